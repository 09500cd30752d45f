"""A LiDAR sweep between its assembly and its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from pipeline.messages import POINT_DTYPE

Array = np.ndarray[Any, Any]
Allocate = Callable[[int], Array]
"""Memory for so many ``POINT_DTYPE`` points, contiguous."""


def fresh(points: int) -> Array:
    """Memory of its own for each sweep."""
    return np.empty(points, POINT_DTYPE)


class Sweep(NamedTuple):
    """One turn of a LiDAR: ``POINT_DTYPE`` points, the session time of its end, the device's own stamp of it (raw, in
    ns, if any), when its last packet was received, and how sure the end is. ``new_epoch``: the device's clock jumped
    or restarted since the sweep before."""

    points: Array
    t_capture_ns: int
    t_device_ns: int | None
    t_receipt_ns: int
    uncertainty_ns: int
    new_epoch: bool


def make_points(xyz: Array, intensity: Array, offset_ns: Array, allocate: Allocate = fresh) -> Array:
    """``POINT_DTYPE`` points from [n, 3] metres, [n] intensities and [n] offsets in ns, which are cut at 0."""
    points = allocate(len(xyz))
    points["x"], points["y"], points["z"] = xyz.T
    points["intensity"] = intensity
    points["offset_ns"] = np.minimum(offset_ns, 0)
    return points
