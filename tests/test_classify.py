"""`pointalign classify`: probabilities over the user's labels, and free answers."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pointalign.answering.jobs import drawn_classes, read_labels
from pointalign.answering.loading import load_answerer
from pointalign.cli import main
from pointalign.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POINTALIGN_MODEL", str(tiny_model))
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for number in range(3):
        np.save(tmp_path / f"{number}.npy", np.random.default_rng(number).random((60, 6)))
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict[str, Any]], str]:
    """The JSON lines of stdout, and stderr, of a command that ends well."""
    with pytest.raises(SystemExit) as ended:
        main(["classify", *arguments])
    captured = capsys.readouterr()
    assert ended.value.code == 0, captured.err
    return [json.loads(line) for line in captured.out.splitlines()], captured.err


def test_each_object_has_its_labels_most_probable_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["chair", "dining table", "lamp"]
    lines, _ = run(capsys, "0.npy", "1.npy", "2.npy", "missing.ply", "--labels", ",".join(labels))
    answerer = load_answerer()
    assert len(lines) == 5
    found = {line["path"]: line for line in lines[:-1]}
    assert "no 3D file" in found.pop("missing.ply")["error"]
    for path, line in found.items():
        scores = [entry["score"] for entry in line["labels"]]
        assert scores == sorted(scores, reverse=True)
        assert sum(scores) == pytest.approx(1, abs=1e-5)
        direct = answerer.probabilities([answerer.prepare(np.load(path))], labels)[0].tolist()
        named = {entry["label"]: entry["score"] for entry in line["labels"]}
        assert [named[label] for label in labels] == pytest.approx(direct, abs=2e-3)  # bf16 where it is native
    assert (lines[-1]["classified"], lines[-1]["errors"]) == (3, 1)


def test_top_and_free_answers(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    top = ("0.npy", "--labels", "chair,table,lamp", "--top", "2")
    all_labels = run(capsys, "0.npy", "--labels", "chair,table,lamp")[0][0]["labels"]
    assert run(capsys, *top)[0][0]["labels"] == all_labels[:2]
    free = run(capsys, "0.npy", "--free", "--max-new-tokens", "5")[0][0]
    both = run(capsys, *top, "--free", "--max-new-tokens", "5")[0][0]
    assert free.keys() == {"path", "answer"}
    assert both == {"path": "0.npy", "labels": all_labels[:2], "answer": free["answer"]}


def test_a_file_of_labels(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("labels.txt").write_bytes("\ufeffchair\r\n\r\n  potted plant \ntable\nchair\n".encode())
    lines, err = run(capsys, "0.npy", "--labels-file", "labels.txt", "--labels", "table, lamp,")
    assert {entry["label"] for entry in lines[0]["labels"]} == {"chair", "potted plant", "table", "lamp"}
    assert "2 labels are named twice and count once" in err


def test_a_stopped_run_is_gone_on_with(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "0.npy", "--labels", "a,b", "--out", "out.jsonl")
    (summary,), _ = run(capsys, ".", "--labels", "a,b", "--out", "out.jsonl")
    assert (summary["classified"], summary["earlier"]) == (3, 1)
    assert len(Path("out.jsonl").read_text().splitlines()) == 3
    with pytest.raises(SystemExit):
        main(["classify", ".", "--labels", "a,c", "--out", "out.jsonl"])
    assert "holds answers with another labels" in capsys.readouterr().err


def test_labels_in_order_and_once() -> None:
    assert read_labels("b, a ,b,,Ä", None) == ["b", "a", "Ä"]
    assert read_labels(None, None) == []


def test_a_file_that_is_no_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="it is not UTF-8 text; give a text file with one label per line"):
        read_labels(None, tmp_path / "x")


def test_people_see_bars() -> None:
    console = Console(file=io.StringIO(), width=80)
    console.print(
        drawn_classes(
            {
                "path": "[a].ply",
                "labels": [{"label": "chair", "score": 0.75}, {"label": "[b]", "score": 0.25}],
                "answer": "x",
            }
        )
    )
    text = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "[a].ply" in text
    assert "█" * 18 + " " * 7 + "75.0%" in text.replace("  75", " 75")
    assert "[b]" in text
    assert "answer" in text
