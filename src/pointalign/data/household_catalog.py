"""The catalogues of the Debian package sweethome3d-furniture: which models there are, whose, and under which licence."""

from __future__ import annotations

import re
import textwrap
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pointalign.errors import DataError

PACKAGE_HELP = (
    "install the Debian package sweethome3d-furniture, or unpack it: apt-get download sweethome3d-furniture && "
    "dpkg -x sweethome3d-furniture_*.deb DIR, then give DIR/usr/share/sweethome3d/furniture"
)
CATALOG_FILE = "PluginFurnitureCatalog.properties"
NOTICE_MARK = "Bundled data: household"
NOTICE_HEAD = """{mark}
-----------------------

src/pointalign/assets/household.parquet holds {count} objects from the five collections of the Debian package
sweethome3d-furniture 1.8-1 (http://www.sweethome3d.com/importModels.jsp). They were changed: each 3D model was turned
and scaled to its catalogue's size, its surface was sampled into 2,048 coloured points, and these were normalised and
rounded; names are the catalogue's. Each object's creator and licence are also in the file itself.
"""


@dataclass(frozen=True)
class Collection:
    """One catalogue of the package: its file, what it is called, who made it and under which licence."""

    file: str
    name: str
    licence: str
    licence_url: str
    copyright: str


COLLECTIONS = (
    Collection(
        "BlendSwap-CC-0.sh3f",
        "BlendSwap-CC-0",
        "CC0-1.0",
        "https://creativecommons.org/publicdomain/zero/1.0/",
        "2014 Emmanuel Puybaret / eTeks and the Blend Swap contributors",
    ),
    Collection(
        "BlendSwap-CC-BY.sh3f",
        "BlendSwap-CC-BY",
        "CC-BY-3.0",
        "https://creativecommons.org/licenses/by/3.0/",
        "the Blend Swap contributors",
    ),
    Collection(
        "KatorLegaz.sh3f",
        "KatorLegaz",
        "CC-BY-3.0-US",
        "https://creativecommons.org/licenses/by/3.0/us/",
        "2003-2008 Andrew Kator & Jennifer Legaz",
    ),
    Collection(
        "Reallusion.sh3f",
        "Reallusion",
        "CC-BY-3.0-US",
        "https://creativecommons.org/licenses/by/3.0/us/",
        "2008-2011 Reallusion, http://www.reallusion.com",
    ),
    Collection(
        "Scopia.sh3f",
        "Scopia",
        "CC-BY-3.0",
        "https://creativecommons.org/licenses/by/3.0/",
        "2010-2012 Scopia Visual Interfaces Systems, s.l., http://www.scopia.es",
    ),
)


@dataclass(frozen=True)
class CatalogEntry:
    """What a catalogue says of one model; `size_cm` is width, height, depth: the extents along x, y, z."""

    id: str
    name: str
    category: str
    tags: tuple[str, ...]
    creator: str
    collection: Collection
    size_cm: tuple[float, float, float]
    model: str
    rotation: np.ndarray


def read_catalogs(source: str | Path) -> list[CatalogEntry]:
    """All models that the catalogues in a folder list, ordered by id.

    Raises:
        DataError: when the folder or all its .sh3f files are missing, or one cannot be read.
    """
    source = Path(source)
    if not source.is_dir():
        raise DataError(f"no folder {source}; {PACKAGE_HELP}")
    absent = [c.file for c in COLLECTIONS if not (source / c.file).is_file()]
    if absent:
        raise DataError(f"{source} lacks {', '.join(absent)}; {PACKAGE_HELP}")
    entries: list[CatalogEntry] = []
    for collection in COLLECTIONS:
        with open_archive(source / collection.file) as archive:
            try:
                text = archive.read(CATALOG_FILE).decode("latin-1")
            except KeyError:
                raise DataError(f"{source / collection.file} holds no {CATALOG_FILE}; {PACKAGE_HELP}") from None
            entries += _parse_catalog(text, collection)
    return sorted(entries, key=lambda entry: entry.id)


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a .sh3f file.

    Raises:
        DataError: when it is missing or no zip archive.
    """
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"cannot open {path}: {error}; {PACKAGE_HELP}") from error


def parse_properties(text: str) -> dict[str, str]:
    """Keys and values of a Java .properties text (continued lines, escapes, `=` or `:`).

    Source: java.util.Properties.load, Java SE documentation.
    """
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\\r?\n[ \t]*", r"\1", text)
    found = {}
    for line in text.splitlines():
        match = re.match(r"\s*([^#!\s=:](?:\\.|[^=:\s\\])*)\s*[=:]?\s*(.*)", line)
        if match:
            found[_unescape(match[1])] = _unescape(match[2]).strip()
    return found


def _unescape(text: str) -> str:
    text = re.sub(r"\\u([0-9a-fA-F]{4})", lambda m: chr(int(m[1], 16)), text)
    return re.sub(r"\\(.)", r"\1", text)


def _parse_catalog(text: str, collection: Collection) -> list[CatalogEntry]:
    rows: defaultdict[int, dict[str, str]] = defaultdict(dict)
    for key, value in parse_properties(text).items():
        field, _, number = key.partition("#")
        if number.isdigit():
            rows[int(number)][field] = value
    entries = []
    for number, row in sorted(rows.items()):
        try:
            rotation = np.array(
                [float(v) for v in row["modelRotation"].split()] if "modelRotation" in row else np.eye(3)
            )
            entries.append(
                CatalogEntry(
                    id=re.sub(r"[^a-z0-9]+", "-", row["id"].lower()).strip("-"),
                    name=row["name"],
                    category=row["category"],
                    tags=tuple(t.strip() for t in row.get("tags", "").split(",") if t.strip()),
                    creator=row["creator"],
                    collection=collection,
                    size_cm=(float(row["width"]), float(row["height"]), float(row["depth"])),
                    model=row["model"].lstrip("/"),
                    rotation=np.array(rotation).reshape(3, 3),
                )
            )
        except (KeyError, ValueError) as error:
            where = f"{collection.file}, model {number}"
            raise DataError(f"{where}: the catalogue lacks or garbles {error}; {PACKAGE_HELP}") from error
    return entries


def notice_text(entries: Sequence[CatalogEntry]) -> str:
    """The attribution of every object, by collection and creator."""
    parts = [NOTICE_HEAD.format(mark=NOTICE_MARK, count=len(entries))]
    for collection in COLLECTIONS:
        mine = [e for e in entries if e.collection is collection]
        title = f"{collection.name}: {len(mine)} objects, {collection.licence}"
        parts.append(f"\n{title}\n{collection.licence_url}\nCopyright {collection.copyright}\n")
        for creator in sorted({e.creator for e in mine}, key=str.lower):
            listed = ", ".join(f"{e.name} [{e.id}]" for e in mine if e.creator == creator)
            line = f"by {creator}: {listed}"
            parts.append(
                textwrap.fill(line, 118, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False)
            )
            parts.append("\n")
    return "".join(parts)
