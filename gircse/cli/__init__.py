"""The command line: one file a verb, and the one place where errors become a line and an exit code.

Nothing here imports torch: ``gircse --help`` answers at once.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import os
import sys
import warnings
from contextlib import suppress

import typer
from rich.console import Console
from rich.markup import escape

from gircse._version import __version__
from gircse.cli.ask import ask
from gircse.cli.classify import classify
from gircse.cli.cluster import cluster
from gircse.cli.demo import demo
from gircse.cli.embed import embed
from gircse.cli.evaluate import evaluate
from gircse.cli.explain import explain
from gircse.cli.index import index
from gircse.cli.info import info
from gircse.cli.map import map
from gircse.cli.merge import merge
from gircse.cli.mine import mine
from gircse.cli.report import report
from gircse.cli.rerank import rerank
from gircse.cli.search import search
from gircse.cli.serve import serve
from gircse.cli.similarity import similarity
from gircse.cli.train import train
from gircse.errors import GircseError
from gircse.fast.kernel_caches import limit_kernel_caches

app = typer.Typer(
    name="gircse",
    no_args_is_help=True,
    rich_markup_mode="rich",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS = (
    demo, embed, similarity, explain, index, search, rerank, ask, classify, cluster, map, evaluate, report, train,
    merge, mine, serve, info,
)  # fmt: skip


def _flowing(docstring: str | None) -> str:
    """Help whose paragraphs have a line each, for terminals of any width to break; what is indented stays as it is."""
    paragraphs = inspect.cleandoc(docstring or "").split("\n\n")
    return "\n\n".join(text if text.startswith(" ") else " ".join(text.split("\n")) for text in paragraphs)


for command in VERBS:
    app.command(command.__name__, help=_flowing(command.__doc__))(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gircse {__version__}")
        raise typer.Exit


def _gircse(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Generative text embeddings: a decoder LLM writes soft tokens about a text, and their mean is its vector.

    Results go to standard output, progress and messages to standard error. Exit codes: 0 done, 1 failed, 2 wrong call,
    130 stopped by Ctrl-C.

    [bold]Start here[/bold]

      gircse demo                                    nothing to prepare
      gircse similarity "a cat sleeps" "a kitten naps"
      gircse embed corpus.jsonl -o corpus.parquet    any size, resumable
      gircse explain "who wrote Hamlet?"             what the soft tokens say
      gircse index corpus.jsonl -o corpus.index      then search, ask
      gircse classify mail.txt --labels "complaint, praise, question"
      gircse cluster mail.txt -k 5                   groups, and names for them
      gircse map corpus.parquet --texts corpus.jsonl -o map.html
      gircse evaluate --suite dev --data DIR -o OUT  MTEB's protocol
      gircse serve                                   OpenAI's interface

    [bold]Environment[/bold]

      GIRCSE_HOME       cache of backbones (default $XDG_CACHE_HOME/gircse or ~/.cache/gircse)
      GIRCSE_OFFLINE    1: never ask the network
      GIRCSE_DEBUG      1: show tracebacks, as --debug does
      GIRCSE_PACKED_WEIGHTS  0: weights are never packed (CPU): slower soft tokens
      GIRCSE_STEP_KERNELS  0: no compiled kernels (CPU): slower
      GIRCSE_FUSED_SOFT_TOKEN  0: never compute soft tokens by the Triton kernels (GPU)
      GIRCSE_API_KEY    key that gircse serve asks for
      GIRCSE_LLM_API_KEY  key of the endpoint that gircse ask --llm uses
    """


app.callback(help=_flowing(_gircse.__doc__))(_gircse)


def run() -> None:
    """The command `gircse`: `main`, and then an end without taking a million objects apart, which takes a second."""
    code = 1

    def end() -> None:
        logging.shutdown()  # which was registered before
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # What is registered first runs last: threads have been waited for by then, and what libraries registered is done.
    atexit.register(end)
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        raise


def main() -> None:
    """Run the command line: an error becomes one line on stderr and an exit code; ``--debug`` shows the traceback."""
    debug = "--debug" in sys.argv or os.environ.get("GIRCSE_DEBUG") == "1"
    if os.environ.get("GIRCSE_OFFLINE") == "1":  # said to the libraries too, which read it when they are imported
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:  # libgomp's threads wait busily, in turn for those of another process
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not debug:
        warnings.filterwarnings("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        limit_kernel_caches()
        app()
    except GircseError as error:
        if debug:
            raise
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("stopped by Ctrl-C", 130)
    except SystemExit as stop:  # what Typer makes of Ctrl-C, without a word
        if isinstance(getattr(stop.__context__, "__cause__", None), KeyboardInterrupt):
            _fail("stopped by Ctrl-C", 130)
        raise
    except BrokenPipeError:
        # The reader of our output has gone (`gircse ... | head`); flushing at exit must not complain about it either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, OSError) and error.filename and error.strerror:
            _fail(f"{error.filename}: {error.strerror}", 1)
        _fail(f"{type(error).__name__}: {' '.join(str(error).split())} (--debug shows where)", 1)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True, highlight=False)
    sys.exit(code)
