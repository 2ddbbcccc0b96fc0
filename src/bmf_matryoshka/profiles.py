"""Profiles: every difference between a smoke test, a laptop, a free T4 and the published recipe, in one place."""

import ast
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import InputError

BGE_M3 = "BAAI/bge-m3"
E5_SMALL = "intfloat/multilingual-e5-small"


@dataclass(frozen=True)
class Profile:
    """What a run trains, on how much, and how.

    The precision is not part of it: it is what the machine really has (see `hardware.precision`).
    """

    name: str
    base_model: str
    dims: tuple[int, ...]
    """Dimensions that MatryoshkaLoss trains and the evaluation reports, descending."""
    full_dimension: bool
    """Whether the base model's full width is added to `dims` where it is missing."""
    max_seq_length: int
    """Texts are cut after this many tokens, in training and evaluation."""
    batch_size: int
    gradient_accumulation_steps: int
    epochs: float
    learning_rate: float
    warmup: float
    """Share of all optimizer steps in which the learning rate rises."""
    scale: float = 20.0
    """What cosines are multiplied by in the loss (one over the temperature)."""
    weight_exponent: float = 0.0
    """The loss at a dimension d of D at most weighs (D / d) to this power; 0 for equal weights."""
    dims_per_step: int = -1
    """Train only this many dimensions, drawn anew, in each step; -1 for all."""
    linear_layer: Literal["axes", "map"] | None = None
    """Add a square layer behind the pooling, which starts as the principal axes of the training pairs' vectors, or as
    the linear map that MatryoshkaLoss makes of them (see `training.linear_map`); then it is trained with the rest."""
    chosen_by: int | Literal["mean"] = "mean"
    """The checkpoint kept is the best by ndcg@10 at this dimension, or by the mean over the dimensions."""
    evaluations: int | None = None
    """Evaluations, with a checkpoint each, spread evenly over the run; None for one an epoch."""
    split: Literal["passage", "question"] = "passage"
    """What is kept together when the pairs are split (see `pairs.split`)."""
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)
    """Of train, validation and test; without validation, the test split chooses the checkpoint, as the card did."""
    protocol: Literal["passage", "card"] = "passage"
    """How the checkpoints are scored (see `evaluation.build_task`)."""
    train_seq_length: int | None = None
    """A shorter limit for training alone, where it pays for speed."""
    columns: tuple[str, str] = ("anchor", "positive")
    """MultipleNegativesRankingLoss takes the first column as the query."""
    batches: Literal["no_duplicates", "similar_length"] = "no_duplicates"
    """The library's random batches, in which no text occurs twice, or `batches.SimilarLengthBatchSampler`."""
    length_groups: bool = False
    """Take a batch through the model in groups of texts of similar length: the same numbers with less padding."""
    mini_batch_size: int | None = None
    """A number switches to CachedMultipleNegativesRankingLoss with mini-batches of this many pairs."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time (once called gradient checkpointing)."""
    tf32: bool = False
    """TensorFloat-32 on GPUs that have it (Ampere and later)."""
    dropout: bool = True
    attention: Literal["sdpa", "eager"] = "sdpa"
    train_token_embeddings: bool = True
    lora_rank: int | None = None
    """Train adapters of this rank instead of the weights, and merge them in at the end."""
    frozen_layers: int = 0
    """The embeddings and this many of the lowest layers keep their weights: the backward pass stops above them."""
    max_steps: int = -1
    """Stop after this many optimizer steps; -1 for no limit."""
    max_passages: int | None = None
    """Use only this many passages (the first in split order)."""

    def dims_for(self, width: int) -> tuple[int, ...]:
        """The dimensions for a base model of this width, descending.

        Raises:
            InputError: a dimension is above the width, or the settings that are about dims do not fit them.
        """
        dims = (width, *self.dims) if self.full_dimension and width not in self.dims else self.dims
        check_dims(dims, width)
        text = " ".join(str(dim) for dim in dims)
        if self.dims_per_step != -1 and not 1 <= self.dims_per_step <= len(dims):
            raise InputError(f"dims_per_step {self.dims_per_step}: choose 1 to {len(dims)}, or -1 for all")
        if self.chosen_by != "mean" and self.chosen_by not in dims:
            raise InputError(f"chosen_by {self.chosen_by}: choose mean, or one of the dims {text}")
        return dims


def check_dims(dims: tuple[int, ...], width: int | None = None) -> tuple[int, ...]:
    """Return the dims unchanged if they are positive, strictly descending and at most the model's width.

    Raises:
        InputError: otherwise, naming the value and the limit.
    """
    text = " ".join(str(dim) for dim in dims)
    if not dims:
        raise InputError("no dims given: name at least one, for example 384 128 32")
    for dim in dims:
        if dim < 1:
            raise InputError(f"dims {text}: {dim} is not a positive number of dimensions")
        if width is not None and dim > width:
            raise InputError(f"dims {text}: {dim} is above the model's width of {width}; leave it out")
    for left, right in itertools.pairwise(dims):
        if right >= left:
            raise InputError(f"dims {text}: {right} follows {left}; give them in descending order, each once")
    return dims


def changed(profile: Profile, settings: Iterable[str]) -> Profile:
    """A profile with some settings changed, each given as text such as ``batch_size=64`` or ``dims=(1024, 64)``.

    Raises:
        InputError: there is no such setting, or the value is not of its type.
    """
    types = get_type_hints(Profile)
    names = [name for name in types if name != "name"]
    for text in settings:
        name, equals, value_text = text.partition("=")
        if not equals or name not in names:
            raise InputError(f"--set {text}: write name=value, with one of the names {', '.join(names)}")
        try:
            value = ast.literal_eval(value_text)
        except (ValueError, SyntaxError):
            value = value_text
        if not _is_a(value, types[name]):
            raise InputError(f"--set {text}: {name} takes {_in_words(types[name])}")
        profile = replace(profile, **{name: value})
    return profile


def _is_a(value: object, kind: Any) -> bool:
    """Whether a value is of a type that a setting has: plain, a choice of words, several types, or a tuple."""
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_is_a(part, get_args(kind)[0]) for part in value)
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return any(_is_a(value, one) for one in get_args(kind))
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return type(value) is kind


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "values in brackets, such as (384, 64)"
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " or ".join(_in_words(one) for one in get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return words[kind]


LAPTOP = Profile(
    name="laptop",
    base_model=E5_SMALL,
    dims=(384, 256, 128, 64, 32),
    full_dimension=True,
    max_seq_length=256,
    batch_size=32,
    gradient_accumulation_steps=1,
    epochs=1,
    max_steps=30,
    evaluations=2,
    learning_rate=2e-5,
    warmup=0.1,
    scale=60.0,
    length_groups=True,
    dropout=False,
    train_token_embeddings=False,
    frozen_layers=10,
    linear_layer="map",
)

SMOKE = Profile(
    name="smoke",
    base_model=E5_SMALL,
    dims=(384, 128, 32),
    full_dimension=True,
    max_seq_length=64,
    batch_size=16,
    gradient_accumulation_steps=1,
    epochs=1,
    learning_rate=1e-4,
    warmup=0.1,
    scale=60.0,
    length_groups=True,
    dropout=False,
    train_token_embeddings=False,
    frozen_layers=8,
    linear_layer="map",
    max_steps=6,
    evaluations=2,
    max_passages=60,
)

COLAB = Profile(
    name="colab",
    base_model=BGE_M3,
    dims=(1024, 768, 512, 256, 128, 64),
    full_dimension=True,
    max_seq_length=512,
    batch_size=64,
    gradient_accumulation_steps=1,
    epochs=2,
    learning_rate=2e-5,
    warmup=0.1,
    mini_batch_size=8,
    activation_checkpointing=True,
)

CARD = Profile(
    name="card",
    base_model=BGE_M3,
    dims=(768, 512, 256, 128, 64),
    full_dimension=False,
    max_seq_length=1024,
    batch_size=16,
    gradient_accumulation_steps=16,
    epochs=10,
    learning_rate=2e-5,
    warmup=0.1,
    split="question",
    shares=(0.9, 0.0, 0.1),
    protocol="card",
    columns=("positive", "anchor"),
    tf32=True,
    activation_checkpointing=True,  # not the card's, but it changes no number, and 24 GB are enough
)

PROFILES = {profile.name: profile for profile in (SMOKE, LAPTOP, COLAB, CARD)}


def get_profile(name: str) -> Profile:
    """The named profile.

    Raises:
        InputError: there is no such profile.
    """
    if name not in PROFILES:
        raise InputError(f"unknown profile {name!r}: choose one of {', '.join(PROFILES)}")
    return PROFILES[name]
