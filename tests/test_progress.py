"""What a run says on stderr: from its first process alone, and not of what is quick."""

import io

import pytest
from rich.console import Console

from pointalign import progress as module
from pointalign.progress import is_first_process, progress, say


def test_one_process_of_several_speaks(monkeypatch, capsys):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert is_first_process() == (rank == "0")
        say("hello")
        with progress("work", 2) as advance:
            advance(2)
        shown = capsys.readouterr().err
        assert shown.startswith("hello\nwork: 2/2") if rank == "0" else shown == ""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("patience", [0.0, 3600.0])
def test_what_is_quick_is_not_shown(monkeypatch, capsys, terminal, patience):
    written = io.StringIO()
    if terminal:
        monkeypatch.setattr(module, "Console", lambda stderr: Console(file=written, force_terminal=True, width=120))
    with progress("work", 3, note=lambda: "going well", patience=patience) as advance:
        for _ in range(3):
            advance(1)
    shown = written.getvalue() if terminal else capsys.readouterr().err
    assert ("3/3" in shown) == (patience == 0.0)
    assert ("going well" in shown) == (patience == 0.0)
    if patience:
        assert shown == ""


def test_an_error_passes_through_a_bar_that_was_not_shown(monkeypatch):
    monkeypatch.setattr(module, "Console", lambda stderr: Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(ValueError, match="broken"), progress("work", 3, patience=10.0):
        raise ValueError("broken")


def test_steps_of_an_earlier_run_do_not_count_for_the_rate(monkeypatch, capsys):
    clock = iter([0.0, 100.0, 200.0, 300.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("work", 1000, before=800) as advance:
        for _ in range(3):
            advance(50)
    first, second, _ = capsys.readouterr().err.splitlines()
    assert first == "work: 850/1000, 0.5/s, 5:00 left"
    assert second == "work: 900/1000, 0.5/s, 3:20 left"


def test_what_is_found_done_is_forgotten_by_the_rate(monkeypatch, capsys):
    clock = iter([0.0, 0.001, 100.0, 200.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    with progress("work", 1000) as advance:
        for steps in (800, 50, 50):
            advance(steps)
    assert capsys.readouterr().err.splitlines()[-1] == "work: 900/1000, 0.5/s, 3:20 left"
