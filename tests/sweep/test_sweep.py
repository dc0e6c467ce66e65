"""`pointalign sweep`: its file, its table by hand, and a whole sweep on a tiny model that is stopped and gone on with."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml

from commands import Command
from pointalign.cli import main
from pointalign.data.household import load_household
from pointalign.data.household_split import household_sides
from pointalign.data.household_text import build_instructions
from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.asking import load_model
from pointalign.evaluation.held_out_loss import held_out_loss
from pointalign.storage import lock_of
from pointalign.sweep.figure import draw_sweep
from pointalign.sweep.run import run_sweep
from pointalign.sweep.settings import load_sweep
from pointalign.sweep.table import MEASURES, build_table, table_lines

EXPERIMENTS = Path(__file__).parents[2] / "docs" / "experiments"


def write_sweep(path: Path, start: Path, **changes: Any) -> Path:
    values: dict[str, Any] = {
        "base": "household-align",
        "overrides": {
            "model": {"start_from": str(start)},
            "lora": {"rank": 2, "alpha": 4},
            "data": {"fraction": 0.02, "max_length": 2000, "sets": [{"types": ["single_round"], "batch_size": 2}]},
            "optimizer": {"max_steps": 3, "warmup_steps": 1, "learning_rate": "1e-2"},
            "precision": "fp32",
            "logging_steps": 1,
            "report_to": [],
        },
        "seeds": [0],
        "arms": {"plain": {"alignment": {"weight": 0}}, "aligned": {"alignment": {"layers": [2]}}},
        "limit": 3,
    }
    path.write_text(yaml.safe_dump({**values, **changes}, sort_keys=False))
    return path


# The file


def test_arms_change_the_base_key_by_key_and_seeds_come_one_after_the_other(tmp_path: Path) -> None:
    sweep, recipes = load_sweep(write_sweep(tmp_path / "s.yaml", tmp_path, seeds=[3, 5]))
    assert list(recipes) == [("plain", 3), ("aligned", 3), ("plain", 5), ("aligned", 5)]
    assert sweep.reference == "plain"
    plain, aligned = recipes["plain", 3], recipes["aligned", 5]
    assert (plain.alignment.weight, plain.alignment.layers) == (0, [14])
    assert (aligned.alignment.weight, aligned.alignment.layers) == (0.1, [2])
    assert (plain.name, plain.seed, aligned.seed) == ("plain", 3, 5)
    assert aligned.optimizer.learning_rate == 1e-2
    assert aligned.optimizer.min_learning_rate == 1e-5, "what is not named is the base's"
    assert plain.data == aligned.data


def test_the_experiments_are_sweeps() -> None:
    _, main_question = load_sweep(EXPERIMENTS / "alignment.yaml")
    assert len(main_question) == 20
    released, aligned = main_question["released-positions", 4], main_question["aligned", 4]
    assert released.alignment.positions == "released"
    assert replace(released, name="", alignment=aligned.alignment) == replace(aligned, name="")
    assert main_question["frozen-language-model", 0].trains == ["language_projection"]
    _, grids = load_sweep(EXPERIMENTS / "alignment-grids.yaml")
    assert {recipe.model.start_from for recipe in grids.values()} == {"household-135m-pretrain"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": "household-alin"}, "found no recipe 'household-alin'"),
        ({"armz": {}}, "unknown key 'armz'; did you mean 'arms'?"),
        ({"arms": {}}, "arms and seeds hold at least one each"),
        ({"arms": {"a/b": {}}}, "the arm 'a/b' becomes a folder"),
        ({"arms": {1: {}, 2: {}}, "against": "foo"}, "YAML reads the arm 1 as no name; put it in quotes"),
        ({"arms": {True: {}}}, "YAML reads the arm True as no name; put it in quotes"),
        ({"arms": {"a": 3}}, "arms: a holds settings of its own"),
        (
            {"arms": {"a": {"alignment": {"wight": 1}}}},
            "arms: a: alignment: unknown key 'wight'; did you mean 'weight'?",
        ),
        ({"seeds": [1, 1]}, "a seed stands twice"),
        ({"against": "nobody"}, "against names no arm: 'nobody'"),
        ({"limit": 0}, "limit 0 leaves no object"),
        ({"overrides": {"model": {"start_from": "not/there/at/all"}}}, "not/there/at/all, which is not there"),
    ],
)
def test_bad_files(changes: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_sweep(tmp_path / "s.yaml", tmp_path, **changes)
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(file), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert (ended.value.code, captured.out) == (1, "")
    assert told in captured.err
    assert len(captured.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"workers": -1}, "workers -1 is no number of processes"),
        ({"trains": ["nothing"]}, "trains: unknown part 'nothing'"),
        ({"data": {"held_out": "foo"}}, "there is no part 'foo' of household to hold out"),
        ({"data": {"extra": "nope.parquet"}}, "nope.parquet"),
        ({"alignment": {"layers": [99]}}, "alignment layer 99 does not exist: choose 1 to 30"),
        ({"seed": -1}, "seed -1 is out of range"),
    ],
)
def test_the_last_arms_mistake_is_told_before_the_first_one_runs(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    seeds = [0, changes.pop("seed", 1)]
    arms = {"plain": {}, "last": changes}
    values = {"base": "household-135m-align", "overrides": {"model": {"start_from": "household-135m-pretrain"}}}
    file = tmp_path / "s.yaml"
    file.write_text(yaml.safe_dump({**values, "arms": arms, "seeds": seeds}, sort_keys=False))
    with pytest.raises(ConfigError, match=rf"s.yaml: arm \w+, seed -?\d: .*{told}"):
        run_sweep(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "told"), [(":\n - [", "is not YAML"), ("[1]", "is no sweep"), (None, "cannot read")])
def test_files_that_are_none(text: str | None, told: str, tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_sweep(file)


# The table


def values(accuracy: list[float]) -> dict[str, dict[str, float]]:
    return {measure: {f"o{index}": value for index, value in enumerate(accuracy)} for measure in MEASURES}


def test_the_table_by_hand_and_its_figure(tmp_path: Path) -> None:
    measured = {
        ("plain", 0): values([0, 1, 0, 1]),
        ("aligned", 0): values([1, 1, 1, 1]),
        ("plain", 1): values([0, 0, 0, 1]),
        ("aligned", 1): values([1, 1, 0, 1]),
        ("alone", 2): values([1, 0, 0, 0]),
    }
    table = build_table(measured, "plain")
    assert draw_sweep(table, "plain", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert not draw_sweep(build_table({("plain", 0): values([0, 1])}, "plain"), "plain", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    rows = table["accuracy"]
    assert rows["plain"]["mean"] == pytest.approx(3 / 8)
    assert (rows["plain"]["seeds"], rows["plain"]["n"]) == ([0, 1], 4)
    assert "difference" not in rows["plain"]
    difference = rows["aligned"]["difference"]
    assert difference["mean"] == pytest.approx(0.5)
    assert difference["by_seed"] == pytest.approx([0.5, 0.5])
    assert difference["few_seeds"]
    assert rows["alone"]["difference"] is None, "no seed in common yet"
    lines = "\n".join(table_lines({"accuracy": rows}, "plain", ["alone, seed 3"]))
    assert "| aligned | 87.5 (" in lines
    assert "| +50.0 (" in lines
    assert "+50.0, +50.0 |" in lines
    assert "Not done yet: alone, seed 3." in lines


def test_the_order_of_objects_in_a_file_does_not_matter() -> None:
    turned = {measure: dict(reversed(found.items())) for measure, found in values([0, 1, 1]).items()}
    rows = build_table({("a", 0): values([0, 1, 1]), ("b", 0): turned}, "a")["accuracy"]
    assert rows["b"]["difference"]["interval"] == [0, 0]


def test_runs_about_different_objects_are_not_paired() -> None:
    other = {measure: {"p0": 0.0, "p1": 1.0} for measure in MEASURES}
    with pytest.raises(DataError, match="b, seed 0, and a, seed 0, measured accuracy on different objects; delete one"):
        build_table({("a", 0): values([0, 1]), ("b", 0): other}, "a")
    with pytest.raises(DataError, match="a, seed 1, and a, seed 0, measured accuracy on different objects"):
        build_table({("a", 0): values([0, 1]), ("a", 1): values([0, 1, 1])}, "a")


# Whole sweeps


@pytest.fixture(scope="module")
def start(
    tmp_path_factory: pytest.TempPathFactory, build_model: Callable[..., Any], build_tokenizer: Callable[..., Any]
) -> Path:
    """A tiny checkpoint by reference to a tiny language model."""
    from pointalign.models.processing import PointAlignProcessor

    folder, model = tmp_path_factory.mktemp("start"), build_model(max_position_embeddings=4096)
    model.language_model.save_pretrained(folder / "language_model")
    model.config.language_model = str(folder / "language_model")
    model.save_pretrained(folder / "model")
    PointAlignProcessor(build_tokenizer(), num_points=48, num_point_tokens=5, min_points=8).save_pretrained(
        folder / "model"
    )
    return folder / "model"


@pytest.mark.parametrize("way", ["packed attention", "packed by positions", "padded"])
def test_held_out_loss_by_hand(way: str, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_model(start)
    loaded.model.float()
    if way == "packed by positions":
        loaded.model.language_model.set_attn_implementation("eager")
    if way == "padded":
        monkeypatch.setattr(
            "pointalign.evaluation.held_out_loss.packing_attention", lambda *given, **named: nullcontext(False)
        )
    found = held_out_loss(loaded, tmp_path / "loss", limit=3)
    things = load_household("test")[:3]
    assert list(found) == [thing.id for thing in things]
    for thing in things[:2]:  # which share a batch
        total, count = 0.0, 0
        for entry in build_instructions([thing]):
            roles = {"human": "user", "gpt": "assistant"}
            messages = []
            for turn in entry["conversations"]:
                text = turn["value"].removeprefix("<point>\n")
                cloud = [{"type": "point_cloud"}] if text != turn["value"] else []
                messages.append({"role": roles[turn["from"]], "content": [*cloud, {"type": "text", "text": text}]})
            encoded = loaded.processor.encode(messages)
            ids, labels = (torch.tensor([encoded[name]]) for name in ("input_ids", "labels"))
            points = loaded.processor.prepare_points(thing.points)[None]
            with torch.inference_mode():
                logits = loaded.model(input_ids=ids, point_clouds=points).logits.float()
            total += float(F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum"))
            count += int((labels != -100).sum())
        assert found[thing.id] == pytest.approx(total / count, rel=1e-5)
    loaded.model.forward = lambda **given: pytest.fail("computed again")
    assert held_out_loss(loaded, tmp_path / "loss", limit=3) == found


def start_sweep(file: Path, out: Path) -> Command:
    return Command("sweep", str(file), "--out", str(out))


def test_a_sweep_stopped_by_ctrl_c_goes_on_and_repeats_nothing(
    start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    file, out = write_sweep(tmp_path / "s.yaml", start), tmp_path / "out"
    slow = yaml.safe_load(file.read_text())
    slow["overrides"]["optimizer"]["max_steps"] = 40
    file.write_text(yaml.safe_dump(slow, sort_keys=False))
    process = start_sweep(file, out)
    metrics = out / "plain" / "seed-0" / "metrics.jsonl"
    process.until(metrics.is_file)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert (process.returncode, printed) == (130, ""), said
    assert "plain, seed 0: stopped at step" in said
    assert said.splitlines()[-1].endswith("give the same command again to go on")
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(file), "--out", str(out)])
    assert ended.value.code == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["runs"], told["against"]) == (2, "plain")
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41)), "gone on with, not begun again"
    difference = told["measures"]["next_token_loss"]["aligned"]["difference"]
    both = [
        json.loads((out / arm / "seed-0" / "measured.json").read_text())["measures"] for arm in ("plain", "aligned")
    ]
    means = [np.mean(list(found["next_token_loss"].values())) for found in both]
    assert difference["mean"] == pytest.approx(means[1] - means[0])
    assert difference["n"] == 3
    assert "| aligned |" in (out / "results.md").read_text()
    for name in ("train", "evaluate", "held_out_loss"):
        monkeypatch.setattr(f"pointalign.sweep.run.{name}", lambda *given, **more: pytest.fail("repeated"))
    assert run_sweep(file, out)["measures"] == told["measures"]
    slow["overrides"]["workers"] = 1  # how the work is done is no part of what was
    file.write_text(yaml.safe_dump(slow, sort_keys=False))
    assert run_sweep(file, out)["measures"] == told["measures"]
    measured = out / "aligned" / "seed-0" / "measured.json"
    was = measured.read_text()
    for name, other in (("scored", {"dtype": "bfloat16", "packed": False}), ("start", "another")):
        measured.write_text(json.dumps({**json.loads(was), name: other}))
        with pytest.raises(ConfigError, match=r"aligned/seed-0: .* otherwise than for .*plain/seed-0; delete one"):
            run_sweep(file, out)
    measured.write_text(was)
    slow["overrides"]["lora"]["rank"] = 3
    file.write_text(yaml.safe_dump(slow, sort_keys=False))
    with pytest.raises(ConfigError, match="was run with other settings than the sweep file has now"):
        run_sweep(file, out)


def test_processes_share_a_sweep(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that another process is at is left to it, and done after all when that process ends without it."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    file, out = write_sweep(tmp_path / "s.yaml", start), tmp_path / "out"
    lock = lock_of(out / "plain" / "seed-0")
    lock.acquire()
    process = start_sweep(file, out)
    process.until((out / "results.json").is_file, 200)
    assert not (out / "plain").exists()
    assert json.loads((out / "results.json").read_text())["missing"] == ["plain, seed 0"]
    lock.release()
    printed, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert json.loads(printed.splitlines()[-1])["runs"] == 2
    begun = [line for line in said.splitlines() if line.startswith("run ")]
    assert begun == ["run 2 of 2: aligned, seed 0", "run 1 of 2: plain, seed 0"]


def test_one_row_alone(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    file, out = write_sweep(tmp_path / "s.yaml", start, seeds=[0, 1]), tmp_path / "out"
    with pytest.raises(
        ConfigError, match=r"has no run 'align': name an arm \(plain, aligned\) or ARM/seed-N with a seed of \[0, 1\]"
    ):
        run_sweep(file, out, only=["aligned/seed-1", "align"])
    assert not out.exists()
    assert main_returns(["sweep", str(file), "--out", str(out), "--only", "aligned/seed-1"]) == 0
    assert sorted(path.name for path in out.glob("*/*")) == ["seed-1"]
    told = json.loads((out / "results.json").read_text())
    assert told["missing"] == ["plain, seed 0", "aligned, seed 0", "plain, seed 1"]
    assert told["measures"]["accuracy"]["aligned"]["seeds"] == [1]


def test_a_sweep_measures_what_its_runs_left_out(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    file, out = write_sweep(tmp_path / "s.yaml", start), tmp_path / "out"
    values = yaml.safe_load(file.read_text())
    values["overrides"].setdefault("data", {})["held_out"] = "validation-1"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    run_sweep(file, out, only=["plain"])
    [measured] = out.glob("plain/seed-*/measured.json")
    left_out = {thing.id for thing in household_sides("validation-1")[1]}
    for found in json.loads(measured.read_text())["measures"].values():
        assert found.keys()
        assert found.keys() <= left_out
    values["arms"]["aligned"]["data"] = {"held_out": "validation-2"}
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    with pytest.raises(ConfigError, match="arms hold out validation-1 and validation-2, so nothing can be paired"):
        run_sweep(file, out)


def main_returns(arguments: list[str]) -> Any:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


def test_the_processes_of_one_run_are_refused(start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start the command several times, without torchrun"):
        run_sweep(write_sweep(tmp_path / "s.yaml", start), tmp_path / "out")
    assert not (tmp_path / "out").exists()
