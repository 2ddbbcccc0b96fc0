from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from bmf_matryoshka import plots
from bmf_matryoshka.metrics import Interval


def test_the_curve_shows_the_values_and_the_band_the_interval() -> None:
    curve = {64: Interval(0.5, 0.4, 0.6), 384: Interval(0.8, 0.7, 0.9)}
    axes = plots.metric_by_dim({"a": curve, "b": curve}, Figure().subplots())
    line = axes.get_lines()[0]
    assert line.get_xdata().tolist() == [64, 384]  # type: ignore[union-attr]
    assert line.get_ydata().tolist() == [0.5, 0.8]  # type: ignore[union-attr]
    band = np.asarray(axes.collections[0].get_paths()[0].vertices)
    assert (band[:, 1].min(), band[:, 1].max()) == (0.4, 0.9)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["64", "384"]
    styles = {(other.get_linestyle(), other.get_marker()) for other in axes.get_lines()}
    assert len(styles) == 2  # told apart without colour
    assert axes.get_xlabel()
    assert "ndcg@10" in axes.get_ylabel()


def test_what_has_no_dimension_is_a_level_line_in_the_legend() -> None:
    curve = {64: Interval(0.5, 0.4, 0.6), 384: Interval(0.8, 0.7, 0.9)}
    axes = plots.metric_by_dim({"a": curve}, Figure().subplots(), levels={"BM25": Interval(0.3, 0.2, 0.4)})
    assert axes.get_lines()[1].get_ydata() == [0.3, 0.3]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "BM25"]


def test_the_loss_curve_starts_at_zero() -> None:
    axes = plots.loss_curve(pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0]}), Figure().subplots())
    assert axes.get_lines()[0].get_ydata().tolist() == [3.0, 2.0]  # type: ignore[union-attr]
    assert axes.get_ylim()[0] == 0


def test_merging_is_a_line_for_each_task_at_both_ends_of_the_dims() -> None:
    rows = pd.DataFrame(
        [
            {"weight": weight, "task": task, "dim": dim, "value": weight + dim, "low": weight, "high": 1.0}
            for weight in (0.0, 0.5, 1.0)
            for task in ("tax law", "general")
            for dim in (384, 64, 32)
        ]
    )
    axes = plots.merging(rows, Figure().subplots())
    lines = {str(line.get_label()): np.asarray(line.get_ydata()).tolist() for line in axes.get_lines()}
    names = ["tax law, 384 dims", "tax law, 32 dims", "general, 384 dims", "general, 32 dims"]
    assert list(lines) == names
    assert lines["general, 32 dims"] == [32.0, 32.5, 33.0]


def test_no_curve_is_left_out_however_many_there_are() -> None:
    many = len(plots.LINES) + 2
    curve = {64: Interval(0.5, 0.4, 0.6), 384: Interval(0.8, 0.7, 0.9)}
    axes = plots.metric_by_dim({str(number): curve for number in range(many)}, Figure().subplots())
    assert len(axes.get_lines()) == many


def test_the_histogram_shows_shares() -> None:
    axes = plots.lengths({"questions": [8, 9, 20], "passages": [100, 200]}, Figure().subplots())
    legend = axes.get_legend()
    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {"questions", "passages"}


def test_the_matrix_shows_every_number() -> None:
    scores = np.array([[1, 0.25], [0.25, 1]], np.float32)
    axes = plots.similarity_matrix(scores, ["a", "b"], Figure().subplots())
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.25", "0.25", "1.00"]


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_equal_data_give_equal_files(tmp_path: Path, ending: str) -> None:
    plots.use_style()
    written = []
    for name in ("a", "b"):
        figure = Figure()
        plots.loss_curve(pd.DataFrame({"step": [1, 2], "loss": [3.0, 2.0]}), figure.subplots())
        plots.save(figure, tmp_path / name / "loss")
        written.append((tmp_path / name / f"loss.{ending}").read_bytes())
    assert written[0] == written[1]
