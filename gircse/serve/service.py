"""What the requests mean: limits, prompts, token counts, ranking. Knows the engine and the model; knows no HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from gircse.errors import UsageError
from gircse.groups.classify import check_labels, texts_of_labels
from gircse.serve.engine import Engine, ModelBackend
from gircse.serve.metrics import Metrics
from gircse.serve.refusals import (
    BusyError,
    InvalidRequestError,
    TimedOutError,
    TooLargeError,
    UnknownModelError,
)  # fmt: skip
from gircse.serve.settings import InputType, ServeSettings, fit_to_model

if TYPE_CHECKING:
    from gircse.encoder import TokenizedTexts
    from gircse.explanation import SoftTokenContent
    from gircse.model import GIRCSE

logger = logging.getLogger("gircse.serve")

_TEXTS_AT_ONCE = 64  # tokenised before others get their turn


@dataclass(frozen=True)
class Embedded:
    """Vectors of a request.

    Attributes:
        vectors: (n, d) float32 of length 1.
        tokens: Prompt tokens, instructions included.
        truncated: Texts that were cut.
        num_steps: K that was used.
    """

    vectors: np.ndarray
    tokens: int
    truncated: int
    num_steps: int


@dataclass(frozen=True)
class Ranking:
    """Documents by their similarity to a query.

    Attributes:
        order: Indices of the documents, best first.
        scores: Their cosine similarities, in the same order.
        tokens: Prompt tokens of query and documents.
        truncated: Texts that were cut.
        num_steps: K that was used.
    """

    order: list[int]
    scores: list[float]
    tokens: int
    truncated: int
    num_steps: int


@dataclass(frozen=True)
class Classes:
    """Texts by their similarity to the names of classes.

    Attributes:
        scores: (texts, classes) cosine similarities.
        tokens: Prompt tokens of texts and names.
        truncated: Texts that were cut.
        num_steps: K that was used.
    """

    scores: np.ndarray
    tokens: int
    truncated: int
    num_steps: int


@dataclass(frozen=True)
class Explained:
    """A text's soft tokens.

    Attributes:
        steps: What each is made of.
        tokens: Prompt tokens of the text.
    """

    steps: list[SoftTokenContent]
    tokens: int


class Service:
    """A model behind an engine, with the limits of the settings.

    Args:
        model: The model.
        settings: Limits.
        default_name: Name of the model where the settings give none.
        engine: Instead of one over the model; for tests.

    Raises:
        UsageError: The model cannot keep the limits.
    """

    def __init__(
        self, model: GIRCSE, settings: ServeSettings, default_name: str = "gircse", engine: Engine | None = None
    ) -> None:
        self.model, self.settings = model, settings
        self.limits = fit_to_model(settings, model, default_name)
        self.metrics = Metrics()
        self.engine = engine or Engine(
            ModelBackend(model), batch_tokens=self.limits.batch_tokens, on_batch=self.metrics.observe_batch
        )
        self.metrics.watch_queue(lambda: self.engine.queue_length)
        self.dimension = cast(int, model.get_embedding_dimension())
        self._stop_before: float | None = None
        self._texts = 0  # admitted and not answered yet
        self._tokenizing = ThreadPoolExecutor(4, thread_name_prefix="gircse-tokenize")
        # No token stands for more characters than the longest; a longer text need not be tokenised to be refused.
        self._max_characters = self.limits.max_tokens * max(map(len, model.encoder.tokenizer.get_vocab()))
        self._vocabulary = model.encoder.decoder.vocabulary.embedding.num_embeddings

    def start(self) -> None:
        """Start the engine."""
        self.engine.start()

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self.engine.healthy and self._stop_before is None

    def begin_stop(self) -> None:
        """The grace period begins, and the server is not ready any more."""
        if self._stop_before is None:
            logger.info("stopping: finishing what is queued", extra={"facts": {"texts": self._texts}})
            self._stop_before = time.monotonic() + self.settings.grace_period

    async def stop(self) -> bool:
        """Finish what is queued within what is left of the grace period; whether all of it was."""
        self.begin_stop()
        left = (self._stop_before or 0.0) - time.monotonic()
        finished = await asyncio.to_thread(self.engine.stop, max(left, 1.0))
        self._tokenizing.shutdown(wait=False, cancel_futures=True)
        return finished

    async def embed(
        self,
        inputs: Sequence[str] | Sequence[Sequence[int]],
        *,
        model: str | None = None,
        instruction: str | None = None,
        input_type: InputType | None = None,
        num_steps: int | None = None,
        dimensions: int | None = None,
    ) -> Embedded:
        """Embed texts, or token ids of the model's own tokenizer.

        Args:
            inputs: Texts or lists of token ids.
            model: The name that the request calls the model by.
            instruction: Put before texts.
            input_type: What the texts are: the model's own prompt for that is put before them. Plain texts where
                neither is given.
            num_steps: K; the server's where not given.
            dimensions: Keep the first so many, then scale to length 1 again.

        Raises:
            Refusal: A limit is exceeded, or the model failed.
        """
        self.check_model(model)
        steps = self._check_steps(num_steps)
        if dimensions is not None and not 1 <= dimensions <= self.dimension:
            raise InvalidRequestError(
                f"dimensions must be between 1 and {self.dimension}, not {dimensions}", param="dimensions"
            )
        self._check_items(len(inputs), "input")
        if instruction is not None and input_type is not None:
            raise InvalidRequestError(
                "give an instruction or an input_type, not both: either says what stands before the texts",
                param="input_type",
            )
        async with self._admitted(len(inputs)):
            if isinstance(inputs[0], str):
                prompt = self._prompt(instruction, input_type)
                ids, truncated = await self._tokenize(cast("Sequence[str]", inputs), prompt, "input")
            elif instruction is not None or input_type is not None:
                named = "an instruction" if input_type is None else "an input_type"
                raise InvalidRequestError(f"{named} needs inputs given as text, not token ids", param="input")
            else:
                ids, truncated = self._check_ids(cast("Sequence[Sequence[int]]", inputs))
            vectors = await asyncio.wrap_future(self.engine.submit(ids, steps))
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True).clip(1e-12)
        return Embedded(vectors, sum(map(len, ids)), truncated, steps)

    async def rerank(
        self,
        query: str,
        documents: Sequence[str],
        *,
        model: str | None = None,
        instruction: str | None = None,
        num_steps: int | None = None,
        top_n: int | None = None,
    ) -> Ranking:
        """Order documents by their cosine similarity to a query, each under the model's own prompt for its role.

        Args:
            query: The query.
            documents: The documents.
            model: As in `embed`.
            instruction: Of the query, instead of the model's.
            num_steps: As in `embed`.
            top_n: How many to keep; all where not given.

        Raises:
            Refusal: As in `embed`.
        """
        self.check_model(model)
        steps = self._check_steps(num_steps)
        self._check_items(len(documents), "documents")
        async with self._admitted(len(documents) + 1):
            ids, truncated = await self._tokenize([query], self._prompt(instruction, "query"), "query")
            more, cut = await self._tokenize(documents, self.own_prompt("document"), "documents")
            vectors = await asyncio.wrap_future(self.engine.submit(ids + more, steps))
        scores = vectors[1:] @ vectors[0]
        order = np.argsort(-scores, kind="stable")[:top_n].tolist()
        tokens = sum(map(len, ids)) + sum(map(len, more))
        return Ranking(order, scores[order].tolist(), tokens, truncated + cut, steps)

    async def classify(
        self,
        texts: Sequence[str],
        labels: Sequence[str],
        *,
        instruction: str,
        model: str | None = None,
        num_steps: int | None = None,
    ) -> Classes:
        """Cosine similarities between texts and names of classes, all under the instruction.

        Args:
            texts: The texts.
            labels: As `gircse.groups.classify.Classifier.from_labels` takes them.
            instruction: What the classes are about.
            model: As in `embed`.
            num_steps: As in `embed`.

        Raises:
            Refusal: As in `embed`; texts and names together are the items of the request.
        """
        self.check_model(model)
        steps = self._check_steps(num_steps)
        try:
            check_labels(labels)
        except UsageError as error:
            raise InvalidRequestError(str(error), param="labels") from error
        self._check_items(len(texts) + len(labels), "input")
        async with self._admitted(len(texts) + len(labels)):
            prompt = self._prompt(instruction, None)
            ids, truncated = await self._tokenize(texts, prompt, "input")
            names, cut = await self._tokenize(texts_of_labels(labels), prompt, "labels")
            vectors = await asyncio.wrap_future(self.engine.submit(ids + names, steps))
        scores = vectors[: len(texts)] @ vectors[len(texts) :].T
        return Classes(scores, sum(map(len, ids)) + sum(map(len, names)), truncated + cut, steps)

    async def explain(
        self, text: str, *, instruction: str | None = None, num_steps: int | None = None, top: int = 5
    ) -> Explained:
        """What each soft token of a text is made of; see `GIRCSE.explain`.

        Raises:
            Refusal: As in `embed`; a text is never cut here.
        """
        steps = self._check_steps(num_steps)
        if steps < 1:
            raise InvalidRequestError("num_steps must be 1 or more: without steps there is nothing to explain")
        async with self._admitted(1):
            prompt = self._prompt(instruction, None)
            ids, _ = await self._tokenize([text], prompt, "input", may_cut=False)

            def work() -> list[SoftTokenContent]:
                return self.model.explain(
                    text, prompt=prompt, num_steps=steps, top=top, max_length=self.limits.max_tokens
                )

            contents = await asyncio.wrap_future(self.engine.call(work, len(ids[0]), steps))
        return Explained(contents, len(ids[0]))

    # Prompts

    def own_prompt(self, input_type: InputType) -> str:
        """What the model itself puts before such texts; empty where it has nothing."""
        return self.model.prompts.get(input_type) or ""

    def _prompt(self, instruction: str | None, input_type: InputType | None) -> str:
        """The instruction where there is one, else the model's own prompt for such texts."""
        if instruction is not None:
            try:
                return self.model.format_instruction(instruction)
            except UsageError as error:
                raise InvalidRequestError(str(error), param="instruction") from error
        return self.own_prompt(input_type) if input_type else ""

    # Limits

    def check_model(self, name: str | None) -> None:
        """Refuse a name that is not served.

        Raises:
            UnknownModelError: It is not.
        """
        if name is not None and name not in self.limits.names:
            raise UnknownModelError(
                f"there is no model {name[:80]!r} here; this server has {', '.join(self.limits.names)} "
                "(--served-name gives it other names)",
                param="model",
            )

    def _check_steps(self, num_steps: int | None) -> int:
        if num_steps is None:
            return self.limits.num_steps
        if not 0 <= num_steps <= self.settings.max_num_steps:
            raise InvalidRequestError(
                f"num_steps must be between 0 and {self.settings.max_num_steps}, not {num_steps}", param="num_steps"
            )
        return num_steps

    def _check_items(self, count: int, param: str) -> None:
        if not 1 <= count <= self.settings.max_items:
            raise InvalidRequestError(
                f"a request takes between 1 and {self.settings.max_items} items, not {count}; send several", param=param
            )

    def _check_ids(self, inputs: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], int]:
        limit, kept, truncated = self.limits.max_tokens, [], 0
        for index, ids in enumerate(inputs):
            if min(ids) < 0 or max(ids) >= self._vocabulary:
                raise InvalidRequestError(
                    f"input[{index}] has token ids outside of this model's vocabulary (0 to {self._vocabulary - 1}); "
                    "send text, or ids of this model's own tokenizer",
                    param="input",
                )
            if len(ids) > limit and self.settings.long_texts == "refuse":
                raise self._too_long(f"input[{index}]", len(ids), "input")
            truncated += len(ids) > limit
            kept.append(ids[:limit])
        return kept, truncated

    async def _tokenize(
        self, texts: Sequence[str], prompt: str, param: str, *, may_cut: bool = True
    ) -> tuple[list[list[int]], int]:
        """Token ids of the texts, and how many of them were cut."""
        refuse = self.settings.long_texts == "refuse" or not may_cut
        for index, text in enumerate(texts):
            if refuse and len(text) > self._max_characters:
                raise self._too_long(_place(param, index), None, param)
        texts = [text[: self._max_characters] for text in texts]
        loop = asyncio.get_running_loop()
        ids: list[list[int]] = []
        truncated = 0
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            chunk = texts[start : start + _TEXTS_AT_ONCE]
            try:
                tokenized = await loop.run_in_executor(self._tokenizing, self._tokenize_chunk, chunk, prompt)
            except UsageError as error:  # the instruction alone is too long
                raise InvalidRequestError(str(error), param="instruction") from error
            if refuse and any(tokenized.truncated):
                raise self._too_long(_place(param, start + tokenized.truncated.index(True)), None, param)
            ids += tokenized.ids
            truncated += sum(tokenized.truncated)
        return ids, truncated

    def _tokenize_chunk(self, texts: Sequence[str], prompt: str) -> TokenizedTexts:
        return self.model.tokenize_texts(texts, prompt, self.limits.max_tokens)

    def _too_long(self, what: str, length: int | None, param: str) -> TooLargeError:
        has = f"has {length} tokens" if length else "is too long"
        return TooLargeError(
            f"{what} {has}; this server takes {self.limits.max_tokens} tokens a text, instruction included: "
            "split it, or start the server with --long-texts cut",
            param=param,
            code="context_length_exceeded",
        )

    @asynccontextmanager
    async def _admitted(self, texts: int) -> AsyncIterator[None]:
        """A place in the queue for so many texts and a limit on the time they take."""
        limit = self.settings.max_queue_texts
        if self._texts + texts > limit:
            seconds = self._texts / self.engine.texts_per_second if self.engine.texts_per_second else 1
            retry_after = min(max(math.ceil(seconds), 1), 60)
            raise BusyError(
                f"{self._texts} texts are waiting and this server's limit is {limit}; try again in {retry_after} s",
                retry_after,
            )
        self._texts += texts
        timeout = self.settings.request_timeout
        try:
            async with asyncio.timeout(timeout):
                yield
        except TimeoutError as error:
            raise TimedOutError(
                f"the request took longer than this server's limit of {timeout:g} s; send fewer texts at once"
            ) from error
        finally:
            self._texts -= texts


def _place(param: str, index: int) -> str:
    return param if param == "query" else f"{param}[{index}]"
