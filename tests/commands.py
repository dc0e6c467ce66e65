"""`pointalign` commands and scripts in processes of their own that begin at once.

Importing torch and transformers takes most of a short command's time. Here one process imports what commands need and computes
nothing; every command is a fork of it, with streams, environment, folder and session of its own, and runs and ends as
`python -m pointalign` does.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from threading import Thread
from typing import IO, Any

IMPORTED = (
    "pointalign.answering.loading",
    "pointalign.evaluation.run",
    "pointalign.figures",
    "pointalign.runs",
    "pointalign.verbs.answering",
    "pointalign.verbs.training",
    "sentence_transformers",
    "transformers.trainer",
)


class Command:
    """A `pointalign` command in a process of its own, with what the tests use of `subprocess.Popen`.

    Args:
        arguments: after the command's name.
        script: to run with these arguments in the command's place, as `python script` does.
        environment: beside the tests' own and one thread.
        folder: where it runs; where the tests do when None.
        stdin: what its standard input holds.
        log: a file that both its outputs are written to, in place of `stdout` and `stderr`.
        own_session: whether a signal to its group reaches nobody else.
        largest_file: in bytes; writing more fails as on a full disk.
    """

    def __init__(
        self,
        *arguments: str,
        script: Path | None = None,
        environment: dict[str, str] | None = None,
        folder: Path | None = None,
        stdin: bytes = b"",
        log: Path | None = None,
        own_session: bool = False,
        largest_file: int | None = None,
    ) -> None:
        (read_in, write_in), (read_out, write_out), (read_error, write_error) = os.pipe(), os.pipe(), os.pipe()
        self._ending, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {
            "arguments": [str(script or "pointalign"), *arguments],
            "imports_from": str(script.parent) if script else "",
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            "folder": str(folder or Path.cwd()),
            "log": log and str(log.absolute()),
            "own_session": own_session,
            "largest_file": largest_file,
        }
        given = [read_in, write_out, write_error, theirs.detach()]
        socket.send_fds(_starter(), [json.dumps(request).encode()], given)
        for descriptor in given:
            os.close(descriptor)
        self.stdout: IO[bytes] = os.fdopen(read_out, "rb")
        self.stderr: IO[bytes] = os.fdopen(read_error, "rb")
        weakref.finalize(self, _close, self.stdout, self.stderr, self._ending)
        self._log = log
        self.returncode: int | None = None
        self.pid = int(self._ending.recv(16))
        with os.fdopen(write_in, "wb") as file:
            file.write(stdin)

    def poll(self, seconds: float | None = 0) -> int | None:
        """How it ended, negative for the signal that ended it; None where it has not within so many seconds, None for ever."""
        if self.returncode is None and select.select([self._ending], [], [], seconds)[0]:
            self.returncode = int(self._ending.recv(16))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """How it ended; fails where it has not in time."""
        ended = self.poll(timeout)
        assert ended is not None, f"the command still runs after {timeout} seconds"
        return ended

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it wrote to standard output and standard error until its end."""
        errors: list[bytes] = []
        reading = Thread(target=lambda: errors.append(self.stderr.read()))
        reading.start()
        told = self.stdout.read()
        reading.join()
        self.wait(timeout)
        return told.decode(), errors[0].decode()

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        """Wait for what it brings about while it runs; fails where it ends before, or takes longer."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.poll() is None, self._log.read_text() if self._log else self.communicate()
            assert time.monotonic() < deadline, f"not within {seconds} seconds"
            time.sleep(0.002)

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """End it as `kill -9` does."""
        self.send_signal(signal.SIGKILL)


def _close(*files: IO[bytes] | socket.socket) -> None:
    for file in files:
        file.close()


@cache
def _starter() -> socket.socket:
    """The way to the process that starts commands; it ends when these tests do."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = subprocess.Popen(
        [sys.executable, __file__, str(theirs.fileno())],
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # a Ctrl-C is for the tests
    )
    theirs.close()
    atexit.register(process.wait)
    atexit.register(ours.close)
    return ours


def _serve(asked: socket.socket) -> None:
    """Start what is asked for, until nobody can ask any more; returns in each command's process, to be run there."""
    for name in IMPORTED:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those who watch commands end unheard
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, 1 << 20, 4)
        if not message:
            sys.exit()
        if os.fork() == 0:
            asked.close()
            return _watch(json.loads(message), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)


def _watch(request: dict[str, Any], descriptors: list[int]) -> None:
    """Fork the command, and tell of its process and its end; returns in that process."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    *streams, telling = descriptors
    if (pid := os.fork()) == 0:
        os.close(telling)
        return _become(request, streams)
    for stream in (0, 1, 2, *streams):
        os.close(stream)
    os.write(telling, str(pid).encode())
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.write(telling, str(ended).encode())
    os._exit(0)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Make this process what the command's own would have been when it had imported its modules."""
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    tempfile.tempdir = None  # or what an import found out would hold whatever the environment says
    os.chdir(request["folder"])
    if request["log"] is not None:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    if request["own_session"]:
        os.setsid()
    if (most := request["largest_file"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    sys.argv, sys.path[0] = request["arguments"], request["imports_from"]


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
    if sys.argv[0] == "pointalign":
        runpy.run_module("pointalign", run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
