"""Sound in ROS: audio_common_msgs in its two kinds.

That of ROS 1 and its ports (``AudioData``, ``AudioDataStamped``) sends bytes, and says on a topic of its own
(``AudioInfo``) what they are; only PCM is taken over, since a single message of an MP3 stream cannot be decoded. The
other (``Audio``, ``AudioStamped``) carries numbers and says with each message what they are.

Sound is counted by its samples: a stamp that differs from the count by less than the slack is jitter, one that differs
by more is a hole, or sound that overlaps what has been. Without a stamp, a block ended when it arrived.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.importing.contents import Content, stamp_of
from pipeline.importing.images import Unusable
from pipeline.messages import AudioLayout
from pipeline.wire import LARGEST

AUDIO_INFO = "audio_common_msgs/msg/AudioInfo"

SLACK_NS, ARRIVAL_SLACK_NS = 20_000_000, 200_000_000
"""How far a stamp, and an arrival, may stray from the count of samples."""

_PCM = {"S16LE": "<i2", "S16BE": ">i2", "S8": "i1", "U8": "u1", "S32LE": "<i4", "S32BE": ">i4", "F32LE": "<f4",
        "F32BE": ">f4"}  # fmt: skip
_LISTS = ("int16_data", "float32_data", "int32_data", "int8_data", "uint8_data")

Array = np.ndarray[Any, Any]


class Timeline:
    """Blocks of sound laid end to end, as far as their stamps allow."""

    def __init__(self) -> None:
        self._first_ns = self._samples = 0
        self._rate_hz: int | None = None

    def place(self, samples: Array, rate_hz: int, stamp_ns: int | None, arrival_ns: int) -> Content:
        """The next block, int16 [samples, channels], with the time that its samples have by their count."""
        count = len(samples)
        told_ns = arrival_ns - count * 10**9 // rate_hz if stamp_ns is None else stamp_ns
        slack_ns = ARRIVAL_SLACK_NS if stamp_ns is None else SLACK_NS
        if rate_hz != self._rate_hz or abs(told_ns - self._end_ns()) > slack_ns:
            self._rate_hz, self._first_ns, self._samples = rate_hz, told_ns, 0
        start_ns = self._end_ns()
        self._samples += count
        layout = AudioLayout(rate_hz, samples.shape[1], count)
        return Content(layout, samples, start_ns, self._end_ns(), stamp_ns, slack_ns)

    def _end_ns(self) -> int:
        return self._first_ns + self._samples * 10**9 // (self._rate_hz or 1)


class Sound:
    """Converter of one topic. ``info``: its AudioInfo, for messages that do not say themselves what they hold."""

    def __init__(self, info: Any) -> None:
        self._info = info
        self._timeline = Timeline()

    def __call__(self, message: Any, arrival_ns: int) -> Content:
        samples, rate_hz = self._pcm(message)
        return self._timeline.place(samples, rate_hz, stamp_of(message), arrival_ns)

    def _pcm(self, message: Any) -> tuple[Array, int]:
        """int16 [samples, channels], and their rate."""
        audio = getattr(message, "audio", message)
        if hasattr(audio, "info"):
            return _interleaved(_numbers(audio.audio_data), audio.info.channels), _rate(audio.info.rate)
        info = self._info
        if info is None:
            raise Unusable("no AudioInfo in the bag says what its bytes are")
        kind = _PCM.get(info.sample_format.upper())
        if info.coding_format.lower() not in ("wave", "wav", "pcm", "") or kind is None:
            said = f"{info.coding_format} {info.sample_format}".strip()
            raise Unusable(f"its sound is {said}; only PCM is taken over")
        raw = bytes(audio.data)
        if len(raw) % np.dtype(kind).itemsize:
            raise Unusable(f"{len(raw)} bytes are no whole samples")
        return _interleaved(to_int16(np.frombuffer(raw, kind)), info.channels), _rate(info.sample_rate)


def _numbers(data: Any) -> Array:
    for name in _LISTS:
        values = np.asarray(getattr(data, name, ()))
        if len(values):
            return to_int16(values)
    raise Unusable("it holds no samples")


def to_int16(values: Array) -> Array:
    """Samples of any format at 16 bits: whole numbers lose their low bits or gain zeros, floats are cut at 1."""
    if values.dtype.kind == "f":
        cut: Array = np.round(np.clip(np.nan_to_num(values), -1, 1) * 32767).astype("<i2")
        return cut
    wide = values.astype(np.int64) - (128 if values.dtype.kind == "u" else 0)
    shift = 16 - 8 * values.dtype.itemsize
    whole: Array = (wide << shift if shift > 0 else wide >> -shift).astype("<i2")
    return whole


def _interleaved(samples: Array, channels: int) -> Array:
    if channels < 1 or not len(samples) or len(samples) % channels:
        raise Unusable(f"{len(samples)} samples are no sound of {channels} channels")
    return np.ascontiguousarray(samples).reshape(-1, channels)


def _rate(rate_hz: int) -> int:
    if not 1 <= rate_hz <= LARGEST:
        raise Unusable(f"its rate is {rate_hz} Hz")
    return int(rate_hz)
