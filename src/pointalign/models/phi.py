"""The Phi-2 variant of the published checkpoints (TinyGPT-V's), as a language model that transformers can load.

It differs from transformers' Phi in three places: query, key and value are one linear whose output is laid out
(heads, 3, head_dim); each head's query and key pass a LayerNorm before rotary; the attention's output passes an RMSNorm
before it is added to the MLP's and the residual. Importing this module makes `AutoModelForCausalLM` know the variant.

Source: TinyGPT-V (arXiv 2312.16862), section 3.1; Phi from transformers (Apache-2.0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PhiConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.phi.modeling_phi import (
    PhiForCausalLM,
    PhiMLP,
    PhiModel,
    PhiPreTrainedModel,
    PhiRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

from pointalign.models.phi_heads import one_pass, split_heads

SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


class PhiVariantConfig(PhiConfig):
    """Sizes of the variant: those of transformers' Phi, whose `qk_layernorm` is always on here.

    Args:
        rms_norm_eps: of the RMSNorm on the attention's output.
    """

    model_type = "pointalign_phi"
    # The plans of Phi name linears that are fused here.
    base_model_tp_plan = None
    base_model_sp_plan = None

    rms_norm_eps: float = 1e-6


class PhiVariantNorm(nn.RMSNorm):
    """An RMSNorm in its weight's own precision, for which PyTorch has a fused kernel, of the input's type as all norms here."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        assert self.weight is not None
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class PhiVariantGELU(nn.Module):
    """GELU by tanh, transformers' `gelu_new`, in one kernel in place of eight; compiled, by a sigmoid in fewer operations.

    Source: (1 + tanh(u)) / 2 = sigmoid(2u), with u = sqrt(2 / pi) (x + 0.044715 x^3) of GELUs (arXiv 1606.08415), section 2.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        if torch.compiler.is_compiling():
            return gelu_by_sigmoid(x)
        return F.gelu(x, approximate="tanh")


def gelu_by_sigmoid(x: Tensor) -> Tensor:
    """GELU by tanh, see `PhiVariantGELU`; any shape to the same."""
    return x * torch.sigmoid(x * (2 * SQRT_2_OVER_PI + 2 * SQRT_2_OVER_PI * 0.044715 * x * x))


class PhiVariantAttention(nn.Module):
    """Causal attention with a fused query_key_value and a LayerNorm over each head's query and key."""

    def __init__(self, config: PhiVariantConfig, layer_idx: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = width // heads
        self.rotary_dim = int(self.head_dim * config.rope_parameters["partial_rotary_factor"])  # pyright: ignore
        self.num_key_value_groups = 1
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)
        self.q_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)
        self.k_layernorm = nn.LayerNorm(self.head_dim, eps=config.layer_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states (B, L, D) to attended ones of the same shape, and the weights where the backend gives them."""
        fused = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        q_norm, k_norm = self.q_layernorm, self.k_layernorm
        norms = (q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias)
        if one_pass(fused, norms):
            query, key, value = (
                x.transpose(1, 2) for x in split_heads(fused, *norms, *position_embeddings, q_norm.eps)
            )
        else:
            query, key, value = fused.transpose(1, 2).unbind(dim=3)
            query, key = self._rotate(q_norm(query), k_norm(key), position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation,  # pyright: ignore[reportArgumentType]
            eager_attention_forward,
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        attended, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.dense(attended.reshape(hidden_states.shape)), weights

    def _rotate(self, query: Tensor, key: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        rotated = apply_rotary_pos_emb(query[..., : self.rotary_dim], key[..., : self.rotary_dim], *position_embeddings)
        query = torch.cat([rotated[0], query[..., self.rotary_dim :]], dim=-1)
        return query, torch.cat([rotated[1], key[..., self.rotary_dim :]], dim=-1)


class PhiVariantDecoderLayer(GradientCheckpointingLayer):
    """A parallel block: attention, through the RMSNorm, and MLP of the same normalised input, added to the residual.

    Attributes:
        called_once: its dropouts, for `pointalign.dropout`.
    """

    called_once = ("attention_dropout", "mlp_dropout")

    def __init__(self, config: PhiVariantConfig, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = PhiVariantAttention(config, layer_idx)
        self.mlp = PhiMLP(config)
        if config.hidden_act == "gelu_new":
            self.mlp.activation_fn = PhiVariantGELU()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_layernorm = PhiVariantNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention_dropout, self.mlp_dropout = nn.Dropout(config.resid_pdrop), nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """(B, L, D) to (B, L, D); the arguments are those of `PhiVariantAttention`."""
        normalized = self.input_layernorm(hidden_states)
        attended, _ = self.self_attn(normalized, **kwargs)
        attended = self.attention_dropout(self.post_layernorm(attended))
        return attended + self.mlp_dropout(self.mlp(normalized)) + hidden_states


class PhiVariantPreTrainedModel(PhiPreTrainedModel):
    """What the variant's two models share."""

    config_class = PhiVariantConfig
    config: PhiVariantConfig
    _no_split_modules = ["PhiVariantDecoderLayer"]  # noqa: RUF012
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PhiVariantDecoderLayer,
        "attentions": PhiVariantAttention,
    }


class PhiVariantModel(PhiVariantPreTrainedModel, PhiModel):
    """Embedding, blocks and final norm; the forward pass is that of transformers' `PhiModel`."""

    def __init__(self, config: PhiVariantConfig) -> None:
        # PhiModel's own constructor would build all of Phi's blocks only to have them replaced.
        super(PhiModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.embed_dropout = nn.Dropout(config.embd_pdrop)
        self.layers = nn.ModuleList(PhiVariantDecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary_emb = PhiRotaryEmbedding(config=config)
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class PhiVariantForCausalLM(PhiVariantPreTrainedModel, PhiForCausalLM):
    """The variant with its head; arguments and outputs are those of transformers' `PhiForCausalLM`."""

    def __init__(self, config: PhiVariantConfig) -> None:
        super(PhiForCausalLM, self).__init__(config)
        self.model = PhiVariantModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()


AutoConfig.register(PhiVariantConfig.model_type, PhiVariantConfig, exist_ok=True)
AutoModelForCausalLM.register(PhiVariantConfig, PhiVariantForCausalLM, exist_ok=True)
