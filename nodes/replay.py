"""A recording in the place of the capture nodes: its streams, published again at the pace at which they came.

    sources:
      session: {kind: replay, path: ../recordings/demo.mcap}

Live rules hold: deadlines, idleness, verdicts of the moment. (Replay by event time, at any speed and to the same
predictions, is ``sensorium replay``.) Every time of the recording is moved by one constant, so that it lies on this
session's clock; headers are otherwise as they were recorded, and so is what was lost. Its labels, be they recorded or
in ``X.labels.csv`` beside ``X.mcap``, are published as the truth.
"""

from __future__ import annotations

import contextlib
import heapq
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from pipeline.labels import known_labels
from pipeline.life import Life, Report
from pipeline.messages import FrameLayout, Header, Message, Payload, nbytes_of
from pipeline.node import PlayedStreams, decode_settings, ring_spec, wait_for_readers
from pipeline.recording import Label, RecordingReader
from pipeline.transport import Publisher, ZmqBus

LABEL = "label"
LEAD_NS = 100_000_000
"""The first message is due so long after the start, so that none begins late."""
PATIENCE_NS = 100_000_000
BEAT_NS = 100_000_000


class Replay:
    """Publishes a recording's streams."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``streams``: which of the recording's (null: all). ``loop``: again from the beginning at the end."""

        path: Path
        speed: Annotated[float, msgspec.Meta(gt=0)] = 1.0
        streams: tuple[str, ...] | None = None
        loop: bool = False

        def __post_init__(self) -> None:
            if self.speed != 1:
                raise ValueError(
                    f"`speed: {self.speed:g}`: a live session's clock runs at speed 1, and so must what is replayed "
                    "into it; for any other speed use `sensorium replay RECORDING --speed`."
                )

    @classmethod
    def streams_of(cls, settings: Replay.Settings) -> dict[str, Payload]:
        """The streams that a node with these settings publishes. Raises RecordingError, ValueError."""
        with RecordingReader(settings.path) as reader:
            there = dict(reader.streams)
            known_labels(reader)  # what is wrong with them is said before anything starts
        chosen = there if settings.streams is None else {name: there.get(name) for name in settings.streams}
        unknown = [name for name, payload in chosen.items() if payload is None]
        if unknown:
            raise ValueError(
                f"{settings.path} has no stream `{unknown[0]}`; it has {', '.join(sorted(there)) or 'none'}."
            )
        return {name: payload for name, payload in chosen.items() if payload is not None}

    @classmethod
    def slots_of(cls, settings: Replay.Settings) -> dict[str, int]:
        """Bytes of the largest payload to expect, by stream: raw frames alone are large enough to matter."""
        wanted = {name for name, payload in cls.streams_of(settings).items() if payload == "frame"}
        slots: dict[str, int] = {}
        with RecordingReader(settings.path) as reader:
            for message, _ in reader.messages(wanted) if wanted else ():
                layout = message.header.layout
                raw = isinstance(layout, FrameLayout) and layout.format != "jpeg"
                slots[message.header.stream] = (nbytes_of(layout) or 0) if raw and layout is not None else 0
                if len(slots) == len(wanted):
                    break
        return slots

    def __init__(self, life: Life) -> None:
        self.life, self.clock = life, life.clock
        self.settings: Replay.Settings = decode_settings(Replay, life.spec.settings)
        self.streams = set(life.spec.streams)

    def run(self) -> None:
        """Until stopped; at the recording's end only beats. Raises RecordingError."""
        spec = self.life.spec
        with contextlib.closing(ZmqBus(Path(spec.session_dir), spec.node)) as bus:
            publisher = bus.publisher(
                spec.node, sorted(self.streams), ring_spec(spec), lossless=True, stop=self.life.stop
            )
            wait_for_readers(publisher, self.life)
            self.life.wait_to_begin(Report(state="loaded"))
            self.play(publisher)

    def play(self, publisher: Publisher) -> None:
        """Publishes the recording, and then beats until stopped. Raises RecordingError."""
        self.publisher, self.played = publisher, PlayedStreams(self.life, publisher, self.streams)
        with RecordingReader(self.settings.path) as reader:
            while self._play(reader) and self.settings.loop:
                pass
        if self.life.ordered or not self.life.stop.is_set():
            self.played.end()
        while self.clock.wait_until(self.clock.now_ns() + BEAT_NS, self.life.stop):
            self.played.end()

    def _play(self, reader: RecordingReader) -> bool:
        """Publishes the recording once, from now on; False if it was stopped, or is empty."""
        shift: int | None = None
        for arrival, what in _in_order(reader, self.streams):
            if shift is None:
                shift = self.clock.now_ns() + LEAD_NS - arrival
            while (now := self.clock.now_ns()) < arrival + shift:
                self.played.report()
                self.clock.wait_until(min(arrival + shift, now + PATIENCE_NS), self.life.stop)
                if self.life.stop.is_set():
                    return False
            if isinstance(what, Label):
                moved = Label(what.start_ns + shift, what.end_ns + shift, what.label)
                self.publisher.publish_json(LABEL, msgspec.json.encode(moved))
            else:
                self.played.publish(Message(moved_header(what.header, shift), what.data))
            self.played.report()
        return shift is not None and not self.life.stop.is_set()


def moved_header(header: Header, shift_ns: int) -> Header:
    """``header`` on a session clock that reads ``shift_ns`` more: every session time moves, epoch and receipt too; a
    device's own stamp stays what it was."""
    return msgspec.structs.replace(
        header,
        epoch=header.epoch + shift_ns,
        t_capture_ns=header.t_capture_ns + shift_ns,
        t_end_ns=header.t_end_ns + shift_ns,
        bound_ns=header.bound_ns + shift_ns,
        t_receipt_ns=header.t_receipt_ns + shift_ns,
    )


def _in_order(reader: RecordingReader, streams: set[str]) -> Iterator[tuple[int, Message | Label]]:
    """Messages and beats by arrival, and labels by the moment at which they begin to be true."""
    messages = ((arrival, message) for message, arrival in reader.messages(streams, beats=True))
    labels = ((label.start_ns, label) for label in known_labels(reader))
    return heapq.merge(labels, messages, key=lambda item: item[0])
