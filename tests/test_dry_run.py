from dataclasses import replace
from pathlib import Path

import pytest

from bmf_matryoshka import dry_run, memory
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import CARD, COLAB, Profile

from .conftest import ROOT

TINY = memory.Shape(2, 64, 4, 128, 250_002, 514)


@pytest.mark.parametrize("profile", [CARD, COLAB])
def test_the_whole_path_runs_with_random_weights(profile: Profile, tmp_path: Path) -> None:
    tried = replace(profile, dims=(64, 32, 16), batch_size=8, mini_batch_size=profile.mini_batch_size and 4)
    report = dry_run.run(tried, TINY, ROOT / "data", tmp_path, steps=2, max_seq_length=32)
    assert report["steps"] == len(report["seconds_a_step"]) == len(report["losses"]) == 2
    assert report["ndcg@10"] == report["ndcg@10 reloaded"]
    assert list(report["ndcg@10"]) == ["64", "32", "16"]
    assert report["peak_bytes"] > 50_000_000
    shown = dry_run.as_text(report)
    assert f"profile {profile.name}: 16 M random weights" in shown
    assert "after reloading the same" in shown
    row = dry_run.as_markdown([report]).splitlines()[2]
    assert row.startswith(f"| `{profile.name}` | 16 M | cpu, {report['precision']} | 8 | 32 | ")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    ("steps", "length", "message"),
    [(1, 32, "--steps 1: at least 2"), (2, 0, "--max-seq-length 0: choose 1 to 1024"), (2, 2000, "2000: choose 1 to")],
)
def test_what_would_show_nothing_is_refused(tmp_path: Path, steps: int, length: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        dry_run.run(CARD, TINY, ROOT / "data", tmp_path, steps, length)
    assert not list(tmp_path.iterdir())


def test_too_little_memory_is_refused_before_anything_is_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "available", lambda _: 2_000_000_000)
    with pytest.raises(InputError, match=r"has 2.0 GB free: take a smaller base model"):
        dry_run.run(CARD, memory.SHAPES[CARD.base_model], ROOT / "data", tmp_path)
    assert not list(tmp_path.iterdir())
