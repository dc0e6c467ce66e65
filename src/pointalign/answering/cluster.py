"""Answering many files on Ray Data: workers hold the model, batches come back in any order, and this process writes them."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pointalign.answering.answerer import Answerer
from pointalign.answering.attempts import Attempts
from pointalign.answering.inputs import Input
from pointalign.answering.lines import Answers, Row
from pointalign.answering.loading import load_answerer, quiet_transformers
from pointalign.answering.reader import read_cloud
from pointalign.answering.reading import TimedReader
from pointalign.data.files import PointCloud
from pointalign.errors import DataError, MissingDependencyError, PointAlignError
from pointalign.models.pointalign import PointAlignConfig
from pointalign.models.processing import load_processor
from pointalign.options import ManyFiles, ModelChoice, Reading
from pointalign.progress import say

if TYPE_CHECKING:
    import numpy as np

    from pointalign.answering.files import Job

# A piece is what Ray hands out, and what is done again when a worker dies; it keeps books of so many without trouble.
MOST_PIECES = 10_000
# How often the worker that has a batch in hand may die before its objects are given up.
TRIES = 4
READING_SECONDS = 600.0


@dataclass(frozen=True)
class Task:
    """What a worker has to know.

    Args:
        model: folder or Hub id.
        job: what is wanted of each object.
        choice: what the model computes on.
        reading: how files become clouds.
        readers: processes that read files for the worker; 0 for none.
        batch_size: objects that the model answers at a time.
        folder: what paths start from.
        number: of the first batch, for sampling.
        attempts: Ray's handle of an `Attempts`.
    """

    model: str
    job: Job
    choice: ModelChoice
    reading: Reading
    readers: int
    batch_size: int
    folder: Path
    number: int = 0
    attempts: Any = None


class Worker:
    """A process of the cluster with a model of its own.

    Whatever ends the work is handed back as a row of `failure`: what is raised here would be tried again.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.failure = ""
        try:
            os.chdir(task.folder)
            self.answerer = load_answerer(task.model, task.choice.device, task.choice.dtype)
            self.readers = [TimedReader(task.folder, READING_SECONDS) for _ in range(task.readers)]
        except Exception as error:
            self.failure = _told(error)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        """Answer a batch of `index` and `path`; gives `index`, the rows as JSON in `row`, and whether a cloud had a colour."""
        indices = batch["index"].tolist()
        try:
            found = {} if self.failure else self._answered([os.fsdecode(path) for path in batch["path"]], indices[0])
        except Exception as error:
            self.failure = _told(error)
        if self.failure:
            return {"index": indices[:1], "row": [json.dumps({"failure": self.failure})], "colored": [True]}
        rows, colored = zip(*(found[place] for place in range(len(indices))), strict=True)
        return {"index": indices, "row": [json.dumps(row) for row in rows], "colored": list(colored)}

    def _answered(self, paths: Sequence[str], first: int) -> dict[int, tuple[Row, bool]]:
        import ray  # pyright: ignore[reportMissingImports]

        begun: Any = ray.get(self.task.attempts.begin.remote(first))
        if begun > TRIES:
            told = f"a worker died {TRIES} times with it in hand; try again with --retry-errors and --batch-size 1"
            return {place: ({"error": f"{path}: {told}"}, True) for place, path in enumerate(paths)}
        found: dict[int, tuple[Row, bool]] = {}
        places, clouds, colored = [], [], []
        for place, cloud in enumerate(self._read(paths)):
            try:
                if isinstance(cloud, DataError):
                    raise cloud
                clouds.append(self.answerer.prepare(cloud))
                places.append(place)
                colored.append(cloud.colors is not None)
            except DataError as error:
                found[place] = {"error": str(error)}, True
        number = self.task.number + first // self.task.batch_size
        rows = self.task.job.rows(self.answerer, clouds, number) if clouds else []
        self.task.attempts.end.remote(first)
        return found | dict(zip(places, zip(rows, colored, strict=True), strict=True))

    def _read(self, paths: Sequence[str]) -> list[PointCloud | DataError]:
        options = self.task.reading.options(self.answerer.processor.num_points)
        if not self.readers:
            return [read_cloud(path, options) for path in paths]
        count = len(self.readers)
        clouds: list[Any] = [None] * len(paths)

        def share(number: int) -> None:
            for place in range(number, len(paths), count):
                clouds[place] = self.readers[number].read(paths[place], options)

        with ThreadPoolExecutor(count) as threads:
            list(threads.map(share, range(count)))
        return clouds


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, PointAlignError) else f"{type(error).__name__}: {error}"


class OnRay:
    """Answers by the workers of a Ray cluster: the one that $RAY_ADDRESS names, else one of this machine alone.

    Args:
        model: folder or Hub id, readable from every machine of the cluster, as the files are.
        folder: the model's local folder.
        job: what is wanted of each object.
        choice: what the model computes on.
        reading: how files become clouds.
        many: how many workers and processes that read.

    Raises:
        PointAlignError: when Ray is not installed, or the model cannot do the job.
    """

    def __init__(
        self, model: str, folder: Path, job: Job, choice: ModelChoice, reading: Reading, many: ManyFiles
    ) -> None:
        self.ray = _import_ray()
        # The model's weights are for the workers alone.
        with quiet_transformers():
            self.processor = load_processor(str(folder))
            config = PointAlignConfig.from_pretrained(folder)
        job.check(Answerer(SimpleNamespace(config=config), self.processor))
        self.many = many
        self.task = Task(
            model=os.path.abspath(model) if os.path.isdir(model) else model,
            job=job,
            choice=choice,
            reading=reading,
            readers=1 if many.workers is None else many.workers,
            batch_size=many.batch_size,
            folder=Path.cwd(),
        )

    def batches(self, left: Sequence[Input], number: int) -> Generator[Answers, None, None]:
        """Rows as they get ready, one for each input.

        Args:
            left: the objects.
            number: of the first batch, for sampling.

        Raises:
            PointAlignError: when a worker cannot work at all.
        """
        if not left:
            return
        self.task = replace(self.task, number=number)
        waiting = dict(enumerate(thing.path for thing in left))
        for indices, rows, colored in self._results([os.fsencode(path) for path in waiting.values()]):
            # Ray gives each result once, also when a worker dies that had handed some of a piece over; this makes sure.
            fresh = [place for place, index in enumerate(indices) if index in waiting]
            found = [{"path": waiting.pop(indices[place]), **rows[place]} for place in fresh]
            yield Answers(found, sum(not colored[place] for place in fresh))

    def _results(self, paths: Sequence[bytes]) -> Iterator[tuple[list[int], list[Row], list[bool]]]:
        import pyarrow as pa

        size = self.many.batch_size * math.ceil(len(paths) / self.many.batch_size / MOST_PIECES)
        pieces = [
            pa.table(
                {"index": pa.array(range(start, min(start + size, len(paths)))), "path": paths[start : start + size]}
            )
            for start in range(0, len(paths), size)
        ]
        with _only_python_speaks(), self._cluster() as (workers, gpus):
            attempts = self.ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Attempts).remote()
            # Actors of Ray Data start again, and do again what they had in hand, without being told.
            answered = self.ray.data.from_arrow(pieces).map_batches(
                Worker,
                fn_constructor_args=(replace(self.task, attempts=attempts),),
                batch_size=self.many.batch_size,
                compute=self.ray.data.ActorPoolStrategy(size=workers),
                num_cpus=1,
                num_gpus=gpus,
            )
            for batch in answered.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
                rows = [json.loads(row) for row in batch["row"].to_pylist()]
                if failures := [row["failure"] for row in rows if "failure" in row]:
                    raise DataError(failures[0])
                yield batch["index"].to_pylist(), rows, batch["colored"].to_pylist()

    @contextmanager
    def _cluster(self) -> Iterator[tuple[int, float]]:
        """Join or start a cluster; gives the number of workers, and each one's share of an accelerator."""
        address = os.environ.get("RAY_ADDRESS")
        cores = max(os.cpu_count() or 1, self.many.ray_workers or 1)
        alone = {"address": "local", "include_dashboard": False, "num_cpus": cores}
        quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        try:
            self.ray.init(**({"address": address} if address else alone), **quiet)
            context = self.ray.data.DataContext.get_current()
            context.enable_progress_bars = context.print_on_execution_start = False
            there = self.ray.cluster_resources()
            gpus = 0 if (self.task.choice.device or "cuda").startswith("cpu") else int(there.get("GPU", 0))
            workers = self.many.ray_workers or gpus or max(int(there.get("CPU", 1)) // 2, 1)
            on = f"{there.get('CPU', 0):.0f} cores and {gpus} GPUs"
            say(f"{workers} Ray workers on {on} answer with {self.task.model}")
            yield workers, 1 / math.ceil(workers / gpus) if gpus else 0
        except (self.ray.exceptions.RayError, ConnectionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"Ray gave up: {reason}; look after the cluster, and run the same command again") from error
        finally:
            self.ray.shutdown()


@contextmanager
def _only_python_speaks() -> Iterator[None]:
    """Keep what Ray's machine code writes to standard error away from people; Python's `sys.stderr` goes where it went."""
    python, ours = sys.stderr, os.dup(2)
    python.flush()
    try:
        is_ours = python.fileno() == 2
    except (OSError, ValueError):
        is_ours = False
    with open(os.devnull, "w") as nowhere, os.fdopen(os.dup(ours), "w", buffering=1) as heard:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = heard if is_ours else python
        try:
            yield
        finally:
            sys.stderr = python
            os.dup2(ours, 2)
            os.close(ours)


def _import_ray() -> Any:
    # It would tell its makers of every start, and print of every worker that dies.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": "."}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingDependencyError('--engine ray needs Ray: pip install "pointalign[ray]"') from error
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    return ray
