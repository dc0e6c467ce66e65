"""How often work was taken in hand; a module of its own, so that the process that counts loads nothing else."""

from __future__ import annotations

from collections import Counter


class Attempts:
    """Counts, in a process of its own, how often each batch was taken in hand; Ray tries one whose worker dies for ever."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def begin(self, first: int) -> int:
        """How often the batch that starts with this object is taken in hand now."""
        self._counts[first] += 1
        return self._counts[first]
