"""Random access to clouds of 8,192 points by object id: a folder of .npy files, packed, and ways of packing not taken.

    python benchmarks/clouds.py                          # 2,048 clouds (0.4 GB), as they lie in the page cache and not
    python benchmarks/clouds.py --clouds 512 --reads 500

Each way reads the same objects in the same order, several rounds in turn; the best round counts. "cold" asks the system to
drop the files from its page cache first. The rivals are Parquet row groups of 1 or 16 clouds, as pyarrow reads them. It
ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import peak_memory

from pointalign.data.objaverse import NumpyClouds
from pointalign.data.pack import pack_clouds
from pointalign.data.packed import PackedClouds
from pointalign.data.sources import read_clouds

NUM_POINTS = 8192
ROUNDS = 3
BATCH = 16
LATENCY = 0.02
RIVALS: dict[str, dict[str, Any]] = {
    "groups of 1": {"row_group_size": 1, "compression": "none"},
    "groups of 1, zstd": {
        "row_group_size": 1,
        "compression": "zstd",
        "use_byte_stream_split": ["points.list.element"],
    },
    "groups of 16": {"row_group_size": 16, "compression": "none"},
}


def make_clouds(folder: Path, count: int) -> None:
    """Random clouds with colours of 256 levels a channel."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    for index in range(count):
        xyz = draw.standard_normal((NUM_POINTS, 3), dtype=np.float32)
        rgb = draw.integers(0, 256, (NUM_POINTS, 3)).astype(np.float32) / np.float32(255)
        np.save(
            folder / f"{index:032x}_8192.npy", np.concatenate([xyz / np.linalg.norm(xyz, axis=1).max(), rgb], axis=1)
        )


def write_rival(path: Path, clouds: NumpyClouds, options: dict[str, Any]) -> None:
    """All clouds in one Parquet file."""
    values = np.concatenate([clouds[object_id].ravel() for object_id in clouds])
    ends = np.arange(len(clouds) + 1, dtype=np.int32) * NUM_POINTS * 6
    table = pa.table({"object_id": list(clouds), "points": pa.ListArray.from_arrays(ends, values)})
    pq.write_table(table, path, use_dictionary=False, data_page_size=2**30, **options)


def rival_reader(path: Path, clouds: NumpyClouds, size: int) -> Callable[[str], Any]:
    """From an object id to its points, through pyarrow and a row group of some size; the file stays open."""
    file, rows = pq.ParquetFile(path), {object_id: row for row, object_id in enumerate(clouds)}

    def read(object_id: str) -> np.ndarray:
        group, row = divmod(rows[object_id], size)
        column = file.read_row_group(group, columns=["points"], use_threads=False)["points"]
        return column[row].values.to_numpy().reshape(-1, 6)

    return read


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def rates(ways: dict[str, Callable[[str], Any]], objects: Sequence[str], folder: Path | None) -> dict[str, float]:
    """Clouds per second of each way, the best of the rounds; with a folder, each round begins with its files on disk alone."""
    best = dict.fromkeys(ways, 0.0)
    for _ in range(ROUNDS):
        for name, read in ways.items():
            if folder is not None:
                forget(folder)
            start = time.perf_counter()
            for object_id in objects:
                read(object_id)
            best[name] = max(best[name], len(objects) / (time.perf_counter() - start))
    return {name: round(rate, 1) for name, rate in best.items()}


def far_rates(packed: Path, objects: Sequence[str]) -> dict[str, float]:
    """Clouds per second from storage that answers after 20 ms, one by one and a batch at once."""
    files = fsspec.filesystem("memory")
    files.put(str(packed), "/clouds", recursive=True)
    clouds = PackedClouds("memory://clouds")
    answer = files.cat_file

    def late(*arguments: Any, **options: Any) -> Any:
        time.sleep(LATENCY)
        return answer(*arguments, **options)

    files.cat_file = late
    start = time.perf_counter()
    for object_id in objects:
        clouds[object_id]
    single = time.perf_counter()
    for first in range(0, len(objects), BATCH):
        read_clouds(clouds, objects[first : first + BATCH])
    end = time.perf_counter()
    return {
        "one by one": round(len(objects) / (single - start), 1),
        f"{BATCH} at once": round(len(objects) / (end - single), 1),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all ways once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clouds", type=int, default=2048, help="how many are made")
    parser.add_argument("--reads", type=int, default=3000, help="random reads of a round")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        make_clouds(root / "npy", options.clouds)
        start = time.perf_counter()
        report = pack_clouds(root / "npy", root / "packed")
        packing = options.clouds / (time.perf_counter() - start)
        clouds, packed = NumpyClouds(root / "npy"), PackedClouds(root / "packed")
        for name, values in RIVALS.items():
            write_rival(root / f"{name}.parquet", clouds, values)
        ways: dict[str, Callable[[str], Any]] = {"npy": clouds.__getitem__, "packed": packed.__getitem__}
        ways |= {
            name: rival_reader(root / f"{name}.parquet", clouds, values["row_group_size"])
            for name, values in RIVALS.items()
        }
        objects = random.Random(0).choices(list(clouds), k=options.reads)
        for read in ways.values():
            assert np.array_equal(read(objects[0]), clouds[objects[0]])
        sizes = {name: (root / f"{name}.parquet").stat().st_size for name in RIVALS}
        result = {
            "benchmark": "clouds",
            "clouds": options.clouds,
            "packed_per_second": round(packing, 1),
            "kilobytes_per_cloud": {
                name: round(size / options.clouds / 1e3, 1)
                for name, size in {"npy": clouds.num_bytes, "packed": report["bytes"], **sizes}.items()
            },
            "clouds_per_second": rates(ways, objects, None),
            "clouds_per_second_cold": rates(ways, sorted(set(objects), key=objects.index), root),
            "clouds_per_second_20_ms_away": far_rates(root / "packed", objects[: 4 * BATCH]),
            "peak_megabytes": round(peak_memory("cpu") / 2**20),
            "machine": f"{os.cpu_count()} x {platform.machine()}, Python {platform.python_version()}, pyarrow {pa.__version__}",
        }
    for name in ways:
        rate, cold = (result[key][name] for key in ("clouds_per_second", "clouds_per_second_cold"))
        print(f"{name:18} {rate:10.0f}/s, cold {cold:8.0f}/s", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
