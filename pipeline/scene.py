"""A small world with a known truth, seen by every kind of sensor: what the synthetic sources show.

Time is cut into periods; in each, four events (shake, tone, approach, flash) happen once, in an order and at moments
drawn from the seed, with calm between them. Every stream with the same seed and period sees the same events:

========  =====================================  ==========================  ==================  ====================
event     camera                                 microphone                  imu                 lidar
========  =====================================  ==========================  ==================  ====================
calm      dark grey, noise                       noise floor                 gravity, noise      a wall all round, 6 m
shake     the same                               a thump every 250 ms        8 Hz, 3 m/s^2       the same
tone      the same                               a tone of 1 kHz             the same            the same
approach  a bright square grows                  the same                    the same            something in front
                                                                                                 nears from 5 m to 1 m
flash     the whole frame flickers at 4 Hz       the same                    the same            the same
========  =====================================  ==========================  ==================  ====================

Everything is a pure function of the seed and of session time, so that a live camera, a test and a written recording
show the same world.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import msgspec
import numpy as np

from pipeline.messages import IMU_DTYPE, POINT_DTYPE, signal_dtype
from pipeline.resample import grid

Label = Literal["calm", "shake", "tone", "approach", "flash"]
LABELS: tuple[Label, ...] = ("calm", "shake", "tone", "approach", "flash")
SIGNAL_CHANNELS = ("x", "y", "reach")
GRAVITY = 9.80665
_NS = 1_000_000_000
_THUMP_NS, _THUMP_DECAY_S = _NS // 4, 0.012


class Happening(msgspec.Struct, frozen=True):
    """One event: what, and when [start_ns, end_ns) in session time."""

    label: Label
    start_ns: int
    end_ns: int


class Truth(msgspec.Struct, frozen=True):
    """What is the case at one moment; ``progress`` runs from 0 to 1 through an event and is 0 in calm."""

    label: Label
    progress: float = 0.0


@lru_cache(maxsize=64)
def happenings(period: int, seed: int, period_ns: int) -> tuple[Happening, ...]:
    """The four events of the ``period``-th period, in order."""
    rng = np.random.default_rng([seed, period])
    slot = period_ns // 4
    result = []
    for place, kind in enumerate(rng.permutation(4)):
        length = int(slot * rng.uniform(0.45, 0.6))
        start = period * period_ns + place * slot + int((slot - length) * rng.uniform(0.3, 0.8))
        result.append(Happening(LABELS[1 + int(kind)], start, start + length))
    return tuple(result)


def truth_at(t_ns: int, seed: int = 0, period_ns: int = 20 * _NS) -> Truth:
    """What is the case at session time ``t_ns``."""
    for event in happenings(t_ns // period_ns, seed, period_ns):
        if event.start_ns <= t_ns < event.end_ns:
            return Truth(event.label, (t_ns - event.start_ns) / (event.end_ns - event.start_ns))
    return Truth("calm")


class Scene:
    """The world of one seed. Each method gives one reading's content; ``index`` seeds its noise."""

    def __init__(self, seed: int = 0, period_ns: int = 20 * _NS) -> None:
        self.seed, self.period_ns = seed, period_ns
        self._grain: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def truth(self, t_ns: int) -> Truth:
        """What is the case at ``t_ns``."""
        return truth_at(t_ns, self.seed, self.period_ns)

    def frame(self, t_ns: int, index: int, out: np.ndarray[Any, Any]) -> None:
        """Draws the camera's view at ``t_ns`` into ``out``, u1 [height, width, 3] BGR."""
        height, width = out.shape[:2]
        truth = self.truth(t_ns)
        bright = truth.label == "flash" and (t_ns // (_NS // 8)) % 2 == 0
        # Fresh noise for every pixel costs more than all else; shifted strips of one field look as good.
        grain = self._noise(height, width)
        shift = self._rng(index, 1).integers(height)
        np.add(grain[shift : shift + height], np.uint8(170 if bright else 40), out=out)
        if truth.label == "approach":
            half = int(height * (0.04 + 0.28 * truth.progress))
            cy, cx = height // 2, width // 2
            out[cy - half : cy + half, max(0, cx - half) : cx + half] += np.uint8(180)

    def audio(self, start: int, samples: int, rate_hz: int, channels: int = 1) -> np.ndarray[Any, Any]:
        """Samples ``start`` to ``start + samples`` of the microphone, i2 [samples, channels]; sample 0 is at time 0."""
        t = grid(rate_hz, start, samples)
        rng = self._rng(start, 2)
        sound = rng.normal(0.0, 60.0, samples)
        label = np.array([self.truth(int(t[0])).label, self.truth(int(t[-1])).label])
        seconds = t / _NS
        if (label == "tone").any():
            sound += 5000.0 * np.sin(2 * np.pi * 1000.0 * seconds)
        if (label == "shake").any():
            since = (t % _THUMP_NS) / _NS
            sound += 9000.0 * np.exp(-since / _THUMP_DECAY_S) * rng.uniform(-1.0, 1.0, samples)
        return np.repeat(np.clip(sound, -32768, 32767).astype("<i2")[:, None], channels, axis=1)

    def imu(self, t_ns: np.ndarray[Any, Any], index: int) -> np.ndarray[Any, Any]:
        """Samples at the session times ``t_ns`` (i8, rising), ``IMU_DTYPE``: z is up, so gravity reads +g."""
        n = len(t_ns)
        rng = self._rng(index, 3)
        batch = np.zeros(n, IMU_DTYPE)
        batch["offset_ns"] = t_ns - t_ns[0]
        batch["accel"] = rng.normal(0.0, 0.03, (n, 3))
        batch["accel"][:, 2] += GRAVITY
        batch["gyro"] = rng.normal(0.0, 0.005, (n, 3))
        shaking = np.array([self.truth(int(t)).label == "shake" for t in t_ns])
        swing = np.sin(2 * np.pi * 8.0 * t_ns / _NS) * shaking
        batch["accel"][:, 0] += 3.0 * swing
        batch["gyro"][:, 2] += 0.5 * swing
        return batch

    def sweep(self, t_ns: int, index: int, points: int, turn_ns: int) -> np.ndarray[Any, Any]:
        """A sweep that ended at ``t_ns`` after ``turn_ns``: ``points`` in four rings, ``POINT_DTYPE``."""
        rng = self._rng(index, 4)
        i = np.arange(points)
        share = i / points
        azimuth = 2 * np.pi * ((share * 1.0 + 0.5) % 1.0)
        elevation = np.deg2rad(np.array([-6.0, -2.0, 2.0, 6.0]))[i % 4]
        distance = rng.normal(6.0, 0.02, points)
        intensity = rng.uniform(15.0, 25.0, points)
        truth = self.truth(t_ns)
        if truth.label == "approach":
            near = 5.0 - 4.0 * truth.progress
            half_angle = np.arctan2(0.4, near)
            front = np.abs((azimuth + np.pi) % (2 * np.pi) - np.pi) < half_angle
            distance[front] = rng.normal(near, 0.02, int(front.sum()))
            intensity[front] = rng.uniform(70.0, 90.0, int(front.sum()))
        cloud = np.empty(points, POINT_DTYPE)
        cloud["x"] = distance * np.cos(elevation) * np.cos(azimuth)
        cloud["y"] = distance * np.cos(elevation) * np.sin(azimuth)
        cloud["z"] = distance * np.sin(elevation)
        cloud["intensity"] = intensity
        cloud["offset_ns"] = -((1.0 - share) * turn_ns).astype("<i4")
        return cloud

    def signal(self, t_ns: np.ndarray[Any, Any], index: int) -> np.ndarray[Any, Any]:
        """A point that circles once in 2 s, ``SIGNAL_CHANNELS``: where it is, and how far it reaches, in metres."""
        batch = np.zeros(len(t_ns), signal_dtype(len(SIGNAL_CHANNELS)))
        batch["offset_ns"] = t_ns - t_ns[0]
        truths = [self.truth(int(t)) for t in t_ns]
        reach = np.array([1.0 + t.progress if t.label == "approach" else 1.0 for t in truths])
        angle = np.pi * t_ns / _NS
        value = np.stack([reach * np.cos(angle), reach * np.sin(angle), reach], axis=1)
        batch["value"] = value + self._rng(index, 5).normal(0.0, 0.01, value.shape)
        return batch

    def line(self, t_ns: int, index: int) -> bytes:
        """One line of text, UTF-8."""
        words = {"calm": "nothing happens", "shake": "the ground shakes", "tone": "a tone sounds",
                 "approach": "something comes nearer", "flash": "a light flashes"}  # fmt: skip
        return f"{index}: {words[self.truth(t_ns).label]}".encode()

    def _rng(self, index: int, salt: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, salt, index]))

    def _noise(self, height: int, width: int) -> np.ndarray[Any, Any]:
        key = (height, width)
        if key not in self._grain:
            rng = np.random.default_rng([self.seed, 0])
            self._grain[key] = rng.integers(0, 16, (2 * height, width, 3), np.uint8)
        return self._grain[key]
