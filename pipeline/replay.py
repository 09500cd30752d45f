"""Recordings as messages, as steps and as predictions again: by event time, at any pace.

Here time is what the messages say. There are no deadlines, no idleness and no guards, and how fast the file is read
changes nothing: the same recording gives the same steps. A step waits until every stream has proven its content, or
has ended.

**Bounds come from the file.** A live stream that falls silent for an hour promises nothing, and a step that waits for
it would hold everything else in memory for that hour. A recording is read twice instead: first the headers alone, which
tell for every message what the least capture time of all later ones of its stream is; then the messages, each followed
by a beat with that bound where it is higher than the message's own. A stream ends after its last message. The steps are
those that plain waiting would give (a property test), with memory for the skew between streams only. Where numbers are
missing in a stream's sequence nothing is promised: the lost messages may lie anywhere in between.
"""

from __future__ import annotations

import heapq
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from pipeline.align import Aligner, AlignSpec, Step, StreamManifest, digest
from pipeline.bundle import Bundle
from pipeline.clock import Clock
from pipeline.errors import BundleError, ConfigError, listed, nearest
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.labels import known_labels
from pipeline.messages import Header, Layout, Message
from pipeline.prediction import Prediction
from pipeline.recording import Label, RecordingReader, reading
from pipeline.rules import misfit
from pipeline.stamper import hollow, in_place_of_values, no_value

T = TypeVar("T")
_MANY, _SHORT_NS = 1_000_000, 100_000
"""So many steps of a shorter hop than that nobody has meant: no sensor here speaks as often."""

_NOTHING, _END = -(1 << 62), 1 << 62
_NO_LIMIT = 1 << 40


def paced(
    items: Iterable[tuple[T, int]], clock: Clock, speed: float | None, stop: threading.Event | None = None
) -> Iterator[tuple[T, int]]:
    """The items, each not before its time, counted from the first one's and sped up by ``speed`` (None: at once).

    Pacing only waits: it neither drops nor changes anything. Ends when ``stop`` is set.
    """
    start: tuple[int, int] | None = None
    for item, t_ns in items:
        if speed is not None:
            start = start or (clock.now_ns(), t_ns)
            if not clock.wait_until(start[0] + round((t_ns - start[1]) / speed), stop):
                return
        if stop is not None and stop.is_set():
            return
        yield item, t_ns


class Heard(Protocol):
    """Where a session's messages come from, in order of arrival: a ``RecordingReader``, or what a program has made."""

    def messages(
        self, streams: Collection[str] | None = None, beats: bool = False
    ) -> Iterator[tuple[Message, int]]: ...

    def headers(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Header, int]]: ...


def event_time(spec: AlignSpec) -> AlignSpec:
    """``spec`` without anything that depends on arrival: deadline, future guard, idleness, caps."""
    streams = tuple(msgspec.structs.replace(s, idle_ns=None, max_buffer=_NO_LIMIT) for s in spec.streams)
    return msgspec.structs.replace(spec, streams=streams, max_delay_ns=None, max_future_ns=None, max_open=_NO_LIMIT)


def replay_steps(recording: str | Path | Heard, align_spec: AlignSpec) -> Iterator[Step]:
    """The steps of a session by event time, in order; limits of ``align_spec`` that depend on arrival are ignored.

    Streams of the recording that the spec does not name are left out; a stream that the recording lacks never started.
    Steps carry messages with payloads. RecordingError if the file is damaged; ConfigError if it has none of the spec's
    streams, if all that it has of one is of another kind (payload, channels) than what the spec takes, or if the hop is
    so short that another unit was meant.
    """
    if not isinstance(recording, str | Path):
        if isinstance(recording, RecordingReader):
            _check_common(recording, align_spec)
        yield from _steps(recording, event_time(align_spec))
        return
    with reading(recording) as reader:
        _check_common(reader, align_spec)
        yield from _steps(reader, event_time(align_spec))


def _check_common(reader: RecordingReader, spec: AlignSpec) -> None:
    """ConfigError where no step can have anything: whoever goes over them would not be told."""
    wanted = [stream.name for stream in spec.streams]
    if reader.streams and not reader.streams.keys() & set(wanted):
        raise ConfigError(
            f"{reader.path} has none of the streams {listed(wanted)}; it has {listed(sorted(reader.streams))}."
            f"{nearest(wanted[0], reader.streams) if wanted else ''}"
        )


def _steps(reader: Heard, spec: AlignSpec) -> Iterator[Step]:
    names = {stream.name for stream in spec.streams}
    foresight = _Foresight(reader, names, {stream.name for stream in spec.streams if stream.ordered})
    foresight.check(spec, getattr(reader, "path", None))
    present = tuple(stream for stream in spec.streams if stream.name in foresight.started)
    absent = sorted(names - foresight.started)
    if not present:
        return
    last = foresight.greatest_ns // spec.hop_ns
    if last > _MANY and spec.hop_ns < _SHORT_NS:
        raise ConfigError(
            f"a hop of {spec.hop_ns} ns makes {last:,} steps of {foresight.greatest_ns / 1e9:.6g} s; hops are in "
            f"nanoseconds, so that {spec.hop_ns} ms would be hop_ns={spec.hop_ns * 1_000_000:_}."
        )
    for step in _aligned(reader, msgspec.structs.replace(spec, streams=present), foresight):
        # Proof may run ahead of the bounds at the very end: a resampled step needs its grid points, not its whole hop.
        if step.manifest.step > last:
            return
        yield _with_absent(step, absent) if absent else step


def _aligned(reader: Heard, spec: AlignSpec, foresight: _Foresight) -> Iterator[Step]:
    aligner = Aligner(spec)
    now_ns = 0
    for beat in foresight.first():
        yield from _drained(aligner, aligner.feed(beat, now_ns), now_ns)
    for message, arrival_ns in reader.messages(foresight.started, beats=True):
        now_ns = max(now_ns, arrival_ns)
        yield from _drained(aligner, aligner.feed(message, now_ns), now_ns)
        bound_ns = foresight.after(message.header)
        if bound_ns == _END:
            yield from _drained(aligner, aligner.close(message.header.stream, "ended", now_ns), now_ns)
        elif bound_ns > message.header.bound_ns:
            yield from _drained(aligner, aligner.feed(_beat(message.header, bound_ns), now_ns), now_ns)
    yield from aligner.finish(now_ns)


def _with_absent(step: Step, absent: list[str]) -> Step:
    """``step`` with the streams that the recording does not know. The aligner is not asked about them: to it, a stream
    that has ended has proven that it had nothing to say, which is more than a file without it tells."""
    never = StreamManifest("missing", "never_started", coverage=0.0, idle=True)
    streams = dict(sorted((step.manifest.streams | dict.fromkeys(absent, never)).items()))
    manifest = msgspec.structs.replace(
        step.manifest, streams=streams, digest=digest(step.manifest.step, streams, step.grids)
    )
    return Step(manifest, step.messages, step.grids)


def _drained(aligner: Aligner, steps: list[Step], now_ns: int) -> Iterator[Step]:
    """All steps that are final now; a call returns only so many."""
    while steps:
        yield from steps
        steps = aligner.tick(now_ns)


def _beat(header: Header, bound_ns: int) -> Message:
    """A promise on the stream of ``header``, right after it."""
    number = header.seq if header.is_beat else header.seq + 1
    return Message(
        Header(
            stream=header.stream,
            seq=number,
            epoch=header.epoch,
            t_capture_ns=bound_ns,
            t_end_ns=bound_ns,
            bound_ns=bound_ns,
            t_receipt_ns=bound_ns,
        )
    )


class _Foresight:
    """What a recording's streams can promise, after each message or beat, from what comes later in the file."""

    def __init__(self, reader: Heard, names: Collection[str], ordered: Collection[str]) -> None:
        self._first: dict[str, Header] = {}
        self._bounds: dict[str, array[int]] = {}
        self._at = dict.fromkeys(ordered, 0)
        self._kinds: dict[str, dict[Hashable, Layout]] = {}
        series: dict[str, _Series] = {}
        for header, _ in reader.headers(names, beats=True):
            if header.stream not in series:
                self._first[header.stream] = header
                series[header.stream] = _Series(header.stream in ordered)
            if header.layout is not None:
                self._kinds.setdefault(header.stream, {}).setdefault(_kind(header.layout), header.layout)
            series[header.stream].add(header)
        self.started = frozenset(series)
        self.greatest_ns = max((one.greatest_ns for one in series.values()), default=0)
        self._bounds = {name: one.promises() for name, one in series.items() if name in ordered}

    def check(self, spec: AlignSpec, path: Path | None) -> None:
        """ConfigError if a stream has messages, and none of them can be in any step."""
        for stream in spec.streams:
            wrong = [misfit(stream, layout) for layout in self._kinds.get(stream.name, {}).values()]
            if wrong and all(wrong):
                raise ConfigError(
                    f"{path or 'the session'}: its stream `{stream.name}` {wrong[0]}, so nothing of it can be in any "
                    "window. Name a recording with what is taken, or a model (or an AlignSpec) that takes what it has; "
                    "what a model takes says its model.yaml"
                )

    def first(self) -> Iterator[Message]:
        """Promises before anything has come: nothing lies below a stream's least capture time."""
        for name, bounds in sorted(self._bounds.items()):
            if bounds[0] != _NOTHING:
                yield _beat(msgspec.structs.replace(self._first[name], seq=0, layout=None), bounds[0])

    def after(self, header: Header) -> int:
        """The bound that holds after this item, the next one of its stream; ``_END`` if it was the last."""
        bounds = self._bounds.get(header.stream)
        if bounds is None:
            return _NOTHING
        self._at[header.stream] += 1
        return bounds[self._at[header.stream]]


def _kind(layout: Layout) -> Hashable:
    """What messages have in common that fit into the same windows or do not."""
    return type(layout), getattr(layout, "channels", None)


class _Series:
    """The items of one stream, in log order: 9 bytes each."""

    def __init__(self, ordered: bool) -> None:
        self.greatest_ns = _NOTHING
        """The greatest bound that holds at the end. In an unordered stream a bound holds once all lower numbers of its
        epoch have come."""
        self._ordered = ordered
        self._captures = array("q")
        self._linked = bytearray()
        self._epoch, self._number = _NOTHING, 0
        self._come: set[int] = set()
        self._waiting: list[tuple[int, int]] = []

    def add(self, header: Header) -> None:
        """Notes a message's capture time, and whether nothing is missing between it and the item before."""
        stale = header.epoch < self._epoch  # of an epoch that is over: the aligner refuses it
        if header.epoch > self._epoch:
            self._epoch, self._number = header.epoch, 0
            self._come.clear()
            self._waiting.clear()
        self._linked.append(not stale and header.seq == self._number)
        self._captures.append(_END if stale or header.is_beat else header.t_capture_ns)
        if stale:
            return
        number = header.seq + (not header.is_beat)
        if self._ordered:
            self._number = max(self._number, number)
            self.greatest_ns = max(self.greatest_ns, header.bound_ns)
        else:
            self._come_in_any_order(header, number)

    def _come_in_any_order(self, header: Header, number: int) -> None:
        if not header.is_beat and header.seq >= self._number:
            self._come.add(header.seq)
        while self._number in self._come:
            self._come.remove(self._number)
            self._number += 1
        heapq.heappush(self._waiting, (number, header.bound_ns))
        while self._waiting and self._waiting[0][0] <= self._number:
            self.greatest_ns = max(self.greatest_ns, heapq.heappop(self._waiting)[1])

    def promises(self) -> array[int]:
        """For each place between items (before the first, ..., after the last) the bound that holds there: the least
        capture time that follows, after the last message the greatest bound that is stated anywhere, and nothing where
        numbers are missing before the next message."""
        bounds = array("q", [_END]) * (len(self._captures) + 1)
        least, whole = self.greatest_ns, True
        for i in range(len(self._captures) - 1, -1, -1):
            capture = self._captures[i]
            whole = bool(self._linked[i]) and (whole or capture != _END)
            least = min(least, capture)
            bounds[i] = least if whole else _NOTHING
        return bounds


class ReplayPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How a recording's streams serve a bundle's."""

    spec: AlignSpec
    streams: dict[str, str]
    """Bundle stream -> stream of the recording."""
    missing: tuple[str, ...]
    """Streams that the bundle knows and the recording lacks; they never start."""
    ignored: tuple[str, ...]
    """Streams of the recording that the bundle does not know."""
    could: tuple[tuple[str, str], ...] = ()
    """Streams of the bundle that are missing, each with one that is ignored and could stand for it."""

    @property
    def notes(self) -> list[str]:
        """What a user should know of it, in words."""
        notes = []
        if self.missing:
            notes.append(f"the recording has no {', '.join(self.missing)}: missing in every window")
        if self.ignored:
            notes.append(f"the bundle does not use {', '.join(self.ignored)} of the recording")
        notes += [f"{own} of the recording could stand for {name}: --stream {name}={own}" for name, own in self.could]
        return notes


def plan_replay(
    recording: str | Path | RecordingReader, bundle: Bundle, streams: Mapping[str, str | None] | None = None
) -> ReplayPlan:
    """Which stream serves which. ``streams`` maps bundle stream -> stream of the recording where the names differ.

    BundleError, naming both sides, if they have no stream in common or the payloads of one differ; ConfigError if
    ``streams`` names what the bundle does not have.
    """
    with reading(recording) as reader:
        held, where = reader.streams, reader.path
    names = bundle.rig_streams(streams)
    needed = {rig: bundle.streams[name].payload for name, rig in names.items()}
    common = [rig for rig in needed if rig in held]
    if not common:
        raise BundleError(
            f"the bundle {bundle.name} and the recording {where} have no stream in common: the bundle needs "
            f"{_described(needed)}, the recording holds {_described(held)}. {_way_out(names, needed, held)}"
        )
    for name, rig in names.items():
        if rig in held and held[rig] != needed[rig]:
            raise BundleError(
                f"the bundle {bundle.name} needs {needed[rig]} on its stream {name}, but {rig} of the recording "
                f"{where} carries {held[rig]}. Map another stream to it (--stream {name}=…), or leave it out "
                f"(--stream {name}=null)"
            )
    return ReplayPlan(
        spec=event_time(bundle.align_spec(streams)),
        streams=names,
        missing=tuple(sorted(set(needed) - set(held))),
        ignored=tuple(sorted(set(held) - set(needed))),
        could=tuple(_stand_ins(names, needed, held)),
    )


def _stand_ins(
    names: Mapping[str, str], needed: Mapping[str, str], held: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Streams of the bundle that the recording lacks, each with one of the recording that could serve it, and serves
    none."""
    free = sorted(set(held) - set(needed))
    for name, rig in names.items():
        own = next((one for one in free if held[one] == needed[rig]), None)
        if rig not in held and own is not None:
            free.remove(own)
            yield name, own


def _way_out(names: Mapping[str, str], needed: Mapping[str, str], held: Mapping[str, str]) -> str:
    """What to do about streams that have other names, if that is all."""
    for name, own in _stand_ins(names, needed, held):
        return (
            f"Map one to the other: --stream {name}={own}, in Python replay_predictions(…, streams={{{name!r}: "
            f"{own!r}}}), in the rig of a session to come `streams: {{{name}: {own}}}` under `bundle`."
        )
    return "None of these can stand for another; name a bundle that takes what was recorded."


def _described(streams: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({payload})" for name, payload in sorted(streams.items())) or "no stream"


class _Watched:
    """A recording that is read, of which it is noted which streams have given no value so far, in how many messages;
    and how many messages of which stream are of a kind that ``spec`` does not take."""

    def __init__(self, reader: RecordingReader, spec: AlignSpec) -> None:
        self._reader, self.path = reader, reader.path
        self._specs = {stream.name: stream for stream in spec.streams}
        self._valued: set[str] = set()
        self._misfits: dict[Hashable, str] = {}
        self._count: Counter[str] = Counter()
        self._unfit: Counter[tuple[str, str]] = Counter()
        self._unmeasured: Counter[str] = Counter()
        self._held: dict[str, frozenset[str]] = {}
        """What they held in place of values, as ``hollow`` has it."""
        self.headers = reader.headers

    @property
    def notes(self) -> list[str]:
        """What a user should know of it, in words, once all is read."""
        notes = []
        for (name, words), count in sorted(self._unfit.items()):
            notes.append(f"{count} of {self._count[name]} messages of {name} are in no window, for it {words}")
        for name, count in sorted(self._unmeasured.items()):
            where = "its message" if count == 1 else f"all of its {count} messages"
            notes.append(f"{name} has nothing but {no_value(in_place_of_values(self._held[name]))}, in {where}")
        return notes

    def messages(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Message, int]]:
        for message, arrival_ns in self._reader.messages(streams, beats):
            name, layout = message.header.stream, message.header.layout
            if layout is not None:
                self._look(name, layout, message)
            yield message, arrival_ns

    def _look(self, name: str, layout: Layout, message: Message) -> None:
        self._count[name] += 1
        kind = (name, _kind(layout))
        if kind not in self._misfits:
            self._misfits[kind] = misfit(self._specs[name], layout)
        if words := self._misfits[kind]:
            self._unfit[name, words] += 1
        if name not in self._valued:
            if held := hollow(layout, message.data):
                self._unmeasured[name] += 1
                self._held[name] = self._held.get(name, held) | held
            else:  # which is not looked at again
                self._valued.add(name)
                self._unmeasured.pop(name, None)


def replay_predictions(
    recording: str | Path | RecordingReader,
    bundle: Bundle,
    options: FuseOptions | None = None,
    *,
    streams: Mapping[str, str | None] | None = None,
    clock: Clock | None = None,
    note: Callable[[str], None] = lambda text: None,
) -> Iterator[Prediction]:
    """The predictions of ``bundle`` on a recording, one a step, by event time: the same at every run and every speed,
    but for ``timing``. ``truth`` is what the session's labels say at the end of the window.

    ``note`` is told which streams are missing or left out, and at the end which had no value, or messages of another
    kind than the model takes. RecordingError, BundleError, ConfigError.
    """
    if not isinstance(bundle, Bundle):
        raise ConfigError(f"a bundle is what load_bundle gives, not {bundle!r}: write load_bundle({str(bundle)!r}).")
    with reading(recording) as reader:
        plan = plan_replay(reader, bundle, streams)
        for text in plan.notes:
            note(text)
        fuser = Fuser(bundle, options, reader.info.session, streams=plan.streams, clock=clock)
        truth = Truth(known_labels(reader))
        heard = _Watched(reader, plan.spec)
        for step in replay_steps(heard, plan.spec):
            prediction = fuser.step(step.manifest, content_of(step))
            yield msgspec.structs.replace(prediction, truth=truth.at(step.manifest.end_ns))
        for text in heard.notes:
            note(text)


class Truth:
    """Labels, asked with times that do not go back."""

    def __init__(self, labels: Iterable[Label]) -> None:
        self._coming = sorted(labels, key=lambda label: label.start_ns, reverse=True)
        self._current: list[Label] = []

    def at(self, t_ns: int) -> str | None:
        """The label that covers the moment before ``t_ns``; of several the one that began last."""
        while self._coming and self._coming[-1].start_ns < t_ns:
            self._current.append(self._coming.pop())
        self._current = [label for label in self._current if label.end_ns >= t_ns]
        return self._current[-1].label if self._current else None
