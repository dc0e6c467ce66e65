"""Run the benchmarks of a checkout one after the other, hold them against the targets, and draw them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pointalign.bench.targets import BENCHMARKS, NAMES, Benchmark, Size, ratios, targets_of, verdicts
from pointalign.device import machine_name
from pointalign.errors import ConfigError, PointAlignError
from pointalign.progress import progress, say
from pointalign.run_folder import git_commit
from pointalign.storage import write_text

RESULTS_FILE = "bench.json"
FIGURE_FILE = "performance.png"


def find_benchmarks() -> Path:
    """The folder `benchmarks/` of the checkout that this package runs from, or of the working folder.

    Raises:
        PointAlignError: when there is none.
    """
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "benchmarks" / "train_step.py").is_file():
            return root / "benchmarks"
    raise PointAlignError(
        "the benchmarks are not part of the installed package: run `pointalign bench` in the root of a checkout"
    )


def run_bench(out: Path, size: Size, only: Sequence[str] = (), check: bool = False) -> dict[str, Any]:
    """Run what is not done yet, and write one JSON file and one figure of all.

    Args:
        out: folder of the results; a benchmark whose result lies there is not repeated.
        size: of models and data.
        only: names of benchmarks; all that run at this size when empty.
        check: hold the results against the targets.

    Returns:
        Names that were run, failed and are missing; the figure; and with `check` the verdicts and `complete`, whether all
        targets are met.

    Raises:
        ConfigError: for unknown names, a folder that holds what was measured otherwise, or `check` where there is no target.
        PointAlignError: outside a checkout.
    """
    if unknown := [name for name in only if name not in NAMES]:
        raise ConfigError(f"unknown benchmark {', '.join(unknown)}; known are {', '.join(NAMES)}")
    scripts = find_benchmarks()
    chosen = [b for b in BENCHMARKS if (b.name in only if only else size in b.sizes)]
    if check and not targets_of(size, _device(), {b.name for b in chosen}):
        raise ConfigError(
            f"no target holds for {', '.join(only) or 'any benchmark'} at size {size} on {_device()}; leave --check out "
            "(most are for size household on a CPU, and for size paper on a GPU)"
        )
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    absent, failed = [], []
    with progress("benchmarks", len(chosen)) as advance:
        for benchmark in chosen:
            if not (scripts / benchmark.script).is_file():
                say(f"{benchmark.name}: this checkout has no benchmarks/{benchmark.script}; left out")
                absent.append(benchmark.name)
            elif (result := run_one(benchmark, scripts, out, size)) is None:
                failed.append(benchmark.name)
            else:
                results[benchmark.name] = result
            advance(1)
    return _tell(out, size, results, {"absent": absent, "failed": failed}, {b.name for b in chosen} if check else None)


def run_one(benchmark: Benchmark, scripts: Path, out: Path, size: Size) -> dict[str, Any] | None:
    """A benchmark's JSON line: read where it is done already, else run; None when it failed, which is said.

    Raises:
        ConfigError: when the folder holds a result of another size, command, machine or commit, or something else.
    """
    arguments = benchmark.arguments(size)
    measured_here = {
        "size": size,
        "command": ["python", f"benchmarks/{benchmark.script}", *arguments],
        "machine": machine_name(),
        "git_commit": git_commit(Path(__file__).parent),
    }
    done, log = out / f"{benchmark.name}.json", out / f"{benchmark.name}.log"
    if done.is_file():
        result = _result(done.read_text(encoding="utf-8"))
        if result is None:
            raise ConfigError(f"{done} is no benchmark's result; delete it")
        if other := _differences(result, measured_here):
            raise ConfigError(f"{done} is of {other}; name another --out, or delete it")
        say(f"{benchmark.name}: done already, {result.get('measured')} ({done})")
        return result
    say(f"{benchmark.name}: {benchmark.about}; what it says goes to {log}")
    command = [sys.executable, str(scripts / benchmark.script), *arguments]
    with log.open("w", encoding="utf-8") as errors:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    lines = ended.stdout.strip().splitlines()
    result = _result(lines[-1]) if lines and ended.returncode == 0 else None
    if result is None:
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["nothing was said"])[-1]
        say(f"{benchmark.name}: failed with exit status {ended.returncode}: {last[:300]} (all of it: {log})")
        return None
    result = {**result, **measured_here, "measured": datetime.now(UTC).isoformat(timespec="seconds")}
    write_text(done, json.dumps(result, indent=2) + "\n")
    return result


def _result(text: str) -> dict[str, Any] | None:
    """What a benchmark told, or None where that is something else."""
    try:
        result = json.loads(text)
    except ValueError:
        return None
    return result if isinstance(result, dict) else None


def _differences(result: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """In what a kept result differs from what would be measured now, for people; empty when in nothing."""

    def told(value: Any) -> str:
        return " ".join(value) if isinstance(value, list) else str(value)

    return "; ".join(
        f"{name.replace('_', ' ')} {told(result.get(name))}, not {told(value)}"
        for name, value in here.items()
        if result.get(name) != value
    )


def _device() -> Literal["cpu", "cuda"]:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _tell(
    out: Path, size: Size, results: dict[str, dict[str, Any]], left: dict[str, list[str]], checked: set[str] | None
) -> dict[str, Any]:
    """Write the JSON file and the figure of what was measured; the summary for the last line on stdout."""
    from pointalign.bench.figure import draw

    found = verdicts(results, size, _device(), set(results) if checked is None else checked)
    told = {
        "size": size,
        "benchmarks": results,
        **left,
        "targets": [{**v.target._asdict(), "measured": v.measured, "met": v.met} for v in found],
    }
    write_text(out / RESULTS_FILE, json.dumps(told, indent=2) + "\n")
    drawn = draw(ratios(results), found, out / FIGURE_FILE, f"size {size}, {machine_name()}")
    summary: dict[str, Any] = {
        "results": str(out / RESULTS_FILE),
        "figure": str(out / FIGURE_FILE) if drawn else None,
        "ran": list(results),
        **left,
        "complete": not left["failed"],
    }
    if checked is not None:
        for verdict in found:
            say(verdict.line())
        summary["missed"] = [f"{v.target.benchmark}.{v.target.key}" for v in found if not v.met]
        summary["complete"] = not left["failed"] and not summary["missed"]
    return summary
