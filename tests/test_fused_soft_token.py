"""The soft token as attention over the vocabulary, in Triton's interpreter: values, gradients, and when it is taken."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gircse.fast import fused_soft_token as fused
from gircse.soft_tokens import Vocabulary

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    """All tensors on the GPU where there is one; else conftest.py has asked for Triton's interpreter."""
    torch.set_default_device("cuda" if torch.cuda.is_available() else "cpu")
    yield
    torch.set_default_device(None)


def plain(hidden: Tensor, head: Tensor, table: Tensor, scale: float) -> Tensor:
    """What the kernels should compute."""
    return torch.softmax((hidden @ head.T).float() * scale, dim=-1).to(table.dtype) @ table


@pytest.mark.parametrize(
    ("rows", "tokens", "width", "tied"),
    [(5, 1000, 48, True), (40, 333, 72, False), (1, 33, 16, True), (16, 96, 64, False), (3, 7, 20, True)],
)
def test_values_and_gradients_are_those_of_the_plain_products(rows: int, tokens: int, width: int, tied: bool) -> None:
    torch.manual_seed(rows)
    head = torch.randn(tokens, width) / 2
    table = head if tied else torch.randn(tokens, width)
    hidden, grad = torch.randn(rows, width, requires_grad=True), torch.randn(rows, width)
    same = hidden.detach().clone().requires_grad_()
    found, expected = fused.fused_soft_token(hidden, head, table, 0.7), plain(same, head, table, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(hidden.grad, same.grad, rtol=1e-4, atol=1e-5)


def test_half_precision_rounds_no_more_than_the_plain_products() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(9, 48), torch.randn(500, 48) / 2
    exact = plain(hidden, head, head, 1.0)
    rounded = plain(hidden.half(), head.half(), head.half(), 1.0).float()
    found = fused.fused_soft_token(hidden.half(), head.half(), head.half(), 1.0)
    assert found.dtype == torch.float16
    assert (found.float() - exact).abs().max() <= 1.5 * (rounded - exact).abs().max()


def test_large_logits_do_not_overflow() -> None:
    torch.manual_seed(0)
    hidden, head = torch.tensor([[200.0] * 16, [-200.0] * 16]), torch.randn(70, 16)
    torch.testing.assert_close(fused.fused_soft_token(hidden, head, head, 1.0), plain(hidden, head, head, 1.0))


@pytest.fixture
def vocabulary(monkeypatch: pytest.MonkeyPatch) -> Vocabulary:
    """Frozen float16 ends of a vocabulary, on a machine that passes for one with a GPU."""
    torch.manual_seed(0)
    monkeypatch.setattr(fused, "_has_kernels", lambda device: True)
    monkeypatch.setattr(fused, "_faster", {})
    embedding = nn.Embedding(90, 16)
    head = nn.Linear(16, 90, bias=False)
    head.weight = embedding.weight
    return Vocabulary(head.half().requires_grad_(False), embedding)


def stopwatch(*seconds: float) -> Callable[..., float]:
    """Says these in turn, kernels first, whatever is run."""
    turns = iter(seconds * 5)

    def read(work: Callable[[], object], device: torch.device) -> float:
        work()
        return next(turns)

    return read


@pytest.mark.parametrize(("seconds", "taken"), [((1.0, 2.0), True), ((1.0, 1.0), False), ((2.0, 1.0), False)])
def test_the_kernels_are_taken_only_where_they_measure_faster(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, ...], taken: bool
) -> None:
    hidden = torch.randn(4, 16, dtype=torch.float16)
    expected = vocabulary.probabilities(hidden, 0.5).half() @ vocabulary.embedding.weight
    monkeypatch.setattr(fused, "_seconds", stopwatch(*seconds))
    calls = []
    monkeypatch.setattr("gircse.soft_tokens.fused_soft_token", spy := _spy(calls))
    found = vocabulary.soft_token(hidden, 0.5)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    measured = len(calls)
    vocabulary.soft_token(hidden[:3], 0.5)  # of the same size: not measured again
    assert len(calls) - measured == (1 if taken else 0)
    assert spy is not fused.fused_soft_token


def _spy(calls: list[Any]) -> Callable[..., Tensor]:
    def call(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return fused.fused_soft_token(*args, **kwargs)

    return call


@pytest.mark.parametrize("fault", ["raises", "wrong", "nan"])
def test_kernels_that_fail_or_err_are_left_alone_with_a_warning(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    def broken(hidden: Tensor, **kwargs: Any) -> Tensor:
        if fault == "raises":
            raise RuntimeError("no compiler")
        return hidden * (float("nan") if fault == "nan" else 7.0)

    monkeypatch.setattr("gircse.soft_tokens.fused_soft_token", broken)
    hidden = torch.randn(4, 16, dtype=torch.float16)
    expected = vocabulary.probabilities(hidden, 1.0).half() @ vocabulary.embedding.weight
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            torch.testing.assert_close(vocabulary.soft_token(hidden), expected)
    assert len(caplog.records) == 1


def test_what_the_kernels_cannot_do_is_left_to_the_plain_products(vocabulary: Vocabulary) -> None:
    hidden, table = torch.randn(4, 16, dtype=torch.float16), vocabulary.embedding.weight
    assert fused.is_possible(vocabulary.head, table, hidden)
    assert not fused.is_possible(vocabulary.head, table, hidden.float())
    assert not fused.is_possible(vocabulary.head, table[:50], hidden)
    assert not fused.is_possible(nn.Linear(16, 90).half().requires_grad_(False), table, hidden)
    assert not fused.is_possible(vocabulary.head, table, torch.randn(4, 2048, dtype=torch.float16))
    table.requires_grad_()
    assert not fused.is_possible(vocabulary.head, table, hidden)
    with torch.no_grad():
        assert fused.is_possible(vocabulary.head, table, hidden)


def test_a_cpu_has_no_kernels_and_a_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused._has_kernels(torch.device("cpu"))
    assert fused._has_kernels(torch.device("cuda"))
    monkeypatch.setenv("GIRCSE_FUSED_SOFT_TOKEN", "0")
    assert not fused._has_kernels(torch.device("cuda"))


COMPILE = """
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from gircse.fast import fused_soft_token as fused, soft_token_kernels as kernels

kernel = getattr(kernels, sys.argv[1])
constants = {"ROWS": fused.ROWS, "TOKENS": fused.TOKENS, "WIDTH": fused.MOST_WIDTH, "TIED": False, "PRECISION": "tf32"}
kinds = {"scale": "fp32"} | dict.fromkeys(("hidden", "head", "table", "grad"), "*bf16")
kinds |= dict.fromkeys(("rows", "tokens", "width", "tokens_a_part"), "i32") | dict.fromkeys(constants, "constexpr")
names = kernel.arg_names
source = ASTSource(
    fn=kernel,
    signature={name: kinds.get(name, "*fp32") for name in names},
    constexprs={(names.index(name),): value for name, value in constants.items()},
)
print(compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "num_stages": 1}).metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soft_token_forward", "soft_token_backward"])
def test_the_kernels_compile_for_a_gpu_and_fit_it(name: str) -> None:
    """Triton compiles without a GPU at hand: for sm_90, whose multiprocessors share 227 KiB."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 227 * 1024
