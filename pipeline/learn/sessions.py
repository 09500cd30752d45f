"""Sessions to learn from: recordings, or what a program has made; both go through the same aligner."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import msgspec

from pipeline.align import AlignSpec, Manifest
from pipeline.errors import RecordingError
from pipeline.inference import content_of
from pipeline.labels import SIDECAR, checked, session_attributes, session_labels
from pipeline.messages import Header, Layout, Message, array
from pipeline.prediction import Prediction
from pipeline.recording import MANIFEST_TOPIC, PREDICTION_TOPIC, Label, RecordingReader
from pipeline.replay import Heard, replay_steps
from pipeline.rules import misfit
from pipeline.verify import recorded_steps

Mode = Literal["recorded", "event_time"]


class Given(NamedTuple):
    """One step as fusion is given it: content by stream, and what was lost on the way there and why."""

    manifest: Manifest
    content: Mapping[str, Any]
    masked: Mapping[str, str]


class Session(Protocol):
    """A labelled session. ``sha256`` identifies all that its steps and labels are made of."""

    @property
    def name(self) -> str: ...

    @property
    def sha256(self) -> Mapping[str, str]:
        """File -> SHA-256; the first is that of what the steps are made of."""

    @property
    def attributes(self) -> Mapping[str, str]: ...

    def layouts(self) -> Mapping[str, Layout]:
        """The layout of each stream's first message."""

    def labels(self, known: Collection[str] | None) -> Sequence[Label]:
        """In order of time, without overlaps. RecordingError if there are none, or if one is none of ``known``."""

    def steps(self, spec: AlignSpec, mode: Mode) -> Iterator[Given]:
        """The steps that the rules of ``spec`` make of it, in order."""


class Recorded:
    """A recording. By ``recorded`` its steps are made again as they were made live, if it holds the windows of a live
    session with this hop and these streams; otherwise by event time."""

    def __init__(self, path: Path) -> None:
        """Raises RecordingError, ConfigError."""
        self.path, self.name = path, path.name
        with path.open("rb") as file:
            self.sha256 = {path.name: hashlib.file_digest(file, "sha256").hexdigest()}
        sidecar = path.with_suffix(SIDECAR)
        if sidecar.is_file():
            self.sha256[sidecar.name] = hashlib.sha256(sidecar.read_bytes()).hexdigest()
        self.attributes = session_attributes(path)

    def layouts(self) -> Mapping[str, Layout]:
        found: dict[str, Layout] = {}
        with RecordingReader(self.path) as reader:
            for header, _ in reader.headers():
                if header.layout is not None:
                    found.setdefault(header.stream, header.layout)
                if len(found) == len(reader.streams):
                    break
        return found

    def labels(self, known: Collection[str] | None) -> Sequence[Label]:
        return session_labels(self.path, known)

    def steps(self, spec: AlignSpec, mode: Mode) -> Iterator[Given]:
        with RecordingReader(self.path) as reader:
            _check_channels(self.name, reader, spec)
            if mode == "recorded" and _lived(reader, spec):
                lost = _masked(reader)
                for manifest, step in recorded_steps(reader, spec):
                    made = manifest if step is None else step.manifest
                    yield Given(made, {} if step is None else content_of(step), lost.get(manifest.step, {}))
            else:
                for step in replay_steps(reader, spec):
                    yield Given(step.manifest, content_of(step), {})


def _check_channels(name: str, session: Heard, spec: AlignSpec) -> None:
    """RecordingError for a signal whose channels become others within a session: what comes then is in no step."""
    signals = {stream.name: stream for stream in spec.streams if stream.payload == "signal"}
    fitting = dict[str, Layout]()
    for header, _ in session.headers(signals) if signals else ():
        layout, stream = header.layout, header.stream
        if layout is None or getattr(layout, "channels", ()) == getattr(fitting.get(stream), "channels", None):
            continue
        if words := misfit(signals[stream], layout):
            raise RecordingError(
                f"{name}: at {header.t_capture_ns / 1e9:.3f} s its stream `{stream}` {words}. Nothing of that could be "
                "learnt from: leave the session out, or record it anew"
            )
        fitting[stream] = layout


def _lived(reader: RecordingReader, spec: AlignSpec) -> bool:
    """Whether a recording holds windows of a live session with this hop, of all the streams that are asked for."""
    if MANIFEST_TOPIC not in reader.topics:
        return False
    for data, _, _ in reader.json(MANIFEST_TOPIC):
        manifest = msgspec.json.decode(data, type=Manifest)
        asked = {stream.name for stream in spec.streams} & reader.streams.keys()
        return manifest.end_ns - manifest.start_ns == spec.hop_ns and asked <= manifest.streams.keys()
    return False


def _masked(reader: RecordingReader) -> dict[int, dict[str, str]]:
    """What the live session could not fuse although the aligner had it, by step and stream."""
    found: dict[int, dict[str, str]] = {}
    for data, _, _ in reader.json(PREDICTION_TOPIC):
        prediction = msgspec.json.decode(data, type=Prediction)
        masked = {s: r.masked for s, r in prediction.streams.items() if r.masked in ("overrun", "shed")}
        if masked:
            found[prediction.window.index] = {stream: reason for stream, reason in masked.items() if reason}
    return found


class Made:
    """A session that a program has made: messages (each stream's in order), labels and attributes, in memory."""

    def __init__(
        self,
        name: str,
        messages: Sequence[Message],
        labels: Sequence[Label],
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.attributes = name, dict(attributes or {})
        self._messages = sorted(messages, key=lambda message: message.header.bound_ns)
        self._labels = list(labels)
        state = hashlib.sha256()
        for message in self._messages:
            state.update(msgspec.msgpack.encode(message.header))
            if message.data is not None:
                state.update(array(message).tobytes())
        self.sha256 = {name: state.hexdigest()}

    def layouts(self) -> Mapping[str, Layout]:
        found: dict[str, Layout] = {}
        for message in self._messages:
            if message.header.layout is not None:
                found.setdefault(message.header.stream, message.header.layout)
        return found

    def labels(self, known: Collection[str] | None) -> Sequence[Label]:
        if not self._labels:
            raise RecordingError(f"the session {self.name} has no labels")
        return checked(self._labels, f"session {self.name}", known)

    def steps(self, spec: AlignSpec, mode: Mode) -> Iterator[Given]:
        _check_channels(self.name, self, spec)
        for step in replay_steps(self, spec):
            yield Given(step.manifest, content_of(step), {})

    def messages(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Message, int]]:
        for message in self._messages:
            if (streams is None or message.header.stream in streams) and (beats or not message.header.is_beat):
                yield message, message.header.bound_ns

    def headers(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Header, int]]:
        for message, arrival_ns in self.messages(streams, beats):
            yield message.header, arrival_ns
