"""Progress of long work on stderr: a bar on a terminal, a line now and then elsewhere; always with rate and time left."""

from __future__ import annotations

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


@contextmanager
def progress(description: str, total: int, note: Callable[[], str] | None = None) -> Iterator[Callable[[int], None]]:
    """Show how far a piece of work is.

    Args:
        description: what is being done.
        total: number of steps in all.
        note: gives a short text to show beside the numbers, for instance the loss.

    Yields:
        A function that is told how many steps were done since it was last called.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        ]
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(description, total=total, note="")
            yield lambda steps: bars.update(task, advance=steps, note=note() if note else "")
        return
    yield _lines(description, total, note)


def _lines(description: str, total: int, note: Callable[[], str] | None) -> Callable[[int], None]:
    start = shown = time.monotonic()
    done = 0

    def advance(steps: int) -> None:
        nonlocal done, shown
        done += steps
        now = time.monotonic()
        if done < total and now - shown < SECONDS_BETWEEN_LINES:
            return
        shown = now
        rate = done / max(now - start, 1e-9)
        left = f"{_duration((total - done) / rate)} left" if done < total else f"took {_duration(now - start)}"
        extra = f", {note()}" if note else ""
        print(f"{description}: {done}/{total}, {rate:.1f}/s, {left}{extra}", file=sys.stderr, flush=True)

    return advance
