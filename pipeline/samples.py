"""Samples of one stream between their arrival and the last step that needs them, and interpolation between them.

A store holds the samples of the messages in a track's buffer in order of time and knows which neighbours belong
together: those of one epoch, at most ``max_gap_ns`` apart. Two stores do the same work:

* ``FewSamples``, in lists, for some ten samples a step (an IMU): an array operation on ten numbers costs as much as
  the arithmetic on a hundred.
* ``ManySamples``, in contiguous arrays, for audio and dense signals; the only one that filters (band-limited).

Both compute every value by the same float64 operations, so that which one serves a stream cannot be seen in its grid.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import isfinite, nan
from struct import Struct
from typing import Any, NamedTuple

import numpy as np

from pipeline import resample
from pipeline.messages import AudioLayout, Message, array, signal_dtype

Array = np.ndarray[Any, Any]


class Filled(NamedTuple):
    """A step's grid: f4 [points, channels] with NaN in holes, how many points have a value, the time of the last that
    has, and the positions (in the buffer) of the messages that the values were made of, ascending."""

    grid: Array
    filled: int
    last_ns: int
    owners: list[int]


def last_sample_ns(message: Message, channels: int) -> int:
    """Time of the last sample of an audio, IMU or signal message."""
    header = message.header
    layout = header.layout
    if type(layout) is AudioLayout:
        return header.t_capture_ns + (layout.samples - 1) * (header.t_end_ns - header.t_capture_ns) // layout.samples
    size = 8 + 4 * channels
    tail = memoryview(message.data).cast("B")[-size:]
    return header.t_capture_ns + int.from_bytes(tail[:8], "little", signed=True)


class FewSamples:
    """A store for streams of few samples a step; linear interpolation only."""

    def __init__(self, channels: int, max_gap_ns: int) -> None:
        self._sample = Struct(f"<q{channels}f")
        self._hole = (nan,) * channels
        self._max_gap_ns = max_gap_ns
        self.clear()

    def clear(self) -> None:
        """Forgets everything, the numbering of messages included."""
        self._times: list[int] = []
        self._values: list[tuple[float, ...]] = []
        self._owners: list[int] = []
        self._joined: list[bool] = []
        self._finite = True
        self._epoch: int | None = None
        self._taken = 0  # messages taken and messages dropped since clear
        self._dropped = 0

    def take(self, messages: list[Message]) -> None:
        """Adds the samples of messages that follow those taken before."""
        times, values, owners, joined = self._times, self._values, self._owners, self._joined
        for message in messages:
            header = message.header
            same_epoch = header.epoch == self._epoch
            for sample in self._sample.iter_unpack(message.data):
                t_ns = header.t_capture_ns + sample[0]
                value = sample[1:]
                joined.append(same_epoch and bool(times) and t_ns - times[-1] <= self._max_gap_ns)
                times.append(t_ns)
                values.append(value)
                self._finite = self._finite and isfinite(sum(value))
                owners.append(self._taken)
                same_epoch = True
            self._epoch = header.epoch
            self._taken += 1

    def drop(self, messages: int) -> None:
        """Forgets the samples of the ``messages`` oldest messages."""
        self._dropped += messages
        count = bisect_left(self._owners, self._dropped)
        del self._times[:count], self._values[:count], self._owners[:count], self._joined[:count]

    def settled(self, beyond_ns: int, bound_ns: int) -> tuple[int | None, int | None]:
        """(the first sample at or after ``beyond_ns``, the newest sample), each only if it lies below ``bound_ns``."""
        first, below = bisect_left(self._times, beyond_ns), bisect_left(self._times, bound_ns)
        return self._times[first] if first < below else None, self._owners[below - 1] - self._dropped if below else None

    def fill(self, rate_hz: int, first: int, count: int) -> Filled | None:
        """Values for the grid points ``first`` ... ``first + count - 1``; None if none of them has one."""
        times, values, owners = self._times, self._values, self._owners
        rows: list[Any] = []
        used: list[int] = []
        filled, last_ns, after, newest, samples = 0, 0, 0, -1, len(times)
        for index in range(first, first + count):
            point = index * resample.SECOND // rate_hz
            after = bisect_right(times, point, after)
            left = after - 1
            if left >= 0 and times[left] == point:
                rows.append(values[left])
                right = left
            elif left >= 0 and after < samples and self._joined[after]:
                start, right = times[left], after
                weight = (point - start) / (times[right] - start)
                rows.append([a + (b - a) * weight for a, b in zip(values[left], values[right], strict=True)])
            else:
                rows.append(self._hole)
                continue
            filled, last_ns = filled + 1, point
            for owner in (owners[left], owners[right]):
                if owner > newest:
                    newest = owner
                    used.append(owner - self._dropped)
        if not filled:
            return None
        grid = np.array(rows, np.float32)
        if not self._finite:
            grid[np.isnan(grid)] = np.nan  # one NaN, not whichever the processor made: digests cover these bytes
        return Filled(grid, filled, last_ns, used)


class ManySamples:
    """A store for streams of many samples a step, in arrays that grow at the end and are trimmed at the front.

    ``times`` i8 [n] not decreasing, ``values`` f8 [n, channels] (audio scaled to [-1, 1)), ``owners`` i8 [n]: number
    of the message, ``breaks`` i8: the samples that do not belong together with the one before.
    """

    def __init__(self, channels: int, max_gap_ns: int, band_limited: bool) -> None:
        self._channels = channels
        self._max_gap_ns = max_gap_ns
        self._band_limited = band_limited
        self.clear()

    def clear(self) -> None:
        """Forgets everything, the numbering of messages included."""
        self._times = np.empty(64, np.int64)
        self._values = np.empty((64, self._channels), np.float64)
        self._owners = np.empty(64, np.int64)
        self._first = self._end = 0
        self._breaks: list[int] = []  # positions in the arrays
        self._epoch: int | None = None
        self._taken = self._dropped = 0
        self._rates: list[int] = []  # Hz of each message that is held (audio)

    @property
    def times(self) -> Array:
        return self._times[self._first : self._end]

    @property
    def breaks(self) -> Array:
        return np.array(self._breaks, np.int64) - self._first if self._breaks else _NONE

    def take(self, messages: list[Message]) -> None:
        """Adds the samples of messages that follow those taken before."""
        if not messages:
            return
        counts = [m.header.layout.samples for m in messages]  # type: ignore[union-attr]
        each = np.repeat(np.arange(len(messages)), counts)
        layout = messages[0].header.layout
        if type(layout) is AudioLayout:
            times = np.concatenate([_audio_times(m) for m in messages])
            values = np.concatenate([_pcm(m, self._channels) for m in messages])
            self._rates.extend(m.header.layout.rate_hz for m in messages)  # type: ignore[union-attr]
        else:
            packed = np.frombuffer(b"".join(m.data for m in messages), signal_dtype(self._channels))
            times = np.array([m.header.t_capture_ns for m in messages])[each] + packed["offset_ns"]
            values = packed["value"]
        epochs = [m.header.epoch for m in messages]
        self._append(times, values, each + self._taken)
        if epochs[0] != epochs[-1] or epochs[0] != self._epoch:
            self._break_epochs(len(times), np.array(epochs)[each])
        self._epoch = epochs[-1]
        self._taken += len(messages)

    def _append(self, times: Array, values: Array, owners: Array) -> None:
        count = len(times)
        if self._end + count > len(self._times):
            self._make_room(count)
        start, end = self._end, self._end + count
        self._times[start:end] = times
        self._values[start:end] = values
        self._owners[start:end] = owners
        self._end = end
        begin = max(start, self._first + 1)
        if end > begin:
            gaps = np.flatnonzero(np.diff(self._times[begin - 1 : end]) > self._max_gap_ns)
            if len(gaps):
                self._breaks.extend((gaps + begin).tolist())

    def _break_epochs(self, count: int, epochs: Array) -> None:
        before = epochs[0] if self._epoch is None else self._epoch
        changes = np.flatnonzero(np.diff(epochs, prepend=before)) + self._end - count
        self._breaks = sorted(set(self._breaks).union(changes.tolist()))

    def _make_room(self, count: int) -> None:
        held, capacity = self._end - self._first, len(self._times)
        while capacity < 2 * (held + count):
            capacity *= 2
        for name in ("_times", "_values", "_owners"):
            old = getattr(self, name)
            new = np.empty((capacity, *old.shape[1:]), old.dtype)
            new[:held] = old[self._first : self._end]
            setattr(self, name, new)
        self._breaks = [b - self._first for b in self._breaks]
        self._first, self._end = 0, held

    def drop(self, messages: int) -> None:
        """Forgets the samples of the ``messages`` oldest messages."""
        self._dropped += messages
        self._first += int(self._owners[self._first : self._end].searchsorted(self._dropped))
        self._breaks = [b for b in self._breaks if b > self._first]
        del self._rates[:messages]

    def settled(self, beyond_ns: int, bound_ns: int) -> tuple[int | None, int | None]:
        """(the first sample at or after ``beyond_ns``, the owner of the newest sample), if below ``bound_ns``."""
        times = self.times
        first, below = int(times.searchsorted(beyond_ns)), int(times.searchsorted(min(bound_ns, _LAST)))
        owner = int(self._owners[self._first + below - 1]) - self._dropped if below else None
        return int(times[first]) if first < below else None, owner

    def fill(self, rate_hz: int, first: int, count: int) -> Filled | None:
        """Values for the grid points ``first`` ... ``first + count - 1``; None if none of them has one."""
        times = self.times
        if not len(times):
            return None
        points = resample.grid(rate_hz, first, count)
        after = times.searchsorted(points, side="right")
        left, right = after - 1, np.minimum(after, len(times) - 1)
        valid = resample.joined(times, self.breaks, left, right, points)
        filled = int(valid.sum())
        if not filled:
            return None
        points, left, right = points[valid], left[valid], right[valid]
        grid = np.full((count, self._channels), np.nan, np.float32)
        if self._band_limited:
            values, owners = self._filter(points, left, right, rate_hz)
        else:
            values, owners = self._interpolate(points, left, right)
        grid[valid] = values
        return Filled(grid, filled, int(points[-1]), owners)

    def _interpolate(self, points: Array, left: Array, right: Array) -> tuple[Array, list[int]]:
        times, owners = self.times, self._owners[self._first : self._end]
        values = resample.linear(times, self._values[self._first : self._end], left, right, points)
        # An exact sample is used alone, whatever stands to its right.
        used = np.union1d(owners[left], owners[np.where(times[left] == points, left, right)])
        return values, (used - self._dropped).tolist()

    def _filter(self, points: Array, left: Array, right: Array, rate_hz: int) -> tuple[Array, list[int]]:
        owners = self._owners[self._first : self._end]
        values = np.empty((len(points), self._channels), np.float32)
        used: set[int] = set()
        for source_hz, at in self._by_rate(owners[left]):
            values[at] = resample.band_limited(
                self.times, self._values[self._first : self._end], self.breaks, left[at], right[at], points[at],
                source_hz, rate_hz,
            )  # fmt: skip
            half, reach_ns = resample.half_taps(source_hz, rate_hz), resample.reach_ns(source_hz, rate_hz)
            used.update(owners[self._under_filter(points[at], left[at], half, reach_ns)].tolist())
        return values, [owner - self._dropped for owner in sorted(used)]

    def _by_rate(self, owners: Array) -> list[tuple[int, Any]]:
        """The points by their source's rate, which only another epoch can change: (Hz, which points)."""
        if len(set(self._rates)) == 1:
            return [(self._rates[0], slice(None))]
        each = np.array(self._rates)[owners - self._dropped]
        return [(int(rate), each == rate) for rate in np.unique(each)]

    def _under_filter(self, points: Array, left: Array, half: int, reach_ns: int) -> Array:
        """The samples that the filter's taps touch: those near the points, in a run with one of them."""
        first, last = np.searchsorted(self.times, (points[0] - reach_ns, points[-1] + reach_ns + 1))
        first, last = max(int(first), int(left[0]) - half + 1), min(int(last), int(left[-1]) + half + 1)
        indices = np.arange(first, last)
        breaks = self.breaks
        if not len(breaks):
            return indices
        run = breaks.searchsorted(indices, side="right")
        return indices[np.isin(run, breaks.searchsorted(left, side="right"))]


_NONE = np.empty(0, np.int64)
_LAST = np.iinfo(np.int64).max


def _pcm(message: Message, channels: int) -> Array:
    """The samples of an audio block, f8 [samples, channels] in [-1, 1); mixed to one channel where that is asked."""
    pcm = array(message)
    if pcm.shape[1] != channels:
        pcm = pcm.sum(axis=1, keepdims=True) / pcm.shape[1]
    values: Array = pcm * (1 / 32768)
    return values


def _audio_times(message: Message) -> Array:
    header = message.header
    samples = header.layout.samples  # type: ignore[union-attr]
    times: Array = header.t_capture_ns + np.arange(samples) * (header.t_end_ns - header.t_capture_ns) // samples
    return times
