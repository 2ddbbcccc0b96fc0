"""What is shown, kept and checked while training runs; the other callbacks are tested with the training itself."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
from IPython.display import DisplayHandle
from matplotlib.figure import Figure
from transformers import TrainerControl, TrainerState, TrainingArguments

from bmf_matryoshka.callbacks import LivePlot, LogFile


def test_the_log_file_grows_and_is_whole_at_any_moment(tmp_path: Path) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "work"))
    state = TrainerState()
    written = LogFile()
    for step in (1, 2):
        state.log_history.append({"step": step, "loss": 1.0 / step, "learning_rate": 0.1})
        written.on_log(arguments, state, TrainerControl())
        assert json.loads((tmp_path / "work" / "log.json").read_text()) == state.log_history
    state.is_world_process_zero = False
    state.log_history.append({"step": 3, "loss": 0.1})
    written.on_log(arguments, state, TrainerControl())
    assert len(json.loads((tmp_path / "work" / "log.json").read_text())) == 2
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["log.json"]


def test_the_live_plot_is_shown_once_and_then_redrawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: list[tuple[str, list[float]]] = []

    def remember(kind: str) -> Any:
        def called(_: DisplayHandle, figure: Figure) -> None:
            shown.append((kind, np.asarray(figure.axes[0].lines[0].get_ydata()).tolist()))

        return called

    monkeypatch.setattr(DisplayHandle, "display", remember("display"))
    monkeypatch.setattr(DisplayHandle, "update", remember("update"))
    arguments, control, state = TrainingArguments(output_dir=str(tmp_path)), TrainerControl(), TrainerState()
    live = LivePlot()
    live.on_train_begin(arguments, state, control)
    live.on_log(arguments, state, control)  # nothing to draw yet
    for step, loss in enumerate((3.0, 2.0, 1.0)):
        state.log_history.append({"step": step, "loss": loss})
        live.on_log(arguments, state, control)
    assert shown == [("display", [3.0]), ("update", [3.0, 2.0]), ("update", [3.0, 2.0, 1.0])]
    assert not plt.get_fignums()
