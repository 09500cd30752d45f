"""The recorder: everything that is published, into one file or a ring of them, without ever making a source wait.

Payloads are copied on receipt, which gives shared memory back at once, into a queue that is bounded in bytes; a thread
of its own compresses and writes. What does not fit, or did not even arrive, is named in a gap record (one for a whole
range, written when the range has ended), and the recording says that it is incomplete. A full disk ends a recording,
but not a ring, which goes on when there is room again.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.clock import SystemClock
from pipeline.errors import WireError
from pipeline.life import (
    FROM_ELSEWHERE,
    ON_THE_WAY,
    OVERWRITTEN,
    QUEUE_FULL,
    Life,
    NoRoom,
    RecordReport,
    Report,
    last_sent,
)
from pipeline.messages import Message
from pipeline.node import decode_settings, inlet_drops
from pipeline.receiving import drain
from pipeline.recording import (
    GAP_TOPIC,
    LABEL_TOPIC,
    MANIFEST_TOPIC,
    NO_ROOM,
    PREDICTION_TOPIC,
    Losses,
    LostMessages,
    RecordingWriter,
    Ring,
    RingWriter,
    SessionInfo,
    free_path,
)
from pipeline.steps import GAP, LOST, STEP, UNHEARD, Account, Gap, Unpredicted, decode_step
from pipeline.transport import Bus, Lossless, Parts, Received, ZmqBus

PATIENCE_MS = 50
ITEM_BYTES = 1024
"""What anything that waits to be written takes beside its payload: headers, objects, the queue itself."""
MALFORMED = "no messages as they must be, which is a fault of their source"
REFUSED = "contradicted themselves"
"""Causes of losses beside those that a slow disk or machine has."""
_JSON_TOPICS = {"label": LABEL_TOPIC}


class _Index(msgspec.Struct):
    index: int


class _Window(msgspec.Struct):
    window: _Index


_index = msgspec.json.Decoder(_Window)


class Record:
    """Writes a session to an MCAP file, or into a ring of them."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``wiring``: the streams to record by publishing node; ``topics``: what else they publish; ``elsewhere``: the
        nodes among them whose sources are on another host. With
        ``limit_bytes``, ``path`` is the folder of a ring, whose segments are ``segment_ns`` long at most."""

        path: Path
        wiring: dict[str, list[str]]
        topics: dict[str, list[str]]
        queue_bytes: int
        compression: Literal["zstd", "lz4", "none"] = "zstd"
        rig: str | None = None
        bundle: str | None = None
        limit_bytes: int | None = None
        segment_ns: int = 0
        elsewhere: list[str] = []

    def __init__(self, life: Life) -> None:
        self.life, self.clock = life, life.clock
        self.settings: Record.Settings = decode_settings(Record, life.spec.settings)
        # A later life of this node cannot have seen the first steps, and its predecessor's file has them.
        self.account = Account(first=1 if life.spec.life == 0 else None)
        self.unpredicted = Unpredicted()
        self.predicted = "fusion" in self.settings.topics
        self.expected: dict[str, tuple[int, int]] = {}
        self.lost = self.lost_beats = self.lost_windows = self.lost_predictions = 0
        self.gaps: dict[str, LostMessages] = {}
        """Ranges of lost messages that may still grow, by stream."""
        self.refused = 0
        """Messages that could not be written as what they claim to be. Counted by the thread that writes."""
        self.losses = Losses()
        """What a ring had no room for. Counted by the thread that writes."""
        self._told = (0, 0, 0, 0)
        self.causes: dict[str, dict[str, int]] = {}
        """Lost messages by stream and cause."""
        self.written = dict.fromkeys((stream for names in self.settings.wiring.values() for stream in names), 0)
        self.refusals = dict(self.written)
        """Both by stream, and counted by the thread that writes."""
        self.safe = dict(self.written)
        """``written`` when something last reached the operating system."""
        self._safe_ns: int | None = None
        self._malformed: dict[str, int] = {}
        self._from_ns = 0

    def run(self) -> None:
        """Until stopped; then the rest is written and the file closed. Raises RecordingError."""
        spec = self.life.spec
        with contextlib.closing(ZmqBus(Path(spec.session_dir), spec.node)) as bus:
            self.join(bus)
            try:
                while not self.life.stop.is_set():
                    self.turn()
                drain(self.turn)
            finally:
                self.finish()

    def join(self, bus: Bus) -> None:
        """Opens the file and subscribes to all that goes into it. Raises RecordingError."""
        spec, settings = self.life.spec, self.settings
        ring = None if settings.limit_bytes is None else Ring(settings.path, settings.limit_bytes)
        path = settings.path if ring is not None else free_path(settings.path)
        self.subscriber = bus.subscriber(
            spec.node,
            {node: {s: Lossless() for s in streams} for node, streams in settings.wiring.items() if streams},
            topics={node: {t: Lossless() for t in topics} for node, topics in settings.topics.items()},
        )
        self.life.wait_to_begin(Report(state="ready", note=str(path)))
        origin = self.clock.origin if isinstance(self.clock, SystemClock) else spec.origin
        streams = [stream for names in settings.wiring.values() for stream in names]
        session = SessionInfo(
            session=spec.session, unix_ns=origin.unix_ns, rig=settings.rig, bundle=settings.bundle,
            since=dict.fromkeys(streams) if spec.life else None,
        )  # fmt: skip
        self.writer: RecordingWriter | RingWriter = (
            RecordingWriter(path, session, settings.compression)
            if ring is None
            else RingWriter(ring, session, self.clock.now_ns(), segment_ns=settings.segment_ns,
                            compression=settings.compression, account=self._account)
        )  # fmt: skip
        if isinstance(self.writer, RingWriter):
            self.losses = self.writer.losses
        self.queue = BoundedWriter(settings.queue_bytes)
        self._from_ns = self.clock.now_ns()
        self._report()  # at once: whoever buries this node must know of its file

    def finish(self) -> None:
        """Writes what waits and closes the file, which says whether anything is missing. Raises what writing
        failed with."""
        for stream in list(self.gaps):
            self._close_gap(stream, self.clock.now_ns())
        self._end_windows()
        self.queue.close()
        self.queue.check()
        notes = self._account()
        self.writer.close(complete=not notes, note="; ".join(notes))
        self._report()

    def _account(self) -> list[str]:
        """What is missing that was not said before, in words. Once a file, or once a segment of a ring."""
        missing = (
            self.lost + self.refused + self.losses.messages.total(), self.lost_beats + self.losses.beats,
            self.lost_windows + self.losses.windows, self.lost_predictions + self.losses.predictions,
        )  # fmt: skip
        before, self._told = self._told, missing
        notes = [
            f"{now - told} {what} could not be recorded"
            for what, now, told in zip(("messages", "beats", "windows", "predictions"), missing, before, strict=True)
            if now > told
        ]
        return notes + ([f"this is part {self.life.spec.life + 1} of its session"] if self.life.spec.life else [])

    def turn(self, patience_ms: int = PATIENCE_MS) -> bool:
        """Waits a moment for something to come, and queues it. Whether more than beats came. Raises what a write
        failed with."""
        came = False
        for received in self.subscriber.receive(patience_ms):
            came |= not received.message.header.is_beat
            self._message(received)
        for parts in self.subscriber.parts():
            came = True
            self._parts(parts)
        self.queue.check()
        if self.life.due:
            self._report()
        return came

    def _report(self) -> None:
        counters = {
            "messages": float(self.writer.messages),
            "bytes": float(self.writer.bytes_written),
            "queue_bytes": float(self.queue.held),
            "lost": float(self.lost + self.refused + self.losses.messages.total()),
        }
        warnings: list[str] = []
        if isinstance(self.writer, RingWriter):
            deleted = self.writer.ring.deleted
            counters |= {"deleted_segments": float(deleted.segments), "deleted_bytes": float(deleted.bytes)}
            warnings = self.writer.warnings
        self.life.report(
            Report(state="ready", note=self.writer.note, counters=counters | self._drops(), warnings=warnings,
                   recording=self._recording())
        )  # fmt: skip

    def _recording(self) -> RecordReport:
        lost = {stream: dict(causes) for stream, causes in self.causes.items()}
        for cause, counts in ((REFUSED, self.refusals), (NO_ROOM, self.losses.messages)):
            for stream, count in dict(counts).items():
                if count:
                    lost.setdefault(stream, {})[cause] = count
        path, asked = self.writer.path, self.settings.path
        elsewhere = isinstance(self.writer, RecordingWriter) and path != asked and self.life.spec.life == 0
        return RecordReport(
            path=str(path), asked=str(asked) if elsewhere else "", from_ns=self._from_ns, safe_ns=self.writer.safe_ns,
            messages=self._kept(), safe=self.safe, lost=lost, lost_beats=self.lost_beats + self.losses.beats,
            lost_windows=self.lost_windows, lost_predictions=self.lost_predictions, no_room=self._no_room(),
        )  # fmt: skip

    def _kept(self) -> dict[str, int]:
        """What was written, by stream, less what there was no room for."""
        return {stream: count - self.losses.messages[stream] for stream, count in self.written.items()}

    def _no_room(self) -> NoRoom | None:
        losses = self.losses
        if losses.from_ns is None:
            return None
        return NoRoom(times=losses.times, from_ns=losses.from_ns, until_ns=losses.until_ns, windows=losses.windows,
                      predictions=losses.predictions)  # fmt: skip

    def _drops(self) -> dict[str, float]:
        wiring, topics = self.settings.wiring, self.settings.topics
        return inlet_drops(
            self.subscriber, [s for names in wiring.values() for s in names], {t for n in topics.values() for t in n}
        )

    def _message(self, received: Received) -> None:
        """Copies one message or beat into the queue; what is missing before it, or does not fit, becomes a gap."""
        arrival = self.clock.now_ns()
        header = received.message.header
        epoch, number = self.expected.get(header.stream, (header.epoch, 0 if self.life.spec.life == 0 else header.seq))
        if epoch != header.epoch:
            number = 0
        self.expected[header.stream] = (header.epoch, header.seq + (not header.is_beat))
        if header.seq > number:
            self._gap(header.stream, header.epoch, number, header.seq - 1, self._why_missing(header.stream), arrival)
        with received:
            size = 0 if received.message.data is None else len(received.message.data)
            if not self.queue.fits(size):
                cause = QUEUE_FULL
                if header.is_beat:
                    self.lost_beats += 1
                else:
                    self._gap(header.stream, header.epoch, header.seq, header.seq, cause, arrival)
                return
            try:
                message = received.message if header.is_beat else received.copy()
            except WireError:
                cause = OVERWRITTEN
                self._gap(header.stream, header.epoch, header.seq, header.seq, cause, arrival)
                return
        if message.data is None and not header.is_beat:
            self._gap(header.stream, header.epoch, header.seq, header.seq, "its shared memory is gone", arrival)
            return
        self._close_gap(header.stream, arrival)
        self.queue.put(size, lambda: self._write(message, arrival))

    def _why_missing(self, stream: str) -> str:
        """Why messages of ``stream`` did not arrive."""
        malformed = self.subscriber.counters(stream).malformed
        before, self._malformed[stream] = self._malformed.get(stream, 0), malformed
        if malformed > before:
            return MALFORMED
        settings = self.settings
        return FROM_ELSEWHERE if any(stream in settings.wiring[node] for node in settings.elsewhere) else ON_THE_WAY

    def _write(self, message: Message, arrival_ns: int) -> None:
        """Runs in the thread that writes. What no schema can state becomes a gap; it must not end the recording."""
        try:
            self.writer.write(message, arrival_ns)
            self.written[message.header.stream] += not message.header.is_beat
            if self.writer.safe_ns != self._safe_ns:
                self._safe_ns, self.safe = self.writer.safe_ns, self._kept()
        except (WireError, ValueError, OverflowError) as error:
            header = message.header
            if header.is_beat:
                return
            self.refused += 1
            self.refusals[header.stream] += 1
            gap = LostMessages(header.stream, header.epoch, header.seq, header.seq, f"it contradicts itself: {error}")
            self.writer.write_json(GAP_TOPIC, msgspec.json.encode(gap), arrival_ns)

    def _gap(self, stream: str, epoch: int, first: int, last: int, cause: str, now_ns: int) -> None:
        self.lost += last - first + 1
        causes = self.causes.setdefault(stream, {})
        causes[cause] = causes.get(cause, 0) + last - first + 1
        before = self.gaps.get(stream)
        if before is not None and (before.epoch, before.last + 1, before.cause) == (epoch, first, cause):
            first = before.first
        else:
            self._close_gap(stream, now_ns)
        self.gaps[stream] = LostMessages(stream, epoch, first, last, cause)

    def _close_gap(self, stream: str, now_ns: int) -> None:
        """Records the range of messages that the stream has lost until now, if it has."""
        gap = self.gaps.pop(stream, None)
        if gap is not None:
            self._json(GAP_TOPIC, msgspec.json.encode(gap), now_ns)

    def _parts(self, parts: Parts) -> None:
        """Records what is no message: manifests, predictions, labels; and gaps between steps, from its own account."""
        now = self.clock.now_ns()
        if parts.topic == STEP:
            with contextlib.suppress(WireError):
                manifest = decode_step([STEP, *parts.parts]).manifest
                gap = self.account.take(manifest.step)
                if gap is not None:
                    self._gaps_of_windows([gap], now)
                self._json(MANIFEST_TOPIC, msgspec.json.encode(manifest), now, manifest.end_ns)
                if self.predicted:
                    self.unpredicted.window(manifest.step)
        elif parts.topic == GAP:
            with contextlib.suppress(msgspec.MsgspecError):
                announced = msgspec.json.decode(parts.parts[0], type=Gap)
                self.unpredicted.announce(announced)
                if announced.of == "window":
                    self.account.announce(announced)
        elif parts.topic == "prediction":
            self._prediction(bytes(parts.parts[0]), now)
        else:
            self._json(_JSON_TOPICS[parts.topic], bytes(parts.parts[0]), now)

    def _prediction(self, data: bytes, now_ns: int) -> None:
        """Records a prediction once, after the gap before it if there is one."""
        try:
            index = _index.decode(data).window.index
        except msgspec.MsgspecError:
            return
        gaps, first = self.unpredicted.prediction(index)
        self._gaps_of_windows(gaps, now_ns)
        if first:
            self._json(PREDICTION_TOPIC, data, now_ns)

    def _gaps_of_windows(self, gaps: list[Gap], now_ns: int) -> None:
        """Records what is missing of windows and predictions; what was sent, and did not come here, is counted."""
        for gap in gaps:
            self.lost_windows += (gap.last - gap.first + 1) * (gap.cause == LOST)
            self.lost_predictions += (gap.last - gap.first + 1) * (gap.cause == UNHEARD)
            self._json(GAP_TOPIC, msgspec.json.encode(gap), now_ns)

    def _end_windows(self) -> None:
        """What is missing at the session's end: nothing came after it that could have shown it."""
        folder, now = self.life.spec.session_dir, self.clock.now_ns()
        if self.account.last is not None and (sent := last_sent(folder, "align")) > self.account.last:
            self._gaps_of_windows([Gap(self.account.last + 1, sent, LOST)], now)
        self._gaps_of_windows(self.unpredicted.end(last_sent(folder, "fusion")), now)

    def _json(self, topic: str, data: bytes, log_ns: int, publish_ns: int | None = None) -> None:
        """These are few, and what explains a gap must not itself be lost: they always fit, and are counted."""
        self.queue.put(len(data), lambda: self.writer.write_json(topic, data, log_ns, publish_ns))


class BoundedWriter:
    """A thread that carries out writes in order, and the bytes that wait for it, ``ITEM_BYTES`` an item included."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self.held = limit_bytes, 0
        self._lock = threading.Lock()
        self._jobs: queue.SimpleQueue[tuple[int, Callable[[], None]] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="writer")
        self._thread.start()

    def fits(self, size: int) -> bool:
        """Whether ``size`` more bytes may wait. Something always fits into an empty queue."""
        return self.held == 0 or self.held + size + ITEM_BYTES <= self._limit

    def put(self, size: int, job: Callable[[], None]) -> None:
        """Queues ``job``, which holds ``size`` bytes."""
        with self._lock:
            self.held += size + ITEM_BYTES
        self._jobs.put((size, job))

    def check(self) -> None:
        """Raises what a write has failed with, if one has; nothing is written after it."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Waits until everything is written. Idempotent; does not raise."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (item := self._jobs.get()) is not None:
            size, job = item
            try:
                if self._error is None:
                    job()
            except BaseException as error:  # whatever it is: a thread that dies in silence would lose the rest
                self._error = error
            with self._lock:
                self.held -= size + ITEM_BYTES
