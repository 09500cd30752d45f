"""What flows: a header, and one contiguous buffer whose layout the header states.

The envelope is apart from the payload: an aligner that places frames in time reads headers and never touches a pixel,
and the same payload bytes travel through a socket, a shared-memory slot and a recording. Nobody re-stamps a message.

Layouts (little endian, C order, one buffer):

========= ================================================== ====================================================
payload   buffer                                             view given by ``array(message)``
========= ================================================== ====================================================
frame     ``bgr8``, ``rgb8``: u1 [height, width, 3]          the same
          ``gray8``: u1 [height, width]                      the same
          ``jpeg``: a JPEG file                              u1 [bytes]; ``pipeline.wire.decode_frame`` gives BGR
audio     i2 [samples, channels]                             the same
imu       ``IMU_DTYPE`` [samples]                            the same; m/s^2 and rad/s, NaN where not measured
signal    ``signal_dtype(c)`` [samples]                      the same
sweep     ``POINT_DTYPE`` [points]                           the same; metres, sensor frame x forward y left z up
text      UTF-8                                              u1 [bytes]
========= ================================================== ====================================================
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import msgspec
import numpy as np

IMU_DTYPE = np.dtype([("offset_ns", "<i8"), ("accel", "<f4", 3), ("gyro", "<f4", 3)])
"""One IMU sample: time after ``t_capture_ns`` (>= 0, not decreasing), acceleration in m/s^2, angular rate in rad/s."""

POINT_DTYPE = np.dtype([("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("intensity", "<f4"), ("offset_ns", "<i4")])
"""One LiDAR point: metres, intensity as the sensor scales it, time relative to the sweep's end (<= 0)."""


def signal_dtype(channels: int) -> np.dtype[Any]:
    """One sample of a signal of ``channels`` values: time after ``t_capture_ns`` in ns, and the values."""
    return np.dtype([("offset_ns", "<i8"), ("value", "<f4", (channels,))])


class FrameLayout(msgspec.Struct, frozen=True, gc=False, tag="frame"):
    """A camera frame."""

    format: Literal["bgr8", "rgb8", "gray8", "jpeg"]
    height: int
    width: int


class AudioLayout(msgspec.Struct, frozen=True, gc=False, tag="audio"):
    """A block of PCM; ``rate_hz`` is the nominal rate, the header's stamps give the measured one."""

    rate_hz: int
    channels: int
    samples: int


class ImuLayout(msgspec.Struct, frozen=True, gc=False, tag="imu"):
    """A batch of accelerometer and gyroscope samples."""

    samples: int


class SignalLayout(msgspec.Struct, frozen=True, gc=False, tag="signal"):
    """A batch of samples of named channels: a skeleton, an EEG, wheel speeds."""

    samples: int
    channels: tuple[str, ...]


class SweepLayout(msgspec.Struct, frozen=True, gc=False, tag="sweep"):
    """One LiDAR sweep."""

    points: int


class TextLayout(msgspec.Struct, frozen=True, gc=False, tag="text"):
    """One line of text."""

    bytes: int


Layout = FrameLayout | AudioLayout | ImuLayout | SignalLayout | SweepLayout | TextLayout
Payload = Literal["frame", "audio", "imu", "signal", "sweep", "text"]
PAYLOADS: tuple[Payload, ...] = ("frame", "audio", "imu", "signal", "sweep", "text")

_IMU_BYTES, _POINT_BYTES = IMU_DTYPE.itemsize, POINT_DTYPE.itemsize
_NAMES: dict[type[Any], Payload] = {layout: layout.__struct_config__.tag for layout in get_args(Layout)}
_BYTES: dict[type[Any], Callable[[Any], int | None]] = {
    FrameLayout: lambda f: None if f.format == "jpeg" else f.height * f.width * (1 if f.format == "gray8" else 3),
    AudioLayout: lambda audio: 2 * audio.channels * audio.samples,
    ImuLayout: lambda imu: _IMU_BYTES * imu.samples,
    SignalLayout: lambda signal: (8 + 4 * len(signal.channels)) * signal.samples,
    SweepLayout: lambda sweep: _POINT_BYTES * sweep.points,
    TextLayout: lambda text: text.bytes,
}
"""What is asked of every message's layout, by one look-up."""


class Header(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """The envelope of a message, or a whole beat (``layout`` is None). All times int64 ns on the session clock.

    ``seq`` counts the messages of an epoch from 0. A beat takes no number of its own: it states the number of the
    message to come, which shows a lost tail at once. ``t_device_ns`` is the device's own stamp, raw, on whatever clock
    the device has; ``t_receipt_ns`` is when the host first saw the data; ``t_capture_ns`` the best estimate of the
    physical moment, computed from them, good to ``uncertainty_ns`` (about 99 %). ``bound_ns`` promises that no later
    message of this epoch has a capture time below it.
    """

    stream: str
    seq: int
    epoch: int
    t_capture_ns: int
    t_end_ns: int
    bound_ns: int
    t_receipt_ns: int
    t_device_ns: int | None = None
    uncertainty_ns: int = 0
    layout: Layout | None = None
    health: str = ""
    """In a beat: what the source is waiting for or suffers from, in words; empty when all is well."""

    @property
    def is_beat(self) -> bool:
        return self.layout is None


class Message(msgspec.Struct, frozen=True, gc=False):
    """A header and its payload buffer (bytes, memoryview or C-contiguous array); ``data`` is None in a beat, and in a
    message whose payload the holder does not need (an aligner that places frames)."""

    header: Header
    data: Any = None


def payload_of(layout: Layout) -> Payload:
    """The payload type's name."""
    return _NAMES[type(layout)]


def nbytes_of(layout: Layout) -> int | None:
    """The exact size of a payload of this layout in bytes; None for a compressed frame, whose size varies."""
    return _BYTES[type(layout)](layout)


def form_of(layout: Layout) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of the array that ``view`` gives; the size of a compressed frame, which varies, is -1."""
    match layout:
        case FrameLayout(format="jpeg"):
            return np.dtype("u1"), (-1,)
        case FrameLayout(format="gray8", height=h, width=w):
            return np.dtype("u1"), (h, w)
        case FrameLayout(height=h, width=w):
            return np.dtype("u1"), (h, w, 3)
        case AudioLayout(channels=c, samples=n):
            return np.dtype("<i2"), (n, c)
        case ImuLayout(samples=n):
            return IMU_DTYPE, (n,)
        case SignalLayout(samples=n, channels=names):
            return signal_dtype(len(names)), (n,)
        case SweepLayout(points=n):
            return POINT_DTYPE, (n,)
        case TextLayout(bytes=n):
            return np.dtype("u1"), (n,)


def view(layout: Layout, data: Any) -> np.ndarray[Any, Any]:
    """The buffer ``data`` as the array that ``layout`` describes, without a copy unless it is an array with steps.
    ValueError if the size is wrong."""
    raw = np.frombuffer(data, np.uint8) if not isinstance(data, np.ndarray) else flat(data)
    expected = nbytes_of(layout)
    if expected is not None and raw.nbytes != expected:
        raise ValueError(f"the payload has {raw.nbytes} bytes where its layout {layout} needs {expected}")
    dtype, shape = form_of(layout)
    return raw.view(dtype).reshape(shape)


def flat(data: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The bytes of an array, u1 [nbytes]; a copy only of one that does not lie in one piece."""
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)


def array(message: Message) -> np.ndarray[Any, Any]:
    """The payload of ``message`` as the array that its header describes (a view; see the table above)."""
    if message.header.layout is None or message.data is None:
        raise ValueError(f"message {message.header.stream}/{message.header.seq} carries no payload")
    return view(message.header.layout, message.data)


def wrong_data(layout: Layout, data: Any) -> str | None:
    """What is wrong with ``data`` as a payload of ``layout``. Plain bytes may be anything of the right size; an array
    says what it is, and one that only has the right size would be taken for something else."""
    if not isinstance(data, np.ndarray | bytes | bytearray | memoryview):
        return f"data of the type `{type(data).__name__}`, where data are an array or bytes"
    size = nbytes_of(layout)
    if isinstance(data, np.ndarray):
        dtype, shape = form_of(layout)
        if data.dtype == dtype and (size is None or data.shape == shape):
            return None
        plain = data.dtype == np.uint8 and data.ndim == 1
        shaped = plain or (data.dtype == dtype and (data.ndim == 1 or _long(data.shape) == _long(shape)))
        if shaped and data.nbytes == size:
            return None
        found = f"an array {data.dtype if data.dtype.names is None else 'of a structured type'} {list(data.shape)}"
        return f"{found} as data, where its layout {layout} needs {_type_name(layout, dtype)} {list(shape)}"
    nbytes = memoryview(data).nbytes
    return None if size is None or nbytes == size else f"{nbytes} bytes of data, where its layout {layout} needs {size}"


def _long(shape: tuple[int, ...]) -> list[int]:
    """The lengths that are not 1, which alone decide how a buffer is read."""
    return [n for n in shape if n != 1]


def _type_name(layout: Layout, dtype: np.dtype[Any]) -> str:
    if isinstance(layout, SignalLayout):
        return f"signal_dtype({len(layout.channels)})"
    return "IMU_DTYPE" if dtype == IMU_DTYPE else "POINT_DTYPE" if dtype == POINT_DTYPE else str(dtype)
