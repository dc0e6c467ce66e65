"""Import MiniGPT-3D's and PointAlign's published checkpoints: a stack of files that together make the model.

Source: MiniGPT-3D (arXiv 2405.01413), PointAlign (arXiv 2603.00412); tensor names as their files hold them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import Blip2QFormerConfig

from pointalign.errors import CheckpointError, ConfigError
from pointalign.importers.assembly import (
    Imported,
    LoraScale,
    assemble,
    count_layers,
    mlp_widths,
    point_encoder_config,
    point_encoder_name,
    take_alignment_projector,
)
from pointalign.importers.tensors import WeightStack, has_weights, read_json, read_weights
from pointalign.models.chat_text import choose_point_token
from pointalign.models.checkpoint import find_checkpoint
from pointalign.models.connector import ConnectorConfig, Routing
from pointalign.models.language_model import load_tokenizer
from pointalign.models.phi import PhiVariantConfig
from pointalign.models.pointalign import PointAlignConfig, PointAlignForConditionalGeneration
from pointalign.models.processing import PointAlignProcessor

END_SYMBOL = "###"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ message['content'] + '###' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n' }}"
    "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
)
QUERY_TOKENS = "connector.query_tokens"
# Published beginnings of names and ours; the first that fits counts.
PREFIXES = {
    "point_2_Qformer_proj.": "connector.point_mlp.",
    "query_expert_dict.": f"{QUERY_TOKENS}.",
    "query_router.": "connector.query_router.mlp.",
    "Qformer.bert.embeddings.LayerNorm.": "connector.qformer.layernorm.",
    "Qformer.bert.": "connector.qformer.",
    "qformer.": "connector.qformer.",
    "llama_proj.": "connector.language_projection.0.",
    "llama_proj2.": "connector.language_projection.1.",
    "llama_model.": "language_model.",
    "alignment_projector.projector.": "alignment_projector.layers.",
}
POINT_ENCODER_PREFIXES = ("pc_encoder.", "point_encoder.")
QFORMER_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "max_position_embeddings",
    "initializer_range",
    "layer_norm_eps",
)


def our_name(name: str) -> str | None:
    """Our name of a tensor of a published file, or None for a tensor that has no place in the model."""
    if ".original_module." in name:
        return None
    name = name.replace("base_model.model.", "").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")
    name = re.sub(r"\.(lora_[AB])\.default\.", r".\1.", name)
    if name == "query_tokens":
        return QUERY_TOKENS
    for prefix in POINT_ENCODER_PREFIXES:
        if name.startswith(prefix):
            return "point_encoder." + point_encoder_name(name.removeprefix(prefix))
    for published, ours in PREFIXES.items():
        if name.startswith(published):
            return ours + name.removeprefix(published).replace("attention.self.", "attention.attention.")
    return None


def fuse_query_key_value(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Join the q_proj, k_proj and v_proj of Phi-2 as published into query_key_value, laid out (heads, 3, head_dim).

    Raises:
        CheckpointError: when one of the three is missing, they differ in shape, or they do not divide into the heads.
    """
    fused = {}
    for name, tensor in state.items():
        if ".q_proj." in name:
            names = [name.replace(".q_proj.", f".{letter}_proj.") for letter in "qkv"]
            if absent := [one for one in names if one not in state]:
                raise CheckpointError(f"the language model holds {name} and no {absent[0]}; add the file that holds it")
            parts = [state[one] for one in names]
            if len({part.shape for part in parts}) > 1 or not tensor.ndim or len(tensor) % heads:
                raise CheckpointError(
                    f"the language model's {name} and its k_proj and v_proj have shapes "
                    f"{[tuple(part.shape) for part in parts]}, not of one shape that divides into {heads} heads; give the "
                    "configuration that belongs to these weights"
                )
            joined = torch.cat([part.unflatten(0, (heads, 1, -1)) for part in parts], dim=1)
            fused[name.replace(".q_proj.", ".query_key_value.")] = joined.flatten(0, 2)
        elif ".k_proj." not in name and ".v_proj." not in name:
            fused[name] = tensor
    return fused


def read_language_model(source: str, weights: WeightStack) -> PhiVariantConfig:
    """Sizes of the language model, and its weights on the stack where the source holds any.

    Args:
        source: a `.json` configuration, a folder, or a Hub id of Phi-2 (or of the variant).
        weights: changed in place.

    Raises:
        CheckpointError: when it cannot be read.
        ConfigError: when it is another language model, or a setting cannot be.
    """
    folder = None if source.endswith(".json") else find_checkpoint(source)
    values = read_json(Path(source) if folder is None else folder / "config.json")
    if values.get("model_type") not in ("phi", "phi-msft", PhiVariantConfig.model_type):
        raise ConfigError(
            f"{source} describes a language model of type {values.get('model_type')!r}; MiniGPT-3D's is Phi-2, type 'phi'"
        )
    dropped = (
        "model_type",
        "architectures",
        "torch_dtype",
        "dtype",
        "auto_map",
        "transformers_version",
        "rope_scaling",
    )
    try:
        config = PhiVariantConfig.from_dict({key: value for key, value in values.items() if key not in dropped})
    except StrictDataclassError as error:
        raise ConfigError(f"{source} describes no Phi-2: {' '.join(str(error).split())}; copy it again") from error
    if folder is not None and has_weights(folder):
        state = fuse_query_key_value(read_weights(folder), config.num_attention_heads)
        weights.add(source, state, lambda name: f"language_model.{name}")
    return config


def read_qformer(source: str | None, weights: WeightStack) -> dict[str, Any]:
    """Settings of the Q-Former, and its weights on the stack where the source holds any.

    Args:
        source: a `.json` configuration of BERT or of the Q-Former; a folder or Hub id of BERT (only its configuration is
            read) or of BLIP-2; a weight file; or None.
        weights: changed in place.

    Raises:
        CheckpointError: when it cannot be read.
    """
    if source is None:
        return {}
    path = Path(source)
    if path.is_file() and path.suffix != ".json":
        weights.add(source, read_weights(path), our_name)
        return {}
    folder = None if path.suffix == ".json" else find_checkpoint(source)
    values = read_json(path if folder is None else folder / "config.json")
    if folder is not None and values.get("model_type") != "bert" and has_weights(folder):
        weights.add(source, read_weights(folder), our_name)
    values = values.get("qformer_config", values)
    return {key: values[key] for key in QFORMER_FIELDS if key in values}


def connector_config(weights: WeightStack, settings: dict[str, Any], routing: Routing) -> ConnectorConfig:
    """Sizes of the connector: from its tensors, and what no tensor tells from the Q-Former's settings.

    Raises:
        ConfigError: when the Q-Former's width does not divide into its heads.
    """
    published, qformer = ConnectorConfig(), Blip2QFormerConfig(**settings)
    layers = "connector.qformer.encoder.layer."
    crossing = sorted(
        {int(name.removeprefix(layers).split(".")[0]) for name in weights.names(layers) if "cross" in name}
    )
    qformer.hidden_size = weights.size("connector.qformer.layernorm.weight", 0, qformer.hidden_size)
    qformer.num_hidden_layers = count_layers(weights, layers, qformer.num_hidden_layers)
    qformer.intermediate_size = weights.size(f"{layers}0.intermediate_query.dense.weight", 0, qformer.intermediate_size)
    if crossing:
        qformer.cross_attention_frequency = crossing[1] if len(crossing) > 1 else qformer.num_hidden_layers
    if qformer.hidden_size % qformer.num_attention_heads:
        raise ConfigError(
            f"the Q-Former's width {qformer.hidden_size} does not divide into {qformer.num_attention_heads} heads; give its "
            "configuration as `qformer`"
        )
    *hidden, qformer.encoder_hidden_size = mlp_widths(
        weights, "connector.point_mlp.", [*published.hidden_sizes, qformer.encoder_hidden_size]
    )
    return ConnectorConfig(
        kind="qformer",
        hidden_sizes=hidden,
        num_query_tokens=weights.size(QUERY_TOKENS, 1, published.num_query_tokens),
        projection_size=weights.size("connector.language_projection.0.weight", 0, published.projection_size),
        qformer_config=qformer,
        num_query_experts=weights.size("connector.query_router.mlp.2.weight", 0, 0),
        router_hidden_size=weights.size("connector.query_router.mlp.0.weight", 0, published.router_hidden_size),
        routing=routing,
    )


def _join_query_experts(weights: WeightStack) -> None:
    """One tensor of all the experts' queries; the first expert's are also stored as `query_tokens`."""
    experts = sorted(weights.names(f"{QUERY_TOKENS}."), key=lambda name: int(name.rpartition(".")[2]))
    if not experts:
        return
    if [name.rpartition(".")[2] for name in experts] != [str(index) for index in range(len(experts))]:
        raise CheckpointError(f"the files hold query experts {experts}, with gaps; add the file that holds the others")
    weights.join(experts, QUERY_TOKENS)


def stop_token_ids(tokenizer: Any) -> list[int]:
    """Tokens that end an answer: the tokenizer's end token, and those that hold the end symbol."""
    ids = {index for token, index in tokenizer.get_vocab().items() if END_SYMBOL in token}
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return sorted(ids)


def build_processor(model_config: PointAlignConfig, tokenizer: Any, token: str, num_points: int) -> PointAlignProcessor:
    """The processor that writes the published training prompt: `[INST] <PC>` points `</PC> question [/INST]`."""
    encoder: Any = model_config.point_encoder_config
    return PointAlignProcessor(
        tokenizer,
        num_points=num_points,
        num_point_tokens=model_config.num_point_tokens,
        min_points=max(encoder.num_groups, encoder.group_size),
        point_token=token,
        point_prefix="<PC>",
        point_suffix="</PC> ",
        chat_template=CHAT_TEMPLATE,
    )


def load_minigpt3d(
    files: Sequence[str | Path],
    language_model: str | Path,
    qformer: str | Path | None = None,
    tokenizer: str | Path | None = None,
    *,
    num_groups: int = 512,
    group_size: int = 32,
    point_encoder_heads: int = 6,
    lora_alpha: int = 16,
    routing: Routing = "sparse",
    num_points: int = 8192,
    allow_missing: Sequence[str] = (),
    merge: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Imported:
    """As `import_minigpt3d`, with the alignment projector and the report; the arguments and errors are the same."""
    weights = WeightStack()
    text_config = read_language_model(str(language_model), weights)
    text_config.dtype = dtype
    settings = read_qformer(None if qformer is None else str(qformer), weights)
    for file in files:
        state = read_weights(file)
        if "cls_pos" in state:
            state = {f"pc_encoder.{name}": tensor for name, tensor in state.items()}
        weights.add(str(file), state, our_name)
    _join_query_experts(weights)
    projector = take_alignment_projector(weights)
    vocabulary = load_tokenizer(str(tokenizer or language_model))
    token = choose_point_token(vocabulary, text_config.vocab_size)
    config = PointAlignConfig(
        point_encoder_config=point_encoder_config(weights, num_groups, group_size, point_encoder_heads),
        connector_config=connector_config(weights, settings, routing),
        text_config=text_config,
        point_token_id=vocabulary.convert_tokens_to_ids(token),
    )
    scales = {"connector.qformer": LoraScale(None, 0.1), "language_model": LoraScale(lora_alpha, 0.05)}
    model, report = assemble(config, weights, scales, allow_missing, dtype)
    if merge:
        model.merge_adapters()
    generation: Any = model.generation_config
    generation.eos_token_id, generation.suppress_tokens = stop_token_ids(vocabulary), [config.point_token_id]
    return Imported(model, build_processor(config, vocabulary, token, num_points), projector, report)


def import_minigpt3d(
    files: Sequence[str | Path],
    language_model: str | Path,
    qformer: str | Path | None = None,
    tokenizer: str | Path | None = None,
    **options: Any,
) -> tuple[PointAlignForConditionalGeneration, PointAlignProcessor]:
    """Read a published MiniGPT-3D or PointAlign model.

    Args:
        files: `.pth` or `.safetensors` files in the order they are applied, later tensors replacing earlier ones: BLIP-2's
            Q-Former, TinyGPT-V, the point encoder, and the stages' own files.
        language_model: folder or Hub id of Phi-2; or a `.json` configuration, when the files hold all its weights.
        qformer: folder, Hub id, weight file or `.json` configuration of the Q-Former (or of the BERT that it is shaped
            like); None reads its sizes from the files and takes 12 heads.
        tokenizer: folder or Hub id; None takes the language model's.
        options: what no tensor tells, with the published values as defaults: `num_groups` 512, `group_size` 32,
            `point_encoder_heads` 6, `lora_alpha` 16, `routing` of query experts "sparse", `num_points` 8192. And
            `allow_missing` (names, beginnings or patterns of our names that may stay randomly initialised), `merge` (add
            the LoRA to the weights), `dtype` of the weights, float32.

    Returns:
        The model in evaluation mode and its processor. Only the language model's LoRA is left to train.

    Raises:
        CheckpointError: when a file is missing, truncated or holds code, or a tensor is missing or of the wrong shape.
        ConfigError: when a configuration is of another model.
    """
    imported = load_minigpt3d(files, language_model, qformer, tokenizer, **options)
    assert imported.processor is not None
    return imported.model, imported.processor
