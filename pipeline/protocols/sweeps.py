"""A LiDAR sweep between its assembly and its message."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pipeline.messages import POINT_DTYPE


class Sweep(NamedTuple):
    """One turn of a LiDAR: ``POINT_DTYPE`` points, the session time of its end, the device's own stamp of it (raw, in
    ns, if any), when its last packet was received, and how sure the end is. ``new_epoch``: the device's clock jumped
    or restarted since the sweep before."""

    points: np.ndarray[Any, Any]
    t_capture_ns: int
    t_device_ns: int | None
    t_receipt_ns: int
    uncertainty_ns: int
    new_epoch: bool


def make_points(xyz: np.ndarray[Any, Any], intensity: np.ndarray[Any, Any],
                offset_ns: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:  # fmt: skip
    """``POINT_DTYPE`` points from [n, 3] metres, [n] intensities and [n] offsets in ns, which are cut at 0."""
    points = np.empty(len(xyz), POINT_DTYPE)
    points["x"], points["y"], points["z"] = xyz.T
    points["intensity"] = intensity
    points["offset_ns"] = np.minimum(offset_ns, 0)
    return points
