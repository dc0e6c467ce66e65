"""Verbs that measure: evaluate, judge, compare and probe models, and bench the machine's speed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pointalign.judge_settings import JudgeName, JudgeSettings
from pointalign.options import AS_THE_FILE_SAYS, Reading

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


@dataclass
class Evaluate:
    """Evaluate a model: its answers to the field's benchmarks, the bundled objects or your own, judged, with intervals."""

    model: str | None = None
    """Folder or Hub id of a trained model, or one that is bundled; $POINTALIGN_MODEL, else household-135m, when not given. Or
    baseline:most-frequent, :chamfer, :forest, :forest-without-size."""
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
    reading: Annotated[Reading, tyro.conf.arg(name="")] = AS_THE_FILE_SAYS

    def run(self) -> dict[str, Any]:
        from pointalign.evaluation.asking import EvaluationSettings
        from pointalign.evaluation.opening import Sources
        from pointalign.evaluation.run import default_out, evaluate
        from pointalign.models.checkpoint import resolve_model

        settings = EvaluationSettings(
            benchmarks=tuple(self.benchmark),
            judge=self.judge,
            judge_options=vars(self.settings),
            sources=Sources(
                self.data, self.val_objects, self.clouds, self.truth, self.classes, self.held_out, self.reading
            ),
            limit=self.limit,
            batch_size=self.batch_size,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            as_released=self.as_released,
            embedders=tuple(self.embedders),
            base_language_model=self.base_language_model,
        )
        model = resolve_model(self.model)
        return evaluate(model, self.out or default_out(model), settings)


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
    """Folder or Hub id of a trained or imported model; give --model twice to compare two. As for `evaluate` when not
    given."""
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
        from pointalign.models.checkpoint import resolve_model
        from pointalign.probing.run import probe

        return probe(
            self.model or [resolve_model()], self.out, self.k, self.folds, self.limit, self.batch_size, self.seed
        )


@dataclass
class Bench:
    """Measure speed and memory of training, answering and reading against the published procedure; one figure."""

    out: Path | None = None
    """Folder for results and figure, runs/bench-SIZE when not given; what is done there is not repeated."""
    size: Literal["household", "paper", "tiny"] = "household"
    """household: bundled data and SmolLM2-135M; paper: the paper's sizes, random weights, on a GPU; tiny: seconds."""
    only: list[str] = field(default_factory=list)
    """Names of benchmarks: train_step, train_step_compiled, train_stage, train_stage_graphs, train_stage_compiled,
    train_stage_float8, train_stage_nf4, generate, encode, encode_8192, load, data; all that run at the size when not given."""
    check: bool = False
    """Hold the numbers against the targets; exit status 1 when one is missed."""

    def run(self) -> dict[str, Any]:
        from pointalign.bench.run import run_bench

        return run_bench(self.out or Path(f"runs/bench-{self.size}"), self.size, self.only, self.check)
