"""Retrieval measures and their uncertainty: arrays in, numbers out."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

AT = (1, 3, 5, 10)
NDCG_AT, MRR_AT, MAP_AT = 10, 10, 100
CUTOFF = max(*AT, NDCG_AT, MRR_AT, MAP_AT)
"""Ranks that the measures look at."""

NAMES = (
    *(f"accuracy@{k}" for k in AT),
    *(f"{name}@{k}" for k in AT for name in ("precision", "recall")),
    f"recall@{MAP_AT}",
    f"ndcg@{NDCG_AT}",
    f"mrr@{MRR_AT}",
    f"map@{MAP_AT}",
)

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A mean over queries with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """How far the interval reaches from the value, on its longer side."""
        return max(self.high - self.value, self.value - self.low)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def per_query(hits: NDArray[np.bool_], relevant: NDArray[np.integer]) -> dict[str, Values]:
    """Every measure for every query, under the names of `NAMES`.

    accuracy@k is 1 if any of the first k hits is relevant; precision@k and recall@k divide the relevant ones among
    them by k and by all relevant ones. mrr@10 is 1 / rank of the first relevant hit, 0 beyond rank 10. ndcg@10 is the
    discounted gain, sum of 1 / log2(rank + 1) over relevant hits, divided by that of the best possible ranking
    (Järvelin and Kekäläinen 2002, binary relevance). map@100 is the sum of precision at each relevant hit, divided by
    min(100, all relevant ones).

    Args:
        hits: shape (queries, ranks), whether the passage at each rank is relevant; fewer ranks than `CUTOFF` only where
            the corpus is smaller.
        relevant: shape (queries,), how many passages are relevant to each query, at least 1.

    Raises:
        ValueError: shapes differ, or a query has no relevant passage.
    """
    if hits.ndim != 2 or relevant.shape != hits.shape[:1]:  # noqa: PLR2004
        raise ValueError(f"hits {hits.shape} and relevant {relevant.shape}: want (queries, ranks) and (queries,)")
    if len(relevant) and relevant.min() < 1:
        raise ValueError(f"query {int(relevant.argmin())} has no relevant passage: leave it out")
    hits = hits[:, :CUTOFF].astype(float)
    found = hits.cumsum(axis=1)
    ranks = np.arange(1, hits.shape[1] + 1)
    last = hits.shape[1] - 1

    def found_at(k: int) -> Values:
        return found[:, min(k - 1, last)]

    discount = 1 / np.log2(ranks[:NDCG_AT] + 1)
    all_discounts = 1 / np.log2(np.arange(2, NDCG_AT + 2))
    ideal = all_discounts.cumsum()[np.minimum(relevant, NDCG_AT) - 1]
    return {
        **{f"accuracy@{k}": (found_at(k) > 0).astype(float) for k in AT},
        **{f"precision@{k}": found_at(k) / k for k in AT},
        **{f"recall@{k}": found_at(k) / relevant for k in (*AT, MAP_AT)},
        f"ndcg@{NDCG_AT}": hits[:, :NDCG_AT] @ discount / ideal,
        f"mrr@{MRR_AT}": (hits[:, :MRR_AT] / ranks[:MRR_AT]).max(axis=1),
        f"map@{MAP_AT}": (hits * found / ranks).sum(axis=1) / np.minimum(relevant, MAP_AT),
    }


def first_rank(hits: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The rank of the first relevant hit, from 1; 0 where there is none."""
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)


def mean_interval(values: Sequence[float] | Values, seed: int = 0, resamples: int = 2000) -> Interval:
    """The mean of one value per query, with a 95 % percentile bootstrap interval over queries.

    For a comparison, pass the differences of two systems on the same queries: that is the paired interval.

    Raises:
        ValueError: there are no values.
    """
    values = np.asarray(values, float)
    if not len(values):
        raise ValueError("no values: an interval needs at least one query")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    result = stats.bootstrap(
        (values,), np.mean, n_resamples=resamples, method="percentile", batch=200, rng=np.random.default_rng(seed)
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))


def permutation_p(differences: Sequence[float] | Values, seed: int = 0, resamples: int = 9999) -> float:
    """The two-sided p-value of a paired permutation test: how often random signs give a mean difference as large.

    (Fisher's randomisation test; Smucker, Allan and Carterette 2007 recommend it for retrieval.)

    Args:
        differences: one for each query, of two systems on the same queries.
        seed: of the random signs.
        resamples: how many; the smallest possible value is 1 / (resamples + 1).
    """
    values = np.asarray(differences, float)
    if not values.any():
        return 1.0
    result = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=500,
        rng=np.random.default_rng(seed),
    )
    return float(result.pvalue)
