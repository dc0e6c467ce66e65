"""The command `pointalign`: one verb per act; people are spoken to on stderr, programs get one JSON line on stdout."""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import tyro

from pointalign import __version__
from pointalign.config import check_seed, load_recipe, recipe_names
from pointalign.errors import PointAlignError
from pointalign.verbs.answering import Caption, Chat, Classify, Demo, Render
from pointalign.verbs.data import BuildExtra, BuildHousehold, CheckData, PackData
from pointalign.verbs.measuring import Bench, Compare, Evaluate, Judge, Probe
from pointalign.verbs.training import Bundle, ImportCheckpoint, Quickstart, Recipes, Sweep, Train

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141
VERBS: dict[str, Any] = {
    "train": Train,
    "sweep": Sweep,
    "evaluate": Evaluate,
    "compare": Compare,
    "probe": Probe,
    "bench": Bench,
    "chat": Chat,
    "caption": Caption,
    "classify": Classify,
    "render": Render,
    "judge": Judge,
    "demo": Demo,
    "quickstart": Quickstart,
    "recipes": Recipes,
    "bundle": Bundle,
    "import-checkpoint": ImportCheckpoint,
}
DATA_VERBS: dict[str, Any] = {"check": CheckData, "pack": PackData, "household": BuildHousehold, "extra": BuildExtra}

MORE = "`pointalign VERB --help` tells the rest; `--debug` shows where a failure came from."


def _usage() -> str:
    lines = [
        f"pointalign {__version__}: {_first_line(sys.modules['pointalign'])}",
        "",
        "usage: pointalign VERB ...",
        "",
    ]
    lines += _listed({**VERBS, **{f"data {name}": kind for name, kind in DATA_VERBS.items()}})
    return "\n".join([*lines, "", MORE])


def _listed(kinds: Mapping[str, Any]) -> list[str]:
    return [f"  {name:16} {_first_line(kind)}" for name, kind in kinds.items()]


def _first_line(thing: Any) -> str:
    return (thing.__doc__ or "").strip().splitlines()[0]


def _parse(arguments: list[str]) -> Any:
    verb, rest, prog = arguments[0], arguments[1:], "pointalign"
    kinds = VERBS
    if verb == "data" and rest:
        verb, rest, prog, kinds = rest[0], rest[1:], "pointalign data", DATA_VERBS
    if verb not in kinds:
        known = ", ".join([*VERBS, *(f"data {name}" for name in DATA_VERBS)])
        raise PointAlignError(f"unknown verb {' '.join(arguments[:2])!r}; known are {known}")
    parse = partial(tyro.cli, kinds[verb], prog=f"{prog} {verb}", args=rest)
    return parse() if kinds[verb] is not Train or not rest else _parse_training(parse, rest)


def _parse_training(parse: Callable[..., Train], rest: Sequence[str]) -> Train:
    """The recipe's own settings are what its options change, so it has to be known before they are read."""

    def read(named: str, **options: Any) -> Train:
        return parse(default=Train(recipe=tyro.MISSING, settings=load_recipe(named)), **options)

    if not rest[0].startswith("-"):
        return parse(default=Train(recipe=rest[0], settings=load_recipe(rest[0])))
    likely = [argument for argument in rest if _may_be_recipe(argument)]
    for named in likely:
        with suppress(SystemExit):  # of what is another option's value
            if (verb := read(named, console_outputs=False)).recipe == named:
                return verb
    return read((read(likely[-1]) if likely else parse()).recipe)


def _may_be_recipe(argument: str) -> bool:
    return argument in recipe_names() or (argument.endswith((".yaml", ".yml")) and os.path.isfile(argument))


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point; ends the process with 0, or 1 after one line that says what went wrong and what to do."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        try:
            status: Any = _run(given, debug)
        except SystemExit as ended:  # as tyro's help ends
            status = ended.code
        if sys.stdout is not None:  # as it is where it was closed
            sys.stdout.flush()
    except BrokenPipeError:
        if not _is_unread():
            raise
        _let_go_of_output()
        status = EXIT_UNREAD
    except OSError as error:  # of standard output; other files' are told where they come up
        if debug:
            raise
        print(f"pointalign: cannot write to standard output: {error.strerror}; free some space", file=sys.stderr)
        _let_go_of_output()
        status = EXIT_FAILED
    sys.exit(status)


def _let_go_of_output() -> None:
    """Write nothing more, or Python would complain at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _is_unread() -> bool:
    """Whether nobody reads our output any more (`| head`), of which most commands say nothing."""
    watched = select.poll()
    watched.register(1, 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _run(given: list[str], debug: bool) -> int:
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if given[0] == "data" and (len(given) == 1 or given[1] in ("-h", "--help")):
        print(
            "\n".join(
                ["usage: pointalign data VERB ...", "", *_listed(DATA_VERBS), "", MORE.replace("VERB", "data VERB")]
            )
        )
        return 0
    if given[0] == "--version":
        print(__version__)
        return 0
    try:
        verb = _parse(given)
        check_seed(getattr(verb, "seed", 0))
        result = verb.run()
    except PointAlignError as error:
        if debug:
            raise
        print(f"pointalign: {error}", file=sys.stderr)
        return EXIT_INTERRUPTED if type(error).__name__ == "RunStopped" else EXIT_FAILED
    except KeyboardInterrupt:
        print("pointalign: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if debug or (isinstance(error, BrokenPipeError) and _is_unread()):
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"pointalign: {error.strerror or error}{where}; check the path and the free space", file=sys.stderr)
        return EXIT_FAILED
    if result is None:
        return 0
    from pointalign.progress import is_first_process

    if is_first_process():
        print(json.dumps(result))
    # A check that was made and found something missing has its result on stdout all the same.
    return 0 if result.get("complete", True) else EXIT_FAILED
