"""Instructions in the field's format, training samples, and batches."""

import json
import pickle
import time
import tracemalloc
from itertools import pairwise

import pytest
import torch

from pointalign.data import conversations
from pointalign.data.conversations import (
    CONVERSATION_TYPES,
    Collator,
    ConversationDataset,
    join_conversations,
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
    assert list(read_conversations([MULTI, BRIEF])) == [multi, brief]


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


# Files that stay on disk


def make_entry(index, words=20):
    """An entry of the published shape; every tenth object has two."""
    kind = CONVERSATION_TYPES[index % 4]
    return {
        "object_id": f"{index * 10 // 11:032x}",
        **({} if kind == "simple_description" else {"conversation_type": kind}),
        "conversations": [
            {"from": "human", "value": "<point>\nWhat is it?"},
            {"from": "gpt", "value": f"Café {index} " + "word " * words},
        ],
    }


@pytest.fixture
def two_files(tmp_path):
    """Two instruction files that share objects, and their entries one after the other."""
    entries = [make_entry(index) for index in range(40)]
    for name, part in (("a.json", entries[:25]), ("b.json", entries[20:])):
        (tmp_path / name).write_text(json.dumps(part, ensure_ascii=name == "a.json", indent=1), encoding="utf-8")
    joined = join_conversations([read_conversations(tmp_path / name) for name in ("a.json", "b.json")])
    wanted = [parse_conversation(entry, "entry") for entry in (*entries[:25], *entries[20:])]
    return joined, wanted


def test_conversations_of_files_are_those_of_their_entries(two_files):
    joined, wanted = two_files
    assert len(joined) == 45
    assert list(joined) == wanted
    assert [joined[index] for index in (44, 0, -1, 24, 25)] == [wanted[index] for index in (44, 0, -1, 24, 25)]
    assert list(joined[20:30:3]) == wanted[20:30:3]
    assert joined.object_ids == sorted({conversation.object_id for conversation in wanted})
    assert wanted[3] in joined
    with pytest.raises(IndexError):
        joined[45]
    assert list(pickle.loads(pickle.dumps(joined))) == wanted


def test_conversations_are_chosen_by_columns(two_files):
    joined, wanted = two_files
    for types in ([], ["single_round"], ["multi_round", "simple_description"], ["poem"]):
        expected = [index for index, conversation in enumerate(wanted) if conversation.kind in types]
        assert joined.of_types(types).tolist() == expected
        chosen = joined.select(joined.of_types(types))
        assert list(chosen) == [wanted[index] for index in expected]
        assert chosen.object_ids == sorted({wanted[index].object_id for index in expected})
    some = {wanted[3].object_id, wanted[30].object_id, "nobody"}
    expected = [index for index, conversation in enumerate(wanted) if conversation.object_id in some]
    assert joined.about(some).tolist() == expected
    again = joined.select(joined.about(some))
    assert list(again.select(again.of_types(["single_round"]))) == [
        wanted[index] for index in expected if wanted[index].kind == "single_round"
    ]
    assert list(join_conversations([])) == []


def test_every_entry_is_checked_when_a_file_is_opened(tmp_path):
    path = tmp_path / "instructions.json"
    entries = [make_entry(index) for index in range(30)]
    entries[28]["conversations"][1]["from"] = "robot"
    path.write_text(json.dumps(entries))
    with pytest.raises(DataError, match=r"instructions\.json, entry 28 is not in PointLLM's format .*robot"):
        read_conversations(path)


@pytest.mark.parametrize("change", ["shorter", "other", "one letter", "gone"])
def test_a_file_that_changes_while_it_is_in_use_is_never_read_wrong(tmp_path, change):
    path = tmp_path / "instructions.json"
    path.write_text(json.dumps([make_entry(index) for index in range(10)]))
    opened = read_conversations(path)
    if change == "gone":
        path.unlink()
    elif change == "one letter":
        path.write_text(path.read_text().replace("Caf\\u00e9 9", "Cafe_u00e9 9"))
    else:
        entries = [make_entry(index + (0 if change == "shorter" else 1)) for index in range(10)]
        path.write_text(json.dumps(entries[: 2 if change == "shorter" else 10]))
    with pytest.raises(DataError, match=r"leave it .*while it is in use") as error:
        opened[9]
    assert "\n" not in str(error.value)


def test_memory_and_time_grow_with_the_entries_and_not_with_their_words(tmp_path):
    seconds, paths = [], [tmp_path / "5000.json", tmp_path / "20000.json"]
    for path in paths:
        path.write_text(json.dumps([make_entry(index, words=120) for index in range(int(path.stem))]))
        start = time.process_time()
        read_conversations(path)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * seconds[0]
    tracemalloc.start()
    opened = read_conversations(paths[1])
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(opened) == 20_000
    assert kept < 150 * 20_000
    assert peak < 8 * 2**20 < paths[1].stat().st_size / 1.8


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


def test_token_ids_are_kept_of_the_first_conversations_only(dataset, processor, monkeypatch):
    monkeypatch.setattr(conversations, "KEPT_ENCODED", 2)
    encoded = []
    encode = processor.encode
    monkeypatch.setattr(processor, "encode", lambda messages: encoded.append(messages) or encode(messages))
    first, second = ([dataset[index]["input_ids"] for index in range(4)] for _ in range(2))
    assert first == second
    assert len(encoded) == 4 + 2


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


@pytest.mark.parametrize(
    ("object_id", "value", "told"),
    [("a", ["<point>\nhi"], "value is no text but list"), (None, "hi", "object_id is no name")],
)
def test_an_entry_of_wrong_kinds(object_id, value, told):
    turns = [{"from": "human", "value": value}, {"from": "gpt", "value": "y"}]
    with pytest.raises(DataError, match=told):
        parse_conversation({"object_id": object_id, "conversations": turns}, "file, entry 0")


def test_released_positions_know_one_cloud_a_conversation(dataset, processor):
    sample = dataset[0]
    several = {**sample, "points": sample["points"] * 2}
    with pytest.raises(
        DataError, match="shows several clouds, and the released code's positions of the alignment loss know one"
    ):
        Collator(processor, alignment_positions=lambda labels: labels != -100)([several])
