"""Which benchmarks an evaluation runs, who judges each, and what it leaves out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pointalign.errors import ConfigError, PointAlignError
from pointalign.evaluation.benchmarks import Benchmark
from pointalign.evaluation.opening import BENCHMARKS, Sources, open_benchmark
from pointalign.evaluation.own_data import read_truth
from pointalign.evaluation.records import TaskKind
from pointalign.options import AS_THE_FILE_SAYS

DEFAULT = ("household-classification", "household-captioning")
ALL, OWN, RETENTION = "all", "own", "language-retention"
# Captions need no judge: their metrics are always measured. `none` leaves the answers for `pointalign judge`.
METRICS, NONE = "metrics", "none"
SUITS: dict[str, tuple[TaskKind, ...]] = {
    "likelihood": ("closed-set",),
    "match": ("closed-set",),
    "embedding": ("closed-set", "captioning"),
    "llm": ("closed-set", "open-vocabulary", "captioning"),
    "hf": ("closed-set", "open-vocabulary", "captioning"),
}


@dataclass(frozen=True)
class Planned:
    """One benchmark to run.

    Args:
        benchmark: what is asked.
        judge: who scores the answers: a key of `SUITS`, `METRICS` or `NONE`.
    """

    benchmark: Benchmark
    judge: str


@dataclass
class Plan:
    """What an evaluation does.

    Args:
        planned: the benchmarks with point clouds, in order.
        retention: whether the language model is held against its base.
        lenient: whether what cannot be run is left out instead of ending the evaluation.
        skipped: why a benchmark is left out, by its name.
    """

    planned: list[Planned] = field(default_factory=list)
    retention: bool = False
    lenient: bool = False
    skipped: dict[str, str] = field(default_factory=dict)


def make_plan(names: Sequence[str], judge: str | None, sources: Sources, limit: int | None) -> Plan:
    """Open what is to be run.

    Args:
        names: of `BENCHMARKS`; `own` for what a user's own file holds, `language-retention`, or `all` for what the data on
            disk allow. `DEFAULT` when empty.
        judge: who scores; a benchmark that this one does not suit is scored by its own, unless it is the only one.
        sources: where the files are.
        limit: only so many objects of each.

    Raises:
        ConfigError: for an unknown name or judge, a way of reading files without a user's own data, a judge that does not suit
            the only benchmark, or a limit below 1.
        DataError: when a benchmark's files are missing or broken; with `all` it is left out instead.
    """
    if judge is not None and judge not in (*SUITS, NONE):
        raise ConfigError(f"there is no judge {judge!r}; known are {', '.join((*SUITS, NONE))}")
    if limit is not None and limit < 1:
        raise ConfigError(f"--limit {limit} leaves no object; give 1 or more")
    if sources.reading != AS_THE_FILE_SAYS and sources.clouds is None:
        raise ConfigError(
            "how files are read (up, unit, format, columns, color_max) is about your own data; name --clouds FOLDER and "
            "--truth FILE, or leave it out"
        )
    plan = Plan(lenient=ALL in names)
    wanted = [*BENCHMARKS, RETENTION] if plan.lenient else list(dict.fromkeys(names or DEFAULT))
    if OWN in wanted:
        wanted[wanted.index(OWN) : wanted.index(OWN) + 1] = _own_benchmarks(sources)
    plan.retention = RETENTION in wanted
    for name in wanted:
        if name == RETENTION:
            continue
        try:
            benchmark = open_benchmark(name, sources, limit)
            plan.planned.append(Planned(benchmark, choose_judge(benchmark, judge, alone=len(wanted) == 1)))
        except PointAlignError as error:
            if not plan.lenient:
                raise
            plan.skipped[name] = str(error)
    return plan


def choose_judge(benchmark: Benchmark, wanted: str | None, alone: bool) -> str:
    """Who scores a benchmark's answers.

    Raises:
        ConfigError: when the judge does not suit the only benchmark, or the benchmark needs one that was not named.
    """
    kind = benchmark.task.kind
    if wanted == NONE or (wanted is not None and kind in SUITS[wanted]):
        return wanted
    suited = [name for name, kinds in SUITS.items() if kind in kinds]
    if wanted is not None and alone:
        raise ConfigError(
            f"the judge {wanted} does not suit {benchmark.name} ({kind}); use --judge {' or '.join(suited)}"
        )
    if benchmark.judge is not None:
        return benchmark.judge
    if kind == "captioning":
        return METRICS
    raise ConfigError(
        f"{benchmark.name} needs a language model as judge; add --judge {' or '.join(suited)}, or --judge none to write its "
        "answers only"
    )


def _own_benchmarks(sources: Sources) -> list[str]:
    if sources.truth is None:
        raise ConfigError("your own data need --clouds FOLDER and --truth FILE; name both")
    truth = read_truth(sources.truth)
    return [
        name for name, values in (("own-classification", truth.labels), ("own-captioning", truth.captions)) if values
    ]
