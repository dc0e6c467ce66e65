"""docs/using.md: every example runs, on a tiny model, and gives what the page shows."""

from __future__ import annotations

import doctest
import io
import re
import shlex
import shutil
from pathlib import Path

import pytest

from pointalign.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "using.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
COMMANDS = [
    (command, shown)
    for block in re.findall(r"```console\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)
]


@pytest.fixture
def checkout(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the examples, where commands may leave files."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("POINTALIGN_MODEL", str(tiny_model))
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(COMMANDS) == 6
    for command, shown in COMMANDS:
        typed, _, called = command.rpartition(" | ")
        if typed:
            said = shlex.split(typed)[1].replace("\\n", "\n")
            monkeypatch.setattr("sys.stdin", io.StringIO(said))
        words = shlex.split(called)
        assert words[0] == "pointalign"
        with pytest.raises(SystemExit) as ended:
            main(words[1:])
        captured = capsys.readouterr()
        assert ended.value.code == 0, captured.err
        assert doctest.OutputChecker().check_output(shown, captured.out, FLAGS), f"{command}\n{captured.out}"


def test_python(checkout: Path) -> None:
    test = doctest.DocTestParser().get_doctest(PAGE.read_text(encoding="utf-8"), {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 15
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    told: list[str] = []
    runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)
