"""Encode once at full width; search exactly, at any dimension, in bounded memory."""

import copy
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize
from tqdm.auto import tqdm

from . import base_models, files, hardware

Embeddings = NDArray[np.float32]
Kind = Literal["query", "passage"]

QUERY_CHUNK = 1024
CORPUS_CHUNK = 16_384
"""Scores are held for this many queries and passages at a time: 64 MB."""
EAGER_LENGTH = 256
"""Models cut at most here attend faster in 16 bits on a processor by plain products than by PyTorch's fused kernel
(12 heads, 2,048 tokens, two cores with AVX-512 BF16: 7.0 against 7.6 ms at 256 a text, 6.4 against 8.3 at 170)."""
BLOCK = 64
"""Scores are skipped in blocks of this many where none is good enough."""


def encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    kind: Kind,
    precision: hardware.Precision = "float32",
    token_budget: int | None = None,
    show_progress: bool = False,
    cache: Path | None = None,
) -> Embeddings:
    """Encode texts at the model's full width, with the model's prompt for their kind.

    A text that occurs several times is encoded once. Texts are sorted by length and batched under a budget of tokens,
    padding included, so that short texts come in large batches and little is spent on padding. Below float32, the
    weights themselves are cast (in a copy of the model), which saves a cast per batch over autocast.

    Args:
        model: the model; it is not changed.
        texts: what to encode.
        kind: selects the model's prompt.
        precision: "float32" is the reference.
        token_budget: tokens a batch, default `hardware.token_budget`; a longer text is a batch of its own.
        show_progress: show a bar.
        cache: a folder that keeps embeddings between runs, keyed by the model's fingerprint and the text.

    Returns:
        float32 array of shape (len(texts), width), rows as the model gives them; those of a model that normalises
        have length 1 in any precision.
    """
    unique = list(dict.fromkeys(texts))
    if cache is None:
        vectors = _encode(model, unique, kind, precision, token_budget, show_progress)
    else:
        vectors = _encode_missing(model, unique, kind, precision, token_budget, show_progress, cache)
    if len(unique) == len(texts):
        return vectors
    position = {text: number for number, text in enumerate(unique)}
    return vectors[[position[text] for text in texts]]


def fingerprint(model: SentenceTransformer) -> str:
    """A hash of what determines a model's embeddings: weights, modules, length limit, prompts."""
    described = [str(model), model.max_seq_length, sorted(model.prompts.items())]
    described.append(base_models.hash_weights(model.state_dict()))
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Positions of texts in batches of similar length, longest first, each at most `budget` tokens with its padding.

    Args:
        lengths: tokens of each text.
        budget: tokens a batch; a text above it is a batch of its own.
    """
    batch: list[int] = []
    for position in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        # The first of a batch is its longest: every text is padded to it.
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


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


def search(
    queries: Embeddings, corpus: Embeddings, k: int, dim: int | None = None, device: str = "cpu"
) -> tuple[NDArray[np.int64], Embeddings]:
    """The k best rows of the corpus for each query, best first; equal scores in corpus order.

    The score is the inner product; with `dim`, that of the rows truncated to it. The corpus is truncated and scored a
    chunk at a time, so memory beyond the corpus itself stays below 1 GiB whatever its size.

    Args:
        queries: shape (queries, width).
        corpus: shape (passages, width); not copied as a whole.
        k: how many.
        dim: truncate both to this dimension first.
        device: where the products are computed.

    Returns:
        indices into the corpus and their scores, both of shape (queries, min(k, passages)).
    """
    k = min(k, len(corpus))
    parts = [
        _search(queries[start : start + QUERY_CHUNK], corpus, k, dim, device)
        for start in range(0, len(queries), QUERY_CHUNK)
    ]
    if not parts:
        return np.empty((0, k), np.int64), np.empty((0, k), np.float32)
    indices, scores = zip(*parts, strict=True)
    return np.concatenate(indices), np.concatenate(scores)


def _search(
    queries: Embeddings, corpus: Embeddings, k: int, dim: int | None, device: str
) -> tuple[NDArray[np.int64], Embeddings]:
    asked = torch.from_numpy(queries if dim is None else truncate(queries, dim)).to(device)
    best = torch.full((len(queries), k), -torch.inf, device=device)
    where = torch.zeros((len(queries), k), dtype=torch.long, device=device)
    room = torch.empty(len(queries) * min(len(corpus), CORPUS_CHUNK), device=device)
    # Small chunks first: they find a good k-th score early, which then rules out nearly all of the rest.
    start, size = 0, CORPUS_CHUNK // 16
    while start < len(corpus):
        chunk = corpus[start : start + size]
        rows = torch.from_numpy(np.ascontiguousarray(chunk) if dim is None else truncate(chunk, dim)).to(device)
        scores = room[: len(queries) * len(rows)].view(len(queries), len(rows))
        torch.mm(asked, rows.T, out=scores)
        best, where = _merge(best, where, scores, start)
        start, size = start + len(chunk), min(2 * size, CORPUS_CHUNK)
    return where.cpu().numpy(), best.cpu().numpy()


def _merge(
    best: torch.Tensor, where: torch.Tensor, scores: torch.Tensor, offset: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best k of what was found so far and a chunk's scores; earlier passages win ties."""
    k, passages = best.shape[1], scores.shape[1]
    if passages % BLOCK:
        scores = torch.nn.functional.pad(scores, (0, -passages % BLOCK), value=-torch.inf)
    last = best[:, -1]
    blocks = scores.view(len(best), -1, BLOCK)
    row, block = torch.nonzero(blocks.amax(dim=2) > last[:, None], as_tuple=True)
    found = blocks[row, block]
    hit, inside = torch.nonzero(found > last[row][:, None], as_tuple=True)
    row, values = row[hit], found[hit, inside]
    columns = block[hit] * BLOCK + inside + offset
    # From one list of finds, in order of row and column, to a table with a row per query, padded at the end.
    counts = torch.bincount(row, minlength=len(best))
    slots = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    longest = int(counts.max()) if len(row) else 0
    new_best = torch.cat([best, best.new_full((len(best), longest), -torch.inf)], dim=1)
    new_where = torch.cat([where, where.new_zeros((len(best), longest))], dim=1)
    new_best[row, k + slots] = values
    new_where[row, k + slots] = columns
    # A stable sort keeps corpus order among equal scores, which topk does not promise.
    order = torch.sort(new_best, dim=1, descending=True, stable=True)
    return order.values[:, :k].contiguous(), new_where.gather(1, order.indices[:, :k])


def _encode(
    model: SentenceTransformer,
    texts: Sequence[str],
    kind: Kind,
    precision: hardware.Precision,
    token_budget: int | None,
    show_progress: bool,
) -> Embeddings:
    vectors = np.empty((len(texts), base_models.width(model)), np.float32)
    if not texts:
        return vectors
    if precision != "float32":
        model = _cast(model, getattr(torch, precision))
    # Told the device, the library leaves the batch to this model. Otherwise, in a training with several processes, it
    # shares the batch with their models, which are not cast, and the result differs from that of one process.
    device = str(model.device)
    encode_kind = model.encode_query if kind == "query" else model.encode_document
    limit = model.max_seq_length or np.iinfo(np.int32).max
    lengths = [min(limit, length) for length in base_models.count_tokens(model, texts)]
    budget = token_budget or hardware.token_budget(model.device.type)
    with tqdm(total=len(texts), desc=f"encoding {kind}", unit="text", disable=not show_progress) as bar:
        for batch in token_batches(lengths, budget):
            rows = encode_kind(
                [texts[position] for position in batch],
                batch_size=len(batch),
                show_progress_bar=False,
                convert_to_tensor=True,
                device=device,
            )
            vectors[batch] = rows.float().cpu().numpy()
            bar.update(len(batch))
    if precision != "float32" and isinstance(model[-1], Normalize):
        vectors = truncate(vectors, vectors.shape[1])  # in 16 bits, a length itself is off by up to .4 %
    return vectors


def _cast(model: SentenceTransformer, kind: torch.dtype) -> SentenceTransformer:
    """A copy of the model with all weights cast, which shares the tokenizer: that is the slowest part to copy."""
    known: dict[int, object] = {
        id(weight): torch.nn.Parameter(weight.detach().to(kind), requires_grad=False) for weight in model.parameters()
    }
    known[id(model.tokenizer)] = model.tokenizer
    cast = copy.deepcopy(model, known).to(kind)
    if model.device.type == "cpu" and (model.max_seq_length or np.inf) <= EAGER_LENGTH:
        base_models.transformer(cast).set_attn_implementation("eager")
    return cast


def _encode_missing(
    model: SentenceTransformer,
    texts: Sequence[str],
    kind: Kind,
    precision: hardware.Precision,
    token_budget: int | None,
    show_progress: bool,
    cache: Path,
) -> Embeddings:
    """Encode what the cache lacks, and put it there."""
    path = cache / f"{fingerprint(model)[:32]}-{kind}-{precision}.npz"
    keys = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    known: dict[str, NDArray[np.float32]] = {}
    if path.is_file():
        with np.load(path, allow_pickle=False) as stored:
            known = dict(zip(stored["keys"].tolist(), stored["vectors"], strict=True))
    missing = [position for position, key in enumerate(keys) if key not in known]
    if missing:
        fresh = _encode(model, [texts[position] for position in missing], kind, precision, token_budget, show_progress)
        known |= {keys[position]: vector for position, vector in zip(missing, fresh, strict=True)}
        with files.whole_file(path) as part, part.open("wb") as file:
            np.savez(file, keys=np.array(list(known)), vectors=np.stack(list(known.values())))
    return np.stack([known[key] for key in keys]) if keys else np.empty((0, base_models.width(model)), np.float32)
