"""The decoder blocks of any Hugging Face model, and how their hidden states are read: by hooks, at chosen positions alone.

Letters: B batch, L sequence length, D width. Layer 0 is what enters the first block; layer k is the output of the k-th.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pointalign.errors import ConfigError

# What the compiler is asked for on a GPU: small kernels of one kind in one launch, and of two ways to write a norm the one that
# it measures to be faster. 3 % of a step on an H100, compiled in the same time (docs/LOG.md, 2026-11-26).
GPU_OPTIONS = {"combo_kernels": True, "triton.multi_kernel": 1}


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of any Hugging Face language or vision-language model, found by their number.

    Raises:
        ConfigError: when no list of blocks has the length that the model's config states.
    """
    config: Any = getattr(model, "config", None)
    text_config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    count = getattr(text_config, "num_hidden_layers", None)
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # pyright: ignore[reportCallIssue]
    roots = [root for root in (decoder, model) if isinstance(root, nn.Module)]
    for root in roots:
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ConfigError(
        f"found no list of {count} decoder blocks in {type(model).__name__}; pass `layers_module` yourself"
    )


def block_output(output: Any) -> Tensor:
    """The hidden states (B, L, D) in what a decoder block returns."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def compiled_blocks(model: nn.Module, wanted: bool, device: torch.device) -> Iterator[None]:
    """While this lasts, the decoder blocks of any Hugging Face model run as one graph that they share, for any length.

    Hooks on blocks stay outside of the graph. Compiling takes a minute or so, in the first step.

    Args:
        model: its blocks are found by their number.
        wanted: False changes nothing.
        device: on which the model will compute, wherever it is now.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    blocks: Any = find_decoder_layers(model) if wanted else []
    options = GPU_OPTIONS if device.type == "cuda" else None
    compiled = [torch.compile(block.forward, dynamic=True, options=options) for block in blocks]
    with replaced_forwards(blocks, [_as_inner(forward) for forward in compiled[:1]] + compiled[1:]):
        yield


@contextmanager
def replaced_forwards(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """While this lasts, blocks have other forward passes; then again those of their own namespace, or their class's."""
    own = [block.__dict__.get("forward") for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    try:
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@contextmanager
def of_class(modules: Sequence[nn.Module], kind: type[nn.Module]) -> Iterator[None]:
    """While this lasts, modules are of another class, a subclass of theirs; then again of their own."""
    own = [type(module) for module in modules]
    for module in modules:
        module.__class__ = kind
    try:
        yield
    finally:
        for module, was in zip(modules, own, strict=True):
            module.__class__ = was


def _as_inner(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The first block called as the others are, with a tensor of its own that has a gradient: else it is compiled apart."""

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        own = hidden_states.clone()
        if torch.is_grad_enabled() and not own.requires_grad:
            own.requires_grad_()
        return compiled(own, *args, **kwargs)

    return forward


@contextmanager
def reading_layers(
    model: nn.Module, read: Callable[[int, Tensor], None], layers_module: nn.ModuleList | None = None
) -> Iterator[int]:
    """Hand every layer's hidden states to a function while the model runs; nothing is kept of them, or of the hooks.

    Args:
        model: any Hugging Face model.
        read: called with the layer (0 for what enters the first block) and its hidden states (B, L, D).
        layers_module: the decoder's blocks, when `find_decoder_layers` cannot find them.

    Yields:
        The number of blocks.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    blocks = layers_module if layers_module is not None else find_decoder_layers(model)

    def enters(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        read(0, args[0] if args else kwargs["hidden_states"])

    def leaves(layer: int) -> Callable[..., None]:
        return lambda module, args, output: read(layer, block_output(output))

    handles = [blocks[0].register_forward_pre_hook(enters, with_kwargs=True)]
    handles += [block.register_forward_hook(leaves(number)) for number, block in enumerate(blocks, start=1)]
    try:
        yield len(blocks)
    finally:
        for handle in handles:
            handle.remove()
