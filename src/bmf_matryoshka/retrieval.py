"""Encode once at full width; search exactly, at any dimension, in bounded memory."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer

from . import hardware

Embeddings = NDArray[np.float32]

QUERY_CHUNK = 256
"""Queries scored at a time: bounds the score matrix to this many rows."""


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    kind: Literal["query", "passage"],
    precision: hardware.Precision = "float32",
    batch_size: int = 32,
    show_progress: bool = False,
) -> Embeddings:
    """Encode texts at the model's full width, with the model's prompt for their kind.

    A text that occurs several times is encoded once.

    Returns:
        float32 array of shape (len(texts), width), rows as the model gives them.
    """
    unique = list(dict.fromkeys(texts))
    position = {text: number for number, text in enumerate(unique)}
    encode_kind = model.encode_query if kind == "query" else model.encode_document
    with hardware.autocast(model.device.type, precision):
        vectors = encode_kind(unique, batch_size=batch_size, show_progress_bar=show_progress, convert_to_tensor=True)
    return vectors.float().cpu().numpy()[[position[text] for text in texts]]


def truncate(embeddings: Embeddings, dim: int) -> Embeddings:
    """The first `dim` components of each row, scaled back to length 1 (a zero row stays zero).

    Raises:
        ValueError: dim is not between 1 and the width.
    """
    width = embeddings.shape[1]
    if not 1 <= dim <= width:
        raise ValueError(f"dim {dim} is not between 1 and the width {width}")
    cut = embeddings[:, :dim]
    lengths = np.linalg.norm(cut, axis=1, keepdims=True)
    lengths[lengths == 0] = 1
    return np.asarray(cut / lengths, np.float32)


def search(queries: Embeddings, corpus: Embeddings, k: int) -> tuple[NDArray[np.int64], Embeddings]:
    """The k best rows of the corpus for each query by inner product, best first; equal scores in corpus order.

    Returns:
        indices into the corpus and their scores, both of shape (queries, min(k, corpus)).
    """
    corpus_t = torch.from_numpy(np.ascontiguousarray(corpus.T))
    k = min(k, corpus.shape[0])
    indices = np.empty((len(queries), k), np.int64)
    scores = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), QUERY_CHUNK):
        chunk = slice(start, start + QUERY_CHUNK)
        # A stable sort keeps corpus order among equal scores, which topk does not promise.
        best = torch.sort(torch.from_numpy(queries[chunk]) @ corpus_t, dim=1, descending=True, stable=True)
        indices[chunk] = best.indices[:, :k].numpy()
        scores[chunk] = best.values[:, :k].numpy()
    return indices, scores
