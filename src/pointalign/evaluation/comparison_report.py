"""The report of `pointalign compare` as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pointalign.evaluation.report import cell

SHOWN_ROWS = 50
# What is a share is told in percent; scores and metrics are 0 to 100 already.
SHARE = "accuracy"


def comparison_lines(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The report's lines.

    Args:
        result: what `compare` gives.
        rows: the objects that the two sides do not do equally well on.
    """
    lines = [
        f"# {result['benchmark']}: second against first",
        "",
        f"* first: {', '.join(cell(model) for model in result['first']['models'])}",
        f"* second: {', '.join(cell(model) for model in result['second']['models'])}",
        f"* judge: {cell(result['judge'] or 'none')}",
        "",
        "| measure | first | second | second - first (95 % interval) | p | n | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, found in result["measures"].items():
        scale = 100 if name.startswith(SHARE) else 1
        low, high = (scale * end for end in found["interval"])
        verdict = "inside the noise" if found["inside_noise"] else "**differs**"
        lines.append(
            f"| {name} | {scale * found['first_mean']:.2f} | {scale * found['second_mean']:.2f} | "
            f"{scale * found['difference']:+.2f} ({low:+.2f} to {high:+.2f}) | {found['p_value']:.2g} | "
            f"{found['n']} | {verdict} |"
        )
    return [*lines, "", *_sureness(result), "", *_disagreements(result, rows)]


def _sureness(result: Mapping[str, Any]) -> list[str]:
    seeds = result["seeds"]
    lines = []
    if seeds == [1, 1]:
        lines.append(
            "The interval is a paired bootstrap over objects. One seed of training a side: how much another seed would "
            "change is not in it."
        )
    else:
        together = "the i-th results of both sides together" if result["paired_seeds"] else "each side for itself"
        lines.append(
            f"Pooled over {seeds[0]} and {seeds[1]} seeds of training: seeds ({together}) and objects are resampled "
            f"independently of one another (pigeonhole bootstrap)."
        )
        if result["few_seeds"]:
            lines.append(
                f"{min(seeds)} seeds say little about how much training varies; take the interval as too narrow."
            )
        if result["paired_seeds"]:
            scale = 100 if result["measure"].startswith(SHARE) else 1
            listed = ", ".join(f"{scale * value:+.2f}" for value in result["by_seed"])
            lines.append(f"By seed: {listed} (standard deviation {scale * result['seed_deviation']:.2f}).")
    if "only_first" in result:
        lines.append(
            f"Only the first is right on {result['only_first']} objects, only the second on {result['only_second']}: exact "
            f"McNemar test, p = {result['p_value']:.3g}."
        )
    else:
        lines.append(
            f"Sign flips over the objects' means: p = {result['p_value']:.3g}, which leaves out how training varies."
        )
    if result["left_out"]:
        lines.append(
            f"{result['left_out']} objects are left out, or one answer about them is, because it could not be judged."
        )
    return lines


def _disagreements(result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"## Where they disagree ({len(rows)} of {result['n']} objects, by {result['measure']})", ""]
    if not rows:
        return [*lines, "Nowhere."]
    if max(result["seeds"]) > 1:
        lines += ["Values are means over seeds; the answers are those of each side's first result.", ""]
    lines += [
        "| object | truth | first | second | first said | second said |",
        "| --- | --- | ---: | ---: | --- | --- |",
    ]
    for row in rows[:SHOWN_ROWS]:
        first, second = (cell(" / ".join(row[name])) for name in ("first_answers", "second_answers"))
        lines.append(
            f"| {cell(row['object_id'])} | {cell(row['truth'])} | {row['first']:.3g} | {row['second']:.3g} | {first} | "
            f"{second} |"
        )
    if len(rows) > SHOWN_ROWS:
        lines += ["", f"The other {len(rows) - SHOWN_ROWS} are in results.json."]
    return lines
