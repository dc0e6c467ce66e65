"""`pointalign bench`: what is run, kept, held against targets and drawn; the benchmarks themselves have their own tests."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pointalign.bench import run as bench
from pointalign.bench.figure import draw
from pointalign.bench.targets import BENCHMARKS, NAMES, TARGETS, Ratio, ratios, verdicts
from pointalign.cli import main
from pointalign.device import machine_name
from pointalign.errors import ConfigError, PointAlignError
from pointalign.run_folder import git_commit

RESULT = {
    "speedup": 3.0,
    "memory_ratio": 0.45,
    "device": "a chip",
    "ours": {"quartiles": [1.0, 2.0]},
    "published": {"quartiles": [5.0, 6.0]},
}
SCRIPT = "import sys\nopen('ran', 'a').write(sys.argv[0] + chr(10))\nprint('words')\nprint({0!r})\n"


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two benchmarks, one of which fails, as the place where the command runs."""
    scripts = tmp_path / "benchmarks"
    scripts.mkdir()
    (scripts / "train_step.py").write_text(SCRIPT.format(json.dumps(RESULT)))
    (scripts / "encode.py").write_text("raise SystemExit('no encoder today')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "find_benchmarks", lambda: scripts)
    return tmp_path


def test_what_is_done_is_not_repeated(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = bench.run_bench(Path("out"), "household")
    assert (told["ran"], told["failed"], told["complete"]) == (["train_step"], ["encode", "encode_8192"], False)
    assert told["absent"] == ["train_stage", "generate", "load", "data"]
    said = capsys.readouterr().err
    assert "load: this checkout has no benchmarks/load.py; left out" in said
    assert "encode: failed with exit status 1: no encoder today" in said
    assert "benchmarks: 7/7" in said
    (checkout / "benchmarks" / "encode.py").write_text(SCRIPT.format(json.dumps({"speedup": 1.6})))
    told = bench.run_bench(Path("out"), "household")
    assert told["ran"] == ["train_step", "encode", "encode_8192"]
    assert told["complete"]
    assert [Path(line).stem for line in Path("ran").read_text().split()] == ["train_step", "encode", "encode"]
    written = json.loads(Path("out/bench.json").read_text())
    assert written["benchmarks"]["train_step"]["speedup"] == 3.0
    assert written["benchmarks"]["train_step"]["command"] == [
        "python",
        "benchmarks/train_step.py",
        "--size",
        "household",
    ]
    assert Path("out/performance.png").stat().st_size > 5000
    result = written["benchmarks"]["train_step"]
    assert result["machine"] == machine_name()
    assert result["git_commit"] == git_commit(Path(bench.__file__).parent)
    assert datetime.fromisoformat(result["measured"]) <= datetime.now(UTC)
    with pytest.raises(
        ConfigError, match=r"train_step.json is of size household, not tiny; command python [^;]+; name"
    ):
        bench.run_bench(Path("out"), "tiny", ["train_step"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"machine": "other chip"}, r"machine other chip, not "),
        ({"git_commit": "abc"}, r"git commit abc, not "),
        ({"command": ["python", "benchmarks/train_step.py"]}, r"command python benchmarks/train_step.py, not "),
    ],
)
def test_what_was_measured_otherwise_is_not_taken(checkout: Path, change: dict[str, Any], told: str) -> None:
    bench.run_bench(Path("out"), "household", ["train_step"])
    file = Path("out/train_step.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ConfigError, match=f"train_step.json is of {told}.*; name another --out, or delete it"):
        bench.run_bench(Path("out"), "household", ["train_step"])


def test_a_check_of_nothing_is_refused(checkout: Path) -> None:
    with pytest.raises(ConfigError, match="no target holds for data at size household on"):
        bench.run_bench(Path("out"), "household", ["data"], check=True)
    assert not Path("out").exists()


def test_the_command_checks_targets(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["bench", "--only", "train_step", "--check", "--out", "out"])
    output = capsys.readouterr()
    told = json.loads(output.out)
    assert end.value.code == 1
    if told["missed"] != []:  # a machine with a GPU has no targets at this size
        assert told["missed"] == ["train_step.speedup"]
        assert "MISSED train_step: steps per second, times the published procedure's: 3, to be at least 4" in output.err
        assert "met    train_step: peak memory, of the published procedure's: 0.45, to be at most 0.5" in output.err


@pytest.mark.parametrize("content", ["x", "[1]"])
def test_a_broken_result_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "data.json").write_text(content)
    benchmark = next(one for one in BENCHMARKS if one.name == "data")
    with pytest.raises(ConfigError, match=r"data.json is no benchmark's result; delete it"):
        bench.run_one(benchmark, tmp_path, tmp_path, "tiny")


def test_targets_by_hand() -> None:
    measured = {"train_stage": {"peak_memory_gib": 24.1}, "train_stage_float8": {"share_of_peak": 0.5}}
    found = verdicts(measured, "paper", "cuda", set(measured))
    assert [(v.target.key, v.measured, v.met) for v in found] == [
        ("share_of_peak", 0.5, True),
        ("seconds_for_10000_steps", None, False),
        ("peak_memory_gib", 24.1, False),
    ]
    assert "not measured, to be at most 300" in found[1].line()
    assert verdicts({}, "tiny", "cpu", set(NAMES)) == []
    started = verdicts({"load": {"ours": {"caption": {"seconds": 14.0}}}}, "household", "cpu", {"load", "data"})
    assert [(v.target.key, v.measured, v.met) for v in started] == [("ours.caption.seconds", 14.0, True)]
    assert {target.benchmark for target in TARGETS} <= set(NAMES)
    sizes = {benchmark.name: benchmark.sizes for benchmark in BENCHMARKS}
    assert all(target.size in sizes[target.benchmark] for target in TARGETS)


def test_ratios_and_their_spread() -> None:
    ours = {"clouds_per_second": 40.0, "quartiles": [30.0, 50.0]}
    rates = {"speedup": 4.0, "ours": ours, "published": {"quartiles": [8.0, 12.0]}}
    plain = {"speedup_grouping": 2.0, "speedup_grouping_quartiles": [1.5, 2.5], "other": 7, "device": "x"}
    assert ratios({"train_step": RESULT, "encode": rates, "data": plain}) == [
        Ratio("train_step: speedup", 3.0, 2.5, 6.0, True),
        Ratio("train_step: memory ratio", 0.45, 0.45, 0.45, False),
        Ratio("encode: speedup", 4.0, 2.5, 6.25, True),
        Ratio("data: speedup grouping", 2.0, 1.5, 2.5, True),
    ]


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not draw([], [], tmp_path / "figure.png", "nothing")
    assert not (tmp_path / "figure.png").exists()


def test_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: Any = tmp_path / "lib" / "site-packages" / "pointalign" / "bench" / "run.py"
    monkeypatch.setattr(bench, "__file__", str(installed))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PointAlignError, match="not part of the installed package: run `pointalign bench` in the root"):
        bench.run_bench(tmp_path / "out", "tiny")
    with pytest.raises(
        ConfigError, match="unknown benchmark speed; known are train_step, train_step_compiled, train_stage"
    ):
        bench.run_bench(tmp_path / "out", "tiny", ["speed"])
