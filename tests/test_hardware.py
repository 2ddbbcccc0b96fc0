import pytest
import torch

from bmf_matryoshka import hardware


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, "bfloat16"),
        ({"avx512_bf16": False, "amx_bf16": True}, "bfloat16"),
        ({"avx512_f": True, "avx512_bf16": False}, "float32"),
        ({"neon": True}, "float32"),
    ],
)
def test_a_processor_needs_bf16_in_hardware(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool], precision: str
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert hardware.precision("cpu") == precision


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


def test_autocast_computes_in_the_precision_it_is_given() -> None:
    a = torch.ones(2, 2)
    with hardware.autocast("cpu", "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with hardware.autocast("cpu", "float32"):
        assert (a @ a).dtype == torch.float32
