"""Kill a training again and again at random moments, resume it, and compare the end with an unbroken run.

Every other kill waits until a later checkpoint is being written. Signals are drawn from SIGINT, SIGTERM and SIGKILL.

Usage: python tests/benchmarks/kills.py [--kills N] [--seed N]
"""

import argparse
import collections
import contextlib
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
STEPS, STEPS_A_CHECKPOINT = 12, 2
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
        finish(start(mine, folder / "unbroken"), folder / "unbroken")
        expected = training.TrainingRun.load(folder / "unbroken" / "training.json").evaluations[KEYS]
        run = 0
        while counts.total() < arguments.kills:
            out = folder / f"broken-{run}"
            work = folder / f".{out.name}-checkpoints"
            kills = 0
            while kills < KILLS_A_RUN and not done(out, work):
                process = start(mine, out)
                phase = kill(process, work, chance, in_checkpoint=kills % 2 == 1)
                if phase is None:
                    finish(process, out)
                    break
                kills += 1
                counts[phase] += 1
                print(f"run {run}: {phase}, whole checkpoint: {training.last_checkpoint(work)}", flush=True)
            if not done(out, work):
                finish(start(mine, out), out)
            found = training.TrainingRun.load(out / "training.json").evaluations[KEYS]
            largest = abs(found.to_numpy() - expected.to_numpy()).max()
            left = [path.name for path in folder.iterdir() if path.name.startswith(f".{out.name}")]
            print(f"run {run}: finished after {kills} kills, largest difference {largest:.4f}, left over: {left}")
            assert largest <= TOLERANCE
            assert not left
            run += 1
    print(f"{counts.total()} kills, all resumed: {dict(counts)}")


def start(pairs_file: Path, out: Path) -> subprocess.Popen[bytes]:
    """A training in a process of its own, which goes on where an earlier one stopped."""
    command = [sys.executable, "-m", "bmf_matryoshka", "train", "--pairs", str(pairs_file), "--out", str(out)]
    command += ["--profile", "smoke", "--resume", "--set", f"max_steps={STEPS}"]
    command += [f"evaluations={STEPS // STEPS_A_CHECKPOINT}"]
    with log(out).open("ab") as errors:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)


def done(out: Path, work: Path) -> bool:
    """Whether nothing is left to resume: a kill may come when all has been saved."""
    return out.exists() and not work.exists()


def log(out: Path) -> Path:
    """Where the processes that train `out` write what they have to say."""
    return out.with_name(f"{out.name}.log")


def finish(process: subprocess.Popen[bytes], out: Path) -> None:
    """Wait for the end, which must be a good one."""
    assert process.wait() == 0, log(out).read_text(encoding="utf-8")[-2000:]


def kill(process: subprocess.Popen[bytes], work: Path, chance: random.Random, in_checkpoint: bool) -> str | None:
    """Kill the process and say how: the signal, and whether in a checkpoint; None if it ended by itself."""
    earlier = partial(work)
    if in_checkpoint:
        whole = training.last_checkpoint(work)
        step = chance.randint(1, 2) * STEPS_A_CHECKPOINT + (step_of(whole) if whole else 0)
        while process.poll() is None:
            now = partial(work)
            earlier &= now  # a resumed run removes them first; an inode may come back
            if any(step_of(path) >= step for path, _ in now - earlier):
                break
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.2))
    else:
        end = time.monotonic() + chance.uniform(1, SECONDS)
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
    if process.poll() is not None:
        return None
    chosen = chance.choice(SIGNALS)
    process.send_signal(chosen)
    process.wait()
    return f"{chosen.name} {'in' if partial(work) - earlier else 'outside'} a checkpoint"


def partial(work: Path) -> set[tuple[str, int]]:
    """Path and inode of each checkpoint without its mark; what vanishes under our eyes is none."""
    found = set()
    for folder in work.glob("checkpoint-*"):
        with contextlib.suppress(FileNotFoundError):
            inode = folder.stat().st_ino
            if not (folder / training.COMPLETE).exists():
                found.add((str(folder), inode))
    return found


def step_of(checkpoint: str) -> int:
    """The optimizer step of a checkpoint, from its path."""
    return int(checkpoint.rsplit("-", 1)[1])


if __name__ == "__main__":
    main()
