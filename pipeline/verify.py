"""``replay --verify``: a recorded live session proves itself.

Every window of the session is made again from the recorded messages as its manifest says that it was made
(``Aligner.obey``), then every prediction from those windows, and both are compared with what was recorded:

* Windows by their digests, which cover references, verdicts and resampled samples; payload hashes, checked by the
  reader, cover the bytes. Both are exact on every machine.
* Predictions byte for byte (``timing`` and ``truth`` aside) where the runtime's fingerprint is the recorded one; on
  another, equal labels and scores within 1e-4 are *equivalent*.

What cannot be known is not passed over: a window that is missing in the file, or that needs a message which the
recorder lost, is listed as unverifiable. Everything must hold for ``Verification.holds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pipeline.align import Aligner, AlignSpec, Manifest, Step
from pipeline.bundle import Bundle
from pipeline.errors import BundleError, RecordingError, WireError
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.messages import Message
from pipeline.prediction import Prediction
from pipeline.recording import MANIFEST_TOPIC, PREDICTION_TOPIC, RecordingReader, reading
from pipeline.recording_damage import damage
from pipeline.replay import event_time, plan_replay

SCORE_TOLERANCE = 1e-4
"""How far scores may lie apart between two runtimes that are not the same."""

MARGIN_NS = 5_000_000_000
"""A message that a window was made from reached the recorder no later than this after the window did."""

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
        if MANIFEST_TOPIC not in reader.topics:
            raise RecordingError(
                f"{reader.path} holds no windows of a live session, so there is nothing to verify; "
                f"record one: sensorium record RIG -o FILE"
            )
        try:
            plan = plan_replay(reader, bundle, streams)
        except BundleError as error:  # a single bit makes another payload's name
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
        if not reader.info.complete:
            result.doubt(f"the recording is incomplete: {reader.info.note or 'its writer did not close it'}")
        return result


# --- windows ---------------------------------------------------------------------------------------------------------


def recorded_steps(reader: RecordingReader, spec: AlignSpec) -> Iterator[tuple[Manifest, Step | None]]:
    """Every recorded manifest with its step made again by the rules of ``spec``, which may be others than those of the
    live session: what had come by then, who was idle and who had ended, is as it was. None where a message that the
    step was made of is not in the recording."""
    return _steps(reader, spec, Verification(session=reader.info.session))


def _steps(reader: RecordingReader, spec: AlignSpec, result: Verification) -> Iterator[tuple[Manifest, Step | None]]:
    """Every recorded manifest with the step made again; None where that cannot be."""
    held = _Held(reader, {stream.name for stream in spec.streams})
    declared = {stream.name: stream for stream in spec.streams}
    aligner: Aligner | None = None
    settled = reader.info.since is None
    """Whether nothing before the file's beginning can be in a window any more: one has been made again without."""
    expected = 1
    for data, log_ns, _ in reader.json(MANIFEST_TOPIC):
        manifest = msgspec.json.decode(data, type=Manifest)
        if manifest.step != expected:
            result.doubt(f"windows {expected} to {manifest.step - 1} are not in the recording")
            aligner = None  # whoever made the next one began anew, or what it had heard meanwhile is not known
        expected = manifest.step + 1
        if aligner is None:
            known = tuple(declared[name] for name in manifest.streams if name in declared)
            aligner = Aligner(event_time(msgspec.structs.replace(spec, streams=known)), manifest.step)
        received, lost = held.received(manifest, log_ns)
        step = aligner.obey(manifest, received)
        if step.manifest.digest == manifest.digest:
            result.windows += 1
            settled = True
            yield manifest, step
        elif lost or not settled:
            lost = lost or "what was before the file's beginning"
            result.doubt(f"window {manifest.step}: {lost} is not in the recording")
            yield manifest, None
        else:
            result.differ(_window_difference(manifest, step.manifest))
            yield manifest, step


class _Held:
    """The recorded messages, found by stream, epoch and number; read from the file as far as they are needed, and kept
    until a window lists later ones of their stream."""

    def __init__(self, reader: RecordingReader, streams: set[str]) -> None:
        self._there = streams & reader.streams.keys()
        self._coming = reader.messages(streams)
        self._read_ns = -(1 << 62)  # how far the file is read
        self._messages: dict[str, dict[tuple[int, int], Message]] = {stream: {} for stream in streams}
        self._newest = dict.fromkeys(streams, (-(1 << 62), -1))

    def received(self, manifest: Manifest, log_ns: int) -> tuple[dict[str, list[Message]], str]:
        """The messages that a manifest, recorded at ``log_ns``, lists as received, and the first that is not there, in
        words."""
        found: dict[str, list[Message]] = {}
        lost = ""
        for stream, stated in manifest.streams.items():
            if stream not in self._messages:
                continue
            found[stream] = []
            for epoch, first, last in stated.received:
                for seq in range(first, last + 1):
                    message = self._find(stream, (epoch, seq), log_ns + MARGIN_NS)
                    if message is None:
                        lost = lost or f"{stream} {epoch}/{seq}"
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
                return None
            message, self._read_ns = item
            header = message.header
            self._messages[header.stream][header.epoch, header.seq] = message
            self._newest[header.stream] = max(self._newest[header.stream], (header.epoch, header.seq))
        return messages.pop(key, None)

    def _drop(self, stream: str, below: tuple[int, int]) -> None:
        messages = self._messages[stream]
        for key in [key for key in messages if key < below]:
            del messages[key]


def _window_difference(recorded: Manifest, made: Manifest) -> Difference:
    for stream, stated in recorded.streams.items():
        other = made.streams.get(stream)
        if other is None:
            return Difference(recorded.step, "window", stream, "stream", "present", "absent")
        for field in ("verdict", "reason", "coverage", "proven", "used"):
            if getattr(stated, field) != getattr(other, field):
                return Difference(recorded.step, "window", stream, field, getattr(stated, field), getattr(other, field))
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
        self._next: Prediction | None = None
        self._fuser: Fuser | None = None
        self._broken = False  # a window is missing that the following predictions look back on
        # Those at the beginning of such a file look back on what it does not hold, until one comes out the same.
        self._before = reader.info.since is not None
        self._advance()

    def _advance(self) -> None:
        record = next(self._recorded, None)
        self._next = None if record is None else msgspec.json.decode(record[0], type=Prediction)

    def take(self, manifest: Manifest, step: Step | None) -> None:
        """Makes the prediction for a window, if one was recorded for it, and compares."""
        if self._next is None or self._next.window.index != manifest.step:
            # No prediction for this window: fusion was away, and begins anew with the next one.
            if self._fused:
                self._result.doubt(f"window {manifest.step} has no recorded prediction")
            self._fuser = None
            return
        recorded = self._next
        self._advance()
        if self._fuser is None:
            self._fuser = self._begin(recorded)
        masked = {s: r.masked for s, r in recorded.streams.items() if r.masked in ("overrun", "shed")}
        content = {} if step is None else content_of(step)
        made = self._fuser.step(manifest, content, masked)
        if step is None:
            self._broken = True
        difference = _prediction_difference(recorded, made, self._result.fingerprint == "equal")
        if self._before and step is not None and difference is None:
            self._broken = self._before = False
        if self._broken:
            self._result.doubt(f"prediction {manifest.step} looks back on a window that is not verified")
        elif difference is None:
            self._result.predictions += 1
        else:
            self._result.differ(difference)

    def finish(self) -> None:
        """Recorded predictions without a recorded window cannot be verified."""
        while self._next is not None:
            self._result.doubt(f"prediction {self._next.window.index} has no recorded window")
            self._advance()

    def _begin(self, recorded: Prediction) -> Fuser:
        fuser = Fuser(self._bundle, self._options, self._reader.info.session, streams=self._streams)
        self._broken = self._before
        self._result.fingerprint = "equal" if recorded.timing.fingerprint == fuser.fingerprint_id else "other"
        return fuser


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
