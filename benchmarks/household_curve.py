"""Accuracy over the number of training objects: what more data, and nothing else, would bring on the bundled objects.

    python benchmarks/household_curve.py --extra extra.parquet --out runs/curve       # half an hour on one core

The bundled model's point encoder is trained from scratch on shares of the training objects, and once on all of them with the
extra ones; a linear classifier reads its features (class token, mean and maximum). Beside it stand the baselines that learn no
shape, on the same shares. Scored is a part of the training side; the held-out 100 are not looked at. Stopped in any way,
the same command goes on where it was. It writes `curve.png` and ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from pointalign.config import Recipe, load_recipe
from pointalign.data.conversations import keep_fraction
from pointalign.data.extra import load_extra
from pointalign.data.household import HouseholdObject, household_classes
from pointalign.data.household_split import household_sides
from pointalign.evaluation.baselines import BASELINES
from pointalign.evaluation.statistics import summarize_share
from pointalign.figures import save_figure
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.probing.probes import linear_class
from pointalign.progress import say
from pointalign.runs import quiet, train

BATCH = 32
NAMES = {"encoder": "point encoder", "forest": "random forest", "chamfer": "chamfer neighbour"}


def encoder_recipe(held_out: str, fraction: float, steps: int, extra: Path | None) -> Recipe:
    """The bundled model's first stage, on a share of its objects, for so many steps."""
    recipe = load_recipe("household-135m-encoder")
    recipe.data.held_out, recipe.data.fraction = held_out, fraction
    recipe.data.extra = str(extra) if extra else None
    recipe.optimizer.max_steps = steps
    return recipe


@torch.inference_mode()
def read_features(model: Path, objects: Sequence[HouseholdObject]) -> np.ndarray:
    """(objects, 3 D): class token, maximum and mean of the other tokens, the size told."""
    loaded = PointAlignForConditionalGeneration.from_pretrained(model).eval()
    processor = load_processor(str(model))
    rows = []
    for start in range(0, len(objects), BATCH):
        clouds = [processor.prepare_points(thing.sized_points) for thing in objects[start : start + BATCH]]
        tokens = loaded.point_encoder(torch.stack(clouds))
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1), tokens[:, 1:].mean(dim=1)], dim=-1))
    return torch.cat(rows).numpy()


def encoder_right(
    model: Path, train_objects: Sequence[HouseholdObject], asked: Sequence[HouseholdObject]
) -> list[bool]:
    """Whether a linear classifier on a trained encoder's features is right about each object."""
    objects = [*train_objects, *asked]
    labels = np.array([thing.label for thing in objects])
    known = np.arange(len(train_objects))
    found = linear_class(read_features(model, objects), labels, [(known, np.arange(len(known), len(objects)))])
    return [not lost for lost in found.lost]


def baseline_right(name: str, train_objects: Sequence[HouseholdObject], asked: Sequence[HouseholdObject]) -> list[bool]:
    """Whether a baseline is right about each object."""
    classes = household_classes()
    found = BASELINES[name](train_objects, asked, classes, lambda count: None)
    return [classes[int(np.argmax(one.scores))] == thing.label for one, thing in zip(found, asked, strict=True)]


def draw_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy with its interval over the number of labelled training objects; a star has the extra objects as well."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for shift, (name, title) in zip((0.97, 1.0, 1.03), NAMES.items(), strict=True):
        line = [point for point in points if point["method"] == name and not point["extra"]]
        color = axes.plot([shift * p["objects"] for p in line], [100 * p["mean"] for p in line], "o-", label=title)[
            0
        ].get_color()
        for point in (point for point in points if point["method"] == name):
            place, (low, high) = shift * point["objects"], point["interval"]
            axes.plot([place, place], [100 * low, 100 * high], color=color, alpha=0.5)
            if point["extra"]:
                axes.plot(
                    place,
                    100 * point["mean"],
                    "*",
                    color=color,
                    markersize=13,
                    label=f"{title}, {point['extra']:,} more",
                )
    axes.set_xscale("log")
    ticks = sorted({point["objects"] for point in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("labelled training objects")
    axes.set_ylabel(f"accuracy, %, 95 % interval (n = {points[0]['n']})")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", type=Path, required=True, help="what `pointalign data extra` built")
    parser.add_argument("--out", type=Path, default=Path("runs/curve"), help="folder for runs and results")
    parser.add_argument("--held-out", default="validation-0", help="scored part, as a recipe's data.held_out")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument("--steps", type=int, default=400, help="of each encoder")
    given = parser.parse_args(arguments)
    if not given.extra.is_file():
        sys.exit(f"{given.extra} is not there; build it with `pointalign data extra` (docs/extra_data.md)")
    quiet()
    known, asked = household_sides(given.held_out)
    points: list[dict[str, Any]] = []
    for fraction, extra in [*((fraction, None) for fraction in given.fractions), (1.0, given.extra)]:
        kept = keep_fraction([thing.id for thing in known], fraction)
        objects = [thing for thing in known if thing.id in kept]
        more = len(load_extra(extra)) if extra else 0
        say(f"{len(objects)} objects" + (f" and {more} extra ones" if more else ""))
        run = given.out / f"{len(objects)}{'-extra' if extra else ''}"
        train(encoder_recipe(given.held_out, fraction, given.steps, extra), run, resume=True)
        found = {"encoder": encoder_right(run / "model", objects, asked)}
        if not extra:
            found |= {name: baseline_right(name, objects, asked) for name in ("forest", "chamfer")}
        for method, right in found.items():
            points.append({"method": method, "objects": len(objects), "extra": more, **summarize_share(right)})
    draw_curve(points, given.out / "curve.png")
    print(json.dumps({"held_out": given.held_out, "steps": given.steps, "points": points}))


if __name__ == "__main__":
    main()
