"""How far rounding takes losses and gradients of a step of stage PointAlign, for our path and the published procedure.

    python benchmarks/precision.py                        # household data, SmolLM2-135M
    python benchmarks/precision.py --learning-rate 5e-6   # of the steps that move weights; the recipe's own if not given
    python benchmarks/precision.py --size tiny            # the same path in seconds

All is held against the published procedure in float32. Weights are the same for some batches: losses and the gradient of all
that trains, relatively, and the share of its numbers whose sign is another one. Then they move: losses of single steps.
It ends in one line of JSON. Where the processor does not multiply bfloat16 natively it takes long and rounds alike.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measuring import device_name
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook
from train_step import leave_dropout_out, prepare, train_ours, train_published

from pointalign.config import Recipe
from pointalign.run_folder import environment
from pointalign.runs import quiet

# A learning rate that changes no number in float32, and a gradient norm that nothing is cut down to.
NO_MOVE, NO_LIMIT = 1e-30, 1e9
LOSSES = ("lm_loss", "alignment_loss")


class Way(NamedTuple):
    """One way to take the steps.

    Args:
        name: of it in the result.
        ours: our path, or the published procedure.
        bf16: what is frozen in bfloat16, and autocast; else float32.
        packing: of our path.
    """

    name: str
    ours: bool
    bf16: bool
    packing: bool = False


REFERENCE = Way("published_fp32", ours=False, bf16=False)
WAYS = (
    Way("published_bf16", ours=False, bf16=True),
    Way("ours_fp32_packed", ours=True, bf16=False, packing=True),
    Way("ours_fp32_padded", ours=True, bf16=False),
    Way("ours_bf16_packed", ours=True, bf16=True, packing=True),
    Way("ours_bf16_padded", ours=True, bf16=True),
)


class Gradients:
    """The gradient of all that trains, kept before every optimiser step while this is entered."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __enter__(self) -> Gradients:
        self.hook = register_optimizer_step_pre_hook(self.keep)
        return self

    def __exit__(self, *error: Any) -> None:
        self.hook.remove()

    def keep(self, optimizer: Any, *arguments: Any) -> None:
        """Called by torch."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        self.kept.append(torch.cat([weight.grad.detach().float().flatten().cpu() for weight in weights]))


def take(way: Way, options: argparse.Namespace, moving: bool) -> tuple[list[dict[str, float]], list[Tensor]]:
    """Losses of every step and, where weights do not move, the gradients."""
    steps = options.moving if moving else options.still
    with tempfile.TemporaryDirectory() as temporary, Gradients() as gradients:
        folder = Path(temporary)
        os.environ["POINTALIGN_CACHE"] = str(folder / "cache")
        recipe, model, processor = prepare(options.size, folder, steps, fp32=True)
        leave_dropout_out(model)
        recipe.precision, recipe.packing, recipe.logging_steps = "bf16" if way.bf16 else "fp32", way.packing, 1
        settings = recipe.optimizer
        if not moving:
            settings.learning_rate = settings.min_learning_rate = settings.warmup_start = NO_MOVE
            settings.max_grad_norm = NO_LIMIT
        elif options.learning_rate is not None:
            settings.learning_rate = settings.min_learning_rate = options.learning_rate
        if way.ours:
            losses = train_ours(recipe, folder, model, processor)
        else:
            losses = train_published(recipe, folder, model.to(device_name()), processor, way.bf16)
    return losses, [] if moving else gradients.kept


def apart(losses: Sequence[dict[str, float]], reference: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    """How far each step's losses are from the reference's, relatively."""
    return {
        name: [float(f"{abs(one[name] / other[name] - 1):.2e}") for one, other in zip(losses, reference, strict=True)]
        for name in LOSSES
    }


def gradients_apart(gradients: Sequence[Tensor], reference: Sequence[Tensor]) -> dict[str, list[float]]:
    """How far each step's gradient is from the reference's, relatively, and the share of its numbers with another sign."""
    pairs = list(zip(gradients, reference, strict=True))
    return {
        "gradient": [float(f"{float((one - other).norm() / other.norm()):.2e}") for one, other in pairs],
        "signs": [round(float((one.sign() != other.sign()).double().mean()), 5) for one, other in pairs],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All ways against the reference."""
    quiet()
    told: dict[str, Any] = {"benchmark": "precision", "size": options.size, "learning_rate": options.learning_rate}
    losses, gradients = take(REFERENCE, options, moving=False)
    moved = take(REFERENCE, options, moving=True)[0] if options.moving else []
    for way in WAYS:
        if options.ways and way.name not in options.ways:
            continue
        seen, found = take(way, options, moving=False)
        told[way.name] = {"same_weights": apart(seen, losses) | gradients_apart(found, gradients)}
        if moved:
            told[way.name]["moving"] = apart(take(way, options, moving=True)[0], moved)
    where = environment(Recipe())
    return told | {name: where[name] for name in ("device", "threads", "versions")}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure once; one line of JSON on stdout."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["household", "tiny"], default="household")
    parser.add_argument("--still", type=int, default=3, help="batches with the same weights")
    parser.add_argument("--moving", type=int, default=8, help="steps that move weights; 0 leaves them out")
    parser.add_argument("--learning-rate", type=float, help="of those; the recipe's own if not given")
    parser.add_argument("--ways", nargs="+", choices=[way.name for way in WAYS], help="all when not given")
    options = parser.parse_args(arguments)
    if options.still < 1 or options.moving < 0:
        parser.error("--still is 1 or more, and --moving 0 or more")
    print(json.dumps(measure(options)))


if __name__ == "__main__":
    main()
