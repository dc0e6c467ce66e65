"""Closed sets of classes with the other names of each, and which class an answers file says is right."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections import Counter
from importlib import resources
from pathlib import Path

from pointalign.errors import ConfigError, DataError
from pointalign.evaluation.records import Answer, Task, TaskKind, Verdict

LABEL_SETS = ("modelnet40", "household")
HEADER = "label,synonyms"
# Phrases in a row without a label hold a class's name and mean something else: "flower bed" is no bed.
NO_CLASS = ""


def load_task(kind: TaskKind, labels: str | Path = "modelnet40") -> Task:
    """What is to be judged; in the closed set with its classes and their synonyms.

    Args:
        kind: "closed-set", "open-vocabulary" or "captioning"; the last two have no classes.
        labels: `modelnet40`, `household`, or a CSV file with the columns label and synonyms (separated by semicolons), one
            row per class in the order of their indices.

    Raises:
        DataError: when the file is missing, has other columns, or gives a class or a synonym twice.
    """
    if kind != "closed-set":
        return Task(kind)
    names, synonyms = read_label_set(labels)
    return Task(kind, names, synonyms)


def read_label_set(name_or_path: str | Path) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """The classes of a set in order, and further names by class; under `NO_CLASS` those that only look like one.

    Raises:
        DataError: as `load_task`.
    """
    if str(name_or_path) in LABEL_SETS:
        file = resources.files("pointalign") / "assets" / "judge" / f"{name_or_path}.csv"
        return _parse(file.read_text(encoding="utf-8"), str(name_or_path))
    path = Path(name_or_path)
    try:
        return _parse(path.read_text(encoding="utf-8-sig"), str(path))
    except OSError as error:
        known = " or ".join(LABEL_SETS)
        raise DataError(
            f"cannot read labels {path}: {error.strerror}; give {known}, or a CSV file of {HEADER}"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error


def _parse(text: str, where: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    if "label" not in (reader.fieldnames or ()):
        columns = ", ".join(map(str, reader.fieldnames or ())) or "(none)"
        raise DataError(f"{where} has the columns {columns}; its first line must be {HEADER}")
    labels: list[str] = []
    synonyms: dict[str, tuple[str, ...]] = {}
    for row in reader:
        label = plain_name(row["label"] or "")
        names = tuple(filter(None, (plain_name(name) for name in (row.get("synonyms") or "").split(";"))))
        synonyms[label] = (*synonyms.get(label, ()), *names)
        if label != NO_CLASS:
            labels.append(label)
    counts = Counter([*labels, *(name for names in synonyms.values() for name in names)])
    twice = [name for name, count in counts.items() if count > 1]
    if twice or not labels:
        raise DataError(f"{where} {f'gives {twice[0]!r} twice' if twice else 'has no labels'}; give each class one row")
    return tuple(labels), synonyms


def synonyms_of(task: Task) -> dict[str, tuple[str, ...]]:
    """The task's synonyms; where it says nothing about them, those of the bundled set with the same classes."""
    if task.synonyms is not None:
        return task.synonyms
    for name in LABEL_SETS:
        labels, synonyms = read_label_set(name)
        if set(labels) == set(task.labels):
            return synonyms
    return {}


def plain_name(text: object) -> str:
    """A class's name as it is compared: lower case, composed letters, blanks for underscores and hyphens."""
    return " ".join(unicodedata.normalize("NFKC", str(text)).casefold().replace("_", " ").replace("-", " ").split())


def true_label(task: Task, answer: Answer) -> str:
    """The class that an answers file says is right: its `label_name`, else `ground_truth` as an index or a name.

    Raises:
        DataError: when neither is a class of the task, or the two do not agree.
    """
    known = {plain_name(label): label for label in task.labels}
    told = [known.get(plain_name(answer.label_name))] if answer.label_name is not None else []
    index = str(answer.ground_truth).strip()
    if index.isdecimal():
        told.append(task.labels[int(index)] if int(index) < len(task.labels) else None)
    elif not told:
        told.append(known.get(plain_name(index)))
    if None in told:
        raise DataError(
            f"the truth of {answer.object_id} (ground_truth {answer.ground_truth!r}, label_name {answer.label_name!r}) is "
            f"not one of the {len(task.labels)} classes {task.labels[0]} to {task.labels[-1]}; give the right --labels"
        )
    if len(set(told)) > 1:
        raise DataError(
            f"{answer.object_id} is {told[0]!r} by its label_name and {told[1]!r} by its ground_truth; give the --labels in "
            "the order that the file's indices have"
        )
    label = told[0]
    assert label is not None
    return label


def reference_text(answer: Answer) -> str:
    """The person's description that an answer is held against.

    Raises:
        DataError: when the file has something else there, as it does in the closed set.
    """
    if not isinstance(answer.ground_truth, str) or not answer.ground_truth.strip():
        raise DataError(
            f"the ground_truth of {answer.object_id} is {answer.ground_truth!r}, not a description; for a file of classes "
            "use --task closed-set"
        )
    return answer.ground_truth


def class_verdict(task: Task, answer: Answer, predicted: str | None, reply: str | None = None) -> Verdict:
    """A readable verdict of the closed set; no class is a wrong one."""
    return Verdict(
        answer.object_id, True, correct=predicted == true_label(task, answer), predicted=predicted, reply=reply
    )


def refuse_task(judge: str, task: Task, suited: str) -> ConfigError:
    """The error of a judge that a task does not suit, which names those that do."""
    return ConfigError(f"the {judge} judge does not judge {task.kind}; use --judge {suited}")
