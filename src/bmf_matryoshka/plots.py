"""Figures: data and an Axes in, the same Axes out; one place that writes files."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .metrics import Interval

STYLE: dict[Any, Any] = {
    "figure.figsize": (7.0, 4.2),
    "figure.dpi": 110,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "bmf-matryoshka",
}
# Told apart by line and marker as well as by colour, so that a black-and-white print stays legible.
LINES: tuple[dict[str, Any], ...] = (
    {"color": "#0b4f8a", "linestyle": "-", "marker": "o"},
    {"color": "#c8501e", "linestyle": "--", "marker": "s"},
    {"color": "#3b7d3b", "linestyle": ":", "marker": "^"},
    {"color": "#6b4c9a", "linestyle": "-.", "marker": "D"},
    {"color": "#555555", "linestyle": (0, (1, 3)), "marker": "v"},
    {"color": "#b8860b", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "P"},
    {"color": "#c2327a", "linestyle": (0, (8, 2)), "marker": "X"},
)
FEW_LABELS = 4
"""A longer legend stands below the axes, where it hides no curve."""


def use_style() -> None:
    """Apply the style shared by all figures."""
    mpl.rcParams.update(STYLE)


def metric_by_dim(
    curves: Mapping[str, Mapping[int, Interval]],
    ax: Axes,
    metric: str = "ndcg@10",
    levels: Mapping[str, Interval] | None = None,
) -> Axes:
    """Draw a metric against the dimension, a line with a 95 % band for each named curve.

    Args:
        curves: name -> dim -> interval.
        ax: where to draw.
        metric: the name of the measure, for the axis.
        levels: name -> interval of what has no dimension; drawn as thin level lines.
    """
    all_dims = sorted({dim for curve in curves.values() for dim in curve})
    for (name, curve), line in zip(curves.items(), cycle(LINES), strict=False):
        dims = sorted(curve)
        ax.plot(dims, [curve[dim].value for dim in dims], label=name, **line)
        low, high = [curve[dim].low for dim in dims], [curve[dim].high for dim in dims]
        ax.fill_between(dims, low, high, color=line["color"], alpha=0.12, linewidth=0)
    for name, level in (levels or {}).items():
        ax.axhline(level.value, color="black", linewidth=0.9, label=name)
        ax.axhspan(level.low, level.high, color="black", alpha=0.06, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_xticks(all_dims, [str(dim) for dim in all_dims])
    ax.minorticks_off()
    ax.set_xlabel("dimensions kept")
    ax.set_ylabel(f"{metric} (band: 95 % interval)")
    labels = len(curves) + len(levels or {})
    if labels > FEW_LABELS:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    elif labels > 1:
        ax.legend()
    return ax


def loss_curve(losses: pd.DataFrame, ax: Axes) -> Axes:
    """Draw the training loss against the optimizer step.

    Args:
        losses: columns step and loss.
        ax: where to draw.
    """
    line = {**LINES[0], "marker": None}
    ax.plot(losses["step"], losses["loss"], **line)
    ax.set_xlabel("optimizer step")
    ax.set_ylabel("Matryoshka loss (weighted sum over dimensions)")
    ax.set_ylim(bottom=0)
    return ax


def merging(rows: pd.DataFrame, ax: Axes) -> Axes:
    """Draw ndcg@10 against the weight of the fine-tuned model, for each task at its largest and smallest dimension.

    Args:
        rows: what `experiments.merging` returned: columns weight, task, dim, value, low, high.
        ax: where to draw.
    """
    ends = rows[rows["dim"].isin([rows["dim"].max(), rows["dim"].min()])]
    for ((task, dim), curve), line in zip(ends.groupby(["task", "dim"], sort=False), cycle(LINES), strict=False):
        ax.plot(curve["weight"], curve["value"], label=f"{task}, {dim} dims", **line)
        ax.fill_between(curve["weight"], curve["low"], curve["high"], color=line["color"], alpha=0.15, linewidth=0)
    ax.set_xlabel("weight of the fine-tuned model (0: base model)")
    ax.set_ylabel("ndcg@10 (band: 95 % interval)")
    ax.legend()
    return ax


def lengths(tokens: Mapping[str, Sequence[int]], ax: Axes) -> Axes:
    """Draw a histogram of lengths in tokens for each named set of texts, as shares of the set.

    Args:
        tokens: name -> a length for each text.
        ax: where to draw.
    """
    top = max(max(values) for values in tokens.values())
    edges = np.geomspace(min(min(values) for values in tokens.values()), top + 1, 40)
    for (name, values), line in zip(tokens.items(), cycle(LINES), strict=False):
        weights = np.full(len(values), 1 / len(values))
        style = {"color": line["color"], "linestyle": line["linestyle"]}
        ax.hist(values, bins=edges.tolist(), weights=weights, histtype="step", linewidth=1.6, label=name, **style)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_xlabel("tokens (log scale)")
    ax.set_ylabel("share of texts")
    ax.legend()
    return ax


def similarity_matrix(
    scores: "np.ndarray[tuple[int, int], np.dtype[np.float32]]", labels: Sequence[str], ax: Axes
) -> Axes:
    """Draw cosine similarities as a grid of numbers.

    Args:
        scores: shape (n, n).
        labels: n short names.
        ax: where to draw.
    """
    ax.imshow(scores, cmap="Greys", vmin=scores.min() - 0.05, vmax=1.3)
    for row, column in np.ndindex(*scores.shape):
        ax.text(column, row, f"{scores[row, column]:.2f}", ha="center", va="center")
    ax.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    ax.set_yticks(range(len(labels)), labels)
    ax.grid(visible=False)
    return ax


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG and SVG, without a date, so that equal data give equal files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
