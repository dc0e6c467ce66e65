"""What the benchmarks share: procedures that take turns in processes of their own, spreads, memory, device."""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch

PROCEDURES = ("ours", "published")


def device_name() -> str:
    """Where it runs."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(device: str) -> int:
    """Bytes: allocated on the GPU since the count was reset, or resident in this process ever.

    On Linux the latter is VmHWM: ru_maxrss also counts what the process that started this one held then.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def quartiles(values: Sequence[float], digits: int = 4) -> list[float]:
    """First and third quartile, within what was measured; of one value that value twice."""
    if len(values) == 1:
        return [round(values[0], digits)] * 2
    return [round(value, digits) for value in statistics.quantiles(values, n=4, method="inclusive")[::2]]


def own_output() -> TextIO:
    """Standard output for a worker's lines alone: what else is printed goes to standard error from now on."""
    told = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return told


class Worker:
    """A process that runs one procedure of a benchmark, a stretch for every line it is sent.

    Args:
        script: the benchmark's file, which takes `--worker PROCEDURE`.
        procedure: one of `PROCEDURES`.
        arguments: of the benchmark's command.
    """

    def __init__(self, script: str, procedure: str, arguments: Sequence[str]) -> None:
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  (open as long as the process writes into it)
        self.process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", script, *arguments, "--worker", procedure],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.procedure = procedure
        self.seconds: list[float] = []
        self.busy: list[float] = []

    def hear(self) -> dict[str, Any]:
        """Its next line.

        Raises:
            SystemExit: when it ended instead, with what it said on standard error.
        """
        line = self.process.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        if not line:
            status = self.process.wait()  # it closes its output before it says why, and writes where reading begins
            self.errors.seek(0)
            raise SystemExit(
                f"the {self.procedure} procedure ended early, exit status {status}:\n{self.errors.read()[-4000:]}"
            )
        return json.loads(line)

    def go(self) -> None:
        """Let it go on."""
        self.process.stdin.write("\n")  # pyright: ignore[reportOptionalMemberAccess]
        self.process.stdin.flush()  # pyright: ignore[reportOptionalMemberAccess]
