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
