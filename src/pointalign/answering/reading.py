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
    paths: Sequence[str], options: Mapping[str, Any], processes: int, ahead: int
) -> Generator[Read, None, None]:
    """Read files, each once.

    Args:
        paths: the files.
        options: further arguments of `load_point_cloud`.
        processes: how many read; 0 reads here, one file whenever one is asked for.
        ahead: clouds that may wait to be asked for.

    Yields:
        Path and cloud, or what is wrong with the file; in the order of the paths when they are read here, else as they get
        ready.
    """
    if not processes:
        for path in paths:
            yield path, read_cloud(path, options)
        return
    readers = _Readers(paths, options, processes, ahead)
    try:
        for _ in paths:
            yield readers.ready.get()
    finally:
        readers.stop()


class _Readers:
    """Threads that hand paths to one process each, and put what comes back into a queue of bounded length.

    A process that dies while it reads a file, for want of memory or in a library's machine code, costs that file alone.
    """

    def __init__(self, paths: Sequence[str], options: Mapping[str, Any], processes: int, ahead: int) -> None:
        self.ready: queue.Queue[Read] = queue.Queue(max(ahead, 1))
        self._todo = iter(paths)
        self._options = dict(options)
        self._lock = threading.Lock()
        self._stopping = False
        self._running: set[subprocess.Popen[bytes]] = set()
        for _ in range(processes):
            threading.Thread(target=self._feed, daemon=True).start()

    def _next(self) -> str | None:
        with self._lock:
            return None if self._stopping else next(self._todo, None)

    def _feed(self) -> None:
        process: subprocess.Popen[bytes] | None = None
        while (path := self._next()) is not None:
            try:
                process = process or self._started()
                if process is None:
                    return
                cloud = _asked(process, path, self._options)
            except (OSError, EOFError, ValueError) as error:
                told = f"no process can be started to read it ({error})" if process is None else _ending(process)
                cloud = DataError(f"{path}: {told}; make the file smaller or convert it to another format")
                process = None
            self.ready.put((path, cloud))
        if process is not None:
            with suppress(OSError):
                process.communicate()

    def _started(self) -> subprocess.Popen[bytes] | None:
        code = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from pointalign.answering.reader import serve; serve()"
        with self._lock:
            if self._stopping:
                return None
            process = subprocess.Popen(
                [sys.executable, "-c", code, json.dumps(sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                start_new_session=True,  # Ctrl-C is for this process alone, which stops the others
            )
            self._running.add(process)
            return process

    def stop(self) -> None:
        """End the processes, whatever they do, and let the threads run out."""
        with self._lock:
            self._stopping = True
            for process in self._running:
                process.kill()
        with suppress(queue.Empty):
            while True:
                self.ready.get_nowait()


def _asked(process: subprocess.Popen[bytes], path: str, options: Mapping[str, Any]) -> PointCloud | DataError:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"path": path, "options": options}).encode() + b"\n")
    process.stdin.flush()
    return receive_cloud(process.stdout)  # pyright: ignore[reportArgumentType]


def _ending(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    how = f"status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
    return f"the process that read it ended with {how}"
