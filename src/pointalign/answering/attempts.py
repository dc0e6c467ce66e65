"""What workers died with in hand; a module of its own, so that the process that counts loads nothing else."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts, in a process of its own, how often each batch was begun and not ended; Ray tries it again for ever.

    A batch that ended is not counted: a piece that a worker died with is done again from its first batch on.
    """

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, first: int) -> int:
        """How often the batch that starts with this object has been taken in hand without an end, this time included."""
        self._begun[first] += 1
        return self._begun[first]

    def end(self, first: int) -> None:
        """It was answered."""
        self._begun[first] -= 1
