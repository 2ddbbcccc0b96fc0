import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, training
from bmf_matryoshka.batches import SimilarLengthBatchSampler
from bmf_matryoshka.callbacks import LossError
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import CARD, LAPTOP, SMOKE


def make_sampler(dataset: Dataset, batch_size: int, drop_last: bool = False) -> SimilarLengthBatchSampler:
    return SimilarLengthBatchSampler(
        dataset, batch_size, drop_last, valid_label_columns=[], generator=torch.Generator(), seed=1
    )


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 25), st.integers(0, 25)), min_size=1, max_size=120), st.integers(2, 12))
def test_no_batch_holds_a_passage_that_answers_anothers_question(rows: list[tuple[int, int]], batch_size: int) -> None:
    dataset = Dataset.from_dict(
        {
            "positive": ["x" * (own + 1) * 10 for own, _ in rows],
            "passage_id": [str(own) for own, _ in rows],
            "relevant": [[str(own), str(other)] for own, other in rows],
        }
    )
    sampler = make_sampler(dataset, batch_size)
    batches = list(sampler)
    seen = [pair for batch in batches for pair in batch]
    assert len(seen) == len(set(seen))
    assert len(batches) <= len(sampler)
    for batch in batches:
        assert 1 <= len(batch) <= batch_size
        for pair in batch:
            others = {dataset[other]["passage_id"] for other in batch if other != pair}
            assert not others & set(dataset[pair]["relevant"])


def test_batches_cover_the_data_differ_by_epoch_and_are_of_similar_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 2000, 640)
    names = [str(n) for n in range(640)]
    dataset = Dataset.from_dict(
        {"positive": ["x" * int(n) for n in lengths], "passage_id": names, "relevant": [[n] for n in names]}
    )
    sampler = make_sampler(dataset, 32)
    first = list(sampler)
    assert sorted(pair for batch in first for pair in batch) == list(range(640))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    padded = sum(max(lengths[batch]) * len(batch) for batch in first)
    assert padded < 1.35 * lengths.sum()
    assert len(make_sampler(dataset.select(range(639)), 32, drop_last=True)) == 19


def test_the_cached_loss_equals_the_plain_one(model: SentenceTransformer) -> None:
    features = [model.preprocess([f"{word} {n}" for n in range(6)]) for word in ("Frage", "Absatz")]
    with torch.no_grad():
        plain = training.build_loss(model, (384, 64))([copy.copy(f) for f in features], torch.empty(0))
        cached = training.build_loss(model, (384, 64), mini_batch_size=2)(
            [copy.copy(f) for f in features], torch.empty(0)
        )
    assert float(plain) == pytest.approx(float(cached), rel=1e-4)


def arguments(profile: Any, tmp_path: Path, precision: Any = "float32") -> Any:
    return training.build_arguments(profile, tmp_path, "cpu", precision, 7, {"anchor": "query: "})


def test_arguments_say_what_the_profile_says(tmp_path: Path) -> None:
    card = arguments(CARD, tmp_path)
    assert (card.num_train_epochs, card.per_device_train_batch_size, card.gradient_accumulation_steps) == (10, 16, 16)
    assert (card.learning_rate, card.lr_scheduler_type, card.warmup_steps, card.seed) == (2e-5, "cosine", 0.1, 7)
    assert (card.batch_sampler, card.optim, card.eval_strategy) == ("no_duplicates", "adamw_torch_fused", "epoch")
    assert (card.load_best_model_at_end, card.report_to, card.bf16, card.fp16) == (True, [], False, False)
    assert arguments(LAPTOP, tmp_path, "bfloat16").bf16


@pytest.fixture
def fresh(model: SentenceTransformer) -> SentenceTransformer:
    return copy.deepcopy(model)


def test_training_learns_keeps_the_best_checkpoint_and_restores_the_model(
    fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = dict(base_models.transformer(fresh).named_parameters())
    names = [f"encoder.layer.{number}.output.dense.weight" for number in (5, 6)]
    names += ["embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight"]
    before = [weights[name].detach().clone() for name in names]
    dropout = [module.p for module in fresh.modules() if isinstance(module, torch.nn.Dropout)]

    fresh.max_seq_length = 32
    run = training.train(fresh, small, replace(SMOKE, max_steps=4), tmp_path, seed=3)

    assert not caplog.records
    assert run.info["steps"] == 4
    assert run.info["chosen_on"] == "validation"
    assert run.losses["loss"].iloc[-1] < run.losses["loss"].iloc[0]
    assert run.evaluations["step"].tolist() == [2, 4]
    kept = [torch.equal(weights[name], old) for name, old in zip(names, before, strict=True)]
    assert kept == [True, False, True, True]  # the first six layers and the embeddings are frozen
    assert [module.p for module in fresh.modules() if isinstance(module, torch.nn.Dropout)] == dropout
    assert all(weight.requires_grad for weight in fresh.parameters())
    (tmp_path / "training.json").write_text(run.to_json(), encoding="utf-8")
    again = training.TrainingRun.load(tmp_path / "training.json")
    assert again.history == run.history
    assert again.info["profile"]["name"] == "smoke"


def test_the_same_seed_gives_the_same_losses(model: SentenceTransformer, small: DatasetDict, tmp_path: Path) -> None:
    profile = replace(SMOKE, max_steps=2, epochs=1, dropout=True, batch_size=4)
    losses = [
        training.train(copy.deepcopy(model), small, profile, tmp_path / str(n), seed).losses["loss"].tolist()
        for n, seed in enumerate((5, 5, 6))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_cards_recipe_trains_too_and_the_library_warns_of_its_two_oddities(
    fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    profile = replace(CARD, dims=(256, 64), max_steps=1, batch_size=4, gradient_accumulation_steps=2)
    fresh.max_seq_length = 32
    run = training.train(fresh, small, profile, tmp_path)
    assert run.info["steps"] == 1
    assert run.info["dims"] == [256, 64]
    full_width, column_order = (record.message for record in caplog.records)
    assert "embedding dimension 384 is not included in matryoshka_dims" in full_width
    assert "Column 'anchor' is at index 1" in column_order


def test_dims_that_do_not_fit_are_refused_before_training(
    model: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="768 is above"):
        training.train(model, small, CARD, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_no_number_stops_the_run(fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path) -> None:
    with torch.no_grad():
        dict(fresh.named_parameters())["0.model.encoder.layer.11.output.dense.weight"].fill_(torch.nan)
    with pytest.raises(LossError, match=r"the loss is nan at step 1 \(learning rate .*, precision .*lower the"):
        training.train(fresh, small, replace(SMOKE, max_steps=2, batch_size=4), tmp_path)


def test_only_a_whole_checkpoint_is_resumed_from(tmp_path: Path) -> None:
    assert training.last_checkpoint(tmp_path) is None
    for step in (2, 10, 12):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").touch()
    assert training.last_checkpoint(tmp_path) is None
    for step in (2, 10):
        (tmp_path / f"checkpoint-{step}" / training.COMPLETE).touch()
    assert training.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")


def test_a_missing_log_names_the_chapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run chapter 04 first"):
        training.TrainingRun.load(tmp_path / "training.json")
