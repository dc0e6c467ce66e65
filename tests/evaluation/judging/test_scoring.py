"""From verdicts to numbers, against numbers worked out by hand; and the command on a peer's file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointalign.cli import main
from pointalign.errors import DataError
from pointalign.evaluation.judging import build_judge, judge_answers, load_task
from pointalign.evaluation.judging.scoring import random_label, summarize_verdicts
from pointalign.evaluation.records import Answer, Task, Verdict

LABELS = ("chair", "table", "lamp")
CLOSED = Task("closed-set", LABELS)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, last line of stdout and stderr of the command."""
    with pytest.raises(SystemExit) as ended:
        main(["judge", *arguments])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out.strip().splitlines()[-1] if out else "", err


def test_the_closed_set_with_and_without_the_random_class() -> None:
    """Of ten: five right, two wrong, three without a class, one of them since the reply could not be read."""
    answers = [Answer(f"o{n}", 0, "") for n in range(10)]
    verdicts = [Verdict(f"o{n}", True, correct=n < 5, predicted="chair" if n < 5 else "table") for n in range(7)]
    verdicts += [Verdict("o7", True, correct=False), Verdict("o8", True, correct=False), Verdict("o9", False)]
    lucky = sum(random_label(LABELS, f"o{n}", 3) == "chair" for n in (7, 8, 9))
    summary = summarize_verdicts(CLOSED, answers, verdicts, seed=3)
    assert summary["accuracy"] == pytest.approx((5 + lucky) / 10)
    assert summary["accuracy_without_random"] == 0.5
    assert summary["accuracy_of_valid"] == pytest.approx(5 / 7)
    assert (summary["n"], summary["invalid"], summary["unreadable"]) == (10, 3, 1)
    assert summary["majority_rate"] == 1.0
    # Wilson's interval of 5 of 10, by hand: (0.5 + z^2/20 -+ z sqrt(0.025 + z^2/400)) / (1 + z^2/10), z = 1.96.
    assert summary["interval_without_random"] == pytest.approx([0.2366, 0.7634], abs=1e-4)


def test_random_classes_are_fair_and_depend_on_object_and_seed_alone() -> None:
    drawn = Counter(random_label(LABELS, f"object-{n}", 0) for n in range(3000))
    assert all(900 < count < 1100 for count in drawn.values())
    first = [random_label(LABELS, f"object-{n}", 0) for n in range(50)]
    assert first == [random_label(LABELS, f"object-{n}", 0) for n in range(50)]
    assert first != [random_label(LABELS, f"object-{n}", 1) for n in range(50)]


def test_open_vocabulary_leaves_invalid_replies_out_and_counts_them() -> None:
    answers = [Answer(f"o{n}", "A chair.", "x") for n in range(5)]
    verdicts = [Verdict("a", True, correct=True)] * 3 + [Verdict("b", True, correct=False), Verdict("c", False)]
    summary = summarize_verdicts(Task("open-vocabulary"), answers, verdicts, 0)
    assert (summary["accuracy"], summary["n"], summary["invalid"]) == (0.75, 4, 1)
    assert summary["majority_rate"] is None
    none = summarize_verdicts(Task("open-vocabulary"), answers, [Verdict("c", False)] * 5, 0)
    assert (none["accuracy"], none["n"], none["interval"], none["invalid"]) == (None, 0, None, 5)


def test_captions_are_averaged_over_valid_replies() -> None:
    answers = [Answer(f"o{n}", "A chair.", "x") for n in range(4)]
    verdicts = [Verdict("a", True, score=score) for score in (0.0, 50.0, 100.0)] + [Verdict("c", False)]
    summary = summarize_verdicts(Task("captioning"), answers, verdicts, 0)
    assert (summary["score"], summary["n"], summary["invalid"]) == (50.0, 3, 1)
    low, high = summary["interval"]
    assert 0 <= low < 50 < high <= 100
    none = summarize_verdicts(Task("captioning"), answers, [Verdict("c", False)] * 4, 0)
    assert (none["score"], none["interval"], none["invalid"]) == (None, None, 4)


def test_a_peers_file_is_judged_as_it_is(peer_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = peer_file.read_bytes()
    status, out, err = run(capsys, str(peer_file), "--task", "closed-set")
    assert status == 0, err
    summary = json.loads(out)
    assert summary["accuracy_without_random"] == 0.6
    assert (summary["n"], summary["invalid"], summary["majority_rate"]) == (5, 1, 0.2)
    assert "1 without a class (a random one counts; 60.0 % without it)" in err
    written = json.loads(Path(summary["results"]).read_text())
    assert Path(summary["results"]) == peer_file.parent / "peer.closed-set.modelnet40.match.json"
    assert [row["predicted"] for row in written["verdicts"]] == ["airplane", "chair", "night stand", "car", None]
    assert [row["label"] for row in written["verdicts"]] == ["airplane", "chair", "night stand", "plant", "table"]
    assert written["verdicts"][4]["counted"] == random_label(load_task("closed-set").labels, "4", 0)
    assert peer_file.read_bytes() == before


def test_seeds_change_the_random_class_alone(peer_file: Path, tmp_path: Path) -> None:
    task, judge = load_task("closed-set"), build_judge("match")
    summaries = [judge_answers(peer_file, task, judge, tmp_path / f"{seed}.json", seed) for seed in range(8)]
    rows = [json.loads((tmp_path / f"{seed}.json").read_text())["verdicts"] for seed in range(8)]
    assert len({row[4]["counted"] for row in rows}) > 1
    assert all(row[:4] == rows[0][:4] for row in rows)
    assert {summary["accuracy_without_random"] for summary in summaries} == {0.6}


def test_the_closed_set_by_a_language_model(
    server: Any, peer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replies = {"jet": "0#airplane#jet", "wooden": "8#chair#x", "bedside": "23#night stand#x", "car": "7#table#x"}
    server.reply = lambda prompt: next((said for word, said in replies.items() if word in asked(prompt)), "-1#none#")
    options = [
        "--judge",
        "llm",
        "--judge-model",
        "m",
        "--judge-base-url",
        server.url,
        "--out",
        str(tmp_path / "o.json"),
    ]
    status, out, err = run(capsys, str(peer_file), "--task", "closed-set", *options)
    assert status == 0, err
    summary = json.loads(out)
    assert (summary["accuracy_without_random"], summary["invalid"], summary["unreadable"]) == (0.6, 2, 1)
    assert summary["judge"].startswith("llm m, prompt ")


def asked(prompt: str) -> str:
    """The answer that a closed-set prompt is about."""
    return prompt.rpartition("Answer: ")[2]


def test_a_dry_run_shows_prompts_and_asks_nothing(
    server: Any, captions_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--judge", "llm", "--judge-model", "m", "--judge-base-url", server.url]
    command = [str(captions_file), "--task", "captioning", *options]
    status, out, err = run(capsys, *command, "--dry-run")
    assert status == 0, err
    shown = json.loads(out)
    assert (shown["answers"], shown["empty_answers"], shown["prompts"], shown["to_ask"]) == (12, 1, 10, 10)
    assert shown["letters_to_ask"] > 5000
    assert "A chair number 0." in err
    assert server.prompts == []
    server.reply = lambda prompt: "50#half"
    assert run(capsys, *command, "--out", str(tmp_path / "o.json"))[0] == 0
    shown = json.loads(run(capsys, *command, "--dry-run")[1])
    assert (shown["to_ask"], shown["replies_kept"], shown["letters_to_ask"]) == (0, 10, 0)
    status, _, err = run(capsys, str(captions_file), "--task", "captioning", "--judge", "embedding", "--dry-run")
    assert status == 1
    assert "has no prompts to show; leave --dry-run out" in err


def test_a_dry_run_needs_no_endpoint(captions_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--task", "captioning", "--judge", "llm", "--judge-model", "m", "--dry-run"]
    assert run(capsys, str(captions_file), *options)[0] == 0


def test_empty_answers_are_not_asked_about(server: Any, captions_file: Path, tmp_path: Path) -> None:
    server.reply = lambda prompt: "100#all"
    judge = build_judge("llm", judge_model="m", judge_base_url=server.url)
    summary = judge_answers(captions_file, Task("captioning"), judge, tmp_path / "o.json")
    assert summary["score"] == pytest.approx(1100 / 12)
    assert not any("A lamp." in prompt for prompt in server.prompts)


def test_a_truth_that_does_not_suit_the_task_is_found_before_anything_is_asked(
    server: Any, peer_file: Path, captions_file: Path, tmp_path: Path
) -> None:
    judge = build_judge("llm", judge_model="m", judge_base_url=server.url)
    with pytest.raises(DataError, match="is not one of the 30 classes animal to window; give the right --labels"):
        judge_answers(peer_file, load_task("closed-set", "household"), judge, tmp_path / "o.json")
    with pytest.raises(DataError, match="not a description; for a file of classes use --task closed-set"):
        judge_answers(peer_file, Task("captioning"), judge, tmp_path / "o.json")
    with pytest.raises(DataError, match="is not one of the 40 classes"):
        judge_answers(captions_file, load_task("closed-set"), judge, tmp_path / "o.json")
    assert server.prompts == []


def test_half_a_character_can_be_written(write_answers: Callable[..., Path], tmp_path: Path) -> None:
    path = write_answers("a.json", [{"object_id": "a", "ground_truth": 8, "model_output": "chair \ud83d"}])
    assert judge_answers(path, load_task("closed-set"), build_judge("match"), tmp_path / "o.json")["accuracy"] == 1


def test_a_byte_order_mark_is_no_part_of_the_file(peer_file: Path, tmp_path: Path) -> None:
    peer_file.write_bytes(b"\xef\xbb\xbf" + peer_file.read_bytes())
    assert judge_answers(peer_file, load_task("closed-set"), build_judge("match"), tmp_path / "o.json")["n"] == 5


def test_objects_that_are_there_twice_are_told_of(
    write_answers: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"object_id": 0, "ground_truth": 8, "model_output": "a chair"}
    status, out, err = run(capsys, str(write_answers("a.json", [entry, entry])), "--task", "closed-set")
    assert (status, json.loads(out)["n"]) == (0, 2)
    assert "warning: 1 of 2 answers of" in err


def test_the_answers_are_never_written_over(peer_file: Path, tmp_path: Path) -> None:
    before = peer_file.read_bytes()
    (tmp_path / "link.json").symlink_to(peer_file)
    for out in (peer_file, tmp_path / "link.json"):
        with pytest.raises(DataError, match="is the answers file itself, which would be lost; name another"):
            judge_answers(peer_file, load_task("closed-set"), build_judge("match"), out)
    assert peer_file.read_bytes() == before


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no file": (["nothing.json", "--task", "closed-set"], "cannot read nothing.json"),
    "unsuited judge": (["FILE", "--task", "captioning"], "use --judge embedding, llm or hf"),
    "unsuited embedding": (["FILE", "--task", "open-vocabulary", "--judge", "embedding"], "use --judge llm or hf"),
    "no labels": (["FILE", "--task", "closed-set", "--labels", "nothing"], "give modelnet40 or household, or a CSV"),
    "no model": (["FILE", "--task", "captioning", "--judge", "hf"], "needs a model; give --judge-model NAME"),
    "missing model": (
        ["FILE", "--task", "captioning", "--judge", "hf", "--judge-model", "nowhere/nothing"],
        "cannot load language model 'nowhere/nothing'",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line(case: str, captions_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = MISTAKES[case]
    status, out, err = run(capsys, *[str(captions_file) if word == "FILE" else word for word in arguments])
    assert (status, out) == (1, "")
    assert message in err.strip().splitlines()[-1]
    assert "Traceback" not in err
