"""The Phi variant's heads on a GPU: norms of query and key, rotary and layout in one pass over what the fused linear gives.

Written out in torch these are a dozen kernels, most of them over rows of 80 numbers, for which neither PyTorch nor its
compiler has a good one. Letters: B batch, L length, H heads, D width of a head, R how many of the D are rotated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pointalign.geometry import kernel_runs


def one_pass(fused: Tensor, norms: Sequence[Tensor]) -> bool:
    """Whether `split_heads` is for a tensor: on a GPU it is; a CPU's own kernels suit these rows.

    Norms whose weights lie elsewhere, offloaded by accelerate, are fetched when they are called as modules.
    """
    return fused.is_cuda and all(norm.device == fused.device for norm in norms)


@torch.library.custom_op("pointalign::split_heads", mutates_args=())
def split_heads(
    fused: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normalised and rotated, and values, in the input's precision; computed in float32.

    Args:
        fused: (B, L, H, 3, D), query, key and value of each head.
        query_weight: (D,) of the LayerNorm of queries.
        query_bias: (D,).
        key_weight: (D,) of the LayerNorm of keys.
        key_bias: (D,).
        cos: (B or 1, L, R), as transformers' rotary embedding gives it.
        sin: as cos.
        eps: of both norms.

    Returns:
        Three tensors (B, L, H, D).
    """
    norms = (query_weight, query_bias, key_weight, key_bias)
    if kernel_runs(fused.device):
        from pointalign.kernels import launch_split_heads

        return launch_split_heads(fused, norms, cos, sin, eps)
    found = [
        _rotated(
            _normalized(fused[..., part, :], eps)[0] * norms[2 * part].float() + norms[2 * part + 1].float(), cos, sin
        )
        for part in range(2)
    ]
    query, key = (tensor.to(fused.dtype) for tensor in found)
    return query, key, fused[..., 2, :].clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("pointalign::join_heads", mutates_args=())
def join_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fused: Tensor,
    query_weight: Tensor,
    key_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The way back through `split_heads`.

    Args:
        query: gradient (B, L, H, D) of the queries.
        key: of the keys.
        value: of the values.
        fused: what `split_heads` was given, and so are all others.
        query_weight: see there.
        key_weight: see there.
        cos: see there.
        sin: see there.
        eps: see there.

    Returns:
        The gradient (B, L, H, 3, D) of `fused` in its precision, and those of the norms, float32 (4, D): weight and bias of
        queries, weight and bias of keys.
    """
    if kernel_runs(fused.device):
        from pointalign.kernels import launch_join_heads

        return launch_join_heads((query, key, value), fused, (query_weight, key_weight), cos, sin, eps)
    parts, norms = [], []
    for part, (gradient, weight) in enumerate(((query, query_weight), (key, key_weight))):
        normal, scale = _normalized(fused[..., part, :], eps)
        plain = _rotated(gradient.float(), cos, sin, back=True)
        norms += [(plain * normal).sum(dim=(0, 1, 2)), plain.sum(dim=(0, 1, 2))]
        inner = plain * weight.float()
        along = (inner * normal).mean(dim=-1, keepdim=True)
        parts.append((inner - inner.mean(dim=-1, keepdim=True) - normal * along) * scale)
    return torch.stack([*parts, value.float()], dim=-2).to(fused.dtype), torch.stack(norms)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean 0 and variance 1 along the last dimension in float32, and what it was multiplied by."""
    x = x.float()
    variance, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    scale = (variance + eps).rsqrt()
    return (x - mean) * scale, scale


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """The first R of (B, L, H, D) rotated, or turned back; the halves of the R are pairs, as in transformers."""
    cos, sin = cos.float().unsqueeze(2), sin.float().unsqueeze(2)
    size = cos.shape[-1]
    turning, rest = x[..., :size], x[..., size:]
    other = turning * sin if back else turning
    first, second = other.chunk(2, dim=-1)
    crossed = torch.cat([second, -first] if back else [-second, first], dim=-1)
    return torch.cat([turning * cos + (crossed if back else crossed * sin), rest], dim=-1)


@split_heads.register_fake
def _split_shapes(fused: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (fused.new_empty(*fused.shape[:3], fused.shape[4]) for _ in range(3))
    return query, key, value


@join_heads.register_fake
def _join_shapes(query: Tensor, key: Tensor, value: Tensor, fused: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    return fused.new_empty(fused.shape), fused.new_empty(4, fused.shape[4], dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    fused, query_weight, _, key_weight, _, cos, sin, ctx.eps = inputs
    ctx.save_for_backward(fused, query_weight, key_weight, cos, sin)
    ctx.types = [tensor.dtype for tensor in inputs[1:5]]


def _back(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
    gradient, norms = join_heads(query, key, value, *ctx.saved_tensors, ctx.eps)
    return gradient, *(norm.to(kind) for norm, kind in zip(norms.unbind(0), ctx.types, strict=True)), None, None, None


split_heads.register_autograd(_back, setup_context=_keep)
