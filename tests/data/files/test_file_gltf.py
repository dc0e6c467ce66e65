"""glTF: colours as the specification multiplies them, transforms, skins, and numbers in every storage."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_files
from small_files import BLUE, CORNERS, RED, glb, gltf_tree, png

from pointalign import PointCloud, load_point_cloud
from pointalign.data.files.surface import to_linear, to_srgb
from pointalign.errors import DataError


def load(folder: Path, tree: dict[str, Any], data: bytes, count: int = 60) -> PointCloud:
    (folder / "a.glb").write_bytes(glb(tree, data))
    return load_point_cloud(folder / "a.glb", n_points=count)


def grown(
    tree: dict[str, Any], data: bytes, values: np.ndarray, component: int, kind: str, **more: Any
) -> tuple[int, bytes]:
    """The number of a new accessor with these values, and the buffer with them behind."""
    data += b"\0" * (-len(data) % 4)
    raw = values.tobytes()
    tree["bufferViews"].append({"buffer": 0, "byteOffset": len(data), "byteLength": len(raw)})
    view = len(tree["bufferViews"]) - 1
    tree["accessors"].append(
        {"bufferView": view, "componentType": component, "count": len(values), "type": kind, **more}
    )
    tree["buffers"][0]["byteLength"] = len(data) + len(raw)
    return len(tree["accessors"]) - 1, data + raw


def all_alike(cloud: PointCloud, rgb: tuple[float, ...]) -> None:
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, np.tile(rgb, (len(cloud), 1)), atol=1e-5)


def test_texture(tmp_path: Path) -> None:
    cloud = load(tmp_path, *gltf_tree())
    np.testing.assert_array_equal(cloud.colors, np.where(cloud.points[:, :1] < 1, [1, 0, 0], [0, 0, 1]))


def test_curves() -> None:
    assert to_srgb(np.array([0.0, 0.5, 1.0, 2.0])) == pytest.approx([0, 0.735357, 1, 1], abs=1e-6)
    np.testing.assert_allclose(to_linear(to_srgb(np.linspace(0, 1, 99))), np.linspace(0, 1, 99), atol=1e-12)


def test_factors_are_linear_light(tmp_path: Path) -> None:
    tree, data = gltf_tree(pbrMetallicRoughness={"baseColorFactor": [0.5, 0.0, 1.0, 1.0]})
    all_alike(load(tmp_path, tree, data), (0.735357, 0, 1))
    tree, data = gltf_tree(pbrMetallicRoughness={"baseColorFactor": [0.001, 0.001, 0.001, 1.0]})
    all_alike(load(tmp_path, tree, data), (0.01292,) * 3)


def test_a_material_that_says_nothing_is_white_and_no_material_is_no_color(tmp_path: Path) -> None:
    tree, data = gltf_tree(name="plain")
    all_alike(load(tmp_path, tree, data), (1, 1, 1))
    del tree["meshes"][0]["primitives"][0]["material"]
    assert load(tmp_path, tree, data).colors is None


def test_a_factor_tints_its_texture(tmp_path: Path) -> None:
    tree, data = gltf_tree(pbrMetallicRoughness={"baseColorTexture": {"index": 0}, "baseColorFactor": [0.5, 1, 1, 1]})
    cloud = load(tmp_path, tree, data)
    np.testing.assert_allclose(cloud.colors, np.where(cloud.points[:, :1] < 1, [0.735357, 0, 0], [0, 0, 1]), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "component"),
    [
        (np.full((4, 3), 0.5, dtype="<f4"), 5126),
        (np.full((4, 4), 32768, dtype="<u2"), 5123),
        (np.full((4, 4), 128, dtype="u1"), 5121),
    ],
)
def test_vertex_colors(tmp_path: Path, values: np.ndarray, component: int) -> None:
    tree, data = gltf_tree(name="plain")
    primitive = tree["meshes"][0]["primitives"][0]
    kind = f"VEC{values.shape[1]}"
    primitive["attributes"]["COLOR_0"], data = grown(tree, data, values, component, kind, normalized=component != 5126)
    half = to_srgb(np.array(128 / 255 if component == 5121 else 0.5))
    cloud = load(tmp_path, tree, data)
    assert cloud.colors is not None
    np.testing.assert_allclose(cloud.colors, np.full((60, 3), half), atol=1e-4)
    del primitive["material"]
    np.testing.assert_allclose(load(tmp_path, tree, data).colors, cloud.colors)


def test_glossy_materials(tmp_path: Path) -> None:
    extension = {"KHR_materials_pbrSpecularGlossiness": {"diffuseFactor": [0, 0.5, 0, 1]}}
    tree, data = gltf_tree(extensions=extension)
    tree["extensionsRequired"] = ["KHR_materials_pbrSpecularGlossiness"]
    all_alike(load(tmp_path, tree, data), (0, 0.735357, 0))


@pytest.mark.parametrize(("mode", "half_seen"), [("OPAQUE", False), ("MASK", True), ("BLEND", True)])
def test_alpha(tmp_path: Path, mode: str, half_seen: bool) -> None:
    texture = png([[(*RED, 0), (*BLUE, 255)]])
    tree, data = gltf_tree(alphaMode=mode, pbrMetallicRoughness={"baseColorTexture": {"index": 0}})
    data += b"\0" * (-len(data) % 4)
    tree["bufferViews"][3] = {"buffer": 0, "byteOffset": len(data), "byteLength": len(texture)}
    cloud = load(tmp_path, tree, data + texture)
    assert (cloud.points[:, 0].min() > 0.95) == half_seen


def test_texture_transform_and_second_coordinates(tmp_path: Path) -> None:
    tree, data = gltf_tree()
    info = {"index": 0, "texCoord": 7, "extensions": {"KHR_texture_transform": {"texCoord": 1, "offset": [0.5, 0]}}}
    tree["materials"] = [{"pbrMetallicRoughness": {"baseColorTexture": info}}]
    tree["extensionsRequired"] = ["KHR_texture_transform"]
    # Half of the texture, as whole numbers of 16 bits; moved by the other half, all of it is blue.
    uv = np.array([[0, 65535], [32767, 65535], [32767, 0], [0, 0]], dtype="<u2")
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    attributes["TEXCOORD_1"], data = grown(tree, data, uv, 5123, "VEC2", normalized=True)
    all_alike(load(tmp_path, tree, data), (0, 0, 1))
    info["extensions"]["KHR_texture_transform"] = {"texCoord": 1, "scale": [1.99, 1]}
    cloud = load(tmp_path, tree, data)
    blue = cloud.points[:, 0] > 1.01
    np.testing.assert_array_equal(cloud.colors[blue], np.tile([0, 0, 1], (blue.sum(), 1)))  # pyright: ignore[reportOptionalSubscript]
    # Turned by a quarter, what ran along u runs along v: red below, blue above.
    info["extensions"]["KHR_texture_transform"] = {"texCoord": 0, "rotation": np.pi / 2}
    cloud = load(tmp_path, tree, data)
    np.testing.assert_array_equal(cloud.colors, np.where(cloud.points[:, 1:2] < 0.5, [0, 0, 1], [1, 0, 0]))


def test_transforms_and_instances(tmp_path: Path) -> None:
    tree, data = gltf_tree()
    quarter = [0, 0, np.sqrt(0.5), np.sqrt(0.5)]
    tree["nodes"] = [
        {"translation": [10, 0, 0], "children": [1, 2]},
        {"mesh": 0, "rotation": quarter, "scale": [2, 2, 2]},
        {"mesh": 0, "matrix": [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 5, 1]},
        {"mesh": 0, "translation": [999, 0, 0]},
    ]
    points = load(tmp_path, tree, data, 400).points
    turned, moved = points[points[:, 2] < 1], points[points[:, 2] > 1]
    # (x, y) becomes (-y, x), twice as large: x in [8, 10], y in [0, 4].
    np.testing.assert_allclose([turned.min(axis=0), turned.max(axis=0)], [[8, 0, 0], [10, 4, 0]], atol=0.2)
    np.testing.assert_allclose([moved.min(axis=0), moved.max(axis=0)], [[10, 0, 5], [12, 1, 5]], atol=0.2)


def test_rest_pose_of_a_skin(tmp_path: Path) -> None:
    tree, data = gltf_tree()
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    attributes["JOINTS_0"], data = grown(tree, data, np.tile([1, 0, 0, 0], (4, 1)).astype("u1"), 5121, "VEC4")
    attributes["WEIGHTS_0"], data = grown(
        tree, data, np.tile([255, 0, 0, 0], (4, 1)).astype("u1"), 5121, "VEC4", normalized=True
    )
    bind = np.stack([np.eye(4), np.eye(4)])
    bind[1, 3, 0] = -3  # columns first: moves by -3 along x
    inverse, data = grown(tree, data, bind.reshape(2, 16).astype("<f4"), 5126, "MAT4")
    tree["nodes"] = [{"mesh": 0, "skin": 0, "translation": [77, 0, 0]}, {}, {"translation": [0, 20, 0]}]
    tree["scenes"] = [{"nodes": [0, 1, 2]}]
    tree["skins"] = [{"joints": [1, 2], "inverseBindMatrices": inverse}]
    points = load(tmp_path, tree, data, 400).points
    np.testing.assert_allclose([points.min(axis=0), points.max(axis=0)], [[-3, 20, 0], [-1, 21, 0]], atol=0.1)


def test_sparse_and_strided_numbers(tmp_path: Path) -> None:
    tree, data = gltf_tree()
    # No view at all: zeros, of which three rows are given.
    rows, data = grown(tree, data, np.array([[1], [2], [3]], dtype="<u2"), 5123, "SCALAR")
    values, data = grown(tree, data, CORNERS[1:], 5126, "VEC3")
    views = [tree["accessors"][number]["bufferView"] for number in (rows, values)]
    tree["accessors"][0] = {
        "componentType": 5126,
        "count": 4,
        "type": "VEC3",
        "sparse": {
            "count": 3,
            "indices": {"bufferView": views[0], "componentType": 5123},
            "values": {"bufferView": views[1]},
        },
    }
    np.testing.assert_allclose(load(tmp_path, tree, data).points.max(axis=0), [2, 1, 0], atol=0.1)
    tree, data = gltf_tree()
    wide = np.zeros((4, 5), dtype="<f4")
    wide[:, :3] = CORNERS
    number, data = grown(tree, data, wide, 5126, "VEC3")
    tree["bufferViews"][tree["accessors"][number]["bufferView"]]["byteStride"] = 20
    tree["meshes"][0]["primitives"][0]["attributes"]["POSITION"] = number
    np.testing.assert_allclose(load(tmp_path, tree, data).points.max(axis=0), [2, 1, 0], atol=0.1)


@pytest.mark.parametrize(("mode", "indices"), [(5, [0, 1, 3, 2]), (6, [0, 1, 2, 3]), (4, None)])
def test_strips_fans_and_no_indices(tmp_path: Path, mode: int, indices: list[int] | None) -> None:
    tree, data = gltf_tree()
    primitive = tree["meshes"][0]["primitives"][0]
    primitive["mode"] = mode
    if indices is None:
        corners = CORNERS[[0, 1, 2, 0, 2, 3]].astype("<f4")
        primitive["attributes"], _ = {}, primitive.pop("indices")
        primitive["attributes"]["POSITION"], data = grown(tree, data, corners, 5126, "VEC3")
    else:
        primitive["indices"], data = grown(tree, data, np.array(indices, dtype="<u4"), 5125, "SCALAR")
    points = load(tmp_path, tree, data, 400).points
    above = points[:, 1] > points[:, 0] / 2
    assert 0.4 < above.mean() < 0.6


def test_points_and_lines(tmp_path: Path) -> None:
    tree, data = gltf_tree()
    primitives = tree["meshes"][0]["primitives"]
    primitives.append({"attributes": {"POSITION": 0}, "mode": 1})
    primitives.append({"attributes": {"POSITION": 0}, "mode": 0})
    notes = load(tmp_path, tree, data).notes
    assert "1 pieces made of lines were left out" in notes
    assert "points beside the triangles were left out" in notes
    primitives[:] = [{"attributes": {"POSITION": 0}, "mode": 0}]
    np.testing.assert_array_equal(load(tmp_path, tree, data).points, CORNERS)


def test_a_document_beside_its_buffer(tmp_path: Path) -> None:
    tree, data = gltf_tree(uri="my%20data.bin")
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"needs 'my%20data.bin'; put it into the same folder"):
        load_point_cloud(tmp_path / "a.gltf")
    (tmp_path / "my data.bin").write_bytes(data)
    tree["images"][0] = {"uri": "data:image/png;base64," + base64.b64encode(png([[RED]])).decode()}
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    all_alike(load_point_cloud(tmp_path / "a.gltf", n_points=20), (1, 0, 0))
    tree["images"][0] = {"uri": "gone.png"}
    (tmp_path / "a.gltf").write_text(json.dumps(tree))
    cloud = load_point_cloud(tmp_path / "a.gltf", n_points=20)
    all_alike(cloud, (1, 1, 1))
    assert any("'gone.png' is not in the folder" in note for note in cloud.notes)
    tree["buffers"][0]["uri"] = "../my data.bin"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.gltf").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="put it into the same folder"):
        load_point_cloud(tmp_path / "sub" / "a.gltf")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["asset"].update(version="1.0"), "is no glTF 2"),
        (
            lambda tree: tree.update(extensionsRequired=["KHR_draco_mesh_compression"]),
            "export without Draco compression",
        ),
        (lambda tree: tree["accessors"][0].update(count=10**12), "ends beyond its data"),
        (
            lambda tree: (
                tree["accessors"].append({"count": 10**12, "componentType": 5126, "type": "VEC3"})
                or tree["meshes"][0]["primitives"][0]["attributes"].update(POSITION=3)
            ),
            "announces 3,000,000,000,000 numbers",
        ),
        (lambda tree: tree["bufferViews"][0].update(byteOffset=-4), "points beyond the end"),
        (lambda tree: tree["nodes"].append({"children": [0, 0]}), "two parents"),
        (lambda tree: tree.update(nodes=[{"children": [1]}, {"children": [0], "mesh": 0}]), "twice or in a circle"),
        (lambda tree: tree["meshes"][0]["primitives"][0].update(indices=-1), "names accessors -1 of 3"),
        (lambda tree: tree["accessors"][1].update(count=5), "triangles of 5 corners"),
        (
            lambda tree: tree["meshes"][0]["primitives"][0]["attributes"].update(TEXCOORD_0=0),
            "texture coordinates that do not fit",
        ),
        (lambda tree: tree.update(scenes=[{"nodes": [0] * 2}]), "shows node 0 twice"),
        (lambda tree: tree.update(meshes=[]), "names meshes 0 of 0"),
        (lambda tree: tree.update(scenes=[{"nodes": []}]), "holds no point"),
    ],
)
def test_documents_that_are_wrong(tmp_path: Path, change: Any, message: str) -> None:
    tree, data = gltf_tree()
    change(tree)
    with pytest.raises(DataError, match=message):
        load(tmp_path, tree, data)


def test_chunks(tmp_path: Path) -> None:
    whole = glb()
    for wrong, message in (
        (whole[:100], "ends too early"),
        (whole[:12], "holds nothing"),
        (whole[:4] + struct.pack("<I", 1) + whole[8:], "no binary glTF 2"),
    ):
        (tmp_path / "a.glb").write_bytes(wrong)
        with pytest.raises(DataError, match=message):
            load_point_cloud(tmp_path / "a.glb")
    extra = small_files.glb() + struct.pack("<II", 4, 0x12345678) + b"----"
    (tmp_path / "a.glb").write_bytes(extra)
    assert len(load_point_cloud(tmp_path / "a.glb", n_points=8)) == 8
