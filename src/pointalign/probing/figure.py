"""The figure of a probe: every measure over the layers, all models with their intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pointalign.figures import save_figure

TITLES = {
    "knn_class": "class, {k} nearest neighbour(s)",
    "linear_class": "class, linear probe",
    "linear_color": "dominant colour, linear probe",
    "box_r2": "box proportions, linear decoding",
    "heights_r2": "points by height, linear decoding",
    "group_r2": "where a token's group lies, linear decoding",
    "cknna": "CKNNA to the point encoder",
}
MAJORITIES = {"knn_class": "class", "linear_class": "class", "linear_color": "color"}
COLUMNS = 3


def draw_probe(result: Mapping[str, Any], path: Path) -> None:
    """Draw what `probe` measured.

    Args:
        result: the content of `probe.json`.
        path: PNG to write.
    """
    measures = [name for name in TITLES if any(name in found for found in result["models"].values())]
    rows = -(-len(measures) // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 0.9 + 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axes, measure in zip(panels, measures, strict=False):
        _draw_measure(axes, measure, result)
    for axes in list(figure.axes)[len(measures) :]:
        axes.set_axis_off()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)
    figure.suptitle(
        f"What the mean point token of each layer holds: n = {result['n']} ({result['scored_on']}), 95 % intervals over "
        "objects",
        fontsize=11,
    )
    save_figure(figure, path)


def _draw_measure(axes: Axes, measure: str, result: Mapping[str, Any]) -> None:
    for number, (name, found) in enumerate(result["models"].items()):
        if measure not in found:
            continue
        rows, color, width = found[measure], f"C{number}", max(2.4 - number, 1.0)  # equal lines stay visible
        layers = [row["layer"] for row in rows]
        values = [row["raw" if measure == "cknna" else "value"] for row in rows]
        axes.plot(layers, values, color=color, marker=".", markersize=3 * width, linewidth=width, label=name)
        low, high = zip(*(row["interval"] for row in rows), strict=True)
        axes.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
        reference = result["point_encoder"][name].get(measure)
        if reference is not None:
            axes.axhline(reference["value"], color=color, linestyle=":", linewidth=1.2)
        if measure == "cknna":
            axes.plot(layers, [row["null_95"] for row in rows], color=color, linestyle="--", linewidth=1)
    if measure in MAJORITIES:
        axes.axhline(result["majority"][MAJORITIES[measure]], color="#777777", linestyle="--", linewidth=1)
    if measure.endswith("_r2"):
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.5))
    notes = {"cknna": "dashed: 95th percentile of shuffled pairs"}
    note = notes.get(measure, "dotted: point encoder" + (", dashed: majority" if measure in MAJORITIES else ""))
    axes.set_title(TITLES[measure].format(k=result["k"]) + f"\n{note}", fontsize=9)
    axes.set_xlabel("layer (0: what enters the first block)", fontsize=8)
    axes.set_ylabel("accuracy" if measure in MAJORITIES else "CKNNA" if measure == "cknna" else "R2", fontsize=8)
    axes.grid(alpha=0.3)
