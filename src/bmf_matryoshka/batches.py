"""Which pairs share a batch, and how a batch goes through the model."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.sampler import DefaultBatchSampler

from .retrieval import token_batches

Features = dict[str, Any]


class SimilarLengthBatchSampler(DefaultBatchSampler):
    """Batches of pairs with passages of similar length, in which no passage answers another pair's question.

    Sorted by length, with 20 % of noise, so that batches differ between epochs: this saves most of the padding. The
    last pairs of an epoch that fit no batch wait for the next epoch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool, **options: Any):
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **options)
        self.passages: list[str] = list(dataset["passage_id"])
        self.relevant = [frozenset(relevant) for relevant in dataset["relevant"]]
        self.lengths = torch.tensor([len(text) for text in dataset["positive"]], dtype=torch.float)

    def __len__(self) -> int:
        full, rest = divmod(len(self.passages), self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        noise = 0.8 + 0.4 * torch.rand(len(self.lengths), generator=generator)
        waiting = deque((self.lengths * noise).argsort().tolist())
        batches = [self._fill(waiting) for _ in range(len(self))]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            if len(batches[number]) >= (self.batch_size if self.drop_last else 1):
                yield batches[number]

    def _fill(self, waiting: deque[int]) -> list[int]:
        """Take a batch from the front of the queue; pairs that clash with it keep their place."""
        batch: list[int] = []
        passages: set[str] = set()
        answers: set[str] = set()
        skipped: list[int] = []
        while waiting and len(batch) < self.batch_size:
            pair = waiting.popleft()
            if self.passages[pair] in answers or self.relevant[pair] & passages:
                skipped.append(pair)
                continue
            batch.append(pair)
            passages.add(self.passages[pair])
            answers |= self.relevant[pair]
        waiting.extendleft(reversed(skipped))
        return batch


@contextmanager
def length_groups(model: SentenceTransformer, budget: int) -> Iterator[None]:
    """Inside the block, the model takes each batch in groups of texts of similar length.

    A group is padded to its own longest text only. Embeddings and gradients are those of the batch in one piece, so a
    loss still tells each text apart from all others of the batch.

    Args:
        model: works as before outside of the block.
        budget: tokens a group, padding included.
    """
    whole = model.forward

    def in_groups(features: Features, **options: Any) -> Features:
        lengths = features["attention_mask"].sum(dim=1).tolist()
        groups = list(token_batches(lengths, budget))
        parts = [whole(_rows(features, group), **options) for group in groups]
        order = torch.tensor([row for group in groups for row in group]).argsort()
        return {"sentence_embedding": torch.cat([part["sentence_embedding"] for part in parts])[order]}

    model.forward = in_groups  # type: ignore[assignment]
    try:
        yield
    finally:
        model.forward = whole  # type: ignore[method-assign]


def _rows(features: Features, rows: list[int]) -> Features:
    """Some rows of a batch, without the columns that are padding in all of them."""
    used = features["attention_mask"][rows].any(dim=0)
    return {key: value[rows][:, used] if torch.is_tensor(value) else value for key, value in features.items()}
