from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytrec_eval
from datasets import DatasetDict
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.evaluation import SequentialEvaluator
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from bmf_matryoshka import evaluation, metrics, pairs, retrieval
from bmf_matryoshka.errors import InputError

DIMS = (384, 256, 128, 64, 32)


@pytest.mark.parametrize("protocol", ["passage", "card"])
def test_every_key_equals_the_stock_evaluators(
    model: SentenceTransformer, course: pd.DataFrame, protocol: evaluation.Protocol
) -> None:
    few = pairs.split(pairs.take_passages(course, 20))
    task = evaluation.build_task(few, "test", protocol)
    queries: dict[str, Any] = dict(task.queries)
    corpus: dict[str, Any] = dict(task.corpus)
    stock = SequentialEvaluator(
        [
            InformationRetrievalEvaluator(
                queries, corpus, task.relevant, truncate_dim=dim, name=f"dim_{dim}", write_csv=False
            )
            for dim in DIMS
        ]
    )
    theirs = stock(model)
    ours = evaluation.MatryoshkaEvaluator(task, DIMS)(model)
    more = {"mean_cosine_ndcg@10", *(f"dim_{dim}_cosine_recall@100" for dim in DIMS)}
    assert set(theirs) - {"sequential_score"} == set(ours) - more
    for key in ours.keys() & theirs.keys():
        assert ours[key] == pytest.approx(theirs[key], abs=1e-6), key
    mean = np.mean([ours[f"dim_{dim}_cosine_ndcg@10"] for dim in DIMS])
    assert ours["mean_cosine_ndcg@10"] == pytest.approx(mean)


def test_the_passage_protocol_has_each_passage_once_and_every_listed_answer(course: pd.DataFrame) -> None:
    task = evaluation.build_task(pairs.split(course), "test")
    assert len(set(task.corpus.values())) == len(task.corpus) == course["passage_id"].nunique()
    listed = dict(zip(course["question_id"], course["relevant"], strict=True))
    assert all(task.relevant[question] == set(listed[question]) for question in task.queries)
    assert list(task.corpus) == sorted(task.corpus)


def test_the_card_protocol_has_a_row_per_pair_train_rows_first_and_one_answer() -> None:
    table = pairs.from_texts([f"Frage {n}" for n in range(30)], [f"Absatz {n // 3}" for n in range(30)])
    parts = pairs.split(table, "question", (0.8, 0.0, 0.2))
    task = evaluation.build_task(parts, "test", "card")
    assert len(task.corpus) == 30
    assert list(task.corpus.values())[: len(parts["train"])] == parts["train"]["positive"][:]
    assert all(len(answers) == 1 for answers in task.relevant.values())
    for key, answers in task.relevant.items():
        question = task.queries[key]
        own = table.loc[table["anchor"] == question, "positive"].item()
        assert task.corpus[next(iter(answers))] == own


def test_duplicates_spoil_the_card_protocol_but_not_the_passage_protocol() -> None:
    """A perfect model, three questions a passage: CARD.md's finding in small."""
    rng = np.random.default_rng(0)
    table = pairs.from_texts([f"Frage {n}" for n in range(60)], [f"Absatz {n // 3}" for n in range(60)])
    parts = pairs.split(table, "question", (0.8, 0.0, 0.2))
    vectors = {text: rng.normal(size=16).astype(np.float32) for text in table["positive"]}
    question_vectors = dict(zip(table["anchor"], (vectors[text] for text in table["positive"]), strict=True))
    accuracy = {}
    protocols: tuple[evaluation.Protocol, ...] = ("passage", "card")
    for protocol in protocols:
        task = evaluation.build_task(parts, "test", protocol)
        scores = evaluation.score(
            np.stack([question_vectors[text] for text in task.queries.values()]),
            np.stack([vectors[text] for text in task.corpus.values()]),
            task,
            [16],
        )
        accuracy[protocol] = scores["accuracy@1"].mean()
    assert accuracy["passage"] == 1
    assert accuracy["card"] < 0.3


def copies_task(ties: evaluation.Ties) -> tuple[evaluation.Task, "np.ndarray[Any, Any]"]:
    """A perfect model on ten passages that stand three times each, under the card's protocol."""
    table = pairs.from_texts([f"Frage {n}" for n in range(30)], [f"Absatz {n % 10}" for n in range(30)])
    parts = pairs.split(table, "question", (0.5, 0.0, 0.5))
    task = evaluation.build_task(parts, "test", "card", ties=ties)
    vectors = {f"Absatz {n}": np.eye(10, dtype=np.float32)[n] for n in range(10)}
    return task, np.stack([vectors[text] for text in task.corpus.values()])


def test_ties_between_copies_stand_in_the_asked_order() -> None:
    accuracy = {}
    for ties in ("order", "random", "worst"):
        task, corpus = copies_task(ties)
        rows = [int(next(iter(answers))) for answers in task.relevant.values()]
        frame = evaluation.score(corpus[rows], corpus, task, [10])
        twins = [
            [n for n, text in enumerate(task.corpus.values()) if text == list(task.corpus.values())[row]]
            for row in rows
        ]
        if ties == "order":
            assert frame["rank"].tolist() == [group.index(row) + 1 for group, row in zip(twins, rows, strict=True)]
        if ties == "worst":
            assert frame["rank"].tolist() == [3] * len(rows)
        assert frame["rank"].between(1, 3).all()
        accuracy[ties] = frame["accuracy@1"].mean()
    assert accuracy["worst"] == 0
    assert 0 < accuracy["random"] < 1


def test_the_text_protocol_accepts_every_copy(model: SentenceTransformer) -> None:
    table = pairs.from_texts([f"Frage {n}" for n in range(30)], [f"Absatz {n // 3}" for n in range(30)])
    parts = pairs.split(table, "question", (0.8, 0.0, 0.2))
    task = evaluation.build_task(parts, "test", "text")
    assert len(task.corpus) == 30
    for key, answers in task.relevant.items():
        assert len(answers) == 3
        own = table.loc[table["anchor"] == task.queries[key], "positive"].item()
        assert {task.corpus[row] for row in answers} == {own}
    tasks = {str(name): evaluation.build_task(parts, "test", name) for name in evaluation.PROTOCOLS}
    results = evaluation.evaluate_tasks(model, tasks, (384, 64))
    assert list(results) == ["passage", "text", "card"]
    top = {name: result.values(384, "accuracy@1").mean() for name, result in results.items()}
    assert top["text"] == top["passage"] >= top["card"]
    for name, result in results.items():
        alone = evaluation.evaluate(model, tasks[name], (384, 64))
        np.testing.assert_allclose(alone.values(64, "map@100"), result.values(64, "map@100"), atol=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_rankings_of_the_shipped_data_score_as_in_trec_eval(
    model: SentenceTransformer, small: DatasetDict, ties: bool
) -> None:
    task = evaluation.build_task(small, "test")
    queries = retrieval.encode(model, list(task.queries.values()), "query")
    corpus = retrieval.encode(model, list(task.corpus.values()), "passage")
    if ties:  # one decimal: many equal scores
        queries, corpus = queries.round(1), corpus.round(1)
    names = {"ndcg_cut_10": "ndcg@10", "map_cut_100": "map@100", "recall_100": "recall@100"}
    names |= {f"recall_{k}": f"recall@{k}" for k in metrics.AT} | {f"P_{k}": f"precision@{k}" for k in metrics.AT}
    wanted = {"ndcg_cut.10", "map_cut.100", "recall.1,3,5,10,100", "P.1,3,5,10"}
    qrels = {query: dict.fromkeys(found, 1) for query, found in task.relevant.items()}
    assert max(len(found) for found in qrels.values()) > 1
    ids = list(task.corpus)
    for dim in (384, 8):
        table = evaluation.score(queries, corpus, task, [dim])
        found, _ = retrieval.search(queries, corpus, 100, dim)
        run = {
            query: {ids[row]: float(-rank) for rank, row in enumerate(rows)}
            for query, rows in zip(task.queries, found.tolist(), strict=True)
        }
        theirs = pytrec_eval.RelevanceEvaluator(qrels, wanted).evaluate(run)
        for trec, own in names.items():
            reference = [theirs[query][trec] for query in task.queries]
            np.testing.assert_allclose(table[own].to_numpy(), reference, atol=1e-6, err_msg=own)


def test_questions_are_grouped_by_what_is_known_about_them(small: DatasetDict) -> None:
    labels = evaluation.labels(small, "test")
    assert labels.index.tolist() == small["test"]["question_id"][:]
    assert set(labels["overlap"]) == {"low", "middle", "high"}
    asked = small["test"].to_pandas().set_index("question_id")
    lengths = asked["positive"].str.split().str.len().groupby(labels["passage_length"], observed=True)
    assert lengths.max()["low"] <= lengths.min()["high"]
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"question_id": labels.index, "dim": 8, "ndcg@10": rng.random(len(labels))})
    sliced = evaluation.Results(frame, {}).sliced(labels["style"], 8)
    for style, row in sliced.iterrows():
        chosen = frame.loc[(labels["style"] == style).to_numpy(), "ndcg@10"]
        assert row["questions"] == len(chosen)
        assert row["value"] == pytest.approx(chosen.mean())
        assert row["low"] <= row["value"] <= row["high"]
    assert sliced["questions"].sum() == len(labels)


def test_own_corpus_holds_the_passages_of_the_split_only(small: DatasetDict) -> None:
    task = evaluation.build_task(small, "validation", corpus="own")
    assert set(task.corpus) == set(small["validation"]["passage_id"])
    assert all(answers for answers in task.relevant.values())


def test_unknown_splits_and_protocols_are_refused(small: DatasetDict) -> None:
    with pytest.raises(InputError, match="no split 'tset': choose all or one of train, validation, test"):
        evaluation.build_task(small, "tset")
    with pytest.raises(InputError, match="unknown protocol 'cart'"):
        evaluation.build_task(small, "test", "cart")  # type: ignore[arg-type]


def table(values: list[float], dim: int = 8) -> evaluation.Results:
    """Results that hold one value per query for every measure."""
    rows = dict.fromkeys(metrics.NAMES, values)
    frame = pd.DataFrame({"question_id": [str(n) for n in range(len(values))], "style": "", "dim": dim, **rows})
    return evaluation.Results(frame.assign(top="", rank=1), {"queries": len(values)})


def test_a_paired_difference_is_narrower_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(3)
    before = rng.random(300)
    a, b = table(before.tolist()), table((before + rng.normal(0.05, 0.02, 300)).tolist())
    difference = b.difference(a, 8)
    assert difference.low > 0.04
    assert difference.high < 0.06
    assert a.interval(8).high > b.interval(8).low


def test_results_of_different_queries_are_not_compared() -> None:
    a, b = table([0.1, 0.2]), table([0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="different queries"):
        a.difference(b, 8)
    with pytest.raises(InputError, match=r"dim 4 was not evaluated: choose one of \[8\]"):
        a.interval(4)


def test_results_come_back_from_disk(tmp_path: Path) -> None:
    results = table([0.25, 0.5])
    results.save(tmp_path / "results" / "untuned")
    again = evaluation.Results.load(tmp_path / "results" / "untuned")
    pd.testing.assert_frame_equal(again.table, results.table)
    assert again.summary() == results.summary()
    assert again.summary()["dims"]["8"]["ndcg@10"]["value"] == 0.375
    with pytest.raises(InputError, match="run the chapter that measures it first"):
        evaluation.Results.load(tmp_path / "nothing")


def test_dims_above_the_width_are_refused_before_encoding(model: SentenceTransformer, small: DatasetDict) -> None:
    task = evaluation.build_task(small, "test")
    with pytest.raises(InputError, match="768 is above the model's width of 384"):
        evaluation.evaluate(model, task, (768, 64))
