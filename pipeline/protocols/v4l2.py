"""What a V4L2 camera says it can do: its pixel formats, sizes and rates, from the kernel's enumeration calls.

They only ask; no setting of the camera changes. Layouts are those of linux/videodev2.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

ENUM_FMT, ENUM_SIZES, ENUM_INTERVALS = 0xC0405602, 0xC02C564A, 0xC034564B
_CAPTURE, _DISCRETE = 1, 1
_MOST = 256
"""Entries of one list; a driver that never ends its list is not followed further."""

Ask = Callable[[int, bytearray], Any]
"""A request and its struct, filled in place; raises OSError where the list is at its end."""


class Mode(msgspec.Struct, frozen=True, gc=False):
    """One pixel format and size, with its highest rate; 0 where the driver tells none."""

    pixel_format: str
    width: int
    height: int
    rate_hz: float


def modes(ask: Ask) -> list[Mode]:
    """All that the camera offers, in the driver's order; empty for a device that gives no frames."""
    found = []
    for form in _listed(ask, ENUM_FMT, 64, lambda i: struct.pack("=II", i, _CAPTURE)):
        code = struct.unpack_from("=I", form, 44)[0]
        name = form[44:48].decode("ascii", "replace")
        for width, height in _sizes(ask, code):
            found.append(Mode(name, width, height, _rate(ask, code, width, height)))
    return found


def _sizes(ask: Ask, code: int) -> Iterator[tuple[int, int]]:
    """A list of sizes, or the largest of a range."""
    for entry in _listed(ask, ENUM_SIZES, 44, lambda i: struct.pack("=II", i, code)):
        kind, width, height_or_most, _, _, most_height, _ = struct.unpack_from("=7I", entry, 8)
        if kind != _DISCRETE:
            yield height_or_most, most_height
            return
        yield width, height_or_most


def _rate(ask: Ask, code: int, width: int, height: int) -> float:
    """The highest rate; of a range of intervals the first is the shortest."""
    best = 0.0
    for entry in _listed(ask, ENUM_INTERVALS, 52, lambda i: struct.pack("=4I", i, code, width, height)):
        kind, numerator, denominator = struct.unpack_from("=3I", entry, 16)
        best = max(best, denominator / numerator if numerator else 0.0)
        if kind != _DISCRETE:
            break
    return best


def _listed(ask: Ask, request: int, size: int, head: Callable[[int], bytes]) -> Iterator[bytes]:
    for i in range(_MOST):
        entry = bytearray(head(i).ljust(size, b"\0"))
        try:
            ask(request, entry)
        except OSError:
            return
        yield bytes(entry)
