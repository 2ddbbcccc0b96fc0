"""What a fine-tuned model must beat: words alone, and other ways to make its vectors short."""

from collections.abc import Sequence

import bm25s
import numpy as np
import pandas as pd
import Stemmer
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.random_projection import GaussianRandomProjection

from . import metrics
from .errors import InputError
from .evaluation import Results, Task, per_query_table, score
from .retrieval import Embeddings


def bm25(task: Task) -> Results:
    """BM25 (Lucene's variant, k1 1.5, b .75) over German word stems without stop words; no vectors, so its dim is 0."""

    def stems(texts: Sequence[str]) -> list[list[str]]:
        tokens: list[list[str]] = bm25s.tokenize(
            list(texts), stopwords="de", stemmer=stemmer, return_ids=False, show_progress=False
        )
        return tokens

    stemmer = Stemmer.Stemmer("german")
    index = bm25s.BM25()
    index.index(stems(list(task.corpus.values())), show_progress=False)
    found = np.full((len(task.queries), min(metrics.CUTOFF, len(task.corpus))), -1, np.int64)
    for row, words in enumerate(stems(list(task.queries.values()))):
        found[row] = _ranking(index.get_scores(words) if words else np.zeros(len(task.corpus)), found.shape[1])
    info = {"queries": len(task.queries), "passages": len(task.corpus), "method": "BM25, German stems"}
    return Results(per_query_table(task, 0, found), info)


def pca(fitted_on: Embeddings, queries: Embeddings, corpus: Embeddings, task: Task, dims: Sequence[int]) -> Results:
    """The model's vectors turned by a principal component analysis before they are cut.

    Args:
        fitted_on: embeddings of training passages, shape (passages, width).
        queries: of the task's queries.
        corpus: of the task's corpus.
        task: what is searched.
        dims: where to cut; a dim above what the training passages can fit is left out.

    Raises:
        InputError: no dim is left.
    """
    most = min(*fitted_on.shape, max(dims))
    if most < min(dims):
        raise InputError(
            f"a PCA of {len(fitted_on)} training passages gives {most} dims, {min(dims)} is the smallest asked"
        )
    fitted = PCA(most, svd_solver="full").fit(fitted_on)
    turned = [np.asarray(fitted.transform(rows), np.float32) for rows in (queries, corpus)]
    possible = [dim for dim in dims if dim <= most]
    info = {"queries": len(task.queries), "passages": len(task.corpus), "method": "PCA of the untuned vectors"}
    return Results(score(turned[0], turned[1], task, possible), info)


def linear(
    matrix: Embeddings, queries: Embeddings, corpus: Embeddings, task: Task, dims: Sequence[int], method: str
) -> Results:
    """The model's vectors under a square matrix before they are cut; orthonormal axes change nothing at full width.

    Args:
        matrix: shape (width, width), for example `training.principal_axes` or `training.linear_map`.
        queries: of the task's queries.
        corpus: of the task's corpus.
        task: what is searched.
        dims: where to cut.
        method: what the matrix is, in words.
    """
    info = {"queries": len(task.queries), "passages": len(task.corpus), "method": method}
    return Results(score(queries @ matrix.T, corpus @ matrix.T, task, dims), info)


def random_projection(
    queries: Embeddings, corpus: Embeddings, task: Task, dims: Sequence[int], seed: int = 0
) -> Results:
    """The model's vectors under a random Gaussian projection to each dimension (Johnson and Lindenstrauss 1984)."""
    tables = []
    for dim in dims:
        projection = GaussianRandomProjection(dim, random_state=seed).fit(corpus)
        shorter = [np.asarray(projection.transform(rows), np.float32) for rows in (queries, corpus)]
        tables.append(score(shorter[0], shorter[1], task, [dim]))
    info = {"queries": len(task.queries), "passages": len(task.corpus), "method": "random projection"}
    return Results(pd.concat(tables, ignore_index=True), info)


def _ranking(scores: NDArray[np.floating], k: int) -> NDArray[np.int64]:
    """The k best positions, equal scores in corpus order; -1 where no word is shared."""
    order = np.argsort(-scores, kind="stable")[:k]
    return np.where(scores[order] > 0, order, -1)
