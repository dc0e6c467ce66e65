"""Writes the table of experiments/geometry.md from probes of pairs of models, one pair for each seed.

    pointalign sweep docs/experiments/alignment.yaml --out runs/alignment
    for seed in 0 1 2 3 4; do
        pointalign probe --model runs/alignment/next-token/seed-$seed/model --model runs/alignment/aligned/seed-$seed/model \\
            --out runs/probe-$seed
    done
    python docs/build_geometry.py runs/probe-0 runs/probe-1 runs/probe-2 runs/probe-3 runs/probe-4

It keeps what it needs of the probes in experiments/geometry/probes.json, and the first pair's figure.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t

HERE = Path(__file__).parent
PAGE, PROBES = HERE / "experiments" / "geometry.md", HERE / "experiments" / "geometry" / "probes.json"
FIGURE = HERE / "images" / "geometry.png"
MARK = "<!-- table -->"
ALIGNED_LAYER = 14
# By row of the table: its measure and number in a probe's JSON, and what people are told.
ROWS = {
    "knn_class": ("knn_class", "value", "class, nearest neighbour, %"),
    "linear_class": ("linear_class", "value", "class, linear, %"),
    "linear_color": ("linear_color", "value", "dominant colour, linear, %"),
    "box_r2": ("box_r2", "value", "box proportions, R2"),
    "heights_r2": ("heights_r2", "value", "points by height, R2"),
    "cknna": ("cknna", "raw", "CKNNA to the point encoder"),
    "cknna_calibrated": ("cknna", "calibrated", "the same, above shuffled pairs"),
}


def read_probe(folder: Path) -> dict[str, Any]:
    """A pair's values by row: of the plain model and the aligned one, one for each layer, and of the point encoder.

    Beside them lie their 95 % intervals over objects where there are some, and the 95th percentile of CKNNA of shuffled pairs.
    """
    told = json.loads((folder / "probe.json").read_text(encoding="utf-8"))
    models = dict(zip(("plain", "aligned"), told["models"].values(), strict=True))
    encoder = next(iter(told["point_encoder"].values()))
    found: dict[str, Any] = {"n": told["n"]}
    for row, (measure, key, _) in ROWS.items():
        found[row] = {"encoder": round(encoder[measure]["value"], 5) if measure in encoder else None}
        for name, model in models.items():
            layers = model[measure]
            found[row][name] = [round(one[key], 5) for one in layers]
            if key != "calibrated":
                found[row][f"{name}_interval"] = [[round(end, 5) for end in one["interval"]] for one in layers]
            if key == "raw":
                found[row][f"{name}_null_95"] = [round(one["null_95"], 5) for one in layers]
    return found


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by Student's t."""
    mean = statistics.mean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def table(probes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each measure at three depths, and how far the aligned models are from the plain ones, over seeds."""
    lines = [
        "| measure | point encoder | layer 0 | 14, plain | 14, aligned | last, plain | last, aligned | "
        "aligned - plain at 14 | mean of all layers | largest of a layer |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row_name, (_, _, name) in ROWS.items():
        scale, digits = (100, 1) if name.endswith("%") else (1, 3)
        rows = [probe[row_name] for probe in probes]

        def at(which: str, layer: int, rows: Any = rows, scale: int = scale, digits: int = digits) -> str:
            return f"{scale * statistics.mean(row[which][layer] for row in rows):.{digits}f}"

        def apart(layers: Sequence[int], rows: Any = rows, scale: int = scale, digits: int = digits) -> str:
            values = [
                scale * statistics.mean(row["aligned"][layer] - row["plain"][layer] for layer in layers) for row in rows
            ]
            mean, low, high = mean_interval(values)
            return f"{mean:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"

        whole, layers = rows[0]["encoder"], range(len(rows[0]["plain"]))
        largest = max(layers, key=lambda layer: abs(sum(row["aligned"][layer] - row["plain"][layer] for row in rows)))
        cells = [
            name,
            "" if whole is None else f"{scale * whole:.{digits}f}",
            at("plain", 0),
            *(at(which, layer) for layer in (ALIGNED_LAYER, -1) for which in ("plain", "aligned")),
            apart([ALIGNED_LAYER]),
            apart(layers),
            f"{apart([largest])} at {largest}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_table(page: str, lines: Sequence[str]) -> str:
    """The page with the lines between its two marks."""
    before, _, after = page.split(MARK)
    return MARK.join([before, "\n" + "\n".join(lines) + "\n", after])


def main() -> None:
    """Write the page's table, the numbers and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probes", type=Path, nargs="+", help="folders that `pointalign probe` wrote, one for each seed")
    given = parser.parse_args()
    probes = [read_probe(folder) for folder in given.probes]
    PROBES.parent.mkdir(exist_ok=True)
    PROBES.write_text(json.dumps(probes) + "\n", encoding="utf-8")
    shutil.copyfile(given.probes[0] / "probe.png", FIGURE)
    PAGE.write_text(write_table(PAGE.read_text(encoding="utf-8"), table(probes)), encoding="utf-8")


if __name__ == "__main__":
    main()
