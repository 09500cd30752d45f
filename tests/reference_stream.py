"""One stream of the model (see ``tests.reference_aligner``): what was fed to it, and what it says of a step.

Nothing is ever forgotten. The stream keeps the list of all that was fed to it, and content, losses, bounds, counters
and verdicts are computed from that list by scanning it. Two questions are answered by their meaning, not by a formula:

- *Is a stream proven for a step?* ``Stream.proven`` tries every further message that the bound still allows, at every
  capture time that could matter, in the current and in a new epoch, and looks whether the content changes.
- *What was lost?* ``Stream.losses`` looks between which two messages of the list the missing numbers must lie.

A header's walk through the checks is in ``Stream._outcome``, in the order of the checks. Captures of one epoch are
taken to differ, as the design demands of every source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np

from pipeline.align import All, Latest, Nearest, Resample, StreamSpec
from pipeline.messages import AudioLayout, Header, ImuLayout, Message, SignalLayout, array, payload_of

LONG_AGO = -(10**18)
"""The epoch of a message that wins every tie. Only a bound proves: what an unordered stream sent above its bound proves
nothing, not even by lying exactly where nothing can lie nearer."""


@dataclass(eq=False)
class Fed:
    """One message that was fed, and what became of it."""

    message: Message
    outcome: str = ""
    bound_before: float = -inf
    missed: int = 0
    """How many numbers were found to be missing just before this header (ordered streams)."""
    left: bool = False
    used: bool = False

    @property
    def header(self) -> Header:
        return self.message.header

    @property
    def came(self) -> bool:
        """Whether it passed the check of bounds: its capture time is good, whatever became of it."""
        return self.outcome in ("late", "no_window", "overflow", "buffered")

    @property
    def unread(self) -> bool:
        """Whether nothing but its number was looked at."""
        return self.outcome in ("malformed", "future")


@dataclass(eq=False)
class Sample:
    t: int
    epoch: int
    fed: Fed
    values: tuple[float, ...]


@dataclass(frozen=True)
class State:
    """A stream after some event: everything that proof and liveness depend on."""

    bound: float
    """The greatest finite bound that counts; -inf before any."""
    ended: bool
    dead: bool
    advanced_ns: int
    epoch: int | None
    buffered: int
    """How many messages had ever been taken into the buffer."""


@dataclass
class RefStream:
    """What the manifest should say of one stream (sets of (epoch, seq) in place of ranges)."""

    verdict: str
    reason: str | None
    coverage: float
    proven: bool
    used: set[tuple[int, int]]
    received: set[tuple[int, int]]
    epoch: int | None
    bound_ns: int | None
    newest_ns: int | None
    uncertainty_ns: int
    idle: bool
    closed: str | None


def sample_times(header: Header, data: Any) -> list[int]:
    """Session time of every sample of a batch."""
    if isinstance(header.layout, AudioLayout):
        n = header.layout.samples
        return [header.t_capture_ns + i * (header.t_end_ns - header.t_capture_ns) // n for i in range(n)]
    return [header.t_capture_ns + int(offset) for offset in array(Message(header, data))["offset_ns"]]


def sample_values(header: Header, data: Any, channels: int) -> list[tuple[float, ...]]:
    """The columns of every sample, in float64; sound is mixed where one channel is wanted."""
    rows = array(Message(header, data))
    match header.layout:
        case AudioLayout():
            wanted = rows if rows.shape[1] == channels else [[sum(map(int, row)) / rows.shape[1]] for row in rows]
            return [tuple(v / 32768 for v in row) for row in wanted]
        case ImuLayout():
            return [tuple(float(v) for v in (*row["accel"], *row["gyro"])) for row in rows]
        case _:
            return [tuple(float(v) for v in row["value"]) for row in rows]


def channels_of(header: Header) -> int:
    match header.layout:
        case AudioLayout(channels=n):
            return n
        case ImuLayout():
            return 6
        case SignalLayout(channels=names):
            return len(names)
    return 0


class Stream:
    """One stream of the model."""

    def __init__(self, spec: StreamSpec, hop_ns: int, first_step: int = 1) -> None:
        self.spec, self.rule, self.hop = spec, spec.rule, hop_ns
        self.fed: list[Fed] = []
        """Everything that is not a beat, in order of arrival."""
        self.accounted: list[Fed] = []
        """Every header, beats included, that passed the checks of epoch and duplicate, in order of arrival."""
        self.buffered: list[Fed] = []
        """What was ever taken into the buffer."""
        self.samples: list[Sample] = []
        self.unproven: list[tuple[int, int]] = []
        """The regions of the steps that were made before they were proven."""
        self.later = first_step > 1  # what happened before is not known, so nothing is said of a start
        self.state = State(-inf, False, False, (first_step - 1) * hop_ns, None, 0)
        self.bound_at_open: dict[int, float] = {}
        self.reported = 0
        self.beats = 0
        self._proofs: dict[tuple[State, int], bool] = {}

    # -- what comes in ------------------------------------------------------------------------------------------------

    def take(self, message: Message, now: int, next_step: int, max_future_ns: int | None) -> None:
        """A header through the checks, in their order; then what follows from its outcome."""
        fed = Fed(message)
        if message.header.is_beat:
            self.beats += 1
        else:
            self.fed.append(fed)
        fed.outcome = self._outcome(fed, now, next_step, max_future_ns)
        bound = max(self.state.bound, self._bound())
        advanced = bound > self.state.bound and not self.state.ended
        if fed.outcome == "buffered":
            self.buffered.append(fed)
            if isinstance(self.rule, Resample):
                times = sample_times(fed.header, message.data)
                values = sample_values(fed.header, message.data, self.spec.channels)
                self.samples += [Sample(t, fed.header.epoch, fed, v) for t, v in zip(times, values, strict=True)]
        self.state = State(
            bound if advanced else self.state.bound,
            self.state.ended,
            self.state.dead and not advanced and fed.outcome != "buffered",
            now if advanced else self.state.advanced_ns,
            self.state.epoch,
            len(self.buffered),
        )

    def _outcome(self, fed: Fed, now: int, next_step: int, max_future_ns: int | None) -> str:
        h = fed.header
        too_far = max_future_ns is not None and max(h.t_end_ns, h.bound_ns) > now + max_future_ns
        if self._malformed(fed.message) or too_far:
            known = not h.is_beat and h.epoch == self.state.epoch and h.seq >= 0
            if known and (h.seq == self._next_seq() or not self.spec.ordered):
                self.accounted.append(fed)
            return "malformed" if self._malformed(fed.message) else "future"
        if self.state.epoch is not None and h.epoch < self.state.epoch:
            return "epoch"
        if self.state.epoch is None or h.epoch > self.state.epoch:
            self.bound_at_open[h.epoch] = self.state.bound
            s = self.state
            self.state = State(s.bound, s.ended, s.dead, s.advanced_ns, h.epoch, s.buffered)
        if not h.is_beat and (h.seq in self._seqs(h.epoch) or (self.spec.ordered and h.seq < self._next_seq())):
            return "duplicate"
        fed.bound_before = inf if self.state.ended else self.state.bound
        fed.missed = max(0, h.seq - self._next_seq() - self._refused_before(h)) if self.spec.ordered else 0
        self.accounted.append(fed)
        if h.is_beat:
            return "beat"
        if not self.spec.ordered and isinstance(self.rule, Resample) and self._overlaps(fed):
            return "overlapping"
        if h.t_capture_ns < self.bound_at_open[h.epoch]:
            return "epoch"
        if self.state.ended or h.t_capture_ns < self.state.bound:
            return "bound"
        if self._obsolete(fed, next_step):
            return "late" if self._missed(fed.header) else "no_window"
        if sum(not b.left for b in self.buffered) >= self.spec.max_buffer:
            return "overflow"
        return "buffered"

    def _missed(self, h: Header) -> bool:
        """Whether it lies in what a step looked at that was made before it was proven."""
        last = h.t_end_ns if isinstance(self.rule, Resample) else h.t_capture_ns
        return any(low <= last and h.t_capture_ns < high for low, high in self.unproven)

    def _refused_before(self, h: Header) -> int:
        """How many of the numbers that are missing before ``h`` belong to messages that came and were not believed."""
        refused = {f.header.seq for f in self.fed if f.outcome in ("malformed", "future", "turned away")
                   and f.header.epoch == h.epoch}  # fmt: skip
        return sum(self._next_seq() <= seq < h.seq for seq in refused)

    def _malformed(self, message: Message) -> bool:
        h = message.header
        if h.layout is None:
            return False
        if payload_of(h.layout) != self.spec.payload or h.seq < 0:
            return True
        if h.t_end_ns < h.t_capture_ns or h.bound_ns < h.t_capture_ns:
            return True
        if not isinstance(self.rule, Resample):
            return False
        mixed = self.spec.channels == 1 and isinstance(h.layout, AudioLayout)
        if (channels_of(h) != self.spec.channels and not mixed) or message.data is None or not h.layout.samples:  # type: ignore[union-attr]
            return True
        if isinstance(h.layout, AudioLayout):
            rates = {f.header.layout.rate_hz for f in self.buffered if f.header.epoch == h.epoch}  # type: ignore[union-attr]
            if h.t_end_ns == h.t_capture_ns or rates - {h.layout.rate_hz}:
                return True
        try:
            array(message)
        except ValueError:
            return True
        times = sample_times(h, message.data)
        return times != sorted(times) or times[-1] > h.t_end_ns or times[-1] >= h.bound_ns

    def _overlaps(self, fed: Fed) -> bool:
        """Whether its samples lie among those of a message that is held."""
        times = sample_times(fed.header, fed.message.data)
        held = [sample_times(f.header, f.message.data) for f in self.buffered if not f.left]
        return any(times[0] <= other[-1] and other[0] <= times[-1] for other in held)

    def _seqs(self, epoch: int) -> set[int]:
        return {f.header.seq for f in self.accounted if f.header.epoch == epoch and not f.header.is_beat}

    def _next_seq(self) -> int:
        """The number of the message to come, as the headers of the current epoch have it so far."""
        here = [f.header for f in self.accounted if f.header.epoch == self.state.epoch]
        return max((h.seq if h.is_beat else h.seq + 1 for h in here), default=0)

    def _bound(self) -> float:
        """What the headers of the current epoch promise: all of them, or those whose lower seqs have all come."""
        here = [f.header for f in self.accounted if f.header.epoch == self.state.epoch and not f.unread]
        if not self.spec.ordered:
            seqs = self._seqs(self.state.epoch) if self.state.epoch is not None else set()
            missing = next(n for n in range(len(seqs) + 1) if n not in seqs)
            here = [h for h in here if h.seq <= missing]  # a message with this number is not there, a beat may be
        return max((h.bound_ns for h in here), default=-inf)

    def _obsolete(self, fed: Fed, step: int) -> bool:
        """No step from ``step`` on can hold it."""
        t, end = fed.header.t_capture_ns, step * self.hop
        match self.rule:
            case Nearest(tolerance_ns=tolerance):
                return t <= end - tolerance
            case Latest(max_age_ns=age):
                return t < end - age
            case Resample(max_gap_ns=gap):
                return sample_times(fed.header, fed.message.data)[-1] + gap < end - self.hop
        return t < end - self.hop

    def turn_away(self, message: Message) -> None:
        """There is not even room for it to wait."""
        if message.header.is_beat:
            self.beats += 1
        else:
            self.fed.append(Fed(message, "turned away"))

    def shut(self, reason: str) -> None:
        s = self.state
        ended = s.ended or reason == "ended"
        self.state = State(s.bound, ended, not ended, s.advanced_ns, s.epoch, s.buffered)

    # -- losses -------------------------------------------------------------------------------------------------------

    def losses(self) -> Iterator[tuple[float, float, int]]:
        """Gaps in the numbers of an ordered stream, each as ``[low, high)`` and how many messages. What is lost lies
        above what came before it and above what had been promised, and below what came after it. Where nothing had been
        promised when its epoch opened it lies above that moment."""
        for i, f in enumerate(self.accounted):
            if f.missed:
                before = [p.header.t_capture_ns + 1 for p in self.accounted[:i] if p.came and same_epoch(p, f)]
                after = [n.header.t_capture_ns for n in self.accounted[i:] if n.came]
                first = self.bound_at_open[f.header.epoch] == -inf
                low = max(before, default=f.header.epoch if first else -inf)
                yield max(low, f.bound_before), after[0] if after else inf, f.missed

    def overflows(self) -> Iterator[tuple[float, float, int]]:
        """What a full buffer turned away, likewise."""
        for f in self.fed:
            if f.outcome in ("overflow", "turned away"):
                yield f.header.t_capture_ns, f.header.t_end_ns + 1, 1

    def _highest(self, epoch: int) -> int:
        here = [f.header for f in self.accounted if f.header.epoch == epoch]
        return max((h.seq if h.is_beat else h.seq + 1 for h in here), default=0)

    def lost(self) -> int:
        if self.spec.ordered:
            return sum(f.missed for f in self.accounted)
        return sum(self._highest(e) - len(self._seqs(e)) for e in self.bound_at_open)

    # -- content and proof --------------------------------------------------------------------------------------------

    def region(self, step: int) -> tuple[int, int]:
        """The capture times ``[low, high)`` that the rule looks at."""
        end = step * self.hop
        match self.rule:
            case Nearest(tolerance_ns=tolerance):
                return end - tolerance + 1, end + tolerance
            case Latest(max_age_ns=age):
                return end - age, end
        return end - self.hop, end

    def grid(self, step: int) -> list[int]:
        assert isinstance(self.rule, Resample)
        n = self.rule.rate_hz * self.hop // 10**9
        return [j * 10**9 // self.rule.rate_hz for j in range((step - 1) * n, step * n)]

    def content(self, step: int, held: list[Fed], samples: list[Sample]) -> tuple[Any, ...]:
        """What the step holds: messages, or for each grid point the one or two samples that it rests on."""
        low, high = self.region(step)
        within = [f for f in held if low <= f.header.t_capture_ns < high]
        match self.rule:
            case Nearest():
                end = step * self.hop
                return tuple(sorted(within, key=lambda f: (abs(f.header.t_capture_ns - end), *age_key(f)))[:1])
            case Latest():
                return tuple(sorted(within, key=age_key)[-1:])
            case Resample(max_gap_ns=gap):
                return tuple(support(g, samples, gap) for g in self.grid(step))
        return tuple(sorted(within, key=age_key))

    def content_at(self, step: int, state: State) -> tuple[Any, ...]:
        held = self.buffered[: state.buffered]
        taken = set(map(id, held))
        return self.content(step, held, self._near(step, [s for s in self.samples if id(s.fed) in taken]))

    def _near(self, step: int, samples: list[Sample]) -> list[Sample]:
        """In order of time, without those too far away to be a neighbour of any grid point of the step."""
        if not isinstance(self.rule, Resample):
            return []
        grid, gap = self.grid(step), self.rule.max_gap_ns
        near = [s for s in samples if grid[0] - gap <= s.t <= grid[-1] + gap]
        return sorted(near, key=lambda s: s.t)  # stable: of equal times the one that was taken last stands last

    def proven(self, step: int, state: State) -> bool:
        """No further message that the bound allows could change what the step holds."""
        key = (state, step)
        if key not in self._proofs:
            self._proofs[key] = state.ended or not self._changeable(step, state)
        return self._proofs[key]

    def _changeable(self, step: int, state: State) -> bool:
        held = self.buffered[: state.buffered]
        taken = set(map(id, held))
        samples = self._near(step, [s for s in self.samples if id(s.fed) in taken])
        now = self.content(step, held, samples)
        times = sorted(t for t in self._critical(step, held, samples, state.bound) if t >= state.bound)
        above = {f.header.t_capture_ns for f in held if f.header.t_capture_ns > state.bound}
        for t in times:
            for epoch in (state.epoch or 0, (state.epoch or 0) + 1, *(LONG_AGO for _ in {t} & above)):
                more = Fed(Message(new_header(t, epoch)), "buffered")
                sample = Sample(t, epoch, more, ())
                for order in ([*samples, sample], [sample, *samples]):  # it may come to stand beside an equal
                    if self.content(step, [*held, more], self._near(step, order)) != now:
                        return True
        return False

    def _critical(self, step: int, held: list[Fed], samples: list[Sample], bound: float) -> set[int]:
        """The capture times at which a further message could begin or cease to matter."""
        low, high = self.region(step)
        times = {low, high - 1}
        if isinstance(self.rule, Resample):
            times |= set(self.grid(step)) | {s.t + d for s in samples for d in (-1, 0, 1, self.rule.max_gap_ns)}
            high += self.rule.max_gap_ns
        else:
            mirror = 2 * step * self.hop
            around = {f.header.t_capture_ns for f in held if low <= f.header.t_capture_ns < high}
            times |= {t + d for a in around for t in (a, mirror - a) for d in (-1, 0, 1)}
        if low <= bound <= high:
            times |= {int(bound), int(bound) + 1}
        return times

    # -- the verdict --------------------------------------------------------------------------------------------------

    def idle_at(self, t: float) -> bool:
        return t >= expiry_of(self.spec, self.state)

    def never_started(self, step: int) -> bool:
        high = self.grid(step)[-1] + 1 if isinstance(self.rule, Resample) else self.region(step)[1]
        return not self.later and not any(f.came and f.header.t_capture_ns < high for f in self.fed)

    def judge(self, step: int, emitted_ns: int) -> tuple[RefStream, tuple[Any, ...]]:
        content, proven = self.content_at(step, self.state), self.proven(step, self.state)
        used = {id(f): f for f in (content if not isinstance(self.rule, Resample) else rested_on(content))}
        for f in used.values():
            f.used = True
        verdict, reason, coverage = self._verdict(step, content, proven, emitted_ns)
        newest = [f.header.t_capture_ns for f in used.values()]
        if isinstance(self.rule, Resample):
            newest = [g for g, s in zip(self.grid(step), content, strict=True) if s]
        state = RefStream(
            verdict, reason, coverage, proven,
            used={(f.header.epoch, f.header.seq) for f in used.values()},
            received={(f.header.epoch, f.header.seq) for f in self.buffered[self.reported :]},
            epoch=self.state.epoch,
            bound_ns=int(self.state.bound) if self.state.bound > -inf else None,
            newest_ns=max(newest, default=None),
            uncertainty_ns=max((f.header.uncertainty_ns for f in used.values()), default=0),
            idle=self.idle_at(emitted_ns) and not self.state.dead,
            closed="ended" if self.state.ended else "dead" if self.state.dead else None,
        )  # fmt: skip
        self.reported = len(self.buffered)
        if not proven:
            self.unproven.append(self.region(step))
        return state, content

    def _verdict(self, step: int, content: tuple[Any, ...], proven: bool, t: int) -> tuple[str, str | None, float]:
        region = self.region(step)
        overflowed = touching(self.overflows(), *region)
        lost = overflowed + touching(self.losses(), *region)
        match self.rule:
            case Resample():
                coverage = sum(bool(s) for s in content) / len(content)
                complete = coverage == 1 and not overflowed
            case All():
                coverage = len(content) / (len(content) + lost) if content else 0.0
                complete = not lost
                if not content and proven and complete:
                    return "ok", None, 1.0
            case _:
                coverage = 1.0 if content else 0.0
                complete = True
                if content:  # nothing that would be the content instead was lost or turned away
                    t, e = content[0].header.t_capture_ns, step * self.hop
                    low, high = (t + 1, e) if isinstance(self.rule, Latest) else (
                        (t + 1, 2 * e - t) if t < e else (2 * e - t, t))  # fmt: skip
                    complete = low >= high or not (
                        touching(self.losses(), low, high) or touching(self.overflows(), low, high))  # fmt: skip
        if coverage > 0:
            return ("ok", None, coverage) if proven and complete else ("partial", None, coverage)
        return self._absence(step, proven, bool(lost), t)

    def _absence(self, step: int, proven: bool, lost: bool, t: int) -> tuple[str, str | None, float]:
        never, gap = self.never_started(step), lost or isinstance(self.rule, Resample | All)
        if proven:
            return "missing", "never_started" if never else "gap" if gap else "out_of_tolerance", 0.0
        if self.state.dead:
            return "missing", "dead", 0.0
        if self.idle_at(t):
            return "missing", "never_started" if never else "silent", 0.0
        return "late", None, 0.0

    def values(self, step: int, content: tuple[Any, ...]) -> np.ndarray[Any, Any]:
        """The grid: float64 between two samples, then float32; NaN in holes."""
        out = np.full((len(content), self.spec.channels), np.nan, np.float32)
        for row, g, rests in zip(out, self.grid(step), content, strict=True):
            for c in range(self.spec.channels if rests else 0):
                row[c] = np.float32(between(g, [(s.t, s.values[c]) for s in rests]))
        return out

    def trim(self, next_step: int) -> None:
        for f in self.buffered:
            f.left = f.left or self._obsolete(f, next_step)

    def counts(self) -> dict[str, Any]:
        by = Counter(
            {"turned away": "overflow", "overlapping": "malformed"}.get(f.outcome, f.outcome) for f in self.fed
        )
        unused = [f for f in self.buffered if not f.used]
        return {
            "received": len(self.fed),
            "used": sum(f.used for f in self.buffered),
            "late": by["late"],
            "no_window": by["no_window"],
            "superseded": sum(f.left for f in unused),
            "duplicate": by["duplicate"],
            "rejected": {r: by[r] for r in ("epoch", "bound", "future", "malformed", "overflow") if by[r]},
            "buffered": sum(not f.left for f in unused),
            "lost": self.lost(),
            "beats": self.beats,
        }


def touching(losses: Iterator[tuple[float, float, int]], low: float, high: float) -> int:
    """How many messages were lost in losses that touch ``[low, high)``."""
    return sum(n for a, b, n in losses if max(a, low) < min(b, high))


def same_epoch(a: Fed, b: Fed) -> bool:
    return a.header.epoch == b.header.epoch


def age_key(f: Fed) -> tuple[int, int, int]:
    return f.header.t_capture_ns, f.header.epoch, f.header.seq


def new_header(t: int, epoch: int) -> Header:
    """Of a message that may still come: it loses every tie, unless it is from long ago."""
    return Header(stream="", seq=10**9, epoch=epoch, t_capture_ns=t, t_end_ns=t, bound_ns=t, t_receipt_ns=t)


def support(g: int, samples: list[Sample], gap: int) -> tuple[Sample, ...]:
    """The samples that the point ``g`` rests on: the one at it, its two neighbours, or none. ``samples`` by time; of
    equal times the last counts at that time and after it, the first before it."""
    at = [s for s in samples if s.t == g]
    if at:
        return (at[-1],)
    left, right = [s for s in samples if s.t < g], [s for s in samples if s.t > g]
    if not left or not right:
        return ()
    a, b = left[-1], right[0]
    return (a, b) if a.epoch == b.epoch and b.t - a.t <= gap else ()


def rested_on(content: tuple[tuple[Sample, ...], ...]) -> list[Fed]:
    return [s.fed for rests in content for s in rests]


def between(g: int, points: list[tuple[int, float]]) -> float:
    """The value at ``g``, of one sample or between two."""
    (left, a), (right, b) = points[0], points[-1]
    return a if left == right else a + (b - a) * ((g - left) / (right - left))


def expiry_of(spec: StreamSpec, state: State) -> float:
    """When the stream becomes idle if nothing more comes."""
    return inf if state.ended or spec.idle_ns is None else state.advanced_ns + spec.idle_ns
