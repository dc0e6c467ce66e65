"""Conversations about clouds: PointLLM's instruction format, training samples, collation."""

from __future__ import annotations

import hashlib
import json
import zlib
from array import array
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pointalign.data.json_list import MEBIBYTE, json_entries
from pointalign.errors import ConfigError, DataError
from pointalign.progress import progress

# PointLLM's four, and an object's caption in the words that references are given in.
CONVERSATION_TYPES = ("simple_description", "detailed_description", "single_round", "multi_round", "caption")
POINT_MARK = "<point>"
ROLES = {"human": "user", "gpt": "assistant"}
# Reading a file that takes longer shows its progress.
QUICK_SECONDS = 2.0
# Token ids of so many conversations are kept; those of 660K would fill the memory, and come once an epoch anyway.
KEPT_ENCODED = 10_000


class PointCloudSource(Protocol):
    """Where clouds come from: a mapping from object ids to clouds, with a fingerprint of its content."""

    @property
    def fingerprint(self) -> str:
        """Changes when a cloud changes."""
        ...

    def __contains__(self, object_id: object) -> bool: ...

    def __getitem__(self, object_id: str) -> Any:
        """One object's cloud, as `PointAlignProcessor.clean_points` takes it."""
        ...


@dataclass(frozen=True)
class Conversation:
    """One conversation about one object.

    Args:
        object_id: names the cloud.
        kind: one of `CONVERSATION_TYPES`.
        messages: chat messages as `PointAlignProcessor.render` takes them.
    """

    object_id: str
    kind: str
    messages: tuple[Mapping[str, Any], ...]


def count_clouds(messages: Iterable[Mapping[str, Any]]) -> int:
    """How many clouds messages show."""
    contents = (message["content"] for message in messages)
    return sum(part["type"] == "point_cloud" for parts in contents if not isinstance(parts, str) for part in parts)


def parse_conversation(item: Mapping[str, Any], where: str) -> Conversation:
    """One entry of a PointLLM instruction file.

    `<point>` and the newline after it become a point_cloud part; a missing `conversation_type` means
    simple_description, as in the published files.

    Raises:
        DataError: when a field is missing or of the wrong kind.
    """
    try:
        if not isinstance(item["object_id"], str | int):
            raise TypeError(f"object_id is no name but {item['object_id']!r}")
        object_id, turns = str(item["object_id"]), item["conversations"]
        kind = item.get("conversation_type", "simple_description")
        messages = tuple(_message(turn["from"], turn["value"]) for turn in turns)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where} is not in PointLLM's format ({type(error).__name__}: {error}); it needs object_id and "
            "conversations with from and value"
        ) from error
    if kind not in CONVERSATION_TYPES:
        raise DataError(f"{where} has conversation_type {kind!r}; known are {', '.join(CONVERSATION_TYPES)}")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{where} has no answer (from: gpt), so there is nothing to learn")
    return Conversation(object_id, kind, messages)


def _message(speaker: str, value: str) -> dict[str, Any]:
    if speaker not in ROLES:
        raise KeyError(f"from: {speaker!r}")
    if not isinstance(value, str):
        raise TypeError(f"value is no text but {type(value).__name__}")
    if POINT_MARK not in value:
        return {"role": ROLES[speaker], "content": value}
    parts: list[dict[str, str]] = []
    for index, text in enumerate(value.split(POINT_MARK)):
        if index:
            parts.append({"type": "point_cloud"})
            text = text.removeprefix("\n")
        if text:
            parts.append({"type": "text", "text": text})
    return {"role": ROLES[speaker], "content": parts}


class _EntryFile(Sequence[Conversation]):
    """Conversations of an instruction file, each read from its place when it is asked for, and held against its checksum."""

    def __init__(self, path: Path, places: np.ndarray, lengths: np.ndarray, checksums: np.ndarray) -> None:
        self.path, self.places, self.lengths, self.checksums = path, places, lengths, checksums

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        try:
            with self.path.open("rb") as file:
                file.seek(int(self.places[index]))
                content = file.read(int(self.lengths[index]))
        except OSError as error:
            raise DataError(f"cannot read {self.path} again: {error.strerror}; leave it while it is in use") from error
        if zlib.crc32(content) != self.checksums[index]:
            raise DataError(
                f"entry {index} of {self.path} changed after it was opened; leave it as it is while it is in use"
            )
        return parse_conversation(json.loads(content), f"{self.path}, entry {index}")


class Conversations(Sequence[Conversation]):
    """Conversations by number, parsed when they are asked for; what they are about and of what type stands in columns.

    Args:
        stores: where the conversations lie.
        names: distinct object ids; some may be named by no conversation.
        columns: one row per conversation: `store` and `row` say where it lies, `name` and `kind` are indices into `names`
            and `CONVERSATION_TYPES`.
    """

    COLUMNS = np.dtype([("store", np.uint16), ("row", np.int32), ("name", np.int32), ("kind", np.uint8)])

    def __init__(self, stores: Sequence[Sequence[Conversation]], names: Sequence[str], columns: np.ndarray) -> None:
        self.stores, self.names, self.columns = stores, names, columns

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, index: Any) -> Any:
        """One conversation, or the `Conversations` of a slice.

        Raises:
            DataError: when its file has changed since it was opened.
        """
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        store, row, *_ = self.columns[index].item()
        return self.stores[store][row]

    @property
    def object_ids(self) -> list[str]:
        """The objects that they are about, sorted."""
        return sorted(self.names[int(number)] for number in np.unique(self.columns["name"]))

    def of_types(self, types: Iterable[str]) -> np.ndarray:
        """Numbers of the conversations of these types, ascending."""
        wanted = [CONVERSATION_TYPES.index(kind) for kind in types if kind in CONVERSATION_TYPES]
        return np.flatnonzero(np.isin(self.columns["kind"], wanted))

    def about(self, object_ids: Container[str]) -> np.ndarray:
        """Numbers of the conversations about these objects, ascending."""
        known = np.fromiter((name in object_ids for name in self.names), dtype=bool, count=len(self.names))
        return np.flatnonzero(known[self.columns["name"]])

    def select(self, numbers: np.ndarray) -> Conversations:
        """Those with these numbers, in this order."""
        return Conversations(self.stores, self.names, self.columns[numbers])


def join_conversations(parts: Sequence[Conversations]) -> Conversations:
    """Several sources one after the other."""
    numbers: dict[str, int] = {}
    stores: list[Sequence[Conversation]] = []
    columns = [np.empty(0, Conversations.COLUMNS)]
    for part in parts:
        renumbered = np.array([numbers.setdefault(name, len(numbers)) for name in part.names], dtype=np.int32)
        moved = part.columns.copy()
        moved["name"] = renumbered[moved["name"]]
        moved["store"] += len(stores)
        stores += part.stores
        columns.append(moved)
    return Conversations(stores, list(numbers), np.concatenate(columns))


def read_conversations(source: str | Path | Iterable[Mapping[str, Any]]) -> Conversations:
    """Open a PointLLM instruction file, or take its entries.

    Every entry of a file is checked once and then left on disk; memory grows by some 100 bytes an entry.

    Raises:
        DataError: when the file is missing, is not JSON, or an entry is not in the format.
    """
    if isinstance(source, (str, Path)):
        return _open_file(Path(source))
    conversations = [parse_conversation(item, f"entry {index}") for index, item in enumerate(source)]
    return list_conversations(conversations)


def list_conversations(conversations: Sequence[Conversation]) -> Conversations:
    """Conversations that are in memory already."""
    numbers: dict[str, int] = {}
    columns = np.empty(len(conversations), Conversations.COLUMNS)
    for row, conversation in enumerate(conversations):
        number = numbers.setdefault(conversation.object_id, len(numbers))
        columns[row] = (0, row, number, CONVERSATION_TYPES.index(conversation.kind))
    return Conversations([conversations], list(numbers), columns)


def _open_file(path: Path) -> Conversations:
    numbers: dict[str, int] = {}
    names, kinds, places, lengths, checksums = array("i"), array("B"), array("q"), array("i"), array("I")
    try:
        mebibytes = path.stat().st_size // MEBIBYTE
        with progress(f"reading {path.name} (MiB)", mebibytes, patience=QUICK_SECONDS) as advance:
            for index, (item, place, content) in enumerate(json_entries(path, advance)):
                conversation = parse_conversation(item, f"{path}, entry {index}")
                names.append(numbers.setdefault(conversation.object_id, len(numbers)))
                kinds.append(CONVERSATION_TYPES.index(conversation.kind))
                places.append(place)
                lengths.append(len(content))
                checksums.append(zlib.crc32(content))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give an instruction file") from error
    columns = np.zeros(len(names), Conversations.COLUMNS)
    columns["row"], columns["name"], columns["kind"] = np.arange(len(names)), names, kinds
    entries = _EntryFile(path, np.array(places), np.array(lengths), np.array(checksums, dtype=np.uint32))
    return Conversations([entries], list(numbers), columns)


def keep_fraction(object_ids: Iterable[str], fraction: float) -> set[str]:
    """The share of objects whose hashed ids come first, so that a smaller share lies inside a larger one.

    Raises:
        ConfigError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction is a share in (0, 1]; got {fraction:g}")
    distinct = set(object_ids)
    if fraction == 1:
        return distinct
    ordered = sorted(distinct, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ordered[: max(1, round(len(ordered) * fraction))])


class ConversationDataset(Dataset):
    """Training samples: token ids, labels, and the object's cloud or what the frozen half computed of it.

    Args:
        conversations: what to train on.
        processor: turns messages into ids.
        points: from object id to a dict of tensors that the collator stacks (a cloud, or cached features).
        max_length: longest sample in tokens.
        rewrite: changes the messages of each conversation before they become ids.
        cloud_name: from an object id and the conversation's number to what `points` calls the cloud.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        points: Any,
        max_length: int,
        rewrite: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]] = lambda messages: messages,
        cloud_name: Callable[[str, int], str] = lambda object_id, number: object_id,
    ) -> None:
        self.conversations = (
            conversations if isinstance(conversations, Conversations) else list_conversations(conversations)
        )
        self.processor, self.points, self.max_length, self.rewrite = processor, points, max_length, rewrite
        self.cloud_name = cloud_name
        self._encoded: dict[int, dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists), and `points`: one dict of tensors per cloud in the prompt.

        Raises:
            DataError: when the conversation is longer than `max_length`.
        """
        conversation = self.conversations[index]
        encoded = self._encoded.get(index)
        if encoded is None:
            encoded = self.processor.encode(self.rewrite(conversation.messages))
            if len(encoded["input_ids"]) > self.max_length:
                raise DataError(
                    f"the conversation about {conversation.object_id} has {len(encoded['input_ids'])} tokens, more than "
                    f"data.max_length {self.max_length}; raise it or leave the conversation out"
                )
            if len(self._encoded) < KEPT_ENCODED:
                self._encoded[index] = encoded
        clouds = count_clouds(conversation.messages)
        return {**encoded, "points": [self.points[self.cloud_name(conversation.object_id, index)]] * clouds}


class Collator:
    """Joins samples into a batch: ids, labels, the positions that carry a label, and the points' tensors.

    Args:
        processor: pads and knows the point token.
        alignment_positions: from a padded batch's labels (B, L) to the positions that are aligned, in rows that hold a cloud;
            the point tokens when not given.
        packing: from the conversations' lengths to the arguments that tell a packed model where each begins; they are then
            laid end to end in one row, and without it each is a row of its own, padded on the right.
    """

    def __init__(
        self,
        processor: Any,
        alignment_positions: Callable[[Tensor], Tensor] | None = None,
        packing: Callable[[Sequence[int]], dict[str, Any]] | None = None,
    ) -> None:
        self.processor, self.alignment_positions, self.packing = processor, alignment_positions, packing

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Samples of `ConversationDataset` as one batch.

        Returns:
            `input_ids`, `labels` (B, L); `logits_to_keep`, the positions whose next token is a label in some row;
            `alignment_mask` (B, L), true where hidden states are aligned; each of the points' tensors, stacked; and
            `attention_mask` (B, L), or for packed conversations, where B is 1, what `packing` gives.

        Raises:
            DataError: when a conversation shows several clouds, and other positions than the point tokens are aligned.
        """
        if self.alignment_positions is not None and any(len(sample["points"]) > 1 for sample in samples):
            raise DataError(
                "a conversation here shows several clouds, and the released code's positions of the alignment loss know one; "
                "leave as_released out, or such conversations"
            )
        ids, labels = [sample["input_ids"] for sample in samples], [sample["labels"] for sample in samples]
        batch = self._padded(ids, labels) if self.packing is None else self._packed(ids, labels, self.packing)
        batch["logits_to_keep"] = (batch["labels"][:, 1:] != -100).any(dim=0).nonzero().flatten()
        positions = self.alignment_positions
        placeholders = batch["input_ids"] == self.processor.point_token_id
        with_cloud = placeholders.any(dim=1, keepdim=True)
        batch["alignment_mask"] = positions(batch["labels"]) & with_cloud if positions else placeholders
        clouds = [cloud for sample in samples for cloud in sample["points"]]
        if clouds:
            batch.update({name: torch.stack([cloud[name] for cloud in clouds]) for name in clouds[0]})
        return batch

    def _padded(self, ids: list[list[int]], labels: list[list[int]]) -> dict[str, Any]:
        return {
            "input_ids": self.processor.pad(ids, side="right"),
            "attention_mask": self.processor.pad([[1] * len(row) for row in ids], side="right", value=0),
            "labels": self.processor.pad(labels, side="right", value=-100),
        }

    def _packed(
        self, ids: list[list[int]], labels: list[list[int]], packing: Callable[[Sequence[int]], dict[str, Any]]
    ) -> dict[str, Any]:
        # A conversation's first token is no label: nothing of its own comes before it.
        own = [[-100, *row[1:]] for row in labels]
        return {
            "input_ids": torch.tensor([list(chain.from_iterable(ids))]),
            "labels": torch.tensor([list(chain.from_iterable(own))]),
            **packing([len(row) for row in ids]),
        }
