"""What a recording holds, counted from its messages: ``sensorium info --json``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pipeline.messages import AudioLayout, ImuLayout, Message, SignalLayout, array, payload_of
from pipeline.recording.reader import RecordingReader, reading
from pipeline.recording.schemas import GAP_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC
from pipeline.recording.writer import Label

BUNDLE_NAME = "bundle_name"
"""Under what a recording without predictions says what the session's model is called."""

_UNKNOWN = -(1 << 62)
"""An epoch before all others: that of a stream of which nobody knows where it stood."""


_ONE_MOMENT_NS = 1_000
"""Nearer to each other, in the mean, are no two samples of any sensor."""


class _Gap(msgspec.Struct):
    """Of a gap record, of messages or of windows, whose it is and how long."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    stream: str | None = None
    of: str = "window"


def lacks(reader: RecordingReader) -> str:
    """What a recording that is incomplete lacks, in words: what its recorder said of it, else of which streams it has
    gaps; and whether its end is missing, and from where on. Nothing of one that is complete."""
    if reader.info.complete:
        return ""
    said = [reader.info.note] if reader.info.note else []
    if reader.lacking_end:
        said.append(f"{reader.lacking_end}; it can be read up to {reader.end_ns / 1e9:.2f} s")
    if not reader.info.note and (gaps := _gaps(reader)):
        said.append(f"it has gaps: {', '.join(f'{name} {count}' for name, count in sorted(gaps.items()))}")
    return "; ".join(said) or "its recorder closed it so, and did not say what it lacks"


def _gaps(reader: RecordingReader) -> Counter[str]:
    """How many messages of which stream, windows and predictions are lacking, by the recording's own gap records."""
    lacking: Counter[str] = Counter()
    if GAP_TOPIC in reader.topics:
        for data, _, _ in reader.json(GAP_TOPIC):
            gap = msgspec.json.decode(data, type=_Gap)
            lacking[gap.stream or f"{gap.of}s"] += gap.last - gap.first + 1
    return lacking


def summarise(path: str | Path | RecordingReader) -> dict[str, Any]:
    """Per stream: messages, samples, measured rate, gaps and losses, delays, and statistics of what it measured.

    Plain values, ready for JSON; a number that cannot be known is None. ``rate_hz`` is of samples (messages, for
    payloads without samples) over the time between captures, None where that is none; ``lost`` counts missing sequence
    numbers and ``gaps`` the places where they are missing; ``max_gap_ms`` is the longest time between two samples (for
    audio: without sound); ``delay_ms`` is arrival less the end of the capture; ``note`` is what the writer had to say
    at its end, ``incomplete`` what a recording that is not complete lacks. ``channels`` are the names of a signal's,
    and its ``stats`` are theirs; where others came later, ``other_channels`` has these. RecordingError if the file
    cannot be read.
    """
    with reading(path) as reader:
        return _summarise(reader)


def rate_hz(count: float, span_ns: int) -> float | None:
    """So many a second; None of nothing, and of what was all at one moment: captures of a stream never are equal, and
    are stamped 1 ns apart where they were."""
    return count * 1e9 / span_ns if count > 0 and span_ns > count * _ONE_MOMENT_NS else None


class _Named(msgspec.Struct):
    """Of a rig or a prediction what names it; the rest may be of another version."""

    name: str = ""
    bundle: Any = None


def about(reader: RecordingReader) -> dict[str, Any]:
    """When and by what a session was recorded, and how much there is of it: plain values, as far as they are known."""
    info = reader.info
    found: dict[str, Any] = {"bytes": reader.path.stat().st_size}
    if info.unix_ns:
        found["date"] = datetime.fromtimestamp(info.unix_ns // 1_000_000_000, UTC).isoformat()
    if rig := _named(msgspec.yaml.decode, info.rig or "").name:
        found["rig"] = rig
    if info.bundle is not None:
        found["bundle"] = {"name": bundle_name(reader), "sha256": info.bundle}
    for what, topic in (("windows", MANIFEST_TOPIC), ("predictions", PREDICTION_TOPIC)):
        if topic in reader.topics:
            found[what] = sum(1 for _ in reader.json(topic))
    return found


def bundle_name(reader: RecordingReader) -> str | None:
    """What the session's model is called, which its predictions say, or the recording itself where these were left
    out; None where neither does."""
    predicted = _named(msgspec.json.decode, next((data for data, _, _ in reader.json(PREDICTION_TOPIC)), b"{}"))
    name = predicted.bundle.get("name") if isinstance(predicted.bundle, dict) else None
    return name or reader.info.extra.get(BUNDLE_NAME)


def _named(decode: Any, text: str | bytes) -> _Named:
    with suppress(msgspec.MsgspecError):
        found: _Named = decode(text, type=_Named)
        return found
    return _Named()


def seconds_of(labels: Iterable[Label], until_ns: int) -> dict[str, float]:
    """How long each label was true, before the session's end ``until_ns``; in order of their first appearance."""
    found: dict[str, int] = {}
    for label in labels:
        found[label.label] = found.get(label.label, 0) + max(min(label.end_ns, until_ns) - label.start_ns, 0)
    return {label: ns / 1e9 for label, ns in found.items()}


def _summarise(reader: RecordingReader) -> dict[str, Any]:
    streams: dict[str, _Stream] = {}
    for message, arrival_ns in reader.messages(beats=True):
        name = message.header.stream
        if message.header.is_beat:
            if name in streams:
                streams[name].sequence(message.header.epoch, message.header.seq)
        else:
            streams.setdefault(name, _Stream(reader.info.standing(name))).add(message, arrival_ns)
    starts = [stream.start_ns for stream in streams.values()]
    ends = [stream.end_ns for stream in streams.values()]
    note, lacking, ring = reader.info.note, lacks(reader), reader.info.ring
    return {
        "duration_s": (max(ends) - min(starts)) / 1e9 if streams else 0.0,
        "session": reader.info.session,
        "complete": reader.info.complete,
        "streams": {name: streams[name].result() for name in sorted(streams)},
        **({"note": note} if note else {}),
        **({"incomplete": lacking} if lacking else {}),
        **({} if ring is None else {"ring": msgspec.to_builtins(ring)}),
    }


class _Stream:
    """One stream's sums. Memory grows by eight bytes a message (the delays), for an exact median."""

    def __init__(self, stands: tuple[int, int] | None) -> None:
        """``stands``: the epoch and the number before which nothing can be missing; None: nobody knows."""
        self.payload = ""
        self.messages = self.samples = self.gaps = self.lost = 0
        self.start_ns = self.end_ns = 0
        self._epoch, self._next_seq = stands or (_UNKNOWN, 0)
        self._first_ns = self._last_ns = 0
        self._max_gap_ns: int | None = None
        self._delays: list[int] = []
        self._moments: dict[str, _Moments] = {}
        self._channels: dict[tuple[str, ...], None] = {}

    def add(self, message: Message, arrival_ns: int) -> None:
        header, layout = message.header, message.header.layout
        assert layout is not None
        times = _sample_times(message)
        first, last = int(times[0]) if len(times) else header.t_capture_ns, header.t_end_ns
        if not self.messages:
            self.payload = payload_of(layout)
            self.start_ns, self.end_ns, self._first_ns = header.t_capture_ns, header.t_end_ns, first
        else:
            self._gap(first - self._last_ns)
        if len(times) > 1:
            self._gap(int(np.diff(times).max()))
        self.sequence(header.epoch, header.seq)
        self._next_seq = max(self._next_seq, header.seq + 1)
        self.messages += 1
        self.samples += len(times) if not isinstance(layout, AudioLayout) else layout.samples
        self.start_ns, self.end_ns = min(self.start_ns, header.t_capture_ns), max(self.end_ns, header.t_end_ns)
        self._last_ns = max(self._last_ns, last)
        self._delays.append(arrival_ns - header.t_end_ns)
        if isinstance(layout, SignalLayout):
            self._channels.setdefault(layout.channels)
            if layout.channels != next(iter(self._channels)):
                return  # of which there is no mean together with the others
        if isinstance(layout, ImuLayout | SignalLayout):
            self._measure(message)

    def sequence(self, epoch: int, seq: int) -> None:
        """Counts what is missing before number ``seq`` of ``epoch``. What comes late is not taken off again."""
        if self._epoch == _UNKNOWN:
            self._epoch, self._next_seq = epoch, seq
        if epoch > self._epoch:
            self._epoch, self._next_seq = epoch, 0
        if epoch == self._epoch and seq > self._next_seq:
            self.gaps += 1
            self.lost += seq - self._next_seq
            self._next_seq = seq

    def _gap(self, ns: int) -> None:
        self._max_gap_ns = max(ns, self._max_gap_ns or 0)

    def _measure(self, message: Message) -> None:
        samples = array(message)
        for name in samples.dtype.names or ():
            if name != "offset_ns":
                self._moments.setdefault(name, _Moments(samples[name].shape[1])).add(samples[name])

    def result(self) -> dict[str, Any]:
        sounding = self.payload == "audio"
        span_ns = (self.end_ns if sounding else self._last_ns) - self._first_ns
        count = self.samples - (not sounding)
        result: dict[str, Any] = {
            "payload": self.payload,
            "messages": self.messages,
            "samples": self.samples,
            "rate_hz": rate_hz(count, span_ns),
            "gaps": self.gaps,
            "lost": self.lost,
            "max_gap_ms": None if self._max_gap_ns is None else self._max_gap_ns / 1e6,
            "delay_ms": {"p50": float(np.median(self._delays)) / 1e6, "max": max(self._delays) / 1e6},
            "start_ns": self.start_ns,
            "end_ns": self.end_ns,
        }
        if self._channels:
            first, *others = map(list, self._channels)
            result |= {"channels": first, **({"other_channels": others} if others else {})}
        if self._moments:
            result["stats"] = {name: moments.result() for name, moments in self._moments.items()}
        return result


def _sample_times(message: Message) -> np.ndarray[Any, np.dtype[np.int64]]:
    """When the samples of a message were; audio counts as one stretch, everything else without samples as one."""
    header = message.header
    if isinstance(header.layout, ImuLayout | SignalLayout):
        return header.t_capture_ns + array(message)["offset_ns"].astype(np.int64)
    return np.array([header.t_capture_ns], np.int64)


class _Moments:
    """Mean and standard deviation of columns, and the mean length of rows, batch by batch; NaN and infinities left
    out, of which the latter are counted."""

    def __init__(self, columns: int) -> None:
        self._count = np.zeros(columns)
        self._mean = np.zeros(columns)
        self._square = np.zeros(columns)
        self._norms = self._infinite = 0
        self._norm_sum = 0.0

    def add(self, rows: np.ndarray[Any, Any]) -> None:
        """Chan's pairwise update: exact where sums of squares would cancel."""
        values = rows.astype(np.float64)
        known = np.isfinite(values)
        self._infinite += int(np.isinf(values).sum())
        count = known.sum(axis=0)
        mean = np.where(known, values, 0.0).sum(axis=0) / np.maximum(count, 1)
        total = self._count + count
        delta = mean - self._mean
        self._square += np.where(known, (values - mean) ** 2, 0.0).sum(axis=0)
        self._square += delta**2 * self._count * count / np.maximum(total, 1)
        self._mean += delta * count / np.maximum(total, 1)
        self._count = total
        whole = values[known.all(axis=1)]
        self._norms += len(whole)
        self._norm_sum += float(np.linalg.norm(whole, axis=1).sum())

    def result(self) -> dict[str, Any]:
        known = self._count > 0
        deviation = np.sqrt(self._square / np.maximum(self._count, 1))
        infinite = {"infinite": self._infinite} if self._infinite else {}
        return {
            "mean": [_plain(value, there) for value, there in zip(self._mean, known, strict=True)],
            "sd": [_plain(value, there) for value, there in zip(deviation, known, strict=True)],
            "mean_norm": self._norm_sum / self._norms if self._norms else None,
            **infinite,
        }


def _plain(value: float, there: bool) -> float | None:
    return float(value) if there and math.isfinite(value) else None
