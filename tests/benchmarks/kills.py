"""Kill a training again and again at random moments, resume it, and compare the end with an unbroken run.

Every other kill waits until a checkpoint is being written. Signals are drawn from SIGINT, SIGTERM and SIGKILL.

Usage: python tests/benchmarks/kills.py [--kills N] [--seed N]
"""

import argparse
import collections
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bmf_matryoshka import course_data, pairs, training

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
KILLS_A_RUN = 4
SECONDS = 25.0
"""About as long as an unbroken run takes, its start included."""
TOLERANCE = 0.002
KEYS = ["eval_dim_384_cosine_ndcg@10", "eval_dim_32_cosine_ndcg@10", "eval_mean_cosine_ndcg@10"]


def main() -> None:
    """Print each kill and how far every finished run ends from the unbroken one; fail if it is too far."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = course_data.read_folder(Path(__file__).resolve().parents[2] / "data").pairs()
        mine = folder / "mine.jsonl"
        pairs.take_passages(table, 60)[["anchor", "positive"]].to_json(mine, orient="records", lines=True)
        finish(start(mine, folder / "unbroken"))
        expected = training.TrainingRun.load(folder / "unbroken" / "training.json").evaluations[KEYS]
        for run in range(-(-arguments.kills // KILLS_A_RUN)):
            out = folder / f"broken-{run}"
            work = folder / f".{out.name}-checkpoints"
            kills = 0
            while kills < KILLS_A_RUN:
                process = start(mine, out)
                phase = kill(process, work, chance, in_checkpoint=kills % 2 == 1)
                if phase == "too late":
                    break
                kills += 1
                counts[phase] += 1
                print(f"run {run}: {phase}, whole checkpoint: {training.last_checkpoint(work)}", flush=True)
            if not out.exists():
                finish(start(mine, out))
            found = training.TrainingRun.load(out / "training.json").evaluations[KEYS]
            largest = abs(found.to_numpy() - expected.to_numpy()).max()
            left = [path.name for path in folder.iterdir() if path.name.startswith(f".{out.name}")]
            print(f"run {run}: finished after {kills} kills, largest difference {largest:.4f}, left over: {left}")
            assert largest <= TOLERANCE
            assert not left
    print(f"{counts.total()} kills, all resumed: {dict(counts)}")


def start(pairs_file: Path, out: Path) -> subprocess.Popen[str]:
    """A training in a process of its own, which goes on where an earlier one stopped."""
    command = [sys.executable, "-m", "bmf_matryoshka", "train", "--pairs", str(pairs_file), "--out", str(out)]
    command += ["--profile", "smoke", "--resume", "--set", "max_steps=12", "evaluations=6"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end, which must be a good one."""
    _, error = process.communicate()
    assert process.returncode == 0, error[-2000:]


def kill(process: subprocess.Popen[str], work: Path, chance: random.Random, in_checkpoint: bool) -> str:
    """Kill the process and say how: the signal, and whether a checkpoint was being written."""
    began = time.time()
    if in_checkpoint:
        while process.poll() is None and not partial(work, began):
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
    else:
        end = time.monotonic() + chance.uniform(1, SECONDS)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    if process.poll() is not None:
        return "too late"
    chosen = chance.choice(SIGNALS)
    process.send_signal(chosen)
    process.communicate()
    return f"{chosen.name} {'in' if partial(work, began) else 'outside'} a checkpoint"


def partial(work: Path, since: float) -> bool:
    """Whether a checkpoint was begun since then and has no mark."""
    return any(
        folder.stat().st_ctime > since and not (folder / training.COMPLETE).exists()
        for folder in work.glob("checkpoint-*")
    )


if __name__ == "__main__":
    main()
