"""Clouds as they might have been: what every draw of a training cloud changes in it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pointalign.data.conversations import ConversationDataset
from pointalign.models.point_clouds import normalize_sized


class Changes(NamedTuple):
    """How far a cloud is changed.

    Args:
        cut: how often it is cut off.
        recolor: how often its colours change places.
        gray: how often they are dropped.
        stretch: least and most factor of each axis.
        light: by how much each colour's factor may differ from 1.
        tint: how much may be added to each colour.
        turn: largest turn about the vertical axis, in radians; forwards a fifth of it.
    """

    cut: float
    recolor: float
    gray: float
    stretch: tuple[float, float]
    light: float
    tint: float
    turn: float


# For learning what an object is, whatever it looks like.
ANY_LOOK = Changes(cut=0.3, recolor=0.2, gray=0.25, stretch=(0.85, 1.18), light=0.25, tint=0.12, turn=0.4)
# For learning to say what a cloud looks like: what is told of colours and proportions stays true, but near a border.
SAME_LOOK = Changes(cut=0, recolor=0, gray=0, stretch=(0.97, 1.03), light=0.03, tint=0.02, turn=0.05)


def drawn(seed: int, number: int, step: int) -> torch.Generator:
    """The generator of one draw's changes, which depend on the seed, the sample and the step alone."""
    return torch.Generator().manual_seed(hash((seed, number, step)) % 2**63)


def augment(
    points: Tensor, generator: torch.Generator, num_points: int, size_told: float, changes: Changes = ANY_LOOK
) -> Tensor:
    """A cloud as it might have been: turned a little, stretched, shaken, in other light or paint, cut off, thinned.

    Args:
        points: (N, 6), y up, or (N, 7) with the unit of xyz in metres. Objects stand upright, so only small turns are made.
        generator: of all random choices.
        num_points: how many points to return.
        size_told: how often the unit is kept, where there is one.
        changes: how far it is changed.

    Returns:
        (num_points, 6), normalised again; where a cut leaves fewer points, some come twice. Of a (N, 7) cloud also the radius
        in metres, 0 where it is not told.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    def happens(chance: float) -> bool:
        return bool(uniform(0, 1) < chance)

    points = points[torch.randperm(len(points), generator=generator)]
    if happens(changes.cut):
        along = points[:, :3] @ F.normalize(torch.randn(3, generator=generator), dim=0)
        points = points[along <= along.quantile(float(uniform(0.7, 1)))]
    kept = points[: int(num_points * float(uniform(0.5, 1)))]
    points = kept.repeat(-(-num_points // len(kept)), 1)[:num_points]
    xyz, rgb, unit = points[:, :3] * uniform(*changes.stretch, 3), points[:, 3:6], points[:, 6:]
    if happens(0.5):
        xyz = xyz * torch.tensor([-1.0, 1.0, 1.0])
    turn, tilt = changes.turn, changes.turn / 5
    xyz = xyz @ _turned(uniform(-turn, turn), 0, 2).T @ _turned(uniform(-tilt, tilt), 1, 2).T
    xyz = xyz + uniform(0, 0.01) * torch.randn(xyz.shape, generator=generator)
    light, tint = changes.light, changes.tint
    rgb = (rgb * uniform(1 - light, 1 + light, 3) + uniform(-tint, tint, 3)).clamp(0, 1)
    if happens(changes.recolor):
        rgb = rgb[:, torch.randperm(3, generator=generator)]
    if happens(changes.gray):
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
    """Conversations whose clouds are shown anew at every draw, without changing what is said of them (`SAME_LOOK`).

    Args:
        size_told: how often a cloud's size is told, where the model can be told it.
        seed: of the changes.
        kwargs: as `ConversationDataset`'s; `points` gives clean clouds, (N, 6 or 7).
    """

    def __init__(self, size_told: float, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.size_told, self.seed = size_told, seed

    def __getitem__(self, index: tuple[int, int]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The sample of (conversation number, batch number), see `NumberedBatches`; errors as `ConversationDataset`'s."""
        number, batch = index
        sample = super().__getitem__(number)
        generator = drawn(self.seed, number, batch)
        clouds = [
            augment(points["point_clouds"], generator, self.processor.num_points, self.size_told, SAME_LOOK)
            for points in sample["points"]
        ]
        return {**sample, "points": [{"point_clouds": cloud} for cloud in clouds]}
