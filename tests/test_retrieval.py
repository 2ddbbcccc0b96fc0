import copy
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import truncate_embeddings

from bmf_matryoshka import base_models, hardware, retrieval

PROMPTS: dict[Literal["query", "passage"], str] = {"query": "query: ", "passage": "passage: "}


@settings(deadline=None)
@given(st.integers(0, 30), st.integers(1, 300), st.integers(1, 150), st.sampled_from([None, 4, 3]), st.integers(0, 99))
def test_search_equals_a_plain_sort_with_ties_in_corpus_order(
    queries: int, corpus: int, k: int, dim: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    # Few distinct values: exact arithmetic and plenty of ties.
    q = rng.integers(-2, 3, (queries, 4)).astype(np.float32)
    c = rng.integers(-2, 3, (corpus, 4)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "CORPUS_CHUNK", 64)
        patch.setattr(retrieval, "QUERY_CHUNK", 7)
        patch.setattr(retrieval, "BLOCK", 8)
        indices, scores = retrieval.search(q, c, k, dim)
    assert indices.shape == scores.shape == (queries, min(k, corpus))
    if dim is not None:
        q, c = retrieval.truncate(q, dim), retrieval.truncate(c, dim)
    # The product of one row may round differently from that of many: compare with the scores of the whole.
    exact = q @ c.T
    for row in range(queries):
        order = np.argsort(-exact[row], kind="stable")[:k]
        np.testing.assert_allclose(scores[row], exact[row][order], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(exact[row][indices[row]], scores[row], rtol=1e-5, atol=1e-6)
        if dim is None:
            assert indices[row].tolist() == order.tolist()


def test_search_needs_little_memory_beside_the_corpus() -> None:
    rng = np.random.default_rng(0)
    corpus, queries = rng.random((60_000, 32), np.float32), rng.random((200, 32), np.float32)
    tracemalloc.start()
    retrieval.search(queries, corpus, 10, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # The corpus is truncated a chunk at a time: never a copy of its 60,000 x 16 numbers.
    assert peak < 60_000 * 16 * 4


@given(st.lists(st.integers(1, 90), max_size=60), st.integers(1, 200))
def test_batches_hold_every_text_once_and_keep_to_the_budget(lengths: list[int], budget: int) -> None:
    batches = list(retrieval.token_batches(lengths, budget))
    assert sorted(position for batch in batches for position in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = max(lengths[position] for position in batch) * len(batch)
        assert padded <= budget or len(batch) == 1
    longest = [max(lengths[position] for position in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


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
    assert sorted(asked) == sorted(texts[:2])
    np.testing.assert_array_equal(vectors[0], vectors[2])
    assert retrieval.encode(model, [], "query").shape == (0, 384)


def test_batches_change_no_embedding(model: SentenceTransformer) -> None:
    texts = [f"Absatz {number} " + "Steuer und Zulage " * number for number in range(12)]
    one = retrieval.encode(model, texts, "passage", token_budget=1)
    many = retrieval.encode(model, texts, "passage", token_budget=4000)
    assert np.abs(one - many).max() < 1e-6


def test_the_cache_is_used_for_the_same_model_kind_and_precision_only(
    model: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    original = retrieval._encode

    def spy(model: SentenceTransformer, texts: list[str], *options: Any) -> retrieval.Embeddings:
        encoded.extend(texts)
        return original(model, texts, *options)

    monkeypatch.setattr(retrieval, "_encode", spy)
    first = retrieval.encode(model, ["eins", "zwei"], "query", cache=tmp_path)
    again = retrieval.encode(model, ["drei", "zwei", "eins"], "query", cache=tmp_path)
    assert encoded == ["eins", "zwei", "drei"]
    np.testing.assert_array_equal(again[[2, 1]], first)
    np.testing.assert_allclose(again, retrieval.encode(model, ["drei", "zwei", "eins"], "query"), atol=1e-6)
    encoded.clear()
    retrieval.encode(model, ["eins"], "passage", cache=tmp_path)
    retrieval.encode(model, ["eins"], "query", "bfloat16", cache=tmp_path)
    other = copy.deepcopy(model)
    with torch.no_grad():
        next(iter(other.parameters()))[0, 0] += 1
    retrieval.encode(other, ["eins"], "query", cache=tmp_path)
    assert encoded == ["eins"] * 3
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(("eager_length", "attention"), [(0, "sdpa"), (256, "eager")])
def test_bfloat16_stays_close_to_float32(
    model: SentenceTransformer, eager_length: int, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retrieval, "EAGER_LENGTH", eager_length)
    cast = retrieval._cast(model, torch.bfloat16)
    assert {weight.dtype for weight in cast.parameters()} == {torch.bfloat16}
    assert base_models.transformer(cast).config._attn_implementation == attention
    assert cast.tokenizer is model.tokenizer
    texts = ["Wer zahlt die Steuer bei einer Schenkung?", "Die Frist beginnt mit Ablauf des Kalenderjahres."]
    precisions: tuple[hardware.Precision, ...] = ("float32", "bfloat16")
    exact, fast = (retrieval.encode(model, texts, "passage", precision) for precision in precisions)
    assert (exact * fast).sum(axis=1).min() > 0.999
    np.testing.assert_allclose(np.linalg.norm(fast, axis=1), 1, atol=1e-6)
    transformer = base_models.transformer(model)
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}
    assert transformer.config._attn_implementation == "sdpa"


def test_in_a_training_of_several_processes_this_process_encodes_alone(
    tiny: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def share(*_: object, **__: object) -> None:
        raise AssertionError("shared with other processes")

    alone = retrieval.encode(tiny, ["Frage"], "query")
    monkeypatch.setattr(SentenceTransformer, "_distributed_inference", share)
    with pytest.raises(AssertionError, match="shared"):
        tiny.encode(["Frage"])  # the library would
    np.testing.assert_array_equal(retrieval.encode(tiny, ["Frage"], "query"), alone)
