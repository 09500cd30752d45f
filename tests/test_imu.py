"""Inertial sensors: WitMotion frames through a pseudo-terminal, IIO files, and the registers of the MPU family."""

from __future__ import annotations

import os
import select
import threading
import tty
from collections.abc import Iterator
from math import nan, radians
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from nodes import imu
from nodes.imu import _SAMPLE, Imu
from pipeline.checks import CheckContext, check_source
from pipeline.clock import ManualClock, SystemClock
from pipeline.errors import ConfigError, SensorError
from pipeline.messages import IMU_DTYPE
from pipeline.protocols import mpu
from pipeline.protocols.witmotion import ACCEL, ACCEL_SCALE, FRAME_BYTES, GYRO, GYRO_SCALE, WitMotion
from pipeline.source import Reading
from pipeline.strict import Document

NS, MS = 1_000_000_000, 1_000_000
RATE = 1000


def frame(kind: int, counts: Any) -> bytes:
    body = bytes((0x55, kind)) + np.array([*counts, 0], "<i2").tobytes()
    return body + bytes((sum(body) & 0xFF,))


def counts_of(index: int) -> tuple[list[int], list[int]]:
    """Sample ``index``, which can be recognised."""
    return [index % 30000, index // 30000, -7], [-(index % 30000), 3, 11]


def sample(index: int) -> bytes:
    accel, gyro = counts_of(index)
    return frame(ACCEL, accel) + frame(GYRO, gyro)


def indices(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    accel = np.round(data["accel"] / ACCEL_SCALE).astype(int)
    result: np.ndarray[Any, Any] = accel[:, 0] + 30000 * accel[:, 1]
    return result


def settings(**given: Any) -> Any:
    return Document("{}", "settings").decode(Imu.Settings, value=given)


class Port:
    """A sensor on the other side of a pseudo-terminal. What nobody reads fills it: ``give_up`` ends a ``write`` that
    waits for room, so that a reader that failed shows why, instead of leaving its sender there for ever."""

    def __init__(self) -> None:
        self.fd, self._slave = os.openpty()
        tty.setraw(self._slave)
        os.set_blocking(self.fd, False)
        self.name = os.ttyname(self._slave)
        self._open = True
        self._given_up = threading.Event()

    def write(self, data: bytes) -> None:
        while data and not self._given_up.is_set():
            try:
                data = data[os.write(self.fd, data) :]
            except BlockingIOError:
                select.select([], [self.fd], [], 0.05)

    def give_up(self) -> None:
        self._given_up.set()

    def unplug(self) -> None:
        if self._open:
            os.close(self._slave)
            os.close(self.fd)
        self._open = False


@pytest.fixture
def port() -> Iterator[Port]:
    made = Port()
    yield made
    made.unplug()


def send_paced(port: Port, clock: SystemClock, first: int, count: int, start_ns: int) -> None:
    """Each sample at its moment, as far as this machine can: all that are due, every 2 ms."""
    sent = 0
    while sent < count:
        due = min(count, (clock.now_ns() - start_ns) * RATE // NS)
        if due > sent:
            port.write(b"".join(sample(first + i) for i in range(sent, due)))
            sent = due
        clock.wait_until(clock.now_ns() + 2 * MS)


# -- the protocol ----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60))
def test_frames_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    whole = b"".join(sample(i) for i in range(30))
    parser, found, at = WitMotion(), [], 0
    for cut in [*cuts, len(whole)]:
        found.append(parser.feed(whole[at : at + cut]))
        at += cut
    got = np.concatenate(found)
    assert np.round(got[:, 0] / ACCEL_SCALE).astype(int).tolist() == list(range(30))
    assert np.round(got[:, 3] / GYRO_SCALE).astype(int).tolist() == [-i for i in range(30)]
    assert parser.damaged == 0


@given(st.integers(2, 17), st.integers(0, 2 * FRAME_BYTES - 1), st.integers(1, 255))
@example(12, 21, 253)  # a sum that becomes a frame's first byte, with a sum that is right by chance
@example(9, 10, 242)
def test_one_damaged_byte_costs_one_frame_and_is_counted(index: int, byte: int, flip: int) -> None:
    whole = bytearray(b"".join(sample(i) for i in range(20)))
    whole[index * 2 * FRAME_BYTES + byte] ^= flip
    parser = WitMotion()
    got = parser.feed(bytes(whole))
    assert parser.damaged == 1
    assert len(got) == 20
    half = slice(0, 3) if byte < FRAME_BYTES else slice(3, 6)
    assert np.isnan(got[index, half]).all()
    assert np.isnan(got).sum() == 3


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.lists(st.integers(0, 659), max_size=4), st.booleans())
def test_damage_is_the_same_however_the_bytes_are_cut(cuts: list[int], places: list[int], missing: bool) -> None:
    whole = bytearray(b"".join(sample(i) for i in range(30)))
    for place in sorted({*places}, reverse=True):
        if missing:
            del whole[place]
        else:
            whole[place] ^= 0x15
    at_once, parser, found, at = WitMotion(), WitMotion(), [], 0
    expected = at_once.samples(bytes(whole))
    for cut in [*cuts, len(whole)]:
        found += parser.samples(bytes(whole[at : at + cut]))
        at += cut
    np.testing.assert_array_equal(found, expected)
    assert parser.damaged == at_once.damaged


def test_a_listener_may_join_in_the_middle_of_a_frame() -> None:
    parser = WitMotion()
    assert len(parser.feed(sample(0)[5:] + sample(1))) == 2  # the first half is lost, which is nobody's fault
    assert parser.damaged == 0


def test_a_sensor_without_rates_gives_accelerations_at_once() -> None:
    parser = WitMotion()
    for i in range(20):
        got = parser.feed(frame(ACCEL, [i, 0, 0]))
    assert len(got) == 1
    assert round(float(got[0, 0]) / ACCEL_SCALE) == 19
    assert np.isnan(got[0, 3:]).all()


def test_full_scale_is_16_g_and_2000_degrees_per_second() -> None:
    (got,) = WitMotion().feed(frame(ACCEL, [-32768, 0, 2048]) + frame(GYRO, [-32768, 0, 16384]))
    assert got == pytest.approx([-16 * 9.80665, 0, 9.80665, -radians(2000), 0, radians(1000)])


# -- a serial port ---------------------------------------------------------------------------------------------------


def test_a_serial_sensor_keeps_the_contract_of_a_source(port: Port) -> None:
    stop = threading.Event()

    def send() -> None:
        clock, first = SystemClock(), 0
        while not stop.is_set():
            send_paced(port, clock, first, 50, clock.now_ns())
            first += 50

    sender = threading.Thread(target=send)
    sender.start()
    try:
        check_source(Imu, {"port": port.name, "rate_hz": RATE}, readings=40)
    finally:
        stop.set()
        port.give_up()
        sender.join()


def read(source: Imu) -> list[Reading]:
    found = source.read()
    return found if isinstance(found, list) else [] if found is None else [found]


def read_all(source: Imu, wanted: int, turns: int = 3000) -> list[Reading]:
    """Readings until ``wanted`` samples have come."""
    found: list[Reading] = []
    count = 0
    for _ in range(turns):
        readings = read(source)
        found += readings
        count += sum(len(reading.data) for reading in readings)
        if count >= wanted:
            return found
    raise AssertionError(f"{count} samples of {wanted} after {turns} turns")


@pytest.mark.slow
def test_a_thousand_samples_a_second_none_lost_then_twenty_seconds_of_them_at_once(port: Port) -> None:
    clock = SystemClock()
    context = CheckContext(clock=clock)
    source = Imu(settings(port=port.name, rate_hz=RATE), context)
    source.open()
    paced, burst = 4 * RATE, 20 * RATE
    start = clock.now_ns()

    def send() -> None:
        send_paced(port, clock, 0, paced, start)
        port.write(b"".join(sample(i) for i in range(paced, paced + burst)))

    sender = threading.Thread(target=send)
    sender.start()
    try:
        found = read_all(source, paced + burst - 20)
    finally:
        source.close()
        port.give_up()
        sender.join()
    data = np.concatenate([reading.data for reading in found])
    assert indices(data).tolist() == list(range(len(data)))
    assert context.counted == {}
    times = np.concatenate([r.t_capture_ns + r.data["offset_ns"] for r in found])
    truth = start + (np.arange(len(times)) + 1) * NS // RATE
    settled = slice(2 * RATE, paced - 100)
    assert (np.diff(times[settled]) > 0).all()
    # A sender that other programs delay makes samples late, never early: the earliest ones tell the truth.
    error = (times - truth)[settled]
    doubt = max(r.uncertainty_ns for r in found[2 * RATE // 10 : (paced - 100) // 10])
    assert np.median(np.abs(error)) <= doubt + 4 * MS
    assert all(r.t_end_ns <= r.t_receipt_ns for r in found)


@pytest.mark.parametrize("gather_ms", [10, 20])
def test_twenty_seconds_of_simulated_time_through_a_real_port(port: Port, gather_ms: int) -> None:
    """Frames pass the port, time is simulated: 22 s at 1 kHz, the sensor's clock 80 ppm slow, receipts late by up to
    3 ms."""
    clock = ManualClock()
    context = CheckContext(clock=clock)
    source = Imu(settings(port=port.name, rate_hz=RATE, gather_ms=gather_ms), context)
    source.open()
    moments = 22_000 // gather_ms
    late = np.random.default_rng(5).exponential(0.5 * MS, moments).clip(0, 3 * MS)
    true_period = NS / RATE * (1 + 80e-6)
    found: list[Reading] = []
    for i in range(moments):
        clock.advance(max(0, round((i + 1) * gather_ms * true_period + late[i]) - clock.now_ns()))
        port.write(b"".join(sample(gather_ms * i + j) for j in range(gather_ms)))
        wanted = gather_ms * (i + 1) - 1
        for _ in range(50):
            found += (readings := read(source))
            if readings and indices(readings[-1].data)[-1] >= wanted:
                break
    source.close()
    assert {len(reading.data) for reading in found} == {10}
    data = np.concatenate([reading.data for reading in found])
    assert indices(data).tolist() == list(range(22_000))
    assert context.counted == {}
    times = np.concatenate([r.t_capture_ns + r.data["offset_ns"] for r in found])
    error = times - (np.arange(22_000) + 1) * true_period
    doubt = np.repeat([r.uncertainty_ns for r in found], [len(r.data) for r in found])
    assert not any(r.new_epoch for r in found[1:])
    assert (np.diff(times) > 0).all()
    assert np.abs(error[10_000:]).max() < MS
    assert np.mean(np.abs(error) <= doubt) >= 0.99


def test_damaged_frames_are_counted_and_leave_holes(port: Port) -> None:
    context = CheckContext()
    source = Imu(settings(port=port.name, rate_hz=RATE), context)
    source.open()
    broken = bytearray(b"".join(sample(i) for i in range(40)))
    broken[20 * 2 * FRAME_BYTES + 4] ^= 1
    port.write(bytes(broken))
    data = np.concatenate([r.data for r in read_all(source, 40)])
    source.close()
    assert context.counted == {"checksum": 1}
    assert np.isnan(data["accel"]).all(axis=1).tolist() == [i == 20 for i in range(40)]


def test_an_unplugged_sensor_is_a_sensor_error_and_so_is_one_that_is_not_there(port: Port) -> None:
    source = Imu(settings(port=port.name, rate_hz=RATE), CheckContext())
    source.open()
    port.write(b"".join(sample(i) for i in range(20)))
    read_all(source, 20)
    port.unplug()
    with pytest.raises(SensorError, match="unplugged"):
        read_all(source, 100)
    source.close()
    with pytest.raises(SensorError, match="plugged in"):
        source.open()


def test_batches_that_gathered_come_together_each_with_its_own_time(port: Port) -> None:
    clock = ManualClock()
    source = Imu(settings(port=port.name, rate_hz=200), CheckContext(clock=clock))
    source.open()
    clock.advance(20 * MS)
    port.write(b"".join(sample(i) for i in range(4)))
    first, second = read_all(source, 4)
    source.close()
    assert [indices(r.data).tolist() for r in (first, second)] == [[0, 1], [2, 3]]
    assert [r.data["offset_ns"].tolist() for r in (first, second)] == [[0, 5 * MS], [0, 5 * MS]]
    assert [r.t_capture_ns for r in (first, second)] == [5 * MS, 15 * MS]
    assert [r.t_end_ns for r in (first, second)] == [10 * MS, 20 * MS]
    assert [r.new_epoch for r in (first, second)] == [True, False]


def test_what_an_adapter_holds_back_is_part_of_the_uncertainty(port: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    doubts = []
    for held_ms in (0, 16):
        monkeypatch.setattr("nodes.imu.polling_ns", lambda path, held_ms=held_ms: held_ms * MS)
        clock = ManualClock()
        source = Imu(settings(port=port.name, rate_hz=200), CheckContext(clock=clock))
        source.open()
        clock.advance(20 * MS)
        port.write(b"".join(sample(i) for i in range(4)))
        doubts += [read_all(source, 4)[-1].uncertainty_ns]
        source.close()
    assert doubts[1] - doubts[0] == 16 * MS


def test_what_had_come_of_a_batch_is_given_before_its_sensor_is_lost(port: Port) -> None:
    clock = ManualClock()
    source = Imu(settings(port=port.name, rate_hz=200, silence_ms=500), CheckContext(clock=clock))
    source.open()
    clock.advance(15 * MS)
    port.write(b"".join(sample(i) for i in range(3)))
    assert [read(source) for _ in range(2)] == [[]] * 2
    clock.advance(501 * MS)
    silent = read(source)
    with pytest.raises(SensorError, match="no sample for 500 ms"):
        source.read()
    clock.advance(5 * MS)
    port.write(sample(3))
    assert [read(source) for _ in range(2)] == [[]] * 2
    port.unplug()
    unplugged = read_all(source, 1)
    with pytest.raises(SensorError, match="unplugged"):
        source.read()
    source.close()
    assert [indices(r.data).tolist() for r in silent] == [[0, 1], [2]]
    assert silent[-1].t_end_ns <= 15 * MS
    assert [indices(r.data).tolist() for r in unplugged] == [[3]]


def test_a_silent_sensor_is_lost_after_a_while(port: Port) -> None:
    clock = ManualClock()
    source = Imu(settings(port=port.name, rate_hz=RATE, silence_ms=500), CheckContext(clock=clock))
    source.open()
    assert source.read() is None
    clock.advance(501 * MS)
    with pytest.raises(SensorError, match="no sample for 500 ms"):
        source.read()
    source.close()


def test_a_wrong_rate_is_refused_with_the_right_one(port: Port) -> None:
    clock = ManualClock()
    source = Imu(settings(port=port.name, rate_hz=100), CheckContext(clock=clock))
    source.open()

    def feed() -> None:
        for i in range(400):
            clock.advance(50 * MS)
            port.write(b"".join(sample(10 * i + j) for j in range(10)))
            source.read()

    with pytest.raises(SensorError, match="rate_hz: 200"):
        feed()
    source.close()


@pytest.mark.parametrize("until", [312, 405])
def test_a_stall_while_the_rate_is_measured_is_no_wrong_rate(port: Port, until: int) -> None:
    """What waited meanwhile comes later, a little at a time: until then the rate is wrong."""
    clock = ManualClock()
    source = Imu(settings(port=port.name, rate_hz=100, silence_ms=5000), CheckContext(clock=clock))
    source.open()
    waiting: list[bytes] = []
    for i in range(550):
        clock.advance(10 * MS)
        waiting.append(sample(i))
        if not 290 <= i < until:
            port.write(b"".join(waiting[:3]))  # the terminal has room for all that ever waits
            del waiting[:3]
            source.read()
    assert not waiting
    source.close()


# -- IIO and I2C -----------------------------------------------------------------------------------------------------


@pytest.fixture
def iio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The files that the kernel shows of an accelerometer with a gyroscope."""
    folder = tmp_path / "iio:device3"
    folder.mkdir()
    files = {
        "name": "mpu6050",
        "in_accel_scale": "0.000598",
        "in_anglvel_scale": "0.001064724",
        "sampling_frequency": "50",
    }
    files |= {f"in_accel_{axis}_raw": str(value) for axis, value in zip("xyz", (100, -200, 16384), strict=True)}
    files |= {f"in_anglvel_{axis}_raw": str(value) for axis, value in zip("xy", (10, -20), strict=True)}
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    monkeypatch.setattr(imu, "_IIO", tmp_path)
    return folder


def test_an_iio_device_keeps_the_contract_and_gives_si_units(iio: Path) -> None:
    (iio / "in_accel_x_offset").write_text("50\n")
    for reading in check_source(Imu, {"iio": "mpu6050", "rate_hz": 200}, readings=3):
        for accel, gyro in zip(reading.data["accel"], reading.data["gyro"], strict=True):
            assert accel == pytest.approx([150 * 0.000598, -200 * 0.000598, 16384 * 0.000598])
            assert gyro[:2] == pytest.approx([0.01064724, -0.02129448])
            assert np.isnan(gyro[2])  # not measured
        assert reading.uncertainty_ns >= 10 * MS  # half a period of the sensor's own 50 Hz


def test_an_iio_device_that_is_not_there_or_goes_away(iio: Path) -> None:
    with pytest.raises(SensorError, match=r"iio:device3 \(mpu6050\)"):
        Imu(settings(iio="lsm6ds3"), CheckContext()).open()
    source = Imu(settings(iio="iio:device3"), CheckContext())
    source.open()
    (iio / "in_accel_x_raw").write_text("")
    with pytest.raises(SensorError, match="gave no value"):
        read_all(source, 5)
    source.close()


def test_polling_that_cannot_keep_up_skips_and_counts(iio: Path) -> None:
    clock = ManualClock()
    context = CheckContext(clock=clock)
    source = Imu(settings(iio="mpu6050", rate_hz=100), context)
    source.open()
    (first,) = read(source)
    clock.advance(95 * MS)
    (second,), (third,) = read(source), read(source)
    source.close()
    assert context.counted == {"not_asked": 8}
    assert first.t_end_ns < second.t_capture_ns < third.t_capture_ns


def test_an_i2c_bus_that_is_not_there_is_a_sensor_error() -> None:
    with pytest.raises(SensorError, match="i2c-251"):
        Imu(settings(i2c=251), CheckContext()).open()


def test_the_registers_say_range_and_filter() -> None:
    assert mpu.registers(0x68, 200, 4, 500) == {0x6B: 1, 0x19: 0, 0x1A: 2, 0x1B: 0x08, 0x1C: 0x08}
    assert mpu.registers(0x71, 1000, 16, 2000) == {0x6B: 1, 0x19: 0, 0x1A: 1, 0x1B: 0x18, 0x1C: 0x18, 0x1D: 1}
    assert mpu.registers(0x70, 5, 2, 250)[0x1A] == 6


def test_counts_become_si_units() -> None:
    block = np.array([16384, 0, -32768, 999, 32767, 0, -16384], ">i2").tobytes()
    assert mpu.sample(block, 2, 250) == pytest.approx(
        (9.80665, 0, -2 * 9.80665, radians(250) * 32767 / 32768, 0, -radians(125))
    )


@pytest.mark.parametrize("given_settings", [{}, {"port": "/dev/x", "i2c": 1}, {"i2c": 1, "iio": "mpu6050"}])
def test_settings_name_exactly_one_device(given_settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="exactly one"):
        settings(**given_settings)


def test_a_batch_is_as_the_layout_says(iio: Path) -> None:
    (reading,) = check_source(Imu, {"iio": "mpu6050", "rate_hz": 400, "batch_ms": 10}, readings=1, lives=1)
    assert reading.data.dtype == IMU_DTYPE
    assert len(reading.data) == 4


@given(st.lists(st.tuples(st.integers(0, 2**62), *[st.floats(-1e6, 1e6) | st.just(nan)] * 6), min_size=1, max_size=20))
def test_samples_are_packed_as_arrays_would_hold_them(rows: list[tuple[Any, ...]]) -> None:
    expected = np.empty(len(rows), IMU_DTYPE)
    expected["offset_ns"] = [row[0] for row in rows]
    values = np.array([row[1:] for row in rows], np.float32)
    expected["accel"], expected["gyro"] = values[:, :3], values[:, 3:]
    assert b"".join(_SAMPLE.pack(*row) for row in rows) == expected.tobytes()
