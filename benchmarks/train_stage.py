"""A stretch of stage PointAlign through the trainer: tokens per second, and what share of the matmul peak that is.

    python benchmarks/train_stage.py                          # household data, SmolLM2-135M
    python benchmarks/train_stage.py --size paper --steps 50  # random weights of the paper's sizes, on a GPU
    python benchmarks/train_stage.py --size tiny --steps 4    # the same path in seconds

The peak is that of bfloat16 (float32 where the run computes in it) matmuls of the model's own shapes, measured in the same
run before and after the steps, the better of the two. Matmul work is counted as 4 FLOP for each frozen and 6 for each trained
weight of the language model's matrices and token (forward, and back through and into them), the head's at labels alone;
attention's products and the alignment projector are left out. It ends in one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train_step import device_name, prepare
from true_size import StepClock, peak_memory

from pointalign.config import Recipe
from pointalign.run_folder import RunFolder, environment
from pointalign.run_loop import uses_bf16
from pointalign.runs import cast_frozen, quiet, train_language

REPEATS = 8


def matmul_peak(tokens: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> float:
    """FLOP per second of the fastest of the shapes (out, in), the median of some repeats."""
    best = 0.0
    for out, width in shapes:
        left = torch.randn(tokens, width, device=device_name()).to(dtype)
        right = torch.randn(out, width, device=device_name()).to(dtype)
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            left @ right.t()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken.append(time.perf_counter() - start)
        best = max(best, 2 * tokens * out * width / statistics.median(taken))
    return best


class Work:
    """Counts tokens and scored positions of every forward pass, and the matmul work they mean."""

    def __init__(self, model: Any) -> None:
        head = model.get_output_embeddings().weight
        matrices = {id(p): p for p in model.language_model.parameters() if p.ndim == 2}
        for table in (head, model.get_input_embeddings().weight):
            matrices.pop(id(table), None)
        self.per_token = sum(p.numel() * (6 if p.requires_grad else 4) for p in matrices.values())
        self.per_label = 4 * head.numel()
        self.shapes = sorted(
            {tuple(p.shape) for p in matrices.values() if min(p.shape) >= model.config.text_config.hidden_size}
        )
        self.tokens, self.flops = [], []
        model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, arguments: Any, inputs: dict[str, Any]) -> None:
        """Before a forward pass; reads shapes alone, so that no device is waited for."""
        tokens = inputs["input_ids"].numel()
        self.tokens.append(tokens)
        labels = len(inputs["logits_to_keep"]) * len(inputs["input_ids"])
        self.flops.append(tokens * self.per_token + labels * self.per_label)


def measure(size: str, steps: int, precision: Any, packing: bool) -> dict[str, Any]:
    """Train some steps.

    Args:
        size: see `train_step.prepare`.
        steps: optimiser steps, 2 or more; the first one warms up and is not counted.
        precision: of the recipe.
        packing: of the recipe.
    """
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bf16 = uses_bf16(Recipe(precision=precision))
        recipe, model, processor = prepare(size, folder, steps, not bf16)
        os.environ["POINTALIGN_CACHE"] = str(folder / "cache")
        recipe.precision, recipe.packing, recipe.logging_steps = precision, packing, min(steps, 10)
        if bf16:
            cast_frozen(model)
        work, clock, dtype = Work(model), StepClock(), torch.bfloat16 if bf16 else torch.float32
        typical = 512 if size == "household" else 2048
        peaks = [matmul_peak(typical, work.shapes, dtype)]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        run = RunFolder(folder / "run")
        run.open(recipe, resume=False)
        train_language(recipe, run, model, processor)
        peaks.append(matmul_peak(typical, work.shapes, dtype))
        seconds, told = clock.stop(), environment(recipe)
        rates = [tokens / taken for tokens, taken in zip(work.tokens[1:], seconds, strict=True)]
        reached = [flops / taken for flops, taken in zip(work.flops[1:], seconds, strict=True)]
        return {
            "benchmark": "train_stage",
            "size": size,
            "steps": steps,
            "packing": recipe.packing,
            "precision": "bf16" if bf16 else "fp32",
            "tokens_per_step": round(statistics.mean(work.tokens[1:])),
            "seconds_per_step": round(statistics.median(seconds), 4),
            "tokens_per_second": round(statistics.median(rates), 1),
            "quartiles": [round(value, 1) for value in statistics.quantiles(rates, n=4)[::2]],
            "matmul_peak_gflops": round(max(peaks) / 1e9, 1),
            "share_of_peak": round(statistics.median(reached) / max(peaks), 3),
            "seconds_for_10000_steps": round(1e4 * statistics.mean(seconds)),
            "peak_memory_gib": round(peak_memory(device_name()) / 2**30, 3),
            "device": told["device"],
            "threads": told["threads"],
            "versions": told["versions"],
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["household", "paper", "tiny"], default="household")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps, 4 or more")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args(arguments)
    if options.steps < 4:
        parser.error("--steps is 4 or more: the first step warms up, and a spread needs two")
    print(json.dumps(measure(options.size, options.steps, options.precision, options.packing)))


if __name__ == "__main__":
    main()
