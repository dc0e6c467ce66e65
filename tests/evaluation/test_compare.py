"""`pointalign compare`: differences worked out by hand, and the refusal of what cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pointalign.cli import main
from pointalign.errors import DataError
from pointalign.evaluation.compare import compare, disagreements, object_values, split_sides
from pointalign.evaluation.results import read_results

WriteResult = Callable[..., Path]
# Of ten objects both have four right and two wrong; the first alone has one right, the second alone three.
FIRST = [True] * 4 + [True] + [False] * 3 + [False] * 2
SECOND = [True] * 4 + [False] + [True] * 3 + [False] * 2


def test_two_results_by_hand(result_file: WriteResult, tmp_path: Path) -> None:
    result = compare([result_file("a", FIRST)], [result_file("b", SECOND)], tmp_path / "out")
    assert result["difference"] == pytest.approx((3 - 1) / 10)
    assert (result["only_first"], result["only_second"]) == (1, 3)
    assert result["p_value"] == pytest.approx(2 * (1 + 4) / 2**4)
    assert result["inside_noise"]
    assert (result["first"]["mean"], result["second"]["mean"]) == (0.5, 0.7)
    assert result["n"] == 10
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| accuracy | 50.00 | 70.00 | +20.00 (" in report
    assert "inside the noise" in report
    assert "exact McNemar test, p = 0.625." in report
    assert "(4 of 10 objects, by accuracy)" in report
    assert "| o4 | chair | 1 | 0 | a says 4 [chair] | b says 4 [chair] |" in report
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["object_id"] for row in kept["disagreements"]] == ["o4", "o5", "o6", "o7"]


def test_the_command_ends_in_a_json_line_and_warns(
    result_file: WriteResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [str(result_file("a", FIRST)), str(result_file("b", SECOND).parent)]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *files, "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert ended.value.code == 0
    assert json.loads(captured.out.splitlines()[-1])["report"] == str(tmp_path / "out" / "report.md")
    assert "warning: the difference is inside the noise" in captured.err
    assert "warning: one seed of training a side" in captured.err


def test_a_clear_difference_is_no_noise(result_file: WriteResult, tmp_path: Path) -> None:
    result = compare([result_file("a", [False] * 12)], [result_file("b", [True] * 10 + [False] * 2)], tmp_path / "out")
    assert not result["inside_noise"]
    assert result["p_value"] == pytest.approx(2 / 2**10)
    assert "**differs**" in (tmp_path / "out" / "report.md").read_text()


def test_seeds_are_pooled_and_told_by_seed(result_file: WriteResult, tmp_path: Path) -> None:
    first = [result_file(f"a{seed}", FIRST) for seed in range(3)]
    second = [result_file("b0", SECOND), result_file("b1", FIRST), result_file("b2", SECOND)]
    result = compare(first, second, tmp_path / "out")
    assert result["by_seed"] == pytest.approx([0.2, 0, 0.2])
    assert result["difference"] == pytest.approx(0.4 / 3)
    assert (result["seeds"], result["paired_seeds"], result["few_seeds"]) == ([3, 3], True, True)
    assert result["p_value"] == pytest.approx(2 * (1 + 4) / 2**4)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "By seed: +20.00, +0.00, +20.00 (standard deviation 11.55)." in report
    assert "Sign flips over the objects' means: p = 0.625, which leaves out" in report
    assert "3 seeds say little" in report
    rows = disagreements([read_results(path) for path in first], [read_results(path) for path in second], "accuracy")
    assert rows[0]["second"] == pytest.approx(1 / 3)
    unpaired = compare(first, second[:2], tmp_path / "unpaired")
    assert unpaired["seeds"] == [3, 2]
    assert "each side for itself" in (tmp_path / "unpaired" / "report.md").read_text()


def test_objects_that_could_not_be_judged_are_left_out(result_file: WriteResult, tmp_path: Path) -> None:
    result = compare([result_file("a", [True, None, False])], [result_file("b", [True, True, None])], tmp_path / "out")
    assert (result["n"], result["left_out"]) == (1, 2)
    assert "2 objects are left out" in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(DataError, match="no object has accuracy in all results"):
        compare([result_file("c", [None])], [result_file("d", [True])], tmp_path / "none")


def both_questions(
    result_file: WriteResult, name: str, instructed: list[bool | None], completed: list[bool | None]
) -> Path:
    values = json.loads(result_file(f"{name}-I", instructed).read_text())
    more = json.loads(result_file(f"{name}-C", completed).read_text())["objects"]
    questions = {"I": {"prompt": "What is this?"}, "C": {"prompt": "This is an object of "}}
    rows = values["objects"] + [{**row, "question": "C"} for row in more]
    return result_file(name, [], questions=questions, objects=rows)


def test_an_answer_that_counts_on_one_side_counts_on_neither(result_file: WriteResult, tmp_path: Path) -> None:
    """Both models are right by the first question and wrong by the second, whose reply about one object was unreadable."""
    first = both_questions(result_file, "a", [True] * 3, [False] * 3)
    second = both_questions(result_file, "b", [True] * 3, [False, None, False])
    result = compare([first], [second], tmp_path / "out")
    assert (result["difference"], result["n"], result["left_out"]) == (0.0, 3, 1)
    assert result["inside_noise"]
    assert not json.loads((tmp_path / "out" / "results.json").read_text())["disagreements"]


def test_other_classes_do_not_compare(result_file: WriteResult, tmp_path: Path) -> None:
    few = result_file("a", FIRST, labels=["chair", "lamp"])
    many = result_file("b", SECOND, labels=["chair", "lamp", "vase"])
    with pytest.raises(DataError, match=r"chose among different classes \(2 and 3\)"):
        compare([few], [many], tmp_path / "out")
    compare([few], [result_file("of before", SECOND)], tmp_path / "out")


def test_a_comparison_takes_no_results_place(result_file: WriteResult, tmp_path: Path) -> None:
    first, second = result_file("a", FIRST), result_file("b", SECOND)
    before = first.read_text()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "report.md").write_text("An overview.")
    for place in (first.parent, result_file("of a third", FIRST).parent, tmp_path / "evaluation"):
        with pytest.raises(DataError, match="holds an evaluation's result or report, which would be lost"):
            compare([first], [second], place)
    assert first.read_text() == before
    for _ in range(2):
        compare([first], [second], tmp_path / "out")


def test_several_questions_are_compared_together_and_each(result_file: WriteResult, tmp_path: Path) -> None:
    paths = (
        both_questions(result_file, "a", [True, False], [False, False]),
        both_questions(result_file, "b", [True, True], [True, False]),
    )
    result = compare([paths[0]], [paths[1]], tmp_path / "out")
    assert object_values(read_results(paths[1]), "accuracy") == {"o0": 1.0, "o1": 0.5}
    assert result["difference"] == pytest.approx((0.5 + 0.5) / 2)
    assert "only_first" not in result, "half-right answers are not yes or no"
    assert result["measures"]["accuracy (I)"]["only_second"] == 1
    assert result["measures"]["accuracy (C)"]["difference"] == 0.5


def test_captions_are_compared_by_score_and_shared_metrics(result_file: WriteResult, tmp_path: Path) -> None:
    def captions(name: str, scores: list[float | None], **metrics: list[float]) -> Path:
        rows = [
            {
                "object_id": f"o{index}",
                "question": "caption",
                "ground_truth": "A chair.",
                "model_output": "Something.",
                "score": score,
                "metrics": {metric: values[index] for metric, values in metrics.items()},
            }
            for index, score in enumerate(scores)
        ]
        head = {"task": "captioning", "questions": {"caption": {"prompt": "Caption this."}}, "objects": rows}
        return result_file(name, [], **head)

    first = captions("a", [50.0, None, 10.0], bleu=[1.0, 2.0, 3.0], only=[0.0, 0.0, 0.0])
    second = captions("b", [80.0, 20.0, 20.0], bleu=[2.0, 2.0, 5.0])
    result = compare([first], [second], tmp_path / "out")
    assert list(result["measures"]) == ["score", "bleu"]
    assert (result["difference"], result["n"], result["left_out"]) == (20.0, 2, 1)
    assert result["measures"]["bleu"]["difference"] == 1.0
    assert "| score | 30.00 | 50.00 | +20.00 (" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge": "likelihood"}, r"is of judge 'match', .* of 'likelihood'; compare results of one judge"),
        ({"benchmark": "modelnet40"}, "compare results of one benchmark"),
        ({"questions": {"I": {"prompt": "What?"}}}, "have different questions; evaluate both"),
        ({"objects": []}, r"different objects \(2 of them, first: o0\)"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    changes: dict[str, Any], message: str, result_file: WriteResult, tmp_path: Path
) -> None:
    first, second = result_file("a", [True, False]), result_file("b", [True, False], **changes)
    with pytest.raises(DataError, match=message):
        compare([first], [second], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_truth_is_another_object(result_file: WriteResult, tmp_path: Path) -> None:
    rows = json.loads(result_file("b", [True]).read_text())["objects"]
    changed = result_file("c", [], objects=[{**rows[0], "ground_truth": 7}])
    with pytest.raises(DataError, match=r"different objects \(1 of them, first: o0\)"):
        compare([result_file("a", [True])], [changed], tmp_path / "out")


def test_results_that_cannot_be_read(tmp_path: Path) -> None:
    for text, message in (
        (None, "cannot read .*; give a results.json"),
        ("{", "is not a result"),
        ("[]", "is not a result"),
    ):
        path = tmp_path / "results.json"
        path.unlink(missing_ok=True)
        if text is not None:
            path.write_text(text)
        with pytest.raises(DataError, match=message):
            read_results(path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(DataError, match=r"holds no results\.json; evaluate first"):
        read_results(tmp_path)


def test_two_sides() -> None:
    assert split_sides(["a", "b"]) == (["a"], ["b"])
    assert split_sides(["a", "b", "vs", "c"]) == (["a", "b"], ["c"])
    for wrong in (["a"], ["a", "b", "c"], ["vs", "a"], ["a", "vs"], ["a", "vs", "b", "vs"], []):
        with pytest.raises(DataError, match="give two results, or several seeds a side"):
            split_sides(wrong)
