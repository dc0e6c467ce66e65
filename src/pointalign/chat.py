"""A conversation about a 3D file in the terminal, or between pipes."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from pointalign.answering.answerer import Answerer
from pointalign.answering.conversation import Conversation
from pointalign.data.files import PointCloud, load_point_cloud
from pointalign.errors import ConfigError, DataError, PointAlignError
from pointalign.options import Decoding, Reading
from pointalign.progress import say

COMMANDS = {
    "/load FILE": "talk about another file",
    "/reset": "forget what was said, keep the file",
    "/help": "show this",
    "/quit": "leave, as Ctrl-D does",
}
PROMPT = "> "


def chat(file: str, answerer: Answerer, decoding: Decoding, reading: Reading) -> None:
    """Talk about a file until the questions end: on a terminal with people, else one question per line.

    Between pipes the answers alone go to standard output, and the first thing that goes wrong ends the conversation,
    because later answers would not be about what the script believes.

    Args:
        file: the first file.
        answerer: the model.
        decoding: how answers are written.
        reading: how files become clouds.

    Raises:
        PointAlignError: for a bad first file, and between pipes for whatever goes wrong.
    """
    if sys.stdin is None or sys.stdout is None:
        raise DataError("standard input or output is closed; open both to ask and be answered")
    console = Console() if sys.stdin.isatty() and sys.stdout.isatty() else None
    talk = Talk(answerer, decoding, reading, console)
    talk.load(file)
    talk.converse(sys.stdin if console is None else _typed_lines(console))


def _typed_lines(console: Console) -> Iterator[str]:
    with suppress(ImportError):
        import readline  # noqa: F401  (gives `input` its line editing and history)
    while True:
        try:
            yield input(PROMPT)
        except KeyboardInterrupt:
            console.print("\nCtrl-D or /quit leaves", highlight=False)
        except EOFError:
            console.print()
            return


class Talk:
    """What a line of a conversation does: a question, or a command with a slash in front.

    Args:
        answerer: the model.
        decoding: how answers are written.
        reading: how files become clouds.
        console: where people read; None between pipes.
    """

    def __init__(self, answerer: Answerer, decoding: Decoding, reading: Reading, console: Console | None) -> None:
        self.answerer = answerer
        self.decoding = decoding
        self.reading = reading
        self.console = console
        self.conversation: Conversation | None = None

    def load(self, file: str) -> None:
        """Turn to a file; what was said of another is forgotten.

        Raises:
            DataError: when it cannot be read; the conversation is then as it was.
        """
        processor = self.answerer.processor
        cloud = load_point_cloud(file, **self.reading.options(processor.num_points)).filled(processor.missing_color)
        self.conversation = Conversation(self.answerer, cloud, self.decoding)
        self._introduce(cloud)

    def converse(self, lines: Iterable[str]) -> None:
        """Go through lines until they end or one says /quit.

        Raises:
            PointAlignError: between pipes, for whatever goes wrong; people are told, and go on.
        """
        for line in lines:
            try:
                if not self.take(line.strip()):
                    return
            except PointAlignError as error:
                if self.console is None:
                    raise
                self.console.print(Text(str(error), style="red"))

    def take(self, line: str) -> bool:
        """Do what a line says; tells whether to go on.

        Raises:
            PointAlignError: for an unknown command, a bad file or a question that is too long.
        """
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word == "/load":
            if not rest:
                raise ConfigError("/load needs a file; give its path behind it")
            self.load(rest.strip())
        elif word == "/reset":
            assert self.conversation is not None
            self.conversation.reset()
            self._tell("what was said is forgotten")
        elif word == "/help":
            self._help()
        elif word.startswith("/"):
            raise ConfigError(f"unknown command {word}; known are {', '.join(COMMANDS)}")
        elif line:
            self._ask(line)
        return True

    def _ask(self, question: str) -> None:
        assert self.conversation is not None
        pieces = self.conversation.ask(question)
        try:
            if self.console is None:
                for piece in map(harmless, pieces):
                    print(piece, end="", flush=True)
                print(flush=True)
            else:
                for word in wrapped(map(harmless, pieces), self.console.width):
                    self.console.print(word, end="", style="bright_cyan", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            pieces.close()
            if self.console is None:
                raise
            self.console.print(Text(" (stopped)", style="dim"))
        if count := self.conversation.forgotten:
            oldest = "oldest turn is" if count == 1 else f"{count} oldest turns are"
            self._tell(f"the {oldest} forgotten, to stay within the model's context")

    def _introduce(self, cloud: PointCloud) -> None:
        if self.console is None:
            say(f"{cloud.source}: {'; '.join(cloud.notes)}")
            return
        told = Panel(
            Text("\n".join(cloud.notes)), title=Text(Path(cloud.source).name), title_align="left", expand=False
        )
        self.console.print(told)
        self.console.print("Ask something about it; /help shows the commands.", highlight=False)

    def _help(self) -> None:
        table = Table(box=None, show_header=False)
        for command, does in COMMANDS.items():
            table.add_row(command, does)
        (self.console or Console(stderr=True)).print(table)

    def _tell(self, text: str) -> None:
        if self.console is None:
            say(text)
        else:
            self.console.print(Text(f"({text})", style="dim"))


def harmless(text: str) -> str:
    """Text without the control characters that a terminal would obey; line ends and tabs stay."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")


def wrapped(pieces: Iterable[str], width: int) -> Iterator[str]:
    """Cut text that comes in pieces into words and the space between them, with line ends where a word would not fit.

    Args:
        pieces: the text; a word may come in several pieces.
        width: columns of a line.
    """
    column, word = 0, ""
    for letter in chain.from_iterable(chain(pieces, ["\n"])):
        if not letter.isspace():
            word += letter
            continue
        if word:
            if column and column + cell_len(word) > width:
                yield "\n"
                column = 0
            yield word
            column, word = column + cell_len(word), ""
        if letter == "\n" or column + 1 < width:
            yield letter
        column = 0 if letter == "\n" else column + 1
