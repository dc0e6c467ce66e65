"""One table of a sweep: every arm's measures, and its paired difference from one arm, over seeds and objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pointalign.errors import DataError
from pointalign.evaluation.statistics import pooled_difference, pooled_mean

# By measure: what people are told, and what it is multiplied by.
MEASURES = {
    "accuracy": ("held-out accuracy, %", 100.0),
    "caption_similarity": ("caption similarity", 1.0),
    "next_token_loss": ("held-out next-token loss", 1.0),
}

Values = Mapping[str, Mapping[str, float]]


def build_table(measured: Mapping[tuple[str, int], Values], reference: str) -> dict[str, Any]:
    """Means and differences of all runs that are done.

    Args:
        measured: by arm and seed, for each measure one number per object.
        reference: the arm that the others are compared with, over the seeds that both have.

    Returns:
        By measure and arm: `mean`, `interval` (seeds and objects resampled), `n` objects and `seeds`; but for the reference
        also `difference`, what `pooled_difference` gives, or None while the two have no seed in common.

    Raises:
        DataError: when runs measured different objects.
    """
    arms = list(dict.fromkeys(arm for arm, _ in measured))
    _check_objects(measured)
    table: dict[str, Any] = {}
    for measure in MEASURES:
        rows: dict[str, Any] = {}
        for arm in arms:
            seeds = [seed for name, seed in measured if name == arm]
            own = _matrix(measured, arm, seeds, measure)
            rows[arm] = {**pooled_mean(own.tolist()), "seeds": seeds}
            if arm != reference:
                shared = [seed for seed in seeds if (reference, seed) in measured]
                rows[arm]["difference"] = _difference(measured, reference, arm, shared, measure) if shared else None
        table[measure] = rows
    return table


def _check_objects(measured: Mapping[tuple[str, int], Values]) -> None:
    head: tuple[tuple[str, int], Values] | None = None
    for key, values in measured.items():
        head = head or (key, values)
        for measure in MEASURES:
            if values[measure].keys() != head[1][measure].keys():
                (arm, seed), (other, other_seed) = key, head[0]
                raise DataError(
                    f"{arm}, seed {seed}, and {other}, seed {other_seed}, measured {measure} on different objects; delete one "
                    "of them and run it again"
                )


def _matrix(measured: Mapping[tuple[str, int], Values], arm: str, seeds: Sequence[int], measure: str) -> np.ndarray:
    """(seeds, objects), the objects in the order of their ids."""
    return np.array([[value for _, value in sorted(measured[arm, seed][measure].items())] for seed in seeds])


def _difference(
    measured: Mapping[tuple[str, int], Values], reference: str, arm: str, seeds: Sequence[int], measure: str
) -> dict[str, Any]:
    before, after = (_matrix(measured, name, seeds, measure).tolist() for name in (reference, arm))
    return pooled_difference(before, after)


def table_lines(table: Mapping[str, Any], reference: str, missing: Sequence[str]) -> list[str]:
    """The table as Markdown.

    Args:
        table: see `build_table`.
        reference: the arm compared with.
        missing: runs that are not done.
    """
    lines = [f"# Sweep: every arm against {reference}", ""]
    for measure, rows in table.items():
        title, scale = MEASURES[measure]
        lines += [
            f"## {title[0].upper()}{title[1:]}",
            "",
            f"| arm | mean (95 % interval) | seeds | n | minus {reference} (95 % interval) | by seed | verdict |",
            "| --- | ---: | ---: | ---: | ---: | --- | --- |",
        ]
        lines += [_row(arm, found, scale) for arm, found in rows.items()]
        lines.append("")
    lines += [
        "Seeds and objects are resampled independently of one another (pigeonhole bootstrap); differences are paired by seed "
        "and by object. One differs whose interval excludes zero and that flips of signs over the objects find too (p at most "
        "0.05; exact McNemar for right and wrong). Fewer than 5 seeds say little about how much training varies, and their "
        "intervals are too narrow. Many arms are many tries: one of twenty differs by chance alone.",
    ]
    if missing:
        lines += ["", f"Not done yet: {', '.join(missing)}."]
    return lines


def _row(arm: str, found: Mapping[str, Any], scale: float) -> str:
    low, high = (scale * end for end in found["interval"])
    digits = 1 if scale == 100 else 3
    start = (
        f"| {arm} | {scale * found['mean']:.{digits}f} ({low:.{digits}f} to {high:.{digits}f}) | {len(found['seeds'])} "
        f"| {found['n']} |"
    )
    difference = found.get("difference")
    if difference is None:
        return f"{start} | | |"
    low, high = (scale * end for end in difference["interval"])
    by_seed = ", ".join(f"{scale * value:+.{digits}f}" for value in difference["by_seed"])
    verdict = "inside the noise" if difference["inside_noise"] else "**differs**"
    told = f"{scale * difference['mean']:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"{start} {told} | {by_seed} | {verdict}{', few seeds' if difference['few_seeds'] else ''} |"
