"""The estimate against what processes really used, and what is refused."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, hardware, memory
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.hardware import Precision
from bmf_matryoshka.profiles import BGE_M3, CARD, COLAB, E5_SMALL, LAPTOP, SMOKE

from .conftest import ROOT

GB = 1_000_000_000
AS_PUBLISHED = replace(CARD, activation_checkpointing=False)
# Where activations rule, where weights do, and where attention keeps matrices of tokens by tokens.
SIZES: list[tuple[memory.Shape, dict[str, Any], int, Precision]] = [
    (memory.Shape(4, 512, 16, 2048, 4_000, 514), {"batch_size": 8, "attention": "eager"}, 384, "float32"),
    (memory.Shape(6, 512, 8, 2048, 4_000, 514), {"batch_size": 16, "dropout": False}, 256, "float32"),
    (memory.Shape(4, 768, 12, 3072, 60_000, 514), {"batch_size": 4, "dropout": False}, 64, "float32"),
    (memory.Shape(4, 512, 16, 2048, 4_000, 514), {"batch_size": 8, "attention": "eager"}, 384, "bfloat16"),
    (memory.Shape(4, 1024, 16, 4096, 60_000, 514), {"batch_size": 8}, 256, "bfloat16"),
]


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells the peak of one process")
@pytest.mark.parametrize(("shape", "changes", "tokens", "precision"), SIZES)
def test_the_estimate_is_within_a_quarter_of_the_measured_peak(
    shape: memory.Shape, changes: dict[str, Any], tokens: int, precision: Precision
) -> None:
    if precision == "bfloat16" and not hardware.cpu_has_bfloat16():
        pytest.skip("this processor only emulates bfloat16, hundreds of times slower")
    argument = json.dumps([asdict(shape), changes, tokens, precision])
    command = [sys.executable, "-m", "tests.memory_probe", argument]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    profile = replace(AS_PUBLISHED, **changes)
    estimated = memory.estimate(shape, profile, precision, tokens, fused_attention=not profile.dropout)
    assert estimated.total == pytest.approx(int(done.stdout), rel=0.25)


def test_parameters_are_counted_as_they_are(model: SentenceTransformer, tmp_path: Path) -> None:
    weights = base_models.transformer(model).named_parameters()
    counted = sum(weight.numel() for name, weight in weights if "pooler" not in name)
    assert memory.SHAPES[E5_SMALL].parameters == counted
    assert memory.SHAPES[BGE_M3].parameters == pytest.approx(567e6, rel=0.002)  # what its authors say: 0.6 billion
    base_models.save(model, tmp_path / "model")
    assert memory.shape_of(str(tmp_path / "model")) == memory.SHAPES[E5_SMALL]
    assert memory.shape_of("some/unknown-model") is None


def test_what_each_setting_saves() -> None:
    shape = memory.SHAPES[BGE_M3]

    def total(**changes: Any) -> int:
        settings = {"activation_checkpointing": False, **changes}
        return memory.estimate(shape, replace(CARD, **settings), "bfloat16").total

    whole = total()
    assert total(activation_checkpointing=True) < whole / 1.8
    assert total(mini_batch_size=4) < whole / 1.8
    assert whole - total(max_seq_length=512) > 10 * GB
    assert total(train_token_embeddings=False) == pytest.approx(whole - 16 * 250_002 * 1024, rel=0.001)
    weights_alone = memory.estimate(shape, replace(CARD, lora_rank=16), "bfloat16")
    assert weights_alone.gradients + weights_alone.optimizer < 0.2 * GB
    frozen = memory.estimate(memory.SHAPES[E5_SMALL], replace(LAPTOP, frozen_layers=11), "float32")
    assert frozen.gradients == 4 * memory.SHAPES[E5_SMALL].layer


@pytest.mark.parametrize(
    ("profile", "device", "precision", "free", "remedy"),
    [
        (CARD, "cuda", "bfloat16", 24 * GB, None),
        (AS_PUBLISHED, "cuda", "bfloat16", 24 * GB, "set activation_checkpointing=True"),
        (AS_PUBLISHED, "cuda", "bfloat16", 80 * GB, None),
        (COLAB, "cuda", "float16", 15 * GB, None),
        (COLAB, "cuda", "float16", 8 * GB, "lora_rank=16"),
        (COLAB, "cuda", "float16", 2 * GB, "take a smaller base model"),
        (CARD, "cpu", "float32", 12 * GB, "set activation_checkpointing=True, mini_batch_size=8"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_setting_to_change(
    monkeypatch: pytest.MonkeyPatch, profile: Any, device: str, precision: Precision, free: int, remedy: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 24 * GB))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Free", (), {"available": free}))
    shape = memory.SHAPES[profile.base_model]
    if remedy is None:
        assert memory.check_fits(shape, profile, device, precision).total <= free
        return
    with pytest.raises(InputError) as refused:
        memory.check_fits(shape, profile, device, precision)
    text = str(refused.value)
    assert remedy in text
    assert f"{device} has {free / GB:.1f} GB free" in text
    assert f"the profile {profile.name} needs about" in text


def test_the_profiles_for_a_processor_fit_a_small_laptop() -> None:
    for profile in (LAPTOP, SMOKE):
        shape = memory.SHAPES[profile.base_model]
        assert memory.estimate(shape, profile, hardware.precision("cpu")).total < 3 * GB
