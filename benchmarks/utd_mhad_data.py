"""UTD-MHAD as labelled sessions: one clip, one session, its streams joined by the real aligner.

UTD-MHAD (Chen, Jafari and Kehtarnavaz, "UTD-MHAD: a multimodal dataset for human action recognition utilizing a depth
camera and a wearable inertial sensor", ICIP 2015): 27 actions, 8 subjects, up to 4 trials, seen by a Kinect and by an
inertial sensor on the right wrist (actions 1 to 21) or the right thigh (22 to 27).

**Time.** The nominal rates of the two sensors contradict each other: frames / 30 is 0.635 times samples / 50 in the
median. Both saw the same event, so a sample is stamped by which fraction of the clip it stands at, over a span that is
the same for all clips (``SPAN_NS``). One hop of the window is the whole clip, and the aligner brings each stream to its
own fixed number of points by linear interpolation. So a clip's duration is not known to the model.

**Depth** is a signal made of each picture by itself (``depth_rows``): how much of the body is in each cell of a coarse
grid, seen from the front, from the side and from above, and how far away it is.

**Corruptions** happen to the samples before they are stamped, so that nothing downstream is told of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.learn.sessions import Made
from pipeline.messages import IMU_DTYPE, Header, ImuLayout, Layout, Message, SignalLayout, signal_dtype
from pipeline.recording import Label

Array = np.ndarray[Any, Any]
SPAN_NS = 3_200_000_000
_LAST_NS = SPAN_NS * 998 // 1000
"""Where a clip's last sample stands: within the hop, and at or behind the last point of every grid."""
BATCH = 16
"""Samples a message."""
GRAVITY = 9.80665
ACTIONS = (
    "swipe_left", "swipe_right", "wave", "clap", "throw", "arm_cross", "basketball_shoot", "draw_x",
    "draw_circle_cw", "draw_circle_ccw", "draw_triangle", "bowling", "boxing", "baseball_swing", "tennis_swing",
    "arm_curl", "tennis_serve", "push", "knock", "catch", "pickup_throw", "jog", "walk", "sit_to_stand",
    "stand_to_sit", "lunge", "squat",
)  # fmt: skip
JOINTS = (
    "head", "neck", "spine", "hip", "left_shoulder", "left_elbow", "left_wrist", "left_hand", "right_shoulder",
    "right_elbow", "right_wrist", "right_hand", "left_hip", "left_knee", "left_ankle", "left_foot", "right_hip",
    "right_knee", "right_ankle", "right_foot",
)  # fmt: skip
CELLS = (14, 16, 10)
"""Of the depth grid: across, down, away."""
FOCAL = 71.0
"""Of the depth pictures at 80 x 60, in pixels."""
WHERE = """\
UTD-MHAD is not part of this project and may not be redistributed. Get it from its authors
(https://personal.utdallas.edu/~kehtar/UTD-MHAD.html) and store it as two NumPy archives in one folder, which is the
argument of this script (it looked in {folder}):
  utd_mhad_inertial_skeleton.npz   ids [n, 3] (action, subject, trial), frames [n], samples [n],
                                   skeleton f4 [sum of frames, 20, 3] in metres,
                                   inertial f4 [sum of samples, 6] (acceleration in g, angular rate in deg/s)
  utd_mhad_depth_60x80_u16.npz     depth u2 [sum of frames, 60, 80] in mm, 0 where nobody is (only for depth)
all sequences concatenated in the order of ids."""


class Clip(NamedTuple):
    """One sequence: who did what, and each stream's rows, in the stream's own units."""

    action: int
    subject: int
    trial: int
    rows: dict[str, Array]

    @property
    def name(self) -> str:
        return f"a{self.action}_s{self.subject}_t{self.trial}"


def check_files(folder: Path, depth: bool) -> list[Path]:
    """The archives. SystemExit says where to get them if they are not there."""
    files = [folder / "utd_mhad_inertial_skeleton.npz"]
    files += [folder / "utd_mhad_depth_60x80_u16.npz"] if depth else []
    for file in files:
        if not file.is_file():
            raise SystemExit(f"{file} is not there.\n{WHERE.format(folder=folder)}")
    return files


def load_clips(folder: Path, depth: bool) -> list[Clip]:
    """All clips: ``skeleton`` [n, 60] in metres, ``inertial`` [n, 6] in m/s^2 and rad/s, and ``depth`` if asked.
    SystemExit as ``check_files``."""
    files = check_files(folder, depth)
    with np.load(files[0]) as data:
        ids, frames, samples = (data[key].astype(np.int64) for key in ("ids", "frames", "samples"))
        inertial = data["inertial"] * np.array([GRAVITY] * 3 + [np.pi / 180] * 3, np.float32)
        rows = {
            "skeleton": np.split(data["skeleton"].reshape(-1, 60), np.cumsum(frames)[:-1]),
            "inertial": np.split(inertial, np.cumsum(samples)[:-1]),
        }
    if depth:
        with np.load(files[1]) as data:
            seen = np.stack([depth_rows(picture) for picture in data["depth"]])
        rows["depth"] = np.split(seen, np.cumsum(frames)[:-1])
    return [
        Clip(*map(int, identity), {name: parts[i] for name, parts in rows.items()}) for i, identity in enumerate(ids)
    ]


def depth_rows(picture: Array) -> Array:
    """A depth picture u2 [60, 80] in mm as a row: where the body is relative to its median, in m^2 of surface (as a
    square root) in the cells of three views, its depth relative to the median in the front view, and the median
    itself in m. Zeros where nobody is seen."""
    across, down, away = CELLS
    front = across * down
    out = np.zeros(2 * front + down * away + away * across + 3, np.float32)
    v, u = np.nonzero(picture)
    if not len(u):
        return out
    z = picture[v, u] / 1000.0
    place = np.stack([(u - 39.5) * z / FOCAL, (v - 29.5) * z / FOCAL, z])
    centre = np.median(place, axis=1)
    x, y, depth = place - centre[:, None]
    area = (z / FOCAL) ** 2
    i = np.clip(((x + 1.05) / 2.1 * across).astype(int), 0, across - 1)
    j = np.clip(((y + 1.1) / 2.2 * down).astype(int), 0, down - 1)
    k = np.clip(((depth + 0.9) / 1.5 * away).astype(int), 0, away - 1)
    seen = np.bincount(j * across + i, area, front)
    out[:front] = np.sqrt(seen)
    out[front : 2 * front] = np.bincount(j * across + i, area * depth, front) / (seen + 0.003)
    side = np.bincount(j * away + k, area, down * away)
    above = np.bincount(k * across + i, area, away * across)
    out[2 * front :] = np.concatenate([np.sqrt(side), np.sqrt(above), centre])
    return out


def session(clip: Clip, streams: Sequence[str], change: Callable[[Clip, str], Array] | None = None) -> Made:
    """The clip as a session with the attribute ``subject``; ``change`` gives a stream's rows instead of its own."""
    messages: list[Message] = []
    for stream in streams:
        messages += _messages(stream, clip.rows[stream] if change is None else change(clip, stream))
    label = Label(0, SPAN_NS, ACTIONS[clip.action - 1])
    return Made(clip.name, messages, [label], {"subject": str(clip.subject)})


def _messages(stream: str, rows: Array) -> list[Message]:
    """The rows, stamped by fraction of the clip, in batches."""
    stamps = np.arange(len(rows), dtype=np.int64) * _LAST_NS // max(len(rows) - 1, 1)
    starts = range(0, len(rows), BATCH)
    return [_message(stream, seq, stamps[i : i + BATCH], rows[i : i + BATCH]) for seq, i in enumerate(starts)]


def _message(stream: str, seq: int, stamps: Array, rows: Array) -> Message:
    layout: Layout
    if stream == "inertial":
        layout, data = ImuLayout(len(rows)), np.zeros(len(rows), IMU_DTYPE)
        data["accel"], data["gyro"] = rows[:, :3], rows[:, 3:]
    else:
        names = [f"{joint}.{axis}" for joint in JOINTS for axis in "xyz"]
        names = names if stream == "skeleton" else [f"cell.{i}" for i in range(rows.shape[1])]
        layout, data = SignalLayout(len(rows), tuple(names)), np.zeros(len(rows), signal_dtype(rows.shape[1]))
        data["value"] = rows
    data["offset_ns"] = stamps - stamps[0]
    last = stamps[-1] >= _LAST_NS
    header = Header(
        stream=stream, seq=seq, epoch=0, t_capture_ns=int(stamps[0]), t_end_ns=int(stamps[-1]),
        bound_ns=SPAN_NS if last else int(stamps[-1]) + 1, t_receipt_ns=int(stamps[-1]), layout=layout,
    )  # fmt: skip
    return Message(header, data)


# -- undetected corruption ---------------------------------------------------------------------------------------------


class Corruption(NamedTuple):
    """What happens to streams without anybody saying so. ``kind``: ``noise`` (Gaussian, ``severity`` standard
    deviations of the channel over all clips), ``shift`` (everything is seen later by a share of the clip; the sensor
    stood still before, and the end is not seen), ``loss`` (that share of the samples is gone; the aligner interpolates
    over it), ``frozen`` (from a moment on, until the end, the same sample: that share of the clip)."""

    kind: str
    severity: float
    streams: tuple[str, ...]
    seed: int = 0


def corrupted(corruption: Corruption, scale: dict[str, Array]) -> Callable[[Clip, str], Array]:
    """What ``session`` takes as ``change``. ``scale`` is each stream's standard deviation by channel."""

    def change(clip: Clip, stream: str) -> Array:
        rows = clip.rows[stream]
        if stream not in corruption.streams or not corruption.severity:
            return rows
        seed = [corruption.seed, clip.action, clip.subject, clip.trial, len(stream)]
        return _CHANGES[corruption.kind](rows, corruption.severity, scale[stream], np.random.default_rng(seed))

    return change


def _noise(rows: Array, severity: float, scale: Array, rng: np.random.Generator) -> Array:
    noisy: Array = rows + severity * scale * rng.standard_normal(rows.shape, np.float32)
    return noisy


def _shift(rows: Array, severity: float, scale: Array, rng: np.random.Generator) -> Array:
    late = round(severity * len(rows))
    return np.concatenate([np.repeat(rows[:1], late, axis=0), rows[: len(rows) - late]])


def _loss(rows: Array, severity: float, scale: Array, rng: np.random.Generator) -> Array:
    """Lost samples lie on the straight line between their neighbours, which is what the aligner makes of the hole."""
    kept = np.flatnonzero(rng.random(len(rows)) >= severity)
    kept = np.unique(np.concatenate([[0], kept, [len(rows) - 1]]))
    at = np.arange(len(rows))
    return np.stack([np.interp(at, kept, rows[kept, c]) for c in range(rows.shape[1])], 1).astype(np.float32)


def _frozen(rows: Array, severity: float, scale: Array, rng: np.random.Generator) -> Array:
    first = len(rows) - round(severity * len(rows))
    held = rows.copy()
    held[first:] = rows[max(first - 1, 0)]
    return held


_CHANGES: dict[str, Callable[[Array, float, Array, np.random.Generator], Array]] = {
    "noise": _noise, "shift": _shift, "loss": _loss, "frozen": _frozen,
}  # fmt: skip
