"""WitMotion's serial protocol: frames of 11 bytes, ``0x55 type 8 data bytes sum``.

Of the frames that a sensor may be set to send (time, acceleration, rates, angles, field, ...) two make a sample here:
``0x51`` acceleration, full scale 16 g, and ``0x52`` angular rate, full scale 2000 deg/s, in this order, each three
little-endian i2. Source: WitMotion, "WT901C-TTL Datasheet" (standard protocol).
"""

from __future__ import annotations

import struct
from math import nan, radians
from typing import Any

import numpy as np

FRAME_BYTES = 11
HEAD, ACCEL, GYRO = 0x55, 0x51, 0x52
TYPES = range(0x50, 0x60)
G = 9.80665
ACCEL_SCALE = 16 * G / 32768
"""m/s^2 per count."""
GYRO_SCALE = radians(2000) / 32768
"""rad/s per count."""

_THREE = struct.Struct("<hhh")
_PAIR = struct.Struct("<2xhhh5xhhh3x")  # acceleration and rate, one after the other
_ACCEL_HEAD, _GYRO_HEAD = bytes((HEAD, ACCEL)), bytes((HEAD, GYRO))
_ALONE = 10
"""So many accelerations in a row without a rate: the sensor is set to send no rates."""


Sample = tuple[float, float, float, float, float, float]
"""Acceleration in m/s^2 and rate in rad/s, NaN where a frame of the sample was damaged or is not sent."""


class WitMotion:
    """Bytes in, samples out. ``damaged`` counts the stretches of bytes that were no frame (a checksum that fails, a
    byte that is missing); those before the first frame, where the listener joined in the middle of one, are not."""

    def __init__(self) -> None:
        self.damaged = 0
        self._rest = b""
        self._in_step, self._joined = True, False
        self._accel: tuple[float, float, float] | None = None
        self._alone = 0

    def feed(self, data: bytes) -> np.ndarray[Any, Any]:
        """``samples`` as f4 [n, 6]."""
        return np.array(self.samples(data), np.float32).reshape(-1, 6)

    def samples(self, data: bytes) -> list[Sample]:
        """The samples that ``data`` completes."""
        buffer = self._rest + data
        at, last = 0, len(buffer) - FRAME_BYTES
        samples: list[Sample] = []
        while at <= last:
            if self._in_step and at + FRAME_BYTES <= last and self._is_pair(buffer, at):
                ax, ay, az, gx, gy, gz = _PAIR.unpack_from(buffer, at)
                samples.append((ax * ACCEL_SCALE, ay * ACCEL_SCALE, az * ACCEL_SCALE,
                                gx * GYRO_SCALE, gy * GYRO_SCALE, gz * GYRO_SCALE))  # fmt: skip
                self._joined = True
                at += 2 * FRAME_BYTES
                continue
            if self._is_frame(buffer, at):
                self._in_step = self._joined = True
                self._frame(buffer[at + 1], _THREE.unpack_from(buffer, at + 2), samples)
                at += FRAME_BYTES
                continue
            if self._in_step and self._joined:
                if at + 2 * FRAME_BYTES > len(buffer):
                    break  # the frame after it tells whether a byte is wrong or missing
                self.damaged += 1
                if self._is_frame(buffer, at + FRAME_BYTES):
                    at += FRAME_BYTES  # wrong; to look for a frame within would find one by chance
                    continue
            self._in_step = False
            at += 1
        self._rest = buffer[at:]
        return samples

    def missing_bytes(self, samples: int) -> int:
        """How many bytes at least must come before ``samples`` more samples are complete."""
        alone = self._alone >= _ALONE
        held = len(self._rest) + FRAME_BYTES * (self._accel is not None)
        return samples * FRAME_BYTES * (1 if alone else 2) - held

    def _is_pair(self, buffer: bytes, at: int) -> bool:
        """Whether a whole sample of a sensor that sends both stands at ``at``: the usual case, taken at once."""
        return (
            self._accel is None and not self._alone
            and buffer.startswith(_ACCEL_HEAD, at) and buffer.startswith(_GYRO_HEAD, at + 11)
            and sum(buffer[at : at + 10]) & 0xFF == buffer[at + 10]
            and sum(buffer[at + 11 : at + 21]) & 0xFF == buffer[at + 21]
        )  # fmt: skip

    @staticmethod
    def _is_frame(buffer: bytes, at: int) -> bool:
        last = at + FRAME_BYTES - 1
        return buffer[at] == HEAD and buffer[at + 1] in TYPES and sum(buffer[at:last]) & 0xFF == buffer[last]

    def _frame(self, kind: int, counts: tuple[int, ...], samples: list[Sample]) -> None:
        """Pairs an acceleration with the rate that follows it."""
        x, y, z = counts
        if kind == ACCEL:
            if self._accel is not None:
                samples.append((*self._accel, nan, nan, nan))
                self._alone += 1
            self._accel = (x * ACCEL_SCALE, y * ACCEL_SCALE, z * ACCEL_SCALE)
            if self._alone >= _ALONE:  # do not hold each back for a rate that will not come
                samples.append((*self._accel, nan, nan, nan))
                self._accel = None
        elif kind == GYRO:
            rate = (x * GYRO_SCALE, y * GYRO_SCALE, z * GYRO_SCALE)
            if self._alone < _ALONE:
                samples.append((*(self._accel or (nan, nan, nan)), *rate))
            self._accel, self._alone = None, 0
