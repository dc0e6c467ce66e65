"""The benchmarks of training run at a tiny size, and their two procedures have the same losses."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from torch import nn

from benchmarking import BENCHMARKS, load_script, run_benchmark
from pointalign.config import load_recipe
from pointalign.data.conversations import ConversationDataset
from pointalign.data.sources import open_training_data
from pointalign.runs import PreparedClouds

FLOAT32 = ("--precision", "fp32")


def test_a_step_of_both_procedures() -> None:
    told = run_benchmark("train_step.py", *FLOAT32, "--steps", "2", "--published-precision", "fp32")
    assert told["first_losses_apart"] <= 2e-5
    assert told["mean_losses_apart"] <= 5e-4
    assert told["packing"], "as the recipe says"
    for procedure in ("ours", "published"):
        assert told[procedure]["seconds_per_step"] > 0
        assert told[procedure]["peak_megabytes"] > 100
        assert 0 < told[procedure]["last_losses"]["alignment_loss"] < 2
    ratio = told["published"]["seconds_per_step"] / told["ours"]["seconds_per_step"]
    assert told["speedup"] == pytest.approx(ratio, abs=0.01)
    assert told["memory_ratio"] > 0


def test_rounding_alone_is_between_the_precisions() -> None:
    told = run_benchmark(
        "precision.py", "--still", "1", "--moving", "0", "--ways", "ours_fp32_packed", "published_bf16"
    )
    ours, rounded = (told[name]["same_weights"] for name in ("ours_fp32_packed", "published_bf16"))
    for name, most in (("lm_loss", 2e-6), ("alignment_loss", 2e-6), ("gradient", 1e-5), ("signs", 1e-4)):
        assert ours[name][0] <= most
    assert 1e-3 < rounded["gradient"][0] < 0.1
    assert "moving" not in told["published_bf16"]


def test_a_step_of_the_made_up_stage_is_as_long_as_the_published_one(tmp_path: Path) -> None:
    """10,000 steps of stage PointAlign are some 11 M tokens, in 67,500 conversations by odds and batch sizes."""
    true_size = load_script(BENCHMARKS / "true_size.py")
    recipe, processor = load_recipe("pointalign"), true_size.build(load_recipe("pointalign"), 64, True, "cpu")[1]
    recipe.data.source, recipe.data.instructions = str(tmp_path / "clouds"), true_size.write_data(tmp_path, 64)
    clouds, conversations = open_training_data(recipe.data, tmp_path)
    dataset = ConversationDataset(
        conversations, processor, PreparedClouds(clouds, processor.prepare_points), recipe.data.max_length
    )
    more_point_tokens, tokens = 32 - processor.num_point_tokens, 0.0
    for kind in recipe.data.sets:
        numbers = [int(number) for number in conversations.of_types(kind.types)]
        length = sum(len(dataset[number]["input_ids"]) for number in numbers) / len(numbers)
        tokens += kind.odds / 8 * kind.batch_size * (length + more_point_tokens)
    assert tokens == pytest.approx(1100, abs=5)


def test_dropout_is_left_out_where_two_procedures_are_compared() -> None:
    train_step = load_script(BENCHMARKS / "train_step.py")
    model = nn.ModuleList([nn.Dropout(0.1), nn.Linear(2, 2), nn.ModuleList([nn.Dropout(0.2)])])
    train_step.leave_dropout_out(model)
    assert [module.p for module in model.modules() if isinstance(module, nn.Dropout)] == [0.0, 0.0]


def test_a_stretch_of_the_stage() -> None:
    four_bits = ["--quantize", "nf4"] if importlib.util.find_spec("bitsandbytes") else []
    told = run_benchmark("train_stage.py", *FLOAT32, "--steps", "5", *four_bits, "--times", "2", "--forbid-waiting")
    assert told["packing"]
    assert (told["quantize"], told["times"]) == ("nf4" if four_bits else None, 2)
    assert told["tokens_per_second"] > 0
    assert 0 < told["share_of_peak"] < 1
