"""The files that a mesh names beside itself, and pictures: opened within limits and never from elsewhere."""

from __future__ import annotations

import io
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

import numpy as np
from PIL import Image

from pointalign.data.files.source import MAX_MESH_BYTES, Source, readable, reason
from pointalign.errors import DataError

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TGA", "TIFF", "GIF")
# All textures of one file together; a gibibyte as RGBA.
MAX_TEXTURE_PIXELS = 2**28


class Companions:
    """Finds the files that a mesh names (materials, textures, buffers) in the mesh's own folder and nowhere else.

    What trimesh asks of a resolver is here, though not its class. A name that leads out of the folder, as exporters write it
    from the author's disk, is looked for by its last word. What is not found is noted, for trimesh goes on without it.

    Args:
        source: the mesh's file.

    Attributes:
        notes: what was asked for and not found, once each.
    """

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.path = source.path
        self.notes: list[str] = []

    def find(self, name: str) -> Path | None:
        """The file of that name in the mesh's folder or below; None when there is none."""
        if self.path is None:
            return None
        folder = self.path.parent
        plain = unquote(name.strip()).removeprefix("file://").replace("\\", "/")
        last = PureWindowsPath(plain).name
        for candidate in (plain, last, last.split()[-1] if last.split() else ""):
            if candidate and self._is_inside(folder / candidate):
                return folder / candidate
        same = [entry for entry in folder.iterdir() if last and entry.name.lower() == last.lower()]
        return same[0] if same and self._is_inside(same[0]) else None

    def _is_inside(self, candidate: Path) -> bool:
        """Whether it is a file below the mesh's folder; the folder that a link to the mesh leads to is its own too."""
        assert self.path is not None
        try:
            homes = (self.path.parent.resolve(), self.path.resolve().parent)
            real = candidate.resolve()
            return real.is_file() and any(real.is_relative_to(home) for home in homes)
        except (OSError, ValueError):
            return False

    def names_in(self, text: str) -> list[str]:
        """The files that a statement names: one, in whose name there may be blanks, or several."""
        words = text.split("#")[0].split()
        if len(words) < 2 or (self.path is not None and self._is_inside(self.path.parent / text.strip())):
            return [text]
        found = [word for word in words if self.find(word) is not None]
        return words if len(found) > 1 else [text.split("#")[0].strip()]

    def get(self, key: str) -> bytes:
        """The bytes of a file that the mesh names.

        Raises:
            FileNotFoundError: when the folder has none of that name.
            DataError: when it is larger than MAX_MESH_BYTES.
        """
        found = self.find(str(key))
        if found is None:
            self.note(f"{str(key).strip()!r} is not in the folder of {Path(self.name).name} and was not read")
            raise FileNotFoundError(key)
        if found.stat().st_size > MAX_MESH_BYTES:
            raise DataError(f"{found} is larger than the {readable(MAX_MESH_BYTES)} that are read; make it smaller")
        return found.read_bytes()

    def note(self, text: str) -> None:
        """Remember something to say, once."""
        if text not in self.notes:
            self.notes.append(text)

    def keys(self) -> list[str]:
        """Names of the files beside the mesh."""
        return [entry.name for entry in self.path.parent.iterdir()] if self.path else []


class Pictures:
    """Opens the pictures of one mesh, and keeps what they come to within MAX_TEXTURE_PIXELS.

    Args:
        where: what to call the mesh in an error.

    Attributes:
        notes: which pictures are of a kind that is not read.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self.notes: list[str] = []
        self._pixels = 0
        self._decoded: dict[str, np.ndarray | None] = {}
        self._opened: dict[int, tuple[Image.Image, np.ndarray | None]] = {}

    def decode(self, data: bytes, name: str) -> np.ndarray | None:
        """A picture from its bytes; asked for the same name again, the same array.

        Returns:
            (H, W, 4) uint8 RGBA, first row on top; None, and a note, when it is of a kind that is not read.

        Raises:
            DataError: when it is broken or too large.
        """
        if name not in self._decoded:
            try:
                image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
            except Image.DecompressionBombError as error:
                raise DataError(f"texture {name} of {self.where} is too large: {reason(error)}") from error
            except (OSError, ValueError, SyntaxError):
                self.notes.append(f"texture {name} is no {', '.join(IMAGE_FORMATS)} and was not read")
                image = None
            self._decoded[name] = None if image is None else self._pixels_of(image, name)
        return self._decoded[name]

    def opened(self, image: Image.Image, name: str) -> np.ndarray | None:
        """As `decode`, of a picture that something else has opened, and that is the same object when it is the same."""
        if id(image) not in self._opened:
            if image.format is not None and image.format not in IMAGE_FORMATS:
                self.notes.append(f"texture {name} is no {', '.join(IMAGE_FORMATS)} and was not read")
                self._opened[id(image)] = (image, None)
            else:
                self._opened[id(image)] = (image, self._pixels_of(image, name))
        return self._opened[id(image)][1]

    def _pixels_of(self, image: Image.Image, name: str) -> np.ndarray:
        self._pixels += image.width * image.height
        if self._pixels > MAX_TEXTURE_PIXELS:
            raise DataError(
                f"the textures of {self.where} have {self._pixels:,} pixels or more, more than the "
                f"{MAX_TEXTURE_PIXELS:,} that are read; make them smaller"
            )
        try:
            if image.mode.startswith(("I", "F")):  # 16 bits and more, which `convert` would clip
                wide = np.asarray(image, dtype=np.float64)
                full = 65535 if wide.max() > 255 else 255
                image = Image.fromarray((wide * (255 / full)).clip(0, 255).astype(np.uint8))
            return np.asarray(image.convert("RGBA"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"the texture {name} of {self.where} is broken: {reason(error)}; replace it") from error
