"""From a stack of published tensors to our model: sizes from the tensors, strict loading, LoRA, and the folder."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import initialization

from pointalign.alignment import AlignmentProjector
from pointalign.errors import CheckpointError, ConfigError
from pointalign.importers.tensors import ImportReport, WeightStack, check_missing
from pointalign.models.checkpoint import ADAPTED_PARTS
from pointalign.models.point_encoder import PointEncoderConfig
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor
from pointalign.storage import lie_in_each_other, written_folder

PROJECTOR_FILE = "alignment_projector.safetensors"
PROJECTOR_PREFIX = "alignment_projector."
# Files of an export, its adapters' and its tokenizer's with them.
EXPORTED = re.compile(
    r"(\w+_adapter/)?[^/]+\.(json|safetensors|jinja|model)|(vocab|merges)\.txt|\w+_adapter/README\.md"
)

POINT_ENCODER_WORDS = {
    "cls_token": "class_token",
    "cls_pos": "class_position",
    "pos_embed.": "position_embedding.",
    "encoder.first_conv.0.": "group_encoder.linear1.",
    "encoder.first_conv.1.": "group_encoder.norm1.",
    "encoder.first_conv.3.": "group_encoder.linear2.",
    "encoder.second_conv.0.": "group_encoder.linear3.",
    "encoder.second_conv.1.": "group_encoder.norm3.",
    "encoder.second_conv.3.": "group_encoder.linear4.",
    "blocks.blocks.": "blocks.",
    ".attn.": ".",
    ".mlp.": ".",
}


@dataclass
class Imported:
    """A published model as ours.

    Args:
        model: in evaluation mode, frozen but for the language model's LoRA.
        processor: with the prompt of the published training, or None where there is no tokenizer.
        alignment_projector: the published regulariser's projector, if the files held one; inference does not need it.
        report: what became of every tensor.
    """

    model: PointAlignForConditionalGeneration
    processor: PointAlignProcessor | None
    alignment_projector: AlignmentProjector | None
    report: ImportReport


@dataclass(frozen=True)
class LoraScale:
    """What a LoRA's tensors do not tell.

    Args:
        alpha: scale of the update over its rank; None is twice the rank.
        dropout: on the update's input while it trains.
    """

    alpha: int | None
    dropout: float


def point_encoder_name(name: str) -> str:
    """Our name of a published Point-BERT tensor, both without the encoder's own prefix."""
    for published, ours in POINT_ENCODER_WORDS.items():
        name = name.replace(published, ours)
    return name


def count_layers(weights: WeightStack, prefix: str, default: int) -> int:
    """Number of layers whose names are a prefix and an index, or the default where there is none."""
    indices = [int(name.removeprefix(prefix).split(".")[0]) for name in weights.names(prefix)]
    return max(indices) + 1 if indices else default


def mlp_widths(weights: WeightStack, prefix: str, default: Sequence[int]) -> list[int]:
    """Output widths of the linears of an MLP named by a prefix, or the default where there are none."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.weight")
    indices = sorted(int(match[1]) for name in weights.names(prefix) if (match := pattern.fullmatch(name)))
    return [weights[f"{prefix}{index}.weight"].shape[0] for index in indices] or list(default)


def point_encoder_config(weights: WeightStack, num_groups: int, group_size: int, heads: int) -> PointEncoderConfig:
    """Sizes of the point encoder: from its tensors, and the three that no tensor tells.

    Raises:
        ConfigError: when the width does not divide into the heads.
    """
    published = PointEncoderConfig()

    def size(name: str, axis: int, default: int) -> int:
        return weights.size(f"point_encoder.{name}.weight", axis, default)

    width = size("reduce_dim", 0, published.hidden_size)
    if width % heads:
        raise ConfigError(
            f"the point encoder's width {width} does not divide into {heads} heads; set point_encoder_heads"
        )
    linears = ("linear1", "linear2", "linear3")
    return PointEncoderConfig(
        in_channels=size("group_encoder.linear1", 1, published.in_channels),
        num_groups=num_groups,
        group_size=group_size,
        group_hidden_sizes=[
            size(f"group_encoder.{name}", 0, default)
            for name, default in zip(linears, published.group_hidden_sizes, strict=True)
        ],
        group_width=size("reduce_dim", 1, published.group_width),
        hidden_size=width,
        num_hidden_layers=count_layers(weights, "point_encoder.blocks.", published.num_hidden_layers),
        num_attention_heads=heads,
        position_hidden_size=size("position_embedding.0", 0, published.position_hidden_size),
        mlp_ratio=size("blocks.0.fc1", 0, int(width * published.mlp_ratio)) / width,
    )


def assemble(
    config: PointAlignConfig,
    weights: WeightStack,
    scales: dict[str, LoraScale],
    allow_missing: Sequence[str],
    dtype: torch.dtype,
) -> tuple[PointAlignForConditionalGeneration, ImportReport]:
    """Build the model that a configuration describes and load a stack into it, every tensor or none.

    Args:
        config: all sizes.
        weights: tensors under our names; those without a place are left over.
        scales: for each of `ADAPTED_PARTS`, what its LoRA's tensors do not tell.
        allow_missing: as in `check_missing`; what is missing stays randomly initialised.
        dtype: of the model's weights.

    Raises:
        CheckpointError: when a tensor is missing or of the wrong shape, or the language model is deeper than it says.
    """
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in PointAlignForConditionalGeneration(config).state_dict().items()}
    adapted = [name for name in weights.names() if ".lora_" in name]
    known = {name for name in adapted if name.rpartition(".lora_")[0] + ".weight" in shapes} | set(shapes)
    _check_depth(config, weights)
    weights.leave_over(name for name in weights.names() if name not in known)
    expected = {name for name in shapes if not name.endswith("num_batches_tracked")} | _expected_lora(adapted, shapes)
    missing = check_missing((name for name in expected if name not in weights), allow_missing)
    state = {name: weights.fit(name, shape) for name, shape in shapes.items() if name in weights}
    with nullcontext() if missing else initialization.no_init_weights():
        model = PointAlignForConditionalGeneration(config)
    model.load_state_dict(state, strict=False)
    nn.Module.to(model, dtype).requires_grad_(False)
    for part, scale in scales.items():
        lora = {name.removeprefix(f"{part}."): weights[name] for name in weights.names(f"{part}.") if ".lora_" in name}
        if lora:
            attach_lora(model, part, lora, scale)
    # Everything before the language model is frozen in the published recipes; it then stays in evaluation mode.
    model.connector.requires_grad_(False)
    return model.eval(), ImportReport(weights.files, missing)


def _check_depth(config: PointAlignConfig, weights: WeightStack) -> None:
    """Refuse a language model of more blocks than its configuration says: without them it would be another."""
    text: Any = config.text_config
    if (blocks := count_layers(weights, "language_model.model.layers.", 0)) > text.num_hidden_layers:
        raise CheckpointError(
            f"the language model has {blocks} blocks where its configuration has {text.num_hidden_layers}; give the "
            "configuration that belongs to these weights"
        )


def _expected_lora(adapted: list[str], shapes: dict[str, torch.Size]) -> set[str]:
    """Both LoRA weights of every linear that is called like an adapted one of the same part."""
    linears = {name.rpartition(".lora_")[0] for name in adapted}
    kinds = {
        (part, linear.rpartition(".")[2]) for linear in linears for part in ADAPTED_PARTS if linear.startswith(part)
    }
    return {
        f"{name.removesuffix('.weight')}.lora_{letter}.weight"
        for name in shapes
        for part, kind in kinds
        if name.startswith(f"{part}.") and name.endswith(f".{kind}.weight")
        for letter in "AB"
    }


def attach_lora(
    model: PointAlignForConditionalGeneration, part: str, lora: dict[str, Tensor], scale: LoraScale
) -> None:
    """Put a published LoRA around a part of the model.

    Args:
        model: changed in place.
        part: one of `ADAPTED_PARTS`.
        lora: weights named like the part's linears, with `.lora_A.weight` or `.lora_B.weight` behind.
        scale: what the tensors do not tell.

    Raises:
        CheckpointError: when the ranks differ or a weight has the wrong shape.
    """
    ranks = {tensor.shape[0] for name, tensor in lora.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise CheckpointError(f"the LoRA of {part} has ranks {sorted(ranks)}; all its layers must have the same one")
    rank = ranks.pop()
    parent, _, attribute = part.rpartition(".")
    owner = model.get_submodule(parent)
    config = LoraConfig(
        task_type="CAUSAL_LM" if part == "language_model" else None,
        r=rank,
        lora_alpha=2 * rank if scale.alpha is None else scale.alpha,
        lora_dropout=scale.dropout,
        target_modules=sorted({name.split(".lora_")[0].rpartition(".")[2] for name in lora}),
    )
    adapted = get_peft_model(getattr(owner, attribute), config)
    state = {f"base_model.model.{name.replace('.weight', '.default.weight')}": t for name, t in lora.items()}
    try:
        adapted.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"the LoRA of {part} does not fit: {str(error).splitlines()[-1].strip()}") from error
    setattr(owner, attribute, adapted)


def take_alignment_projector(weights: WeightStack) -> AlignmentProjector | None:
    """The published alignment projector, if the stack holds one; the stack counts its tensors as loaded.

    Raises:
        CheckpointError: when some of its tensors are missing or do not fit each other.
    """
    names = weights.names(PROJECTOR_PREFIX)
    if not names:
        return None
    state = {name.removeprefix(PROJECTOR_PREFIX): weights.pop(name) for name in names}
    kernels = [state[name] for name in sorted(state) if name.endswith("weight")]
    try:
        first, last = kernels[0], kernels[-1]
        projector = AlignmentProjector(first.shape[1], last.shape[0], depth=len(kernels), hidden_size=first.shape[0])
        projector.load_state_dict(state)
    except (IndexError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(
            f"the alignment projector is not whole ({reason}); add the file that holds all of it"
        ) from error
    return projector.eval()


def export(imported: Imported, out: str | Path, alignment_layer: int = 15) -> None:
    """Write a folder that `from_pretrained` loads, with the alignment projector in a file of its own.

    Args:
        imported: what an importer gave.
        out: the folder; an earlier export there is replaced.
        alignment_layer: the hidden states that the projector reads; 15 in PointAlign. Its file then holds the state of an
            `AlignmentRegularizer` for that layer.

    Raises:
        CheckpointError: when the folder holds something else, or cannot be written. What was there is then left as it was.
    """
    out = Path(out)
    check_place(out)
    with written_folder(out) as temporary:
        imported.model.save_pretrained(temporary, self_contained=True)
        if imported.processor is not None:
            imported.processor.save_pretrained(temporary)
        if imported.alignment_projector is not None:
            state: dict[str, Tensor] = nn.ModuleDict({str(alignment_layer): imported.alignment_projector}).state_dict()
            save_file({f"projectors.{name}": tensor for name, tensor in state.items()}, temporary / PROJECTOR_FILE)


def check_place(out: Path, read: Sequence[str | Path] = ()) -> None:
    """See that an import may be written somewhere: where nothing is, or an earlier import.

    Args:
        out: the folder.
        read: files, folders and Hub ids that are read meanwhile.

    Raises:
        CheckpointError: when something else is there, or what is read lies in the folder or around it.
    """
    for source in (Path(name) for name in read if Path(name).exists()):
        if lie_in_each_other(out, source):
            raise CheckpointError(f"{out} and {source}, which is read, lie in each other; choose a new folder")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out} is a file; choose a new folder")
    there = sorted(str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir())
    if there and not _is_import(out / "config.json"):
        raise CheckpointError(f"{out} holds files of its own; choose a new folder")
    if others := [name for name in there if not EXPORTED.fullmatch(name)]:
        raise CheckpointError(f"{out} holds {others[0]}, which no import writes; choose a new folder")


def _is_import(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8")).get("model_type") == PointAlignConfig.model_type
    except (OSError, ValueError, AttributeError):
        return False
