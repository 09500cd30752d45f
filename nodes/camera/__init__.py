"""A camera: on USB, in the network, or a file that plays in a camera's place.

    sources:
      camera: {kind: camera, width: 1280, height: 720, rate_hz: 30, encoding: jpeg}   # the first one on USB
      desk:   {kind: camera, device: C920}                          # by name, by number, or as /dev/video2
      door:   {kind: camera, device: "rtsp://10.0.0.7/stream1", width: 640}
      yard:   {kind: camera, device: "http://10.0.0.8/mjpeg", encoding: native}
      clip:   {kind: camera, file: ../clips/street.mp4}

When a frame was taken is known by, in this order of trust:

======= ========================================================== ============================================
device  capture time                                               uncertainty, beside half a frame for exposure
======= ========================================================== ============================================
file    the moment it was opened, and the file's own stamps        none
V4L2    the driver's CLOCK_MONOTONIC stamp, never after receipt    none
RTSP    the sender's wall clock, from RTCP sender reports          ``sender_error_ms``
RTSP    RTP time mapped by its least delays (until a report comes) ``arrival_error_ms``
HTTP    the stream's stamps if it has any, else receipt            ``arrival_error_ms``
======= ========================================================== ============================================

Frames go where readers see them: OpenCV decodes a V4L2 frame straight into the lent memory, FFmpeg decodes and scales
in one pass and is copied there once. A width or height smaller than the stream's is made while converting, never after.

After a stall old frames arrive in a rush; those older than ``max_age_ms`` are dropped and counted as ``stale``. A
source that reads too slowly loses the oldest frames, counted as ``superseded``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import cv2
import msgspec
import numpy as np

from nodes.camera.ffmpeg import File, Network
from nodes.camera.shots import MS, NS, PERIOD_NS, Array, Driver, Shot, shown
from nodes.camera.usb import Usb, found_at, usb_absence, usb_cameras
from pipeline.errors import SensorError
from pipeline.messages import FrameLayout, Payload
from pipeline.source import Pace, Reading, Search, Source, SourceContext

_URL = re.compile(r"(rtsps?|https?)://")
_UNKNOWN = (1920, 1080)
_LEAST_QUALITY = 25
_EARLY = 0.4
"""A frame may come by this part of a period before it is due, where `rate_hz` leaves some out."""

Positive = Annotated[int, msgspec.Meta(ge=1)]
Pixels = Annotated[int, msgspec.Meta(ge=1, le=16_384)]


class Camera(Source):
    """One camera."""

    payload: ClassVar[Payload] = "frame"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``width`` and ``height``: one alone keeps the proportions; none: as the device gives it. ``encoding``:
        ``raw`` pixels in ``format``; ``jpeg`` compressed here, with ``quality`` lowered while it would exceed
        ``limit_mb_per_min``; ``native`` the JPEG files that the device itself makes, untouched. ``pixel_format`` is
        what a USB camera is asked for, like MJPG or YUYV (MJPG by default where pixels would not fit through USB 2).
        ``delay_ms``: a constant delay that you have measured; it is taken off all capture times."""

        device: int | str | None = None
        file: Path | None = None
        width: Pixels | None = None
        height: Pixels | None = None
        rate_hz: Annotated[float, msgspec.Meta(gt=0, le=1000)] | None = None
        format: Literal["bgr8", "rgb8", "gray8"] = "bgr8"
        encoding: Literal["raw", "jpeg", "native"] = "raw"
        quality: Annotated[int, msgspec.Meta(ge=_LEAST_QUALITY, le=100)] = 80
        limit_mb_per_min: Annotated[float, msgspec.Meta(gt=0)] = 100.0
        pixel_format: Annotated[str, msgspec.Meta(pattern="^[A-Z0-9 ]{4}$")] | None = None
        rtsp_transport: Literal["tcp", "udp"] = "tcp"
        max_age_ms: Positive = 1000
        timeout_ms: Positive = 3000
        sender_error_ms: Annotated[float, msgspec.Meta(ge=0)] = 10.0
        arrival_error_ms: Annotated[float, msgspec.Meta(ge=0)] = 100.0
        delay_ms: Annotated[float, msgspec.Meta(ge=-1000, le=1000)] = 0.0

        def __post_init__(self) -> None:
            if self.device is not None and self.file is not None:
                raise ValueError("`device` and `file` stand here together; a camera is one of them. Remove the other.")
            if self.encoding == "native" and self.format != "bgr8":
                raise ValueError("`format` is for raw frames; `encoding: native` passes on what the device gives.")
            device = _device(self)
            elsewhere = (isinstance(device, str) and _URL.match(device)) or _file(device, self) is not None
            if self.encoding == "native" and elsewhere and (self.width or self.height):
                raise ValueError(
                    "`width` and `height` choose what a USB camera gives; `encoding: native` passes on what comes from "
                    "elsewhere untouched. Remove them and set the size in the camera, or use `encoding: jpeg`."
                )

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._driver: Driver | None = None

    @classmethod
    def pace(cls, settings: Any) -> Pace:
        known = {"jpeg": settings.limit_mb_per_min * 1e6 / 60, "native": 0.0}
        return msgspec.structs.replace(Pace.of(settings.rate_hz), bytes_per_s=known.get(settings.encoding))

    @classmethod
    def largest_payload(cls, settings: Any) -> int:
        pixels = (settings.width or _UNKNOWN[0]) * (settings.height or _UNKNOWN[1])
        return int(pixels * (3 if settings.encoding == "raw" and settings.format != "gray8" else 1))

    @classmethod
    def discover(cls) -> list[Search]:
        where = "cameras on USB or on the board (V4L2, /sys/class/video4linux)"
        cameras = usb_cameras()
        names = list(cameras.values())
        return [Search(looked_for=where, found=[found_at(Path(path), name, names) for path, name in cameras.items()])]

    @classmethod
    def absence(cls, settings: Any) -> str:
        device = _device(settings)
        if isinstance(device, str) and _URL.match(device):
            return ""  # to tell, it would have to be asked
        if (path := _file(device, settings)) is not None:
            return _file_trouble(path)
        return usb_absence(device)

    def open(self) -> None:
        self.close()
        self._driver = _driver(self.settings, self.context)
        self._size = self._wanted_size(*self._driver.size)
        self._quality, self._balance = self.settings.quality, 0.0
        self._last_ns: int | None = None
        self._due_ns: int | None = None
        self._dropped, self._fresh = 0, False
        self._period_ns = round(NS / self.settings.rate_hz) if self.settings.rate_hz else PERIOD_NS
        self._seen_ns = self.context.clock.now_ns()

    def read(self) -> Reading | None:
        driver = self._driver
        assert driver is not None
        shot = driver.shot()
        now = self.context.clock.now_ns()
        if driver.dropped > self._dropped:
            self.context.count("superseded", driver.dropped - self._dropped)
            self._dropped = driver.dropped
        if shot is None:
            if now - self._seen_ns > self.settings.timeout_ms * MS and self.settings.file is None:
                raise SensorError(f"{self._where()} hangs: no frame for {(now - self._seen_ns) / NS:.1f} s.")
            return None
        self._seen_ns = now
        return self._reading(driver, shot) if self._wanted(shot) else None

    def close(self) -> None:
        driver, self._driver = self._driver, None
        if driver is not None:
            driver.close()

    # -- which frames, and how -----------------------------------------------------------------------------------------

    def _wanted(self, shot: Shot) -> bool:
        """Whether a frame is published: not when stale, not before the last one, not more often than ``rate_hz``."""
        self._fresh |= shot.new_epoch
        if shot.late_ns > self.settings.max_age_ms * MS:
            self.context.count("stale")
            return False
        if self._last_ns is not None and shot.t_capture_ns <= self._last_ns:
            self.context.count("order")  # a better clock has just shown that the frames before came earlier, too
            return False
        if self.settings.rate_hz is not None:
            period = NS / self.settings.rate_hz
            if self._due_ns is not None and not self._fresh and shot.t_capture_ns < self._due_ns - _EARLY * period:
                return False
            behind = self._due_ns is None or abs(shot.t_capture_ns - self._due_ns) > period
            self._due_ns = round((shot.t_capture_ns if behind or self._due_ns is None else self._due_ns) + period)
        return True

    def _wanted_size(self, width: int, height: int) -> tuple[int, int]:
        """The size to publish, from the size that the device gives."""
        wide, high = self.settings.width, self.settings.height
        if self.settings.encoding == "native" or (wide is None and high is None):
            return width, height
        return (wide or max(1, round(high * width / height)), high or max(1, round(wide * height / width)))

    def _reading(self, driver: Driver, shot: Shot) -> Reading:
        layout, data = self._payload(driver, shot)
        if self._last_ns is not None and shot.t_capture_ns - self._last_ns < NS:
            self._period_ns += (shot.t_capture_ns - self._last_ns - self._period_ns) // 8
        exposure = 0 if isinstance(driver, File) else self._period_ns // 2
        fresh, self._fresh, self._last_ns = self._fresh, False, shot.t_capture_ns
        capture = shot.t_capture_ns - round(self.settings.delay_ms * MS)
        return Reading(layout=layout, data=data, t_capture_ns=capture, t_end_ns=capture,
                       t_receipt_ns=shot.t_receipt_ns, t_device_ns=shot.t_device_ns,
                       uncertainty_ns=shot.uncertainty_ns + exposure, new_epoch=fresh)  # fmt: skip

    def _payload(self, driver: Driver, shot: Shot) -> tuple[FrameLayout, Any]:
        width, height = self._size
        if self.settings.encoding == "native":
            return FrameLayout("jpeg", height, width), driver.jpeg(shot)
        layout = FrameLayout(self.settings.format, height, width)
        if self.settings.encoding == "raw":
            buffer = self.context.loan(layout)
            driver.fill(shot, layout, _as_image(buffer, layout))
            return layout, buffer
        pixels = np.empty(height * width * (1 if layout.format == "gray8" else 3), np.uint8)
        layout = FrameLayout("gray8" if layout.format == "gray8" else "bgr8", height, width)
        driver.fill(shot, layout, _as_image(pixels, layout))
        _, coded = cv2.imencode(".jpg", _as_image(pixels, layout), [cv2.IMWRITE_JPEG_QUALITY, self._quality])
        self._adapt(len(coded), shot.t_capture_ns)
        return FrameLayout("jpeg", height, width), coded.reshape(-1)

    def _adapt(self, size: int, t_ns: int) -> None:
        """Lowers the quality while the last second's frames were over the limit, and raises it again after."""
        per_s = self.settings.limit_mb_per_min * 1e6 / 60
        passed_s = (t_ns - self._last_ns) / NS if self._last_ns is not None else 0.0
        self._balance = min(max(self._balance + per_s * passed_s - size, -per_s), per_s / 4)
        if self._balance < 0:
            self._quality = max(_LEAST_QUALITY, self._quality - 2)
        elif self._quality < self.settings.quality:
            self._quality += 1

    def _where(self) -> str:
        return shown(self.settings.file or self.settings.device or 0)


def _as_image(buffer: Array, layout: FrameLayout) -> Array:
    shape = (layout.height, layout.width)
    return buffer.reshape(shape if layout.format == "gray8" else (*shape, 3))


def _driver(settings: Any, context: SourceContext) -> Driver:
    """The driver for the device of ``settings``, opened. Raises SensorError."""
    device = _device(settings)
    if isinstance(device, str) and _URL.match(device):
        return Network(device, settings, context)
    if (path := _file(device, settings)) is None:
        return Usb(device, settings, context)
    if trouble := _file_trouble(path):
        raise SensorError(trouble)
    return File(path, settings, context)


def _device(settings: Any) -> Any:
    return settings.file or (0 if settings.device is None else settings.device)


def _file(device: Any, settings: Any) -> Path | None:
    """The path of the file that a device is; None if it is a camera on this machine."""
    if isinstance(device, int):
        return None
    path = Path(device)
    elsewhere = "/" in str(path) and not str(path).startswith("/dev/")
    return path if os.path.isfile(path) or settings.file or path.suffix or elsewhere else None


def _file_trouble(path: Path) -> str:
    """Why the file cannot be played; "" if that cannot be seen from here."""
    if os.path.isfile(path):
        return "" if os.access(path, os.R_OK) else (
            f"{shown(str(path))}: you may not read this file; ask its owner, or change that: sudo chmod a+r {path}."
        )  # fmt: skip
    if not os.path.exists(path):
        above = path.absolute().parents[::-1]
        closed = next((folder for folder in above if os.path.isdir(folder) and not os.access(folder, os.X_OK)), None)
        if closed is not None:
            return f"{shown(str(path))}: you may not look into {closed}; ask its owner, or move the file."
        return f"{shown(str(path))}: there is no such file."
    return (
        f"{shown(str(path))} is no file that could be played; a camera on this machine is named by its number, by a "
        "part of its name, or as /dev/video0."
    )


__all__ = ["Camera", "usb_cameras"]
