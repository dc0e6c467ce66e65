"""What docs/files.md says of limits is what holds."""

from __future__ import annotations

from pathlib import Path

import pytest

from pointalign.data.files import load, pcd, source, textures

PAGE = (Path(__file__).parents[3] / "docs" / "files.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "text",
    [
        f"{source.readable(source.MAX_CLOUD_BYTES)}, {source.MAX_POINTS:,} points",
        f"{source.readable(source.MAX_MESH_BYTES)}; memory",
        source.readable(source.MAX_TEXT_MESH_BYTES),
        source.readable(source.MAX_XML_BYTES),
        f"{source.MAX_FACES:,}; {source.MAX_VERTICES:,}; {source.MAX_PARTS:,}",
        f"{textures.MAX_TEXTURE_PIXELS:,} pixels",
        f"{source.readable(source.MAX_UNPACKED_BYTES)}; {source.readable(pcd.MAX_COMPRESSED_BYTES)}",
        f"{load.FAR_AWAY} times its own size",
        f"{load.DRAWN_PER_POINT} points for each wanted one",
        f"more than {load.KEPT_PER_POINT} points for each wanted one",
    ],
)
def test_numbers(text: str) -> None:
    assert text in " ".join(PAGE.split())


@pytest.mark.parametrize("format", source.FORMATS)
def test_every_format_has_its_line(format: str) -> None:
    assert f"`.{format}`" in PAGE.split("## What is done")[0]
