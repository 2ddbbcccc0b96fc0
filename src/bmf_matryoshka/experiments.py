"""What each choice in training does: one option changed at a time, the same pairs, one table."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from sentence_transformers import SentenceTransformer
from tqdm.auto import tqdm

from . import base_models, evaluation, files, hardware, pairs, training
from .callbacks import StepTimer
from .errors import InputError
from .evaluation import Results, Task
from .metrics import Interval
from .profiles import Profile

REFERENCE = "the reference"
STEPS, LEARNING_RATE = 20, 2e-4
"""Optimizer steps and learning rate of each experiment: a profile's own, from a map trained already, moves so little
that no option would stand out."""
MANY_EPOCHS = 4
FEW_PASSAGES = 80
"""Training passages of the experiment with many epochs."""
MERGE_WEIGHTS = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Option:
    """One change to the reference."""

    profile: Profile
    why: str
    passages: int | None = None
    """Train on this many passages alone."""
    leak: bool = False
    """Train on the validation passages themselves, with every other question; the rest is asked afterwards."""
    against: str = REFERENCE
    """The option that this one is compared with."""


def options(profile: Profile) -> dict[str, Option]:
    """Every option by its name, the reference first; all see the same number of pairs unless they are about that.

    Args:
        profile: what all have in common, but for the settings that make options visible, or cheap to measure.
    """
    reference = replace(
        profile,
        max_steps=STEPS,
        evaluations=1,
        learning_rate=LEARNING_RATE,
        linear_layer="axes",
        weight_exponent=1.0,
        train_seq_length=profile.max_seq_length // 2,
    )
    batch, dims = reference.batch_size, reference.dims

    def change(why: str, **settings: Any) -> Option:
        return Option(replace(reference, **settings), why)

    few = replace(reference, max_steps=-1)
    many = replace(few, epochs=MANY_EPOCHS)
    many_epochs = f"{FEW_PASSAGES} passages, {MANY_EPOCHS} epochs"
    return {
        REFERENCE: change(f"{STEPS} steps from the turn at a learning rate of {LEARNING_RATE:.0e}"),
        "no rotation": change("training starts from the model's own axes", linear_layer=None),
        "equal weights": change("the loss of each dimension counts once", weight_exponent=0.0),
        "milder weights": change("a dimension a quarter as large counts twice", weight_exponent=0.5),
        "full dimension left out": change("as the card did", dims=dims[1:], full_dimension=False),
        "2 dims a step": change("less to compute in the loss, which costs little anyway", dims_per_step=2),
        f"batch {batch // 2}": change(
            "fewer wrong answers a question", batch_size=batch // 2, max_steps=STEPS * 2
        ),
        f"batch {batch * 2}, cached": change(
            "more wrong answers, in the memory of half the batch",
            batch_size=batch * 2, mini_batch_size=batch, max_steps=STEPS // 2,
        ),
        "columns reversed": change("as the card did: passages look for questions", columns=("positive", "anchor")),
        "dropout .1": change("the model's default", dropout=True),
        "only the turn trained": change("every layer of the model is frozen", frozen_layers=12),
        "two more layers trained": change("the backward pass goes deeper", frozen_layers=reference.frozen_layers - 2),
        "no layer frozen": change("the embeddings stay frozen", frozen_layers=0),
        "nothing frozen": change("all weights are trained", frozen_layers=0, train_token_embeddings=True),
        "eager attention": change("the fused one is the library's default", attention="eager"),
        "no length groups": change("each batch padded as a whole, as the trainer does", length_groups=False),
        "batches of similar length": change("little padding even without groups", batches="similar_length"),
        f"cap of {reference.max_seq_length} tokens": change("as in evaluation", train_seq_length=None),
        f"{FEW_PASSAGES} passages, 1 epoch": Option(few, "few pairs", FEW_PASSAGES),
        many_epochs: Option(many, "few pairs, many times", FEW_PASSAGES),
        f"leak, {MANY_EPOCHS} epochs": Option(
            many, "trained on the passages that are searched, under other questions", leak=True, against=many_epochs
        ),
    }  # fmt: skip


def run(
    profile: Profile,
    course_pairs: pd.DataFrame,
    folder: Path,
    names: Sequence[str] = (),
    seed: int = 42,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Train and measure every option on the validation questions among the validation passages.

    Args:
        profile: what the reference is made from (see `options`).
        course_pairs: all pairs.
        folder: keeps each finished option, so that an interrupted run goes on where it stopped.
        names: of the options to run; all without any.
        seed: for each training.
        show_progress: show a bar over the options.

    Returns:
        records: option, why, pairs seen, seconds of its steps, and for each dim ndcg@10 and the paired difference from
        the reference, each with its interval.

    Raises:
        InputError: there is no such option.
    """
    known = options(profile)
    for name in names:
        if name not in known:
            raise InputError(f"no option {name!r}: choose from {', '.join(known)}")
    chosen = [REFERENCE, *(name for name in (names or known) if name != REFERENCE)]
    for name in tqdm(chosen, desc="options", unit="option", disable=not show_progress):
        path = folder / name.replace(" ", "_")
        if not path.with_suffix(".json").is_file():
            _measure(known[name], course_pairs, profile.dims, seed, folder / "embeddings").save(path)
    results = {name: Results.load(folder / name.replace(" ", "_")) for name in chosen}
    return [_row(name, known[name], results) for name in chosen]


def _measure(option: Option, course_pairs: pd.DataFrame, dims: Sequence[int], seed: int, cache: Path) -> Results:
    """Train one option and measure it at all of the reference's dims, whatever it was trained on."""
    profile = option.profile
    dataset = pairs.split(course_pairs)
    if option.leak:
        every_other = range(0, len(dataset["validation"]), 2)
        dataset["train"] = dataset["validation"].select(every_other)
        dataset["validation"] = dataset["validation"].select(range(1, len(dataset["validation"]), 2))
    if option.passages is not None:
        few = set(list(dict.fromkeys(dataset["train"]["passage_id"]))[: option.passages])
        dataset["train"] = dataset["train"].filter(lambda row: row["passage_id"] in few)
    device = hardware.device()
    model = base_models.load(profile.base_model, profile.max_seq_length, device).model
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as work:
        log = training.train(model, dataset, profile, Path(work), seed, callbacks=[timer], cache=cache)
    task = evaluation.build_task(dataset, "validation", corpus="own")
    results = evaluation.evaluate(model, task, dims, hardware.precision(device))
    measured = {"pairs_seen": log.info["pairs_seen"], "seconds": sum(timer.seconds)}
    return Results(results.table, {**results.info, **measured})


def _row(name: str, option: Option, results: Mapping[str, Results]) -> dict[str, Any]:
    found = results[name]
    row: dict[str, Any] = {"option": name, "why": option.why, "against": option.against}
    row |= {key: found.info[key] for key in ("pairs_seen", "seconds", "queries")}
    # Compared on the questions that both were asked.
    other = results.get(option.against, found).table
    both = Results(other[other["question_id"].isin(found.table["question_id"])], {})
    for dim in found.dims:
        row[str(dim)] = asdict(found.interval(dim))
        row[f"{dim} difference"] = asdict(found.difference(both, dim)) if name != REFERENCE else None
    return row


def merging(
    base: SentenceTransformer,
    tuned: SentenceTransformer,
    tasks: Mapping[str, Task],
    dims: Sequence[int],
    show_progress: bool = False,
    cache: Path | None = None,
) -> list[dict[str, Any]]:
    """ndcg@10 on several tasks along the straight line from the base model's weights to the tuned ones.

    Args:
        base: of the same shape as `tuned`, turned onto the principal axes where that has a linear layer.
        tuned: the fine-tuned model.
        tasks: by name, for example the validation questions and general ones.
        dims: at which dimensions.
        show_progress: show a bar over the weights.
        cache: see `retrieval.encode`; it may know the fine-tuned model's embeddings already.

    Returns:
        records of weight, task, dim, value, low, high.
    """
    rows: list[dict[str, Any]] = []
    precision = hardware.precision(tuned.device.type)
    for weight in tqdm((0.0, *MERGE_WEIGHTS, 1.0), desc="merging", unit="weight", disable=not show_progress):
        model = base_models.merge(base, tuned, weight)
        for name, results in evaluation.evaluate_tasks(model, tasks, dims, precision, cache=cache).items():
            rows += [{"weight": weight, "task": name, "dim": dim, **asdict(results.interval(dim))} for dim in dims]
    return rows


def as_markdown(table: Sequence[Mapping[str, Any]]) -> str:
    """What `run` returned, for people: ndcg@10 of the reference, then the other options' differences."""
    dims = [key for key in table[0] if key.isdigit()]
    lines = [
        "| option | what it is | pairs/s | " + " | ".join(dims) + " |",
        "| --- | --- |" + " ---: |" * (len(dims) + 1),
    ]
    for row in table:
        cells = []
        for dim in dims:
            found = Interval(**(row[f"{dim} difference"] or row[dim]))
            sign = "" if row["option"] == REFERENCE else "+"
            cells.append(f"{found.value:{sign}.3f} ± {found.half:.3f}")
        against = "" if row["against"] == REFERENCE else f"; against {row['against']}"
        start = f"| {row['option']} | {row['why']}{against} | {row['pairs_seen'] / row['seconds']:.0f} |"
        lines.append(f"{start} " + " | ".join(cells) + " |")
    return "\n".join(lines)


def load(path: Path) -> list[dict[str, Any]]:
    """What `save` wrote.

    Raises:
        InputError: there is no such file.
    """
    if not path.is_file():
        raise InputError(f"{path} is missing: python -m bmf_matryoshka experiments makes it")
    content: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    return content


def save(table: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write what `run` returned as JSON."""
    files.write_json(path, list(table))
