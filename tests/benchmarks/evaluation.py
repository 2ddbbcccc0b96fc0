"""The evaluator against the library's, in one run, in turn: equal numbers, and the ratio of their times.

Usage: python tests/benchmarks/evaluation.py [--passages N]
"""

import argparse
import time
from pathlib import Path
from typing import Any

from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from bmf_matryoshka import base_models, course_data, evaluation, pairs
from bmf_matryoshka.profiles import LAPTOP


def main() -> None:
    """Print the largest difference of any key, both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=300, help="passages of the course to use")
    arguments = parser.parse_args()
    table = course_data.read_folder(Path(__file__).resolve().parents[2] / "data").pairs()
    task = evaluation.build_task(pairs.split(pairs.take_passages(table, arguments.passages)), "test")
    model = base_models.load(LAPTOP.base_model, LAPTOP.max_seq_length).model
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
    ours = evaluation.MatryoshkaEvaluator(task, LAPTOP.dims)
    values, seconds = [], []
    model.encode(list(corpus.values())[:64], batch_size=32)  # the first products of a process are slow
    for evaluator in (ours, stock):
        start = time.perf_counter()
        values.append(evaluator(model))
        seconds.append(time.perf_counter() - start)
    keys = values[0].keys() & values[1].keys()
    largest = max(abs(values[0][key] - values[1][key]) for key in keys)
    print(f"{len(queries)} questions, {len(corpus)} passages, {len(LAPTOP.dims)} dims, float32")
    print(f"{len(keys)} keys, largest difference {largest:.1e}")
    print(f"ours {seconds[0]:.1f} s, stock {seconds[1]:.1f} s, ratio {seconds[1] / seconds[0]:.1f}")


if __name__ == "__main__":
    main()
