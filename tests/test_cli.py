"""The command: what it prints, how it ends, and one clear line for everything that people get wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import pointalign
import pointalign.errors
from commands import Command
from pointalign.cli import DATA_VERBS, _parse, main
from pointalign.config import load_recipe, recipe_names

ENTRY = {
    "object_id": "a",
    "conversation_type": "simple_description",
    "conversations": [{"from": "human", "value": "<point>\nWhat is this?"}, {"from": "gpt", "value": "A chair."}],
}


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    try:
        main(arguments)
        status: Any = 0
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_help_names_every_verb_and_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0
    for verb in (
        "train",
        "evaluate",
        "chat",
        "caption",
        "classify",
        "demo",
        "quickstart",
        "data household",
        "import-checkpoint",
    ):
        assert f"  {verb} " in out
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "pointalign", "--help"], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 1


def test_the_data_verbs_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    for given in (["data"], ["data", "--help"]):
        with pytest.raises(SystemExit) as ended:
            main(given)
        told = capsys.readouterr().out
        assert ended.value.code == 0
        assert "usage: pointalign data VERB ..." in told
        assert re.findall(r"^  (\w+) ", told, re.MULTILINE) == list(DATA_VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version")[:2] == (0, f"{pointalign.__version__}\n")


def test_recipes_end_in_a_json_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "recipes")
    assert status == 0
    assert json.loads(last_line(out)) == {"recipes": recipe_names()}


def test_a_recipe_is_told_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "recipes", "pointalign")
    assert status == 0
    assert "pointalign import-checkpoint minigpt-3d" in err
    assert json.loads(last_line(out))["head"][1].startswith("Published: 66.08")
    status, out, err = run(capsys, "recipes", "pointalign", "--count")
    assert status == 0
    told = json.loads(last_line(out))
    assert (told["trained"], told["total"]) == (39_939_584, 2_962_307_072)
    assert told["parts"]["alignment_projector"] == {"total": 8_310_784, "trained": 8_310_784}
    assert "8,310,784" in err
    status, _, err = run(capsys, "recipes", "pointaling")
    assert status == 1
    assert "(nearest: pointalign" in last_line(err)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_shows_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_recipe(name).name == name
    status, out, _ = run(capsys, "train", name, "--help")
    assert status == 0
    assert "--alignment.weight" in out


@pytest.fixture
def world(tmp_path: Path, build_model: Any, build_tokenizer: Any) -> dict[str, Path]:
    """A tiny model, a folder of clouds, instructions and a recipe over them: all right, for a test to break."""
    from pointalign.models.processing import PointAlignProcessor

    model = build_model()
    model.save_pretrained(tmp_path / "model")
    PointAlignProcessor(
        build_tokenizer(), num_points=48, num_point_tokens=model.config.num_point_tokens, min_points=8
    ).save_pretrained(tmp_path / "model")
    (tmp_path / "clouds").mkdir()
    np.save(tmp_path / "clouds" / "a_8192.npy", np.random.default_rng(0).random((60, 6)))
    (tmp_path / "instructions.json").write_text(json.dumps([ENTRY]))
    recipe = {
        "name": "tiny",
        "model": {"start_from": str(tmp_path / "model")},
        "lora": {"rank": 2, "dropout": 0.0},
        "data": {
            "source": str(tmp_path / "clouds"),
            "instructions": [str(tmp_path / "instructions.json")],
            "sets": [{"batch_size": 1}],
        },
        "alignment": {"weight": 0.1, "layers": [2]},
        "optimizer": {"max_steps": 1, "warmup_steps": 0, "learning_rate": "1e-3"},
        "precision": "fp32",
        "report_to": [],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return {name: tmp_path / name for name in ("model", "clouds", "instructions.json", "recipe.yaml", "out")}


def change(path: Path, **values: Any) -> None:
    recipe = yaml.safe_load(path.read_text())
    for key, value in values.items():
        recipe[key] = {**recipe[key], **value} if isinstance(value, dict) else value
    path.write_text(yaml.safe_dump(recipe))


def cloud(world: dict[str, Path], points: np.ndarray) -> None:
    np.save(world["clouds"] / "a_8192.npy", points)


def with_nan() -> np.ndarray:
    points = np.random.default_rng(0).random((60, 6))
    points[7, 1] = np.nan
    return points


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_INPUT: dict[str, tuple[Any, str]] = {
    "missing cloud": (
        lambda w: (w["clouds"] / "a_8192.npy").rename(w["clouds"] / "b_8192.npy"),
        "(first: a); complete",
    ),
    "missing folder": (lambda w: change(w["recipe.yaml"], data={"source": "nowhere"}), "no folder nowhere; give one"),
    "empty cloud": (lambda w: cloud(w, np.zeros((0, 6))), "the cloud has 0 points; this model needs at least 8"),
    "NaN": (lambda w: cloud(w, with_nan()), "1 of 60 points hold NaN or infinite values (first: row 7); remove them"),
    "wrong columns": (lambda w: cloud(w, np.zeros((60, 4))), "has shape (points, 3) or (points, 6), xyz and rgb"),
    "colours out of range": (lambda w: cloud(w, 300 * np.ones((60, 6))), "give rgb in [0, 1] (or 0-255)"),
    "broken cloud": (lambda w: cut(w["clouds"] / "a_8192.npy"), "is broken ("),
    "pickled cloud": (lambda w: cloud(w, np.array([[object()]])), "is broken (Object arrays cannot be loaded"),
    "missing instructions": (lambda w: w["instructions.json"].unlink(), "give an instruction file"),
    "instructions cut short": (lambda w: cut(w["instructions.json"]), "is not JSON ("),
    "no instructions": (
        lambda w: change(w["recipe.yaml"], data={"instructions": []}),
        "must name PointLLM-format JSON",
    ),
    "unknown key": (lambda w: change(w["recipe.yaml"], optimizer={"max_step": 3}), "did you mean 'max_steps'?"),
    "wrong kind": (lambda w: change(w["recipe.yaml"], seed="many"), "seed is a int; got 'many'"),
    "unknown part": (lambda w: change(w["recipe.yaml"], trains=["llm"]), "unknown part 'llm'; known are point_encoder"),
    "layer too deep": (lambda w: change(w["recipe.yaml"], alignment={"layers": [9]}), "choose 1 to 4 for this model"),
    "truncated model": (lambda w: cut(w["model"] / "model.safetensors"), "copy"),
    "missing config": (lambda w: (w["model"] / "config.json").unlink(), "holds no config.json"),
    "missing model": (
        lambda w: change(w["recipe.yaml"], model={"start_from": "nowhere"}),
        "found no checkpoint 'nowhere'",
    ),
    "not YAML": (lambda w: w["recipe.yaml"].write_text("a: [1"), "is not YAML"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gets_one_line_and_leaves_nothing_half_done(
    case: str,
    world: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    break_it, message = BAD_INPUT[case]
    break_it(world)
    status, out, err = run(capsys, "train", str(world["recipe.yaml"]), "--out", str(world["out"]))
    assert status == 1
    assert out == ""
    assert message in last_line(err)
    assert last_line(err).startswith("pointalign: ")
    assert "Traceback" not in err
    assert not (world["out"] / "model").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_same_without_a_fault_trains(
    world: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    command = ["train", str(world["recipe.yaml"]), "--out", str(world["out"]), "--alignment.weight", "0.2"]
    status, out, err = run(capsys, *command)
    assert status == 0, err
    assert json.loads(last_line(out))["steps"] == 1
    assert load_recipe(world["out"] / "recipe.yaml").alignment.weight == 0.2
    assert run(capsys, *command)[0] == 1
    assert run(capsys, *command, "--resume")[0] == 0


def test_colours_up_to_255_are_taken_and_said(world: dict[str, Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(tmp_path / "cache"))
    points = np.random.default_rng(0).random((60, 6))
    points[:, 3:] = (points[:, 3:] * 255).round()
    cloud(world, points)
    with pytest.warns(UserWarning, match=r"taken as 0-255 and divided by 255"), pytest.raises(SystemExit) as ended:
        main(["train", str(world["recipe.yaml"]), "--out", str(world["out"])])
    assert ended.value.code == 0


@pytest.mark.parametrize("name", ["source", "extra", "instructions"])
def test_missing_data_are_told_of_before_a_model_is_loaded(
    name: str, world: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pointalign.runs.build_model", lambda *_: pytest.fail("loaded a model first"))
    change(world["recipe.yaml"], data={name: ["nowhere/at/all"] if name == "instructions" else "nowhere/at/all"})
    status, _, err = run(capsys, "train", str(world["recipe.yaml"]), "--out", str(world["out"]))
    assert status == 1
    assert "nowhere/at/all" in last_line(err)
    assert not world["out"].exists()


@pytest.mark.parametrize("limit", [1_000, 3_000, 30_000], ids=["recipe", "feature cache", "checkpoint"])
def test_a_full_disk_ends_in_one_line(world: dict[str, Path], tmp_path: Path, limit: int) -> None:
    """The limit on a file's size stands for the full disk: writing fails in the middle of a file."""
    names = [f"a{number}" for number in range(20)]
    for name in names:  # so that their features take more room than the recipe
        np.save(world["clouds"] / f"{name}_8192.npy", np.random.default_rng(0).random((60, 6)))
    world["instructions.json"].write_text(json.dumps([{**ENTRY, "object_id": name} for name in names]))
    process = Command(
        *("train", str(world["recipe.yaml"]), "--out", str(world["out"])),
        environment={"POINTALIGN_CACHE": str(tmp_path / "cache")},
        largest_file=limit,
    )
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1, err[-2000:]
    assert "free some space" in last_line(err)
    assert "Traceback" not in err
    assert not (world["out"] / "model").exists()
    assert not list(tmp_path.rglob("*.tmp*"))


def test_other_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    cases = {
        ("trian",): "unknown verb 'trian'; known are train",
        ("data", "hosuehold"): "unknown verb 'data hosuehold'",
        ("train", "nothing"): "found no recipe 'nothing': give a YAML file, or one of",
        ("evaluate", "--model", str(tmp_path)): "holds no config.json",
        ("evaluate", "--model", str(tmp_path), "--limit", "0"): "--limit 0 leaves no object",
        ("compare", "a", "b", "--seed", "-1"): "seed -1 is out of range; give 0 to 4294967295",
        ("train", "household-align", "--seed", "-1", "--out", str(tmp_path / "s")): "seed -1 is out of range",
        ("data", "household", "--source", str(tmp_path), "--out", str(tmp_path / "x")): "sweethome3d-furniture",
        ("import-checkpoint", "pointllm", str(tmp_path / "no"), "--out", str(tmp_path / "o")): "pointalign: ",
    }
    for arguments, message in cases.items():
        status, _, err = run(capsys, *arguments)
        assert status == 1, arguments
        assert message in last_line(err)
    assert run(capsys, "train", "household-align", "--alignment.wieght", "1")[0] == 2


def test_options_may_stand_before_the_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "missing" / "run" / "model"
    status, _, err = run(
        capsys, "train", "--out", str(tmp_path / "run"), "--model.start-from", str(missing), "household-align"
    )
    assert status == 1
    assert f"recipe household-align starts from {missing}" in last_line(err)
    assert "found no recipe 'nothing'" in last_line(run(capsys, "train", "--resume", "nothing")[2])


@pytest.mark.parametrize(
    "given",
    [
        ("--data.sets.1.odds", "7", "pointalign"),
        ("--out", "pointalign-baseline", "--data.sets.1.odds", "7", "pointalign"),
        ("--out", "household-135m-encoder", "--data.sets.1.odds", "7", "pointalign"),
    ],
    ids=["of a later set", "after a value that is a recipe's name", "and that recipe has no such set"],
)
def test_options_of_a_recipes_own_lists_may_stand_before_it(given: tuple[str, ...]) -> None:
    verb = _parse(["train", *given])
    assert (verb.recipe, verb.settings.name) == ("pointalign", "pointalign")
    assert [one.odds for one in verb.settings.data.sets][1] == 7


@pytest.mark.parametrize("given", [("--out", "pointalign"), ("--out", "pointalign", "--resume"), ("--resume",)])
def test_a_recipe_that_is_forgotten_is_asked_for(given: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "train", *given)
    assert status == 2
    assert "A recipe that comes with the package, or a YAML file. (required)" in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_behind_the_output_is_one_line() -> None:
    ran = subprocess.run(f"{sys.executable} -m pointalign recipes > /dev/full", shell=True, stderr=subprocess.PIPE)
    assert ran.returncode == 1
    told = ran.stderr.splitlines()[-1]
    assert told == b"pointalign: cannot write to standard output: No space left on device; free some space"


def test_output_may_be_closed() -> None:
    ran = subprocess.run(f"{sys.executable} -m pointalign --version >&-", shell=True, stderr=subprocess.PIPE)
    assert (ran.returncode, ran.stderr) == (0, b"")


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("evaluate", "--help")])
def test_who_reads_no_further_is_told_nothing(arguments: tuple[str, ...]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, "-m", "pointalign", *arguments], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (ran.returncode, ran.stderr) == (141, b"")


def test_debug_shows_where_a_failure_came_from() -> None:
    with pytest.raises(pointalign.errors.ConfigError):
        main(["--debug", "train", "nothing"])
