"""What a model made of each object, kept as it comes: JSON lines that a killed run and several processes go on from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pointalign.errors import DataError
from pointalign.evaluation.processes import ALONE, Processes
from pointalign.storage import taken_lock, write_text


class Ledger:
    """Rows of JSON by object, appended batch by batch; each process has a file of its own.

    `NAME.settings.json` says what the rows depend on, so that those of another model or question are never taken for these.
    A batch that a kill cut short is computed again as a whole, with the objects it had, so that the rows are those of a
    run that was never stopped.

    Args:
        folder: where the files lie.
        name: how their names begin.
        settings: whatever determines the rows: hashes of model and prompt, generation options.
        processes: this process among others.

    Raises:
        DataError: when the folder holds rows of other settings.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any], processes: Processes = ALONE) -> None:
        self.folder, self.name, self.processes = folder, name, processes
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        self.settings_file = folder / f"{name}.settings.json"
        self._open(self.settings)

    def _open(self, settings: dict[str, Any]) -> None:
        if not self.settings_file.is_file():
            write_text(self.settings_file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            return
        try:
            saved = json.loads(self.settings_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{self.settings_file} is broken ({error}); delete {self.folder} and run again") from error
        changed = [name.replace("_", " ") for name in {**saved, **settings} if saved.get(name) != settings.get(name)]
        if changed:
            raise DataError(
                f"{self.folder} holds {self.name} of a different run ({', '.join(changed)} differ); name another --out, or "
                "delete that folder"
            )

    def rows(self) -> dict[str, dict[str, Any]]:
        """All rows by object id; a line that was being written when a run was killed is left out.

        Raises:
            DataError: when another line is broken.
        """
        found = {}
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
            for number, line in enumerate(lines, start=1):
                try:
                    row = json.loads(line)
                    found[row["object_id"]] = row
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{path}, line {number} is broken ({error}); delete the file and run again"
                    ) from error
        return found

    def fill(
        self,
        object_ids: Sequence[str],
        batch_size: int,
        compute: Callable[[int, Sequence[str]], Sequence[Mapping[str, Any]]],
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Compute this process's share of the rows that are missing.

        Args:
            object_ids: all objects in a fixed order.
            batch_size: objects at a time.
            compute: from a batch's number and its objects to one row for each.
            advance: called with the number of objects done.

        Raises:
            DataError: when another process is at work on this share.
        """
        path = self.folder / f"{self.name}.{self.processes.rank}.jsonl"
        with taken_lock(path):
            _drop_unfinished_line(path)
            self._append_missing(path, object_ids, batch_size, compute, advance)

    def _append_missing(
        self,
        path: Path,
        object_ids: Sequence[str],
        batch_size: int,
        compute: Callable[[int, Sequence[str]], Sequence[Mapping[str, Any]]],
        advance: Callable[[int], None],
    ) -> None:
        done = self.rows()
        with path.open("a", encoding="utf-8") as file:
            for number, start in enumerate(range(0, len(object_ids), batch_size)):
                batch = object_ids[start : start + batch_size]
                if not self.processes.owns(number):
                    continue
                if any(object_id not in done for object_id in batch):
                    rows = compute(number, batch)
                    lines = [
                        json.dumps({"object_id": object_id, **row}, ensure_ascii=False) + "\n"
                        for object_id, row in zip(batch, rows, strict=True)
                    ]
                    file.write("".join(lines))
                    file.flush()
                advance(len(batch))

    def share(self, num_objects: int, batch_size: int) -> int:
        """How many of so many objects are this process's."""
        starts = range(0, num_objects, batch_size)
        return sum(
            min(batch_size, num_objects - start) for number, start in enumerate(starts) if self.processes.owns(number)
        )


def _drop_unfinished_line(path: Path) -> None:
    if path.is_file():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
