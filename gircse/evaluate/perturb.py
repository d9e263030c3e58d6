"""Noise put into texts on purpose, the same for the same seed and text: how robust are the embeddings to it?

Knows strings; knows nothing of models or tasks.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from hashlib import blake2b

from gircse.errors import UsageError

DESCRIPTIONS = {
    "typos": "in one word of five, two neighbouring letters swapped, or a letter dropped, doubled or replaced",
    "case": "letters of the whole text in upper case, lower case or swapped case, one of the three at random",
    "truncate": "the last third of the words cut off",
    "noise": "one character of twenty followed by a random punctuation mark or digit",
}
"""What each perturbation does; `perturb` takes their names."""


def perturb(text: str, kind: str, seed: int) -> str:
    """The text with one kind of noise.

    Args:
        text: Any text.
        kind: A key of `DESCRIPTIONS`.
        seed: The same seed and text give the same result, whatever else is perturbed.

    Raises:
        UsageError: Unknown kind.
    """
    if kind not in _PERTURBATIONS:
        raise UsageError(f"unknown perturbation {kind!r}; choose from {', '.join(DESCRIPTIONS)}")
    digest = blake2b(f"{seed} {kind} {text}".encode(errors="surrogatepass"), digest_size=8).digest()
    return _PERTURBATIONS[kind](text, random.Random(int.from_bytes(digest, "little")))


def _typos(text: str, generator: random.Random) -> str:
    return " ".join(_typo(word, generator) if generator.random() < 0.2 else word for word in text.split(" "))


def _typo(word: str, generator: random.Random) -> str:
    if len(word) < 2:
        return word
    at = generator.randrange(len(word) - 1)
    edit = generator.randrange(4)
    if edit == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    if edit == 1:
        return word[:at] + word[at + 1 :]
    if edit == 2:
        return word[: at + 1] + word[at:]
    return word[:at] + generator.choice(string.ascii_lowercase) + word[at + 1 :]


def _case(text: str, generator: random.Random) -> str:
    return generator.choice((str.upper, str.lower, str.swapcase))(text)


def _truncate(text: str, generator: random.Random) -> str:
    words = text.split()
    return " ".join(words[: max(1, len(words) - len(words) // 3)])


def _noise(text: str, generator: random.Random) -> str:
    marks = string.punctuation + string.digits
    return "".join(c + generator.choice(marks) if generator.random() < 0.05 else c for c in text)


_PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "typos": _typos,
    "case": _case,
    "truncate": _truncate,
    "noise": _noise,
}
