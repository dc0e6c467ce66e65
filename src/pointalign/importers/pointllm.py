"""Import PointLLM's published folders: Llama, a point encoder and an MLP that hands it every point token.

Source: PointLLM (arXiv 2308.16911); tensor names and settings as its folders hold them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from pointalign.errors import ConfigError
from pointalign.importers.assembly import (
    Imported,
    LoraScale,
    assemble,
    mlp_widths,
    point_encoder_config,
    point_encoder_name,
)
from pointalign.importers.tensors import WeightStack, read_json, read_weights
from pointalign.models.checkpoint import find_checkpoint
from pointalign.models.connector import ConnectorConfig
from pointalign.models.language_model import load_tokenizer
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor

CHAT_TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] != 'system' %}"
    '{{ " A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, '
    "detailed, and polite answers to the user's questions. \" }}{% endif %}"
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' + message['content'] + '</s>' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + ' ' }}"
    "{% else %}{{ 'USER: ' + message['content'] + ' ' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BACKBONE, PROJECTION = "model.point_backbone.", "model.point_proj."
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def our_name(name: str) -> str | None:
    """Our name of a tensor of a published folder, or None for one that is computed when the model is built."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    if name.startswith(BACKBONE):
        return "point_encoder." + point_encoder_name(name.removeprefix(BACKBONE))
    if name.startswith(PROJECTION):
        return "connector.language_projection." + name.removeprefix(PROJECTION)
    return "language_model." + name


def _text_config(values: dict[str, Any], weights: WeightStack, dtype: torch.dtype) -> Any:
    """Llama's own settings; what an old transformers wrote about generation and labels stays behind."""
    known = AutoConfig.for_model("llama").to_dict()
    dropped = {"model_type", "architectures", "dtype", "transformers_version", "id2label", "label2id", "problem_type"}
    settings = {key: value for key, value in values.items() if key in known and key not in dropped}
    settings |= {key: values[key] for key in ("rope_theta", "rope_scaling") if values.get(key) is not None}
    config = AutoConfig.for_model("llama", **settings)
    config.vocab_size = weights.size("language_model.model.embed_tokens.weight", 0, config.vocab_size)
    config.dtype = dtype
    return config


def _marks_clouds(values: dict[str, Any]) -> bool:
    return values.get("mm_use_point_start_end", True)


def _build_processor(
    folder: Path, values: dict[str, Any], config: PointAlignConfig, num_points: int
) -> PointAlignProcessor | None:
    """The processor of Vicuna v1.1's turns, or None for a folder without tokenizer; sets the config's point token."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    tokenizer = load_tokenizer(str(folder))
    patch, start, end = (
        values.get(f"DEFAULT_POINT_{name}_TOKEN", f"<point_{name.lower()}>") for name in ("PATCH", "START", "END")
    )
    marked = _marks_clouds(values)
    needed = (patch, start, end) if marked else (patch,)
    if unknown := [token for token in needed if token not in tokenizer.get_vocab()]:
        raise ConfigError(
            f"the tokenizer in {folder} does not know {unknown[0]!r}; take the folder that PointLLM published"
        )
    config.point_token_id = tokenizer.convert_tokens_to_ids(patch)
    encoder: Any = config.point_encoder_config
    return PointAlignProcessor(
        tokenizer,
        num_points=num_points,
        num_point_tokens=config.num_point_tokens,
        min_points=max(encoder.num_groups, encoder.group_size),
        point_token=patch,
        point_prefix=start if marked else "",
        point_suffix=end + "\n" if marked else "\n",
        chat_template=CHAT_TEMPLATE,
    )


def load_pointllm(
    folder: str | Path,
    *,
    num_groups: int = 512,
    group_size: int = 32,
    point_encoder_heads: int = 6,
    lora_alpha: int = 16,
    num_points: int = 8192,
    allow_missing: Sequence[str] = (),
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Imported:
    """As `import_pointllm`, with the report; the arguments and errors are the same."""
    path = find_checkpoint(str(folder))
    values = read_json(path / "config.json")
    if values.get("model_type") != "pointllm":
        raise ConfigError(f"{folder} holds a model of type {values.get('model_type')!r}, not 'pointllm'")
    weights = WeightStack()
    weights.add(str(folder), read_weights(path), our_name)
    *hidden, _ = mlp_widths(weights, "connector.language_projection.", [1024, 2048, 4096])
    text_config = _text_config(values, weights, dtype)
    config = PointAlignConfig(
        point_encoder_config=point_encoder_config(weights, num_groups, group_size, point_encoder_heads),
        connector_config=ConnectorConfig(kind="mlp", hidden_sizes=hidden),
        text_config=text_config,
        # PointLLM puts its tokens behind the vocabulary in this order: patch, and where clouds are marked start and end.
        point_token_id=text_config.vocab_size - (3 if _marks_clouds(values) else 1),
    )
    processor = _build_processor(path, values, config, num_points)
    model, report = assemble(config, weights, {"language_model": LoraScale(lora_alpha, 0.05)}, allow_missing, dtype)
    if merge:
        model.merge_adapters()
    return Imported(model, processor, None, report)


def import_pointllm(
    folder: str | Path, **options: Any
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor | None]:
    """Read a published PointLLM folder.

    The model has no Q-Former: all tokens of the point encoder enter the language model, and an alignment target is the
    point encoder's or the projector's output.

    Args:
        folder: config.json and weights, in one file or in shards; or a Hub id.
        options: what no tensor tells, with the published values as defaults: `num_groups` 512, `group_size` 32,
            `point_encoder_heads` 6, `num_points` 8192, and `lora_alpha` 16 for weights that hold a LoRA. And
            `allow_missing`, `merge` and `dtype` as in `import_minigpt3d`.

    Returns:
        The model in evaluation mode, and its processor, or None where the folder holds no tokenizer; `<point_patch>` is
        then the third row from the end of the vocabulary, where PointLLM puts it.

    Raises:
        CheckpointError: when a file is missing, truncated or holds code, or a tensor is missing or of the wrong shape.
        ConfigError: when the folder holds another kind of model, or a tokenizer without the three point tokens.
    """
    imported = load_pointllm(folder, **options)
    return imported.model, imported.processor
