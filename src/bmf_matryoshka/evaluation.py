"""Queries, corpus and relevance in; every measure at every dimension out, from one encoding."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
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

Protocol = Literal["passage", "text", "card"]
Ties = Literal["order", "random", "worst"]
PROTOCOLS: tuple[Protocol, ...] = ("passage", "text", "card")


@dataclass(frozen=True)
class Task:
    """What is searched for and in what; ids are unique, `relevant` names corpus ids for every query."""

    queries: dict[str, str]
    corpus: dict[str, str]
    relevant: dict[str, set[str]]
    styles: dict[str, str]
    ties: Ties = "order"
    """Passages with equal scores stand in corpus order. Copies of one text always have equal scores; their order among
    themselves can be changed to see how much of a result hangs on it: "random", or "worst" with relevant ones last."""

    def relevant_rows(self) -> list[NDArray[np.int64]]:
        """For each query, the positions in the corpus of what is relevant to it."""
        position = {passage: number for number, passage in enumerate(self.corpus)}
        return [
            np.array([position[passage] for passage in self.relevant[question]], np.int64) for question in self.queries
        ]


def build_task(
    dataset: DatasetDict, split: str, protocol: Protocol = "passage", corpus: str = "all", ties: Ties = "order"
) -> Task:
    """The retrieval task of one split.

    Protocol `passage`: the corpus holds each passage once, and every passage listed as relevant counts.
    Protocols `card` and `text`: the corpus holds a row per pair, train rows first. Under `card` only the question's own
    row counts, as the published card did; under `text` every row that holds a relevant passage counts. They exist to
    teach what that does to the numbers.

    Args:
        dataset: what `pairs.split` returned.
        split: whose questions are asked; "all" for every split's.
        protocol: see above.
        corpus: "all" searches the passages of every split, "own" only those of the asked one.
        ties: see `Task`.

    Raises:
        InputError: there is no such split or protocol.
    """
    if split != "all" and split not in dataset:
        raise InputError(f"no split {split!r}: choose all or one of {', '.join(dataset)}")
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    frames = {name: part.to_pandas() for name, part in dataset.items()}
    everything = pd.concat([frames[name] for name in sorted(frames, key=lambda name: name != "train")])
    asked = everything if split == "all" else frames[split]
    searched = asked if corpus == "own" else everything
    # A question may stand in several pairs of a foreign file: with its passage it is unique.
    keys = asked["question_id"] if protocol == "passage" else asked["question_id"] + " " + asked["passage_id"]
    if protocol == "passage":
        texts = dict(sorted(zip(searched["passage_id"], searched["positive"], strict=True)))
        rows = {passage: {passage} for passage in texts}
        answers = asked["relevant"]
    else:
        # Numbered with leading zeros, so that the order of the ids is the order of the rows.
        texts = {f"{row:07d}": text for row, text in enumerate(searched["positive"])}
        owners = (
            searched["passage_id"] if protocol == "text" else searched["question_id"] + " " + searched["passage_id"]
        )
        rows = {owner: set(group) for owner, group in pd.Series(list(texts), index=owners.array).groupby(level=0)}
        answers = asked["relevant"] if protocol == "text" else keys.map(lambda key: [key])
    return Task(
        queries=dict(zip(keys, asked["anchor"], strict=True)),
        corpus=texts,
        relevant={
            key: set().union(*(rows.get(answer, set()) for answer in several))
            for key, several in zip(keys, answers, strict=True)
        },
        styles=dict(zip(keys, asked["style"], strict=True)),
        ties=ties,
    )


def labels(dataset: DatasetDict, split: str) -> pd.DataFrame:
    """What questions can be grouped by: a row per question, indexed by question_id.

    Columns: style, letter, passage_length (words of its own passage, in thirds) and overlap (the share of the
    question's words of five letters or more that its passage has too, in thirds).
    """
    asked = dataset[split].to_pandas()
    words = asked[["anchor", "positive"]].map(lambda text: set(re.findall(r"\w{5,}", text.casefold())))
    overlap = pd.Series(
        [len(q & p) / len(q) if q else 0.0 for q, p in zip(words["anchor"], words["positive"], strict=True)]
    )
    thirds = ("low", "middle", "high")
    return pd.DataFrame(
        {
            "style": asked["style"],
            "letter": asked["letter"],
            "passage_length": pd.qcut(asked["positive"].str.split().str.len().rank(method="first"), 3, thirds),
            "overlap": pd.qcut(overlap.rank(method="first"), 3, thirds),
        }
    ).set_index(asked["question_id"])


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

    def sliced(self, labels: "pd.Series[Any]", dim: int, metric: str = "ndcg@10") -> pd.DataFrame:
        """The mean with its interval for each value of a label.

        Args:
            labels: one for each question, indexed by question_id (see `labels`).
            dim: the dimension.
            metric: the measure.

        Returns:
            a row per label, with the columns questions, value, low, high.
        """
        values = pd.Series(self.values(dim, metric), index=self._queries(dim))
        groups = values.groupby(labels.reindex(values.index), observed=True)
        rows = {
            label: {"questions": len(group), **asdict(metrics.mean_interval(group.tolist()))} for label, group in groups
        }
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis(str(labels.name))

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
    show_progress: bool = False,
    cache: Path | None = None,
) -> Results:
    """Measure a model on a task at every dimension; queries and corpus are encoded once.

    Raises:
        InputError: the dims do not fit the model.
    """
    return evaluate_tasks(model, {"": task}, dims, precision, show_progress, cache)[""]


def evaluate_tasks(
    model: SentenceTransformer,
    tasks: Mapping[str, Task],
    dims: Sequence[int],
    precision: hardware.Precision = "float32",
    show_progress: bool = False,
    cache: Path | None = None,
) -> dict[str, Results]:
    """Measure a model on several tasks, for example one split under several protocols; each text is encoded once.

    Args:
        model: what to measure.
        tasks: on what, by name.
        dims: at which dimensions, descending.
        precision: to encode in.
        show_progress: show bars.
        cache: see `retrieval.encode`.

    Raises:
        InputError: the dims do not fit the model.
    """
    width = base_models.width(model)
    check_dims(tuple(dims), width)

    def embed(kind: retrieval.Kind, texts: Iterable[str]) -> dict[str, retrieval.Embeddings]:
        unique = list(dict.fromkeys(texts))
        return dict(
            zip(
                unique,
                retrieval.encode(model, unique, kind, precision, None, show_progress, cache),
                strict=True,
            )
        )

    queries = embed("query", (text for task in tasks.values() for text in task.queries.values()))
    passages = embed("passage", (text for task in tasks.values() for text in task.corpus.values()))
    results = {}
    for name, task in tasks.items():
        rows = [
            np.stack([known[text] for text in texts.values()])
            for known, texts in ((queries, task.queries), (passages, task.corpus))
        ]
        info = {
            "queries": len(task.queries),
            "passages": len(task.corpus),
            "precision": precision,
            "max_seq_length": model.max_seq_length,
            "width": width,
            "ties": task.ties,
        }
        results[name] = Results(score(rows[0], rows[1], task, dims), info)
    return results


def score(queries: retrieval.Embeddings, corpus: retrieval.Embeddings, task: Task, dims: Sequence[int]) -> pd.DataFrame:
    """The table of `Results` for embeddings in the order of the task's queries and corpus.

    Args:
        queries: shape (queries, width).
        corpus: shape (passages, width).
        task: the texts they belong to.
        dims: where to cut.
    """
    copies = _Copies(task)
    unique = corpus if copies.none else corpus[copies.firsts]
    tables = []
    for dim in dims:
        found, _ = retrieval.search(queries, unique, metrics.CUTOFF, dim)
        tables.append(per_query_table(task, dim, copies.expand(found)))
    return pd.concat(tables, ignore_index=True)


def per_query_table(task: Task, dim: int, found: NDArray[np.int64]) -> pd.DataFrame:
    """A row per query: the measures of any ranking, made with or without vectors.

    Args:
        task: what was searched.
        dim: its dimension; 0 for a method without vectors.
        found: shape (queries, ranks): positions in the corpus, best first; -1 where nothing was found.
    """
    relevant = task.relevant_rows()
    # One number for each (query, row of the corpus), so that no table of queries x corpus is needed.
    corpus = len(task.corpus)
    wanted = np.concatenate([query * corpus + rows for query, rows in enumerate(relevant)])
    hits = np.isin(np.arange(len(found))[:, None] * corpus + found, wanted) & (found >= 0)
    ids = np.array([*task.corpus, ""], object)  # -1 takes the last
    return pd.DataFrame(
        {
            "question_id": list(task.queries),
            "style": list(task.styles.values()),
            "dim": dim,
            "top": ids[found[:, 0]],
            "rank": metrics.first_rank(hits),
            **metrics.per_query(hits, np.array([len(rows) for rows in relevant])),
        }
    )


class _Copies:
    """The rows of a corpus that hold the same text: each text is searched once, then its rows are put back."""

    def __init__(self, task: Task):
        texts = list(task.corpus.values())
        numbers: dict[str, int] = {}
        text_of = np.array([numbers.setdefault(text, len(numbers)) for text in texts])
        self.task = task
        self.none = len(numbers) == len(texts)
        self.firsts = np.unique(text_of, return_index=True)[1]
        rows = np.arange(len(texts)) if task.ties != "random" else np.random.default_rng(0).permutation(len(texts))
        order = rows[np.argsort(text_of[rows], kind="stable")]
        self.rows = np.split(order, np.bincount(text_of).cumsum()[:-1])

    def expand(self, found: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rankings of texts as rankings of rows."""
        if self.none:
            return found
        rankings = []
        for texts, relevant in zip(found, self.task.relevant_rows(), strict=True):
            groups = [self.rows[text] for text in texts]
            if self.task.ties == "worst":
                groups = [group[np.argsort(np.isin(group, relevant), kind="stable")] for group in groups]
            rankings.append(np.concatenate(groups)[: metrics.CUTOFF])
        return np.stack(rankings)


class MatryoshkaEvaluator(BaseEvaluator):
    """Evaluates all dimensions from one encoding, during training or on its own.

    Returns the keys of a sequence of the library's `InformationRetrievalEvaluator`s named `dim_384`, `dim_256`, …, and
    `mean_cosine_ndcg@10`, the mean over the dimensions, as the primary metric.
    """

    def __init__(self, task: Task, dims: Sequence[int], precision: hardware.Precision = "float32"):
        super().__init__()  # type: ignore[no-untyped-call]
        self.task, self.dims, self.precision = task, tuple(dims), precision
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
        results = evaluate(model, self.task, self.dims, self.precision)
        values = {
            f"dim_{dim}_cosine_{name}": float(results.values(dim, name).mean())
            for dim in self.dims
            for name in metrics.NAMES
        }
        values["mean_cosine_ndcg@10"] = sum(values[f"dim_{dim}_cosine_ndcg@10"] for dim in self.dims) / len(self.dims)
        self.store_metrics_in_model_card_data(model, values, epoch, steps)
        return values
