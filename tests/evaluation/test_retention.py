"""Did fine-tuning hurt the language model: the base behind an adapter, perplexity and agreement by hand, the benchmark."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pointalign.config import LoraSettings
from pointalign.errors import ConfigError
from pointalign.evaluation.asking import EvaluationSettings
from pointalign.evaluation.retention import (
    Reading,
    base_language_model,
    compare_readings,
    read_texts,
    retention_passages,
    retention_prompts,
)
from pointalign.evaluation.run import evaluate
from pointalign.parts import add_lora

IDS = torch.tensor([[72, 101, 108, 108, 111]])


def fine_tuned(model: Any) -> Any:
    """The model with a LoRA and norms that differ from the base's."""
    add_lora(model, LoraSettings(rank=2, alpha=4, dropout=0.0), train_norms=True)
    generator = torch.Generator().manual_seed(5)
    changed = set()
    with torch.no_grad():
        for name, parameter in model.language_model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
                changed.add("norm" if ".modules_to_save." in name else "lora")
    assert changed == {"norm", "lora"}
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.language_model(input_ids=IDS).logits


def test_without_adapters_the_base_is_back_norms_included(model: Any) -> None:
    before = logits(model)
    tuned = fine_tuned(model)
    after = logits(tuned)
    assert (after - before).abs().max() > 0.1
    with base_language_model(tuned):
        torch.testing.assert_close(logits(tuned), before)
    torch.testing.assert_close(logits(tuned), after)


def test_a_named_base_takes_the_language_models_place(model: Any, tmp_path: Path) -> None:
    before = logits(model)
    model.language_model.save_pretrained(tmp_path / "base")
    tuned = fine_tuned(model)
    tuned.merge_adapters()
    after = logits(tuned)
    with pytest.raises(ConfigError, match="name its base with --base-language-model"), base_language_model(tuned):
        pass
    with base_language_model(tuned, str(tmp_path / "base")):
        torch.testing.assert_close(logits(tuned), before)
    torch.testing.assert_close(logits(tuned), after)


def test_perplexity_is_exp_of_the_mean_loss(model: Any, processor: Any) -> None:
    passages = ["Hello there.", "A somewhat longer passage."]
    reading = read_texts(model, processor, passages, ["What?", "Why is that so?"])
    total, count = 0.0, 0
    for passage in passages:
        ids = torch.tensor([processor.tokenizer(passage)["input_ids"]])
        with torch.inference_mode():
            scores = model.language_model(input_ids=ids).logits.log_softmax(dim=-1)
        total -= sum(scores[0, place, ids[0, place + 1]].item() for place in range(ids.shape[1] - 1))
        count += ids.shape[1] - 1
    assert reading.tokens == (11, 25)
    assert reading.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)
    alone = read_texts(model, processor, [passages[0]], ["What?"])
    assert (alone.losses[0], alone.replies[0]) == (pytest.approx(reading.losses[0]), reading.replies[0])


def test_two_readings_by_hand() -> None:
    base = Reading((2.0, 4.0), (2, 4), ((1, 2), (3, 4, 5, 6)), ("a red chair", "no"))
    tuned = Reading((4.0, 8.0), (2, 4), ((1, 9), (3, 4, 5, 9)), ("a red lamp today", "no"))
    found = compare_readings(base, tuned, ["What?", "Is it?"])
    assert found["perplexity"] == {"base": pytest.approx(math.e), "fine_tuned": pytest.approx(math.e**2)}
    assert found["perplexity_ratio"] == pytest.approx(math.e)
    assert found["interval"] == pytest.approx([math.e, math.e]), "both passages got worse by one nat a token"
    assert not found["inside_noise"]
    assert found["same_next_token"] == pytest.approx(4 / 6)
    assert (found["same_replies"]["mean"], found["same_replies"]["n"]) == (0.5, 2)
    assert found["same_beginning"] == pytest.approx((2 / 4 + 1) / 2)
    same = compare_readings(base, base, ["What?", "Is it?"])
    assert (same["perplexity_ratio"], same["inside_noise"], same["same_next_token"]) == (1, True, 1)


def test_the_bundled_texts() -> None:
    passages, prompts = retention_passages(), retention_prompts()
    assert (len(passages), len(prompts)) == (21, 24)
    assert 2500 < sum(len(passage.split()) for passage in passages) < 3500
    assert all(len(passage.split()) > 100 and "\n" not in passage and "#" not in passage for passage in passages)
    assert len(set(prompts)) == 24


def test_the_benchmark(
    tmp_path: Path, model: Any, processor: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pointalign.evaluation.retention_run.retention_passages", lambda: ["Bread.", "A bus."])
    monkeypatch.setattr("pointalign.evaluation.retention_run.retention_prompts", lambda: ["What do bees make?"])
    fine_tuned(model).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    told = evaluate(tmp_path / "model", tmp_path / "out", EvaluationSettings(("language-retention",)))
    result = told["benchmarks"]["language-retention"]
    assert result["n"] == 2
    assert result["perplexity_ratio"] != 1
    kept = json.loads((tmp_path / "out" / "language-retention" / "results.json").read_text())
    assert kept["replies"][0]["prompt"] == "What do bees make?"
    report = (tmp_path / "out" / "language-retention" / "report.md").read_text()
    assert f"| perplexity | {result['perplexity']['base']:.3f} |" in report
    assert "language-retention/report.md) | - | perplexity x" in (tmp_path / "out" / "report.md").read_text()
