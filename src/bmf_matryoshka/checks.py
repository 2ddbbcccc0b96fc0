"""What an exercise's answer must do.

A check never sees the solution: it compares the answer with a slow, plain reference or tests a property. An unsolved
stub is reported and the notebook goes on; a wrong answer raises `WrongAnswerError` with one line that says what is
wrong, without giving the solution away.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

Answer = Callable[..., Any]

TOLERANCE = 1e-5


class WrongAnswerError(AssertionError):
    """An answer does not do what it must."""

    def _render_traceback_(self) -> list[str]:
        # IPython shows this instead of a page of traceback.
        return [f"not yet right: {self}"]


def cosine(answer: Answer) -> None:
    """cosine(a, b): the cosine of the angle between two vectors."""

    def test() -> None:
        _close(answer(np.array([3.0, 0.0]), np.array([5.0, 0.0])), 1, "parallel vectors of different lengths")
        _close(answer(np.array([1.0, 0.0]), np.array([0.0, 2.0])), 0, "vectors at a right angle")
        _close(answer(np.array([1.0, 1.0]), np.array([-2.0, -2.0])), -1, "opposite vectors")
        a, b = _random(2, 7)
        lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(x * x for x in b))
        _close(answer(a, b), sum(x * y for x, y in zip(a, b, strict=True)) / lengths, "two random vectors")

    _judge("cosine", test)


def truncate(answer: Answer) -> None:
    """truncate(vectors, dim): the first dim components of each row, length 1 again."""

    def test() -> None:
        vectors = _random(5, 8)
        untouched = vectors.copy()
        cut = np.asarray(answer(vectors, 3))
        _shape(cut, (5, 3))
        if np.allclose(cut, untouched[:, :3]):
            raise WrongAnswerError(
                "the right components, but their length is no longer 1: divide each row by its length"
            )
        _close(np.linalg.norm(cut, axis=1), np.ones(5), "the length of each row")
        reference = [[x / math.sqrt(sum(y * y for y in row[:3])) for x in row[:3]] for row in untouched.tolist()]
        _close(cut, reference, "five random rows cut to 3")
        if not np.array_equal(vectors, untouched):
            raise WrongAnswerError("the vectors passed in were changed: work on a copy")

    _judge("truncate", test)


def share_cut(answer: Answer) -> None:
    """share_cut(lengths, limit): the share of texts longer than the limit."""

    def test() -> None:
        _close(answer([10, 20, 30, 40], 25), 0.5, "two of four texts above the limit")
        _close(answer([10, 20, 30, 40], 30), 0.25, "a text as long as the limit, which is not cut")
        _close(answer([5], 512), 0, "no text above the limit")

    _judge("share_cut", test)


def limit_for(answer: Answer) -> None:
    """limit_for(lengths, share): the smallest limit that cuts at most that share of the texts."""

    def test() -> None:
        lengths = [40, 10, 30, 20]
        _equal(int(answer(lengths, 0)), 40, "no text may be cut")
        _equal(int(answer(lengths, 0.25)), 30, "a quarter of four texts may be cut")
        _equal(int(answer(lengths, 0.3)), 30, "30 % of four texts: only one whole text")
        _equal(int(answer([7, 7, 7], 0.5)), 7, "texts of equal length")

    _judge("limit_for", test)


def leaked_share(answer: Answer) -> None:
    """leaked_share(train, test): the share of distinct test passages that also stand in training."""

    def test() -> None:
        _close(answer(["a", "b"], ["c", "d"]), 0, "no shared passage")
        _close(answer(["a", "b", "b"], ["b", "c"]), 0.5, "one of two test passages in training")
        _close(answer(["a", "a"], ["a", "a", "a", "b"]), 0.5, "a test passage that occurs three times (count it once)")

    _judge("leaked_share", test)


def fits(answer: Answer) -> None:
    """fits(pair, batch): whether no pair answers another's question once the pair joins the batch."""

    def test() -> None:
        def pair(own: str, *others: str) -> dict[str, Any]:
            return {"passage_id": own, "relevant": [own, *others]}

        _equal(answer(pair("a"), []), True, "an empty batch")
        _equal(answer(pair("a"), [pair("b"), pair("c")]), True, "three unrelated passages")
        _equal(answer(pair("a"), [pair("b"), pair("a")]), False, "the same passage twice")
        _equal(answer(pair("a", "b"), [pair("b")]), False, "a question that a passage in the batch answers, too")
        _equal(answer(pair("b"), [pair("a", "b")]), False, "a passage that answers a question already in the batch")

    _judge("fits", test)


def reciprocal_rank(answer: Answer) -> None:
    """reciprocal_rank(rank, k): 1 / rank, 0 beyond k and for rank 0 (not found)."""

    def test() -> None:
        _close(answer(1, 10), 1, "rank 1")
        _close(answer(4, 10), 0.25, "rank 4")
        _close(answer(10, 10), 0.1, "rank 10, the last one that counts")
        _close(answer(11, 10), 0, "rank 11 with k = 10")
        _close(answer(0, 10), 0, "rank 0, not found")

    _judge("reciprocal_rank", test)


def ndcg(answer: Answer) -> None:
    """ndcg(hits, relevant, k): discounted gain over the best possible one."""

    def test() -> None:
        _close(answer([True, False, False], 1, 10), 1, "the only relevant passage at rank 1")
        _close(answer([False, True, False], 1, 10), 1 / math.log2(3), "the only relevant passage at rank 2")
        _close(answer([False, False, True], 1, 2), 0, "a hit beyond k")
        _close(
            answer([True, True], 2, 10), 1, "both relevant passages on top (is the best ranking's gain in the divisor?)"
        )
        best = 1 + 1 / math.log2(3) + 0.5
        _close(
            answer([False, True, False, True], 3, 10),
            (1 / math.log2(3) + 1 / math.log2(5)) / best,
            "two of three found",
        )

    _judge("ndcg", test)


def questions_needed(answer: Answer) -> None:
    """questions_needed(values, half): how many questions make a 95 % interval at most that narrow."""

    def test() -> None:
        values = [0.0, 1.0] * 50
        _equal(int(answer(values, 0.05)), 385, "values half 0, half 1, half-width 0.05")
        _equal(int(answer(values, 0.1)), 97, "twice the half-width: a quarter of the questions, rounded up")
        _equal(int(answer([0.4, 0.6] * 50, 0.05)), 16, "values that spread less")

    _judge("questions_needed", test)


def ranking_loss(answer: Answer) -> None:
    """ranking_loss(anchors, positives, scale): cross entropy of each anchor's own passage among the batch's."""

    def test() -> None:
        anchors, positives = (torch.tensor(_random(4, 6, seed=seed)) for seed in (1, 2))
        value = torch.as_tensor(answer(anchors, positives, 20.0))
        if value.numel() != 1:
            raise WrongAnswerError(f"shape {tuple(value.shape)}; one number wanted: the mean over the anchors")
        wanted = _plain_ranking_loss(anchors, positives)
        _close(float(value), wanted, "four random pairs (cosine times scale, own passage on the diagonal)", 1e-4)

    _judge("ranking_loss", test)


def matryoshka_loss(answer: Answer) -> None:
    """matryoshka_loss(anchors, positives, dims): the ranking losses at every dimension, added up."""

    def test() -> None:
        anchors, positives = (torch.tensor(_random(4, 8, seed=seed)) for seed in (3, 4))
        parts = [_plain_ranking_loss(anchors[:, :dim], positives[:, :dim]) for dim in (8, 4, 2)]
        value = float(answer(anchors, positives, [8, 4, 2]))
        if abs(value - sum(parts) / len(parts)) < TOLERANCE:
            raise WrongAnswerError("the mean over the dimensions; the loss is their sum")
        _close(float(answer(anchors, positives, [8])), parts[0], "the full dimension alone is the plain loss", 1e-4)
        _close(value, sum(parts), "three dimensions of four random pairs", 1e-4)

    _judge("matryoshka_loss", test)


def optimizer_steps(answer: Answer) -> None:
    """optimizer_steps(pairs, batch_size, accumulation, epochs): how often the weights change."""

    def test() -> None:
        _equal(int(answer(320, 32, 1, 1)), 10, "320 pairs in batches of 32")
        _equal(int(answer(321, 32, 1, 1)), 11, "one pair more: the last batch is smaller, but it counts")
        _equal(int(answer(320, 32, 2, 1)), 5, "two batches for a step")
        _equal(int(answer(320, 32, 1, 3)), 30, "three epochs")
        _equal(int(answer(320, 32, 3, 2)), 8, "ten batches, three a step: the last step of an epoch has one")

    _judge("optimizer_steps", test)


def smallest_dim(answer: Answer) -> None:
    """smallest_dim(curve, share): the smallest dim whose value is at least that share of the largest dim's."""

    def test() -> None:
        curve = {384: 0.75, 128: 0.72, 64: 0.5625, 32: 0.5}
        _equal(answer(curve, 0.95), 128, "95 % of the value at 384 dims")
        _equal(answer(curve, 0.75), 64, "75 %, met exactly at 64 dims")
        _equal(answer(curve, 0.99), 384, "99 %, which only the full width meets")
        _equal(answer({64: 0.72, 384: 0.8}, 0.5), 64, "dims in ascending order")

    _judge("smallest_dim", test)


def paired_interval(answer: Answer) -> None:
    """paired_interval(before, after): a 95 % bootstrap interval (low, high) of the mean difference."""

    def test() -> None:
        rng = np.random.default_rng(5)
        before = rng.random(400)
        after = before + rng.normal(0.05, 0.1, 400)
        low, high = answer(before, after)
        if not low < high:
            raise WrongAnswerError(f"({low}, {high}): low must be below high")
        half = 1.96 * (after - before).std() / math.sqrt(400)
        mean = float((after - before).mean())
        if high - low > 3 * half:
            raise WrongAnswerError("far too wide: draw the same queries for both models, then take the difference")
        _close([low, high], [mean - half, mean + half], "400 paired values with a known spread", 0.3 * half)

    _judge("paired_interval", test)


def share_worse(answer: Answer) -> None:
    """share_worse(before, after): the share of questions whose value fell."""

    def test() -> None:
        _close(answer([1.0, 0.5, 0.5, 0.0], [0.5, 0.5, 1.0, 0.0]), 0.25, "one of four fell, two did not change")
        _close(answer([0.2, 0.2], [0.1, 0.0]), 1, "both fell")

    _judge("share_worse", test)


def _judge(name: str, test: Callable[[], None]) -> None:
    try:
        test()
    except NotImplementedError:
        print(f"{name}: not solved yet")
    except WrongAnswerError:
        raise
    except Exception as error:
        raise WrongAnswerError(f"{name} stops with {type(error).__name__}: {error}") from error
    else:
        print(f"{name}: solved")


def _plain_ranking_loss(anchors: torch.Tensor, positives: torch.Tensor) -> float:
    """Cross entropy with scale 20, a pair at a time."""
    total = 0.0
    for row, anchor in enumerate(anchors):
        scores = [20 * float(anchor @ positive / anchor.norm() / positive.norm()) for positive in positives]
        total += math.log(sum(math.exp(score) for score in scores)) - scores[row]
    return total / len(anchors)


def _random(rows: int, columns: int, seed: int = 0) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    return np.random.default_rng(seed).normal(size=(rows, columns))


def _shape(value: "np.ndarray[Any, Any]", wanted: Sequence[int]) -> None:
    if value.shape != tuple(wanted):
        raise WrongAnswerError(f"shape {value.shape}; {tuple(wanted)} wanted")


def _close(value: ArrayLike, wanted: ArrayLike, case: str, tolerance: float = TOLERANCE) -> None:
    if value is None:
        raise WrongAnswerError(f"{case}: nothing is returned")
    if not np.allclose(np.asarray(value, float), wanted, rtol=0, atol=tolerance):
        raise WrongAnswerError(f"{case}: got {np.round(np.asarray(value, float), 4).tolist()}")


def _equal(value: object, wanted: object, case: str) -> None:
    if value is None:
        raise WrongAnswerError(f"{case}: nothing is returned")
    if value != wanted:
        raise WrongAnswerError(f"{case}: got {value}")
