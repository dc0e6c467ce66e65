"""Accuracy over training objects, parameters and steps: what more of each would bring on the bundled objects.

    python benchmarks/household_curve.py --extra extra.parquet --out runs/curve       # two hours on one core

The bundled model's point encoder is trained from scratch on shares of the training objects, and on all of them at other
widths and for other numbers of steps, some with the extra objects beside them; a linear classifier reads its features (class
token, mean and maximum). Beside it stand the baselines that learn no shape, on the same shares. Scored is a part of the
training side; the held-out 100 are not looked at. Stopped in any way, the same command goes on where it was. It writes
`curve.png` and ends in one line of JSON.
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
from matplotlib.axes import Axes
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
WIDTH = load_recipe("household-135m-encoder").model.point_encoder.hidden_size
NAMES = {"encoder": "point encoder", "forest": "random forest", "chamfer": "chamfer neighbour"}


def encoder_recipe(held_out: str, fraction: float, steps: int, extra: Path | None, width: int = WIDTH) -> Recipe:
    """The bundled model's first stage, on a share of its objects, for so many steps.

    Args:
        held_out: scored part, as a recipe's `data.held_out`.
        fraction: of the other objects.
        steps: of the optimizer.
        extra: the file of extra objects, None for none of them.
        width: of the encoder's transformer, in heads as wide as the bundled one's; its group encoder's grows as much.
    """
    recipe = load_recipe("household-135m-encoder")
    encoder = recipe.model.point_encoder
    encoder.group_hidden_sizes = [size * width // WIDTH for size in encoder.group_hidden_sizes]
    encoder.group_width = encoder.group_width * width // WIDTH
    encoder.num_attention_heads = encoder.num_attention_heads * width // WIDTH
    encoder.hidden_size = width
    recipe.data.held_out, recipe.data.fraction = held_out, fraction
    recipe.data.extra = str(extra) if extra else None
    recipe.optimizer.max_steps = steps
    return recipe


@torch.inference_mode()
def read_features(run: Path, objects: Sequence[HouseholdObject]) -> tuple[np.ndarray, int]:
    """(objects, 3 D): class token, maximum and mean of the other tokens, the size told; and the encoder's parameters."""
    model = PointAlignForConditionalGeneration.from_pretrained(run / "model").eval()
    processor = load_processor(str(run / "model"))
    rows = []
    for start in range(0, len(objects), BATCH):
        clouds = [processor.prepare_points(thing.sized_points) for thing in objects[start : start + BATCH]]
        tokens = model.point_encoder(torch.stack(clouds))
        rows.append(torch.cat([tokens[:, 0], tokens[:, 1:].amax(dim=1), tokens[:, 1:].mean(dim=1)], dim=-1))
    return torch.cat(rows).numpy(), sum(weight.numel() for weight in model.point_encoder.parameters())


def encoder_right(
    run: Path, train_objects: Sequence[HouseholdObject], asked: Sequence[HouseholdObject]
) -> tuple[list[bool], int]:
    """Whether a linear classifier on a run's encoder is right about each object; and the encoder's parameters."""
    objects = [*train_objects, *asked]
    labels = np.array([thing.label for thing in objects])
    known = np.arange(len(train_objects))
    features, parameters = read_features(run, objects)
    found = linear_class(features, labels, [(known, np.arange(len(known), len(objects)))])
    return [not lost for lost in found.lost], parameters


def baseline_right(name: str, train_objects: Sequence[HouseholdObject], asked: Sequence[HouseholdObject]) -> list[bool]:
    """Whether a baseline is right about each object."""
    classes = household_classes()
    found = BASELINES[name](train_objects, asked, classes, lambda count: None)
    return [classes[int(np.argmax(one.scores))] == thing.label for one, thing in zip(found, asked, strict=True)]


def draw_line(axes: Axes, points: Sequence[Mapping[str, Any]], over: str, title: str, shift: float = 1) -> None:
    """Accuracy with its interval over one of a point's numbers, a factor beside it so that lines do not hide each other."""
    points = sorted(points, key=lambda point: point[over])
    places = [shift * point[over] for point in points]
    marker = "*--" if points[0]["extra"] else "o-"
    [line] = axes.plot(places, [100 * point["mean"] for point in points], marker, label=title)
    for place, point in zip(places, points, strict=True):
        axes.plot([place, place], [100 * end for end in point["interval"]], color=line.get_color(), alpha=0.5)


def draw_curve(points: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy over labelled training objects, the encoder's parameters and its steps; stars have the extra objects as well."""
    encoders = [point for point in points if point["method"] == "encoder"]
    first, most = encoders[0], max(point["objects"] for point in encoders)

    def differing(by: str, extra: bool = False) -> list[Mapping[str, Any]]:
        """The encoders that are like the usual one of all objects, but for one thing."""
        usual = {"objects": most, "width": WIDTH, "steps": first["steps"]}
        return [
            point
            for point in encoders
            if bool(point["extra"]) == extra and all(point[name] == usual[name] for name in usual if name != by)
        ]

    figure = Figure(figsize=(12.8, 4.2), layout="constrained")
    panels = dict(zip(("objects", "parameters", "steps"), figure.subplots(1, 3, sharey=True), strict=True))
    own, with_extra = (f"{NAMES['encoder']}, {more}" for more in (f"{most} objects", "extra ones beside them"))
    draw_line(panels["objects"], differing("objects"), "objects", NAMES["encoder"], 0.97)
    for shift, name in ((1.0, "forest"), (1.03, "chamfer")):
        line = [point for point in points if point["method"] == name]
        draw_line(panels["objects"], line, "objects", NAMES[name], shift)
    draw_line(panels["parameters"], differing("width"), "parameters", own)
    draw_line(panels["steps"], differing("steps"), "steps", own, 0.98)
    draw_line(panels["steps"], differing("steps", extra=True), "steps", with_extra, 1.02)
    titles = {"objects": "labelled training objects", "parameters": "parameters of the encoder", "steps": "steps of 64"}
    for name, by in (("objects", "objects"), ("parameters", "width"), ("steps", "steps")):
        axes, shown = panels[name], sorted({point[name] for point in differing(by)})
        axes.set_xscale("log")
        axes.set_xticks(shown, [f"{tick / 1e6:.1f} M" if tick > 1e5 else f"{tick:,}" for tick in shown])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        axes.set_xlabel(titles[name])
    panels["objects"].set_ylabel(f"accuracy, %, 95 % interval (n = {first['n']})")
    save_figure(figure, path)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", type=Path, required=True, help="what `pointalign data extra` built")
    parser.add_argument("--out", type=Path, default=Path("runs/curve"), help="folder for runs and results")
    parser.add_argument("--held-out", default="validation-0", help="scored part, as a recipe's data.held_out")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.25, 0.5, 1.0])
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[400, 100, 800], help="of an encoder, the usual ones first"
    )
    parser.add_argument("--extra-steps", type=int, nargs="+", default=[400, 800], help="those with the extra objects")
    parser.add_argument("--widths", type=int, nargs="+", default=[WIDTH // 2, WIDTH * 2], help="other ones")
    given = parser.parse_args(arguments)
    if not given.extra.is_file():
        sys.exit(f"{given.extra} is not there; build it with `pointalign data extra` (docs/extra_data.md)")
    quiet()
    known, asked = household_sides(given.held_out)
    usual, *other = given.steps
    plan = [(fraction, None, WIDTH, usual) for fraction in given.fractions]
    plan += [(1.0, None, WIDTH, steps) for steps in other]
    plan += [(1.0, None, width, usual) for width in given.widths]
    plan += [(1.0, given.extra, WIDTH, steps) for steps in given.extra_steps]
    points: list[dict[str, Any]] = []
    for fraction, extra, width, steps in plan:
        kept = keep_fraction([thing.id for thing in known], fraction)
        objects = [thing for thing in known if thing.id in kept]
        more = len(load_extra(extra)) if extra else 0
        name = f"{len(objects)}{'-extra' if extra else ''}-width-{width}-steps-{steps}"
        say(f"{len(objects)} objects{f' and {more} extra ones' if more else ''}, width {width}, {steps} steps")
        train(encoder_recipe(given.held_out, fraction, steps, extra, width), given.out / name, resume=True)
        right, parameters = encoder_right(given.out / name, objects, asked)
        encoder = {"method": "encoder", "width": width, "parameters": parameters, "steps": steps}
        point = {"objects": len(objects), "extra": more}
        points.append({**encoder, **point, **summarize_share(right)})
        for baseline in ("forest", "chamfer") if (width, steps, extra) == (WIDTH, usual, None) else ():
            told = summarize_share(baseline_right(baseline, objects, asked))
            points.append({"method": baseline, "width": None, "parameters": None, "steps": None, **point, **told})
    draw_curve(points, given.out / "curve.png")
    print(json.dumps({"held_out": given.held_out, "points": points}))


if __name__ == "__main__":
    main()
