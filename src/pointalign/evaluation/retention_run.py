"""The benchmark `language-retention` of one model, from loading to report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pointalign.answering.loading import quiet_transformers
from pointalign.evaluation.processes import evaluation_device
from pointalign.evaluation.provenance import environment, model_fingerprint
from pointalign.evaluation.results import RESULTS_FILE
from pointalign.evaluation.retention import (
    base_language_model,
    compare_readings,
    read_texts,
    retention_passages,
    retention_prompts,
)
from pointalign.models.checkpoint import check_weights, resolve_model
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.progress import progress
from pointalign.storage import write_text

SHOWN_REPLIES = 8


def evaluate_retention(model: str | Path, out: Path, base: str | None = None) -> dict[str, Any]:
    """Hold a model's language model against what it was before fine-tuning; both compute in the weights' own precision.

    Args:
        model: folder or Hub id.
        out: folder for `results.json` and `report.md`.
        base: the language model to compare with; see `base_language_model`.

    Returns:
        What `compare_readings` gives, with what it came from.

    Raises:
        PointAlignError: when the model cannot be loaded, or nothing tells of its base.
    """
    name, device = resolve_model(model), evaluation_device()
    with quiet_transformers():
        processor = load_processor(name)
        loaded = PointAlignForConditionalGeneration.from_pretrained(name)
    check_weights(loaded, name)
    named = base or loaded.config.language_model
    loaded.to(device)  # pyright: ignore[reportArgumentType]
    passages, prompts = retention_passages(), retention_prompts()
    with progress("language-retention", 2 * (len(passages) + len(prompts))) as advance:
        with base_language_model(loaded, base):
            before = read_texts(loaded, processor, passages, prompts, advance)
        loaded.merge_adapters()
        after = read_texts(loaded, processor, passages, prompts, advance)
    result = {
        "benchmark": "language-retention",
        "model": name,
        "base": named or "the same without its adapters",
        **compare_readings(before, after, prompts),
        "provenance": {"model": model_fingerprint(name), "environment": environment(device, 1)},
    }
    write_text(out / RESULTS_FILE, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    write_text(out / "report.md", "\n".join(_report(result)) + "\n")
    return {**result, "results": str(out / RESULTS_FILE)}


def _report(result: dict[str, Any]) -> list[str]:
    low, high = result["interval"]
    same = result["same_replies"]
    verdict = "no change shown" if result["inside_noise"] else "worse" if result["perplexity_ratio"] > 1 else "better"
    changed = [reply for reply in result["replies"] if reply["base"] != reply["fine_tuned"]]
    lines = [
        f"# Did fine-tuning hurt the language model? {result['model']}",
        "",
        "| | base | fine-tuned |",
        "| --- | ---: | ---: |",
        f"| perplexity | {result['perplexity']['base']:.3f} | {result['perplexity']['fine_tuned']:.3f} |",
        "",
        f"Fine-tuned over base: {result['perplexity_ratio']:.4f} ({low:.4f} to {high:.4f}): **{verdict}**. Perplexity per "
        f"token over {result['n']} bundled passages of plain English ({result['tokens']:,} tokens), without any point cloud; "
        f"in brackets, the 95 % interval of a paired bootstrap over passages. Base: {result['base']}.",
        "",
        f"The most probable next token is the same at {100 * result['same_next_token']:.1f} % of the tokens. Of {same['n']} "
        f"questions without a cloud, {100 * same['mean']:.0f} % are answered word for word the same; on average the first "
        f"{100 * result['same_beginning']:.0f} % of an answer's words are.",
    ]
    if changed:
        lines += ["", "| question | base | fine-tuned |", "| --- | --- | --- |"]
    for reply in changed[:SHOWN_REPLIES]:
        cells = (reply["prompt"], reply["base"], reply["fine_tuned"])
        lines.append(f"| {' | '.join(cell.replace('|', '/').replace(chr(10), ' ') or '(empty)' for cell in cells)} |")
    return lines
