"""What several tests share: the small real model, the course's data, one executed smoke run."""

from pathlib import Path

import pandas as pd
import pytest
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, course_data, pairs, workbook
from bmf_matryoshka.profiles import E5_SMALL, SMOKE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def model() -> SentenceTransformer:
    """The untuned small model; tests must not change it."""
    return base_models.load(E5_SMALL, max_seq_length=32).model


@pytest.fixture(scope="session")
def course() -> pd.DataFrame:
    return course_data.read_folder(ROOT / "data").pairs()


@pytest.fixture(scope="session")
def small(course: pd.DataFrame) -> DatasetDict:
    """A small split of the course's pairs, as the profile smoke makes it."""
    return pairs.split(pairs.take_passages(course, SMOKE.max_passages))


@pytest.fixture(scope="session")
def smoke_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after all solutions ran under the profile smoke."""
    return _run(ROOT / "notebooks" / "solutions", tmp_path_factory.mktemp("solutions"))


@pytest.fixture(scope="session")
def exercise_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after all exercises ran, unsolved, under the profile smoke."""
    return _run(ROOT / "notebooks", tmp_path_factory.mktemp("exercises"))


def _run(notebooks: Path, run_dir: Path) -> Path:
    parameters = {"profile": "smoke", "run_dir": str(run_dir)}
    workbook.run(workbook.chapters(notebooks), run_dir / "notebooks", parameters)
    return run_dir
