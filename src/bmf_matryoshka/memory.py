"""How much memory training needs at its peak, known before anything is loaded."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from .errors import InputError
from .hardware import Precision
from .profiles import BGE_M3, CARD, COLAB, E5_SMALL, LAPTOP, Profile

WORKSPACE = 150_000_000
"""Buffers of the libraries and of one layer's backward pass, as measured on a processor."""
QUESTION_TOKENS = 64
"""What a question is taken to have at most, where a passage may fill the profile's limit."""


@dataclass(frozen=True)
class Shape:
    """The size of a BERT-like encoder."""

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int
    positions: int

    @property
    def embeddings(self) -> int:
        """Parameters of the tables of tokens, positions and token types, and their layer norm."""
        return (self.vocabulary + self.positions + 2 + 2) * self.hidden

    @property
    def layer(self) -> int:
        """Parameters of one layer: four square matrices, two of the feed-forward part, biases and two layer norms."""
        return 4 * self.hidden**2 + 2 * self.hidden * self.intermediate + 9 * self.hidden + self.intermediate

    @property
    def parameters(self) -> int:
        """Parameters of the encoder, without the pooler, which sentence embeddings do not use."""
        return self.embeddings + self.layers * self.layer


SHAPES = {
    BGE_M3: Shape(24, 1024, 16, 4096, 250_002, 8_194),
    E5_SMALL: Shape(12, 384, 12, 1536, 250_037, 512),
}


def shape_of(base_model: str) -> Shape | None:
    """The shape of a known hub id or of a model folder, read from its configuration; None where it is not known."""
    path = Path(base_model) / "config.json"
    if not path.is_file():
        return SHAPES.get(base_model)
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size")
    try:
        return Shape(*(int(config[name]) for name in (*names, "max_position_embeddings")))
    except KeyError:
        return None


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a training step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """The sum, with the workspace."""
        return self.weights + self.gradients + self.optimizer + self.activations + WORKSPACE

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "activations")
        return f"{self.total / 1e9:.1f} GB (" + ", ".join(f"{p} {getattr(self, p) / 1e9:.1f}" for p in parts) + ")"


def estimate(
    shape: Shape,
    profile: Profile,
    precision: Precision,
    passage_tokens: int | None = None,
    fused_attention: bool = True,
) -> Memory:
    """Estimate the peak of a training step with AdamW, from the sizes of what autograd keeps.

    Weights, gradients and both moments of AdamW are float32, 4 bytes each; below float32, autocast keeps a copy of the
    layers' matrices in 2 bytes. What a layer keeps for its backward pass was read off the operations of the library's
    layer (compare Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models", eq. 1,
    whose 34 bytes a token and hidden unit hold where all of it is 16-bit).

    Args:
        shape: of the base model.
        profile: how it is trained.
        precision: of the matrix products.
        passage_tokens: of each passage of the largest batch; default: the limit of the profile.
        fused_attention: whether attention keeps no matrix of tokens by tokens (a GPU's fused kernels; a processor's
            only without dropout).
    """
    trained = shape.parameters
    if profile.lora_rank:
        # Four square matrices and two of the feed-forward part have an adapter each.
        trained = shape.layers * profile.lora_rank * (8 * shape.hidden + 2 * (shape.hidden + shape.intermediate))
    elif profile.frozen_layers:
        trained = (shape.layers - profile.frozen_layers) * shape.layer
    elif not profile.train_token_embeddings:
        trained -= shape.vocabulary * shape.hidden
    # A question and a passage each give a gradient for the table of tokens; for a moment both are there.
    whole_table = profile.train_token_embeddings and not profile.lora_rank and not profile.frozen_layers
    table = 4 * shape.vocabulary * shape.hidden if whole_table else 0
    copies = 0 if precision == "float32" else 2 * shape.layers * shape.layer
    passage = passage_tokens or profile.train_seq_length or profile.max_seq_length
    question = min(QUESTION_TOKENS, passage)
    if profile.mini_batch_size is None:
        texts = {passage: profile.batch_size, question: profile.batch_size}
    else:
        texts = {passage: profile.mini_batch_size}
    layers = shape.layers - profile.frozen_layers
    activations = 0
    for tokens, number in texts.items():
        one_layer = number * tokens * _kept_by_layer(shape, profile, precision, tokens, fused_attention)
        if profile.activation_checkpointing:
            activations += 4 * shape.hidden * number * tokens * layers + one_layer
        else:
            activations += one_layer * layers
    return Memory(4 * shape.parameters + copies, 4 * trained + table, 8 * trained, activations)


def _kept_by_layer(shape: Shape, profile: Profile, precision: Precision, tokens: int, fused_attention: bool) -> int:
    """Bytes a token that one layer keeps for its backward pass."""
    hidden, intermediate = shape.hidden, shape.intermediate
    if precision == "float32":
        # Input, query, key, value, context, inputs of both layer norms, output of the first; before and after GELU.
        kept = 4 * 8 * hidden + 8 * intermediate
    else:
        # As above, with the layer norms in float32 and a cast copy of the input for each of the projections.
        kept = 2 * 10 * hidden + 4 * 4 * hidden + 4 * intermediate
    size = 4 if precision == "float32" else 2
    if profile.dropout:
        kept += 2 * size * hidden  # a mask behind the attention and one behind the feed-forward part
    matrices = 0
    if profile.attention == "eager":
        matrices = 3 if profile.dropout else 1  # the softmax; with dropout its mask and the product too
    elif not fused_attention:
        matrices = 5 if size == 4 else 8  # noqa: PLR2004 - what the unfused kernel keeps, found by measuring
    return kept + matrices * size * shape.heads * tokens


def available(device: str) -> int:
    """Bytes of memory that a run may use on this device."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def peak(device: str) -> int:
    """The most bytes that this process has held so far, on the device; what it holds now where only that is known."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage, whose figure a process inherits from the one that started it.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if found:
            return int(found[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def check_fits(shape: Shape, profile: Profile, device: str, precision: Precision) -> Memory:
    """Estimate, and refuse what cannot fit.

    Raises:
        InputError: the estimate is above what the device has; names the first setting that would help.
    """
    limit = available(device)
    fused = device.startswith("cuda") or not profile.dropout
    needed = estimate(shape, profile, precision, fused_attention=fused)
    if needed.total <= limit:
        return needed
    for setting, smaller in _smaller(profile):
        if estimate(shape, smaller, precision, fused_attention=fused).total <= limit:
            remedy = f"set {setting}"
            break
    else:
        remedy = f"take a smaller base model, such as {E5_SMALL}"
    raise InputError(
        f"the profile {profile.name} needs about {needed}, and {device} has {limit / 1e9:.1f} GB free: {remedy}"
    )


def as_markdown() -> str:
    """The estimate for each profile in the precision of the machine it is for; the card's recipe as published, too."""
    as_published = replace(CARD, activation_checkpointing=False)
    plans: list[tuple[str, Profile, Precision]] = [
        ("`laptop`", LAPTOP, "float32"),
        ("`colab`", COLAB, "float16"),
        ("`card`", CARD, "bfloat16"),
        ("`card` without activation checkpointing", as_published, "bfloat16"),
    ]
    parts = ("weights", "gradients", "optimizer", "activations", "total")
    lines = ["| GB | precision | " + " | ".join(parts) + " |", "| --- | --- |" + " ---: |" * len(parts)]
    for name, profile, precision in plans:
        needed = estimate(SHAPES[profile.base_model], profile, precision)
        sizes = " | ".join(f"{getattr(needed, part) / 1e9:.1f}" for part in parts)
        lines.append(f"| {name} | {precision} | {sizes} |")
    return "\n".join(lines)


def _smaller(profile: Profile) -> Iterator[tuple[str, Profile]]:
    """Ways to need less, each on top of the ones before, in the order of what they cost in quality."""
    steps: list[dict[str, object]] = [
        {"activation_checkpointing": True},
        {"mini_batch_size": 8},
        {"max_seq_length": 512},
        {"mini_batch_size": 2},
        {"lora_rank": 16},
    ]
    changes: dict[str, object] = {}
    for step in steps:
        changes |= step
        yield ", ".join(f"{name}={value}" for name, value in changes.items()), replace(profile, **changes)  # type: ignore[arg-type]
