"""Where a benchmark's objects come from: the bundled ones, the field's files, a user's own folder."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pointalign.data.check import CLOUD_FOLDERS
from pointalign.data.conversations import Conversation, Conversations, read_conversations
from pointalign.data.household import household_classes
from pointalign.data.household_phrases import CATEGORY_QUESTIONS
from pointalign.data.household_split import TEST, household_sides
from pointalign.data.household_text import reference_caption
from pointalign.data.modelnet import CLASS_NAMES, MODELNET_FILE, ModelNetObject, load_modelnet40
from pointalign.data.objaverse import VAL_3000_FILE, NumpyClouds
from pointalign.data.sources import HouseholdClouds, open_clouds
from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.benchmarks import (
    CAPTION,
    COMPLETION,
    INSTRUCTION,
    Benchmark,
    Item,
    Question,
    closed_set_items,
)
from pointalign.evaluation.own_data import FolderClouds, read_classes, read_truth
from pointalign.evaluation.records import Task
from pointalign.evaluation.simcse import SIMCSE
from pointalign.evaluation.text_metrics import SENTENCE_BERT
from pointalign.options import AS_THE_FILE_SAYS, Reading
from pointalign.sentence_embedding import MINILM

BENCHMARKS = (
    "household-classification",
    "household-captioning",
    "modelnet40",
    "objaverse-classification",
    "objaverse-captioning",
    "own-classification",
    "own-captioning",
)
# Longest answers and batch. Source: released evaluation of PointAlign (arXiv 2603.00412).
MODELNET_TOKENS, OBJAVERSE_TOKENS, FIELD_BATCH = 100, 150, 15
HOUSEHOLD_ANSWER_TOKENS, HOUSEHOLD_CAPTION_TOKENS, HOUSEHOLD_BATCH = 40, 60, 50
# The field's two, and the installed one, so that there is a number where the field's cannot be had.
FIELD_EMBEDDERS = (SENTENCE_BERT, SIMCSE, MINILM)
VAL_200_FILE = "PointLLM_brief_description_val_200_GT.json"
ALL_CAPTIONS_FILE = "PointLLM_brief_description_660K.json"


@dataclass(frozen=True)
class Sources:
    """Where benchmarks find what is not bundled.

    Args:
        data: the folder with the field's files, laid out as docs/data.md says.
        val_objects: how many held-out Objaverse objects: 200, or 3000 of which the 200 are part.
        clouds: a user's own folder of clouds.
        truth: the CSV or JSON file of its labels or captions.
        classes: text file with the closed set of its labels, one per line; the labels that occur when None.
        held_out: which of household's objects are asked about, see `household_sides`.
        reading: how the 3D files of a user's own folder become clouds.
    """

    data: Path = Path("data")
    val_objects: int = 200
    clouds: Path | None = None
    truth: Path | None = None
    classes: Path | None = None
    held_out: str = "test"
    reading: Reading = AS_THE_FILE_SAYS


def open_benchmark(name: str, sources: Sources = Sources(), limit: int | None = None) -> Benchmark:
    """Find a benchmark's objects, and check that each has its cloud.

    Args:
        name: one of `BENCHMARKS`.
        sources: where the files are.
        limit: only so many objects, the first ones.

    Raises:
        ConfigError: for an unknown name, or own data that were not named.
        DataError: when files are missing or broken, or objects lack their cloud.
    """
    if name not in _OPENERS:
        raise ConfigError(f"there is no benchmark {name!r}; known are {', '.join(BENCHMARKS)}")
    benchmark = _OPENERS[name](sources)
    items = benchmark.items[:limit]
    if not items:
        raise DataError(f"{benchmark.source} holds no object; check the file")
    twice = [object_id for object_id, count in Counter(item.object_id for item in items).items() if count > 1]
    if twice:
        raise DataError(f"{benchmark.source} lists {twice[0]} twice; keep one entry per object")
    missing = [item.object_id for item in items if item.object_id not in benchmark.clouds]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(items)} objects of {benchmark.source} have no cloud (first: {missing[0]}); "
            "complete the folder of clouds"
        )
    return replace(benchmark, items=items, fingerprint=_fingerprint(benchmark))


def _fingerprint(benchmark: Benchmark) -> str:
    """Of the clouds of all items, also those that a limit leaves out; a folder of 660K is not looked through."""
    if not isinstance(benchmark.clouds, NumpyClouds):
        return benchmark.clouds.fingerprint
    present = [item.object_id for item in benchmark.items if item.object_id in benchmark.clouds]
    return hashlib.sha256(repr(benchmark.clouds.states(present)).encode()).hexdigest()


def _household_classification(sources: Sources) -> Benchmark:
    objects = household_sides(sources.held_out)[1]
    classes = household_classes()
    return Benchmark(
        name=household_name("household-classification", sources),
        task=Task("closed-set", tuple(classes)),
        questions=(Question("I", INSTRUCTION, CATEGORY_QUESTIONS[0]),),
        items=closed_set_items([(thing.id, thing.label) for thing in objects], classes, "household"),
        clouds=HouseholdClouds(objects),
        max_new_tokens=HOUSEHOLD_ANSWER_TOKENS,
        batch_size=HOUSEHOLD_BATCH,
        judge="likelihood",
        source="the bundled household objects held out from training",
    )


def _household_captioning(sources: Sources) -> Benchmark:
    objects = household_sides(sources.held_out)[1]
    return Benchmark(
        name=household_name("household-captioning", sources),
        task=Task("captioning"),
        questions=(Question("caption", CAPTION),),
        items=tuple(Item(thing.id, reference_caption(thing)) for thing in objects),
        clouds=HouseholdClouds(objects),
        max_new_tokens=HOUSEHOLD_CAPTION_TOKENS,
        batch_size=HOUSEHOLD_BATCH,
        judge=None,
        source="the bundled household objects held out from training",
        embedders=(MINILM,),
    )


def household_name(name: str, sources: Sources) -> str:
    """What a household benchmark is called: results on different objects are never taken for one another's."""
    return name if sources.held_out == TEST else f"{name}-{sources.held_out}"


class ModelNetClouds:
    """ModelNet40's test clouds by their place in the field's file.

    Args:
        objects: what the file holds.
        file: the file.
    """

    def __init__(self, objects: Sequence[ModelNetObject], file: Path) -> None:
        self.objects = {str(thing.id): thing for thing in objects}
        status = file.stat()
        self.fingerprint = f"{status.st_size} {status.st_mtime_ns}"

    def __contains__(self, object_id: object) -> bool:
        return object_id in self.objects

    def __getitem__(self, object_id: str) -> Any:
        """(8192, 6) xyz and black."""
        return self.objects[object_id].points


def _modelnet40(sources: Sources) -> Benchmark:
    file = sources.data / "modelnet40_data" / MODELNET_FILE
    objects = load_modelnet40(file)
    return Benchmark(
        name="modelnet40",
        task=Task("closed-set", CLASS_NAMES),
        questions=(Question("I", INSTRUCTION), Question("C", COMPLETION)),
        items=closed_set_items([(str(thing.id), thing.label) for thing in objects], CLASS_NAMES, str(file)),
        clouds=ModelNetClouds(objects, file),
        max_new_tokens=MODELNET_TOKENS,
        batch_size=FIELD_BATCH,
        judge="likelihood",
        source=str(file),
    )


def _objaverse(name: str, task: Task, questions: tuple[Question, ...], sources: Sources) -> Benchmark:
    annotations = sources.data / "anno_data"
    file = annotations / (VAL_200_FILE if sources.val_objects == 200 else ALL_CAPTIONS_FILE)
    talks = read_conversations(file)
    if sources.val_objects != 200:
        talks = _chosen(talks, annotations / VAL_3000_FILE, file)
    return Benchmark(
        name=name,
        task=task,
        questions=questions,
        items=tuple(Item(talk.object_id, talk.messages[-1]["content"]) for talk in talks),
        clouds=open_clouds(_cloud_folder(sources.data)),
        max_new_tokens=OBJAVERSE_TOKENS,
        batch_size=FIELD_BATCH,
        judge=None,
        source=str(file),
        embedders=FIELD_EMBEDDERS if task.kind == "captioning" else (),
    )


def _cloud_folder(data: Path) -> Path:
    return next((data / name for name in CLOUD_FOLDERS if (data / name).is_dir()), data / CLOUD_FOLDERS[0])


def _chosen(talks: Conversations, ids_file: Path, captions_file: Path) -> list[Conversation]:
    """The captions of the objects that a file lists, in its order."""
    try:
        ids = ids_file.read_text(encoding="utf-8-sig").split()
    except OSError as error:
        raise DataError(
            f"cannot read {ids_file}: {error.strerror}; give PointLLM's list of held-out objects"
        ) from error
    found = {talk.object_id: talk for talk in talks.select(talks.about(set(ids)))}
    missing = [object_id for object_id in ids if object_id not in found]
    if missing:
        raise DataError(
            f"{captions_file} has no caption for {len(missing)} of {len(ids)} objects of {ids_file} (first: {missing[0]}); "
            "give PointLLM's unfiltered file"
        )
    return [found[object_id] for object_id in ids]


def _objaverse_classification(sources: Sources) -> Benchmark:
    questions = (Question("I", INSTRUCTION), Question("C", COMPLETION))
    return _objaverse("objaverse-classification", Task("open-vocabulary"), questions, sources)


def _objaverse_captioning(sources: Sources) -> Benchmark:
    return _objaverse("objaverse-captioning", Task("captioning"), (Question("caption", CAPTION),), sources)


def _own(sources: Sources) -> tuple[FolderClouds, Path]:
    if sources.clouds is None or sources.truth is None:
        raise ConfigError("your own data need --clouds FOLDER and --truth FILE; name both")
    return FolderClouds(sources.clouds, sources.reading), sources.truth


def _own_classification(sources: Sources) -> Benchmark:
    clouds, file = _own(sources)
    labels = read_truth(file).labels
    if not labels:
        raise DataError(f"{file} has no labels; add a column label, or run own-captioning")
    classes = sorted(set(labels.values())) if sources.classes is None else read_classes(sources.classes)
    return Benchmark(
        name="own-classification",
        task=Task("closed-set", tuple(classes)),
        questions=(Question("I", INSTRUCTION, CATEGORY_QUESTIONS[0]),),
        items=closed_set_items(list(labels.items()), classes, str(file)),
        clouds=clouds,
        max_new_tokens=MODELNET_TOKENS,
        batch_size=FIELD_BATCH,
        judge="likelihood",
        source=str(file),
    )


def _own_captioning(sources: Sources) -> Benchmark:
    clouds, file = _own(sources)
    captions = read_truth(file).captions
    if not captions:
        raise DataError(f"{file} has no captions; add a column caption, or run own-classification")
    return Benchmark(
        name="own-captioning",
        task=Task("captioning"),
        questions=(Question("caption", CAPTION),),
        items=tuple(Item(object_id, caption) for object_id, caption in captions.items()),
        clouds=clouds,
        max_new_tokens=OBJAVERSE_TOKENS,
        batch_size=FIELD_BATCH,
        judge=None,
        source=str(file),
        embedders=FIELD_EMBEDDERS,
    )


_OPENERS: dict[str, Callable[[Sources], Benchmark]] = {
    "household-classification": _household_classification,
    "household-captioning": _household_captioning,
    "modelnet40": _modelnet40,
    "objaverse-classification": _objaverse_classification,
    "objaverse-captioning": _objaverse_captioning,
    "own-classification": _own_classification,
    "own-captioning": _own_captioning,
}
