"""`pointalign chat`: on a terminal with people, between pipes with scripts."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from commands import Command
from pointalign.answering.answerer import Answerer
from pointalign.chat import Talk, harmless, wrapped
from pointalign.errors import ConfigError, DataError
from pointalign.options import AS_THE_FILE_SAYS, Decoding

SHORT = Decoding(max_new_tokens=8)


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for number in range(2):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).random((60, 6 if number else 3)))
    return [str(tmp_path / "0.npy"), str(tmp_path / "1.npy")]


@pytest.fixture
def screen() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=60, color_system=None)


@pytest.fixture
def talk(model: Any, processor: Any, screen: Console, files: list[str]) -> Talk:
    talk = Talk(Answerer(model, processor, "tiny"), SHORT, AS_THE_FILE_SAYS, screen)
    talk.load(files[0])
    return talk


def shown(screen: Console) -> str:
    file: Any = screen.file
    text = file.getvalue()
    file.seek(0)
    file.truncate()
    return text


def test_people_see_the_file_what_was_done_and_the_answer(talk: Talk, screen: Console, files: list[str]) -> None:
    head = shown(screen)
    assert "0.npy" in head
    assert "no colour: filled with (0, 0, 0)" in " ".join(head.replace("│", " ").split())
    talk.converse(["What is this?", "", "  ", "And its colour?"])
    assert talk.conversation is not None
    assert [turn.question for turn in talk.conversation.turns] == ["What is this?", "And its colour?"]
    said = shown(screen)
    for turn in talk.conversation.turns:
        assert "".join(harmless(turn.answer).split()) in "".join(said.split())


def test_commands(talk: Talk, screen: Console, files: list[str]) -> None:
    assert talk.take("What is this?")
    first = talk.conversation
    assert first is not None
    assert talk.take("/reset")
    assert first.turns == []
    assert talk.take(f"/load {files[1]}")
    assert talk.conversation is not first
    assert talk.take("/help")
    text = shown(screen)
    assert "(what was said is forgotten)" in text
    assert "1.npy" in text
    assert "/load FILE" in text
    assert not talk.take("/quit")


def test_what_goes_wrong_is_told_and_the_talk_goes_on(talk: Talk, screen: Console) -> None:
    before = talk.conversation
    talk.converse(["/load missing.ply", "/load", "/laod x", "x" * 600, "What is this?", "/quit", "never asked"])
    text = " ".join(shown(screen).split())
    assert "no 3D file at missing.ply; check the path" in text
    assert "/load needs a file" in text
    assert "unknown command /laod; known are /load FILE" in text
    assert "shorten the question" in text
    assert talk.conversation is before
    assert before is not None
    assert [turn.question for turn in before.turns] == ["What is this?"]


def test_turns_that_are_forgotten_are_told(talk: Talk, screen: Console) -> None:
    talk.converse(letter * 110 for letter in "abcd")
    assert "(the oldest turn is forgotten, to stay within the model's context)" in " ".join(shown(screen).split())


def test_scripts_end_at_the_first_thing_that_goes_wrong(
    model: Any, processor: Any, files: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    talk = Talk(Answerer(model, processor), SHORT, AS_THE_FILE_SAYS, None)
    talk.load(files[1])
    with pytest.raises(DataError, match=r"missing\.ply"):
        talk.converse(["What is this?", "/load missing.ply", "What is this?"])
    captured = capsys.readouterr()
    assert talk.conversation is not None
    assert captured.out == harmless(talk.conversation.turns[0].answer) + "\n"
    assert "1.npy: 60 points; " in captured.err
    with pytest.raises(ConfigError, match="unknown command"):
        talk.converse(["/what"])


def test_what_a_terminal_would_obey_is_left_out() -> None:
    assert harmless("a\x1b[31mb\x07\r\nc\td\x9b1mé椅") == "a[31mb\nc\td1mé椅"


@pytest.mark.parametrize(
    ("pieces", "width", "expected"),
    [
        (["one two", " three"], 80, "one two three\n"),
        (["on", "e tw", "o three"], 8, "one two\nthree\n"),
        (["12345", "6789", " a"], 5, "123456789\na\n"),
        (["a\n", "\nb"], 5, "a\n\nb\n"),
        (["椅子 椅子 x"], 6, "椅子 \n椅子 x\n"),
        ([], 5, "\n"),
        (["abcde f"], 5, "abcde\nf\n"),
    ],
)
def test_words_are_kept_whole(pieces: list[str], width: int, expected: str) -> None:
    assert "".join(wrapped(pieces, width)) == expected


def test_words_come_as_soon_as_they_are_whole() -> None:
    asked = 0

    def pieces() -> Iterator[str]:
        nonlocal asked
        for piece in ("one ", "two ", "three"):
            asked += 1
            yield piece

    words = wrapped(pieces(), 80)
    assert next(words) == "one"
    assert asked == 1


# In a process of its own.


def arguments(file: str, tiny_model: Path, *options: str) -> list[str]:
    return ["chat", file, "--model", str(tiny_model), "--device", "cpu", *options]


def test_questions_in_and_answers_out(files: list[str], tiny_model: Path) -> None:
    process = Command(
        *arguments(files[0], tiny_model, "--max-new-tokens", "8", "--dtype", "float32"),
        stdin=f"What is this?\nAnd its colour?\n/load {files[1]}\nWhat is this?\n".encode(),
    )
    told, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    from pointalign.answering.conversation import Conversation
    from pointalign.answering.loading import load_answerer
    from pointalign.data.files import load_point_cloud

    expected = []
    for file, questions in ((files[0], ("What is this?", "And its colour?")), (files[1], ("What is this?",))):
        conversation = Conversation(load_answerer(tiny_model, "cpu", "float32"), load_point_cloud(file, 48), SHORT)
        expected += [harmless("".join(conversation.ask(question))) for question in questions]
    assert told == "".join(f"{answer}\n" for answer in expected)
    assert "\x1b" not in told + said
    assert "million weights" in said


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, arguments: list[str]) -> None:
        self.master, slave = pty.openpty()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80", "LINES": "30"}
        self.process = subprocess.Popen(
            arguments, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Read until a text has come since the last time."""
        deadline = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < deadline, self.text
            if select.select([self.master], [], [], 0.5)[0]:
                try:
                    self.text += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # the other end was closed
                    assert text in self.text, self.text
        self.text = self.text.partition(text)[2]


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_leaves(
    files: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    endless = tmp_path / "model"  # it knows no end symbol, so that an answer takes long enough to be stopped
    shutil.copytree(tiny_model, endless)
    settings = json.loads((endless / "generation_config.json").read_text())
    (endless / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": -1}))
    terminal = Terminal([sys.executable, "-m", "pointalign", *arguments(files[0], endless, "--max-new-tokens", "450")])
    try:
        terminal.wait_for("/help shows the commands")
        terminal.wait_for("> ")
        terminal.type("Hi\n")
        terminal.wait_for("Hi")
        time.sleep(0.3)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        time.sleep(1)  # a Ctrl-C in the moment between prompt and reading is heard only at the next key
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("Ctrl-D or /quit leaves")
        terminal.type("/help\n")
        terminal.wait_for("/load FILE")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)
