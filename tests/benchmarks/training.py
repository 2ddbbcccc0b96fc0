"""Training against the trainer's defaults, in one run, in turn: the ratio of pairs a second, then the quality of both.

The defaults: float32, sdpa attention, dropout, random batches padded as a whole, every weight trained. Everything else
is the profile laptop's: the same pairs, cap on tokens, batch size, steps, learning rate and loss. Ours is trained
before and after them, without the memory of hidden states that the command `train` and chapter 04 add.

Usage: python tests/benchmarks/training.py [--steps N]
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

from datasets import DatasetDict
from sentence_transformers import SentenceTransformer

from bmf_matryoshka import base_models, course_data, evaluation, hardware, pairs, training
from bmf_matryoshka.callbacks import StepTimer
from bmf_matryoshka.profiles import LAPTOP, Profile

DEFAULTS = replace(
    LAPTOP,
    length_groups=False,
    attention="sdpa",
    dropout=True,
    train_token_embeddings=True,
    frozen_layers=0,
)


def main() -> None:
    """Print pairs a second of each training, their ratio, and the paired difference of ndcg@10 at each dim."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=LAPTOP.max_steps, help="optimizer steps of each training")
    steps = parser.parse_args().steps
    dataset = pairs.split(course_data.read_folder(Path(__file__).resolve().parents[2] / "data").pairs())
    best = hardware.precision("cpu")
    ours, first_rate = train(replace(LAPTOP, max_steps=steps), best, dataset)
    defaults, rate = train(replace(DEFAULTS, max_steps=steps), "float32", dataset)
    _, second_rate = train(replace(LAPTOP, max_steps=steps), best, dataset)
    ratios = first_rate / rate, second_rate / rate
    task = evaluation.build_task(dataset, "test")
    first, second = (evaluation.evaluate(model, task, LAPTOP.dims, best) for model in (ours, defaults))
    print(
        f"ratio of throughput: {ratios[0]:.1f} before, {ratios[1]:.1f} after the defaults, mean {sum(ratios) / 2:.1f}"
    )
    print(f"ndcg@10 on {first.info['queries']} test questions, ours minus defaults, 95 % intervals")
    for dim in LAPTOP.dims:
        print(f"  {dim:>4}  {first.interval(dim)}  {second.interval(dim)}  {first.difference(second, dim)}")


def train(profile: Profile, precision: hardware.Precision, dataset: DatasetDict) -> tuple[SentenceTransformer, float]:
    """Train a fresh model; the model, and its pairs a second without the evaluations."""
    model = base_models.load(profile.base_model, profile.max_seq_length).model
    timer = StepTimer()
    with tempfile.TemporaryDirectory() as work, mock.patch.object(hardware, "precision", return_value=precision):
        run = training.train(model, dataset, profile, Path(work), callbacks=[timer])
    rate = run.info["pairs_seen"] / sum(timer.seconds)
    print(f"{precision}, {profile.attention}: {run.info['steps']} steps, {rate:.1f} pairs/s, {run.info['seconds']} s")
    return model, rate


if __name__ == "__main__":
    main()
