"""Models of the game 0 A.D. as its Debian package 0ad-data has them: actors, assembled from meshes, textures and props.

An actor is an XML file that picks, from groups of variants, a mesh, its textures, and other actors that hang on the
mesh's attachment points. The look taken here is the most frequent variant of each group.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image

from pointalign.data.extra_pmd import read_pmd
from pointalign.data.extra_surfaces import Surfaces
from pointalign.data.files.xml_guard import refuse_declarations
from pointalign.errors import DataError

ACTORS, MESHES, SKINS = "art/actors/", "art/meshes/", "art/textures/skins/"
MATERIALS, VARIANTS = "art/materials/", "art/variants/"
MAX_DEPTH = 4
NUMBER, COLOR = re.compile(r"\d+(\.\d+)?"), re.compile(r"\d{1,3}(\s+\d{1,3}){2}")
MAX_ENTRY_BYTES = 2**28
# The game is left-handed; seen from the front, an object keeps its right hand.
HANDEDNESS = np.diag([-1.0, 1.0, 1.0, 1.0])
# What hangs here is in flight or waits to be shot; riders and crews stand spread-armed in rest pose.
EMPTY_POINTS = {"projectile", "ammo", "garrisoned"}
EMPTY_ACTORS = ("units/", "particle/", "props/units/blood", "props/special/common/")
NO_SURFACE = {"player_water.xml", "waterfall.xml", "aura.xml"}
# Colours of players 1 to 8. Source: simulation/data/settings/player_defaults.json of 0 A.D. 0.0.26.
PLAYER_COLORS = (
    (21, 55, 149),
    (150, 20, 20),
    (86, 180, 31),
    (231, 200, 5),
    (50, 170, 170),
    (160, 80, 200),
    (220, 115, 16),
    (64, 64, 64),
)


@dataclass
class Look:
    """What an actor shows: a mesh, its base texture, its material's file, its object colour, and its props."""

    mesh: str | None = None
    texture: str | None = None
    material: str = "default.xml"
    color: tuple[int, int, int] = (255, 255, 255)
    props: dict[str, list[str]] = field(default_factory=dict)


class Actors:
    """The actors in public.zip of 0 A.D."""

    def __init__(self, path: Path) -> None:
        try:
            self.archive = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"cannot open {path}: {error}; unpack the Debian package 0ad-data again") from error
        self.files = set(self.archive.namelist())
        self._read_mesh = cache(lambda name: read_pmd(self._bytes(name), name))
        self._open_skin = lru_cache(16)(self._skin)

    def names(self) -> list[str]:
        """All actors, as paths below art/actors without .xml, in alphabetical order."""
        return sorted(n[len(ACTORS) : -4] for n in self.files if n.startswith(ACTORS) and n.endswith(".xml"))

    def meshes(self, actor: str) -> list[str]:
        """The meshes that an actor can wear, its usual one first; empty when it has none.

        Raises:
            DataError: when its XML is missing or broken.
        """
        usual = self.look(actor).mesh
        if usual is None:
            return []
        worn = [usual]
        for variants in self._groups(self._actor_element(f"{ACTORS}{actor}.xml")):
            worn += [mesh for v in variants if _frequency(v) > 0 and (mesh := self._mesh_of(v))]
        return list(dict.fromkeys(worn))

    def look(self, actor: str, mesh: str | None = None) -> Look:
        """What an actor shows when nothing happens to it.

        Args:
            actor: one of `names()`.
            mesh: one of `meshes(actor)`; the usual one when None.

        Raises:
            DataError: when its XML is missing or broken.
        """
        root = self._actor_element(f"{ACTORS}{actor}.xml")
        look = Look()
        for variants in self._groups(root):
            wanted = [v for v in variants if mesh is not None and _frequency(v) > 0 and self._mesh_of(v) == mesh]
            self._apply(wanted[0] if wanted else self._usual(variants, actor), look, depth=0)
        look.material = (root.findtext("material") or look.material).strip()
        return look

    def surfaces(self, actor: str, player: tuple[int, int, int], mesh: str | None = None) -> list[Surfaces]:
        """An actor's surfaces with those of its props, in right-handed axes; empty when it shows none.

        Args:
            actor: one of `names()`.
            player: the colour, each in [0, 255], of what the game paints in its owner's colour.
            mesh: one of `meshes(actor)`; the usual one when None.

        Raises:
            DataError: when a file that it names is missing or broken.
        """
        found: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
        for texture, corners, uv in self._parts(self.look(actor, mesh), player, HANDEDNESS, depth=0):
            lists = found.setdefault(texture, ([], []))
            lists[0].append(corners)
            lists[1].append(uv)
        return [Surfaces(np.concatenate(c), np.concatenate(u), texture) for texture, (c, u) in found.items()]

    def open_image(self, texture: str) -> np.ndarray:
        """The image of a `Surfaces.texture`, (H, W, 4) uint8: a skin, its alpha taken for opacity, for a tint, or left out.

        Raises:
            DataError: when it is missing or broken.
        """
        name, use, tint = texture.split("|")
        return self._open_skin(name, use, tint)

    def _parts(
        self, look: Look, player: tuple[int, int, int], matrix: np.ndarray, depth: int
    ) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        if look.mesh is None or look.material in NO_SURFACE:
            return
        model = self._read_mesh(f"{MESHES}{look.mesh}.cached.pmd")
        if look.texture is not None and len(model.faces):
            vertices = model.vertices @ matrix[:3, :3].T + matrix[:3, 3]
            use, tint = self._alpha_use(look.material), ""
            if use == "tint":
                tint = "#{:02x}{:02x}{:02x}".format(*(player if self._is_player(look.material) else look.color))
            yield f"{look.texture}|{use}|{tint}", vertices[model.faces], model.uv[0][model.faces]
        if depth < MAX_DEPTH:
            for point, props in look.props.items():
                if point in EMPTY_POINTS or point not in model.points:
                    continue
                for prop in props:
                    if not prop.startswith(EMPTY_ACTORS):
                        yield from self._parts(self.look(prop), player, matrix @ model.points[point], depth + 1)

    def _groups(self, actor: ElementTree.Element) -> Iterator[list[ElementTree.Element]]:
        """The variants of each group that has any; those with a maxquality are for weaker machines."""
        for group in actor.iter("group"):
            if variants := [v for v in group.findall("variant") if "maxquality" not in v.attrib]:
                yield variants

    def _usual(self, variants: list[ElementTree.Element], actor: str) -> ElementTree.Element:
        """The most frequent variant: of several the first, but where all of them bring a texture, one by a hash."""
        most = max(_frequency(variant) for variant in variants)
        usual = [variant for variant in variants if _frequency(variant) == most]
        if all(self._brought(variant).texture for variant in usual):
            return usual[hashlib.sha256(actor.encode()).digest()[0] % len(usual)]
        return usual[0]

    def _mesh_of(self, variant: ElementTree.Element) -> str | None:
        return self._brought(variant).mesh

    def _brought(self, variant: ElementTree.Element) -> Look:
        look = Look()
        self._apply(variant, look, depth=0)
        return look

    def _apply(self, variant: ElementTree.Element, look: Look, depth: int) -> None:
        """Let a variant overrule what the look has so far; a file that it names comes first."""
        if variant.get("file") and depth < MAX_DEPTH:
            self._apply(self._xml(VARIANTS + variant.get("file", "")), look, depth + 1)
        look.mesh = (variant.findtext("mesh") or look.mesh or "").strip() or None
        for texture in variant.iterfind("textures/texture"):
            if texture.get("name") == "baseTex":
                look.texture = texture.get("file")
        if color := variant.findtext("color"):
            red, green, blue = (int(word) for word in color.split())
            look.color = (red, green, blue)
        own: dict[str, list[str]] = {}
        for prop in variant.iterfind("props/prop"):
            own.setdefault(prop.get("attachpoint", ""), []).append(prop.get("actor") or "")
        for point, actors in own.items():
            look.props[point] = [actor.removesuffix(".xml") for actor in actors if actor]

    def _actor_element(self, name: str, depth: int = 0) -> ElementTree.Element:
        """The actor in a file; of several qualities the best, which stands last."""
        root = self._xml(name)
        qualities = root.findall("actor") if root.tag == "qualitylevels" else []
        if not qualities:
            return root
        best = qualities[-1]
        if best.get("file") and depth < MAX_DEPTH:
            return self._actor_element(ACTORS + best.get("file", ""), depth + 1)
        inline = root.find("inline")
        return inline if "inline" in best.attrib and inline is not None else best

    def _xml(self, name: str) -> ElementTree.Element:
        data = self._bytes(name)
        refuse_declarations(io.BytesIO(data), name)
        root = ElementTree.fromstring(data)
        numbers = [(variant.get("frequency") or "0").strip() for variant in root.iter("variant")]
        colors = [(color.text or "").strip() for color in root.iter("color")]
        wrong = [n for n in numbers if not NUMBER.fullmatch(n)] + [c for c in colors if not COLOR.fullmatch(c)]
        if wrong:
            raise DataError(f"{name} has {wrong[0]!r} for a frequency or a colour; unpack 0ad-data again")
        return root

    def _bytes(self, name: str) -> bytes:
        try:
            if self.archive.getinfo(name).file_size > MAX_ENTRY_BYTES:
                raise DataError(f"{name} unpacks to more than {MAX_ENTRY_BYTES:,} bytes; unpack 0ad-data again")
            return self.archive.read(name)
        except (KeyError, zipfile.BadZipFile, zlib.error, OSError, RuntimeError) as error:
            raise DataError(f"0 A.D.'s archive lacks {name} or has it broken; unpack 0ad-data again") from error

    def _is_player(self, material: str) -> bool:
        return self._defines(material).get("USE_PLAYERCOLOR") == "1"

    def _alpha_use(self, material: str) -> str:
        """What a material takes a texture's alpha for: "tint", "opacity" or "" (nothing)."""
        defines = self._defines(material)
        if "1" in (defines.get("USE_PLAYERCOLOR"), defines.get("USE_OBJECTCOLOR")):
            return "tint"
        return "opacity" if defines.get("USE_TRANSPARENT") == "1" else ""

    def _defines(self, material: str) -> dict[str, str]:
        root = self._xml(MATERIALS + material)
        return {d.get("name", ""): d.get("value", "") for d in root.iter("define")}

    def _skin(self, name: str, use: str, tint: str) -> np.ndarray:
        try:
            image = Image.open(io.BytesIO(self._bytes(f"{SKINS}{name}.cached.dds")), formats=["DDS"])
            pixels = np.array(image.convert("RGBA"))
        except (OSError, ValueError, SyntaxError, NotImplementedError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read 0 A.D.'s texture {name}: {error}; unpack 0ad-data again") from error
        if use == "tint":
            # The less alpha, the more of the colour. Source: the game's shader, shaders/glsl/model_common.fs.
            color = np.array([int(tint[k : k + 2], 16) for k in (1, 3, 5)]) / 255
            alpha = pixels[..., 3:] / 255
            pixels[..., :3] = (pixels[..., :3] * (color * (1 - alpha) + alpha)).round()
        if use != "opacity":
            pixels[..., 3] = 255
        return pixels


def _frequency(variant: ElementTree.Element) -> float:
    return float(variant.get("frequency") or 0)
