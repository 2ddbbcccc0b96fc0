"""What the lowest layers of a model make of each text, computed once."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from torch import Tensor
from torch.nn import Dropout, Module, ModuleList, Parameter
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions as Output

from . import base_models, files, memory
from .errors import InputError

MOST_BYTES = 2 * 2**30


class HiddenStates:
    """A memory of the hidden states above a model's lowest layers, for layers that keep their weights.

    Training, evaluations and merged models then need these layers once a text; only the layers above are computed each
    time. Several models may share one memory: a state is known by its token ids and a hash of the weights that made it,
    so it is never taken for another's. While the lowest layers are trained, or drop out, nothing is remembered.
    """

    def __init__(self, layers: int, limit: int | None = None, file: Path | None = None):
        """A memory, empty without a file.

        Args:
            layers: how many of the lowest layers, counted above the token embeddings; with 0, nothing is remembered.
            limit: bytes; what does not fit is computed each time. A token takes 4 bytes times the model's width.
                Default: a quarter of what the first model's device has free, at most `MOST_BYTES`.
            file: where `save` keeps the states; what it kept before is known from the start.

        Raises:
            InputError: the file is damaged or holds something else.
        """
        self.layers, self.limit, self.file = layers, limit, file
        self._states = _read(file) if file is not None and file.is_file() else {}
        self.bytes = sum(state.nbytes for state in self._states.values())
        self._hashes: WeakKeyDictionary[Module, tuple[list[tuple[int, int]], str]] = WeakKeyDictionary()

    def attach(self, model: SentenceTransformer) -> None:
        """Let a model use this memory from now on; copies made of it will as well.

        Raises:
            InputError: the model has too few layers, or is not built like BERT.
        """
        if self.layers == 0:
            return
        inner = base_models.transformer(model)
        encoder: Any = getattr(inner, "encoder", None)
        count = len(getattr(encoder, "layer", ()))
        if not 0 < self.layers <= count:
            raise InputError(
                f"{self.layers} layers: choose 1 to {count}, what we know of in a {inner.config.model_type}"
            )
        if self.limit is None:
            self.limit = min(MOST_BYTES, memory.available(str(model.device)) // 4)
        padding = model.tokenizer.pad_token_id
        embedded: tuple[Module, Tensor]

        # Functions, not methods of this object: a copied model then brings modules of its own, and keeps the memory.
        def note(embeddings: Module, _: tuple[Any, ...], inputs: dict[str, Tensor]) -> None:
            nonlocal embedded
            embedded = embeddings, inputs["input_ids"]

        def forward(
            encoder: Any,
            hidden: Tensor,
            attention_mask: Tensor | None = None,
            use_cache: bool | None = None,  # noqa: ARG001 - the layers do not take it
            **options: Any,
        ) -> Output:
            embeddings, ids = embedded
            lowest, above = encoder.layer[: self.layers], encoder.layer[self.layers :]

            def through(layers: Iterable[Module], hidden: Tensor, mask: Tensor | None) -> Tensor:
                for layer in layers:
                    hidden = layer(hidden, mask, **options)
                return hidden

            def compute(rows: list[int]) -> Tensor:
                return through(lowest, hidden[rows], None if attention_mask is None else attention_mask[rows])

            if _is_changing(embeddings, lowest):
                self._hashes.pop(encoder, None)  # a fused optimizer changes weights without counting a new version
                states = through(lowest, hidden, attention_mask)
            else:
                weights = dict(ModuleList([embeddings, *lowest]).named_parameters())
                states = self._recall(self._hash(encoder, weights), ids, padding, compute)
            return Output(last_hidden_state=through(above, states, attention_mask))

        inner.get_submodule("embeddings").register_forward_pre_hook(note, with_kwargs=True)
        encoder.forward = MethodType(forward, encoder)

    def save(self) -> None:
        """Keep the states in the file for the next run, which may be another process's."""
        assert self.file is not None
        with files.whole_file(self.file) as part:
            save_file(self._states, part)

    def _recall(self, weights: str, ids: Tensor, padding: int, compute: Callable[[list[int]], Tensor]) -> Tensor:
        """The states of a batch, shape (texts, tokens, width), zero behind each text's end.

        Args:
            weights: the hash of those that make them.
            ids: shape (texts, tokens).
            padding: the id that fills up a row.
            compute: gives the states of some rows.
        """
        kind = ids.device.type
        precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        texts = [row[: int(row.ne(padding).nonzero().max()) + 1].cpu().numpy() for row in ids]
        made_by = f"{weights} {precision} ".encode()
        keys = [hashlib.sha256(made_by + text.tobytes()).hexdigest() for text in texts]
        states = {
            key: self._states[key].to(ids.device) for key in keys if key in self._states
        }  # a file's are on the CPU
        missing = [row for row, key in enumerate(keys) if key not in states]
        if missing:
            with torch.no_grad():
                computed = compute(missing)
            for row, state in zip(missing, computed, strict=True):
                states[keys[row]] = state[: len(texts[row])].clone()
                self._keep(keys[row], states[keys[row]])
        padded = torch.nn.utils.rnn.pad_sequence([states[key] for key in keys], batch_first=True)
        return torch.nn.functional.pad(padded, (0, 0, 0, ids.shape[1] - padded.shape[1]))

    def _keep(self, key: str, state: Tensor) -> None:
        if key not in self._states and self.bytes + state.nbytes <= (self.limit or 0):
            self._states[key] = state
            self.bytes += state.nbytes

    def _hash(self, encoder: Module, weights: dict[str, Parameter]) -> str:
        """A hash of the weights, computed again only when they may have changed."""
        versions = [(weight.data_ptr(), weight._version) for weight in weights.values()]
        if encoder not in self._hashes or self._hashes[encoder][0] != versions:
            self._hashes[encoder] = versions, base_models.hash_weights(weights)
        return self._hashes[encoder][1]


def _read(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise InputError(f"{file} holds no hidden states ({error}): remove it, and they are made anew") from error


def _is_changing(*modules: Module) -> bool:
    """Whether a forward pass has to be computed in full: weights are being trained, or dropout is at work."""
    trained = any(weight.requires_grad for module in modules for weight in module.parameters())
    parts = (part for module in modules for part in module.modules())
    return (torch.is_grad_enabled() and trained) or any(
        isinstance(part, Dropout) and part.training and part.p > 0 for part in parts
    )
