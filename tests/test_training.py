import copy
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer
from transformers import TrainerCallback

from bmf_matryoshka import base_models, training
from bmf_matryoshka.batches import SimilarLengthBatchSampler, length_groups
from bmf_matryoshka.callbacks import LossError
from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import CARD, COLAB, LAPTOP, SMOKE
from bmf_matryoshka.training import CheckpointError


@pytest.fixture
def fresh(model: SentenceTransformer) -> SentenceTransformer:
    return copy.deepcopy(model)


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


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_length_groups_give_the_same_loss_and_gradients_with_less_padding(
    fresh: SentenceTransformer, mini_batch_size: int | None
) -> None:
    texts = [[f"{word} " * (1 + 7 * n % 40) for n in range(8)] for word in ("Frage", "Absatz")]
    seen: list[torch.Tensor] = []
    fresh[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]["attention_mask"]))
    loss = training.build_loss(fresh, (384, 64), mini_batch_size=mini_batch_size)
    weight = base_models.transformer(fresh).get_parameter("encoder.layer.11.output.dense.weight")

    def measure() -> tuple[float, torch.Tensor, float]:
        seen.clear()
        fresh.zero_grad()
        value = loss([fresh.preprocess(part) for part in texts], torch.empty(0))
        value.backward()
        assert weight.grad is not None
        padded = 1 - float(torch.cat([mask.flatten() for mask in seen]).float().mean())
        return value.item(), weight.grad.clone(), padded

    whole, whole_gradient, whole_padded = measure()
    forward = fresh.forward
    with length_groups(fresh, 60):
        parts, gradient, padded = measure()
    assert parts == pytest.approx(whole, rel=1e-5)
    assert torch.allclose(gradient, whole_gradient, rtol=1e-3, atol=1e-6)
    assert padded < whole_padded / 2
    with pytest.raises(ZeroDivisionError), length_groups(fresh, 60):
        raise ZeroDivisionError
    assert fresh.forward == forward


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


def test_training_learns_keeps_the_best_checkpoint_and_restores_the_model(
    fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = dict(base_models.transformer(fresh).named_parameters())
    names = [f"encoder.layer.{number}.output.dense.weight" for number in (7, 8)]
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
    assert kept == [True, False, True, True]  # the first eight layers and the embeddings are frozen
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


def test_a_full_disk_stops_the_run_in_one_line_and_leaves_no_part_of_a_checkpoint(
    model: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    profile = replace(SMOKE, max_steps=2, batch_size=4, train_seq_length=16)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000_000, before[1]))  # a checkpoint's weights need 470 MB
    try:
        with pytest.raises(CheckpointError, match=r"of step 1 could not be written to .*make room .* --resume"):
            training.train(copy.deepcopy(model), small, profile, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("checkpoint-*"))
    profile = replace(profile, evaluations=1)
    run = training.train(copy.deepcopy(model), small, profile, tmp_path, resume=True)
    assert run.info["steps"] == 2
    assert run.evaluations["step"].tolist() == [2]


def test_the_checkpoint_kept_is_the_best_at_the_dim_that_was_named(
    fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    fresh.max_seq_length = 32
    run = training.train(fresh, small, replace(SMOKE, max_steps=4, evaluations=4, chosen_by=32), tmp_path)
    key = "dim_32_cosine_ndcg@10"
    assert run.info["chosen_by"] == key
    scores = run.evaluations.set_index("step")[f"eval_{key}"]
    assert run.info["best_step"] == scores.idxmax()
    assert run.info["kept"][key] == pytest.approx(scores.max(), abs=training.KEPT_TOLERANCE)


def test_a_checkpoint_that_is_not_what_it_was_is_noticed(
    fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(trainer: Any) -> None:
        with torch.no_grad():
            for weight in base_models.transformer(trainer.model).parameters():
                weight.zero_()

    monkeypatch.setattr(SentenceTransformerTrainer, "_load_best_model", damage)
    with pytest.raises(RuntimeError, match=r"the loaded model scores mean_cosine_ndcg@10 .*, its checkpoint scored"):
        training.train(fresh, small, replace(SMOKE, max_steps=1, evaluations=1, batch_size=4), tmp_path)


def test_activation_checkpointing_changes_no_number(
    model: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **options: Any) -> None:
            seen.append(base_models.transformer(options["model"]).is_activation_checkpointing)

    seen: list[bool] = []
    losses = []
    for on in (False, True):
        profile = replace(SMOKE, max_steps=2, evaluations=1, batch_size=4, activation_checkpointing=on)
        changed = copy.deepcopy(model)
        run = training.train(changed, small, profile, tmp_path / str(on), callbacks=[Look()])
        losses.append(run.losses["loss"].tolist())
        assert not base_models.transformer(changed).is_activation_checkpointing
    assert seen == [False, False, True, True]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_profile_with_length_groups_trains_on_less_padding_to_the_same_losses(
    model: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    shares, losses = [], []
    for groups in (False, True):
        masks: list[torch.Tensor] = []
        fresh = copy.deepcopy(model)
        fresh.max_seq_length = 256

        def note(module: torch.nn.Module, inputs: Any, masks: list[torch.Tensor] = masks) -> None:
            if module.training:
                masks.append(inputs[0]["attention_mask"].flatten())

        fresh[0].register_forward_pre_hook(note)
        profile = replace(SMOKE, max_steps=2, length_groups=groups, linear_layer=None, frozen_layers=11)
        run = training.train(fresh, small, profile, tmp_path / str(groups))
        losses.append(run.losses["loss"].tolist())
        shares.append(float(torch.cat(masks).float().mean()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert shares[1] > shares[0] + 0.05, shares


def test_adapters_train_beside_frozen_weights_and_leave_a_plain_model(
    fresh: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    names = [name for name, _ in fresh.named_parameters()]
    before = {name: weight.detach().clone() for name, weight in fresh.named_parameters()}
    fresh.max_seq_length = 32

    def loss_of_a_batch() -> float:
        batch = small["train"].select(range(0, 120, 6))
        features = [fresh.preprocess(list(batch[column])) for column in ("anchor", "positive")]
        with torch.no_grad():
            return float(training.build_loss(fresh, (384, 128, 32), SMOKE.scale)(features, torch.empty(0)))

    loss_before = loss_of_a_batch()
    profile = replace(SMOKE, max_steps=3, evaluations=1, lora_rank=4, learning_rate=1e-3, linear_layer=None)
    training.train(fresh, small, profile, tmp_path)
    assert loss_of_a_batch() < loss_before
    after = dict(fresh.named_parameters())
    assert list(after) == names
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert changed
    assert all(name.endswith(("query.weight", "key.weight", "value.weight", "dense.weight")) for name in changed)
    assert not any("embeddings" in name or "pooler" in name for name in changed)
    base_models.save(fresh, tmp_path / "model")
    again = base_models.load(str(tmp_path / "model"), 32).model
    assert torch.equal(dict(again.named_parameters())[names[50]], after[names[50]])


@pytest.mark.parametrize(("exponent", "expected"), [(0.0, [1.0, 1.0, 1.0]), (0.5, [1.0, 2.0, 4.0])])
def test_weights_reach_the_loss(model: SentenceTransformer, exponent: float, expected: list[float]) -> None:
    dims = (384, 96, 24)
    loss = training.build_loss(model, dims, weight_exponent=exponent)
    assert list(loss.matryoshka_weights) == expected
    features = [model.preprocess([f"{word} {n}" for n in range(6)]) for word in ("Frage", "Absatz")]
    with torch.no_grad():
        vectors = [model(copy.copy(f))["sentence_embedding"] for f in features]
        value = float(loss([copy.copy(f) for f in features], torch.empty(0)))
    normal = torch.nn.functional.normalize
    by_hand = [
        torch.nn.functional.cross_entropy(
            20 * normal(vectors[0][:, :dim], dim=1) @ normal(vectors[1][:, :dim], dim=1).T, torch.arange(6)
        )
        for dim in dims
    ]
    assert value == pytest.approx(sum(w * float(x) for w, x in zip(expected, by_hand, strict=True)), rel=1e-4)


def test_a_t4_trains_in_float16_without_tf32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(training, "SentenceTransformerTrainingArguments", lambda **options: seen.update(options))
    for profile, precision, expected in (
        (COLAB, "float16", (False, True, None)),
        (CARD, "float16", (False, True, None)),  # as a T4 would run the card: it has no tf32
        (CARD, "bfloat16", (True, False, True)),
    ):
        training.build_arguments(profile, tmp_path, "cuda", precision, 1, {})  # type: ignore[arg-type]
        assert (seen["bf16"], seen["fp16"], seen["tf32"]) == expected
        assert not seen["use_cpu"]


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


def test_a_linear_map_starts_at_the_axes_and_lowers_the_loss_at_each_dim(
    model: SentenceTransformer, small: DatasetDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, first = np.unique(small["train"]["passage_id"], return_index=True)
    train = small["train"].select(first)
    vectors = {
        name: model.encode([model.prompts[prompt] + text for text in train[name]])
        for name, prompt in (("anchor", "query"), ("positive", "document"))
    }

    def loss(matrix: NDArray[np.float32], dim: int) -> float:
        cut = {name: part @ matrix[:dim].T for name, part in vectors.items()}
        anchors, positives = (part / np.linalg.norm(part, axis=1, keepdims=True) for part in cut.values())
        scores = 60 * anchors @ positives.T
        return float(np.mean(np.log(np.exp(scores).sum(axis=1)) - np.diag(scores)))

    axes = training.principal_axes(model, train, cache=tmp_path)
    again = tmp_path / "again"  # keeps nothing yet
    maps = [
        training.linear_map(model, train, (384, 32), 60.0, seed, cache=cache)
        for seed, cache in ((1, tmp_path), (1, again), (2, again))
    ]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[2])
    with monkeypatch.context() as nothing_to_train:
        nothing_to_train.setattr(training, "build_loss", None)
        np.testing.assert_array_equal(training.linear_map(model, train, (384, 32), 60.0, 1, cache=again), maps[0])
    for dim in (384, 32):
        assert loss(maps[0], dim) < 0.5 * loss(axes, dim)
    monkeypatch.setattr(training, "MAP_STEPS", 0)
    np.testing.assert_array_equal(training.linear_map(model, train, (384, 32), cache=tmp_path), axes)


def test_the_linear_layer_starts_as_the_profile_says(
    model: SentenceTransformer, small: DatasetDict, tmp_path: Path
) -> None:
    train = small["train"]
    expected: dict[Literal["axes", "map"], NDArray[np.float32]] = {
        "axes": training.principal_axes(model, train, cache=tmp_path),
        "map": training.linear_map(model, train, SMOKE.dims, SMOKE.scale, 3, cache=tmp_path),
    }
    for linear_layer, matrix in expected.items():
        profile = replace(SMOKE, linear_layer=linear_layer)
        longer = copy.deepcopy(model)
        training.add_linear_layer(longer, train, profile, 3, tmp_path)
        assert [type(module).__name__ for module in longer] == ["Transformer", "Pooling", "Dense", "Normalize"]
        np.testing.assert_array_equal(dict(longer.named_parameters())["2.linear.weight"].detach().numpy(), matrix)
    same = copy.deepcopy(model)
    training.add_linear_layer(same, train, replace(SMOKE, linear_layer=None))
    assert len(same) == len(model)


def test_a_missing_log_names_the_chapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run chapter 04 first"):
        training.TrainingRun.load(tmp_path / "training.json")
