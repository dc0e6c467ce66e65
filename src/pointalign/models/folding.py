"""A saved LoRA added to the weights it adapts, without peft, whose import takes longer than reading the weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PREFIX = "base_model.model."
# Settings that say nothing of how weights are computed from the saved tensors. Any other one must be unset.
HARMLESS = {
    *(
        "peft_type",
        "task_type",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "megatron_core",
        "peft_version",
    ),
    *("r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "qalora_group_size", "auto_mapping"),
    *("target_modules", "modules_to_save", "exclude_modules", "layers_pattern", "layers_to_transform"),
}


def fold_adapter(module: nn.Module, settings: Mapping[str, Any], state: Mapping[str, Tensor]) -> bool:
    """Change a module's weights to what peft's `merge_and_unload` makes of them, bit for bit.

    Args:
        module: the part that was adapted, with float32 weights, without an adapter.
        settings: of the adapter, from its adapter_config.json.
        state: of the adapter, as peft saves it.

    Returns:
        False, with the module as it was, where this is no plain LoRA of linear layers or does not fit the module: peft
        knows what to do with it, or what is wrong.

    Source: W + alpha / r B A, Hu et al. 2021 (arXiv 2106.09685), section 4.1.
    """
    if not _is_plain(settings):
        return False
    weights = dict(module.named_parameters())
    added, replaced = [], []
    for name, tensor in state.items():
        layer, _, kind = name.removeprefix(PREFIX).partition(".lora_")
        weight = weights.get(layer + ".weight" if kind else layer)
        if weight is None or weight.dtype != torch.float32:
            return False
        if kind == "A.weight":
            up = state.get(name.replace(".lora_A.", ".lora_B."))
            if up is None or (len(up), *tensor.shape[1:]) != weight.shape or up.shape[1:] != tensor.shape[:1]:
                return False
            added.append((weight, up, tensor))
        elif not kind and weight.shape == tensor.shape:
            replaced.append((weight, tensor))
        elif kind != "B.weight":
            return False
    scale = settings["lora_alpha"] / settings["r"]
    with torch.no_grad():
        for weight, up, down in added:
            weight += (up.float() @ down.float()) * scale
        for weight, tensor in replaced:
            weight.copy_(tensor)
    return True


def _is_plain(settings: Mapping[str, Any]) -> bool:
    """Whether the adapter is a LoRA without any of the ways in which peft lets it differ from the paper's."""
    if settings.get("peft_type") != "LORA" or settings.get("bias") != "none":
        return False
    # Other ways of starting change the weights that are adapted, too.
    if settings.get("init_lora_weights") not in (True, False, "gaussian"):
        return False
    return not any(value for name, value in settings.items() if name not in HARMLESS)
