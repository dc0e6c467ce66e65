"""Dropout that a compiler can put into its neighbours: what is left out follows from a hash of its place.

A compiled block draws a random number of its own for each place, some hundred operations by Philox, and on a GPU that takes
longer than all else a norm does. Here a step draws a few keys for each dropout, and the numbers are hashed from key and place.

Source: dropout (Srivastava et al., 2014); the hash is lowbias32 of C. Wellons' hash-prospector (public domain), twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pointalign.decoder_blocks import find_decoder_layers

# The factors of lowbias32, as signed numbers of 32 bits.
FIRST, SECOND = 0x7FEB352D, 0x846CA68B - 2**32
# Bits of a hash that are held against the probability, and keys of a dropout.
BITS, KEYS = 24, 2


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
    place = torch.arange(shape.numel(), dtype=torch.int32, device=key.device).view(shape)
    number = _mixed(_mixed(place ^ key[0]) + key[1])
    return (number & (2**BITS - 1)) >= round(p * 2**BITS)


class HashedDropout(nn.Dropout):
    """A dropout whose places are hashed from a key, which is another one at each step; made of one in its place.

    Attributes:
        key: (2,) int32.
    """

    key: Tensor

    def forward(self, input: Tensor) -> Tensor:
        """Any shape to the same; what stays is divided by 1 - p."""
        if not self.training:
            return input
        return torch.where(kept_places(input.shape, self.key, self.p), input * (1 / (1 - self.p)), 0.0)


@contextmanager
def hashed_dropout(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While this lasts, the decoder blocks of any Hugging Face model drop hashed places, others at each forward pass.

    A second forward pass through a block, as gradient checkpointing takes, drops the same ones. Keys come from PyTorch's own
    random numbers.

    Args:
        model: on its device; its forward pass draws the keys.
        wanted: False changes nothing.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    blocks = find_decoder_layers(model) if wanted else nn.ModuleList()
    found: list[Any] = [module for module in blocks.modules() if type(module) is nn.Dropout and 0 < module.p < 1]
    if not found:
        yield
        return
    drawn = torch.zeros(len(found), KEYS, dtype=torch.int32, device=next(blocks.parameters()).device)
    # Blocks that were handed rows of one tensor would be compiled once for each way in which these lie to one another.
    rows = drawn.unbind()
    keys = [row.clone() for row in rows]

    def draw(*called: Any) -> None:
        drawn.random_()
        torch._foreach_copy_(keys, rows)  # pyright: ignore[reportPrivateImportUsage]

    drawing = model.register_forward_pre_hook(draw)
    for module, key in zip(found, keys, strict=True):
        module.__class__, module.key = HashedDropout, key
    try:
        yield
    finally:
        drawing.remove()
        for module in found:
            del module.key
            module.__class__ = nn.Dropout
