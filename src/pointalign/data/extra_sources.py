"""The three Debian packages that the extra models come from, and the models that they offer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from pointalign.data.extra_ac3d import read_ac3d
from pointalign.data.extra_homedecor import homedecor_surfaces
from pointalign.data.extra_names import Naming, find_name, read_homedecor
from pointalign.data.extra_surfaces import as_parts
from pointalign.data.extra_zeroad import PLAYER_COLORS, Actors
from pointalign.data.files.surface import Part
from pointalign.errors import DataError

# Ships drag flat pictures of foam behind them, longer than they are themselves.
WAKES = ("wake", "sillage")
IMAGE_FORMATS = ("PNG", "JPEG", "SGI", "DDS")


@dataclass(frozen=True)
class Package:
    """A Debian package: its name and version, where it keeps its models, whose they are and under which licence."""

    name: str
    version: str
    root: str
    creator: str
    licence: str
    licence_url: str


ZEROAD = Package(
    "0ad-data",
    "0.0.26-1",
    "usr/share/games/0ad/mods/public/public.zip",
    "Wildfire Games",
    "CC-BY-SA-3.0",
    "https://creativecommons.org/licenses/by-sa/3.0/",
)
FLIGHTGEAR = Package(
    "flightgear-data-models",
    "1:2020.3.16+dfsg-1",
    "usr/share/games/flightgear/Models",
    "the FlightGear team",
    "GPL-2.0-or-later",
    "https://www.gnu.org/licenses/old-licenses/gpl-2.0.html",
)
HOMEDECOR = Package(
    "minetest-mod-homedecor",
    "20210327.1-2",
    "usr/share/games/minetest/mods/homedecor",
    "Vanessa Ezekowitz",
    "CC-BY-SA-4.0",
    "https://creativecommons.org/licenses/by-sa/4.0/",
)
PACKAGES = (FLIGHTGEAR, HOMEDECOR, ZEROAD)


@dataclass(frozen=True)
class Candidate:
    """A model that a package offers and the tables name.

    Attributes:
        id: source and path in lower case, for instance "0ad-fauna-wolf".
        path: where the package has it.
        naming: what it is.
        package: where it comes from.
        mesh: what it shares with the models of the same shape.
        load: reads it, y up.
    """

    id: str
    path: str
    naming: Naming
    package: Package
    mesh: str
    load: Callable[[], list[Part]]


def find_packages(sources: Iterable[Path]) -> dict[Package, Path]:
    """Where the packages' models lie, for those that are unpacked in one of the folders or in a folder within it.

    Raises:
        DataError: when a folder is missing, or none holds any of the packages.
    """
    found: dict[Package, Path] = {}
    for source in sources:
        if not source.is_dir():
            raise DataError(f"no folder {source}; give the folder that the packages were unpacked into")
        for folder in [source, *sorted(path for path in source.iterdir() if path.is_dir())]:
            for package in PACKAGES:
                if os.path.exists(folder / package.root):  # which is False, too, where one may not look
                    found.setdefault(package, folder / package.root)
    if not found:
        names = ", ".join(package.name for package in PACKAGES)
        raise DataError(f"none of {names} is unpacked there; see docs/extra_data.md on how to get them")
    return found


def list_candidates(package: Package, root: Path) -> list[Candidate]:
    """The models of a package that the tables name, ordered by id.

    Raises:
        DataError: when the package's list of models cannot be read.
    """
    listing = {ZEROAD: _zeroad, FLIGHTGEAR: _flightgear, HOMEDECOR: _homedecor}[package]
    return sorted(listing(root), key=lambda candidate: candidate.id)


def _zeroad(root: Path) -> Iterator[Candidate]:
    actors = Actors(root)
    for name in actors.names():
        naming = find_name("0ad", name)
        if naming is None:
            continue
        for number, mesh in enumerate(actors.meshes(name)):
            object_id = f"0ad-{_slug(name)}" + (f".{number + 1}" if number else "")
            yield Candidate(object_id, name, naming, ZEROAD, mesh, _zeroad_loader(actors, object_id, name, mesh))


def _zeroad_loader(actors: Actors, object_id: str, actor: str, mesh: str) -> Callable[[], list[Part]]:
    player = PLAYER_COLORS[hashlib.sha256(object_id.encode()).digest()[0] % len(PLAYER_COLORS)]
    return lambda: as_parts(actors.surfaces(actor, player, mesh), actors.open_image)


def _flightgear(root: Path) -> Iterator[Candidate]:
    for file in sorted(root.rglob("*.ac")):
        path = file.relative_to(root).with_suffix("").as_posix()
        if naming := find_name("flightgear", path):
            yield Candidate(f"flightgear-{_slug(path)}", path, naming, FLIGHTGEAR, path, _ac3d_loader(file))


def _ac3d_loader(file: Path) -> Callable[[], list[Part]]:
    def open_texture(name: str) -> np.ndarray:
        path = PurePosixPath(name.replace("\\", "/"))
        for place in (file.parent / path, file.parent / path.name):
            if place.is_file():
                return open_image(place)
        raise DataError(f"{file} names the texture {name}, which is not beside it; add it or leave the model out")

    return lambda: as_parts(read_ac3d(file.read_text(encoding="latin-1"), str(file), WAKES), open_texture)


def _homedecor(root: Path) -> Iterator[Candidate]:
    meshes = {path.stem: path for path in sorted(root.rglob("*.obj"))}
    images = {path.name: path for path in sorted(root.rglob("*.png"))}

    def open_tile(name: str) -> np.ndarray:
        if name not in images:
            raise DataError(f"{root} holds no texture {name}; unpack the Debian package minetest-mod-homedecor again")
        return open_image(images[name])

    for row in read_homedecor():
        file = meshes.get(row.mesh, root / f"{row.mesh}.obj")

        def load(row=row, file=file) -> list[Part]:
            return as_parts(homedecor_surfaces(row, file), open_tile)

        yield Candidate(f"homedecor-{_slug(row.id)}", row.id, row.naming, HOMEDECOR, row.mesh, load)


@lru_cache(16)
def open_image(path: Path) -> np.ndarray:
    """An image file as (H, W, 4) uint8 RGBA, first row on top.

    Raises:
        DataError: when it cannot be read.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            return np.array(image.convert("RGBA"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path}: {error}; save it as a .png") from error


def _slug(path: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in path.lower())
