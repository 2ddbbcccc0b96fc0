"""Queries, corpus and relevance in; every measure at every dimension out, from one encoding."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from datasets import DatasetDict
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import BaseEvaluator
from sentence_transformers.base.model import BaseModel

from . import base_models, hardware, metrics, retrieval
from .errors import InputError
from .profiles import check_dims

Protocol = Literal["passage", "card"]


@dataclass(frozen=True)
class Task:
    """What is searched for and in what; ids are unique, `relevant` names corpus ids for every query."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]
    styles: dict[str, str]


def build_task(dataset: DatasetDict, split: str, protocol: Protocol = "passage", corpus: str = "all") -> Task:
    """The retrieval task of one split.

    Protocol `passage`: the corpus holds each passage once, and every passage listed as relevant counts.
    Protocol `card`: the corpus holds a row per pair, train rows first, and only the question's own row counts, as the
    published card did; it exists to teach what that does to the numbers.

    Args:
        dataset: what `pairs.split` returned.
        split: whose questions are asked; "all" for every split's.
        protocol: see above.
        corpus: "all" searches the passages of every split, "own" only those of the asked one.

    Raises:
        InputError: there is no such split or protocol.
    """
    if split != "all" and split not in dataset:
        raise InputError(f"no split {split!r}: choose all or one of {', '.join(dataset)}")
    frames = {name: part.to_pandas() for name, part in dataset.items()}
    everything = pd.concat([frames[name] for name in sorted(frames, key=lambda name: name != "train")])
    asked = everything if split == "all" else frames[split]
    searched = asked if corpus == "own" else everything
    if protocol == "card":
        row_ids = dict(zip(searched["question_id"] + " " + searched["passage_id"], range(len(searched)), strict=True))
        keys = asked["question_id"] + " " + asked["passage_id"]
        return Task(
            queries=dict(zip(keys, asked["anchor"], strict=True)),
            # Numbered with leading zeros, so that the order of the ids is the order of the rows.
            corpus={f"{row:07d}": text for row, text in enumerate(searched["positive"])},
            relevant={key: {f"{row_ids[key]:07d}"} for key in keys},
            styles=dict(zip(keys, asked["style"], strict=True)),
        )
    if protocol != "passage":
        raise InputError(f"unknown protocol {protocol!r}: choose passage or card")
    passages = dict(sorted(zip(searched["passage_id"], searched["positive"], strict=True)))
    return Task(
        queries=dict(zip(asked["question_id"], asked["anchor"], strict=True)),
        corpus=passages,
        relevant={
            question: {passage for passage in relevant if passage in passages}
            for question, relevant in zip(asked["question_id"], asked["relevant"], strict=True)
        },
        styles=dict(zip(asked["question_id"], asked["style"], strict=True)),
    )


@dataclass(frozen=True)
class Results:
    """One model on one task: a table with a row per query and dimension, and what was measured.

    The table has the columns question_id, style, dim, top (the passage that came first), rank (of the first relevant
    passage, 0 if not among the first 100) and every name in `metrics.NAMES`.
    """

    table: pd.DataFrame
    info: dict[str, Any]

    @property
    def dims(self) -> list[int]:
        """The dimensions, descending."""
        return sorted(self.table["dim"].unique().tolist(), reverse=True)

    def values(self, dim: int, metric: str = "ndcg@10") -> NDArray[np.float64]:
        """One value per query, in the order of the task's queries.

        Raises:
            InputError: the dimension was not evaluated.
        """
        if dim not in self.dims:
            raise InputError(f"dim {dim} was not evaluated: choose one of {self.dims}")
        return self.table.loc[self.table["dim"] == dim, metric].to_numpy(float)

    def interval(self, dim: int, metric: str = "ndcg@10") -> metrics.Interval:
        """The mean over queries with its 95 % bootstrap interval."""
        return metrics.mean_interval(self.values(dim, metric))

    def difference(self, other: "Results", dim: int, metric: str = "ndcg@10") -> metrics.Interval:
        """The paired difference, this minus the other, with its 95 % bootstrap interval.

        Raises:
            InputError: the two were not measured on the same queries.
        """
        if self._queries(dim) != other._queries(dim):
            raise InputError("the two results are of different queries: evaluate both on the same split and pairs")
        return metrics.mean_interval(self.values(dim, metric) - other.values(dim, metric))

    def _queries(self, dim: int) -> list[str]:
        return self.table.loc[self.table["dim"] == dim, "question_id"].tolist()

    def summary(self) -> dict[str, Any]:
        """What was measured, and every measure at every dimension with its interval, ready for JSON."""
        dims = {str(dim): {name: asdict(self.interval(dim, name)) for name in metrics.NAMES} for dim in self.dims}
        return {**self.info, "dims": dims}

    def save(self, path: Path) -> None:
        """Write the table as Parquet, with what was measured beside it as JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.table.to_parquet(path.with_suffix(".parquet"), index=False)
        path.with_suffix(".json").write_text(json.dumps(self.info, indent=1, ensure_ascii=False), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what `save` wrote.

        Raises:
            InputError: there is nothing at the path.
        """
        table, info = path.with_suffix(".parquet"), path.with_suffix(".json")
        if not (table.is_file() and info.is_file()):
            raise InputError(f"{table} is missing: run the chapter that measures it first")
        return cls(pd.read_parquet(table), json.loads(info.read_text(encoding="utf-8")))


def evaluate(
    model: SentenceTransformer,
    task: Task,
    dims: Sequence[int],
    precision: hardware.Precision = "float32",
    batch_size: int = 32,
    show_progress: bool = False,
) -> Results:
    """Measure a model on a task at every dimension; queries and corpus are encoded once.

    Raises:
        InputError: the dims do not fit the model.
    """
    width = base_models.width(model)
    check_dims(tuple(dims), width)

    def embed(texts: dict[str, str], kind: Literal["query", "passage"]) -> retrieval.Embeddings:
        return retrieval.encode(model, list(texts.values()), kind, precision, batch_size, show_progress)

    table = score(embed(task.queries, "query"), embed(task.corpus, "passage"), task, dims)
    info = {
        "queries": len(task.queries),
        "passages": len(task.corpus),
        "precision": precision,
        "max_seq_length": model.max_seq_length,
        "width": width,
    }
    return Results(table, info)


def score(queries: retrieval.Embeddings, corpus: retrieval.Embeddings, task: Task, dims: Sequence[int]) -> pd.DataFrame:
    """The table of `Results` for embeddings in the order of the task's queries and corpus."""
    position = {passage: number for number, passage in enumerate(task.corpus)}
    relevance = np.zeros((len(task.queries), len(task.corpus)), bool)
    for row, question in enumerate(task.queries):
        relevance[row, [position[passage] for passage in task.relevant[question]]] = True
    passage_ids = list(task.corpus)
    frames = []
    for dim in dims:
        found, _ = retrieval.search(retrieval.truncate(queries, dim), retrieval.truncate(corpus, dim), metrics.CUTOFF)
        hits = np.take_along_axis(relevance, found, axis=1)
        frames.append(
            pd.DataFrame(
                {
                    "question_id": list(task.queries),
                    "style": list(task.styles.values()),
                    "dim": dim,
                    "top": [passage_ids[best] for best in found[:, 0]],
                    "rank": metrics.first_rank(hits),
                    **metrics.per_query(hits, relevance.sum(axis=1)),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


class MatryoshkaEvaluator(BaseEvaluator):
    """Evaluates all dimensions from one encoding, during training or on its own.

    Returns the keys of a sequence of the library's `InformationRetrievalEvaluator`s named `dim_384`, `dim_256`, …, and
    `mean_cosine_ndcg@10`, the mean over the dimensions, as the primary metric.
    """

    def __init__(
        self, task: Task, dims: Sequence[int], precision: hardware.Precision = "float32", batch_size: int = 32
    ):
        super().__init__()  # type: ignore[no-untyped-call]
        self.task, self.dims, self.precision, self.batch_size = task, tuple(dims), precision, batch_size
        self.primary_metric = "mean_cosine_ndcg@10"

    def __call__(
        self,
        model: BaseModel,
        output_path: str | None = None,  # noqa: ARG002
        epoch: int = -1,
        steps: int = -1,
    ) -> dict[str, float]:
        """Evaluate; nothing is written to `output_path`."""
        assert isinstance(model, SentenceTransformer)
        results = evaluate(model, self.task, self.dims, self.precision, self.batch_size)
        values = {
            f"dim_{dim}_cosine_{name}": float(results.values(dim, name).mean())
            for dim in self.dims
            for name in metrics.NAMES
        }
        values["mean_cosine_ndcg@10"] = sum(values[f"dim_{dim}_cosine_ndcg@10"] for dim in self.dims) / len(self.dims)
        self.store_metrics_in_model_card_data(model, values, epoch, steps)
        return values
