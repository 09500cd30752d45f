"""How far a mouth moved between two frames, beyond what its head moved.

The face's box is cut from both frames at the same place and scaled to one size, and dense optical flow runs between
the two. An affine motion, fitted to the rigid upper face (brow to nose) and insensitive to blinks, is taken away from
all of it: it holds what the head's translation, turn and tilt do to a surface that is nearly flat. What is left in the
mouth's region is lip motion; what is left in the upper face is noise and the part of head motion that no affine map
holds, and its median, which a blink hardly moves, shows how much of the same to expect at the mouth. All in fractions
of the face's height, so that neither the camera's resolution nor the distance of the face matters.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

Array = np.ndarray[Any, Any]
Box = tuple[float, float, float, float]
"""x, y, width, height in pixels of the frame."""

SIDE = 96
"""Pixels of the normalised face: a mouth is then some 35 x 14, which a flow window of 13 resolves."""

_y, _x = (np.mgrid[0:SIDE, 0:SIDE].astype(np.float64) + 0.5) / SIDE
_UPPER = (_y > 0.15) & (_y < 0.62) & (_x > 0.15) & (_x < 0.85)
_MOUTH = (_y > 0.68) & (_y < 0.98) & (_x > 0.25) & (_x < 0.75)
_DESIGN = np.stack([np.ones(SIDE * SIDE), _x.ravel(), _y.ravel()], axis=1)


def cut(gray: Array, box: Box) -> Array:
    """The face in ``box`` as u1 [SIDE, SIDE]; pixels beyond the frame repeat its edge."""
    x, y, width, height = box
    if max(width, height) > 2 * SIDE:  # average before sampling, or fine texture would alias into motion
        gray = cv2.blur(gray, (max(1, int(width / SIDE)), max(1, int(height / SIDE))))
    sx, sy = width / SIDE, height / SIDE
    place = np.array([[sx, 0, x + sx / 2 - 0.5], [0, sy, y + sy / 2 - 0.5]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(gray, place, (SIDE, SIDE), flags=flags, borderMode=cv2.BORDER_REPLICATE)


def _without_head(flow: Array) -> Array:
    """The flow [SIDE, SIDE, 2] less the affine motion of its upper face (least squares, reweighted three times)."""
    design, moved = _DESIGN[_UPPER.ravel()], flow[_UPPER]
    weight = np.ones(len(design))
    for _ in range(3):
        weighted = design * weight[:, None]
        affine = np.linalg.lstsq(weighted, moved * weight[:, None], rcond=None)[0]
        left = np.linalg.norm(moved - design @ affine, axis=1)
        weight = 1.0 / (1.0 + (left / (np.median(left) + 1e-4)) ** 2)
    left_over: Array = flow - (_DESIGN @ affine).reshape(SIDE, SIDE, 2)
    return left_over


def mouth_motion(before: Array, now: Array, box: Box) -> tuple[float, float]:
    """(mouth, upper): rms displacement beyond the head's own, as a fraction of the face's height; the upper one from
    its median (1.2 times that is the rms of a Rayleigh distribution).

    ``before`` and ``now`` are grey frames of one size, u1 [height, width]; ``box`` is the face in ``now``.
    """
    flow: Array = np.zeros((SIDE, SIDE, 2), np.float32)
    flow = cv2.calcOpticalFlowFarneback(cut(before, box), cut(now, box), flow, 0.5, 3, 13, 3, 5, 1.1, 0)
    left = np.linalg.norm(_without_head(flow.astype(np.float64) / SIDE), axis=2)
    return float(np.sqrt((left[_MOUTH] ** 2).mean())), 1.2 * float(np.median(left[_UPPER]))
