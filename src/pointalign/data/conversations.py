"""Conversations about clouds: PointLLM's instruction format, training samples, mixing by odds, collation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pointalign.config import DataSet
from pointalign.errors import ConfigError, DataError

CONVERSATION_TYPES = ("simple_description", "detailed_description", "single_round", "multi_round")
POINT_MARK = "<point>"
ROLES = {"human": "user", "gpt": "assistant"}


class PointCloudSource(Protocol):
    """Where clouds come from: a mapping from object ids to arrays, with a fingerprint of its content."""

    @property
    def fingerprint(self) -> str:
        """Changes when a cloud changes."""
        ...

    def __contains__(self, object_id: object) -> bool: ...

    def __getitem__(self, object_id: str) -> Any:
        """(N, 3) or (N, 6) points of one object."""
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


def parse_conversation(item: Mapping[str, Any], where: str) -> Conversation:
    """One entry of a PointLLM instruction file.

    `<point>` and the newline after it become a point_cloud part; a missing `conversation_type` means
    simple_description, as in the published files.

    Raises:
        DataError: when a field is missing or of the wrong kind.
    """
    try:
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


def read_conversations(source: str | Path | Iterable[Mapping[str, Any]]) -> list[Conversation]:
    """Read a PointLLM instruction file, or its entries.

    Raises:
        DataError: when the file is missing, is not JSON, or an entry is not in the format.
    """
    items: Any = source
    name = "entry"
    if isinstance(source, (str, Path)):
        name = f"{source}, entry"
        try:
            items = json.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"cannot read {source}: {error.strerror}; give an instruction file") from error
        except ValueError as error:
            raise DataError(f"{source} is not JSON ({error}); copy it again") from error
        if not isinstance(items, list):
            raise DataError(f"{source} holds a {type(items).__name__}, not a list of conversations; give another file")
    return [parse_conversation(item, f"{name} {index}") for index, item in enumerate(items)]


def keep_fraction(object_ids: Iterable[str], fraction: float) -> set[str]:
    """The share of objects whose hashed ids come first, so that a smaller share lies inside a larger one.

    Raises:
        ConfigError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ConfigError(f"data.fraction is a share in (0, 1]; got {fraction:g}")
    ordered = sorted(set(object_ids), key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return set(ordered[: max(1, round(len(ordered) * fraction))])


class ConversationDataset(Dataset):
    """Training samples: token ids, labels, and the object's cloud or what the frozen half computed of it.

    Args:
        conversations: what to train on.
        processor: turns messages into ids.
        points: from object id to a dict of tensors that the collator stacks (a cloud, or cached features).
        max_length: longest sample in tokens.
        rewrite: changes the messages of each conversation before they become ids.
    """

    def __init__(
        self,
        conversations: Sequence[Conversation],
        processor: Any,
        points: Any,
        max_length: int,
        rewrite: Callable[[Sequence[Mapping[str, Any]]], Sequence[Mapping[str, Any]]] = lambda messages: messages,
    ) -> None:
        self.conversations = list(conversations)
        self.processor, self.points, self.max_length, self.rewrite = processor, points, max_length, rewrite
        self._encoded: dict[int, dict[str, list[int]]] = {}

    def __len__(self) -> int:
        return len(self.conversations)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`input_ids`, `labels` (lists), and `points`: one dict of tensors per cloud in the prompt.

        Raises:
            DataError: when the conversation is longer than `max_length`.
        """
        conversation = self.conversations[index]
        if index not in self._encoded:
            encoded = self.processor.encode(self.rewrite(conversation.messages))
            if len(encoded["input_ids"]) > self.max_length:
                raise DataError(
                    f"the conversation about {conversation.object_id} has {len(encoded['input_ids'])} tokens, more than "
                    f"data.max_length {self.max_length}; raise it or leave the conversation out"
                )
            self._encoded[index] = encoded
        clouds = sum(
            part["type"] == "point_cloud"
            for message in conversation.messages
            if not isinstance(message["content"], str)
            for part in message["content"]
        )
        return {**self._encoded[index], "points": [self.points[conversation.object_id]] * clouds}


class MixtureBatchSampler(Sampler[list[int]]):
    """Batches of a mixture: at each step one set is drawn by odds, and its next conversations in shuffled order.

    A set's order is a new permutation on every pass, so every conversation comes once before any comes twice. The
    sequence of batches depends on the seed alone: not on the number of processes, nor on where a run was stopped.

    Args:
        indices: for each set, the dataset indices it holds.
        sets: odds and batch sizes.
        num_batches: how many batches there are in all.
        seed: of the draw and the permutations.
        rank: this process; it receives every `world`-th conversation of each batch.
        world: number of processes.

    Raises:
        ConfigError: when a set is empty, its batch is smaller than the number of processes, or the odds mean nothing.

    Source: PointAlign (arXiv 2603.00412) and MiniGPT-3D (arXiv 2405.01413): three sets, odds 2:3:3, batch 6/10/4.
    """

    def __init__(
        self,
        indices: Sequence[Sequence[int]],
        sets: Sequence[DataSet],
        num_batches: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for members, settings in zip(indices, sets, strict=True):
            if not members:
                raise ConfigError(f"the data hold no conversation of types {', '.join(settings.types)}; drop this set")
            if settings.batch_size < world:
                raise ConfigError(
                    f"a batch of {settings.batch_size} cannot be split over {world} processes; raise data.sets' batch_size"
                )
        if not all(0 <= settings.odds < float("inf") for settings in sets) or not sum(s.odds for s in sets):
            given = ", ".join(f"{settings.odds:g}" for settings in sets)
            raise ConfigError(f"data.sets' odds are numbers from 0 up, not all 0; got {given}")
        self.indices, self.sets, self.num_batches, self.seed = indices, sets, num_batches, seed
        self.rank, self.world = rank, world

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        odds = np.array([settings.odds for settings in self.sets], dtype=float)
        draws = np.random.default_rng([self.seed, 0]).choice(len(odds), size=self.num_batches, p=odds / odds.sum())
        streams = [self._stream(number) for number in range(len(self.sets))]
        for drawn in draws:
            batch = [next(streams[drawn]) for _ in range(self.sets[drawn].batch_size)]
            yield batch[self.rank :: self.world]

    def _stream(self, number: int) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, 1 + number])
        members = np.asarray(self.indices[number])
        while True:
            yield from rng.permutation(members).tolist()


class Collator:
    """Joins samples into a batch: right-padded ids, labels, the positions that carry a label, and the points' tensors.

    Args:
        processor: pads and knows the point token.
        alignment_positions: from a batch's labels (B, L) to the positions that are aligned; the point tokens when not
            given.
    """

    def __init__(self, processor: Any, alignment_positions: Callable[[Tensor], Tensor] | None = None) -> None:
        self.processor, self.alignment_positions = processor, alignment_positions

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Samples of `ConversationDataset` as one batch.

        Returns:
            `input_ids`, `attention_mask`, `labels` (B, L); `logits_to_keep`, the positions whose next token is a label in
            some row; `alignment_mask` (B, L), true where hidden states are aligned; and each of the points' tensors, stacked.
        """
        ids = [sample["input_ids"] for sample in samples]
        input_ids = self.processor.pad(ids, side="right")
        labels = self.processor.pad([sample["labels"] for sample in samples], side="right", value=-100)
        positions = self.alignment_positions
        batch = {
            "input_ids": input_ids,
            "attention_mask": self.processor.pad([[1] * len(row) for row in ids], side="right", value=0),
            "labels": labels,
            "logits_to_keep": (labels[:, 1:] != -100).any(dim=0).nonzero().flatten(),
            "alignment_mask": positions(labels) if positions else input_ids == self.processor.point_token_id,
        }
        clouds = [cloud for sample in samples for cloud in sample["points"]]
        if clouds:
            batch.update({name: torch.stack([cloud[name] for cloud in clouds]) for name in clouds[0]})
        return batch
