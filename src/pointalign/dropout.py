"""Dropout that a compiler can put into its neighbours: what is left out follows from a hash of its place.

A compiled block draws a random number of its own for each place, some hundred operations by Philox, and on a GPU that takes
longer than all else a norm does. Here a step draws a few keys for each dropout, and the numbers are hashed from key and place.

Source: dropout (Srivastava et al., 2014); the hash is lowbias32 of C. Wellons' hash-prospector (public domain), twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from pointalign.decoder_blocks import find_decoder_layers, of_class

# The factors of lowbias32, as signed numbers of 32 bits.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32
# Bits of a hash that are held against the probability.
BITS = 24


def _mixed(number: Tensor) -> Tensor:
    """lowbias32: each bit of an int32 turns every bit of the result with a probability of about a half."""
    # Shifts of signed numbers carry the sign along, so it is masked out.
    number = (number ^ ((number >> 16) & 0xFFFF)) * FIRST
    number = (number ^ ((number >> 15) & 0x1FFFF)) * SECOND
    return number ^ ((number >> 16) & 0xFFFF)


def kept_places(shape: torch.Size, key: Tensor, p: float) -> Tensor:
    """Which numbers of a tensor stay, each with probability 1 - p to 2**-24.

    Args:
        shape: of the tensor, fewer than 2**31 numbers.
        key: (2,) int32; another one keeps others.
        p: the probability to be left out.

    Returns:
        bool, of the shape.
    """
    place = torch.arange(math.prod(shape), dtype=torch.int32, device=key.device).view(shape)
    number = _mixed(_mixed(place ^ key[0]) + key[1])
    return (number & (2**BITS - 1)) >= round(p * 2**BITS)


class HashedDropout(nn.Dropout):
    """A dropout whose places are hashed from a key, which is another one at each step; made of one in its place.

    Called twice in a step it leaves out the same places twice.

    Attributes:
        key: (2,) int32.
    """

    key: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same; what stays is divided by 1 - p."""
        if not self.training:
            return input
        return torch.where(kept_places(input.shape, self.key, self.p), input * (1 / (1 - self.p)), 0.0)


def dropouts_called_once(blocks: nn.Module) -> list[nn.Dropout]:
    """The dropouts of decoder blocks that a forward pass calls once each: those of LoRA, and those that a block's class names.

    Others may be called twice, as that of transformers' Phi is, or by every block.
    """
    found: list[Any] = []
    for module in blocks.modules():
        if isinstance(module, LoraLayer):
            found += module.lora_dropout.values()
        found += [getattr(module, name) for name in getattr(module, "called_once", ())]
    return [one for one in dict.fromkeys(found) if type(one) is nn.Dropout and 0 < one.p < 1 and not one.inplace]


@contextmanager
def hashed_dropout(model: nn.Module, wanted: bool, device: torch.device) -> Iterator[None]:
    """While this lasts, the decoder blocks of any Hugging Face model drop hashed places, others at each forward pass.

    One step must go forward and back before the next one begins: a second pass through a block, as gradient checkpointing
    takes, drops the same places, those of the model's last forward pass. Keys come from PyTorch's own random numbers.

    Args:
        model: its forward pass draws the keys; see `dropouts_called_once`.
        wanted: False changes nothing.
        device: on which the model will compute, wherever it is now.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    found: list[Any] = dropouts_called_once(find_decoder_layers(model)) if wanted else []
    if not found:
        yield
        return
    drawn = torch.zeros(len(found), 2, dtype=torch.int32, device=device)
    # Blocks that were handed rows of one tensor would be compiled once for each way in which these lie to one another.
    rows = drawn.unbind()
    keys = [row.clone() for row in rows]

    def draw(*called: Any) -> None:
        drawn.random_()
        torch._foreach_copy_(keys, rows)  # pyright: ignore[reportPrivateImportUsage]

    drawing = model.register_forward_pre_hook(draw)
    with of_class(found, HashedDropout):
        for module, key in zip(found, keys, strict=True):
            module.key = key
        try:
            yield
        finally:
            drawing.remove()
            for module in found:
                del module.key
