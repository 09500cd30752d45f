"""An inertial sensor: on a serial port (WitMotion), on an I2C bus (MPU-6050, 6500, 9250), or under Linux' IIO.

    sources:
      imu:  {kind: imu, port: /dev/ttyUSB0, baud: 115200, rate_hz: 200}
      imu2: {kind: imu, i2c: 1, address: 0x68, rate_hz: 200, accel_range_g: 4, gyro_range_dps: 500}
      imu3: {kind: imu, iio: mpu6050, rate_hz: 100}

Samples are in m/s^2 and rad/s, NaN where the sensor measures nothing, and travel in batches of ``batch_ms``.

A serial sensor samples on its own clock and sends each sample at once: its samples are counted, and the count is fitted
against the times at which they were received (``timebase.SampleClock``). What is left unknown is the constant time that
one sample takes on its way, and how long it waits in a USB adapter, which is part of the stated uncertainty. Samples
gather in the port for ``gather_ms`` and make their batches together: to be woken costs more than to take one batch
more. I2C and IIO sensors are asked, sample by sample: the host's clock says when, and the sensor's answer is at most
one of its own periods (1 ms) old.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from math import ceil, nan
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec
import numpy as np

from pipeline.clock import Clock
from pipeline.devices import polling_ns, port_trouble, read_line, refusal, serial_ports
from pipeline.errors import SensorError
from pipeline.messages import IMU_DTYPE, ImuLayout, Payload
from pipeline.protocols import mpu
from pipeline.protocols.witmotion import Sample, WitMotion
from pipeline.serialport import SerialPort
from pipeline.source import Found, Pace, Reading, Search, Source, SourceContext
from pipeline.timebase import SampleClock

_NS, _MS = 1_000_000_000, 1_000_000
_PATIENCE_S = 0.05
_SAMPLE = struct.Struct("<q6f")
"""One sample as ``IMU_DTYPE`` lays it out."""
_RATE_CHECK_NS = 3 * _NS
_RATE_DOUBT_NS = _NS
_RATE_TOLERANCE = 0.05

Rate = Annotated[float, msgspec.Meta(gt=0, le=8000)]


class Imu(Source):
    """Accelerometer and gyroscope."""

    payload: ClassVar[Payload] = "imu"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """Exactly one of ``port`` (a serial port), ``i2c`` (the number of the bus) and ``iio`` (a device's name, or
        its folder like ``iio:device0``). ``rate_hz`` is what a serial sensor is set to, and how often the others are
        asked. Samples travel in batches of ``batch_ms``; for ``gather_ms`` they may gather in a serial port until they
        are taken, all at once: at that of one batch each comes when it is full, and costs more CPU. The ranges are for
        I2C; the others know theirs. A device that says nothing for ``silence_ms`` is lost."""

        port: str | None = None
        baud: Annotated[int, msgspec.Meta(ge=1200)] = 115_200
        i2c: Annotated[int, msgspec.Meta(ge=0)] | None = None
        address: Annotated[int, msgspec.Meta(ge=3, le=0x77)] = 0x68
        iio: str | None = None
        rate_hz: Rate = 100.0
        batch_ms: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 10.0
        gather_ms: Annotated[float, msgspec.Meta(ge=1, le=1000)] = 20.0
        accel_range_g: Literal[2, 4, 8, 16] = 4
        gyro_range_dps: Literal[250, 500, 1000, 2000] = 500
        silence_ms: Annotated[int, msgspec.Meta(ge=100)] = 1000

        def __post_init__(self) -> None:
            given = [name for name in ("port", "i2c", "iio") if getattr(self, name) is not None]
            if len(given) != 1:
                raise ValueError(
                    f"an IMU needs exactly one of `port`, `i2c` and `iio`, and has {' and '.join(given) or 'none'}; "
                    "write for example `port: /dev/ttyUSB0`, `i2c: 1` or `iio: mpu6050`"
                )

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._device: _Device | None = None

    @classmethod
    def pace(cls, settings: Any) -> Pace:
        pace = Pace.of(settings.rate_hz, settings.batch_ms, "batch_ms")
        if settings.port is None or settings.gather_ms <= settings.batch_ms:
            return pace
        return msgspec.structs.replace(pace, gather_ns=settings.gather_ms * 1e6, sooner="lower `gather_ms`")

    @classmethod
    def discover(cls, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> list[Search]:
        """I2C buses are named, never asked: to ask a chip who it is, its bus must be written to."""
        serial = [Found(name=f"{path}  {about}".rstrip(), settings={"port": str(path)},
                        detail=refused or f"if what is on this port is an IMU (WitMotion){_slow(path, sys)}")
                  for path, about, refused in serial_ports(sys, dev)]  # fmt: skip
        return [
            Search(looked_for="serial ports on USB or on the board (/sys/class/tty)", found=serial),
            Search(looked_for="I2C buses (/sys/class/i2c-dev, there after `modprobe i2c-dev`)",
                   found=[_bus(folder, sys, dev) for folder in sorted((sys / "class/i2c-dev").glob("i2c-*"))]),
            Search(looked_for="sensors that the kernel drives (IIO, /sys/bus/iio/devices)",
                   found=[_kernels(folder) for folder in sorted((sys / "bus/iio/devices").glob("iio:device*"))]),
        ]  # fmt: skip

    @classmethod
    def absence(cls, settings: Any) -> str:
        path = Path(settings.port or f"/dev/i2c-{settings.i2c}")
        if settings.iio is None:
            if not os.path.exists(path):
                return f"the IMU's {path} is not here."
            refused = refusal(path, "i2c" if settings.port is None else "dialout")
            return f"the IMU's {path}: {refused}." if refused else ""
        try:
            _Iio._find(settings.iio)
        except SensorError as error:
            return str(error)
        return ""

    def open(self) -> None:
        self.close()
        settings = self.settings
        if settings.port is not None:
            self._device = _Serial(settings, self.context)
        elif settings.i2c is not None:
            self._device = _Polled(settings, self.context, _Mpu(settings))
        else:
            self._device = _Polled(settings, self.context, _Iio(settings.iio))

    def read(self) -> Reading | list[Reading] | None:
        if self._device is None:
            raise SensorError("the IMU was read before it was opened; open it first.")
        return self._device.read()

    def close(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            device.close()


def _slow(port: Path, sys: Path) -> str:
    """That a port's adapter holds bytes for long, and what to do; "" if it does not."""
    held_ms = polling_ns(port, sys) // _MS
    if held_ms <= 1:
        return ""
    timer = f"/sys/class/tty/{port.resolve().name}/device/latency_timer"
    return f"\nits adapter holds bytes for up to {held_ms} ms, so its times are less certain; echo 1 | sudo tee {timer}"


def _bus(folder: Path, sys: Path, dev: Path) -> Found:
    """An I2C bus as `sensorium devices` shows it, with the chips that the kernel itself knows on it."""
    number = int(folder.name.removeprefix("i2c-"))
    chips = ", ".join(f"{read_line(chip / 'name')} at 0x{chip.name[-2:]}"
                      for chip in sorted((sys / "bus/i2c/devices").glob(f"{number}-00??")))  # fmt: skip
    detail = refusal(dev / folder.name, "i2c") or "if an MPU-6050, 6500 or 9250 is on this bus, at 0x68 or 0x69"
    return Found(name=f"{dev / folder.name}  {read_line(folder / 'name')}".rstrip(), settings={"i2c": number},
                 detail=detail + (f"\nthe kernel knows {chips} on it" if chips else ""))  # fmt: skip


def _kernels(folder: Path) -> Found:
    """An IIO device as `sensorium devices` shows it."""
    name = read_line(folder / "name")
    kinds = [said for kind, said in (("accel", "acceleration"), ("anglvel", "angular rate"))
             if any((folder / f"in_{kind}_{axis}_raw").exists() for axis in "xyz")]  # fmt: skip
    shown = f"{folder.name}  {name}".rstrip()
    if not kinds:
        return Found(name=shown, detail="measures neither acceleration nor angular rate")
    return Found(name=shown, detail=f"measures {' and '.join(kinds)}", settings={"iio": folder.name})


class _Device(Protocol):
    def read(self) -> Reading | list[Reading] | None: ...
    def close(self) -> None: ...


def _reading(values: np.ndarray[Any, Any], times: np.ndarray[Any, Any], receipt_ns: int,
             uncertainty_ns: int) -> Reading:  # fmt: skip
    """A batch of samples: f4 [n, 6] values at [n] session times."""
    data = np.empty(len(values), IMU_DTYPE)
    data["offset_ns"] = times - times[0]
    data["accel"], data["gyro"] = values[:, :3], values[:, 3:]
    return Reading(layout=ImuLayout(len(values)), data=data, t_capture_ns=int(times[0]), t_end_ns=int(times[-1]),
                   t_receipt_ns=receipt_ns, uncertainty_ns=uncertainty_ns)  # fmt: skip


# -- serial ----------------------------------------------------------------------------------------------------------


class _Serial:
    """A sensor that sends frames on its own clock."""

    def __init__(self, settings: Imu.Settings, context: SourceContext) -> None:
        try:
            self._port = SerialPort(str(settings.port), settings.baud)
        except (OSError, ValueError) as error:
            raise SensorError(
                f"the IMU's serial port {settings.port} cannot be opened: {port_trouble(str(settings.port), error)}"
            ) from error
        self._settings, self._context = settings, context
        self._polling_ns = polling_ns(str(settings.port))
        self._frames = WitMotion()
        self._times = SampleClock(settings.rate_hz)
        self._batch = max(1, round(settings.rate_hz * settings.batch_ms / 1000))
        self._wanted = self._batch * max(1, round(settings.gather_ms / settings.batch_ms))
        self._held: list[Sample] = []
        self._count = 0
        self._end_ns = -1
        self._last_ns = self._first_ns = context.clock.now_ns()
        self._rate_known = False
        self._doubt_ns: int | None = None

    def read(self) -> list[Reading] | None:
        try:
            samples, now = self._receive()
        except SensorError:
            if not self._held:
                raise
            return self._batches(self._last_ns)  # what came before; the port fails again when it is read again
        if samples:
            self._held += samples
            self._check_rate(len(samples), now)
            self._last_ns = now
        elif now - self._last_ns > self._settings.silence_ms * _MS:
            if self._held:
                return self._batches(self._last_ns)
            raise SensorError(
                f"the IMU on {self._settings.port} sent no sample for {self._settings.silence_ms} ms. Is it a "
                f"WitMotion sensor that sends acceleration at {self._settings.baud} baud, and is it still plugged in?"
            )
        return self._batches(now) if len(self._held) >= self._wanted else None

    def _receive(self) -> tuple[list[Sample], int]:
        try:
            data = self._port.read(self._frames.missing_bytes(self._wanted - len(self._held)), _PATIENCE_S)
        except OSError as error:
            raise SensorError(
                f"the IMU's serial port {self._settings.port} failed: {error}. It was unplugged, or another program "
                "reads it."
            ) from error
        now = self._context.clock.now_ns()
        damaged = self._frames.damaged
        samples = self._frames.samples(data)
        if self._frames.damaged > damaged:
            self._context.count("checksum", self._frames.damaged - damaged)
        return samples, now

    def _batches(self, now: int) -> list[Reading]:
        """What is held, the last of it received at ``now``. A batch has a few samples: numbers one by one cost less
        than arrays do."""
        values, self._held = self._held, []
        block = self._times.update(len(values), now)
        if block.lost:
            self._context.count("lost", block.lost)
        # A block lasts until one period after its last sample began; a sample is sent when it has been taken.
        step = (block.t_end_ns - block.t_capture_ns) / len(values)
        # Whatever a count says, nothing is received before it happens: more samples than time means that a queue
        # emptied, or that the count is wrong. They share the time that there was.
        end, excess = block.t_end_ns, max(0, block.t_end_ns - now)
        if excess:
            end = max(now, self._end_ns + len(values))
            step = min(step, (end - self._end_ns) / len(values))
        self._end_ns, last = end, len(values) - 1
        times = [end - round((last - i) * step) for i in range(len(values))]
        doubt, found = block.uncertainty_ns + excess + self._polling_ns, []
        for first in range(0, len(values), self._batch):
            some = values[first : first + self._batch]
            begin = times[first]
            packed = [_SAMPLE.pack(times[first + i] - begin, *value) for i, value in enumerate(some)]
            found.append(
                Reading(layout=ImuLayout(len(some)), data=np.frombuffer(b"".join(packed), IMU_DTYPE),
                        t_capture_ns=begin, t_end_ns=times[first + len(some) - 1], t_receipt_ns=now,
                        uncertainty_ns=doubt, new_epoch=block.new_epoch and not first)
            )  # fmt: skip
        return found

    def _check_rate(self, samples: int, now: int) -> None:
        """A wrong ``rate_hz`` would make every time wrong: better no data than those."""
        if self._rate_known:
            return
        if self._count == 0:
            self._first_ns, self._count = now, 1
            return
        self._count += samples
        passed = now - self._first_ns
        if passed < _RATE_CHECK_NS:
            return
        found, expected = (self._count - 1) * _NS / passed, self._settings.rate_hz
        wrong = self._count > 10 and abs(found / expected - 1) > _RATE_TOLERANCE
        if wrong:  # this process may just have been stopped, and the rest be waiting in the port
            self._doubt_ns = now if self._doubt_ns is None else self._doubt_ns
            if now - self._doubt_ns < _RATE_DOUBT_NS:
                return
        self._rate_known = True
        if wrong:
            raise SensorError(
                f"the IMU on {self._settings.port} sends {found:.1f} samples per second where `rate_hz` says "
                f"{expected:g}. Set `rate_hz: {float(f'{found:.3g}'):g}`, or set the sensor to {expected:g} Hz."
            )

    def close(self) -> None:
        self._port.close()


# -- asked: I2C and IIO ----------------------------------------------------------------------------------------------


class _Registers(Protocol):
    """A sensor that answers when asked."""

    delay_ns: int
    """Its answer is up to this old."""

    def sample(self) -> tuple[float, ...]: ...
    def close(self) -> None: ...


class _Polled:
    """Asks a sensor ``rate_hz`` times a second."""

    def __init__(self, settings: Imu.Settings, context: SourceContext, sensor: _Registers) -> None:
        self._sensor, self._context = sensor, context
        self._clock: Clock = context.clock
        self._period_ns = max(1, round(_NS / settings.rate_hz))
        self._wanted = max(1, round(settings.rate_hz * settings.batch_ms / 1000))
        self._due_ns = self._clock.now_ns()
        self._last_ns = 0
        self._held: list[tuple[float, ...]] = []
        self._times: list[int] = []
        self._doubt_ns = 0

    def read(self) -> Reading | None:
        until = self._clock.now_ns() + round(_PATIENCE_S * _NS)
        while len(self._held) < self._wanted:
            if not self._clock.wait_until(min(self._due_ns, until)) or self._clock.now_ns() < self._due_ns:
                return None
            self._take()
        values, times = np.array(self._held, np.float32), np.array(self._times, np.int64)
        doubt, receipt = self._doubt_ns, self._clock.now_ns()
        self._held, self._times, self._doubt_ns = [], [], 0
        return _reading(values, times, receipt, doubt)

    def _take(self) -> None:
        before = self._clock.now_ns()
        self._held.append(self._sensor.sample())
        after = self._clock.now_ns()
        # The sensor measured between one of its periods before the question and the end of the answer.
        early = before - self._sensor.delay_ns
        self._last_ns = max((early + after) // 2, self._last_ns + 1)
        self._times.append(self._last_ns)
        self._doubt_ns = max(self._doubt_ns, (after - early + 1) // 2)
        missed = max(0, (after - self._due_ns) // self._period_ns)
        self._due_ns += (missed + 1) * self._period_ns
        if missed:  # the bus, or the machine, is slower than the rate
            self._context.count("not_asked", missed)

    def close(self) -> None:
        self._sensor.close()


class _Mpu:
    """A chip of the MPU-6050 family, asked for its newest sample."""

    delay_ns = mpu.SAMPLE_NS

    def __init__(self, settings: Imu.Settings) -> None:
        self._ranges = (settings.accel_range_g, settings.gyro_range_dps)
        self._where = f"address {settings.address:#04x} of I2C bus {settings.i2c}"
        self._number, self._address = settings.i2c, settings.address
        self._bus = self._open()
        try:
            self._configure(self._identify(), settings.rate_hz)
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        import smbus2

        try:
            return smbus2.SMBus(self._number)
        except OSError as error:
            path = Path(f"/dev/i2c-{self._number}")
            if os.path.exists(path):
                why = f"{refusal(path, 'i2c') or error.strerror}."
            else:
                why = "it is not here. Is I2C switched on (`modprobe i2c-dev`; on a Raspberry Pi `raspi-config`)?"
            raise SensorError(f"the I2C bus {path} cannot be opened: {why}") from error

    def _ask(self, call: Callable[..., Any], *arguments: int) -> Any:
        try:
            return call(self._address, *arguments)
        except OSError as error:
            raise SensorError(
                f"nothing answers at {self._where}: {error}. `i2cdetect -y {self._number}` shows who is there; "
                "the other address of this family is 0x69."
            ) from error

    def _identify(self) -> int:
        chip: int = self._ask(self._bus.read_byte_data, mpu.WHO_AM_I)
        if chip not in mpu.CHIPS:
            known = ", ".join(f"{code:#04x} ({name})" for code, name in mpu.CHIPS.items())
            raise SensorError(
                f"the device at {self._where} calls itself {chip:#04x}; known are {known}. Set `address` to the IMU's."
            )
        return chip

    def _configure(self, chip: int, rate_hz: float) -> None:
        """Writes the registers, then reads them all back: a range that was not taken would falsify every value."""
        wanted = mpu.registers(chip, rate_hz, *self._ranges)
        for register, value in wanted.items():
            self._ask(self._bus.write_byte_data, register, value)
        for register, value in wanted.items():
            found: int = self._ask(self._bus.read_byte_data, register)
            if found != value:
                raise SensorError(
                    f"the {mpu.CHIPS[chip]} at {self._where} did not take a setting: register {register:#04x} holds "
                    f"{found:#04x} after {value:#04x} was written. Take its power away and give it back; if that does "
                    "not help, the bus is disturbed or the chip is no genuine one."
                )

    def sample(self) -> tuple[float, ...]:
        return mpu.sample(bytes(self._ask(self._bus.read_i2c_block_data, mpu.DATA, mpu.DATA_BYTES)), *self._ranges)

    def close(self) -> None:
        self._bus.close()


_IIO = Path("/sys/bus/iio/devices")


class _Iio:
    """A sensor that the kernel drives. Its files give counts, scales and offsets; the results are in m/s^2 and rad/s
    by the kernel's own rules (Documentation/ABI/testing/sysfs-bus-iio)."""

    def __init__(self, name: str) -> None:
        self._folder = self._find(name)
        channels = [f"in_{kind}_{axis}" for kind in ("accel", "anglvel") for axis in "xyz"]
        self._scales = [self._scale(channel) for channel in channels]
        self._files = [None if s is None else (self._folder / f"{c}_raw").open("rb", buffering=0)
                       for c, s in zip(channels, self._scales, strict=True)]  # fmt: skip
        if not any(self._files):
            raise SensorError(f"the IIO device {name} ({self._folder}) measures neither acceleration nor angular rate.")
        rate = self._number("sampling_frequency")
        self.delay_ns = ceil(_NS / rate) if rate else _MS

    @staticmethod
    def _find(name: str) -> Path:
        here = {}
        for folder in sorted(_IIO.glob("iio:device*")):
            label = folder / "name"
            here[folder.name] = label.read_text().strip() if label.exists() else ""
        for device, known_as in here.items():
            if name in (device, known_as, str(_IIO / device)):
                return _IIO / device
        listed = ", ".join(f"{device} ({label})" for device, label in here.items()) or "none"
        raise SensorError(
            f"there is no IIO device `{name}`. The kernel shows: {listed}. Its driver may not be loaded, or it is "
            "asked by address instead: `i2c: 1`."
        )

    def _number(self, file: str) -> float | None:
        try:
            return float((self._folder / file).read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise SensorError(
                f"{self._folder / file} cannot be read: {error}. The device is gone, or its driver failed."
            ) from error

    def _scale(self, channel: str) -> tuple[float, float] | None:
        """Scale and offset of a channel: its own, else its kind's; None if it is not there."""
        if not (self._folder / f"{channel}_raw").exists():
            return None
        kind = channel.rpartition("_")[0]
        scale, offset = (
            next((n for n in (self._number(f"{c}_{what}") for c in (channel, kind)) if n is not None), default)
            for what, default in (("scale", 1.0), ("offset", 0.0))
        )
        return scale, offset

    def sample(self) -> tuple[float, ...]:
        return tuple(map(self._value, self._files, self._scales))

    def _value(self, file: Any, scale: tuple[float, float] | None) -> float:
        if scale is None:
            return nan
        try:
            file.seek(0)
            return (int(file.read()) + scale[1]) * scale[0]
        except (OSError, ValueError) as error:
            raise SensorError(
                f"the IIO device at {self._folder} gave no value: {error}. It was unplugged, or its bus is disturbed."
            ) from error

    def close(self) -> None:
        for file in self._files:
            if file is not None:
                file.close()
