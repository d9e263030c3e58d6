"""Evaluation in MTEB's protocol: local or hub tasks, every K from one encode, intervals, costs, a report.

Nothing here prints. The command line is `gircse.cli.evaluate` and `gircse.cli.report`.
"""

from __future__ import annotations

from importlib.util import find_spec

from gircse.errors import MissingExtraError

if any(find_spec(module) is None for module in ("mteb", "matplotlib", "yaml", "jinja2")):
    raise MissingExtraError("evaluation", "eval")
