"""The command `pointalign`: one verb per act; people are spoken to on stderr, programs get one JSON line on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pointalign import __version__
from pointalign.config import Recipe, load_recipe, recipe_names
from pointalign.errors import PointAlignError

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


@dataclass
class Train:
    """Run a training recipe; every setting of the recipe can be overridden."""

    recipe: tyro.conf.Positional[str]
    """A recipe that comes with the package, or a YAML file."""
    out: Path | None = None
    """The run's folder; runs/NAME when not given."""
    resume: bool = False
    """Go on with the run in that folder."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)

    def run(self) -> dict[str, Any]:
        from pointalign.runs import train

        return train(self.settings, self.out or Path("runs") / self.settings.name, self.resume)


@dataclass
class Evaluate:
    """Evaluate a model on held-out objects: closed-set accuracy, free-form answers, captions."""

    model: str
    """Folder or Hub id of a trained model."""
    out: Path | None = None
    """Folder for the results; evaluation beside the model when not given."""
    limit: int | None = None
    """Only the first objects; all when not given."""
    as_released: bool = False
    """Ask with the released code's evaluation prompt (imported MiniGPT-3D and PointAlign models only)."""

    def run(self) -> dict[str, Any]:
        from pointalign.evaluation.run import evaluate

        out = self.out or Path(self.model).parent / "evaluation"
        summary = evaluate(self.model, out, self.limit, self.as_released)
        return {name: value for name, value in summary.items() if name != "objects"}


@dataclass
class Demo:
    """Fine-tune a real model twice on the bundled objects, with and without alignment, and compare the two."""

    out: Path = Path("runs/demo")
    """The demo's folder; a demo that was stopped goes on where it was."""
    fast: bool = False
    """A few steps and objects only, to see that everything runs."""

    def run(self) -> dict[str, Any]:
        from pointalign.demo import run_demo

        return run_demo(self.out, self.fast)


@dataclass
class BuildHousehold:
    """Build the bundled data set from the models of the Debian package sweethome3d-furniture."""

    source: Path
    """Folder with the package's .sh3f files."""
    out: Path
    """Parquet file to write."""
    notice: Path | None = None
    """NOTICE file whose list of objects is rewritten."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.household_build import build_household

        return build_household(source=self.source, out=self.out, notice=self.notice)


@dataclass
class ImportCheckpoint:
    """Turn a published checkpoint into a folder that `from_pretrained` loads."""

    family: tyro.conf.Positional[Literal["minigpt-3d", "pointllm"]]
    """minigpt-3d (PointAlign's checkpoints too) or pointllm."""
    sources: tyro.conf.Positional[list[str]]
    """Files in the order they are applied, or PointLLM's one folder."""
    out: Path
    """Folder to write."""
    language_model: str | None = None
    """Folder or Hub id of Phi-2, or its configuration when the files hold all weights; minigpt-3d needs it."""
    qformer: str | None = None
    """Folder or configuration of the Q-Former."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer; the language model's when not given."""
    num_groups: int = 512
    """Local groups of each cloud."""
    group_size: int = 32
    """Points of each group."""
    point_encoder_heads: int = 6
    """Heads of the point encoder."""
    lora_alpha: int = 16
    """Scale of the language model's LoRA over its rank."""
    num_points: int = 8192
    """Points of each cloud."""
    allow_missing: list[str] = field(default_factory=list)
    """Names, beginnings or patterns of tensors that may be missing."""
    merge: bool = False
    """Add the LoRA to the weights instead of keeping it as adapters."""

    def run(self) -> dict[str, Any]:
        from pointalign.importers.command import import_checkpoint

        report = import_checkpoint(**vars(self))
        for line in report.lines():
            print(line, file=sys.stderr)
        return {"out": str(self.out), **report.summary()}


@dataclass
class Recipes:
    """List the recipes that come with the package."""

    def run(self) -> dict[str, Any]:
        for name in recipe_names():
            print(f"{name:30} {load_recipe(name).stage}", file=sys.stderr)
        return {"recipes": recipe_names()}


VERBS: dict[str, Any] = {
    "train": Train,
    "evaluate": Evaluate,
    "demo": Demo,
    "recipes": Recipes,
    "import-checkpoint": ImportCheckpoint,
}
DATA_VERBS: dict[str, Any] = {"household": BuildHousehold}


def _usage() -> str:
    lines = [
        f"pointalign {__version__}: {_first_line(sys.modules['pointalign'])}",
        "",
        "usage: pointalign VERB ...",
        "",
    ]
    entries = {**VERBS, **{f"data {name}": kind for name, kind in DATA_VERBS.items()}}
    lines += [f"  {name:16} {_first_line(kind)}" for name, kind in entries.items()]
    return "\n".join(
        [*lines, "", "`pointalign VERB --help` tells the rest; `--debug` shows where a failure came from."]
    )


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _parse(arguments: list[str]) -> Any:
    verb, rest, prog = arguments[0], arguments[1:], "pointalign"
    kinds = VERBS
    if verb == "data" and rest:
        verb, rest, prog, kinds = rest[0], rest[1:], "pointalign data", DATA_VERBS
    if verb not in kinds:
        known = ", ".join([*VERBS, *(f"data {name}" for name in DATA_VERBS)])
        raise PointAlignError(f"unknown verb {' '.join(arguments[:2])!r}; known are {known}")
    default = None
    if kinds[verb] is Train:
        named = next((argument for argument in rest if not argument.startswith("-")), None)
        if named is not None and (not rest[0].startswith("-")):
            default = Train(recipe=named, settings=load_recipe(named))
    return tyro.cli(kinds[verb], prog=f"{prog} {verb}", args=rest, default=default)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with 0, or 1 after one line that says what went wrong and what to do."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return
    if given[0] == "--version":
        print(__version__)
        return
    sys.exit(_run(given, debug))


def _run(given: list[str], debug: bool) -> int:
    try:
        result = _parse(given).run()
    except PointAlignError as error:
        if debug:
            raise
        print(f"pointalign: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED if type(error).__name__ == "RunStopped" else EXIT_FAILED
    except KeyboardInterrupt:
        print("pointalign: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if debug:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"pointalign: {error.strerror or error}{where}; check the path and the free space", file=sys.stderr)
        return EXIT_FAILED
    from pointalign.run_folder import is_first_process

    if is_first_process():
        print(json.dumps(result))
    return 0
