"""Figures: loss curves and clouds, drawn without a screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pointalign.storage import written_file

LOSSES = {
    "lm_loss": "next-token loss",
    "alignment_loss": "alignment loss",
    "contrastive_loss": "contrastive loss",
    "word_loss": "word loss",
}


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    FigureCanvasAgg(figure)
    with written_file(path) as temporary:
        figure.savefig(temporary, dpi=120)


def draw_losses(
    metrics: Sequence[dict[str, Any]] | Mapping[str, Sequence[dict[str, Any]]], path: Path, title: str
) -> None:
    """Draw each logged loss over the steps.

    Args:
        metrics: a run's metric lines, or several runs' by name.
        path: PNG to write.
        title: of the figure.
    """
    runs = metrics if isinstance(metrics, Mapping) else {"": metrics}
    names = [name for name in LOSSES if any(name in line for lines in runs.values() for line in lines)]
    if not names:
        return
    figure = Figure(figsize=(4.8 * len(names), 3.4), layout="constrained")
    figure.suptitle(title)
    for axes, name in zip(np.atleast_1d(np.asarray(figure.subplots(1, len(names)))), names, strict=True):
        for number, (run, lines) in enumerate(runs.items()):
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=run or None)
        axes.set_xlabel("step")
        axes.set_ylabel(LOSSES[name])
        axes.grid(alpha=0.3)
        if any(runs):
            axes.legend()
    save_figure(figure, path)


def draw_cloud(axes: Axes, points: np.ndarray, size: float = 2.0) -> None:
    """Draw one coloured cloud from slightly above, y up, far points first.

    Args:
        axes: an ordinary 2D axes; its frame is removed.
        points: (N, 6) xyz and rgb in [0, 1].
        size: area of a point's mark.
    """
    turn, tilt = np.deg2rad(35), np.deg2rad(20)
    x, y, z = points[:, 0], points[:, 1], points[:, 2]
    right, depth = np.cos(turn) * x + np.sin(turn) * z, -np.sin(turn) * x + np.cos(turn) * z
    up, near = np.cos(tilt) * y - np.sin(tilt) * depth, np.sin(tilt) * y + np.cos(tilt) * depth
    order = np.argsort(near)
    shade = 0.75 + 0.25 * (near - near.min()) / max(float(np.ptp(near)), 1e-9)
    axes.scatter(right[order], up[order], s=size, c=np.clip(points[:, 3:] * shade[:, None], 0, 1)[order], linewidths=0)
    axes.set_aspect("equal")
    axes.set_axis_off()
