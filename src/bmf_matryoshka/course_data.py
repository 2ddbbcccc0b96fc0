"""The data set that the course ships: `passages.jsonl` and `questions.jsonl`, read and checked."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rapidfuzz import fuzz, process

from .errors import InputError
from .pairs import COLUMNS, json_lines, normalise

STYLES = ("fachlich", "alltag", "fall", "stichwort")
CountTokens = Callable[[Sequence[str]], list[int]]

# What the data set promises; lengths in XLM-RoBERTa tokens, special ones included.
MIN_STYLE_SHARE = 0.15
SHORTEST_PASSAGE, MEAN_PASSAGE, LONGEST_PASSAGE = (6, 20), (160, 210), (500, 1024)
MEAN_QUESTION, LONGEST_QUESTION = (20, 28), 64
QUESTIONS_A_PASSAGE = (1, 14)
MAX_SIMILARITY = 90
MAX_SHARE_ALIKE = 0.05


@dataclass(frozen=True)
class CourseData:
    """Both files as tables, in their order."""

    passages: pd.DataFrame
    questions: pd.DataFrame

    def pairs(self) -> pd.DataFrame:
        """One row per question, in the columns of `pairs`."""
        joined = self.questions.merge(self.passages[["passage_id", "text", "letter"]], on="passage_id", how="left")
        return joined.rename(columns={"text_x": "anchor", "text_y": "positive"})[list(COLUMNS)]


def read(passages_file: Path, questions_file: Path) -> CourseData:
    """Read and check both files: ids, references, texts.

    Raises:
        InputError: a file is missing or a line breaks the format; the message names the place.
    """
    passages = _records(passages_file, ("passage_id", "letter", "text"))
    questions = _records(questions_file, ("question_id", "passage_id", "text", "style"))
    for passage_id, passage in passages.items():
        if passage_id != f"{passage['letter']}-{passage.get('randnummer'):03}":
            raise InputError(f"{passages_file}, {passage_id}: the id must be letter-randnummer, three digits")
        if not isinstance(passage.get("norms"), list) or not passage["norms"]:
            raise InputError(f"{passages_file}, {passage_id}: norms must be a list with at least one norm")
    for question_id, question in questions.items():
        own, relevant = question["passage_id"], question.get("relevant")
        where = f"{questions_file}, {question_id}"
        if not isinstance(relevant, list) or relevant[:1] != [own]:
            raise InputError(f"{where}: relevant must be a list that starts with its own passage {own!r}")
        for passage_id in relevant:
            if passage_id not in passages:
                raise InputError(f"{where}: there is no passage {passage_id!r} in {passages_file}")
        if len(set(relevant)) < len(relevant):
            raise InputError(f"{where}: relevant names a passage twice")
        if question["style"] not in STYLES:
            raise InputError(f"{where}: style {question['style']!r}: choose one of {', '.join(STYLES)}")
    return CourseData(pd.DataFrame(list(passages.values())), pd.DataFrame(list(questions.values())))


def read_folder(folder: Path) -> CourseData:
    """Read both files from a folder; see `read`."""
    return read(folder / "passages.jsonl", folder / "questions.jsonl")


def breaches(data: CourseData, count_tokens: CountTokens) -> list[str]:
    """Where the data set falls short of what it promises, a line each; empty if it holds everything.

    Args:
        data: what `read` returned.
        count_tokens: the number of XLM-RoBERTa tokens of each text.
    """
    found = []

    def expect(condition: bool, message: str) -> None:
        if not condition:
            found.append(message)

    passages, questions = count_tokens(data.passages["text"].tolist()), count_tokens(data.questions["text"].tolist())
    for name, value, (low, high) in (
        ("shortest passage", min(passages), SHORTEST_PASSAGE),
        ("mean passage", float(np.mean(passages)), MEAN_PASSAGE),
        ("longest passage", max(passages), LONGEST_PASSAGE),
        ("mean question", float(np.mean(questions)), MEAN_QUESTION),
        ("longest question", max(questions), (0, LONGEST_QUESTION)),
    ):
        expect(low <= value <= high, f"{name}: {value:.1f} tokens, {low} to {high} promised")
    shares = data.questions["style"].value_counts(normalize=True)
    for style in STYLES:
        share = float(shares.get(style, 0))
        expect(share >= MIN_STYLE_SHARE, f"style {style}: {share:.1%} of the questions, {MIN_STYLE_SHARE:.0%} promised")
    counts = data.questions["passage_id"].value_counts().reindex(data.passages["passage_id"], fill_value=0)
    for passage_id, count in counts.items():
        low, high = QUESTIONS_A_PASSAGE
        expect(low <= count <= high, f"{passage_id}: {count} questions, {low} to {high} promised")
    found += [f"{a} and {b}: questions {score} % alike" for a, b, score in similar_questions(data.questions)]
    alike = share_alike(data.passages)
    expect(
        alike <= MAX_SHARE_ALIKE,
        f"{alike:.1%} of neighbours share half of their 5-grams, {MAX_SHARE_ALIKE:.0%} promised",
    )
    return found


def similar_questions(questions: pd.DataFrame, limit: int = MAX_SIMILARITY) -> list[tuple[str, str, int]]:
    """Questions of different passages whose rapidfuzz ratio is above `limit` (0 to 100): ids and ratio."""
    texts = questions["text"].map(normalise).tolist()
    ids, owners = questions["question_id"].tolist(), questions["passage_id"].tolist()
    found = []
    for start in range(0, len(texts), 1000):
        scores = process.cdist(
            texts[start : start + 1000], texts, scorer=fuzz.ratio, score_cutoff=limit, dtype=np.uint8, workers=-1
        )
        for row, column in zip(*np.nonzero(scores > limit), strict=True):
            if start + row < column and owners[start + row] != owners[column]:
                found.append((ids[start + row], ids[column], int(scores[row, column])))
    return found


def share_alike(passages: pd.DataFrame) -> float:
    """The share of pairs of passages within a letter where the shorter one has half of its word 5-grams in common."""
    alike = total = 0
    for _, letter in passages.groupby("letter"):
        grams = [_five_grams(text) for text in letter["text"]]
        for number, left in enumerate(grams):
            for right in grams[:number]:
                total += 1
                alike += len(left & right) >= max(1, min(len(left), len(right)) / 2)
    return alike / total if total else 0.0


def _five_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[start : start + 5]) for start in range(len(words) - 4)}


def _records(path: Path, texts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Each line under its id, the first of the named fields; these must be texts, and the text must be new."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    records: dict[str, dict[str, Any]] = {}
    seen: dict[str, str] = {}
    for number, record in json_lines(path):
        for field in texts:
            value = record.get(field)
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{path}, line {number}: {field} is {value!r}; it must be a text")
        key = record[texts[0]]
        if key in records:
            raise InputError(f"{path}, line {number}: {texts[0]} {key!r} stands twice")
        first = seen.setdefault(normalise(record["text"]), key)
        if first != key:
            raise InputError(f"{path}, {key}: the same text as {first}; merge the two")
        records[key] = record
    return records
