"""What is shown, kept and checked while training runs."""

import math
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython.display import DisplayHandle
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import files, hardware, plots


class LossError(Exception):
    """The loss became infinite or not a number."""


class ProgressBar(TrainerCallback):
    """One bar over all optimizer steps, showing the last loss and the last evaluation."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc="training",
            unit="step",
            disable=not state.is_world_process_zero,
        )
        self.shown: dict[str, str] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        for key, short in (("loss", "loss"), ("eval_mean_cosine_ndcg@10", "ndcg@10")):
            if key in options["logs"]:
                self.shown[short] = f"{options['logs'][key]:.3f}"
        self.bar.set_postfix(self.shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


class LogFile(TrainerCallback):
    """Keeps loss, learning rate and measures so far in `log.json` beside the checkpoints, whole at any moment."""

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            files.write_json(Path(str(args.output_dir)) / "log.json", state.log_history)


class LivePlot(TrainerCallback):
    """A loss curve in a notebook that is redrawn at each log while training runs."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.handle = DisplayHandle()
        self.shown = False

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = pd.DataFrame([row for row in state.log_history if "loss" in row])
        if len(losses):
            figure, axes = plt.subplots()
            plots.loss_curve(losses, axes)
            if self.shown:
                self.handle.update(figure)
            else:
                self.handle.display(figure)
            self.shown = True
            plt.close(figure)


class LossGuard(TrainerCallback):
    """Stops a run whose loss is no longer a number, instead of training on with ruined weights."""

    def __init__(self, precision: hardware.Precision):
        self.precision = precision

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any) -> None:
        loss = options["logs"].get("loss")
        if loss is not None and not math.isfinite(loss):
            rate = options["logs"].get("learning_rate")
            raise LossError(
                f"the loss is {loss} at step {state.global_step} (learning rate {rate:.1e}, precision "
                f"{self.precision}): lower the learning rate, or train in float32"
            )


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.seconds.append(round(time.perf_counter() - self.start, 2))
