"""Foreign point clouds and planar scans as the points of a sweep.

A cloud's points come as records whose fields are named and placed freely: ``x``, ``y``, ``z``, some intensity, some
time. A record is read as a structured array over the bytes as they lie, whatever the order, the gaps or the byte order.

**Time.** What drivers call ``t``, ``time``, ``timestamp``, ``offset_time`` is a whole number of ns or a float of
seconds, counted from the stamp of the message or absolute; which of them it is follows from its type and its size, and
where that would give a sweep of more than ``LONGEST_NS`` nothing is guessed: the points then have no times of their
own. A sweep ends with its last point.

Points that are not finite, or lie exactly in the sensor, are none: drivers fill with them where nothing came back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.importing.images import Unusable
from pipeline.protocols.sweeps import make_points

Array = np.ndarray[Any, Any]

TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}
"""Of sensor_msgs/PointField: number -> numpy's name."""

LONGEST_NS = 2_000_000_000
"""No sweep lasts longer; an offset of int32 ns does not reach much further, either."""

_INTENSITY = ("intensity", "intensities", "reflectivity", "signal", "i")
_TIME = ("t", "time", "timestamp", "time_stamp", "timeStamp", "offset_time", "time_offset")
_ABSOLUTE_NS = 1e17  # 1973, since 1970


class Field(NamedTuple):
    """One field of a point: where it begins in the record and numpy's name of its type without byte order (``f4``)."""

    name: str
    offset: int
    type: str


class Points(NamedTuple):
    """``POINT_DTYPE`` points, and when the last one was; ``timed``: whether that comes from the points themselves."""

    points: Array
    end_ns: int
    timed: bool


def records(data: Any, fields: Sequence[Field], height: int, width: int, point_step: int, row_step: int,
            big_endian: bool) -> Array:  # fmt: skip
    """[height * width] structured records with the fields by their names. Unusable if they cannot lie in the data."""
    order = ">" if big_endian else "<"
    if height * width == 0:
        row_step = point_step * width
    ends = [field.offset + np.dtype(field.type).itemsize for field in fields]
    needed = row_step * (height - 1) + point_step * width if height * width else 0
    if max(ends, default=0) > point_step or row_step < point_step * width or len(data) < needed:
        raise Unusable(
            f"{len(data)} bytes are no cloud of {height} x {width} points of {point_step} bytes in rows of {row_step}"
        )
    if len({field.name for field in fields}) != len(fields):
        raise Unusable("two fields of its points have the same name")  # numpy could not tell them apart
    dtype = np.dtype(
        {
            "names": [field.name for field in fields],
            "formats": [order + field.type for field in fields],
            "offsets": [field.offset for field in fields],
            "itemsize": point_step,
        }
    )
    cloud: Array = np.ndarray((height, width), dtype, bytes(data), strides=(row_step, point_step))
    return cloud.reshape(-1)


def sweep_of(cloud: Array, stamp_ns: int) -> Points:
    """The points of ``records`` that stand for something. Unusable if they have no ``x``, ``y`` and ``z``."""
    names = cloud.dtype.names or ()
    if not {"x", "y", "z"} <= set(names):
        raise Unusable(f"its points have the fields {', '.join(names) or 'none'}, but not x, y and z")
    xyz = np.stack([cloud[axis].astype(np.float32) for axis in "xyz"], axis=1)
    seen = np.isfinite(xyz).all(axis=1) & (xyz != 0).any(axis=1)
    light = next((cloud[name] for name in _INTENSITY if name in names), np.zeros(len(cloud), np.float32))
    times = next((times_ns(cloud[name], stamp_ns, seen) for name in _TIME if name in names), None)
    end_ns = stamp_ns if times is None or not seen.any() else int(times[seen].max())
    offsets = np.zeros(len(cloud), np.int64) if times is None else times - end_ns
    points = make_points(xyz[seen], light[seen].astype(np.float32), offsets[seen])
    return Points(points, end_ns, times is not None)


def times_ns(values: Array, stamp_ns: int, seen: Array) -> Array | None:
    """When each point that is ``seen`` was, int64 ns on the stamp's clock; None where the numbers cannot be told."""
    used = values[seen]
    if not len(used) or not np.isfinite(used).all():
        return None
    low, high = float(used.min()), float(used.max())
    unit = 1.0 if values.dtype.kind in "iu" or low > _ABSOLUTE_NS else 1e9
    absolute = low * unit > _ABSOLUTE_NS
    if absolute and values.dtype.itemsize < 8:  # float32 counts seconds since 1970 in steps of two minutes
        return None
    start_ns = round(low * unit) + (0 if absolute else stamp_ns)
    if (high - low) * unit > LONGEST_NS or abs(start_ns - stamp_ns) > LONGEST_NS:
        return None
    times = np.full(len(values), start_ns, np.int64)
    times[seen] += np.round((used.astype(np.float64) - low) * unit).astype(np.int64)
    return times


def scan_points(ranges: Array, intensities: Array, angles: tuple[float, float], limits: tuple[float, float],
                step_s: float, stamp_ns: int) -> Points:  # fmt: skip
    """A planar scan: ``ranges`` [n] in metres at ``angles`` = (first, increment) in radians, counterclockwise from x;
    what lies outside ``limits`` is no return. The stamp is the first ray's, the others follow every ``step_s``."""
    distance = np.asarray(ranges, np.float64)
    count = len(distance)
    seen = np.isfinite(distance) & (distance >= limits[0]) & (distance <= limits[1]) & (distance > 0)
    angle = angles[0] + angles[1] * np.arange(count)
    near = np.where(seen, distance, 0.0)
    xyz = np.stack([near * np.cos(angle), near * np.sin(angle), np.zeros(count)], axis=1)
    light = np.asarray(intensities, np.float32) if len(intensities) == count else np.zeros(count, np.float32)
    step_ns = step_s * 1e9 if np.isfinite(step_s) and abs(step_s) * count * 1e9 <= LONGEST_NS else 0.0
    times = np.round(np.arange(count) * step_ns).astype(np.int64)
    last = int(times.max(initial=0))
    return Points(make_points(xyz[seen], light[seen], (times - last)[seen]), stamp_ns + last, step_ns != 0)
