"""ModelNet40's test clouds from the field's file, which is a pickle: read without running anything that it asks for.

A pickle is a program that names functions and calls them. Here it may only use the instructions that lists of arrays
need, and every name it may use stands for a small stand-in of ours that checks its arguments and builds plain arrays:
numpy's own functions are never handed what the file says. Anything else ends the reading.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pointalign.errors import DataError

MODELNET_FILE = "modelnet40_test_8192pts_fps.dat"
# Source: ModelNet40 (arXiv 1406.5670); the order is that of the labels in the file, PointLLM (arXiv 2308.16911).
CLASS_NAMES = (
    *("airplane", "bathtub", "bed", "bench", "bookshelf", "bottle", "bowl", "car", "chair", "cone"),
    *("cup", "curtain", "desk", "door", "dresser", "flower pot", "glass box", "guitar", "keyboard", "lamp"),
    *("laptop", "mantel", "monitor", "night stand", "person", "piano", "plant", "radio", "range hood", "sink"),
    *("sofa", "stairs", "stool", "table", "tent", "toilet", "tv stand", "vase", "wardrobe", "xbox"),
)


@dataclass(frozen=True)
class ModelNetObject:
    """One test cloud.

    Attributes:
        id: its place in the file, counted from 0, which is its object_id in the field's answer files.
        label: its class, one of `CLASS_NAMES`.
        xyz: (N, 3) float32, as the file has it.
    """

    id: int
    label: str
    xyz: np.ndarray = field(repr=False, compare=False)

    @property
    def class_index(self) -> int:
        """The number of its class, 0 to 39."""
        return CLASS_NAMES.index(self.label)

    @property
    def points(self) -> np.ndarray:
        """(N, 6) float32: xyz, and black, as the field shows ModelNet40 to its models."""
        return np.concatenate([self.xyz, np.zeros_like(self.xyz)], axis=1)


def load_modelnet40(path: str | Path) -> list[ModelNetObject]:
    """Load the test clouds in the file's order; normals are dropped.

    Args:
        path: `modelnet40_test_8192pts_fps.dat`, a pickle of (list of arrays (8192, 6): xyz and normals; list of labels).

    Raises:
        DataError: when the file is missing, cut short, of another layout, or asks for anything but numpy arrays, lists,
            tuples and numbers; nothing of it is run then.
    """
    path = Path(path)
    content = _unpickle(path)
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise _wrong(path, "it does not hold a list of clouds and a list of labels")
    clouds, labels = (_items(part) for part in content)
    if clouds is None or labels is None or len(clouds) != len(labels) or not clouds:
        raise _wrong(path, "it does not hold as many labels as clouds")
    del content
    objects = []
    for index, label in enumerate(labels):
        xyz, clouds[index] = _xyz(clouds[index], f"cloud {index}", path), None  # so that memory holds no cloud twice
        objects.append(ModelNetObject(index, CLASS_NAMES[_label(label, f"label {index}", path)], xyz))
    return objects


def _wrong(path: Path, reason: str) -> DataError:
    return DataError(f"{path} is not ModelNet40's test set ({reason}); copy {MODELNET_FILE} again")


def _items(part: Any) -> list[Any] | None:
    values = part.values if isinstance(part, _Array) else part
    return list(values) if isinstance(values, (list, tuple)) or getattr(values, "ndim", 0) > 0 else None


def _xyz(cloud: Any, where: str, path: Path) -> np.ndarray:
    values = cloud.values if isinstance(cloud, _Array) else cloud
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.shape[1] not in (3, 6) or not len(values):
        raise _wrong(path, f"{where} is no array of shape (points, 6)")
    xyz = values[:, :3].astype(np.float32)
    if not np.isfinite(xyz).all():
        raise _wrong(path, f"{where} holds NaN or infinite values")
    return xyz


def _label(label: Any, where: str, path: Path) -> int:
    value = label.values if isinstance(label, _Array) else label
    if isinstance(value, np.ndarray) and value.size == 1 and value.dtype.kind in "iu":
        value = value.item()
    if not isinstance(value, (int, np.integer)) or not 0 <= value < len(CLASS_NAMES):
        raise _wrong(path, f"{where} is no number from 0 to {len(CLASS_NAMES) - 1}")
    return int(value)


class _Refused(Exception):
    """Something in a pickle that has no part in an array of numbers."""


class _Dtype:
    """What a pickle says of an array's numbers; only plain integers and floats are admitted."""

    def __init__(self, *arguments: Any) -> None:
        name = arguments[0] if arguments else None
        if not isinstance(name, str) or not re.fullmatch(r"[iu][1248]|f[248]", name):
            raise _Refused(f"an array of {str(name)[:40]!r}")
        self.name, self.order = name, "="

    def __setstate__(self, state: Any) -> None:
        version, order, *structure = state
        if version not in (3, 4) or order not in ("<", ">", "|", "=") or structure[:3] != [None] * 3:
            raise _Refused("an array of structures")
        self.order = order

    def numbers(self, content: Any) -> np.ndarray:
        """Bytes as a flat array of this kind."""
        if isinstance(content, str):  # as Python 2 wrote them
            content = content.encode("latin-1")
        if not isinstance(content, (bytes, bytearray)):
            raise _Refused("an array of objects")
        return np.frombuffer(content, np.dtype(self.order.replace("|", "=") + self.name))


class _Array:
    """An array under construction: made empty, then filled, as numpy pickles them."""

    def __init__(self, values: Any = None) -> None:
        self.values = values

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, is_fortran, content = state
        self.values = _shaped(dtype, content, shape, "F" if is_fortran else "C")


def _shaped(dtype: Any, content: Any, shape: Any, order: str) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or any(type(size) is not int or size < 0 for size in shape):
        raise _Refused("an array of no plain shape or kind")
    return dtype.numbers(content).reshape(tuple(shape), order="F" if order == "F" else "C")


def _empty_array(kind: Any, *_shape_and_code: Any) -> _Array:
    if kind is not _NAMES["numpy", "ndarray"]:
        raise _Refused("an array of a type of its own")
    return _Array()


def _array_of_buffer(content: Any, dtype: Any, shape: Any, order: str) -> _Array:
    return _Array(_shaped(dtype, content, shape, order))


def _scalar(dtype: Any, content: Any) -> int | float:
    return _shaped(dtype, content, (), "C").item()


def _bytes_of(*arguments: Any) -> bytes:
    """Bytes as protocols before 3 write them: the text whose Latin-1 form they are, or nothing."""
    text, encoding = arguments or ("", "latin1")
    if not isinstance(text, str) or encoding != "latin1":
        raise _Refused("bytes in an encoding of their own")
    return text.encode("latin-1")


def _nothing(*arguments: Any) -> None:
    raise _Refused("a type that is called")


class _Name:
    """What a name in the pickle stands for; it can be called, and nothing else can be done to it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise _Refused("a change to a function")


_NAMES = {
    ("numpy", "ndarray"): _Name(_nothing),
    ("numpy", "dtype"): _Name(_Dtype),
    ("_codecs", "encode"): _Name(_bytes_of),
    ("builtins", "bytes"): _Name(_bytes_of),
    ("__builtin__", "bytes"): _Name(_bytes_of),
    **{
        (f"numpy.{core}.{module}", name): _Name(call)
        for core in ("core", "_core")  # numpy 1 and 2
        for module, name, call in (
            ("multiarray", "_reconstruct", _empty_array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_of_buffer),
        )
    },
}


# What pickles of lists, tuples, numbers, text and arrays are made of, in any protocol.
_INSTRUCTIONS = frozenset(
    [
        *("PROTO", "FRAME", "STOP", "MARK", "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"),
        *("EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
        *("NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
        *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET"),
    ]
)


def _check_instructions(file: BinaryIO) -> None:
    """Look at each instruction without following it, and go back to the start."""
    for number, (instruction, argument, _) in enumerate(pickletools.genops(file)):
        if instruction.name not in _INSTRUCTIONS:
            raise _Refused(f"the instruction {instruction.name}")
        # The table of what is remembered grows to the place that is named, however large.
        if instruction.name.endswith("PUT") and not 0 <= int(argument or 0) <= number:
            raise _Refused("a place in memory beyond its own length")
    file.seek(0)


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _NAMES:
            raise _Refused(repr(f"{module_name}.{global_name}"[:80]))
        return _NAMES[module_name, global_name]


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            _check_instructions(file)
            return _ArrayUnpickler(file, encoding="latin1").load()
    except _Refused as error:
        raise DataError(
            f"{path} asks for {error}, which has no part in ModelNet40's arrays, so it may be malicious; nothing of it was "
            f"run: delete it, and copy {MODELNET_FILE} from where the field publishes it"
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give {MODELNET_FILE}") from error
    except Exception as error:  # a broken pickle fails in any way there is
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise _wrong(path, f"a broken pickle: {reason}") from error
