"""The card of a shipped model: what it is, how it was made and measured, whose data it learnt from, what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pointalign.config import Recipe, load_recipe
from pointalign.data.extra_sources import PACKAGES
from pointalign.data.household_catalog import COLLECTIONS
from pointalign.data.household_split import TEST, household_sides
from pointalign.evaluation.report import cell, percent, points
from pointalign.evaluation.results import RESULTS_FILE, read_results
from pointalign.models.checkpoint import resolve_model
from pointalign.models.language_model import EMBEDDED
from pointalign.models.pointalign import PointAlignConfig
from pointalign.run_folder import RunFolder

# By bundled model, the recipes that made it.
BUNDLED_STAGES = {
    "household-135m-pretrain": ("household-135m-encoder", "household-135m-pretrain"),
    "household-135m": (
        "household-135m-encoder",
        "household-135m-pretrain",
        "household-135m-align",
        "household-135m-caption",
    ),
}
# What an alignment loss holds point tokens to, by `alignment.target`.
TARGETS = {
    "qformer": "the Q-Former's output",
    "point_encoder": "the point encoder's features",
    "projector": "the tokens that enter the language model",
}

HOUSEHOLD = "household"

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
    """The recipes of a run and of those that it builds on, the first one first, as far as they are known.

    Of a folder that is no run's, or a Hub id, nothing is known: the first recipe then starts from it.
    """
    recipe = load_recipe(run.recipe_file)
    start = recipe.model.start_from
    if start is None:
        return [recipe]
    folder = Path(resolve_model(start))
    if str(folder) in BUNDLED_STAGES and not (folder / "config.json").is_file():
        return [*map(load_recipe, BUNDLED_STAGES[str(folder)]), recipe]
    earlier = RunFolder(folder.parent)
    return [*(stages(earlier) if folder.is_dir() and earlier.recipe_file.is_file() else []), recipe]


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
    config: Any = PointAlignConfig.from_pretrained(run.model)
    processor = json.loads((run.model / "processor_config.json").read_text(encoding="utf-8"))
    embedded = EMBEDDED.get(config.language_model)
    base = embedded.hub_id if embedded else config.language_model or "its language model"
    household = all(recipe.data.source == HOUSEHOLD for recipe in recipes)
    ours = bool(embedded) and _all_is_known(recipes)
    connector = "a Q-Former connector" if config.connector_config.kind == "qformer" else "a connector"
    front = {
        **({"license": "apache-2.0"} if ours else {}),
        "language": "en",
        "library_name": "pointalign",
        **({"base_model": base} if config.language_model and not Path(base).is_dir() else {}),
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
            f"A {'small ' if embedded else ''}language model that sees: a point encoder and {connector} turn a coloured point "
            f"cloud into {config.num_point_tokens} tokens, which {base} reads through a LoRA. Made by `pointalign bundle`; the "
            "numbers below are read from its results.",
            "",
            USE.format(name=name),
            "",
            *_files(config.language_model, bool(embedded), aligned=recipes[-1].alignment.weight > 0),
            *_training(recipes),
            *_measured(name, evaluations, recipes),
            *_data(recipes, ours),
            "## What it cannot do",
            "",
            *_limits(processor, household, small=bool(embedded)),
            "",
        ]
    )


def _files(language_model: str | None, embedded: bool, aligned: bool) -> list[str]:
    where = "from its own package" if embedded else f"from {language_model}"
    whose = "is in the folder" if language_model is None else f"is not in the folder: it comes {where}"
    projector = " `alignment_projector.safetensors` served training alone." if aligned else ""
    return [
        "Matrices are stored in bfloat16, vectors in float32; everything is float32 again when it is loaded. The language",
        f"model {whose}.{projector}",
        "",
    ]


def _limits(processor: Mapping[str, Any], household: bool, small: bool) -> list[str]:
    known = (
        "the 30 kinds of things of the bundled data set, and of them the common ones best"
        if household
        else "the kinds of things that it was trained on"
    )
    size = (
        "It is told how large an object is only where the file says so (`--unit`, glTF's metres); without that it speaks of no "
        "size."
        if processor.get("metric_size")
        else "It is not told how large an object is."
    )
    words = (
        "Its language model has 135 million weights: English only, little knowledge of the world, and answers that can "
        "contradict each other within a conversation."
        if small
        else "Its answers can contradict each other within a conversation."
    )
    return [
        f"* It knows {known}. Of anything else it names the nearest thing it knows, with the same confidence: it never says "
        "that it does not know.",
        f"* It sees {processor['num_points']:,} points. Writing, faces, screens and small parts are not there for it.",
        "* It judges one object that stands upright (y up). Rooms, scenes, several objects and things lying on their sides are "
        "foreign.",
        "* Colours are named roughly and from the object's own paint, without light or material. Counts and proportions are "
        "guesses.",
        f"* {size}",
        f"* {words} Do not rely on it for anything that matters.",
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
    released = last.as_released or last.alignment.positions == "released"
    aligned = "what the released code takes for the point tokens" if released else "the point tokens"
    alignment = (
        f" In the last one the alignment loss (weight {last.alignment.weight:g}) holds {aligned} after block "
        f"{', '.join(map(str, last.alignment.layers))} to {TARGETS[last.alignment.target]}."
        if last.alignment.weight
        else ""
    )
    return [*lines, "", f"`pointalign recipes NAME` tells each one's purpose.{alignment}", ""]


def result_files(evaluation: Path) -> list[Path]:
    """The results in a folder that `pointalign evaluate` wrote."""
    return sorted(evaluation.glob(f"*/*/{RESULTS_FILE}"))


def _measured(name: str, evaluations: Sequence[Path], recipes: Sequence[Recipe]) -> list[str]:
    rows, asked = [], set()
    for number, folder in enumerate(evaluations):
        for file in result_files(folder):
            result = read_results(file)
            told = name if number == 0 else str(result["model"])
            rows += [f"| {result['benchmark']} | {cell(told)} | {row} |" for row in _rows(result)]
            asked |= {(result["benchmark"].startswith(HOUSEHOLD), row["object_id"]) for row in result["objects"]}
    if not rows:
        return ["## What was measured", "", "Nothing yet.", ""]
    return [
        "## What was measured",
        "",
        "| benchmark | model | measure | value (95 % interval) | n |",
        "| --- | --- | --- | ---: | ---: |",
        *rows,
        "",
        f"By `pointalign evaluate --model {name}`{_on_what(asked, recipes)}. Accuracy by likelihood: the most probable of all "
        "class names wins. Similarities: cosine x 100 of sentence embeddings with a reference caption.",
        "",
    ]


def _on_what(asked: set[tuple[bool, str]], recipes: Sequence[Recipe]) -> str:
    """What is known of whether a model was trained on the objects that it was asked about, each household's or another's."""
    seen = len({(True, object_id) for object_id in _objects(recipes, trained=True)} & asked)
    if seen:
        return f", which asked about {seen} objects that it was trained on"
    unseen = _all_is_known(recipes) and all(household for household, _ in asked)
    return ", on objects that it was not trained on" if unseen else ""


def _all_is_known(recipes: Sequence[Recipe]) -> bool:
    """Whether a model learnt from the bundled objects and those that joined them alone, from the first stage on."""
    return recipes[0].model.start_from is None and all(recipe.data.source == HOUSEHOLD for recipe in recipes)


def _objects(recipes: Sequence[Recipe], trained: bool) -> set[str]:
    """Ids of household's objects that some stage was trained on, or held out."""
    parts = {recipe.data.held_out for recipe in recipes if recipe.data.source == HOUSEHOLD}
    return {thing.id for part in parts for thing in household_sides(part)[0 if trained else 1]}


def _rows(result: Mapping[str, Any]) -> list[str]:
    if "accuracy" in result:
        told = percent(result["accuracy"], result["interval"])
        frequent = f"always the most frequent class: {100 * result['majority_rate']:.1f} %"
        return [f"accuracy, {cell(result['judge'])} ({frequent}) | {told} | {result['n']}"]
    return [
        f"{measure} | {points(metric['mean'], metric['interval'])} | {metric.get('n', result['n'])}"
        for measure, metric in result.get("metrics", {}).items()
        if "absent" not in metric
    ]


def _data(recipes: Sequence[Recipe], ours: bool) -> list[str]:
    licence = (
        "Code and weights: Apache-2.0, as the language model's."
        if ours
        else "The code's licence is Apache-2.0; the weights' follows from the language model's and the data's."
    )
    return [
        "## Whose data it learnt from",
        "",
        *_household(recipes),
        *_own(recipes),
        *_unknown(recipes[0].model.start_from),
        "",
        f"{licence} Where a law takes weights for an adaptation of what they learnt from, the licences above go with them.",
        "",
    ]


def _household(recipes: Sequence[Recipe]) -> list[str]:
    """The bundled objects, and those that joined them."""
    parts = sorted({recipe.data.held_out for recipe in recipes if recipe.data.source == HOUSEHOLD})
    if not parts:
        return []
    trained, held = _objects(recipes, trained=True), _objects(recipes, trained=False)
    collections = "; ".join(f"{one.name}: {one.licence}" for one in COLLECTIONS)
    lines = [
        f"* **household**: {len(trained)} objects of the Debian package sweethome3d-furniture, by the artists that NOTICE "
        f"names ({collections}). {_held_out(parts, len(held - trained))}"
    ]
    if any(recipe.data.extra for recipe in recipes):
        lines += [
            f"* **{one.name}** {one.version}: {one.creator}, {one.licence}, {one.licence_url}" for one in PACKAGES
        ]
    return [
        *lines,
        "* The conversations about these were written by rules from names, labels, colours and sizes; no model wrote them.",
    ]


def _unknown(start: str | None) -> list[str]:
    return [f"* What **{cell(start)}**, which it started from, had learnt from, its own card tells."] if start else []


def _held_out(parts: Sequence[str], count: int) -> str:
    if parts == [TEST]:
        return f"Its other {count} objects were held out."
    if len(parts) == 1:
        return f"The {count} of {parts[0]} were held out."
    return f"Its stages held out other objects ({', '.join(parts)}): {count} were seen by none."


def _own(recipes: Sequence[Recipe]) -> list[str]:
    """Data of whoever trained it."""
    sources = dict.fromkeys(
        (recipe.data.source, *recipe.data.instructions) for recipe in recipes if recipe.data.source != HOUSEHOLD
    )
    return [
        f"* **{cell(source)}**, with the conversations of {', '.join(map(cell, files))}: where these come from and under which "
        "licence is for whoever passes the model on to say here."
        for source, *files in sources
    ]
