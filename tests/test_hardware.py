"""Which dtype a device gets, and that the command line honours it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from gircse import hardware
from gircse.cli.common import check_device, load_model
from gircse.errors import UsageError
from gircse.hardware import default_batch_tokens, fastest_dtype, free_memory, in_own_thread, prompt_pass_tokens


@pytest.mark.parametrize(("amx", "avx"), [(True, True), (False, True), (False, False)])
def test_a_processor_gets_bfloat16_only_where_it_multiplies_it(
    amx: bool, avx: bool, backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert fastest_dtype("cpu")[0] == torch.float32, "told to leave its vectors alone"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    dtype, reason = fastest_dtype("cpu")
    assert dtype == (torch.bfloat16 if amx or avx else torch.float32)
    assert ("AMX" if amx or not avx else "AVX512-BF16") in reason
    assert next(load_model(None, backbone=str(backbone), device="cpu").parameters()).dtype == dtype
    chosen = load_model(None, backbone=str(backbone), device="cpu", dtype="float32")
    assert next(chosen.parameters()).dtype == torch.float32


@pytest.mark.parametrize("supported", [True, False])
def test_a_gpu_likewise(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert fastest_dtype("cuda:1")[0] == (torch.bfloat16 if supported else torch.float32)


def test_a_batch_is_larger_where_few_rows_leave_the_hardware_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    for amx, tokens in ((False, 1024), (True, 4096)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        assert prompt_pass_tokens("cpu") == tokens
    assert default_batch_tokens("cpu") == 8192
    assert default_batch_tokens(torch.device("cuda:1")) == 65_536
    assert prompt_pass_tokens(torch.device("cuda:1")) == 49_152


def test_a_device_that_is_none_is_refused_in_one_line(backbone: Path) -> None:
    with pytest.raises(UsageError, match="--device nosuch: there is no such device"):
        load_model(None, backbone=str(backbone), device="nosuch")


def test_a_gpu_that_is_not_there_is_refused_in_one_line(backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda")
    for device in ("cuda:1", "mps:1"):
        with pytest.raises(UsageError, match=f"--device {device}: PyTorch .* finds none here; leave --device out"):
            load_model(None, backbone=str(backbone), device=device)


def test_an_unknown_device_gets_float32() -> None:
    assert fastest_dtype("mps")[0] == torch.float32


def test_a_container_has_the_memory_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "CONTAINER_MEMORY", ())
    machine = free_memory()
    assert machine > 0
    limit, taken = tmp_path / "max", tmp_path / "current"
    taken.write_text("1000\n")
    monkeypatch.setattr(hardware, "CONTAINER_MEMORY", ((str(limit), str(taken)),))
    for text, free in (("5000\n", 4000), ("500\n", 0)):
        limit.write_text(text)
        assert free_memory() == free
    limit.write_text("max\n")
    assert free_memory() == pytest.approx(machine, rel=0.5), "no limit"


@pytest.mark.parametrize(
    ("described", "intel"), [("vendor_id\t: GenuineIntel", True), ("vendor_id\t: AuthenticAMD", False), (None, True)]
)
def test_intels_processors_are_told_from_others(
    described: str | None, intel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path, **options: str) -> str:
        if described is None:
            raise FileNotFoundError(path)
        return described

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(hardware.platform, "processor", lambda: "Intel64 Family 6 Model 85")
    hardware.is_intel.cache_clear()
    assert hardware.is_intel() == intel
    hardware.is_intel.cache_clear()


def test_a_thread_of_its_own_ends_with_what_it_does() -> None:
    thread = in_own_thread(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join(timeout=10)
    assert not thread.is_alive()

    def fail() -> None:
        raise UsageError("no such model")

    with pytest.raises(UsageError, match="no such model"):
        in_own_thread(fail)
