"""Point clouds of every layout: what was put into the fields comes out as points."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.importing import ImportOptions
from pipeline.importing.clouds import TYPES, Field, records, sweep_of, times_ns
from pipeline.importing.images import Unusable, compressed_frame, jpeg_size, pixels
from pipeline.importing.ros_audio import to_int16

T0 = 1_700_000_000_000_000_000
NAMES = {name: number for number, name in TYPES.items()}


class Cloud(NamedTuple):
    """A cloud as a driver would lay it out, and the values in it by field."""

    fields: list[Field]
    height: int
    width: int
    point_step: int
    row_step: int
    big_endian: bool
    data: bytes
    values: dict[str, np.ndarray[Any, Any]]


@st.composite
def clouds(draw: st.DrawFn) -> Cloud:
    """Fields in any order, with gaps between them, padding behind points and rows, in either byte order."""
    names = draw(st.permutations(["x", "y", "z", *draw(st.sets(st.sampled_from(["intensity", "t", "ring", "tag"])))]))
    types = {"x": st.sampled_from(["f4", "f8"]), "intensity": st.sampled_from(list(NAMES)), "t": st.just("u4")}
    types |= {"y": types["x"], "z": types["x"]}
    fields, at = [], 0
    for name in names:
        at += draw(st.integers(0, 5))
        type_ = draw(types.get(name, st.sampled_from(list(NAMES))))
        fields.append(Field(name, at, type_))
        at += np.dtype(type_).itemsize
    height, width = draw(st.integers(0, 4)), draw(st.integers(0, 6))
    point_step = at + draw(st.integers(0, 7))
    row_step = point_step * width + draw(st.integers(0, 9))
    big = draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    # The last row's padding may be absent.
    data = bytearray(random.integers(0, 256, height * row_step, np.uint8).tobytes())
    values: dict[str, np.ndarray[Any, Any]] = {}
    for field in fields:
        dtype = np.dtype((">" if big else "<") + field.type)
        top = 100_000_000 if field.name == "t" else 100
        values[field.name] = random.integers(1, top, height * width).astype(dtype)
        for index in range(height * width):
            place = index // width * row_step + index % width * point_step + field.offset
            data[place : place + dtype.itemsize] = values[field.name][index : index + 1].tobytes()
    return Cloud(fields, height, width, point_step, row_step, big, bytes(data), values)


def cloud_arguments(cloud: Cloud) -> tuple[Any, ...]:
    return (cloud.data, cloud.fields, cloud.height, cloud.width, cloud.point_step, cloud.row_step, cloud.big_endian)


@given(clouds())
def test_every_layout_gives_the_values_that_were_put_in(cloud: Cloud) -> None:
    read = records(*cloud_arguments(cloud))
    assert len(read) == cloud.height * cloud.width
    for name, expected in cloud.values.items():
        assert read[name].tolist() == expected.tolist()
    found = sweep_of(read, T0)
    assert len(found.points) == len(read)
    for name in ("x", "y", "z", "intensity"):
        if name in cloud.values:
            assert found.points[name].tolist() == cloud.values[name].astype(np.float32).tolist()
    if "t" in cloud.values and len(read):
        times = cloud.values["t"].astype(np.int64)
        assert (found.end_ns, found.timed) == (T0 + times.max(), True)
        assert found.points["offset_ns"].tolist() == (times - times.max()).tolist()
    else:
        assert (found.end_ns, found.timed) == (T0, False)
        assert not found.points["offset_ns"].any()


@given(clouds(), st.data())
def test_what_cannot_lie_in_its_data_is_refused(cloud: Cloud, data: st.DataObject) -> None:
    """Any numbers in the message: it is read without a byte from elsewhere, or Unusable."""
    number = st.integers(0, 40)
    try:
        read = records(cloud.data, cloud.fields, data.draw(number), data.draw(number), data.draw(number),
                       data.draw(number), cloud.big_endian)  # fmt: skip
        sweep_of(read, T0)
    except Unusable:
        pass


def test_a_cloud_without_coordinates_or_with_a_field_twice_is_refused() -> None:
    fields = [Field("x", 0, "f4"), Field("y", 4, "f4")]
    with pytest.raises(Unusable, match="the fields x, y, but not x, y and z"):
        sweep_of(records(bytes(8), fields, 1, 1, 8, 8, False), T0)
    with pytest.raises(Unusable, match="the same name"):
        records(bytes(8), [Field("x", 0, "f4"), Field("x", 4, "f4")], 1, 1, 8, 8, False)


def test_points_where_nothing_came_back_are_none() -> None:
    cloud = np.zeros(4, [("x", "f4"), ("y", "f4"), ("z", "f4"), ("time", "f4")])
    cloud["x"] = [1, np.nan, 0, np.inf]
    cloud["time"] = [0.01, 0.02, 0.03, 0.04]
    found = sweep_of(cloud, T0)
    assert found.points["x"].tolist() == [1]
    assert found.end_ns == pytest.approx(T0 + 10_000_000, abs=10)
    assert found.points["offset_ns"].tolist() == [0]


MS = 1_000_000


@pytest.mark.parametrize(
    ("values", "offsets_ms", "start_ms"),
    [
        (np.array([0, 50 * MS, 99 * MS], "u4"), [0, 50, 99], 0),  # Ouster: ns since the stamp
        (np.array([0, 0.05, 0.099], "f4"), [0, 50, 99], 0),  # Velodyne: s since the stamp
        (np.array([-0.099, -0.05, 0], "f4"), [0, 49, 99], -99),  # ... or before it
        (T0 / 1e9 + np.array([0, 0.05, 0.099]), [0, 50, 99], 0),  # Hesai: s since 1970
        (T0 + np.array([0, 50 * MS, 99 * MS], "f8"), [0, 50, 99], 0),  # Livox: ns since 1970, as a float
    ],
)
def test_the_times_of_points_as_drivers_write_them(
    values: np.ndarray[Any, Any], offsets_ms: list[int], start_ms: int
) -> None:
    times = times_ns(values, T0, np.ones(3, bool))
    assert times is not None
    assert times - times[0] == pytest.approx(np.array(offsets_ms) * MS, abs=300)
    assert times[0] == pytest.approx(T0 + start_ms * MS, abs=300)


@pytest.mark.parametrize(
    "values",
    [
        np.array([0, 50_000, 99_000], "f4"),  # microseconds, which only their size tells from seconds
        np.array([0, 3_000_000_000], "u4"),
        np.array([0, np.nan, 1], "f4"),
        np.array([T0 / 1e9, T0 / 1e9], "f4"),  # in which every 128 s are one number
        np.array([1234.5, 1234.6], "f8"),  # a clock of its own
        np.array([1e9, 1e9 + 0.1], "f8"),  # 22 years before the stamp
    ],
)
def test_times_that_cannot_be_told_are_not_guessed(values: np.ndarray[Any, Any]) -> None:
    assert times_ns(values, T0, np.ones(len(values), bool)) is None


# Pictures and sound.


@given(height=st.integers(0, 5), width=st.integers(0, 5), step=st.integers(0, 40), size=st.integers(0, 200),
       encoding=st.sampled_from(["mono8", "rgb8", "rgba8", "mono16", "bayer_rggb8", "bayer_gbrg16", "yuv422", "yuyv",
                                 "16UC1", "huh", ""]), big=st.booleans())  # fmt: skip
def test_pictures_of_any_numbers_are_read_or_refused(height: int, width: int, step: int, size: int, encoding: str,
                                                     big: bool) -> None:  # fmt: skip
    try:
        image = pixels(bytes(size), encoding, height, width, step, big)
    except Unusable:
        return
    assert image.shape[:2] == (height, width)
    assert image.dtype == np.uint8


@given(cut=st.integers(0, 700), at=st.integers(0, 699), value=st.integers(0, 255))
def test_damaged_jpegs_are_read_or_refused(cut: int, at: int, value: int) -> None:
    data = bytearray(cv2.imencode(".jpg", np.arange(96, dtype=np.uint8).reshape(8, 12))[1].tobytes())
    data[at % len(data)] = value
    try:
        layout, _ = compressed_frame(bytes(data[: max(0, len(data) - cut)]), ImportOptions())
    except Unusable:
        return
    assert layout.format == "jpeg"


def test_the_size_that_a_jpeg_states(tmp_path: Path) -> None:
    for kind in ([], [cv2.IMWRITE_JPEG_PROGRESSIVE, 1], [cv2.IMWRITE_JPEG_RST_INTERVAL, 1]):
        data = cv2.imencode(".jpg", np.zeros((33, 57, 3), np.uint8), kind)[1].tobytes()
        assert jpeg_size(data) == (33, 57)
        assert jpeg_size(data[:100]) is None
    assert jpeg_size(b"\x89PNG") is None


def test_a_picture_that_exif_turns_is_turned() -> None:
    data = cv2.imencode(".jpg", np.zeros((20, 30), np.uint8))[1].tobytes()
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"  # orientation 6: a quarter turn
    turned = data[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + data[2:]
    layout, _ = compressed_frame(turned, ImportOptions())
    assert (layout.height, layout.width) == (30, 20)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 128, 255], "u1"), [-32768, 0, 127 << 8]),
        (np.array([-128, 1], "i1"), [-32768, 256]),
        (np.array([-(2**31), 65536], "<i4"), [-32768, 1]),
        (np.array([2.0, -1.0, np.nan], "<f4"), [32767, -32767, 0]),
        (np.array([258], ">i2"), [258]),
    ],
)
def test_samples_of_every_format(values: np.ndarray[Any, Any], expected: list[int]) -> None:
    assert to_int16(values).tolist() == expected
