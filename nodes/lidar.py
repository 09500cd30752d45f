"""A LiDAR: Velodyne and Ouster over UDP, RPLidar on a serial port. One message is one sweep.

    sources:
      lidar:  {kind: lidar, sensor: velodyne, udp: 2368}
      roof:   {kind: lidar, sensor: ouster, udp: 7502, metadata: ouster.json}
      bumper: {kind: lidar, sensor: rplidar, port: /dev/ttyUSB0}

Points are x, y, z in metres (x forward, y left, z up, in the sensor's own frame), intensity, and the time before the
sweep's end, which is the capture time. The sensor's own stamps are fitted against the kernel's receive times of its
packets (``timebase``). Packets that the kernel dropped, because this process was too slow, are counted as ``kernel``.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import msgspec
import numpy as np

from pipeline.datagrams import AT_ONCE, Datagrams
from pipeline.devices import polling_ns, port_trouble, refusal, serial_ports
from pipeline.errors import ConfigError, SensorError, WireError
from pipeline.messages import POINT_DTYPE, Payload, SweepLayout
from pipeline.protocols import rplidar
from pipeline.protocols.sweeps import Sweep
from pipeline.protocols.velodyne import MODELS, Velodyne
from pipeline.source import Found, Reading, Search, Source, SourceContext
from pipeline.strict import NUMBER

_MS, _NS = 1_000_000, 1_000_000_000
_PATIENCE_S, _QUIET_S = 0.05, 0.02
_LARGEST_PACKET = {"velodyne": 2048, "ouster": 65536}
_GATHER_NS = 25 * _MS
"""Packets are taken this often while it is not known when a sweep will be whole: the kernel has stamped them, and
waking for each costs more than decoding."""
_LONGEST_NS = 100 * _MS
"""Once it is known they are taken then; but this often at least, for a node has more to do."""
_MARGIN_NS = 2 * _MS
"""A sweep is whole when the first packet of the next has come, which may be one packet later than last time."""
_SHARE, _OVERHEAD_BYTES = 4, 2048
"""Sooner, where they would else fill this part of what the kernel keeps, each counted with what it costs the kernel."""
_LARGEST = {"velodyne": 1 << 18, "ouster": 1 << 18, "rplidar": 1 << 14}
_NO_SERIAL_PORT = "`port` is the serial one of an RPLidar; that to which others send is `udp`: write `udp: {}`."
_UDP_PORT = {"velodyne": 2368, "ouster": 7502}


class Lidar(Source):
    """Sweeps of a LiDAR."""

    payload: ClassVar[Payload] = "sweep"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``udp`` is the port to which a Velodyne (2368) or an Ouster (7502) sends, ``bind`` the own address that
        listens, ``sensor_ip`` the only sender to be heard if set. ``model`` and ``calibration`` are for a Velodyne
        (an HDL-64E needs its model), ``metadata`` for an Ouster, ``port`` and ``baud`` for an RPLidar. A sensor that
        sends nothing for ``silence_ms`` is lost."""

        sensor: Literal["velodyne", "ouster", "rplidar"]
        udp: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
        bind: str = "0.0.0.0"
        sensor_ip: str | None = None
        model: str | None = None
        calibration: Path | None = None
        metadata: Path | None = None
        port: Annotated[str, msgspec.Meta(extra={NUMBER: _NO_SERIAL_PORT})] | None = None
        baud: Annotated[int, msgspec.Meta(ge=9600)] = 115_200
        min_range_m: Annotated[float, msgspec.Meta(ge=0)] = 0.1
        max_range_m: Annotated[float, msgspec.Meta(gt=0)] = 200.0
        silence_ms: Annotated[int, msgspec.Meta(ge=100)] = 2000

        def __post_init__(self) -> None:
            if self.model is not None and self.model not in MODELS:
                raise ValueError(f"`model: {self.model}` is no Velodyne; allowed are {', '.join(MODELS)}")
            if self.sensor == "ouster" and self.metadata is None:
                raise ValueError(
                    "an Ouster needs `metadata`, a file fetched from it: "
                    "curl http://SENSOR/api/v1/sensor/metadata -o ouster.json"
                )
            if (self.sensor == "rplidar") != (self.port is not None):
                if self.port and self.port.isdecimal():
                    raise ValueError(_NO_SERIAL_PORT.format(self.port))
                raise ValueError("`port`, a serial port like /dev/ttyUSB0, is what an RPLidar needs and no other has")

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._device: _Device | None = None
        self._polling_ns = 0

    @classmethod
    def largest_payload(cls, settings: Any) -> int:
        return _LARGEST[settings.sensor] * POINT_DTYPE.itemsize

    @classmethod
    def discover(cls, sys: Path = Path("/sys"), dev: Path = Path("/dev")) -> list[Search]:
        """Only an RPLidar hangs on this machine; the others send to it over the network, where nobody is asked."""
        where = "serial ports for an RPLidar (/sys/class/tty); a Velodyne or an Ouster is in the network, not listed"
        found = [Found(name=f"{path}  {about}".rstrip(), settings={"sensor": "rplidar", "port": str(path)},
                       detail=refused or "if what is on this port is an RPLidar")
                 for path, about, refused in serial_ports(sys, dev)]  # fmt: skip
        return [Search(looked_for=where, found=found)]

    @classmethod
    def absence(cls, settings: Any) -> str:
        """Whether packets come over the network is not asked; who asks would take the port."""
        gone = [str(path) for path in (settings.port, settings.metadata, settings.calibration)
                if path is not None and not os.path.exists(path)]  # fmt: skip
        if gone:
            return f"the LiDAR's {' and '.join(gone)} {'are' if len(gone) > 1 else 'is'} not here."
        refused = refusal(Path(settings.port), "dialout") if settings.port is not None else ""
        return f"the LiDAR's {settings.port}: {refused}." if refused else ""

    @property
    def protocol(self) -> Any:
        """What makes sweeps of the open device's bytes (``pipeline.protocols``), with its counters."""
        return None if self._device is None else self._device.sweeps

    def open(self) -> None:
        self.close()
        opened = _Serial if self.settings.sensor == "rplidar" else _Packets
        self._device = opened(self.settings, self.context)
        self._polling_ns = 0 if self.settings.port is None else polling_ns(self.settings.port)

    def read(self) -> list[Reading]:
        if self._device is None:
            raise SensorError("the LiDAR was read before it was opened; open it first.")
        return [self._reading(sweep) for sweep in self._device.read()]

    def _reading(self, sweep: Sweep) -> Reading:
        layout = SweepLayout(len(sweep.points))
        data = sweep.points.base  # the lent memory itself, where the protocol has written there
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8:
            data = self.context.loan(layout)
            data.view(POINT_DTYPE)[:] = sweep.points
        return Reading(layout=layout, data=data, t_capture_ns=sweep.t_capture_ns, t_end_ns=sweep.t_capture_ns,
                       t_receipt_ns=sweep.t_receipt_ns, t_device_ns=sweep.t_device_ns,
                       uncertainty_ns=sweep.uncertainty_ns + self._polling_ns, new_epoch=sweep.new_epoch)  # fmt: skip

    def close(self) -> None:
        device, self._device = self._device, None
        if device is not None:
            device.close()


class _Device(Protocol):
    sweeps: Any

    def read(self) -> list[Sweep]: ...
    def close(self) -> None: ...


class _Counters:
    """Tells the context what a protocol counts from its beginning."""

    def __init__(self, context: SourceContext) -> None:
        self._context = context
        self._told: dict[str, int] = {}

    def tell(self, **totals: int) -> None:
        for what, total in totals.items():
            if total > self._told.get(what, 0):
                self._context.count(what, total - self._told.get(what, 0))
                self._told[what] = total


# -- UDP -------------------------------------------------------------------------------------------------------------


class _Packets:
    """A sensor that sends packets."""

    def __init__(self, settings: Lidar.Settings, context: SourceContext) -> None:
        self._settings, self._context = settings, context
        try:
            self.sweeps = self._protocol(settings)
        except ConfigError as error:
            raise SensorError(str(error)) from error
        self._port = settings.udp or _UDP_PORT[settings.sensor]
        self._socket = Datagrams(settings.bind, self._port, context.clock, settings.sensor_ip,
                                 _LARGEST_PACKET[settings.sensor])  # fmt: skip
        self._counters = _Counters(context)
        self._last_ns = self._heard_ns = self._visited_ns = self._next_ns = context.clock.now_ns()
        self._whole_ns = self._turn_ns = 0  # when the last sweep was whole, and how long after the one before

    def _protocol(self, settings: Lidar.Settings) -> Any:
        if settings.sensor == "velodyne":
            return Velodyne(settings.model, settings.calibration, settings.min_range_m, settings.max_range_m,
                            self._lent)  # fmt: skip
        from pipeline.protocols.ouster import Ouster

        assert settings.metadata is not None
        return Ouster(settings.metadata)

    def _lent(self, points: int) -> np.ndarray[Any, Any]:
        """Memory for a sweep, where its readers will see it."""
        return np.ndarray(points, POINT_DTYPE, self._context.loan(SweepLayout(points)))  # a view is checked for long

    def read(self) -> list[Sweep]:
        clock, listening = self._context.clock, self._socket
        clock.wait_until(self._next_ns)
        taken = listening.receive()
        if not taken:
            listening.wait(_QUIET_S)
            taken = listening.receive()
        now = clock.now_ns()
        elapsed_ns, self._visited_ns = now - self._visited_ns, now
        packets = listening.packets
        found: list[Sweep] = []
        if packets:
            self._heard_ns = now
            try:
                found = self.sweeps.take(packets, self._received_ns)
            except WireError as error:
                raise SensorError(str(error)) from error
        for sweep in found:
            self._whole_ns, self._turn_ns = sweep.t_receipt_ns, sweep.t_receipt_ns - self._whole_ns
        self._next_ns = now + min(self._room_ns(taken, elapsed_ns), self._due_ns(now))
        self._counters.tell(kernel=listening.dropped, malformed=self.sweeps.malformed, partial=self.sweeps.partial,
                            foreign=listening.foreign)  # fmt: skip
        if now - self._heard_ns > self._settings.silence_ms * _MS:
            raise self._silence()
        return found

    def _room_ns(self, taken: int, elapsed_ns: int) -> int:
        """How long the kernel has room for packets that come as fast as ``taken`` of them did."""
        if taken == AT_ONCE:
            return 0  # more may wait already
        kept = 2 * max(map(len, self._socket.packets), default=0) + _OVERHEAD_BYTES
        return elapsed_ns * self._socket.room // (_SHARE * kept * max(taken, 1))

    def _due_ns(self, now: int) -> int:
        """How long it takes until the next sweep should be whole; one that is late is looked for more and more
        rarely."""
        if not _GATHER_NS <= self._turn_ns <= 2 * _NS:
            return _GATHER_NS
        due = self._whole_ns + self._turn_ns + _MARGIN_NS - now
        return min(due, _LONGEST_NS) if due > 0 else min(max(-due, _MARGIN_NS), _GATHER_NS)

    def _received_ns(self, index: int) -> int:
        """The wall clock, on which the kernel stamps, may be slewed; receipts of one socket never go back."""
        self._last_ns = max(self._last_ns, self._socket.received_ns(index))
        return self._last_ns

    def _silence(self) -> SensorError:
        who = self._settings.sensor_ip or "anybody"
        return SensorError(
            f"no packet came from {who} on UDP port {self._port} for {self._settings.silence_ms} ms. Is the "
            f"{self._settings.sensor} powered, is this host the destination that is set in it, and does the "
            "firewall let it through?"
        )

    def close(self) -> None:
        self._socket.close()


# -- serial ----------------------------------------------------------------------------------------------------------


class _Serial:
    """An RPLidar: asked for its health and rate, then scanning until it is stopped."""

    def __init__(self, settings: Lidar.Settings, context: SourceContext) -> None:
        import serial

        self._settings, self._context = settings, context
        self._failures: tuple[type[Exception], ...] = (serial.SerialException, OSError, TypeError)
        try:
            self._port = serial.Serial(settings.port, settings.baud, timeout=_PATIENCE_S)
        except (OSError, ValueError) as error:
            raise SensorError(
                f"the RPLidar's serial port {settings.port} cannot be opened: {port_trouble(str(settings.port), error)}"
            ) from error
        try:
            self._motor(True)
            self._start()
        except BaseException as error:
            self.close()
            if isinstance(error, self._failures):
                raise self._failed(error) from error
            raise
        self._counters = _Counters(context)
        self._heard_ns = context.clock.now_ns()

    def _motor(self, on: bool) -> None:
        """By the line DTR on an A1's adapter, by a request on the others; each ignores what is not for it."""
        with contextlib.suppress(OSError):  # a pseudo-terminal and some adapters have no such line
            self._port.dtr = not on
        self._port.write(rplidar.PWM if on else rplidar.PWM_OFF)

    def _start(self) -> None:
        self._port.write(rplidar.STOP)
        self._port.reset_input_buffer()
        state, code = rplidar.health(self._ask(rplidar.HEALTH, rplidar.HEALTH_ANSWER, 3))
        if state == "error":
            raise SensorError(
                f"the RPLidar on {self._settings.port} reports a fault of its own, code {code}. Take its power away "
                "and give it back; if it stays, the device is broken."
            )
        self.sweeps = rplidar.Rplidar(rplidar.rate_hz(self._ask(rplidar.RATE, rplidar.RATE_ANSWER, 4)))
        self._ask(rplidar.SCAN, rplidar.SCAN_ANSWER, 0)

    def _ask(self, request: bytes, answer: bytes, size: int) -> bytes:
        """Sends a request and returns the ``size`` bytes behind its answer."""
        self._port.write(request)
        until = self._context.clock.now_ns() + self._settings.silence_ms * _MS
        got = b""
        while self._context.clock.now_ns() < until:
            at = got.find(answer)
            if at >= 0 and len(got) >= at + len(answer) + size:
                return got[at + len(answer) : at + len(answer) + size]
            got += self._port.read(1)
        raise SensorError(
            f"the device on {self._settings.port} does not answer like an RPLidar ({len(got)} bytes came at "
            f"{self._settings.baud} baud). Set `baud` to that of its model: A1 and A2M8 115200, A2M7, A2M12 and A3 "
            "256000, S1 256000, S2 and S3 1000000."
        )

    def read(self) -> list[Sweep]:
        try:
            data = self._port.read(1)
            data += self._port.read(self._port.in_waiting) if data else b""
        except self._failures as error:
            raise self._failed(error) from error
        now = self._context.clock.now_ns()
        if data:
            self._heard_ns = now
        elif now - self._heard_ns > self._settings.silence_ms * _MS:
            raise SensorError(
                f"the RPLidar on {self._settings.port} sent nothing for {self._settings.silence_ms} ms. Does its motor "
                "turn, and does it get enough power?"
            )
        found = self.sweeps.feed(data, now)
        self._counters.tell(damaged=self.sweeps.damaged, partial=self.sweeps.partial, lost=self.sweeps.lost)
        return found

    def _failed(self, error: BaseException) -> SensorError:
        return SensorError(
            f"the RPLidar's serial port {self._settings.port} failed: {error}. It was unplugged, or another program "
            "reads it."
        )

    def close(self) -> None:
        with contextlib.suppress(*self._failures):
            if self._port.is_open:
                self._port.write(rplidar.STOP)
                self._motor(False)
        with contextlib.suppress(*self._failures):
            self._port.close()
