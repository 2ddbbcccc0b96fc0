"""Anchor/positive pairs: read, check, split; passages with ids made from their text.

A pair is one row: `anchor` (the question), `positive` (the passage), their ids, `relevant` (the ids of every passage
that answers the question, the own one first), and `style` and `letter`, empty where a file has none.
"""

import csv
import hashlib
import io
import json
import re
import unicodedata
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .errors import InputError

COLUMNS = ("question_id", "passage_id", "anchor", "positive", "relevant", "style", "letter")
ALIASES = {
    "anchor": ("anchor", "question", "query", "frage", "anfrage"),
    "positive": ("positive", "passage", "context", "document", "answer", "randnummer_text", "absatz"),
}
PARTS = ("train", "validation", "test")
MIN_PAIRS = 10

By = Literal["passage", "question"]


def normalise(text: str) -> str:
    """The form in which two texts count as the same: NFKC, case folded, one space between words."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text)).strip().casefold()


def text_id(text: str) -> str:
    """An id made from the text: the first 16 hexadecimal digits of the SHA-256 of its normalised form."""
    return hashlib.sha256(normalise(text).encode()).hexdigest()[:16]


def read_file(path: Path) -> tuple[pd.DataFrame, dict[str, str]]:
    """Pairs from a CSV, TSV, JSONL or Parquet file, and which of its columns were taken as anchor and positive.

    Identical texts share an id; every passage that the file pairs with a question counts as relevant to it.
    A pair that is repeated is kept once.

    Raises:
        InputError: the file cannot be read as pairs; the message names file, row, value and remedy.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    readers = {".csv": _read_csv, ".tsv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix.lower() not in readers:
        raise InputError(f"{path}: {path.suffix or 'no'} ending; use .csv, .tsv, .jsonl or .parquet")
    table = readers[path.suffix.lower()](path)
    columns = {role: _column(path, table.columns, role) for role in ALIASES}
    for role, column in columns.items():
        for row, value in enumerate(table[column], start=1):
            if not isinstance(value, str):
                raise InputError(f"{path}, row {row}: {column} is {value!r}, not a text; fill it in or delete the row")
            if not normalise(value):
                raise InputError(f"{path}, row {row}: {column} ({role}) is empty; fill it in or delete the row")
    if len(table) < MIN_PAIRS:
        raise InputError(f"{path}: {len(table)} row(s); at least {MIN_PAIRS} pairs are needed to split and evaluate")
    return from_texts(table[columns["anchor"]], table[columns["positive"]]), columns


def from_texts(anchors: Iterable[str], positives: Iterable[str]) -> pd.DataFrame:
    """Pairs from two columns of equal length, with ids made from the texts."""
    table = pd.DataFrame({"anchor": list(anchors), "positive": list(positives)})
    table["question_id"] = table["anchor"].map(text_id)
    table["passage_id"] = table["positive"].map(text_id)
    table = table.drop_duplicates(["question_id", "passage_id"], ignore_index=True)
    answers = table.groupby("question_id")["passage_id"].agg(list)
    table["relevant"] = [
        [own, *(other for other in answers[question] if other != own)]
        for question, own in zip(table["question_id"], table["passage_id"], strict=True)
    ]
    return table.assign(style="", letter="")[list(COLUMNS)]


def passages(pairs: pd.DataFrame) -> dict[str, str]:
    """Each passage once: id -> text, in the order of the ids."""
    return dict(sorted(zip(pairs["passage_id"], pairs["positive"], strict=True)))


def take_passages(pairs: pd.DataFrame, count: int | None) -> pd.DataFrame:
    """The pairs of `count` passages, chosen by the hash of their text; all pairs for None.

    Relevance is narrowed to the passages that stay.
    """
    if count is None:
        return pairs
    texts = passages(pairs)
    chosen = set(sorted(texts, key=lambda passage_id: text_id(texts[passage_id]))[:count])
    kept = pairs[pairs["passage_id"].isin(chosen)].reset_index(drop=True)
    kept["relevant"] = kept["relevant"].map(lambda relevant: [passage for passage in relevant if passage in chosen])
    return kept


def split(pairs: pd.DataFrame, by: By = "passage", shares: tuple[float, float, float] = (0.7, 0.1, 0.2)) -> DatasetDict:
    """Split into train, validation and test, whatever the order of the rows; a share of 0 leaves a part out.

    By passage, all questions of a passage stay together, and so do passages that answer the same question: nothing of
    a test passage is in training. By question, each row is placed on its own, as the published card did, and most test
    passages are in training under other questions.

    Raises:
        InputError: too few passages or questions, so that a part would be empty.
    """
    keys = _passage_groups(pairs) if by == "passage" else pairs["anchor"].map(text_id)
    # Ordered by hash, not shuffled by a seed: a pair keeps its place when the seed changes, and almost always when the
    # data grow. Placed by the middle of each group, so that a large group does not push its whole size over a border.
    sizes = keys.value_counts()
    order = sorted(sizes.index, key=lambda key: text_id(f"split {key}"))
    counts = sizes.loc[order].to_numpy()
    middle = (counts.cumsum() - counts / 2) / counts.sum()
    borders = np.cumsum(shares)[:-1]
    part_of = dict(zip(order, np.searchsorted(borders, middle, side="right"), strict=True))
    part = keys.map(part_of)
    parts = {
        name: pairs[part == number].reset_index(drop=True)
        for number, (name, share) in enumerate(zip(PARTS, shares, strict=True))
        if share > 0
    }
    for name, rows in parts.items():
        if rows.empty:
            raise InputError(
                f"{len(pairs)} pairs of {pairs['passage_id'].nunique()} passages leave nothing for {name}: "
                "add pairs of other passages"
            )
    if by == "passage":
        _assert_disjoint(parts)
    return DatasetDict({name: Dataset.from_pandas(rows, preserve_index=False) for name, rows in parts.items()})


def save(dataset: DatasetDict, folder: Path) -> None:
    """Write the parts as Parquet files that `load` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in dataset.items():
        part.to_pandas().to_parquet(folder / f"{name}.parquet", index=False)


def load(folder: Path) -> DatasetDict:
    """Read what `save` wrote.

    Raises:
        InputError: a part is missing.
    """
    paths = {name: folder / f"{name}.parquet" for name in PARTS}
    if not paths["train"].is_file() or not paths["test"].is_file():
        raise InputError(f"{folder} holds no train.parquet and test.parquet: run chapter 02 first")
    return DatasetDict(
        {
            name: Dataset.from_pandas(pd.read_parquet(path), preserve_index=False)
            for name, path in paths.items()
            if path.is_file()
        }
    )


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Each line of a JSONL file as an object, with its number.

    Raises:
        InputError: a line is not UTF-8, not JSON or not an object.
    """
    for number, line in enumerate(_decode(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg} at column {error.colno})") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: {line.strip()[:40]} is not an object with named fields")
        yield number, record


def _passage_groups(pairs: pd.DataFrame) -> "pd.Series[str]":
    """For each pair, the smallest text id among the passages that questions tie to its passage."""
    texts = passages(pairs)
    position = {passage_id: number for number, passage_id in enumerate(texts)}
    links = [
        (position[own], position[other])
        for own, relevant in zip(pairs["passage_id"], pairs["relevant"], strict=True)
        for other in relevant
        if other in position
    ]
    left, right = np.array(links).T
    graph = coo_array((np.ones(len(links)), (left, right)), shape=(len(texts), len(texts)))
    _, group = connected_components(graph, directed=False)
    names = pd.Series([text_id(text) for text in texts.values()]).groupby(group).min()
    return pairs["passage_id"].map(lambda passage_id: names[group[position[passage_id]]])


def _assert_disjoint(parts: dict[str, pd.DataFrame]) -> None:
    seen: dict[str, str] = {}
    for name, rows in parts.items():
        for text in {normalise(text) for text in (*rows["positive"], *rows["anchor"])}:
            if seen.setdefault(text, name) != name:
                raise AssertionError(f"a text is in {seen[text]} and in {name}: {text[:80]}")


def _column(path: Path, present: Iterable[Hashable], role: str) -> str:
    names = [str(name) for name in present]
    for alias in ALIASES[role]:
        for name in names:
            if name.strip().casefold() == alias:
                return name
    raise InputError(
        f"{path}: no column for {role} among {', '.join(names) or 'none'}; name one {' or '.join(ALIASES[role])}"
    )


def _decode(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8 "
            "(it may be Latin-1)"
        ) from None


def _read_csv(path: Path) -> pd.DataFrame:
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = list(csv.reader(io.StringIO(_decode(path), newline=""), delimiter=delimiter, strict=False))
    if not rows:
        raise InputError(f"{path}: the file is empty; its first line must name the columns anchor and positive")
    header, *body = rows
    body = [row for row in body if row]
    for number, row in enumerate(body, start=1):
        if len(row) != len(header):
            raise InputError(
                f"{path}, row {number}: {len(row)} fields where the header has {len(header)}; "
                "put quotes around a text that holds the delimiter"
            )
    return pd.DataFrame(body, columns=header)


def _read_jsonl(path: Path) -> pd.DataFrame:
    return pd.DataFrame([record for _, record in json_lines(path)])


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except (ValueError, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
