"""Next-token loss on held-out objects: how well a model predicts the answers about clouds that it has not seen."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pointalign.data.conversations import Collator, ConversationDataset, read_conversations
from pointalign.data.household_split import TEST, household_sides
from pointalign.data.household_text import build_instructions
from pointalign.data.sources import HouseholdClouds
from pointalign.evaluation.asking import LoadedModel
from pointalign.evaluation.ledger import Ledger
from pointalign.models.packing import packed_positions, packing_attention
from pointalign.progress import progress

NAME = "loss"
# Their eight conversations each are one batch.
OBJECTS_AT_ONCE = 2
LONGEST = 4096


def held_out_loss(loaded: LoadedModel, out: Path, limit: int | None = None, held_out: str = TEST) -> dict[str, float]:
    """Mean loss per answer token of each held-out object's conversations; stopped and called again, it goes on.

    The conversations are of all four types, written by the rules that write the training ones.

    Args:
        loaded: the model, see `load_model`.
        out: folder that keeps the losses.
        limit: only so many objects, the first ones.
        held_out: which objects, see `household_sides`.

    Returns:
        By object id, in nats per token.

    Raises:
        DataError: when the folder holds the losses of another model.
    """
    objects = household_sides(held_out)[1][:limit]
    clouds = HouseholdClouds(objects)
    by_id = {thing.id: thing for thing in objects}
    language_model = loaded.model.language_model
    with (
        packing_attention(language_model, bf16=loaded.dtype == "bfloat16") as packed,
        progress("held-out next-token loss", len(objects)) as advance,
    ):
        # In bfloat16 the last digits of a loss depend on it.
        same = {"model": loaded.fingerprint, "clouds": clouds.fingerprint, "dtype": loaded.dtype, "packed": packed}
        ledger = Ledger(out, NAME, same)
        collate = Collator(loaded.processor, packing=packed_positions if packed else None)
        ledger.fill(
            list(by_id),
            OBJECTS_AT_ONCE,
            lambda number, names: _losses(loaded, collate, [by_id[name] for name in names]),
            advance,
        )
    rows = ledger.rows()
    return {name: rows[name]["loss"] / rows[name]["tokens"] for name in by_id}


def how_scored(out: Path) -> dict[str, Any]:
    """`dtype` and `packed` of the losses that `held_out_loss` keeps in a folder: their last digits depend on both."""
    settings = json.loads((out / f"{NAME}.settings.json").read_text(encoding="utf-8"))
    return {name: settings[name] for name in ("dtype", "packed")}


@torch.inference_mode()
def _losses(loaded: LoadedModel, collate: Collator, objects: Sequence[Any]) -> list[dict[str, float]]:
    """Summed `loss` and number of answer `tokens` of each object."""
    model, processor = loaded.model, loaded.processor
    points = torch.stack([processor.prepare_points(thing.sized_points) for thing in objects]).to(loaded.device)
    tokens = model.encode_points(points).point_tokens.cpu()
    ready = {thing.id: {"point_tokens": row} for thing, row in zip(objects, tokens, strict=True)}
    conversations = read_conversations(build_instructions(objects))
    dataset = ConversationDataset(conversations, processor, ready, LONGEST)
    samples = [dataset[index] for index in range(len(dataset))]
    batch = collate(samples)
    del batch["alignment_mask"]
    batch = {name: value.to(loaded.device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    labels, kept = batch.pop("labels"), batch["logits_to_keep"]
    logits = model(**batch, use_cache=False).logits  # with a cache transformers looks for no packing
    wanted = F.pad(labels[:, 1:], (0, 1), value=-100)[:, kept]
    learnt = wanted != -100
    losses = F.cross_entropy(logits[learnt].float(), wanted[learnt], reduction="none").double().cpu()
    numbers = {thing.id: number for number, thing in enumerate(objects)}
    owners = torch.tensor([numbers[conversation.object_id] for conversation in conversations])
    # A conversation's first token is no label: nothing of its own comes before it.
    owners = owners.repeat_interleave(torch.tensor([sum(n != -100 for n in one["labels"][1:]) for one in samples]))
    sums = torch.zeros(len(objects), dtype=torch.float64).index_add_(0, owners, losses).tolist()
    counts = owners.bincount(minlength=len(objects)).tolist()
    return [{"loss": loss, "tokens": count} for loss, count in zip(sums, counts, strict=True)]
