"""Packed conversations: one after another in a single row, without padding, and without a word passing between them.

transformers keeps packed conversations apart by their position ids, whatever the attention: flash attention takes them as
they are, everything else gets a mask of (tokens x tokens). On a CPU that mask costs more than the padding did, on a GPU it is
waited for. So a GPU's flash attention is told where conversations end; elsewhere `packed_attention` gives each of them a row of
its own for the attention alone. Plain products do the rest on a CPU, where PyTorch's fused kernel is slow at going back in
bfloat16, and the fused kernel without a mask on a GPU that has no flash attention.
Letters: S conversations, L the longest one, T tokens, H heads, G key heads, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None
if varlen_attn is not None and "window_size" not in inspect.signature(varlen_attn).parameters:  # PyTorch 2.10
    varlen_attn = None

PACKED_ATTENTION, PACKED_FLASH = "pointalign_packed", "pointalign_packed_by_ends"
# What flash attention takes, also on the way back: widths of a head, and cards from this compute capability on.
FLASH_WIDTHS, FLASH_CAPABILITY = range(8, 193, 8), (8, 0)


def packed_positions(lengths: Sequence[int]) -> dict[str, Any]:
    """What tells a language model of transformers where packed conversations begin.

    Args:
        lengths: tokens of each conversation, in order.

    Returns:
        `position_ids` (1, T), which begin again at 0, and the arguments of flash attention: `cu_seq_lens_q` and
        `cu_seq_lens_k` (S + 1,), where each begins and the last one ends, and `max_length_q` and `max_length_k`.
    """
    ends = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return {
        "position_ids": positions.unsqueeze(0),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


def rounded_up(batch: Mapping[str, Any], filler: int, multiple: int = 128) -> dict[str, Any]:
    """A packed batch with few shapes: one more conversation of nothing fills it up, and no label or point token is in it.

    Args:
        batch: of packed conversations, with `input_ids`, `labels`, `alignment_mask` (1, T) and what `packed_positions` gives.
        filler: the token that fills it up, not the point token.
        multiple: of which T and the longest conversation's length become multiples.

    Returns:
        The batch, rounded; all else in it as it was.
    """
    count = batch["input_ids"].shape[1]
    added, length = -count % multiple, batch["max_length_q"]
    length += -length % multiple
    ends = F.pad(batch["cu_seq_lens_q"], (0, 1), value=count + added)
    return {
        **batch,
        "input_ids": F.pad(batch["input_ids"], (0, added), value=filler),
        "labels": F.pad(batch["labels"], (0, added), value=-100),
        "alignment_mask": F.pad(batch["alignment_mask"], (0, added), value=False),
        "position_ids": torch.cat([batch["position_ids"], torch.arange(added).unsqueeze(0)], dim=1),
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": length,
        "max_length_k": length,
    }


class _BiasedSoftmax(torch.autograd.Function):
    """softmax(scores * scale + bias) in float32, kept for the way back in the scores' own precision."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, bias: Tensor, scale: float) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        values = scores.to(torch.float32, copy=True).mul_(scale).add_(bias)
        weights = values.softmax(dim=-1).to(scores.dtype)
        ctx.save_for_backward(weights)
        ctx.scale = scale
        return weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights = ctx.saved_tensors[0].float()
        product = gradient.float() * weights
        product.sub_(weights.mul_(product.sum(dim=-1, keepdim=True)))
        return product.mul_(ctx.scale).to(gradient.dtype), None, None


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    flash: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each packed conversation, called as transformers' attention functions are.

    Args:
        module: the attention layer; dropout is drawn while it trains.
        query: (1, H, T, D).
        key: (1, G, T, D), G a divisor of H; as value.
        value: see key.
        attention_mask: not used; conversations are told apart by their ends.
        dropout: of the attention weights.
        scaling: of the products; 1 / sqrt(D) when not given.
        sliding_window: how many tokens back a token sees, itself included; all when not given.
        flash: whether there is flash attention for bfloat16; it is taken where it suits.
        kwargs: of `packed_positions`, `cu_seq_lens_q` and `max_length_q`; others are not used.

    Returns:
        (1, T, H, D), and no weights.
    """
    ends, length = kwargs["cu_seq_lens_q"], int(kwargs["max_length_q"])
    count, tokens, width = len(ends) - 1, key.shape[2], query.shape[3]
    dropout = dropout if module.training else 0.0
    if flash and not dropout and _suits_flash(query, key, value):
        assert varlen_attn is not None
        # Not tensor[0], whose gradient is a copy.
        queries, keys, values = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
        window = (-1 if sliding_window is None else sliding_window - 1, 0)
        attended: Any = varlen_attn(
            queries, keys, values, ends, ends, length, length, scale=scaling, window_size=window
        )
        return attended.unsqueeze(0), None
    ends = ends.long()
    shifts = torch.arange(count, device=ends.device) * length - ends[:-1]
    places = torch.arange(tokens, device=ends.device) + shifts.repeat_interleave(ends.diff(), output_size=tokens)

    def rows(tensor: Tensor) -> Tensor:
        """(1, heads, T, D) to (S, heads, L, D), zero behind each conversation's end."""
        flat = tensor[0].transpose(0, 1).flatten(1)
        padded = flat.new_zeros(count * length, flat.shape[1]).index_copy(0, places, flat)
        return padded.view(count, length, -1, width).transpose(1, 2)

    scale = width**-0.5 if scaling is None else scaling
    fused = query.is_cuda and sliding_window is None
    attend = _fused_attention if fused else partial(_plain_attention, sliding_window=sliding_window)
    attended = attend(rows(query), rows(key), rows(value), scale, dropout)
    heads = attended.transpose(1, 2).reshape(count * length, -1)
    return heads.index_select(0, places).view(1, tokens, -1, width), None


def _suits_flash(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether all three are on a GPU and in bfloat16, of the same heads (keys are not shared) and of a width that it takes."""
    alike = query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype
    return alike and _on_gpu(query) and query.dtype == torch.bfloat16 and query.shape[3] in FLASH_WIDTHS


def _on_gpu(tensor: Tensor) -> bool:
    """Whether flash attention can be asked at all: a model that is going to be split over cards is tried on the CPU."""
    return tensor.is_cuda


def _fused_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    """PyTorch's causal attention, (S, H, L, D) with keys and values (S, G, L, D)."""
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float, sliding_window: int | None = None
) -> Tensor:
    """The same by products; heads that share a key lie below each other."""
    groups, length, device = key.shape[1], key.shape[2], query.device
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    unseen = back < 0 if sliding_window is None else (back < 0) | (back >= sliding_window)
    bias = torch.zeros(length, length, device=device).masked_fill(unseen, float("-inf"))
    below = query.unflatten(1, (groups, -1)).flatten(2, 3).flatten(0, 1)
    scores = torch.bmm(below, key.flatten(0, 1).transpose(1, 2)).unflatten(1, (-1, length))
    weights: Any = _BiasedSoftmax.apply(scores, bias, scale)
    if dropout:
        weights = F.dropout(weights, dropout)
    return torch.bmm(weights.flatten(1, 2), value.flatten(0, 1)).view_as(query)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionInterface.register(PACKED_FLASH, partial(packed_attention, flash=True))


def _has_flash(device: torch.device) -> bool:
    if varlen_attn is None or device.type != "cuda" or not torch.backends.cuda.is_flash_attention_available():
        return False
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def _is_causal(config: Any) -> bool:
    """Whether a token sees those before it, all or a window of them: Llama 4 cuts into chunks, some Gemma 3 look ahead."""
    chunked = "chunked_attention" in (getattr(config, "layer_types", None) or ())
    return not chunked and not getattr(config, "use_bidirectional_attention", False)


@contextmanager
def packing_attention(language_model: Any, bf16: bool, device: torch.device | None = None) -> Iterator[bool]:
    """While this lasts, a language model attends to packed conversations; tells whether it keeps them apart.

    Its attention is replaced by `packed_attention` where it is PyTorch's. Whether conversations stay apart is tried out, not
    known by name: models without attention, with positions of their own, or that take no position ids do not. It is to be
    run without a cache of keys and values, with which transformers looks for no packing.

    Args:
        language_model: any causal language model of transformers, inside peft or not.
        bf16: whether it is run in mixed precision.
        device: where it is going to run; where it is now when None.
    """
    base: Any = language_model.get_base_model() if isinstance(language_model, PeftModel) else language_model
    own = base.config._attn_implementation
    try:
        flash = [PACKED_FLASH] if _has_flash(base.device if device is None else device) else []
        for way in [*flash, PACKED_ATTENTION, own] if own == "sdpa" and _is_causal(base.config) else [own]:
            if base.config._attn_implementation != way:
                base.set_attn_implementation(way)
            if keeps_apart(language_model, bf16):
                yield True
                return
        yield False
    finally:
        if base.config._attn_implementation != own:
            base.set_attn_implementation(own)


@torch.no_grad()
def keeps_apart(language_model: Any, bf16: bool) -> bool:
    """Whether packed conversations give what each gives alone, and none of them feels another.

    Args:
        language_model: any causal language model of transformers, inside peft or not.
        bf16: whether it is run in mixed precision.
    """
    device, vocabulary = language_model.device, language_model.get_input_embeddings().weight.shape[0]
    first, second = torch.arange(7) % vocabulary, torch.arange(5).flip(0) % vocabulary
    modes = [(module, module.training) for module in language_model.modules()]
    language_model.eval()

    def logits(*conversations: Tensor) -> Tensor:
        """Of the last conversation."""
        places = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in packed_positions([len(ids) for ids in conversations]).items()
        }
        ids = torch.cat(conversations).unsqueeze(0).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            embeds = language_model.get_input_embeddings()(ids)
            output = language_model(inputs_embeds=embeds, use_cache=False, **places)
        return output.logits[0, -len(conversations[-1]) :].float()

    try:
        packed, alone = logits(first, second), logits(second)
        other = logits((first + 1) % vocabulary, second)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, KeyError, RuntimeError):  # it does not take such arguments, or heads of such shapes
        return False
    finally:
        for module, mode in modes:
            module.training = mode
    largest = alone.abs().max()
    # What the other conversation says may change rounding alone: experts get batches of other sizes.
    near, felt = (0.05, 0.01) if bf16 else (1e-3, 1e-5)
    apart = (packed - alone).abs().max() <= near * largest
    return bool(apart) and bool((packed - other).abs().max() <= felt * largest)
