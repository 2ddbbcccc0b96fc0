"""The comparison table: what each way to search reaches, at every dimension and in every style of question."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from . import baselines, evaluation, hardware, retrieval
from .evaluation import Results, Task
from .training import principal_axes

NAMES = {
    "bm25": "BM25",
    "untuned": "untuned, cut",
    "random_projection": "untuned, random projection",
    "pca": "untuned, PCA",
    "rotated": "untuned, rotated and cut",
    "plain": "fine-tuned without Matryoshka, cut",
    "fine_tuned": "fine-tuned with Matryoshka, cut",
}
"""Each way to search, in the order of the table."""


def measure(
    models: Mapping[str, SentenceTransformer],
    dataset: DatasetDict,
    task: Task,
    dims: Sequence[int],
    precision: hardware.Precision = "float32",
    show_progress: bool = False,
    cache: Path | None = None,
) -> dict[str, Results]:
    """Measure every way to search on one task.

    Args:
        models: "untuned" and any further ones, by their names in `NAMES`.
        dataset: what `pairs.split` returned; the PCA is fitted on its training passages, the rotation on its
            training pairs.
        task: what is searched.
        dims: at which dimensions, descending.
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
    axes = principal_axes(models["untuned"], dataset["train"], show_progress, cache)
    results["rotated"] = baselines.rotated(axes, queries, corpus, task, dims)
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
        half = max(row["high"] - row["value"], row["value"] - row["low"])
        cells.setdefault((row["system"], row["dim"]), {})[row["slice"]] = f"{row['value']:.3f} ± {half:.3f}"
    for (name, dim), found in cells.items():
        lines.append(f"| {NAMES[name]} | {dim or '-'} | " + " | ".join(found[part] for part in slices) + " |")
    return "\n".join(lines)


def save(comparison: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write what `compare` returned as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(list(comparison), indent=1) + "\n", encoding="utf-8")
    part.replace(path)
