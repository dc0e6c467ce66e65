"""The benchmarks of answering run at a tiny size, and our answers are those of the plain way."""

from __future__ import annotations

import pytest

from benchmarking import run_benchmark

LONGEST = 12


def test_answers_of_both_procedures() -> None:
    told = run_benchmark("generate.py", "--precision", "fp32", "--max-new-tokens", str(LONGEST), "--objects", "6")
    ours, published = told["ours"], told["published"]
    assert ours["same_as_one_by_one"] == 1
    # The published procedure knows no end: every answer has the longest length.
    assert published["tokens_per_answer"] == LONGEST
    assert 1 <= ours["tokens_per_answer"] <= LONGEST
    assert ours["labels_in_answers"] == pytest.approx(
        ours["labels_cpu_seconds"] / ours["one_answer_cpu_seconds"], abs=0.01
    )
    assert told["speedup"] == pytest.approx(ours["answers_per_second"] / published["answers_per_second"], rel=0.01)
    assert told["memory_ratio"] > 0
    assert 0 <= told["agreement"]["same"] <= 1
    assert told["agreement"]["objects"] == 6


def test_growth_of_batch_and_answer_length() -> None:
    told = run_benchmark("generate.py", "--growth", "--precision", "fp32", "--max-new-tokens", "32", "--rounds", "1")
    for name in ("batch", "answer_length"):
        assert len(told[name]["seconds"]) == 3
        assert told[name]["exponent"] < 1.3


def test_quality_of_both_procedures() -> None:
    told = run_benchmark("generate.py", "--size", "household", "--quality", "--objects", "3", "--max-new-tokens", "6")
    difference = told["ours_minus_published"]
    assert difference["n"] == told["ours"]["n"] == 3
    assert difference["mean"] == pytest.approx(told["ours"]["mean"] - told["published"]["mean"])
    assert 0 < told["published"]["mean"] < 100
    assert told["agreement"]["objects"] == 3


def test_loading_by_part() -> None:
    told = run_benchmark("load.py", "--rounds", "1", "--max-new-tokens", "3")
    parts = {name: value["cpu"] for name, value in told["ours"].items() if isinstance(value, dict)}
    whole, first = parts.pop("caption"), parts.pop("first_ever")
    assert first > 0.5 * whole
    assert parts["import_pointalign"] < 0.5
    assert parts["import_answering"] > parts["import_pointalign"]
    assert told["ours"]["answer_tokens"] == 3
    assert 0 < whole < 3 * sum(parts.values())
