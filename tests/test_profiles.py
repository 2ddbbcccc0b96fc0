from dataclasses import replace
from typing import Any

import pytest

from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import CARD, COLAB, LAPTOP, PROFILES, changed, check_dims, get_profile


def test_card_is_the_published_recipe() -> None:
    assert (CARD.base_model, CARD.dims, CARD.max_seq_length) == ("BAAI/bge-m3", (768, 512, 256, 128, 64), 1024)
    assert (CARD.epochs, CARD.batch_size, CARD.gradient_accumulation_steps) == (10, 16, 16)
    assert (CARD.learning_rate, CARD.warmup, CARD.columns) == (2e-5, 0.1, ("positive", "anchor"))
    assert (CARD.split, CARD.shares, CARD.protocol) == ("question", (0.9, 0.0, 0.1), "card")


def test_dims_for_adds_the_full_width_only_where_the_profile_says_so() -> None:
    assert CARD.dims_for(1024) == (768, 512, 256, 128, 64)
    assert COLAB.dims_for(1024)[0] == 1024
    assert LAPTOP.dims_for(384) == (384, 256, 128, 64, 32)


@pytest.mark.parametrize(
    ("dims", "width", "message"),
    [
        ((), 384, "no dims given"),
        ((768, 64), 384, r"dims 768 64: 768 is above the model's width of 384"),
        ((64, 0), 384, "0 is not a positive"),
        ((64, -8), None, "-8 is not a positive"),
        ((64, 128), 384, "128 follows 64; give them in descending order"),
        ((64, 64), 384, "64 follows 64"),
    ],
)
def test_wrong_dims_are_named(dims: tuple[int, ...], width: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_dims(dims, width)


def test_every_profile_has_its_own_name_and_an_unknown_one_is_refused() -> None:
    assert {name: profile.name for name, profile in PROFILES.items()} == {name: name for name in PROFILES}
    with pytest.raises(InputError, match="unknown profile 'lapdog': choose one of smoke, laptop, colab, card"):
        get_profile("lapdog")


def test_settings_are_changed_by_name() -> None:
    texts = ["batch_size=64", "dims=(384, 64)", "attention=sdpa", "lora_rank=8", "chosen_by=mean", "learning_rate=1"]
    done = changed(LAPTOP, texts)
    assert (done.batch_size, done.dims, done.attention, done.lora_rank) == (64, (384, 64), "sdpa", 8)
    assert changed(done, ["lora_rank=None"]).lora_rank is None
    assert replace(done, name="x") == replace(
        LAPTOP, name="x", batch_size=64, dims=(384, 64), attention="sdpa", lora_rank=8, learning_rate=1
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize=64", "--set batchsize=64: write name=value, with one of the names base_model, dims"),
        ("batch_size", "write name=value"),
        ("name=mine", "write name=value"),
        ("batch_size=many", "--set batch_size=many: batch_size takes a whole number"),
        ("batch_size=True", "takes a whole number"),
        ("attention=flash", "attention takes sdpa or eager"),
        ("chosen_by=best", "chosen_by takes a whole number or mean"),
        ("dims=64", r"dims takes values in brackets, such as \(384, 64\)"),
        ("dropout=0.1", "dropout takes True or False"),
        ("mini_batch_size=1.5", "takes a whole number or None"),
    ],
)
def test_a_wrong_setting_is_named(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        changed(LAPTOP, [text])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dims_per_step": 6}, "dims_per_step 6: choose 1 to 5, or -1 for all"),
        ({"dims_per_step": 0}, "dims_per_step 0"),
        ({"chosen_by": 100}, "chosen_by 100: choose mean, or one of the dims 384 256 128 64 32"),
    ],
)
def test_settings_about_dims_must_fit_them(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(LAPTOP, **settings).dims_for(384)
