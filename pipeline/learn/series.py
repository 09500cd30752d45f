"""Encoders of sampled values: an IMU, and signals of any kind (skeletons, physiological channels, features).

A prepared step is f4 [channels + 1, points]: the values, and last whether a sample was there. What is derived from them
(gravity, movement, distances) is computed in the learned half, so that a step may be turned or bent in training and all
that derives from it follows. The network is residual convolutions over time; beside its pooled features, plain
statistics of each channel go into the token.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.errors import ConfigError
from pipeline.learn.blocks import SMALLEST, TINY, Moments, Normalise, ResidualNet, pooled, statistics
from pipeline.learn.limits import Count, NotNegative, Positive, Share
from pipeline.learn.stream_encoder import StreamEncoder, normal, spread, uniform

GRAVITY = 9.80665
LIMIT = 6.0
"""Standard deviations beyond which a value is as good as any other: a wild sample must not rule a whole batch."""
SHORTEST = 0.05
"""No unit of length is taken to be less, summed over a step."""
LEAST = 0.2
"""Of the median scale of all points: what hardly moves (a spine) is noise, and is not made as large as a hand."""


class SeriesSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``widths``: channels of the residual blocks; ``halve`` halves the time from block to block. ``points``: length to
    which the samples of a step are stretched where the stream is not resampled. ``differences`` adds each channel's
    differences over so many samples (how fast it changes, by short spans and by longer ones, which are less noisy),
    ``statistics`` plain statistics of each channel.

    ``stride`` is the network's first (0: so that it looks at about 128 points).

    Augmentation in training: ``warp`` (share of the length that may be cut off at either end, the rest being
    stretched, or by which the ends may stand still), ``bend`` (how unevenly time may pass in between: 0.5 is up to
    about half as fast again), ``scale`` (relative), ``turn_deg`` (greatest rotation), ``jitter`` (noise and an offset
    relative to the standard deviation), ``hide`` (greatest share of a step that stands still at its mean), ``thin``
    (greatest share of samples that are lost and bridged by straight lines, in one step of twelve), ``style`` (share of
    the chunks in which each channel takes on a part, at most half, of another chunk's mean and standard deviation over
    time: the same, done with somebody else's posture and vigour. After MixStyle: Zhou et al. 2021, where it is done to
    what a layer gives)."""

    widths: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)] = (48, 64, 96)
    kernel: Positive = 5
    dropout: Share = 0.1
    halve: bool = True
    stride: Count = 0
    points: Annotated[int, msgspec.Meta(ge=2)] = 32
    differences: tuple[Positive, ...] = (1,)
    statistics: bool = True
    warp: Annotated[float, msgspec.Meta(ge=0, le=0.4)] = 0.0
    bend: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0
    scale: Share = 0.0
    turn_deg: NotNegative = 0.0
    jitter: NotNegative = 0.0
    hide: Share = 0.0
    thin: Share = 0.0
    style: Share = 0.0


class ImuSettings(SeriesSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``frame: level`` leaves out what depends on how the sensor is mounted about the vertical: of each sample it keeps
    the parts along gravity and across it. ``both`` gives the raw axes, too."""

    frame: Literal["raw", "level", "both"] = "both"


class SignalSettings(SeriesSettings, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``dims``: channels a point, for channels that are the coordinates of points (3 for a skeleton). Then ``origin``
    is the point that the others are relative to, ``pairs`` are points whose distance is a channel, and ``axis`` the
    coordinate about which ``turn_deg`` rotates. ``unit``: two points whose mean distance is the unit of length, so that
    a tall person is like a small one. With ``parents``, the point that each hangs on (-1: on none), each
    link's length varies in training by ``limbs`` (relative standard deviation), as it does from person to person.

    ``components``: so many principal components (of the training) in the place of the channels, for signals of hundreds
    of them, of which a network would learn the training by heart."""

    components: Count = 0
    dims: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    origin: Count | None = None
    pairs: tuple[tuple[int, int], ...] = ()
    axis: Annotated[int, msgspec.Meta(ge=0, le=2)] = 1
    unit: tuple[int, int] | None = None
    parents: tuple[int, ...] = ()
    limbs: NotNegative = 0.0


class SeriesEncoder(StreamEncoder):
    """[channels + 1, points] to a token; see the module's text. ``points`` is context + samples of a resampled stream,
    0 of any other."""

    known_row = True

    def __init__(self, settings: SeriesSettings, channels: int, points: int, token: int) -> None:
        super().__init__()
        self.token, self.channels, self.settings = token, channels, settings
        self.resampled = points > 0
        self.points = points or settings.points
        self.shape = (channels + 1, self.points)
        self._furnish()
        with torch.no_grad():
            known = self.derived(torch.zeros(1, channels, self.points), torch.ones(1, 1, self.points))[0].shape[1]
        self.known = known
        self.normalise = Normalise(known * (1 + len(settings.differences)), 1)
        self.raw = Normalise(channels, 1)
        features = self.normalise.mean.shape[1]
        stride = settings.stride or max(1, self.points // 128)
        self.net = ResidualNet(
            1, features + 1, settings.widths, settings.kernel, settings.dropout, stride=stride, halve=settings.halve
        )
        size = 2 * settings.widths[-1] + (4 * features if settings.statistics else 0)
        self.head = nn.Sequential(nn.Dropout(settings.dropout), nn.Linear(size, token))

    def prepare(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        finite = torch.isfinite(x)
        values = torch.where(finite, x, 0.0)
        known = finite.any(1).to(x) if valid is None else valid
        if not self.resampled:
            values, known = self._stretched(values, known)
        return torch.cat([values * known[:, None], known[:, None]], 1).T

    def _stretched(self, values: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, C] as [points, C], linear in between; n = 0 gives zeros that are not valid."""
        n = values.shape[0]
        place = ((2 * torch.arange(self.points) + 1) * n - self.points).clamp(min=0)  # in units of 1 / (2 points)
        left = place // (2 * self.points)
        right = torch.minimum(left + 1, torch.clamp(torch.full_like(left, n) - 1, min=0))
        part = ((place % (2 * self.points)).to(values) / (2 * self.points))[:, None]
        rows = torch.cat([values, torch.zeros(1, self.channels)])
        there = torch.cat([known, torch.zeros(1)])
        return rows[left] * (1 - part) + rows[right] * part, there[left] * there[right]

    def _furnish(self) -> None:
        """Makes what ``derived`` computes with."""

    def derived(self, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Channels [B, C', T] that the network sees, and where they hold [B, 1, T]."""
        return values, valid

    def features(self, prepared: Tensor) -> tuple[Tensor, Tensor]:
        """All channels with their differences, and the weight of each [B, C', T]."""
        channels, valid = self.derived(prepared[:, :-1], prepared[:, -1:])
        parts, weights = [channels], [valid.expand_as(channels)]
        for lag in self.settings.differences:
            change, both = lagged(channels, valid, min(lag, self.points))
            parts.append(change)
            weights.append(both.expand_as(change))
        return torch.cat(parts, 1), torch.cat(weights, 1)

    def fit(self, prepared: Iterable[Tensor]) -> None:
        raw, derived = Moments(), Moments()
        for steps in map(self.flat, prepared):
            raw.add(steps[:, :-1], steps[:, -1:])
            values, weight = self.features(steps)
            derived.add(values, weight[:, :1])
        self.raw.take(raw)
        self.normalise.take(derived)
        self._level()

    def _level(self) -> None:
        """Called when scales were taken; a place for what channels have in common."""

    def forward(self, prepared: Tensor) -> Tensor:
        values, weight = self.features(prepared)
        valid = weight[:, :1]
        scaled = self.normalise(values).clamp(-LIMIT, LIMIT) * weight
        parts = [pooled(self.net(torch.cat([scaled, valid], 1)), valid)]
        if self.settings.statistics:
            parts.append(statistics(scaled, valid))
        token: Tensor = self.head(torch.cat(parts, 1))
        return token

    def augment(self, prepared: Tensor, generator: torch.Generator) -> Tensor:
        settings, lots = self.settings, len(prepared)
        values, valid = prepared[:, :, :-1], prepared[:, :, -1:]
        if settings.style:
            values = self._restyled(values, valid, generator)
        if settings.warp or settings.bend:
            values, valid = self._warped(values, valid, generator)
        if settings.thin:
            values = self._thinned(values, generator)
        if settings.turn_deg:
            values = self._turned(values, generator)
        if settings.scale:
            values = values * self._scales(lots, generator, values)
        if settings.hide:
            values = self._hidden(values, generator)
        if settings.jitter:
            noise = normal(tuple(values.shape), generator, values) * self.raw.scale
            offset = normal((*values.shape[:1], 1, values.shape[2], 1), generator, values) * self.raw.scale
            values = values + settings.jitter * (noise + offset)
        return torch.cat([values * valid, valid], 2)

    def _restyled(self, values: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
        lots, over = len(values), (1, 3)
        values = torch.where(valid > 0, values, 0.0)
        count = valid.sum(over, keepdim=True)
        mean = values.sum(over, keepdim=True) / count.clamp(min=1)
        scale = (((values - mean).square() * valid).sum(over, keepdim=True) / count.clamp(min=1) + TINY).sqrt()
        other = uniform((lots,), 0, 1, generator, values).argsort()
        some = uniform((lots, 1, 1, 1), 0, 1, generator, values) < self.settings.style
        # The third power: mostly little, as by the distribution that the authors draw from, Beta(0.3, 0.3), folded.
        part = uniform((lots, 1, 1, 1), 0, 1, generator, values) ** 3 / 2
        part = torch.where(some & (count > 0) & (count[other] > 0), part, 0.0)
        given_mean, given_scale = (x + part * (x[other] - x) for x in (mean, scale))
        return given_mean + (values - mean) * (given_scale / scale)

    def _warped(self, values: Tensor, valid: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A part of each step, stretched to its length, or the step with its ends repeated."""
        lots, warp, last = len(values), self.settings.warp, self.points - 1
        first = uniform((lots, 1), -warp, warp, generator, values) * last
        end = last - uniform((lots, 1), -warp, warp, generator, values) * last
        share = torch.linspace(0, 1, self.points).to(values)
        sway = uniform((lots, 2), -1, 1, generator, values) * self.settings.bend / (2 * math.pi)
        bent = share + sway[:, :1] * (math.pi * share).sin() + sway[:, 1:] * (2 * math.pi * share).sin()
        at = (first + (end - first) * bent).clamp(0, last)
        left = at.floor().long().clamp(max=last - 1)
        part = (at - left)[:, None, None]
        both = torch.cat([values, valid], 2)
        index = left[:, None, None].expand(*both.shape[:-1], -1)
        before, after = both.gather(3, index), both.gather(3, index + 1)
        there = before[:, :, -1:] * after[:, :, -1:]
        return ((1 - part) * before + part * after)[:, :, :-1] * there, there

    def _thinned(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Samples lost without a trace, and straight lines in their place."""
        lots, points = len(values), self.points
        share = uniform((lots, 1), -11 * self.settings.thin, self.settings.thin, generator, values)
        kept = uniform((lots, points), 0, 1, generator, values) >= share
        kept[:, 0] = kept[:, -1] = True
        place = torch.arange(points).to(values.device).expand(lots, points)
        left = torch.where(kept, place, 0).cummax(1).values
        right = torch.where(kept, place, points - 1).flip(1).cummin(1).values.flip(1)
        part = ((place - left) / (right - left).clamp(min=1))[:, None, None]
        before, after = (values.gather(3, i[:, None, None].expand_as(values)) for i in (left, right))
        return (1 - part) * before + part * after

    def _hidden(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """A stretch of each step at the step's mean."""
        lots = len(values)
        extent = uniform((lots, 1), 0, self.settings.hide, generator, values)
        start = uniform((lots, 1), 0, 1, generator, values) * (1 - extent)
        share = torch.linspace(0, 1, self.points).to(values)
        hit = ((share >= start) & (share < start + extent))[:, None, None]
        return torch.where(hit, values.mean(3, keepdim=True), values)

    def _scales(self, lots: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """Factors for the channels of each chunk."""
        return uniform((lots, 1, 1, 1), 1 - self.settings.scale, 1 + self.settings.scale, generator, like)

    def _turned(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """The values in a turned frame of reference; a plain signal has none."""
        return values

    def disturb(self, prepared: Tensor, strength: Tensor, generator: torch.Generator) -> Tensor:
        values, valid = prepared[:, :, :-1], prepared[:, :, -1:]
        noise = normal(tuple(values.shape), generator, values) * self.raw.scale
        return torch.cat([(values + spread(strength, values) * noise) * valid, valid], 2)

    def slid(self, prepared: Tensor, present: Tensor, late: Tensor) -> Tensor:
        """A chunk of one step slides within it, by parts of ``late`` tenths, its ends repeated."""
        if prepared.shape[1] > 1:
            return super().slid(prepared, present, late)
        place = torch.arange(self.points, device=prepared.device)[None]
        other = (place - (late[:, None] * (self.points / 10)).round().long()).clamp(0, self.points - 1)
        return prepared.gather(3, other[:, None, None].expand_as(prepared))

    def blank(self, prepared: Tensor) -> Tensor:
        """Every channel stands still at its mean of the training."""
        values, valid = prepared[:, :, :-1], prepared[:, :, -1:]
        return torch.cat([self.raw.mean.expand_as(values[:, 0])[:, None].expand_as(values) * valid, valid], 2)


class ImuEncoder(SeriesEncoder):
    """Accelerations in m/s² and angular rates in rad/s. Gravity is taken to be the mean acceleration of what the
    encoder sees, as good as its context is long."""

    settings: ImuSettings

    def derived(self, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        accel, gyro = values[:, :3] / GRAVITY, values[:, 3:]
        mean = accel.sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp(min=1)
        free = (accel - mean) * valid
        parts = [] if self.settings.frame == "level" else [accel, gyro, free]
        if self.settings.frame != "raw":
            down = mean / (mean.square().sum(1, keepdim=True) + TINY).sqrt()
            along, turning = ((v * down).sum(1, keepdim=True) for v in (free, gyro))
            across, tilting = free - along * down, gyro - turning * down
            parts += [along, turning, length(across), length(tilting), length(accel), length(gyro)]
        return torch.cat(parts, 1), valid

    def _scales(self, lots: int, generator: torch.Generator, like: Tensor) -> Tensor:
        """The two sensors are apart."""
        both = uniform((lots, 1, 2, 1), 1 - self.settings.scale, 1 + self.settings.scale, generator, like)
        return both.repeat_interleave(3, 2)

    def _turned(self, values: Tensor, generator: torch.Generator) -> Tensor:
        lots = len(values)
        axis = functional.normalize(normal((lots, 3), generator, values), dim=1)
        angle = torch.deg2rad(uniform((lots, 1), -1, 1, generator, values) * self.settings.turn_deg)
        turn = rotation(axis, angle)[:, None]
        return torch.cat([turn @ values[:, :, :3], turn @ values[:, :, 3:]], 2)


class SignalEncoder(SeriesEncoder):
    """Any channels; those of points may be made relative to one of them, turned, and measured against each other."""

    settings: SignalSettings

    def __init__(self, settings: SignalSettings, channels: int, points: int, token: int) -> None:
        _check_points(settings, channels)
        super().__init__(settings, channels, points, token)

    def _furnish(self) -> None:
        some = self.settings.components
        self.principal = Principal(self.channels, some) if some else None

    def fit(self, prepared: Iterable[Tensor]) -> None:
        if self.principal is not None:
            self.principal.take(map(self.flat, prepared))
        super().fit(prepared)

    def derived(self, values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        dims = self.settings.dims
        if self.principal is not None:
            return self.principal(values) * valid, valid
        if not dims:
            return values, valid
        points = torch.unflatten(values, 1, (-1, dims))
        parts = [points.flatten(1, 2)]
        if (origin := self.settings.origin) is not None:
            centre = points[:, origin : origin + 1]
            where = centre.sum(3, keepdim=True) / valid.sum(2)[:, :, None, None].clamp(min=1)
            moved = (centre - where) * valid[:, :, None]
            parts = [(points - centre).flatten(1, 2), moved.flatten(1, 2)]
        if self.settings.pairs:
            first, second = (list(side) for side in zip(*self.settings.pairs, strict=True))
            parts.append(length((points[:, first] - points[:, second]).transpose(1, 2)).squeeze(1))
        channels = torch.cat(parts, 1)
        if self.settings.unit is not None:
            one, two = self.settings.unit
            unit = (length(points[:, one] - points[:, two]) * valid).sum(2, keepdim=True)
            channels = channels * (valid.sum(2, keepdim=True).clamp(min=1) / unit.clamp(min=SHORTEST))
        return channels, valid

    def _level(self) -> None:
        if self.settings.dims:
            scales = self.normalise.scale
            for first in range(0, scales.shape[1], self.known):
                some = scales[:, first : first + self.known]
                some.clamp_(min=LEAST * float(some.median()))

    def _turned(self, values: Tensor, generator: torch.Generator) -> Tensor:
        dims, lots = self.settings.dims, len(values)
        if dims < 2:
            return values
        if self.settings.parents and self.settings.limbs:
            values = self._grown(values, generator)
        axis = torch.zeros(lots, 3).to(values)
        axis[:, self.settings.axis if dims == 3 else 2] = 1
        angle = torch.deg2rad(uniform((lots, 1), -1, 1, generator, values) * self.settings.turn_deg)
        turn = rotation(axis, angle)[:, None, None, :dims, :dims]
        return (turn @ torch.unflatten(values, 2, (-1, dims))).flatten(2, 3)

    def _grown(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Another person's: every link longer or shorter by a share."""
        parents, dims = self.settings.parents, self.settings.dims
        n = len(parents)
        link = torch.eye(n)
        for point, parent in enumerate(parents):
            if parent >= 0:
                link[point, parent] = -1.0
        grow = 1 + self.settings.limbs * normal((len(values), n), generator, values)
        roots = torch.tensor([parent < 0 for parent in parents], device=values.device)
        grow = torch.where(roots, 1.0, grow)
        change = torch.linalg.inv(link).to(values) @ (grow[:, :, None] * link.to(values))
        return torch.einsum("bij,bljct->blict", change, torch.unflatten(values, 2, (n, dims))).flatten(2, 3)


class Principal(nn.Module):
    """Channels [B, C, T] to their first principal components [B, components, T]. A channel counts by the root of its
    standard deviation: neither do the ones of large numbers rule, nor does the noise of the smallest become as large as
    they are."""

    mean: Tensor
    axes: Tensor

    def __init__(self, channels: int, components: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, channels, 1))
        self.register_buffer("axes", torch.eye(components, channels))

    @torch.no_grad()
    def take(self, prepared: Iterable[Tensor]) -> None:
        """Finds the axes in steps [B, C + 1, T], whose last row says what counts; without any they stay as they are."""
        n = self.mean.shape[1]
        count, total = 0.0, torch.zeros(n, dtype=torch.float64)
        squares = torch.zeros(n, n, dtype=torch.float64)
        for steps in prepared:
            valid = steps[:, -1] > 0
            rows = steps[:, :-1].transpose(1, 2)[valid].double()
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.T @ rows
        if not count:
            return
        mean = total / count
        covariance = squares / count - mean[:, None] * mean
        scale = covariance.diagonal().clamp(min=SMALLEST**2) ** -0.25
        axes = torch.linalg.eigh(scale[:, None] * covariance * scale).eigenvectors.flip(1)[:, : len(self.axes)].T
        axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # an axis may point either way
        self.mean.copy_(mean[None, :, None])
        self.axes.copy_(axes * scale)

    def forward(self, values: Tensor) -> Tensor:
        return self.axes @ (values - self.mean)


def _check_points(settings: SignalSettings, channels: int) -> None:
    if settings.components and settings.dims:
        raise ConfigError("`components` are of a signal's channels; with `dims` these are points. Give one of both.")
    if settings.components > channels:
        raise ConfigError(f"{channels} channels have no {settings.components} `components`; ask for as many at most.")
    dims, origin = settings.dims, () if settings.origin is None else (settings.origin,)
    named = [
        *origin,
        *(settings.unit or ()),
        *itertools.chain(*settings.pairs),
        *(p for p in settings.parents if p != -1),
    ]
    if not dims and named:
        raise ConfigError("`origin` and `pairs` name points, so that `dims` (channels a point) is needed beside them.")
    if dims and channels % dims:
        raise ConfigError(f"{channels} channels are no points of {dims}; give the signal's `dims` rightly, or none.")
    if settings.parents and len(settings.parents) * dims != channels:
        raise ConfigError(
            f"`parents` names {len(settings.parents)} points, but {channels} channels are {channels // max(dims, 1)} "
            "points; give each its parent, or -1."
        )
    if dims and (wrong := [n for n in named if not 0 <= n < channels // dims]):
        raise ConfigError(f"`{wrong[0]}` is none of the points 0 to {channels // dims - 1} of {channels} channels.")


def lagged(values: Tensor, valid: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Differences over ``lag`` samples of values [B, C, T], in the middle between the two, and where both are valid
    [B, 1, T]; zeros at the ends."""
    points, after = values.shape[2], lag // 2
    change, both = values[:, :, lag:] - values[:, :, : points - lag], valid[:, :, lag:] * valid[:, :, : points - lag]
    ends = (lag - after, after)
    return functional.pad(change, ends), functional.pad(both, ends)


def length(vectors: Tensor) -> Tensor:
    """Euclidean length over dimension 1, which stays, with a gradient everywhere."""
    return (vectors.square().sum(1, keepdim=True) + TINY).sqrt()


def rotation(axis: Tensor, angle: Tensor) -> Tensor:
    """Matrices [N, 3, 3] that turn by ``angle`` [N, 1] about unit vectors ``axis`` [N, 3] (Rodrigues' formula)."""
    x, y, z = axis.unbind(1)
    zero = torch.zeros_like(x)
    cross = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).reshape(-1, 3, 3)
    sine, cosine = angle.sin()[..., None], angle.cos()[..., None]
    return torch.eye(3).to(axis) + sine * cross + (1 - cosine) * (cross @ cross)
