"""A LoRA that is added without peft against peft's own merging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from pointalign.models.folding import fold_adapter
from randomness import randomize

NORMS = ["model.layers.1.input_layernorm", "model.norm"]


def saved(model: nn.Module, folder: Path, **settings: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Configuration and tensors of a random adapter around a model, which is wrapped by it."""
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], **settings)
    adapted: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    randomize(adapted, 1)
    adapted.save_pretrained(folder)
    read = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    return read, load_file(folder / "adapter_model.safetensors")


@pytest.fixture
def language_model(build_model: Callable[..., Any]) -> Callable[[], Any]:
    """Makes the same language model again and again."""
    return lambda: build_model().language_model


def test_the_weights_are_those_that_peft_makes(language_model: Callable[[], Any], tmp_path: Path) -> None:
    settings, state = saved(language_model(), tmp_path, modules_to_save=NORMS)
    expected = PeftModel.from_pretrained(language_model(), str(tmp_path)).merge_and_unload().state_dict()
    plain, folded = language_model(), language_model()
    assert fold_adapter(folded, settings, state)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in folded.state_dict().items())
    changed = [name for name, tensor in folded.named_parameters() if not torch.equal(tensor, plain.state_dict()[name])]
    assert sorted(changed) == sorted(
        [f"model.layers.{n}.{part}.weight" for n in range(4) for part in ("self_attn.q_proj", "mlp.down_proj")]
        + [f"{name}.weight" for name in NORMS]
    )


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"bias": "all"}, {"lora_bias": True}],
)
def test_other_kinds_are_left_to_peft(
    settings: dict[str, Any], language_model: Callable[[], Any], tmp_path: Path
) -> None:
    read, state = saved(language_model(), tmp_path, **settings)
    model = language_model()
    assert not fold_adapter(model, read, state)
    assert all(
        torch.equal(one, two) for one, two in zip(model.parameters(), language_model().parameters(), strict=True)
    )


def test_what_does_not_fit_is_left_to_peft(language_model: Callable[[], Any], tmp_path: Path) -> None:
    settings, state = saved(language_model(), tmp_path)
    first = next(name for name in state if ".lora_A." in name)
    wrong = [
        {name: tensor for name, tensor in state.items() if name != first.replace("lora_A", "lora_B")},
        {**state, first: state[first][:, :-1]},
        {**state, "base_model.model.model.unknown.weight": torch.zeros(2)},
        {**state, "base_model.model.model.norm.weight": torch.zeros(2)},
    ]
    for broken in wrong:
        model = language_model()
        assert not fold_adapter(model, settings, broken)
        pairs = zip(model.parameters(), language_model().parameters(), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)
    assert not fold_adapter(language_model().bfloat16(), settings, state)
