"""Training in several processes, DDP and FSDP2: what they compute together, and going on with another number of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import socket
import traceback
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from pointalign import recipe_trainer
from pointalign.config import Recipe, from_dict
from pointalign.errors import ConfigError
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor
from pointalign.run_folder import RunFolder
from pointalign.run_loop import RunCallback, RunStopped
from pointalign.runs import train
from pointalign.training import AlignmentTrainer

STEPS = 4
LOSSES = ("loss", "lm_loss", "alignment_loss", "grad_norm")
# Sums over two processes come in another order; AdamW divides by gradients' size, so that weights differ more than losses.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 2e-5


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory, build_model: Any, build_tokenizer: Any) -> dict[str, Any]:
    """A recipe's values, on a tiny checkpoint by reference to a tiny language model with tied embeddings."""
    folder = tmp_path_factory.mktemp("start")
    model = build_model(tied=True, layers=2)
    model.language_model.save_pretrained(folder / "language_model")
    model.config.language_model = str(folder / "language_model")
    model.save_pretrained(folder / "model")
    PointAlignProcessor(build_tokenizer(), num_points=48, num_point_tokens=5, min_points=8).save_pretrained(
        folder / "model"
    )
    return {
        "name": "tiny",
        "model": {"start_from": str(folder / "model")},
        "lora": {"rank": 2, "alpha": 4, "dropout": 0.0},
        # 2 and 3 conversations: one batch is split evenly over two processes, the other is not.
        "data": {
            "fraction": 0.05,
            "max_length": 1500,
            "sets": [
                {"types": ["detailed_description"], "odds": 2, "batch_size": 2},
                {"types": ["single_round"], "odds": 3, "batch_size": 3},
            ],
        },
        "alignment": {"weight": 0.5, "layers": [1]},
        "optimizer": {"max_steps": STEPS, "learning_rate": "1e-2", "warmup_steps": 2, "warmup_start": "1e-3"},
        "precision": "fp32",
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": [],
    }


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POINTALIGN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def one(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that was never stopped."""
    run = tmp_path_factory.mktemp("runs") / "one"
    train(from_dict(Recipe, values, "test"), run)
    return run


@pytest.fixture(scope="module")
def split(values: dict[str, Any], one: Path) -> Path:
    """The same run with FSDP2 in two processes; it reads the features that the other has cached."""
    return train_with(2, from_dict(Recipe, {**values, "fsdp": True}, "test"), one.with_name("split"))


def train_with(world: int, recipe: Recipe, out: Path, stop: tuple[int, int] | None = None) -> Path:
    """As `torchrun --nproc-per-node WORLD -m pointalign train RECIPE --out OUT --resume`, in copies of this process.

    With a `stop`, (rank, step), that process alone gets a SIGTERM in that step.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    started = [
        context.Process(target=one_of, args=(rank, world, port, errors, recipe, out, stop), daemon=True)
        for rank in range(world)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(400)
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in started] == [0] * world
    return out


def one_of(
    rank: int, world: int, port: int, errors: Any, recipe: Recipe, out: Path, stop: tuple[int, int] | None
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    gathered, whole = [], recipe_trainer.whole
    recipe_trainer.whole = lambda state: gathered.append(state) or whole(state)
    if stop is not None and rank == stop[0]:

        def signalled(self: RunCallback, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop[1] - 1:
                os.kill(os.getpid(), signal.SIGTERM)

        RunCallback.on_step_begin = signalled
    try:
        with (
            nullcontext() if stop is None else pytest.raises(RunStopped, match=f"stopped at step {stop[1]} of {STEPS}")
        ):
            train(recipe, out, resume=True)
        # Without this, a run that quietly was no FSDP run would pass for one.
        were_split = [isinstance(tensor, DTensor) for tensor in gathered[0].values()]
        assert all(were_split) if recipe.fsdp else not any(were_split)
    except BaseException:
        errors.put(traceback.format_exc())


def stopped_copy(run: Path, name: str) -> Path:
    """The run as it was after its first checkpoint."""
    copy = shutil.copytree(run, run.with_name(name))
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / f"checkpoint-{STEPS}")
    return copy


def weights(run: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.stem}.{name}": tensor
        for path in (run / "model").rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_same_run(first: Path, second: Path) -> None:
    for loss in LOSSES:
        expected, found = ([line[loss] for line in RunFolder(run).metrics()] for run in (first, second))
        assert len(expected) == STEPS
        assert found == pytest.approx(expected, rel=LOSS_TOLERANCE)
    expected, found = weights(first), weights(second)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=WEIGHT_TOLERANCE, atol=WEIGHT_TOLERANCE, msg=name)


def test_fsdp_gives_the_one_process_run_and_its_files(one: Path, split: Path) -> None:
    assert_same_run(one, split)
    for path in (one / "model").rglob("*"):
        other = split / path.relative_to(one)
        assert other.exists(), other
        if path.suffix in (".json", ".jinja"):
            assert other.read_text() == path.read_text()
    for run in (one, split):
        model = PointAlignForConditionalGeneration.from_pretrained(run / "model")
        assert type(model) is PointAlignForConditionalGeneration
        assert not hasattr(model, "alignment_regularizer")


def test_an_fsdp_checkpoint_is_that_of_one_process(one: Path, split: Path) -> None:
    """The same small files with whole tensors: what trains, and AdamW's two moments of it."""
    checkpoints = [run / "checkpoints" / "checkpoint-2" for run in (one, split)]
    names = [{path.name for path in folder.iterdir() if "rng" not in path.name} for folder in checkpoints]
    assert names[0] == names[1]
    ours, theirs = (load_file(folder / "trainable.safetensors") for folder in checkpoints)
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    first, second = (torch.load(folder / "optimizer.pt", weights_only=True) for folder in checkpoints)
    assert first["state"].keys() == second["state"].keys()
    assert [group["params"] for group in first["param_groups"]] == [group["params"] for group in second["param_groups"]]
    for number, moments in first["state"].items():
        for name, tensor in moments.items():
            torch.testing.assert_close(second["state"][number][name], tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("run", "world", "fsdp"),
    [("one", 2, False), ("one", 2, True), ("split", 1, False)],
    ids=["1 to 2, DDP", "1 to 2, FSDP", "2 to 1, FSDP"],
)
def test_a_run_goes_on_with_another_number_of_processes(
    values: dict[str, Any], request: pytest.FixtureRequest, one: Path, run: str, world: int, fsdp: bool
) -> None:
    copy = stopped_copy(request.getfixturevalue(run), f"{run}-{world}-{fsdp}")
    recipe = from_dict(Recipe, {**values, "fsdp": fsdp}, "test")
    if world == 1:
        train(recipe, copy, resume=True)
    else:
        train_with(world, recipe, copy)
    assert_same_run(one, copy)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_process_stops_all_after_the_same_step(values: dict[str, Any], one: Path, rank: int) -> None:
    stopped = one.with_name(f"stopped-{rank}")
    recipe = from_dict(Recipe, values, "test")
    train_with(2, recipe, stopped, stop=(rank, 3))
    last = RunFolder(stopped).last_checkpoint()
    assert last is not None
    assert last.name == "checkpoint-3"
    train(recipe, stopped, resume=True)
    assert_same_run(one, stopped)


def test_fsdp_with_frozen_bf16_matrices(values: dict[str, Any], one: Path) -> None:
    """The first step's loss and gradient are those of one process, but for the rounding of bf16."""
    changed = {**values, "precision": "bf16", "optimizer": {"max_steps": 1, "learning_rate": 1e-2, "warmup_steps": 1}}
    train(from_dict(Recipe, changed, "test"), one.with_name("bf16"))
    train_with(2, from_dict(Recipe, {**changed, "fsdp": True}, "test"), one.with_name("bf16-split"))
    (first,), (second,) = (RunFolder(one.with_name(name)).metrics() for name in ("bf16", "bf16-split"))
    for loss in LOSSES:
        assert second[loss] == pytest.approx(first[loss], rel=5e-3)


@pytest.mark.parametrize("fsdp", [False, True])
def test_a_process_whose_share_is_text_alone(values: dict[str, Any], tmp_path: Path, fsdp: bool) -> None:
    """Of each step one conversation is about a cloud and one is not, or both are not."""
    rng, entries = np.random.default_rng(0), []
    (tmp_path / "clouds").mkdir()
    for number in range(6):
        np.save(tmp_path / "clouds" / f"object{number}_8192.npy", rng.random((64, 6), dtype=np.float32))
        for kind, mark in (("detailed_description", "<point>\n" if number % 2 else ""), ("single_round", "")):
            turns = [{"from": "human", "value": f"{mark}What is it?"}, {"from": "gpt", "value": f"a thing {number}"}]
            entries.append({"object_id": f"object{number}", "conversation_type": kind, "conversations": turns})
    (tmp_path / "text.json").write_text(json.dumps(entries), encoding="utf-8")
    sets = [
        {"types": ["detailed_description"], "odds": 3, "batch_size": 2},
        {"types": ["single_round"], "odds": 1, "batch_size": 2},
    ]
    data = {
        "source": str(tmp_path / "clouds"),
        "instructions": [str(tmp_path / "text.json")],
        "max_length": 1500,
        "sets": sets,
    }
    changed = {**values, "data": data, "trains": ["point_mlp", "language_projection", "language_model_lora"]}
    clouds: list[int] = []
    count_items = AlignmentTrainer.count_items

    def counted(trainer: Any, batches: Any, device: Any) -> Any:
        [batch] = batches
        clouds.append(int(batch["alignment_mask"].sum()) // 5)
        return count_items(trainer, batches, device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignmentTrainer, "count_items", counted)
        train(from_dict(Recipe, changed, "test"), tmp_path / "one")
    assert {0, 1} <= set(clouds), "steps of text alone, and one with a cloud in one share"
    train_with(2, from_dict(Recipe, {**changed, "fsdp": fsdp}, "test"), tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_the_encoder_stage_is_not_split(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fsdp splits a language model; stage encoder trains none: leave fsdp out"):
        train(from_dict(Recipe, {**values, "fsdp": True, "stage": "encoder"}, "test"), tmp_path / "run")
