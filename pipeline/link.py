"""Several hosts: what the hub and a host that has joined it say to each other, and the hub's clock on that host.

The hub listens (`kind: remote` in its rig), the other host joins (`sensorium node --join`), learns from the hub which
sources it is to run, and runs each in a process of its own. There is one file to edit, the hub's rig, and one clock,
the hub's: every message leaves its host with times on the session clock already, and with an uncertainty that has the
link's in it. The hub publishes what comes on its own bus, so that nothing behind it knows of other hosts.

========  ==============  ===========================================================  ==============================
message   from            parts after its name                                         answer
========  ==============  ===========================================================  ==============================
join      joining host    JSON ``Hello``                                               invite: JSON ``Invitation``
probe     each source     msgpack (number)                                             echo: msgpack ``Echo``
data      each source     header, payload; a header alone is a beat                    none
report    each source     stream, JSON ``Report``                                      none
stop      hub             none: the session is over
========  ==============  ===========================================================  ==============================

**The clock.** Every source's process probes the hub in bursts over a connection of its own, so that no payload stands
in a probe's way; the fastest of a burst counts (``pipeline.linkclock``). Sources themselves live on their own host's
clock, where devices are mapped undisturbed; their readings are placed on the session clock as they leave.

**A lost link.** After 2 s without an echo nothing is sent any more. When the hub answers again (the same life of it or
another) a beat states how far the old epoch's numbers had come, so that what was lost is counted, and a new one opens.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from pipeline.clock import Clock, Origin, SystemClock
from pipeline.errors import ConfigError
from pipeline.life import Life, Report
from pipeline.linkclock import LinkClock, RoundTrip, Steered
from pipeline.messages import Header, ImuLayout, Message, SignalLayout, view
from pipeline.sending import as_bytes
from pipeline.source import Reading
from pipeline.transport import LinkClient, load_curve_client
from pipeline.wire import encode_header

JOIN, INVITE, PROBE, ECHO, DATA, REPORT, STOP = b"join", b"invite", b"probe", b"echo", b"data", b"report", b"stop"
PROTOCOL = 1

PROBES = 8
"""Probes of a burst."""
PROBE_MS = 400
"""An echo that takes longer is not waited for."""
BURST_EVERY_NS = 1_000_000_000
LOST_NS = 2_000_000_000
"""A hub that has said nothing for so long is away."""


class Hello(msgspec.Struct, frozen=True):
    """Who joins: the version of what is said here, and the host's name."""

    protocol: int
    host: str


class RemoteStream(msgspec.Struct, frozen=True, kw_only=True):
    """One source that the joining host is to run; ``settings`` as they stand in the hub's rig."""

    kind: str
    payload: str
    settings: dict[str, Any] = {}
    offset_ns: int = 0
    offset_uncertainty_ns: int = 0


class Invitation(msgspec.Struct, frozen=True):
    """The hub's answer. ``life`` is new whenever the hub's end of the link is, and when the sources are to begin anew.
    ``warnings`` are about those who join."""

    protocol: int
    session: str
    life: str
    streams: dict[str, RemoteStream]
    warnings: list[str] = []


class Echo(msgspec.Struct, frozen=True, array_like=True):
    """The answer to a probe: its number, when it came and when this left (session clock), and the hub's life."""

    number: int
    received_ns: int
    sent_ns: int
    life: str


class LinkSpec(msgspec.Struct, frozen=True):
    """How a source's process reaches its hub; keys as files."""

    address: str
    secret: str | None = None
    server: str | None = None
    insecure: bool = False

    def connect(self) -> LinkClient:
        """A connection. Raises ConfigError."""
        if (self.secret is None) != (self.server is None):
            raise ConfigError("a link needs both keys or none: this host's own (--key) and the hub's (--hub-key).")
        curve = None
        if self.secret is not None and self.server is not None:
            curve = load_curve_client(Path(self.secret), Path(self.server))
        return LinkClient(self.address, curve, self.insecure)


class Carrier(Protocol):
    """The part of a ``LinkClient`` that probing needs."""

    def receive(self, timeout_ms: int) -> Sequence[Any] | None: ...
    def send(self, parts: Sequence[Any]) -> bool: ...


def probe(carrier: Carrier, clock: Clock, first: int, stop: threading.Event) -> tuple[list[RoundTrip], str]:
    """A burst of probes numbered from ``first``, one after the other: the round trips that came back whole, and the
    life of the hub that answered last. Two in a row that find no answer end it."""
    trips: list[RoundTrip] = []
    life, silent = "", 0
    for number in range(first, first + PROBES):
        sent = clock.now_ns()
        echo = None
        if carrier.send((PROBE, msgspec.msgpack.encode(number))):
            echo = _echo(carrier, clock, number, stop)
        if echo is None:
            silent += 1
            if silent == 2 or stop.is_set():
                break
            continue
        trips.append(RoundTrip(sent, echo.received_ns, echo.sent_ns, clock.now_ns()))
        life, silent = echo.life, 0
    return trips, life


def _echo(carrier: Carrier, clock: Clock, number: int, stop: threading.Event) -> Echo | None:
    """The echo of one probe; others came too late and are passed over."""
    deadline = clock.now_ns() + PROBE_MS * 1_000_000
    while (left := deadline - clock.now_ns()) > 0 and not stop.is_set():
        parts = carrier.receive(min(left // 1_000_000 + 1, 50))
        if parts is None or len(parts) != 2 or bytes(parts[0]) != ECHO:
            continue
        try:
            echo = msgspec.msgpack.decode(parts[1], type=Echo)
        except msgspec.MsgspecError:
            continue
        if echo.number == number:
            return echo
    return None


class Link:
    """The hub's clock as this host knows it. Fed by one thread and asked by another.

    ``generation`` counts how often the link has come back, or one of the clocks jumped: times from before and after do
    not belong to one epoch.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.generation = 0
        self._lock = threading.Lock()
        self._link, self._steered = LinkClock(), Steered()
        self._life = ""
        self._heard_ns: int | None = None

    @property
    def lost(self) -> bool:
        """Whether the hub is away, or has not answered yet."""
        return self._heard_ns is None or self.clock.now_ns() - self._heard_ns > LOST_NS

    def take(self, trips: Sequence[RoundTrip], life: str) -> None:
        """Takes what a burst of probes found."""
        trips = [
            trip for trip in trips if trip.received_ns - trip.sent_ns >= trip.remote_sent_ns - trip.remote_received_ns
        ]
        if not trips:
            return
        with self._lock:
            anew = self.lost or life != self._life
            jumped = self._link.update(trips)
            now = self.clock.now_ns()
            if jumped:
                self._steered.jump(now, self._link.at(now))
            else:
                self._steered.steer(now, self._link)
            self.generation += anew or jumped
            self._life, self._heard_ns = life, now

    def place(self, t_ns: int) -> tuple[int, int]:
        """A time of this host on the session clock, and the uncertainty of that. ValueError before the first answer."""
        with self._lock:
            placed, state = self._steered.map(t_ns), self._link.at(t_ns)
            return placed, state.uncertainty_ns + abs(t_ns + state.offset_ns - placed)

    def now_ns(self) -> int:
        """The session clock now."""
        return self.place(self.clock.now_ns())[0]

    def time(self, t_ns: int) -> int:
        """A time of this host on the session clock."""
        return self.place(t_ns)[0]

    def reading(self, reading: Reading) -> Reading:
        """``reading`` with its times on the session clock; the times of single samples go with the others."""
        begin, doubt = self.place(reading.t_capture_ns)
        end = self.time(reading.t_end_ns)
        data = reading.data
        if end - begin != reading.t_end_ns - reading.t_capture_ns and isinstance(
            reading.layout, ImuLayout | SignalLayout
        ):
            data = view(reading.layout, data).copy()
            stretch = (
                (end - begin) / (reading.t_end_ns - reading.t_capture_ns)
                if reading.t_end_ns > reading.t_capture_ns
                else 1.0
            )
            data["offset_ns"] = np.minimum(np.rint(data["offset_ns"] * stretch).astype(np.int64), end - begin)
        return msgspec.structs.replace(
            reading,
            data=data,
            t_capture_ns=begin,
            t_end_ns=end,
            t_receipt_ns=self.time(reading.t_receipt_ns),
            bound_ns=None if reading.bound_ns is None else self.time(reading.bound_ns),
            uncertainty_ns=reading.uncertainty_ns + doubt,
        )


class LinkSender:
    """The way of a source's messages to the hub. Never waits: what cannot leave is dropped, and its number shows the
    hub the loss."""

    def __init__(self, carrier: Carrier, link: Link, stream: str) -> None:
        self._carrier, self._link, self._stream = carrier, link, stream.encode()
        self.dropped = 0

    def publish(self, message: Message) -> bool:
        """Sends a message; False if it was dropped."""
        sent = not self._link.lost and self._carrier.send(
            (DATA, encode_header(message.header), as_bytes(message.data).data)
        )
        self.dropped += not sent
        return sent

    def beat(self, header: Header) -> bool:
        """Sends a beat."""
        return not self._link.lost and self._carrier.send((DATA, encode_header(header)))

    def report(self, report: bytes) -> None:
        """Tells the hub what the source says of itself (a JSON ``Report``)."""
        self._carrier.send((REPORT, self._stream, report))

    def loan(self, nbytes: int) -> np.ndarray[Any, Any] | None:
        """Fresh memory: nothing is shared between hosts."""
        return None


def find_hub(where: LinkSpec, life: Life) -> Link | None:
    """Asks the hub for the time until it answers, and lays this process's clock where the session's is, as far as that
    is known now; what is learnt later is slewed into the messages. None if the life says stop first."""
    with contextlib.closing(where.connect()) as carrier:
        trips: list[RoundTrip] = []
        hub = ""
        while not trips:
            note = carrier.refusal or f"asks {where.address} for the time"
            life.report(Report(state="starting", note=note))
            trips, hub = probe(carrier, life.clock, 0, life.stop)
            if life.stop.is_set():
                return None
    first = LinkClock()
    first.update(trips)
    ahead = first.at(life.clock.now_ns()).offset_ns
    if isinstance(life.clock, SystemClock):
        origin = life.clock.origin
        life.begin(Origin(origin.monotonic_ns - ahead, origin.unix_ns - ahead))
        trips = [trip._replace(sent_ns=trip.sent_ns + ahead, received_ns=trip.received_ns + ahead) for trip in trips]
    link = Link(life.clock)
    link.take(trips, hub)
    return link


def keep_time(where: LinkSpec, link: Link, life: Life) -> None:
    """Probes the hub once a second until the life says stop."""
    with contextlib.closing(where.connect()) as carrier:
        number = PROBES
        while not life.stop.is_set():
            begun = link.clock.now_ns()
            link.take(*probe(carrier, link.clock, number, life.stop))
            number += PROBES
            link.clock.wait_until(begun + BURST_EVERY_NS, life.stop)
