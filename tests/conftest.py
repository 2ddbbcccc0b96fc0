"""What several tests share: the small real model, the course's data, one executed smoke run."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, course_data, dry_run, memory, pairs
from bmf_matryoshka.profiles import E5_SMALL, SMOKE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model() -> SentenceTransformer:
    """The untuned small model; tests must not change it."""
    return base_models.load(E5_SMALL, max_seq_length=32).model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    """One layer of random weights in bge-m3's architecture; tests must not change it."""
    folder = tmp_path_factory.mktemp("tiny")
    dry_run.build_model(memory.Shape(1, 32, 4, 64, 250_002, 514), folder / "built")
    return base_models.load(str(folder / "built" / "model"), max_seq_length=32).model


@pytest.fixture(scope="session")
def course() -> pd.DataFrame:
    return course_data.read_folder(ROOT / "data").pairs()


@pytest.fixture(scope="session")
def small(course: pd.DataFrame) -> DatasetDict:
    """A small split of the course's pairs, as the profile smoke makes it."""
    return pairs.split(pairs.take_passages(course, SMOKE.max_passages))


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The run folders of the solutions and of the unsolved exercises under the profile smoke, run side by side."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("solutions", "exercises")}
    started = []
    for name, folder in folders.items():
        command = [sys.executable, "-m", "bmf_matryoshka", "run", "--profile", "smoke", "-p", f"run_dir={folder}"]
        command += ["--exercises"] if name == "exercises" else []
        # One thread each: two runs with two threads on two cores would only wait for each other.
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        started.append(
            subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for process in started:
        shown, _ = process.communicate()
        assert process.returncode == 0, shown[-5000:]
    return folders


@pytest.fixture(scope="session")
def smoke_run(runs: dict[str, Path]) -> Path:
    """The run folder after all solutions ran under the profile smoke."""
    return runs["solutions"]


@pytest.fixture(scope="session")
def exercise_run(runs: dict[str, Path]) -> Path:
    """The run folder after all exercises ran, unsolved, under the profile smoke."""
    return runs["exercises"]
