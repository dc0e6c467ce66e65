"""What the page shows of clouds: bundled objects to pick from, small pictures, and clouds as the viewer takes them."""

from __future__ import annotations

import base64
import io
import json
from functools import cache
from html import escape

import numpy as np
from PIL import Image

from pointalign.data.files import PointCloud
from pointalign.data.household import HouseholdObject, load_household
from pointalign.errors import DataError
from pointalign.rendering import MARGIN, NEUTRAL, ball_size, looking, splat

# The first object of each of these classes is shown as a picture; the list has them all.
SHELF = ("chair", "sofa", "lamp", "animal", "music equipment", "vehicle", "plant", "food", "toy", "table")
PICTURE_PIXELS = 112
PICTURE_VIEW = (35, 22)
INT16_MAX = 32767
SMALLEST_RADIUS = 1e-9


@cache
def bundled_objects() -> dict[str, HouseholdObject]:
    """The objects that no bundled recipe trains on, by id."""
    return {thing.id: thing for thing in load_household("test")}


def bundled_cloud(object_id: str) -> PointCloud:
    """A bundled object as if it had been read from a file.

    Raises:
        DataError: when there is none of that id.
    """
    thing = bundled_objects().get(object_id)
    if thing is None:
        raise DataError("there is no such bundled object; pick one from the list")
    notes = (
        f"bundled object {thing.id} by {thing.creator} ({thing.licence}), of the held-out part",
        f"{len(thing.points):,} points with colours",
    )
    return PointCloud(thing.points[:, :3], thing.points[:, 3:], thing.noun, notes, float(thing.sized_points[0, 6]))


def choices() -> list[tuple[str, str]]:
    """What people read and the id of each bundled object, ordered by what they read; those alike are numbered."""
    found: list[tuple[str, str]] = []
    nouns = [thing.noun for thing in bundled_objects().values()]
    for position, (object_id, thing) in enumerate(bundled_objects().items()):
        number = nouns[: position + 1].count(thing.noun)
        found.append((f"{thing.noun} ({number})" if nouns.count(thing.noun) > 1 else thing.noun, object_id))
    return sorted(found, key=lambda pair: pair[0].split(" ", 1)[-1].lower())


def shelf() -> list[str]:
    """Ids of the objects shown as pictures."""
    first = {thing.label: object_id for object_id, thing in reversed(bundled_objects().items())}
    return [first[label] for label in SHELF]


def shelf_html() -> str:
    """The pictures, as buttons."""
    buttons = []
    for object_id in shelf():
        thing = bundled_objects()[object_id]
        picture = base64.b64encode(picture_png(thing.points)).decode()
        noun = escape(thing.noun, quote=True)
        buttons.append(
            f'<button type="button" data-id="{escape(object_id, quote=True)}" title="{noun}" aria-label="{noun}">'
            f'<img alt="" src="data:image/png;base64,{picture}"></button>'
        )
    return f'<div class="shelf">{"".join(buttons)}</div>'


def picture_png(points: np.ndarray) -> bytes:
    """A small picture of a coloured cloud (N, 6) on white."""
    xyz = points[:, :3] - (points[:, :3].min(axis=0) + points[:, :3].max(axis=0)) / 2
    seen = xyz @ looking(*PICTURE_VIEW).T
    reach = MARGIN * float(np.abs(seen[:, :2]).max())
    image = splat(seen, points[:, 3:].clip(0, 1), reach, PICTURE_PIXELS, ball_size(xyz))
    file = io.BytesIO()
    Image.fromarray((image * 255).round().astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def viewer_value(cloud: PointCloud) -> str:
    """A cloud as the viewer takes it: JSON with the middle of its box at 0 and its farthest point at distance 1.

    `xyz` is int16 of 32767 a unit, `rgb` uint8, both base64; `spacing` is the radius at which balls close the surface.
    Without colours it is gray.
    """
    low, high = cloud.points.min(axis=0), cloud.points.max(axis=0)
    xyz = cloud.points - (low + high) / 2
    xyz /= max(float(np.linalg.norm(xyz, axis=1).max()), SMALLEST_RADIUS)
    rgb = np.full(xyz.shape, NEUTRAL) if cloud.colors is None else cloud.colors
    return json.dumps(
        {
            "name": cloud.source,
            "spacing": ball_size(xyz) if len(xyz) > 1 else 0.0,
            "xyz": _packed((xyz * INT16_MAX).round().astype("<i2")),
            "rgb": _packed((rgb.clip(0, 1) * 255).round().astype(np.uint8)),
        }
    )


def _packed(numbers: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(numbers).tobytes()).decode()


def about_html(cloud: PointCloud) -> str:
    """A cloud's name, and what was done to get it."""
    notes = "".join(f"<li>{escape(note)}</li>" for note in cloud.notes)
    return (
        f'<div class="about"><b>{escape(cloud.source)}</b> <span>{len(cloud):,} points</span>'
        f"<details><summary>how it was read</summary><ul>{notes}</ul></details></div>"
    )
