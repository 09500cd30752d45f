"""The IMU where a kernel has one: an I2C bus with the registers of an MPU-6050, and the same chip under the kernel's
IIO driver. The registers hold what is written to them, so every value is known.

Writes to the chip at address 0x68, so it runs only on the kernel's own stub of one (module i2c-stub).
"""

from __future__ import annotations

from collections.abc import Iterator
from math import radians
from pathlib import Path
from typing import Any

import pytest

from nodes.imu import Imu
from pipeline.checks import CheckContext, check_source
from pipeline.errors import SensorError
from pipeline.strict import Document

ADDRESS = 0x68
COUNTS = (8192, -4096, 16384, 1234, 100, -200, 32767)
"""Acceleration, temperature, rate."""


def stub() -> int | None:
    """The number of the stub's bus, if this kernel has one."""
    for name in Path("/sys/bus/i2c/devices").glob("i2c-*/name"):
        if "stub" in name.read_text():
            return int(name.parent.name.removeprefix("i2c-"))
    return None


def bound() -> Path | None:
    """The chip as the kernel's IIO driver shows it, if the driver has it."""
    return next(Path("/sys/bus/iio/devices").glob("iio:device*"), None)


def fill_registers(opened: Any) -> None:
    """Makes the stub say that it is an MPU-6050, which measures ``COUNTS``. ``opened`` is its bus."""
    opened.write_byte_data(ADDRESS, 0x75, 0x68)
    for i, count in enumerate(COUNTS):
        high, low = (count & 0xFFFF).to_bytes(2, "big")
        opened.write_byte_data(ADDRESS, 0x3B + 2 * i, high)
        opened.write_byte_data(ADDRESS, 0x3C + 2 * i, low)


@pytest.fixture
def bus() -> Iterator[Any]:
    number = stub()
    if number is None:
        pytest.skip("this kernel has no I2C stub: run it where the module i2c-stub is loaded with chip_addr=0x68")
    if bound() is not None:
        pytest.skip("the kernel's own IIO driver has the chip, so I2C may not")
    import smbus2

    with smbus2.SMBus(number) as opened:
        fill_registers(opened)
        opened.number = number
        yield opened


def settings(**given: Any) -> Any:
    return Document("{}", "settings").decode(Imu.Settings, value=given)


def test_values_are_those_of_the_registers(bus: Any) -> None:
    got = check_source(
        Imu, {"i2c": bus.number, "rate_hz": 50, "batch_ms": 20, "accel_range_g": 8, "gyro_range_dps": 1000}, readings=3
    )
    for reading in got:
        for sample in reading.data:
            assert sample["accel"] == pytest.approx([2 * 9.80665, -9.80665, 4 * 9.80665], rel=1e-6)
            assert sample["gyro"] == pytest.approx([radians(1000) * c / 32768 for c in COUNTS[4:]], rel=1e-6)


def test_range_and_filter_are_in_the_registers(bus: Any) -> None:
    source = Imu(settings(i2c=bus.number, rate_hz=50, accel_range_g=16, gyro_range_dps=250), CheckContext())
    source.open()
    source.close()
    assert [bus.read_byte_data(ADDRESS, r) for r in (0x6B, 0x19, 0x1A, 0x1B, 0x1C)] == [1, 0, 4, 0, 0x18]


def test_a_chip_of_another_family_and_an_empty_address_are_refused(bus: Any) -> None:
    bus.write_byte_data(ADDRESS, 0x75, 0x33)
    with pytest.raises(SensorError, match="calls itself 0x33"):
        Imu(settings(i2c=bus.number), CheckContext()).open()
    with pytest.raises(SensorError, match="nothing answers at address 0x69"):
        Imu(settings(i2c=bus.number, address=0x69), CheckContext()).open()


def test_an_iio_device_gives_its_counts_times_its_scales() -> None:
    folder = bound()
    if folder is None:
        pytest.skip("no IIO device is here: run it where the kernel's driver inv-mpu6050-i2c has the I2C stub")
    scale = float((folder / "in_accel_scale").read_text())
    expected = [scale * int((folder / f"in_accel_{axis}_raw").read_text()) for axis in "xyz"]
    for reading in check_source(Imu, {"iio": "mpu6050", "rate_hz": 2, "batch_ms": 10}, readings=1, turns=200):
        assert reading.data["accel"][0] == pytest.approx(expected)
        assert reading.data["gyro"][0] == pytest.approx([0, 0, 0])
