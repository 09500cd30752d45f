"""``replay --verify``: a recorded live session proves itself.

Every window of the session is made again from the recorded messages as its manifest says that it was made
(``Aligner.obey``), then every prediction from those windows, and both are compared with what was recorded:

* Windows by their digests, which cover references, verdicts and resampled samples; payload hashes, checked by the
  reader, cover the bytes. Both are exact on every machine.
* Predictions byte for byte (``timing`` and ``truth`` aside) where the runtime's fingerprint is the recorded one; on
  another, equal labels and scores within 1e-4 are *equivalent*.

What cannot be known is not passed over: a window that is missing in the file is listed as unverifiable, and so is one
that does not come out the same where it may hold a message which the recorder lost. Which windows may, a bound tells:
what a manifest lists as received ends below the stream's bound in it, so a window whose rule looks at nothing below
that bound cannot hold it (``_Unknown``). Everything must hold for ``Verification.holds``.

A segment of a ring is verified as far as it goes: what lies in the segments before and behind it is named
(``elsewhere``), and no doubt about this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from pipeline.align import Aligner, AlignSpec, Manifest, Step
from pipeline.bundle import Bundle
from pipeline.errors import BundleError, ConfigError, RecordingError, WireError, listed
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.messages import Message
from pipeline.prediction import BundleRef, Prediction
from pipeline.recalibrate import FROM as RECALIBRATED
from pipeline.recording import GAP_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC, RecordingReader, lacks, reading
from pipeline.recording.damage import damage
from pipeline.replay import event_time, plan_replay

SCORE_TOLERANCE = 1e-4
"""How far scores may lie apart between two runtimes that are not the same."""

MARGIN_NS = 5_000_000_000
"""A message that a window was made from reached the recorder no later than this after the window did."""

BEHIND_NS = 1_000_000_000
"""So long before the end of a ring's segment a window may be final, and its prediction be in the next segment."""

LISTED = 20
"""How many unverifiable windows are named one by one."""


class Difference(msgspec.Struct, frozen=True):
    """The first place where what was recorded and what was made again are not the same."""

    window: int | None
    what: str
    """``window``, ``prediction`` or ``recording``."""
    stream: str | None
    field: str
    recorded: Any
    recomputed: Any

    def __str__(self) -> str:
        where = self.what if self.window is None else f"{self.what} {self.window}"
        stream = f", stream {self.stream}" if self.stream else ""
        return f"{where}{stream}, {self.field}: recorded {self.recorded}, made again {self.recomputed}"


class Verification(msgspec.Struct, kw_only=True):
    """What ``verify`` found."""

    session: str
    windows: int = 0
    """Made again with an equal digest."""
    predictions: int = 0
    """Made again, exactly or equivalently."""
    fingerprint: str = "none"
    """``equal``, ``other`` (predictions are then compared as equivalent) or ``none`` (no prediction recorded)."""
    unverifiable: list[str] = []
    unverifiable_count: int = 0
    elsewhere: list[str] = []
    """What this file, a segment of a ring, cannot show since it lies in another one."""
    elsewhere_count: int = 0
    differences: int = 0
    first_difference: Difference | None = None

    @property
    def holds(self) -> bool:
        """Whether everything was made again and nothing differs."""
        return not self.differences and not self.unverifiable_count

    def doubt(self, text: str) -> None:
        """Notes what cannot be verified."""
        self.unverifiable_count += 1
        if len(self.unverifiable) < LISTED:
            self.unverifiable.append(text)

    def refer(self, text: str) -> None:
        """Notes what lies in another segment of the ring."""
        self.elsewhere_count += 1
        if len(self.elsewhere) < LISTED:
            self.elsewhere.append(text)

    def differ(self, difference: Difference) -> None:
        """Notes what is not the same."""
        self.differences += 1
        self.first_difference = self.first_difference or difference

    def damaged(self, text: str, window: int | None = None) -> None:
        """Notes that the file is not what was written; ``window`` is the last that could be read."""
        field = "bytes" if window is None else "after this window"
        self.differ(Difference(window, "recording", None, field, "whole", text))


def verify(
    recording: str | Path | RecordingReader,
    bundle: Bundle,
    *,
    streams: Mapping[str, str | None] | None = None,
    options: FuseOptions | None = None,
    progress: Callable[[int], None] = lambda window: None,
) -> Verification:
    """Makes a recorded session again and compares. RecordingError if it holds no windows of a live session;
    BundleError, ConfigError if the bundle does not fit it. A damaged file is a difference, not an error."""
    with reading(recording) as reader:
        result = Verification(session=reader.info.session)
        check_windows(reader)
        try:
            _check_model(reader, bundle)
            plan = plan_replay(reader, bundle, streams)
        except (BundleError, ConfigError) as error:  # a single bit makes another payload's name
            if (text := damage(reader.path)) is None:
                raise
            raise RecordingError(f"{reader.path} does not fit the bundle as it is now: {error}; {text}") from None
        names = {name: rig for name, rig in plan.streams.items() if rig}
        last: int | None = None
        try:
            check = _Predictions(reader, bundle, options, names, result)
            for manifest, step in _steps(reader, plan.spec, result):
                progress(manifest.step)
                last = manifest.step
                check.take(manifest, step)
            check.finish()
        except (RecordingError, WireError, msgspec.MsgspecError) as error:
            result.damaged(str(error), last)
        if (text := damage(reader.path)) is not None:
            result.damaged(text)
        if result.elsewhere_count and not result.windows:
            result.doubt("no window of this segment could be made again: each of them needs what is in others")
        if not reader.info.complete:
            result.doubt(f"the recording is incomplete: {lacks(reader)}")
        return result


def check_windows(reader: RecordingReader) -> None:
    """Raises RecordingError, which says what can be verified, if the recording holds no windows of a live session."""
    if MANIFEST_TOPIC in reader.topics:
        return
    if (text := damage(reader.path)) is not None:
        raise RecordingError(f"{reader.path} is damaged, and holds no windows to verify: {text}")
    for _ in reader.headers(beats=True):  # every chunk is checked on the way
        pass
    why = "; it was recorded without a model, and without a model there are none" if reader.info.bundle is None else ""
    whole = (
        "All that can be verified are its bytes, and every one of them is as it was written"
        if reader.info.complete
        else f"All that can be verified are its bytes, which can be read as far as they go; {reader.lacking_end}"
        if not reader.info.note
        else f"All that can be verified are its bytes, which are as they were written; of itself it says: "
        f"{reader.info.note}"
    )
    advice = (
        "To record a session that can be verified, name a model in the rig (`bundle`): sensorium record RIG -o FILE"
        if reader.info.bundle is None
        else f"It was recalibrated, and theirs were the old times; verify its original, {original}"
        if (original := reader.info.extra.get(RECALIBRATED))
        else "Its session ended before the first window, or its aligner died; record a longer one"
    )
    raise RecordingError(
        f"{reader.path} holds no windows of a live session, so there is nothing to verify{why}. {whole}. {advice}"
    )


def check_streams(
    reader: RecordingReader,
    asked: Mapping[str, str | None],
    does: str = "--verify makes those again",
    instead: str = "leave --verify away",
) -> None:
    """Raises ConfigError where a stream that is ``asked`` for is none that the session's windows were made of; what a
    command ``does`` with these, and what to do ``instead``, is said with it."""
    with suppress(RecordingError, msgspec.MsgspecError):  # which is told of where the windows are read
        data, _, _ = next(iter(reader.json(MANIFEST_TOPIC)), (None, 0, 0))
        if data is None:
            return
        made = msgspec.json.decode(data, type=Manifest).streams
        for name, held in asked.items():
            if held is not None and held not in made:
                raise ConfigError(
                    f"--stream {name}={held}: the windows of this session were made of {listed(sorted(made))}, and "
                    f"{does}. To see what the model says with another stream, {instead}."
                )


def _check_model(reader: RecordingReader, bundle: Bundle) -> None:
    ran = reader.info.bundle
    if ran is None or ran == bundle.sha256:
        return
    names = {said.name for said in _models(reader) if said.sha256 == ran}
    named = f"{min(names)} ({ran[:12]}…)" if names else f"{ran[:12]}…"
    raise ConfigError(
        f"{reader.path} was recorded with the model {named}, and {bundle.name} ({bundle.sha256[:12]}…) is another: "
        f"nothing can be proven by it. Leave --bundle away if the recorded model is a shipped one, or name the folder "
        f"of the recorded model. To see what {bundle.name} says of this session, replay it without --verify"
    )


def _models(reader: RecordingReader) -> Iterator[BundleRef]:
    """What the first prediction says of its model, if there is one."""
    with suppress(RecordingError, msgspec.MsgspecError):
        for data, _, _ in reader.json(PREDICTION_TOPIC):
            yield msgspec.json.decode(data, type=Prediction).bundle
            return


# --- windows ---------------------------------------------------------------------------------------------------------


def recorded_steps(reader: RecordingReader, spec: AlignSpec) -> Iterator[tuple[Manifest, Step | None]]:
    """Every recorded manifest with its step made again by the rules of ``spec``, which may be others than those of the
    live session: what had come by then, who was idle and who had ended, is as it was. None where a message that the
    step was made of, or may have been, is not in the recording."""
    return _steps(reader, spec, Verification(session=reader.info.session))


def _steps(reader: RecordingReader, spec: AlignSpec, result: Verification) -> Iterator[tuple[Manifest, Step | None]]:
    """Every recorded manifest with the step made again; None where that cannot be."""
    held = _Held(reader, {stream.name for stream in spec.streams})
    declared = {stream.name: stream for stream in spec.streams}
    unknown = _Unknown({stream.name for stream in spec.streams if stream.ordered})
    aligner: Aligner | None = None
    begun = reader.info.since is None
    died = _died_before(list(_gaps(reader)))
    expected = 1
    for data, log_ns, _ in reader.json(MANIFEST_TOPIC):
        manifest = msgspec.json.decode(data, type=Manifest)
        if manifest.step != expected:
            if begun:
                with_it = f", nor {_predictions_text(gap)}" if (gap := died.get(expected)) else ""
                result.doubt(f"windows {expected} to {manifest.step - 1} are not in the recording{with_it}")
                aligner = None  # whoever made the next one began anew, or what it had heard meanwhile is not known
                unknown.all(manifest, f"what windows {expected} to {manifest.step - 1} had received", False)
            elif reader.info.ring is not None:
                _before(reader, manifest.step - 1, result)
            else:
                result.doubt(f"windows 1 to {manifest.step - 1} were before this file")
        if not begun:
            unknown.all(manifest, "what was before the file's beginning", reader.info.ring is not None)
            begun = True
        expected = manifest.step + 1
        if aligner is None:
            known = tuple(declared[name] for name in manifest.streams if name in declared)
            aligner = Aligner(event_time(msgspec.structs.replace(spec, streams=known)), manifest.step)
        received, lost = held.received(manifest, log_ns)
        unknown.add(manifest, lost)
        mine = [name for name in manifest.streams if name in declared]  # the live model may have had others
        touched = {name: why for name in mine if (why := unknown.within(name, aligner.looks_from(name)))}
        step = aligner.obey(manifest, received)
        if step.manifest.digest == manifest.digest:
            result.windows += 1
            yield manifest, step
        elif (why := _excuse(manifest, step, touched)) is not None:
            if why.elsewhere:
                result.refer(f"window {manifest.step}: {why.text} is not in this segment")
            else:
                result.doubt(f"window {manifest.step}: {why.text} is not in the recording")
            yield manifest, None
        else:
            result.differ(_window_difference(manifest, step.manifest, touched))
            yield manifest, step


def _before(reader: RecordingReader, last: int, result: Verification) -> None:
    """Notes that the windows up to ``last`` were before this segment, but for those that it says itself never came."""
    gaps = [gap for gap in _gaps(reader) if gap.stream is None and gap.of == "window" and gap.last == last]
    if gaps:
        result.doubt(f"windows {gaps[0].first} to {last} are not in the recording")
        last = gaps[0].first - 1
    if last:
        result.refer(f"windows 1 to {last} were before this segment")


class _Lack(NamedTuple):
    """Messages of a stream that are not in the file: which, and whether they are in another segment of its ring. None
    was captured, nor a sample of it, after ``until_ns``."""

    text: str
    elsewhere: bool
    until_ns: int


class _Unknown:
    """What was received and is not in the file, by stream."""

    def __init__(self, ordered: set[str]) -> None:
        self._ordered = ordered
        self._lacks: dict[str, list[_Lack]] = {}

    def all(self, manifest: Manifest, text: str, elsewhere: bool) -> None:
        """Notes that nobody knows what had been received of any stream before this manifest."""
        self.add(manifest, dict.fromkeys(manifest.streams, (text, elsewhere)))

    def add(self, manifest: Manifest, lost: Mapping[str, tuple[str, bool]]) -> None:
        """Notes what had been received by this manifest and is not there. Whatever a stream has said lies below its
        bound; where numbers come in any order, all that is certain is that nothing was captured after it came."""
        for name, (text, elsewhere) in lost.items():
            until_ns = manifest.streams[name].bound_ns
            if until_ns is None or name not in self._ordered:
                until_ns = max(until_ns or 0, manifest.emitted_ns)
            self._lacks.setdefault(name, []).append(_Lack(text, elsewhere, until_ns))

    def within(self, stream: str, from_ns: int) -> _Lack | None:
        """What may lie at or after ``from_ns``; what is lost goes before what is only elsewhere. What lies before it is
        forgotten: later windows look at later times."""
        left = [lack for lack in self._lacks.get(stream, ()) if lack.until_ns >= from_ns]
        self._lacks[stream] = left
        return min(left, key=lambda lack: lack.elsewhere, default=None)


def _excuse(recorded: Manifest, made: Step, touched: Mapping[str, _Lack]) -> _Lack | None:
    """Why a window need not have come out the same: each stream that did not lacks something. None if one does not."""
    differing = [name for name in recorded.streams if _stream_difference(recorded, made.manifest, name)]
    if not differing:  # then samples do, and of which stream cannot be told
        differing = [name for name in made.grids if name in touched]
    if not differing or any(name not in touched for name in differing):
        return None
    return min((touched[name] for name in differing), key=lambda lack: lack.elsewhere)


class _Held:
    """The recorded messages, found by stream, epoch and number; read from the file as far as they are needed, and kept
    until a window lists later ones of their stream."""

    def __init__(self, reader: RecordingReader, streams: set[str]) -> None:
        self._info = reader.info
        self._ended = False
        self._there = streams & reader.streams.keys()
        self._coming = reader.messages(streams)
        self._read_ns = -(1 << 62)  # how far the file is read
        self._messages: dict[str, dict[tuple[int, int], Message]] = {stream: {} for stream in streams}
        self._newest = dict.fromkeys(streams, (-(1 << 62), -1))

    def received(self, manifest: Manifest, log_ns: int) -> tuple[dict[str, list[Message]], dict[str, tuple[str, bool]]]:
        """The messages that a manifest, recorded at ``log_ns``, lists as received; and by stream the first that is not
        there, in words, and whether it is in a later segment of the ring."""
        found: dict[str, list[Message]] = {}
        lost: dict[str, tuple[str, bool]] = {}
        for stream, stated in manifest.streams.items():
            if stream not in self._messages:
                continue
            found[stream] = []
            for epoch, first, last in stated.received:
                for seq in range(first, last + 1):
                    message = self._find(stream, (epoch, seq), log_ns + MARGIN_NS)
                    if message is None:
                        elsewhere = self._elsewhere(stream, (epoch, seq))
                        if stream not in lost or (lost[stream][1] and not elsewhere):
                            lost[stream] = f"{stream} {epoch}/{seq}", elsewhere
                    else:
                        found[stream].append(message)
            if stated.received:  # a bus delivers in order: what lies below was refused, and is never asked for
                self._drop(stream, min((epoch, first) for epoch, first, _ in stated.received))
        return found, lost

    def _find(self, stream: str, key: tuple[int, int], until_ns: int) -> Message | None:
        messages = self._messages[stream]
        while (
            stream in self._there and key not in messages and self._newest[stream] < key and self._read_ns <= until_ns
        ):
            item = next(self._coming, None)
            if item is None:
                self._ended = True
                return None
            message, self._read_ns = item
            header = message.header
            self._messages[header.stream][header.epoch, header.seq] = message
            self._newest[header.stream] = max(self._newest[header.stream], (header.epoch, header.seq))
        return messages.pop(key, None)

    def _elsewhere(self, stream: str, key: tuple[int, int]) -> bool:
        """Whether a message that is not there belongs to a segment before this one, or behind it."""
        info = self._info
        if info.ring is None:
            return False
        begun = None if info.since is None else info.since.get(stream)
        if begun is not None and key < begun:
            return True
        return self._ended and key > self._newest[stream] and (stream in self._there or begun is not None)

    def _drop(self, stream: str, below: tuple[int, int]) -> None:
        messages = self._messages[stream]
        for key in [key for key in messages if key < below]:
            del messages[key]


def _stream_difference(recorded: Manifest, made: Manifest, stream: str) -> Difference | None:
    stated, other = recorded.streams[stream], made.streams.get(stream)
    if other is None:
        return Difference(recorded.step, "window", stream, "stream", "present", "absent")
    for field in ("verdict", "reason", "coverage", "proven", "used"):
        if getattr(stated, field) != getattr(other, field):
            return Difference(recorded.step, "window", stream, field, getattr(stated, field), getattr(other, field))
    return None


def _window_difference(recorded: Manifest, made: Manifest, touched: Mapping[str, _Lack]) -> Difference:
    """The first difference, of a stream that lacks nothing if there is one."""
    for stream in sorted(recorded.streams, key=lambda name: name in touched):
        if (difference := _stream_difference(recorded, made, stream)) is not None:
            return difference
    return Difference(recorded.step, "window", None, "digest (resampled samples)", recorded.digest, made.digest)


# --- predictions -----------------------------------------------------------------------------------------------------


class _Predictions:
    """Makes predictions again beside the recorded ones."""

    def __init__(
        self,
        reader: RecordingReader,
        bundle: Bundle,
        options: FuseOptions | None,
        streams: dict[str, str],
        result: Verification,
    ) -> None:
        self._reader, self._bundle, self._options, self._streams = reader, bundle, options, streams
        self._result = result
        self._recorded = reader.json(PREDICTION_TOPIC)
        self._fused = PREDICTION_TOPIC in reader.topics or reader.info.bundle is not None
        self._ring = reader.info.ring is not None
        self._next: Prediction | None = None
        self._last: int | None = None
        self._fuser: Fuser | None = None
        # A window is missing that the following predictions look back on. Encoders may remember more than a bundle's
        # window of steps, so what differs later on is still no difference; what comes out the same is made again.
        self._broken = False
        self._whole = 0  # so many windows since then are verified
        # What came before the file's beginning, or in a gap, nobody knows, until one comes out the same.
        self._unsettled = reader.info.since is not None
        gaps = list(_gaps(reader))
        self._never, self._unmade = _said_missing(gaps, "prediction"), _said_missing(gaps, "window")
        self._died = _died_before(gaps)
        self._dead = {k for gap in self._died.values() for k in range(gap.first, gap.last + 1)}
        self._owed: list[int] = []
        """Windows without a prediction that are named with the windows missing behind them, if those are missing."""
        self._advance()

    def _advance(self) -> None:
        record = next(self._recorded, None)
        self._next = None if record is None else msgspec.json.decode(record[0], type=Prediction)

    def _looks_back(self, step: int) -> None:
        """Notes that a prediction is not verified: for want of another segment, as long as nothing else is wanting."""
        if self._ring and not self._result.unverifiable_count:
            self._result.refer(f"prediction {step} looks back on a window that needs another segment")
        else:
            self._result.doubt(f"prediction {step} looks back on a window that is not verified")

    def take(self, manifest: Manifest, step: Step | None) -> None:
        """Makes the prediction for a window, if one was recorded for it, and compares."""
        self._skip_to(manifest.step)
        if self._last is not None and manifest.step != self._last + 1:
            self._unsettled = self._broken = True  # whether the fusion node had the windows in between, nobody knows
            if self._last + 1 in self._died:  # that they are missing is said with what they owe
                self._owed.clear()
        if manifest.step not in self._dead:
            self._doubt_owed()
        self._last = manifest.step
        if self._next is None or self._next.window.index != manifest.step:
            # No prediction for this window: fusion was away, and begins anew with the next one; or it was lost.
            if self._fused:
                text = f"window {manifest.step} has no recorded prediction"
                if manifest.step in self._dead:
                    self._owed.append(manifest.step)
                else:
                    (self._result.refer if self._behind(manifest) else self._result.doubt)(text)
            self._unsettled = self._unsettled or self._fuser is not None
            self._fuser = None
            return
        recorded = self._next
        self._advance()
        if self._fuser is None:
            self._fuser = self._begin(recorded)
        masked = {s: r.masked for s, r in recorded.streams.items() if r.masked in ("overrun", "shed")}
        content = {} if step is None else content_of(step)
        made = self._fuser.step(manifest, content, masked)
        self._whole = 0 if step is None else self._whole + 1
        self._broken = self._broken or step is None
        difference = _prediction_difference(recorded, made, self._result.fingerprint == "equal")
        if self._unsettled and step is not None and difference is None:
            self._broken = self._unsettled = False
        if self._broken and (difference is not None or self._whole < self._bundle.window.steps):
            self._looks_back(manifest.step)
        elif difference is None:
            self._result.predictions += 1
        else:
            self._result.differ(difference)

    def _skip_to(self, step: int) -> None:
        """Passes over predictions whose windows are not in the file."""
        while self._next is not None and self._next.window.index < step:
            text = f"prediction {self._next.window.index} has no recorded window"
            before = self._ring and self._last is None
            if self._next.window.index not in self._unmade or before:  # else the window is doubted already
                (self._result.refer if before else self._result.doubt)(text)
            self._advance()

    def _doubt_owed(self) -> None:
        for step in self._owed:
            self._result.doubt(f"window {step} has no recorded prediction")
        self._owed.clear()

    def _behind(self, manifest: Manifest) -> bool:
        """Whether the prediction of a window is in the next segment, for all that this one says."""
        late = manifest.emitted_ns >= self._reader.end_ns - BEHIND_NS
        return self._ring and self._next is None and late and manifest.step not in self._never

    def finish(self) -> None:
        """Recorded predictions without a recorded window cannot be verified."""
        self._doubt_owed()
        while self._next is not None:
            self._result.doubt(f"prediction {self._next.window.index} has no recorded window")
            self._advance()

    def _begin(self, recorded: Prediction) -> Fuser:
        fuser = Fuser(self._bundle, self._options, self._reader.info.session, streams=self._streams)
        self._broken = self._unsettled
        self._result.fingerprint = "equal" if recorded.timing.fingerprint == fuser.fingerprint_id else "other"
        return fuser


class _Gap(msgspec.Struct):
    """What is read of a gap record: of windows, of predictions, or of messages of a stream."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    of: str = "window"
    stream: str | None = None
    cause: str = ""


def _gaps(reader: RecordingReader) -> Iterator[_Gap]:
    for data, _, _ in reader.json(GAP_TOPIC):
        yield msgspec.json.decode(data, type=_Gap)


def _said_missing(gaps: list[_Gap], of: str) -> set[int]:
    """The windows of which the recording says that they, or their predictions, never came."""
    return {k for gap in gaps if gap.stream is None and gap.of == of for k in range(gap.first, gap.last + 1)}


def _died_before(gaps: list[_Gap]) -> dict[int, _Gap]:
    """The predictions that the aligner's death took with it, by the first window that it took: the last windows that
    it sent may have come to the recorder and not to the fusion node."""
    gaps = [gap for gap in gaps if gap.stream is None]
    causes = {gap.first: gap.cause for gap in gaps if gap.of == "window"}
    return {gap.last + 1: gap for gap in gaps if gap.of == "prediction" and causes.get(gap.last + 1) == gap.cause}


def _predictions_text(gap: _Gap) -> str:
    if gap.first == gap.last:
        return f"the prediction of window {gap.first}"
    return f"the predictions of windows {gap.first} to {gap.last}"


def _prediction_difference(recorded: Prediction, made: Prediction, exact: bool) -> Difference | None:
    window = recorded.window.index
    if exact:
        kept = msgspec.structs.replace(made, timing=recorded.timing, truth=recorded.truth)
        if msgspec.json.encode(kept) == msgspec.json.encode(recorded):
            return None
        for field in Prediction.__struct_fields__:
            before, after = getattr(recorded, field), getattr(kept, field)
            if msgspec.json.encode(before) != msgspec.json.encode(after):
                return Difference(window, "prediction", None, field, before, after)
    if recorded.bundle != made.bundle:
        return Difference(window, "prediction", None, "bundle", recorded.bundle, made.bundle)
    if recorded.label != made.label:
        return Difference(window, "prediction", None, "label", recorded.label, made.label)
    for label, score in recorded.scores.items():
        other = made.scores.get(label)
        if (score is None) != (other is None) or abs((score or 0.0) - (other or 0.0)) > SCORE_TOLERANCE:
            return Difference(window, "prediction", None, f"score of {label}", score, other)
    return None
