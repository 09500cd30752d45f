"""The encoder of sound: a log-mel spectrogram inside the graph, and residual convolutions over it.

The short-time Fourier transform is a convolution with fixed windowed sines and cosines, so that every runtime computes
it. Mel bands are triangles, equal on the scale of O'Shaughnessy (2595 log10(1 + f / 700)), as widely used. What counts
is power relative to full scale; ``FLOOR`` is where 16-bit sound ends.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.learn.blocks import Moments, Normalise, ResidualNet, pooled
from pipeline.learn.limits import NotNegative, Positive, PositiveFloat, Share
from pipeline.learn.stream_encoder import StreamEncoder, normal, spread, uniform

FLOOR = 1e-8
"""A band's value is log(1 + power / FLOOR): 0 in silence."""


class AudioSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``window_ms`` and ``stride_ms`` of the spectrogram, its ``mels`` bands from ``low_hz`` to ``high_hz`` (half the
    rate unless given). ``widths``: channels of the residual blocks. Augmentation: ``gain_db`` (greatest change of
    loudness), ``mask`` (share of the bands, and of the time, that may be blanked; Park et al., SpecAugment, 2019)."""

    window_ms: PositiveFloat = 25.0
    stride_ms: PositiveFloat = 10.0
    mels: Annotated[int, msgspec.Meta(ge=4)] = 40
    low_hz: NotNegative = 50.0
    high_hz: PositiveFloat | None = None
    widths: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (12, 24, 48)
    dropout: Share = 0.1
    gain_db: NotNegative = 6.0
    mask: Share = 0.2


class AudioEncoder(StreamEncoder):
    """Audio in [-1, 1), channels averaged, to a token. A prepared step is f4 [mels + 1, frames]: log power of each
    band, and last the share of each frame's samples that was there."""

    sines: Tensor
    bands: Tensor
    known_row = True

    def __init__(self, settings: AudioSettings, rate_hz: float, samples: int, token: int) -> None:
        super().__init__()
        if not samples or not rate_hz:
            raise ConfigError(
                "a learned encoder of audio needs the rule `resample`, so that a step is a fixed number of samples at "
                "a known rate; give the stream that rule."
            )
        self.token, self.settings = token, settings
        self.length = min(max(16, round(rate_hz * settings.window_ms / 1000)), samples)
        self.stride = max(1, round(rate_hz * settings.stride_ms / 1000))
        frames = (samples - self.length) // self.stride + 1
        self.skipped = (samples - self.length) % self.stride  # the oldest samples, so that the newest are all heard
        self.shape = (settings.mels + 1, frames)
        high = settings.high_hz or rate_hz / 2
        if not settings.low_hz < high <= rate_hz / 2:
            raise ConfigError(
                f"an audio encoder's bands from {settings.low_hz:g} to {high:g} Hz do not fit a rate of {rate_hz:g} Hz;"
                f" `high_hz` must lie above `low_hz` and be at most {rate_hz / 2:g}."
            )
        sines, bands = fourier(self.length), triangles(settings.mels, self.length, rate_hz, settings.low_hz, high)
        self.register_buffer("sines", sines, persistent=False)
        self.register_buffer("bands", bands, persistent=False)
        self.normalise = Normalise(settings.mels, 1)
        self.net = ResidualNet(2, 2, settings.widths, 3, settings.dropout)
        rows = -(-settings.mels // 2 ** (len(settings.widths) - 1))
        self.head = nn.Sequential(
            nn.Dropout(settings.dropout), nn.Linear(2 * settings.widths[-1] * rows + 2 * settings.mels, token)
        )

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        known = torch.ones_like(x[:, 0]) if valid is None else valid
        sound = (x.mean(1) * known)[self.skipped :]
        found = functional.conv1d(sound[None, None], self.sines, stride=self.stride)[0]
        power = found[: len(found) // 2].square() + found[len(found) // 2 :].square()
        part = functional.avg_pool1d(known[None, None, self.skipped :], self.length, self.stride)[0]
        return torch.cat([(self.bands @ power * (1 / FLOOR) + 1).log(), part], 0)

    def fit(self, prepared: Iterable[Tensor]) -> None:
        moments = Moments()
        for steps in map(self.flat, prepared):
            moments.add(steps[:, :-1], steps[:, -1:])
        self.normalise.take(moments)

    def forward(self, prepared: Tensor) -> Tensor:
        known = prepared[:, -1:]
        bands = self.normalise(prepared[:, :-1]) * known
        both = torch.stack([bands, known.expand_as(bands)], 1)
        features = self.net(both).flatten(1, 2)
        parts = [pooled(features, known), bands.mean(2), bands.amax(2)]
        token: Tensor = self.head(torch.cat(parts, 1))
        return token

    def augment(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        lots, settings = len(prepared), self.settings
        bands, known = prepared[:, :, :-1], prepared[:, :, -1:]
        nepers = uniform((lots, 1, 1, 1), -1, 1, generator, bands) * (settings.gain_db * math.log(10) / 10)
        bands = louder(bands, nepers)
        mean = self.normalise.mean.to(bands)
        for axis in (2, 3):  # a run of bands, then one of time
            size = bands.shape[axis]
            start, extent = (uniform((lots, 1, 1, 1), 0, size, generator, bands) for _ in range(2))
            place = torch.arange(size).to(bands).reshape(1, 1, *((-1, 1) if axis == 2 else (1, -1)))
            bands = torch.where((place >= start) & (place < start + extent * settings.mask), mean, bands)
        return torch.cat([bands, known], 2)

    def disturb(self, prepared: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
        """Noise adds power: about as much as the training's mean at a strength of 1, and 20 dB a factor of 10."""
        bands, known = prepared[:, :, :-1], prepared[:, :, -1:]
        level = self.normalise.mean.mean() + 2 * spread(strength, bands).clamp(min=1e-6).log()
        noise = level + normal(tuple(bands.shape), generator, bands)
        return torch.cat([torch.logaddexp(bands, noise), known], 2)

    def blank(self, prepared: Tensor) -> Tensor:
        """Silence: 0 in every band."""
        return torch.cat([torch.zeros_like(prepared[:, :, :-1]), prepared[:, :, -1:]], 2)


def louder(bands: Tensor, nepers: Tensor) -> Tensor:
    """Bands with their power changed by ``nepers``, and the floor where it was."""
    return torch.log1p((bands.exp() - 1).clamp(min=0) * nepers.exp())


def fourier(length: int) -> Tensor:
    """Sines and cosines under a Hann window, for ``conv1d``: [2 (length // 2 + 1), 1, length], scaled so that white
    noise of variance 1 has power 1 in every bin."""
    time = torch.arange(length, dtype=torch.float64)
    window = torch.sin(math.pi * (time + 0.5) / length).square()
    angle = 2 * math.pi * torch.outer(torch.arange(length // 2 + 1, dtype=torch.float64), time) / length
    bases = torch.cat([angle.cos(), angle.sin()]) * window / window.square().sum().sqrt()
    return bases[:, None].float()


def triangles(mels: int, length: int, rate_hz: float, low_hz: float, high_hz: float) -> Tensor:
    """Triangles over the bins of a transform, [mels, length // 2 + 1], each with the sum 1. A band narrower than a bin
    takes the nearest one."""
    low, high = (2595 * math.log10(1 + f / 700) for f in (low_hz, high_hz))
    edges = 700 * (10 ** (torch.linspace(low, high, mels + 2, dtype=torch.float64) / 2595) - 1)
    bins = torch.arange(length // 2 + 1, dtype=torch.float64) * rate_hz / length
    rise = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    fall = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    bands = torch.minimum(rise, fall).clamp(min=0)
    nearest = functional.one_hot((bins - edges[1:-1, None]).abs().argmin(1), len(bins)).double()
    bands = torch.where(bands.sum(1, keepdim=True) > 1e-3, bands, nearest)
    return (bands / bands.sum(1, keepdim=True)).float()
