import json
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, course_data, datasheet
from bmf_matryoshka.course_data import CourseData
from bmf_matryoshka.errors import InputError

from .conftest import ROOT


def test_the_shipped_datasheet_shows_what_the_files_say(model: SentenceTransformer) -> None:
    data = course_data.read_folder(ROOT / "data")
    shown = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    remedy = "run pairs describe --into data/README.md"
    assert datasheet.statistics(data, partial(base_models.count_tokens, model)) in shown, remedy
    assert datasheet.readings(data, ROOT / "data") in shown, remedy


def test_the_sample_had_errors_in_at_most_2_percent_of_its_texts() -> None:
    data = course_data.read_folder(ROOT / "data")
    sample = [json.loads(line) for line in (ROOT / "data" / "sample.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = {line["passage_id"] for line in sample}
    texts = len(drawn) + data.questions["passage_id"].isin(drawn).sum()
    assert len(drawn) == round(len(data.passages) / 10)
    assert sum(len(line["errors"]) for line in sample) <= 0.02 * texts


def test_the_judgements_agree_with_the_questions() -> None:
    data = course_data.read_folder(ROOT / "data")
    relevant = dict(zip(data.questions["question_id"], data.questions["relevant"], strict=True))
    for line in (ROOT / "data" / "judged.jsonl").read_text(encoding="utf-8").splitlines():
        judged = json.loads(line)
        assert (judged["passage_id"] in relevant[judged["question_id"]]) == judged["relevant"], judged


def folder(tmp_path: Path, data: CourseData) -> Path:
    drawn = datasheet.draw_sample(data)
    error = {"question": 1, "kind": "fact", "what": "wrong rate", "fix": "5 %"}
    lines: dict[str, list[dict[str, Any]]] = {
        "readings": [
            {"reading": reading, "letter": "a", "randnummer": 1, "kind": kind, "what": "", "fix": ""}
            for reading, kind in ((2, "fact"), (2, "fact"), (2, "citation"), (3, "answerability"), (3, "language"))
        ],
        "judged": [{"question_id": "q1", "passage_id": "a-2", "relevant": True}],
        "sample": [{"passage_id": drawn[0], "errors": [error]}]
        + [{"passage_id": passage_id, "errors": []} for passage_id in drawn[1:]],
    }
    for name, rows in lines.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return tmp_path


def small() -> CourseData:
    ids = [f"a-{number}" for number in range(40)]
    passages = pd.DataFrame({"passage_id": ids, "letter": "a", "text": [f"Absatz {i}" for i in ids]})
    questions = pd.DataFrame({"question_id": [f"q{i}" for i in range(60)], "passage_id": (ids * 2)[:60]})
    return CourseData(passages, questions)


def test_the_readings_are_counted(tmp_path: Path) -> None:
    data = small()
    text = datasheet.readings(data, folder(tmp_path, data))
    assert "| fact, citation, answerability | 3 | 1 |" in text
    assert "| the same per text of the set | 3.0% | 1.0% |" in text
    assert "1 candidates for 1 questions, of which 1 answer" in text
    drawn = datasheet.draw_sample(data)
    asked = data.questions["passage_id"].isin(drawn).sum()
    assert f"1 errors (0 answerability, 0 citation, 1 fact) in 4 passages with their {asked} questions" in text
    assert f"{1 / (4 + asked):.1%} of the texts read; 1 of the passages" in text


def test_a_sample_of_ones_own_choosing_is_refused(tmp_path: Path) -> None:
    data = small()
    path = folder(tmp_path, data) / "sample.jsonl"
    path.write_text(json.dumps({"passage_id": "a-0", "errors": []}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match="is not the sample of seed 2026"):
        datasheet.readings(data, tmp_path)
