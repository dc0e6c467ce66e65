"""One small valid file of every format, as bytes: what the readers are tested and fuzzed with."""

from __future__ import annotations

import importlib
import io
import json
import struct
import zipfile
from typing import Any

import numpy as np
from PIL import Image

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
# A square in the plane z = 0, twice as wide as high, as two triangles; the first is red, the second blue.
CORNERS = np.array([[0, 0, 0], [2, 0, 0], [2, 1, 0], [0, 1, 0]], dtype=np.float32)
FACES = np.array([[0, 1, 2], [0, 2, 3]])
CORNER_COLORS = np.array([RED, GREEN, BLUE, RED], dtype=np.uint8)


def grid(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    """A cloud: xyz (count, 3) float32 and rgb (count, 3) uint8, full range."""
    rng = np.random.default_rng(7)
    rgb = rng.integers(0, 256, (count, 3))
    rgb[0], rgb[1] = 255, 0
    return rng.random((count, 3), dtype=np.float32) * 4 - 2, rgb.astype(np.uint8)


def ply_cloud(encoding: str = "binary_little_endian", count: int = 40) -> bytes:
    """A coloured cloud as .ply."""
    xyz, rgb = grid(count)
    head = f"ply\nformat {encoding} 1.0\ncomment made for a test\nelement vertex {count}\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz")
    head += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue")) + "end_header\n"
    if encoding == "ascii":
        rows = [f"{x:.6f} {y:.6f} {z:.6f} {r} {g} {b}" for (x, y, z), (r, g, b) in zip(xyz, rgb, strict=True)]
        return (head + "\n".join(rows) + "\n").encode()
    order = "<" if "little" in encoding else ">"
    table = np.empty(count, [("xyz", order + "f4", 3), ("rgb", "u1", 3)])
    table["xyz"], table["rgb"] = xyz, rgb
    return head.encode() + table.tobytes()


def ply_mesh(encoding: str = "binary_little_endian", quads: bool = False) -> bytes:
    """The square with colours at its corners as .ply: two triangles, or a triangle and a quadrilateral."""
    faces = [[0, 1, 2], [0, 1, 2, 3]] if quads else FACES.tolist()
    head = f"ply\nformat {encoding} 1.0\nelement vertex 4\n" + "".join(f"property float {a}\n" for a in "xyz")
    head += "".join(f"property uchar {name}\n" for name in ("red", "green", "blue"))
    head += f"element face {len(faces)}\nproperty list uchar int vertex_indices\nend_header\n"
    if encoding == "ascii":
        rows = [
            " ".join(map(str, [*corner.tolist(), *color.tolist()]))
            for corner, color in zip(CORNERS, CORNER_COLORS, strict=True)
        ]
        rows += [" ".join(map(str, [len(face), *face])) for face in faces]
        return (head + "\n".join(rows) + "\n").encode()
    order = "<" if "little" in encoding else ">"
    data = b"".join(
        struct.pack(order + "3f3B", *corner.tolist(), *color.tolist())
        for corner, color in zip(CORNERS, CORNER_COLORS, strict=True)
    )
    data += b"".join(struct.pack(f"{order}B{len(face)}i", len(face), *face) for face in faces)
    return head.encode() + data


def pcd(data: str = "ascii", count: int = 40) -> bytes:
    """A coloured cloud as .pcd, its colours packed as PCL packs them."""
    xyz, rgb = grid(count)
    packed = (rgb.astype(np.uint32) << np.array([16, 8, 0], dtype=np.uint32)).sum(axis=1).astype("<u4")
    head = (
        "# .PCD v0.7 - Point Cloud Data file format\nVERSION 0.7\nFIELDS x y z rgb\nSIZE 4 4 4 4\n"
        f"TYPE F F F {'U' if data == 'ascii' else 'F'}\nCOUNT 1 1 1 1\nWIDTH {count}\nHEIGHT 1\n"
        f"VIEWPOINT 0 0 0 1 0 0 0\nPOINTS {count}\nDATA {data}\n"
    ).encode()
    if data == "ascii":
        return head + "".join(f"{x} {y} {z} {c}\n" for (x, y, z), c in zip(xyz, packed, strict=True)).encode()
    if data == "binary":
        return head + np.concatenate([xyz.astype("<f4").view("<u4"), packed[:, None]], axis=1).tobytes()
    raw = b"".join(column.tobytes() for column in (*xyz.astype("<f4").T, packed))
    squeezed = lzf(raw)
    return head + struct.pack("<II", len(squeezed), len(raw)) + squeezed


def lzf(raw: bytes) -> bytes:
    """LZF as a plain encoder writes it: repetitions of three bytes or more that were seen before, else literals."""
    out, literal, seen, at = bytearray(), bytearray(), {}, 0

    def flush() -> None:
        for start in range(0, len(literal), 32):
            piece = literal[start : start + 32]
            out.append(len(piece) - 1)
            out.extend(piece)
        literal.clear()

    while at < len(raw):
        key, before = raw[at : at + 3], seen.get(raw[at : at + 3])
        seen[key] = at
        if len(key) == 3 and before is not None and at - before <= 8192:
            length = 3
            while length < 264 and at + length < len(raw) and raw[before + length] == raw[at + length]:
                length += 1
            flush()
            distance = at - before - 1
            short = length - 2
            out.append(min(short, 7) << 5 | distance >> 8)
            out.extend([short - 7] if short >= 7 else [])
            out.append(distance & 255)
            at += length
        else:
            literal.append(raw[at])
            at += 1
    flush()
    return bytes(out)


def las(point_format: int = 2, count: int = 40, full: int = 65535, laz: bool = False, minor: int = 2) -> bytes:
    """A cloud as .las or .laz at a place far from the origin, in millimetres."""
    xyz, rgb = grid(count)
    record = {0: 20, 2: 26, 3: 34, 7: 36}[point_format]
    color = {2: 20, 3: 28, 7: 30}.get(point_format)
    rows = np.zeros((count, record), np.uint8)
    rows[:, :12] = np.round(xyz * 1000).astype("<i4").view(np.uint8)
    rows[:, 12:14] = np.arange(count, dtype="<u2")[:, None].view(np.uint8)
    if color is not None:
        rows[:, color : color + 6] = (rgb.astype(np.float64) / 255 * full).round().astype("<u2").view(np.uint8)
    size = 375 if minor >= 4 else 227
    head = bytearray(size)
    head[:4], head[24:26] = b"LASF", bytes([1, minor])
    vlr = b""
    body = rows.tobytes()
    if laz:
        lazrs = importlib.import_module("lazrs")
        description = lazrs.LazVlr.new_for_compression(point_format, 0)
        data = description.record_data()
        vlr = struct.pack("<H16sHH32s", 0, b"laszip encoded", 22204, len(data), b"") + data
        body = lazrs.compress_points(description, rows.reshape(-1), False)
        # compress_points gives the points alone; where the table of chunks lies comes first in a file.
        stream = io.BytesIO()
        stream.write(bytes(head) + vlr)
        compressor = lazrs.LasZipCompressor(stream, description)
        compressor.compress_many(rows.reshape(-1))
        compressor.done()
        body = stream.getvalue()[size + len(vlr) :]
    struct.pack_into("<HII", head, 94, size, size + len(vlr), 1 if laz else 0)
    struct.pack_into("<BHI", head, 104, point_format | (128 if laz else 0), record, count if minor < 4 else 0)
    struct.pack_into("<6d", head, 131, *[0.001] * 3, 500000.0, 4000000.0, 100.0)
    if minor >= 4:
        struct.pack_into("<Q", head, 247, count)
    return bytes(head) + vlr + body


def npy(full: bool = True) -> bytes:
    """A cloud as .npy, rgb in [0, 1]."""
    xyz, rgb = grid()
    stream = io.BytesIO()
    np.save(stream, np.concatenate([xyz, rgb / 255], axis=1).astype(np.float32) if full else xyz)
    return stream.getvalue()


def npz() -> bytes:
    """A cloud as .npz: points and colours apart, with something else beside them."""
    xyz, rgb = grid()
    stream = io.BytesIO()
    np.savez_compressed(stream, points=xyz, colors=rgb, label=np.array(3))
    return stream.getvalue()


def text(delimiter: str = " ", header: str = "") -> bytes:
    """A cloud as text, colours 0-255."""
    xyz, rgb = grid()
    rows = [delimiter.join(map(str, [*p.tolist(), *c.tolist()])) for p, c in zip(xyz, rgb, strict=True)]
    return ("\n".join([*([header] if header else []), *rows]) + "\n").encode()


def obj(materials: str = "") -> bytes:
    """The square as .obj: one face of each material, by quadrilaterals and relative numbers too."""
    library = f"mtllib {materials}\n" if materials else ""
    return (
        f"# made for a test\n{library}o square\n"
        + "".join(f"v {x} {y} {z}\n" for x, y, z in CORNERS)
        + "vt 0 0\nvt 1 0\nvt 1 1\nvt 0 1\nusemtl one\nf 1/1 2/2 3/3\nusemtl two\nf -4/-4 -2/-2 -1/-1\n"
    ).encode()


def stl(binary: bool = True) -> bytes:
    """The square as .stl."""
    if binary:
        body = b"".join(struct.pack("<12fH", 0, 0, 1, *CORNERS[face].reshape(-1).tolist(), 0) for face in FACES)
        return b"made for a test".ljust(80) + struct.pack("<I", len(FACES)) + body
    facets = "".join(
        "facet normal 0 0 1\nouter loop\n"
        + "".join(f"vertex {x} {y} {z}\n" for x, y, z in CORNERS[face].tolist())
        + "endloop\nendfacet\n"
        for face in FACES
    )
    return f"solid square\n{facets}endsolid square\n".encode()


def off(colors: bool = False) -> bytes:
    """The square as .off, or .off with colours at its corners."""
    rows = [" ".join(map(str, corner)) for corner in CORNERS.tolist()]
    if colors:
        rows = [f"{row} {r} {g} {b} 255" for row, (r, g, b) in zip(rows, CORNER_COLORS, strict=True)]
    faces = ["3 0 1 2 255 0 0", "3 0 2 3 0 0 255"] if not colors else ["4 0 1 2 3"]
    return "\n".join(["COFF" if colors else "OFF", f"4 {len(faces)} 0", *rows, *faces, ""]).encode()


def png(pixels: list[list[tuple[int, ...]]]) -> bytes:
    """A picture."""
    stream = io.BytesIO()
    Image.fromarray(np.array(pixels, dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def gltf_tree(uri: str | None = None, **material: Any) -> tuple[dict[str, Any], bytes]:
    """The square as a glTF document and its buffer; a texture of two texels, red and blue, unless a material is given."""
    uv = np.array([[0, 1], [1, 1], [1, 0], [0, 0]], dtype="<f4")
    picture = png([[RED, BLUE]])
    pieces = [CORNERS.astype("<f4").tobytes(), FACES.astype("<u2").tobytes(), uv.tobytes(), picture]
    views, data = [], b""
    for piece in pieces:
        views.append({"buffer": 0, "byteOffset": len(data), "byteLength": len(piece)})
        data += piece + b"\0" * (-len(piece) % 4)
    tree: dict[str, Any] = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0, "TEXCOORD_0": 2}, "indices": 1, "material": 0}]}],
        "materials": [material or {"pbrMetallicRoughness": {"baseColorTexture": {"index": 0}}}],
        "textures": [{"source": 0}],
        "images": [{"bufferView": 3, "mimeType": "image/png"}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 4, "type": "VEC3"},
            {"bufferView": 1, "componentType": 5123, "count": 6, "type": "SCALAR"},
            {"bufferView": 2, "componentType": 5126, "count": 4, "type": "VEC2"},
        ],
        "bufferViews": views,
        "buffers": [{"byteLength": len(data), **({"uri": uri} if uri else {})}],
    }
    return tree, data


def glb(tree: dict[str, Any] | None = None, data: bytes | None = None) -> bytes:
    """A glTF document and its buffer as .glb; the square when none is given."""
    if tree is None or data is None:
        tree, data = gltf_tree()
    head = json.dumps(tree).encode()
    head += b" " * (-len(head) % 4)
    data += b"\0" * (-len(data) % 4)
    chunks = struct.pack("<II", len(head), 0x4E4F534A) + head + struct.pack("<II", len(data), 0x004E4942) + data
    return b"glTF" + struct.pack("<II", 2, 12 + len(chunks)) + chunks


def gltf() -> bytes:
    """The square as .gltf that holds its buffer."""
    import base64

    tree, data = gltf_tree()
    tree["buffers"][0]["uri"] = "data:application/octet-stream;base64," + base64.b64encode(data).decode()
    return json.dumps(tree).encode()


MODEL_3MF = """<?xml version="1.0" encoding="UTF-8"?>
<model unit="millimeter" xmlns="http://schemas.microsoft.com/3dmanufacturing/core/2015/02"
 xmlns:m="http://schemas.microsoft.com/3dmanufacturing/material/2015/02"><resources>
<basematerials id="5"><base name="red" displaycolor="#FF0000"/><base name="blue" displaycolor="#0000FFFF"/></basematerials>
<object id="1" type="model" pid="5" pindex="0"><mesh><vertices>{vertices}</vertices>
<triangles><triangle v1="0" v2="1" v3="2"/><triangle v1="0" v2="2" v3="3" pid="5" p1="1"/></triangles></mesh></object>
<object id="2" type="model"><components><component objectid="1" transform="1 0 0 0 1 0 0 0 1 10 0 0"/></components></object>
</resources><build><item objectid="2"/></build></model>"""


def threemf(model: str | None = None) -> bytes:
    """The square as .3mf, moved by 10 along x; the first triangle red by its object, the second blue by itself."""
    vertices = "".join(f'<vertex x="{x}" y="{y}" z="{z}"/>' for x, y, z in CORNERS.tolist())
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
        archive.writestr("3D/3dmodel.model", model or MODEL_3MF.format(vertices=vertices))
    return stream.getvalue()


DAE = """<?xml version="1.0" encoding="utf-8"?>
<COLLADA xmlns="http://www.collada.org/2005/11/COLLADASchema" version="1.4.1"><asset><up_axis>{up}</up_axis></asset>
<library_effects><effect id="e"><profile_COMMON><technique sid="t"><lambert><diffuse><color>1 0 0 1</color></diffuse>
</lambert></technique></profile_COMMON></effect></library_effects>
<library_materials><material id="m"><instance_effect url="#e"/></material></library_materials>
<library_geometries><geometry id="g"><mesh><source id="p"><float_array id="pa" count="12">{corners}</float_array>
<technique_common><accessor source="#pa" count="4" stride="3"><param name="X" type="float"/><param name="Y" type="float"/>
<param name="Z" type="float"/></accessor></technique_common></source>
<vertices id="v"><input semantic="POSITION" source="#p"/></vertices>
{faces}
</mesh></geometry></library_geometries>
<library_visual_scenes><visual_scene id="S"><node id="n"><translate>5 0 0</translate><instance_geometry url="#g">
<bind_material><technique_common><instance_material symbol="s" target="#m"/></technique_common></bind_material>
</instance_geometry></node></visual_scene></library_visual_scenes><scene><instance_visual_scene url="#S"/></scene></COLLADA>
"""


INPUT = '<input semantic="VERTEX" source="#v" offset="0"/>'
TRIANGLES = f'<triangles count="2" material="s">{INPUT}<p>0 1 2 0 2 3</p></triangles>'
POLYGONS = f'<polylist count="1" material="s">{INPUT}<vcount>4</vcount><p>0 1 2 3</p></polylist>'


def dae(up: str = "Y_UP", faces: str = TRIANGLES) -> bytes:
    """The square as .dae, red, moved by 5 along x."""
    corners = " ".join(map(str, CORNERS.reshape(-1).tolist()))
    return DAE.format(up=up, corners=corners, faces=faces).encode()


def every_format() -> dict[str, bytes]:
    """A valid file for every reader and encoding, by a name whose ending is the format."""
    return {
        "little.ply": ply_cloud(),
        "big.ply": ply_cloud("binary_big_endian"),
        "ascii.ply": ply_cloud("ascii"),
        "mesh.ply": ply_mesh(),
        "quads.ply": ply_mesh(quads=True),
        "ascii_mesh.ply": ply_mesh("ascii", quads=True),
        "ascii.pcd": pcd(),
        "binary.pcd": pcd("binary"),
        "packed.pcd": pcd("binary_compressed"),
        "plain.las": las(),
        "packed.laz": las(7, laz=True, minor=4),
        "plain.npy": npy(),
        "two.npz": npz(),
        "plain.xyz": text(),
        "header.csv": text(",", "x,y,z,r,g,b"),
        "plain.txt": text("\t"),
        "counted.pts": b"40\n" + text(),
        "square.obj": obj(),
        "binary.stl": stl(),
        "ascii.stl": stl(binary=False),
        "square.off": off(),
        "colors.off": off(colors=True),
        "square.glb": glb(),
        "square.gltf": gltf(),
        "square.3mf": threemf(),
        "square.dae": dae(),
        "polygons.dae": dae(faces=POLYGONS),
    }
