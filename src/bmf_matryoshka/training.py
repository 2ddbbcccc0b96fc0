"""Train with MatryoshkaLoss over MultipleNegativesRankingLoss: loss, batches, arguments, trainer."""

import json
import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers, DefaultBatchSampler
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from torch.utils.data import BatchSampler
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import base_models, hardware
from .errors import InputError
from .evaluation import MatryoshkaEvaluator, build_task
from .profiles import Profile

LOGS_PER_RUN = 50
CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "training_args.bin")
"""The last of these to be written is the state of the trainer."""


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


class SimilarLengthBatchSampler(DefaultBatchSampler):
    """Batches of pairs with passages of similar length, in which no passage answers another pair's question.

    Padding wastes half of a random batch; sorting by length (with 20 % of noise, so that batches differ between epochs)
    saves most of it. The last pairs of an epoch that fit no batch wait for the next epoch.
    """

    def __init__(self, dataset: Dataset, batch_size: int, drop_last: bool, **options: Any):
        super().__init__(dataset, batch_size=batch_size, drop_last=drop_last, **options)
        self.passages: list[str] = list(dataset["passage_id"])
        self.relevant = [frozenset(relevant) for relevant in dataset["relevant"]]
        self.lengths = torch.tensor([len(text) for text in dataset["positive"]], dtype=torch.float)

    def __len__(self) -> int:
        full, rest = divmod(len(self.passages), self.batch_size)
        return full + bool(rest and not self.drop_last)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        noise = 0.8 + 0.4 * torch.rand(len(self.lengths), generator=generator)
        waiting = deque((self.lengths * noise).argsort().tolist())
        batches = [self._fill(waiting) for _ in range(len(self))]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            if batches[number]:
                yield batches[number]

    def _fill(self, waiting: deque[int]) -> list[int]:
        """Take a batch from the front of the queue; pairs that clash with it keep their place."""
        batch: list[int] = []
        passages: set[str] = set()
        answers: set[str] = set()
        skipped: list[int] = []
        while waiting and len(batch) < self.batch_size:
            pair = waiting.popleft()
            if self.passages[pair] in answers or self.relevant[pair] & passages:
                skipped.append(pair)
                continue
            batch.append(pair)
            passages.add(self.passages[pair])
            answers |= self.relevant[pair]
        waiting.extendleft(reversed(skipped))
        return batch


def build_loss(
    model: SentenceTransformer, dims: Sequence[int], scale: float = 20.0, mini_batch_size: int | None = None
) -> MatryoshkaLoss:
    """MatryoshkaLoss, weight 1 for each dimension, over MultipleNegativesRankingLoss or its cached form."""
    base: torch.nn.Module
    if mini_batch_size is None:
        base = MultipleNegativesRankingLoss(model, scale=scale)
    else:
        base = CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=mini_batch_size)
    return MatryoshkaLoss(model, base, matryoshka_dims=list(dims))


def build_arguments(
    profile: Profile, work: Path, device: str, precision: hardware.Precision, seed: int, prompts: dict[str, str]
) -> SentenceTransformerTrainingArguments:
    """The trainer's arguments for a profile on this machine."""
    # A run that stops within its first epoch is evaluated at half-time and at the end.
    when: dict[str, Any] = (
        {"eval_strategy": "epoch", "save_strategy": "epoch"}
        if profile.max_steps < 0
        else {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 0.5, "save_steps": 0.5}
    )
    return SentenceTransformerTrainingArguments(
        output_dir=str(work),
        num_train_epochs=profile.epochs,
        max_steps=profile.max_steps,
        per_device_train_batch_size=profile.batch_size,
        gradient_accumulation_steps=profile.gradient_accumulation_steps,
        activation_checkpointing=profile.activation_checkpointing or None,
        learning_rate=profile.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=profile.warmup,
        optim="adamw_torch_fused",
        batch_sampler=BatchSamplers.NO_DUPLICATES,
        prompts=prompts,
        use_cpu=device == "cpu",
        bf16=precision == "bfloat16",
        fp16=precision == "float16",
        tf32=True if profile.tf32 and device.startswith("cuda") else None,
        **when,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_mean_cosine_ndcg@10",
        greater_is_better=True,
        logging_strategy="steps",
        logging_steps=1 / LOGS_PER_RUN,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=device.startswith("cuda"),
        seed=seed,
    )


def train(
    model: SentenceTransformer,
    dataset: DatasetDict,
    profile: Profile,
    work: Path,
    seed: int = 42,
    resume: bool = False,
) -> TrainingRun:
    """Train the model in place; afterwards it holds the checkpoint with the best mean ndcg@10.

    Args:
        model: a base model in float32; its `truncate_dim` must not be set.
        dataset: what `pairs.split` returned.
        profile: how to train.
        work: folder for checkpoints.
        seed: for batches and dropout.
        resume: go on from the last whole checkpoint in `work`; without one, start anew.

    Raises:
        InputError: the profile's dims do not fit the model.
        LossError: the loss is no longer a number.
    """
    dims = profile.dims_for(base_models.width(model))
    device = model.device.type
    precision = hardware.precision(device)
    chooser = "validation" if "validation" in dataset else "test"
    task = build_task(dataset, chooser, profile.protocol, corpus="own" if chooser == "validation" else "all")
    evaluator = MatryoshkaEvaluator(task, dims, precision)
    prompts = {"anchor": model.prompts.get("query") or "", "positive": model.prompts.get("document") or ""}
    model.model_card_data.generate_widget_examples = False
    start = time.perf_counter()
    with _settings(model, profile), base_models.quiet_transformers():
        trainer = _Trainer(
            model=model,
            args=build_arguments(profile, work, device, precision, seed, prompts),
            train_dataset=dataset["train"].select_columns(list(profile.columns)),
            loss=build_loss(model, dims, profile.scale, profile.mini_batch_size),
            evaluator=evaluator,
            callbacks=[_ProgressBar(), _LossGuard(precision)],
        )
        trainer.remove_callback(PrinterCallback)
        if profile.batches == "similar_length":
            trainer.batch_source = dataset["train"]
        trainer.train(resume_from_checkpoint=last_checkpoint(work) if resume else None)
    seconds = time.perf_counter() - start
    state = trainer.state
    info = {
        "profile": asdict(profile),
        "dims": list(dims),
        "seed": seed,
        "device": device,
        "precision": precision,
        "pairs": len(dataset["train"]),
        "pairs_seen": round(len(dataset["train"]) * (state.epoch or 0)),
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "chosen_on": chooser,
        "seconds": round(seconds, 1),
    }
    return TrainingRun(state.log_history, info)


def last_checkpoint(work: Path) -> str | None:
    """The newest checkpoint in a folder that holds everything a run needs to go on; None if there is none."""
    found = sorted(work.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]), reverse=True)
    for folder in found:
        if all((folder / name).is_file() for name in CHECKPOINT_FILES):
            return str(folder)
    return None


class LossError(Exception):
    """The loss became infinite or not a number."""


class _Trainer(SentenceTransformerTrainer):
    """The library's trainer, with a batch sampler that may look at columns that are not trained on."""

    batch_source: Dataset | None = None
    """Pairs with all their columns: switches to batches of similar length."""

    def get_batch_sampler(self, dataset: Dataset, *args: Any, **options: Any) -> BatchSampler | None:
        if self.batch_source is None:
            return super().get_batch_sampler(dataset, *args, **options)
        return SimilarLengthBatchSampler(self.batch_source, *args, **options)


class _ProgressBar(TrainerCallback):
    """One bar over all optimizer steps, showing the last loss and the last evaluation."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")
        self.shown: dict[str, str] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:  # noqa: ARG002
        for key, short in (("loss", "loss"), ("eval_mean_cosine_ndcg@10", "ndcg@10")):
            if key in options["logs"]:
                self.shown[short] = f"{options['logs'][key]:.3f}"
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        self.bar.close()


class _LossGuard(TrainerCallback):
    """Stops a run whose loss is no longer a number, instead of training on with ruined weights."""

    def __init__(self, precision: hardware.Precision):
        self.precision = precision

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:  # noqa: ARG002
        loss = options["logs"].get("loss")
        if loss is not None and not math.isfinite(loss):
            rate = options["logs"].get("learning_rate")
            raise LossError(
                f"the loss is {loss} at step {state.global_step} (learning rate {rate:.1e}, precision "
                f"{self.precision}): lower the learning rate, or train in float32"
            )


@contextmanager
def _settings(model: SentenceTransformer, profile: Profile) -> Iterator[None]:
    """Apply a profile's length limit, attention, dropout and frozen weights, and put everything back afterwards."""
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
    model.max_seq_length = profile.train_seq_length or length
    transformer.set_attn_implementation(profile.attention)
    for module in dropouts:
        module.p = 0.0
    for weight in frozen:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        model.max_seq_length = length
        transformer.set_attn_implementation(attention)
        for module, probability in dropouts.items():
            module.p = probability
        for weight in frozen:
            weight.requires_grad_(True)
