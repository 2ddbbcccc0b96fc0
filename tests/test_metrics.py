import itertools
import math
from typing import Any

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from bmf_matryoshka import metrics


def stock(hits: "np.ndarray[tuple[int, int], np.dtype[np.bool_]]", relevant: list[int]) -> dict[str, float]:
    """The library's own computation on the same rankings."""
    rows = [str(row) for row in range(len(hits))]
    queries: dict[str, Any] = {row: row for row in rows}
    corpus: dict[str, Any] = {f"{row} {rank}": "" for row in rows for rank in range(2 * max(hits.shape[1], *relevant))}
    wanted: dict[str, set[str]] = {}
    results: list[object] = []
    for row in rows:
        found = hits[int(row)]
        own = {f"{row} {rank}" for rank in np.flatnonzero(found)}
        hidden = [f"{row} {hits.shape[1] + number}" for number in range(relevant[int(row)] - len(own))]
        wanted[row] = own | set(hidden)
        results.append([{"corpus_id": f"{row} {rank}", "score": -float(rank)} for rank in range(hits.shape[1])])
    evaluator = InformationRetrievalEvaluator(queries, corpus, wanted, precision_recall_at_k=[1, 3, 5, 10, 100])
    scores = evaluator.compute_metrics(results)
    values = {f"{name.split('@')[0]}@{k}": float(v) for name, values in scores.items() for k, v in values.items()}
    del values["precision@100"]
    return values


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(1, 130), st.floats(0, 0.3), st.sampled_from([0, 1, 5, 120]), st.integers(0, 999))
def test_every_measure_equals_the_library(queries: int, ranks: int, share: float, unseen: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    hits = rng.random((queries, ranks)) < share
    relevant = np.maximum(hits.sum(axis=1) + unseen, 1)
    ours = metrics.per_query(hits, relevant)
    theirs = stock(hits[:, : metrics.CUTOFF], relevant.tolist())
    assert set(ours) == set(metrics.NAMES) == set(theirs)
    for name in metrics.NAMES:
        assert ours[name].mean() == pytest.approx(theirs[name], abs=1e-12), name


def test_known_values() -> None:
    hits = np.zeros((3, 100), bool)
    hits[0, 0] = hits[1, 3] = True
    values = metrics.per_query(hits, np.array([1, 2, 1]))
    assert values["accuracy@1"].tolist() == [1, 0, 0]
    assert values["accuracy@5"].tolist() == [1, 1, 0]
    assert values["precision@5"].tolist() == [0.2, 0.2, 0]
    assert values["recall@5"].tolist() == [1, 0.5, 0]
    assert values["recall@100"].tolist() == [1, 0.5, 0]
    assert values["mrr@10"].tolist() == [1, 0.25, 0]
    assert values["map@100"].tolist() == [1, 0.125, 0]
    assert values["ndcg@10"][1] == pytest.approx(1 / math.log2(5) / (1 + 1 / math.log2(3)))
    assert metrics.first_rank(hits).tolist() == [1, 4, 0]


@pytest.mark.parametrize(
    ("hits", "relevant", "message"),
    [
        (np.zeros((2, 5), bool), np.array([1, 0]), "query 1 has no relevant passage"),
        (np.zeros((2, 5), bool), np.array([1]), r"hits \(2, 5\) and relevant \(1,\)"),
        (np.zeros(5, bool), np.array([1]), r"hits \(5,\)"),
    ],
)
def test_wrong_input_is_refused(
    hits: "np.ndarray[tuple[int, ...], np.dtype[np.bool_]]",
    relevant: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.per_query(hits, relevant)


def test_the_interval_agrees_with_the_normal_one_on_many_values() -> None:
    values = np.random.default_rng(1).random(2000)
    interval = metrics.mean_interval(values)
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert metrics.mean_interval(values) == interval
    assert str(metrics.Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


def test_the_interval_is_the_percentile_one_on_skewed_values() -> None:
    values = np.random.default_rng(3).exponential(size=30) ** 2
    means = np.random.default_rng(4).choice(values, (20_000, 30)).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    interval = metrics.mean_interval(values, resamples=20_000)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=0.03)
    assert high - values.mean() > 1.2 * (values.mean() - low)


def test_the_interval_holds_the_true_mean_about_95_times_in_100() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for seed in range(200):
        interval = metrics.mean_interval((rng.random(80) < 0.6).astype(float), seed=seed, resamples=400)
        inside += interval.low <= 0.6 <= interval.high
    assert 180 <= inside <= 199


def test_an_interval_of_equal_values_is_a_point_and_of_none_is_refused() -> None:
    assert metrics.mean_interval([0.5, 0.5]) == metrics.Interval(0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no values"):
        metrics.mean_interval([])


def test_every_measure_equals_trec_eval() -> None:
    rng = np.random.default_rng(0)
    hits = rng.random((40, 100)) < 0.05
    relevant = hits.sum(axis=1) + rng.integers(1, 4, 40)
    ours = metrics.per_query(hits, relevant)
    qrels = {
        str(row): {
            **{f"d{rank}": 1 for rank in np.flatnonzero(hits[row])},
            **{f"unseen{number}": 1 for number in range(relevant[row] - hits[row].sum())},
        }
        for row in range(40)
    }
    run = {str(row): {f"d{rank}": float(-rank) for rank in range(100)} for row in range(40)}
    top = {row: {doc: score for doc, score in docs.items() if score > -10} for row, docs in run.items()}
    names = {"ndcg_cut_10": "ndcg@10", "map_cut_100": "map@100"}
    names |= {f"recall_{k}": f"recall@{k}" for k in (1, 3, 5, 10, 100)} | {
        f"P_{k}": f"precision@{k}" for k in metrics.AT
    }
    wanted = {"ndcg_cut.10", "map_cut.100", "recall.1,3,5,10,100", "P.1,3,5,10"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
    reciprocal = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(top)
    for row in range(40):
        for trec, own in names.items():
            assert ours[own][row] == pytest.approx(theirs[str(row)][trec], abs=1e-6), own
        assert ours["mrr@10"][row] == pytest.approx(reciprocal[str(row)]["recip_rank"], abs=1e-6)


def test_the_permutation_test_agrees_with_all_sign_flips() -> None:
    differences = np.array([0.3, -0.1, 0.2, 0.25, 0.05, -0.02, 0.4, 0.1])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    means = (signs * differences).mean(axis=1)
    exact = np.mean(np.abs(means) >= abs(differences.mean()) - 1e-12)
    assert metrics.permutation_p(differences) == pytest.approx(exact, abs=0.01)
    assert metrics.permutation_p([0.0, 0.0]) == 1.0
    assert metrics.permutation_p(np.full(200, 0.1)) < 0.001
