"""The align node: the aligner on a bus. Messages in, finished steps out.

A step is published as soon as it is final. When this node was killed and is started again it begins at the next hop
and announces the steps in between as a gap.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from pipeline.align import Aligner, AlignSpec, Manifest, Resample, Step
from pipeline.errors import WireError
from pipeline.life import Accounts, AlignReport, Life, Mark, Order, Report
from pipeline.messages import Message
from pipeline.node import decode_settings, inlet_drops, wait_for_readers
from pipeline.steps import ACCOUNT, GAP, STEP, Gap, encode_step
from pipeline.transport import Bus, Lossless, Publisher, Received, ZmqBus

PATIENCE_NS = 20_000_000
"""The longest wait for a message, so that orders are seen soon."""

LINGER_NS = 500_000_000
"""How long after the stop the last messages may still come."""


class Align:
    """Runs the aligner on the session's streams."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """What to align, and which node publishes each stream."""

        spec: AlignSpec
        wiring: dict[str, list[str]]

    def __init__(self, life: Life) -> None:
        self.life, self.clock = life, life.clock
        self.settings: Align.Settings = decode_settings(Align, life.spec.settings)
        self.mark = Mark(life)
        self.newest: Manifest | None = None
        self.heard: dict[str, tuple[int, int]] = {}  # epoch and number of what came last, by stream
        self.dead: dict[str, int] = {}  # streams whose node died: the last epoch of that life
        self.ending: dict[str, Order] = {}  # streams that will end when their last message is here
        self.ended: set[str] = set()

    def run(self) -> None:
        """Until stopped. Of a session that ends before it began no windows are made."""
        with contextlib.closing(ZmqBus(Path(self.life.spec.session_dir), self.life.spec.node)) as bus:
            publisher = bus.publisher(self.life.spec.node, stop=self.life.stop)
            self.join(bus, publisher)
            wait_for_readers(publisher, self.life)
            self.life.wait_to_begin(Report(state="ready"))
            if not self.life.begun.is_set():  # it ends before it began, when nobody was there yet to hear of windows
                return
            self.begin()
            while not self.life.stop.is_set():
                self.turn()
            self.finish()

    def join(self, bus: Bus, publisher: Publisher) -> None:
        """Subscribes to the streams: payloads only where they are resampled here."""
        self.publisher = publisher
        self.subscriber = bus.subscriber(
            self.life.spec.node,
            {node: {stream: Lossless() for stream in streams} for node, streams in self.settings.wiring.items()},
            payloads={stream.name: isinstance(stream.rule, Resample) for stream in self.settings.spec.streams},
        )

    def begin(self) -> None:
        """Starts with step 1; after a restart with the first hop that begins from now on, and the gap before it is
        announced."""
        first = 1
        if self.life.spec.life:
            first = max(self.clock.now_ns() // self.settings.spec.hop_ns + 2, self.mark.value + 1)
            gap = Gap(max(self.mark.value, 0) + 1, first - 1, "the align node was restarted")
            self.publisher.publish_json(GAP, msgspec.json.encode(gap))
        self.aligner = Aligner(self.settings.spec, first_step=first)

    def turn(self) -> None:
        """Waits for the next message or deadline, and does what it brings."""
        now, event = self.clock.now_ns(), None if self.finished else self.aligner.next_event_ns
        wait_ns = PATIENCE_NS if event is None else min(max(event - now, 0), PATIENCE_NS)
        for received in self.subscriber.receive(-(-wait_ns // 1_000_000)):
            self._feed(received)
        for order in self.life.take_orders():
            self._close(order)
        self._tick()
        if self.life.due:
            report = self._report()
            self.life.report(report)
            accounts = Accounts(now_ns=self.clock.now_ns(), streams=report.aligned)
            self.publisher.publish_json(ACCOUNT, msgspec.json.encode(accounts))

    def _tick(self) -> None:
        if not self.finished:
            self._publish(self.aligner.tick(self.clock.now_ns()))

    @property
    def finished(self) -> bool:
        """Whether every stream came to its natural end, after which no deadline says anything new."""
        return len(self.ended) == len(self.settings.spec.streams)

    def finish(self) -> None:
        """What is on its way when everything stops still makes steps; not for long, if it does not come."""
        deadline = self.clock.now_ns() + LINGER_NS
        self.turn()
        while self.ending and self.clock.now_ns() < deadline:
            self.turn()

    def _feed(self, received: Received) -> None:
        message = _owned(received)
        stream, epoch = message.header.stream, message.header.epoch
        self.heard[stream] = (epoch, message.header.seq)
        self._publish(self.aligner.feed(message, self.clock.now_ns()))
        if stream in self.dead:
            if epoch > self.dead[stream]:
                del self.dead[stream]  # its node is back
            else:  # what it had sent before it died
                self._publish(self.aligner.close(stream, "dead", self.clock.now_ns()))
        if stream in self.ending:
            self._close(self.ending[stream])

    def _close(self, order: Order) -> None:
        """Closes a stream: a dead one at once, one that ended as soon as all that it sent is here."""
        heard = self.heard.get(order.stream, (-1, -1))
        if order.reason == "dead":
            if heard[0] > order.epoch:
                return  # its node's next life has spoken already
            self.dead[order.stream] = order.epoch
        elif heard < (order.epoch, order.seq):
            self.ending[order.stream] = order
            return
        else:
            self.ending.pop(order.stream, None)
            self.ended.add(order.stream)
        self._publish(self.aligner.close(order.stream, order.reason, self.clock.now_ns()))

    def _publish(self, steps: list[Step]) -> None:
        for step in steps:
            _, *parts = encode_step(step, self.clock.now_ns())
            self.publisher.publish_parts(STEP, parts)
            self.mark.value = step.manifest.step
            self.newest = step.manifest

    def _report(self) -> Report:
        return Report(
            state="ended" if self.finished else "ready",
            aligned={s.name: self._stream_report(s.name) for s in self.settings.spec.streams},
            warnings=[
                f"{s.name} {words}: these messages are in no window; what the model takes says its model.yaml"
                for s in self.settings.spec.streams
                if (words := self.aligner.misfit(s.name))
            ],
            counters={
                "steps": float(max(self.mark.value, 0)),
                **inlet_drops(self.subscriber, [stream for names in self.settings.wiring.values() for stream in names]),
            },
        )

    def _stream_report(self, stream: str) -> AlignReport:
        counters: Any = msgspec.structs.asdict(self.aligner.counters(stream))
        known = {name: counters[name] for name in AlignReport.__struct_fields__ if name in counters}
        report = AlignReport(**known)
        if self.newest is not None:
            stated = self.newest.streams[stream]
            report.verdict, report.reason = stated.verdict, stated.reason
            if stated.newest_ns is not None:
                report.age_ms = (self.newest.end_ns - stated.newest_ns) / 1e6
        return report


def _owned(received: Received) -> Message:
    """The message with memory of its own, since the aligner may keep it for long; without its payload if that was
    overwritten, which the aligner then rejects as malformed."""
    with received:
        if received.message.data is None:
            return received.message
        try:
            return received.copy()
        except WireError:
            return Message(received.message.header)
