import time

import pytest
import torch

from bmf_matryoshka import hardware


@pytest.mark.parametrize(
    ("capabilities", "gain", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, 2.1, "bfloat16"),
        ({"avx512_bf16": True, "amx_bf16": False}, 0.55, "float32"),  # has it without AMX, and is slower with it
        ({"avx512_bf16": False, "amx_bf16": True}, 8.0, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, 2.0, "float32"),
        ({"neon": True}, 2.0, "float32"),
    ],
)
def test_a_processor_needs_bf16_in_hardware_and_must_gain_by_it(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], gain: float, precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(hardware, "bfloat16_gain", lambda: gain)
    assert hardware.precision("cpu") == precision


def test_the_gain_is_measured_once_and_is_the_ratio_of_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    cost = {torch.float32: 3.0, torch.bfloat16: 2.0}
    clock = [0.0]

    def linear(rows: torch.Tensor, _: torch.Tensor) -> None:
        clock[0] += cost[rows.dtype]

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert hardware.bfloat16_gain.__wrapped__() == pytest.approx(1.5)
    monkeypatch.undo()
    assert hardware.bfloat16_gain() == hardware.bfloat16_gain() > 0


def test_a_t4_that_only_emulates_bf16_gets_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert hardware.precision("cuda") == "float16"


def test_an_ampere_gpu_gets_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert hardware.precision("cuda:1") == "bfloat16"


def test_mps_stays_in_float32_and_devices_are_preferred_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert hardware.precision("mps") == "float32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert hardware.device() == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert hardware.device() == "cuda"
    for available in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(available, "is_available", lambda: False)
    assert hardware.device() == "cpu"


def test_each_of_several_processes_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("WORLD_SIZE", "8"), ("RANK", "11"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    assert hardware.device() == "cuda:3"
    assert not hardware.is_first_process()


def test_autocast_computes_in_the_precision_it_is_given() -> None:
    a = torch.ones(2, 2)
    with hardware.autocast("cpu", "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with hardware.autocast("cpu", "float32"):
        assert (a @ a).dtype == torch.float32
