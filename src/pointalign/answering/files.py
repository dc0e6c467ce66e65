"""Answers about many files: read, asked in batches, written line by line, gone on with after a stop."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import RenderableType
from torch import Tensor

from pointalign.answering.answerer import Answerer
from pointalign.answering.cluster import OnRay
from pointalign.answering.inputs import STANDARD_INPUT, Input, find_inputs
from pointalign.answering.lines import WORKING_FOLDER, Answers, LinesFile, Row, StandardOutput
from pointalign.answering.loading import choose_device, choose_dtype, fetch_model, load_answerer, short_dtype
from pointalign.answering.reading import read_clouds, reading_processes
from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.provenance import model_fingerprint
from pointalign.models.checkpoint import resolve_model
from pointalign.options import ManyFiles, ModelChoice, Reading
from pointalign.progress import progress, say

# Clouds that wait for the model, in batches.
BATCHES_AHEAD = 2


@dataclass(frozen=True)
class Job:
    """What is wanted of each object.

    Args:
        name: what rows without error are called in the summary: "captions".
        settings: what the rows depend on besides model and file.
        rows: from the model, prepared clouds of a batch and the batch's number to one row for each cloud.
        draws: whether rows depend on a batch's number and on what else is in it, as drawn words do.
        check: refuses what this model cannot do for any object, before the first one.
        drawn: a row as people read it on a terminal, for rich.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Callable[[Answerer, Sequence[Tensor], int], list[Row]]
    check: Callable[[Answerer], None]
    drawn: Callable[[Row], RenderableType]
    draws: bool = False


def answer_files(paths: Sequence[str], job: Job, choice: ModelChoice, reading: Reading, many: ManyFiles) -> Row:
    """Write one line for each object: its path, and what is wanted of it or an error.

    A run that was stopped, in whatever way, is gone on with by calling this again.

    Args:
        paths: files, folders and patterns.
        job: what is wanted.
        choice: the model and what it computes on.
        reading: how files become clouds.
        many: how they are answered and where lines go.

    Returns:
        The number of rows of the job's kind and of errors, over all these objects; how many of them an earlier run wrote
        (`earlier`); the seconds that answering took, without loading the model; and the objects answered per second.

    Raises:
        PointAlignError: when no object is named, the model cannot be loaded, lines cannot be written, or an earlier run wrote
            one about standard input.
    """
    inputs = find_inputs(paths)
    if inputs[0].path == STANDARD_INPUT:
        if many.engine == "ray":
            raise ConfigError(
                "the workers of a Ray cluster cannot read standard input; give a file, or leave --engine out"
            )
        many = replace(many, workers=0)  # other processes have a standard input of their own
    name = resolve_model(choice.model)
    folder = fetch_model(name)
    if many.out in (None, "-"):
        lines: LinesFile | StandardOutput = StandardOutput(job.drawn if many.out is None else None)
    else:
        computed = {"model": model_fingerprint(str(folder)), "dtype": _dtype(choice, many)}
        settings = {**computed, **job.settings, **asdict(reading), WORKING_FOLDER: _start_of(inputs, Path(many.out))}
        lines = LinesFile(Path(many.out), settings, many.retry_errors)
    with closing(lines):
        if inputs[0].path == STANDARD_INPUT and inputs[0].key in lines.done:
            raise DataError(
                f"{many.out} has a line about standard input already, perhaps of another object; name another --out, or "
                f"append with >> {many.out} in place of --out"
            )
        left = [thing for thing in inputs if thing.key not in lines.done]
        run = _Run(job, many, lines)
        run.counts.update("errors" if lines.done[i.key] else job.name for i in inputs if i.key in lines.done)
        earlier = len(inputs) - len(left)
        if earlier:
            say(f"{earlier} of {len(inputs)} objects are in {many.out} already")
        engine = None
        if left and many.engine == "ray":
            engine = OnRay(name, folder, job, choice, reading, many)
        elif left:
            engine = _Here(name, job, choice, reading, many)
        start = time.monotonic()
        if engine is not None:
            # Batches are counted on from those of an earlier run, so that none draws as one of them did.
            run.write(engine, left, -(-(run.counts[job.name]) // many.batch_size))
        seconds = time.monotonic() - start
    if run.uncolored and engine is not None:
        filled = ", ".join(f"{value:g}" for value in engine.processor.missing_color)
        say(f"{run.uncolored} objects have no colour: filled with ({filled}), as in the model's own data")
    if run.counts["errors"]:
        say(f"{run.counts['errors']} of {len(inputs)} objects have no answer; the lines with `error` say why")
    found = {job.name: run.counts[job.name], "errors": run.counts["errors"], "earlier": earlier}
    return {**found, "seconds": round(seconds, 2), "objects_per_second": round(run.answered / max(seconds, 1e-9), 2)}


def _start_of(inputs: Sequence[Input], out: Path) -> str | None:
    """Where relative paths start from, as seen from the lines' folder, so that both may move; None where all are absolute."""
    if all(os.path.isabs(thing.path) or thing.path == STANDARD_INPUT for thing in inputs):
        return None
    return os.path.relpath(os.getcwd(), os.path.realpath(out.parent))


@dataclass
class _Run:
    """One run: what is wanted, where lines go, and what was counted."""

    job: Job
    many: ManyFiles
    lines: LinesFile | StandardOutput
    counts: Counter[str] = field(default_factory=Counter)
    uncolored: int = 0
    answered: int = 0

    def write(self, engine: _Here | OnRay, left: Sequence[Input], number: int) -> None:
        """Write a line for each object that is left: errors at once, answers as they get ready, in batches from a number on."""
        nothing = [{"path": thing.path, "error": thing.error} for thing in left if thing.error is not None]
        try:
            with (
                progress(self.job.name, len(left), self._note) as advance,
                closing(engine.batches([thing for thing in left if thing.error is None], number)) as batches,
            ):
                for rows, uncolored in chain([Answers(nothing)], batches):
                    self.lines.write(rows)
                    kinds = ["errors" if "error" in row else self.job.name for row in rows]
                    self.counts.update(kinds)
                    self.answered += kinds.count(self.job.name)
                    self.uncolored += uncolored
                    advance(len(rows))
        except KeyboardInterrupt:
            if isinstance(self.lines, LinesFile):
                say(
                    f"stopped; {self.counts.total()} objects are in {self.many.out}, the same command goes on from there"
                )
            raise

    def _note(self) -> str:
        return f"{self.counts['errors']} errors"


def _dtype(choice: ModelChoice, many: ManyFiles) -> str:
    """What lines say of the language model's numbers; each worker of a cluster chooses for its own device."""
    if many.engine == "ray":
        return choice.dtype or "each worker's own"
    return short_dtype(choose_dtype(choice.dtype, choose_device(choice.device)))


class _Here:
    """Answers by a model in this process; arguments and errors as in `answer_files`."""

    def __init__(self, name: str, job: Job, choice: ModelChoice, reading: Reading, many: ManyFiles) -> None:
        self.job, self.reading, self.many = job, reading, many
        self.answerer = load_answerer(name, choice.device, choice.dtype)
        self.processor = self.answerer.processor
        job.check(self.answerer)

    def batches(self, left: Sequence[Input], number: int) -> Generator[Answers, None, None]:
        """Rows as they get ready, one for each input: errors of reading at once, answers in batches from a number on."""
        paths = [thing.path for thing in left]
        options = self.reading.options(self.processor.num_points)
        processes = reading_processes(len(paths), self.many.workers)
        batch: list[tuple[str, Tensor]] = []
        uncolored, ahead = 0, BATCHES_AHEAD * self.many.batch_size
        with closing(read_clouds(paths, options, processes, ahead, self.job.draws)) as clouds:
            for path, cloud in clouds:
                try:
                    if isinstance(cloud, DataError):
                        raise cloud
                    batch.append((path, self.answerer.prepare(cloud)))
                    uncolored += cloud.colors is None
                except DataError as error:
                    yield Answers([{"path": path, "error": str(error)}])
                if len(batch) == self.many.batch_size:
                    yield Answers(self._answered(batch, number), uncolored)
                    batch, number, uncolored = [], number + 1, 0
        if batch:
            yield Answers(self._answered(batch, number), uncolored)

    def _answered(self, batch: Sequence[tuple[str, Tensor]], number: int) -> list[Row]:
        rows = self.job.rows(self.answerer, [cloud for _, cloud in batch], number)
        return [{"path": path, **row} for (path, _), row in zip(batch, rows, strict=True)]
