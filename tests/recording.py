"""What `torch.cuda.make_graphed_callables` promises, on a CPU: fixed buffers in and out, nothing else is looked at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Recorded:
    """Counts recordings and replays, and runs each recorded callable on its own buffers alone."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.replays = 0

    def __call__(
        self, callables: Sequence[nn.Module], samples: Sequence[Sequence[Tensor]], allow_unused_input: bool, pool: Any
    ) -> tuple[Callable[..., Tensor], ...]:
        """As `torch.cuda.make_graphed_callables`, for callables of one output."""
        assert not (torch.is_autocast_enabled("cpu") and torch.is_autocast_cache_enabled())
        self.lengths.append(samples[0][0].shape[1])
        assert not any(c._forward_hooks or c._forward_pre_hooks for c in callables)
        return tuple(self._replayed(one, tuple(sample)) for one, sample in zip(callables, samples, strict=True))

    def _replayed(self, module: nn.Module, buffers: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        weights, mixed = tuple(module.parameters()), torch.is_autocast_enabled("cpu")
        kept: dict[int, Tensor] = {}
        surface = [tensor for tensor in (*buffers, *weights) if tensor.requires_grad]
        told = self

        def in_place(number: int, value: Tensor) -> Tensor:
            """In the same memory at every replay."""
            place = kept.setdefault(number, torch.empty_like(value))
            place.data.copy_(value.detach())
            return place.detach()

        class Replay(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, *inputs: Tensor) -> Tensor:
                told.replays += 1
                for buffer, given in zip(buffers, inputs, strict=False):
                    assert (buffer.shape, buffer.dtype) == (given.shape, given.dtype)
                    buffer.data.copy_(given)  # as a card does, behind autograd's back
                with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, mixed, cache_enabled=False):
                    ctx.output = module(*buffers)
                return in_place(-1, ctx.output)

            @staticmethod
            def backward(ctx: Any, *gradients: Tensor) -> Any:
                found = torch.autograd.grad(ctx.output, surface, gradients[0], allow_unused=True)
                placed = iter([value if value is None else in_place(n, value) for n, value in enumerate(found)])
                return tuple(next(placed) if tensor.requires_grad else None for tensor in (*buffers, *weights))

        return lambda *inputs: Replay.apply(*inputs, *weights)
