"""The face expert: is a person's face in the picture, and does its mouth move?

Faces are found by OpenCV's cascade ``haarcascade_frontalface_alt2``, which ships inside the OpenCV wheel, on a picture
made small; ``tracks`` holds them, ``motion`` measures their mouths. A whole-frame search runs only now and then and
when no face is held; in between the cascade looks where the faces were.

Token, f4 [3]:

0. p_face: probability that at least one face is there.
1. p_mouth_moving: probability that the mouth of one of them moves as in speech, between this frame and the last.
2. known: the belief in the face that element 1 is about; 0 where nothing could be compared (first frame, the same
   frame again, a gap), and element 1 then means nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np

from pipeline.errors import BundleError
from pipeline.experts.motion import Box, mouth_motion
from pipeline.experts.tracks import Tracks
from pipeline.messages import Message
from pipeline.wire import decode_frame

Array = np.ndarray[Any, Any]
CASCADE = "haarcascade_frontalface_alt2.xml"
SCALES_ANYWHERE, SCALES_NEAR, NEIGHBOURS = 1.2, 1.1, 3
"""Steps between sizes: a whole frame at 1.2 costs half of 1.1 and lost no face; the fewer sizes near a known face
afford the finer steps, which place its box better."""
NO_FACE = 0.02
"""p_face where nothing is held: about one frame in fifty with a frontal face gets no hit at its first sight."""


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """All lengths are fractions or pixels of the picture the cascade sees; motion is in fractions of a face."""

    search_width_px: int = 320
    min_face_px: int = 36
    max_faces: int = 3
    search_every_steps: int = 5
    motion_width_px: int = 640
    min_gap_ms: float = 50
    max_gap_ms: float = 300
    """Two frames nearer or farther apart than this are not compared."""
    floor: float = 0.0025
    """Flow at a still mouth from noise alone (0.001 at sd 2 to 0.002 at sd 6 of 255) and from breath."""
    spill: float = 3.0
    """A head's uncompensated motion at the mouth, away from where it was fitted, over that above: 2.6 in the median of
    simulated turns and nods, below 3.8 in three quarters of their steps."""
    knee: float = 1.25
    """The mouth moves with even odds when it moves this many times what floor and spill explain."""
    slope: float = 5.0


def _settings(stream: str, settings: Mapping[str, Any]) -> Settings:
    try:
        return msgspec.convert(dict(settings), Settings)
    except msgspec.ValidationError as error:
        raise BundleError(
            f"the face expert of stream {stream!r} cannot use its settings: {error}; "
            f"allowed are {', '.join(Settings.__struct_fields__)}"
        ) from None


def _cascade() -> cv2.CascadeClassifier:
    folder = getattr(getattr(cv2, "data", None), "haarcascades", None)
    path = Path(folder or "") / CASCADE
    if folder is None or not hasattr(cv2, "CascadeClassifier") or not path.is_file():
        raise BundleError(
            f"the face expert needs {CASCADE}, which OpenCV {cv2.__version__} here does not bring; "
            "install opencv-python-headless >= 4.14, < 5"
        )
    return cv2.CascadeClassifier(str(path))


class Face:
    """See the module's text. Content: the frames of the step, of which the newest counts."""

    token = 3

    def __init__(self, stream: str, settings: Mapping[str, Any]) -> None:
        self._settings = _settings(stream, settings)
        self._cascade = _cascade()
        self.reset()

    def reset(self) -> None:
        self._tracks = Tracks(self._settings.max_faces)
        self._before: tuple[int, Array] | None = None
        self._until_search = 0

    def skip(self) -> None:
        self._tracks.wait()

    def encode(self, content: tuple[Message, ...], start_ns: int, end_ns: int) -> Array:
        """Raises WireError when the frame cannot be decoded; the state is then as it was."""
        gray = _narrow(cv2.cvtColor(decode_frame(content[-1]), cv2.COLOR_BGR2GRAY), self._settings.motion_width_px)
        self._tracks.update(self._find(gray))
        moving, known = self._motion(gray, content[-1].header.t_capture_ns)
        absent = float(np.prod([1 - track.belief for track in self._tracks.all])) * (1 - NO_FACE)
        return np.array([1 - absent, moving, known], np.float32)

    def _find(self, gray: Array) -> list[Box]:
        """Boxes in pixels of ``gray``: near the faces that are held, or anywhere."""
        small = _narrow(gray, self._settings.search_width_px)
        scale = gray.shape[1] / small.shape[1]
        held = [track for track in self._tracks.all if track.seen]
        if len(held) < len(self._tracks.all) or not held or self._until_search <= 0:
            self._until_search = self._settings.search_every_steps
            found = self._search(small, (0, 0), SCALES_ANYWHERE, self._settings.min_face_px, min(small.shape))
        else:
            found = [box for track in held for box in self._search_near(small, track.box, scale)]
        self._until_search -= 1
        return [(x * scale, y * scale, w * scale, h * scale) for x, y, w, h in found]

    def _search_near(self, small: Array, box: Box, scale: float) -> list[Box]:
        x, y, w, h = (v / scale for v in box)
        left, top = max(0, int(x - 0.4 * w)), max(0, int(y - 0.4 * h))
        part = small[top : int(y + 1.4 * h) + 1, left : int(x + 1.4 * w) + 1]
        return self._search(part, (left, top), SCALES_NEAR, int(0.75 * w), int(1.35 * w))[:1]

    def _search(self, image: Array, at: tuple[int, int], scales: float, smallest: int, largest: int) -> list[Box]:
        found = self._cascade.detectMultiScale(
            np.ascontiguousarray(image), scales, NEIGHBOURS, minSize=(smallest, smallest), maxSize=(largest, largest)
        )
        boxes = [(float(x + at[0]), float(y + at[1]), float(w), float(h)) for x, y, w, h in found]
        return sorted(boxes, key=lambda box: (-box[2], box))

    def _motion(self, gray: Array, captured_ns: int) -> tuple[float, float]:
        """(p_mouth_moving, known) of the face that moves its mouth most, weighed by the belief in it."""
        before, self._before = self._before, (captured_ns, gray)
        if before is None or before[1].shape != gray.shape:
            return 0.5, 0.0
        gap_ms = (captured_ns - before[0]) / 1e6
        if not self._settings.min_gap_ms <= gap_ms <= self._settings.max_gap_ms:
            return 0.5, 0.0
        seen = [(self._moving(before[1], gray, track.box), track.belief) for track in self._tracks.all]
        return max(seen, key=lambda pair: (pair[0] * pair[1], pair[1]), default=(0.5, 0.0))

    def _moving(self, before: Array, now: Array, box: Box) -> float:
        mouth, upper = mouth_motion(before, now, box)
        s = self._settings
        ratio = mouth / np.hypot(s.floor, s.spill * upper) / s.knee
        return float(ratio**s.slope / (1 + ratio**s.slope))


def _narrow(gray: Array, width: int) -> Array:
    """``gray`` at most ``width`` pixels wide, its shape kept, averaged over area."""
    if gray.shape[1] <= width:
        return gray
    return cv2.resize(gray, (width, max(1, round(gray.shape[0] * width / gray.shape[1]))), interpolation=cv2.INTER_AREA)
