"""The evaluator against the library's, in one run, in turn: equal numbers, and the ratio of their times.

Usage: python tests/benchmarks/evaluation.py [--passages N] [--card-passages N]
"""

import argparse
import time
from pathlib import Path
from typing import Any

from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from bmf_matryoshka import base_models, course_data, evaluation, hardware, pairs
from bmf_matryoshka.profiles import LAPTOP


def main() -> None:
    """Compare on unique passages in float32 and the machine's best precision, then under the card's protocol."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, help="passages of the course to use; all without it")
    parser.add_argument("--card-passages", type=int, default=60, help="the same for the card's protocol")
    arguments = parser.parse_args()
    table = course_data.read_folder(Path(__file__).resolve().parents[2] / "data").pairs()
    model = base_models.load(LAPTOP.base_model, LAPTOP.max_seq_length).model
    best = hardware.precision("cpu")
    plans: list[tuple[evaluation.Protocol, int | None, tuple[hardware.Precision, ...]]] = [
        ("passage", arguments.passages, ("float32", best)),
        ("card", arguments.card_passages, ("float32",)),
    ]
    for protocol, passages, precisions in plans:
        few = pairs.take_passages(table, passages)
        if protocol == "card":  # five questions a passage
            few = few.groupby("passage_id").head(5).reset_index(drop=True)
        parts = pairs.split(few, "passage" if protocol == "passage" else "question")
        task = evaluation.build_task(parts, "test", protocol)
        print(f"protocol {protocol}: {len(task.queries)} questions, {len(task.corpus)} rows, {len(LAPTOP.dims)} dims")
        compare(model, task, precisions)


def compare(model: SentenceTransformer, task: evaluation.Task, precisions: tuple[hardware.Precision, ...]) -> None:
    """Print the largest difference of any key and of ndcg@10, and the ratio of the times, for each precision."""
    queries: dict[str, Any] = dict(task.queries)
    corpus: dict[str, Any] = dict(task.corpus)
    stock = SequentialEvaluator(
        [
            InformationRetrievalEvaluator(
                queries, corpus, task.relevant, truncate_dim=dim, name=f"dim_{dim}", write_csv=False
            )
            for dim in LAPTOP.dims
        ]
    )
    model.encode(list(corpus.values())[:64], batch_size=32)  # the first products of a process are slow
    theirs, their_seconds = timed(stock, model)
    print(f"  stock, float32: {their_seconds:.1f} s")
    for precision in precisions:
        ours, seconds = timed(evaluation.MatryoshkaEvaluator(task, LAPTOP.dims, precision), model)
        keys = ours.keys() & theirs.keys()
        largest = {
            part: max(abs(ours[key] - theirs[key]) for key in keys if part in key) for part in ("dim_", "ndcg@10")
        }
        print(
            f"  ours, {precision}: {seconds:.1f} s, ratio {their_seconds / seconds:.1f}; largest difference "
            f"{largest['dim_']:.1e} over {len(keys)} keys, {largest['ndcg@10']:.1e} in ndcg@10"
        )


def timed(evaluator: Any, model: SentenceTransformer) -> tuple[dict[str, float], float]:
    """What an evaluator returns, and its seconds."""
    start = time.perf_counter()
    values: dict[str, float] = evaluator(model)
    return values, time.perf_counter() - start


if __name__ == "__main__":
    main()
