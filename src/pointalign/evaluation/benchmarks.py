"""What is asked, about which objects, and how answers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pointalign.data.conversations import PointCloudSource
from pointalign.data.files import PointCloud
from pointalign.errors import DataError
from pointalign.evaluation.judging.label_sets import plain_name
from pointalign.evaluation.records import Task

# Source: PointLLM (arXiv 2308.16911), section 5: instruction (I), completion (C), caption.
INSTRUCTION = "What is this?"
COMPLETION = "This is an object of "
CAPTION = "Caption this 3D model in detail."


@dataclass(frozen=True)
class Question:
    """One question of a benchmark.

    Args:
        key: "I", "C" or "caption".
        text: what the model is asked.
        class_text: what it is asked where labels are scored instead of read; the text itself when None.
    """

    key: str
    text: str
    class_text: str | None = None


@dataclass(frozen=True)
class Item:
    """One object of a benchmark and what is known of it; the fields are those of `Answer`."""

    object_id: str
    ground_truth: Any
    label_name: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """Objects, questions about them, and how answers are judged.

    Args:
        name: one of `opening.BENCHMARKS`.
        task: what a judge is to do.
        questions: each is asked about every object.
        items: the objects, in a fixed order.
        clouds: their clouds by id.
        max_new_tokens: longest answer.
        batch_size: objects at a time, unless the user says otherwise.
        judge: who scores the answers, unless the user says otherwise; None where nobody does without being named.
        source: where the objects come from, for reports.
        embedders: models of sentence embeddings that captions are held against their references with.
        fingerprint: changes when the clouds do.
    """

    name: str
    task: Task
    questions: tuple[Question, ...]
    items: tuple[Item, ...]
    clouds: PointCloudSource
    max_new_tokens: int
    batch_size: int
    judge: str | None
    source: str
    embedders: tuple[str, ...] = ()
    fingerprint: str = ""

    def points(self, object_id: str) -> np.ndarray:
        """(N, 3), (N, 6) or (N, 7) points of one object, as `PointAlignProcessor.clean_points` takes them.

        Raises:
            DataError: when it is missing or broken.
        """
        cloud = self.clouds[object_id]
        return cloud.array() if isinstance(cloud, PointCloud) else np.asarray(cloud)


def closed_set_items(labels: Sequence[tuple[str, str]], classes: Sequence[str], where: str) -> tuple[Item, ...]:
    """Objects of a closed set, with their class as the field writes it: its index, and its name.

    Args:
        labels: object id and class name of each object.
        classes: the closed set.
        where: names the file in an error.

    Raises:
        DataError: when a label is not in the set, or two classes of it differ in case, hyphens or underscores alone.
    """
    names: dict[str, str] = {}
    for name in classes:
        if names.setdefault(plain_name(name), name) != name:
            raise DataError(
                f"{where}: the classes {names[plain_name(name)]!r} and {name!r} read alike; write them in one way"
            )
    index = {name: number for number, name in enumerate(classes)}
    unknown = [(object_id, name) for object_id, name in labels if name not in index]
    if unknown:
        object_id, name = unknown[0]
        raise DataError(
            f"{where}: the label {name!r} of {object_id} is not one of the {len(classes)} classes; correct it, or add it to "
            "the classes"
        )
    return tuple(Item(object_id, index[name], name) for object_id, name in labels)
