"""Figures of an evaluation: who is taken for whom, accuracy by class, the best and worst answers beside their clouds."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import MultipleLocator

from pointalign.evaluation.metrics import class_accuracies, confusion_matrix
from pointalign.figures import draw_cloud, save_figure

# More rows than these cannot be read on a page.
MOST_CLASSES = 40
NO_CLASS = "(no class)"
DRAWN_POINTS = 3000
GRAY = 0.62
COLUMNS = 4
TEXT_WIDTH, TEXT_LINES = 46, 6
# Inches.
CELL_WIDTH, CLOUD, LINE, HEADING = 3.2, 2.3, 0.155, 0.35
RIGHT, WRONG, NEITHER = "#1a7f37", "#b42318", "#333333"


def shown_classes(labels: Sequence[str]) -> list[str]:
    """The classes that occur, in alphabetical order; of too many, the most frequent."""
    return sorted(list(class_accuracies(labels, [True] * len(labels)))[:MOST_CLASSES])


def draw_confusion(labels: Sequence[str], predicted: Sequence[str | None], path: Path, title: str) -> None:
    """Draw true against predicted classes: shares of each row as colour, counts as numbers.

    Args:
        labels: the true class of each object.
        predicted: the class read out of the answer, None where none could be.
        path: PNG to write.
        title: of the figure.
    """
    rows = shown_classes(labels)
    columns = sorted({*rows, *(name for name in predicted if name is not None)})
    counts = confusion_matrix(labels, predicted, columns, rows)
    kept = [index for index, name in enumerate(columns) if name in rows or counts[:, index].any()]
    names = [columns[index] for index in kept]
    counts = counts[:, [*kept, len(columns)]]
    if counts[:, -1].any():
        names.append(NO_CLASS)
    else:
        counts = counts[:, :-1]
    figure = Figure(figsize=(3.2 + 0.27 * len(names), 2.4 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for row, column in zip(*counts.nonzero(), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=6.5, color=color)
    axes.set_xticks(range(len(names)), list(map(_drawable, names)), rotation=90, fontsize=7.5)
    axes.set_yticks(range(len(rows)), list(map(_drawable, rows)), fontsize=7.5)
    axes.set_xlabel("taken for")
    axes.set_ylabel("true class")
    cut = len(set(labels)) - len(rows)
    axes.set_title(
        title + (f"\n(the {len(rows)} most frequent of {len(rows) + cut} classes)" if cut else ""), fontsize=10
    )
    figure.colorbar(image, ax=axes, label="share of the true class", shrink=0.8)
    save_figure(figure, path)


def draw_class_accuracy(labels: Sequence[str], correct: Sequence[bool], path: Path, title: str) -> None:
    """Draw the accuracy of each class with its interval and number of objects.

    Args:
        labels: the true class of each object.
        correct: whether the answer about it counts as right.
        path: PNG to write.
        title: of the figure.
    """
    accuracies = class_accuracies(labels, correct)
    shown = sorted(shown_classes(labels), key=lambda name: (accuracies[name]["accuracy"], -accuracies[name]["n"]))
    values = np.array([accuracies[name]["accuracy"] for name in shown])
    ends = np.array([accuracies[name]["interval"] for name in shown])
    figure = Figure(figsize=(6.4, 1.4 + 0.22 * len(shown)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(shown))
    axes.barh(rows, 100 * values, color="#9ecae1", height=0.7)
    axes.hlines(rows, 100 * ends[:, 0], 100 * ends[:, 1], color="#333333", linewidth=1)
    axes.axvline(100 * float(np.mean(correct)), color=WRONG, linewidth=1, linestyle="--", label="all objects")
    axes.set_yticks(rows, [_drawable(f"{name} ({accuracies[name]['n']})") for name in shown], fontsize=7.5)
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.xaxis.set_major_locator(MultipleLocator(20))
    axes.set_xlabel("right, % (lines: 95 % Wilson intervals; in brackets: objects)", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    axes.set_title(title, fontsize=10)
    save_figure(figure, path)


@dataclass(frozen=True)
class Panel:
    """One object of a contact sheet.

    Args:
        points: (N, 3) or (N, 6).
        title: what it is.
        lines: what was said of it, and the verdict.
        right: colours the frame; None where answers are not right or wrong.
    """

    points: Any
    title: str
    lines: tuple[str, ...]
    right: bool | None = None


def draw_contact_sheet(groups: Mapping[str, Sequence[Panel]], path: Path, title: str) -> None:
    """Draw clouds four in a row with what was said of them, group under group.

    Args:
        groups: panels by heading.
        path: PNG to write.
        title: of the figure.
    """
    groups = {heading: panels for heading, panels in groups.items() if panels}
    heights = {heading: _row_heights(panels) for heading, panels in groups.items()}
    sizes = [HEADING + sum(parts) for parts in heights.values()]
    figure = Figure(figsize=(CELL_WIDTH * COLUMNS, HEADING + sum(sizes)), layout="constrained")
    figure.suptitle(_drawable(title), fontsize=12)
    subfigures = np.atleast_1d(np.asarray(figure.subfigures(len(groups), 1, height_ratios=sizes)))
    for part, (heading, panels) in zip(subfigures, groups.items(), strict=True):
        part.suptitle(heading, fontsize=11, fontweight="bold")
        ratios = heights[heading]
        cells = part.subplots(len(ratios), COLUMNS, height_ratios=ratios, squeeze=False)
        for axes in cells.flat:
            axes.set_axis_off()
        for number, panel in enumerate(panels):
            row, column = divmod(number, COLUMNS)
            draw_cloud(cells[2 * row, column], _drawn(np.asarray(panel.points)), size=3.0)
            _write_panel(cells[2 * row + 1, column], panel)
    save_figure(figure, path)


def _row_heights(panels: Sequence[Panel]) -> list[float]:
    """Inches of each row of clouds and of the text below it."""
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    return [inch for row in rows for inch in (CLOUD, LINE * (2 + max(len(_wrapped(panel)) for panel in row)))]


def _wrapped(panel: Panel) -> list[str]:
    """The panel's lines in its width; each keeps its beginning when it is long."""
    found = []
    for line in panel.lines:
        pieces = textwrap.wrap(line, TEXT_WIDTH) or [""]
        found += pieces if len(pieces) <= TEXT_LINES else [*pieces[: TEXT_LINES - 1], "..."]
    return found


def _write_panel(axes: Any, panel: Panel) -> None:
    color = NEITHER if panel.right is None else RIGHT if panel.right else WRONG
    title = _drawable(textwrap.shorten(panel.title, TEXT_WIDTH, placeholder=" ..."))
    axes.text(0, 1, title, fontsize=9.5, fontweight="bold", color=color, va="top", transform=axes.transAxes)
    text = "\n".join(map(_drawable, _wrapped(panel)))
    below = {"xytext": (0, -14), "textcoords": "offset points", "xycoords": "axes fraction"}
    axes.annotate(text, (0, 1), fontsize=8.5, va="top", annotation_clip=False, **below)


def _drawable(text: str) -> str:
    """Text with a question mark for every letter that the font lacks, and without formulas."""
    known = get_font(findfont("DejaVu Sans")).get_charmap()
    shown = "".join(letter if ord(letter) in known and letter.isprintable() else "?" for letter in text)
    return shown.replace("$", r"\$")


def _drawn(points: np.ndarray) -> np.ndarray:
    """At most 3,000 points with a colour that can be seen; clouds without colour are black in the field."""
    points = points[:: -(-len(points) // DRAWN_POINTS), :6]
    if points.shape[1] == 3 or not points[:, 3:].any():
        points = np.concatenate([points[:, :3], np.full((len(points), 3), GRAY)], axis=1)
    return points
