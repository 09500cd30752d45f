"""Payloads that are wrong and do not say so: noise as strong as the signal itself has been, or a multiple of it.

Strength is relative, so that one number means the same to a camera, an accelerometer and a signal of unknown units: the
standard deviation of what the stream has said so far, each channel by itself (pixels and ranges: all of them together).
"""

from __future__ import annotations

from random import Random
from typing import Any

import msgspec
import numpy as np

from pipeline.errors import WireError
from pipeline.messages import (
    AudioLayout,
    FrameLayout,
    ImuLayout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    array,
)
from pipeline.wire import decode_frame

Array = np.ndarray[Any, Any]
_ENOUGH = 20_000
"""Samples of one message that its spread is taken from; a picture has millions."""


class Disturber:
    """Puts noise on the messages of one stream, in order. The same ``random`` gives the same noise."""

    def __init__(self, level: float, random: Random) -> None:
        """``level`` is how many standard deviations of the signal one of the noise is; of a text, the share of
        characters (1 at most) that become others."""
        self._level = level
        self._random = np.random.default_rng(random.getrandbits(64))
        self._count: Array | None = None
        self._mean: Array = np.zeros(0)
        self._squares: Array = np.zeros(0)

    def __call__(self, message: Message) -> Message:
        """The message with noise; as it is if it has no payload, or one that cannot be read."""
        if message.data is None:
            return message
        try:
            return self._disturbed(message)
        except (WireError, ValueError):
            return message

    def _disturbed(self, message: Message) -> Message:
        header = message.header
        match header.layout:
            case FrameLayout():
                pixels = decode_frame(message)
                noisy = np.clip(self._noisy(pixels.reshape(-1, 1)), 0, 255).reshape(pixels.shape)
                layout = FrameLayout("bgr8", pixels.shape[0], pixels.shape[1])
                return Message(msgspec.structs.replace(header, layout=layout), np.rint(noisy).astype(np.uint8))
            case AudioLayout():
                return Message(header, np.rint(np.clip(self._noisy(array(message)), -32768, 32767)).astype("<i2"))
            case ImuLayout():
                batch = array(message).copy()
                noisy = self._noisy(np.concatenate([batch["accel"], batch["gyro"]], axis=1))
                batch["accel"], batch["gyro"] = noisy[:, :3], noisy[:, 3:]
                return Message(header, batch)
            case SignalLayout():
                batch = array(message).copy()
                batch["value"] = self._noisy(batch["value"])
                return Message(header, batch)
            case SweepLayout():
                return Message(header, self._sweep(array(message).copy()))
            case TextLayout():
                return Message(header, self._text(array(message).copy()).tobytes())
        return message

    def _sweep(self, points: Array) -> Array:
        """Points that are nearer or farther along their rays."""
        place = np.stack([points[axis] for axis in "xyz"], axis=1).astype(np.float64)
        distance = np.sqrt((place**2).sum(axis=1))
        seen = np.isfinite(distance) & (distance > 0)
        ratio = np.ones(len(points))
        ratio[seen] = self._noisy(distance[seen, None])[:, 0] / distance[seen]
        for i, axis in enumerate("xyz"):
            points[axis] = place[:, i] * np.maximum(ratio, 0)
        return points

    def _text(self, letters: Array) -> Array:
        struck = (self._random.random(len(letters)) < self._level) & (letters < 128)  # what is left is still UTF-8
        letters[struck] = self._random.integers(ord("a"), ord("z") + 1, int(struck.sum()))
        return letters

    def _noisy(self, values: Array) -> Array:
        """Values [samples, channels] with noise; what is not finite stays as it is."""
        self._learn(values[:: max(1, len(values) // _ENOUGH)].astype(np.float64))
        assert self._count is not None
        spread = self._level * np.sqrt(self._squares / np.maximum(self._count, 1))
        noise = self._random.standard_normal(values.shape, dtype=np.float32)
        noisy: Array = values + noise * spread.astype(np.float32)
        return noisy

    def _learn(self, values: Array) -> None:
        """Joins count, mean and squared deviations of the channels with those of ``values`` (Chan et al. 1983)."""
        if self._count is None:
            self._count = np.zeros(values.shape[1])
            self._mean, self._squares = np.zeros(values.shape[1]), np.zeros(values.shape[1])
        known = np.isfinite(values)
        count = known.sum(axis=0)
        safe = np.where(known, values, 0.0)
        mean = safe.sum(axis=0) / np.maximum(count, 1)
        squares = (np.where(known, values - mean, 0.0) ** 2).sum(axis=0)
        total = np.maximum(self._count + count, 1)
        apart = mean - self._mean
        self._squares = self._squares + squares + apart**2 * self._count * count / total
        self._mean = self._mean + apart * count / total
        self._count = self._count + count
