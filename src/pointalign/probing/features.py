"""What a model's layers hold about objects: the mean point token of every layer, read by hooks, kept on disk.

Letters: B clouds, L sequence length, D width of the language model, S sampled tokens of a cloud. Layers as in
`pointalign.decoder_blocks`: 0 is what enters the first block, k the output of the k-th.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pointalign.data.features import FeatureCache
from pointalign.data.sources import HouseholdClouds, read_clouds
from pointalign.decoder_blocks import reading_layers
from pointalign.errors import DataError
from pointalign.evaluation.asking import LoadedModel
from pointalign.evaluation.benchmarks import INSTRUCTION
from pointalign.evaluation.provenance import prompt_hash
from pointalign.geometry import group_points
from pointalign.progress import progress
from pointalign.storage import cache_dir

# Of each cloud, so many groups' tokens are kept for decoding where they lie.
SAMPLED_GROUPS = 8


@torch.inference_mode()
def read_point_tokens(
    model: nn.Module,
    inputs: Mapping[str, Any],
    mask: Tensor,
    num_tokens: int,
    sampled: Sequence[int] = (),
    layers_module: nn.ModuleList | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a model once and read its placeholders' hidden states in every layer.

    Works for any Hugging Face decoder: a PointAlign model, an imported one, a LLaVA. Each layer is averaged as it is
    computed, so that the memory does not grow with depth times length.

    Args:
        model: in evaluation mode.
        inputs: arguments of its forward.
        mask: (B, L) bool, true at the placeholders: `input_ids == config.point_token_id`, or a LLaVA's image tokens.
        num_tokens: placeholders of one cloud or image.
        sampled: which of them are also given one by one.
        layers_module: the decoder's blocks, when they cannot be found.

    Returns:
        Means (clouds, layers + 1, D) and sampled tokens (clouds, layers + 1, S, D), float32 on the CPU, in the order of the
        placeholders.

    Raises:
        DataError: when the mask does not hold whole clouds.
        ConfigError: when the decoder's blocks cannot be found.
    """
    counts = mask.sum(dim=-1)
    if not counts.any() or (counts % num_tokens).any():
        raise DataError(
            f"{counts.flatten().tolist()} placeholders are not whole clouds of {num_tokens} tokens each; check the prompts"
        )
    means: dict[int, Tensor] = {}
    tokens: dict[int, Tensor] = {}

    def read(layer: int, hidden: Tensor) -> None:
        rows = hidden[mask.to(hidden.device)].float().unflatten(0, (-1, num_tokens))
        means[layer], tokens[layer] = rows.mean(dim=1).cpu(), rows[:, list(sampled)].cpu()

    with reading_layers(model, read, layers_module) as depth:
        model(**inputs)
    order = range(depth + 1)
    return torch.stack([means[k] for k in order], dim=1), torch.stack([tokens[k] for k in order], dim=1)


@dataclass(frozen=True)
class LayerFeatures:
    """What one model holds about n objects.

    Args:
        means: (n, layers + 1, D) mean point token.
        point_features: (n, D_encoder) mean of the point encoder's output over its tokens.
        tokens: (n, layers + 1, S, D) tokens of sampled groups; S is 0 where point tokens belong to no group.
        centers: (n, S, 3) where those groups lie in the cloud.
    """

    means: np.ndarray
    point_features: np.ndarray
    tokens: np.ndarray
    centers: np.ndarray

    @property
    def depth(self) -> int:
        """Number of decoder blocks."""
        return self.means.shape[1] - 1


def sampled_groups(config: Any) -> list[int]:
    """Groups whose tokens are kept one by one, spread evenly; none where queries mix the groups (a Q-Former)."""
    encoder = config.point_encoder_config
    if config.connector_config.kind == "qformer":
        return []
    count = min(SAMPLED_GROUPS, encoder.num_groups)
    return [round(index) for index in np.linspace(0, encoder.num_groups - 1, count)]


def extract_features(
    loaded: LoadedModel, clouds: HouseholdClouds, object_ids: Sequence[str], batch_size: int
) -> LayerFeatures:
    """Read a model's layers about objects, asked "What is this?"; what was computed before comes from disk.

    Args:
        loaded: the model.
        clouds: the objects' clouds.
        object_ids: which objects, in the order of the result's rows.
        batch_size: clouds at a time.

    Raises:
        DataError: when a cloud does not suit the model, or the disk is full.
    """
    groups = sampled_groups(loaded.model.config)
    cache = FeatureCache(
        cache_dir() / "probing",
        object_ids,
        {
            "model": loaded.fingerprint,
            "dtype": loaded.dtype,
            "prompt": prompt_hash(loaded.processor, INSTRUCTION),
            "clouds": clouds.fingerprint,
            "groups": groups,
        },
    )
    if not cache.is_full:
        with progress(f"reading layers of {loaded.name}", len(object_ids)) as advance:
            cache.fill(lambda names: _compute(loaded, read_clouds(clouds, names), groups), batch_size, advance)
    # Gigabytes of a large model: written into place, and never there twice.
    read = {name: np.empty((len(object_ids), *row.shape), np.float32) for name, row in cache[object_ids[0]].items()}
    for number, object_id in enumerate(object_ids):
        for name, row in cache[object_id].items():
            read[name][number] = row
    return LayerFeatures(**read)


def _compute(loaded: LoadedModel, clouds: Sequence[np.ndarray], groups: Sequence[int]) -> dict[str, Tensor]:
    model, processor = loaded.model, loaded.processor
    messages = [{"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": INSTRUCTION}]}]
    inputs = processor.apply_chat_template([messages] * len(clouds), points=list(clouds))
    points, ids = inputs["point_clouds"].to(loaded.device), inputs["input_ids"].to(loaded.device)
    with torch.inference_mode():
        encoded = model.encode_points(points)
    given = {
        "input_ids": ids,
        "attention_mask": inputs["attention_mask"].to(loaded.device),
        "point_tokens": encoded.point_tokens,
        "logits_to_keep": 1,
    }
    config = model.config
    # With an MLP connector the class token comes first, then the groups.
    means, tokens = read_point_tokens(
        model, given, ids == config.point_token_id, config.num_point_tokens, [group + 1 for group in groups]
    )
    encoder = config.point_encoder_config
    _, centers = group_points(points.float(), encoder.num_groups, encoder.group_size)
    return {
        "means": means,
        "point_features": encoded.point_features.float().mean(dim=1),
        "tokens": tokens,
        "centers": centers[:, list(groups)],
    }
