"""Instructions in the field's format, training samples, the mixture of sets, and batches."""

import json
from collections import Counter
from itertools import islice, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pointalign.config import DataSet
from pointalign.data.conversations import (
    Collator,
    ConversationDataset,
    MixtureBatchSampler,
    keep_fraction,
    parse_conversation,
    read_conversations,
)
from pointalign.errors import ConfigError, DataError

MULTI = {
    "object_id": "abc",
    "conversation_type": "multi_round",
    "conversations": [
        {"from": "human", "value": "<point>\nWhat is it?"},
        {"from": "gpt", "value": "A mug."},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "Red."},
    ],
}
BRIEF = {
    "object_id": "xyz",
    "conversations": [{"from": "human", "value": "<point>\nCaption it."}, {"from": "gpt", "value": "A chair."}],
}


def test_the_published_format(tmp_path):
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps([MULTI, BRIEF]), encoding="utf-8")
    multi, brief = read_conversations(path)
    assert (multi.object_id, multi.kind) == ("abc", "multi_round")
    assert multi.messages == (
        {"role": "user", "content": [{"type": "point_cloud"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "A mug."},
        {"role": "user", "content": "Which colour?"},
        {"role": "assistant", "content": "Red."},
    )
    assert brief.kind == "simple_description"
    assert read_conversations([MULTI, BRIEF]) == [multi, brief]


@pytest.mark.parametrize(
    ("value", "content"),
    [
        ("<point>", [{"type": "point_cloud"}]),
        (
            "Look: <point>\nwhat?",
            [{"type": "text", "text": "Look: "}, {"type": "point_cloud"}, {"type": "text", "text": "what?"}],
        ),
        ("<point>\n\nx", [{"type": "point_cloud"}, {"type": "text", "text": "\nx"}]),
        ("<point><point>\nx", [{"type": "point_cloud"}, {"type": "point_cloud"}, {"type": "text", "text": "x"}]),
        ("no cloud", "no cloud"),
    ],
)
def test_where_the_cloud_stands(value, content):
    item = {"object_id": 1, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "y"}]}
    parsed = parse_conversation(item, "entry 0")
    assert parsed.object_id == "1"
    assert parsed.messages[0]["content"] == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda i: i.pop("object_id"), "object_id"),
        (lambda i: i.pop("conversations"), "conversations"),
        (lambda i: i.update(conversations=None), "PointLLM's format"),
        (lambda i: i.update(conversations=["x"]), "PointLLM's format"),
        (lambda i: i["conversations"][0].pop("from"), "PointLLM's format"),
        (lambda i: i["conversations"][0].update({"from": "system"}), "system"),
        (lambda i: i["conversations"][1].update(value=None), "PointLLM's format"),
        (lambda i: i["conversations"][1].update(value=3), "PointLLM's format"),
        (lambda i: i.update(conversation_type="poem"), "'poem'; known are simple_description"),
        (lambda i: i.update(conversations=i["conversations"][:1]), "has no answer"),
        (lambda i: i.update(conversations=[]), "has no answer"),
    ],
)
def test_entries_in_another_format_are_named(change, message):
    item = json.loads(json.dumps(MULTI))
    change(item)
    with pytest.raises(DataError, match=message) as error:
        read_conversations([BRIEF, item])
    assert str(error.value).startswith("entry 1 ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["[{", "", "\ufeff[", "3", '"abc"', "null", "{}", '{"a": 1}', "[3]", "[null]"])
def test_files_that_hold_no_list_of_entries(tmp_path, text):
    path = tmp_path / "broken.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"broken\.json") as error:
        read_conversations(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nothing\.json"):
        read_conversations(tmp_path / "nothing.json")
    (tmp_path / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(DataError, match=r"latin\.json"):
        read_conversations(tmp_path / "latin.json")


def test_smaller_fractions_lie_inside_larger_ones():
    ids = [f"object-{i}" for i in range(200)]
    kept = [keep_fraction(ids, fraction) for fraction in (0.001, 0.1, 0.5, 1.0)]
    assert [len(k) for k in kept] == [1, 20, 100, 200]
    assert all(a < b for a, b in pairwise(kept))
    assert keep_fraction(reversed(ids * 2), 0.1) == kept[1]
    assert kept[1] != set(ids[:20])
    for fraction in (0, -0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=r"data\.fraction"):
            keep_fraction(ids, fraction)


# Samples and batches


class CountingPoints(dict):
    """Clouds that know how often each was read."""

    def __getitem__(self, key):
        self.reads = [*getattr(self, "reads", []), key]
        return {"point_clouds": super().__getitem__(key)}


@pytest.fixture
def dataset(processor, clouds):
    two = {
        "object_id": "two",
        "conversation_type": "single_round",
        "conversations": [{"from": "human", "value": "<point> or <point>?"}, {"from": "gpt", "value": "Same."}],
    }
    text = {"object_id": "abc", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    points = CountingPoints(abc=clouds[0], xyz=clouds[1], two=clouds[2])
    return ConversationDataset(read_conversations([MULTI, BRIEF, two, text]), processor, points, 150)


def test_a_sample_holds_ids_labels_and_a_cloud_for_each_mark(dataset, processor):
    assert len(dataset) == 4
    for index, count in enumerate((1, 1, 2, 0)):
        sample = dataset[index]
        encoded = processor.encode(dataset.conversations[index].messages)
        assert sample["input_ids"] == encoded["input_ids"]
        assert sample["labels"] == encoded["labels"]
        assert len(sample["points"]) == count
        assert sample["input_ids"].count(259) == 5 * count


def test_a_sample_that_is_too_long_is_named(dataset):
    dataset.max_length = 20
    with pytest.raises(
        DataError, match=r"^the conversation about abc has \d+ tokens, more than data.max_length 20; [^\n]+$"
    ):
        dataset[0]


def test_the_collator_pads_right_and_keeps_the_order_of_clouds(dataset, processor, clouds):
    samples = [dataset[i] for i in (2, 3, 0)]
    batch = Collator(processor)(samples)
    width = max(len(s["input_ids"]) for s in samples)
    for row, sample in enumerate(samples):
        length = len(sample["input_ids"])
        assert batch["input_ids"][row, :length].tolist() == sample["input_ids"]
        assert batch["labels"][row].tolist() == sample["labels"] + [-100] * (width - length)
        assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (width - length)
    assert torch.equal(batch["point_clouds"], torch.stack([clouds[2], clouds[2], clouds[0]]))
    assert batch["alignment_mask"].dtype == torch.bool
    assert torch.equal(batch["alignment_mask"], batch["input_ids"] == 259)
    assert batch["alignment_mask"].sum(dim=1).tolist() == [10, 0, 5]
    wanted = {i - 1 for s in samples for i, label in enumerate(s["labels"]) if label != -100}
    assert batch["logits_to_keep"].tolist() == sorted(wanted)


def test_the_collated_batch_scores_as_the_whole_sequence_does(dataset, processor, model):
    batch = Collator(processor)([dataset[i] for i in range(4)])
    del batch["alignment_mask"]
    loss = model(**batch).loss
    del batch["logits_to_keep"]
    assert model(**batch).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def test_a_batch_without_clouds(dataset, processor):
    batch = Collator(processor)([dataset[3]])
    assert set(batch) == {"input_ids", "attention_mask", "labels", "logits_to_keep", "alignment_mask"}


# The mixture

SETS = [
    DataSet(types=["detailed_description"], odds=2, batch_size=6),
    DataSet(types=["single_round"], odds=3, batch_size=10),
    DataSet(types=["multi_round"], odds=3, batch_size=4),
]
INDICES = [range(50), range(50, 90), range(90, 201)]


def test_sets_are_drawn_by_odds_with_their_batch_sizes():
    batches = list(MixtureBatchSampler(INDICES, SETS, 8000, seed=42))
    drawn = Counter()
    for batch in batches:
        number = next(n for n, members in enumerate(INDICES) if batch[0] in members)
        assert set(batch) <= set(INDICES[number])
        assert len(batch) == SETS[number].batch_size
        drawn[number] += 1
    for number, share in enumerate((2 / 8, 3 / 8, 3 / 8)):
        assert abs(drawn[number] / 8000 - share) < 4 * (share * (1 - share) / 8000) ** 0.5


@given(st.integers(0, 1000), st.lists(st.tuples(st.integers(1, 30), st.integers(1, 7)), min_size=1, max_size=3))
def test_every_conversation_comes_once_before_any_comes_twice(seed, sizes):
    start, indices, sets = 0, [], []
    for count, batch_size in sizes:
        indices.append(list(range(start, start + count)))
        sets.append(DataSet(odds=1, batch_size=batch_size))
        start += count
    seen = [[] for _ in sizes]
    for batch in MixtureBatchSampler(indices, sets, 60, seed):
        number = next(n for n, members in enumerate(indices) if batch[0] in members)
        seen[number] += batch
    for members, order in zip(indices, seen, strict=True):
        for first in range(0, len(order), len(members)):
            one_pass = order[first : first + len(members)]
            assert len(set(one_pass)) == len(one_pass)


def test_passes_and_seeds_have_different_orders():
    sets = [DataSet(batch_size=20)]
    first, second = list(MixtureBatchSampler([range(20)], sets, 2, seed=1))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert first != list(range(20))
    assert next(iter(MixtureBatchSampler([range(20)], sets, 2, seed=2))) != first


@pytest.mark.parametrize("world", [2, 3, 4])
def test_processes_share_the_batches_of_one(world):
    alone = list(MixtureBatchSampler(INDICES, SETS, 40, seed=42))
    ranks = [list(MixtureBatchSampler(INDICES, SETS, 40, 42, rank, world)) for rank in range(world)]
    for number, batch in enumerate(alone):
        parts = [rank[number] for rank in ranks]
        assert all(parts)
        assert sorted(index for part in parts for index in part) == sorted(batch)


def test_skipping_gives_the_batches_of_a_run_that_was_never_stopped():
    sampler = MixtureBatchSampler(INDICES, SETS, 50, seed=42)
    whole = list(sampler)
    assert len(sampler) == len(whole) == 50
    assert list(islice(iter(sampler), 23, None)) == whole[23:]
    from accelerate.data_loader import SkipBatchSampler

    assert list(SkipBatchSampler(sampler, skip_batches=23)) == whole[23:]


def test_sets_that_cannot_be_drawn():
    with pytest.raises(ConfigError, match="no conversation of types single_round"):
        MixtureBatchSampler([[1], [], [2]], SETS, 1, 0)
    with pytest.raises(ConfigError, match="a batch of 4 cannot be split over 5 processes"):
        MixtureBatchSampler(INDICES, SETS, 1, 0, 0, 5)


@pytest.mark.parametrize("odds", [[0.0, 0.0], [-1.0, 2.0], [float("nan"), 1.0]])
def test_odds_that_mean_nothing_are_refused(odds):
    sets = [DataSet(odds=o, batch_size=1) for o in odds]
    with pytest.raises(ConfigError, match="odds"):
        next(iter(MixtureBatchSampler([[1], [2]], sets, 3, 0)))


def test_a_batch_size_of_zero_is_refused():
    with pytest.raises(ConfigError, match="batch"):
        next(iter(MixtureBatchSampler([[1]], [DataSet(batch_size=0)], 3, 0)))
