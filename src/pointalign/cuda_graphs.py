"""Decoder blocks as CUDA graphs: a step's thousands of small launches become a few, so that no card waits for its host.

What is recorded has fixed shapes and addresses, so batches are rounded up (`packing.rounded_up`) and each rounded shape is
recorded once, when it comes for the second time. A stretch of blocks is recorded as one graph forward and one back; it ends
where a hook reads a block's output.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pointalign.decoder_blocks import find_decoder_layers, replaced_forwards
from pointalign.errors import PointAlignError
from pointalign.progress import say

# Shapes that are recorded at most, and the share of the device's memory that their gradients may take: each keeps a gradient
# of everything that trains. What comes later runs as if nothing were recorded.
MOST_SHAPES, GRADIENTS_SHARE = 48, 0.15


class _Stretch(nn.Module):
    """Blocks that run one after the other on what the first one gets; its hooks and theirs are left out.

    Args:
        blocks: in order.
        forwards: their forward passes.
        spec: how the tensors and constants of a call are put together.
        constants: of a call, None where a tensor stands.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        forwards: Sequence[Callable[..., Any]],
        spec: TreeSpec,
        constants: Sequence[Any],
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.forwards, self.spec, self.constants = list(forwards), spec, list(constants)

    def forward(self, hidden: Tensor, *tensors: Tensor) -> Tensor:
        """Hidden states (B, L, D) to those behind the last block."""
        given = iter(tensors)
        leaves = [next(given) if constant is None else constant[0] for constant in self.constants]
        kwargs = tree_unflatten(leaves, self.spec)
        for forward in self.forwards:
            hidden = forward(hidden, **kwargs)
        return hidden


class _Call:
    """The arguments of a block's call beside the hidden states, taken apart."""

    def __init__(self, hidden: Tensor, kwargs: dict[str, Any]) -> None:
        leaves, self.spec = tree_flatten(kwargs)
        self.tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        shapes = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in (hidden, *self.tensors))
        self.shape = (shapes, str(self.constants), str(self.spec))
        values = (constant[0] for constant in self.constants if constant is not None)
        self.plain = all(isinstance(value, _PLAIN) for value in values) and not any(
            t.requires_grad for t in self.tensors
        )

    def same(self, other: _Call) -> bool:
        """Whether another block is called with the very same tensors and the same constants."""
        return self.shape[1:] == other.shape[1:] and all(
            one is two for one, two in zip(self.tensors, other.tensors, strict=True)
        )


_PLAIN = (bool, int, float, str, type(None))


class _Shape:
    """What is known of one shape of the first block's call: seen, recorded, or not to be recorded.

    Attributes:
        entering: the type of what entered each block, and whether it has a gradient.
        graphs: by the number of a stretch's last block.
        hopeless: nothing will be recorded.
    """

    def __init__(self) -> None:
        self.entering: list[tuple[torch.dtype, bool]] = []
        self.graphs: dict[int, Callable[..., Tensor]] = {}
        self.hopeless = False


class BlockRecorder:
    """Runs a model's blocks, recorded where their shape has been recorded; see the module.

    Args:
        blocks: of the model, in order.
        record: as `torch.cuda.make_graphed_callables`.
        pool: of the graphs' memory, which all shapes share: a step goes forward and back before the next one begins.
    """

    def __init__(self, blocks: Sequence[nn.Module], record: Callable[..., Any], pool: Any) -> None:
        self.blocks, self.record, self.pool = list(blocks), record, pool
        self.forwards = [block.forward for block in self.blocks]
        self.most = self._most_shapes()
        self.shapes: dict[Any, _Shape] = {}
        self.now: _Shape | None = None
        self.first: _Call | None = None
        self.last: Callable[[], Tensor | None] = lambda: None
        self.told: set[str] = set()

    def _most_shapes(self) -> int:
        weights = [weight for block in self.blocks for weight in block.parameters() if weight.requires_grad]
        if not weights or not weights[0].is_cuda:
            return MOST_SHAPES
        room = GRADIENTS_SHARE * torch.cuda.get_device_properties(weights[0].device).total_memory
        return min(MOST_SHAPES, int(room / sum(weight.nbytes for weight in weights)))

    def tell(self, what: str) -> None:
        """Say something, once."""
        if what not in self.told:
            self.told.add(what)
            say(f"cuda_graphs: {what}")

    def ends(self) -> list[int]:
        """Numbers of the blocks whose output somebody reads, and of the last one."""
        read = [number for number, block in enumerate(self.blocks) if block._forward_hooks]
        return sorted({*read, len(self.blocks) - 1})

    def run(self, number: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A block's forward pass."""
        block, forward = self.blocks[number], self.forwards[number]
        if not (block.training and torch.is_grad_enabled()):
            return forward(hidden, *args, **kwargs)
        if number == 0:
            self._begin(hidden, args, kwargs)
        shape, first = self.now, self.first
        if shape is None or first is None or shape.hopeless:
            with _casting_anew(hidden.device):
                return forward(hidden, *args, **kwargs)
        if not shape.graphs:
            alike = not args and first.same(_Call(hidden, kwargs)) and not block._forward_pre_hooks
            alike = alike and (number == 0 or hidden is self.last())
            shape.entering.append((hidden.dtype, hidden.requires_grad))
            with _casting_anew(hidden.device):
                output = forward(hidden, *args, **kwargs)
            shape.hopeless = not alike or not isinstance(output, Tensor) or output.shape != hidden.shape
            if shape.hopeless:
                self.tell(
                    "nothing is recorded, this model's blocks do not simply follow each other with the same arguments"
                )
            else:
                # Held for good it would keep the step's graph alive, beside which a card records no other.
                self.last = weakref.ref(output)
            return output
        graph = shape.graphs.get(number)
        return hidden if graph is None else graph(hidden, *first.tensors)

    def _begin(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.now, self.first = None, _Call(hidden, kwargs)
        if args or not self.first.plain:
            self.tell("nothing is recorded, this model's blocks are called with what cannot be")
            return
        self.now = self.shapes.setdefault((self.first.shape, tuple(self.ends())), _Shape())
        if self.now.graphs or self.now.hopeless or len(self.now.entering) < len(self.blocks):
            return
        if sum(bool(shape.graphs) for shape in self.shapes.values()) < self.most:
            self._record(self.now, hidden, self.first)
        else:
            self.tell(f"{self.most} shapes are recorded, others are not any more")
            self.now = None

    def _record(self, shape: _Shape, hidden: Tensor, first: _Call) -> None:
        ends = self.ends()
        starts = [0, *(end + 1 for end in ends[:-1])]
        stretches = tuple(
            _Stretch(self.blocks[a : b + 1], self.forwards[a : b + 1], first.spec, first.constants)
            for a, b in zip(starts, ends, strict=True)
        )
        tensors = [tensor.detach().clone() for tensor in first.tensors]
        samples = tuple(
            (hidden.detach().to(kind, copy=True).requires_grad_(has_gradient), *tensors)
            for kind, has_gradient in (shape.entering[start] for start in starts)
        )
        devices = [hidden.device] if hidden.is_cuda else []
        with torch.random.fork_rng(devices), _waiting_allowed(hidden.device), _casting_anew(hidden.device):
            try:
                recorded = self.record(stretches, samples, allow_unused_input=True, pool=self.pool)
            except RuntimeError as error:  # the card's memory is full, or a block waits for it
                raise PointAlignError(
                    f"the decoder blocks cannot be recorded ({str(error).splitlines()[0]}); go on without: add "
                    "--no-cuda-graphs and --resume"
                ) from error
        shape.graphs = dict(zip(ends, recorded, strict=True))


def _casting_anew(device: torch.device) -> Any:
    """Autocast as it is, but a weight's copy in bfloat16 is made anew each time: a recorded one must be made at each step.

    Compiled blocks see to it that this is always the same, so it holds for blocks that are not recorded too.
    """
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False)


@contextmanager
def _waiting_allowed(device: torch.device) -> Iterator[None]:
    """Recording waits for the device, also where a training step must not."""
    if device.type != "cuda":
        yield
        return
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)


@contextmanager
def graphed_blocks(model: nn.Module, wanted: bool, record: Callable[..., Any] | None = None) -> Iterator[None]:
    """While this lasts, the decoder blocks of any Hugging Face model are recorded, and trained as recorded.

    Blocks that do not simply follow each other, called with the same tensors and plain values by name, run as ever, which is
    said. One step must go forward and back before the next one begins, and gradients must not be summed over
    several: what is recorded writes them to the same place each time.

    Args:
        model: on a GPU; its blocks are found by their number.
        wanted: False changes nothing.
        record: in place of `torch.cuda.make_graphed_callables`.

    Raises:
        ConfigError: when the blocks cannot be found.
        PointAlignError: when they cannot be recorded.
    """
    if not wanted:
        yield
        return
    blocks = list(find_decoder_layers(model))
    pool = torch.cuda.graph_pool_handle() if record is None else None
    recorder = BlockRecorder(blocks, record or torch.cuda.make_graphed_callables, pool)
    with replaced_forwards(blocks, [_numbered(recorder, number) for number in range(len(blocks))]):
        yield


def _numbered(recorder: BlockRecorder, number: int) -> Callable[..., Any]:
    return lambda hidden_states, *args, **kwargs: recorder.run(number, hidden_states, *args, **kwargs)


def why_not_graphed(
    device: str, processes: int, accumulation: int, packed: bool, checkpointing: bool, trains: bool
) -> str | None:
    """What keeps a run from being recorded, for people; None when nothing does.

    Args:
        device: that computes.
        processes: that train.
        accumulation: batches of a step.
        packed: whether conversations are laid end to end.
        checkpointing: whether activations are recomputed.
        trains: whether anything in the language model does.
    """
    reasons = (
        (device != "cuda", "there is no CUDA GPU"),
        (processes > 1, "several processes train"),
        (accumulation > 1, "gradients are summed over several batches"),
        (not packed, "conversations are not packed, so that every step has another shape"),
        (checkpointing, "activations are recomputed"),
        (not trains, "the language model is frozen"),
    )
    return next((reason for holds, reason in reasons if holds), None)
