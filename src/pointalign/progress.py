"""What a run says to people on stderr, in its first process alone.

Progress of long work is a bar on a terminal and a line now and then elsewhere, always with rate and time left.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
SECONDS_OF_RATE = 60.0


class _RateColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def is_first_process() -> bool:
    """Whether this process is the one of a distributed run that speaks and writes; true for a run of one process."""
    return int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """One line to people, said by the first process alone."""
    if is_first_process():
        print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(
    description: str, total: int, note: Callable[[], str] | None = None, patience: float = 0.0, before: int = 0
) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is.

    Args:
        description: what is being done.
        total: number of steps in all.
        note: gives a short text to show beside the numbers, for instance the loss.
        patience: seconds that pass before anything is shown, for work that is mostly quick.
        before: how many of the steps an earlier run has done, which say nothing of this one's rate.

    Yields:
        A function that is told how many steps were done since it was last called.
    """
    console = Console(stderr=True)
    if not is_first_process():
        yield lambda steps: None
        return
    if console.is_terminal:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        bars = Progress(*columns, console=console)
        task = bars.add_task(description, total=total, completed=before, note="")
        start = time.monotonic()

        def advance(steps: int) -> None:
            if not bars.live.is_started and time.monotonic() - start >= patience:
                bars.start()
            bars.update(task, advance=steps, note=note() if note else "")

        try:
            if not patience:
                bars.start()
            yield advance
        finally:
            if bars.live.is_started:
                bars.stop()
        return
    yield _lines(description, total, note, patience, before)


def _lines(
    description: str, total: int, note: Callable[[], str] | None, patience: float, before: int
) -> Callable[[int], None]:
    start = shown = time.monotonic()
    done = before
    # What was found done already goes by in no time, so the rate is that of the last while.
    marks = deque([(start, done)])

    def advance(steps: int) -> None:
        nonlocal done, shown
        done += steps
        now = time.monotonic()
        if (done < total and now - shown < SECONDS_BETWEEN_LINES) or now - start < patience:
            return
        shown = now
        while len(marks) > 1 and now - marks[0][0] > SECONDS_OF_RATE:
            marks.popleft()
        rate = max(done - marks[0][1], 1e-9) / max(now - marks[0][0], 1e-9)
        marks.append((now, done))
        left = f"{_duration((total - done) / rate)} left" if done < total else f"took {_duration(now - start)}"
        extra = f", {note()}" if note else ""
        print(f"{description}: {done}/{total}, {rate:.1f}/s, {left}{extra}", file=sys.stderr, flush=True)

    return advance
