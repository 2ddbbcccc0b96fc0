import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmf_matryoshka import pairs
from bmf_matryoshka.errors import InputError

ROWS = [(f"Frage {number}, wie hoch?", f'Absatz {number // 2}: Zeile; mit "Zitat"') for number in range(40)]


def write(path: Path, anchor: str = "anchor", positive: str = "positive") -> Path:
    table = pd.DataFrame(ROWS, columns=[anchor, positive])
    if path.suffix == ".parquet":
        table.to_parquet(path)
    elif path.suffix == ".jsonl":
        table.to_json(path, orient="records", lines=True, force_ascii=False)
    else:
        table.to_csv(path, index=False, sep="\t" if path.suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_all_formats_give_the_same_pairs(tmp_path: Path, ending: str) -> None:
    table, columns = pairs.read_file(write(tmp_path / f"pairs.{ending}"))
    assert list(zip(table["anchor"], table["positive"], strict=True)) == ROWS
    assert columns == {"anchor": "anchor", "positive": "positive"}


@pytest.mark.parametrize(("anchor", "positive"), [("question", "context"), ("Query", "document"), ("Frage", "passage")])
def test_aliases_are_accepted_and_reported(tmp_path: Path, anchor: str, positive: str) -> None:
    table, columns = pairs.read_file(write(tmp_path / "pairs.csv", anchor, positive))
    assert columns == {"anchor": anchor, "positive": positive}
    assert table["anchor"].tolist() == [row[0] for row in ROWS]


HEAD = "anchor,positive\n"
GOOD = "".join(f"Frage {number}?,Absatz {number}\n" for number in range(12))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", "question_id,positive\n1,b\n", r"p\.csv: no column for anchor among question_id, positive; name one"),
        ("p.csv", HEAD + GOOD + "Frage?,\n", r"p\.csv, row 13: positive \(positive\) is empty; fill it in or delete"),
        ("p.csv", HEAD + "  ,Absatz\n" + GOOD, r"p\.csv, row 1: anchor \(anchor\) is empty"),
        ("p.csv", HEAD + "Frage?,Absatz\n", r"p\.csv: 1 row\(s\); at least 10 pairs are needed"),
        ("p.csv", HEAD + GOOD + "a,b,c\n", r"p\.csv, row 13: 3 fields where the header has 2; put quotes"),
        ("p.csv", "", r"p\.csv: the file is empty"),
        ("p.csv", (HEAD + GOOD + "Für?,Straße\n").encode("latin-1"), r"p\.csv, line 14: byte 0xfc is not UTF-8; save"),
        ("p.jsonl", '{"anchor": "a", "positive": "b"}\n{"anchor": \n', r"p\.jsonl, line 2: not JSON"),
        ("p.jsonl", '["a", "b"]\n', r"p\.jsonl, line 1: .* is not an object"),
        ("p.jsonl", '{"anchor": "a", "positive": 7}\n' * 12, r"p\.jsonl, row 1: positive is 7, not a text"),
        ("p.jsonl", '{"anchor": "a"}\n' * 12, r"p\.jsonl: no column for positive among anchor"),
        ("p.parquet", b"PAR1 not really", r"p\.parquet: not a readable Parquet file"),
        ("p.xlsx", b"PK", r"p\.xlsx: \.xlsx ending; use \.csv, \.tsv, \.jsonl or \.parquet"),
    ],
)
def test_malformed_files_get_one_line_that_names_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        pairs.read_file(path)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.csv: no such file"):
        pairs.read_file(tmp_path / "gone.csv")


def test_copies_share_an_id_and_count_as_relevant() -> None:
    table = pairs.from_texts(["Wer?", "wer? ", "Wer?", "Was?"], ["Absatz  A", "absatz a", "Absatz B", "Absatz A"])
    assert len(table) == 3
    first, second, third = table.to_dict("records")
    assert first["passage_id"] == third["passage_id"] != second["passage_id"]
    assert first["relevant"] == [first["passage_id"], second["passage_id"]]
    assert second["relevant"] == [second["passage_id"], first["passage_id"]]
    assert third["relevant"] == [third["passage_id"]]


@given(st.text(), st.sampled_from(["", " ", "\n", "\u00a0"]))
def test_normalising_ignores_space_and_case_only(text: str, space: str) -> None:
    assert pairs.text_id(space + text + space) == pairs.text_id(text)
    assert pairs.text_id(pairs.normalise(text)) == pairs.text_id(text)
    assert pairs.text_id(text + " x") != pairs.text_id(text)


ids = st.integers(0, 30)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 200), ids), min_size=60, max_size=120), st.randoms())
def test_a_split_by_passage_shares_no_text_and_loses_no_pair(rows: list[tuple[int, int]], random: Any) -> None:
    table = pairs.from_texts([f"Frage {q}" for q, _ in rows], [f"Absatz {p}" for _, p in rows])
    try:
        parts = pairs.split(table)
    except InputError:
        return  # everything hangs together, so one part would be empty
    texts = {name: {*part["anchor"], *part["positive"]} for name, part in parts.items()}
    assert not texts["train"] & texts["test"]
    assert not texts["train"] & texts["validation"]
    assert sum(len(part) for part in parts.values()) == len(table)
    shuffled = table.sample(frac=1, random_state=random.randrange(1000)).reset_index(drop=True)
    again = pairs.split(shuffled)
    assert {name: sorted(part["question_id"]) for name, part in again.items()} == {
        name: sorted(part["question_id"]) for name, part in parts.items()
    }


def test_the_course_is_split_as_said(course: pd.DataFrame) -> None:
    by_passage = pairs.split(course)
    sizes = {name: len(part) / len(course) for name, part in by_passage.items()}
    assert sizes == pytest.approx({"train": 0.7, "validation": 0.1, "test": 0.2}, abs=0.02)
    assert not set(by_passage["train"]["passage_id"]) & set(by_passage["test"]["passage_id"])

    by_question = pairs.split(course, "question", (0.9, 0.0, 0.1))
    assert list(by_question) == ["train", "test"]
    assert len(by_question["test"]) / len(course) == pytest.approx(0.1, abs=0.01)
    test = set(by_question["test"]["passage_id"])
    assert len(test & set(by_question["train"]["passage_id"])) / len(test) > 0.9


def test_too_few_passages_to_split_are_refused() -> None:
    table = pairs.from_texts([f"Frage {number}" for number in range(20)], ["Absatz"] * 20)
    with pytest.raises(InputError, match="20 pairs of 1 passages leave nothing for"):
        pairs.split(table)


def test_taking_passages_keeps_their_pairs_and_narrows_relevance(course: pd.DataFrame) -> None:
    taken = pairs.take_passages(course, 25)
    assert taken["passage_id"].nunique() == 25
    kept = set(taken["passage_id"])
    assert all(set(relevant) <= kept for relevant in taken["relevant"])
    assert len(taken) == course["passage_id"].isin(kept).sum()


def test_saved_pairs_come_back(course: pd.DataFrame, tmp_path: Path) -> None:
    parts = pairs.split(pairs.take_passages(course, 30))
    pairs.save(parts, tmp_path)
    again = pairs.load(tmp_path)
    assert json.dumps(again["test"].to_list()) == json.dumps(parts["test"].to_list())
    with pytest.raises(InputError, match="run chapter 02 first"):
        pairs.load(tmp_path / "nothing")
