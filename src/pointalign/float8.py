"""Frozen matrices multiplied in 8-bit floats while a model trains, on cards that do so faster than in bfloat16.

A product's rows are scaled, each by its own largest number, and so are the outputs of a matrix; both are rounded to e4m3 (four
bits of exponent, three of mantissa) and the products summed and given back in bfloat16. A matrix is frozen, so it is rounded
once, and a second time the other way round for the way back. Weights, what trains and what is saved stay as they are.

Source: FP8 formats (arXiv 2209.05433), section 3; a scale for each row as in torchao's `rowwise` recipe of float8 training.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pointalign.decoder_blocks import find_decoder_layers, of_class

KIND = torch.float8_e4m3fn
# Below this width a product takes no less time; and kernels want widths in steps of 16.
NARROWEST, STEP = 128, 16
# Rows of the product that is tried.
TRIED = 128


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (..., D) in e4m3 and their scales (..., 1), by which they are divided: each row's largest number is e4m3's, 448."""
    # Numbers stand here, not in constants: PyTorch would compile those as inputs, and fails inside a product. The least one
    # keeps the scale of a row of zeros a normal number.
    largest = rows.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-30)
    return (rows.float() * (448.0 / largest)).to(KIND), largest / 448.0


class _Product(torch.autograd.Function):
    """Rows times a frozen matrix, both in 8-bit floats, forward and back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, bias: Tensor | None, forth: Tensor, forth_scale: Tensor, *back: Tensor
    ) -> Tensor:
        """(N, in) to (N, out)."""
        ctx.save_for_backward(*back)
        return _multiply(rows, forth, forth_scale, bias, fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(N, out) to (N, in); sums are kept in full precision, as in Transformer Engine and torchao."""
        matrix, scale = ctx.saved_tensors
        return _multiply(gradient, matrix, scale, None, fast=False), None, None, None, None, None


def _multiply(rows: Tensor, matrix: Tensor, scale: Tensor, bias: Tensor | None, fast: bool) -> Tensor:
    # torch.nn.functional.scaled_mm is what is public, but PyTorch 2.11 cannot compile it.
    rounded, row_scale = to_float8(rows)
    return torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
        rounded.contiguous(), matrix.t(), row_scale, scale.t(), bias=bias, out_dtype=rows.dtype, use_fast_accum=fast
    )


class Float8Linear(nn.Linear):
    """A frozen linear in bfloat16 whose products are taken in 8-bit floats; made of one in its place by `round_weight`."""

    rounded: tuple[Tensor, ...]
    rounded_bias: Tensor | None

    def round_weight(self) -> None:
        """Keep the matrix (out, in) in 8-bit floats, and the other way round, each with its scales; the bias in bfloat16."""
        weight = self.weight.detach()
        self.rounded = (*to_float8(weight), *to_float8(weight.t().contiguous()))
        self.rounded_bias = None if self.bias is None else self.bias.detach().to(weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """(..., in) in any precision to (..., out) in the weight's."""
        rows = input.to(self.weight.dtype).reshape(-1, self.in_features)
        output: Any = _Product.apply(rows, self.rounded_bias, *self.rounded)
        return output.unflatten(0, input.shape[:-1])


def frozen_linears(model: nn.Module) -> list[nn.Linear]:
    """The linears of any Hugging Face model's decoder blocks that can be multiplied in 8-bit floats.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    return [
        module
        for module in find_decoder_layers(model).modules()
        if type(module) is nn.Linear
        and module.weight.dtype == torch.bfloat16
        and not any(weight.requires_grad for weight in module.parameters())
        and all(size >= NARROWEST and size % STEP == 0 for size in module.weight.shape)
    ]


def why_not_float8(model: nn.Module, split: bool) -> str | None:
    """What keeps a model from being trained on products in 8-bit floats, for people; None when nothing does.

    Args:
        model: where it will train; its first product is tried, forward and back.
        split: whether weights are split over processes.
    """
    if split:
        return "weights are split over the processes"
    linears = frozen_linears(model)
    if not linears:
        return "the language model has no frozen matrices in bfloat16"
    first = linears[0]
    try:
        with _rounded([first]):
            first(first.weight.new_ones(TRIED, first.in_features, requires_grad=True)).sum().backward()
    except RuntimeError as error:  # what devices say that cannot do it, each in its own way
        told = str(error).splitlines()[0]
        return f"PyTorch {torch.__version__} does not multiply them here, but on GPUs from compute capability 8.9 on ({told})"
    return None


@contextmanager
def float8_products(model: nn.Module, wanted: bool) -> Iterator[None]:
    """While this lasts, the frozen matrices of a model's decoder blocks are multiplied in 8-bit floats.

    They are kept in them beside the weights, which takes as much memory again.

    Args:
        model: see `why_not_float8`.
        wanted: False changes nothing.

    Raises:
        ConfigError: when the blocks cannot be found.
    """
    with _rounded(frozen_linears(model) if wanted else []):
        yield


@contextmanager
def _rounded(linears: Any) -> Iterator[None]:
    with of_class(linears, Float8Linear):
        for linear in linears:
            linear.round_weight()
        try:
            yield
        finally:
            for linear in linears:
                del linear.rounded, linear.rounded_bias
