"""Next-token cross-entropy that never holds all its logits in float32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Values that are in float32 at one time: 16 MiB of a CPU's, 128 of a GPU's, which waits for its host at small pieces.
CHUNK_VALUES = {"cpu": 2**22, "cuda": 2**25}
IGNORED = -100


class _SummedCrossEntropy(torch.autograd.Function):
    """Sum of -log softmax(logits)[label] over rows; rows of logits become float32 a few at a time, forward and back."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, chunk: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        total = logits.new_zeros((), dtype=torch.float32)
        normalizers = []
        for rows, wanted in zip(logits.split(chunk), labels.split(chunk), strict=True):
            values = rows.float()
            normalizers.append(values.logsumexp(dim=-1))
            picked = values.gather(1, wanted.clamp(min=0)[:, None]).squeeze(1)
            total += ((normalizers[-1] - picked) * (wanted != IGNORED)).sum()
        ctx.save_for_backward(logits, labels, torch.cat(normalizers))
        ctx.chunk = chunk
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, normalizers = ctx.saved_tensors
        result = torch.empty_like(logits)
        pieces = (tensor.split(ctx.chunk) for tensor in (logits, labels, normalizers, result))
        for rows, wanted, normalizer, place in zip(*pieces, strict=True):
            values = (rows.float() - normalizer[:, None]).exp_()
            one = torch.ones_like(wanted, dtype=values.dtype)[:, None]
            values.scatter_add_(1, wanted.clamp(min=0)[:, None], -one)
            place.copy_(values.mul_((gradient * (wanted != IGNORED))[:, None]))
        return result, None, None


def summed_cross_entropy(logits: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Cross-entropy summed over labels, as `torch.nn.functional.cross_entropy` gives it of float32 logits.

    Logits of lower precision are read in float32 without a float32 copy of all of them; their gradient has their own
    precision, as it has behind `.float()`.

    Args:
        logits: (T, V).
        labels: (T,), -100 where a row does not count.
        chunk: rows at a time; as many as have the device's `CHUNK_VALUES` when not given.

    Returns:
        A scalar in float32.
    """
    if logits.dtype == torch.float32:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
    values = CHUNK_VALUES.get(logits.device.type, CHUNK_VALUES["cpu"])
    return _SummedCrossEntropy.apply(logits, labels, chunk or max(1, values // logits.shape[-1]))
