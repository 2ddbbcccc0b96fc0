"""What this machine really has: device, precision, processes."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from accelerate import PartialState

Precision = Literal["float32", "bfloat16", "float16"]
LEAST_GAIN = 1.2
"""How much faster bfloat16 must be for a processor to compute in it; measured rates differ by less from run to run."""


def device() -> str:
    """The device to compute on: "cuda" (with several processes, the one of this process), "mps" or "cpu"."""
    if torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}" if processes() > 1 else "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def processes() -> int:
    """How many processes `accelerate launch` or `torchrun` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    """Whether this process is the one that evaluates, writes and prints."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process runs the block, then the others: for what is downloaded or unpacked once."""
    if processes() == 1:
        yield
        return
    with PartialState(cpu=not torch.cuda.is_available()).main_process_first():
        yield


def precision(device: str) -> Precision:
    """The fastest precision that the device has in hardware.

    A T4 claims bfloat16 but only emulates it, so emulation does not count. Neither does a processor's claim alone: of
    two with AVX-512 BF16 and no AMX that we measured, one doubled its rate with it and the other halved it.
    """
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu":
        return "bfloat16" if cpu_has_bfloat16() and bfloat16_gain() > LEAST_GAIN else "float32"
    return "float32"


def cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16; without, PyTorch emulates them, hundreds of times slower."""
    has = torch.cpu.get_capabilities()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


@cache
def bfloat16_gain() -> float:
    """How many times faster this processor multiplies matrices in bfloat16 than in float32; takes .2 seconds once."""

    def seconds(kind: torch.dtype) -> float:
        rows, weights = torch.ones(2048, 384, dtype=kind), torch.ones(1536, 384, dtype=kind)
        times = []
        for _ in range(6):
            start = time.perf_counter()
            torch.nn.functional.linear(rows, weights)
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.float32) / seconds(torch.bfloat16)


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
