"""What this machine really has: device and precision."""

from typing import Literal

import torch

Precision = Literal["float32", "bfloat16", "float16"]


def device() -> str:
    """The device to compute on: "cuda", "mps" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def precision(device: str) -> Precision:
    """The fastest precision that the device has in hardware.

    A T4 claims bfloat16 but only emulates it, so emulation does not count; a processor needs AVX-512 BF16 or AMX.
    """
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu":
        has = torch.cpu.get_capabilities()
        return "bfloat16" if has.get("avx512_bf16") or has.get("amx_bf16") else "float32"
    return "float32"


def autocast(device: str, precision: Precision) -> torch.autocast:
    """A context that computes in this precision; does nothing for float32."""
    kind = device.split(":", maxsplit=1)[0]
    if precision == "float32":
        return torch.autocast(kind, enabled=False)
    return torch.autocast(kind, getattr(torch, precision))


def token_budget(device: str) -> int:
    """Tokens a batch when encoding: few enough for a processor's caches, many enough to fill a GPU.

    On two cores with AVX-512, 2,048 was the fastest of 1,024 to 32,768 by up to a factor of two; the GPU's value is a
    guess that fits 16 GB, not measured by us.
    """
    return 2_048 if device == "cpu" else 32_768
