"""`pointalign caption`: every input has exactly one line, whatever is wrong with files, and however a run ends."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from commands import Command
from pointalign.answering.loading import load_answerer
from pointalign.cli import main
from pointalign.options import Decoding

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SHORT = ("--max-new-tokens", "7")


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with five good files and three bad ones; the tiny model is the default."""
    monkeypatch.setenv("POINTALIGN_MODEL", str(tiny_model))
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        path = tmp_path / "things" / f"{number}.npy"
        path.parent.mkdir(exist_ok=True)
        np.save(path, np.random.default_rng(number).random((60, 6 if number % 2 else 3)))
    (tmp_path / "things" / "broken.glb").write_bytes((EXAMPLES / "chair.glb").read_bytes()[:500])
    (tmp_path / "things" / "empty.ply").write_bytes(b"")
    np.save(tmp_path / "things" / "few.npy", np.zeros((3, 3)))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[dict[str, Any]], str]:
    """Exit status, the JSON lines of stdout, and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return int(str(ended.value.code)), [json.loads(line) for line in captured.out.splitlines()], captured.err


def rows(path: str = "out.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_every_input_has_one_line_and_bad_files_stop_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = ("things", "things/*.npy", "./things/1.npy", "missing.obj", "*.stl")
    status, (summary,), err = run(capsys, "caption", *paths, "--out", "out.jsonl", "--batch-size", "2", *SHORT)
    assert status == 0
    assert Counter(len(row) for row in rows()) == {2: 10}
    assert {row["path"]: "caption" in row for row in rows()} == {
        **{f"things/{number}.npy": True for number in range(5)},
        **{f"things/{name}": False for name in ("broken.glb", "empty.ply", "few.npy")},
        "missing.obj": False,
        "*.stl": False,
    }
    assert len(rows()) == 10
    errors = {row["path"]: row["error"] for row in rows() if "error" in row}
    assert "the cloud has 3 points" in errors["things/few.npy"]
    assert "no 3D file at missing.obj" in errors["missing.obj"]
    assert not any("\n" in error for error in errors.values())
    assert summary.keys() == {"captions", "errors", "earlier", "seconds", "objects_per_second"}
    assert (summary["captions"], summary["errors"], summary["earlier"]) == (5, 5, 0)
    assert summary["objects_per_second"] > 0
    assert err.count("million weights") == 1
    assert "captions: 10/10" in err
    assert "5 errors" in err
    assert "3 objects have no colour: filled with (0, 0, 0), as in the model's own data" in err


def test_batches_and_processes_caption_as_one_by_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # In bfloat16 a batch of another size rounds differently, which a model of random weights shows.
    exact = (*SHORT, "--dtype", "float32")
    one_by_one = run(capsys, "caption", "things", "--batch-size", "1", *exact)[1]
    batched = run(capsys, "caption", "things", "--batch-size", "4", "--workers", "2", *exact)[1]
    answerer = load_answerer(dtype="float32")
    direct = [
        answerer.ask(
            [answerer.prepare(np.load(f"things/{number}.npy"))], "Caption this 3D model in detail.", Decoding(7)
        )
        for number in range(5)
    ]
    told = {row["path"]: row for row in one_by_one[:-1]}
    assert told == {row["path"]: row for row in batched[:-1]}
    assert [told[f"things/{number}.npy"]["caption"] for number in range(5)] == [said[0].text for said in direct]
    assert [row["path"] for row in one_by_one[:-1]] == [f"things/{name}" for name in sorted(os.listdir("things"))]


def test_a_file_that_is_there_is_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ("caption", "things", "--out", "sub/out.jsonl", *SHORT)
    run(capsys, "caption", "things/0.npy", "things/few.npy", "--out", "sub/out.jsonl", *SHORT)
    first = rows("sub/out.jsonl")
    assert len(first) == 2
    _, (summary,), err = run(capsys, *command)
    assert rows("sub/out.jsonl")[:2] == first
    assert Counter(row["path"] for row in rows("sub/out.jsonl")).most_common(1)[0][1] == 1
    assert (summary["captions"], summary["errors"], summary["earlier"]) == (5, 3, 2)
    assert "2 of 8 objects are in sub/out.jsonl already" in err
    # All are there now: nothing is loaded, nothing is written.
    before = Path("sub/out.jsonl").read_bytes()
    _, (summary,), err = run(capsys, *command)
    assert (summary["captions"], summary["errors"], summary["earlier"]) == (5, 3, 8)
    assert "million weights" not in err
    assert Path("sub/out.jsonl").read_bytes() == before


def test_the_same_path_in_another_folder_is_another_object(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for scene in ("a", "b"):
        Path(scene).mkdir()
        shutil.copy(f"things/{ord(scene) % 5}.npy", f"{scene}/x.npy")
    os.chdir("a")
    assert run(capsys, "caption", "x.npy", "--out", "../all.jsonl", *SHORT)[0] == 0
    os.chdir("../b")
    status, _, err = run(capsys, "caption", "x.npy", "--out", "../all.jsonl", *SHORT)
    assert status == 1
    assert "all.jsonl holds answers with another working folder" in err
    assert len(rows("../all.jsonl")) == 1
    # Of a file that says nothing of it, as older ones do, the folder is taken for the one that we are in.
    told = json.loads(Path("../all.jsonl.settings.json").read_text())
    assert told.pop("working_folder") == "a"
    Path("../all.jsonl.settings.json").write_text(json.dumps(told))
    os.chdir("../a")
    refused = run(capsys, "caption", "x.npy", "--out", "../all.jsonl", "--question", "What?", *SHORT)
    assert refused[0] == 1
    assert json.loads(Path("../all.jsonl.settings.json").read_text()) == told, "a refused run writes nothing"
    assert run(capsys, "caption", "x.npy", "--out", "../all.jsonl", *SHORT)[1][0]["earlier"] == 1
    # Paths that are whole and paths that are not may follow each other, also in a folder that a link leads to.
    (folder / "link").symlink_to(folder / "things")
    for number, (path, out) in enumerate(
        (
            (str(folder / "things" / "0.npy"), "../things/d.jsonl"),
            ("../things/1.npy", "../things/d.jsonl"),
            (str(folder / "things" / "1.npy"), "../link/d.jsonl"),
        )
    ):
        assert run(capsys, "caption", path, "--out", out, *SHORT)[1][0]["earlier"] == number // 2
    os.chdir("../b")
    whole = str(folder / "things" / "1.npy")
    assert run(capsys, "caption", whole, "--out", "../things/d.jsonl", *SHORT)[1][0]["earlier"] == 1
    # Whole paths mean the same everywhere, and what lies together may move.
    for scene in ("a", "b"):
        assert run(capsys, "caption", str(folder / scene / "x.npy"), "--out", "../whole.jsonl", *SHORT)[0] == 0
        os.chdir("../a")
    assert len(rows("../whole.jsonl")) == 2
    os.chdir("..")
    run(capsys, "caption", "a", "--out", "lines/a.jsonl", *SHORT)
    Path("moved").mkdir()
    for name in ("a", "lines"):
        shutil.move(name, "moved")
    os.chdir("moved")
    assert run(capsys, "caption", "a", "--out", "lines/a.jsonl", *SHORT)[1][0]["earlier"] == 1


@pytest.mark.parametrize("verb", [("caption", "--question", "caf\udce9?"), ("classify", "--labels", "chair,ch\udce9")])
def test_words_that_are_not_utf_8_are_one_line(
    folder: Path, verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = run(capsys, verb[0], "things/1.npy", *verb[1:])
    assert status == 1
    assert err.splitlines()[-1].endswith("?' is not UTF-8 text; type it anew, or save the file as UTF-8")


def test_closed_output_is_told_before_anything_is_loaded(folder: Path) -> None:
    ran = subprocess.run(
        f"{sys.executable} -m pointalign caption things/1.npy >&-", shell=True, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert ran.stderr.splitlines() == ["pointalign: standard output is closed; give --out FILE to keep the lines"]


def test_errors_are_tried_again_when_asked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "caption", "things", "--out", "out.jsonl", *SHORT)
    np.save("things/few.npy", np.random.default_rng(9).random((60, 3)))
    assert run(capsys, "caption", "things", "--out", "out.jsonl", *SHORT)[1][0]["errors"] == 3
    _, (summary,), _ = run(capsys, "caption", "things", "--out", "out.jsonl", "--retry-errors", *SHORT)
    assert (summary["captions"], summary["errors"], summary["earlier"]) == (6, 2, 5)
    assert sorted(row["path"] for row in rows()) == sorted(f"things/{name}" for name in os.listdir("things"))


def test_captions_of_another_model_or_question_are_refused(
    folder: Path, tiny_model: Path, build_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "caption", "things", "--out", "out.jsonl", *SHORT)
    shutil.copytree(tiny_model, "copy")
    unused = ("--seed", "3", "--top-p", "0.5")
    assert run(capsys, "caption", "things", "--out", "out.jsonl", "--model", "copy", *unused, *SHORT)[0] == 0
    build_model(seed=1).save_pretrained("copy")
    for options in (
        ("--model", "copy", *SHORT),
        ("--question", "What?", *SHORT),
        ("--max-new-tokens", "8"),
        ("--up", "z"),
        ("--dtype", "bfloat16" if Path("out.jsonl.settings.json").read_text().count("float32") else "float32"),
        ("--temperature", "1"),
    ):
        status, lines, err = run(capsys, "caption", "things", "--out", "out.jsonl", *SHORT, *options)
        assert (status, lines) == (1, [])
        assert "out.jsonl holds answers with another" in err


BAD_COMMANDS = {
    ("caption",): "no object is named",
    ("caption", "things", "--batch-size", "0"): "batch_size 0 leaves no object",
    ("caption", "things", "--workers", "-1"): "workers -1 is less than none",
    ("caption", "things", "--max-new-tokens", "0"): "max_new_tokens 0 leaves no room",
    ("caption", "things", "--max-new-tokens", "600"): "together more than the language model's 512",
    ("caption", "things", "--temperature", "-1"): "temperature -1.0 is out of range",
    ("caption", "things", "--retry-errors"): "retry_errors needs the file",
    ("caption", "-", "things"): "standard input (-) goes alone",
    ("caption", "things", "--out", "."): "cannot write '.': it is a folder; name a file",
    ("caption", "things", "--model", "nowhere"): "found no checkpoint 'nowhere'",
    ("caption", "things", "--device", "abacus"): "cannot compute on device 'abacus'",
    ("caption", "things", "--dtype", "int4"): "unknown dtype 'int4'",
    ("caption", "things", "--out", "things"): "cannot write things: Is a directory",
    ("classify", "things"): "name some with --labels or --labels-file",
    ("classify", "things", "--labels", " , "): "--labels names no label",
    ("classify", "things", "--labels-file", "none.txt"): "cannot read none.txt: No such file",
    ("classify", "things", "--labels", "a,b", "--top", "0"): "top 0 leaves no label",
    ("classify", "things", "--labels", "x" * 600): "together more than the language model's 512",
    ("chat", "missing.ply"): "no 3D file at missing.ply",
}


@pytest.mark.parametrize("command", BAD_COMMANDS, ids=lambda command: " ".join(command)[:60])
def test_a_bad_command_ends_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    status, lines, err = run(capsys, *command)
    assert (status, lines) == (1, [])
    assert BAD_COMMANDS[command] in err.splitlines()[-1]
    assert "Traceback" not in err


# In processes of their own: how a run ends.


def test_drawn_captions_are_repeated_by_their_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """However many processes read the files, and where a run goes on; greedy ones depend on no seed."""
    shutil.copy(EXAMPLES / "chair.glb", "things/0.glb")  # takes longest, and comes first
    drawn = ("caption", "things", "--temperature", "1", "--seed", "5", "--batch-size", "2", *SHORT)
    run(capsys, *drawn, "--out", "here.jsonl", "--workers", "0")
    run(capsys, *drawn, "--out", "there.jsonl", "--workers", "3")
    captions = {row["path"]: row.get("caption") for row in rows("here.jsonl")}
    assert {row["path"]: row.get("caption") for row in rows("there.jsonl")} == captions
    assert len(set(captions.values())) == 7, "six good files and the errors' None"
    lines = Path("here.jsonl").read_text().splitlines(keepends=True)
    good = [number for number, line in enumerate(lines) if '"caption"' in line]
    Path("here.jsonl").write_text("".join(lines[: good[2]]))
    run(capsys, *drawn, "--out", "here.jsonl", "--workers", "0")
    assert {row["path"]: row.get("caption") for row in rows("here.jsonl")} == captions


def test_standard_input_is_read_here_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = Command("caption", "-", "--workers", "1", *SHORT, stdin=(folder / "things" / "1.npy").read_bytes())
    told, _ = process.communicate(timeout=120)
    assert "caption" in json.loads(told.splitlines()[0])
    status, _, err = run(capsys, "caption", "-", "--engine", "ray")
    assert status == 1
    assert err.splitlines()[-1].startswith(
        "pointalign: the workers of a Ray cluster cannot read standard input; give a"
    )


def test_standard_input_is_never_taken_for_an_earlier_one(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(name: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "things" / name).read_bytes())))
        status, _, err = run(capsys, "caption", "-", "--out", "out.jsonl", "--workers", "0", *SHORT)
        return status, err.splitlines()[-1]

    assert ask("1.npy")[0] == 0
    first = rows()
    status, last = ask("3.npy")
    assert (status, rows()) == (1, first)
    assert last.startswith("pointalign: out.jsonl has a line about standard input already")


def written_lines(path: Path) -> int:
    """How many are written whole."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def readers() -> set[int]:
    """Processes anywhere that read files for others."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"pointalign.answering.reader" in path.read_bytes():
                found.add(int(path.parent.name))
        except OSError:  # it has ended meanwhile
            continue
    return found


def test_killed_at_any_moment_and_run_again_every_input_has_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(5, 40):
        np.save(f"things/{number}.npy", np.random.default_rng(number).random((60, 6)))
    command = ("caption", "things", "--out", "out.jsonl", "--batch-size", "1", "--max-new-tokens", "60")
    before = readers()
    process = Command(*command, "--workers", "2")
    process.until(lambda: written_lines(folder / "out.jsonl") >= 4)
    process.kill()
    process.communicate()
    assert 4 <= len(rows()) < 43
    with open("out.jsonl", "ab") as file:
        file.write(b'{"path": "things/9.npy", "capt')
    _, (summary,), _ = run(capsys, *command)
    assert (summary["captions"], summary["errors"]) == (40, 3)
    assert sorted(row["path"] for row in rows()) == sorted(f"things/{name}" for name in os.listdir("things"))
    deadline = time.monotonic() + 20
    while readers() - before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not readers() - before


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(folder: Path) -> None:
    for number in range(5, 40):
        np.save(f"things/{number}.npy", np.random.default_rng(number).random((60, 6)))
    process = Command(
        "caption", "things", "--out", "out.jsonl", "--batch-size", "1", "--max-new-tokens", "60", "--workers", "2"
    )
    process.until(lambda: written_lines(folder / "out.jsonl") >= 4)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    assert f"stopped; {len(rows())} objects are in out.jsonl, the same command goes on from there" in err
    assert err.splitlines()[-1] == "pointalign: interrupted"
    assert "Traceback" not in err
    assert Path("out.jsonl").read_bytes().endswith(b"\n")


def test_a_full_disk_ends_in_one_line_and_keeps_whole_lines(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The limit on a file's size stands for the full disk."""
    command = ("caption", "things", "--out", "out.jsonl", "--batch-size", "2", *SHORT)
    process = Command(*command, largest_file=420)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert last.startswith("pointalign: cannot write out.jsonl: File too large; free some space or name another --out")
    assert "Traceback" not in err
    kept = rows()
    assert 0 < len(kept) < 8
    run(capsys, *command)
    assert rows()[: len(kept)] == kept
    assert len(rows()) == 8


def test_who_reads_standard_output_no_longer_gets_one_line(folder: Path) -> None:
    process = Command("caption", "things", "--out", "-", "--batch-size", "1", *SHORT)
    assert b'"path"' in process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    assert process.wait(timeout=60) == 1
    assert err.splitlines()[-1] == "pointalign: standard output was closed; give --out FILE to keep the lines"
    assert "Exception ignored" not in err


def test_the_examples_are_what_their_script_writes_and_are_read(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = subprocess.run([sys.executable, str(EXAMPLES / "build.py"), str(folder)], capture_output=True, check=True)
    assert done.stdout == b""
    names = ("chair.glb", "oak_table.ply", "potted_plant.xyz", "labels.txt")
    for name in names:
        assert (folder / name).read_bytes() == (EXAMPLES / name).read_bytes(), name
    status, lines, _ = run(capsys, "caption", *(str(EXAMPLES / name) for name in names[:3]), *SHORT)
    assert status == 0
    assert (lines[-1]["captions"], lines[-1]["errors"]) == (3, 0)
