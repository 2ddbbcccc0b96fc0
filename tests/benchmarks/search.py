"""Exact search over a million vectors: time against the bare matrix products, and peak memory.

Usage: python tests/benchmarks/search.py [--passages N]
"""

import argparse
import resource
import time

import numpy as np
import torch

from bmf_matryoshka import retrieval

DIMS = (384, 256, 128, 64, 32)
QUERIES, TOP = 1000, 100


def main() -> None:
    """Print seconds and ratio per dimension and in all, and the memory beyond the corpus."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--passages", type=int, default=1_000_000)
    count = parser.parse_args().passages
    rng = np.random.default_rng(0)
    corpus = np.empty((count, DIMS[0]), np.float32)
    for start in range(0, count, 50_000):
        part = corpus[start : start + 50_000]
        part[:] = rng.standard_normal(part.shape, np.float32)
    queries = rng.standard_normal((QUERIES, DIMS[0]), np.float32)
    before = peak()
    totals = np.zeros(2)
    for dim in DIMS:
        seconds = np.array([timed(bare, queries, corpus, dim), timed(ours, queries, corpus, dim)])
        totals += seconds
        print(f"dim {dim:>3}: products {seconds[0]:.1f} s, search {seconds[1]:.1f} s")
    print(f"all: search takes {totals[1] / totals[0]:.2f} times as long as the products")
    print(f"peak memory: {peak() - before:.2f} GiB above the corpus of {corpus.nbytes / 2**30:.2f} GiB")


def bare(queries: retrieval.Embeddings, corpus: retrieval.Embeddings, dim: int) -> None:
    """The matrix products alone, in chunks of the same size."""
    asked = torch.from_numpy(np.ascontiguousarray(queries[:, :dim]))
    for start in range(0, len(corpus), retrieval.CORPUS_CHUNK):
        asked @ torch.from_numpy(corpus[start : start + retrieval.CORPUS_CHUNK, :dim]).T


def ours(queries: retrieval.Embeddings, corpus: retrieval.Embeddings, dim: int) -> None:
    """The whole search."""
    retrieval.search(queries, corpus, TOP, dim)


def timed(what: object, queries: retrieval.Embeddings, corpus: retrieval.Embeddings, dim: int) -> float:
    """Seconds of a call."""
    assert callable(what)
    start = time.perf_counter()
    what(queries, corpus, dim)
    return time.perf_counter() - start


def peak() -> float:
    """The most memory this process has held, in GiB (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
