import pytest

from bmf_matryoshka.errors import InputError
from bmf_matryoshka.profiles import CARD, COLAB, LAPTOP, PROFILES, check_dims, get_profile


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
