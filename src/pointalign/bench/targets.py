"""What the benchmarks are, how each is run at each size, and the targets that their numbers are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Size = Literal["household", "paper", "tiny"]
# Each benchmark's own number of repetitions is kept at the other sizes; a tiny run only shows that everything runs.
TINY_STEPS = {"train_step": ["--steps", "2"], "train_stage": ["--steps", "5"], "train_stage_nf4": ["--steps", "5"]}
SMALL_CARD = ("--quantize", "nf4", "--gradient-checkpointing")
PAPER_CLOUDS = ("--size", "paper")
RECORDED = ("--cuda-graphs", "--steps", "300", "--forbid-waiting")


@dataclass(frozen=True)
class Benchmark:
    """One script of `benchmarks/`, whose last line on stdout is JSON.

    Args:
        name: of its results.
        about: what it measures, for people.
        script: its file.
        options: of its command, beside `--size`.
        sizes: those it runs at.
    """

    name: str
    about: str
    script: str
    options: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ("household", "paper", "tiny")

    def arguments(self, size: Size) -> list[str]:
        """Of its command at a size."""
        return ["--size", size, *self.options, *(TINY_STEPS.get(self.name, []) if size == "tiny" else [])]


BENCHMARKS = (
    Benchmark("train_step", "a fine-tuning step", "train_step.py"),
    Benchmark(
        "train_step_compiled",
        "the same, our decoder blocks compiled and recorded",
        "train_step.py",
        ("--compile", "--cuda-graphs", "--warm-up", "60"),
        ("paper",),
    ),
    Benchmark("train_stage", "a stretch of stage PointAlign", "train_stage.py", ("--forbid-waiting",)),
    Benchmark("train_stage_graphs", "the same, decoder blocks recorded", "train_stage.py", RECORDED, ("paper",)),
    Benchmark(
        "train_stage_compiled",
        "the same, decoder blocks compiled and recorded",
        "train_stage.py",
        ("--compile", *RECORDED),
        ("paper",),
    ),
    Benchmark(
        "train_stage_float8",
        "the same, products of frozen matrices in 8-bit floats",
        "train_stage.py",
        ("--float8", "--compile", *RECORDED),
        ("paper",),
    ),
    Benchmark(
        "train_stage_nf4",
        "the same on 4-bit weights, recomputing activations",
        "train_stage.py",
        SMALL_CARD,
        ("paper", "tiny"),
    ),
    Benchmark("generate", "answering", "generate.py"),
    Benchmark("encode", "encoding clouds", "encode.py"),
    Benchmark(
        "encode_8192", "encoding clouds of 8,192 points to 513 tokens", "encode.py", PAPER_CLOUDS, ("household",)
    ),
    Benchmark("load", "from the command to the first answer", "load.py", sizes=("household", "tiny")),
    Benchmark("data", "reading training data", "data.py"),
)
NAMES = tuple(benchmark.name for benchmark in BENCHMARKS)


class Target(NamedTuple):
    """A bound on one number of one benchmark.

    Args:
        benchmark: its name.
        key: of the number in its JSON line; inner keys follow a dot.
        bound: the number is at least this, or at most.
        at_least: which of the two.
        device: where the bound holds, "cpu" or "cuda".
        size: at which size.
        about: the number, for people.
    """

    benchmark: str
    key: str
    bound: float
    at_least: bool
    device: Literal["cpu", "cuda"]
    size: Size
    about: str


LABELS = "cost of scoring 40 labels, in free answers"
TARGETS = (
    Target("train_step", "speedup", 4, True, "cpu", "household", "steps per second, times the published procedure's"),
    Target("train_step", "memory_ratio", 0.5, False, "cpu", "household", "peak memory, of the published procedure's"),
    Target("generate", "speedup", 10, True, "cpu", "household", "answers per second, times the published procedure's"),
    Target("generate", "ours.labels_in_answers", 2, False, "cpu", "household", LABELS),
    Target("encode", "speedup", 1.5, True, "cpu", "household", "clouds per second, times the plain loop's"),
    Target("encode_8192", "speedup", 1.5, True, "cpu", "household", "clouds per second, times the plain loop's"),
    Target("load", "ours.caption.seconds", 15, False, "cpu", "household", "seconds to the first answer"),
    Target("train_stage_float8", "share_of_peak", 0.5, True, "cuda", "paper", "share of the measured bf16 matmul peak"),
    Target(
        "train_stage_float8",
        "seconds_for_10000_steps",
        300,
        False,
        "cuda",
        "paper",
        "seconds of 10,000 steps, without what comes before them",
    ),
    Target("train_stage", "peak_memory_gib", 24, False, "cuda", "paper", "GiB while training"),
    Target("train_stage_nf4", "peak_memory_gib", 12, False, "cuda", "paper", "GiB while training on 4-bit weights"),
    Target("generate", "speedup", 10, True, "cuda", "paper", "answers per second, times the published procedure's"),
    Target(
        "generate", "ours.answers_per_second", 5536 / 60, True, "cuda", "paper", "answers per second, 5,536 in 60 s"
    ),
    Target("generate", "ours.labels_in_answers", 2, False, "cuda", "paper", LABELS),
    Target("encode", "speedup", 5, True, "cuda", "paper", "clouds per second, times the plain loop's"),
)


@dataclass(frozen=True)
class Verdict:
    """A target held against what was measured.

    Args:
        target: see `Target`.
        measured: the number, or None where the benchmark does not tell it.
    """

    target: Target
    measured: float | None
    met: bool = field(init=False)

    def __post_init__(self) -> None:
        value, bound = self.measured, self.target.bound
        met = value is not None and (value >= bound if self.target.at_least else value <= bound)
        object.__setattr__(self, "met", met)

    def line(self) -> str:
        """For people."""
        target = self.target
        bound = f"{'at least' if target.at_least else 'at most'} {target.bound:g}"
        told = "not measured" if self.measured is None else f"{self.measured:g}"
        return f"{'met   ' if self.met else 'MISSED'} {target.benchmark}: {target.about}: {told}, to be {bound}"


def targets_of(size: Size, device: str, names: set[str]) -> list[Target]:
    """The targets that hold for a size, a device ("cpu" or "cuda") and some benchmarks."""
    return [t for t in TARGETS if (t.size, t.device) == (size, device) and t.benchmark in names]


def verdicts(results: Mapping[str, Mapping[str, Any]], size: Size, device: str, names: set[str]) -> list[Verdict]:
    """The targets that hold for a size and a device, each with its verdict.

    Args:
        results: the benchmarks' JSON lines by name.
        size: they were run at.
        device: "cpu" or "cuda".
        names: of the benchmarks that were asked for.
    """
    return [
        Verdict(target, _number(results.get(target.benchmark, {}), target.key))
        for target in targets_of(size, device, names)
    ]


def _number(result: Any, key: str) -> float | None:
    for part in key.split("."):
        result = result.get(part) if isinstance(result, Mapping) else None
    return result


class Ratio(NamedTuple):
    """How our path compares with the published procedure in one number.

    Args:
        label: benchmark and number.
        value: ratio of the medians.
        low: and
        high: of the quartiles, each against the other side's; the value where they are not told.
        better_above: whether more is better.
    """

    label: str
    value: float
    low: float
    high: float
    better_above: bool


def ratios(results: Mapping[str, Mapping[str, Any]]) -> list[Ratio]:
    """The ratios in the benchmarks' JSON lines: `speedup...`, and `..._ratio`, where less is better.

    The spread of a `speedup` comes from `quartiles` of `ours` and `published`, where both tell them, or from
    `NAME_quartiles`.
    """
    found = []
    for name, result in results.items():
        for key, value in result.items():
            if not isinstance(value, int | float) or not (key.startswith("speedup") or key.endswith("_ratio")):
                continue
            low, high = result.get(f"{key}_quartiles") or (_spread(result) if key == "speedup" else (value, value))
            found.append(Ratio(f"{name}: {key.replace('_', ' ')}", value, low, high, key.startswith("speedup")))
    return found


def _spread(result: Mapping[str, Any]) -> tuple[float, float]:
    sides = [result.get(side) or {} for side in ("ours", "published")]
    if not all(isinstance(side, Mapping) and "quartiles" in side for side in sides):
        return result["speedup"], result["speedup"]
    ours, published = (side["quartiles"] for side in sides)
    if any(name.endswith("_per_second") for name in sides[0]):  # rates, not times
        return ours[0] / published[1], ours[1] / published[0]
    return published[0] / ours[1], published[1] / ours[0]
