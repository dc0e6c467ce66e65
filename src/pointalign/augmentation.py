"""Clouds as they might have been: what every draw of a training cloud changes in it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pointalign.data.conversations import ConversationDataset
from pointalign.models.point_clouds import normalize_sized

# How often a cloud is cut off, its colours change places, or are dropped, when it is augmented.
CUT_CHANCE, RECOLOR_CHANCE, GRAY_CHANCE = 0.3, 0.2, 0.25


def drawn(seed: int, number: int, step: int) -> torch.Generator:
    """The generator of one draw's changes, which depend on the seed, the sample and the step alone."""
    return torch.Generator().manual_seed(hash((seed, number, step)) % 2**63)


def augment(points: Tensor, generator: torch.Generator, num_points: int, size_told: float) -> Tensor:
    """A cloud as it might have been: turned a little, stretched, shaken, in other light or paint, cut off, thinned.

    Args:
        points: (N, 6), y up, or (N, 7) with the unit of xyz in metres. Objects stand upright, so only small turns are made.
        generator: of all random choices.
        num_points: how many points to return.
        size_told: how often the unit is kept, where there is one.

    Returns:
        (num_points, 6), normalised again; where a cut leaves fewer points, some come twice. Of a (N, 7) cloud also the radius
        in metres, 0 where it is not told.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def happens(chance: float) -> bool:
        return bool(uniform(0, 1) < chance)

    points = points[torch.randperm(len(points), generator=generator)]
    if happens(CUT_CHANCE):
        along = points[:, :3] @ F.normalize(torch.randn(3, generator=generator), dim=0)
        points = points[along <= along.quantile(float(uniform(0.7, 1)))]
    kept = points[: int(num_points * float(uniform(0.5, 1)))]
    points = kept.repeat(-(-num_points // len(kept)), 1)[:num_points]
    xyz, rgb, unit = points[:, :3] * uniform(0.85, 1.18, 3), points[:, 3:6], points[:, 6:]
    if happens(0.5):
        xyz = xyz * torch.tensor([-1.0, 1.0, 1.0])
    xyz = xyz @ _turned(uniform(-0.4, 0.4), 0, 2).T @ _turned(uniform(-0.08, 0.08), 1, 2).T
    xyz = xyz + uniform(0, 0.01) * torch.randn(xyz.shape, generator=generator)
    rgb = (rgb * uniform(0.75, 1.25, 3) + uniform(-0.12, 0.12, 3)).clamp(0, 1)
    if happens(RECOLOR_CHANCE):
        rgb = rgb[:, torch.randperm(3, generator=generator)]
    if happens(GRAY_CHANCE):
        rgb = torch.full_like(rgb, 0.5)
    if happens(1 - size_told):
        unit = torch.zeros_like(unit)
    return normalize_sized(torch.cat([xyz, rgb, unit], dim=1))


def _turned(angle: Tensor, first: int, second: int) -> Tensor:
    """(3, 3) rotation by an angle in radians in the plane of two axes."""
    matrix = torch.eye(3)
    matrix[first, first] = matrix[second, second] = angle.cos()
    matrix[first, second], matrix[second, first] = -angle.sin(), angle.sin()
    return matrix


class AugmentedConversations(ConversationDataset):
    """Conversations whose clouds are shown anew at every draw, as `augment` does it.

    Args:
        size_told: how often a cloud's size is told, where the model can be told it.
        seed: of the changes.
        kwargs: as `ConversationDataset`'s; `points` gives clean clouds, (N, 6 or 7).
    """

    def __init__(self, size_told: float, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size_told, self.seed = size_told, seed

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The sample of (conversation number, step), see `NumberedBatches`; errors as `ConversationDataset`'s."""
        number, step = index
        sample = super().__getitem__(number)
        generator = drawn(self.seed, number, step)
        clouds = [
            augment(points["point_clouds"], generator, self.processor.num_points, self.size_told)
            for points in sample["points"]
        ]
        return {**sample, "points": [{"point_clouds": cloud} for cloud in clouds]}
