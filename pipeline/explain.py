"""``sensorium explain``: where every message of a recorded session went, and what its windows waited for.

Everything is worked out again from what lies in the file. A manifest names the messages that the aligner took in and
those that it used; the others came too late, for no window, twice, or against their stream's own promises, which their
headers tell. So the account of a stream (sent = received + lost; received = used + late + no_window + superseded +
duplicate + rejected + buffered) is not copied from the aligner but recounted, and says whether it balances.

A recording without windows (an import, a rig without a model) gets them by event time if a bundle is named; without
one only what the messages say by themselves is known.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from pipeline.align import AlignSpec, Manifest, Resample, StreamManifest, make_track
from pipeline.messages import Header, Layout
from pipeline.prediction import Prediction
from pipeline.recording import GAP_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC, RecordingReader, reading, summarise
from pipeline.replay import replay_steps
from pipeline.rules import misfit
from pipeline.summary import Summary, ordered, quantiles
from pipeline.track import Track

PLACES = ("used", "late", "no_window", "superseded", "duplicate", "rejected", "buffered")
"""Where a message that was received can have gone."""
_NEVER = 1 << 62
JITTERY_NS = 10_000_000
"""So much later or sooner than the aligner the recorder may have heard the same."""
Source = Literal["live", "running", "event time", "messages"]
Key = tuple[int, int]
"""(epoch, number)"""


class Spread(msgspec.Struct, frozen=True):
    """A series of times in ms."""

    p50: float
    p95: float
    max: float


class StreamAccount(msgspec.Struct, kw_only=True):
    """One stream of a session."""

    payload: str | None
    """None where it is not known: a running session's stream of which nothing has come."""
    rate_hz: float | None
    gaps: int
    """Places in its numbering where messages are missing."""
    max_gap_ms: float | None
    jitter_ms: Spread | None
    """How far the time between two captures is from its median."""
    delay_ms: Spread | None
    """Arrival at the recorder less the end of the capture."""
    uncertainty_ms: Spread | None
    age_ms: Spread | None
    """End of a step less the capture of the newest content in it."""
    messages: dict[str, int]
    """sent, lost, received and, where windows are known, what became of the received ones."""
    rejected: dict[str, int]
    unaccounted: int
    """Messages that came while nobody aligned, or that a manifest names and the recorder lost."""
    balanced: bool
    """Whether sent = received + lost and received = used + late + no_window + superseded + duplicate + rejected +
    buffered."""
    verdicts: dict[str, int]
    waited: int
    """Windows that waited for this stream, the last to be proven."""
    wait_ms: Spread | None
    """How long after their end these windows were final."""


class Explanation(msgspec.Struct, kw_only=True):
    """What ``explain`` says of a session."""

    session: str
    complete: bool
    incomplete: str = ""
    """What it lacks, in words, if it is not complete."""
    source: Source
    """Where the windows come from: the live session, one that still runs (its last half minute), event time, or there
    are none."""
    windows: int
    causes: dict[str, int]
    wait_ms: Spread | None
    gaps: list[dict[str, Any]]
    """Gap records: what nobody recorded or aligned."""
    latency_ms: dict[str, dict[str, float]]
    streams: dict[str, StreamAccount]


class Heard:
    """The headers of one stream as the recorder heard them, in order: eight bytes a number."""

    def __init__(self) -> None:
        names = ("epoch", "seq", "capture_ns", "end_ns", "bound_ns", "uncertainty_ns", "arrival_ns", "beat")
        self._columns = {name: array("q") for name in names}
        self.first_bound: dict[int, int] = {}
        """Bound -> arrival of the first header that stated it."""

    def add(self, header: Header, arrival_ns: int) -> None:
        values = (header.epoch, header.seq, header.t_capture_ns, header.t_end_ns, header.bound_ns)
        all_values = (*values, header.uncertainty_ns, arrival_ns, int(header.is_beat))
        for column, value in zip(self._columns.values(), all_values, strict=True):
            column.append(value)
        self.first_bound.setdefault(header.bound_ns, arrival_ns)

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        """A column, of messages alone."""
        column: np.ndarray[Any, Any] = np.array(self._columns[name], np.int64)
        return np.asarray(column[np.array(self._columns["beat"]) == 0])

    def rows(self) -> Iterator[tuple[int, ...]]:
        """epoch, seq, capture, end, bound, uncertainty, arrival, beat of each header."""
        return zip(*self._columns.values(), strict=True)


class Session:
    """What a recording holds of a session, read once."""

    def __init__(self, recording: str | Path | RecordingReader, spec: AlignSpec | None = None) -> None:
        """``spec``: what the session's streams were aligned by, if it is known. RecordingError."""
        self.spec = spec
        with reading(recording) as reader:
            self.info = reader.info
            self.facts = summarise(reader)
            self.heard = {name: Heard() for name in sorted(reader.streams)}
            self.layouts: dict[str, Layout] = {}
            """Of the first message of each stream."""
            for header, arrival_ns in reader.headers(beats=True):
                if header.stream in self.heard:
                    self.heard[header.stream].add(header, arrival_ns)
                    if header.layout is not None:
                        self.layouts.setdefault(header.stream, header.layout)
            self.manifests, self.source = _windows(reader, spec)
            self.predictions = {prediction.window.index: prediction for prediction in recorded_predictions(reader)}
            self.gaps: list[dict[str, Any]] = [msgspec.json.decode(data) for data, _, _ in reader.json(GAP_TOPIC)]

    @property
    def live(self) -> bool:
        """Whether the windows are those of the live session, which had to wait."""
        return self.source in ("live", "running")

    def misfit(self, stream: str) -> str:
        """Why the stream's messages can be in no window, in words that follow its name, as far as this is known."""
        specs = () if self.spec is None or stream not in self.layouts else self.spec.streams
        return next((misfit(spec, self.layouts[stream]) for spec in specs if spec.name == stream), "")


def _windows(reader: RecordingReader, spec: AlignSpec | None) -> tuple[list[Manifest], Source]:
    decode = msgspec.json.Decoder(Manifest).decode
    if MANIFEST_TOPIC in reader.topics:
        return [decode(data) for data, _, _ in reader.json(MANIFEST_TOPIC)], "live"
    if spec is not None:
        return [step.manifest for step in replay_steps(reader, spec)], "event time"
    return [], "messages"


def recorded_predictions(reader: RecordingReader) -> Iterator[Prediction]:
    """The predictions that a recording holds. RecordingError."""
    decode = msgspec.json.Decoder(Prediction).decode
    return (decode(data) for data, _, _ in reader.json(PREDICTION_TOPIC))


def latency_ms(predictions: Iterable[Prediction]) -> dict[str, dict[str, float]]:
    """p50, p95, p99 and max of every stage; empty without predictions."""
    summary = Summary()
    for prediction in predictions:
        summary.add(prediction)
    return {stage: quantiles(summary.latency_ms[stage]) for stage in ordered(summary.latency_ms)}


def explain(session: Session) -> Explanation:
    """The account of a whole session."""
    waits = waits_of(session)
    lags = [manifest.emitted_ns - manifest.end_ns for manifest in session.manifests] if session.live else []
    return Explanation(
        session=session.info.session,
        complete=session.info.complete,
        incomplete=session.facts.get("incomplete", ""),
        source=session.source,
        windows=len(session.manifests),
        causes=dict(Counter(manifest.cause for manifest in session.manifests)),
        wait_ms=spread(lags),
        gaps=session.gaps,
        latency_ms=latency_ms(session.predictions.values()),
        streams={name: _stream(session, name, waits.get(name, [])) for name in session.heard},
    )


def spread(values_ns: Any) -> Spread | None:
    """The spread of times in ns; None of none."""
    values = np.asarray(values_ns, np.float64) / 1e6
    if not len(values):
        return None
    return Spread(*(float(v) for v in (np.median(values), np.percentile(values, 95), values.max())))


def _stream(session: Session, name: str, waits: list[int]) -> StreamAccount:
    heard, facts = session.heard[name], session.facts["streams"][name]
    stated = [m.streams[name] for m in session.manifests if name in m.streams]
    ages = [m.end_ns - newest for m in session.manifests if name in m.streams and (newest := m.streams[name].newest_ns)]
    intervals = np.diff(np.sort(heard["capture_ns"]))
    ledger = _Ledger(session, name)
    return StreamAccount(
        payload=facts["payload"],
        rate_hz=facts["rate_hz"],
        gaps=facts["gaps"],
        max_gap_ms=facts["max_gap_ms"],
        jitter_ms=spread(np.abs(intervals - np.median(intervals))) if len(intervals) else None,
        delay_ms=spread(heard["arrival_ns"] - heard["end_ns"]),
        uncertainty_ms=spread(heard["uncertainty_ns"]),
        age_ms=spread(ages),
        messages=ledger.messages(),
        rejected=dict(ledger.rejected),
        unaccounted=ledger.unaccounted,
        balanced=ledger.balanced(),
        verdicts=dict(Counter(verdict_of(one) for one in stated)),
        waited=len(waits),
        wait_ms=spread(waits),
    )


def verdict_of(stated: StreamManifest) -> str:
    """A verdict with its reason."""
    return f"{stated.verdict}({stated.reason})" if stated.reason else stated.verdict


# --- who was waited for ----------------------------------------------------------------------------------------------


def waited_for(session: Session, manifest: Manifest) -> list[str]:
    """The streams for which a live window waited: the last to be proven or to be given up, all that were unproven at
    the deadline."""
    if not session.live:
        return []
    unproven = {n: s for n, s in manifest.streams.items() if not s.proven and s.closed is None}
    match manifest.cause:
        case "proven":
            proven = [n for n, s in manifest.streams.items() if s.proven and n in session.heard]
            near = {n: abs(_moved_at(session, n, manifest) - manifest.emitted_ns) for n in proven}
            name = min(near, key=near.__getitem__, default=None)
            return [] if name is None else [name]
        case "idle":
            silent = [n for n, s in unproven.items() if s.idle]
            # The last to have moved was the last to be given up; what never moved was given up first.
            return [max(silent, key=lambda n: _moved_at(session, n, manifest) % _NEVER)] if silent else []
        case "deadline" | "overflow":
            return sorted(n for n, s in unproven.items() if not s.idle)
    return []


def _moved_at(session: Session, stream: str, manifest: Manifest) -> int:
    """When the header came that moved the stream's bound to where the manifest states it; ``_NEVER`` if none did."""
    bound_ns = manifest.streams[stream].bound_ns
    heard = session.heard.get(stream)
    return _NEVER if heard is None or bound_ns is None else heard.first_bound.get(bound_ns, _NEVER)


def waits_of(session: Session) -> dict[str, list[int]]:
    """By stream, how long after their end those windows were final that waited for it, ns."""
    waits: dict[str, list[int]] = {}
    for manifest in session.manifests:
        for name in waited_for(session, manifest):
            waits.setdefault(name, []).append(manifest.emitted_ns - manifest.end_ns)
    return waits


# --- where every message went ----------------------------------------------------------------------------------------


class _Ledger:
    """The account of one stream: each of its messages in one place."""

    def __init__(self, session: Session, stream: str) -> None:
        manifests = [m for m in session.manifests if stream in m.streams]
        self.aligned = bool(manifests)
        self.places: Counter[str] = Counter()
        self.rejected: Counter[str] = Counter()
        self.unaccounted = 0
        self.received = self.lost = 0
        self._stream = stream
        received = set(_keys(r for m in manifests for r in m.streams[stream].received))
        self._first, self._last = _span(session, stream, manifests)
        self._taken = {key for key in received if self._first <= key <= self._last}
        self._used = self._taken & set(_keys(r for m in manifests for r in m.streams[stream].used))
        self._overflows = [span for m in manifests for span in m.streams[stream].overflows]
        self._absences = _absences(manifests) if session.live else []
        self._refused_until_ns = _refused_until(session, stream, manifests)
        self._track = _track(session, stream, manifests)
        self._obsolete_ns = _obsolete_ns(self._track, manifests)
        self._end_ns = manifests[-1].emitted_ns if manifests and session.live else -_NEVER
        self._max_future_ns = session.spec.max_future_ns if session.spec is not None and session.live else None
        # Where messages overtake each other a bound holds only once all before it have come.
        specs = session.spec.streams if session.spec is not None else ()
        self._ordered = all(spec.ordered for spec in specs if spec.name == stream)
        self._count(session.heard[stream])

    def messages(self) -> dict[str, int]:
        """The account in numbers."""
        sent = {"sent": self.received + self.lost, "lost": self.lost, "received": self.received}
        if not self.aligned:
            return sent | {"duplicate": self.places["duplicate"]}
        return sent | {place: self.places[place] for place in PLACES}

    def balanced(self) -> bool:
        """Whether every message has one place."""
        return not self.aligned or (self.received == sum(self.places.values()) and not self.unaccounted)

    def _count(self, heard: Heard) -> None:
        seen: set[Key] = set()
        known: dict[int, int] = {}  # epoch -> how many numbers were given out
        epoch, floor_ns, bound_ns = -_NEVER, -_NEVER, -_NEVER
        for of, seq, capture_ns, end_ns, promise_ns, _, arrival_ns, beat in heard.rows():
            stale = of < epoch
            if of > epoch:
                epoch, floor_ns = of, bound_ns
            if (of, seq + (not beat)) > self._first:
                known[of] = max(known.get(of, 0), seq + (not beat))
            refused = self._beyond(max(end_ns, promise_ns), arrival_ns)
            if not beat and (of, seq) >= self._first:
                self.received += 1
                if (of, seq) in seen:
                    place = "duplicate"
                elif (of, seq) in self._taken:
                    place = self._of_taken((of, seq), end_ns)
                else:
                    below = self._ordered and capture_ns < bound_ns
                    broken = "epoch" if stale or capture_ns < floor_ns else "bound" if below else ""
                    place = self._of_others(capture_ns, end_ns, arrival_ns, "future" if refused else broken)
                if place:
                    self.places[place] += 1
                seen.add((of, seq))
            if not stale and not refused:
                bound_ns = max(bound_ns, promise_ns)
        self._absent(seen, known)

    def _of_taken(self, key: Key, end_ns: int) -> str:
        if key in self._used:
            return "used"
        return "superseded" if end_ns < self._obsolete_ns else "buffered"

    def _of_others(self, capture_ns: int, end_ns: int, arrival_ns: int, broken: str) -> str:
        """What became of a message that no manifest names."""
        if not self.aligned:
            return ""
        if not broken and any(first <= capture_ns <= last for first, last, _ in self._overflows):
            broken = "overflow"
        if not broken and any(first <= arrival_ns < end for first, end in self._absences):
            self.unaccounted += 1
            return ""
        if not broken and arrival_ns < self._refused_until_ns:
            broken = "malformed"
        if broken:
            self.rejected[broken] += 1
            return "rejected"
        if capture_ns >= self._obsolete_ns and arrival_ns >= self._end_ns - JITTERY_NS:
            return "buffered"  # it came after the last window was made
        return "late" if self._track is None or self._track.missed(capture_ns, end_ns) else "no_window"

    def _beyond(self, stamp_ns: int, arrival_ns: int) -> bool:
        return self._max_future_ns is not None and stamp_ns - arrival_ns > self._max_future_ns

    def _absent(self, seen: set[Key], known: dict[int, int]) -> None:
        """What never came is lost; what the aligner had and the recorder had not is counted with neither's name."""
        unrecorded = self._taken - seen
        for of, seq in unrecorded:
            known[of] = max(known.get(of, 0), seq + 1)
        self.received += len(unrecorded)
        self.unaccounted += len(unrecorded)
        before = self._first[1] if self._first[0] in known else 0
        self.lost = sum(known.values()) - before - len(seen | unrecorded)


def _span(session: Session, stream: str, manifests: list[Manifest]) -> tuple[Key, Key]:
    """The first and the last message of a stream that this file accounts for. A file that has its session's beginning
    accounts for all. In one that begins later what was sent before is another file's, and so is what the windows before
    its first one took in, or what only reached the recorder after its end."""
    if session.info.since is None:
        return (-_NEVER, 0), (_NEVER, 0)
    heard = [(row[0], row[1]) for row in session.heard[stream].rows()]
    listed = next((m.streams[stream].received[0] for m in manifests if m.streams[stream].received), None)
    first = session.info.standing(stream) or heard[0]
    return (first if listed is None else max(first, listed[:2])), max(heard)


def _keys(ranges: Iterable[tuple[int, int, int]]) -> Iterator[Key]:
    for epoch, first, last in ranges:
        for seq in range(first, last + 1):
            yield epoch, seq


def _absences(manifests: list[Manifest]) -> list[tuple[int, int]]:
    """Stretches of arrival times in which nobody aligned: between windows that do not follow each other."""
    return [(a.emitted_ns, b.emitted_ns) for a, b in pairwise(manifests) if b.step != a.step + 1]


def _refused_until(session: Session, stream: str, manifests: list[Manifest]) -> int:
    """Until when all that came of a stream was refused: where the last window of a live session still says that it has
    never begun."""
    never = session.live and bool(manifests) and manifests[-1].streams[stream].first_ns is None
    return manifests[-1].emitted_ns - JITTERY_NS if never else -_NEVER


def _track(session: Session, stream: str, manifests: list[Manifest]) -> Track | None:
    """The stream's track after the last window: what no window to come could use, and which were made too early; None
    where nobody knows the stream's rule."""
    for spec in session.spec.streams if session.spec is not None and manifests else ():
        if spec.name == stream and session.spec is not None:
            track = make_track(spec, session.spec.hop_ns, None, manifests[-1].step + 1)
            for manifest in manifests:
                if not manifest.streams[stream].proven:
                    track.note_unproven(manifest.step)
            return track
    return None


def _obsolete_ns(track: Track | None, manifests: list[Manifest]) -> int:
    """The time below which no window after the last could use a message: by the stream's rule if that is known."""
    if track is not None:
        return track.late_below_ns + isinstance(track.spec.rule, Resample)
    return manifests[-1].end_ns if manifests else _NEVER
