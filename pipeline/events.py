"""How strongly something happened, moment by moment, in a stream of any sensor: what ``pipeline.calibrate`` compares.

A knock shakes an accelerometer, sounds in a microphone and may be seen; a turn of the head is felt by a gyroscope and
moves the whole picture. Sensors have nothing else in common, so that a stream is brought down to one or two tracks:

========  ==================================================  ======================================================
payload   strength (one value, >= 0)                          others
========  ==================================================  ======================================================
audio     onsets: by how much louder, summed over bands,      level: loudness (one value, >= 0)
          every 2 ms
imu       onsets of jerk, every sample                        rotation: angular rate [3]
frame     how much of the picture changed, every frame        rotation: shift of the whole picture per second [2]
signal    onsets of change, every sample                      none
sweep     how much of the surroundings changed, every sweep   none
========  ==================================================  ======================================================

The moment of a value is the middle of what it speaks of (between two frames, within a bin of sound), so that two tracks
of one event agree to a fraction of their spans. Everything is linear in the length of the recording and deterministic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, Protocol

import cv2
import numpy as np

from pipeline.messages import AudioLayout, ImuLayout, Message, Payload, SignalLayout, SweepLayout, array
from pipeline.wire import decode_frame

Array = np.ndarray[Any, Any]
Kind = Literal["strength", "level", "rotation"]

BIN_NS = 2_000_000
"""How finely sound is cut."""

_PIECE_S = 20
_GAP_NS = 3_000_000
_BANDS = 6
_BACK = 6  # bins: a voice's own period, up to 12 ms, is no onset
_WIDTH = 160
# A burst is seen once it has come into its window, and the rise of a jolt that rings goes on in the next sample: so
# much later than they happen do onsets come out on the average (simulated knocks, benchmarks/calibrate.py).
_SOUND_LATE_NS, _JOLT_LATE = BIN_NS // 2, 0.25
_QUIET = 2  # grey levels that noise and compression change by themselves
_SECTORS = 180


@dataclass(frozen=True)
class Track:
    """Values ``value`` f8 [n, c] at the moments ``t_ns`` i8 [n] (rising), each of which is ``span_ns`` long. Between
    moments further apart than ``max_gap_ns`` nothing is known."""

    what: str
    kind: Kind
    t_ns: Array
    value: Array
    span_ns: float
    max_gap_ns: float


class Extractor(Protocol):
    """Takes the messages of one stream, in order; gives its tracks."""

    def add(self, message: Message) -> None: ...
    def tracks(self) -> list[Track]: ...


def extractor(payload: Payload) -> Extractor | None:
    """For a stream of this payload; None where its messages tell no moments (text)."""
    makers: dict[str, Callable[[], Extractor]] = {
        "audio": _Sound, "imu": _Motion, "frame": _Picture, "signal": _Signal, "sweep": _Surroundings,
    }  # fmt: skip
    return makers[payload]() if payload in makers else None


# -- sound -------------------------------------------------------------------------------------------------------------


class _Sound:
    def __init__(self) -> None:
        self._held: list[Message] = []
        self._held_ns = 0
        self._t: list[Array] = []
        self._power: list[Array] = []

    def add(self, message: Message) -> None:
        layout = message.header.layout
        last = self._held[-1].header if self._held else None
        if last is not None and (
            abs(message.header.t_capture_ns - last.t_end_ns) > _GAP_NS
            or (last.layout.rate_hz, last.layout.channels) != (layout.rate_hz, layout.channels)  # type: ignore[union-attr]
        ):
            self._analyse(0)
        self._held.append(message)
        self._held_ns += message.header.t_end_ns - message.header.t_capture_ns
        if self._held_ns > _PIECE_S * 10**9:
            self._analyse(keep=1)

    def _analyse(self, keep: int) -> None:
        """Power by bin and band of what is held; ``keep`` messages stay, to be analysed with what follows."""
        messages, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._held_ns = sum(m.header.t_end_ns - m.header.t_capture_ns for m in self._held)
        if not messages:
            return
        layout = messages[0].header.layout
        assert isinstance(layout, AudioLayout)
        sound = np.concatenate([array(m).mean(axis=1) for m in messages]) / 32768
        starts = np.cumsum([0, *(m.header.layout.samples for m in messages)])  # type: ignore[union-attr]
        edges = np.array([*(m.header.t_capture_ns for m in messages), messages[-1].header.t_end_ns], np.float64)
        begin_ns, end_ns = int(edges[0]), int(edges[-1])
        bins = np.arange(-(-begin_ns // BIN_NS), end_ns // BIN_NS) * BIN_NS
        half = max(8, round(layout.rate_hz * BIN_NS / 1e9))  # twice a bin: the window fades at both ends
        at = np.interp(bins + BIN_NS / 2.0, edges, starts).round().astype(np.int64)
        bins, at = bins[(at >= half) & (at <= len(sound) - half)], at[(at >= half) & (at <= len(sound) - half)]
        if not len(at):
            return
        windows = np.lib.stride_tricks.sliding_window_view(sound, 2 * half)[at - half]
        self._t.append(bins + BIN_NS // 2)
        self._power.append(_band_power(windows, layout.rate_hz))

    def tracks(self) -> list[Track]:
        self._analyse(0)
        if not self._t:
            return []
        t, power = np.concatenate(self._t), np.concatenate(self._power)
        onsets = np.zeros(len(t))
        for band in power.T:
            onsets += _onsets(band, _BACK)
        # Where a recorder filled in silence nothing was heard, and the end of that is no event.
        known = _heard(power.sum(axis=1))
        loud = np.sqrt(power.sum(axis=1))
        return [
            Track("sound onsets", "strength", t[known] - _SOUND_LATE_NS, onsets[known, None], BIN_NS, 5 * BIN_NS),
            Track("loudness", "level", t[known], loud[known, None], BIN_NS, 5 * BIN_NS),
        ]


def _band_power(windows: Array, rate_hz: int) -> Array:
    """Mean power of each window [n, samples] in ``_BANDS`` bands of equal width in log frequency, f4 [n, bands]."""
    size = windows.shape[1]
    spectrum = np.abs(np.fft.rfft(windows * np.hanning(size + 2)[1:-1], axis=1)) ** 2 / size
    top = min(8000.0, rate_hz / 2)
    edges = np.geomspace(max(150.0, rate_hz / size), top, _BANDS + 1) * size / rate_hz
    places = np.unique(np.clip(edges.round().astype(int), 1, spectrum.shape[1]))
    return np.stack([spectrum[:, a:b].mean(axis=1) for a, b in pairwise(places)], 1).astype("f4")


def _onsets(level: Array, back: int) -> Array:
    """By how much the logarithm of ``level`` (power, >= 0) exceeds its greatest value in the ``back`` values before."""
    loud = level[level > 0]
    if not len(loud):
        return np.zeros(len(level))
    # The floor is what the sensor shows most of the time: below it, rises are noise.
    floor = max(float(np.quantile(loud, 0.5)), 1e-6 * float(loud.max()))
    log = np.log1p(level / floor)
    before = np.full(len(log), -np.inf)
    for shift in range(1, back + 1):
        before[shift:] = np.maximum(before[shift:], log[:-shift])
    before[0] = log[0]
    rise: Array = np.maximum(log - before, 0.0)
    return rise


def _heard(power: Array) -> Array:
    """Which bins a microphone heard: all but runs of at least 20 ms of nothing at all, and what follows them at
    once."""
    silent = power <= 1e-12
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(np.int8)))
    heard = np.ones(len(power), bool)
    for begin, end in edges.reshape(-1, 2):
        if end - begin >= 10:
            heard[begin : end + _BACK + 4] = False
    return heard


# -- motion ------------------------------------------------------------------------------------------------------------


class _Samples:
    """Batches of samples with times: times i8 [n] and values f8 [n, c]."""

    def __init__(self) -> None:
        self._t: list[Array] = []
        self._values: list[Array] = []

    def take(self, message: Message, values: Array, offsets: Array) -> None:
        """Adds a batch."""
        self._t.append(message.header.t_capture_ns + offsets)
        self._values.append(values.astype(np.float64))

    def joined(self) -> tuple[Array, Array, float]:
        """Times, values, period: only samples after the ones before, as a jumping clock's may not be."""
        if not self._t:
            return np.empty(0, np.int64), np.empty((0, 1)), 0.0
        t, values = np.concatenate(self._t), np.concatenate(self._values)
        rising = t > np.concatenate([[-(1 << 62)], np.maximum.accumulate(t)[:-1]])
        t, values = t[rising], values[rising]
        return t, values, float(np.median(np.diff(t))) if len(t) > 1 else 0.0


class _Motion(_Samples):
    def add(self, message: Message) -> None:
        assert isinstance(message.header.layout, ImuLayout)
        batch = array(message)
        self.take(message, np.concatenate([batch["accel"], batch["gyro"]], axis=1), batch["offset_ns"])

    def tracks(self) -> list[Track]:
        t, values, period = self.joined()
        found = []
        accel, gyro = np.isfinite(values[:, :3]).all(axis=1), np.isfinite(values[:, 3:]).all(axis=1)
        if accel.sum() > 2:
            found.append(_change("jolts", t[accel], values[accel, :3], period))
        if gyro.sum() > 2:
            found.append(Track("turning", "rotation", t[gyro], values[gyro, 3:], period, 3 * period))
        return found


class _Signal:
    """Of a signal whose channels become others those that it has longest: there is no change from one to the other."""

    def __init__(self) -> None:
        self._samples: dict[tuple[str, ...], _Samples] = {}

    def add(self, message: Message) -> None:
        layout = message.header.layout
        assert isinstance(layout, SignalLayout)
        batch = array(message)
        self._samples.setdefault(layout.channels, _Samples()).take(message, batch["value"], batch["offset_ns"])

    def tracks(self) -> list[Track]:
        if not self._samples:
            return []
        t, values, period = max((samples.joined() for samples in self._samples.values()), key=lambda one: len(one[0]))
        whole = np.isfinite(values).all(axis=1)
        if whole.sum() <= 2:
            return []
        spread = np.maximum(values[whole].std(axis=0), 1e-12)
        return [_change("changes", t[whole], values[whole] / spread, period)]


def _change(what: str, t: Array, values: Array, period: float) -> Track:
    """Onsets of change: the moment of a sample is the interval before it, in which it came to be other."""
    steps = np.diff(t)
    speed = np.linalg.norm(np.diff(values, axis=0), axis=1) / (steps / period)
    onsets = _onsets(speed**2, max(1, round(2 * _BACK * 1e6 / period)))
    known = steps < 3 * period
    middle = (t[1:] - steps // 2)[known] - round(_JOLT_LATE * period)
    return Track(what, "strength", middle, onsets[known, None], period, 3 * period)


# -- pictures ----------------------------------------------------------------------------------------------------------


class _Picture:
    def __init__(self) -> None:
        self._before: tuple[int, Array] | None = None
        self._window: Array = np.empty((0, 0), np.float32)
        self._t: list[tuple[int, int]] = []
        self._values: list[tuple[float, float, float]] = []

    def add(self, message: Message) -> None:
        t_ns = message.header.t_capture_ns
        grey = cv2.cvtColor(decode_frame(message), cv2.COLOR_BGR2GRAY)
        height = max(16, round(grey.shape[0] * _WIDTH / grey.shape[1]))
        small = cv2.resize(grey, (_WIDTH, height), interpolation=cv2.INTER_AREA).astype(np.float32)
        if self._window.shape != small.shape:
            self._window = cv2.createHanningWindow((_WIDTH, height), cv2.CV_32F)
            self._before = None
        if self._before is not None and t_ns > self._before[0]:
            before_ns, before = self._before
            calm = cv2.GaussianBlur(small, (0, 0), 2)
            changed = np.maximum(cv2.absdiff(calm, cv2.GaussianBlur(before, (0, 0), 2)) - _QUIET, 0.0)
            # The window is put on here: OpenCV would put it on in place, and the next difference would see it.
            (dx, dy), _ = cv2.phaseCorrelate(before * self._window, small * self._window)
            seconds = (t_ns - before_ns) / 1e9
            self._t.append((before_ns, t_ns))
            self._values.append((float(np.sqrt(changed.mean())), dx / seconds, dy / seconds))
        self._before = (t_ns, small)

    def tracks(self) -> list[Track]:
        if len(self._t) < 2:
            return []
        spans, values = np.array(self._t, np.int64), np.array(self._values)
        steps = spans[:, 1] - spans[:, 0]
        period = float(np.median(steps))
        known = steps < 1.7 * period
        t, values = (spans[:, 0] + steps // 2)[known], values[known]
        return [
            Track("picture motion", "strength", t, values[:, :1], period, 1.7 * period),
            Track("picture turning", "rotation", t, values[:, 1:], period, 1.7 * period),
        ]


class _Surroundings:
    """How far the nearest thing is in each direction, and how much that changed from sweep to sweep."""

    def __init__(self) -> None:
        self._before: tuple[int, Array] | None = None
        self._t: list[tuple[int, int]] = []
        self._values: list[float] = []

    def add(self, message: Message) -> None:
        assert isinstance(message.header.layout, SweepLayout)
        t_ns, points = message.header.t_capture_ns, array(message)
        near = np.full(_SECTORS, np.inf)
        sector = ((np.arctan2(points["y"], points["x"]) + np.pi) * (_SECTORS / (2 * np.pi))).astype(int) % _SECTORS
        np.minimum.at(near, sector, np.hypot(points["x"], points["y"]))
        if self._before is not None and t_ns > self._before[0]:
            before_ns, before = self._before
            seen = np.isfinite(near) & np.isfinite(before)
            change = np.abs(np.log(np.maximum(near[seen], 0.1)) - np.log(np.maximum(before[seen], 0.1)))
            self._t.append((before_ns, t_ns))
            self._values.append(float(np.minimum(change, 1.0).mean()) if seen.any() else 0.0)
        self._before = (t_ns, near)

    def tracks(self) -> list[Track]:
        if len(self._t) < 2:
            return []
        spans = np.array(self._t, np.int64)
        steps = spans[:, 1] - spans[:, 0]
        period = float(np.median(steps))
        known = steps < 1.7 * period
        t, values = (spans[:, 0] + steps // 2)[known], np.array(self._values)[known]
        return [Track("motion of the surroundings", "strength", t, values[:, None], period, 1.7 * period)]
