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

import fcntl
import os
import re
import sys
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol

import cv2
import msgspec
import numpy as np

from pipeline.devices import refusal
from pipeline.errors import SensorError
from pipeline.hosttime import FrameClock, domain_of, host_zero, prft_unix_ns
from pipeline.messages import FrameLayout, Payload
from pipeline.protocols import v4l2
from pipeline.source import Found, Reading, Search, Source, SourceContext

_MS, _NS = 1_000_000, 1_000_000_000
_WAIT_NS = 50 * _MS
_OPEN_S = 4.0
_UNKNOWN = (1920, 1080)
_PERIOD_NS = 33_000_000
_KEPT = 2
"""Decoded frames that wait for ``read``: one, and one more for a hiccup."""
_CORRUPT = 200
_LEAST_QUALITY = 25
_EARLY = 0.4
"""A frame may come by this part of a period before it is due, where `rate_hz` leaves some out."""
_AV_FORMAT = {"bgr8": "bgr24", "rgb8": "rgb24", "gray8": "gray"}
_CV_FORMAT = {"rgb8": cv2.COLOR_BGR2RGB, "gray8": cv2.COLOR_BGR2GRAY}

Positive = Annotated[int, msgspec.Meta(ge=1)]
Array = np.ndarray[Any, Any]


class Shot(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """A frame as its driver has it. ``late_ns`` is its age, or how much longer than usual it was on its way."""

    t_capture_ns: int
    t_receipt_ns: int
    t_device_ns: int | None = None
    uncertainty_ns: int = 0
    new_epoch: bool = False
    late_ns: int = 0
    image: Any = None


class Driver(Protocol):
    """One way to get frames. ``size`` is (width, height) as the device gives them."""

    size: tuple[int, int]
    dropped: int

    def shot(self) -> Shot | None: ...
    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None: ...
    def jpeg(self, shot: Shot) -> Array: ...
    def close(self) -> None: ...


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
        width: Positive | None = None
        height: Positive | None = None
        rate_hz: Annotated[float, msgspec.Meta(gt=0)] | None = None
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

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._driver: Driver | None = None

    @classmethod
    def largest_payload(cls, settings: Any) -> int:
        pixels = (settings.width or _UNKNOWN[0]) * (settings.height or _UNKNOWN[1])
        return int(pixels * (3 if settings.encoding == "raw" and settings.format != "gray8" else 1))

    @classmethod
    def discover(cls) -> list[Search]:
        where = "cameras on USB or on the board (V4L2, /sys/class/video4linux)"
        cameras = usb_cameras()
        names = list(cameras.values())
        return [Search(looked_for=where, found=[_found(Path(path), name, names) for path, name in cameras.items()])]

    def open(self) -> None:
        self.close()
        self._driver = _driver(self.settings, self.context)
        self._size = self._wanted_size(*self._driver.size)
        self._quality, self._balance = self.settings.quality, 0.0
        self._last_ns: int | None = None
        self._due_ns: int | None = None
        self._dropped, self._fresh = 0, False
        self._period_ns = round(_NS / self.settings.rate_hz) if self.settings.rate_hz else _PERIOD_NS
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
            if now - self._seen_ns > self.settings.timeout_ms * _MS and self.settings.file is None:
                raise SensorError(f"{self._where()} hangs: no frame for {(now - self._seen_ns) / _NS:.1f} s.")
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
        if shot.late_ns > self.settings.max_age_ms * _MS:
            self.context.count("stale")
            return False
        if self._last_ns is not None and shot.t_capture_ns <= self._last_ns:
            self.context.count("order")  # a better clock has just shown that the frames before came earlier, too
            return False
        if self.settings.rate_hz is not None:
            period = _NS / self.settings.rate_hz
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
        if self._last_ns is not None and shot.t_capture_ns - self._last_ns < _NS:
            self._period_ns += (shot.t_capture_ns - self._last_ns - self._period_ns) // 8
        exposure = 0 if isinstance(driver, _File) else self._period_ns // 2
        fresh, self._fresh, self._last_ns = self._fresh, False, shot.t_capture_ns
        capture = shot.t_capture_ns - round(self.settings.delay_ms * _MS)
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
        passed_s = (t_ns - self._last_ns) / _NS if self._last_ns is not None else 0.0
        self._balance = min(max(self._balance + per_s * passed_s - size, -per_s), per_s / 4)
        if self._balance < 0:
            self._quality = max(_LEAST_QUALITY, self._quality - 2)
        elif self._quality < self.settings.quality:
            self._quality += 1

    def _where(self) -> str:
        return _shown(self.settings.file or self.settings.device or 0)


def _as_image(buffer: Array, layout: FrameLayout) -> Array:
    shape = (layout.height, layout.width)
    return buffer.reshape(shape if layout.format == "gray8" else (*shape, 3))


def _shown(device: Any) -> str:
    """A device in words, without the password that a URL may hold."""
    return "the camera " + re.sub(r"//[^/@]*@", "//…@", str(device))


def _driver(settings: Any, context: SourceContext) -> Driver:
    """The driver for the device of ``settings``, opened. Raises SensorError."""
    device = settings.file or (0 if settings.device is None else settings.device)
    if isinstance(device, str) and re.match(r"(rtsps?|https?)://", device):
        return _Network(device, settings, context)
    path = Path(device) if not isinstance(device, int) else None
    if path is not None and path.is_file():
        return _File(path, settings, context)
    if path is not None and (settings.file or path.suffix or ("/" in str(path) and not str(path).startswith("/dev/"))):
        raise SensorError(f"{_shown(device)}: there is no such file.")
    return _Usb(device, settings, context)


# -- V4L2 --------------------------------------------------------------------------------------------------------------


def usb_cameras() -> dict[str, str]:
    """The V4L2 devices that are here: path -> name; a camera's further nodes (metadata) are left out."""
    found = {}
    for folder in sorted(Path("/sys/class/video4linux").glob("video*"), key=lambda p: int(p.name[5:])):
        try:
            index, name = (folder / "index").read_text().strip(), (folder / "name").read_text().strip()
        except OSError:  # unplugged while we looked
            continue
        if index == "0":
            found[f"/dev/{folder.name}"] = name
    return found


def _found(path: Path, name: str, names: list[str]) -> Found:
    """A camera as `sensorium devices` shows it: by its name, where no other has that too."""
    shown = f"{path}  {name}"
    if refused := refusal(path, "video"):
        return Found(name=shown, detail=refused, settings={"device": str(path)})
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        return Found(name=shown, detail=f"cannot be opened: {error.strerror}", settings={"device": str(path)})
    try:
        offered = v4l2.modes(lambda request, entry: fcntl.ioctl(handle, request, entry, True))
    finally:
        os.close(handle)
    if not offered:
        return Found(name=shown, detail="gives no frames; it is no camera")
    alone = [other for other in names if name.lower() in other.lower()] == [name] and not name.isdigit()
    settings = {"device": name if alone and "/" not in name else str(path)} | _usual(offered)
    return Found(name=shown, detail=_listed(offered), settings=settings)


def _usual(offered: list[v4l2.Mode]) -> dict[str, Any]:
    """Settings for the mode that most want: 720p, else VGA, else the first; at 30 Hz, or what there is."""
    sizes = [(1280, 720), (640, 480), (offered[0].width, offered[0].height)]
    width, height = next(size for size in sizes if any((m.width, m.height) == size for m in offered))
    rate = min(30.0, max(m.rate_hz for m in offered if (m.width, m.height) == (width, height)))
    return {"width": width, "height": height} | ({"rate_hz": round(rate, 3)} if rate else {})


def _listed(offered: list[v4l2.Mode]) -> str:
    """Modes, one line a pixel format."""
    lines: dict[str, list[str]] = {}
    for mode in offered:
        at = f" at {mode.rate_hz:g} Hz" if mode.rate_hz else ""
        lines.setdefault(mode.pixel_format, []).append(f"{mode.width}x{mode.height}{at}")
    return "\n".join(f"{name.strip()}: {', '.join(dict.fromkeys(sizes))}" for name, sizes in lines.items())


class _Usb:
    """A V4L2 camera through OpenCV (elsewhere than on Linux: whatever camera OpenCV knows by this number, with the
    receipt for its time). OpenCV starts and takes a frame in ``waitAny``, which has a limit; ``read`` has none."""

    def __init__(self, device: int | str, settings: Any, context: SourceContext) -> None:
        self.dropped = 0
        self._settings, self._clock = settings, context.clock
        self._zero = host_zero(context.clock)
        self._linux = sys.platform == "linux"
        self._name = _find_usb(device) if self._linux else device
        self._capture = cv2.VideoCapture(self._name, cv2.CAP_V4L2 if self._linux else cv2.CAP_ANY)
        try:
            self._configure()
            self._wait(round(_OPEN_S * _NS))
        except SensorError:
            self.close()
            raise
        self._check_start()

    def shot(self) -> Shot | None:
        if not self._wait(_WAIT_NS):
            return None
        now = self._clock.now_ns()
        stamp = round(self._capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
        if domain_of(stamp, now, self._zero) != "monotonic":
            return Shot(t_capture_ns=now, t_receipt_ns=now, uncertainty_ns=round(self._settings.arrival_error_ms * _MS))
        capture = min(stamp - self._zero.monotonic_ns, now)
        return Shot(t_capture_ns=capture, t_receipt_ns=now, t_device_ns=stamp, late_ns=now - capture)

    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None:
        same = layout.format == "bgr8" and out.shape[1::-1] == self.size
        frame = self._retrieve(out if same else None)
        if same and frame.ctypes.data == out.ctypes.data:
            return
        if out.shape[1::-1] != frame.shape[1::-1]:
            frame = cv2.resize(frame, out.shape[1::-1], interpolation=cv2.INTER_AREA)
        if layout.format == "bgr8":
            np.copyto(out, frame)
        else:
            cv2.cvtColor(frame, _CV_FORMAT[layout.format], dst=out)

    def jpeg(self, shot: Shot) -> Array:
        return self._retrieve(None).reshape(-1).copy()

    def close(self) -> None:
        self._capture.release()

    def _configure(self) -> None:
        capture, settings = self._capture, self._settings
        if not capture.isOpened():
            raise SensorError(f"{_shown(self._name)} cannot be opened: another program uses it, or it is no camera.")
        large = (settings.width or 0) * (settings.height or 0) > 640 * 480
        wanted = settings.pixel_format or ("MJPG" if settings.encoding == "native" or large else None)
        if wanted is not None:
            capture.set(cv2.CAP_PROP_FOURCC, cv2.VideoWriter.fourcc(*wanted))
        if settings.width and settings.height:
            capture.set(cv2.CAP_PROP_FRAME_WIDTH, settings.width)
            capture.set(cv2.CAP_PROP_FRAME_HEIGHT, settings.height)
        if settings.rate_hz:
            capture.set(cv2.CAP_PROP_FPS, settings.rate_hz)
        given = self._fourcc()
        if wanted is not None and given != wanted and (settings.pixel_format or settings.encoding == "native"):
            raise SensorError(
                f"{_shown(self._name)} does not give the pixel format {wanted} but {given}; "
                f"{'use `encoding: jpeg`' if settings.encoding == 'native' else 'leave `pixel_format` out'}, or see "
                f"`v4l2-ctl -d {self._name} --list-formats-ext`."
            )
        if settings.encoding == "native":
            capture.set(cv2.CAP_PROP_CONVERT_RGB, 0)

    def _check_start(self) -> None:
        self.size = (
            int(self._capture.get(cv2.CAP_PROP_FRAME_WIDTH)),
            int(self._capture.get(cv2.CAP_PROP_FRAME_HEIGHT)),
        )
        if min(self.size) <= 0:
            self.close()
            raise SensorError(
                f"{_shown(self._name)} states a picture of {self.size}; it is no camera that gives frames."
            )

    def _fourcc(self) -> str:
        return int(self._capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("ascii", "replace")

    def _wait(self, limit_ns: int) -> bool:
        """Takes a frame into the driver's buffer; False if none came in time."""
        try:
            if not self._linux:
                return bool(self._capture.grab())
            return bool(cv2.VideoCapture.waitAny([self._capture], timeoutNs=limit_ns)[0])
        except cv2.error as error:
            raise SensorError(f"{_shown(self._name)} fails: unplugged, or taken by another program.") from error

    def _retrieve(self, out: Array | None) -> Array:
        ok, frame = self._capture.retrieve(out) if out is not None else self._capture.retrieve()
        if not ok or frame is None:
            raise SensorError(f"{_shown(self._name)} gave a frame that cannot be decoded.")
        result: Array = frame
        return result


def _find_usb(device: int | str) -> str:
    """The path of a V4L2 device given by number, path or part of a name. Raises SensorError."""
    cameras = usb_cameras()
    here = ", ".join(f"{path} ({name})" for path, name in cameras.items()) or "none"
    text = f"/dev/video{device}" if str(device).isdigit() else str(device)
    if not text.startswith("/dev/"):
        exact = [path for path, name in cameras.items() if name == text]
        found = exact or [path for path, name in cameras.items() if text.lower() in name.lower()]
        if not found:
            raise SensorError(f"no camera has `{text}` in its name; cameras here: {here}.")
        text = found[0]
    if not os.path.exists(text):
        raise SensorError(f"{_shown(text)} is not here; cameras here: {here}.")
    if not os.access(text, os.R_OK | os.W_OK):
        raise SensorError(f"{_shown(text)} may not be opened by you; join its group: sudo usermod -aG video $USER, and "
                          "log in again.")  # fmt: skip
    return text


# -- FFmpeg ------------------------------------------------------------------------------------------------------------


def _fill(image: Any, layout: FrameLayout, out: Array) -> None:
    """An FFmpeg frame as ``layout`` says: converted and scaled in one pass, then copied without FFmpeg's padding."""
    made = image.reformat(width=layout.width, height=layout.height, format=_AV_FORMAT[layout.format])
    plane = made.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    np.copyto(out.reshape(layout.height, -1), rows[:, : out.nbytes // layout.height])


def _open_av(url: str, settings: Any, **more: Any) -> tuple[Any, Any]:
    """FFmpeg's container and its first video stream. Raises SensorError."""
    import av

    try:
        container = av.open(url, **more)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise SensorError(f"{_shown(url)} cannot be opened: {_why(error)}.") from error
    if not container.streams.video:
        container.close()
        raise SensorError(f"{_shown(url)} has no video in it.")
    stream = container.streams.video[0]
    if settings.encoding == "native" and stream.codec_context.name != "mjpeg":
        container.close()
        raise SensorError(
            f"{_shown(url)} sends {stream.codec_context.name}, no JPEG files that could be passed on; "
            "use `encoding: jpeg`."
        )
    return container, stream


def _why(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "it does not answer in time" if "exit" in text.lower() else str(text)


class _File:
    """A video file, played at its own pace. Ends with EOFError."""

    def __init__(self, path: Path, settings: Any, context: SourceContext) -> None:
        self.dropped = 0
        self._clock = context.clock
        self._container, stream = _open_av(str(path), settings)
        stream.thread_type = "AUTO"
        self.size = (stream.codec_context.width, stream.codec_context.height)
        self._native = settings.encoding == "native"
        self._frames = self._pictures(stream)
        self._period_ns = round(_NS / (stream.average_rate or 25))
        self._next: Any = None
        self._begin_ns: int | None = None
        self._stamp_ns = 0

    def _pictures(self, stream: Any) -> Iterator[tuple[int | None, Any]]:
        """Every picture with its stamp in ns."""
        if self._native:
            for packet in self._container.demux(stream):
                if packet.size:
                    yield _stamp(packet), bytes(packet)
            return
        for frame in self._container.decode(stream):
            yield _stamp(frame), frame

    def shot(self) -> Shot | None:
        import av

        now = self._clock.now_ns()
        if self._next is None:
            try:
                stamp, image = next(self._frames)
            except StopIteration:
                raise EOFError from None
            except av.error.FFmpegError as error:
                raise SensorError(f"the file {self._container.name} is damaged: {_why(error)}.") from error
            self._stamp_ns = self._stamp_ns + self._period_ns if stamp is None else stamp
            if self._begin_ns is None:
                self._begin_ns = now - self._stamp_ns
            self._next = image
        assert self._begin_ns is not None
        due = self._begin_ns + self._stamp_ns
        if due > now and not (self._clock.wait_until(min(due, now + _WAIT_NS)) and self._clock.now_ns() >= due):
            return None
        image, self._next = self._next, None
        now = self._clock.now_ns()
        return Shot(t_capture_ns=due, t_receipt_ns=now, t_device_ns=self._stamp_ns, late_ns=now - due, image=image)

    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None:
        _fill(shot.image, layout, out)

    def jpeg(self, shot: Shot) -> Array:
        return np.frombuffer(shot.image, np.uint8)

    def close(self) -> None:
        self._container.close()


def _stamp(of: Any) -> int | None:
    """The stamp of a packet or a frame in ns on its stream's clock."""
    return None if of.pts is None else int(of.pts * of.time_base * _NS)


class _Network:
    """RTSP, or MJPEG over HTTP. A thread receives and decodes, because FFmpeg blocks; the newest frames are kept."""

    def __init__(self, url: str, settings: Any, context: SourceContext) -> None:
        self.dropped = 0
        self.size = (0, 0)
        self._url, self._settings, self._context = url, settings, context
        self._native = settings.encoding == "native"
        zero = host_zero(context.clock)
        self._times = FrameClock(zero.unix_ns, round(settings.sender_error_ms * _MS),
                                 round(settings.arrival_error_ms * _MS))  # fmt: skip
        self._shots: deque[Shot] = deque()
        self._changed = threading.Condition()
        self._error: SensorError | None = None
        self._stopped = self._opened = False
        self._came_ns = self._rush_ns = 0
        self._usual_ns = float(_PERIOD_NS)
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._opened or self._error is not None, _OPEN_S + 1)
            if self._error is not None or not self._opened:
                self._stopped = True
                raise self._error or SensorError(f"{_shown(url)} does not answer.")

    def shot(self) -> Shot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._shots or self._error, _WAIT_NS / _NS)
            if self._shots:
                return self._shots.popleft()
            if self._error is not None:
                raise self._error
            return None

    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None:
        _fill(shot.image, layout, out)

    def jpeg(self, shot: Shot) -> Array:
        return np.frombuffer(shot.image, np.uint8)

    def close(self) -> None:
        self._stopped = True
        self._thread.join(_WAIT_NS / _NS)  # it ends by itself at the driver's time limit at the latest

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._receive()
            error = SensorError(f"{_shown(self._url)}: the stream ended; its server was stopped.")
        except SensorError as failed:
            error = failed
        except Exception as failed:  # FFmpeg's errors are of many kinds; all of them mean the same here
            error = SensorError(f"{_shown(self._url)} fails: {_why(failed)}.")
        with self._changed:
            self._error = error
            self._changed.notify()

    def _receive(self) -> None:
        import av

        options = {"fflags": "nobuffer", "analyzeduration": "500000"}
        if self._url.startswith("rtsp"):
            options |= {"rtsp_transport": self._settings.rtsp_transport, "max_delay": "100000"}
        limits = (_OPEN_S, self._settings.timeout_ms / 1000)
        container, stream = _open_av(self._url, self._settings, options=options, timeout=limits)
        corrupt = 0
        with container:
            stream.codec_context.flags |= av.codec.context.Flags.low_delay
            stream.thread_type = "SLICE"
            for packet in container.demux(stream):
                if self._stopped:
                    return
                if not packet.size:
                    continue
                receipt = self._context.clock.now_ns()
                try:
                    self._take(packet, receipt)
                    corrupt = 0
                except av.error.InvalidDataError:  # before the first key frame, or after a loss
                    corrupt += 1
                    if corrupt > _CORRUPT:
                        raise

    def _take(self, packet: Any, receipt_ns: int) -> None:
        """Decodes a packet; low-delay decoding gives its picture at once, or (B-frames) an older one's."""
        sender = next((prft_unix_ns(bytes(d)) for d in packet.iter_sidedata() if d.data_type == "prft"), None)
        if self._native:
            self._put(packet, bytes(packet), sender, receipt_ns)
            return
        mine = _stamp(packet)
        for frame in packet.decode():
            stamp = _stamp(frame)
            # The sender's clock and RTP time run together, so that an older picture is as much older on both.
            moved = 0 if stamp is None or mine is None else stamp - mine
            self._put(frame, frame, None if sender is None else sender + moved, receipt_ns)

    def _put(self, stamped: Any, image: Any, sender_ns: int | None, receipt_ns: int) -> None:
        stamp = _stamp(stamped) if self._url.startswith("rtsp") else None
        moment = self._times.update(stamp, sender_ns, receipt_ns)
        late = self._rush(receipt_ns) if moment.by == "arrival" else moment.late_ns
        shot = Shot(
            t_capture_ns=moment.t_capture_ns, t_receipt_ns=receipt_ns, t_device_ns=sender_ns or stamp,
            uncertainty_ns=moment.uncertainty_ns, new_epoch=moment.new_epoch, late_ns=late,
            image=image,
        )  # fmt: skip
        with self._changed:
            if not self._opened:
                layout = stamped.stream.codec_context if self._native else stamped
                self.size, self._opened = (layout.width, layout.height), True
            self._shots.append(shot)
            while len(self._shots) > _KEPT:
                self._shots.popleft()
                self.dropped += 1
            self._changed.notify()

    def _rush(self, receipt_ns: int) -> int:
        """How old a frame without any clock may be: what comes in a rush after a stall is as old as the stall."""
        gap = receipt_ns - self._came_ns if self._came_ns else 0
        self._came_ns = receipt_ns
        if gap > self._settings.max_age_ms * _MS:
            self._rush_ns = gap
        elif gap > self._usual_ns / 3:
            self._rush_ns = 0
            self._usual_ns += (gap - self._usual_ns) / 16
        return self._rush_ns
