"""A sensor that needs no hardware: it sees the seeded world of ``pipeline.scene``, live, on the session clock.

    sources:
      camera:     {kind: synthetic, payload: frame}
      microphone: {kind: synthetic, payload: audio, delay_ms: 20}
      imu:        {kind: synthetic, payload: imu, silence_s: [[10, 12]]}
      lidar:      {kind: synthetic, payload: sweep, restarts_s: [30]}

Reading i is due at i periods of session time, however late the source was opened, so that its content depends on the
seed and the moment alone. It arrives ``delay_ms`` (and up to ``delay_jitter_ms`` more) after it happened.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import cv2
import msgspec
import numpy as np

from pipeline.messages import (
    POINT_DTYPE,
    AudioLayout,
    FrameLayout,
    ImuLayout,
    Layout,
    Payload,
    SignalLayout,
    SweepLayout,
    TextLayout,
)
from pipeline.scene import SIGNAL_CHANNELS, Scene
from pipeline.source import Pace, Reading, Source, SourceContext

_NS, _MS = 1_000_000_000, 1_000_000
_PATIENCE_NS = 50 * _MS
_STALE_NS = _NS

_RATE_HZ = {"frame": 30.0, "audio": 16_000.0, "imu": 100.0, "signal": 100.0, "sweep": 10.0, "text": 1.0}
_BLOCK = {"audio": 320, "imu": 5, "signal": 5}

Interval = tuple[float, float]
Amount = Annotated[float, msgspec.Meta(ge=0)]


class Synthetic(Source):
    """A seeded camera, microphone, IMU, LiDAR, signal or text source."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``rate_hz`` counts frames, sweeps and lines, or samples (audio, imu, signal), of which ``block`` come in a
        message. ``jitter_ms`` moves the moment of a frame, sweep or line, and says so in its time. ``silence_s`` are
        spans of session time in which nothing is seen, ``restarts_s`` moments at which the clock restarts. The data
        end ``duration_s`` after the source was opened."""

        payload: Payload
        seed: Annotated[int, msgspec.Meta(ge=0)] = 0
        period_s: Annotated[float, msgspec.Meta(ge=2)] = 20.0
        rate_hz: Annotated[float, msgspec.Meta(gt=0, le=192_000)] | None = None
        block: Annotated[int, msgspec.Meta(ge=1)] | None = None
        width: Annotated[int, msgspec.Meta(ge=16, le=16_384)] = 320
        height: Annotated[int, msgspec.Meta(ge=16, le=16_384)] = 240
        format: Literal["bgr8", "jpeg"] = "bgr8"
        quality: Annotated[int, msgspec.Meta(ge=1, le=100)] = 80
        channels: Annotated[int, msgspec.Meta(ge=1)] = 1
        points: Annotated[int, msgspec.Meta(ge=4)] = 1440
        jitter_ms: Amount = 0.0
        delay_ms: Amount = 0.0
        delay_jitter_ms: Amount = 0.0
        loss: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
        silence_s: tuple[Interval, ...] = ()
        restarts_s: tuple[Amount, ...] = ()
        duration_s: Annotated[float, msgspec.Meta(gt=0)] | None = None

        def __post_init__(self) -> None:
            if any(start >= end for start, end in self.silence_s):
                raise ValueError(
                    f"`silence_s: {[list(s) for s in self.silence_s]}`: each span must end after it begins"
                )
            if self.payload == "audio" and self.rate_hz is not None and self.rate_hz != int(self.rate_hz):
                raise ValueError(f"`rate_hz: {self.rate_hz}`: the rate of audio must be a whole number, like 16000")
            if self.payload in ("frame", "sweep", "text") and self.rate_hz is not None and self.rate_hz > 1000:
                raise ValueError(
                    f"`rate_hz: {self.rate_hz:g}`: a {self.payload} source has at most 1000 messages a second"
                )
            if self.payload in ("frame", "sweep", "text") and self.block is not None:
                raise ValueError(f"`block` is for audio, imu and signal; a {self.payload} source has one a message")

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self.scene = Scene(settings.seed, round(settings.period_s * _NS))
        self._block = settings.block or _BLOCK.get(settings.payload, 1)
        self._rate_hz: float = settings.rate_hz or _RATE_HZ[settings.payload]
        self._span_ns = self._block / self._rate_hz * _NS
        self._index = 0
        self._last_due_ns = 0
        self._end_ns: int | None = None
        self._restarts = sorted(round(t * _NS) for t in settings.restarts_s)
        self._makers = {"frame": self._frame, "audio": self._audio, "imu": self._imu, "signal": self._signal,
                        "sweep": self._sweep, "text": self._text}  # fmt: skip

    @classmethod
    def payload_of(cls, settings: Any) -> Payload:
        payload: Payload = settings.payload
        return payload

    @classmethod
    def pace(cls, settings: Any) -> Pace:
        rate_hz = settings.rate_hz or _RATE_HZ[settings.payload]
        if settings.payload not in _BLOCK:
            compressed = settings.payload == "frame" and settings.format == "jpeg"
            return msgspec.structs.replace(Pace.of(rate_hz), bytes_per_s=0.0 if compressed else None)
        return Pace.of(rate_hz, 1000 * (settings.block or _BLOCK[settings.payload]) / rate_hz, "block")

    @classmethod
    def largest_payload(cls, settings: Any) -> int:
        sizes: dict[str, int] = {
            "frame": settings.width * settings.height * 3,
            "sweep": settings.points * POINT_DTYPE.itemsize,
        }
        return sizes.get(settings.payload, 0)

    def open(self) -> None:
        now = self.context.clock.now_ns()
        self._index = int(np.ceil(now / self._span_ns))
        if self._end_ns is None and self.settings.duration_s is not None:
            self._end_ns = now + round(self.settings.duration_s * _NS)
        self._restarts = [t for t in self._restarts if t > now]

    def read(self) -> Reading | None:
        clock = self.context.clock
        now = clock.now_ns()
        capture, due = self._times(self._index)
        if now - due > _STALE_NS:  # a machine that was asleep: a device's own buffer would have run over as well
            skipped = int((now - due) / self._span_ns)
            self._index += skipped
            self.context.count("stale", skipped)
            capture, due = self._times(self._index)
        if self._end_ns is not None and capture >= self._end_ns:
            raise EOFError
        if not clock.wait_until(min(due, now + _PATIENCE_NS)) or clock.now_ns() < due:
            return None
        self._last_due_ns = due
        self._index += 1
        if self._hidden(self._index - 1, capture):
            return None
        return self._makers[self.settings.payload](self._index - 1, capture)

    def bound_ns(self) -> int | None:
        """Lines are rare, so a text source promises the time up to the next one."""
        if self.settings.payload != "text":
            return None
        capture, due = self._times(self._index)
        return max(0, min(capture, self.context.clock.now_ns() - (due - capture)))

    # -- when ----------------------------------------------------------------------------------------------------------

    def _times(self, index: int) -> tuple[int, int]:
        """When reading ``index`` begins, and when it is there."""
        begin = self._sample_ns(index * self._block)
        noise = np.random.Generator(np.random.PCG64([self.settings.seed, 9, index])).random(3)
        if self.settings.payload in ("frame", "sweep", "text"):
            reach = min(self.settings.jitter_ms * _MS, 0.45 * self._span_ns)
            begin = max(0, begin + round((2 * noise[0] - 1) * reach))
        end = self._sample_ns((index + 1) * self._block) if self._block > 1 else begin
        delay = (self.settings.delay_ms + self.settings.delay_jitter_ms * noise[1]) * _MS
        return begin, max(end + round(delay), self._last_due_ns)

    def _sample_ns(self, sample: int) -> int:
        return round(sample * _NS / self._rate_hz)

    def _hidden(self, index: int, capture_ns: int) -> bool:
        """Whether the device misses this reading: in silence, or lost."""
        if any(start * _NS <= capture_ns < end * _NS for start, end in self.settings.silence_s):
            return True
        noise = np.random.Generator(np.random.PCG64([self.settings.seed, 10, index])).random()
        if noise >= self.settings.loss:
            return False
        self.context.count("lost")
        return True

    def _restarted(self, capture_ns: int) -> bool:
        """Whether the clock restarted before this moment and after the last one."""
        before = len(self._restarts)
        self._restarts = [t for t in self._restarts if t > capture_ns]
        return len(self._restarts) < before

    # -- what ----------------------------------------------------------------------------------------------------------

    def _reading(self, layout: Layout, data: Any, capture_ns: int, end_ns: int) -> Reading:
        return Reading(
            layout=layout,
            data=data,
            t_capture_ns=capture_ns,
            t_end_ns=end_ns,
            t_receipt_ns=self.context.clock.now_ns(),
            t_device_ns=capture_ns,
            new_epoch=self._restarted(capture_ns),
        )

    def _frame(self, index: int, t_ns: int) -> Reading:
        height, width = self.settings.height, self.settings.width
        layout = FrameLayout("bgr8", height, width)
        if self.settings.format == "bgr8":
            buffer = self.context.loan(layout)
            self.scene.frame(t_ns, index, buffer.reshape(height, width, 3))
            return self._reading(layout, buffer, t_ns, t_ns)
        pixels = np.empty((height, width, 3), np.uint8)
        self.scene.frame(t_ns, index, pixels)
        _, coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, self.settings.quality])
        return self._reading(FrameLayout("jpeg", height, width), coded.tobytes(), t_ns, t_ns)

    def _audio(self, index: int, t_ns: int) -> Reading:
        rate = int(self._rate_hz)
        data = self.scene.audio(index * self._block, self._block, rate, self.settings.channels)
        layout = AudioLayout(rate, self.settings.channels, self._block)
        return self._reading(layout, data, t_ns, self._sample_ns((index + 1) * self._block))

    def _sample_times(self, index: int) -> np.ndarray[Any, Any]:
        return np.array([self._sample_ns(index * self._block + i) for i in range(self._block)], np.int64)

    def _imu(self, index: int, t_ns: int) -> Reading:
        times = self._sample_times(index)
        return self._reading(ImuLayout(self._block), self.scene.imu(times, index), t_ns, int(times[-1]))

    def _signal(self, index: int, t_ns: int) -> Reading:
        times = self._sample_times(index)
        layout = SignalLayout(self._block, SIGNAL_CHANNELS)
        return self._reading(layout, self.scene.signal(times, index), t_ns, int(times[-1]))

    def _sweep(self, index: int, t_ns: int) -> Reading:
        points = self.settings.points
        data = self.scene.sweep(t_ns, index, points, round(self._span_ns))
        return self._reading(SweepLayout(points), data, t_ns, t_ns)

    def _text(self, index: int, t_ns: int) -> Reading:
        line = self.scene.line(t_ns, index)
        return self._reading(TextLayout(len(line)), line, t_ns, t_ns)
