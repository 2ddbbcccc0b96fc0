"""The command line, in this process: the same calls as `python -m bmf_matryoshka …`."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bmf_matryoshka import base_models, bench, memory, pairs, training
from bmf_matryoshka.__main__ import main
from bmf_matryoshka.profiles import PROFILES, SMOKE

from .conftest import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model, cut to 32 tokens so that the tests are quick."""
    folder = tmp_path_factory.mktemp("base") / "model"
    base_models.save(base_models.load("intfloat/multilingual-e5-small", max_seq_length=32).model, folder)
    return folder


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory, course: pd.DataFrame) -> Path:
    """A JSONL file as a user might have it: other column names, one more column."""
    table = pairs.take_passages(course, 40)[["anchor", "positive", "letter"]]
    path = tmp_path_factory.mktemp("foreign") / "mine.jsonl"
    table.set_axis(["question", "context", "source"], axis=1).to_json(path, orient="records", lines=True)
    return path


def test_train_then_evaluate_on_ones_own_pairs(
    base: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "tuned"
    arguments = ["train", "--pairs", foreign, "--out", out, "--profile", "smoke", "--base-model", base]
    assert run(*arguments, "--dims", 384, 64, "--epochs", 0.1) == 0
    shown = capsys.readouterr().out
    assert "columns taken: question as anchor, context as positive" in shown
    assert f"base model: the folder {base}" in shown
    assert json.loads((out / "training.json").read_text())["dims"] == [384, 64]
    assert [path.name for path in out.parent.iterdir()] == ["tuned"]  # no checkpoints are left

    report = tmp_path / "report.json"
    arguments = ["evaluate", "--model", out, "--pairs", foreign, "--dims", 384, 64, "--json", report]
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "dim  384  ndcg@10 0." in shown
    assert "dim   64  ndcg@10 0." in shown
    test = json.loads(report.read_text())
    assert set(test["dims"]) == {"384", "64"}

    assert run(*arguments, "--split", "all", "--protocol", "card") == 0
    everything = json.loads(report.read_text())
    assert everything["queries"] == everything["passages"] == len(foreign.read_text().splitlines())
    assert test["queries"] < everything["queries"]
    card, passage = (results["dims"]["384"]["accuracy@1"]["value"] for results in (everything, test))
    assert card < passage  # copies of a passage count as errors

    cache = tmp_path / "cache"
    assert run(*arguments, "--protocol", "passage", "text", "card", "--ties", "worst", "--cache", cache) == 0
    shown = capsys.readouterr().out
    several = json.loads(report.read_text())
    assert list(several) == ["passage", "text", "card"]
    assert all(f"protocol {name}" in shown for name in several)
    assert several["passage"]["dims"]["64"]["ndcg@10"] == test["dims"]["64"]["ndcg@10"]
    first = {name: results["dims"]["384"]["accuracy@1"]["value"] for name, results in several.items()}
    assert first["card"] < first["text"] == first["passage"]
    assert len(list(cache.glob("*.npz"))) == 2


def test_bench_compares_every_way_to_search_of_a_run(
    base: Path, course: pd.DataFrame, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("bench", "--run-dir", tmp_path) == 2
    assert "lacks pairs, base_model, plain_model, model: run the chapters up to 04 first" in capsys.readouterr().err
    pairs.save(pairs.split(pairs.take_passages(course, 50)), tmp_path / "pairs")
    for name in ("base_model", "plain_model"):
        (tmp_path / name).symlink_to(base)
    (tmp_path / "model").mkdir()
    for part in base.iterdir():
        (tmp_path / "model" / part.name).symlink_to(part)
    assert run("bench", "--run-dir", tmp_path) == 2
    assert "training.json is missing: run chapter 04 first" in capsys.readouterr().err
    (tmp_path / "model" / "training.json").write_text(
        '{"profile": {"scale": 60.0}, "dims": [384, 32], "seed": 42, "history": []}'
    )
    assert run("bench", "--run-dir", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "| BM25 | - |" in shown
    assert "| fine-tuned without Matryoshka, cut | 32 |" in shown
    rows = json.loads((tmp_path / "results" / "bench.json").read_text())
    assert {row["system"] for row in rows} == set(bench.NAMES)


def test_a_killed_run_resumes_and_ends_as_an_unbroken_one(
    base: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["train", "--pairs", foreign, "--profile", "smoke", "--base-model", base]
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    command = [sys.executable, "-m", "bmf_matryoshka", *map(str, options), "--out", str(broken)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        work = tmp_path / ".broken-checkpoints"
        while training.last_checkpoint(work) is None and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    assert not broken.exists()
    (work / "checkpoint-9").mkdir()  # begun, but not whole: it must not be used
    assert run(*options, "--out", broken) == 2
    assert "holds an interrupted run: add --resume" in capsys.readouterr().err
    assert run(*options, "--out", broken, "--resume", "--seed", 7) == 2
    assert "holds a run with other settings or pairs" in capsys.readouterr().err
    assert run(*options, "--out", broken, "--resume") == 0
    assert not work.exists()
    assert run(*options, "--out", unbroken) == 0
    runs = [training.TrainingRun.load(folder / "training.json") for folder in (broken, unbroken)]
    assert [one.info["steps"] for one in runs] == [6, 6]
    assert runs[0].evaluations["step"].tolist() == [3, 6]
    keys = ["eval_dim_384_cosine_ndcg@10", "eval_dim_32_cosine_ndcg@10", "eval_mean_cosine_ndcg@10"]
    measured = [one.evaluations[keys].to_numpy() for one in runs]
    np.testing.assert_allclose(measured[0], measured[1], atol=0.002)


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dims", "768", "64"], "dims 768 64: 768 is above the model's width of 384; leave it out"),
        (["--dims", "64", "128"], "128 follows 64; give them in descending order"),
        (["--dims", "64", "0"], "0 is not a positive number"),
        (["--epochs", "0"], "--epochs 0.0: a number above 0 is needed"),
        (["--base-model", "no/such-folder-or-model"], "no/such-folder-or-model"),
        (["--pairs", "gone.csv"], "gone.csv: no such file"),
        (["--set", "batchsize=8"], "--set batchsize=8: write name=value, with one of the names"),
        (["--set", "chosen_by=100"], "chosen_by 100: choose mean, or one of the dims 384 128 32"),
        (["--set", "batch_size=1000000"], "the profile smoke needs about "),
    ],
)
def test_train_refuses_bad_input_in_one_line_and_writes_nothing(
    base: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str], message: str
) -> None:
    defaults = ["--pairs", foreign, "--base-model", base, "--out", tmp_path / "out", "--profile", "smoke"]
    assert run("train", *defaults, *options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_or_finished_run_says_so(
    base: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    arguments = ["train", "--pairs", foreign, "--base-model", base, "--profile", "smoke", "--out", tmp_path / "out"]
    with monkeypatch.context() as patched:
        patched.setattr(training, "train", interrupt)
        assert run(*arguments) == 130
    assert capsys.readouterr().err == "interrupted; train goes on with --resume\n"
    # Killed between the model's last byte and the removal of the checkpoints.
    (tmp_path / "out").mkdir()
    assert run(*arguments, "--resume") == 0
    assert "the run was finished already" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_tracker_that_is_not_installed_is_named(
    base: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "find_spec", lambda _: None)
    arguments = ["train", "--pairs", foreign, "--base-model", base, "--profile", "smoke", "--out", tmp_path / "out"]
    assert run(*arguments, "--report-to", "trackio") == 2
    assert "trackio is not installed: pip install trackio" in capsys.readouterr().err


def test_dry_run_reports_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    tiny = memory.Shape(1, 64, 4, 128, 250_002, 514)
    monkeypatch.setitem(memory.SHAPES, SMOKE.base_model, tiny)
    monkeypatch.setitem(PROFILES, "smoke", replace(SMOKE, dims=(64, 32), frozen_layers=0, linear_layer=None))
    arguments = ["dry-run", "--profile", "smoke", "--max-seq-length", 16, "--folder", tmp_path]
    assert run(*arguments, "--json", tmp_path / "report.json") == 0
    shown = capsys.readouterr().out
    assert "2 optimizer steps: " in shown
    assert "after reloading the same" in shown
    assert json.loads((tmp_path / "report.json").read_text())["shape"]["layers"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    assert run(*arguments, "--steps", 1) == 2
    assert "--steps 1: at least 2" in capsys.readouterr().err


def test_a_malformed_file_stops_train_and_evaluate(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.csv"
    path.write_text("anchor,positive\n" + "Frage?,Absatz\n" * 11 + "Frage?,\n", encoding="utf-8")
    assert run("train", "--pairs", path, "--out", tmp_path / "out") == 2
    assert run("evaluate", "--pairs", path, "--model", base, "--json", tmp_path / "report.json") == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [f"error: {path}, row 12: positive (positive) is empty; fill it in or delete the row"] * 2
    assert [found.name for found in tmp_path.iterdir()] == ["bad.csv"]


def test_an_existing_out_folder_is_not_touched(
    base: Path, foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run("train", "--pairs", foreign, "--base-model", base, "--out", tmp_path) == 2
    assert "exists: name a new folder or remove it" in capsys.readouterr().err
    assert run("evaluate", "--pairs", foreign, "--model", base, "--json", tmp_path / "no" / "report.json") == 2
    assert "there is no folder" in capsys.readouterr().err
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_run_refuses_misspelt_parameters_and_chapters(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert run("run", "-p", "profil=smoke") == 2
    assert "has no parameter 'profil'" in capsys.readouterr().err
    assert run("run", "-p", "profile") == 2
    assert "write name=value" in capsys.readouterr().err
    assert run("run", "--only", "9") == 2
    assert "there is no chapter '9'" in capsys.readouterr().err


def test_pairs_validate_reports_counts_or_the_broken_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [ROOT / "data" / f"{name}.jsonl" for name in ("passages", "questions")]
    assert run("pairs", "validate", *files) == 0
    assert capsys.readouterr().out.startswith("valid: ")
    broken = Path(shutil.copy(files[1], tmp_path / "questions.jsonl"))
    broken.write_text(broken.read_text(encoding="utf-8").replace('"style": "alltag"', '"style": "alttag"', 1), "utf-8")
    assert run("pairs", "validate", files[0], broken) == 2
    assert "style 'alttag': choose one of" in capsys.readouterr().err
    assert run("pairs", "describe", *files) == 0
    assert "| `alltag` |" in capsys.readouterr().out
