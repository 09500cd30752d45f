"""The ``resample`` rule as a track: a value for every point of an integer grid. See ``pipeline.rules``."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np

from pipeline import resample
from pipeline.errors import ConfigError
from pipeline.messages import AudioLayout, Header, ImuLayout, Message, SignalLayout, nbytes_of, signal_dtype
from pipeline.rules import FOREVER, Resample, StreamSpec
from pipeline.samples import FewSamples, ManySamples, last_sample_ns
from pipeline.track import Content, Track, by_time

IMU_CHANNELS = 6
_AT_ONCE = bytes(8)  # an offset of 0

FEW = 256
"""Up to so many numbers a step lists are faster than arrays (measured with ``benchmarks/align.py``)."""


class ResampleTrack(Track):
    """See ``Resample``. Samples stand in a store of their own; messages only say which of them are whose."""

    hole_is_gap = True
    looks_inside = True

    def __init__(self, spec: StreamSpec, hop_ns: int, max_future_ns: int | None, step: int) -> None:
        rule = spec.rule
        assert isinstance(rule, Resample)
        self.rule = rule
        self.max_gap_ns = rule.max_gap_ns
        self.count_per_hop = _count(spec.name, rule.rate_hz, hop_ns)
        if spec.channels < 1 or (spec.payload == "imu" and spec.channels != IMU_CHANNELS):
            usual = "6 for an IMU, whose columns are accel xyz and gyro xyz" if spec.payload == "imu" else "1 or more"
            raise ConfigError(
                f"stream {spec.name!r} is resampled to {spec.channels} columns; its `channels` are {usual}"
            )
        self.channels = spec.channels
        self.names = spec.channel_names
        self.sample_bytes = 8 + 4 * spec.channels
        self.rate = (-FOREVER, 0)  # (epoch, Hz) of the newest audio block
        self.reach_ns = 0  # how far beyond the last point samples are needed (band-limited), for the slowest source yet
        few = spec.payload != "audio" and self.count_per_hop * spec.channels <= FEW
        filtered = rule.method == "band_limited"
        self.samples: FewSamples | ManySamples = (
            FewSamples(spec.channels, rule.max_gap_ns)
            if few and not filtered
            else ManySamples(spec.channels, rule.max_gap_ns, filtered)
        )
        self.parsed = 0  # how many messages of the buffer already stand in ``samples``
        super().__init__(spec, hop_ns, max_future_ns, step)

    def limit(self) -> None:
        first, rate_hz = (self.step - 1) * self.count_per_hop, self.rule.rate_hz
        self.first_point = first
        self.first_point_ns = first * resample.SECOND // rate_hz
        self.last_point_ns = (first + self.count_per_hop - 1) * resample.SECOND // rate_hz
        self.interesting_ns = self.last_point_ns + 1
        self.late_below_ns = self.first_point_ns - max(self.max_gap_ns, self.reach_ns)

    def span(self) -> tuple[int, int]:
        return self.start_ns, self.end_ns

    @property
    def never_started(self) -> bool:
        return self.first_ns > self.last_point_ns

    # --- taking messages -------------------------------------------------------------------------------------------

    def well_formed(self, message: Message) -> bool:
        """Whether size, channels and sample times are what the header says, and the bound lies beyond the samples."""
        header, data = message.header, message.data
        layout = header.layout
        if layout is None:
            return True
        if type(data) is bytes and len(data) == self.sample_bytes and data[:8] == _AT_ONCE:
            # One sample at the capture time: the commonest message of all.
            return (
                type(layout) is ImuLayout
                and layout.samples == 1
                and header.t_capture_ns < header.bound_ns
                and self.channels == IMU_CHANNELS
            ) or self._well_formed(message)
        return data is not None and self._well_formed(message)

    def _well_formed(self, message: Message) -> bool:
        header, data, layout = message.header, message.data, message.header.layout
        nbytes = len(data) if type(data) is bytes else memoryview(data).nbytes
        if type(layout) is AudioLayout:
            return self._well_formed_audio(header, layout, nbytes)
        samples = layout.samples  # type: ignore[union-attr]
        if samples < 1 or nbytes != samples * self.sample_bytes:
            return False
        if type(layout) is SignalLayout and (
            len(layout.channels) != self.channels or (self.names and layout.channels != self.names)
        ):
            return False
        if samples > 1:
            offsets = np.frombuffer(data, signal_dtype(self.channels))["offset_ns"]
            if offsets[0] < 0 or (offsets[1:] < offsets[:-1]).any():
                return False
        last_ns = last_sample_ns(message, self.channels)
        return header.t_capture_ns <= last_ns <= header.t_end_ns and header.bound_ns > last_ns

    def _well_formed_audio(self, header: Header, layout: AudioLayout, nbytes: int) -> bool:
        if layout.samples < 1 or layout.rate_hz < 1 or nbytes != nbytes_of(layout):
            return False
        if layout.channels != self.channels and (self.channels != 1 or layout.channels < 1):
            return False  # any number of channels is mixed to one; nothing else can be made of another number
        duration_ns = header.t_end_ns - header.t_capture_ns
        last_ns = header.t_capture_ns + (layout.samples - 1) * duration_ns // layout.samples
        if duration_ns <= 0 or header.bound_ns <= last_ns:
            return False
        return self.rate[0] != header.epoch or self.rate[1] == layout.rate_hz

    def is_late(self, message: Message) -> bool:
        reach_ns = max(self.max_gap_ns, self._reach_with(message.header))
        return last_sample_ns(message, self.channels) + reach_ns < self.first_point_ns

    def _place(self, message: Message) -> None:
        if self.sequence is not None and self._overlaps(message):
            self._reject(message.header, "malformed")
        else:
            super()._place(message)

    def _overlaps(self, message: Message) -> bool:
        """Whether the samples of an unordered stream's message lie among those of another that came before it."""
        index = bisect_left(self.buffer, by_time(message), key=by_time)
        before = self.buffer[index - 1] if index else None
        after = self.buffer[index] if index < len(self.buffer) else None
        return bool(
            (before and last_sample_ns(before, self.channels) >= message.header.t_capture_ns)
            or (after and last_sample_ns(message, self.channels) >= after.header.t_capture_ns)
        )

    def _keep(self, message: Message) -> None:
        header = message.header
        if type(header.layout) is AudioLayout:
            self.rate = (header.epoch, header.layout.rate_hz)
            self.reach_ns = self._reach_with(header)
        super()._keep(message)

    def _reach_with(self, header: Header) -> int:
        """How far the filter reaches once this message is kept: the source's rate sets that."""
        if type(header.layout) is not AudioLayout or self.rule.method != "band_limited":
            return self.reach_ns
        return max(self.reach_ns, resample.reach_ns(header.layout.rate_hz, self.rule.rate_hz))

    def acquainted(self) -> bool:
        """Whether a block of this epoch was kept: rate and reach are learnt from it, whatever came too late before."""
        return self.spec.payload != "audio" or self.rate[0] == self.epoch

    def reordered(self) -> None:
        self.parsed = 0
        self.samples.clear()

    def _parse(self) -> None:
        """Brings the samples of messages that have come since into the store."""
        self.samples.take(self.buffer[self.parsed :])
        self.parsed = len(self.buffer)

    # --- the step that is next -------------------------------------------------------------------------------------

    def _settled(self) -> tuple[bool, int | None]:
        """(whether a sample beyond the last point and its filter, the newest sample of the current epoch), of those
        below the bound, which nothing can come before any more."""
        beyond_ns = self.last_point_ns + self.reach_ns
        if not self.buffer:
            return False, None
        if self.sequence is None:
            newest = self.buffer[-1]
        else:
            self._parse()
            beyond, owner = self.samples.settled(beyond_ns, self.bound_ns)
            if beyond is not None or owner is None:
                return beyond is not None, None
            newest = self.buffer[owner]
            below = [n for n in self.sample_times(newest) if n < self.bound_ns]
            return False, below[-1] if newest.header.epoch == self.epoch else None
        newest_ns = newest.header.t_capture_ns
        if newest_ns < beyond_ns:
            newest_ns = last_sample_ns(newest, self.channels)
        return newest_ns >= beyond_ns, newest_ns if newest.header.epoch == self.epoch else None

    def sample_times(self, message: Message) -> list[int]:
        """The times of a message's samples."""
        header = message.header
        if type(header.layout) is AudioLayout:
            n = header.layout.samples
            return [header.t_capture_ns + i * (header.t_end_ns - header.t_capture_ns) // n for i in range(n)]
        offsets = np.frombuffer(message.data, signal_dtype(self.channels))["offset_ns"]
        return [header.t_capture_ns + int(offset) for offset in offsets]

    def prove(self) -> bool:
        beyond, newest_ns = self._settled()
        if beyond:
            return True
        self.interesting_ns = self.bound_ns + 1  # the sample that proves it may come before the bound gets far
        # The bound lies beyond the last point: a point without right neighbour gets one only from a sample of this
        # epoch that is still to come, and near enough to the left neighbour.
        return newest_ns is None or self.bound_ns > newest_ns + self.max_gap_ns

    def content(self) -> Content | None:
        self._parse()
        made = self.samples.fill(self.rule.rate_hz, self.first_point, self.count_per_hop)
        if made is None:
            return None
        messages = tuple([self.buffer[owner] for owner in made.owners])
        self.used.update(map(id, messages))
        complete = made.filled == self.count_per_hop and not self.overflowed_within(self.start_ns, self.end_ns)
        return Content(messages, made.filled / self.count_per_hop, complete, made.last_ns, made.grid)

    def obsolete(self) -> int:
        """Samples stay as long as they can be a left neighbour (or lie under the filter) of a point to come."""
        limit_ns = self.late_below_ns
        count = 0
        for message in self.buffer:
            header = message.header
            if header.t_end_ns >= limit_ns and (
                header.t_capture_ns >= limit_ns or last_sample_ns(message, self.channels) >= limit_ns
            ):
                break
            count += 1
        if count:
            # What was never parsed must be taken before it can be dropped, or the store's numbering would slip.
            if self.parsed < count:
                self._parse()
            self.samples.drop(count)
            self.parsed -= count
        return count


def _count(stream: str, rate_hz: int, hop_ns: int) -> int:
    count = resample.samples_per_hop(rate_hz, hop_ns)
    if count is None:
        hop_ms = resample.nearest_hop_ns(rate_hz, hop_ns) / 1e6
        raise ConfigError(
            f"stream {stream!r} is resampled at {rate_hz} Hz, which gives {rate_hz * hop_ns / 1e9:g} samples in a hop "
            f"of {hop_ns / 1e6:g} ms; it must be a whole number. The nearest hop is {hop_ms:g} ms"
        )
    return count
