"""`--engine ray`: workers of a cluster answer, whatever happens to them, and every object has exactly one line."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from pointalign.answering.attempts import Attempts
from pointalign.answering.cluster import TRIES, OnRay, Task, Worker
from pointalign.answering.files import answer_files
from pointalign.answering.jobs import caption_job, classify_job
from pointalign.cli import main
from pointalign.options import AS_THE_FILE_SAYS, Decoding, ManyFiles, ModelChoice

OBJECTS = 12
DECODING = Decoding(max_new_tokens=24)
MODEL = ModelChoice(dtype="float32", device="cpu")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files, two of them bad; the tiny model is the default."""
    monkeypatch.setenv("POINTALIGN_MODEL", str(tiny_model))
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "things").mkdir()
    for number in range(OBJECTS):
        array = np.random.default_rng(number).random((60, 6 if number % 2 else 3))
        np.save(tmp_path / "things" / f"{number}.npy", array)
    (tmp_path / "things" / "empty.ply").write_bytes(b"")
    np.save(tmp_path / "things" / "few.npy", np.zeros((3, 3)))
    return tmp_path


def rows(path: str) -> dict[str, dict[str, Any]]:
    """The lines of a file by path; a path with two lines is a failure."""
    read = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    assert len({row["path"] for row in read}) == len(read)
    return {row["path"]: row for row in read}


def started() -> subprocess.Popen[str]:
    command = ["caption", "things", "--out", "ray.jsonl", "--engine", "ray", "--ray-workers", "2", "--batch-size", "2"]
    choices = ["--max-new-tokens", str(DECODING.max_new_tokens), "--dtype", "float32", "--device", "cpu"]
    return subprocess.Popen(
        [sys.executable, "-m", "pointalign", *command, *choices],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    deadline = time.monotonic() + 400
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


def line_count() -> int:
    return Path("ray.jsonl").read_bytes().count(b"\n") if Path("ray.jsonl").is_file() else 0


def named(process: subprocess.Popen[str], part: str) -> list[psutil.Process]:
    """Processes below this one whose command line has a part."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            found += [child] if part in " ".join(child.cmdline()) else []
        except psutil.Error:  # it has ended meanwhile
            continue
    return found


@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None, reason='Ray is not installed: pip install "pointalign[ray]"'
)
@pytest.mark.timeout(1500)
def test_stopped_and_with_a_worker_killed_every_object_has_one_line(folder: Path) -> None:
    answer_files(["things"], caption_job(decoding=DECODING), MODEL, AS_THE_FILE_SAYS, ManyFiles(out="local.jsonl"))
    lines = Path("local.jsonl").read_bytes().splitlines(keepends=True)
    Path("ray.jsonl").write_bytes(b"".join(lines[:3]))
    shutil.copy("local.jsonl.settings.json", "ray.jsonl.settings.json")

    process = started()
    assert process.stderr is not None
    assert process.stderr.readline() == f"3 of {OBJECTS + 2} objects are in ray.jsonl already\n"
    assert process.stderr.readline().startswith("2 Ray workers on ")
    for server in named(process, "dashboard.py"):
        # The process is there, but serves no page and tells nobody of anything.
        assert {"--minimal", "--modules-to-load=UsageStatsHead"} & set(server.cmdline())
        assert server.environ()["RAY_USAGE_STATS_ENABLED"] == "0"
    cluster = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=400)
    assert (process.returncode, out) == (130, "")
    assert errors.splitlines() == [
        "stopped; 3 objects are in ray.jsonl, the same command goes on from there",
        "pointalign: interrupted",
    ]
    assert not psutil.wait_procs(cluster, timeout=100)[1]

    process = started()
    wait_for(lambda: line_count() > 3, process)
    named(process, "ray::MapWorker")[0].kill()
    out, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    (summary,) = map(json.loads, out.splitlines())
    assert (summary["captions"], summary["errors"], summary["earlier"]) == (OBJECTS, 2, 3)
    # Ray itself says nothing.
    ours = (
        "3 of 14 objects are in",
        "2 Ray workers on",
        "captions: ",
        "5 objects have no colour",
        "2 of 14 objects have no",
    )
    assert [line for line in errors.splitlines() if not line.startswith(ours)] == []
    assert Path("ray.jsonl").read_bytes().startswith(b"".join(lines[:3]))
    assert rows("ray.jsonl") == rows("local.jsonl")


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """A worker's rows for some paths, without a cluster: by job, paths and how often they were begun already."""

    def work(job: Any, paths: list[str], begun: int = 0) -> dict[str, Any]:
        counted = Attempts()
        for _ in range(begun):
            counted.begin(0)
        monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(get=lambda value: value))
        attempts = SimpleNamespace(begin=SimpleNamespace(remote=counted.begin), end=SimpleNamespace(remote=counted.end))
        task = Task(os.environ["POINTALIGN_MODEL"], job, MODEL, AS_THE_FILE_SAYS, 0, 4, Path.cwd(), 0, attempts)
        batch = {"index": np.arange(len(paths)), "path": np.array([os.fsencode(path) for path in paths])}
        answered = Worker(task)(batch)
        return {**answered, "row": [json.loads(row) for row in answered["row"]]}

    return work


def test_a_worker_answers_as_this_process(work: Any, folder: Path) -> None:
    paths = ["things/few.npy", *(f"things/{number}.npy" for number in range(3))]
    job = classify_job(["a", "b"])
    answer_files(paths, job, MODEL, AS_THE_FILE_SAYS, ManyFiles(out="local.jsonl"))
    answered = work(job, paths)
    assert answered["index"] == [0, 1, 2, 3]
    assert answered["colored"] == [True, False, True, False]
    assert {path: {"path": path, **row} for path, row in zip(paths, answered["row"], strict=True)} == rows(
        "local.jsonl"
    )


def test_nothing_that_can_be_read_needs_no_cluster() -> None:
    assert list(OnRay.batches(OnRay.__new__(OnRay), [], 0)) == []


def test_a_batch_whose_worker_always_dies_is_given_up(work: Any) -> None:
    assert "caption" in work(caption_job(decoding=DECODING), ["things/0.npy"], begun=TRIES - 1)["row"][0]
    given_up = work(caption_job(decoding=DECODING), ["things/0.npy", "things/few.npy"], begun=TRIES)["row"]
    assert [row["error"].partition(":")[0] for row in given_up] == ["things/0.npy", "things/few.npy"]
    assert "a worker died 4 times with it in hand; try again with --retry-errors" in given_up[0]["error"]


def test_what_ends_the_work_is_handed_back(work: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTALIGN_MODEL", "nowhere/at/all")
    answered = work(caption_job(), ["things/0.npy", "things/1.npy"])
    (row,) = answered["row"]
    assert "found no checkpoint 'nowhere/at/all'" in row["failure"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--engine", "ray"], '--engine ray needs Ray: pip install "pointalign[ray]"'),
        (["--ray-workers", "2"], "ray_workers 2 goes with engine ray; give 1 or more, and --engine ray"),
        (["--engine", "ray", "--ray-workers", "0"], "ray_workers 0 goes with engine ray"),
    ],
)
def test_without_ray_and_with_odd_options_one_line_says_what_to_do(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], told: str
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit) as ended:
        main(["caption", "things/0.npy", *options])
    assert ended.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if told in line]
    assert line.startswith("pointalign: ") or "Traceback" not in line
