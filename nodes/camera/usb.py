"""A camera on USB or on the board, through V4L2."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from nodes.camera.shots import MS, NS, OPEN_S, WAIT_NS, Array, Shot, shown
from pipeline.devices import refusal
from pipeline.errors import SensorError
from pipeline.hosttime import DriverStamps, host_zero
from pipeline.messages import FrameLayout
from pipeline.protocols import v4l2
from pipeline.source import Found, SourceContext

_CV_FORMAT = {"rgb8": cv2.COLOR_BGR2RGB, "gray8": cv2.COLOR_BGR2GRAY}


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


def found_at(path: Path, name: str, names: list[str]) -> Found:
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


class Usb:
    """A V4L2 camera through OpenCV (elsewhere than on Linux: whatever camera OpenCV knows by this number, with the
    receipt for its time). OpenCV starts and takes a frame in ``waitAny``, which has a limit; ``read`` has none."""

    def __init__(self, device: int | str, settings: Any, context: SourceContext) -> None:
        self.dropped = 0
        self._settings, self._clock = settings, context.clock
        self._stamps = DriverStamps(host_zero(context.clock))
        self._linux = sys.platform == "linux"
        self._name = find_usb(device) if self._linux else device
        self._capture = cv2.VideoCapture(self._name, cv2.CAP_V4L2 if self._linux else cv2.CAP_ANY)
        try:
            self._configure()
            self._wait(round(OPEN_S * NS))
        except SensorError:
            self.close()
            raise
        self._check_start()

    def shot(self) -> Shot | None:
        begun = self._clock.now_ns()
        if not self._wait(WAIT_NS):
            self._clock.wait_until(begun + WAIT_NS)  # a driver in trouble may say at once that there is no frame
            return None
        now = self._clock.now_ns()
        stamp = round(self._capture.get(cv2.CAP_PROP_POS_MSEC) * 1e6)
        capture = self._stamps.session_ns(stamp, now)
        if capture is None:
            return Shot(t_capture_ns=now, t_receipt_ns=now, uncertainty_ns=round(self._settings.arrival_error_ms * MS))
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
            raise SensorError(f"{shown(self._name)} cannot be opened: another program uses it, or it is no camera.")
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
                f"{shown(self._name)} does not give the pixel format {wanted} but {given}; "
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
                f"{shown(self._name)} states a picture of {self.size}; it is no camera that gives frames."
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
            raise SensorError(f"{shown(self._name)} fails: unplugged, or taken by another program.") from error

    def _retrieve(self, out: Array | None) -> Array:
        ok, frame = self._capture.retrieve(out) if out is not None else self._capture.retrieve()
        if not ok or frame is None:
            raise SensorError(f"{shown(self._name)} gave a frame that cannot be decoded.")
        result: Array = frame
        return result


def usb_absence(device: int | str) -> str:
    """Why a camera given by number, path or part of a name cannot be opened, if that can be seen."""
    if sys.platform != "linux":
        return ""
    try:
        find_usb(device)
    except SensorError as error:
        return str(error)
    return ""


def find_usb(device: int | str) -> str:
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
        raise SensorError(f"{shown(text)} is not here; cameras here: {here}.")
    if not os.access(text, os.R_OK | os.W_OK):
        raise SensorError(f"{shown(text)} may not be opened by you; join its group: sudo usermod -aG video $USER, and "
                          "log in again.")  # fmt: skip
    return text
