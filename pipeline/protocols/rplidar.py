"""SLAMTEC's RPLidar serial protocol: requests, the descriptors that answer them, and the plain scan.

A measurement has five bytes: quality, angle clockwise from the front in 1/64 degree, distance in 1/4 mm; 0 mm is no
echo. The sensor measures at a fixed rate which it states, so measurements are counted and the count is fitted against
their receipts. Source: SLAMTEC, "RPLIDAR Interface Protocol and Application Notes".
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from pipeline.protocols.sweeps import Sweep, make_points
from pipeline.timebase import SampleClock

STOP, SCAN, HEALTH, RATE = b"\xa5\x25", b"\xa5\x20", b"\xa5\x52", b"\xa5\x59"
PWM = b"\xa5\xf0\x02\x94\x02\xc1"
"""Motor on at 660 of 1023, for adapters that take the speed on the wire."""
PWM_OFF = b"\xa5\xf0\x02\x00\x00\x57"
SCAN_ANSWER, HEALTH_ANSWER, RATE_ANSWER = (
    b"\xa5\x5a\x05\x00\x00\x40\x81",
    b"\xa5\x5a\x03\x00\x00\x00\x06",
    b"\xa5\x5a\x04\x00\x00\x00\x15",
)
MEASUREMENT_BYTES = 5


def health(answer: bytes) -> tuple[str, int]:
    """What the three bytes after ``HEALTH_ANSWER`` say: good, warning or error, and the error's code."""
    status, code = struct.unpack("<BH", answer)
    return ("good", "warning", "error")[min(status, 2)], code


def rate_hz(answer: bytes) -> float:
    """Measurements per second of the plain scan, from the four bytes after ``RATE_ANSWER``."""
    period_us: int = struct.unpack("<HH", answer)[0]
    return 1e6 / max(1, period_us)


class Rplidar:
    """Bytes of a running scan in, sweeps out. ``damaged`` counts the stretches of bytes that were no measurement."""

    def __init__(self, rate_hz: float) -> None:
        self.damaged = self.partial = self.lost = 0
        self._period_ns = 1e9 / rate_hz
        self._times = SampleClock(rate_hz)
        self._rest = b""
        self._in_step, self._whole, self._new_epoch = True, False, False
        self._turn: list[tuple[int, int, int]] = []

    def feed(self, data: bytes, receipt_ns: int) -> list[Sweep]:
        """The sweeps that ``data`` completes: a turn ends where the sensor marks the beginning of the next."""
        found = self._measurements(data)
        if not found:
            return []
        block = self._times.update(len(found), receipt_ns)
        self.lost += block.lost
        self._new_epoch |= block.new_epoch and self._whole
        step = (block.t_end_ns - block.t_capture_ns) / len(found)
        sweeps = []
        for i, (begins, *measured) in enumerate(found):
            if begins:
                if self._whole:
                    sweeps.append(self._sweep(block.t_capture_ns + round(i * step), receipt_ns, block.uncertainty_ns))
                else:
                    self._whole, self.partial = True, self.partial + 1
                self._turn = []
            self._turn.append((measured[0], measured[1], measured[2]))
        return [s for s in sweeps if s is not None]

    def _measurements(self, data: bytes) -> list[tuple[bool, int, int, int]]:
        buffer, at, found = self._rest + data, 0, []
        while at + MEASUREMENT_BYTES <= len(buffer):
            first, second = buffer[at], buffer[at + 1]
            if (first ^ first >> 1) & 1 and second & 1:
                self._in_step = True
                angle, distance = struct.unpack_from("<HH", buffer, at + 1)
                found.append((bool(first & 1), first >> 2, angle >> 1, distance))
                at += MEASUREMENT_BYTES
                continue
            self.damaged += self._in_step
            self._in_step = False
            at += 1
        self._rest = buffer[at:]
        return found

    def _sweep(self, end_ns: int, receipt_ns: int, uncertainty_ns: int) -> Sweep | None:
        turn: np.ndarray[Any, Any] = np.array(self._turn, np.float64).reshape(-1, 3)
        # The turn's last measurement was made one period before the next turn's first.
        offsets = -np.round(np.arange(len(turn) - 1, -1, -1) * self._period_ns).astype(np.int32)
        seen = turn[:, 2] > 0
        if not seen.any():
            return None
        angle, distance = np.radians(turn[:, 1] / 64), turn[:, 2] / 4000
        xyz = np.stack([distance * np.cos(angle), -distance * np.sin(angle), np.zeros(len(turn))], axis=1)
        new_epoch, self._new_epoch = self._new_epoch, False
        points = make_points(xyz[seen], turn[seen, 0], offsets[seen])
        end = end_ns - round(self._period_ns)
        return Sweep(points, end, None, receipt_ns, uncertainty_ns, new_epoch)
