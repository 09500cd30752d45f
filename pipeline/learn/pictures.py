"""The encoders of pictures: camera frames, and sweeps drawn as pictures.

A frame of any size becomes a small square one by sampling a regular pattern of its pixels and averaging them in cells:
on large pictures that is as cheap as it gets (most pixels are never read), on small ones it repeats pixels.

A sweep becomes a range image (azimuth by elevation: the nearest return of each cell) or a view from above (pillars:
how many returns, how high the highest, how low the lowest). Cells are found by divisions, roots and a table, whose
results are the same to the last bit in every runtime: with a library's arc tangent a point on an edge would fall into
one cell in training and into another one live.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor, nn

from pipeline.learn.blocks import Moments, Normalise, ResidualNet, averaging
from pipeline.learn.limits import Positive, PositiveFloat, Share
from pipeline.learn.stream_encoder import StreamEncoder, normal, spread, uniform

SAMPLES = 4
"""Pixels sampled along each side of a cell."""
TURN = 4096
"""Entries of the table of azimuths."""


class PictureSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``widths``: channels of the residual blocks, from the second on each half as wide and high as the one before."""

    widths: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (16, 32, 64)
    dropout: Share = 0.1


class FrameSettings(PictureSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``size``: of the square picture that the network sees. Augmentation: ``shift`` (share of the size), ``light``
    (relative change of brightness and contrast), ``flip`` (left to right, where the labels allow it)."""

    size: Annotated[int, msgspec.Meta(ge=8, le=512)] = 64
    shift: Share = 0.08
    light: Share = 0.2
    flip: bool = False


class SweepSettings(PictureSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``view``: ``range`` is an image of ``columns`` around the sensor and ``rows`` from ``down_deg`` to ``up_deg``;
    ``above`` is a map of ``columns`` x ``columns`` cells out to ``far_m``. Returns nearer than ``near_m`` or beyond
    ``far_m`` are not seen. Augmentation: ``turn_deg`` (about the vertical axis), ``drop`` (greatest share of cells that
    lose their return)."""

    view: Literal["range", "above"] = "range"
    columns: Annotated[int, msgspec.Meta(ge=8, le=512)] = 64
    rows: Annotated[int, msgspec.Meta(ge=1, le=128)] = 16
    down_deg: Annotated[float, msgspec.Meta(gt=-85, lt=85)] = -25.0
    up_deg: Annotated[float, msgspec.Meta(gt=-85, lt=85)] = 20.0
    near_m: PositiveFloat = 0.1
    far_m: PositiveFloat = 50.0
    turn_deg: Annotated[float, msgspec.Meta(ge=0, le=180)] = 0.0
    drop: Share = 0.1
    widths: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (16, 24, 48)


class PictureEncoder(StreamEncoder):
    """[channels, height, width] to a token: residual convolutions, the means of some parts of the picture, so that the
    token knows where, and the maximum of all of it. ``wrap`` columns are repeated at either side of a picture that
    closes on itself."""

    def __init__(
        self, settings: PictureSettings, shape: tuple[int, int, int], token: int, *, stride: int = 1, wrap: int = 0
    ) -> None:
        super().__init__()
        self.token, self.shape, self.wrap = token, shape, wrap
        self.normalise = Normalise(shape[0], 2)
        self.net = ResidualNet(2, shape[0], settings.widths, 3, settings.dropout, stride=stride)
        self.parts = (2, 2 if shape[1] == shape[2] else 4)
        size = settings.widths[-1] * (self.parts[0] * self.parts[1] + 1)
        self.head = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(size, token))

    def fit(self, prepared: Iterable[Tensor]) -> None:
        moments = Moments()
        for steps in map(self.flat, prepared):
            moments.add(steps, torch.ones_like(steps[:, :1]))
        self.normalise.take(moments)

    def forward(self, prepared: Tensor) -> Tensor:
        picture = self.normalise(prepared)
        if self.wrap:
            picture = torch.cat([picture[..., -self.wrap :], picture, picture[..., : self.wrap]], -1)
        features = self.net(picture)
        rows, columns = (averaging(n, m).to(features) for n, m in zip(features.shape[2:], self.parts, strict=True))
        parts = (rows.T @ features @ columns).flatten(1)
        token: Tensor = self.head(torch.cat([parts, features.amax((2, 3))], 1))
        return token


class FrameEncoder(PictureEncoder):
    """Camera frames. A prepared step is f4 [3, size, size], BGR from 0 to 1."""

    def __init__(self, settings: FrameSettings, token: int) -> None:
        super().__init__(settings, (3, settings.size, settings.size), token, stride=2)
        self.settings = settings

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        size = self.settings.size
        place = 2 * torch.arange(SAMPLES * size) + 1
        rows, columns = (place * n // (2 * SAMPLES * size) for n in (x.shape[0], x.shape[1]))
        some = x.index_select(0, rows).index_select(1, columns).to(torch.float32)
        cells = some.reshape(size, SAMPLES, size, SAMPLES, 3).mean((1, 3))
        return cells.permute(2, 0, 1) / 255

    def augment(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        settings, lots = self.settings, len(prepared)
        x = prepared
        if settings.shift:
            x = shifted(x, round(settings.shift * settings.size), generator)
        if settings.light:
            gain, offset = (
                uniform((lots, 1, 1, 1, 1), -settings.light, settings.light, generator, x) for _ in range(2)
            )
            mean = x.mean((1, 2, 3, 4), keepdim=True)
            x = ((x - mean) * (1 + gain) + mean * (1 + offset)).clamp(0, 1)
        if settings.flip:
            x = torch.where(uniform((lots, 1, 1, 1, 1), 0, 1, generator, x) < 0.5, x, x.flip(-1))
        return x

    def disturb(self, prepared: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
        """Noise of pixels, and light that is wrong."""
        scale = self.normalise.scale.mean().to(prepared)
        much = spread(strength, prepared)
        light = normal((*strength.shape, 1, 1, 1), generator, prepared)
        noise = normal(tuple(prepared.shape), generator, prepared)
        return (prepared + much * scale * (noise + 0.5 * light)).clamp(0, 1)


def shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Pictures [B, L, C, H, W] moved by up to ``most`` pixels, alike in all L, with their edges repeated."""
    lots, size = len(x), (x.shape[-2], x.shape[-1])
    moves = torch.randint(-most, most + 1, (2, lots), generator=generator, device=generator.device).to(x.device)
    rows, columns = (
        (torch.arange(n, device=x.device)[None] + move[:, None]).clamp(0, n - 1)
        for n, move in zip(size, moves, strict=True)
    )
    lot = torch.arange(lots, device=x.device)[:, None, None]
    return x.permute(0, 3, 4, 1, 2)[lot, rows[:, :, None], columns[:, None, :]].permute(0, 3, 4, 1, 2)


class SweepEncoder(PictureEncoder):
    """LiDAR sweeps. A prepared step is f4 [channels, rows, columns]. ``range``: nearness of the nearest return
    (0 nothing, 1 at the sensor), log of the number of returns, log of the greatest intensity. ``above``: log of the
    number of returns, height of the highest and depth of the lowest (metres / 3, 0 for none)."""

    columns_of_turn: Tensor

    def __init__(self, settings: SweepSettings, token: int) -> None:
        rows = settings.rows if settings.view == "range" else settings.columns
        wrap = 4 if settings.view == "range" else 0
        super().__init__(settings, (3, rows, settings.columns), token, wrap=wrap)
        self.settings = settings
        self.register_buffer("columns_of_turn", azimuths(settings.columns), persistent=False)

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        settings = self.settings
        points = torch.where(torch.isfinite(x).all(1, keepdim=True), x, 0.0)
        points = torch.cat([points, torch.zeros(1, 5)])  # never none; at the sensor itself nothing is seen
        px, py, pz = points[:, 0], points[:, 1], points[:, 2]
        level = (px * px + py * py).sqrt()
        distance = (px * px + py * py + pz * pz).sqrt()
        seen = (distance >= settings.near_m) & (distance <= settings.far_m)
        cells = self.shape[1] * self.shape[2]
        inside, cell = self._around(px, py, pz, level) if settings.view == "range" else self._above(px, py)
        cell = torch.where(seen & inside, cell, cells)
        nothing = torch.zeros(cells + 1)
        count = nothing.scatter_add(0, cell, torch.ones_like(px)).log1p()
        if settings.view == "range":
            near = nothing.scatter_reduce(0, cell, 1 / (1 + distance), "amax")
            bright = nothing.scatter_reduce(0, cell, points[:, 3].clamp(min=0), "amax").log1p()
            channels = [near, count, bright]
        else:
            high = nothing.scatter_reduce(0, cell, (pz / 3).clamp(min=0), "amax")
            low = nothing.scatter_reduce(0, cell, (-pz / 3).clamp(min=0), "amax")
            channels = [count, high, low]
        return torch.stack([c[:cells] for c in channels]).reshape(self.shape)

    def _around(self, px: Tensor, py: Tensor, pz: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        """The cell of each point in the range image, and whether it is in it."""
        settings = self.settings
        part = py / (px.abs() + py.abs()).clamp(min=1e-9)  # -1 to 1, and monotone with the angle on either side
        turn = torch.where(px >= 0, part + 1, 3 - part)  # 0 to 4
        column = self.columns_of_turn[(turn * (TURN / 4)).long().clamp(0, TURN - 1)]
        down, up = (math.tan(math.radians(d)) for d in (settings.down_deg, settings.up_deg))
        height = (pz / level.clamp(min=1e-9) - down) * (settings.rows / (up - down))
        row = height.clamp(-1, settings.rows).floor().long()
        inside = (row >= 0) & (row < settings.rows)
        return inside, row.clamp(0, settings.rows - 1) * settings.columns + column

    def _above(self, px: Tensor, py: Tensor) -> tuple[Tensor, Tensor]:
        """The same in the view from above: x forward is up, y left is left."""
        far, n = self.settings.far_m, self.settings.columns
        row, column = (((far - p) * (n / (2 * far))).clamp(-1, n).floor().long() for p in (px, py))
        inside = (row >= 0) & (row < n) & (column >= 0) & (column < n)
        return inside, row.clamp(0, n - 1) * n + column.clamp(0, n - 1)

    def augment(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        settings, x = self.settings, prepared
        if settings.turn_deg and settings.view == "range":
            most = settings.turn_deg / 360 * settings.columns
            turns = uniform((len(x),), -most, most, generator, x).round().long()
            x = torch.stack([one.roll(int(k), -1) for one, k in zip(x, turns, strict=True)])
        share = uniform((*x.shape[:2], 1, 1, 1), 0, settings.drop, generator, x)
        lost = uniform((*x.shape[:2], 1, *x.shape[3:]), 0, 1, generator, x) < share
        return torch.where(lost, 0.0, x)

    def disturb(self, prepared: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
        """Returns that are lost, and others where nothing is, as in rain or dust."""
        much = 1 - torch.exp(-spread(strength, prepared))
        draw = uniform((*prepared.shape[:2], 2, *prepared.shape[3:]), 0, 1, generator, prepared)
        lost, false = draw[:, :, :1] < much, draw[:, :, 1:] < 0.3 * much
        noise = normal(tuple(prepared.shape), generator, prepared).abs() * self.normalise.scale.to(prepared)
        return torch.where(false, noise, torch.where(lost, 0.0, prepared))


def azimuths(columns: int) -> Tensor:
    """Which of ``columns`` equal parts of the circle each of ``TURN`` parts of the square's round lies in. The first
    part begins behind the sensor's right; none begins at a multiple of a degree, where points like to lie."""
    turn = (torch.arange(TURN, dtype=torch.float64) + 0.5) * (4 / TURN)
    part = torch.where(turn < 2, turn - 1, 3 - turn)
    x, y = 1 - part.abs(), part
    angle = torch.atan2(y, torch.where(turn < 2, x, -x)) / (2 * math.pi)
    return ((angle + 0.25 + 0.1234 / columns) % 1 * columns).floor().long().clamp(max=columns - 1)
