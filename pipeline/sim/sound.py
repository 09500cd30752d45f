"""The microphone: what the world sounds like, made from its physics in blocks of 20 ms.

Strokes are struck where physics says so: a thud where the force of a contact rises, a grain where a wheel meets a
stone, a step. Each is a short wave drawn once per session and scaled by what struck it. Tones run on with their phase:
the wheels' whine follows their speed, the siren sweeps, an engine hums. Music, voices, a breeze and hiss belong to the
place and mean nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.sim.ranges import Drawn

Array = np.ndarray[Any, Any]
RATE_HZ = 16_000
BLOCK = 320
LOOP_S = 6
FULL_SCALE = 32767.0
GUST = 0.35
"""How loud the wind is that deafens; 1 is full scale."""


class Sound:
    """Gives block after block. ``strike`` says what will be heard, at most ``AHEAD`` samples ahead."""

    AHEAD = RATE_HZ

    def __init__(self, world: Drawn, seed: int) -> None:
        self._world = world
        self._rng = np.random.Generator(np.random.PCG64([seed, 8]))
        rng = self._rng
        n = LOOP_S * RATE_HZ
        self._white = rng.standard_normal(n).astype(np.float32)
        self._wind = _shaped(rng, n, lambda f: 1.0 / np.maximum(f, 40.0) ** 0.8)
        self._music, self._babble = _music(rng, n), _babble(rng, n)
        self._waves = {
            "thud": [_thud(rng, world.thud_hz * f) for f in (0.9, 1.0, 1.1)],
            "grain": [_grain(rng, 0.012, 1500.0) * world.crunch for _ in range(6)],
            "step": [_grain(rng, 0.05, 500.0) * world.steps for _ in range(4)],
        }
        self._tail = np.zeros(self.AHEAD + 2 * BLOCK, np.float32)
        self._at = 0
        """The first sample of the next block, which is also the first of the tail."""
        self._phase = {"whine": 0.0, "siren": 0.0, "engine": 0.0}
        self._level: dict[str, float] = {}

    def strike(self, kind: str, t_s: float, strength: float) -> None:
        """Adds a thud, grain or step that begins at ``t_s`` of the simulation (now, if that is past)."""
        wave = self._waves[kind][self._rng.integers(len(self._waves[kind]))]
        gain = {"thud": 0.9, "grain": 0.25, "step": 0.8}[kind] * min(strength, 1.5)
        start = min(max(round(t_s * RATE_HZ) - self._at, 0), len(self._tail) - 1)
        part = wave[: len(self._tail) - start]
        self._tail[start : start + len(part)] += part * np.float32(gain)

    def block(self, wheel_rad_s: float, siren: float, engine: float, wind: bool) -> Array:
        """The next 20 ms, i2 [BLOCK, 1]."""
        world, t = self._world, np.arange(BLOCK)
        speed = abs(wheel_rad_s) / 7.0
        out = self._tail[:BLOCK].copy()
        self._tail[:-BLOCK] = self._tail[BLOCK:]
        self._tail[-BLOCK:] = 0.0
        whine = self._turn("whine", np.full(BLOCK, world.whine_hz * (0.3 + speed)))
        out += self._faded("whine", world.whine * min(speed, 1.5)) * (np.sin(whine) + 0.4 * np.sin(2 * whine))
        if siren or self._level.get("siren"):
            sweep = 1.0 + 0.25 * np.sign(np.sin(2 * np.pi * 1.1 * (self._at + t) / RATE_HZ))
            phase = self._turn("siren", world.siren_hz * sweep)
            out += self._faded("siren", siren * world.siren) * (np.sin(phase) + 0.3 * np.sin(3 * phase))
        if engine or self._level.get("engine"):
            phase = self._turn("engine", np.full(BLOCK, world.engine_hz))
            hum = sum(np.sin(k * phase) / k**0.7 for k in range(1, 9))
            out += self._faded("engine", 0.35 * engine) * hum
        place = (self._at + t) % len(self._white)
        out += world.hiss * self._white[place] + world.music * self._music[place] + world.babble * self._babble[place]
        out += self._faded("wind", GUST if wind else world.breeze) * self._wind[place]
        if wind:
            out += 0.15 * self._white[place]
        self._at += BLOCK
        return (np.clip(out, -1.0, 1.0) * FULL_SCALE).astype("<i2")[:, None]

    def _turn(self, name: str, hz: Array) -> Array:
        """A tone's phase in this block, going on from the last."""
        phase: Array = self._phase[name] + 2 * np.pi * np.cumsum(hz) / RATE_HZ
        self._phase[name] = float(phase[-1] % (2 * np.pi))
        return phase

    def _faded(self, name: str, level: float) -> Array:
        """From the last block's level to this one's, so that nothing clicks."""
        before, self._level[name] = self._level.get(name, level), level
        return np.linspace(before, level, BLOCK)


def _shaped(rng: np.random.Generator, n: int, gain: Any) -> Array:
    """Noise with a spectrum, root mean square 1, that can be repeated end to end."""
    spectrum = np.fft.rfft(rng.standard_normal(n)) * gain(np.fft.rfftfreq(n, 1 / RATE_HZ))
    noise = np.fft.irfft(spectrum, n)
    return np.asarray(noise / noise.std(), np.float32)


def _thud(rng: np.random.Generator, hz: float) -> Array:
    """A box that was struck: a few damped modes and a click."""
    t = np.arange(int(0.3 * RATE_HZ)) / RATE_HZ
    wave = np.zeros(len(t))
    for k, ratio in enumerate((1.0, 1.59, 2.3, 3.6)):
        wave += np.sin(2 * np.pi * hz * ratio * t + rng.uniform(0, 0.5)) * np.exp(-t * (14 + 9 * k)) / (1 + k)
    wave += 0.5 * rng.standard_normal(len(t)) * np.exp(-t * 250)
    return np.asarray(wave / np.abs(wave).max(), np.float32)


def _grain(rng: np.random.Generator, length_s: float, hz: float) -> Array:
    """A short noise around a frequency, that falls off."""
    n = int(length_s * RATE_HZ * 3)
    noise = _shaped(rng, n, lambda f: np.exp(-(((f - hz) / hz) ** 2)))
    t = np.arange(n) / RATE_HZ
    wave = noise * np.exp(-t / length_s) * np.minimum(t * 1000.0, 1.0)
    return np.asarray(wave / np.abs(wave).max(), np.float32)


def _music(rng: np.random.Generator, n: int) -> Array:
    """Chords that change twice a second."""
    t = np.arange(n) / RATE_HZ
    wave = np.zeros(n)
    for start in np.arange(0, LOOP_S, 0.5):
        root = 220.0 * 2 ** (rng.integers(0, 12) / 12)
        inside = (t >= start) & (t < start + 0.5)
        chord = sum(np.sin(2 * np.pi * root * r * t[inside]) for r in (1.0, 1.25, 1.5, 2.0))
        wave[inside] += chord * np.exp(-(t[inside] - start) * 3)
    return np.asarray(wave / wave.std(), np.float32)


def _babble(rng: np.random.Generator, n: int) -> Array:
    """Voices of which no word is understood: noise around formants, four syllables a second."""
    t = np.arange(n) / RATE_HZ
    wave = np.zeros(n)
    for hz in (500.0, 1500.0, 2500.0):
        syllables = 0.5 + 0.5 * np.sin(2 * np.pi * 4 * t + rng.uniform(0, 2 * np.pi))
        wave += _shaped(rng, n, lambda f, hz=hz: np.exp(-(((f - hz) / 250.0) ** 2))) * syllables * (500.0 / hz)
    return np.asarray(wave / wave.std(), np.float32)
