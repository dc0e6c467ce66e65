"""A frozen language model whose matrices are kept in 4 or 8 bits, so that a card with little memory trains LoRA around it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from pointalign.errors import ConfigError, MissingDependencyError

KINDS = ("nf4", "int8")


def quantization_config(kind: str, whole: list[str] | None = None) -> BitsAndBytesConfig:
    """transformers' settings of a kind of quantisation.

    Args:
        kind: "nf4", 4-bit normal floats whose scales are quantised too, or "int8", 8-bit integers that leave outliers whole.
        whole: names of modules that are not quantised; the head alone when not given.

    Raises:
        ConfigError: for another kind.
        MissingDependencyError: without bitsandbytes.

    Source: QLoRA (arXiv 2305.14314), sections 2 and 3; LLM.int8() (arXiv 2208.07339).
    """
    if kind not in KINDS:
        raise ConfigError(f"unknown quantisation {kind!r}; choose {' or '.join(KINDS)}")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingDependencyError(
            f'a language model in {kind} needs bitsandbytes; run `pip install "pointalign[quantize]"`'
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=whole)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=whole,
    )


def kept_whole(model_class: Any, config: Any) -> list[str]:
    """Names of the parts of a whole model that are not quantised: everything before the language model, and its head."""
    with torch.device("meta"):
        model = model_class(config)
    head = model.get_output_embeddings()
    return ["point_encoder", "connector", *(name for name, module in model.named_modules() if module is head)]


def adopt(model: nn.Module, language_model: nn.Module) -> None:
    """Make a model that transformers has quantised one that trains and saves like any other.

    transformers' marks go, for with them Trainer would look for adapters on the outside, and saving would write the quantised
    weights alone; peft needs one of them, on the language model.
    """
    marks = {name: getattr(model, name, False) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")}
    for name in ("hf_quantizer", "is_quantized", "quantization_method", *marks):
        if name in vars(model):
            delattr(model, name)
    config: Any = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name, value in marks.items():
        setattr(language_model, name, value)
    for module in language_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes 0.50 would repack a matrix when it is first used for inference on a CPU, and never again give a
            # gradient through it.
            module.support_avx512bf16_for_cpu = False  # pyright: ignore


def language_model_weights(folder: Path) -> dict[str, Tensor]:
    """The language model's own weights in a folder that holds a whole model, by their names there."""
    weights = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            weights.update({name: file.get_tensor(name) for name in file.keys() if name.startswith("language_model.")})  # noqa: SIM118
    return weights
