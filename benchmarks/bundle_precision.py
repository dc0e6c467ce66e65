"""What a model loses when its trained weights are stored small: float32 against bfloat16 and int8, on held-out objects.

    python benchmarks/bundle_precision.py runs/household-135m-caption/model            # minutes on two cores
    python benchmarks/bundle_precision.py runs/household-135m-caption/model --objects 20

Each storage is written to a folder of its own and loaded as any model. int8 is one scale per row of each matrix. It ends in one
line of JSON: for each storage the MiB of trained weights, accuracy by likelihood, on how many objects the class is that of
float32, the largest change of a class's probability, and how many captions are the same word for word.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pointalign.bundle import compact
from pointalign.data.household import household_classes, load_household
from pointalign.models.checkpoint import load_weights_file
from pointalign.pipelines import pipeline
from pointalign.progress import progress

MIB = 2**20


def int8(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices rounded to 255 levels of each row, given back as float32; the rest as it is."""

    def rounded(tensor: Tensor) -> Tensor:
        scale = tensor.abs().flatten(1).amax(dim=1).clamp(min=1e-12).div(127).view(-1, *[1] * (tensor.ndim - 1))
        return (tensor / scale).round() * scale

    return {name: rounded(t) if t.is_floating_point() and t.ndim >= 2 else t for name, t in state.items()}


STORAGES: dict[str, tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], float]] = {
    "float32": (dict, 4),
    "bfloat16": (compact, 2),
    "int8": (int8, 1),
}


def stored(model: Path, folder: Path, storage: str) -> float:
    """Write a model's folder with its weights so stored; the MiB that they take."""
    shutil.copytree(model, folder)
    store, width = STORAGES[storage]
    total = 0.0
    for file in (folder / "model.safetensors", *folder.glob("*_adapter/adapter_model.safetensors")):
        state = load_weights_file(file)
        save_file({name: tensor.contiguous() for name, tensor in store(state).items()}, file, metadata={"format": "pt"})
        total += sum(t.numel() * (width if t.is_floating_point() and t.ndim >= 2 else 4) for t in state.values())
    return total / MIB


def answers(folder: Path, count: int) -> tuple[Tensor, list[str]]:
    """(objects, classes) probabilities of the held-out objects' classes, and their captions."""
    things = load_household("test")[:count]
    labels = household_classes()
    classify = pipeline("classify", model=folder, labels=labels, dtype="float32")
    caption = pipeline("caption", model=folder, max_new_tokens=40, dtype="float32")
    rows, captions = [], []
    with progress(folder.name, len(things)) as advance:
        for thing in things:
            scores: Any = {entry["label"]: entry["score"] for entry in classify(thing.sized_points)}
            rows.append([scores[label] for label in labels])
            captions.append(caption(thing.sized_points)["caption"])
            advance(1)
    return torch.tensor(rows), captions


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--objects", type=int, default=100)
    given = parser.parse_args()
    things = load_household("test")[: given.objects]
    truth = torch.tensor([household_classes().index(thing.label) for thing in things])
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        exact: tuple[Tensor, list[str]] | None = None
        for storage in STORAGES:
            size = stored(given.model, Path(scratch, storage), storage)
            scores, captions = answers(Path(scratch, storage), given.objects)
            exact = exact or (scores, captions)
            found[storage] = {
                "mib": round(size, 2),
                "accuracy": (scores.argmax(dim=1) == truth).double().mean().item(),
                "same_class": int((scores.argmax(dim=1) == exact[0].argmax(dim=1)).sum()),
                "largest_change": (scores - exact[0]).abs().max().item(),
                "same_captions": sum(one == other for one, other in zip(captions, exact[1], strict=True)),
            }
    print(json.dumps({"model": str(given.model), "n": len(things), "storages": found}))


if __name__ == "__main__":
    main()
