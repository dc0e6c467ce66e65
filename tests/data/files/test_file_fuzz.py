"""Valid small files, changed at random: always a cloud or one clear line, and never for long."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import small_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pointalign import PointCloud, load_point_cloud
from pointalign.errors import PointAlignError

FILES = small_files.every_format()
# What a number in a header may be changed to.
TOKENS = (
    b"\xff" * 4,
    b"\0" * 4,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\xff" * 8,
    b"99999999999",
    b"-1",
    b"0",
    b"nan",
    b"1e308",
)
SECONDS = 10.0
# Each .laz starts a process.
EXAMPLES = {"laz": 8}


@st.composite
def changed(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes after one to four changes: replaced, inserted, removed, repeated or cut off."""
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        length = draw(st.integers(0, 40))
        put = draw(st.one_of(st.sampled_from(TOKENS), st.binary(max_size=6), st.just(data[at : at + length])))
        change: Callable[[], bytes] = draw(
            st.sampled_from(
                [
                    lambda: data[:at] + put + data[at + len(put) :],  # noqa: B023
                    lambda: data[:at] + put + data[at:],  # noqa: B023
                    lambda: data[:at] + data[at + length :],  # noqa: B023
                    lambda: data[:at],  # noqa: B023
                ]
            )
        )
        data = change()
    return data


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FILES)
def test_a_cloud_or_one_line(tmp_path: Path, name: str) -> None:
    @settings(
        max_examples=EXAMPLES.get(name.rpartition(".")[2], 60), suppress_health_check=list(HealthCheck), database=None
    )
    @given(changed(FILES[name]))
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        start = time.monotonic()
        try:
            cloud = load_point_cloud(tmp_path / name, n_points=16)
        except PointAlignError as error:
            assert str(error).isprintable()  # noqa: PT017
        else:
            check_cloud(cloud)
        assert time.monotonic() - start < SECONDS

    check()


def check_cloud(cloud: PointCloud) -> None:
    """What every cloud keeps to."""
    assert 1 <= len(cloud) <= 16
    assert cloud.points.dtype == np.float32
    assert np.isfinite(cloud.points).all()
    assert cloud.colors is None or (cloud.colors.dtype == np.float32 and cloud.colors.shape == cloud.points.shape)
    assert cloud.colors is None or (cloud.colors.min() >= 0 and cloud.colors.max() <= 1)
    assert all(note.isprintable() for note in cloud.notes)
