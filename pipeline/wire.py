"""Bytes on a socket: headers as msgpack, payloads as they are, nothing ever unpickled.

A message is multipart ``[stream, header, payload]``; a beat is ``[stream, header]``. Where the payload lies in a
shared-memory slot the third part is a ``Slot`` instead, told apart by the flag that the header part carries in its
first byte (``INLINE`` or ``SLOT``), so that a header's msgpack is the same bytes on every path and in a recording.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np

from pipeline.errors import WireError
from pipeline.messages import (
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    array,
    nbytes_of,
)

_LIMIT = 1 << 62
"""146 years in ns: beyond it arithmetic in int64 is not safe, and no honest clock gets there."""

LARGEST = 1 << 30
"""No number of a layout is greater: a row of so many pixels still has fewer bytes than 32 bits can count."""

INLINE, SLOT = b"\x00", b"\x01"


class Slot(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """Where in shared memory a payload lies: segment name, slot index, generation of its content, length in bytes."""

    segment: str
    index: int
    generation: int
    length: int


_encoder = msgspec.msgpack.Encoder()
_header = msgspec.msgpack.Decoder(Header)
_slot = msgspec.msgpack.Decoder(Slot)


def encode_header(header: Header) -> bytes:
    """The header as msgpack."""
    return _encoder.encode(header)


def decode_header(data: Any) -> Header:
    """The header in ``data``, checked: types, times that do not contradict each other, and a layout that something can
    have. Raises WireError."""
    try:
        header = _header.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise WireError(f"a message header is not valid msgpack of a Sensorium header: {error}") from None
    times = (header.t_capture_ns, header.t_end_ns, header.bound_ns, header.epoch, header.t_receipt_ns)
    if max(*times, header.uncertainty_ns) >= _LIMIT or min(times) <= -_LIMIT or not 0 <= header.seq < _LIMIT:
        raise WireError(f"header {header.stream}/{header.seq} states a time or number beyond 2^62: {times}")
    if header.t_end_ns < header.t_capture_ns or header.uncertainty_ns < 0:
        raise WireError(
            f"header {header.stream}/{header.seq} contradicts itself: capture {header.t_capture_ns} ns, "
            f"end {header.t_end_ns} ns, uncertainty {header.uncertainty_ns} ns; end must not lie before capture"
        )
    if header.layout is not None and not _possible(header.layout):
        raise WireError(
            f"header {header.stream}/{header.seq} states the layout {header.layout}; its numbers must lie between 0 "
            "and 2^30, and pictures, rates and channels of sound must not be 0"
        )
    return header


def _possible(layout: Layout) -> bool:
    """Whether the numbers of ``layout`` are such as a payload can have, and every schema of a recording can state."""
    match layout:
        case FrameLayout(height=h, width=w):
            return 1 <= h <= LARGEST and 1 <= w <= LARGEST
        case AudioLayout(rate_hz=rate, channels=c, samples=n):
            return 1 <= rate <= LARGEST and 1 <= c <= LARGEST and 0 <= n <= LARGEST
        case ImuLayout(samples=n) | SignalLayout(samples=n) | SweepLayout(points=n) | TextLayout(bytes=n):
            return 0 <= n <= LARGEST


def encode_slot(slot: Slot) -> bytes:
    """A descriptor as msgpack."""
    return _encoder.encode(slot)


def decode_slot(data: Any) -> Slot:
    """The descriptor in ``data``. Raises WireError."""
    try:
        return _slot.decode(data)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise WireError(f"a shared-memory descriptor is damaged: {error}") from None


def check_payload(header: Header, nbytes: int) -> None:
    """Raises WireError unless a payload of ``nbytes`` bytes fits what ``header`` says."""
    expected = nbytes_of(header.layout) if header.layout is not None else 0
    if expected is not None and nbytes != expected:
        raise WireError(
            f"message {header.stream}/{header.seq} has a payload of {nbytes} bytes where its header says {expected}"
        )


def decode_frame(message: Message) -> np.ndarray[Any, Any]:
    """A frame as BGR u1 [height, width, 3] (gray8: repeated), decompressed if need be. Raises WireError."""
    layout = message.header.layout
    if not isinstance(layout, FrameLayout):
        raise WireError(f"message {message.header.stream}/{message.header.seq} is no frame")
    pixels = array(message)
    if layout.format == "jpeg":
        import cv2  # only where something is decoded: it would double the time that a node takes to start

        try:
            decoded = cv2.imdecode(pixels, cv2.IMREAD_COLOR)
        except cv2.error:
            decoded = None
        if decoded is None:
            raise WireError(f"frame {message.header.stream}/{message.header.seq} is no readable JPEG")
        return decoded
    if layout.format == "rgb8":
        return np.ascontiguousarray(pixels[..., ::-1])
    if layout.format == "gray8":
        return np.repeat(pixels[..., None], 3, axis=2)
    return pixels
