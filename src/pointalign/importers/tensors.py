"""Published weight files: read without running code in them, stacked in order, and accounted for tensor by tensor."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pointalign.errors import CheckpointError
from pointalign.models.checkpoint import load_weights_file

CONTAINERS = ("model", "state_dict", "base_model", "module")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
WHOLE_FILES = ("model.safetensors", "pytorch_model.bin", "checkpoint.safetensors")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: when the file is missing or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; give the file that came with the weights"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); copy it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not a configuration; give another file")
    return values


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a weight file or of a folder with one or several of them, under their published names.

    Args:
        path: a `.safetensors` file; a file of `torch.save` (a state dict, alone or under `model` or `state_dict`); or a
            folder as transformers writes it, with or without an index of shards.

    Raises:
        CheckpointError: when it is missing or truncated, holds no tensors, or holds Python objects, which loading would
            have to run.
    """
    path = Path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise CheckpointError(f"found no weights at {path}; give an existing file or folder")
    state = load_weights_file(path) if path.suffix == ".safetensors" else _unwrap(_read_torch_file(path))
    tensors = {name.removeprefix("module."): value for name, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors; give a file of weights")
    return tensors


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights that `read_weights` reads."""
    return any((folder / name).is_file() for name in (*INDEX_FILES, *WHOLE_FILES))


def _read_folder(folder: Path) -> dict[str, Tensor]:
    for name in INDEX_FILES:
        if (folder / name).is_file():
            weight_map = read_json(folder / name).get("weight_map")
            if not isinstance(weight_map, dict):
                raise CheckpointError(f"{folder / name} has no weight_map; copy it again")
            shards = sorted(set(weight_map.values()))
            return {key: tensor for shard in shards for key, tensor in read_weights(folder / shard).items()}
    for name in WHOLE_FILES:
        if (folder / name).is_file():
            return read_weights(folder / name)
    raise CheckpointError(f"{folder} holds no weights; it needs one of {', '.join(WHOLE_FILES + INDEX_FILES)}")


def _read_torch_file(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"Python code or objects ({found[1]})" if found else "Python code or objects, or no weights at all"
        raise CheckpointError(
            f"{path} holds {what}, so it is not loaded; get it as .safetensors, or save its state dict alone"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        raise CheckpointError(f"{path} is truncated or not a file of weights; copy it again") from error


def _unwrap(content: Any) -> Mapping[str, Any]:
    while isinstance(content, Mapping):
        inner = next((content[key] for key in CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return content
        content = inner
    return {}


@dataclass
class FileReport:
    """What became of one file's tensors.

    Args:
        name: the file.
        loaded: tensors that are in the model.
        replaced: tensors that a later file (or a second name in the same file) replaced.
        left_over: published names of tensors that the model has no place for.
    """

    name: str
    loaded: int = 0
    replaced: int = 0
    left_over: list[str] = field(default_factory=list)


@dataclass
class ImportReport:
    """What an import did: each file's tensors, and the model's own tensors that no file held.

    Args:
        files: one entry per file, in the order they were applied.
        missing: names in the model; all of them were allowed to be missing.
    """

    files: list[FileReport] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The report for people, one line per fact."""
        lines = []
        for file in self.files:
            replaced = f", {file.replaced} replaced by later tensors" if file.replaced else ""
            lines.append(f"{file.name}: {file.loaded} tensors loaded{replaced}, {len(file.left_over)} left over")
            lines += [f"  left over: {name}" for name in _by_part(file.left_over)]
        return lines + [f"missing: {name}" for name in _by_part(self.missing) or ["nothing"]]

    def summary(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "loaded": sum(file.loaded for file in self.files),
            "missing": self.missing,
            "left_over": [name for file in self.files for name in file.left_over],
        }


def _by_part(names: list[str]) -> list[str]:
    """Names as they are, or by their first word where a part has many."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.split(".")[0], []).append(name)
    return [
        text
        for part, members in parts.items()
        for text in (members if len(members) <= 3 else [f"{part}.* ({len(members)} tensors)"])
    ]


@dataclass
class _Entry:
    tensor: Tensor
    published_name: str
    file: FileReport


class WeightStack:
    """Tensors of several files under the model's names; a later file's tensor replaces an earlier one.

    LoRA weights are named like the linear they adapt, with `.lora_A.weight` or `.lora_B.weight` behind.
    """

    def __init__(self) -> None:
        self.files: list[FileReport] = []
        self._entries: dict[str, _Entry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        return self._entries[name].tensor

    def size(self, name: str, axis: int, default: int) -> int:
        """Length of a tensor's axis, or the default where there is no such tensor.

        Raises:
            CheckpointError: when the tensor has no such axis.
        """
        if name not in self:
            return default
        shape = tuple(self[name].shape)
        if axis >= len(shape):
            raise CheckpointError(f"{name} has shape {shape}, which is no matrix; copy its file again")
        return shape[axis]

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with a prefix, in order of arrival."""
        return [name for name in self._entries if name.startswith(prefix)]

    def add(self, source: str, state: Mapping[str, Tensor], rename: Callable[[str], str | None]) -> None:
        """Put a file's tensors on top.

        Args:
            source: the file, as the report names it.
            state: published names and tensors.
            rename: from a published name to the model's, or None for a tensor that has no place.
        """
        file = FileReport(source)
        self.files.append(file)
        for published, tensor in state.items():
            name = rename(published)
            if name is None:
                file.left_over.append(published)
                continue
            if (old := self._entries.get(name)) is not None:
                old.file.loaded -= 1
                old.file.replaced += 1
            self._entries[name] = _Entry(tensor, published, file)
            file.loaded += 1

    def join(self, names: list[str], joined: str) -> None:
        """Concatenate tensors along their first axis under one name; a tensor of that name is replaced."""
        tensor = torch.cat([self[name] for name in names])
        if joined in self and joined not in names:
            old = self._entries.pop(joined)
            old.file.loaded -= 1
            old.file.replaced += 1
        entries = [self._entries.pop(name) for name in names]
        self._entries[joined] = _Entry(tensor, entries[0].published_name, entries[0].file)

    def leave_over(self, names: Iterable[str]) -> None:
        """Take tensors off, because the model has no place for them."""
        for name in list(names):
            entry = self._entries.pop(name)
            entry.file.loaded -= 1
            entry.file.left_over.append(entry.published_name)

    def pop(self, name: str) -> Tensor:
        """Hand over a tensor; it counts as loaded."""
        return self._entries.pop(name).tensor

    def fit(self, name: str, shape: torch.Size) -> Tensor:
        """A tensor in the shape of its place: the kernel of a 1x1 convolution is a linear's weight.

        Raises:
            CheckpointError: when the shapes differ otherwise.
        """
        entry = self._entries[name]
        tensor = entry.tensor.squeeze(-1) if entry.tensor.shape == (*shape, 1) else entry.tensor
        if tensor.shape != shape:
            raise CheckpointError(
                f"{entry.published_name} of {entry.file.name} has shape {tuple(tensor.shape)} where the configuration has "
                f"{tuple(shape)}; give the configuration that belongs to these weights"
            )
        return tensor


def check_missing(missing: Iterable[str], allowed: Iterable[str]) -> list[str]:
    """Names that are missing and may be.

    Args:
        missing: names in the model.
        allowed: names, beginnings of names (`language_model.`), or patterns with `*`.

    Raises:
        CheckpointError: when a name is missing that is not allowed to be.
    """
    patterns = list(allowed)
    missing = sorted(missing)
    refused = [
        name
        for name in missing
        if not any(name.startswith(pattern) or fnmatchcase(name, pattern) for pattern in patterns)
    ]
    if refused:
        more = f" and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise CheckpointError(
            f"the files hold nothing for {', '.join(refused[:3])}{more}; add the file that holds them (the published "
            "model is a stack of files), or name them as allowed to be missing"
        )
    return missing
