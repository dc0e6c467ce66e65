"""One figure of all benchmarks: our path against the published procedure, with the targets as marks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pointalign.bench.targets import Ratio, Verdict
from pointalign.figures import save_figure

BETTER, WORSE, MARK = "#2a6f97", "#c1666b", "#222222"


def draw(ratios: Sequence[Ratio], verdicts: Sequence[Verdict], path: Path, title: str) -> bool:
    """Draw each ratio as a bar with the spread of its quartiles and, where there is one, its target.

    Args:
        ratios: what is drawn, from above.
        verdicts: their targets; one without a ratio is not drawn.
        path: PNG to write.
        title: of the figure.

    Returns:
        Whether there was anything to draw.
    """
    if not ratios:
        return False
    targets = {f"{v.target.benchmark}: {v.target.key.replace('_', ' ')}": v.target.bound for v in verdicts}
    figure = Figure(figsize=(8, 1.6 + 0.5 * len(ratios)), layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(ratios))[::-1]
    for place, ratio in zip(places, ratios, strict=True):
        better = ratio.value >= 1 if ratio.better_above else ratio.value <= 1
        axes.barh(place, ratio.value - 1, left=1, height=0.6, color=BETTER if better else WORSE)
        axes.plot([ratio.low, ratio.high], [place, place], color=MARK, linewidth=1.5, solid_capstyle="butt")
        axes.annotate(
            f"{ratio.value:.2f}",
            (max(ratio.value, ratio.high, 1), place),
            textcoords="offset points",
            xytext=(6, 0),
            va="center",
        )
        if ratio.label in targets:
            axes.plot(targets[ratio.label], place, marker="D", color=MARK, markersize=7, linestyle="none")
    axes.plot([], [], marker="D", color=MARK, linestyle="none", label="target")
    axes.plot([], [], color=MARK, linewidth=1.5, label="quartiles")
    axes.axvline(1, color=MARK, linewidth=1)
    axes.set_xscale("log")
    edges = [1, *targets.values(), *(value for ratio in ratios for value in (ratio.low, ratio.high, ratio.value))]
    left, right = min(edges) / 1.3, max(edges) * 2
    axes.set_xlim(left, right)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 4, 10, 20, 50, 100) if left <= tick <= right]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(places, [ratio.label for ratio in ratios])
    axes.set_xlabel(
        "our path against the published procedure, ratio of medians\n(of a speedup more is better, of memory less)"
    )
    axes.set_title(title)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)
    return True
