"""Foreign pictures as frames: raw pixels in the encodings that cameras and ROS use, and compressed files.

A JPEG keeps its bytes, so that nothing is compressed twice; everything else is decoded and compressed as asked. Depth
(``16UC1``, ``32FC1``) is no picture, and no frame format holds it.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from pipeline.importing.base import ImportOptions
from pipeline.messages import FrameLayout

Array = np.ndarray[Any, Any]

_PLAIN = {"mono8": 1, "8uc1": 1, "bgr8": 3, "8uc3": 3, "rgb8": 3, "bgra8": 4, "8uc4": 4, "rgba8": 4}
_TO_BGR = {"rgb8": cv2.COLOR_RGB2BGR, "bgra8": cv2.COLOR_BGRA2BGR, "8uc4": cv2.COLOR_BGRA2BGR,
           "rgba8": cv2.COLOR_RGBA2BGR}  # fmt: skip
_YUV = {
    **dict.fromkeys(("yuv422", "uyvy", "yuv422_uyvy"), cv2.COLOR_YUV2BGR_UYVY),
    **dict.fromkeys(("yuyv", "yuv422_yuy2", "yuy2"), cv2.COLOR_YUV2BGR_YUYV),
}
# ROS names the first row's two pixels and the second's, as these names of OpenCV do.
_BAYER = {
    "bayer_rggb": cv2.COLOR_BayerRGGB2BGR,
    "bayer_bggr": cv2.COLOR_BayerBGGR2BGR,
    "bayer_gbrg": cv2.COLOR_BayerGBRG2BGR,
    "bayer_grbg": cv2.COLOR_BayerGRBG2BGR,
}
_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LONE_MARKERS = frozenset(range(0xD0, 0xDA)) | {0x01}


class Unusable(ValueError):
    """What cannot be taken over of a message, in words that follow "messages of X: "."""


def pixels(data: Any, encoding: str, height: int, width: int, step: int, big_endian: bool) -> Array:
    """BGR u1 [height, width, 3], or gray u1 [height, width], of raw pixels whose rows are ``step`` bytes apart.
    Unusable if the encoding is unknown, or the data too short for it."""
    name = encoding.strip().lower()
    if name in _PLAIN:
        image = _rows(data, height, width * _PLAIN[name], step).reshape(height, width, _PLAIN[name])
        return _bgr(image, name)
    if name in ("mono16", *(f"{bayer}16" for bayer in _BAYER)):
        words = np.ascontiguousarray(_rows(data, height, 2 * width, step)).view(">u2" if big_endian else "<u2")
        image = (words >> 8).astype(np.uint8)
        return image if name == "mono16" else _converted(image, _BAYER[name[:-2]])
    if name.removesuffix("8") in _BAYER:
        return _converted(_rows(data, height, width, step), _BAYER[name.removesuffix("8")])
    if name in _YUV:
        return _converted(_rows(data, height, 2 * width, step).reshape(height, width, 2), _YUV[name])
    if name in ("16uc1", "32fc1", "16sc1", "64fc1"):
        raise Unusable(f"encoded as {encoding}: depth is no picture, and there is no payload for it yet")
    raise Unusable(f"encoded as {encoding!r}, which is not known here")


def _rows(data: Any, height: int, row: int, step: int) -> Array:
    step = step or row
    raw = np.frombuffer(data, np.uint8)
    if height < 1 or row < 1 or step < row or len(raw) < step * (height - 1) + row:
        raise Unusable(f"{len(raw)} bytes are no picture of {height} rows of {row} bytes every {step}")
    whole = np.zeros(step * height, np.uint8) if len(raw) < step * height else raw
    if whole is not raw:  # the padding of the last row may be absent
        whole[: len(raw)] = raw
    return whole[: step * height].reshape(height, step)[:, :row]


def _bgr(image: Array, name: str) -> Array:
    if image.shape[2] == 1:
        return np.ascontiguousarray(image[..., 0])
    return _converted(image, _TO_BGR[name]) if name in _TO_BGR else np.ascontiguousarray(image)


def _converted(image: Array, code: int) -> Array:
    try:
        return cv2.cvtColor(np.ascontiguousarray(image), code)
    except cv2.error as error:  # an odd width, a picture of one row
        raise Unusable(f"a picture of {image.shape[1]} x {image.shape[0]} cannot be converted") from error


def frame(image: Array, options: ImportOptions) -> tuple[FrameLayout, Array]:
    """Layout and payload of a picture, scaled and compressed as asked."""
    height, width = image.shape[:2]
    if options.max_width is not None and width > options.max_width:
        height, width = max(1, round(height * options.max_width / width)), options.max_width
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if options.jpeg_quality is None:
        return FrameLayout("gray8" if image.ndim == 2 else "bgr8", height, width), np.ascontiguousarray(image)
    try:
        packed = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, options.jpeg_quality])[1]
    except cv2.error:  # JPEG ends at 65535 pixels
        raise Unusable(f"a picture of {width} x {height} cannot be compressed as JPEG") from None
    return FrameLayout("jpeg", height, width), packed


def compressed_frame(data: bytes, options: ImportOptions) -> tuple[FrameLayout, Any]:
    """Layout and payload of a compressed picture (JPEG, PNG, what else OpenCV reads). Unusable if it is none.

    A JPEG is taken over as it is, if it need not be scaled and is not to be turned by its Exif data.
    """
    size = jpeg_size(data)
    as_it_is = size is not None and (options.max_width is None or size[1] <= options.max_width)
    if as_it_is and b"Exif\0" not in data[:65536]:
        # An eighth of the size costs little and tells whether anything can be seen.
        small = _decoded(data, cv2.IMREAD_REDUCED_GRAYSCALE_8)
        assert size is not None
        if small.shape == tuple(-(-side // 8) for side in size):
            return FrameLayout("jpeg", *size), data
    return frame(_decoded(data, cv2.IMREAD_COLOR), options)


def _decoded(data: bytes, how: int) -> Array:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), how) if len(data) else None
    except cv2.error:
        image = None
    if image is None:
        raise Unusable("the picture cannot be decoded")
    return image


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG's header states; None if it is no JPEG or cut off before."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _SIZE_MARKERS:
            return int.from_bytes(data[at + 5 : at + 7], "big"), int.from_bytes(data[at + 7 : at + 9], "big")
        fill = marker == 0xFF
        at += 1 if fill else 2 if marker in _LONE_MARKERS else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None
