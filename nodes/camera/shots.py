"""What every way to get frames gives."""

from __future__ import annotations

import re
from typing import Any, Protocol

import msgspec
import numpy as np

from pipeline.messages import FrameLayout

MS, NS = 1_000_000, 1_000_000_000
WAIT_NS = 50 * MS
"""How long a driver waits for a frame at most."""
OPEN_S = 4.0
PERIOD_NS = 33_000_000
"""Between two frames, until it is known better."""

Array = np.ndarray[Any, Any]


class Shot(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A frame as its driver has it. ``late_ns`` is its age, or how much longer than usual it was on its way."""

    t_capture_ns: int
    t_receipt_ns: int
    t_device_ns: int | None = None
    uncertainty_ns: int = 0
    new_epoch: bool = False
    late_ns: int = 0
    image: Any = None


class Driver(Protocol):
    """One way to get frames. ``size`` is (width, height) as the device gives them."""

    size: tuple[int, int]
    dropped: int

    def shot(self) -> Shot | None: ...
    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None: ...
    def jpeg(self, shot: Shot) -> Array: ...
    def close(self) -> None: ...


def shown(device: Any) -> str:
    """A device in words, without the password that a URL may hold."""
    return "the camera " + re.sub(r"//[^/@]*@", "//…@", str(device))
