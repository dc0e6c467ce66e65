"""`pointalign sweep`: train and measure every arm and seed, repeat nothing that is done, and write one table."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import Timeout

from pointalign.config import Recipe
from pointalign.errors import ConfigError, DataError, PointAlignError
from pointalign.evaluation.asking import EvaluationSettings, load_model
from pointalign.evaluation.compare import ACCURACY, object_values
from pointalign.evaluation.held_out_loss import held_out_loss, how_scored
from pointalign.evaluation.opening import Sources, household_name
from pointalign.evaluation.provenance import model_fingerprint
from pointalign.evaluation.results import read_results
from pointalign.evaluation.run import evaluate
from pointalign.evaluation.text_metrics import measure_name
from pointalign.models.checkpoint import resolve_model
from pointalign.progress import say
from pointalign.run_folder import RunFolder
from pointalign.run_loop import SAME_COMMAND, RunStopped
from pointalign.runs import check_recipe, starts_from_nothing, train
from pointalign.sentence_embedding import MINILM
from pointalign.storage import lock_of, write_text
from pointalign.sweep.figure import draw_sweep
from pointalign.sweep.settings import load_sweep
from pointalign.sweep.table import build_table, table_lines

MEASURED_FILE, TABLE_FILE, REPORT_FILE, FIGURE_FILE = "measured.json", "results.json", "results.md", "results.png"
CLASSIFICATION, CAPTIONING, LOSS = "household-classification", "household-captioning", "household-loss"


def run_sweep(file: str | Path, out: str | Path, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run a sweep; stopped in any way and run again, it goes on where it was.

    Several processes of one machine, with one cache folder, that run the same sweep share its runs among them.

    Args:
        file: see `load_sweep`.
        out: folder: ARM/seed-N is one run with its evaluation, `results.json` and `results.md` the table of all that is
            done and `results.png` its figure, written anew after each run.
        only: these runs alone, as ARM or ARM/seed-N; all of the sweep's when none is named.

    Returns:
        `runs`, `against`, the table's numbers by measure and arm, and the table's files; `figure` once two arms can be
        compared.

    Raises:
        RunStopped: when Ctrl-C or SIGTERM stopped a training.
        PointAlignError: for anything else expected that goes wrong.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a sweep's processes share its runs, not one run: start the command several times, without torchrun"
        )
    folder = Path(out)
    sweep, recipes = load_sweep(file)
    asked = _asked(recipes, only, file)
    for recipe in recipes.values():
        _check(recipe, file)
    if len(parts := {recipe.data.held_out for recipe in recipes.values()}) > 1:
        raise ConfigError(f"{file}: arms hold out {' and '.join(sorted(parts))}, so nothing can be paired; choose one")
    # What is done is known before anything is trained, so that other settings are refused at once.
    done = len(_measured(folder, recipes, sweep.limit))
    if done:
        say(f"{done} of {len(recipes)} runs are done already")
    for wait in (False, True):
        for number, (key, recipe) in enumerate(asked.items(), start=1):
            run = _run_folder(folder, key)
            with _claimed(run, wait) as ours:
                if ours and _read_measured(run, recipe, sweep.limit) is None:
                    say(f"run {number} of {len(asked)}: {key[0]}, seed {key[1]}")
                    _run(recipe, run, sweep.limit)
                    _write_table(folder, _measured(folder, recipes, sweep.limit), recipes, sweep.reference)
    measured = _measured(folder, recipes, sweep.limit)
    table = _write_table(folder, measured, recipes, sweep.reference)
    files = {"results": str(folder / TABLE_FILE), "report": str(folder / REPORT_FILE)}
    if (folder / FIGURE_FILE).is_file():
        files["figure"] = str(folder / FIGURE_FILE)
    return {"runs": len(measured), "against": sweep.reference, "measures": table, **files}


def _asked(
    recipes: Mapping[tuple[str, int], Recipe], only: Sequence[str], file: str | Path
) -> dict[tuple[str, int], Recipe]:
    """The runs that are meant."""
    names = {(arm, seed): {str(arm), f"{arm}/seed-{seed}"} for arm, seed in recipes}
    if unknown := [name for name in only if name not in set().union(*names.values())]:
        arms, seeds = (list(dict.fromkeys(key[place] for key in recipes)) for place in (0, 1))
        raise ConfigError(
            f"{file} has no run {unknown[0]!r}: name an arm ({', '.join(map(str, arms))}) or ARM/seed-N with a seed of {seeds}"
        )
    return {key: recipe for key, recipe in recipes.items() if not only or names[key] & set(only)}


def _check(recipe: Recipe, file: str | Path) -> None:
    """See that an arm can be run, as far as that can be seen before it is."""
    if starts_from_nothing(recipe.model.start_from):
        raise ConfigError(
            f"{file}: arm {recipe.name} starts from {recipe.model.start_from}, which is not there; train it first, or set "
            "overrides: model: start_from to another"
        )
    try:
        check_recipe(recipe)
    except PointAlignError as error:
        raise ConfigError(f"{file}: arm {recipe.name}, seed {recipe.seed}: {error}") from error


def _run_folder(folder: Path, key: tuple[str, int]) -> Path:
    return folder / key[0] / f"seed-{key[1]}"


@contextmanager
def _claimed(folder: Path, wait: bool) -> Iterator[bool]:
    """Whether a run is this process's to do; one that another process is at is left to it, or waited for."""
    lock = lock_of(folder)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            yield False
            return
        say(f"waiting for the process that is at {folder}")
        lock.acquire()
    try:
        yield True
    finally:
        lock.release()


def _measured(
    folder: Path, recipes: Mapping[tuple[str, int], Recipe], limit: int | None
) -> dict[tuple[str, int], dict[str, dict[str, float]]]:
    """What all finished runs measured.

    Raises:
        ConfigError: when they cannot be compared.
    """
    found = {key: _read_measured(_run_folder(folder, key), recipe, limit) for key, recipe in recipes.items()}
    done = {key: values for key, values in found.items() if values is not None}
    first: dict[Any, tuple[Path, Any]] = {}
    for key, values in done.items():
        run, start = _run_folder(folder, key), recipes[key].model.start_from
        for what, value in (("losses are scored", values["scored"]), (f"{start} is", values["start"])):
            other, same = first.setdefault(what, (run, value))
            if value != same:
                raise ConfigError(
                    f"{run}: {what} otherwise than for {other}; delete one of them, or {MEASURED_FILE} and evaluation in it"
                )
    return {key: values["measures"] for key, values in done.items()}


def _read_measured(folder: Path, recipe: Recipe, limit: int | None) -> dict[str, Any] | None:
    """What a finished run measured (`measures`), from which `start` and how it was `scored`; None while it is not finished."""
    file = folder / MEASURED_FILE
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        found, measured_on = {name: values[name] for name in ("measures", "scored", "start")}, values["limit"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is broken ({error}); delete it and run again") from error
    if RunFolder(folder).changed_settings(recipe) or measured_on != limit:
        raise ConfigError(
            f"{folder} was run with other settings than the sweep file has now; name another --out, or delete that folder"
        )
    return found


def _run(recipe: Recipe, folder: Path, limit: int | None) -> None:
    """Train one arm with one seed, and measure it on the held-out objects."""
    try:
        train(recipe, folder, resume=True)
    except RunStopped as stopped:
        raise RunStopped(f"{recipe.name}, seed {recipe.seed}: {stopped.done}", SAME_COMMAND) from None
    gc.collect()  # the trainer holds the model in circles
    model, out = folder / "model", folder / "evaluation"
    sources = Sources(held_out=recipe.data.held_out)
    evaluate(model, out, EvaluationSettings((CLASSIFICATION, CAPTIONING), sources=sources, limit=limit))
    classification, captioning = (out / household_name(name, sources) for name in (CLASSIFICATION, CAPTIONING))
    measures = {
        "accuracy": object_values(read_results(classification), ACCURACY),
        "caption_similarity": object_values(read_results(captioning), measure_name(MINILM)),
        "next_token_loss": held_out_loss(load_model(model), out / LOSS, limit, sources.held_out),
    }
    start = recipe.model.start_from
    content = {
        "limit": limit,
        "start": start and model_fingerprint(resolve_model(start)),
        "scored": how_scored(out / LOSS),
        "measures": measures,
    }
    write_text(folder / MEASURED_FILE, json.dumps(content, indent=1) + "\n")


def _write_table(
    folder: Path,
    measured: Mapping[tuple[str, int], Any],
    recipes: Mapping[tuple[str, int], Recipe],
    reference: str,
) -> dict[str, Any]:
    ordered = {key: measured[key] for key in recipes if key in measured}
    missing = [f"{arm}, seed {seed}" for arm, seed in recipes if (arm, seed) not in measured]
    table = build_table(ordered, reference)
    content = {"against": reference, "missing": missing, "measures": table}
    write_text(folder / TABLE_FILE, json.dumps(content, indent=1) + "\n")
    write_text(folder / REPORT_FILE, "\n".join(table_lines(table, reference, missing)) + "\n")
    if not draw_sweep(table, reference, folder / FIGURE_FILE):
        (folder / FIGURE_FILE).unlink(missing_ok=True)
    return table
