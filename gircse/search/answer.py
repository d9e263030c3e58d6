"""Answers a question from passages that a search found, with numbered citations to them.

Knows passages, messages and how a model of language is asked to write; knows nothing of tables or of the terminal. The
embedder's own backbone writes, on the same weights in memory with the embedding adapter switched off; or any endpoint
that speaks OpenAI's chat protocol does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Protocol

from gircse.errors import UsageError
from gircse.search import DEFAULT_CONTEXT_TOKENS, DEFAULT_MAX_TOKENS, DEFAULT_MIN_SIMILARITY
from gircse.search.citations import cited_numbers, with_citations
from gircse.search.search import SearchHit, SearchIndex

if TYPE_CHECKING:
    from gircse.encoder import GenerativeEncoder

NOTHING_FOUND = "Nothing relevant found."
"""The answer where no passage is similar enough to the question."""

_SYSTEM = (
    "Answer the question from the numbered passages only, in one or two sentences, and cite the passage of each "
    "statement by its number in brackets. If the passages do not answer the question, say that they do not."
)
# Small models do as they are shown rather than as they are told: without these they hardly ever cite.
_EXAMPLES: tuple[tuple[Sequence[str], str, str], ...] = (
    (("Copper conducts electricity well.", "The Danube flows into the Black Sea."),
     "Where does the Danube end?", "The Danube flows into the Black Sea [2]."),
    (("Owls hunt at night.", "Most bats sleep by day.", "Rice is grown in wet fields."),
     "When do owls hunt?", "Owls hunt at night [1]."),
)  # fmt: skip
_LOOP = 24  # tokens; less may be a list or a name that is said again
Message = dict[str, str]


@dataclass(frozen=True)
class Passage:
    """A passage shown to the writer.

    Attributes:
        number: What it is cited by, from 1.
        text: All of it, or its beginning where the budget ended.
        hit: Where it comes from.
    """

    number: int
    text: str
    hit: SearchHit


class Writer(Protocol):
    """Writes a reply to messages, piece by piece."""

    def write(self, messages: Sequence[Message]) -> Iterator[str]:
        """The reply's text in pieces, as it is written."""
        ...


@dataclass(frozen=True)
class Answer:
    """An answer in the making.

    Attributes:
        passages: What the writer is shown, best first; empty where nothing relevant was found.
        pieces: The text, sentence by sentence as it is written, with citations that hold; iterate once.
        best_similarity: Of all passages found, relevant or not; None where nothing at all was found.
    """

    passages: list[Passage]
    pieces: Iterator[str]
    best_similarity: float | None


def ask(
    index: SearchIndex,
    question: str,
    writer: Writer,
    *,
    count_tokens: Callable[[str], int],
    top: int = 3,
    where: str | None = None,
    instruction: str | None = None,
    min_similarity: float = DEFAULT_MIN_SIMILARITY,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> Answer:
    """Search an index and have the answer written from what is found there.

    Args:
        index: With its model.
        question: The question.
        writer: Writes the answer.
        count_tokens: Tokens of a text, for the budget.
        top: Passages (chunks) at most.
        where: An SQL condition over metadata.
        instruction: Of the question; the model's ``query`` prompt where not given.
        min_similarity: A passage below this cosine similarity is not used.
        context_tokens: All passages together.

    Raises:
        UsageError: The question is empty, or the budget below 1.
    """
    hits = index.search(question, top=top, where=where, instruction=instruction, chunks=True)
    return answer(question, hits, writer, count_tokens, min_similarity=min_similarity, context_tokens=context_tokens)


def answer(
    question: str,
    hits: Sequence[SearchHit],
    writer: Writer,
    count_tokens: Callable[[str], int],
    *,
    min_similarity: float = DEFAULT_MIN_SIMILARITY,
    context_tokens: int = DEFAULT_CONTEXT_TOKENS,
) -> Answer:
    """The same over passages that are there already. Without a relevant one the writer is not asked at all."""
    best = max((hit.similarity for hit in hits if hit.similarity is not None), default=None)
    relevant = [hit for hit in hits if hit.similarity is not None and hit.similarity >= min_similarity]
    passages = within_budget(relevant, count_tokens, context_tokens)
    if not passages:
        return Answer([], iter([NOTHING_FOUND]), best)
    written = writer.write(build_messages(question, passages))
    return Answer(passages, with_citations(written, [passage.text for passage in passages]), best)


def within_budget(hits: Sequence[SearchHit], count_tokens: Callable[[str], int], budget: int) -> list[Passage]:
    """Numbered passages, best first, until the next one does not fit; the very first is cut at a word instead."""
    if budget < 1:
        raise UsageError(f"context tokens must be 1 or more, not {budget}")
    passages: list[Passage] = []
    left = budget
    for number, hit in enumerate(hits, start=1):
        text = hit.text if number > 1 else _cut(hit.text, count_tokens, budget)
        left -= count_tokens(text)
        if left < 0:
            break
        passages.append(Passage(number, text, hit))
    return passages


def _cut(text: str, count_tokens: Callable[[str], int], budget: int) -> str:
    """The longest beginning, in words, that fits."""
    if count_tokens(text) <= budget:
        return text
    ends = [match.start() for match in re.finditer(r"\s+", text)]
    low, high = 0, len(ends)  # of so many words it is known that they fit; of more than `high`, that they do not
    while low < high:
        middle = (low + high + 1) // 2
        if count_tokens(text[: ends[middle - 1]]) <= budget:
            low = middle
        else:
            high = middle - 1
    return text[: ends[low - 1]] if low else ""


def build_messages(question: str, passages: Sequence[Passage]) -> list[Message]:
    """What the writer is asked."""
    messages: list[Message] = [{"role": "system", "content": _SYSTEM}]
    for texts, example, reply in _EXAMPLES:
        messages.append({"role": "user", "content": _question_text(example, texts)})
        messages.append({"role": "assistant", "content": reply})
    shown = [passage.text for passage in passages]
    return [*messages, {"role": "user", "content": _question_text(question, shown)}]


def _question_text(question: str, texts: Sequence[str]) -> str:
    shown = "\n".join(f"[{number}] {' '.join(text.split())}" for number, text in enumerate(texts, start=1))
    return f"Passages:\n{shown}\n\nQuestion: {question.strip()}"


def cited(text: str, passages: Sequence[Passage]) -> list[Passage]:
    """The passages that an answer cites, in their order; numbers that no passage has are ignored."""
    numbers = cited_numbers(text)
    return [passage for passage in passages if passage.number in numbers]


def repeats(tokens: Sequence[int]) -> bool:
    """Whether the end of a text is one stretch three times over: a small model does not leave such a loop by itself."""
    for length in range(_LOOP // 3, len(tokens) // 3 + 1):
        if not tokens[-1] == tokens[-1 - length] == tokens[-1 - 2 * length]:
            continue  # so it is after nearly every token
        first, second, third = (tokens[len(tokens) - count * length :][:length] for count in (3, 2, 1))
        if first == second == third:
            return True
    return False


class BackboneWriter:
    """The embedder's backbone as a writer: no second copy of the weights, and the adapter off while it writes.

    Nothing may be embedded while a reply is being written: both use the same layers.

    Args:
        encoder: Of a `gircse.GIRCSE`.
        max_tokens: Longest reply.
    """

    def __init__(self, encoder: GenerativeEncoder, max_tokens: int = DEFAULT_MAX_TOKENS) -> None:
        if max_tokens < 1:
            raise UsageError(f"a reply needs 1 token or more, not {max_tokens}")
        self.encoder, self.max_tokens = encoder, max_tokens

    def count_tokens(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.encoder.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)

    def write(self, messages: Sequence[Message]) -> Iterator[str]:
        """The most likely reply, greedily, in pieces; it ends early where it repeats itself.

        Raises:
            UsageError: Messages and reply are together longer than the backbone's positions.
        """
        import torch
        from transformers import StoppingCriteriaList, TextIteratorStreamer

        from gircse.adapter import adapter_off

        encoder = self.encoder
        if encoder.frozen:
            raise UsageError("with 8-bit or packed weights the plain LLM is gone; load the model again")
        ids = encoder.tokenizer(self._prompt(messages), add_special_tokens=False, verbose=False).input_ids
        limit = encoder.decoder.max_positions
        if len(ids) + self.max_tokens > limit:
            raise UsageError(
                f"{len(ids)} tokens of question and passages and {self.max_tokens} of the answer exceed the backbone's "
                f"{limit} positions; lower --context-tokens"
            )
        streamer = TextIteratorStreamer(encoder.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
        stopped, failures = Event(), []

        def stops(written: torch.Tensor, _: Any) -> bool:
            return stopped.is_set() or repeats(written[0, len(ids) :].tolist())

        def generate() -> None:
            try:
                with adapter_off(encoder.backbone), torch.inference_mode():
                    inputs = torch.tensor([ids], device=encoder.backbone.device)
                    encoder.backbone.generate(  # type: ignore[operator]
                        inputs,
                        attention_mask=torch.ones_like(inputs),
                        streamer=streamer,
                        max_new_tokens=self.max_tokens,
                        do_sample=False,
                        eos_token_id=self._ends(),
                        pad_token_id=self._ends()[0],
                        stopping_criteria=StoppingCriteriaList([stops]),  # type: ignore[list-item]
                    )
            except BaseException as error:
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            yield from (piece for piece in streamer if piece)
        finally:
            stopped.set()  # whoever asked may have stopped reading
            thread.join()
        if failures:
            raise failures[0]

    def _prompt(self, messages: Sequence[Message]) -> str:
        tokenizer: Any = self.encoder.tokenizer
        if tokenizer.chat_template:
            return tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        answered = {"assistant": "Answer: "}  # without a template it is a base model, which goes on with a text
        text = "\n\n".join(answered.get(message["role"], "") + message["content"] for message in messages)
        return f"{text}\n\nAnswer:"

    def _ends(self) -> list[int]:
        """Tokens that end a reply, as tokenizer and backbone name them."""
        backbone = self.encoder.backbone
        places: list[Any] = [self.encoder.tokenizer, backbone.generation_config, backbone.config]
        ends: set[int] = set()
        for place in places:
            found = getattr(place, "eos_token_id", None)
            ends.update(end for end in (found if isinstance(found, list) else [found]) if isinstance(end, int))
        return sorted(ends) or [0]
