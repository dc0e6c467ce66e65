"""Clouds of many files as they get ready, read by other processes while the model computes."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pointalign.answering.reader import read_cloud, receive_cloud
from pointalign.data.files import PointCloud
from pointalign.errors import DataError

Read = tuple[str, PointCloud | DataError]
# Fewer files are read here: a process takes a second or two to start.
WORTH_A_PROCESS = 24
MOST_PROCESSES = 8


def reading_processes(num_files: int, wanted: int | None) -> int:
    """How many processes read so many files: as many as wanted, else one for every two cores and 24 files.

    The model needs the other half of the cores where it computes on them.
    """
    if wanted is not None:
        return min(wanted, num_files)
    return min(num_files // WORTH_A_PROCESS, (os.cpu_count() or 2) // 2, MOST_PROCESSES)


def read_clouds(
    paths: Sequence[str], options: Mapping[str, Any], processes: int, ahead: int, in_order: bool = False
) -> Generator[Read, None, None]:
    """Read files, each once.

    Args:
        paths: the files.
        options: further arguments of `load_point_cloud`.
        processes: how many read; 0 reads here, one file whenever one is asked for.
        ahead: clouds that may wait to be asked for.
        in_order: a file that takes long holds up those behind it.

    Yields:
        Path and cloud, or what is wrong with the file; in the order of the paths when they are read here or `in_order`, else
        as they get ready.
    """
    if not processes:
        for path in paths:
            yield path, read_cloud(path, options)
        return
    window = max(ahead, processes) if in_order else len(paths) + processes
    readers = _Readers(paths, options, processes, ahead, window)
    early: dict[int, Read] = {}
    try:
        for number in range(len(paths)):
            if not in_order:
                yield readers.ready.get()[1]
                continue
            while number not in early:
                place, read = readers.ready.get()
                early[place] = read
            readers.let_begin(number + 1 + window)
            yield early.pop(number)
    finally:
        readers.stop()


class _Readers:
    """Threads that hand paths to one process each, and put what comes back into a queue of bounded length.

    A process that dies while it reads a file, for want of memory or in a library's machine code, costs that file alone.
    """

    def __init__(
        self, paths: Sequence[str], options: Mapping[str, Any], processes: int, ahead: int, limit: int
    ) -> None:
        self.ready: queue.Queue[tuple[int, Read]] = queue.Queue(max(ahead, 1))
        self._todo = iter(enumerate(paths))
        self._options = dict(options)
        self._limit, self._begun = limit, 0
        self._lock = threading.Condition()
        self._stopping = False
        self._running: set[subprocess.Popen[bytes]] = set()
        for _ in range(processes):
            threading.Thread(target=self._feed, daemon=True).start()

    def _next(self) -> tuple[int, str] | None:
        with self._lock:
            self._lock.wait_for(lambda: self._stopping or self._begun < self._limit)
            self._begun += 1
            return None if self._stopping else next(self._todo, None)

    def let_begin(self, limit: int) -> None:
        """Let so many files be begun; each thread asks for one more than there are."""
        with self._lock:
            self._limit = limit
            self._lock.notify_all()

    def _feed(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        while (todo := self._next()) is not None:
            place, path = todo
            try:
                process = process or self._started()
                if process is None:
                    return
                cloud = _asked(process, path, self._options)
            except (OSError, EOFError, ValueError) as error:
                told = f"no process can be started to read it ({error})" if process is None else _ending(process)
                cloud = DataError(f"{path}: {told}; make the file smaller or convert it to another format")
                process = None
            self.ready.put((place, (path, cloud)))
        if process is not None:
            with suppress(OSError):
                process.communicate()

    def _started(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stopping:
                return None
            process = start_reader()
            self._running.add(process)
            return process

    def stop(self) -> None:
        """End the processes, whatever they do, and let the threads run out."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()
            for process in self._running:
                process.kill()
        with suppress(queue.Empty):
            while True:
                self.ready.get_nowait()


class TimedReader:
    """Reads one file at a time in a process of its own, which ends when a file takes too long; another then takes its place.

    Args:
        folder: what paths start from; the process, and so what it says of a file, knows of no folder above.
        seconds: that a file may take.
    """

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = start_reader(folder)
        self._is_up = False

    def read(self, path: str, options: Mapping[str, Any]) -> PointCloud | DataError:
        """A file's cloud, or what is wrong with the file.

        Args:
            path: from the folder on.
            options: further arguments of `load_point_cloud`.
        """
        with self._lock:
            if self._process is None:
                return DataError(f"{path}: nothing is read any more")
            process, late = self._process, threading.Event()

            def give_up() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(self.seconds, give_up)
            try:
                if not self._is_up:
                    # A file that is not there is answered at once: starting up is not the visitor's time.
                    _asked(process, "", options)
                    self._is_up = True
                timer.start()
                return _asked(process, path, options)
            except (OSError, EOFError, ValueError):
                ended = _ending(process)
                told = f"reading it took more than {self.seconds:g} seconds" if late.is_set() else ended
                self._process, self._is_up = start_reader(self.folder), False
                return DataError(f"{path}: {told}; make the file smaller or convert it to another format")
            finally:
                timer.cancel()

    def close(self) -> None:
        """End the process, whatever it does; a file that is being read fails."""
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            if (process := self._process) is not None:
                process.kill()
                process.communicate()
            self._process = None


def start_reader(folder: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a process that reads files.

    Args:
        folder: what paths start from; the working folder when None.
    """
    code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pointalign.answering.reader import serve; serve()"
    return subprocess.Popen(
        [sys.executable, "-P", "-c", code, json.dumps([place or os.getcwd() for place in sys.path])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is for this process alone, which stops the others
    )


def _asked(process: subprocess.Popen[bytes], path: str, options: Mapping[str, Any]) -> PointCloud | DataError:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"path": path, "options": options}).encode() + b"\n")
    process.stdin.flush()
    return receive_cloud(process.stdout)  # pyright: ignore[reportArgumentType]


def _ending(process: subprocess.Popen[bytes]) -> str:
    process.communicate()  # waits for its end, and closes the ways to it
    status = process.returncode
    how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    return f"the process that read it ended with {how}"
