"""Evaluating one model: load it, ask, score, write the results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pointalign.data.household import load_household
from pointalign.device import native_bf16
from pointalign.errors import DataError
from pointalign.evaluation.benchmarks import evaluate_household, summarize_results
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.models.processing import load_processor
from pointalign.progress import progress
from pointalign.released import with_released_prompt
from pointalign.storage import write_text

RESULTS_FILE = "results.json"


def evaluate(model: str | Path, out: str | Path, limit: int | None = None, as_released: bool = False) -> dict[str, Any]:
    """Evaluate a model on the held-out household objects; the language model computes in bf16 where that is native.

    Args:
        model: folder or Hub id.
        out: folder for `results.json`, which holds every object's answers.
        limit: only so many objects, the first by id.
        as_released: ask with the released code's evaluation prompt, see `with_released_prompt`.

    Returns:
        What `summarize_results` gives.

    Raises:
        PointAlignError: when the model cannot be loaded or the folder cannot be written.
    """
    if limit is not None and limit < 1:
        raise DataError(f"--limit {limit} leaves no object; give 1 or more")
    processor = load_processor(str(model))
    if as_released:
        processor = with_released_prompt(processor)
    loaded = PointAlignForConditionalGeneration.from_pretrained(model)
    loaded.merge_adapters()
    if native_bf16():
        loaded.language_model.to(torch.bfloat16)
    objects = load_household("test")[:limit]
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    with progress(f"evaluating {Path(model).parent.name}", 3 * len(objects)) as advance:
        results = evaluate_household(loaded, processor, objects, advance)
    summary = {"model": str(model), **summarize_results(results)}
    write_text(folder / RESULTS_FILE, json.dumps(summary, indent=1) + "\n")
    return {**summary, "results": str(folder / RESULTS_FILE)}
