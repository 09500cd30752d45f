"""The shell around a source, and the start of any node.

A source reads a device; everything else that a stream promises is kept here once, for all of them: numbers without
gaps, epochs that open when the clock of the device does, captures that strictly increase, a bound with every message,
a beat every 100 ms of silence, retries with backoff while a device is away, and a report of what was dropped and why.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np

from pipeline.clock import Clock
from pipeline.errors import ConfigError, SensorError, SensoriumError
from pipeline.life import Life, NodeSpec, Report, SourceReport, State, begin, read_spec
from pipeline.messages import Header, Layout, Message, nbytes_of
from pipeline.source import CORE_KINDS, KINDS, Reading, Source, SourceContext, load_kind
from pipeline.stamper import ClockCheck, Stamper, ValueCheck
from pipeline.transport import INLINE_MAX, Publisher, RingSpec, Subscriber, ZmqBus

__all__ = [
    "BEAT_NS",
    "CORE_KINDS",
    "KINDS",
    "Reading",
    "Source",
    "SourceContext",
    "SourceShell",
    "Stamper",
    "load_kind",
    "run_node",
]

BEAT_NS = 100_000_000
"""A beat is sent after this much silence."""

RETRY_NS = (200_000_000, 1_000_000_000)
"""The first and the longest pause before a device that failed is opened again: it is back within 2 s of its return."""

FAILURES = 30
"""So many failures in a row without a reading end the process; a fresh one may help where a driver is wedged."""

IDLE_NS = 1_000_000
"""A source that has nothing is not asked again sooner than this after it was asked."""

EXIT_SENSOR = 4
"""Exit status of a node whose device failed for so long; the launcher restarts it without counting that as a crash."""


INLET_DROPS = ("overrun", "malformed", "before_join", "dropped")
"""Of a reader's counters those that nothing else reports."""


class Sender(Protocol):
    """The part of a publisher that the shell needs."""

    def publish(self, message: Message) -> bool: ...
    def beat(self, header: Header) -> bool: ...
    def loan(self, nbytes: int) -> np.ndarray[Any, Any] | None: ...


class Place(Protocol):
    """The clock that a source's messages are stamped by, as seen from the clock that the source itself lives on."""

    generation: int
    """Changes when times from before and after do not belong to one epoch."""

    def now_ns(self) -> int: ...
    def time(self, t_ns: int) -> int: ...
    def reading(self, reading: Reading) -> Reading: ...


class _Here:
    """The session clock is this host's."""

    generation = 0

    def __init__(self, clock: Clock) -> None:
        self.now_ns = clock.now_ns

    def time(self, t_ns: int) -> int:
        return t_ns

    def reading(self, reading: Reading) -> Reading:
        return reading


class _Context:
    """What the shell gives its source."""

    def __init__(self, name: str, clock: Clock, sender: Sender | None) -> None:
        self.name, self.clock = name, clock
        self._sender = sender
        self.dropped: dict[str, int] = {}
        self.health = ""

    def loan(self, layout: Layout, nbytes: int | None = None) -> np.ndarray[Any, Any]:
        size = nbytes if nbytes is not None else nbytes_of(layout)
        if size is None:
            raise ValueError(f"{self.name}: the size of {layout} varies; say how many bytes to lend")
        slot = self._sender.loan(size) if self._sender is not None else None
        return np.empty(size, np.uint8) if slot is None else slot

    def count(self, what: str, n: int = 1) -> None:
        self.dropped[what] = self.dropped.get(what, 0) + n

    def note(self, text: str) -> None:
        self.health = text


def inlet_drops(subscriber: Subscriber, streams: Iterable[str], topics: Iterable[str] = ()) -> dict[str, float]:
    """What did not reach this node whole, for its report: ``stream.what``, only what is not 0."""
    found: dict[str, int] = {}
    for stream in streams:
        counters = subscriber.counters(stream)
        found |= {f"{stream}.{what}": getattr(counters, what) for what in INLET_DROPS}
    found |= {f"{topic}.dropped": subscriber.parts_dropped(topic) for topic in topics}
    return {name: float(count) for name, count in found.items() if count}


def ring_drops(publisher: Publisher) -> dict[str, float]:
    """What readers cost this node's ring, for its report: ``ring.what``, only what is not 0."""
    counters = msgspec.structs.asdict(publisher.ring_counters)
    return {f"ring.{what}": float(count) for what, count in counters.items() if count}


class SourceShell:
    """Runs one source: ``turn`` does one round and returns; ``run`` turns until stopped or at the data's end."""

    def __init__(
        self,
        source_class: type[Source],
        settings: Any,
        life: Life,
        sender: Sender,
        stream: str,
        place: Place | None = None,
    ) -> None:
        self.life, self.sender = life, sender
        self.place: Place = place or _Here(life.clock)
        self._generation = self.place.generation
        self.context = _Context(stream, life.clock, sender)
        self.source = source_class(settings, self.context)
        self.stamper = Stamper(
            stream, source_class.payload_of(settings), life.spec.offset_ns, life.spec.offset_uncertainty_ns
        )
        self._clock_check, self._values = ClockCheck(), ValueCheck()
        self.published = 0
        self.newest_ns: int | None = None
        self.ended = False
        self.failures = 0
        """How often the device failed or could not be opened."""
        self._open = False
        self._in_a_row = 0
        self._retry_ns = 0
        self._last_sent_ns = 0
        self._trouble = ""
        self._said_epoch: int | None = None
        self.counters: Callable[[], dict[str, float]] = dict
        """What else goes into every report."""
        self.say: Callable[[Report], None] = life.report
        """Where reports go."""

    def run(self) -> None:
        """Turns until the life says stop. When the whole session stops that is the stream's end: nobody need wait for
        more. Raises SensorError after ``FAILURES``."""
        try:
            self._last_sent_ns = self.life.clock.now_ns()
            self.stamper.open(self.place.now_ns())
            self._report()
            while not self.life.stop.is_set():
                self.turn()
            if self.life.ordered and not self.ended:
                self._end()
        finally:
            self.source.close()

    def turn(self) -> None:
        """Opens the device if need be, reads once, publishes, beats in silence, reports."""
        clock = self.life.clock
        if self.place.generation != self._generation:
            self._reopen()
        if self.ended:
            clock.wait_until(clock.now_ns() + BEAT_NS, self.life.stop)
        elif not self._open:
            self._try_open()
        else:
            self._read()
        now = clock.now_ns()
        if now - self._last_sent_ns >= BEAT_NS:
            self._beat()
        if self.life.due_at(now):
            self._report()

    def _reopen(self) -> None:
        """The clock that messages are stamped by jumped, or could not be seen for a while: says how far the numbers of
        the old epoch had come, so that what was lost of them is known, and opens a new one."""
        self._generation, self._clock_check = self.place.generation, ClockCheck()
        self._beat()
        if not self.ended:
            self.stamper.open(self.place.now_ns())
            self._report()
            self._beat()

    def _try_open(self) -> None:
        clock = self.life.clock
        if clock.now_ns() < self._retry_ns:
            clock.wait_until(min(self._retry_ns, self._last_sent_ns + BEAT_NS), self.life.stop)
            return
        try:
            self.source.open()
        except SensorError as error:
            self._failed(error)
            return
        self._open, self._trouble = True, ""
        self.stamper.open(self.place.now_ns())
        self._beat()
        self._report()

    def _read(self) -> None:
        clock = self.life.clock
        asked_ns = clock.now_ns()
        try:
            readings = self.source.read()
            if readings is None or (isinstance(readings, list) and not readings):
                if clock.now_ns() - asked_ns < IDLE_NS:  # a source that does not wait would take a whole core
                    clock.wait_until(asked_ns + IDLE_NS, self.life.stop)
                return
            if isinstance(readings, list):
                for reading in readings:
                    self._publish(reading)
            else:
                self._publish(readings)
        except SensorError as error:
            self._failed(error)
        except EOFError:
            self._end()

    def _end(self) -> None:
        """States the number of the message that will not come."""
        self.ended = True
        self._beat()
        self._report()

    def _publish(self, reading: Reading) -> None:
        self.stamper.check(reading)
        reading = self.place.reading(reading)
        now_ns = self.place.now_ns()
        self._clock_check.check(reading, now_ns)
        header = self.stamper.stamp_checked(reading, now_ns)
        if header is None:
            self.context.count("order")
            return
        self._in_a_row = 0
        if header.epoch != self._said_epoch:
            self._report()  # before anything of it is sent: whoever buries this node must know its last epoch
        if not self.sender.publish(Message(header, reading.data)):
            self.context.count("no_slot")
        self.published += 1
        self.newest_ns = header.t_end_ns
        self._last_sent_ns = self.life.clock.now_ns()
        self._values.look(reading.layout, reading.data, self._last_sent_ns)  # nobody waits for it, nor does it jump

    def _failed(self, error: SensorError) -> None:
        self.source.close()
        self._open = False
        self._in_a_row += 1
        if self._in_a_row >= FAILURES:
            raise error
        pause = min(RETRY_NS[0] << min(self._in_a_row - 1, 8), RETRY_NS[1])
        self._retry_ns = self.life.clock.now_ns() + pause
        self._trouble = str(error)
        self.failures += 1
        self._beat()
        self._report()

    def _beat(self) -> None:
        promise = self.source.bound_ns() if self._open and not self.ended else None
        promised = None if promise is None else self.place.time(promise)
        self.sender.beat(self.stamper.beat(self.place.now_ns(), promised, self._trouble or self.context.health))
        self._last_sent_ns = self.life.clock.now_ns()

    def _report(self) -> None:
        state: State = "ended" if self.ended else "ready" if self._open else "waiting" if self._trouble else "starting"
        report = SourceReport(epoch=self.stamper.epoch, published=self.published, newest_ns=self.newest_ns,
                              dropped=dict(self.context.dropped), failures=self.failures)  # fmt: skip
        self._values.report(report)
        self._said_epoch = self.stamper.epoch
        self.say(
            Report(
                state=state,
                note=self._trouble or self.context.health,
                sources={self.stamper.stream: report},
                counters=self.counters(),
                ended={self.stamper.stream: (self.stamper.epoch, self.stamper.seq)} if self.ended else {},
            )
        )


class PlayedStreams:
    """Publishes streams whose messages were stamped elsewhere, a recording's or a simulation's, and reports on them."""

    def __init__(self, life: Life, publisher: Publisher, streams: Iterable[str]) -> None:
        self._life, self._publisher = life, publisher
        self._reports = {stream: SourceReport() for stream in sorted(streams)}
        self._values = {stream: ValueCheck() for stream in self._reports}
        self._last: dict[str, Header] = {}
        self.note = ""
        """Health in words, for every report."""

    def publish(self, message: Message) -> None:
        """Publishes a message or a beat as it is."""
        header = message.header
        self._last[header.stream] = header
        if header.is_beat:
            self._publisher.beat(header)
            return
        report = self._reports[header.stream]
        if report.epoch != header.epoch:  # said before it is sent: whoever buries this node must know its last epoch
            report.epoch = header.epoch
            self.report(force=True)
        self._publisher.publish(message)
        if header.layout is not None and message.data is not None:
            values = self._values[header.stream]
            values.look(header.layout, message.data, header.t_receipt_ns)
            values.report(report)
        report.newest_ns = header.t_end_ns
        report.published += 1

    def end(self) -> None:
        """A beat on every stream, which states the number of the message that will not come."""
        ended: dict[str, tuple[int, int]] = {}
        for stream, header in self._last.items():
            seq = header.seq if header.is_beat else header.seq + 1
            ended[stream] = (header.epoch, seq)
            beat: dict[str, Any] = {"layout": None, "seq": seq, "t_capture_ns": header.bound_ns}
            beat |= {"t_end_ns": header.bound_ns, "t_receipt_ns": self._life.clock.now_ns(), "t_device_ns": None}
            self._publisher.beat(msgspec.structs.replace(header, **beat))
        self._life.report(Report(state="ended", sources=self._reports, ended=ended))

    def report(self, force: bool = False) -> None:
        """Says how things are, if that is due."""
        if force or self._life.due:
            counters = ring_drops(self._publisher)
            self._life.report(Report(state="ready", note=self.note, sources=self._reports, counters=counters))


SLOTS = (6, 16)
"""The least and the most slots of a ring."""


class Node(Protocol):
    """What a node's class is, if it is no Source: made with its life, and run until the life says stop."""

    def __init__(self, life: Life) -> None: ...
    def run(self) -> None: ...


def decode_settings(node_class: type[Any], settings: dict[str, Any]) -> Any:
    """Settings from a node's spec, which were checked when it was written."""
    return msgspec.convert(settings, node_class.Settings, dec_hook=lambda type_, value: type_(value))


def ring_spec(spec: NodeSpec) -> RingSpec | None:
    """The ring that a node's largest payloads need; None where all of them go through the socket."""
    largest = max(spec.slots.values(), default=0)
    if largest <= INLINE_MAX:
        return None
    slots = min(max((spec.ring_mib << 20) // largest, SLOTS[0]), SLOTS[1])
    return RingSpec(slots, largest, spec.lease_ms)


def wait_for_readers(publisher: Publisher, life: Life) -> None:
    """Waits until those who must not miss anything have joined, for ``readers_s`` at most, and reports meanwhile."""
    clock = life.clock
    deadline = clock.now_ns() + round(life.spec.readers_s * 1e9)
    missing = set(life.spec.readers)
    while missing and not life.stop.is_set() and clock.now_ns() < deadline:
        life.report(Report(state="starting", note=f"waiting for {', '.join(sorted(missing))}"))
        missing = publisher.wait_for_readers(life.spec.readers, 0.2, life.stop)


def run_source(source_class: type[Source], life: Life) -> None:
    """Runs a source on the session's bus until the life says stop. Raises SensoriumError."""
    spec = life.spec
    if spec.link is not None:
        _run_joined(source_class, life, spec.link)
        return
    with contextlib.closing(ZmqBus(Path(spec.session_dir), spec.node)) as bus:
        publisher = bus.publisher(spec.node, [spec.node], ring_spec(spec), stop=life.stop)
        settings = decode_settings(source_class, spec.settings)
        shell = SourceShell(source_class, settings, life, publisher, spec.node)
        shell.counters = lambda: ring_drops(publisher)
        wait_for_readers(publisher, life)
        life.wait_to_begin(Report(state="loaded"))
        shell.run()


def _run_joined(source_class: type[Source], life: Life, link_spec: dict[str, Any]) -> None:
    """Runs a source for the hub of another host."""
    from pipeline.link import LinkSender, LinkSpec, find_hub, keep_time  # most nodes start without it, and faster

    where = msgspec.convert(link_spec, LinkSpec)
    spec, encode = life.spec, msgspec.json.Encoder().encode
    with contextlib.closing(where.connect()) as carrier:
        link = find_hub(where, life)
        if link is None:
            return
        keeper = threading.Thread(target=keep_time, args=(where, link, life), name="time", daemon=True)
        keeper.start()
        sender = LinkSender(carrier, link, spec.node)
        shell = SourceShell(source_class, decode_settings(source_class, spec.settings), life, sender, spec.node, link)

        def say(report: Report) -> None:
            life.report(report)
            sender.report(encode(report))

        shell.say, shell.counters = say, lambda: {"link.dropped": float(sender.dropped)} if sender.dropped else {}
        try:
            shell.run()
        finally:
            life.stop.set()
            keeper.join()


def run_node(path: Path | str) -> int:
    """Runs the node whose spec is in the file ``path`` until it is told to stop. Returns the exit status; what went
    wrong is on standard error."""
    try:
        spec = read_spec(path)
        life = begin(spec)
        node_class = load_kind(spec.kind, spec.import_paths)
        if issubclass(node_class, Source):
            run_source(node_class, life)
        elif hasattr(node_class, "run"):
            node_class(life).run()
        else:
            raise ConfigError(f"{spec.kind} is no kind of node: the class has neither Source as its base nor `run`.")
    except SensoriumError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_SENSOR if isinstance(error, SensorError) else error.exit_code
    return 0
