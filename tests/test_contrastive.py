"""The encoder's stage: which objects are drawn how often, what their captions have in common, how clouds are augmented."""

from __future__ import annotations

import torch

from pointalign.contrastive import CloudTextDataset, augment, balanced_members, captions_by_object, mean_embeddings
from pointalign.data.conversations import read_conversations
from pointalign.sentence_embedding import embed_sentences


def test_objects_that_share_their_words_are_drawn_less_often() -> None:
    words = torch.tensor([[0.5, 0.5, 0.0]] * 4 + [[0.0, 0.0, 1.0]])
    assert sorted(balanced_members(words, 0)) == [0, 1, 2, 3, 4]
    assert sorted(balanced_members(words, 0.5)) == [0, 1, 2, 3, 4, 4], "one over the square root of four"
    assert sorted(balanced_members(words, 1)) == [0, 1, 2, 3, 4, 4, 4, 4]


def test_the_weights_of_words_do_not_part_the_same_words() -> None:
    assert len(balanced_members(torch.tensor([[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]]), 1)) == 4


def test_what_captions_have_in_common() -> None:
    first, second, third = torch.from_numpy(embed_sentences(["a red chair", "a wolf", "a grey wolf"]))
    means = mean_embeddings([["a red chair"], ["a wolf", "a grey wolf"]])
    torch.testing.assert_close(means[0], first, atol=1e-5, rtol=0)
    torch.testing.assert_close(means[1], (second + third) / (second + third).norm(), atol=1e-5, rtol=0)


def test_all_first_answers_about_an_object_the_shortest_first() -> None:
    entries = [
        {
            "object_id": name,
            "conversation_type": "simple_description",
            "conversations": [{"from": "human", "value": "<point>\nWhat?"}, {"from": "gpt", "value": answer}],
        }
        for name, answer in (("a", "a long answer"), ("b", "a lamp"), ("a", "short"))
    ]
    assert captions_by_object(read_conversations(entries)) == {"a": ["short", "a long answer"], "b": ["a lamp"]}


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


def test_a_sample_is_a_function_of_seed_object_and_step() -> None:
    def dataset(seed: int) -> CloudTextDataset:
        return CloudTextDataset(lambda number: tower() * (number + 1), {"text_embeddings": torch.eye(3)}, 64, 0.5, seed)

    first, again = dataset(1)[2, 5], dataset(1)[2, 5]
    assert len(dataset(1)) == 3
    assert torch.equal(first["point_clouds"], again["point_clouds"])
    assert torch.equal(first["text_embeddings"], torch.tensor([0.0, 0.0, 1.0]))
    for other in (dataset(2)[2, 5], dataset(1)[1, 5], dataset(1)[2, 6]):
        assert not torch.equal(first["point_clouds"], other["point_clouds"])
