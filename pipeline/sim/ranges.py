"""The worlds that sessions are drawn from: two named sets of ranges, one for training and one held out.

Every session draws each quantity once, uniformly. The held-out ranges are wider or lie elsewhere, so that a model that
has only learnt the training worlds by heart is found out.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

Name = Literal["train", "held-out"]
Range = tuple[float, float]


class Ranges(msgspec.Struct, frozen=True, kw_only=True):
    """From what each quantity of a world is drawn."""

    # light and looks
    sun: Range = (0.35, 0.75)
    ambient: Range = (0.25, 0.45)
    hue: Range = (0.0, 0.6)
    """Of scenery and clothes, in turns of the colour circle; a draw shifts all colours."""
    ground_grey: Range = (0.3, 0.6)
    gravel_contrast: Range = (0.25, 0.5)
    flash: Range = (0.6, 1.0)
    flash_hz: Range = (2.2, 3.2)
    exposure: Range = (0.85, 1.15)
    # bodies
    rover_kg: Range = (18.0, 26.0)
    ball_kg: Range = (1.5, 3.0)
    stone_m: Range = (0.012, 0.024)
    """How far the stones of rough ground stand out."""
    friction: Range = (0.8, 1.1)
    person_m: Range = (1.6, 1.95)
    list_deg: Range = (9.0, 15.0)
    """How far the rover tilts, and a mount slips."""
    # sounds; gains relative to a microphone's full scale at 1 m
    whine_hz: Range = (180.0, 320.0)
    whine: Range = (0.01, 0.03)
    siren_hz: Range = (600.0, 900.0)
    siren: Range = (0.1, 0.25)
    engine_hz: Range = (55.0, 90.0)
    steps: Range = (0.5, 0.9)
    crunch: Range = (0.7, 1.3)
    thud_hz: Range = (90.0, 170.0)
    music: Range = (0.0, 0.02)
    babble: Range = (0.0, 0.02)
    breeze: Range = (0.0, 0.01)
    hiss: Range = (0.002, 0.006)
    # sensors
    pixel_noise: Range = (2.0, 6.0)
    lidar_noise_m: Range = (0.008, 0.02)
    lidar_loss: Range = (0.0, 0.05)
    accel_noise: Range = (0.03, 0.08)
    gyro_noise: Range = (0.002, 0.006)
    accel_bias: Range = (-0.1, 0.1)
    # time
    delay_ms: Range = (5.0, 40.0)
    delay_jitter_ms: Range = (1.0, 10.0)
    drift_ppm: Range = (-60.0, 60.0)
    stamp_error_ms: Range = (-2.0, 2.0)
    """By how much a sensor's stated times are off, constant within a session."""


RANGES: dict[Name, Ranges] = {
    "train": Ranges(),
    "held-out": Ranges(
        sun=(0.3, 0.85), ambient=(0.2, 0.5), hue=(0.6, 1.0), ground_grey=(0.25, 0.65), gravel_contrast=(0.22, 0.5),
        flash=(0.5, 1.1), flash_hz=(2.0, 3.4), exposure=(0.75, 1.25), rover_kg=(16.0, 30.0), ball_kg=(1.3, 3.3),
        stone_m=(0.011, 0.026), friction=(0.75, 1.2), person_m=(1.5, 2.0), list_deg=(8.5, 16.0),
        whine_hz=(160.0, 350.0), whine=(0.01, 0.04), siren_hz=(550.0, 1000.0), siren=(0.08, 0.3),
        engine_hz=(50.0, 100.0), steps=(0.45, 1.0), crunch=(0.6, 1.4), thud_hz=(80.0, 190.0), music=(0.0, 0.03),
        babble=(0.0, 0.03), breeze=(0.0, 0.015), hiss=(0.002, 0.008), pixel_noise=(2.0, 8.0),
        lidar_noise_m=(0.006, 0.025), lidar_loss=(0.0, 0.1), accel_noise=(0.03, 0.1), gyro_noise=(0.002, 0.008),
        accel_bias=(-0.15, 0.15), delay_ms=(5.0, 60.0), delay_jitter_ms=(1.0, 15.0), drift_ppm=(-100.0, 100.0),
        stamp_error_ms=(-4.0, 4.0),
    ),
}  # fmt: skip


class Drawn(msgspec.Struct, frozen=True):
    """One world's quantities."""

    values: dict[str, float]

    def __getattr__(self, name: str) -> float:
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None


def draw(name: Name, seed: int) -> Drawn:
    """The world of a seed: the same for the same name and seed, everywhere."""
    rng = np.random.Generator(np.random.PCG64([seed, 1]))
    ranges: dict[str, Any] = msgspec.structs.asdict(RANGES[name])
    return Drawn({field: float(rng.uniform(*ranges[field])) for field in sorted(ranges)})
