"""The fusion node: steps in, one prediction a step out.

The aligner's manifest names the messages of a step; their payloads come from the streams themselves and wait here, in
memory of their own, for the step that uses them. A step whose payload is late is waited for a little while; when it is
lost (a later number came, or the time is over) the stream is masked and the prediction says so: no window is left out.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from pipeline.bundle import load_bundle
from pipeline.errors import WireError
from pipeline.inference import FuseOptions, Fuser
from pipeline.life import Life, Mark, Report
from pipeline.messages import Message
from pipeline.node import decode_settings, inlet_drops, wait_for_readers
from pipeline.prediction import Prediction
from pipeline.receiving import drain
from pipeline.recording import Label
from pipeline.steps import GAP, STEP, Account, Gap, SentStep, decode_step
from pipeline.transport import Bus, CurveServer, Lossless, Parts, Publisher, Received, ZmqBus, load_curve_server

PREDICTION, LABEL = "prediction", "label"
PATIENCE_MS = 50
BACKLOG = 8
"""Steps that may wait; beyond it a step's streams are shed, so that predictions keep up with the sensors."""

Key = tuple[int, int]
"""Epoch and number of a message."""


class PayloadCache:
    """Payloads by stream, epoch and number, bounded in bytes: what no later step can use goes first."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._bytes = limit_bytes, 0
        self._kept: OrderedDict[tuple[str, Key], Message] = OrderedDict()
        self._newest: dict[str, Key] = {}
        self.evicted = 0

    def put(self, received: Received) -> None:
        """Keeps a copy of a message's payload; what was overwritten meanwhile is only known to have come."""
        with received:
            header = received.message.header
            key = header.epoch, header.seq
            if header.is_beat:
                self._newest[header.stream] = max(self._newest.get(header.stream, key), (header.epoch, header.seq - 1))
                return
            self._newest[header.stream] = max(self._newest.get(header.stream, key), key)
            if received.message.data is None:
                return
            try:
                message = received.copy()
            except WireError:
                return
        self._kept[header.stream, key] = message
        self._bytes += len(message.data)
        while self._bytes > self._limit and len(self._kept) > 1:
            self.evicted += 1
            self._bytes -= len(self._kept.popitem(last=False)[1].data)

    def get(self, stream: str, key: Key) -> Message | None:
        """The message, if it is here."""
        return self._kept.get((stream, key))

    def lost(self, stream: str, key: Key) -> bool:
        """Whether this message will not come any more: it is not here, and it or a later one has been."""
        return (stream, key) not in self._kept and self._newest.get(stream, (-1, -1)) >= key

    def forget(self, stream: str, before: Key) -> None:
        """Drops what precedes ``before`` on its stream."""
        for name, key in [k for k in self._kept if k[0] == stream and k[1] < before]:
            self._bytes -= len(self._kept.pop((name, key)).data)


class Fusion:
    """Runs a bundle on the session's steps."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``streams`` maps bundle stream -> rig stream; ``wiring`` names, by publishing node, the streams whose
        payloads are needed; ``labels`` the nodes that state what is true."""

        bundle: Path
        allow_code: bool = False
        streams: dict[str, str]
        wiring: dict[str, list[str]]
        labels: list[str] = []
        threads: int = 1
        providers: tuple[str, ...] = ("cpu",)
        contributions: bool = True
        payload_wait_ms: int = 50
        cache_bytes: int = 256 << 20
        tcp: str | None = None
        curve_secret: Path | None = None
        curve_allow: tuple[Path, ...] = ()

    def __init__(self, life: Life) -> None:
        self.life, self.clock = life, life.clock
        self.settings: Fusion.Settings = decode_settings(Fusion, life.spec.settings)
        self.mark = Mark(life)
        self.account = Account(first=1 if life.spec.life == 0 else None)
        self.cache = PayloadCache(self.settings.cache_bytes)
        self.waiting: deque[tuple[SentStep, int]] = deque()
        self.labels: deque[Label] = deque(maxlen=256)
        self.counters: dict[str, float] = {"predictions": 0.0}
        self.payload_streams = {s for streams in self.settings.wiring.values() for s in streams}
        self.refusals: Callable[[], list[str]] = list
        """Who was refused lately where predictions are to be had."""

    def run(self) -> None:
        """Until stopped, and what was on its way is predicted. Raises BundleError."""
        spec, settings = self.life.spec, self.settings
        with contextlib.closing(ZmqBus(Path(spec.session_dir), spec.node)) as bus:
            self.life.report(Report(state="starting", note="loading the model"))
            publisher = bus.publisher(spec.node, stop=self.life.stop, tcp=settings.tcp, curve=self._curve())
            self.refusals = bus.refusals
            self.join(bus, publisher)
            wait_for_readers(publisher, self.life)
            self.life.wait_to_begin(Report(state="ready"))
            while not self.life.stop.is_set():
                self.turn()
            drain(self.turn)

    def join(self, bus: Bus, publisher: Publisher) -> None:
        """Loads the model and subscribes to all that it needs. Raises BundleError."""
        settings = self.settings
        bundle = load_bundle(settings.bundle, settings.allow_code)
        options = FuseOptions(
            threads=settings.threads, providers=settings.providers, contributions=settings.contributions
        )
        self.fuser = Fuser(bundle, options, self.life.spec.session, streams=settings.streams, clock=self.clock)
        self.publisher = publisher
        # What explains a gap is looked at before the step that shows it.
        topics: dict[str, list[str]] = {"align": [GAP, STEP]} | {node: [LABEL] for node in settings.labels}
        self.subscriber = bus.subscriber(
            self.life.spec.node,
            {node: {s: Lossless() for s in streams} for node, streams in settings.wiring.items() if streams},
            topics={node: {topic: Lossless() for topic in names} for node, names in topics.items()},
        )

    def _curve(self) -> CurveServer | None:
        secret = self.settings.curve_secret
        return None if secret is None else load_curve_server(secret, self.settings.curve_allow)

    def turn(self) -> bool:
        """Waits a moment for something to come, and predicts what can be predicted. Whether more than beats came, or
        a step still waits."""
        came = False
        for received in self.subscriber.receive(2 if self.waiting else PATIENCE_MS):
            came |= not received.message.header.is_beat
            self.cache.put(received)
        for parts in self.subscriber.parts():
            came = True
            self._parts(parts)
        while self.waiting and self._step(*self.waiting[0]):
            self.waiting.popleft()
            self._report()  # a model that is slower than the windows come has much to do here, and does not hang
        self.publisher.readers()  # takes note of who has joined meanwhile
        self._report()
        return came or bool(self.waiting)

    def _report(self) -> None:
        if self.life.due:
            note = "; ".join(f"{stream}: {text}" for stream, text in self.fuser.notes.items())
            counters = self.counters | {"evicted": float(self.cache.evicted), "last_step": float(self.mark.value)}
            counters |= inlet_drops(self.subscriber, self.payload_streams)
            self.life.report(Report(state="ready", note=note, counters=counters, warnings=self.refusals()))

    def _parts(self, parts: Parts) -> None:
        """Takes a step, the announcement of a gap, or a label. What is damaged is counted."""
        try:
            if parts.topic == STEP:
                step = decode_step([STEP, *parts.parts])
                gap = self.account.take(step.manifest.step)
                if self.mark.value >= step.manifest.step:
                    return
                if gap is None and self.life.spec.life and not self.counters["predictions"] and not self.waiting:
                    first, last = max(self.mark.value, 0) + 1, step.manifest.step - 1
                    gap = Gap(first, last, "the fusion node was restarted", "prediction")
                if gap is not None and gap.first <= gap.last:
                    self.publisher.publish_json(GAP, msgspec.json.encode(gap))
                self.waiting.append((step, self.clock.now_ns()))
            elif parts.topic == GAP:
                self.account.announce(msgspec.json.decode(parts.parts[0], type=Gap))
            else:
                self.labels.append(msgspec.json.decode(parts.parts[0], type=Label))
        except (WireError, msgspec.MsgspecError):
            self._count("malformed")

    def _step(self, step: SentStep, arrival_ns: int) -> bool:
        """Predicts for a step; False while one of its payloads may still come."""
        overdue = self.clock.now_ns() - arrival_ns >= self.settings.payload_wait_ms * 1_000_000
        content: dict[str, Any] = dict(step.grids)
        masked: dict[str, str] = {}
        if len(self.waiting) > BACKLOG:
            masked = dict.fromkeys(step.manifest.streams, "shed")
        for stream in self.payload_streams - masked.keys():
            keys = used_keys(step, stream)
            messages = [self.cache.get(stream, key) for key in keys]
            missing = [key for key, message in zip(keys, messages, strict=True) if message is None]
            if missing and not overdue and not any(self.cache.lost(stream, key) for key in missing):
                return False
            if missing:
                masked[stream] = "overrun"
            else:
                content[stream] = tuple(messages)
        self._publish(step, self.fuser.step(step.manifest, content, masked), self.clock.now_ns(), arrival_ns)
        for stream in self.payload_streams:
            if keys := used_keys(step, stream):
                self.cache.forget(stream, keys[0])
        for reason in masked.values():
            self._count(f"masked.{reason}")
        return True

    def _publish(self, step: SentStep, prediction: Prediction, done_ns: int, arrival_ns: int) -> None:
        manifest, stages = step.manifest, prediction.timing.latency_ms
        work_ms = stages["encode"] + stages["fuse"]
        total_ms = (done_ns - manifest.end_ns) / 1e6
        align_ms = (step.sent_ns - manifest.emitted_ns) / 1e6
        stages = stages | {
            "align": align_ms,
            "transport": total_ms - work_ms - stages["wait"] - align_ms,
            "total": total_ms,
        }
        timing = msgspec.structs.replace(prediction.timing, latency_ms=stages)
        prediction = msgspec.structs.replace(prediction, timing=timing, truth=self._truth(manifest.end_ns))
        self.publisher.publish_json(PREDICTION, msgspec.json.encode(prediction))
        self.mark.value = manifest.step
        self._count("predictions")

    def _truth(self, end_ns: int) -> str | None:
        """The label that covers the window's end; of several the one that began last."""
        covering = [label for label in self.labels if label.start_ns < end_ns <= label.end_ns]
        return max(covering, key=lambda label: label.start_ns).label if covering else None

    def _count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0.0) + 1


def used_keys(step: SentStep, stream: str) -> list[Key]:
    """The messages that a step's content of one stream consists of, oldest first."""
    stated = step.manifest.streams.get(stream)
    if stated is None or stated.verdict not in ("ok", "partial"):
        return []
    return [(epoch, seq) for epoch, first, last in stated.used for seq in range(first, last + 1)]
