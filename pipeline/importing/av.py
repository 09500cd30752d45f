"""Any audio-video file that FFmpeg reads: its first picture track and its first sound track.

Times are the container's presentation stamps, on which both tracks agree to about half a frame (what recorders keep to
and what no file can prove); so much stands in every header's uncertainty. Sound is counted from its stamps by samples:
a stamp that says that samples are missing leaves a hole there, one that says that samples overlap drops them.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np

from pipeline.errors import RecordingError
from pipeline.importing import gopro
from pipeline.importing.base import ImportOptions, Opened, Piece
from pipeline.messages import AudioLayout, FrameLayout

_SLACK_NS = 20_000_000
"""By how much a sound's stamps may stray from its count of samples before samples are taken to be missing."""


class AudioVideo:
    """Importer of audio-video files, a GoPro's motion track included."""

    name = "audio-video file"

    def accepts(self, path: Path) -> bool:
        if not path.is_file():
            return False
        try:
            with av.open(str(path)) as container:
                return bool(container.streams.video or container.streams.audio)
        except (av.FFmpegError, ValueError):
            return False

    def open(self, path: Path, options: ImportOptions) -> Opened:
        with contextlib.ExitStack() as stack:

            def container() -> Any:
                return stack.enter_context(_container(path))

            probe = container()
            opened = Opened(tracks={}, unix_ns=_creation_ns(probe), zero_ns=_zero_ns(probe))
            slack_ns = _half_frame_ns(probe)
            # A container each, so that every track runs at its own pace and nothing is held back for another.
            if probe.streams.video:
                opened.tracks[options.camera] = _guarded(path, pictures(container(), options, slack_ns))
            if probe.streams.audio:
                track = sound(container(), options, slack_ns, opened.dropped)
                opened.tracks[options.microphone] = _guarded(path, track)
            # Nobody who names the streams that are wanted asked for the rest.
            if not options.streams:
                opened.left_out += _more(probe)
            motion = gopro.motion(probe, path, [] if options.streams else opened.left_out)
            if motion is not None:
                opened.tracks[options.imu] = motion.pieces(options.imu_batch_ms, slack_ns)
                opened.facts |= motion.facts
            opened.close = stack.pop_all().close
        return opened


def _more(container: Any) -> list[str]:
    """What there is beside the first track of pictures and of sound."""
    more = {"pictures": len(container.streams.video) - 1, "sound": len(container.streams.audio) - 1}
    return [f"{n} more track{'s' * (n > 1)} of {what}" for what, n in more.items() if n > 0]


def pictures(container: Any, options: ImportOptions, uncertainty_ns: int) -> Iterator[Piece]:
    """Frames of the first picture track, upright, scaled and compressed as asked."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    rate = stream.average_rate or stream.guessed_rate or Fraction(25)
    for index, frame in enumerate(container.decode(stream)):
        device_ns = _ns(frame.pts, frame.time_base) if frame.pts is not None else int(index * 10**9 / rate)
        image = upright(_bgr(frame, options.max_width), frame.rotation)
        height, width = image.shape[:2]
        if options.jpeg_quality is None:
            layout, data = FrameLayout("bgr8", height, width), image
        else:
            layout = FrameLayout("jpeg", height, width)
            data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, options.jpeg_quality])[1]
        yield Piece(
            layout=layout,
            data=data,
            t_ns=device_ns,
            end_ns=device_ns,
            t_device_ns=device_ns,
            uncertainty_ns=uncertainty_ns,
        )


def _bgr(frame: Any, max_width: int | None) -> np.ndarray[Any, Any]:
    image: np.ndarray[Any, Any]
    if max_width is None or frame.width <= max_width:
        image = frame.to_ndarray(format="bgr24")
        return image
    height = max(1, round(frame.height * max_width / frame.width))
    image = frame.reformat(width=max_width, height=height, format="bgr24", interpolation="AREA").to_ndarray()
    return image


def upright(image: np.ndarray[Any, Any], rotation_deg: int) -> np.ndarray[Any, Any]:
    """The picture turned counterclockwise by what its file asks for, in quarter turns."""
    return np.ascontiguousarray(np.rot90(image, round(rotation_deg / 90) % 4))


def sound(container: Any, options: ImportOptions, uncertainty_ns: int, dropped: Any) -> Iterator[Piece]:
    """The first sound track as int16 blocks of ``block_ms`` (the last one, and one before a hole, may be shorter)."""
    stream = container.streams.audio[0]
    rate = stream.codec_context.sample_rate
    size = max(1, rate * options.block_ms // 1000)
    resampler = av.AudioResampler(format="s16", layout=stream.codec_context.layout, rate=rate)
    run = _Run(rate, 0)
    for frame in container.decode(stream):
        samples = np.concatenate([_interleaved(part) for part in resampler.resample(frame)])
        if frame.pts is not None:
            t_ns = _ns(frame.pts, frame.time_base)
            strays_ns = t_ns - run.end_ns if run.started else _SLACK_NS + 1
            if strays_ns > _SLACK_NS:
                yield from run.blocks(1, uncertainty_ns)  # what is left before the hole
                run = _Run(rate, t_ns)
            elif strays_ns < -_SLACK_NS:
                surplus = min(-strays_ns * rate // 10**9, len(samples))
                dropped["samples that overlap earlier ones"] += surplus
                samples = samples[surplus:]
        run.append(samples)
        yield from run.blocks(size, uncertainty_ns)
    yield from run.blocks(1, uncertainty_ns)


def _interleaved(frame: Any) -> np.ndarray[Any, Any]:
    samples: np.ndarray[Any, Any] = frame.to_ndarray().reshape(-1, len(frame.layout.channels))
    return samples


class _Run:
    """Sound without a hole: the time of every sample follows from the first one's and the rate."""

    def __init__(self, rate_hz: int, start_ns: int) -> None:
        self._rate = rate_hz
        self._start_ns = start_ns
        self._done = 0
        self._rest: np.ndarray[Any, Any] | None = None

    @property
    def started(self) -> bool:
        return self._rest is not None

    @property
    def end_ns(self) -> int:
        """One period after the last sample."""
        return self._time(self._done + (0 if self._rest is None else len(self._rest)))

    def _time(self, sample: int) -> int:
        return self._start_ns + sample * 10**9 // self._rate

    def append(self, samples: np.ndarray[Any, Any]) -> None:
        self._rest = samples if self._rest is None else np.concatenate([self._rest, samples])

    def blocks(self, at_least: int, uncertainty_ns: int) -> Iterator[Piece]:
        """Whole blocks of ``at_least`` samples; with 1, everything that is left as one block."""
        rest = self._rest
        while rest is not None and len(rest) >= at_least:
            count = len(rest) if at_least == 1 else at_least
            block, rest = rest[:count], rest[count:]
            start_ns, end_ns = self._time(self._done), self._time(self._done + count)
            self._done += count
            self._rest = rest
            yield Piece(
                layout=AudioLayout(self._rate, block.shape[1], count),
                data=np.ascontiguousarray(block, "<i2"),
                t_ns=start_ns,
                end_ns=end_ns,
                t_device_ns=start_ns,
                uncertainty_ns=uncertainty_ns,
            )


def _container(path: Path) -> Any:
    try:
        return av.open(str(path))
    except (av.FFmpegError, ValueError) as error:
        raise RecordingError(f"{path} cannot be read as an audio-video file: {error}") from None


def _guarded(path: Path, track: Iterator[Piece]) -> Iterator[Piece]:
    try:
        yield from track
    except av.FFmpegError as error:
        raise RecordingError(f"{path} is damaged: {error}") from None


def _ns(stamp: int, time_base: Fraction) -> int:
    return stamp * time_base.numerator * 10**9 // time_base.denominator


def _zero_ns(container: Any) -> int:
    return 0 if container.start_time is None else int(container.start_time) * 1000


def _half_frame_ns(container: Any) -> int:
    if not container.streams.video:
        return 0
    video = container.streams.video[0]
    return int(10**9 / (video.average_rate or video.guessed_rate or Fraction(25)) / 2)


def _creation_ns(container: Any) -> int | None:
    """When the file says it was made, to a second and by the device's own calendar; None if it does not."""
    try:
        made = datetime.datetime.fromisoformat(container.metadata["creation_time"])
        return max(0, int(made.timestamp()) * 10**9) or None
    except (KeyError, ValueError, OverflowError):
        return None
