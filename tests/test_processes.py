"""Training in two processes on this machine (gloo), as `torchrun` or `accelerate launch` starts it on several GPUs."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bmf_matryoshka import base_models, pairs
from bmf_matryoshka.__main__ import main
from bmf_matryoshka.training import TrainingRun

SHARES = (0.5, 0.4, 0.1)
"""So many validation questions that one of them, ranked elsewhere by a rounding, does not decide."""


def test_two_processes_learn_what_one_does_with_the_same_batches(
    course: pd.DataFrame, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, mine = tmp_path / "base", tmp_path / "mine.jsonl"
    base_models.save(base_models.load("intfloat/multilingual-e5-small", max_seq_length=32).model, base)
    # A question a passage and whole batches only, so that one process and several make the same batches.
    table = pairs.take_passages(course, 224).drop_duplicates("passage_id")[["anchor", "positive"]]
    table.to_json(mine, orient="records", lines=True)
    assert len(pairs.split(pairs.read_file(mine)[0], shares=SHARES)["train"]) % 16 == 0
    options = ["train", "--pairs", str(mine), "--base-model", str(base), "--profile", "smoke"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*options, "--out", str(one), "--set", f"shares={SHARES}", "batch_size=16"]) == 0

    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "bmf_matryoshka"]
    done = subprocess.run(
        [*launch, *options, "--out", str(two), "--set", f"shares={SHARES}", "batch_size=8"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for line in (f"{mine}: ", "base model: the folder", "trained 6 steps"):
        assert done.stdout.count(line) == 1, done.stdout
    capfd.readouterr()

    runs = [TrainingRun.load(folder / "training.json") for folder in (one, two)]
    assert [run.info["processes"] for run in runs] == [1, 2]
    assert [run.info["steps"] for run in runs] == [6, 6]
    losses = [run.losses["loss"].to_numpy() for run in runs]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.02)
    assert losses[1][-1] < 0.7 * losses[1][0]
    keys = [f"eval_dim_{dim}_cosine_ndcg@10" for dim in runs[0].info["dims"]]
    last = [run.evaluations[keys].iloc[-1].to_numpy() for run in runs]
    np.testing.assert_allclose(last[0], last[1], atol=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine.jsonl", "one", "two"]
