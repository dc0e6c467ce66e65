"""Writes the example files beside it: `python examples/build.py`. They are the same bytes every time.

The chair is made here, of boxes. The other two are objects of the bundled data set that no model was trained on, CC0,
stored in formats that scanners and scripts write.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import trimesh
from trimesh.visual.material import PBRMaterial

from pointalign import load_household

WOOD, CUSHION = (150, 98, 54, 255), (176, 42, 48, 255)
# glTF has linear light in its materials. Source: glTF 2.0 specification, section 3.9.2; IEC 61966-2-1, approximated.
GAMMA = 2.2
# Centre and size of each box in metres, y up, and its colour.
CHAIR = (
    *(((x, 0.22, z), (0.04, 0.44, 0.04), WOOD) for x in (-0.2, 0.2) for z in (-0.2, 0.2)),
    ((0.0, 0.45, 0.0), (0.46, 0.03, 0.46), WOOD),
    ((0.0, 0.49, 0.01), (0.42, 0.05, 0.42), CUSHION),
    *(((x, 0.71, -0.21), (0.04, 0.52, 0.04), WOOD) for x in (-0.2, 0.2)),
    *(((0.0, y, -0.21), (0.38, 0.07, 0.02), WOOD) for y in (0.66, 0.79, 0.92)),
)


def chair() -> bytes:
    """A chair as a glTF scene, one material per box."""
    scene = trimesh.Scene()
    for center, size, color in CHAIR:
        box = trimesh.creation.box(size, trimesh.transformations.translation_matrix(center))
        linear = [*(round(255 * (value / 255) ** GAMMA) for value in color[:3]), color[3]]
        material = PBRMaterial(baseColorFactor=linear, metallicFactor=0.0, roughnessFactor=0.9)
        box.visual = trimesh.visual.TextureVisuals(material=material)
        scene.add_geometry(box)
    data = scene.export(file_type="glb")
    assert isinstance(data, bytes)
    return data


def ply(points: np.ndarray) -> bytes:
    """A coloured cloud (N, 6) as binary PLY with colours of one byte."""
    kinds = [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")]
    rows = np.empty(len(points), kinds)
    for column, (name, kind) in enumerate(kinds):
        values = points[:, column]
        rows[name] = values if kind == "<f4" else (values * 255).round()
    words = {"<f4": "float", "u1": "uchar"}
    properties = "".join(f"property {words[kind]} {name}\n" for name, kind in kinds)
    return (
        f"ply\nformat binary_little_endian 1.0\nelement vertex {len(rows)}\n{properties}end_header\n".encode()
        + rows.tobytes()
    )


def xyz(points: np.ndarray) -> bytes:
    """A coloured cloud (N, 6) as text: x y z, and red green blue from 0 to 255."""
    lines = (
        f"{x:.4f} {y:.4f} {z:.4f} {r:.0f} {g:.0f} {b:.0f}" for x, y, z, r, g, b in points * [1, 1, 1, 255, 255, 255]
    )
    return ("\n".join(lines) + "\n").encode()


def build(folder: Path) -> None:
    """Write all files."""
    things = {thing.id: thing.points for thing in load_household("test")}
    (folder / "chair.glb").write_bytes(chair())
    (folder / "oak_table.ply").write_bytes(ply(things["blend-swap-cc-0-oaktable"]))
    (folder / "potted_plant.xyz").write_bytes(xyz(things["blend-swap-cc-0-plant"]))
    (folder / "labels.txt").write_text("chair\ntable\nplant\nlamp\nbottle\n", encoding="utf-8")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
