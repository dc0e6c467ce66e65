"""LoRA's second matrix scaled: the same outputs and gradients as peft's, and which layers are left to peft."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear
from transformers import LlamaConfig, LlamaForCausalLM

from pointalign.lora_scaling import EarlyScaled, early_scaling

IDS = torch.arange(10).unsqueeze(0)


def adapted(**settings: Any) -> Any:
    """Two blocks of a Llama in LoRA, whose adapters are not zero; scaling 5 / 3 or, by rank's root, 5 / 3 ** 0.5."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    lora = LoraConfig(**{"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], **settings})
    model: Any = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.3)
    return model.train()


def scaled(model: Any) -> int:
    return sum(isinstance(module, EarlyScaled) for module in model.modules())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}])
@pytest.mark.parametrize("bf16", [False, True])
def test_outputs_and_gradients_are_pefts(settings: dict[str, Any], bf16: bool) -> None:
    model, found = adapted(**settings), {}
    for wanted in (False, True):
        with early_scaling(model, wanted), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            assert scaled(model) == (4 if wanted else 0)
            logits = model(input_ids=IDS).logits
        logits.float().square().sum().backward()
        found[wanted] = [logits, *(weight.grad for weight in model.parameters() if weight.requires_grad)]
        model.zero_grad()
    assert found[True][0].dtype == found[False][0].dtype
    for ours, pefts in zip(found[True], found[False], strict=True):
        scale = float(pefts.abs().max())
        assert scale > 0
        torch.testing.assert_close(ours / scale, pefts / scale, atol=0.03 if bf16 else 2e-6, rtol=0)


def test_layers_are_pefts_again() -> None:
    model = adapted()
    with early_scaling(model, True):
        assert scaled(model) == 4
    assert scaled(model) == 0
    assert sum(type(module) is Linear for module in model.modules()) == 4


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"lora_bias": True}])
def test_other_kinds_are_left_to_peft(settings: dict[str, Any]) -> None:
    model = adapted(**settings)
    with early_scaling(model, True):
        assert scaled(model) == 0


def test_what_is_merged_switched_off_hooked_or_has_a_second_adapter_is_left_to_peft() -> None:
    model = adapted()
    model.merge_adapter()
    with early_scaling(model, True):
        assert scaled(model) == 0
    model.unmerge_adapter()
    with model.disable_adapter(), early_scaling(model, True):
        assert scaled(model) == 0
    hook = (
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].register_forward_hook(lambda *a: None)
    )
    with early_scaling(model, True):
        assert scaled(model) == 3
    hook.remove()
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    with early_scaling(model, True):
        assert scaled(model) == 2, "the two down_proj have one adapter alone"
