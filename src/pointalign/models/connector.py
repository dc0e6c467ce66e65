"""The connector: everything that maps point features to tokens of the language model's width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedConfig
from transformers.utils import ModelOutput


class ConnectorConfig(PreTrainedConfig):
    """Sizes of the connector; the defaults are the published ones (PointAlign, arXiv 2603.00412; MiniGPT-3D).

    Args:
        kind: "qformer" (point MLP, Q-Former, two linears) or "mlp" (linears with GELU between, as in PointLLM).
        input_size: width of the point features.
        output_size: D_llm, the language model's hidden size.
        hidden_sizes: hidden widths of the point MLP ("qformer": one, before the Q-Former) or of the whole MLP ("mlp").
        num_query_tokens: Q, learned queries of the Q-Former.
        projection_size: width between the two linears that follow the Q-Former.
        qformer_config: sizes of the Q-Former; its `encoder_hidden_size` is the point MLP's output width.
    """

    model_type = "pointalign_connector"
    base_config_key = "connector_config"
    sub_configs = {"qformer_config": Blip2QFormerConfig}  # noqa: RUF012

    kind: Literal["qformer", "mlp"] = "qformer"
    input_size: int = 384
    output_size: int = 2560
    hidden_sizes: list[int] | tuple[int, ...] = (768,)
    num_query_tokens: int = 32
    projection_size: int = 4096
    qformer_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        if not isinstance(self.qformer_config, PreTrainedConfig):
            self.qformer_config = Blip2QFormerConfig(**(self.qformer_config or {}))
        super().__post_init__(**kwargs)


@dataclass
class ConnectorOutput(ModelOutput):
    """What the connector makes of one batch of clouds.

    Args:
        point_tokens: (B, Q, D_llm), what enters the language model.
        qformer_output: (B, Q, D_qformer), the alignment target of the paper, or None for an MLP connector.
    """

    point_tokens: Tensor | None = None
    qformer_output: Tensor | None = None


def _mlp(sizes: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(width_in, width_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class MLPConnector(nn.Module):
    """Linears with GELU between them, applied to every point feature: all tokens of the encoder reach the model.

    Source: PointLLM (arXiv 2308.16911), section 3.2.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.language_projection = _mlp([config.input_size, *config.hidden_sizes, config.output_size])

    def forward(self, point_features: Tensor) -> ConnectorOutput:
        """(B, L, D) to point tokens (B, L, D_llm)."""
        return ConnectorOutput(point_tokens=self.language_projection(point_features))


class QFormerConnector(nn.Module):
    """Point MLP, Q-Former with learned queries, and two linears with nothing between them.

    Source: MiniGPT-3D (arXiv 2405.01413), section 3.2; Q-Former from BLIP-2 (arXiv 2301.12597).
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        qformer_config = config.qformer_config
        assert isinstance(qformer_config, Blip2QFormerConfig)
        width = qformer_config.hidden_size
        self.point_mlp = _mlp([config.input_size, *config.hidden_sizes, qformer_config.encoder_hidden_size])
        self.query_tokens = nn.Parameter(torch.zeros(1, config.num_query_tokens, width))
        self.qformer = Blip2QFormerModel(qformer_config)
        self.language_projection = nn.Sequential(
            nn.Linear(width, config.projection_size), nn.Linear(config.projection_size, config.output_size)
        )

    def forward(self, point_features: Tensor) -> ConnectorOutput:
        """Point features (B, L, D) to point tokens (B, Q, D_llm) and the Q-Former's output (B, Q, D_qformer)."""
        qformer_output = self.qformer(
            query_embeds=self.query_tokens.expand(len(point_features), -1, -1),
            encoder_hidden_states=self.point_mlp(point_features),
        ).last_hidden_state
        return ConnectorOutput(
            point_tokens=self.language_projection(qformer_output), qformer_output=qformer_output
        )


def build_connector(config: ConnectorConfig) -> MLPConnector | QFormerConnector:
    """The connector that a config describes, randomly initialised."""
    return QFormerConnector(config) if config.kind == "qformer" else MLPConnector(config)
