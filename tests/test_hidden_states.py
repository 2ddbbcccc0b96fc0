import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from torch.nn import Dropout, Module

from bmf_matryoshka import base_models, dry_run, hardware, hidden_states, memory, retrieval, training
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.hidden_states import MOST_BYTES, HiddenStates

TEXTS = ["Umsatzsteuer", "Die Steuer entsteht mit Ablauf des Voranmeldungszeitraums.", "Wer zahlt?", "§ 15 <pad> UStG"]


@pytest.fixture
def plain(tmp_path: Path) -> SentenceTransformer:
    """Three layers of random weights in bge-m3's architecture."""
    dry_run.build_model(memory.Shape(3, 32, 4, 64, 250_002, 514), tmp_path / "built")
    return base_models.load(str(tmp_path / "built" / "model"), max_seq_length=32).model


@pytest.fixture
def passes(plain: SentenceTransformer) -> list[int]:
    """Grows by the rows that go through the lowest layer of the model or of a copy of it."""
    rows: list[int] = []

    def count(_: Module, inputs: tuple[torch.Tensor, ...]) -> None:
        rows.append(len(inputs[0]))

    part(plain, "encoder.layer.0").register_forward_pre_hook(count)
    return rows


def part(model: SentenceTransformer, name: str) -> Module:
    return base_models.transformer(model).get_submodule(name)


def encode(
    model: SentenceTransformer, texts: list[str], budget: int = 2_048, precision: hardware.Precision = "float32"
) -> retrieval.Embeddings:
    return retrieval.encode(model, texts, "passage", precision, budget)


def test_embeddings_stay_the_same_and_the_lowest_layers_see_each_text_once(
    plain: SentenceTransformer, passes: list[int]
) -> None:
    expected = encode(plain, TEXTS)
    attached = copy.deepcopy(plain)
    states = HiddenStates(2)
    states.attach(attached)
    passes.clear()
    first = encode(attached, TEXTS[:3])
    assert sum(passes) == 3
    again = encode(copy.deepcopy(attached), TEXTS[::-1], budget=20)[::-1]  # in other batches, with other padding
    assert sum(passes) == 4
    np.testing.assert_allclose(first, expected[:3], atol=1e-6)
    np.testing.assert_allclose(again, expected, atol=1e-6)
    tokens = sum(base_models.count_tokens(plain, TEXTS))
    assert states.bytes == tokens * 32 * 4


def test_a_text_that_ends_like_padding_is_not_taken_for_another(plain: SentenceTransformer) -> None:
    texts = ["Steuer", "Steuer<pad>", "Steuer<pad><pad>"]
    expected = encode(plain, texts)
    HiddenStates(2).attach(plain)
    np.testing.assert_allclose(encode(plain, texts), expected, atol=1e-6)


@pytest.mark.parametrize("weight", ["embeddings.word_embeddings.weight", "encoder.layer.1.output.dense.bias"])
def test_other_weights_are_never_served_from_the_memory(plain: SentenceTransformer, weight: str) -> None:
    states = HiddenStates(2)
    states.attach(plain)
    encode(plain, TEXTS)
    changed = copy.deepcopy(plain)
    with torch.no_grad():
        base_models.transformer(changed).get_parameter(weight).normal_()
    fresh = HiddenStates(2)
    expected = copy.deepcopy(changed)
    fresh.attach(expected)
    np.testing.assert_array_equal(encode(changed, TEXTS), encode(expected, TEXTS))
    assert np.abs(encode(changed, TEXTS) - encode(plain, TEXTS)).max() > 0.01


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizer_step_in_the_lowest_layers_is_noticed(plain: SentenceTransformer, fused: bool) -> None:
    twin = copy.deepcopy(plain)
    HiddenStates(2).attach(plain)
    encode(plain, TEXTS)
    features = [plain.preprocess(TEXTS[:2]), plain.preprocess(TEXTS[2:])]
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1, fused=fused)
    training.build_loss(plain, (32,))(features, None).backward()
    optimizer.step()
    twin.load_state_dict(plain.state_dict())
    np.testing.assert_allclose(encode(plain, TEXTS), encode(twin, TEXTS), atol=1e-6)


def test_gradients_above_stay_the_same(plain: SentenceTransformer, passes: list[int]) -> None:
    for name in ("embeddings", "encoder.layer.0", "encoder.layer.1"):
        part(plain, name).requires_grad_(False)
    twin = copy.deepcopy(plain)
    HiddenStates(2).attach(twin)
    for model in (plain, twin, twin):
        model.zero_grad()
        features = [model.preprocess(TEXTS[:2]), model.preprocess(TEXTS[2:])]
        model.eval()
        passes.clear()
        training.build_loss(model, (32, 8))(features, None).backward()
    assert passes == []  # in the third turn
    expected = {name: weight.grad for name, weight in plain.named_parameters()}
    for name, weight in twin.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-7)
    assert twin.get_parameter("0.model.encoder.layer.2.output.dense.weight").grad is not None


def test_nothing_is_remembered_while_the_lowest_layers_change(plain: SentenceTransformer) -> None:
    states = HiddenStates(2)
    states.attach(plain)
    features = plain.preprocess(TEXTS)
    plain.eval()
    plain(features)["sentence_embedding"].sum().backward()
    assert states.bytes == 0
    assert plain.get_parameter("0.model.encoder.layer.0.output.dense.weight").grad is not None
    plain.requires_grad_(False).train()
    assert any(isinstance(module, Dropout) and module.p > 0 for module in plain.modules())
    plain(plain.preprocess(TEXTS))
    assert states.bytes == 0
    plain.eval()
    plain(plain.preprocess(TEXTS))
    assert states.bytes > 0


def test_bfloat16_has_states_of_its_own(plain: SentenceTransformer) -> None:
    expected = encode(plain, TEXTS, precision="bfloat16")
    HiddenStates(2).attach(plain)
    full = encode(plain, TEXTS)
    for _ in range(2):
        np.testing.assert_allclose(encode(plain, TEXTS, precision="bfloat16"), expected, atol=1e-6)
        plain.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            rough = plain(plain.preprocess(TEXTS))["sentence_embedding"].float().numpy()
        assert 0 < np.abs(rough - full).max() < 0.05
        np.testing.assert_array_equal(encode(plain, TEXTS), full)


def test_the_limit_holds_and_changes_no_embedding(plain: SentenceTransformer) -> None:
    expected = encode(plain, TEXTS)
    states = HiddenStates(2, limit=1_000)
    states.attach(plain)
    for _ in range(2):
        np.testing.assert_allclose(encode(plain, TEXTS), expected, atol=1e-6)
    assert 0 < states.bytes <= 1_000


def test_states_are_kept_in_a_file(plain: SentenceTransformer, passes: list[int], tmp_path: Path) -> None:
    file = tmp_path / "new" / "states.safetensors"
    other = copy.deepcopy(plain)
    first = HiddenStates(2, file=file)
    first.attach(plain)
    expected = encode(plain, TEXTS)
    first.save()
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    passes.clear()
    second = HiddenStates(2, file=file)
    second.attach(other)
    np.testing.assert_array_equal(encode(other, TEXTS), expected)
    assert passes == []
    assert second.bytes == first.bytes > 0


def test_a_damaged_file_is_refused_and_a_failed_save_leaves_the_old_one(
    plain: SentenceTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "states.safetensors"
    file.write_bytes(b"cut short")
    with pytest.raises(InputError, match=f"{file}.*remove it"):
        HiddenStates(2, file=file)
    file.unlink()
    states = HiddenStates(2, file=file)
    states.attach(plain)
    encode(plain, TEXTS[:1])
    states.save()
    kept = file.read_bytes()

    def full_disk(_: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(kept[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(hidden_states, "save_file", full_disk)
    with pytest.raises(OSError, match="space"):
        states.save()
    assert [path.name for path in tmp_path.glob("states*")] == [file.name]
    assert file.read_bytes() == kept


def test_the_memory_takes_a_quarter_of_what_is_free_at_most(
    plain: SentenceTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for free, limit in ((400, 100), (2**40, MOST_BYTES)):
        monkeypatch.setattr(memory, "available", lambda _, free=free: free)
        states = HiddenStates(2)
        states.attach(plain)
        assert states.limit == limit


@pytest.mark.parametrize("layers", [-1, 4])
def test_a_number_of_layers_that_the_model_has_not_is_refused(plain: SentenceTransformer, layers: int) -> None:
    with pytest.raises(InputError, match=f"{layers} .*1 to 3"):
        HiddenStates(layers).attach(plain)


def test_no_layers_nothing_to_remember(plain: SentenceTransformer, passes: list[int]) -> None:
    states = HiddenStates(0)
    states.attach(plain)
    encode(plain, TEXTS)
    encode(plain, TEXTS)
    assert sum(passes) == 8
    assert states.bytes == 0
