"""One fine-tuning step of stage PointAlign: our path against the published procedure written out plainly.

    python benchmarks/train_step.py                        # household data, SmolLM2-135M, the household recipe's sizes
    python benchmarks/train_step.py --procedure published  # that one alone; or ours
    python benchmarks/train_step.py --size paper           # random weights of the paper's sizes, on a GPU
    python benchmarks/train_step.py --size paper --compile --cuda-graphs --warm-up 60    # our fastest path
    python benchmarks/train_step.py --size tiny --steps 3  # the same path at a tiny size, in seconds

Each procedure is a process of its own with the same initial weights; they take the same batches in turn, so that a busy
machine slows both, and their losses are compared. It ends in one line of JSON: seconds per step (by the clock, and on the
processor, which a busy machine changes less), peak memory of each process, `speedup` (ratio of the medians), `memory_ratio`.

The published procedure runs the point encoder and the connector at every step, pads to the longest conversation, keeps the
hidden states of all layers, and computes the logits of every position in float32. On a CPU all of it is float32; on a GPU it
is autocast to bfloat16, as `--published-precision bf16` does on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measuring import PROCEDURES, Worker, device_name, own_output, peak_memory, quartiles, synchronize
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from true_size import build, write_data

from pointalign.alignment import AlignmentProjector
from pointalign.config import Recipe, load_recipe
from pointalign.data.conversations import Collator, ConversationDataset
from pointalign.data.sources import missing_color, open_training_data
from pointalign.models.language_model import resolve_language_model
from pointalign.parts import prepare_parts
from pointalign.recipe_trainer import learning_rate_at, parameter_groups
from pointalign.run_folder import RunFolder, environment
from pointalign.run_loop import uses_bf16
from pointalign.runs import PreparedClouds, build_model, cast_frozen, quiet, train_language
from pointalign.training import mixture

# How far apart, relatively, each loss may be at the first step, and its mean over the first `COMPARED`. bfloat16 has 8 bits:
# single losses of the same weights were up to 0.6 % from float32, those of the published procedure in bfloat16 up to 0.4 %. At
# the learning rate 5e-4 both were up to 1.5 % within eight steps, for rounding turns signs of small gradients and AdamW's first
# steps move each weight by the learning rate whatever its gradient (docs/LOG.md, 2026-11-25); later they have other weights:
# after 20 steps the alignment loss was 10 % above where batches are packed, and 10 % below where they are padded (2026-11-26).
# In float32 it is rounding alone. e4m3 has four bits: answers' losses were up to 10 % from float32, their mean 0.5 %.
TOLERANCE = {"float8": (0.05, 0.03), "bf16": (0.01, 0.02), "fp32": (2e-5, 5e-4)}
COMPARED = 8
# The recipe's settings that change what a step costs.
SWITCHES = ("compile", "cuda_graphs", "float8", "gradient_checkpointing")


def prepare(size: str, folder: Path, steps: int, fp32: bool) -> tuple[Recipe, Any, Any]:
    """Stage PointAlign at some size: its recipe, a model with random new parts, and a processor.

    Args:
        size: "household" (bundled data, pretrained SmolLM2), "paper" or "tiny" (random weights, clouds and words).
        folder: for made-up data and caches.
        steps: optimiser steps.
        fp32: made-up weights in float32, and not the frozen ones in bfloat16.
    """
    torch.manual_seed(0)
    if size == "household":
        recipe = load_recipe("household-align")
        recipe.model, recipe.lora = load_recipe("household-encoder").model, load_recipe("household-pretrain").lora
        recipe.model.language_model = resolve_language_model(recipe.model.language_model)
        model, processor = build_model(recipe.model, missing_color(recipe.data))
        prepare_parts(model, recipe)
    else:
        recipe, num_points = load_recipe("pointalign"), 64 if size == "tiny" else 8192
        made = folder / "data"
        made.mkdir()
        recipe.data.source, recipe.data.instructions = str(made / "clouds"), write_data(made, num_points)
        model, processor = build(recipe, num_points, size == "tiny", device_name())
        if fp32:
            model.float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name and weight.requires_grad:  # a new LoRA is zero and would hide half of the gradients
                weight.normal_(std=0.01)
    recipe.optimizer.max_steps = steps
    recipe.save_steps, recipe.report_to = 10 * steps, []
    return recipe, model, processor


def leave_dropout_out(model: Any) -> None:
    """Nothing is dropped from now on: two procedures would draw different masks."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0


class Gate:
    """After every optimiser step: tell the parent how long it took, and wait for its word to go on."""

    def __init__(self, told: Any) -> None:
        self.told = told
        self.start, self.busy = time.perf_counter(), time.process_time()
        self.hook = register_optimizer_step_post_hook(self.step)

    def step(self, *arguments: Any) -> None:
        """Called by torch."""
        synchronize()
        self.say(seconds=time.perf_counter() - self.start, cpu=time.process_time() - self.busy)
        sys.stdin.readline()
        self.start, self.busy = time.perf_counter(), time.process_time()

    def say(self, **values: Any) -> None:
        """One line of JSON to the parent."""
        print(json.dumps(values), file=self.told, flush=True)


def train_ours(recipe: Recipe, folder: Path, model: Any, processor: Any) -> list[dict[str, Any]]:
    """The steps as `pointalign train` takes them; losses of each."""
    if uses_bf16(recipe):
        cast_frozen(model)
    run = RunFolder(folder / "run")
    run.open(recipe, resume=False)
    trainer, _ = train_language(recipe, run, model, processor)
    check_done(recipe, trainer)
    return [{name: line[name] for name in ("lm_loss", "alignment_loss")} for line in run.metrics()]


def check_done(recipe: Recipe, trainer: Any) -> None:
    """See that a run did what its recipe asks for; it trains all the same where it could not.

    Raises:
        SystemExit: when it did not.
    """
    did = {
        "packing": trainer.data_collator.packing is not None,
        "float8": trainer.float8,
        "cuda_graphs": trainer.cuda_graphs,
    }
    for name, value in did.items():
        if value != getattr(recipe, name):
            raise SystemExit(f"{name} could not be had here, so nothing is told of it")


def train_published(recipe: Recipe, folder: Path, model: Any, processor: Any, autocast: bool) -> list[dict[str, Any]]:
    """The same steps written out plainly; losses of each."""
    clouds, conversations = open_training_data(recipe.data, folder)
    dataset = ConversationDataset(
        conversations, processor, PreparedClouds(clouds, processor.prepare_points), recipe.data.max_length
    )
    collate, sampler = Collator(processor), mixture(dataset, recipe)(recipe.optimizer.max_steps, 0, 1)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        width = model.config.connector_config.qformer_config.hidden_size
        projector = AlignmentProjector(model.config.connector_config.output_size, width, recipe.alignment.depth)
    projector.to(next(model.parameters()).device)
    layer, weight = recipe.alignment.layers[0], recipe.alignment.weight
    model.train()
    both = torch.nn.ModuleList([model, projector])
    optimizer = torch.optim.AdamW(
        parameter_groups(both, recipe.optimizer.weight_decay), betas=(0.9, recipe.optimizer.beta2)
    )
    losses = []
    for step, numbers in enumerate(sampler):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe.optimizer)
        batch = collate([dataset[number] for number in numbers])
        batch = {name: tensor.to(device_name()) for name, tensor in batch.items()}
        with torch.autocast(device_name(), torch.bfloat16, enabled=autocast):
            lm_loss, alignment = published_losses(model, projector, batch, layer)
        (lm_loss + weight * alignment).backward()
        torch.nn.utils.clip_grad_norm_(
            [p for p in both.parameters() if p.requires_grad], recipe.optimizer.max_grad_norm
        )
        losses.append({"lm_loss": lm_loss.item(), "alignment_loss": alignment.item()})
        optimizer.step()
        optimizer.zero_grad()
    return losses


def published_losses(model: Any, projector: Any, batch: dict[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
    """Next-token and alignment loss of a batch (arXiv 2603.00412), nothing left out that need not be computed."""
    with torch.no_grad():
        points = model.encode_points(batch["point_clouds"])
    output = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        point_tokens=points.point_tokens,
        output_hidden_states=True,
    )
    logits, labels = output.logits.float()[:, :-1], batch["labels"][:, 1:]
    lm_loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    hidden = output.hidden_states[layer][batch["alignment_mask"]]
    target = points.qformer_output.flatten(0, 1)
    alignment = (1 - F.cosine_similarity(projector(hidden).float(), target.float(), dim=-1)).mean()
    return lm_loss, alignment


def work(options: argparse.Namespace) -> None:
    """One procedure in this process, a step for every line on stdin."""
    told = own_output()
    quiet()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        own = options.precision if options.worker == "ours" else options.published_precision
        bf16 = uses_bf16(Recipe(precision=own))
        recipe, model, processor = prepare(options.size, folder, options.steps + options.warm_up, not bf16)
        leave_dropout_out(model)
        os.environ["POINTALIGN_CACHE"] = str(folder / "cache")
        recipe.precision, recipe.logging_steps = "bf16" if bf16 else "fp32", 1
        if options.packing is not None:
            recipe.packing = options.packing
        for name in SWITCHES:
            setattr(recipe, name, getattr(options, name))
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        gate = Gate(told)
        if options.worker == "ours":
            losses = train_ours(recipe, folder, model, processor)
        else:
            model.to(device_name())
            losses = train_published(recipe, folder, model, processor, bf16)
        gate.hook.remove()
        gate.say(
            losses=losses,
            peak=peak_memory(device_name()),
            precision=recipe.precision,
            packing=recipe.packing,
            **environment(recipe),
        )


def losses_apart(ours: list[dict[str, float]], published: list[dict[str, float]], precision: str) -> dict[str, float]:
    """How far apart the two procedures' losses are, relatively: at the first step, and their means over the first `COMPARED`.

    Raises:
        SystemExit: when that is more than the precision, of `TOLERANCE`, explains.
    """
    first = max(abs(ours[0][name] / published[0][name] - 1) for name in ours[0])
    sums = [{name: sum(step[name] for step in steps[:COMPARED]) for name in ours[0]} for steps in (ours, published)]
    mean = max(abs(sums[0][name] / sums[1][name] - 1) for name in ours[0])
    limits = TOLERANCE[precision]
    if first > limits[0] or mean > limits[1]:
        raise SystemExit(
            f"the procedures' losses are {first:.2e} apart at the first step and {mean:.2e} in the mean, more than "
            f"{limits[0]:g} and {limits[1]:g}"
        )
    return {"first_losses_apart": round(first, 7), "mean_losses_apart": round(mean, 7)}


def compare(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Run the procedures in turn; medians, memory, and how far their losses are apart."""
    names = PROCEDURES if options.procedure == "both" else (options.procedure,)
    workers = [Worker(__file__, name, arguments) for name in names]
    for worker in workers:
        worker.hear()  # the first step, which also prepares
    for step in range(1, options.steps + options.warm_up):
        for worker in workers:
            worker.go()
            taken = worker.hear()
            if step >= options.warm_up:
                worker.seconds.append(taken["seconds"])
                worker.busy.append(taken["cpu"])
    ends = []
    for worker in workers:
        worker.go()
        ends.append(worker.hear())
        worker.process.wait()
    result: dict[str, Any] = {"benchmark": "train_step", "size": options.size, "steps": options.steps}
    result |= {name: getattr(options, name) for name in ("warm_up", *SWITCHES)}
    for worker, end in zip(workers, ends, strict=True):
        result[worker.procedure] = {
            "seconds_per_step": round(statistics.median(worker.seconds), 4),
            "quartiles": quartiles(worker.seconds),
            "peak_megabytes": round(end["peak"] / 2**20),
            "cpu_seconds_per_step": round(statistics.median(worker.busy), 4),
            "last_losses": end["losses"][-1],
        }
    if len(workers) == 2:
        ours, published = (result[name] for name in PROCEDURES)
        result |= {
            "speedup": round(published["seconds_per_step"] / ours["seconds_per_step"], 2),
            "speedup_in_cpu_seconds": round(published["cpu_seconds_per_step"] / ours["cpu_seconds_per_step"], 2),
            "memory_ratio": round(ours["peak_megabytes"] / published["peak_megabytes"], 3),
            **losses_apart(ends[0]["losses"], ends[1]["losses"], _least_precise(options, ends[0]["precision"])),
        }
    return result | {
        "precision": ends[0]["precision"],
        "packing": ends[0]["packing"],
        "published_precision": options.published_precision,
        "device": ends[0]["device"],
        "threads": ends[0]["threads"],
        "versions": ends[0]["versions"],
    }


def _least_precise(options: argparse.Namespace, ours: str) -> str:
    if options.float8:
        return "float8"
    return "bf16" if "bf16" in (ours, options.published_precision) else "fp32"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--procedure", choices=["both", *PROCEDURES], default="both")
    parser.add_argument("--size", choices=["household", "paper", "tiny"], default="household")
    parser.add_argument("--steps", type=int, default=24, help="timed steps, 2 or more")
    parser.add_argument("--warm-up", type=int, default=2, help="steps before them; more where shapes are recorded")
    parser.add_argument("--precision", choices=["auto", "fp32", "bf16"], default="auto", help="of our path")
    parser.add_argument(
        "--published-precision", choices=["fp32", "bf16"], default="bf16" if torch.cuda.is_available() else "fp32"
    )
    parser.add_argument(
        "--packing", action=argparse.BooleanOptionalAction, help="of our path; the recipe's own if not given"
    )
    parser.add_argument("--compile", action="store_true", help="our path's decoder blocks")
    parser.add_argument("--cuda-graphs", action="store_true", help="record our path's decoder blocks, on a GPU")
    parser.add_argument("--float8", action="store_true", help="our path's frozen matrices multiply in 8-bit floats")
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="our path recomputes blocks at the way back"
    )
    parser.add_argument("--worker", choices=PROCEDURES, help=argparse.SUPPRESS)
    options = parser.parse_args(given)
    if options.steps < 2 or options.warm_up < 1:
        parser.error("--steps is 2 or more, for a spread needs two, and --warm-up 1 or more")
    if options.worker:
        work(options)
        return
    result = compare(options, given)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
