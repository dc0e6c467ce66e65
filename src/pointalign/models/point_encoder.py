"""The point encoder: Point-BERT, which turns a coloured cloud into one token per local group and a class token."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, initialization

from pointalign.geometry import group_points

# Values of the group encoder's widest layer that are held at a time: 4 MB stay in a core's caches, 1 GiB keeps a GPU busy.
CACHED_VALUES = 1 << 20
ACCELERATOR_VALUES = 1 << 28


class PointEncoderConfig(PreTrainedConfig):
    """Sizes of the point encoder; the defaults are the published ones (PointAlign, arXiv 2603.00412; MiniGPT-3D).

    Args:
        in_channels: columns of a point, xyz first; 6 with colour.
        num_groups: G, centres chosen by farthest point sampling.
        group_size: K, nearest points of each centre.
        group_hidden_sizes: widths of the group encoder's first three 1x1 layers.
        group_width: width of a group's feature before it enters the transformer.
        hidden_size: D, width of the transformer.
        num_hidden_layers: number of pre-norm blocks.
        num_attention_heads: heads of each block.
        position_hidden_size: hidden width of the MLP that embeds a centre's position.
        mlp_ratio: hidden width of a block's MLP over D.
        metric_size: clouds have one more column, the same for all their points: their radius in metres, 0 where it is not
            known. Normalisation throws the size away; this way the class token is told of it.
    """

    model_type = "pointalign_point_encoder"
    base_config_key = "point_encoder_config"

    in_channels: int = 6
    num_groups: int = 512
    group_size: int = 32
    group_hidden_sizes: list[int] | tuple[int, ...] = (128, 256, 512)
    group_width: int = 256
    hidden_size: int = 384
    num_hidden_layers: int = 12
    num_attention_heads: int = 6
    position_hidden_size: int = 128
    mlp_ratio: float = 4.0
    metric_size: bool = False
    layer_norm_eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        """Tokens of one cloud: the class token and one per group."""
        return self.num_groups + 1


class GroupEncoder(nn.Module):
    """A mini-PointNet that turns each local group into one feature, whatever the order of its points.

    Source: Point-BERT (arXiv 2111.14819), section 3.1, on PointNet (arXiv 1612.00593).
    """

    def __init__(self, config: PointEncoderConfig) -> None:
        super().__init__()
        first, second, third = config.group_hidden_sizes
        self.linear1 = nn.Linear(config.in_channels, first)
        self.norm1 = nn.BatchNorm1d(first)
        self.linear2 = nn.Linear(first, second)
        self.linear3 = nn.Linear(2 * second, third)
        self.norm3 = nn.BatchNorm1d(third)
        self.linear4 = nn.Linear(third, config.group_width)

    def forward(self, groups: Tensor) -> Tensor:
        """Groups (B, G, K, C) to features (B, G, group_width).

        In evaluation the normalisations are folded into the linear layers before them, and the groups pass in pieces: the
        widest layer of a batch is then never held whole.
        """
        flat = groups.flatten(0, 1)
        if self.training:  # statistics are of the whole batch
            layers = (self.linear1.weight, self.linear1.bias), (self.linear3.weight, self.linear3.bias)
            features = self._features(flat, layers, (self.norm1, self.norm3))
        else:
            layers = _folded(self.linear1, self.norm1), _folded(self.linear3, self.norm3)
            values = CACHED_VALUES if flat.device.type == "cpu" else ACCELERATOR_VALUES
            at_once = max(values // (flat.shape[1] * self.linear3.out_features), 1)
            pieces = [self._features(part, layers, (nn.Identity(), nn.Identity())) for part in flat.split(at_once)]
            features = torch.cat(pieces)
        return features.unflatten(0, groups.shape[:2])

    def _features(self, groups: Tensor, layers: tuple[Any, Any], norms: tuple[nn.Module, nn.Module]) -> Tensor:
        """(groups, K, C) to (groups, group_width), with weight and bias of the two layers that a normalisation follows."""
        (weight1, bias1), (weight3, bias3) = layers
        shape, width = groups.shape[:2], self.linear2.out_features
        local = self.linear2(F.relu_(norms[0](F.linear(groups.flatten(0, 1), weight1, bias1)))).unflatten(0, shape)
        # linear3 of [pooled ; local]: the pooled half is the same for all points of a group, so it is done once.
        mixed = F.linear(local, weight3[:, width:])
        mixed += F.linear(local.amax(dim=1), weight3[:, :width], bias3).unsqueeze(1)
        return self.linear4(F.relu_(norms[1](mixed.flatten(0, 1)))).unflatten(0, shape).amax(dim=1)


def _folded(linear: nn.Linear, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer that does what it and the normalisation of running statistics after it do."""
    dtype = linear.weight.dtype
    exact = torch.promote_types(dtype, torch.float32)
    scale = norm.weight.to(exact) * (norm.running_var.to(exact) + norm.eps).rsqrt()
    bias = (linear.bias.to(exact) - norm.running_mean.to(exact)) * scale + norm.bias.to(exact)
    return (linear.weight.to(exact) * scale.unsqueeze(1)).to(dtype), bias.to(dtype)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention without a mask, (B, heads, L, width) each.

    On a CPU the fused kernel's way back is six times slower in bfloat16 than plain products (docs/LOG.md, 2026-11-25).
    """
    if query.requires_grad and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).softmax(dim=-1) @ value
    return F.scaled_dot_product_attention(query, key, value)


class PointEncoderBlock(nn.Module):
    """A pre-norm transformer block whose query, key and value have no bias."""

    def __init__(self, config: PointEncoderConfig) -> None:
        super().__init__()
        width, hidden = config.hidden_size, int(config.hidden_size * config.mlp_ratio)
        self.num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        query, key, value = self.qkv(self.norm1(tokens)).unflatten(-1, (3, self.num_heads, -1)).unbind(dim=2)
        attended = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        tokens = tokens + self.proj(attended.transpose(1, 2).flatten(2))
        return tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))


class SizeEmbedding(nn.Module):
    """What the class token is told of a cloud's size; nothing where the size is not known.

    Source: our own; the published normalisation leaves no size.
    """

    def __init__(self, config: PointEncoderConfig) -> None:
        super().__init__()
        hidden = config.position_hidden_size
        self.mlp = nn.Sequential(nn.Linear(1, hidden), nn.GELU(), nn.Linear(hidden, config.hidden_size))

    def forward(self, radius: Tensor) -> Tensor:
        """Radii in metres (B,), 0 where unknown, to (B, 1, D)."""
        known = radius > 0
        logarithm = torch.where(known, radius, torch.ones_like(radius)).log()
        embedded = self.mlp(logarithm.unsqueeze(-1).to(next(self.mlp.parameters()).dtype))
        return (embedded * known.unsqueeze(-1)).unsqueeze(1)


class PointEncoder(PreTrainedModel):
    """Point-BERT: group the cloud, encode each group, mix the groups in a transformer.

    A centre's position is added again before every block, as in the published encoder.

    Source: Point-BERT (arXiv 2111.14819); constants from PointAlign (arXiv 2603.00412).
    """

    config_class = PointEncoderConfig
    config: PointEncoderConfig
    main_input_name = "points"
    base_model_prefix = "point_encoder"
    _no_split_modules = ["GroupEncoder", "PointEncoderBlock"]  # noqa: RUF012

    def __init__(self, config: PointEncoderConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.group_encoder = GroupEncoder(config)
        self.reduce_dim = nn.Linear(config.group_width, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.size_embedding = SizeEmbedding(config) if config.metric_size else None
        self.position_embedding = nn.Sequential(
            nn.Linear(3, config.position_hidden_size), nn.GELU(), nn.Linear(config.position_hidden_size, width)
        )
        self.blocks = nn.ModuleList(PointEncoderBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, PointEncoder):
            initialization.trunc_normal_(module.class_token, std=0.02)
            initialization.trunc_normal_(module.class_position, std=0.02)

    def forward(self, points: Tensor) -> Tensor:
        """Encode clouds.

        Args:
            points: (B, N, in_channels), xyz in the unit ball, colours in [0, 1]; N >= max(num_groups, group_size). With
                `metric_size` (B, N, in_channels + 1), the last column the radius in metres.

        Returns:
            (B, num_groups + 1, hidden_size), the class token first, then the groups in order of sampling.

        Raises:
            DataError: when the clouds have too few points.
        """
        points, radius = points[..., : self.config.in_channels].float(), points[:, 0, -1].float()
        groups, centers = group_points(points, self.config.num_groups, self.config.group_size)
        return self.mix_groups(self.group_encoder(groups.to(self.reduce_dim.weight.dtype)), centers, radius)

    def mix_groups(self, features: Tensor, centers: Tensor, radius: Tensor) -> Tensor:
        """The transformer over a cloud's groups.

        Args:
            features: (B, G, group_width) of the group encoder.
            centers: (B, G, 3), where the groups lie.
            radius: (B,) in metres, read with `metric_size` alone.

        Returns:
            (B, G + 1, hidden_size), the class token first.
        """
        tokens = self.reduce_dim(features)
        first = self.class_token.expand(len(tokens), -1, -1)
        if self.size_embedding is not None:
            first = first + self.size_embedding(radius)
        tokens = torch.cat([first, tokens], dim=1)
        positions = self.position_embedding(centers.to(tokens.dtype))
        positions = torch.cat([self.class_position.expand(len(positions), -1, -1), positions], dim=1)
        for block in self.blocks:
            tokens = block(tokens + positions)
        return self.norm(tokens)
