"""A glTF file's JSON and the bytes it points at; nothing is believed before it is checked."""

from __future__ import annotations

import base64
import json
import math
from typing import Any
from urllib.parse import unquote

import numpy as np

from pointalign.data.files.source import MAX_MESH_BYTES, MAX_TEXT_MESH_BYTES, MAX_VERTICES, Source
from pointalign.data.files.textures import Companions
from pointalign.errors import DataError

# Commas and brackets bound what JSON becomes in memory; data that it embeds has none.
MAX_JSON_ITEMS = 10_000_000
GLB_MAGIC, JSON_CHUNK, BINARY_CHUNK = b"glTF", 0x4E4F534A, 0x004E4942
COMPONENTS = {5120: "<i1", 5121: "<u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}
# Extensions that a file may require and that are read, or change nothing that is read here.
KNOWN_EXTENSIONS = {
    "KHR_mesh_quantization",
    "KHR_texture_transform",
    "EXT_texture_webp",
    "KHR_lights_punctual",
    "KHR_xmp_json_ld",
    "KHR_animation_pointer",
}
REMEDIES = {
    "KHR_draco_mesh_compression": "export without Draco compression",
    "EXT_meshopt_compression": "export without meshopt compression",
    "KHR_texture_basisu": "export with PNG or JPEG textures",
}


class Document:
    """A glTF 2.0 file.

    Args:
        source: a .glb or .gltf.
        companions: finds the buffers and pictures that lie beside it.

    Raises:
        DataError: when it is broken, of another version, or requires an extension that is not read.

    Source: glTF 2.0 specification (Khronos), sections 3 and 4.
    """

    def __init__(self, source: Source, companions: Companions) -> None:
        self.name, self._companions = source.name, companions
        self._binary: bytes | None = None
        if source.format == "glb" or source.file.read(4) == GLB_MAGIC:
            source.file.seek(0)
            text = self._read_chunks(source)
        else:
            source.check_size(MAX_TEXT_MESH_BYTES, "save it as .glb")
            source.file.seek(0)
            text = source.file.read()
        if sum(text.count(mark) for mark in (b",", b"{", b"[")) > MAX_JSON_ITEMS:
            raise DataError(f"{self.name} describes more than {MAX_JSON_ITEMS:,} things; join its parts")
        self.json: dict[str, Any] = json.loads(text)
        if not isinstance(self.json, dict) or not str(self.json["asset"]["version"]).startswith("2."):
            raise DataError(f"{self.name} is no glTF 2; export it as glTF 2")
        self._check_extensions()
        self._buffers: dict[int, bytes] = {}
        self._accessors: dict[int, np.ndarray] = {}
        self._numbers = 0

    def _read_chunks(self, source: Source) -> bytes:
        source.check_size(MAX_MESH_BYTES, "decimate the mesh")
        head = source.read_exactly(12)
        if head[:4] != GLB_MAGIC or int.from_bytes(head[4:8], "little") != 2:
            raise DataError(f"{self.name} is no binary glTF 2; export it as glTF 2")
        text = None
        while source.size - source.file.tell() >= 8:
            length, kind = np.frombuffer(source.read_exactly(8), "<u4").tolist()
            chunk = source.read_exactly(length)
            if text is None:
                text = chunk
                if kind != JSON_CHUNK:
                    raise DataError(f"{self.name} does not begin with its JSON; the file is broken")
            elif kind == BINARY_CHUNK and self._binary is None:
                self._binary = chunk
        if text is None:
            raise DataError(f"{self.name} holds nothing; the file is cut short")
        return text

    def _check_extensions(self) -> None:
        for name in self.json.get("extensionsRequired", []):
            if name not in KNOWN_EXTENSIONS and not str(name).startswith("KHR_materials_"):
                remedy = REMEDIES.get(name, "export without it")
                raise DataError(
                    f"{self.name} requires the glTF extension {str(name)[:60]}, which is not read; {remedy}"
                )

    def item(self, kind: str, index: object) -> dict[str, Any]:
        """The entry of that index in one of the document's lists.

        Raises:
            DataError: when there is none.
        """
        entries = self.json.get(kind, [])
        if not isinstance(index, int) or not 0 <= index < len(entries) or not isinstance(entries[index], dict):
            raise DataError(f"{self.name} names {kind} {str(index)[:20]} of {len(entries)}; the file is broken")
        return entries[index]

    def view(self, index: object) -> tuple[memoryview, int | None]:
        """The bytes of a buffer view, and the stride it declares."""
        view = self.item("bufferViews", index)
        buffer = memoryview(self._buffer(view["buffer"]))
        start, length = int(view.get("byteOffset", 0)), int(view["byteLength"])
        if start < 0 or length < 0 or start + length > len(buffer):
            raise DataError(f"{self.name} points beyond the end of its buffer; the file is cut short")
        return buffer[start : start + length], view.get("byteStride")

    def _buffer(self, index: object) -> bytes:
        buffer = self.item("buffers", index)
        assert isinstance(index, int)
        if index not in self._buffers:
            uri = buffer.get("uri")
            if uri is None:
                if index != 0 or self._binary is None:
                    raise DataError(f"{self.name} lacks the data of its buffer {index}; the file is cut short")
                self._buffers[index] = self._binary
            else:
                data = self.uri_bytes(uri)
                if data is None:
                    raise DataError(f"{self.name} needs {str(uri)[:80]!r}; put it into the same folder")
                self._buffers[index] = data
        return self._buffers[index]

    def uri_bytes(self, uri: str) -> bytes | None:
        """What a URI stands for: data that it holds, or a file in the document's folder; None when there is none."""
        if uri.startswith("data:"):
            head, _, body = uri.partition(",")
            return base64.b64decode(body) if head.endswith(";base64") else unquote(body).encode("latin-1")
        try:
            return self._companions.get(uri)
        except FileNotFoundError:
            return None  # and `companions` has noted it

    def accessor(self, index: object) -> np.ndarray:
        """Numbers of an accessor, (count, width) in their stored type.

        Raises:
            DataError: when they do not lie within their buffer, or are more than can be meant.
        """
        accessor = self.item("accessors", index)
        assert isinstance(index, int)
        if index not in self._accessors:
            dtype, width = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]]
            count = int(accessor["count"])
            if "bufferView" in accessor:
                values = self._strided(accessor["bufferView"], int(accessor.get("byteOffset", 0)), count, width, dtype)
            else:
                self._count_numbers(count * width)
                values = np.zeros((count, width), dtype)
            if "sparse" in accessor:
                values = self._with_sparse(values, accessor["sparse"])
            self._accessors[index] = values
        return self._accessors[index]

    def fractions(self, index: object) -> np.ndarray:
        """Numbers of an accessor as floats: integers that it calls normalised as fractions of their largest value."""
        values = self.accessor(index)
        if values.dtype.kind == "f" or not self.item("accessors", index).get("normalized"):
            return values.astype(np.float64)
        return np.maximum(values / np.iinfo(values.dtype).max, -1)

    def _strided(self, view: object, offset: int, count: int, width: int, dtype: np.dtype) -> np.ndarray:
        data, stride = self.view(view)
        row = width * dtype.itemsize
        stride = int(stride or row)
        if offset < 0 or count < 0 or stride < 1 or (count and offset + (count - 1) * stride + row > len(data)):
            raise DataError(f"{self.name} has an accessor that ends beyond its data; the file is cut short")
        if stride != row:
            self._count_numbers(count * width)
        strided = np.ndarray((count, width), dtype, buffer=data, offset=offset, strides=(stride, dtype.itemsize))
        return np.ascontiguousarray(strided)

    def _count_numbers(self, count: int) -> None:
        """Numbers that take memory without bytes of the file behind each."""
        self._numbers += count
        if count < 0 or self._numbers > 8 * MAX_VERTICES:
            raise DataError(f"{self.name} announces {self._numbers:,} numbers; decimate the mesh")

    def _with_sparse(self, values: np.ndarray, sparse: dict[str, Any]) -> np.ndarray:
        count, where, what = int(sparse["count"]), sparse["indices"], sparse["values"]
        kind = np.dtype(COMPONENTS[where["componentType"]])
        rows = self._strided(where["bufferView"], int(where.get("byteOffset", 0)), count, 1, kind)[:, 0]
        width = values.shape[1]
        new = self._strided(what["bufferView"], int(what.get("byteOffset", 0)), count, width, values.dtype)
        if count and not 0 <= rows.min() <= rows.max() < len(values):
            raise DataError(f"{self.name} has a sparse accessor that leaves its own rows; the file is broken")
        values = values.copy()
        values[rows.astype(np.int64)] = new
        return values

    def matrix(self, node: dict[str, Any]) -> np.ndarray:
        """The (4, 4) transform that a node applies to what it holds."""
        if "matrix" in node:
            return np.asarray(node["matrix"], dtype=np.float64).reshape(4, 4).T
        matrix = np.eye(4)
        x, y, z, w = np.asarray(node.get("rotation", (0, 0, 0, 1)), dtype=np.float64)
        length = math.sqrt(x * x + y * y + z * z + w * w)
        if not length > 0:
            raise DataError(f"{self.name} has a node whose rotation is no quaternion; the file is broken")
        x, y, z, w = x / length, y / length, z / length, w / length
        matrix[:3, :3] = [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
        matrix[:3, :3] *= np.asarray(node.get("scale", (1, 1, 1)), dtype=np.float64).reshape(3)
        matrix[:3, 3] = np.asarray(node.get("translation", (0, 0, 0)), dtype=np.float64).reshape(3)
        return matrix
