"""The motion track of a GoPro: accelerometer and gyroscope out of GPMF ("GoPro Metadata Format").

GPMF is nested key-length-value, big endian, aligned to four bytes: a four-letter key, a type, the size of a sample, a
count. One payload a second lies in a data track of the MP4. In each, a stream (``STRM``) carries what describes it
(``SCAL`` divides, ``ORIN`` names the axes as they come, lower case pointing backwards, ``STMP`` is the device's time of
the first sample in microseconds) and then its samples. The format: https://github.com/gopro/gpmf-parser.

**Time.** Samples between two stamps are equally spaced; behind the last stamp they go on at the mean rate. Streams with
one sample a frame (exposure, sensitivity, orientation) are stamped on the same clock, so their first stamp is the first
frame's, which ties the device's clock to the pictures. On real footage the orientation's derivative and the gyroscope
agree to 0.998 with a lag of 10 ms, about half of a frame's exposure and readout, inside the stated uncertainty. Cameras
without stamps are read by the times of the payloads.

**Axes.** X, Y, Z as the camera's maker draws them, Z up; m/s^2 and rad/s.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from pipeline.errors import RecordingError
from pipeline.importing.base import Piece
from pipeline.messages import IMU_DTYPE, ImuLayout

_HEAD = struct.Struct(">4scBH")
_NUMBERS = {"b": "i1", "B": "u1", "s": ">i2", "S": ">u2", "l": ">i4", "L": ">u4", "j": ">i8", "J": ">u8"} | {
    "f": ">f4",
    "d": ">f8",
}
_TAKEN = ("ACCL", "GYRO")
_ONE_A_FRAME = ("SHUT", "ISOE", "ISOG", "CORI", "IORI")
_DEFAULT_AXES = "ZXY"  # of the cameras before ORIN


class Entry(NamedTuple):
    """One key with its value: a list of entries where nested, else the raw bytes of ``repeat`` samples."""

    key: str
    kind: str
    size: int
    repeat: int
    body: bytes

    @property
    def children(self) -> list[Entry]:
        return list(entries(self.body))

    def numbers(self) -> np.ndarray[Any, Any]:
        """[count, columns]. ValueError for what is no plain number."""
        if self.kind not in _NUMBERS:
            raise ValueError(f"{self.key} has values of the type {self.kind!r}, not numbers")
        return np.frombuffer(self.body, _NUMBERS[self.kind]).reshape(self.repeat, -1)


def entries(data: bytes) -> Iterator[Entry]:
    """The entries of one level. ValueError where the data ends inside one."""
    at = 0
    while at + _HEAD.size <= len(data):
        key, kind, size, count = _HEAD.unpack_from(data, at)
        if key == b"\0\0\0\0":  # padding
            return
        at += _HEAD.size
        body = data[at : at + size * count]
        if len(body) < size * count:
            raise ValueError(f"{key!r} has {len(body)} bytes where {size * count} should be")
        yield Entry(key.decode("latin-1"), kind.decode("latin-1").replace("\0", ""), size, count, body)
        at += -(-size * count // 4) * 4


@dataclass
class Series:
    """The samples of one stream, payload by payload."""

    stamps_us: list[int] = field(default_factory=list)
    """The device's time of each payload's first sample; empty if it gives none."""
    starts_ns: list[int] = field(default_factory=list)
    """The container's time of each payload."""
    end_ns: int = 0
    """... and of the end of the last."""
    values: list[np.ndarray[Any, Any]] = field(default_factory=list)

    @property
    def stamped(self) -> bool:
        """Whether the device's stamps can be relied on: one a payload, and going forward."""
        stamps = self.stamps_us
        return len(stamps) == len(self.values) and all(0 <= a < b < 1 << 53 for a, b in pairwise([*stamps, 1 << 52]))

    def times_ns(self, by_device: bool) -> np.ndarray[Any, Any]:
        """The time of each sample, strictly increasing, on the device's or the container's clock. ValueError if it
        does not increase."""
        counts = [len(block) for block in self.values]
        if by_device:
            starts = [stamp * 1000 for stamp in self.stamps_us]
            known = sum(counts[:-1])
            period = (starts[-1] - starts[0]) / known if known else (self.end_ns - self.starts_ns[-1]) / counts[-1]
            ends = [*starts[1:], starts[-1] + round(period * counts[-1])]
        else:
            starts, ends = self.starts_ns, [*self.starts_ns[1:], self.end_ns]
        spans = zip(starts, ends, counts, strict=True)
        times = np.concatenate([start + np.arange(n) * (end - start) // n for start, end, n in spans])
        if (np.diff(times) <= 0).any():
            raise ValueError("its samples do not go forward in time")
        return times


@dataclass
class Motion:
    """Accelerometer and gyroscope on one time base."""

    times_ns: np.ndarray[Any, Any]
    """On the container's clock."""
    device_ns: np.ndarray[Any, Any]
    samples: np.ndarray[Any, Any]
    """IMU_DTYPE [n], offsets not set."""
    facts: dict[str, str]

    def pieces(self, batch_ms: int, uncertainty_ns: int) -> Iterator[Piece]:
        """Batches of about ``batch_ms``."""
        span_ns = int(self.times_ns[-1] - self.times_ns[0])
        size = max(1, round((len(self.times_ns) - 1) * batch_ms * 1_000_000 / span_ns)) if span_ns else 1
        for first in range(0, len(self.times_ns), size):
            times = self.times_ns[first : first + size]
            batch = self.samples[first : first + size].copy()
            batch["offset_ns"] = times - times[0]
            yield Piece(
                layout=ImuLayout(len(batch)),
                data=batch,
                t_ns=int(times[0]),
                end_ns=int(times[-1]),
                t_device_ns=int(self.device_ns[first]),
                uncertainty_ns=uncertainty_ns,
            )


def motion(container: Any, path: Path, left_out: list[str]) -> Motion | None:
    """The motion track of an open container; None if it has none. What else the track holds is said in ``left_out``.
    RecordingError if it is damaged."""
    held: Counter[str] = Counter()
    try:
        series, facts = _collect(_payloads(container), held)
    except (ValueError, struct.error, av.FFmpegError) as error:
        raise RecordingError(f"{path} has a damaged GoPro motion track: {error}") from None
    taken = _TAKEN if "ACCL" in series else ()
    rest = [f"{key} ({count} samples)" for key, count in held.items() if count and key not in taken]
    if rest:
        left_out.append(f"{', '.join(rest)} of the GoPro's track, of which only ACCL and GYRO are taken over")
    if "ACCL" not in series:
        return None
    try:
        return _motion(series, _first_frame_ns(container), facts)
    except ValueError as error:
        raise RecordingError(f"{path} has a damaged GoPro motion track: {error}") from None


def _motion(series: dict[str, Series], first_frame_ns: int, facts: dict[str, str]) -> Motion:
    accel, gyro = series["ACCL"], series.get("GYRO")
    by_device = accel.stamped and (gyro is None or gyro.stamped)
    device_ns = accel.times_ns(by_device)
    samples = np.zeros(len(device_ns), IMU_DTYPE)
    samples["accel"] = np.concatenate(accel.values)
    samples["gyro"] = np.nan if gyro is None else _on_times(gyro, device_ns, by_device)
    times_ns = device_ns - _device_zero_ns(series, first_frame_ns) if by_device else device_ns
    return Motion(times_ns, device_ns, samples, facts)


def _payloads(container: Any) -> Iterator[tuple[int, int, bytes]]:
    """Start and end on the container's clock (ns) and bytes of every GPMF payload."""
    for stream in container.streams:
        if stream.type != "data":
            continue
        for packet in container.demux(stream):
            data = bytes(packet)
            if data and not data.startswith(b"DEVC"):
                break  # another kind of data track
            if data:
                unit = packet.time_base.numerator * 10**9
                start = packet.pts * unit // packet.time_base.denominator
                end = (packet.pts + (packet.duration or 0)) * unit // packet.time_base.denominator
                yield start, end, data
        container.seek(0)


def _collect(
    payloads: Iterator[tuple[int, int, bytes]], held: Counter[str] | None = None
) -> tuple[dict[str, Series], dict[str, str]]:
    """What is read of the track, and what it says of the camera; ``held`` counts the samples of all of its streams."""
    wanted = (*_TAKEN, *_ONE_A_FRAME)
    held = Counter() if held is None else held
    found: dict[str, Series] = {}
    facts: dict[str, str] = {}
    for start_ns, end_ns, data in payloads:
        for device in entries(data):
            for entry in device.children:
                if entry.key == "DVNM":
                    facts["device"] = entry.body.decode("latin-1").rstrip("\0 ")
                if entry.key != "STRM":
                    continue
                children = entry.children
                stream = {inner.key: inner for inner in children}
                if children:  # the samples are what comes last
                    held[children[-1].key] += _samples(children)
                for key in wanted:
                    if key in stream and stream[key].repeat:
                        _append(found.setdefault(key, Series()), stream, key, start_ns, end_ns)
    return found, facts


def _samples(stream: list[Entry]) -> int:
    """How many a stream has in one payload: as many as are in its last entry, but where that is there several times
    (a list of scenes for each picture) one in each."""
    same = [entry for entry in stream if entry.key == stream[-1].key]
    return len(same) if len(same) > 1 else same[0].repeat


def _append(series: Series, stream: dict[str, Entry], key: str, start_ns: int, end_ns: int) -> None:
    values = stream[key].numbers().astype(np.float64)
    if "SCAL" in stream:
        scale = stream["SCAL"].numbers().reshape(-1)
        if not np.isfinite(scale).all() or not scale.all() or values.shape[1] % len(scale):
            raise ValueError(f"{key} is to be divided by {scale.tolist()}")
        values = values / scale
    if key in _TAKEN:
        axes = stream["ORIN"].body.decode("latin-1") if "ORIN" in stream else _DEFAULT_AXES
        values = to_xyz(values, axes)
    series.values.append(values)
    series.starts_ns.append(start_ns)
    series.end_ns = end_ns
    if "STMP" in stream:
        series.stamps_us.append(int(stream["STMP"].numbers()[0, 0]))


def to_xyz(values: np.ndarray[Any, Any], axes: str) -> np.ndarray[Any, Any]:
    """Columns that come as ``axes`` says (``XzY``: X, then minus Z, then Y) as X, Y, Z. ValueError if it says else."""
    if sorted(axes.upper()) != ["X", "Y", "Z"] or values.shape[1] != 3:
        raise ValueError(f"{values.shape[1]} columns with the axes {axes!r}, where X, Y and Z are needed")
    columns = [axes.upper().index(axis) for axis in "XYZ"]
    signs = [1.0 if axes[column].isupper() else -1.0 for column in columns]
    turned: np.ndarray[Any, Any] = values[:, columns] * signs
    return turned


def _on_times(series: Series, times_ns: np.ndarray[Any, Any], by_device: bool) -> np.ndarray[Any, Any]:
    """The series at the given times: its own samples where the times are the same, else linear between them."""
    values = np.concatenate(series.values)
    own = series.times_ns(by_device)
    if np.array_equal(own, times_ns):
        return values
    columns = [np.interp(times_ns, own, column, left=np.nan, right=np.nan) for column in values.T]
    return np.stack(columns, axis=1)


def _device_zero_ns(series: dict[str, Series], first_frame_ns: int) -> int:
    """What the device's clock shows at the container's 0."""
    for key in _ONE_A_FRAME:
        if key in series and series[key].stamped:
            return series[key].stamps_us[0] * 1000 - first_frame_ns
    accel = series["ACCL"]
    return accel.stamps_us[0] * 1000 - accel.starts_ns[0]


def _first_frame_ns(container: Any) -> int:
    if not container.streams.video or container.streams.video[0].start_time is None:
        return 0
    video = container.streams.video[0]
    return int(video.start_time * video.time_base.numerator * 10**9 // video.time_base.denominator)
