import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, course_data, pairs
from bmf_matryoshka.errors import InputError

from .conftest import ROOT

PASSAGES: list[dict[str, Any]] = [
    {"passage_id": f"brief-{n:03d}", "letter": "brief", "randnummer": n, "text": f"Absatz {n}", "norms": ["§ 1 EStG"]}
    for n in (1, 2)
]
QUESTIONS: list[dict[str, Any]] = [
    {"question_id": "q1", "passage_id": "brief-001", "text": "Wer?", "style": "alltag", "relevant": ["brief-001"]},
    {
        "question_id": "q2",
        "passage_id": "brief-002",
        "text": "Wo?",
        "style": "fall",
        "relevant": ["brief-002", "brief-001"],
    },
]


def write(folder: Path, passages: list[dict[str, Any]], questions: list[dict[str, Any]]) -> Path:
    for name, rows in (("passages", passages), ("questions", questions)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


def test_pairs_are_read_with_everything_that_belongs_to_them(tmp_path: Path) -> None:
    table = course_data.read_folder(write(tmp_path, PASSAGES, QUESTIONS)).pairs()
    assert table.to_dict("records")[1] == {
        "question_id": "q2",
        "passage_id": "brief-002",
        "anchor": "Wo?",
        "positive": "Absatz 2",
        "relevant": ["brief-002", "brief-001"],
        "style": "fall",
        "letter": "brief",
    }


@pytest.mark.parametrize(
    ("file", "row", "change", "message"),
    [
        ("passages", 1, {"text": " "}, r"passages\.jsonl, line 2: text is ' '; it must be a text"),
        ("passages", 1, {"passage_id": "brief-001"}, r"passages\.jsonl, line 2: passage_id 'brief-001' stands twice"),
        ("passages", 1, {"text": "absatz  1"}, r"passages\.jsonl, brief-002: the same text as brief-001"),
        ("questions", 0, {"passage_id": None}, r"questions\.jsonl, line 1: passage_id is None"),
        ("questions", 0, {"relevant": []}, r"questions\.jsonl, q1: relevant must be a list that starts with"),
        ("questions", 1, {"relevant": ["brief-001"]}, "q2: relevant must be a list that starts with its own passage"),
        ("questions", 1, {"relevant": ["brief-002", "x"]}, r"q2: there is no passage 'x' in .*passages\.jsonl"),
        ("passages", 0, {"randnummer": 7}, r"brief-001: the id must be letter-randnummer"),
        ("passages", 0, {"norms": []}, r"brief-001: norms must be a list with at least one norm"),
        ("questions", 1, {"relevant": ["brief-002", "brief-001", "brief-001"]}, "q2: relevant names a passage twice"),
        ("questions", 1, {"style": "vers"}, "q2: style 'vers': choose one of fachlich, alltag, fall, stichwort"),
        ("questions", 1, {"text": "wer?"}, r"questions\.jsonl, q2: the same text as q1"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, file: str, row: int, change: dict[str, Any], message: str) -> None:
    rows = {"passages": [dict(p) for p in PASSAGES], "questions": [dict(q) for q in QUESTIONS]}
    rows[file][row].update(change)
    write(tmp_path, rows["passages"], rows["questions"])
    with pytest.raises(InputError, match=message):
        course_data.read_folder(tmp_path)


def test_the_shipped_data_keep_every_promise(model: SentenceTransformer) -> None:
    data = course_data.read_folder(ROOT / "data")
    assert course_data.breaches(data, partial(base_models.count_tokens, model)) == []
    assert data.passages["letter"].nunique() >= 30
    assert len(data.passages) >= 1000
    assert len(data.questions) >= 5500


def words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def frame(texts: list[str], letter: str = "a") -> pd.DataFrame:
    return pd.DataFrame({"passage_id": [f"{letter}-{n}" for n in range(len(texts))], "letter": letter, "text": texts})


def test_every_broken_promise_is_found() -> None:
    questions = pd.DataFrame(
        {
            "question_id": ["q1", "q2", "q3"],
            "passage_id": ["a-0", "a-1", "a-1"],
            "text": ["Wie hoch ist die Zulage im Jahr 2020?", "Wie hoch ist die Zulage im Jahr 2021?", "Wer zahlt?"],
            "style": ["fall", "fall", "alltag"],
        }
    )
    long = " ".join(str(number) for number in range(2000))
    found = course_data.breaches(course_data.CourseData(frame(["x " * 3, long, long + " z"]), questions), words)
    text = "\n".join(found)
    for promise in (
        "shortest passage: 3.0 tokens, 6 to 20 promised",
        "mean passage: ",
        "longest passage: 2001.0 tokens, 500 to 1024 promised",
        "mean question: ",
        "style fachlich: 0.0% of the questions, 15% promised",
        "a-2: 0 questions, 1 to 14 promised",
        "q1 and q2: questions 97 % alike",
        "33.3% of neighbours share half of their 5-grams, 5% promised",
    ):
        assert promise in text
    assert "longest question" not in text


def test_similar_questions_of_one_passage_are_allowed() -> None:
    table = pd.DataFrame(
        {
            "question_id": ["q1", "q2"],
            "passage_id": ["a", "a"],
            "text": ["Wer zahlt die Steuer?", "Wer zahlt die Steuer!"],
        }
    )
    assert course_data.similar_questions(table) == []
    other = table.assign(passage_id=["a", "b"])
    assert [row[:2] for row in course_data.similar_questions(other)] == [("q1", "q2")]


def test_neighbours_count_within_a_letter_only() -> None:
    text = "eins zwei drei vier fünf sechs sieben"
    assert course_data.share_alike(pd.concat([frame([text], "a"), frame([text], "b")])) == 0
    assert course_data.share_alike(
        frame([text, text + " acht neun zehn", "ganz anderer Wortlaut in diesem Absatz"])
    ) == (pytest.approx(1 / 3))


def test_the_general_control_is_large_enough_and_holds_no_tax_law() -> None:
    table, _ = pairs.read_file(ROOT / "data" / "general.jsonl")
    assert table["passage_id"].nunique() >= 150
    assert table["question_id"].nunique() == len(table) >= 300
    texts = table["anchor"] + " " + table["positive"]
    assert not texts.str.contains(r"[Ss]teuerrecht|Finanzamt|Freibetrag|EStG|UStG|§").any()
    assert course_data.similar_questions(table.rename(columns={"anchor": "text"})) == []
