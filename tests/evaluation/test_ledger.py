"""Rows that are kept as they come: what a kill, another process, another model or a broken disk does to them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from pointalign.errors import DataError
from pointalign.evaluation.ledger import Ledger
from pointalign.evaluation.processes import Processes

IDS = [f"o{number}" for number in range(7)]
SETTINGS = {"model": "m", "prompt": "p"}


class Killed(Exception):
    """Stands for a kill in the middle."""


def answers(calls: list[list[str]], until: int = 99) -> Any:
    def compute(number: int, object_ids: Sequence[str]) -> list[dict[str, Any]]:
        if len(calls) >= until:
            raise Killed
        calls.append(list(object_ids))
        return [{"said": f"{object_id} in batch {number}"} for object_id in object_ids]

    return compute


def test_a_run_goes_on_where_it_was_killed(tmp_path: Path) -> None:
    whole = Ledger(tmp_path / "whole", "answers", SETTINGS)
    whole.fill(IDS, 2, answers([]))
    with pytest.raises(Killed):
        Ledger(tmp_path / "killed", "answers", SETTINGS).fill(IDS, 2, answers([], until=2))
    calls: list[list[str]] = []
    ledger = Ledger(tmp_path / "killed", "answers", SETTINGS)
    done: list[int] = []
    ledger.fill(IDS, 2, answers(calls), done.append)
    assert calls == [["o4", "o5"], ["o6"]]
    assert done == [2, 2, 2, 1]
    assert ledger.rows() == whole.rows()
    assert list(ledger.rows()) == IDS


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_half_written_line_is_computed_again_with_its_whole_batch(tmp_path: Path, cut: int) -> None:
    ledger = Ledger(tmp_path, "answers", SETTINGS)
    ledger.fill(IDS, 3, answers([]))
    rows = ledger.rows()
    file = tmp_path / "answers.0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    assert ledger.rows().items() < rows.items() or cut == 1
    calls: list[list[str]] = []
    Ledger(tmp_path, "answers", SETTINGS).fill(IDS, 3, answers(calls))
    assert ledger.rows() == rows
    assert calls[-1] == ["o6"]
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_a_broken_line_elsewhere_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "answers", SETTINGS)
    ledger.fill(IDS, 3, answers([]))
    file = tmp_path / "answers.0.jsonl"
    file.write_text(file.read_text().replace('"o1"', "o1"))
    with pytest.raises(DataError, match=r"answers\.0\.jsonl, line 2 is broken .*; delete the file and run again"):
        ledger.rows()


def test_rows_of_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Ledger(tmp_path, "answers", SETTINGS)
    Ledger(tmp_path, "answers", dict(SETTINGS))
    with pytest.raises(
        DataError, match=r"holds answers of a different run \(model differ\); name another --out, or delete"
    ):
        Ledger(tmp_path, "answers", {**SETTINGS, "model": "n"})
    with pytest.raises(DataError, match=r"\(prompt, batch size differ\)"):
        Ledger(tmp_path, "answers", {**SETTINGS, "prompt": "q", "batch_size": 3})
    (tmp_path / "answers.settings.json").write_text("{")
    with pytest.raises(DataError, match="is broken"):
        Ledger(tmp_path, "answers", SETTINGS)


def test_two_processes_share_the_batches_and_give_the_same_rows(tmp_path: Path) -> None:
    alone = Ledger(tmp_path / "alone", "answers", SETTINGS)
    alone.fill(IDS, 2, answers([]))
    shares = []
    for rank in range(2):
        calls: list[list[str]] = []
        ledger = Ledger(tmp_path / "both", "answers", SETTINGS, Processes(rank, 2))
        ledger.fill(IDS, 2, answers(calls))
        shares.append(calls)
        assert ledger.share(len(IDS), 2) == sum(map(len, calls))
    assert shares == [[["o0", "o1"], ["o4", "o5"]], [["o2", "o3"], ["o6"]]]
    assert ledger.rows() == alone.rows()
    calls = []
    Ledger(tmp_path / "both", "answers", SETTINGS).fill(IDS, 2, answers(calls))
    assert not calls


def test_fewer_objects_before_are_no_hindrance(tmp_path: Path) -> None:
    Ledger(tmp_path / "grown", "answers", SETTINGS).fill(IDS[:5], 3, answers([]))
    calls: list[list[str]] = []
    grown = Ledger(tmp_path / "grown", "answers", SETTINGS)
    grown.fill(IDS, 3, answers(calls))
    whole = Ledger(tmp_path / "whole", "answers", SETTINGS)
    whole.fill(IDS, 3, answers([]))
    assert calls == [["o3", "o4", "o5"], ["o6"]]
    assert grown.rows() == whole.rows()


def test_two_processes_do_not_write_one_share(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "twice", "answers", SETTINGS)

    def while_another_begins(number: int, object_ids: Sequence[str]) -> list[dict[str, Any]]:
        with pytest.raises(DataError, match=r"another process is writing .*answers\.0\.jsonl; wait for it"):
            Ledger(tmp_path / "twice", "answers", SETTINGS).fill(IDS, 2, answers([]))
        return [{"said": object_id} for object_id in object_ids]

    ledger.fill(IDS, 4, while_another_begins)
    assert len(ledger.rows()) == len(IDS)
    ledger.fill(IDS, 4, answers([], until=0))
