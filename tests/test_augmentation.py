"""Clouds that are shown anew at every draw: what may change in them, and what it depends on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from pointalign.augmentation import ANY_LOOK, SAME_LOOK, AugmentedConversations, Changes, augment
from pointalign.data.conversations import ConversationDataset, read_conversations
from pointalign.data.household import load_household
from pointalign.data.household_text import describe
from pointalign.models.processing import PointAlignProcessor


def tower() -> torch.Tensor:
    """An upright tower, four times as high as wide, red."""
    xyz = torch.rand(2048, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 4.0, 1.0])
    return torch.cat([xyz, torch.tensor([[1.0, 0.0, 0.0]]).expand(2048, 3)], dim=1)


def test_an_augmented_cloud_is_still_one_cloud_that_stands_upright() -> None:
    seen = []
    for seed in range(60):
        cloud = augment(tower(), torch.Generator().manual_seed(seed), 512, 0.5)
        assert cloud.shape == (512, 6)
        torch.testing.assert_close(cloud[:, :3].norm(dim=1).max(), torch.tensor(1.0))
        torch.testing.assert_close(cloud[:, :3].mean(dim=0), torch.zeros(3), atol=1e-5, rtol=0)
        assert 0 <= cloud[:, 3:].min() <= cloud[:, 3:].max() <= 1
        width, height, depth = (cloud[:, axis].quantile(0.95) - cloud[:, axis].quantile(0.05) for axis in range(3))
        assert height > 1.3 * max(width, depth)
        seen.append(cloud)
    gray = [bool((cloud[:, 3:] == 0.5).all()) for cloud in seen]
    assert 5 <= sum(gray) <= 28, "a quarter of 60, give or take"
    assert any(cloud[:, 4].mean() > 0.6 for cloud in seen), "red in another channel"
    assert len({tuple(cloud[0].tolist()) for cloud in seen}) == 60


def test_an_augmented_cloud_knows_its_radius_half_the_time() -> None:
    unit = torch.full((2048, 1), 0.5)
    radii = [
        augment(torch.cat([tower(), unit], dim=1), torch.Generator().manual_seed(seed), 512, 0.5)[:, 6]
        for seed in range(60)
    ]
    assert all(bool((radius == radius[0]).all()) for radius in radii)
    known = [float(radius[0]) for radius in radii if radius[0] > 0]
    assert 18 <= len(known) <= 42
    # The tower of 1 x 4 x 1 units of half a metre has a radius of 1.06 m; cuts and stretches change it somewhat.
    assert all(0.7 < radius < 1.5 for radius in known)
    assert max(known) > min(known) + 0.1


def still_true(changes: Changes) -> dict[str, float]:
    """Of the facts told about 60 objects, the shares that their changed clouds still show."""
    things = load_household("train")[::12]
    same = {"shape": 0, "colors": 0}
    for number, thing in enumerate(things):
        generator = torch.Generator().manual_seed(number)
        cloud = augment(torch.from_numpy(thing.points), generator, 2048, 0.5, changes)
        changed = describe(replace(thing, points=cloud.numpy()))
        for fact in same:
            same[fact] += getattr(changed, fact) == getattr(describe(thing), fact)
    return {fact: count / len(things) for fact, count in same.items()}


def test_what_is_said_of_a_cloud_stays_true_where_answers_are_learnt() -> None:
    kept, lost = still_true(SAME_LOOK), still_true(ANY_LOOK)
    assert kept["shape"] > 0.85
    assert kept["colors"] > 0.75
    assert lost["colors"] < 0.4
    assert lost["shape"] < kept["shape"] - 0.1


def test_a_conversation_shows_another_cloud_at_every_draw(build_tokenizer: Callable[..., Any]) -> None:
    told = {"from": "gpt", "value": "A tower."}
    entries = [
        {
            "object_id": name,
            "conversation_type": "simple_description",
            "conversations": [{"from": "human", "value": "<point>\nWhat is this?"}, told],
        }
        for name in ("a", "b")
    ]
    given: dict[str, Any] = {
        "conversations": read_conversations(entries),
        "processor": PointAlignProcessor(build_tokenizer(), num_points=48, num_point_tokens=5, min_points=8),
        "points": {"a": {"point_clouds": tower()}, "b": {"point_clouds": tower()}},
        "max_length": 1500,
    }
    plain = ConversationDataset(**given)

    def drawn(number: int, step: int, seed: int = 1) -> torch.Tensor:
        sample = AugmentedConversations(0.5, seed, **given)[number, step]
        assert {name: sample[name] for name in ("input_ids", "labels")} == {
            name: plain[number][name] for name in ("input_ids", "labels")
        }
        (cloud,) = sample["points"]
        assert cloud["point_clouds"].shape == (48, 6)
        return cloud["point_clouds"]

    first = drawn(0, 0)
    assert torch.equal(first, drawn(0, 0))
    for other in (drawn(1, 0), drawn(0, 1), drawn(0, 0, seed=2)):
        assert not torch.equal(first, other)
    assert torch.equal(given["points"]["a"]["point_clouds"], tower()), "what is kept stays as it is"
