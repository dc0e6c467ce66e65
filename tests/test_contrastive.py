"""The encoder's stage: which objects are drawn how often, what their captions have in common, how clouds are augmented."""

from __future__ import annotations

import torch

from pointalign.contrastive import CloudTextDataset, balanced_members, captions_by_object, mean_embeddings
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


def test_a_sample_is_a_function_of_seed_object_and_step() -> None:
    cloud = torch.rand(2048, 6, generator=torch.Generator().manual_seed(0))

    def dataset(seed: int) -> CloudTextDataset:
        return CloudTextDataset(lambda number: cloud * (number + 1), {"text_embeddings": torch.eye(3)}, 64, 0.5, seed)

    first, again = dataset(1)[2, 5], dataset(1)[2, 5]
    assert len(dataset(1)) == 3
    assert torch.equal(first["point_clouds"], again["point_clouds"])
    assert torch.equal(first["text_embeddings"], torch.tensor([0.0, 0.0, 1.0]))
    for other in (dataset(2)[2, 5], dataset(1)[1, 5], dataset(1)[2, 6]):
        assert not torch.equal(first["point_clouds"], other["point_clouds"])
