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
from pointalign.config import Recipe, load_recipe, recipe_head, recipe_names
from pointalign.errors import PointAlignError
from pointalign.judge_settings import JudgeName, JudgeSettings
from pointalign.options import (
    AS_THE_FILE_SAYS,
    FROM_ENVIRONMENT,
    GREEDY,
    Decoding,
    ManyFiles,
    ModelChoice,
    Page,
    Reading,
)

BenchmarkName = Literal[
    "household-classification",
    "household-captioning",
    "modelnet40",
    "objaverse-classification",
    "objaverse-captioning",
    "own",
    "own-classification",
    "own-captioning",
    "language-retention",
    "all",
]
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
class Sweep:
    """Train and measure several arms of a recipe with several seeds, and tell their paired differences in one table."""

    file: tyro.conf.Positional[Path]
    """The sweep in YAML: base (a recipe), arms (by name what each changes), seeds; see docs/sweeps.md."""
    out: Path | None = None
    """Folder for the runs and the table, runs/ and the file's name when not given; run again, it goes on."""

    def run(self) -> dict[str, Any]:
        from pointalign.sweep.run import run_sweep

        return run_sweep(self.file, self.out or Path("runs") / self.file.stem)


@dataclass
class Evaluate:
    """Evaluate a model: its answers to the field's benchmarks, the bundled objects or your own, judged, with intervals."""

    model: str
    """Folder or Hub id of a trained model; or baseline:most-frequent, :chamfer, :forest, :forest-without-size."""
    benchmark: list[BenchmarkName] = field(default_factory=list)
    """What is asked: one or several, or all that the data on disk allow; the household objects when not given."""
    judge: JudgeName | Literal["likelihood", "none"] | None = None
    """likelihood: the most probable label, no judge; none: answers only; each benchmark's own when not given."""
    data: Path = Path("data")
    """Root of the field's files, see docs/data.md."""
    val_objects: Literal[200, 3000] = 200
    """Held-out Objaverse objects: the 200 of the published tables, or all 3000."""
    held_out: str = "test"
    """Which of the bundled objects: test; fold-0 to fold-4; validation-0 to validation-4, as in the recipe's data.held_out."""
    clouds: Path | None = None
    """Your own data: folder of {object_id}.npy or other 3D files."""
    truth: Path | None = None
    """Your own data: CSV or JSON file of object_id and label, caption or both."""
    classes: Path | None = None
    """Your own data: text file with the closed set of labels, one per line; those that occur when not given."""
    out: Path | None = None
    """Folder for answers and results; evaluation beside the model when not given."""
    limit: int | None = None
    """Only the first objects of each benchmark; all when not given."""
    batch_size: int | None = None
    """Clouds at a time; each benchmark's own when not given."""
    max_new_tokens: int | None = None
    """Longest answer in tokens; each benchmark's own when not given."""
    seed: int = 0
    """Of the classes that stand in for answers without one, and of sampling where --as-released samples."""
    embedders: list[str] = field(default_factory=list)
    """Sentence embedders for captions; each benchmark's own when not given."""
    base_language_model: str | None = None
    """language-retention: what to compare with, where the model does not tell."""
    as_released: bool = False
    """The released code's evaluation prompt and sampling (imported MiniGPT-3D and PointAlign models only)."""
    settings: Annotated[JudgeSettings, tyro.conf.arg(name="")] = field(default_factory=JudgeSettings)

    def run(self) -> dict[str, Any]:
        from pointalign.evaluation.asking import EvaluationSettings
        from pointalign.evaluation.opening import Sources
        from pointalign.evaluation.run import default_out, evaluate

        settings = EvaluationSettings(
            benchmarks=tuple(self.benchmark),
            judge=self.judge,
            judge_options=vars(self.settings),
            sources=Sources(self.data, self.val_objects, self.clouds, self.truth, self.classes, self.held_out),
            limit=self.limit,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            as_released=self.as_released,
            embedders=tuple(self.embedders),
            base_language_model=self.base_language_model,
        )
        return evaluate(self.model, self.out or default_out(self.model), settings)


@dataclass
class Compare:
    """Compare two evaluated models over the same objects, with paired intervals and where they disagree."""

    results: tyro.conf.Positional[list[str]]
    """Two results.json files or their folders; or several seeds a side: A1 A2 A3 vs B1 B2 B3."""
    out: Path = Path("runs/comparison")
    """Folder for the report."""
    seed: int = 0
    """Of the resampling."""

    def run(self) -> dict[str, Any]:
        from pointalign.evaluation.compare import compare, split_sides

        first, second = split_sides(self.results)
        return compare(first, second, self.out, self.seed)


@dataclass
class Probe:
    """Tell how much class and geometry every layer of models still holds: a figure with intervals, and the numbers."""

    model: tyro.conf.UseAppendAction[list[str]] = field(default_factory=list)
    """Folder or Hub id of a trained or imported model; give --model twice to compare two."""
    out: Path = Path("runs/probe")
    """Folder for the figure and the numbers."""
    k: int = 1
    """Neighbours of the nearest-neighbour classifier."""
    folds: int | None = None
    """Cross-validate over all 820 objects in so many parts; fit on 720 and score the held-out 100 when not given."""
    limit: int | None = None
    """Only the first objects of each split; all when not given."""
    batch_size: int = 16
    """Clouds at a time."""
    seed: int = 0
    """Of resampling and permutations."""

    def run(self) -> dict[str, Any]:
        from pointalign.probing.run import probe

        return probe(self.model, self.out, self.k, self.folds, self.limit, self.batch_size, self.seed)


@dataclass
class Judge:
    """Score a file of answers in the field's format, ours or a peer's, with a judge."""

    answers: tyro.conf.Positional[Path]
    """The answers file."""
    task: Literal["closed-set", "open-vocabulary", "captioning"]
    """Which of the classes the answer names; whether it names the same kind of object as the reference; 0 to 100."""
    judge: JudgeName = "match"
    """match and embedding need no language model; llm asks an OpenAI-compatible endpoint, hf a model on this machine."""
    labels: str = "modelnet40"
    """The classes of the closed set: modelnet40, household, or a CSV file of label,synonyms."""
    out: Path | None = None
    """JSON file for the summary and every verdict; beside the answers when not given."""
    seed: int = 0
    """Of the random classes that stand in for answers without one."""
    dry_run: bool = False
    """Show a prompt and how many there are; ask nothing."""
    settings: Annotated[JudgeSettings, tyro.conf.arg(name="")] = field(default_factory=JudgeSettings)

    def run(self) -> dict[str, Any]:
        from pointalign.evaluation.judging.command import judge_file

        given = {name: value for name, value in vars(self).items() if name != "settings"}
        return judge_file(**given, **vars(self.settings))


@dataclass
class Chat:
    """Talk about a 3D file: on a terminal with commands (/help), between pipes one question per line."""

    file: tyro.conf.Positional[str]
    """The 3D file."""
    choice: Annotated[ModelChoice, tyro.conf.arg(name="")] = FROM_ENVIRONMENT
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = GREEDY
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> None:
        from pointalign.answering.loading import load_answerer
        from pointalign.chat import chat

        chat(self.file, load_answerer(**vars(self.choice)), self.decoding, self.reading)


@dataclass
class Caption:
    """Caption 3D files: one JSON line for each, with its path and a caption or an error."""

    paths: tyro.conf.Positional[list[str]]
    """Files, folders (all 3D files below) and patterns."""
    question: str | None = None
    """What the model is asked; "Caption this 3D model in detail." when not given."""
    choice: Annotated[ModelChoice, tyro.conf.arg(name="")] = FROM_ENVIRONMENT
    many: Annotated[ManyFiles, tyro.conf.arg(name="")] = field(default_factory=ManyFiles)
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = GREEDY
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> dict[str, Any]:
        from pointalign.answering.files import answer_files
        from pointalign.answering.jobs import caption_job

        job = caption_job(self.question, self.decoding)
        return answer_files(self.paths, job, self.choice, self.reading, self.many)


@dataclass
class Classify:
    """Tell how probable each of your labels is for 3D files: one JSON line for each file."""

    paths: tyro.conf.Positional[list[str]]
    """Files, folders (all 3D files below) and patterns."""
    labels: str | None = None
    """The labels, separated by commas."""
    labels_file: Path | None = None
    """A file with one label per line."""
    top: int | None = None
    """Only so many of the most probable labels in each line; all when not given."""
    free: bool = False
    """Ask "What is this?" too, for an answer in the model's own words; labels are then optional."""
    question: str | None = None
    """What the labels answer; "Which class of object is this?" when not given."""
    choice: Annotated[ModelChoice, tyro.conf.arg(name="")] = FROM_ENVIRONMENT
    many: Annotated[ManyFiles, tyro.conf.arg(name="")] = field(default_factory=ManyFiles)
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = GREEDY
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> dict[str, Any]:
        from pointalign.answering.files import answer_files
        from pointalign.answering.jobs import classify_job, read_labels

        labels = read_labels(self.labels, self.labels_file)
        job = classify_job(labels, self.top, self.free, self.question, self.decoding)
        return answer_files(self.paths, job, self.choice, self.reading, self.many)


@dataclass
class Render:
    """Draw a 3D file as a model sees it: its cloud from five sides, as a PNG."""

    file: tyro.conf.Positional[str]
    """The 3D file, or - for standard input."""
    out: Path
    """PNG to write."""
    points: int | None = None
    """Points of the cloud; the model's, else 8192, when not given."""
    model: str | None = None
    """Folder or Hub id of the model whose number of points and missing colour are taken."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> dict[str, Any]:
        from dataclasses import asdict

        from pointalign.rendering import render_file

        result = render_file(self.file, self.out, self.points, self.model, asdict(self.reading))
        for note in result["notes"]:
            print(note, file=sys.stderr)
        return result


@dataclass
class Demo:
    """Show a page in the browser: drop a 3D file or pick an object, see its cloud, and talk about it."""

    compare: str | None = None
    """A second model, whose answers stand beside those of the first."""
    choice: Annotated[ModelChoice, tyro.conf.arg(name="")] = FROM_ENVIRONMENT
    page: Annotated[Page, tyro.conf.arg(name="")] = field(default_factory=Page)
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = GREEDY
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> None:
        from pointalign.demo import serve

        serve(self.choice, self.compare, self.page, self.decoding, self.reading)


@dataclass
class Quickstart:
    """Fine-tune a real model twice on the bundled objects, with and without alignment, and compare the two."""

    out: Path = Path("runs/demo")
    """Its folder; one that was stopped goes on where it was."""
    fast: bool = False
    """A few steps and objects only, to see that everything runs."""

    def run(self) -> dict[str, Any]:
        from pointalign.quickstart import run_quickstart

        return run_quickstart(self.out, self.fast)


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
class BuildExtra:
    """Build a file of extra training objects from models of free games: docs/extra_data.md tells which packages."""

    source: list[Path]
    """Folders that the Debian packages were unpacked into; packages that are absent are told and left out."""
    out: Path
    """Parquet file to write."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.extra_build import build_extra

        return build_extra(sources=self.source, out=self.out)


@dataclass
class CheckData:
    """Tell what of the field's data a folder holds and lacks, file by file; exit status 1 when something is missing."""

    folder: tyro.conf.Positional[Path]
    """Root of the layout, see docs/data.md."""
    clouds: str | None = None
    """Folder or address of the clouds, when they lie elsewhere."""
    list: Path | None = None
    """File for the names of all objects without cloud."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.check import check_data

        return check_data(self.folder, self.clouds, self.list)


@dataclass
class PackData:
    """Pack a folder of 660K small .npy clouds into Parquet shards for data.source; run again, it goes on."""

    folder: tyro.conf.Positional[Path]
    """Folder of {object_id}_8192.npy files."""
    out: Path
    """Folder for the shards."""
    skip_broken: bool = False
    """Leave broken files out; else they are named, and the packing ends without the index that training needs."""
    readers: int = 8
    """Files that are read at once."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.pack import pack_clouds

        return pack_clouds(self.folder, self.out, self.skip_broken, self.readers)


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
    """List the recipes that come with the package, tell what one reproduces and needs, or count what it trains."""

    name: tyro.conf.Positional[str | None] = None
    """One recipe; all when not given."""
    count: bool = False
    """Count the weights of the recipe's model at full size, part by part; nothing is loaded but sizes."""
    page: Path | None = None
    """A page whose tables of all recipes are rewritten (docs/recipes.md)."""

    def run(self) -> dict[str, Any]:
        if self.page is not None or self.count:
            return self._count()
        if self.name is not None:
            lines = recipe_head(self.name)
            print("\n".join(lines), file=sys.stderr)
            return {"recipe": self.name, "head": lines}
        for name in recipe_names():
            print(f"{name:32} {recipe_head(name)[0]}", file=sys.stderr)
        return {"recipes": recipe_names()}

    def _count(self) -> dict[str, Any]:
        from pointalign import recipe_table

        if self.page is not None:
            recipe_table.rewrite_page(self.page)
            return {"page": str(self.page)}
        return recipe_table.tell_counts() if self.name is None else recipe_table.tell_count(self.name)


VERBS: dict[str, Any] = {
    "train": Train,
    "sweep": Sweep,
    "evaluate": Evaluate,
    "compare": Compare,
    "probe": Probe,
    "chat": Chat,
    "caption": Caption,
    "classify": Classify,
    "render": Render,
    "judge": Judge,
    "demo": Demo,
    "quickstart": Quickstart,
    "recipes": Recipes,
    "import-checkpoint": ImportCheckpoint,
}
DATA_VERBS: dict[str, Any] = {"check": CheckData, "pack": PackData, "household": BuildHousehold, "extra": BuildExtra}


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
    if result is None:
        return 0
    from pointalign.progress import is_first_process

    if is_first_process():
        print(json.dumps(result))
    # A check that was made and found something missing has its result on stdout all the same.
    return 0 if result.get("complete", True) else EXIT_FAILED
