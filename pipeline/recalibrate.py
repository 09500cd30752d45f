"""``sensorium recalibrate``: better times for an old recording, from the raw stamps that it kept. The original stays.

Two corrections, which may be combined:

* an **offset** moves all capture times of a stream by a constant that is known by now (``sensorium calibrate``, a ruler
  and the speed of sound);
* a **refit** maps a device's own clock again, now that the whole session is known: live, a time base has only the past,
  so that its first seconds are its worst. The line below all receipts is fitted on overlapping minutes of each epoch
  (``pipeline.envelope``), and what a source adds to its time base (half an exposure, an offset) is kept: the median of
  that over the last quarter of the epoch, where the live time base knew most.

Receipts, device stamps, arrivals, epochs and numbers stay as they were; bounds are made anew, so that each still holds
of all that follows. Windows and predictions came from the old times and are left out: `sensorium replay` makes them
again from the new ones. Labels, gaps and attachments are kept.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pipeline.config import LONG_MS
from pipeline.envelope import MIN_BLOCKS, Prior, fit_lower
from pipeline.errors import ConfigError, RecordingError
from pipeline.messages import AudioLayout, Header, Message
from pipeline.recording import (
    BEAT_TOPIC,
    GAP_TOPIC,
    MANIFEST_TOPIC,
    PREDICTION_TOPIC,
    RecordingReader,
    RecordingWriter,
    SessionInfo,
)
from pipeline.recording.summary import BUNDLE_NAME, bundle_name
from pipeline.recording.writer import CALIBRATION, RIG, refuse_existing, whole_file
from pipeline.strict import listed, nearest

Array = np.ndarray[Any, Any]

OFFSET = "offset_ns."
"""Prefix of what a recalibrated recording says of itself: by how much, in all, a stream's times were moved."""
FROM = "recalibrated_from"

_LEAST_S, _LEAST = 10.0, 100
_STEP_NS = 15_000_000
"""A device's clock that moved by less between two epochs did not jump."""
_WINDOW_NS, _STRIDE_NS, _BLOCKS = 60e9, 30e9, 48
_STATED = 1.15  # as the live time base states it: delays follow no model exactly


class Shift(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be done to a stream: ``offset_ns`` is added to its capture times, known to ``uncertainty_ns``."""

    offset_ns: int = 0
    uncertainty_ns: int = 0
    refit: bool = False


class Change(msgspec.Struct, kw_only=True):
    """What was done to a stream. Shifts are new less old capture times; ``before`` and ``after`` are the medians of
    the stated uncertainty."""

    messages: int
    offset_ms: float
    refitted: bool
    shift_ms: dict[str, float]
    """p50, min, max."""
    uncertainty_ms: dict[str, float]
    """before, after."""
    left: str = ""
    """Why a refit that was asked for was not made, in words."""


class Recalibration(msgspec.Struct, kw_only=True):
    """What became of a recording."""

    recording: str
    out: str
    streams: dict[str, Change]
    dropped: dict[str, int]
    """Records that came from the old times, and are not in the new recording."""


class _Stream:
    """The headers of one stream in columns, messages and beats in the order in which they came."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, ...]] = []
        self.audio = False

    def add(self, header: Header) -> None:
        device = header.t_device_ns
        self.audio = self.audio or isinstance(header.layout, AudioLayout)
        self.rows.append(
            (
                header.epoch, header.t_capture_ns, header.t_end_ns, header.bound_ns, header.t_receipt_ns,
                device or 0, int(device is not None), int(header.is_beat), header.uncertainty_ns,
            )
        )  # fmt: skip


class _Columns:
    def __init__(self, stream: _Stream) -> None:
        table = np.array(stream.rows, np.int64).reshape(-1, 9)
        (self.epoch, self.capture, self.end, self.bound, self.receipt, self.device, has, beat, self.doubt) = table.T
        self.message, self.has, self.audio = beat == 0, has == 1, stream.audio


def recalibrate(
    reader: RecordingReader,
    out: Path,
    shifts: Mapping[str, Shift],
    progress: Callable[[int], Any] = lambda t_ns: None,
) -> Recalibration:
    """Writes ``reader``'s recording with corrected times to ``out``, which appears only when it is whole. ConfigError
    for a stream that is not there and an ``out`` that exists; RecordingError."""
    _check(reader, shifts)
    refuse_existing(out)
    columns = _columns(reader, shifts)
    plans = {name: _plan(columns[name], shift) for name, shift in shifts.items()}
    dropped: Counter[str] = Counter()
    session = _session(reader, shifts)
    with whole_file(out, overwrite=False) as part, RecordingWriter(part, session, overwrite=True) as writer:
        for name, data in reader.attachments.items():
            if name != RIG and not name.startswith(CALIBRATION):
                writer.attach(name, data)
        _copy(reader, writer, plans, dropped, progress)
        cut_off = f"{reader.path.name}, of which this was made, lacked its end then" if reader.lacking_end else ""
        writer.close(reader.info.complete, "; ".join(filter(None, (reader.info.note, cut_off))))
    changes = {name: _change(columns[name], shifts[name], plans[name]) for name in sorted(shifts)}
    return Recalibration(recording=str(reader.path), out=str(out), streams=changes, dropped=dict(dropped))


def asked_shifts(
    reader: RecordingReader, offsets: Collection[str], refit: Collection[str], found: Mapping[str, Shift]
) -> dict[str, Shift]:
    """What was asked for, by stream: ``offsets`` like ``imu=-80`` or ``imu=-80,2`` (ms, and how unsure), on top of
    what was ``found``; ``refit`` names streams, ``all`` means those that state device times. ConfigError."""
    shifts = dict(found)
    for text in offsets:
        name, equals, value = text.partition("=")
        try:
            offset_ms, _, unsure_ms = value.partition(",")
            offset_ns, uncertainty_ns = round(float(offset_ms) * 1e6), round(float(unsure_ms or 0) * 1e6)
        except (ValueError, OverflowError):
            equals = ""
        if not equals or uncertainty_ns < 0:
            raise ConfigError(
                f"--offset {text}: found {text!r}, expected one like imu=-80 or imu=-80,2 (milliseconds)."
            )
        before = shifts.get(name, Shift())
        if abs(before.offset_ns + offset_ns) > LONG_MS * 1_000_000:  # as of a rig's offset_ms
            raise ConfigError(
                f"--offset {text}: {(before.offset_ns + offset_ns) / 1e6:.10g} ms is more than an offset may be, which "
                f"is {LONG_MS} ms either way."
            )
        shifts[name] = Shift(
            offset_ns=before.offset_ns + offset_ns, uncertainty_ns=before.uncertainty_ns + uncertainty_ns
        )
    everything = {name for name, payload in reader.streams.items() if payload != "audio"}
    for name in {n for asked in refit for n in (everything if asked == "all" else {asked})}:
        shifts[name] = msgspec.structs.replace(shifts.get(name, Shift()), refit=True)
    return shifts


def moved_ns(reader: RecordingReader) -> dict[str, int]:
    """By how much the streams of a recording were moved by recalibrations since it was recorded."""
    extra = reader.info.extra
    return {name.removeprefix(OFFSET): int(text) for name, text in extra.items() if name.startswith(OFFSET)}


def _check(reader: RecordingReader, shifts: Collection[str]) -> None:
    for name in shifts:
        if name not in reader.streams:
            raise ConfigError(
                f"{reader.path} has no stream `{name}`; it has {listed(sorted(reader.streams)) or 'none'}."
                f"{nearest(name, reader.streams)}"
            )


def _columns(reader: RecordingReader, streams: Collection[str]) -> dict[str, _Columns]:
    found = {name: _Stream() for name in streams}
    for header, _ in reader.headers(streams, beats=True):
        found[header.stream].add(header)
    return {name: _Columns(stream) for name, stream in found.items()}


# -- new times --------------------------------------------------------------------------------------------------------


class _Plan:
    """The new times of a stream, in the order of its messages and beats."""

    def __init__(self, columns: _Columns, shift: Array, doubt: Array, left: str) -> None:
        self.shift, self.doubt, self.left = shift, doubt, left
        message = columns.message
        capture = columns.capture + shift
        # What follows, epochs to come included, begins here at the earliest.
        floor = np.minimum.accumulate(np.where(message, capture, np.iinfo(np.int64).max)[::-1])[::-1]
        after = np.append(floor[1:], np.iinfo(np.int64).max)
        self.capture, self.bound = capture, np.minimum(columns.bound + shift, after)
        self.end = columns.end + shift
        if columns.audio:  # blocks that followed each other without a gap still do
            then = np.flatnonzero(message)
            joined = columns.end[then[:-1]] == columns.capture[then[1:]]
            self.end[then[:-1][joined]] = capture[then[1:][joined]]
        self.bound = np.where(message, np.maximum(self.bound, capture), self.bound)
        self.position = 0

    def apply(self, header: Header) -> Header:
        """The next header of the stream with its new times."""
        i, self.position = self.position, self.position + 1
        bound = int(self.bound[i])
        if header.is_beat:
            return msgspec.structs.replace(header, t_capture_ns=bound, t_end_ns=bound, bound_ns=bound)
        return msgspec.structs.replace(
            header, t_capture_ns=int(self.capture[i]), t_end_ns=int(self.end[i]), bound_ns=bound,
            uncertainty_ns=int(self.doubt[i]),
        )  # fmt: skip


def _plan(columns: _Columns, asked: Shift) -> _Plan:
    shift = np.full(len(columns.epoch), asked.offset_ns, np.int64)
    doubt, left = columns.doubt.copy(), ""
    if asked.refit:
        fitted, left = _refit(columns)
        for where, moved, uncertainty in fitted:
            shift[where] += moved
            doubt[where] = uncertainty
    return _Plan(columns, shift, doubt + asked.uncertainty_ns, left)


def _refit(columns: _Columns) -> tuple[list[tuple[Array, Array, Array]], str]:
    """Per run of epochs that can be fitted: which rows, by how much they move, and their new uncertainty; and why
    others were left as they are."""
    if columns.audio:
        return [], "sound is placed by counting its samples, which a refit of single stamps would make worse"
    fitted, left = [], ""
    for epochs in _runs(columns):
        rows = np.flatnonzero(np.isin(columns.epoch, epochs))
        inside = rows[columns.message[rows] & columns.has[rows]]
        if not _enough(columns, inside):
            left = "its messages state no device times, or fewer than it takes (100 over 10 s, rising)"
            continue
        new, doubt = _fit(columns, inside)
        moved = new - columns.capture[inside]
        before = np.searchsorted(inside, rows, side="right") - 1  # a beat goes with the message before it
        fitted.append((rows, moved[np.maximum(before, 0)], doubt[np.maximum(before, 0)]))
    return fitted, left


def _runs(columns: _Columns) -> list[list[int]]:
    """Epochs through which the device's clock went on: a live time base also opens one when its first guess was too
    bad to be slewed."""
    runs: list[list[int]] = []
    before: tuple[int, int] | None = None
    for epoch in np.unique(columns.epoch):
        rows = np.flatnonzero((columns.epoch == epoch) & columns.message & columns.has)
        late = (columns.receipt - columns.device)[rows]
        goes_on = before is not None and len(rows) and columns.device[rows[0]] > before[0]
        if goes_on and before is not None and abs(int(late[:50].min()) - before[1]) < _STEP_NS:
            runs[-1].append(int(epoch))
        else:
            runs.append([int(epoch)])
        if len(rows):
            before = int(columns.device[rows[-1]]), int(late[-50:].min())
    return runs


def _enough(columns: _Columns, rows: Array) -> bool:
    if len(rows) < _LEAST or columns.receipt[rows[-1]] - columns.receipt[rows[0]] < _LEAST_S * 1e9:
        return False
    return bool((np.diff(columns.device[rows]) > 0).all())


def _fit(columns: _Columns, rows: Array) -> tuple[Array, Array]:
    """New capture times of a run's messages and their uncertainties, ns."""
    device, receipt = columns.device[rows], columns.receipt[rows]
    x = (device - device[0]).astype(np.float64)
    rate = float(receipt[-1] - receipt[0]) / x[-1]  # a device may count in other units
    if abs(rate - 1) > 1e-2:
        x = x * rate
    y = (receipt - receipt[0]) - x
    line, doubt = _lines(x, y)
    placed = receipt[0] + np.rint(x + line).astype(np.int64)
    own = columns.capture[rows] - placed
    settled = own[-max(len(own) // 4, 1) :]
    constant = int(np.median(settled))
    placed += constant
    # The live time base went on learning while the constant was taken from it.
    spread = float(np.median(np.abs(settled - constant)))
    return placed, np.ceil(doubt + spread).astype(np.int64)


def _lines(x: Array, y: Array) -> tuple[Array, Array]:
    """The lower edge of ``y`` over ``x`` (ns), and how well it is known: lines of overlapping windows, faded into each
    other."""
    count = max(1, round((x[-1] - _WINDOW_NS) / _STRIDE_NS) + 1)
    width = min(_WINDOW_NS, x[-1])
    starts = np.linspace(0.0, x[-1] - width, count)
    total, weight, doubt = np.zeros(len(x)), np.zeros(len(x)), np.zeros(len(x))
    for start in starts:
        inside = (x >= start) & (x <= start + width)
        if inside.sum() < 2 * MIN_BLOCKS:
            continue
        fit = fit_lower(*_block_minima(x[inside], y[inside]), Prior(0.0, 100e-6))
        ahead = x[inside] - fit.at
        variance = fit.var_value + 2 * fit.covariance * ahead + fit.var_slope * ahead**2
        known = _STATED * fit.bound99 * np.sqrt(np.maximum(variance, 0.0) / max(fit.var_value, 1.0))
        fade = 1e-3 + 1 - np.abs(2 * (x[inside] - start) / width - 1)
        total[inside] += fade * (fit.value + fit.slope * ahead)
        doubt[inside] += fade * known
        weight[inside] += fade
    if not weight.all():
        raise RecordingError("a stream is silent for most of an epoch, so that its clock cannot be fitted over it.")
    return total / weight, doubt / weight


def _block_minima(x: Array, y: Array) -> tuple[Array, Array, Array]:
    """The least ``y`` of each of at most 48 blocks of equal length: where, how much, and of how many."""
    block = np.minimum(((x - x[0]) / (x[-1] - x[0]) * _BLOCKS).astype(int), _BLOCKS - 1)
    order = np.lexsort((y, block))
    _, first, counts = np.unique(block[order], return_index=True, return_counts=True)
    least = order[first]
    return x[least], y[least], counts.astype(np.float64)


# -- the new recording ------------------------------------------------------------------------------------------------


def _session(reader: RecordingReader, shifts: Mapping[str, Shift]) -> SessionInfo:
    moved = moved_ns(reader)
    for name, shift in shifts.items():
        moved[name] = moved.get(name, 0) + shift.offset_ns
    extra = {k: v for k, v in reader.info.extra.items() if not k.startswith(OFFSET)}
    if called := bundle_name(reader):  # the predictions, which say it, are left out
        extra[BUNDLE_NAME] = called
    extra |= {FROM: reader.path.name} | {OFFSET + name: str(ns) for name, ns in moved.items() if ns}
    return msgspec.structs.replace(reader.info, extra=extra, ring=None)


def _copy(
    reader: RecordingReader,
    writer: RecordingWriter,
    plans: Mapping[str, _Plan],
    dropped: Counter[str],
    progress: Callable[[int], Any],
) -> None:
    messages = ((arrival_ns, message) for message, arrival_ns in reader.messages(beats=True))
    others: Iterable[tuple[int, Any]] = sorted(_kept(reader, dropped), key=lambda item: item[0])
    for at_ns, item in heapq.merge(others, messages, key=lambda item: item[0]):
        if isinstance(item, Message):
            plan = plans.get(item.header.stream)
            writer.write(Message(item.header if plan is None else plan.apply(item.header), item.data), at_ns)
            progress(at_ns)
        else:
            topic, data, publish_ns = item
            writer.write_json(topic, data, at_ns, publish_ns)


def _kept(reader: RecordingReader, dropped: Counter[str]) -> Iterator[tuple[int, tuple[str, bytes, int]]]:
    """What is no message and does not come from the old times: a gap of messages stays, a gap of windows does not."""
    for topic in reader.topics:
        if not topic.startswith("/") or topic == BEAT_TOPIC:
            continue
        for data, log_ns, publish_ns in reader.json(topic):
            of_windows = topic == GAP_TOPIC and "stream" not in msgspec.json.decode(data)
            if of_windows or topic in (MANIFEST_TOPIC, PREDICTION_TOPIC):
                dropped[topic.removeprefix("/")] += 1
            else:
                yield log_ns, (topic, data, publish_ns)


def _change(columns: _Columns, asked: Shift, plan: _Plan) -> Change:
    moved, message = plan.shift[columns.message] / 1e6, columns.message
    return Change(
        messages=int(message.sum()),
        offset_ms=asked.offset_ns / 1e6,
        refitted=asked.refit and not plan.left,
        shift_ms={"p50": float(np.median(moved)), "min": float(moved.min()), "max": float(moved.max())},
        uncertainty_ms={
            "before": float(np.median(columns.doubt[message])) / 1e6,
            "after": float(np.median(plan.doubt[message])) / 1e6,
        },
        left=plan.left,
    )
