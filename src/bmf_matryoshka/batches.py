"""Which pairs share a batch."""

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers.base.sampler import DefaultBatchSampler


class SimilarLengthBatchSampler(DefaultBatchSampler):
    """Batches of pairs with passages of similar length, in which no passage answers another pair's question.

    Padding wastes half of a random batch; sorting by length (with 20 % of noise, so that batches differ between epochs)
    saves most of it. The last pairs of an epoch that fit no batch wait for the next epoch.
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
