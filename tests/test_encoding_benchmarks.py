"""The benchmarks of encoding and of reading data: their two procedures give the same, and they see it when not."""

from __future__ import annotations

import pytest
import torch

from benchmarking import BENCHMARKS, run_benchmark


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_encoding_by_both_procedures() -> None:
    told = run_benchmark("encode.py", "--rounds", "2")
    assert told["tokens_apart"] < 1e-5
    for procedure in ("ours", "published"):
        assert told[procedure]["clouds_per_second"] > 0
        assert told[procedure]["transformer_per_second"] > 0
    ratio = told["ours"]["clouds_per_second"] / told["published"]["clouds_per_second"]
    assert told["speedup"] == pytest.approx(ratio, abs=0.01)
    assert told["memory_ratio"] > 0


@pytest.mark.parametrize(("part", "told"), [("sampling", "sample"), ("grouping", "find"), ("transformer", "tokens")])
def test_procedures_that_differ_are_seen(monkeypatch, part, told) -> None:
    import encode

    encoder, points = encode.make("tiny", 2)
    encode.hold_against_each_other(encoder, points)
    right = getattr(encode.Published, part)

    def wrong(self, *arguments, **named):
        result = right(self, *arguments, **named)
        return (*result[:2], result[2].flip(1)) if isinstance(result, tuple) else result.flip(1)

    monkeypatch.setattr(encode.Published, part, wrong)
    with pytest.raises(SystemExit, match=f"the procedures.* {told} "):
        encode.hold_against_each_other(encoder, points)


def test_data_by_both_procedures(tmp_path) -> None:
    import data

    data.make_data(tmp_path, "tiny", 3)
    processor = data.processor_of("tiny")
    (count, ours), (same, published) = data.open_ours(tmp_path, processor), data.open_published(tmp_path, processor)
    assert count == same == 12
    numbers = [7, 0, 11, 4]
    mine, plain = ours(numbers), published(numbers)
    for name in ("input_ids", "labels", "attention_mask"):
        assert torch.equal(mine[name], plain[name]), name
    assert mine["point_tokens"].shape == (4, 4, 16)
    assert mine["qformer_output"].shape == (4, 4, 12)
    assert plain["point_clouds"].shape == (4, 64, 6)
