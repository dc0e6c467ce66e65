"""README.md and docs/using.md: every example runs and gives what the page shows; every command of all pages is understood."""

from __future__ import annotations

import doctest
import io
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from pointalign.cli import _parse, main
from pointalign.data.household import ASSETS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "using.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]


def console(page: Path) -> list[tuple[str, str]]:
    """Commands of a page's console blocks, and what it shows of their standard output."""
    return [
        (command, shown)
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
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


def check_commands(
    commands: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command, shown in commands:
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


def test_commands(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    commands = console(PAGE)
    assert len(commands) == 6
    check_commands(commands, monkeypatch, capsys)


@pytest.mark.skipif(not (ASSETS / "household-135m").is_dir(), reason="this checkout lacks assets/household-135m")
def test_the_quick_start_on_the_bundled_model(
    checkout: Path, smollm2_cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("POINTALIGN_MODEL")
    monkeypatch.setenv("POINTALIGN_CACHE", str(smollm2_cache))
    served: list[Any] = []
    monkeypatch.setattr("pointalign.demo.serve", lambda *given: served.append(given))
    commands = console(README)
    assert [command.split("pointalign ")[1].split()[0] for command, _ in commands] == [
        "caption", "classify", "chat", "render", "demo"
    ]  # fmt: skip
    check_commands(commands, monkeypatch, capsys)
    assert len(served) == 1


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_command_is_understood(page: Path) -> None:
    """Verbs and options exist; what stands for something of the reader's own, in capitals, may be anything."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^(?:\$ | {4})?(?:.*\| )?pointalign (.+)$", text, re.MULTILINE):
        words = shlex.split(line.partition("  #")[0].partition(" # ")[0])
        if words and re.fullmatch(r"[a-z-]+", words[0]) and "..." not in words:
            _parse(words)


def test_python(checkout: Path) -> None:
    test = doctest.DocTestParser().get_doctest(PAGE.read_text(encoding="utf-8"), {}, PAGE.name, str(PAGE), 0)
    assert len(test.examples) > 15
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    told: list[str] = []
    runner.run(test, out=told.append)
    assert runner.failures == 0, "".join(told)
