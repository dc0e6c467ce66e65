"""Extra training objects: the readers of game models, the tables of names, and a build from tiny packages."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pointalign.cli import main
from pointalign.data.extra import build_descriptions, load_extra
from pointalign.data.extra_ac3d import read_ac3d
from pointalign.data.extra_build import MOST_PER_NOUN, MOST_PER_SHAPE, build_extra
from pointalign.data.extra_duplicates import nearest_held_out, shape_families
from pointalign.data.extra_homedecor import homedecor_surfaces, read_obj_groups
from pointalign.data.extra_names import HomedecorRow, Naming, _name_rules, find_name, read_homedecor
from pointalign.data.extra_pmd import read_pmd
from pointalign.data.extra_sources import FLIGHTGEAR, HOMEDECOR, ZEROAD
from pointalign.data.extra_surfaces import Surfaces, as_parts
from pointalign.data.extra_zeroad import PLAYER_COLORS, Actors
from pointalign.data.files.surface import sample_surface
from pointalign.data.household import household_classes, load_household
from pointalign.data.household_split import NEAR_DUPLICATE_DISTANCE
from pointalign.data.household_text import build_instructions, reference_caption
from pointalign.errors import DataError

INSTALLED = Path("/")
TETRAHEDRON = np.array([[0, 0, 0], [1, 0, 0], [0, 2, 0], [0, 0, 3]], dtype=np.float32)
FACES = np.array([[0, 1, 2], [0, 1, 3], [0, 2, 3], [1, 2, 3]], dtype="<u2")
QUARTER_ABOUT_Z = (0.0, 0.0, np.sqrt(0.5), np.sqrt(0.5))


# 0 A.D.'s meshes


def pmd(
    vertices: np.ndarray = TETRAHEDRON,
    faces: np.ndarray = FACES,
    bones: tuple[tuple[float, ...], ...] = (),
    points: tuple[tuple[bytes, tuple[float, ...], int], ...] = ((b"root", (0, 0, 0, 0, 0, 0, 1), 0xFF),),
    uv: tuple[float, float] = (0.25, 0.75),
) -> bytes:
    """A .pmd file, written from the layout."""
    body = struct.pack("<II", len(vertices), 1)
    for vertex in vertices:
        body += struct.pack("<3f", *vertex) + struct.pack("<3f", 0, 1, 0) + struct.pack("<2f", *uv)
        body += struct.pack("<4B4f", *[0xFF] * 4, *[0.0] * 4)
    body += struct.pack("<I", len(faces)) + faces.astype("<u2").tobytes()
    body += struct.pack("<I", len(bones)) + b"".join(struct.pack("<7f", *bone) for bone in bones)
    body += struct.pack("<I", len(points))
    for name, place, bone in points:
        body += struct.pack("<I", len(name)) + name + struct.pack("<7f", *place) + bytes([bone])
    return b"PSMD" + struct.pack("<II", 4, len(body)) + body


def test_pmd_holds_the_surface_and_the_points() -> None:
    bone = (10.0, 0.0, 0.0, *QUARTER_ABOUT_Z)
    model = read_pmd(
        pmd(bones=(bone,), points=((b"hand", (1, 2, 3, 0, 0, 0, 1), 0), (b"hand", (0,) * 7, 0xFF))), "x.pmd"
    )
    np.testing.assert_array_equal(model.vertices, TETRAHEDRON)
    np.testing.assert_array_equal(model.faces, FACES)
    np.testing.assert_array_equal(model.uv, np.tile([0.25, 0.75], (1, 4, 1)))
    # The bone turns x to y and y to -x, then moves by 10 along x; of two points of one name the first counts.
    np.testing.assert_allclose(model.points["hand"] @ [0, 0, 0, 1], [8, 1, 3, 1], atol=1e-6)
    np.testing.assert_allclose(model.points["hand"][:3, :3] @ [1, 0, 0], [0, 1, 0], atol=1e-6)


@pytest.mark.parametrize("length", [0, 3, 11, 12, 19, 40, 200, -1])
def test_pmd_cut_short(length: int) -> None:
    with pytest.raises(DataError, match=r"^cannot read x\.pmd: .*(cut short|broken)") as caught:
        read_pmd(pmd()[:length], "x.pmd")
    assert "\n" not in str(caught.value)


def test_pmd_that_lies() -> None:
    data = pmd()
    for broken, told in [
        (b"PSMX" + data[4:], "no PMD file of version 4"),
        (data[:4] + struct.pack("<I", 3) + data[8:], "no PMD file of version 4"),
        (data[:12] + struct.pack("<I", 2**31) + data[16:], "cut short"),
        (data[:16] + struct.pack("<I", 99) + data[20:], "99 texture coordinate sets"),
        (pmd(faces=np.array([[0, 1, 4]])), "a face names no vertex"),
        (pmd(vertices=np.full((4, 3), np.nan)), "not finite"),
        (pmd(points=((b"hand", (0, 0, 0, 0, 0, 0, 1), 3),)), "hangs on no bone"),
    ]:
        with pytest.raises(DataError, match=told):
            read_pmd(broken, "x.pmd")


# AC3D

MATERIALS = (
    'MATERIAL "plain one" rgb 1 0.5 0  amb 1 1 1  emis 0 0 0  spec 0 0 0  shi 10  trans 0\n'
    'MATERIAL "glass" rgb 1 1 1  amb 1 1 1  emis 0 0 0  spec 0 0 0  shi 10  trans 0.75\n'
)
SQUARE = "numvert 4\n0 0 0\n1 0 0\n1 1 0\n0 1 0\n"


def surf(kind: str = "0x20", material: int = 0, corners: str = "0 0 0\n1 1 0\n2 1 1\n3 0 1\n") -> str:
    return f"SURF {kind}\nmat {material}\nrefs {len(corners.splitlines())}\n{corners}"


def ac3d(*objects: str) -> str:
    return f"AC3Db\n{MATERIALS}OBJECT world\nkids {len(objects)}\n{''.join(objects)}"


def test_ac3d_tree_textures_and_materials() -> None:
    inner = f'OBJECT poly\nname "b"\nloc 0 0 5\n{SQUARE}numsurf 1\n{surf(material=1)}kids 0\n'
    outer = (
        f'OBJECT poly\nname "a"\ndata 9\ntwo\nlines\ntexture "a b.png"\ntexrep 2 3\ntexoff 0.5 0\nloc 10 0 0\n'
        f"rot 0 1 0 -1 0 0 0 0 1\n{SQUARE}numsurf 2\n{surf()}{surf(kind='0x22')}kids 1\n{inner}"
    )
    first, second = read_ac3d(ac3d(outer), "x.ac")
    assert (first.texture, first.rgb, first.opacity) == ("a b.png", (1.0, 0.5, 0.0), 1.0)
    assert (second.texture, second.rgb, second.opacity) == (None, (1.0, 1.0, 1.0), 0.25)
    assert first.corners.shape == (2, 3, 3)  # the line is left out
    # A quarter turn from x to y, then 10 along x.
    np.testing.assert_allclose(first.corners[0], [[10, 0, 0], [10, 1, 0], [9, 1, 0]], atol=1e-12)
    np.testing.assert_allclose(first.uv[0], [[0.5, 0], [2.5, 0], [2.5, 3]])
    np.testing.assert_allclose(second.corners[1], [[10, 0, 5], [9, 1, 5], [9, 0, 5]], atol=1e-12)


def test_ac3d_without_wakes() -> None:
    square = f"{SQUARE}numsurf 1\n{surf()}"
    foam = f'OBJECT poly\nname "Stern-Wake"\n{square}kids 1\nOBJECT poly\n{square}kids 0\n'
    hull = f'OBJECT poly\ntexture "hull.png"\n{square}kids 0\n'
    text = ac3d(foam, hull, hull.replace("hull", "WAKE-big"))
    assert [surface.texture for surface in read_ac3d(text, "x.ac", ("wake",))] == ["hull.png"]
    assert [surface.texture for surface in read_ac3d(text, "x.ac")] == [None, "hull.png", "WAKE-big.png"]


def test_ac3d_material_by_place() -> None:
    text = ac3d(f"OBJECT poly\n{SQUARE}numsurf 1\n{surf()}kids 0\n").replace("rgb 1 0.5 0", "png 0.25 0.5 0")
    assert read_ac3d(text, "x.ac")[0].rgb == (0.25, 0.5, 0.0)


GOOD = ac3d(f"OBJECT poly\n{SQUARE}numsurf 1\n{surf()}kids 0\n")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("solid x\n", "does not start with AC3D"),
        (GOOD[: GOOD.index("kids 0")], "it ends too early"),
        (GOOD.replace("1 1 0", "1 one 0"), "'1 one 0' should be 3 numbers"),
        (GOOD.replace("1 1 0", "1 nan 0"), "'1 nan 0' should be 3 numbers"),
        (GOOD.replace("numvert 4", "numvert 999999999999"), "should give a count of at most"),
        (GOOD.replace("numsurf 1", "numsurf -1"), "should give a count of at most"),
        (GOOD.replace("3 0 1", "9 0 1"), "names a vertex or material that is not there"),
        (GOOD.replace("3 0 1", "-1 0 1"), "names a vertex or material that is not there"),
        (GOOD.replace("mat 0", "mat 2"), "should give a count of at most 1"),
        (GOOD.replace("SURF 0x20", "SURF maybe"), "a SURF with flags"),
        (GOOD.replace(MATERIALS, ""), "should give a count of at most"),
        ("AC3Db\nMATERIAL\n", "should be 3 numbers"),
        ("AC3Db\n" + "OBJECT group\nkids 1\n" * 100, "nested more than 64 deep"),
        (GOOD.replace("OBJECT poly", "SURFACE poly"), "a child OBJECT should stand here"),
    ],
)
def test_ac3d_broken(text: str, told: str) -> None:
    with pytest.raises(DataError, match=told) as caught:
        read_ac3d(text, "x.ac")
    assert str(caught.value).startswith("cannot read x.ac")
    assert "\n" not in str(caught.value)


# homedecor

OBJ = "v 0 0 0\nv 1 0 0\nv 1 0 2\nv 0 3 0\nvt 0 0\nvt 1 0\nvt 1 1\ng 1\nf 1/1 2/2 3/3\ng 2\nf -4 -3 -1\ng 1\nf 1/1 2/2 4/3\n"


def test_obj_groups() -> None:
    first, second = read_obj_groups(OBJ, "x.obj")
    np.testing.assert_array_equal(first[:, 2], [[1, 0, 2, 1, 1], [0, 3, 0, 1, 1]])
    np.testing.assert_array_equal(second[0], [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 3, 0, 0, 0]])


@pytest.mark.parametrize("line", ["v 1 x 2", "f 1 2 9", "f 0 1 2", "f 1/9 2/9 3/9", "f 1 2 b"])
def test_obj_broken(line: str) -> None:
    with pytest.raises(DataError, match=r"^cannot read x\.obj, line 14: .*the file is broken$"):
        read_obj_groups(OBJ + line + "\n", "x.obj")
    with pytest.raises(DataError, match="no faces"):
        read_obj_groups("v 0 0 0\n", "x.obj")


def test_homedecor_tiles(tmp_path: Path) -> None:
    (tmp_path / "x.obj").write_text(OBJ)
    row = HomedecorRow("x", "x", "z", ("wood.png*#804020", ""), Naming("a thing", None, True))
    (only,) = homedecor_surfaces(row, tmp_path / "x.obj")
    assert (only.texture, only.rgb) == ("wood.png", (128 / 255, 64 / 255, 32 / 255))
    np.testing.assert_array_equal(only.corners[0], [[0, 0, 0], [1, 0, 0], [1, 2, 0]])  # z has become y
    with pytest.raises(DataError, match="has 2 groups, the table 1 tiles"):
        homedecor_surfaces(HomedecorRow("x", "x", "y", ("#000000",), row.naming), tmp_path / "x.obj")
    with pytest.raises(DataError, match="no mesh at"):
        homedecor_surfaces(row, tmp_path / "absent.obj")


# Colours


def test_surfaces_wear_texture_times_colour() -> None:
    corners = TETRAHEDRON[FACES].astype(np.float64)
    uv = np.zeros((4, 3, 2))
    pixels = np.full((1, 1, 4), 200, np.uint8)
    parts = as_parts(
        [Surfaces(corners, uv, "x", (1.0, 0.5, 0.0)), Surfaces(corners + 5, uv, None, (0.0, 0.0, 1.0))],
        lambda _: pixels,
    )
    points = sample_surface(parts, 400, seed=0).points
    near = points[:, :3].max(axis=1) < 4
    np.testing.assert_allclose(points[near, 3:], np.tile([200, 100, 0], (near.sum(), 1)) / 255)
    np.testing.assert_array_equal(points[~near, 3:], np.tile([0, 0, 1], ((~near).sum(), 1)))


# Names


def test_tables_name_things() -> None:
    classes = household_classes()
    for naming in [naming for *_, naming in _name_rules() if naming] + [row.naming for row in read_homedecor()]:
        assert naming.noun.startswith(("a ", "an ")), naming
        assert not naming.noun.startswith(("a a", "a e", "a i", "a o", "an b", "an c", "an d", "an s", "an t")), naming
        assert naming.label is None or naming.label in classes
    ids = Counter(row.id for row in read_homedecor())
    assert max(ids.values()) == 1
    assert {row.up for row in read_homedecor()} == {"y", "z"}


def test_later_rows_overrule_earlier_ones() -> None:
    assert find_name("0ad", "fauna/bear_brown") == Naming("a bear", "animal", False)
    assert find_name("0ad", "fauna/bear_white") == Naming("a polar bear", "animal", False)
    assert find_name("0ad", "structures/celts/house") == Naming("a thatched house", "structure", False)
    assert find_name("0ad", "structures/celts/special") is None
    assert find_name("flightgear", "Maritime/Civilian/SailBoatUnderSail") == Naming("a sailboat", "vehicle", False)
    assert find_name("flightgear", "Maritime/Civilian/SailBoatUnderPower11m") == Naming("a sailboat", "vehicle", True)
    assert find_name("0ad", "particle/smoke_light") is None
    assert find_name("flightgear", "Weather/nimbus1") is None
    assert find_name("homedecor", "fauna/bear_brown") is None


# A build from tiny packages


def dds(red: int, green: int, blue: int, alpha: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (4, 4), (red, green, blue, alpha)).save(file, "DDS")
    return file.getvalue()


def actor(mesh: str, texture: str, material: str = "default.xml", props: str = "", more: str = "") -> str:
    return (
        f"<actor><group><variant frequency='1'><mesh>{mesh}</mesh><textures><texture file='{texture}' name='baseTex'/>"
        f"</textures><props>{props}</props></variant>{more}</group><material>{material}</material></actor>"
    )


def write_zeroad(folder: Path, **replaced: str | bytes) -> Path:
    rng = np.random.default_rng(0)
    files: dict[str, str | bytes] = {
        "art/materials/default.xml": "<material/>",
        "art/materials/player.xml": "<material><define name='USE_PLAYERCOLOR' value='1'/></material>",
        "art/materials/leaves.xml": "<material><define name='USE_TRANSPARENT' value='1'/></material>",
        "art/textures/skins/fur.png.cached.dds": dds(100, 150, 200, 0),
        "art/textures/skins/saddle.png.cached.dds": dds(10, 20, 30, 255),
        "art/meshes/wolf.dae.cached.pmd": pmd(points=((b"back", (0, 10, 0, 0, 0, 0, 1), 0xFF),)),
        "art/meshes/saddle.dae.cached.pmd": pmd(vertices=TETRAHEDRON / 2),
        "art/meshes/cub.dae.cached.pmd": pmd(vertices=rng.random((4, 3), dtype=np.float32) + 0.1),
        "art/actors/fauna/wolf.xml": actor(
            "wolf.dae",
            "fur.png",
            props="<prop actor='props/saddle.xml' attachpoint='back'/><prop actor='units/rider.xml' attachpoint='back'/>"
            "<prop actor='props/saddle.xml' attachpoint='nowhere'/>",
            more="<variant name='dead'><mesh>never.dae</mesh></variant>"
            "<variant frequency='0.5'><mesh>cub.dae</mesh><textures><texture file='fur.png' name='baseTex'/></textures>"
            "</variant>",
        ),
        "art/actors/props/saddle.xml": actor("saddle.dae", "saddle.png", "player.xml"),
        "art/actors/fauna/lion.xml": actor("broken.dae", "fur.png"),
        "art/meshes/broken.dae.cached.pmd": b"PSMD",
        "art/actors/particle/smoke.xml": "<actor/>",
    }
    path = folder / ZEROAD.root
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**files, **replaced}.items():
            archive.writestr(name, content)
    return path


def test_actors_are_assembled(tmp_path: Path) -> None:
    actors = Actors(write_zeroad(tmp_path))
    assert actors.names() == ["fauna/lion", "fauna/wolf", "particle/smoke", "props/saddle"]
    assert actors.meshes("fauna/wolf") == ["wolf.dae", "cub.dae"]
    assert actors.meshes("particle/smoke") == []
    player = PLAYER_COLORS[0]
    fur, saddle = actors.surfaces("fauna/wolf", player)
    np.testing.assert_allclose(fur.corners[0], TETRAHEDRON[FACES[0]] * [-1, 1, 1])  # the game is left-handed
    np.testing.assert_allclose(saddle.corners[0], (TETRAHEDRON[FACES[0]] / 2 + [0, 10, 0]) * [-1, 1, 1], atol=1e-6)
    assert fur.texture is not None
    assert saddle.texture is not None
    assert actors.open_image(fur.texture)[0, 0].tolist() == [100, 150, 200, 255]  # alpha means nothing here
    # Where alpha is full, there is none of the player's colour.
    assert actors.open_image(saddle.texture)[0, 0].tolist() == [10, 20, 30, 255]
    assert len(actors.surfaces("fauna/wolf", player, "cub.dae")) == 1


def test_the_best_quality_counts(tmp_path: Path) -> None:
    wolf = actor("wolf.dae", "fur.png")
    inline = (
        f"<qualitylevels><actor quality='low'/><actor inline=''/>{wolf.replace('actor>', 'inline>')}</qualitylevels>"
    )
    files = {
        "art/actors/a.xml": inline,
        "art/actors/b.xml": "<qualitylevels><actor quality='low'/><actor file='a.xml'/></qualitylevels>",
        "art/actors/c.xml": "<qualitylevels><actor file='c.xml'/></qualitylevels>",
    }
    actors = Actors(write_zeroad(tmp_path, **files))
    assert [actors.meshes(name) for name in "abc"] == [["wolf.dae"], ["wolf.dae"], []]


@pytest.mark.parametrize(
    ("material", "expected"),
    [
        ("default.xml", [100, 150, 200, 255]),
        ("player.xml", [round(v * c / 255) for v, c in zip((100, 150, 200), PLAYER_COLORS[1], strict=True)] + [255]),
        ("leaves.xml", [100, 150, 200, 0]),
    ],
)
def test_what_alpha_means(tmp_path: Path, material: str, expected: list[int]) -> None:
    path = write_zeroad(tmp_path, **{"art/actors/fauna/wolf.xml": actor("wolf.dae", "fur.png", material)})
    actors = Actors(path)
    (surface,) = actors.surfaces("fauna/wolf", PLAYER_COLORS[1])
    assert surface.texture is not None
    assert actors.open_image(surface.texture)[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("replaced", "told"),
    [
        ({"art/actors/fauna/wolf.xml": "<actor>"}, "not well-formed"),
        ({"art/actors/fauna/wolf.xml": "<!DOCTYPE x><actor/>"}, "document type"),
        ({"art/actors/fauna/wolf.xml": actor("absent.dae", "fur.png")}, "lacks art/meshes/absent.dae"),
        ({"art/actors/fauna/wolf.xml": actor("wolf.dae", "absent.png")}, "lacks art/textures/skins/absent.png"),
        ({"art/actors/fauna/wolf.xml": actor("wolf.dae", "fur.png", "absent.xml")}, "lacks art/materials/absent.xml"),
        (
            {"art/actors/fauna/wolf.xml": actor("a", "b").replace("'1'", "'often'", 1)},
            "fauna/wolf.xml has 'often' for a frequency",
        ),
        (
            {
                "art/actors/fauna/wolf.xml": actor("a", "b", props="<x/>").replace(
                    "<props>", "<color>1 2 x</color><props>"
                )
            },
            "colour",
        ),
        ({"art/textures/skins/fur.png.cached.dds": b"DDS "}, r"cannot read 0 A\.D\.'s texture fur\.png"),
    ],
)
def test_broken_actors(tmp_path: Path, replaced: dict[str, str | bytes], told: str) -> None:
    actors = Actors(write_zeroad(tmp_path, **replaced))
    with pytest.raises(DataError, match=told) as caught:
        as_parts(actors.surfaces("fauna/wolf", PLAYER_COLORS[0]), actors.open_image)
    assert "\n" not in str(caught.value)


def write_flightgear(folder: Path) -> None:
    models = folder / FLIGHTGEAR.root
    (models / "Transport").mkdir(parents=True)
    (models / "Residential").mkdir()
    box = "".join(f"{x} {y} {z}\n" for x in (0, 10) for y in (0, 4) for z in (0, 3))
    sides = ["0 1 3 2", "4 5 7 6", "0 1 5 4", "2 3 7 6", "0 2 6 4", "1 3 7 5"]
    faces = "".join(surf(corners="".join(f"{i} 0.5 0.5\n" for i in side.split())) for side in sides)
    poly = f"numvert 8\n{box}numsurf 6\n{faces}kids 0\n"
    (models / "Transport" / "110Bus.ac").write_text(ac3d(f'OBJECT poly\ntexture "C:\\art\\Bus.png"\n{poly}'))
    Image.new("RGB", (2, 2), (200, 200, 200)).save(models / "Transport" / "Bus.png")
    (models / "Transport" / "Class_66.ac").write_text(ac3d(f'OBJECT poly\ntexture "absent.png"\n{poly}'))
    (models / "Residential" / "SDHouse1.ac").write_text(ac3d(f"OBJECT poly\n{SQUARE}numsurf 1\n{surf()}kids 0\n"))
    (models / "Transport" / "unnamed.ac").write_text("no model at all")


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    write_zeroad(tmp_path / "unpacked" / "0ad")
    write_flightgear(tmp_path / "unpacked" / "fg")
    return tmp_path / "unpacked"


def test_build(packages: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "extra.parquet"
    with pytest.raises(SystemExit) as caught:
        main(["data", "extra", "--source", str(packages), "--out", str(out)])
    assert caught.value.code == 0
    told, said = capsys.readouterr()
    counts = json.loads(told.splitlines()[-1])
    assert counts == {"objects": 3, "0ad-data": 2, "flightgear-data-models": 1, "left_out": 3}
    assert "minetest-mod-homedecor is not there" in said
    assert "left out 0ad-fauna-lion: cannot read art/meshes/broken.dae.cached.pmd" in said
    assert "left out flightgear-transport-class-66" in said
    assert "left out 1: flat" in said
    objects = {thing.id: thing for thing in load_extra(out)}
    assert sorted(objects) == ["0ad-fauna-wolf", "0ad-fauna-wolf.2", "flightgear-transport-110bus"]
    bus, wolf = objects["flightgear-transport-110bus"], objects["0ad-fauna-wolf"]
    assert (bus.noun, bus.label, bus.licence, bus.creator) == (
        "a bus",
        "vehicle",
        "GPL-2.0-or-later",
        FLIGHTGEAR.creator,
    )
    assert bus.size is not None
    np.testing.assert_allclose(bus.size, [10, 4, 3], atol=0.05)
    assert (wolf.size, wolf.label, wolf.licence, wolf.source) == (None, "animal", "CC-BY-SA-3.0", "0ad-data")
    assert (wolf.name, wolf.category, wolf.tags) == ("wolf", "fauna", ("fauna",))
    assert wolf.points.shape == (2048, 6)
    assert wolf.points.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(wolf.points[:, :3], axis=1).max(), 1, atol=1e-5)
    columns = pq.ParquetFile(out).schema_arrow
    assert str(columns.field("xyz").type) == "fixed_size_list<element: int16>[6144]"
    first = hashlib.sha256(out.read_bytes()).hexdigest()
    build_extra([packages], out)
    assert hashlib.sha256(out.read_bytes()).hexdigest() == first


def test_build_from_nothing(packages: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder"):
        build_extra([tmp_path / "absent"], tmp_path / "x.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="none of flightgear-data-models, minetest-mod-homedecor, 0ad-data is unpacked"):
        build_extra([tmp_path / "empty"], tmp_path / "x.parquet")
    (packages / "0ad" / ZEROAD.root).write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"cannot open .*: File is not a zip file"):
        build_extra([packages], tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()
    with pytest.raises(DataError, match=r"no extra file at .*; build it with: pointalign data extra"):
        load_extra(tmp_path / "x.parquet")


def test_descriptions_need_no_label(packages: Path, tmp_path: Path) -> None:
    build_extra([packages], tmp_path / "extra.parquet")
    bus = load_extra(tmp_path / "extra.parquet")[-1]
    assert reference_caption(bus).startswith("This is a vehicle: a bus. It is mainly ")
    unlabelled = type(bus)(**{**vars(bus), "label": None})
    items = build_descriptions([bus, unlabelled])
    assert [item["conversation_type"] for item in items] == ["simple_description"] * 6
    answers = [item["conversations"][1]["value"] for item in items]
    assert all("a vehicle" in answer and "a bus" in answer for answer in answers[:3])
    assert all(answer.startswith("This is a bus.") for answer in answers[3:])
    kinds = Counter(item["conversation_type"] for item in build_instructions([unlabelled]))
    assert kinds == {"simple_description": 3, "detailed_description": 1, "single_round": 2, "multi_round": 1}


# Near-duplicates


def test_families_and_the_held_out() -> None:
    held_out = load_household("test")
    clouds = np.stack([thing.points for thing in held_out[:6]])
    turned = clouds[0] @ np.diag([-1.0, 1, 1, 1, 1, 1])
    found = np.stack([turned, clouds[3], *(thing.points for thing in load_household("train")[:2])])
    distances, nearest = nearest_held_out(found, clouds)
    assert distances[:2].max() < 1e-6
    assert nearest[:2].tolist() == [0, 3]
    assert distances[2:].min() > 0
    ids, nouns = ["a", "b", "c", "d"], ["a thing", "a thing", "a thing", "another"]
    alike = np.stack([clouds[0], clouds[3], turned, clouds[3]])[..., :3]
    assert shape_families(ids, ["m", "n", "o", "p"], nouns, alike) == ["a", "b", "a", "d"]
    assert shape_families(ids, ["m", "n", "m", "n"], nouns, alike) == ["a", "b", "a", "b"]


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (INSTALLED / HOMEDECOR.root).is_dir():
        pytest.skip(f"the Debian package {HOMEDECOR.name} is not installed")
    source = tmp_path_factory.mktemp("installed")
    (source / HOMEDECOR.root).parent.mkdir(parents=True)
    (source / HOMEDECOR.root).symlink_to(INSTALLED / HOMEDECOR.root)
    out = tmp_path_factory.mktemp("built") / "extra.parquet"
    build_extra([source], out)
    return out


def test_the_installed_package(real: Path) -> None:
    objects = load_extra(real)
    assert {thing.source for thing in objects} == {HOMEDECOR.name}
    assert len(objects) > 100
    per_noun = Counter(thing.noun for thing in objects)
    per_shape = Counter((thing.family, thing.noun) for thing in objects)
    assert max(per_noun.values()) <= MOST_PER_NOUN
    assert max(per_shape.values()) <= MOST_PER_SHAPE
    held_out = np.stack([thing.points for thing in load_household("test")])
    distances, _ = nearest_held_out(np.stack([thing.points for thing in objects]), held_out)
    assert distances.min() > NEAR_DUPLICATE_DISTANCE
