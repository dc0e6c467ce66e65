"""LoRA whose second matrix is scaled, in place of what it adds, while a model trains.

peft multiplies what an adapter adds, as wide as the layer's output, and on the way back that output's gradient: two passes
over all of it. The matrix is small, and is cast at each step anyway.

Source: LoRA (arXiv 2106.09685), section 4.1: h = W x + (alpha / r) B A x.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn

from pointalign.decoder_blocks import find_decoder_layers, of_class


class EarlyScaled(Linear):
    """A LoRA linear of peft that scales its second matrix; made of one in its place."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in) to (..., out), with the one adapter that is active."""
        (name,) = self.active_adapters
        down: Any = self.lora_A[name]
        result = self.base_layer(x, *args, **kwargs)
        narrow = down(self.lora_dropout[name](self._cast_input_dtype(x, down.weight.dtype)))
        return (result + F.linear(narrow, self.lora_B[name].weight * self.scaling[name])).to(result.dtype)


def is_plain(module: nn.Module) -> bool:
    """Whether a module is a LoRA linear of peft with one adapter, active, not merged, of no other kind, and without a bias
    or hooks at its second matrix, which is not called."""
    if type(module) is not Linear or module.merged or module.disable_adapters or module.lora_variant:
        return False
    ups: Any = list(module.lora_B.values())
    if len(ups) != 1 or module.active_adapters != list(module.lora_B) or ups[0].bias is not None:
        return False
    return not any((ups[0]._forward_hooks, ups[0]._forward_pre_hooks, ups[0]._backward_hooks))


@contextmanager
def early_scaling(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While this lasts, the plain LoRA linears of a model's decoder blocks scale their second matrix.

    Args:
        model: any Hugging Face model; adapters must stay as they are.
        wanted: False changes nothing.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    blocks = find_decoder_layers(model) if wanted else nn.ModuleList()
    with of_class([module for module in blocks.modules() if is_plain(module)], EarlyScaled):
        yield
