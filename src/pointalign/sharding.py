"""FSDP2: weights, gradients and optimiser split over the processes, and whole again in everything that is written.

Checkpoints and the final model are those of a run of one process, so that any number of processes can go on with them.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from pointalign.decoder_blocks import find_decoder_layers
from pointalign.progress import is_first_process


def allow_cpu(accelerator: Accelerator, plugin_arguments: dict[str, Any]) -> None:
    """Let accelerate split a model on the CPU too, which torch can do through gloo; it quietly does without otherwise.

    Args:
        accelerator: of several processes on CPUs; changed.
        plugin_arguments: of its `FullyShardedDataParallelPlugin`.
    """
    state: Any = accelerator.state
    # Every later look at accelerate's state starts from the second of these.
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**plugin_arguments)


def prepare_to_split(accelerator: Accelerator, model: nn.Module) -> None:
    """Say what accelerate will split: each decoder block by itself, and nothing before the language model that is frozen.

    A frozen point side stays whole in every process: split, it would be gathered at every step, also where its output is
    read from a cache. Numbers are cast as in a run without FSDP, by autocast alone: trained weights stay float32, and
    frozen matrices travel in the precision that they are kept in.

    Args:
        accelerator: with FSDP, version 2; its plugin is changed.
        model: a PointAlign model that has not been split yet; its forward pass is put under autocast where that is on.
    """
    plugin: Any = accelerator.state.fsdp_plugin
    plugin.transformer_cls_names_to_wrap = sorted({type(block).__name__ for block in find_decoder_layers(model)})
    before = [name for name, _ in model.named_children() if name in ("point_encoder", "connector")]
    frozen = [name for name in before if not any(p.requires_grad for p in model.get_submodule(name).parameters())]
    plugin.ignored_modules = "|".join(frozen) or None
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)


def whole(state: Any) -> Any:
    """A state with every split tensor put together; all processes call it, and all get it."""
    return tree_map(lambda value: value.full_tensor() if isinstance(value, DTensor) else value, state)


def split_like(tensor: Tensor, like: Any) -> Tensor:
    """A whole tensor split over the processes as another one is, which may also be whole; all processes call it."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)


def split_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state split as its parameters are; see `split_like`.

    Args:
        state: what `whole(optimizer.state_dict())` gave, in whatever number of processes.
        optimizer: of the same parameters in the same order.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    split = {
        number: {name: split_like(value, parameters[number]) for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": split}


def gather_weights(model: nn.Module) -> None:
    """Make a split model whole again in the first process, on the CPU; all processes call it, and none trains it further.

    One weight after another is put together, so that no accelerator has to hold the whole model.
    """
    gathered: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                continue
            if id(parameter) not in gathered:
                full = parameter.full_tensor()
                kept = full.cpu() if is_first_process() else full.new_empty(0)
                gathered[id(parameter)] = nn.Parameter(kept, requires_grad=parameter.requires_grad)
            module.register_parameter(name, gathered[id(parameter)])
