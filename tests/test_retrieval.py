from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import truncate_embeddings

from bmf_matryoshka import hardware, retrieval

PROMPTS: dict[Literal["query", "passage"], str] = {"query": "query: ", "passage": "passage: "}


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 50), st.integers(0, 99))
def test_search_equals_a_plain_sort_with_ties_in_corpus_order(queries: int, corpus: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct integer values: exact arithmetic and plenty of ties.
    q = rng.integers(-2, 3, (queries, 4)).astype(np.float32)
    c = rng.integers(-2, 3, (corpus, 4)).astype(np.float32)
    indices, scores = retrieval.search(q, c, k)
    assert indices.shape == scores.shape == (queries, min(k, corpus))
    for row in range(queries):
        wanted = sorted(range(corpus), key=lambda doc: (-float(q[row] @ c[doc]), doc))[:k]
        assert indices[row].tolist() == wanted
        assert scores[row].tolist() == [float(q[row] @ c[doc]) for doc in wanted]


def test_truncate_equals_the_library_and_has_length_one() -> None:
    vectors = np.random.default_rng(0).normal(size=(20, 16)).astype(np.float32)
    cut = retrieval.truncate(vectors, 5)
    library = np.asarray(truncate_embeddings(vectors, 5))
    np.testing.assert_allclose(cut, library / np.linalg.norm(library, axis=1, keepdims=True), rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, rtol=1e-6)
    assert cut.dtype == np.float32


def test_truncate_leaves_a_zero_row_zero_and_its_input_alone() -> None:
    vectors = np.array([[0, 0, 3], [3, 4, 0]], np.float32)
    before = vectors.copy()
    np.testing.assert_allclose(retrieval.truncate(vectors, 2), np.array([[0, 0], [0.6, 0.8]], np.float32))
    np.testing.assert_array_equal(vectors, before)


@pytest.mark.parametrize("dim", [0, -1, 17])
def test_truncate_refuses_a_dim_outside_the_width(dim: int) -> None:
    with pytest.raises(ValueError, match=f"dim {dim} is not between 1 and the width 16"):
        retrieval.truncate(np.ones((2, 16), np.float32), dim)


def test_encode_uses_the_prompt_of_its_kind_and_encodes_a_text_once(
    model: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["Wer zahlt?", "Was ist steuerfrei?", "Wer zahlt?"]
    for kind, prompt in PROMPTS.items():
        plain = np.asarray(model.encode([prompt + text for text in texts], prompt=""))
        assert np.abs(retrieval.encode(model, texts, kind) - plain).max() < 1e-6
    asked: list[str] = []
    original: Any = model.encode_query

    def spy(sentences: list[str], **options: object) -> object:
        asked.extend(sentences)
        return original(sentences, **options)

    monkeypatch.setattr(model, "encode_query", spy)
    vectors = retrieval.encode(model, texts, "query")
    assert asked == texts[:2]
    np.testing.assert_array_equal(vectors[0], vectors[2])


def test_bfloat16_stays_close_to_float32(model: SentenceTransformer) -> None:
    texts = ["Wer zahlt die Steuer bei einer Schenkung?", "Die Frist beginnt mit Ablauf des Kalenderjahres."]
    precisions: tuple[hardware.Precision, ...] = ("float32", "bfloat16")
    exact, fast = (retrieval.encode(model, texts, "passage", precision) for precision in precisions)
    assert (exact * fast).sum(axis=1).min() > 0.999
