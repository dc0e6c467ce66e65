"""A stretch of stage PointAlign through the trainer: tokens per second, and what share of the matmul peak that is.

    python benchmarks/train_stage.py                          # household data, SmolLM2-135M
    python benchmarks/train_stage.py --size paper --steps 50  # random weights of the paper's sizes, on a GPU
    python benchmarks/train_stage.py --size paper --steps 300 --cuda-graphs    # recorded; --compile: fused kernels as well
    python benchmarks/train_stage.py --size paper --steps 300 --cuda-graphs --compile --float8    # products in 8-bit floats
    python benchmarks/train_stage.py --size paper --quantize nf4 --gradient-checkpointing    # 4-bit weights, on a small card
    python benchmarks/train_stage.py --times 4                # four times the conversations a step
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
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measuring import device_name, peak_memory, quartiles, synchronize
from train_step import check_done, prepare
from true_size import StepClock

from pointalign.config import Recipe
from pointalign.models.pointalign import PointAlignForConditionalGeneration
from pointalign.parts import select_parts
from pointalign.run_folder import RunFolder, environment
from pointalign.run_loop import uses_bf16
from pointalign.runs import cast_frozen, quiet, train_language
from pointalign.training import AlignmentTrainer

REPEATS = 8


def matmul_peak(tokens: int, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> float:
    """FLOP per second of the fastest of the shapes (out, in), the median of some repeats.

    A repeat is so many products that a GPU need not wait for its host between them.
    """
    best, count = 0.0, 20 if torch.cuda.is_available() else 1
    for out, width in shapes:
        left = torch.randn(tokens, width, device=device_name()).to(dtype)
        right = torch.randn(out, width, device=device_name()).to(dtype)
        taken = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            for _ in range(count):
                torch.matmul(left, right.t())
            synchronize()
            taken.append(time.perf_counter() - start)
        best = max(best, 2 * count * tokens * out * width / statistics.median(taken))
    return best


class Work:
    """Counts tokens and scored positions of every batch that trainers take, and the matmul work they mean."""

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

    def watch(self) -> None:
        """Count from now on, before a batch is rounded up or moved."""
        prepare = AlignmentTrainer._prepare_inputs

        def counted(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
            tokens = inputs["input_ids"].numel()
            self.tokens.append(tokens)
            labels = len(inputs["logits_to_keep"]) * len(inputs["input_ids"])
            self.flops.append(tokens * self.per_token + labels * self.per_label)
            return prepare(trainer, inputs)

        AlignmentTrainer._prepare_inputs = counted


def quantized(model: Any, recipe: Recipe, folder: Path, kind: str) -> Any:
    """The model once more, read from a folder with its language model in 4 or 8 bits; the other one leaves the device."""
    model.save_pretrained(folder)
    again = PointAlignForConditionalGeneration.from_pretrained(folder, is_trainable=True, quantize=kind)
    select_parts(again, recipe.trains)
    model.to("meta")
    return again


def forbid_waiting(first: int) -> None:
    """A step that asks the GPU for a value ends the benchmark, from the first one on that is timed."""
    step = AlignmentTrainer.training_step

    def strict(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error" if trainer.state.global_step >= first else "default")
        try:
            return step(trainer, *args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    AlignmentTrainer.training_step = strict


def warm_up(options: argparse.Namespace) -> int:
    """Steps that are not timed: two, or half of them where shapes are recorded or compiled as they come."""
    return options.steps // 2 if options.cuda_graphs or options.compile else 2


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Train some steps, the first of which warm up and are not counted; options are the command's."""
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bf16 = uses_bf16(Recipe(precision=options.precision))
        recipe, model, processor = prepare(options.size, folder, options.steps, not bf16)
        os.environ["POINTALIGN_CACHE"] = str(folder / "cache")
        recipe.precision, recipe.packing = options.precision, options.packing
        recipe.compile, recipe.cuda_graphs, recipe.float8 = options.compile, options.cuda_graphs, options.float8
        recipe.gradient_checkpointing = options.gradient_checkpointing
        recipe.logging_steps = min(options.steps, recipe.logging_steps)
        for kind in recipe.data.sets:
            kind.batch_size *= options.times
        work, dtype = Work(model), torch.bfloat16 if bf16 else torch.float32
        if options.quantize:
            model = quantized(model, recipe, folder / "start", options.quantize)
        if bf16:
            cast_frozen(model)
        work.watch()
        typical = (512 if options.size == "household" else 2048) * options.times
        peaks = [matmul_peak(typical, work.shapes, dtype)]
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        clock, run = StepClock(), RunFolder(folder / "run")
        run.open(recipe, resume=False)
        trainer, _ = train_language(recipe, run, model, processor)
        check_done(recipe, trainer)
        first = warm_up(options)
        seconds, memory = clock.stop()[first - 1 :], peak_memory(device_name())
        busy = statistics.median(after - before for before, after in pairwise(clock.busy[first - 1 :]))
        peaks.append(matmul_peak(typical, work.shapes, dtype))
        timed = {"cpu_seconds_per_step": round(busy, 4), **told(options, recipe, bf16, work, seconds, max(peaks))}
        return {**timed, "peak_memory_gib": round(memory / 2**30, 3)}


def told(
    options: argparse.Namespace,
    recipe: Recipe,
    bf16: bool,
    work: Work,
    seconds: Sequence[float],
    peak: float,
) -> dict[str, Any]:
    """The benchmark's result, from what was counted and timed of all steps but those that warm up."""
    around, first = environment(recipe), warm_up(options)
    rates = [tokens / taken for tokens, taken in zip(work.tokens[first:], seconds, strict=True)]
    reached = [flops / taken for flops, taken in zip(work.flops[first:], seconds, strict=True)]
    return {
        "benchmark": "train_stage",
        "size": options.size,
        "steps": options.steps,
        "times": options.times,
        "packing": recipe.packing,
        "compile": recipe.compile,
        "cuda_graphs": recipe.cuda_graphs,
        "float8": recipe.float8,
        "quantize": options.quantize,
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "precision": "bf16" if bf16 else "fp32",
        "tokens_per_step": round(statistics.mean(work.tokens[first:])),
        "seconds_per_step": round(statistics.median(seconds), 4),
        "tokens_per_second": round(statistics.median(rates), 1),
        "quartiles": quartiles(rates, 1),
        "matmul_peak_gflops": round(peak / 1e9, 1),
        "share_of_peak": round(statistics.median(reached) / peak, 3),
        "seconds_for_10000_steps": round(1e4 * statistics.mean(seconds)),
        "device": around["device"],
        "threads": around["threads"],
        "versions": around["versions"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["household", "paper", "tiny"], default="household")
    parser.add_argument("--steps", type=int, default=20, help="optimiser steps, 5 or more")
    parser.add_argument("--times", type=int, default=1, help="conversations of a step, times the recipe's")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto")
    parser.add_argument("--packing", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--cuda-graphs", action="store_true", help="on a GPU: record the decoder blocks' launches")
    parser.add_argument(
        "--float8", action="store_true", help="frozen matrices multiply in 8-bit floats, on a card that does"
    )
    parser.add_argument("--quantize", choices=["nf4", "int8"], help="of the frozen language model's matrices")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations on the way back")
    parser.add_argument("--forbid-waiting", action="store_true", help="on a GPU: end when a step waits for it")
    options = parser.parse_args(arguments)
    if options.steps < 5:
        parser.error("--steps is 5 or more: the first ones warm up, and a spread needs two")
    if options.forbid_waiting and torch.cuda.is_available():
        forbid_waiting(warm_up(options))
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
