"""Reading one 3D file, here or as the whole life of a process of its own: paths come in, clouds go out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from pointalign.data.files import PointCloud, load_point_cloud
from pointalign.data.files.source import reason
from pointalign.errors import DataError, PointAlignError


def read_cloud(path: str, options: Mapping[str, Any]) -> PointCloud | DataError:
    """A file's cloud, or what is wrong with the file.

    Whatever a reader trips over is told, so that one file never ends the work on the others.

    Args:
        path: the file.
        options: further arguments of `load_point_cloud`.
    """
    try:
        return load_point_cloud(path, **options)
    except PointAlignError as error:
        return DataError(str(error))
    except Exception as error:
        return DataError(f"cannot read {path}: {type(error).__name__}: {reason(error)}")


def send_cloud(stream: BinaryIO, cloud: PointCloud | DataError) -> None:
    """Write what `receive_cloud` reads: one line of JSON, then the numbers."""
    if isinstance(cloud, DataError):
        _send(stream, {"error": str(cloud)})
        return
    colors = () if cloud.colors is None else (np.ascontiguousarray(cloud.colors, np.float32).tobytes(),)
    head = {"points": len(cloud), "colored": bool(colors), "source": cloud.source, "notes": cloud.notes}
    head["unit"] = cloud.unit
    _send(stream, head, np.ascontiguousarray(cloud.points, np.float32).tobytes(), *colors)


def _send(stream: BinaryIO, head: Mapping[str, Any], *numbers: bytes) -> None:
    stream.write(json.dumps(head).encode() + b"\n" + b"".join(numbers))
    stream.flush()


def receive_cloud(stream: BinaryIO) -> PointCloud | DataError:
    """Read what `send_cloud` wrote.

    Raises:
        EOFError: when the process at the other end is gone.
    """
    line = stream.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    head = json.loads(line)
    if "error" in head:
        return DataError(head["error"])
    points, colors = (_numbers(stream, head["points"]) if there else None for there in (True, head["colored"]))
    assert points is not None
    return PointCloud(points, colors, head["source"], tuple(head["notes"]), head["unit"])


def _numbers(stream: BinaryIO, rows: int) -> np.ndarray:
    data = stream.read(rows * 12)
    if len(data) != rows * 12:
        raise EOFError
    return np.frombuffer(data, np.float32).reshape(rows, 3).copy()


def serve() -> None:
    """Read files until no more path comes: what a reading process does.

    What a library prints to standard output would end up between the clouds, so that it is turned away.
    """
    clouds = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for line in sys.stdin.buffer:
        task = json.loads(line)
        send_cloud(clouds, read_cloud(task["path"], task["options"]))
