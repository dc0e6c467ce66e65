"""Verbs that make and check data sets: data check, pack, household, extra."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro


@dataclass
class CheckData:
    """Tell what of the field's data a folder holds and lacks, file by file; exit status 1 when something is missing."""

    folder: tyro.conf.Positional[Path]
    """Root of the layout, see docs/data.md."""
    clouds: str | None = None
    """Folder or address of the clouds, when they lie elsewhere."""
    list: Path | None = None
    """File for the names of all objects without cloud."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.check import check_data

        return check_data(self.folder, self.clouds, self.list)


@dataclass
class PackData:
    """Pack a folder of 660K small .npy clouds into Parquet shards for data.source; run again, it goes on."""

    folder: tyro.conf.Positional[Path]
    """Folder of {object_id}_8192.npy files."""
    out: Path
    """Folder for the shards."""
    skip_broken: bool = False
    """Leave broken files out; else they are named, and the packing ends without the index that training needs."""
    readers: int = 8
    """Files that are read at once."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.pack import pack_clouds

        return pack_clouds(self.folder, self.out, self.skip_broken, self.readers)


@dataclass
class BuildHousehold:
    """Build the bundled data set from the models of the Debian package sweethome3d-furniture."""

    source: Path
    """Folder with the package's .sh3f files."""
    out: Path
    """Parquet file to write."""
    notice: Path | None = None
    """NOTICE file whose list of objects is rewritten."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.household_build import build_household

        return build_household(source=self.source, out=self.out, notice=self.notice)


@dataclass
class BuildExtra:
    """Build a file of extra training objects from models of free games: docs/extra_data.md tells which packages."""

    source: list[Path]
    """Folders that the Debian packages were unpacked into; packages that are absent are told and left out."""
    out: Path
    """Parquet file to write."""

    def run(self) -> dict[str, Any]:
        from pointalign.data.extra_build import build_extra

        return build_extra(sources=self.source, out=self.out)
