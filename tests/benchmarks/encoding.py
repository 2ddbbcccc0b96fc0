"""Encoding against the machine's rate of matrix products: how much of it goes into useful tokens.

The rate is that of a product of 4096 x 384 by 384 x 1536, the largest of the small model's layers. A useful token is
one that is not padding; in each of 12 layers it takes 2 * (4 * 384^2 + 2 * 384 * 1536) operations in the linear maps
and 4 * 384 for each token it attends to.

Usage: python tests/benchmarks/encoding.py [--passages N]
"""

import argparse
import time
from pathlib import Path

import torch

from bmf_matryoshka import base_models, course_data, hardware, retrieval
from bmf_matryoshka.profiles import LAPTOP

LAYERS, WIDTH, INNER = 12, 384, 1536


def main() -> None:
    """Print the rate of products, passages and useful tokens a second, and the share of the rate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=400)
    count = parser.parse_args().passages
    data = course_data.read_folder(Path(__file__).resolve().parents[2] / "data")
    texts = data.passages["text"].sample(count, random_state=0).tolist()
    model = base_models.load(LAPTOP.base_model, LAPTOP.max_seq_length).model
    lengths = [min(LAPTOP.max_seq_length, length) for length in base_models.count_tokens(model, texts)]
    operations = sum(
        LAYERS * length * (2 * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * WIDTH * length) for length in lengths
    )
    precision = hardware.precision("cpu")
    rate = product_rate(getattr(torch, precision))
    retrieval.encode(model, texts[:32], "passage", precision)
    start = time.perf_counter()
    retrieval.encode(model, texts, "passage", precision)
    seconds = time.perf_counter() - start
    print(f"{precision}: products {rate / 1e12:.2f} TFLOP/s")
    print(f"{count / seconds:.0f} passages and {sum(lengths) / seconds:.0f} useful tokens a second")
    print(f"useful: {operations / seconds / 1e12:.2f} TFLOP/s, {operations / seconds / rate:.0%} of the rate")


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of the best of ten products."""
    left, right = torch.ones(4096, WIDTH, dtype=dtype), torch.ones(INNER, WIDTH, dtype=dtype)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.nn.functional.linear(left, right)
        best = min(best, time.perf_counter() - start)
    return 2 * 4096 * WIDTH * INNER / best


if __name__ == "__main__":
    main()
