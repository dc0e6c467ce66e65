"""The figure of a sweep: every arm's paired difference from the reference, with its interval and each seed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pointalign.figures import save_figure
from pointalign.sweep.table import MEASURES

WITHIN, BEYOND = "#555555", "#0b5fa5"


def draw_sweep(table: Mapping[str, Any], reference: str, path: Path) -> bool:
    """Draw what `build_table` gives; nothing while no arm can be compared.

    Args:
        table: by measure and arm.
        reference: the arm that the others are compared with.
        path: PNG to write.

    Returns:
        Whether there was anything to draw.
    """
    compared = [arm for arm, row in next(iter(table.values())).items() if row.get("difference")]
    if not compared:
        return False
    figure = Figure(figsize=(2.4 + 3.4 * len(MEASURES), 1.5 + 0.34 * len(compared)), layout="constrained")
    panels = figure.subplots(1, len(MEASURES), sharey=True, squeeze=False)[0]
    for axes, (measure, (title, scale)) in zip(panels, MEASURES.items(), strict=True):
        _draw_measure(axes, {arm: table[measure][arm]["difference"] for arm in compared}, scale)
        rows = table[measure]
        axes.set_title(f"{title}\n{reference}: {scale * rows[reference]['mean']:.3g}", fontsize=9)
    panels[0].set_yticks(range(len(compared)), compared, fontsize=8)
    panels[0].invert_yaxis()
    first = table[next(iter(MEASURES))][compared[0]]
    figure.suptitle(
        f"Difference from {reference}: mean and 95 % interval over seeds and n = {first['n']} objects; dots are seeds",
        fontsize=10,
    )
    save_figure(figure, path)
    return True


def _draw_measure(axes: Axes, differences: Mapping[str, Mapping[str, Any]], scale: float) -> None:
    for row, found in enumerate(differences.values()):
        color = WITHIN if found["inside_noise"] else BEYOND
        low, high = (scale * end for end in found["interval"])
        axes.plot([low, high], [row, row], color=color, linewidth=2, solid_capstyle="butt")
        axes.plot(scale * found["mean"], row, marker="D", color=color, markersize=5)
        seeds = [scale * value for value in found["by_seed"]]
        axes.plot(seeds, [row + 0.22] * len(seeds), linestyle="", marker=".", color=color, markersize=4, alpha=0.6)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.grid(axis="x", alpha=0.3)
    axes.tick_params(axis="x", labelsize=8)
