"""The regulariser: keep a decoder's intermediate point tokens aligned with features that hold the geometry.

It is a guest in the model: one forward hook on one decoder layer of any Hugging Face model while training, nothing
afterwards. Letters: B batch, L sequence length, T point tokens in the batch, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pointalign.decoder_blocks import block_output, find_decoder_layers
from pointalign.errors import ConfigError, DataError

AlignmentLoss = Literal["cosine", "l1", "l2"]
AlignmentSchedule = Literal["constant", "linear", "stop"]


def _token_losses(projected: Tensor, target: Tensor, kind: AlignmentLoss) -> Tensor:
    """One loss per token for rows (T, D); the target gives no gradient; computed in float32."""
    projected, target = projected.float(), target.detach().float()
    if kind == "cosine":
        return 1 - F.cosine_similarity(projected, target, dim=-1)
    if kind == "l1":
        return (projected - target).abs().mean(dim=-1)
    if kind == "l2":
        return (projected - target).square().mean(dim=-1)
    raise ConfigError(f"unknown alignment loss {kind!r}; choose cosine, l1 or l2")


def _check_match(projected: Tensor, target: Tensor) -> None:
    """See that rows (T, D) have targets of their number and width; one value would be spread over a row otherwise."""
    if len(projected) != len(target):
        raise DataError(
            f"{len(target)} alignment targets for {len(projected)} point tokens; the mask and target must match"
        )
    if projected.shape[-1] != target.shape[-1]:
        raise DataError(
            f"alignment targets are {target.shape[-1]} wide and projected point tokens {projected.shape[-1]}; give the "
            "regulariser (or projector) the targets' width"
        )


def _select_target(target: Tensor, mask: Tensor) -> Tensor:
    """Rows of the target, one per true position of the mask, in the mask's order; with positions it has no other rows."""
    if mask.dtype == torch.bool and target.shape[:-1] == mask.shape:
        return target[mask]
    return target.reshape(-1, target.shape[-1])


def _select_hidden(hidden: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (B, L, D) at the true positions of a mask (B, L), or at flat positions (T,)."""
    mask = mask.to(hidden.device)
    return hidden[mask] if mask.dtype == torch.bool else hidden.flatten(0, -2).index_select(0, mask)


def alignment_loss(projected: Tensor, target: Tensor, mask: Tensor, kind: AlignmentLoss = "cosine") -> Tensor:
    """Mean over point tokens of the distance between projected hidden states and their targets.

    Args:
        projected: (..., D), the projector's output, at every position of the mask.
        target: (..., D) of the same leading shape, or (T, D) / (clouds, Q, D) with one row per true position, in order.
            It never receives a gradient.
        mask: (...) bool, true at the point tokens.
        kind: "cosine" is 1 - cos (the paper's loss); "l1" and "l2" are the mean absolute and squared difference over D
            (the paper's table of losses).

    Returns:
        A scalar in float32. Without any true position it is exactly zero and still back-propagates.

    Raises:
        DataError: when the targets are not as many as the true positions, or not as wide.

    Source: PointAlign (arXiv 2603.00412), alignment loss: L_align = mean(1 - cos(g(h), q)).
    """
    mask = mask.bool()
    rows, targets = projected[mask], _select_target(target, mask)
    _check_match(rows, targets)
    losses = _token_losses(rows, targets, kind)
    return losses.mean() if len(rows) else projected.sum() * 0.0


class AlignmentProjector(nn.Module):
    """A small MLP from the language model's width to the target's: g in L_align = mean(1 - cos(g(h), q)).

    With depth 3 it is linear D_in-H, SiLU, linear H-H, SiLU, linear H-D_out with H = (D_in + D_out) // 2; depth 2 leaves
    out the middle pair, depth 1 is one linear D_in-D_out. It exists only in training.

    Args:
        input_size: D_in, the language model's hidden size.
        output_size: D_out, the target's width.
        depth: number of linears, 1 to 3.
        hidden_size: H, if not the mean of the two widths.

    Raises:
        ConfigError: for a depth outside 1 to 3.

    Source: PointAlign (arXiv 2603.00412), alignment projector and its ablation of depth.
    """

    def __init__(self, input_size: int, output_size: int, depth: int = 3, hidden_size: int | None = None) -> None:
        super().__init__()
        if not 1 <= depth <= 3:
            raise ConfigError(f"the alignment projector's depth is 1, 2 or 3 linears, not {depth}")
        hidden = hidden_size or (input_size + output_size) // 2
        sizes = [input_size, *[hidden] * (depth - 1), output_size]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(sizes):
            layers += [nn.Linear(width_in, width_out), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D_in) to (..., D_out)."""
        return self.layers(hidden_states)


def pool_target(features: Tensor, count: int) -> Tensor:
    """Average neighbouring tokens so that a target has as many tokens as the language model sees.

    The pooling is fixed (adaptive average over the token axis, nothing learned). With equal counts it is the identity.

    Args:
        features: (B, S, D).
        count: tokens wanted.

    Returns:
        (B, count, D).
    """
    if features.shape[1] == count:
        return features
    return F.adaptive_avg_pool1d(features.transpose(1, 2), count).transpose(1, 2)


def schedule_weight(weight: float, schedule: AlignmentSchedule, progress: float, stop_fraction: float = 1.0) -> float:
    """The loss's weight at a point of training.

    Args:
        weight: the weight at the start.
        schedule: "constant"; "linear" falls to zero at `stop_fraction`; "stop" is constant up to `stop_fraction`, then 0.
        progress: share of the training steps done, 0 to 1.
        stop_fraction: where "linear" and "stop" reach zero.

    Source: constant in PointAlign (arXiv 2603.00412); early stop after HASTE (arXiv 2505.16792).
    """
    if schedule == "constant":
        return weight
    if progress >= stop_fraction:
        return 0.0
    return weight if schedule == "stop" else weight * (1 - progress / stop_fraction)


def check_layers(layers: Sequence[int], blocks: int) -> None:
    """See that a model of so many decoder blocks has these layers.

    Raises:
        ConfigError: when it has not.
    """
    for layer in layers:
        if not 1 <= layer <= blocks:
            raise ConfigError(f"alignment layer {layer} does not exist: choose 1 to {blocks} for this model")


@dataclass
class AlignmentTerm:
    """The alignment loss of one forward pass, as a sum so that batches can be joined exactly.

    Args:
        total: scalar, sum over point tokens (mean over tapped layers).
        count: number of point tokens.
        weight: the weight in force.
    """

    total: Tensor
    count: int
    weight: float

    @property
    def mean(self) -> Tensor:
        """Mean over point tokens; exactly zero where there is none."""
        return self.total / max(self.count, 1)


class AlignmentRegularizer(nn.Module):
    """Adds the alignment loss to the training of any Hugging Face decoder.

    `attach(model)` hooks the model and the tapped block and registers this module inside the model, so that optimizers,
    DDP and FSDP see the projector's weights; `detach()` leaves the model as it was. While attached, a call of the model
    with the two extra arguments `alignment_mask` (B, L) and `alignment_target` leaves an `AlignmentTerm`, which `take()`
    hands over; a call without them is an ordinary call. The target is a tensor (rows as in `alignment_loss`) or a function
    of the model's output that gives one. Hidden states are read at one layer and only where the mask is true. In place of
    the mask, the flat positions of its true values may be given as a 1-D integer tensor, with one row of the target for
    each: a GPU has to be waited for to look them up in a mask.

    Args:
        hidden_size: D of the language model.
        target_size: width of the target.
        layers: which hidden states are aligned; k is the output of the k-th block, so 15 is what enters the 16th block.
            Several layers have a projector each, and their losses are averaged.
        weight: weight of the loss.
        loss: "cosine", "l1" or "l2".
        depth: linears of the projector.
        schedule: how the weight changes, see `schedule_weight`.
        stop_fraction: see `schedule_weight`.
        seed: of the projector's initial weights; the global generator is left untouched.

    Source: PointAlign (arXiv 2603.00412): layer 15 of 32, weight 0.1, 3 linears.
    """

    def __init__(
        self,
        hidden_size: int,
        target_size: int,
        layers: Sequence[int] = (15,),
        weight: float = 0.1,
        loss: AlignmentLoss = "cosine",
        depth: int = 3,
        schedule: AlignmentSchedule = "constant",
        stop_fraction: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not layers:
            raise ConfigError("alignment.layers is empty; name at least one layer")
        self.layers, self.target_size = tuple(layers), target_size
        self.weight, self.stop_fraction = weight, stop_fraction
        self.loss: AlignmentLoss = loss
        self.schedule: AlignmentSchedule = schedule
        self.progress = 0.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projectors = nn.ModuleDict(
                {str(layer): AlignmentProjector(hidden_size, target_size, depth) for layer in self.layers}
            )
        self._handles: list[Any] = []
        self._host: list[nn.Module] = []
        self._request: tuple[Tensor, Tensor | Callable[[Any], Tensor]] | None = None
        self._captured: dict[int, Tensor] = {}
        self._term: AlignmentTerm | None = None

    def attach(self, model: nn.Module, layers_module: nn.ModuleList | None = None) -> AlignmentRegularizer:
        """Hook a model; see the class.

        Args:
            model: any Hugging Face model; its forward is called with the two extra arguments.
            layers_module: the decoder's blocks, when `find_decoder_layers` cannot find them.

        Raises:
            ConfigError: when already attached, or the model has another one, or when a layer does not exist.
        """
        if self._handles:
            raise ConfigError("this regulariser is attached already; call detach() first")
        if hasattr(model, "alignment_regularizer"):
            raise ConfigError("the model has a regulariser already; call its alignment_regularizer.detach() first")
        blocks = layers_module if layers_module is not None else find_decoder_layers(model)
        check_layers(self.layers, len(blocks))
        self._handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.register_forward_hook(self._after_model),
            *(blocks[layer - 1].register_forward_hook(self._capture(layer)) for layer in self.layers),
        ]
        model.add_module("alignment_regularizer", self)
        self._host = [model]
        return self

    def detach(self) -> None:
        """Remove the hooks and leave the model; nothing remains of the regulariser in it."""
        for handle in self._handles:
            handle.remove()
        for model in self._host:
            del model.alignment_regularizer
        self._handles, self._host = [], []

    @property
    def current_weight(self) -> float:
        """The weight at the present `progress` of training."""
        return schedule_weight(self.weight, self.schedule, self.progress, self.stop_fraction)

    def take(self) -> AlignmentTerm:
        """Hand over the last forward pass's loss, once.

        Raises:
            ConfigError: when no forward pass with a mask and a target came before.
        """
        if self._term is None:
            raise ConfigError(
                "no alignment loss to take: call the attached model with alignment_mask and alignment_target first"
            )
        term, self._term = self._term, None
        return term

    def _before_model(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        mask, target = kwargs.pop("alignment_mask", None), kwargs.pop("alignment_target", None)
        if (mask is None) != (target is None):
            raise DataError("alignment_mask and alignment_target belong together; give both or neither")
        if mask is not None and (mask.ndim > 1 or mask.dtype == torch.bool):
            mask = mask.bool()
        self._request = None if mask is None else (mask, target)
        self._captured, self._term = {}, None
        return args, kwargs

    def _capture(self, layer: int) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            # A recomputation for gradient checkpointing runs in the backward pass, when no request is open.
            if self._request is not None:
                self._captured[layer] = block_output(output)

        return hook

    def _after_model(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self._request is None:
            return
        (mask, target), self._request = self._request, None
        rows_of_target = _select_target(target(output) if callable(target) else target, mask)
        totals = []
        for layer in self.layers:
            if layer not in self._captured:
                raise ConfigError(f"decoder block {layer} did not run in this forward pass; alignment cannot read it")
            hidden = self._captured[layer]
            if torch.is_grad_enabled() and not hidden.requires_grad:
                raise ConfigError(
                    f"the hidden states of block {layer} carry no gradient, so alignment would train nothing: with "
                    "gradient checkpointing use `use_reentrant=False`; else let something before that block train"
                )
            totals.append(self._layer_total(layer, hidden, mask, rows_of_target))
        self._captured = {}
        self._term = AlignmentTerm(torch.stack(totals).mean(), len(rows_of_target), self.current_weight)

    def _layer_total(self, layer: int, hidden: Tensor, mask: Tensor, target: Tensor) -> Tensor:
        rows = _select_hidden(hidden, mask)
        projector = self.projectors[str(layer)]
        weight = next(projector.parameters())
        projected = projector(rows.to(weight.dtype))
        _check_match(projected, target)
        return _token_losses(projected, target.to(weight.device), self.loss).sum()
