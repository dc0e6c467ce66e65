"""The connector: everything that maps point features to tokens of the language model's width."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel, PreTrainedConfig
from transformers.utils.generic import ModelOutput

from pointalign.errors import ConfigError

Routing = Literal["sparse", "soft", "constant"]


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
        num_query_experts: sets of queries that a router chooses between for each cloud; 0 is one set and no router.
        routing: how the sets' outputs are joined, see `QueryRouter.choose`.
        num_chosen_experts: sets that "sparse" routing runs.
        router_hidden_size: hidden width of the router.

    Raises:
        ConfigError: for an unknown kind or routing, or more chosen sets than there are.
    """

    model_type = "pointalign_connector"
    base_config_key = "connector_config"
    sub_configs: ClassVar[Any] = {"qformer_config": Blip2QFormerConfig}

    kind: Literal["qformer", "mlp"] = "qformer"
    input_size: int = 384
    output_size: int = 2560
    hidden_sizes: list[int] | tuple[int, ...] = (768,)
    num_query_tokens: int = 32
    projection_size: int = 4096
    qformer_config: dict | PreTrainedConfig | None = None
    num_query_experts: int = 0
    routing: Routing = "sparse"
    num_chosen_experts: int = 2
    router_hidden_size: int = 256

    def __post_init__(self, **kwargs):
        if self.kind not in ("qformer", "mlp"):
            raise ConfigError(f"unknown connector kind {self.kind!r}; choose qformer or mlp")
        if self.routing not in ("sparse", "soft", "constant"):
            raise ConfigError(f"unknown routing {self.routing!r}; choose sparse, soft or constant")
        if self.num_query_experts and not 1 <= self.num_chosen_experts <= self.num_query_experts:
            raise ConfigError(
                f"cannot choose {self.num_chosen_experts} of {self.num_query_experts} query experts; "
                "num_chosen_experts is between 1 and their number"
            )
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
    for width_in, width_out in pairwise(sizes):
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


class QueryRouter(nn.Module):
    """Weighs the sets of queries for each cloud, by an MLP on [class token ; maximum over the other tokens].

    Source: MiniGPT-3D (arXiv 2405.01413), mixture of query experts.
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        self.mlp = _mlp([2 * config.input_size, config.router_hidden_size, config.num_query_experts])

    def forward(self, point_features: Tensor) -> Tensor:
        """Point features (B, L, D), the class token first, to one logit per set (B, experts)."""
        return self.mlp(torch.cat([point_features[:, 0], point_features[:, 1:].amax(dim=1)], dim=-1))

    def choose(self, point_features: Tensor) -> tuple[Tensor, Tensor]:
        """Which sets to run for each cloud, and the weights that their outputs are summed with.

        "sparse" takes the sets of largest softmax weight and does not normalise the weights again; "soft" takes all sets
        with their softmax weights; "constant" takes all sets equally, whatever the cloud. The config's `routing` tells which,
        and may be changed at any time: no weight belongs to one of them alone.

        Returns:
            Indices and weights, both (B, chosen).
        """
        weights = self(point_features).softmax(dim=-1)
        if self.config.routing == "sparse":
            top = weights.topk(self.config.num_chosen_experts, dim=-1)
            return top.indices, top.values
        if self.config.routing == "constant":
            weights = torch.full_like(weights, 1 / weights.shape[-1])
        return torch.arange(weights.shape[-1], device=weights.device).expand_as(weights), weights


class QFormerConnector(nn.Module):
    """Point MLP, Q-Former with learned queries, and two linears with nothing between them.

    With query experts, `query_tokens` holds one set of queries per expert; the Q-Former runs once per chosen set.

    Source: MiniGPT-3D (arXiv 2405.01413), section 3.2; Q-Former from BLIP-2 (arXiv 2301.12597).
    """

    def __init__(self, config: ConnectorConfig) -> None:
        super().__init__()
        self.config = config
        qformer_config = config.qformer_config
        assert isinstance(qformer_config, Blip2QFormerConfig)
        width = qformer_config.hidden_size
        self.point_mlp = _mlp([config.input_size, *config.hidden_sizes, qformer_config.encoder_hidden_size])
        self.query_tokens = nn.Parameter(torch.zeros(max(config.num_query_experts, 1), config.num_query_tokens, width))
        self.query_router = QueryRouter(config) if config.num_query_experts else None
        self.qformer = Blip2QFormerModel(qformer_config)
        self.language_projection = nn.Sequential(
            nn.Linear(width, config.projection_size), nn.Linear(config.projection_size, config.output_size)
        )

    def forward(self, point_features: Tensor) -> ConnectorOutput:
        """Point features (B, L, D) to point tokens (B, Q, D_llm) and the Q-Former's output (B, Q, D_qformer)."""
        encoded = self.point_mlp(point_features)
        if self.query_router is None:
            qformer_output = self._ask(self.query_tokens.expand(len(encoded), -1, -1), encoded)
        else:
            chosen, weights = self.query_router.choose(point_features)
            outputs = self._ask(
                self.query_tokens[chosen].flatten(0, 1), encoded.repeat_interleave(chosen.shape[1], dim=0)
            )
            qformer_output = torch.einsum("be,beqd->bqd", weights, outputs.unflatten(0, chosen.shape))
        return ConnectorOutput(point_tokens=self.language_projection(qformer_output), qformer_output=qformer_output)

    def add_query_experts(self, count: int, noise: float) -> None:
        """Make several sets of queries of the one there is, and a new router between them; the config follows.

        The first set is the one there was; the others are copies of it with noise, because equal sets that are chosen
        together would stay equal.

        Args:
            count: sets in all.
            noise: standard deviation of what is added to every set but the first.

        Raises:
            ConfigError: when there are several sets already, or fewer than two are asked for.

        Source: MiniGPT-3D (arXiv 2405.01413), stage IV: 8 sets, the first the trained queries. How the others begin is our
        choice.
        """
        if self.query_router is not None or count < 2:
            raise ConfigError(
                f"cannot make {count} sets of queries of {len(self.query_tokens)}; query_experts.count is 2 or more, for a "
                "model that has one set"
            )
        self.config.num_query_experts = count
        self.config.num_chosen_experts = min(self.config.num_chosen_experts, count)
        queries = self.query_tokens.detach().repeat(count, 1, 1)
        queries[1:] += noise * torch.randn_like(queries[1:])
        self.query_tokens = nn.Parameter(queries)
        self.query_router = QueryRouter(self.config).to(queries)

    def _ask(self, queries: Tensor, encoded: Tensor) -> Tensor:
        return self.qformer(query_embeds=queries, encoder_hidden_states=encoded).last_hidden_state


def rest_frozen(part: nn.Module) -> None:
    """Put a part into evaluation mode as far as it is frozen, so that it computes what it will compute later.

    A part whose matrices are all frozen rests whole, whether or not its norm weights train. Under a LoRA that trains, the
    LoRA's dropout stays awake.

    Source: released code of PointAlign (arXiv 2603.00412), measured by running it: the frozen Q-Former's own dropout is
    off, its LoRA's is on.
    """
    matrices = [name for name, weight in part.named_parameters() if weight.requires_grad and weight.ndim >= 2]
    if any(".lora_" not in name for name in matrices):
        return
    awake = [module for name, module in part.named_modules() if module.training and ".lora_dropout" in name]
    part.eval()
    for dropout in awake if matrices else ():
        dropout.train()


def drop_nothing(module: nn.Module, wanted: bool) -> None:
    """Set a module's own dropout to 0 where it is a number, as OPT's blocks keep it, or back to what it was."""
    own = vars(module)
    if not wanted:
        own.update(own.pop("dropout_kept", {}))
    elif "dropout_kept" not in own:
        kept = {name: value for name, value in own.items() if type(value) is float and "drop" in name}
        own.update({**dict.fromkeys(kept, 0.0), "dropout_kept": kept})


def build_connector(config: ConnectorConfig) -> MLPConnector | QFormerConnector:
    """The connector that a config describes, randomly initialised."""
    return QFormerConnector(config) if config.kind == "qformer" else MLPConnector(config)
