"""The whole model: point encoder, connector and any causal language model of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from huggingface_hub import create_repo, upload_folder
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput, can_return_tuple

import pointalign.models.phi  # noqa: F401  (a saved model may hold the variant, which transformers must know)
from pointalign.errors import ConfigError, DataError
from pointalign.models.checkpoint import is_adapted, load_own_weights, merge_adapters, save_own_weights
from pointalign.models.connector import (
    ConnectorConfig,
    QFormerConnector,
    build_connector,
    drop_nothing,
    rest_frozen,
)
from pointalign.models.language_model import embedding_width, takes
from pointalign.models.losses import IGNORED, summed_cross_entropy
from pointalign.models.point_encoder import PointEncoder, PointEncoderConfig

# Ways of transformers to guess tokens ahead. From embeddings, which hold a cloud, it guesses wrong.
GUESSING = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
# What an upload's commit is told.
COMMIT = ("commit_message", "commit_description", "revision", "create_pr")


def _is_begun(cache: Any) -> bool:
    """Whether a cache of keys and values was handed over that may hold a prompt already."""
    return cache is not None and not (isinstance(cache, DynamicCache) and cache.get_seq_length() == 0)


class PointAlignConfig(PreTrainedConfig):
    """Configuration of a `PointAlignForConditionalGeneration`.

    Args:
        point_encoder_config: sizes of the point encoder.
        connector_config: sizes of the connector; its input and output widths follow from the parts it joins.
        text_config: the language model's own configuration, of any causal model of transformers.
        point_token_id: placeholder id that stands for one point token in `input_ids`.
        language_model: name, Hub id or folder of the language model whose weights a checkpoint leaves out; None when
            the checkpoint holds them itself.
        shared_with: folder, relative to the checkpoint's, that holds the point encoder, the connector and the processor,
            for a checkpoint that differs from another by its adapters alone; a loaded model forgets it.
        quantize: "nf4" or "int8" when the language model's matrices are quantised as they are loaded.
    """

    model_type = "pointalign"
    sub_configs: ClassVar[Any] = {
        "text_config": AutoConfig,
        "point_encoder_config": PointEncoderConfig,
        "connector_config": ConnectorConfig,
    }

    point_encoder_config: dict | PreTrainedConfig | None = None
    connector_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    point_token_id: int = 0
    language_model: str | None = None
    shared_with: str | None = None
    quantize: str | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        if not isinstance(self.point_encoder_config, PreTrainedConfig):
            self.point_encoder_config = PointEncoderConfig(**(self.point_encoder_config or {}))
        if not isinstance(self.connector_config, PreTrainedConfig):
            self.connector_config = ConnectorConfig(**(self.connector_config or {}))
        if not isinstance(self.text_config, PreTrainedConfig):
            text = dict(self.text_config or {"model_type": "phi"})
            self.text_config = AutoConfig.for_model(**text)
        self.connector_config.input_size = self.point_encoder_config.hidden_size
        self.connector_config.output_size = embedding_width(self.text_config)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        # The base class sets the attention of all parts; a loaded language model's own choice must survive, because
        # without one transformers builds no causal mask.
        attention = self.text_config._attn_implementation
        super().__post_init__(**kwargs)
        if attention is not None:
            self.text_config._attn_implementation = attention

    @property
    def filler_token_id(self) -> int:
        """What fills rows up where nobody looks: any id but the point token's, which would ask for a cloud."""
        return 0 if self.point_token_id else 1

    @property
    def num_point_tokens(self) -> int:
        """Point tokens that one cloud becomes in the language model's input."""
        connector, encoder = self.connector_config, self.point_encoder_config
        assert isinstance(connector, ConnectorConfig)
        assert isinstance(encoder, PointEncoderConfig)
        return connector.num_query_tokens if connector.kind == "qformer" else encoder.num_tokens


@dataclass
class PointFeatures(ModelOutput):
    """What the model computes of clouds before the language model.

    Args:
        point_features: (B, G + 1, D), the point encoder's output.
        qformer_output: (B, Q, D_qformer), or None when the connector is an MLP.
        point_tokens: (B, Q, D_llm), what enters the language model.
    """

    point_features: Tensor | None = None
    qformer_output: Tensor | None = None
    point_tokens: Tensor | None = None


@dataclass
class PointAlignOutput(CausalLMOutputWithPast):
    """What one forward pass gives: transformers' causal language model output, and the clouds' features if computed.

    Args:
        points: what `encode_points` gave, when clouds or point features were passed in.
    """

    points: PointFeatures | None = None


class PointAlignForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """A language model that reads coloured point clouds.

    `input_ids` hold `config.point_token_id` once per point token; the clouds' tokens take those places in order, whatever
    the prompt, the padding side or the number of clouds. Before the language model, modules without a trainable weight
    stay in evaluation mode while the model trains, so that frozen parts compute what they will compute later; where only
    LoRA and norm weights train, its dropout alone is active. So does a language model of which nothing trains.

    Attributes:
        weights_folder: holds the language model's weights as they came, where the model's own folder does.
        rounded_from: where those lie whose frozen matrices were rounded for training; None when none were.
    """

    weights_folder: Path | None = None
    rounded_from: str | Path | None = None
    config_class = PointAlignConfig
    config: PointAlignConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012

    def __init__(self, config: PointAlignConfig, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        assert isinstance(config.point_encoder_config, PointEncoderConfig)
        assert isinstance(config.connector_config, ConnectorConfig)
        self.point_encoder = PointEncoder(config.point_encoder_config)
        self.connector = build_connector(config.connector_config)
        self.language_model: Any = (
            AutoModelForCausalLM.from_config(config.text_config) if language_model is None else language_model
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, QFormerConnector):
            initialization.normal_(module.query_tokens, std=0.02)

    def get_input_embeddings(self) -> Any:
        """The language model's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the language model's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The language model's head."""
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language model's head."""
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> Any:
        """The language model's stack of decoder blocks, without the head."""
        model = self.language_model
        base: Any = model.get_base_model() if is_adapted(model) else model
        return base.get_decoder()

    def train(self, mode: bool = True) -> PointAlignForConditionalGeneration:
        """Training mode for the parts that train; what is frozen rests, so that a frozen LoRA drops nothing out."""
        super().train(mode)
        for part in (self.point_encoder, *self.connector.children()):
            rest_frozen(part)
        frozen = not any(weight.requires_grad for weight in self.language_model.parameters())
        for module in self.language_model.modules():
            if frozen:  # activations are recomputed in training mode alone
                module.training = mode and getattr(module, "gradient_checkpointing", False)
            drop_nothing(module, frozen and module.training)
        return self

    def encode_points(self, point_clouds: Tensor | None = None, point_features: Tensor | None = None) -> PointFeatures:
        """Run everything before the language model.

        Args:
            point_clouds: (B, N, C), normalised, as the processor gives them, or
            point_features: (B, G + 1, D) computed before by the point encoder.

        Returns:
            A `PointFeatures` with `point_features`, `qformer_output` (or None) and `point_tokens`.
        """
        features: Tensor = self.point_encoder(point_clouds) if point_features is None else point_features
        point_features = features.to(next(self.connector.parameters()).dtype)
        connected = self.connector(point_features)
        return PointFeatures(
            point_features=point_features,
            qformer_output=connected.qformer_output,
            point_tokens=connected.point_tokens,
        )

    def merge_adapters(self) -> None:
        """Fold every LoRA into the weights it adapts: the same answers without the adapter's work.

        The language model then differs from the one that `config.language_model` names, so it is forgotten and a saved
        folder holds all weights.
        """
        if merge_adapters(self):
            self.config.language_model = self.weights_folder = self.rounded_from = None

    def embed_inputs(
        self, input_ids: Tensor, point_tokens: Tensor | None = None, point_positions: Tensor | None = None
    ) -> Tensor:
        """Token embeddings with the clouds' tokens at the placeholders.

        Args:
            input_ids: (B, L).
            point_tokens: (clouds, Q, D_llm) in the order of their placeholders.
            point_positions: (placeholders,), where they stand in the flattened ids, if that is known; a GPU then need not
                be waited for to find them.

        Returns:
            (B, L, D_llm).

        Raises:
            DataError: when the number of placeholders is not the number of point tokens.
        """
        mask = input_ids == self.config.point_token_id
        embeds = self.get_input_embeddings()(input_ids.masked_fill(mask, 0))
        placeholders = int(mask.sum()) if point_positions is None else len(point_positions)
        given = 0 if point_tokens is None else point_tokens.shape[:-1].numel()
        if placeholders != given:
            raise DataError(
                f"the prompts hold {placeholders} point placeholders but the clouds give {given} point tokens; "
                "build both with the same processor"
            )
        if point_tokens is None:
            return embeds
        if point_tokens.shape[-1] != embeds.shape[-1]:
            raise DataError(
                f"the point tokens are {point_tokens.shape[-1]} wide and the language model's embeddings "
                f"{embeds.shape[-1]}; give what this model's encode_points made"
            )
        tokens = point_tokens.to(embeds)
        if point_positions is None:
            return embeds.masked_scatter(mask.unsqueeze(-1), tokens)
        return embeds.flatten(0, 1).index_copy(0, point_positions, tokens.flatten(0, 1)).view_as(embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        point_clouds: Tensor | None = None,
        point_features: Tensor | None = None,
        point_tokens: Tensor | None = None,
        point_positions: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PointAlignOutput:
        """Next-token logits, and the loss when labels are given.

        Args:
            input_ids: (B, L) with `config.point_token_id` at the point tokens.
            attention_mask: (B, L), 0 at padding.
            point_clouds: (clouds, N, C), or
            point_features: (clouds, G + 1, D) of the point encoder, or
            point_tokens: (clouds, Q, D_llm) of the connector, computed before by `encode_points`.
            point_positions: where the point tokens stand, see `embed_inputs`; looked up when not given.
            labels: (B, L), -100 where nothing is to be learnt; shifted inside.
            inputs_embeds: (B, L, D_llm) instead of ids and clouds.
            position_ids: (B, L), for a language model that takes any; transformers' `generate` counts them from the mask.
            past_key_values: the language model's cache.
            logits_to_keep: as in transformers; a 1-D tensor names the positions whose logits are wanted, and with labels
                only those positions are scored.
            num_items_in_batch: number of labels to divide the summed loss by, when batches are joined.
            kwargs: handed to the language model.

        Returns:
            `loss` (mean over labels), `logits` (B, kept positions, V), `past_key_values`, `points`, and what else was
            asked for.

        Raises:
            DataError: when neither ids nor embeddings are given, or the clouds do not fit the placeholders.
        """
        points = None
        if point_clouds is not None or point_features is not None:
            points = self.encode_points(point_clouds, point_features)
            point_tokens = points.point_tokens
        if inputs_embeds is None:
            if input_ids is None:
                raise DataError("the model needs input_ids or inputs_embeds")
            if _is_begun(past_key_values) and point_tokens is None:
                inputs_embeds = self.get_input_embeddings()(input_ids)
            else:
                inputs_embeds = self.embed_inputs(input_ids, point_tokens, point_positions)
        assert inputs_embeds is not None
        if self.training and labels is not None and point_tokens is None:
            inputs_embeds = inputs_embeds + self._nothing()
        if isinstance(logits_to_keep, int) and logits_to_keep:
            # A slice would not lie in one piece, and a CPU would copy the whole head to multiply it.
            logits_to_keep = torch.arange(-min(logits_to_keep, inputs_embeds.shape[1]), 0, device=inputs_embeds.device)
        if position_ids is not None and takes(self.language_model, "position_ids"):
            kwargs["position_ids"] = position_ids
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        loss = None
        if labels is not None:
            loss = self._next_token_loss(outputs.logits, labels, logits_to_keep, num_items_in_batch)
        return PointAlignOutput(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            points=points,
        )

    def _next_token_loss(
        self, logits: Tensor, labels: Tensor, kept: int | Tensor, num_items: Tensor | int | None
    ) -> Tensor:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if isinstance(kept, Tensor):
            shifted = shifted[:, kept]
        shifted = shifted.flatten().to(logits.device)
        count = (shifted != IGNORED).sum() if num_items is None else num_items
        return summed_cross_entropy(logits.flatten(0, 1), shifted) / count

    def _nothing(self) -> Tensor | float:
        """0, with a gradient of 0 for all that trains in front of the language model.

        Text alone needs none of it, but processes that train together wait for the gradients of all that trains, from all of
        them and in one order.
        """
        ahead = chain(self.point_encoder.parameters(), self.connector.parameters())
        return sum(0.0 * weight.sum() for weight in ahead if weight.requires_grad)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        point_clouds: Tensor | None = None,
        point_tokens: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """transformers' `generate`; the clouds are encoded once and follow their prompts into beams and samples.

        Args:
            input_ids: (B, L), left-padded when B > 1.
            point_clouds: as in `forward`.
            point_tokens: as in `forward`.
            kwargs: as in `GenerationMixin.generate`; `inputs` is another name of `input_ids`.

        Raises:
            DataError: when the clouds do not fit the placeholders.
            ConfigError: when tokens about a cloud are to be guessed ahead, which transformers does for prompts of ids alone.
        """
        if input_ids is None:
            input_ids = kwargs.pop("inputs", None)
        if input_ids is not None and kwargs.get("inputs_embeds") is None:
            if point_clouds is not None:
                point_tokens = self.encode_points(point_clouds).point_tokens
            settings = kwargs.get("generation_config") or self.generation_config
            guessing = [name for name in GUESSING if kwargs.get(name, getattr(settings, name, None)) is not None]
            if guessing and point_tokens is not None:
                raise ConfigError(f"{guessing[0]} gives other tokens where a prompt holds a cloud; leave it out")
            embeds = self.embed_inputs(input_ids, point_tokens)
            if not guessing:
                kwargs["inputs_embeds"] = embeds
        if not takes(self.language_model, "past_key_values"):  # how its state is kept, it knows itself
            kwargs.setdefault("generation_config", self.generation_config)
            return self.language_model.generate(input_ids=input_ids, **kwargs)
        return super().generate(input_ids=input_ids, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, self_contained: bool | None = None, **kwargs: Any
    ) -> None:
        """Write a folder that `from_pretrained` loads.

        `model.safetensors` holds the point encoder, the connector and, unless `config.language_model` names where to find
        them, the language model's weights; LoRA goes as peft saves it into `language_model_adapter/`.

        Args:
            save_directory: the folder.
            self_contained: True writes the language model's weights too and forgets where they came from; False leaves
                them out; None leaves them out when `config.language_model` is set.
            kwargs: passed to `PreTrainedModel.save_pretrained`. With `push_to_hub=True` the folder is uploaded as it is then,
                to `repo_id`, with `private`, `token` and what a commit is told (`commit_message`, `revision`, ...).

        Raises:
            ConfigError: when the folder would lack weights: the language model's, or those of an adapter that is not peft's
                wrapper around it.
        """
        folder = Path(save_directory)
        if self_contained is None:
            self_contained = self.config.language_model is None
        upload, repository = kwargs.pop("push_to_hub", False), kwargs.pop("repo_id", folder.name)
        place = {name: kwargs.pop(name) for name in ("private", "token") if name in kwargs}
        commit = {name: kwargs.pop(name) for name in COMMIT if name in kwargs}
        save_own_weights(self, folder, self_contained, super().save_pretrained, **kwargs)
        if upload and kwargs.get("is_main_process", True):  # once the adapters are there
            repository = create_repo(repository, exist_ok=True, **place).repo_id
            upload_folder(repo_id=repository, folder_path=folder, token=place.get("token"), **commit)

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        cls,
        pretrained_model_name_or_path: str | Path,
        *args: Any,
        is_trainable: bool = False,
        merged: bool = False,
        **kwargs: Any,
    ) -> PointAlignForConditionalGeneration:
        """Load a bundled model, or a folder or Hub repository that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: `household-135m`, a folder or a Hub id.
            args: passed to `PreTrainedModel.from_pretrained`.
            is_trainable: whether a LoRA adapter is loaded for further training.
            merged: fold LoRA adapters into the weights, as `merge_adapters` does; without importing peft where it can be.
            kwargs: `quantize`, "nf4" or "int8", keeps the language model's matrices in 4 or 8 bits (as the checkpoint says
                when not given); others are passed to `PreTrainedModel.from_pretrained` (dtype, device_map, ...), for a
                checkpoint without the language model they go to the language model's loader; `revision` is the
                checkpoint's own.

        Raises:
            CheckpointError: when the folder or a file in it is missing, truncated or does not fit.
        """
        return load_own_weights(
            cls, str(pretrained_model_name_or_path), args, is_trainable, merged, super().from_pretrained, kwargs
        )


AutoConfig.register(PointAlignConfig.model_type, PointAlignConfig, exist_ok=True)
AutoModelForImageTextToText.register(PointAlignConfig, PointAlignForConditionalGeneration, exist_ok=True)
