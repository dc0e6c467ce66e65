"""The card of a shipped model: what it is, how it was made and measured, whose data it learnt from, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pointalign.config import Recipe, load_recipe
from pointalign.data.extra_sources import PACKAGES
from pointalign.data.household_catalog import COLLECTIONS
from pointalign.evaluation.report import cell, percent, points
from pointalign.evaluation.results import RESULTS_FILE, read_results
from pointalign.models.checkpoint import resolve_model
from pointalign.models.language_model import EMBEDDED
from pointalign.run_folder import RunFolder

LIMITS = """\
* It knows the 30 kinds of things of the bundled data set, and of them the common ones best. Of anything else it names the
  nearest thing it knows, with the same confidence: it never says that it does not know.
* It sees {num_points:,} points. Writing, faces, screens and small parts are not there for it.
* It judges one object that stands upright (y up). Rooms, scenes, several objects and things lying on their sides are foreign.
* Colours are named roughly and from the object's own paint, without light or material. Counts and proportions are guesses.
* It is told how large an object is only where the file says so (`--unit`, glTF's metres); without that it speaks of no size.
* Its language model has 135 million weights: English only, little knowledge of the world, and answers that can contradict
  each other within a conversation. Do not rely on it for anything that matters."""

USE = """\
```python
import pointalign

pointalign.pipeline("caption", model="{name}")("chair.glb")
```

```python
from pointalign import PointAlignForConditionalGeneration, PointAlignProcessor

model = PointAlignForConditionalGeneration.from_pretrained("{name}")
processor = PointAlignProcessor.from_pretrained("{name}")
```"""


def stages(run: RunFolder) -> list[Recipe]:
    """The recipes of a run and of those that it builds on, the first one first, as far as their folders are there."""
    recipe = load_recipe(run.recipe_file)
    start = Path(resolve_model(recipe.model.start_from)) if recipe.model.start_from else None
    earlier = RunFolder(start.parent) if start and start.is_dir() else None
    return [*(stages(earlier) if earlier and earlier.recipe_file.is_file() else []), recipe]


def model_card(name: str, run: RunFolder, evaluations: Sequence[Path]) -> str:
    """The card as Markdown with the front matter that model hubs read.

    Args:
        name: the model's.
        run: the last one of its training.
        evaluations: folders of `pointalign evaluate`: the model's, and those of what it is compared with.

    Raises:
        ConfigError: when the run has no recipe.
        DataError: when a result cannot be read.
    """
    recipes = stages(run)
    config = json.loads((run.model / "config.json").read_text(encoding="utf-8"))
    num_points = json.loads((run.model / "processor_config.json").read_text(encoding="utf-8"))["num_points"]
    language_model = config["language_model"]
    base = EMBEDDED[language_model].hub_id if language_model in EMBEDDED else language_model
    front = {
        "license": "apache-2.0",
        "language": "en",
        "library_name": "pointalign",
        "base_model": base,
        "tags": "[3d, point-cloud, vision-language]",
    }
    return "\n".join(
        [
            "---",
            *(f"{key}: {value}" for key, value in front.items()),
            "---",
            "",
            f"# {name}",
            "",
            f"A small language model that sees: a point encoder and a Q-Former connector turn a coloured point cloud into "
            f"{config['connector_config']['num_query_tokens']} tokens, which {base} reads through a LoRA. Made by `pointalign "
            "bundle`; the numbers below are read from its results.",
            "",
            USE.format(name=name),
            "",
            *_files(),
            *_training(recipes),
            *_measured(name, evaluations),
            *_data(recipes),
            "## What it cannot do",
            "",
            LIMITS.format(num_points=num_points),
            "",
        ]
    )


def _files() -> list[str]:
    return [
        "Matrices are stored in bfloat16, vectors in float32; everything is float32 again when it is loaded. The language",
        "model is not in the folder: it comes from its own package. `alignment_projector.safetensors` served training alone.",
        "",
    ]


def _training(recipes: Sequence[Recipe]) -> list[str]:
    lines = [
        "## How it was trained",
        "",
        "| recipe | trains | steps | peak learning rate | seed |",
        "| --- | --- | ---: | ---: | ---: |",
    ]
    for recipe in recipes:
        optimizer = recipe.optimizer
        lines.append(
            f"| `{recipe.name}` | {', '.join(recipe.trains)} | {optimizer.max_steps:,} | {optimizer.learning_rate:g} | "
            f"{recipe.seed} |"
        )
    last = recipes[-1]
    alignment = (
        f" In the last one the alignment loss (weight {last.alignment.weight:g}) holds the point tokens after block "
        f"{', '.join(map(str, last.alignment.layers))} to the Q-Former's output."
        if last.alignment.weight
        else ""
    )
    return [*lines, "", f"`pointalign recipes NAME` tells each one's purpose.{alignment}", ""]


def result_files(evaluation: Path) -> list[Path]:
    """The results in a folder that `pointalign evaluate` wrote."""
    return sorted(evaluation.glob(f"*/*/{RESULTS_FILE}"))


def _measured(name: str, evaluations: Sequence[Path]) -> list[str]:
    rows = []
    for number, folder in enumerate(evaluations):
        for file in result_files(folder):
            result = read_results(file)
            told = name if number == 0 else str(result["model"])
            rows += [f"| {result['benchmark']} | {cell(told)} | {row} |" for row in _rows(result)]
    if not rows:
        return ["## What was measured", "", "Nothing yet.", ""]
    return [
        "## What was measured",
        "",
        "| benchmark | model | measure | value (95 % interval) | n |",
        "| --- | --- | --- | ---: | ---: |",
        *rows,
        "",
        f"By `pointalign evaluate --model {name}`, on objects that it was not trained on. Accuracy by likelihood: the most "
        "probable of all class names wins. Similarities: cosine x 100 of sentence embeddings with a reference caption.",
        "",
    ]


def _rows(result: Mapping[str, Any]) -> list[str]:
    if "accuracy" in result:
        told = percent(result["accuracy"], result["interval"])
        frequent = f"always the most frequent class: {100 * result['majority_rate']:.1f} %"
        return [f"accuracy, {cell(result['judge'])} ({frequent}) | {told} | {result['n']}"]
    return [
        f"{measure} | {points(metric['mean'], metric['interval'])} | {result['n']}"
        for measure, metric in result.get("metrics", {}).items()
        if "absent" not in metric
    ]


def _data(recipes: Sequence[Recipe]) -> list[str]:
    collections = "; ".join(f"{one.name}: {one.licence}" for one in COLLECTIONS)
    lines = [
        "## Whose data it learnt from",
        "",
        "* **household**: 720 objects of the Debian package sweethome3d-furniture, by the artists that NOTICE names "
        f"({collections}). Its other 100 objects were held out.",
    ]
    if any(recipe.data.extra for recipe in recipes):
        lines += [
            f"* **{one.name}** {one.version}: {one.creator}, {one.licence}, {one.licence_url}" for one in PACKAGES
        ]
    return [
        *lines,
        "* The conversations were written by rules from names, labels, colours and sizes; no other model wrote them.",
        "",
        "Code and weights: Apache-2.0, as the language model's. Where a law takes weights for an adaptation of what they "
        "learnt from, the licences above go with them.",
        "",
    ]
