"""What a run says to people on stderr, in its first process alone.

Progress of long work is a bar on a terminal and a line now and then elsewhere, always with rate and time left.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0


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
    description: str, total: int, note: Callable[[], str] | None = None, patience: float = 0.0
) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is.

    Args:
        description: what is being done.
        total: number of steps in all.
        note: gives a short text to show beside the numbers, for instance the loss.
        patience: seconds that pass before anything is shown, for work that is mostly quick.

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
        task = bars.add_task(description, total=total, note="")
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
    yield _lines(description, total, note, patience)


def _lines(description: str, total: int, note: Callable[[], str] | None, patience: float) -> Callable[[int], None]:
    start = shown = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, shown
        done += steps
        now = time.monotonic()
        if (done < total and now - shown < SECONDS_BETWEEN_LINES) or now - start < patience:
            return
        shown = now
        rate = done / max(now - start, 1e-9)
        left = f"{_duration((total - done) / rate)} left" if done < total else f"took {_duration(now - start)}"
        extra = f", {note()}" if note else ""
        print(f"{description}: {done}/{total}, {rate:.1f}/s, {left}{extra}", file=sys.stderr, flush=True)

    return advance
