"""The comparison table: what each way to search reaches, at every dimension and in every style of question."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from . import baselines, evaluation, files, hardware, retrieval, training
from .evaluation import Results, Task
from .metrics import Interval

NAMES = {
    "bm25": "BM25",
    "untuned": "untuned, cut",
    "random_projection": "untuned, random projection",
    "pca": "untuned, PCA",
    "rotated": "untuned, rotated and cut",
    "linear_map": "untuned, trained linear map, cut",
    "plain": "fine-tuned without Matryoshka, cut",
    "fine_tuned": "fine-tuned with Matryoshka, cut",
}
"""Each way to search, in the order of the table."""


def measure(
    models: Mapping[str, SentenceTransformer],
    dataset: DatasetDict,
    task: Task,
    dims: Sequence[int],
    scale: float = 20.0,
    seed: int = 42,
    precision: hardware.Precision = "float32",
    show_progress: bool = False,
    cache: Path | None = None,
) -> dict[str, Results]:
    """Measure every way to search on one task.

    Args:
        models: "untuned" and any further ones, by their names in `NAMES`.
        dataset: what `pairs.split` returned; the PCA is fitted on its training passages, the rotation and the
            linear map on its training pairs.
        task: what is searched.
        dims: at which dimensions, descending; the linear map is trained for them.
        scale: of the loss that trains the linear map, best that of the fine-tuned models.
        seed: of the linear map's batches.
        precision: to encode in.
        show_progress: show bars.
        cache: see `retrieval.encode`.
    """
    results = {"bm25": baselines.bm25(task)}
    for name, model in models.items():
        results[name] = evaluation.evaluate(model, task, dims, precision, show_progress, cache)

    def embed(texts: Sequence[str], kind: retrieval.Kind) -> retrieval.Embeddings:
        return retrieval.encode(models["untuned"], texts, kind, precision, None, show_progress, cache)

    queries, corpus = embed(list(task.queries.values()), "query"), embed(list(task.corpus.values()), "passage")
    fitted_on = embed(list(dict.fromkeys(dataset["train"]["positive"])), "passage")
    if len(fitted_on) >= min(dims):
        results["pca"] = baselines.pca(fitted_on, queries, corpus, task, dims)
    matrices = {
        "rotated": training.principal_axes(models["untuned"], dataset["train"], show_progress, cache),
        "linear_map": training.linear_map(models["untuned"], dataset["train"], dims, scale, seed, show_progress, cache),
    }
    for name, matrix in matrices.items():
        results[name] = baselines.linear(matrix, queries, corpus, task, dims, NAMES[name])
    results["random_projection"] = baselines.random_projection(queries, corpus, task, dims)
    return results


def compare(results: Mapping[str, Results], labels: pd.DataFrame) -> list[dict[str, Any]]:
    """ndcg@10 with its interval for each way to search and dimension, over all questions and in each style.

    Args:
        results: by name, of the same questions.
        labels: what `evaluation.labels` returned.

    Returns:
        records of system, dim, slice ("all" or a style), questions, value, low, high, ready for JSON.
    """
    rows: list[dict[str, Any]] = []
    for name in NAMES:
        for dim in results[name].dims if name in results else ():
            row = {"system": name, "dim": dim}
            rows.append({**row, "slice": "all", "questions": len(labels), **asdict(results[name].interval(dim))})
            for style in results[name].sliced(labels["style"], dim).reset_index(names="slice").to_dict("records"):
                rows.append(row | {str(key): value for key, value in style.items()})
    return rows


def as_markdown(comparison: Sequence[Mapping[str, Any]]) -> str:
    """What `compare` returned, for people: a row per way to search and dimension, a column per slice."""
    slices = list(dict.fromkeys(row["slice"] for row in comparison))
    lines = ["| way to search | dims | " + " | ".join(slices) + " |", "| --- | ---: |" + " ---: |" * len(slices)]
    cells: dict[tuple[str, int], dict[str, str]] = {}
    for row in comparison:
        interval = Interval(row["value"], row["low"], row["high"])
        cells.setdefault((row["system"], row["dim"]), {})[row["slice"]] = f"{interval.value:.3f} ± {interval.half:.3f}"
    for (name, dim), found in cells.items():
        lines.append(f"| {NAMES[name]} | {dim or '-'} | " + " | ".join(found[part] for part in slices) + " |")
    return "\n".join(lines)


def apart(comparison: Sequence[Mapping[str, Any]]) -> str:
    """A sentence on what the questions tell apart: each way to search at full width, and the untuned shortest cut.

    Args:
        comparison: what `compare` returned.
    """
    everywhere = [row for row in comparison if row["slice"] == "all"]
    dims = [row["dim"] for row in everywhere if row["dim"]]
    ends = [
        row
        for row in everywhere
        if row["dim"] in (0, max(dims)) or (row["system"], row["dim"]) == ("untuned", min(dims))
    ]
    overlapping, gaps = [], []
    for one, other in itertools.combinations(ends, 2):
        if one["low"] <= other["high"] and other["low"] <= one["high"]:
            names = (
                f"{NAMES[row['system']]} ({row['dim']})" if row["dim"] else NAMES[row["system"]] for row in (one, other)
            )
            overlapping.append(" and ".join(names))
        else:
            gaps.append(abs(one["value"] - other["value"]))
    told = (
        f"of all others here ({len(gaps)} pairs), ndcg@10 differs by {min(gaps):.3f} or more"
        if gaps
        else "no two differ"
    )
    return f"Over all questions, the intervals overlap for {'; for '.join(overlapping) or 'no two'}; {told}."


def save(comparison: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write what `compare` returned as JSON."""
    files.write_json(path, list(comparison))
