"""The registers of InvenSense's MPU-6050 family: what to write, and what the data mean.

The sensors run at 1 kHz behind the widest low-pass filter that fits the rate at which they are asked. Source:
InvenSense, "MPU-6000 and MPU-6050 Register Map and Descriptions", "MPU-9250 Register Map and Descriptions".
"""

from __future__ import annotations

import struct
from math import radians

WHO_AM_I, DATA, DATA_BYTES = 0x75, 0x3B, 14
CHIPS = {0x68: "MPU-6050", 0x70: "MPU-6500", 0x71: "MPU-9250", 0x73: "MPU-9255", 0x74: "MPU-6515"}
"""By what the register ``WHO_AM_I`` holds."""

SAMPLE_NS = 1_000_000
_POWER, _DIVIDER, _CONFIG, _GYRO_CONFIG, _ACCEL_CONFIG, _ACCEL_FILTER = 0x6B, 0x19, 0x1A, 0x1B, 0x1C, 0x1D
_ACCEL_RANGES = {2: 0, 4: 1, 8: 2, 16: 3}
_GYRO_RANGES = {250: 0, 500: 1, 1000: 2, 2000: 3}
_LOW_PASS_HZ = ((184, 1), (94, 2), (44, 3), (20, 4), (10, 5), (5, 6))
_G = 9.80665
_DATA = struct.Struct(">3h2x3h")


def registers(chip: int, rate_hz: float, accel_range_g: int, gyro_range_dps: int) -> dict[int, int]:
    """What each register must hold, in the order in which they are to be written."""
    low_pass = next((code for width, code in _LOW_PASS_HZ if width <= rate_hz / 2), _LOW_PASS_HZ[-1][1])
    wanted = {
        _POWER: 1,  # awake, on the gyroscope's clock
        _DIVIDER: 0,
        _CONFIG: low_pass,
        _GYRO_CONFIG: _GYRO_RANGES[gyro_range_dps] << 3,
        _ACCEL_CONFIG: _ACCEL_RANGES[accel_range_g] << 3,
    }
    if CHIPS[chip] != "MPU-6050":  # the later chips filter acceleration apart
        wanted[_ACCEL_FILTER] = low_pass
    return wanted


def sample(block: bytes, accel_range_g: int, gyro_range_dps: int) -> tuple[float, ...]:
    """Acceleration in m/s^2 and angular rate in rad/s from the ``DATA_BYTES`` bytes at ``DATA``."""
    counts = _DATA.unpack(block)
    accel, gyro = accel_range_g * _G / 32768, radians(gyro_range_dps) / 32768
    return (*(c * accel for c in counts[:3]), *(c * gyro for c in counts[3:]))
