"""Histories for the aligner: what sources send, what the way does to it, and when it arrives.

A ``Case`` is a spec and a list of calls in order of time; its repr, with the imports below, makes it again. Times are
small multiples of one scale, so that captures fall on grid points, ends of hops, deadlines and limits of tolerance all
the time and not once in a million.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec
import numpy as np
from hypothesis import strategies as st

from pipeline.align import AlignSpec, All, Latest, Nearest, Resample, StreamSpec
from pipeline.messages import (
    IMU_DTYPE,
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    signal_dtype,
)

HOP = 100
FAR = 10**15

Call = tuple[Any, ...]
"""("feed", message, at) | ("tick", at) | ("close", stream, reason, at) | ("finish", at)"""


@dataclass(frozen=True)
class Case:
    spec: AlignSpec
    calls: tuple[Call, ...]


class Sent(NamedTuple):
    """A message on its way: when it leaves, how long it takes, and whether it may overtake."""

    message: Message
    at: int
    delay: int
    overtakes: bool


# -- messages ---------------------------------------------------------------------------------------------------------

NAMES = ("a", "b", "c", "d", "e")


def value(seq: int, row: int, column: int) -> float:
    """Some number that float32 does not hold exactly and no other sample nearby has."""
    return ((seq * 31 + row * 7 + column * 3) % 101 - 50) / 7.0


def samples_buffer(payload: str, channels: int, offsets: list[int], seq: int) -> tuple[Layout, bytes]:
    """A layout and its buffer for a batch with these offsets (audio: as many samples)."""
    n = len(offsets)
    values = np.array([[value(seq, i, c) for c in range(channels)] for i in range(n)]).reshape(n, channels)
    if payload == "audio":
        return AudioLayout(rate_hz=16_000, channels=channels, samples=n), (values * 600).astype("<i2").tobytes()
    if payload == "imu":
        rows = np.zeros(n, IMU_DTYPE)
        rows["accel"], rows["gyro"] = values[:, :3], values[:, 3:]
        rows["offset_ns"] = offsets
        return ImuLayout(samples=n), rows.tobytes()
    rows = np.zeros(n, signal_dtype(channels))
    rows["value"], rows["offset_ns"] = values, offsets
    return SignalLayout(samples=n, channels=NAMES[:channels]), rows.tobytes()


def layout_of(spec: StreamSpec, offsets: list[int], seq: int) -> tuple[Layout, bytes | None]:
    match spec.payload:
        case "frame":
            return FrameLayout(format="gray8", height=2, width=2), None
        case "sweep":
            return SweepLayout(points=0), b""
        case "text":
            return TextLayout(bytes=2), b"ab"
        case _:
            return samples_buffer(spec.payload, spec.channels or 1, offsets, seq)


def message(
    spec: StreamSpec, seq: int, t: int, *, epoch: int = 0, bound: int | None = None, offsets: tuple[int, ...] = (0,),
    end: int | None = None,
) -> Message:  # fmt: skip
    """A message as a sane source sends it: one sample at each offset; the least bound that its payload allows."""
    layout, data = layout_of(spec, list(offsets), seq)
    end = end if end is not None else t + offsets[-1] + (spec.payload == "audio")
    least = end if isinstance(layout, AudioLayout) else end + 1
    header = Header(
        stream=spec.name, seq=seq, epoch=epoch, t_capture_ns=t, t_end_ns=end, t_receipt_ns=end,
        bound_ns=least if bound is None else bound, layout=layout, uncertainty_ns=seq % 5,
    )  # fmt: skip
    return Message(header, data)


def beat(stream: str, seq: int, bound: int, epoch: int = 0) -> Message:
    return Message(
        Header(
            stream=stream, seq=seq, epoch=epoch, t_capture_ns=bound, t_end_ns=bound, bound_ns=bound, t_receipt_ns=bound
        )
    )


def ramps(spec: StreamSpec, batches: list[list[int]]) -> list[Message]:
    """Batches of samples at these times, whose values are the times."""
    out = []
    for seq, times in enumerate(b for b in batches if b):
        m = message(spec, seq, times[0], offsets=tuple(t - times[0] for t in times))
        rows = np.frombuffer(m.data, [("offset_ns", "<i8"), ("value", "<f4")]).copy()
        rows["value"] = times
        out.append(Message(m.header, rows.tobytes()))
    return out


# -- sources ----------------------------------------------------------------------------------------------------------

GAPS = (1, 7, 10, 20, 25, 33, 34, 50, 51, 99, 100, 101, 250)
OFFSETS = ((0,), (0, 10), (0, 10, 20), (0, 0, 7), (0, 33, 34, 66), (0, 50, 100), (0, 7, 7, 7, 30))
DELAYS = (0, 0, 0, 1, 5, 20, 50, 150, 400)
PROMISES = (0, 0, 0, 0, 1, 30, 120)
WELL = ("send",) * 12 + ("lose", "lose", "twice", "beat", "beat")
ILL = (
    *WELL,
    "restart",
    "restart",
    "back",
    "stale",
    "future",
    "pause",
    "jump",
    "malformed",
    "overtake",
    "lost tail",
    "shy",
)


class Event(NamedTuple):
    kind: str
    gap: int
    snap: bool
    offsets: tuple[int, ...]
    delay: int
    promise: int


def events(kinds: tuple[str, ...], most: int) -> st.SearchStrategy[list[Event]]:
    """Up to ``most`` events, each drawn as one number: one draw each is what keeps long histories quick to make."""
    fields = (kinds, GAPS, (False, True), OFFSETS, DELAYS, PROMISES)
    numbers = st.integers(0, math.prod(map(len, fields)) - 1)

    def event(number: int) -> Event:
        chosen = []
        for field in reversed(fields):
            number, i = divmod(number, len(field))
            chosen.append(field[i])
        return Event(*reversed(chosen))

    lists = st.integers(0, most).flatmap(lambda n: st.lists(numbers, min_size=n, max_size=n))
    return lists.map(lambda drawn: [event(n) for n in drawn])


@dataclass
class Source:
    """A source and its clock; ``run`` makes of each event what leaves it."""

    spec: StreamSpec
    scale: int = 1
    far: int = FAR
    seq: int = 0
    epoch: int = 0
    t: int = 0
    bound: int = 0

    def run(self, events: list[Event]) -> list[Sent]:
        return [s for e in events for s in self._event(e)]

    def _event(self, e: Event) -> list[Sent]:
        self._move(e)
        match e.kind:
            case "lose":
                self.seq += 1 + e.gap % 3
                return []
            case "lost tail":
                self.seq += 1 + e.gap % 3
                return [self._beat(e)]
            case "beat":
                self.bound = max(self.bound, self.t)
                return [self._beat(e)]
            case "restart":
                self._restart(e)
            case "twice":
                sent = self._message(e)
                return [sent, sent._replace(delay=sent.delay + e.gap * self.scale)]
            case "stale":
                old = self._header(self._message(e), epoch=self.epoch - 1)
                return [old]
            case "back":
                t = self.bound - e.gap * self.scale
                return [self._message(e, max(t, 0))] if self.spec.ordered else []
            case "future":
                sent = self._message(e)
                return [self._header(sent, t_end_ns=self.far, bound_ns=self.far)] if self.far > FAR // 2 else [sent]
            case "shy" if not isinstance(self.spec.rule, Resample):
                sent = self._message(e)
                self.bound = min(self.bound, sent.message.header.t_capture_ns)
                return [self._header(sent, bound_ns=sent.message.header.t_capture_ns)]
            case "malformed":
                return [self._spoil(self._message(e), e.gap + e.delay + len(e.offsets))]
        return [self._message(e)]

    def _move(self, e: Event) -> None:
        gap = e.gap * {"pause": 10, "jump": 30}.get(e.kind, 1)
        self.t = max(self.t + gap * self.scale, self.bound)
        if e.snap:
            rate = self.spec.rule.rate_hz if isinstance(self.spec.rule, Resample) else 10**9 // (50 * self.scale)
            j = -(-self.t * rate // 10**9)
            self.t = max(self.t, j * 10**9 // rate)

    def _restart(self, e: Event) -> None:
        self.epoch = max(self.epoch + 1, self.t)
        self.seq = e.gap % 2
        if e.promise == 30:
            self.t = max(self.t - 120 * self.scale, 0)
        self.bound = 0

    def _message(self, e: Event, t: int | None = None) -> Sent:
        t = self.t if t is None else t
        offsets = tuple(o * self.scale for o in e.offsets)
        end = t + offsets[-1] + (e.gap * self.scale if self.spec.payload == "audio" else 0)
        end = end if self.spec.payload in ("audio", "imu", "signal") else t
        sent = message(self.spec, self.seq, t, epoch=self.epoch, offsets=offsets, end=end)
        promise = sent.header.bound_ns + e.promise * self.scale
        self.seq, self.t, self.bound = self.seq + 1, max(end, self.t), max(promise, self.bound)
        return Sent(change(sent, bound_ns=promise), end, e.delay * self.scale, e.kind == "overtake")

    def _beat(self, e: Event) -> Sent:
        return Sent(beat(self.spec.name, self.seq, self.bound, self.epoch), self.t, e.delay * self.scale, False)

    def _header(self, sent: Sent, **changes: Any) -> Sent:
        return sent._replace(message=change(sent.message, **changes))

    def _spoil(self, sent: Sent, how: int) -> Sent:
        h = sent.message.header
        match how % 8:
            case 0:
                return self._header(sent, t_end_ns=h.t_capture_ns - 1)
            case 1:
                return self._header(sent, bound_ns=h.t_capture_ns - 1)
            case 2:
                return self._header(sent, seq=-1)
            case 3 if isinstance(self.spec.rule, Resample):
                return sent._replace(message=Message(h, sent.message.data[:-1]))
            case 4 if isinstance(self.spec.rule, Resample):
                return sent._replace(message=Message(h, None))
            case 5 if isinstance(self.spec.rule, Resample):
                layout, data = layout_of(self.spec, [0, 9, 8], h.seq)
                return self._header(sent._replace(message=Message(h, data)), layout=layout, t_end_ns=h.t_end_ns + 9)
            case 6 if isinstance(self.spec.rule, Resample):
                return self._header(sent._replace(message=Message(h, b"")), layout=layout_of(self.spec, [], h.seq)[0])
            case 7 if isinstance(self.spec.rule, Resample):
                return self._header(sent, bound_ns=h.t_capture_ns)
        other = FrameLayout(format="gray8", height=1, width=1) if self.spec.payload == "text" else TextLayout(bytes=2)
        return sent._replace(message=change(sent.message, layout=other))


def change(message: Message, **changes: Any) -> Message:
    return Message(msgspec.structs.replace(message.header, **changes), message.data)


# -- rigs -------------------------------------------------------------------------------------------------------------


def rules(scale: int) -> st.SearchStrategy[tuple[Any, str, int]]:
    """(rule, payload, channels)."""
    times = {
        "tolerance": st.sampled_from((1, 20, 50, 99, 100, 150, 260)),
        "age": st.sampled_from((1, 50, 100, 101, 250)),
        "gap": st.sampled_from((5, 34, 60, 150, 400)),
    }
    whole = st.sampled_from(("frame", "sweep", "text"))
    nearest = st.builds(lambda t, p: (Nearest(t * scale), p, 0), times["tolerance"], whole)
    latest = st.builds(lambda t, p: (Latest(t * scale), p, 0), times["age"], whole)
    everything = st.builds(lambda p: (All(), p, 0), st.sampled_from(("frame", "text", "audio")))
    resample = st.builds(
        lambda n, gap, pc: (Resample(n * 10**9 // (HOP * scale), gap * scale), *pc),
        st.sampled_from((1, 2, 3, 5, 50)), times["gap"], st.sampled_from((("imu", 6), ("signal", 2), ("audio", 1))),
    )  # fmt: skip
    return st.one_of(nearest, latest, everything, resample, resample)


@st.composite
def stream_specs(draw: st.DrawFn, name: str, scale: int, limits: bool) -> StreamSpec:
    rule, payload, channels = draw(rules(scale))
    idle = draw(st.sampled_from((None, 60, 150, 500))) if limits else None
    return StreamSpec(
        name=name,
        payload=payload,
        rule=rule,
        channels=channels,
        idle_ns=None if idle is None else idle * scale,
        ordered=draw(st.sampled_from((True, True, False))),
        max_buffer=draw(st.sampled_from((1, 2, 5, 4096))) if limits else 10**6,
    )


@st.composite
def rigs(draw: st.DrawFn, limits: bool = True, scale: int | None = None, most: int = 5) -> tuple[AlignSpec, int]:
    """(spec, scale): one to five streams; with ``limits``, any of the limits may be set."""
    scale = draw(st.sampled_from((1, 10**6))) if scale is None else scale
    n = draw(st.integers(1, most))
    streams = tuple(draw(stream_specs(NAMES[i], scale, limits)) for i in range(n))
    delay = draw(st.sampled_from((None, 0, 30, 100, 250, 1000))) if limits else None
    future = draw(st.sampled_from((None, 50, 500))) if limits else None
    spec = AlignSpec(
        hop_ns=HOP * scale,
        streams=streams,
        max_delay_ns=None if delay is None else delay * scale,
        max_future_ns=None if future is None else future * scale,
        max_open=draw(st.sampled_from((1, 3, 64))) if limits else 10**9,
        max_steps_per_call=draw(st.sampled_from((1, 2, 64, 10**6))),
    )
    return spec, scale


# -- histories --------------------------------------------------------------------------------------------------------


def arrivals(sent: list[Sent], ordered: bool) -> list[tuple[int, Message]]:
    """When each arrives: an ordered stream keeps its order, save for what overtakes."""
    out, last = [], 0
    for s in sent:
        at = s.at + s.delay
        if ordered and not s.overtakes:
            at = last = max(at, last)
        out.append((at, s.message))
    return out


@st.composite
def live_cases(draw: st.DrawFn, most_events: int = 30) -> Case:
    """A live rig in trouble: every limit and fault, ticks and closes at any time; finished unless stamps are wild."""
    spec, scale = draw(rigs())
    wild = spec.max_future_ns is None and draw(st.integers(0, 9)) == 0
    if wild:
        spec = msgspec.structs.replace(spec, max_steps_per_call=draw(st.integers(1, 5)))
    far = min(FAR * scale, 2**62) if spec.max_future_ns is not None or wild else 0
    calls: list[Call] = []
    for stream in spec.streams:
        sent = Source(stream, scale, far).run(draw(events(ILL, most_events)))
        calls += [("feed", m, at) for at, m in arrivals(sent, stream.ordered)]
    end = max((c[-1] for c in calls), default=0) + draw(st.sampled_from((0, 1, 100, 1000))) * scale
    times = st.integers(0, end // scale + 1).map(lambda t: t * scale)
    calls += [("tick", at) for at in draw(st.lists(times, max_size=6))]
    names = st.sampled_from([s.name for s in spec.streams])
    reasons = st.sampled_from(("dead", "dead", "ended"))
    calls += draw(st.lists(st.tuples(st.just("close"), names, reasons, times), max_size=2))
    calls.sort(key=lambda c: c[-1])
    calls.append(("tick", end + scale) if wild else ("finish", end + scale))
    return Case(spec, tuple(calls))


@st.composite
def event_time_orders(draw: st.DrawFn, most_events: int = 20) -> tuple[AlignSpec, list[list[Message]]]:
    """A rig without limits, and several orders of the same messages that its streams allow."""
    spec, scale = draw(rigs(limits=False))
    queues: list[list[Message]] = []
    ordered_ill = tuple(k for k in ILL if k not in ("future", "overtake"))
    for stream in spec.streams:
        kinds = ordered_ill if stream.ordered else WELL
        sent = Source(stream, scale, 0).run(draw(events(kinds, most_events)))
        queues.append([s.message for s in sent])
    random = draw(st.randoms(use_true_random=False))
    orders = [[m for q in queues for m in q]]
    for _ in range(3):
        left = [list(q) if s.ordered else random.sample(q, len(q)) for s, q in zip(spec.streams, queues, strict=True)]
        merged = []
        while any(left):
            merged.append(random.choice([q for q in left if q]).pop(0))
        orders.append(merged)
    return spec, orders


def with_ticks(case: Case, at: list[int]) -> Case:
    """The same case with more ticks; those at the time of another call come before it."""
    last = case.calls[-1][-1] if case.calls else -1  # nothing is left of some that are all ticks
    ticks: list[Call] = [("tick", t) for t in at if t <= last]
    return replace(case, calls=tuple(sorted([*ticks, *case.calls], key=lambda c: c[-1])))
