"""The benchmarks of training run at a tiny size, and their two procedures have the same losses."""

from __future__ import annotations

import importlib.util

import pytest

from benchmarking import run_benchmark

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


def test_a_stretch_of_the_stage() -> None:
    four_bits = ["--quantize", "nf4"] if importlib.util.find_spec("bitsandbytes") else []
    told = run_benchmark("train_stage.py", *FLOAT32, "--steps", "5", *four_bits, "--times", "2", "--forbid-waiting")
    assert told["packing"]
    assert (told["quantize"], told["times"]) == ("nf4" if four_bits else None, 2)
    assert told["tokens_per_second"] > 0
    assert 0 < told["share_of_peak"] < 1
