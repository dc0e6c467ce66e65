"""From a model's inputs to answers: one way of generating for the command, the pipelines and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from pointalign.answering.refill import can_refill, refilled_ids
from pointalign.errors import DataError
from pointalign.options import Decoding


class Generated(NamedTuple):
    """One answer.

    Args:
        text: without the end symbol, special tokens and surrounding space.
        tokens: how many were generated, the end symbol included.
        truncated: whether it stopped at the longest length allowed rather than at an end symbol.
    """

    text: str
    tokens: int
    truncated: bool


@torch.inference_mode()
def generate_from(
    model: Any, processor: Any, inputs: Mapping[str, Any], options: Mapping[str, Any], rows: int | None = None
) -> list[Generated]:
    """Answer prompts; several greedy ones make room for one another as they end, where the model allows.

    Args:
        model: a `PointAlignForConditionalGeneration` in evaluation mode.
        processor: its processor.
        inputs: left-padded, as the processor gives them; they are moved to the model's device.
        options: arguments of `generate`.
        rows: prompts answered at a time, where `can_refill` holds; all of them when None.

    Returns:
        One answer per prompt, in order.
    """
    device = model.get_input_embeddings().weight.device
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    ends = end_symbols(model, processor) if "eos_token_id" not in options else set()
    count, length = moved["input_ids"].shape
    if count > 1 and can_refill(model, options):
        ids = refilled_ids(model, moved, rows or count, options["max_new_tokens"], ends)
    else:
        ids = model.generate(**moved, **{**told_ends(model, ends), **options})[:, length:].tolist()
    ended = [next((index for index, token in enumerate(row) if token in ends), None) for row in ids]
    # An end symbol may be an ordinary word of the vocabulary, which decoding does not skip.
    texts = processor.batch_decode([row[:end] for row, end in zip(ids, ended, strict=True)], skip_special_tokens=True)
    return [
        Generated(text.strip(), len(row) if end is None else end + 1, end is None)
        for text, row, end in zip(texts, ids, ended, strict=True)
    ]


def end_symbols(model: Any, processor: Any) -> set[int]:
    """Ids at which an answer ends: the model's own, else the tokenizer's; none where neither knows any."""
    ends = model.generation_config.eos_token_id
    ends = processor.tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, (list, tuple)) else {ends} - {None}


def told_ends(model: Any, ends: set[int]) -> dict[str, Any]:
    """`generate`'s argument for `end_symbols` that the model's own settings do not hold."""
    return {"eos_token_id": sorted(ends)} if ends and model.generation_config.eos_token_id is None else {}


@contextmanager
def chance(decoding: Decoding, device: torch.device, number: int = 0) -> Iterator[None]:
    """Give sampling its own stream of random numbers, so that the caller's goes on as if nothing had been drawn.

    Args:
        decoding: holds the seed; without a temperature nothing is done.
        device: where the model computes.
        number: of the batch or turn; each draws differently.
    """
    if not decoding.samples:
        yield
        return
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        torch.manual_seed(decoding.seed + number)
        yield


@contextmanager
def memory_told(batch: int) -> Iterator[None]:
    """Tell what to do where a batch does not fit into memory.

    Raises:
        DataError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        remedy = "lower batch_size" if batch > 1 else "free some, or compute elsewhere (device)"
        raise DataError(f"the memory of the device does not hold {batch} objects at a time; {remedy}") from error


def context_length(model: Any) -> int | None:
    """Most tokens of prompt and answer together that the language model was made for; None where it does not say."""
    return getattr(model.config.text_config, "max_position_embeddings", None)


def check_room(model: Any, prompt_length: int, room: int) -> None:
    """Refuse a prompt that leaves less room for its answer than `room` tokens.

    Raises:
        DataError: when both together are longer than the language model's context.
    """
    longest = context_length(model)
    if longest is not None and prompt_length + room > longest:
        raise DataError(
            f"the prompt has {prompt_length} tokens and the answer may have {room}, together more than the language model's "
            f"{longest}; shorten the question or the longest answer (max_new_tokens)"
        )
