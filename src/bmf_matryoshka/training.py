"""Train with MatryoshkaLoss over MultipleNegativesRankingLoss: loss, batches, arguments, trainer."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from numpy.typing import NDArray
from safetensors import SafetensorError
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from sentence_transformers.sentence_transformer.modules import Dense
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback

from . import adapters, base_models, files, hardware, retrieval
from .batches import SimilarLengthBatchSampler, length_groups
from .callbacks import LogFile, LossGuard, ProgressBar
from .errors import InputError
from .evaluation import MatryoshkaEvaluator, build_task
from .profiles import Profile

LOGS_PER_RUN = 50
COMPLETE = "complete"
"""The file that a checkpoint gets last: without it, writing was cut short."""
MAP_STEPS, MAP_BATCH, MAP_LEARNING_RATE = 300, 512, 5e-4
"""Of `linear_map`; chosen on the validation questions."""
KEPT_TOLERANCE = 1e-4
"""How far two evaluations of the same weights may differ."""


@dataclass(frozen=True)
class TrainingRun:
    """What training did: the trainer's log and the facts around it. The model itself was trained in place."""

    history: list[dict[str, float]]
    info: dict[str, Any]

    @property
    def losses(self) -> pd.DataFrame:
        """Columns epoch, step and loss, a row per log."""
        return self._rows("loss")

    @property
    def evaluations(self) -> pd.DataFrame:
        """A row per evaluation: epoch, step and the evaluator's keys behind `eval_`."""
        return self._rows("eval_mean_cosine_ndcg@10")

    def to_json(self) -> str:
        """Facts and log, as a file keeps them."""
        return json.dumps({**self.info, "history": self.history}, indent=1)

    @classmethod
    def load(cls, path: Path) -> "TrainingRun":
        """Read what `to_json` gave.

        Raises:
            InputError: there is no such file.
        """
        if not path.is_file():
            raise InputError(f"{path} is missing: run chapter 04 first")
        info = json.loads(path.read_text(encoding="utf-8"))
        return cls(info.pop("history"), info)

    def _rows(self, key: str) -> pd.DataFrame:
        return pd.DataFrame([row for row in self.history if key in row])


def build_loss(
    model: SentenceTransformer,
    dims: Sequence[int],
    scale: float = 20.0,
    mini_batch_size: int | None = None,
    weight_exponent: float = 0.0,
    dims_per_step: int = -1,
    gather: bool = False,
) -> MatryoshkaLoss:
    """MatryoshkaLoss over MultipleNegativesRankingLoss or its cached form.

    Args:
        model: what is trained.
        dims: trained dimensions.
        scale: what cosines are multiplied by.
        mini_batch_size: a number switches to the cached loss.
        weight_exponent: the loss at a dim weighs (largest dim / dim) to this power.
        dims_per_step: train only this many of the dims in each step; -1 for all.
        gather: tell each question apart from the passages of all processes.
    """
    base: torch.nn.Module
    if mini_batch_size is None:
        base = MultipleNegativesRankingLoss(model, scale=scale, gather_across_devices=gather)
    else:
        base = CachedMultipleNegativesRankingLoss(
            model, scale=scale, mini_batch_size=mini_batch_size, gather_across_devices=gather
        )
    weights: list[float | int] = [(dims[0] / dim) ** weight_exponent for dim in dims]
    return MatryoshkaLoss(model, base, list(dims), weights, dims_per_step)


def build_arguments(
    profile: Profile,
    work: Path,
    device: str,
    precision: hardware.Precision,
    seed: int,
    prompts: dict[str, str],
    report_to: str = "none",
) -> SentenceTransformerTrainingArguments:
    """The trainer's arguments for a profile on this machine."""
    when: dict[str, Any] = {"eval_strategy": "epoch", "save_strategy": "epoch"}
    if profile.evaluations is not None:
        share = min(1 / profile.evaluations, 1 - 1e-9)  # the trainer takes 1 as "after each step"
        when = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": share, "save_steps": share}
    several = hardware.processes() > 1
    return SentenceTransformerTrainingArguments(
        output_dir=str(work),
        num_train_epochs=profile.epochs,
        max_steps=profile.max_steps,
        per_device_train_batch_size=profile.batch_size,
        gradient_accumulation_steps=profile.gradient_accumulation_steps,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=profile.warmup,
        optim="adamw_torch_fused",
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts=prompts,
        use_cpu=device == "cpu",
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        tf32=True if profile.tf32 and device.startswith("cuda") and precision == "bfloat16" else None,
        **when,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model=f"eval_{_chosen_by(profile)}",
        greater_is_better=True,
        logging_strategy="steps",
        logging_steps=1 / LOGS_PER_RUN,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=report_to,
        dataloader_pin_memory=device.startswith("cuda"),
        # One batch over all processes, cut into a share for each: so it holds no duplicates, and every share is full.
        accelerator_config={"split_batches": several},
        dataloader_drop_last=several,
        ddp_find_unused_parameters=False if several else None,
        seed=seed,
    )


def train(
    model: SentenceTransformer,
    dataset: DatasetDict,
    profile: Profile,
    work: Path,
    seed: int = 42,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    report_to: str = "none",
    cache: Path | None = None,
) -> TrainingRun:
    """Train the model in place; afterwards it holds the checkpoint that `profile.chosen_by` calls the best.

    Started by `accelerate launch` or `torchrun`, each process runs this function: batches are shared out, negatives
    gathered; only the first process evaluates and writes.

    Args:
        model: a base model in float32; its `truncate_dim` must not be set. `profile.linear_layer` adds a layer.
        dataset: what `pairs.split` returned.
        profile: how to train.
        work: folder for checkpoints and the growing log, `log.json`.
        seed: for batches and dropout.
        resume: go on from the last whole checkpoint in `work`; without one, start anew.
        callbacks: called by the trainer as well, for example a `LivePlot`.
        report_to: "none", "tensorboard" or "trackio", which must be installed.
        cache: keeps the base model's embeddings, from which `profile.linear_layer` starts.

    Raises:
        InputError: the profile's dims do not fit the model, or a package that the profile needs is not installed.
        LossError: the loss is no longer a number.
        CheckpointError: a checkpoint could not be written.
    """
    dims = profile.dims_for(base_models.width(model))
    if report_to != "none" and find_spec(report_to) is None:
        raise InputError(f"{report_to} is not installed: pip install {report_to}")
    device = model.device.type
    precision = hardware.precision(device)
    chooser = "validation" if "validation" in dataset else "test"
    task = build_task(dataset, chooser, profile.protocol, corpus="own" if chooser == "validation" else "all")
    evaluator = MatryoshkaEvaluator(task, dims, precision)
    prompts = {"anchor": model.prompts.get("query") or "", "positive": model.prompts.get("document") or ""}
    model.model_card_data.generate_widget_examples = False
    # Otherwise the trainer draws examples for a model card, behind a bar of its own.
    model.model_card_data.widget = [{}]
    start = time.perf_counter()
    if resume:
        _remove_partial(work)
    checkpoint = last_checkpoint(work) if resume else None
    if checkpoint and profile.linear_layer:
        base_models.insert_linear(model, np.eye(base_models.width(model), dtype=np.float32))  # the checkpoint fills it
    else:
        add_linear_layer(model, dataset["train"], profile, seed, cache)
    with _settings(model, profile), base_models.quiet_transformers():
        trainer = _Trainer(
            model=model,
            args=build_arguments(profile, work, device, precision, seed, prompts, report_to),
            train_dataset=dataset["train"].select_columns(list(profile.columns)),
            loss=build_loss(
                model,
                dims,
                profile.scale,
                profile.mini_batch_size,
                profile.weight_exponent,
                profile.dims_per_step,
                gather=hardware.processes() > 1,
            ),
            evaluator=evaluator,
            callbacks=[ProgressBar(), LogFile(), LossGuard(precision), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        if profile.batches == "similar_length":
            trainer.batch_source = dataset["train"]
        if profile.length_groups:
            trainer.group_tokens = hardware.token_budget(device)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.accelerator.wait_for_everyone()
        # The trainer only logs an error where the best checkpoint cannot be loaded, so look at what was loaded.
        kept = evaluator(model) if hardware.is_first_process() else {}
    state = trainer.state
    chosen = _chosen_by(profile)
    if kept and (state.best_metric is None or abs(kept[chosen] - state.best_metric) > KEPT_TOLERANCE):
        raise RuntimeError(
            f"the loaded model scores {chosen} {kept[chosen]:.4f}, its checkpoint scored {state.best_metric}"
        )
    seconds = time.perf_counter() - start
    info = {
        "profile": asdict(profile),
        "dims": list(dims),
        "seed": seed,
        "device": device,
        "precision": precision,
        "processes": hardware.processes(),
        "pairs": len(dataset["train"]),
        "pairs_seen": round(len(dataset["train"]) * (state.epoch or 0)),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "chosen_on": chooser,
        "chosen_by": chosen,
        "kept": kept,
        "seconds": round(seconds, 1),
    }
    return TrainingRun(state.log_history, info)


def add_linear_layer(
    model: SentenceTransformer, train: Dataset, profile: Profile, seed: int = 42, cache: Path | None = None
) -> None:
    """Give a base model the layer that `profile.linear_layer` names, as it is before the training.

    Args:
        model: changed in place.
        train: the training split.
        profile: how the model will be trained.
        seed: see `linear_map`.
        cache: see `retrieval.encode`.
    """
    if profile.linear_layer == "axes":
        base_models.insert_linear(model, principal_axes(model, train, cache=cache))
    elif profile.linear_layer == "map":
        dims = profile.dims_for(base_models.width(model))
        base_models.insert_linear(model, linear_map(model, train, dims, profile.scale, seed, cache=cache))


def principal_axes(
    model: SentenceTransformer, train: Dataset, show_progress: bool = False, cache: Path | None = None
) -> NDArray[np.float32]:
    """The principal axes of the training pairs' vectors, shape (width, width) (see `base_models.principal_axes`).

    Args:
        model: encodes them.
        train: the training split.
        show_progress: show bars.
        cache: see `retrieval.encode`.
    """
    return base_models.principal_axes(*_pair_vectors(model, train, show_progress, cache))


def linear_map(
    model: SentenceTransformer,
    train: Dataset,
    dims: Sequence[int],
    scale: float = 20.0,
    seed: int = 42,
    show_progress: bool = False,
    cache: Path | None = None,
) -> NDArray[np.float32]:
    """A square matrix for the model's vectors, trained with MatryoshkaLoss while the model itself stays as it is.

    All dims weigh alike in the loss.

    Starts from the principal axes. Each text is encoded once, so that a step costs no more than a few products of
    matrices: batches are large, and all is done in seconds on a processor.

    Args:
        model: encodes the pairs.
        train: the training split.
        dims: trained dimensions.
        scale: what cosines are multiplied by in the loss.
        seed: for the batches: a question each of different passages.
        show_progress: show bars.
        cache: see `retrieval.encode`; keeps the matrix as well.

    Returns:
        shape (width, width); a vector x becomes matrix @ x.
    """
    vectors = _pair_vectors(model, train, show_progress, cache)
    width = vectors[0].shape[1]
    settings = f"{[*dims]} {scale} {seed} {MAP_STEPS} {MAP_BATCH} {MAP_LEARNING_RATE} {train['passage_id'][:]}"
    digest = hashlib.sha256(settings.encode() + vectors[0].tobytes() + vectors[1].tobytes()).hexdigest()
    known = cache / f"map-{digest[:32]}.npy" if cache else None
    if known and known.is_file():
        return np.asarray(np.load(known, allow_pickle=False), np.float32)
    start = torch.from_numpy(base_models.principal_axes(*vectors))
    dense = Dense(width, width, bias=False, activation_function=torch.nn.Identity(), init_weight=start)
    loss = build_loss(SentenceTransformer(modules=[dense], device="cpu"), dims, scale)
    pairs_of = train.to_pandas().groupby("passage_id", sort=False).indices
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(dense.parameters(), lr=MAP_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, MAP_STEPS)
    for _ in tqdm(range(MAP_STEPS), desc="linear map", unit="step", disable=not show_progress):
        drawn = generator.permutation(list(pairs_of))[:MAP_BATCH]
        rows = [generator.choice(pairs_of[passage]) for passage in drawn]
        optimizer.zero_grad()
        loss([{"sentence_embedding": torch.from_numpy(part[rows])} for part in vectors], None).backward()
        optimizer.step()
        schedule.step()
    matrix: NDArray[np.float32] = dense.linear.weight.detach().numpy()
    if known:
        with files.whole_file(known) as part, part.open("wb") as file:
            np.save(file, matrix)
    return matrix


def _pair_vectors(
    model: SentenceTransformer, train: Dataset, show_progress: bool, cache: Path | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The vectors of the questions and of their passages, each of shape (pairs, width)."""
    precision = hardware.precision(model.device.type)
    passages = list(dict.fromkeys(train["positive"]))
    place = {text: row for row, text in enumerate(passages)}
    own = [place[text] for text in train["positive"]]
    positives = retrieval.encode(model, passages, "passage", precision, None, show_progress, cache)[own]
    anchors = retrieval.encode(model, list(train["anchor"]), "query", precision, None, show_progress, cache)
    return anchors, positives


def save(model: SentenceTransformer, run: TrainingRun, folder: Path, work: Path) -> None:
    """Save the trained model with its log, replacing an older one, then remove the checkpoints.

    Whatever is cut short here stays inside `work`.
    """
    base_models.save(model, work / "model", {"training.json": run.to_json()})
    shutil.rmtree(folder, ignore_errors=True)
    (work / "model").rename(folder)
    shutil.rmtree(work)


def _chosen_by(profile: Profile) -> str:
    return f"{'mean' if profile.chosen_by == 'mean' else f'dim_{profile.chosen_by}'}_cosine_ndcg@10"


def last_checkpoint(work: Path) -> str | None:
    """The newest whole checkpoint in a folder; None if there is none."""
    whole = [folder for folder in _checkpoints(work) if (folder / COMPLETE).is_file()]
    return str(whole[-1]) if whole else None


def _checkpoints(work: Path) -> list[Path]:
    return sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))


def _remove_partial(work: Path) -> None:
    """Remove checkpoints whose writing was cut short."""
    if hardware.is_first_process():
        for folder in _checkpoints(work):
            if not (folder / COMPLETE).is_file():
                shutil.rmtree(folder)


class CheckpointError(Exception):
    """A checkpoint could not be written."""


class _Trainer(SentenceTransformerTrainer):
    """The library's trainer, with batches over all processes, its own sampler, and checkpoints whole or absent."""

    batch_source: Dataset | None = None
    """Pairs with all their columns: switches to batches of similar length."""
    group_tokens: int | None = None
    """Tokens a group: switches to length groups."""

    def get_batch_sampler(
        self, dataset: Dataset, batch_size: int, drop_last: bool, *args: Any, **options: Any
    ) -> BatchSampler | None:
        batch_size *= hardware.processes()
        if self.batch_source is None:
            return super().get_batch_sampler(dataset, batch_size, drop_last, *args, **options)
        return SimilarLengthBatchSampler(self.batch_source, batch_size, drop_last, *args, **options)

    def training_step(self, *args: Any, **options: Any) -> torch.Tensor:
        with length_groups(self.model, self.group_tokens) if self.group_tokens else nullcontext():
            return super().training_step(*args, **options)

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(*args, **options)
            if self.args.should_save:
                (folder / COMPLETE).touch()
        except (OSError, RuntimeError, SafetensorError) as error:  # the forms that a full disk takes
            shutil.rmtree(folder, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {self.state.global_step} could not be written to {folder.parent} "
                f"({str(error).splitlines()[0]}): make room on the disk, then go on with --resume"
            ) from error


@contextmanager
def _settings(model: SentenceTransformer, profile: Profile) -> Iterator[None]:
    """Apply a profile's length limit, attention, dropout, frozen weights, adapters and activation checkpointing.

    Everything is put back afterwards; what the adapters learned is added to the weights.
    """
    length = model.max_seq_length
    transformer = base_models.transformer(model)
    attention = transformer.config._attn_implementation
    dropouts = {} if profile.dropout else {m: m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    frozen = [weight for name, weight in transformer.named_parameters() if name.startswith("pooler.")]
    if not profile.train_token_embeddings:
        frozen += transformer.get_input_embeddings().parameters()
    if profile.frozen_layers:
        lowest = ("embeddings.", *(f"encoder.layer.{number}." for number in range(profile.frozen_layers)))
        frozen += [weight for name, weight in transformer.named_parameters() if name.startswith(lowest)]
    if profile.lora_rank:
        adapters.add(model, profile.lora_rank)
    model.max_seq_length = profile.train_seq_length or length
    transformer.set_attn_implementation(profile.attention)
    if profile.activation_checkpointing:
        transformer.activation_checkpointing_enable()
    for module in dropouts:
        module.p = 0.0
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        model.max_seq_length = length
        transformer.set_attn_implementation(attention)
        if profile.activation_checkpointing:
            transformer.activation_checkpointing_disable()
        for module, probability in dropouts.items():
            module.p = probability
        if profile.lora_rank:
            adapters.merge(model)
        for weight in transformer.parameters():
            weight.requires_grad_(True)
