"""Compiled kernels, each against PyTorch's operations."""

from __future__ import annotations

import copy
from importlib.machinery import EXTENSION_SUFFIXES
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import gircse
from gircse import soft_tokens
from gircse.fast import step_kernels
from gircse.fast.int8 import Int8Linear, WidenedInt8Linear
from gircse.fast.kernel_steps import takes_kernels
from gircse.fast.norms import frugal_norm
from gircse.fast.packed_linear import PackedLinear, packs_in_place
from gircse.fast.packed_weights import ROWS_PACKED_FOR
from tests.kernel_models import DTYPES, TOLERANCE, forget, kernel_model, skip_without_int8
from tests.tiny import relative_error


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"), reason="another processor")
def test_installation_compiles_where_there_is_a_compiler() -> None:
    """Without this test, one with a mistake in its source would leave all others skipped."""
    import shutil
    import sysconfig

    if shutil.which((sysconfig.get_config_var("CXX") or "c++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    folder = Path(gircse.__file__).parent / "fast"
    newest = max(source.stat().st_mtime for source in (folder / "kernels").glob("*.*"))
    for name in ("_step_kernels_avx512", "_step_kernels_avx2", "_matrix_kernels", "_bfloat16_kernels", "_int8_kernels"):
        made = [path for suffix in EXTENSION_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()]
        assert made, f"{name} does not compile"
        assert made[0].stat().st_mtime >= newest, "of an older source: install again, and see what the compiler says"
    assert step_kernels.library() is not None


def test_a_library_of_another_source_is_not_used(compiled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setattr(step_kernels, "VERSION", step_kernels.VERSION + 1)
    assert step_kernels.library() is None
    assert not step_kernels.serves(torch.float32, 64)


def test_an_environment_variable_switches_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setenv("GIRCSE_STEP_KERNELS", "0")
    assert step_kernels.library() is None
    with torch.no_grad():
        assert not takes_kernels(kernel_model())
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "shared", "width"), [(9, 3, 64), (5, 1, 128), (4, 4, 96), (6, 1, 256), (2, 1, 16)])
@pytest.mark.parametrize("prefix_length", [0, 5])
def test_attention(heads: int, shared: int, width: int, prefix_length: int, dtype: torch.dtype, compiled: str) -> None:
    torch.manual_seed(0)
    rows, capacity, length = 3, 40, 37
    keys, values = (torch.randn(rows, shared, capacity, width).to(dtype) for _ in range(2))
    query, key, value = (torch.randn(rows, n, width).to(dtype) for n in (heads, shared, shared))
    prefix = torch.randn(shared, prefix_length, width).to(dtype), torch.randn(shared, prefix_length, width).to(dtype)
    starts = torch.tensor([0, 37, 20])
    seen = torch.arange(length + 1) >= starts.unsqueeze(1)  # (rows, length + 1)
    both = [
        torch.cat([first.expand(rows, -1, -1, -1), own[:, :, :length], new.unsqueeze(2)], dim=2).float()
        for first, own, new in zip(prefix, (keys, values), (key, value), strict=True)
    ]
    mask = torch.cat([torch.ones(rows, prefix_length, dtype=torch.bool), seen], dim=1)[:, None, None]
    expected = F.scaled_dot_product_attention(
        query.float().unsqueeze(2), *both, attn_mask=mask, scale=0.2, enable_gqa=True
    ).squeeze(2)
    found = step_kernels.attend(query, key, value, (keys, values), starts, length, 0.2, prefix)
    assert relative_error(found, expected) <= TOLERANCE[dtype]
    assert torch.equal(keys[:, :, length], key)
    assert torch.equal(values[:, :, length], value)
    with pytest.raises(ValueError, match="more positions"):
        step_kernels.attend(query, key, value, (keys, values), starts, capacity, 0.2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 70])
def test_positions_norms_and_gates(rows: int, dtype: torch.dtype, compiled: str) -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(rows, 9, 64).to(dtype), torch.randn(rows, 64)
    cos, sin = angles.cos(), angles.sin()
    half = torch.cat([-x[..., 32:], x[..., :32]], dim=-1).float()
    expected = x.float() * cos.unsqueeze(1) + half * sin.unsqueeze(1)
    step_kernels.turn(x, cos, sin)
    assert relative_error(x, expected) <= TOLERANCE[dtype]

    states, new = torch.randn(rows, 576).to(dtype), torch.randn(rows, 576).to(dtype)
    weight, total = torch.rand(576).to(dtype), states + new
    normed = step_kernels.add_and_norm(states, new, weight, 1e-5)
    assert torch.equal(states, total), "added in place"
    assert relative_error(normed, frugal_norm(total.float(), weight.float(), 1e-5)) <= TOLERANCE[dtype]
    assert torch.equal(step_kernels.add_and_norm(states, None, weight, 1e-5), normed)
    assert torch.equal(states, total)

    gate, up = 30 * torch.randn(rows, 1536).to(dtype), torch.randn(rows, 1536).to(dtype)
    gate[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.0])
    assert relative_error(step_kernels.gate(gate, up), F.silu(gate.float()) * up.float()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 6, 16, 33, 150])
@pytest.mark.parametrize(("vocabulary", "width"), [(1000, 576), (97, 64), (512, 96), (3, 16), (66, 80)])
def test_soft_tokens(rows: int, vocabulary: int, width: int, dtype: torch.dtype, compiled: str) -> None:
    torch.manual_seed(0)
    hidden, table = torch.randn(rows, width).to(dtype), torch.randn(vocabulary, width).to(dtype)
    hidden[-1] *= 30  # one word has all the weight
    expected = (0.5 * hidden.float() @ table.float().T).softmax(dim=-1) @ table.float()
    assert relative_error(step_kernels.soft_tokens(hidden, table, 0.5), expected) <= 3 * TOLERANCE[dtype]
    hidden[0, 0] = float("nan")
    assert step_kernels.soft_tokens(hidden, table, 0.5)[0].isnan().all()


def test_a_soft_token_is_read_once_where_head_and_table_are_one(compiled: str, taken: dict[str, int]) -> None:
    torch.manual_seed(0)
    vocabulary = kernel_model().vocabulary
    few = step_kernels.MOST_SOFT_TOKENS
    hidden = torch.randn(few, 64)
    with torch.no_grad():
        expected = vocabulary.by_products(hidden, 0.6)
        assert torch.equal(vocabulary.soft_token(hidden, 0.6), expected)
        assert taken["soft tokens"] == 0
        assert relative_error(vocabulary.soft_token(hidden, 0.6, compiled=True), expected) <= 1e-6
        assert taken["soft tokens"] == 1
        vocabulary.soft_token(torch.randn(few + 1, 64), compiled=True)
        assert taken["soft tokens"] == (1 if compiled == "AVX2" else 2), "with AVX512 any number of rows"
        kernel_model("own-heads").vocabulary.soft_token(hidden, compiled=True)
        capped = soft_tokens.Vocabulary(vocabulary.head, vocabulary.embedding, logit_cap=3.0)
        capped.soft_token(hidden, compiled=True)
    assert taken["soft tokens"] == (1 if compiled == "AVX2" else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 6, 16, 33, 64])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [64, 576, 80])
def test_products_with_packed_weights(
    width: int, bias: bool, rows: int, dtype: torch.dtype, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = 192, 64, 80  # in panels of 64, 32 and 16
    if not packs_in_place(dtype):
        pytest.skip("no packed weights on this processor")
    torch.manual_seed(0)
    weights, offsets = [torch.randn(out, width) for out in outputs], [torch.randn(out) for out in outputs]
    pairs = list(zip(weights, offsets if bias else [None] * 3, strict=True))
    layers, x = [PackedLinear(*pair, dtype=dtype) for pair in pairs], torch.randn(rows, width).to(dtype)
    layers = [layer for layer in layers if layer.joins(dtype)]
    if not layers:
        pytest.skip("oneDNN packs otherwise on this processor")
    calls: list[int] = []
    multiply = step_kernels.multiply
    monkeypatch.setattr(step_kernels, "multiply", lambda x, *args: calls.append(len(x)) or multiply(x, *args))
    most = step_kernels.most_product_rows(dtype, width)
    together = PackedLinear.products(x, layers)
    assert len(calls) == (1 if rows <= most else 0)
    for layer, found in zip(layers, together, strict=True):
        offset = None if layer.bias is None else layer.bias.float()
        exact = F.linear(x.float(), layer.matrix().float(), offset)
        assert relative_error(found, exact) <= TOLERANCE[dtype]
        assert torch.equal(layer(x), found)
        assert torch.equal(layer(x.unsqueeze(1)).squeeze(1), found)
    before = len(calls)
    layers[0](torch.randn(most + 1, width).to(dtype))
    assert len(calls) == before, "too many rows"
    hooked: list[int] = []
    layers[0].register_forward_hook(lambda *_: hooked.append(1))
    PackedLinear.products(x, layers)
    assert hooked == [1]


def packed(matrix: torch.Tensor, panel: int) -> torch.Tensor:
    """A weight, (out, in), as oneDNN packs it with so many outputs side by side."""
    together = {torch.float32: 1, torch.bfloat16: 2, torch.int8: 4}[matrix.dtype]
    return matrix.view(-1, panel, matrix.shape[1] // together, together).transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", step_kernels.PANELS)
def test_every_width_of_panels(panel: int, dtype: torch.dtype, compiled: str) -> None:
    """Whatever this processor's oneDNN packs."""
    torch.manual_seed(0)
    weights, x = [torch.randn(n * panel, 96).to(dtype) for n in (3, 1)], torch.randn(35, 96).to(dtype)
    kept = [packed(weight, panel) for weight in weights]
    places = [step_kernels.PackedMatrix(one.data_ptr(), panel, n * panel) for one, n in zip(kept, (3, 1), strict=True)]
    bias = torch.randn(panel).to(dtype)
    first, second = step_kernels.multiply(x, places, [None, bias])
    assert relative_error(first, x.float() @ weights[0].float().T) <= TOLERANCE[dtype]
    assert relative_error(second, F.linear(x.float(), weights[1].float(), bias.float())) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("panel", step_kernels.PANELS)
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 16, 35])
@pytest.mark.parametrize("width", [128, 80])
def test_weights_of_8_bits(width: int, rows: int, panel: int, dtype: torch.dtype, compiled: str) -> None:
    """By vectors and by tiles: the inputs are rounded to 16 bits, and whole numbers do the rest."""
    skip_without_int8(Int8Linear)
    torch.manual_seed(0)
    weights = [torch.randint(-127, 128, (n * panel, width), dtype=torch.int8) for n in (3, 1)]
    scales = [torch.rand(len(weight)) for weight in weights]
    x, bias = (torch.randn(rows, width) * torch.logspace(-3, 3, rows).unsqueeze(1)).to(dtype), torch.randn(panel)
    kept = [
        (packed(one, panel), scale, one.sum(1, dtype=torch.int32)) for one, scale in zip(weights, scales, strict=True)
    ]
    places = [step_kernels.PackedMatrix(a.data_ptr(), panel, len(b), b.data_ptr(), c.data_ptr()) for a, b, c in kept]
    found = step_kernels.multiply(x, places, [None, bias.to(dtype)])
    for weight, scale, offset, out in zip(weights, scales, (0, bias.to(dtype).double()), found, strict=True):
        exact = weight.double() * scale.double().unsqueeze(1)  # (out, in)
        wanted = x.double() @ exact.T + offset
        half_step = x.double().abs().amax(dim=1, keepdim=True) / 127 / 254 / 2  # of the second part
        bound = half_step * exact.abs().sum(dim=1) + TOLERANCE[dtype] * wanted.abs() + 1e-6
        assert bool(((out.double() - wanted).abs() <= bound).all())
    for row in range(rows):
        for alone, out in zip(step_kernels.multiply(x[[row]], places, [None, bias.to(dtype)]), found, strict=True):
            assert relative_error(alone[0], out[row]) <= TOLERANCE[dtype], "a row depends on itself alone"


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("kind", [Int8Linear, WidenedInt8Linear])
def test_inputs_that_are_no_numbers_stay_none(kind: type[Int8Linear], rows: int, compiled: str) -> None:
    skip_without_int8(kind)
    layer, x = kind(torch.randn(64, 64)), torch.randn(rows, 64)
    x[0, 5] = float("nan")
    assert layer.takes(torch.float32)
    assert layer(x)[0].isnan().all()
    assert layer(x)[1:].isfinite().all()


@pytest.mark.parametrize("kind", [Int8Linear, WidenedInt8Linear])
def test_what_kernels_read_stays_where_it_is(kind: type[Int8Linear], compiled: str) -> None:
    """A tensor that is sent to another process has its memory replaced in this one."""
    skip_without_int8(kind)
    torch.manual_seed(0)
    layer, x = kind(torch.randn(64, 64), torch.randn(64)), torch.randn(5, 64)
    expected, before = layer(x), layer.scale.data_ptr()
    ForkingPickler.dumps(layer)
    assert layer.scale.data_ptr() != before, "or there is nothing to fear"
    assert layer.place is not None
    assert layer.place.scales != before
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    layer.bfloat16()
    assert relative_error(layer(x.bfloat16()), expected) <= 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 12, 50])
@pytest.mark.parametrize(("out", "width"), [(32, 16), (96, 576)])
def test_weights_of_8_bits_that_become_float32(
    out: int, width: int, rows: int, dtype: torch.dtype, compiled: str
) -> None:
    torch.manual_seed(0)
    layer = WidenedInt8Linear(torch.randn(out, width), torch.randn(out).to(dtype))
    assert layer.takes(dtype)
    weight, x = layer.matrix() * layer.scale.unsqueeze(1), torch.randn(rows, width).to(dtype)
    assert layer.bias is not None
    found = layer(x)
    assert relative_error(found, F.linear(x.float(), weight, layer.bias.float())) <= TOLERANCE[dtype]
    for row in range(rows):
        assert torch.equal(layer(x[[row]])[0], found[row]), "a row depends on itself alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Int8Linear, WidenedInt8Linear])
def test_layers_of_8_bits_are_multiplied_by_kernels(
    kind: type[Int8Linear], dtype: torch.dtype, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_int8(kind)
    torch.manual_seed(0)
    layers = [kind(torch.randn(out, 128), torch.randn(out).to(dtype)) for out in (192, 64)]
    many = 300
    x, calls = torch.randn(many, 128).to(dtype), []
    multiply = step_kernels.multiply
    monkeypatch.setattr(step_kernels, "multiply", lambda x, *args: calls.append(len(x)) or multiply(x, *args))
    found = Int8Linear.products(x, layers)
    assert calls == [256, 44], "always, some rows at a time"
    few = Int8Linear.products(x[:100], layers)
    assert calls.pop() == 100
    for layer, all_rows, some in zip(layers, found, few, strict=True):
        assert relative_error(all_rows[: len(some)], some) <= TOLERANCE[dtype]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_kernels, "serves", lambda *_: False)
            assert not layer.takes(dtype)
            assert relative_error(layer(x), all_rows) <= TOLERANCE[dtype], "as PyTorch's operations"
    mixed = [layers[0], PackedLinear(torch.randn(64, 128), dtype=dtype)] if packs_in_place(dtype) else layers[:1]
    assert relative_error(Int8Linear.products(x, mixed)[0], found[0]) <= TOLERANCE[dtype]
    assert not layers[0].takes(torch.float16)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32
    assert not layers[0].takes(other), "whose bias is of another dtype"
    assert copy.deepcopy(layers[0]).takes(dtype)


def test_few_rows_are_multiplied_by_vectors_and_more_by_tiles() -> None:
    if step_kernels.matrix_library() is None or step_kernels.int8_library() is None:
        pytest.skip("no AMX, or nothing was compiled for it")
    weights, most = [step_kernels.PackedMatrix(0, 64, 64, 0, 0)], step_kernels.MOST_VECTOR_ROWS
    few, more, odd = (
        step_kernels.multiply_address(torch.float32, inputs, rows, weights)
        for inputs, rows in ((576, most), (576, most + 1), (80, most + 1))
    )
    assert few != more
    assert few == odd, "tiles take 64 inputs at a time"


def test_weights_that_are_packed_otherwise_are_left_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """What oneDNN makes of a matrix is looked at, not assumed."""
    if not packs_in_place(torch.float32):
        pytest.skip("no packed weights on this processor")
    assert step_kernels.panel_width(33, 48, torch.float32, ROWS_PACKED_FOR) is None, "no whole panels"
    step_kernels.panel_width.cache_clear()
    monkeypatch.setattr(
        step_kernels, "PANELS", (16,) if step_kernels.panel_width(64, 64, torch.float32, 1) != 16 else ()
    )
    assert step_kernels.panel_width(64, 80, torch.float32, ROWS_PACKED_FOR) is None
    layer = PackedLinear(torch.randn(64, 80), dtype=torch.float32)
    x = torch.randn(2, 80)
    assert relative_error(layer(x), x @ layer.matrix().T) <= 1e-5
    step_kernels.panel_width.cache_clear()


@pytest.mark.parametrize("library", ["matrix_library", "bfloat16_library"])
def test_products_of_bfloat16_are_those_of_the_fastest_library(library: str, compiled: str) -> None:
    wanted = {"AMX": "matrix_library", "AVX512-BF16": "bfloat16_library"}.get(compiled)
    if library != wanted:
        pytest.skip("of another library")
    most = {"matrix_library": step_kernels.MOST_MATRIX_ROWS, "bfloat16_library": step_kernels.MOST_PAIR_ROWS}[library]
    assert step_kernels.most_product_rows(torch.bfloat16, 576) == most
    assert step_kernels.most_product_rows(torch.bfloat16, 48) == step_kernels.MOST_PRODUCT_ROWS[torch.bfloat16]
    assert step_kernels.most_product_rows(torch.float32, 576) == step_kernels.MOST_PRODUCT_ROWS[torch.float32]
    weights = [step_kernels.PackedMatrix(0, 64, 64)]
    own = step_kernels.multiply_address(torch.bfloat16, 576, 1, weights)
    assert own != step_kernels.multiply_address(torch.bfloat16, 48, 1, weights), "of two libraries"
    hidden, table = torch.randn(300, 64).bfloat16(), torch.randn(700, 64).bfloat16()
    expected = (hidden.float() @ table.float().T).softmax(dim=-1) @ table.float()
    assert relative_error(step_kernels.soft_tokens(hidden, table, 1.0), expected) <= 6e-3
    alone = torch.cat([step_kernels.soft_tokens(row, table, 1.0) for row in hidden[:40].split(1)])
    assert torch.equal(step_kernels.soft_tokens(hidden, table, 1.0)[:40], alone), "a row depends on itself alone"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 39, 40, 41, 100])
def test_rows_of_a_product_depend_on_themselves_alone(
    rows: int, dtype: torch.dtype, compiled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many there are, and however they are parted among threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # tests have one
    torch.manual_seed(0)
    weights, x = [torch.randn(n * 64, 96).to(dtype) for n in (3, 1)], torch.randn(rows, 96).to(dtype)
    kept = [packed(weight, 64) for weight in weights]
    places = [step_kernels.PackedMatrix(one.data_ptr(), 64, n * 64) for one, n in zip(kept, (3, 1), strict=True)]
    found = step_kernels.multiply(x, places, [None, None])
    for weight, out in zip(weights, found, strict=True):
        assert relative_error(out, x.float() @ weight.float().T) <= TOLERANCE[dtype]
    for row in range(rows):
        for alone, out in zip(step_kernels.multiply(x[[row]], places, [None, None]), found, strict=True):
            assert torch.equal(alone[0], out[row])
