"""The bundled model's recipe, cross-validated over all 820 objects: four trainings and an evaluation for each fold.

    python benchmarks/household_recipe.py --extra extra.parquet --out runs/folds                      # hours on two cores
    python benchmarks/household_recipe.py --extra extra.parquet --out runs/validation --parts validation-0
    python benchmarks/household_recipe.py --extra extra.parquet --out runs/folds --baselines runs/baselines

Every object is answered about by a model that was trained on the other folds, which hold none of its family. Stopped in any
way, the same command goes on where it was. With `--baselines`, the folder that household_baselines.py wrote for the same
folds, each paired difference is told too. It ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pointalign.config import Recipe, load_recipe, override_recipe
from pointalign.data.household_split import FOLD, FOLDS, check_part
from pointalign.errors import ConfigError, DataError, PointAlignError
from pointalign.evaluation.asking import EvaluationSettings
from pointalign.evaluation.compare import ACCURACY, object_values
from pointalign.evaluation.opening import Sources, household_name
from pointalign.evaluation.results import read_results
from pointalign.evaluation.run import evaluate
from pointalign.evaluation.statistics import paired_difference, summarize, summarize_share
from pointalign.evaluation.text_metrics import measure_name
from pointalign.progress import say
from pointalign.runs import train
from pointalign.sentence_embedding import MINILM

STAGES = ("encoder", "pretrain", "align", "caption")
MEASURES = {"classification": ACCURACY, "captioning": measure_name(MINILM)}


def stage_recipe(stage: str, part: str, folder: Path, extra: Path, changes: dict[str, Any]) -> Recipe:
    """One of the bundled model's recipes, with a part of the objects held out.

    Args:
        stage: of `STAGES`.
        part: what is held out, as the recipe's `data.held_out`.
        folder: of this part; a stage starts from the one before it.
        extra: the file of extra objects.
        changes: by stage, what else is different.
    """
    recipe = load_recipe(f"household-135m-{stage}")
    recipe.data.held_out = part
    if recipe.data.extra is not None:
        recipe.data.extra = str(extra)
    if stage != STAGES[0]:
        recipe.model.start_from = str(folder / STAGES[STAGES.index(stage) - 1] / "model")
    return override_recipe(recipe, changes.get(stage, {}), "--changes")


def run_part(part: str, out: Path, extra: Path, changes: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Train and evaluate with one part held out; by measure, one number per held-out object."""
    folder = out / part
    for stage in STAGES:
        train(stage_recipe(stage, part, folder, extra, changes), folder / stage, resume=True)
    evaluation, sources = folder / "evaluation", Sources(held_out=part)
    evaluate(
        str(folder / STAGES[-1] / "model"), evaluation, EvaluationSettings(sources=sources)
    )  # which asks again only what was not answered
    return {
        name: object_values(read_results(evaluation / household_name(f"household-{name}", sources)), measure)
        for name, measure in MEASURES.items()
    }


def summary(found: dict[str, dict[str, float]], baselines: Path | None) -> dict[str, Any]:
    """Means with intervals over all objects, and the paired difference from each baseline."""
    told: dict[str, Any] = {
        "accuracy": summarize_share([bool(value) for value in found["classification"].values()]),
        "caption_similarity": summarize(list(found["captioning"].values())),
    }
    for folder in sorted(baselines.iterdir()) if baselines else ():
        told[f"minus_{folder.name}"] = {}
        for name, measure in MEASURES.items():
            theirs = object_values(read_results(folder / name), measure)
            shared = sorted(found[name].keys() & theirs.keys())
            told[f"minus_{folder.name}"][name] = paired_difference(
                [theirs[key] for key in shared], [found[name][key] for key in shared]
            )
    return told


def check(parts: Sequence[str], extra: Path, changes: dict[str, Any], baselines: Path | None) -> None:
    """See what can be seen of mistakes before hours of training.

    Raises:
        PointAlignError: when there is no such part, stage or setting, or a file is not there.
    """
    if not extra.is_file():
        raise DataError(f"{extra} is not there; build it with `pointalign data extra` (docs/extra_data.md)")
    if unknown := sorted(changes.keys() - set(STAGES)):
        raise ConfigError(f"--changes: there is no stage {unknown[0]!r}; the stages are {', '.join(STAGES)}")
    for part in parts:
        check_part(part)
        for stage in STAGES:
            stage_recipe(stage, part, Path(), extra, changes)
    if baselines and not baselines.is_dir():
        raise DataError(f"{baselines} is not there; household_baselines.py writes it")
    for folder in sorted(baselines.iterdir()) if baselines else ():
        for name in MEASURES:
            read_results(folder / name)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", type=Path, required=True, help="what `pointalign data extra` built")
    parser.add_argument("--out", type=Path, default=Path("runs/folds"), help="folder for runs and results")
    parser.add_argument("--parts", nargs="+", default=[f"{FOLD}-{number}" for number in range(FOLDS)])
    parser.add_argument("--baselines", type=Path, help="folder that household_baselines.py wrote")
    parser.add_argument("--changes", type=json.loads, default={}, help='by stage: {"pretrain": {"optimizer": {...}}}')
    given = parser.parse_args(arguments)
    try:
        check(given.parts, given.extra, given.changes, given.baselines)
        found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
        for part in given.parts:
            say(f"held out: {part}")
            for name, values in run_part(part, given.out, given.extra, given.changes).items():
                found[name] |= values
        print(json.dumps({"parts": given.parts, **summary(found, given.baselines), "out": str(given.out)}))
    except PointAlignError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
