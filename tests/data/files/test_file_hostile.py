"""Files made to break their reader: one clear line, soon, and without taking the machine with them."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_files
from small_files import gltf_tree

from pointalign import PointCloud, load_point_cloud
from pointalign.data.files import source as limits
from pointalign.errors import DataError, PointAlignError

BROKEN = Path(__file__).parent / "broken"
SECONDS = 20


def zipped(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "/"), data)
    return stream.getvalue()


def zeros_npy(count: int) -> bytes:
    """An .npy of zeros that announces `count` points, as a stream that deflates a thousandfold."""
    stream = io.BytesIO()
    header = np.lib.format.header_data_from_array_1_0(np.zeros((1, 3))) | {"shape": (count, 3)}
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


def lying_zip() -> bytes:
    """A .npz whose array announces more than its member holds."""
    return zipped(**{"points.npy": zeros_npy(10**9) + bytes(2**20)})


def long_directory() -> bytes:
    data = bytearray(small_files.npz())
    struct.pack_into("<I", data, data.rindex(b"PK\x05\x06") + 12, 2**30)
    return bytes(data)


def entity_bomb(body: str) -> bytes:
    """A billion laughs."""
    entities = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    return f'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY l0 "ha">{entities}]>{body}'.encode()


def outside_entity() -> bytes:
    return b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY e SYSTEM "file:///etc/passwd">]><COLLADA>&e;</COLLADA>'


def components_3mf(depth: int, fan: int) -> bytes:
    """Objects made of objects: a triangle, fan to the power of depth times."""
    triangle = (
        '<object id="0"><mesh><vertices><vertex x="0" y="0" z="0"/><vertex x="1" y="0" z="0"/><vertex x="0" y="1" z="0"/>'
        '</vertices><triangles><triangle v1="0" v2="1" v3="2"/></triangles></mesh></object>'
    )
    nested = "".join(
        f'<object id="{n}"><components>{f"""<component objectid="{n - 1}"/>""" * fan}</components></object>'
        for n in range(1, depth + 1)
    )
    model = f'<model><resources>{triangle}{nested}</resources><build><item objectid="{depth}"/></build></model>'
    return small_files.threemf(model)


def circle_3mf() -> bytes:
    return small_files.threemf(
        '<model><resources><object id="1"><components><component objectid="1"/></components></object></resources>'
        '<build><item objectid="1"/></build></model>'
    )


def big_3mf() -> bytes:
    """A .3mf whose list of members says that its model unpacks to more than is read."""
    data = bytearray(small_files.threemf())
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, limits.MAX_XML_BYTES + 1)
    return bytes(data)


def modest_3mf() -> bytes:
    """A .3mf that says that its model unpacks to ten bytes; a million lie in it."""
    data = bytearray(small_files.threemf("<model>" + " " * 10**6 + "</model>"))
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 10)
    return bytes(data)


def nodes_dae(depth: int) -> bytes:
    """Nodes that each show the next one twice."""
    library = "".join(
        f'<node id="n{n}"><instance_node url="#n{n + 1}"/><instance_node url="#n{n + 1}"/></node>' for n in range(depth)
    )
    text = small_files.dae().decode()
    library += f'<node id="n{depth}"><instance_geometry url="#g"/></node>'
    text = text.replace("<library_visual_scenes>", f"<library_nodes>{library}</library_nodes><library_visual_scenes>")
    return text.replace("<translate>5 0 0</translate>", '<instance_node url="#n0"/>').encode()


def circle_dae() -> bytes:
    return small_files.dae().replace(b"<translate>5 0 0</translate>", b'<instance_node url="#n"/>')


def polygons_dae() -> bytes:
    """A polygon that says it has four billion corners."""
    return small_files.dae(faces=small_files.POLYGONS.replace(">4<", ">4000000000<"))


def deep_xml() -> bytes:
    return b"<COLLADA>" + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</COLLADA>"


def instances_glb() -> bytes:
    """A thousand times a thousand pieces."""
    tree, data = gltf_tree()
    tree["meshes"][0]["primitives"] *= 1000
    tree["nodes"] = [{"mesh": 0}] * 1000
    tree["scenes"] = [{"nodes": list(range(1000))}]
    return small_files.glb(tree, data)


def faces_glb() -> bytes:
    """Few bytes that unfold to a hundred million faces: one list of numbers, shown again and again."""
    tree, data = gltf_tree()
    indices = np.zeros(3 * 10**5, dtype="<u2").tobytes()
    tree["bufferViews"].append({"buffer": 0, "byteOffset": len(data), "byteLength": len(indices)})
    tree["accessors"][1].update(bufferView=4, count=3 * 10**5)
    tree["nodes"] = [{"mesh": 0}] * 2000
    tree["scenes"] = [{"nodes": list(range(2000))}]
    return small_files.glb(tree, data + indices)


def json_bomb() -> bytes:
    return b'{"asset": {"version": "2.0"}, "nodes": [' + b"{}," * 12_000_000 + b"{}]}"


def nested_json() -> bytes:
    return b'{"asset": {"version": "2.0"}, "nodes": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"


def picture_bomb() -> bytes:
    """A PNG of few bytes that says it has 65,000 times 65,000 pixels."""
    tree, data = gltf_tree()

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 65000, 65000, 8, 2, 0, 0, 0)
    picture = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**6)))
        + chunk(b"IEND", b"")
    )
    tree["bufferViews"][3] = {"buffer": 0, "byteOffset": len(data), "byteLength": len(picture)}
    return small_files.glb(tree, data + picture)


def program_as_picture() -> bytes:
    """PostScript, for which Pillow would start another program."""
    tree, data = gltf_tree()
    picture = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    tree["bufferViews"][3] = {"buffer": 0, "byteOffset": len(data), "byteLength": len(picture)}
    return small_files.glb(tree, data + picture)


def large_polygon_ply() -> bytes:
    head = PLY.format("binary_little_endian", 1, "element face 1\nproperty list uint int vertex_indices\n")
    return head.encode() + bytes(12) + b"\xff" * 8


def large_packed_pcd() -> bytes:
    head = PCD.format(10**8, "binary_compressed")
    return head.encode() + struct.pack("<II", 8, 12 * 10**8) + bytes(8)


def many_materials_obj() -> bytes:
    return b"v 0 0 0\n" + b"".join(b"usemtl %d\nf 1 1 1\n" % n for n in range(limits.MAX_PARTS + 10))


def endless_las() -> bytes:
    data = small_files.las()
    return data[:107] + b"\xff\xff\xff\xff" + data[111:]


PLY = "ply\nformat {} 1.0\nelement vertex {}\nproperty float x\nproperty float y\nproperty float z\n{}end_header\n"
PCD = "VERSION .7\nFIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nWIDTH {0}\nHEIGHT 1\nPOINTS {0}\nDATA {1}\n"
HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "lying.npz": (lying_zip, "ends too early: 24000000000 bytes are announced"),
    "directory.npz": (long_directory, "lists members in 1 GiB"),
    "entities.dae": (lambda: entity_bomb("<COLLADA>&l9;</COLLADA>"), "declares an XML document type"),
    "entities.3mf": (lambda: small_files.threemf(entity_bomb("<model>&l9;</model>").decode()), "declares an XML document type"),
    "outside.dae": (outside_entity, "declares an XML document type"),
    "components.3mf": (lambda: components_3mf(30, 2), "places more than 20,000 objects"),
    "wide.3mf": (lambda: components_3mf(3, 30), "places more than 20,000 objects"),
    "circle.3mf": (circle_3mf, "nests them too deep"),
    "unpacked.3mf": (big_3mf, "unpacks to more than 256 MiB"),
    "modest.3mf": (modest_3mf, "cannot read .*: Bad CRC-32|is not well-formed XML"),
    "nodes.dae": (lambda: nodes_dae(40), "its scene unfolds to more than is read"),
    "circle.dae": (circle_dae, "has a node that holds itself"),
    "polygons.dae": (polygons_dae, "announces 4,000,000,000 corners"),
    "deep.dae": (deep_xml, "nests XML deeper than 256"),
    "zip.dae": (lambda: zipped(a=small_files.dae()), "is a zip archive"),
    "instances.glb": (instances_glb, "shows more than 50,000 pieces"),
    "faces.glb": (faces_glb, "unfolds to .* faces"),
    "items.gltf": (json_bomb, "describes more than 10,000,000 things"),
    "nested.gltf": (nested_json, "cannot read"),
    "picture.glb": (picture_bomb, "too large|more than the .* that are read"),
    "vertices.ply": (lambda: PLY.format("ascii", 10**15, "").encode(), "at most 500000000 are read"),
    "binary.ply": (lambda: PLY.format("binary_little_endian", 10**8, "").encode(), "more than fit into its"),
    "faces.ply": (large_polygon_ply, "ends after 0 of 1 face"),
    "negative.ply": (lambda: PLY.format("ascii", -1, "").encode(), "announces -1 of vertex"),
    "header.ply": (lambda: b"ply\nformat ascii 1.0\n" + b"comment x\n" * 10**6, "no end of its header"),
    "points.pcd": (lambda: PCD.format(10**9, "binary").encode(), "announces 1000000000 points"),
    "packed.pcd": (large_packed_pcd, "unpacks to 1.1 GiB, more than the 512 MiB"),
    "line.xyz": (lambda: b"1 2 3 " * 2**18, "has a line of a mebibyte|is not a text of numbers"),
    "columns.txt": (lambda: b"1 " * 1000 + b"\n", "has 1000 columns; at most 256 are read"),
    "line.obj": (lambda: b"f " + b"1 " * 2**20, "has a line of a mebibyte"),
    "materials.obj": (many_materials_obj, "has more than 50,000 materials"),
    "counts.off": (lambda: b"OFF\n999999999 999999999 0\n0 0 0\n", "more than it can hold"),
    "count.stl": (lambda: bytes(80) + b"\xff\xff\xff\xff" + bytes(50), "it is cut short or no .stl"),
    "points.las": (endless_las, "announces 4294967295 points"),
    "shape.npy": (lambda: zeros_npy(10**12), "ends too early: 24000000000000 bytes are announced"),
    "header.npy": (lambda: b"\x93NUMPY\x02\x00" + struct.pack("<I", 10**9) + b"{" * 1000, "cannot read"),
}  # fmt: skip


# Other things under the name of a 3D file.
STAND_INS = {
    "pointer.glb": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "is a Git LFS pointer"),
    "page.ply": (b"<!DOCTYPE html><html><body>404</body></html>", "is a web page"),
    "packed.xyz": (gzip.compress(small_files.text()), "is packed; unpack it first"),
    "packed.ply.gz": (gzip.compress(small_files.ply_cloud()), "is packed; unpack it first"),
    "packed.obj": (bz2.compress(small_files.obj()), "is packed; unpack it first"),
    "packed.stl": (lzma.compress(small_files.stl()), "is packed; unpack it first"),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_what_is_no_3d_file_is_told_with_what_to_do(tmp_path: Path, name: str) -> None:
    data, message = STAND_INS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        load_point_cloud(tmp_path / name)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_end_in_one_line(tmp_path: Path, name: str) -> None:
    make, message = HOSTILE[name]
    (tmp_path / name).write_bytes(make())
    start = time.monotonic()
    with pytest.raises(DataError, match=message) as caught:
        load_point_cloud(tmp_path / name)
    assert time.monotonic() - start < SECONDS
    assert "\n" not in str(caught.value)


def test_a_bomb_of_zeros(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousandth of what it unpacks to; what it would unpack to is read off before."""
    data = zipped(**{"points.npy": zeros_npy(2**20) + bytes(24 * 2**20)})
    assert len(data) < 2**15
    (tmp_path / "a.npz").write_bytes(data)
    assert len(load_point_cloud(tmp_path / "a.npz", n_points=8)) == 8
    monkeypatch.setattr("pointalign.data.files.arrays.MAX_UNPACKED_BYTES", 2**20)
    with pytest.raises(DataError, match=r"points in .*a\.npz unpacks to 24.0 MiB; 1 MiB are read"):
        load_point_cloud(tmp_path / "a.npz")


def test_a_picture_that_is_a_program_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "a.glb").write_bytes(program_as_picture())
    assert any("is no PNG, JPEG" in note for note in load_point_cloud(tmp_path / "a.glb", n_points=8).notes)


def test_a_broken_laz_ends_only_the_process_that_unpacks_it(tmp_path: Path) -> None:
    """Its table of chunks announces four billion: the decompressor asks for 64 GiB and ends its process."""
    data = bytearray(small_files.las(2, laz=True))
    start = struct.unpack_from("<I", data, 96)[0]
    table = struct.unpack_from("<q", data, start)[0]
    struct.pack_into("<I", data, table + 4, 2**32 - 1)
    (tmp_path / "a.laz").write_bytes(data)
    with pytest.raises(DataError, match=r"cannot unpack .*; it is broken"):
        load_point_cloud(tmp_path / "a.laz")


def answer_of(path: Path) -> PointCloud | PointAlignError:
    """The cloud, or what is said of the file; anything else that is raised is passed on."""
    try:
        return load_point_cloud(path, n_points=16)
    except PointAlignError as error:
        return error


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("path", sorted(BROKEN.glob("*.*")), ids=lambda path: path.name)
def test_what_once_broke_the_readers(path: Path) -> None:
    answer = answer_of(path)
    if isinstance(answer, PointCloud):
        assert np.isfinite(answer.array()).all()
    else:
        assert str(answer).isprintable()


@pytest.mark.parametrize(
    "name", ["plain.xyz", "little.ply", "ascii.pcd", "square.obj", "square.glb", "square.dae", "plain.npy"]
)
def test_what_a_file_says_does_not_steer_the_terminal(tmp_path: Path, name: str) -> None:
    data = small_files.every_format()[name]
    for place in range(0, len(data), max(len(data) // 40, 1)):
        (tmp_path / name).write_bytes(data[:place] + b"\x1b[2J\x07" + data[place:])
        answer = answer_of(tmp_path / name)
        assert (" ".join(answer.notes) if isinstance(answer, PointCloud) else str(answer)).isprintable()


NAME = "\x1b[2J\ud800\nname"


def named_image(broken: bool) -> bytes:
    tree, data = gltf_tree()
    tree["images"][0]["name"] = NAME
    tree["bufferViews"][3]["byteLength"] = 5 if broken else tree["bufferViews"][3]["byteLength"] - 30
    return small_files.glb(tree, data)


def named_extension() -> bytes:
    tree, data = gltf_tree()
    return small_files.glb({**tree, "extensionsRequired": [NAME]}, data)


def named_mesh() -> bytes:
    tree, data = gltf_tree()
    return small_files.glb({**tree, "nodes": [{"mesh": NAME}]}, data)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("note.glb", named_image(broken=True)),
        ("picture.glb", named_image(broken=False)),
        ("extension.glb", named_extension()),
        ("mesh.glb", named_mesh()),
        ("members.npz", zipped(**{"\x1b[2J\n.npy": small_files.npy(), "b.npy": small_files.npy()})),
        ("line\nand\x1b[2J.ply", b"ply\n"),
        ("empty\n.ply", b""),
    ],
)
def test_what_names_say_does_not_steer_the_terminal(tmp_path: Path, name: str, data: bytes) -> None:
    """Names in JSON and in archives are quoted there, and may hold what no text file could."""
    (tmp_path / name).write_bytes(data)
    answer = answer_of(tmp_path / name)
    told = " ".join(answer.notes) if isinstance(answer, PointCloud) else str(answer)
    assert "?" in told
    assert told.isprintable()
    told.encode()
