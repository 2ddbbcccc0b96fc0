import math
from collections import Counter

import numpy as np
import pandas as pd
import pytest

from bmf_matryoshka import baselines, evaluation, pairs, retrieval
from bmf_matryoshka.errors import InputError

TEXTS = {
    "a": "Die Zulage beträgt jährlich 175 Euro.",
    "b": "Kinderzulagen werden nach der Geburt gezahlt, eine Zulage je Kind.",
    "c": "Der Dienstwagen wird privat gefahren.",
}


def task(queries: dict[str, tuple[str, str]]) -> evaluation.Task:
    return evaluation.Task(
        {name: text for name, (text, _) in queries.items()},
        TEXTS,
        {name: {answer} for name, (_, answer) in queries.items()},
        dict.fromkeys(queries, ""),
    )


def test_bm25_matches_stems_and_finds_nothing_without_a_shared_word() -> None:
    asked = task({"q1": ("Dienstwagens private Fahrten", "c"), "q2": ("Erbschaft", "a"), "q3": ("der die das", "b")})
    table = baselines.bm25(asked).table.set_index("question_id")
    assert table["rank"].tolist() == [1, 0, 0]
    assert table["top"].tolist() == ["c", "", ""]
    assert table["dim"].tolist() == [0, 0, 0]


def test_bm25_ranks_as_its_formula_says() -> None:
    """Robertson's weights with Lucene's idf, word by word, on words that are their own stems."""
    rng = np.random.default_rng(0)
    words = ["haus", "hund", "baum", "rad", "buch", "tor", "bild", "wald"]
    texts = {f"d{n}": " ".join(rng.choice(words, rng.integers(3, 12))) for n in range(30)}
    queries = {f"q{n}": " ".join(rng.choice(words, 2, replace=False)) for n in range(20)}
    asked = evaluation.Task(queries, texts, {q: {"d0"} for q in queries}, dict.fromkeys(queries, ""))
    table = baselines.bm25(asked).table
    counts = {name: Counter(text.split()) for name, text in texts.items()}
    mean = sum(sum(count.values()) for count in counts.values()) / len(counts)

    def weight(word: str, count: Counter[str]) -> float:
        have = sum(word in other for other in counts.values())
        idf = math.log(1 + (len(texts) - have + 0.5) / (have + 0.5))
        return idf * count[word] / (count[word] + 1.5 * (0.25 + 0.75 * sum(count.values()) / mean))

    for question, top in zip(queries.values(), table["top"], strict=True):
        scores = {name: sum(weight(word, count) for word in question.split()) for name, count in counts.items()}
        assert scores[top] == pytest.approx(max(scores.values()), rel=1e-5)


def test_pca_keeps_more_than_a_plain_cut_where_the_signal_lies_elsewhere() -> None:
    rng = np.random.default_rng(1)
    table = pairs.from_texts([f"Frage {n}" for n in range(200)], [f"Absatz {n}" for n in range(200)])
    asked = evaluation.build_task(pairs.split(table, shares=(0.5, 0, 0.5)), "test")
    # The signal is in the last four of 32 components; the others are weak noise.
    signal = {text: rng.normal(size=4) for text in asked.corpus.values()}

    def vectors(texts: list[str], of: dict[str, str]) -> retrieval.Embeddings:
        rows = np.stack([np.concatenate([rng.normal(0, 0.1, 28), signal[of[text]]]) for text in texts])
        return retrieval.truncate(rows.astype(np.float32), 32)

    same = {text: text for text in signal}
    own = dict(zip(table["anchor"], table["positive"], strict=True))
    corpus, queries = vectors(list(asked.corpus.values()), same), vectors(list(asked.queries.values()), own)
    fitted_on = vectors(list(signal), same)
    turned = baselines.pca(fitted_on, queries, corpus, asked, (32, 4))
    plain = evaluation.score(queries, corpus, asked, [4])
    projected = baselines.random_projection(queries, corpus, asked, (32, 4))
    assert turned.values(4).mean() > projected.values(4).mean() > plain["ndcg@10"].mean()
    assert turned.values(4).mean() > 0.9
    assert turned.dims == projected.dims == [32, 4]


def test_pca_leaves_out_dims_that_its_passages_cannot_fit() -> None:
    rows = np.random.default_rng(2).normal(size=(20, 16)).astype(np.float32)
    table = pairs.from_texts([f"Frage {n}" for n in range(20)], [f"Absatz {n}" for n in range(20)])
    asked = evaluation.build_task(pairs.split(table, shares=(0.5, 0, 0.5)), "all")
    assert baselines.pca(rows[:9], rows, rows, asked, (16, 8, 4)).dims == [8, 4]
    with pytest.raises(InputError, match="a PCA of 3 training passages gives 3 dims, 4 is the smallest asked"):
        baselines.pca(rows[:3], rows, rows, asked, (16, 4))
    assert isinstance(baselines.random_projection(rows, rows, asked, (8,)).table, pd.DataFrame)
