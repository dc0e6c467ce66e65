"""Models at the size that a recipe means, built from sizes alone: for counting weights, and for measuring time and memory.

Nothing is read or downloaded. On the meta device (`torch.device("meta")`) a model takes no memory; elsewhere its weights
are random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from pointalign.config import LoraSettings, QFormerLoraSettings, Recipe, load_recipe, recipe_names
from pointalign.errors import CheckpointError, ConfigError
from pointalign.models.checkpoint import ADAPTED_PARTS, BUNDLED_MODELS, adapter_folder, find_checkpoint
from pointalign.models.connector import ConnectorConfig
from pointalign.models.language_model import load_text_config
from pointalign.models.phi import PhiVariantConfig
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.parts import PARTS, add_lora, add_qformer_lora, prepare_parts
from pointalign.runs import model_config, quiet
from pointalign.training import build_regularizer

# Rows of a count, in the order of the model; each weight is counted under the first row that means it.
COUNTED = (
    "point_encoder",
    "point_mlp",
    "query_tokens",
    "query_router",
    "qformer_lora",
    "qformer_norms",
    "qformer",
    "language_projection",
    "language_model_lora",
    "language_model_norms",
    "language_model",
)
ALIGNMENT_PROJECTOR = "alignment_projector"
LANGUAGE_LINEARS = ["query_key_value", "dense"]


class PartCount(NamedTuple):
    """Number of weights of one part.

    Args:
        total: all of them.
        trained: those that train.
    """

    total: int
    trained: int


@dataclass(frozen=True)
class PublishedModel:
    """What `pointalign import-checkpoint` makes of published files.

    Args:
        config: gives all sizes.
        adapters: the parts that have a LoRA.
    """

    config: Callable[[], PointAlignConfig]
    adapters: tuple[str, ...] = ()


def minigpt3d_config() -> PointAlignConfig:
    """Sizes of MiniGPT-3D and PointAlign.

    Source: MiniGPT-3D (arXiv 2405.01413), PointAlign (arXiv 2603.00412); Phi-2's configuration.
    """
    phi = PhiVariantConfig(
        vocab_size=51200,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        resid_pdrop=0.1,
        bos_token_id=50256,
        eos_token_id=50256,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    )
    return PointAlignConfig(text_config=phi, point_token_id=50295)


def pointllm_config() -> PointAlignConfig:
    """Sizes of PointLLM-7B.

    Source: PointLLM (arXiv 2308.16911): LLaMA-7B with three more tokens, an MLP 384-1024-2048-4096.
    """
    return PointAlignConfig(
        text_config=LlamaConfig(vocab_size=32003),
        connector_config=ConnectorConfig(kind="mlp", hidden_sizes=[1024, 2048]),
        point_token_id=32000,
    )


# The folders that the recipes' heads tell how to import.
PUBLISHED = {
    "checkpoints/minigpt-3d/start": PublishedModel(minigpt3d_config, ("language_model",)),
    "checkpoints/minigpt-3d/pretrain": PublishedModel(minigpt3d_config, ADAPTED_PARTS),
    "checkpoints/pointllm/7b": PublishedModel(pointllm_config),
}


def imported_model(published: PublishedModel) -> PointAlignForConditionalGeneration:
    """A published model as the importer builds it, with random weights on the default device."""
    model = PointAlignForConditionalGeneration(published.config())
    if "language_model" in published.adapters:
        add_lora(model, LoraSettings(target_modules=LANGUAGE_LINEARS), train_norms=False)
    if "connector.qformer" in published.adapters:
        add_qformer_lora(model, QFormerLoraSettings(), train_norms=False)
    return model


def starting_model(
    recipe: Recipe, published: Mapping[str, PublishedModel] = PUBLISHED
) -> PointAlignForConditionalGeneration:
    """The model that a recipe starts from, with random weights on the default device.

    `model.start_from` is a folder that a bundled recipe's head tells how to import, one that a bundled recipe writes
    (runs/NAME/model), or any other folder of a model; of the first two nothing needs to be there. Without it the model is
    built from the recipe's sizes.

    Args:
        recipe: the recipe.
        published: what the folders hold that are imported.

    Raises:
        ConfigError: when nothing tells the sizes of what it starts from.
        CheckpointError: when a configuration cannot be loaded.
    """
    start = recipe.model.start_from
    if start is None:
        text = load_text_config(recipe.model.language_model)
        return PointAlignForConditionalGeneration(model_config(recipe.model, text, point_token_id=0))
    if start in published:
        return imported_model(published[start])
    written_by = {f"runs/{name}/model": name for name in recipe_names()}.get(start)
    if written_by is None:
        return _model_like(find_checkpoint(start) if start in BUNDLED_MODELS else Path(start))
    earlier = load_recipe(written_by)
    model = starting_model(earlier, published)
    prepare_parts(model, earlier)
    return model


def _model_like(folder: Path) -> PointAlignForConditionalGeneration:
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model.start_from: nothing tells the sizes of {folder}; name a folder that holds a model")
    try:
        model = PointAlignForConditionalGeneration(PointAlignConfig.from_pretrained(folder))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"cannot read {folder / 'config.json'}: {reason}; copy the checkpoint again") from error
    for part in ADAPTED_PARTS:
        adapter = folder / adapter_folder(part)
        if adapter.is_dir():
            owner, _, attribute = part.rpartition(".")
            lora = LoraConfig.from_pretrained(str(adapter))
            setattr(model.get_submodule(owner), attribute, get_peft_model(model.get_submodule(part), lora))
    return model


def count_weights(model: PointAlignForConditionalGeneration) -> dict[str, PartCount]:
    """Weights of each part of a model; what peft keeps beside the copy that trains is counted once.

    A regulariser that is attached counts as `alignment_projector`.
    """
    totals: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        if ".original_module." in name:
            continue
        row = next((row for row in COUNTED if PARTS[row](name)), ALIGNMENT_PROJECTOR)
        totals[row] += parameter.numel()
        trained[row] += parameter.numel() if parameter.requires_grad else 0
    return {row: PartCount(totals[row], trained[row]) for row in (*COUNTED, ALIGNMENT_PROJECTOR) if totals[row]}


def count_recipe(recipe: Recipe) -> dict[str, PartCount]:
    """Weights of each part of the model that a recipe trains, at full size, on the meta device.

    Raises:
        PointAlignError: as `starting_model`, and when the recipe does not fit the model.
    """
    quiet()
    with torch.device("meta"):
        model = starting_model(recipe)
        prepare_parts(model, recipe)
        build_regularizer(model, recipe.alignment, recipe.seed)
    return count_weights(model)
