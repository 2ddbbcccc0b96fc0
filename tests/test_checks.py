"""Each check accepts a right answer written for this test, refuses typical wrong ones, and reports a stub."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from bmf_matryoshka import checks

Answer = Callable[..., Any]


def loss(a: Any, p: Any, scale: float = 20.0) -> Any:
    scores = scale * torch.nn.functional.cosine_similarity(a[:, None], p[None], dim=2)
    return -torch.log_softmax(scores, dim=1).diagonal().mean()


def interval(before: Any, after: Any) -> tuple[float, float]:
    result = stats.bootstrap((after - before,), np.mean, method="percentile", n_resamples=500, rng=1)
    return result.confidence_interval.low, result.confidence_interval.high


def unpaired(before: Any, after: Any) -> tuple[float, float]:
    rng = np.random.default_rng(0)
    draws = [rng.choice(after, len(after)).mean() - rng.choice(before, len(before)).mean() for _ in range(500)]
    return float(np.percentile(draws, 2.5)), float(np.percentile(draws, 97.5))


def gain(hits: Any, relevant: int, k: int) -> float:
    best = math.fsum(1 / math.log2(r + 2) for r in range(min(relevant, k)))
    return math.fsum(1 / math.log2(r + 2) for r in range(min(len(hits), k)) if hits[r]) / best


def cut(vectors: Any, dim: int) -> Any:
    return np.array([row[:dim] / np.sqrt((row[:dim] ** 2).sum()) for row in vectors])


def cut_in_place(vectors: Any, dim: int) -> Any:
    vectors /= np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
    return vectors[:, :dim].copy()


RIGHT: list[tuple[Answer, Answer]] = [
    (checks.cosine, lambda a, b: np.dot(a, b) / np.sqrt(np.dot(a, a) * np.dot(b, b))),
    (checks.truncate, cut),
    (checks.share_cut, lambda lengths, limit: len([n for n in lengths if n > limit]) / len(lengths)),
    (checks.limit_for, lambda lengths, share: sorted(lengths)[math.ceil(len(lengths) * (1 - share)) - 1]),
    (checks.leaked_share, lambda train, test: len(set(test).intersection(train)) / len(set(test))),
    (
        checks.fits,
        lambda pair, batch: (
            not any(o["passage_id"] in pair["relevant"] or pair["passage_id"] in o["relevant"] for o in batch)
        ),
    ),
    (checks.reciprocal_rank, lambda rank, k: 0 if rank == 0 or rank > k else 1 / rank),
    (checks.ndcg, gain),
    (checks.questions_needed, lambda v, half: math.ceil(1.96**2 * np.var(v) / half**2)),
    (checks.ranking_loss, loss),
    (checks.matryoshka_loss, lambda a, p, dims: sum(loss(a[:, :d], p[:, :d]) for d in dims)),
    (checks.optimizer_steps, lambda n, b, g, e: math.ceil(math.ceil(n / b) / g) * e),
    (checks.smallest_dim, lambda curve, share: sorted(d for d in curve if curve[d] >= share * curve[max(curve)])[0]),
    (checks.paired_interval, interval),
    (checks.share_worse, lambda before, after: sum(a < b for a, b in zip(after, before, strict=True)) / len(before)),
]

WRONG: list[tuple[Answer, Answer, str]] = [
    (checks.cosine, lambda a, b: a @ b, "parallel vectors of different lengths"),
    (checks.cosine, lambda *_: None, "nothing is returned"),
    (checks.truncate, lambda v, d: v[:, :d], "their length is no longer 1"),
    (checks.truncate, lambda v, d: cut(v, d + 1), r"shape \(5, 4\); \(5, 3\) wanted"),
    (checks.truncate, lambda v, d: cut(v[:, ::-1], d), "five random rows"),
    (checks.truncate, cut_in_place, "vectors passed in were changed"),
    (checks.share_cut, lambda lengths, limit: np.mean(np.array(lengths) >= limit), "as long as the limit"),
    (checks.limit_for, lambda lengths, share: sorted(lengths)[int(len(lengths) * (1 - share)) - 1], "30 %"),
    (checks.leaked_share, lambda train, test: sum(t in train for t in test) / len(test), "three times"),
    (checks.fits, lambda p, b: all(p["passage_id"] != o["passage_id"] for o in b), "answers, too"),
    (checks.fits, lambda p, b: all(o["passage_id"] not in p["relevant"] for o in b), "already in the batch"),
    (checks.reciprocal_rank, lambda rank, k: 1 / rank if rank <= k else 0, "ZeroDivisionError"),
    (checks.reciprocal_rank, lambda rank, k: 1 / rank if 0 < rank < k else 0, "the last one that counts"),
    (checks.ndcg, lambda hits, n, k: gain(hits, 1, k), "both relevant"),
    (checks.ndcg, lambda hits, n, k: gain(hits, n, 99), "beyond k"),
    (checks.questions_needed, lambda v, half: int((1.96 * np.std(v) / half) ** 2), "values half 0"),
    (checks.ranking_loss, lambda a, p, s: loss(a, p, 1.0), "four random pairs"),
    (checks.ranking_loss, lambda a, p, s: a @ p.T, "one number wanted"),
    (
        checks.matryoshka_loss,
        lambda a, p, dims: sum(loss(a[:, :d], p[:, :d]) for d in dims) / len(dims),
        "the mean over",
    ),
    (checks.matryoshka_loss, lambda a, p, dims: len(dims) * loss(a, p), "three dimensions"),
    (checks.optimizer_steps, lambda n, b, g, e: n // b // g * e, "one pair more"),
    (checks.optimizer_steps, lambda n, b, g, e: math.ceil(n / b) // g * e, "three a step"),
    (
        checks.smallest_dim,
        lambda curve, share: min(d for d in curve if curve[d] > share * curve[max(curve)]),
        "exactly",
    ),
    (checks.smallest_dim, lambda curve, share: list(curve)[-1], "95 %"),
    (checks.paired_interval, unpaired, "too wide"),
    (checks.paired_interval, lambda b, a: (1.0, 0.0), "low must be below high"),
    (checks.share_worse, lambda before, after: np.mean(np.array(after) <= np.array(before)), "did not change"),
]


def test_every_check_is_tested() -> None:
    public = {value for name, value in vars(checks).items() if callable(value) and not name.startswith("_")}
    own = {value for value in public if getattr(value, "__module__", "") == checks.__name__} - {checks.WrongAnswerError}
    assert {check for check, _ in RIGHT} == own
    assert {check for check, _, _ in WRONG} == own


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=[check.__name__ for check, _ in RIGHT])
def test_a_right_answer_is_accepted(check: Answer, answer: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    check(answer)
    assert capsys.readouterr().out == f"{check.__name__}: solved\n"


@pytest.mark.parametrize(("check", "answer", "message"), WRONG)
def test_a_wrong_answer_is_named(check: Answer, answer: Answer, message: str) -> None:
    with pytest.raises(checks.WrongAnswerError, match=message) as caught:
        check(answer)
    assert "\n" not in str(caught.value)
    assert caught.value._render_traceback_() == [f"not yet right: {caught.value}"]


@pytest.mark.parametrize("check", [check for check, _ in RIGHT])
def test_a_stub_is_reported_and_the_notebook_goes_on(check: Answer, capsys: pytest.CaptureFixture[str]) -> None:
    def stub(*_: object) -> None:
        raise NotImplementedError("your turn")

    check(stub)
    assert capsys.readouterr().out == f"{check.__name__}: not solved yet\n"
