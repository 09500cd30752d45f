"""A line fitted to the lower edge of delayed observations: pure numpy, no state.

A receipt comes a delay after its capture, and delays are one-sided: ``y = c + b x + delay``, ``delay >= 0``. The line
wanted is the lower edge, not the middle. The time axis is cut into blocks; of each only the lowest point is kept, with
the count of points it won against. Whatever the delays' distribution, the minimum of many near its lower end follows a
Weibull law of some shape k (1: the density jumps at the edge, as exponential delays do; larger: it grows from zero, as
gamma delays do), so that

    density of a block's excess e = n k e^(k-1) / s^k  exp(-n (e / s)^k),     s the common scale, n the block's count.

``fit_lower`` integrates the posterior of this model: over s in closed form, over k as a sum, over the line by
quadrature. Its mean is the best unbiased-in-shift estimate also where maximum likelihood fails (k <= 2: the edge is
known better than 1 / sqrt(n), and errors are far from Gaussian), and its spread is an honest uncertainty. Blocks that
lie wholly inside a burst of delays are left out. Nothing here is faster than what the data holds: with delays that
thin out towards their minimum (gamma, k > 2), nobody finds the edge quickly.

``fit_middle`` is its counterpart for stamps with two-sided jitter: weighted least squares through block means.
"""

from __future__ import annotations

from math import sqrt
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

MIN_BLOCKS = 6
"""Fewest blocks that a fit accepts."""

SHAPES = (1.0, 1.5, 2.0, 3.0, 4.5)
_LOG_SHAPES = np.log(np.array(SHAPES))[:, None]
_LESS_ONE = np.array(SHAPES)[:, None] - 1
_ANCHOR = 0.6
"""The line is described by how far it passes below the points' lower hull at -0.6 and +0.6 of the window's half."""

_COARSE = np.linspace(np.log(2e-3), np.log(8.0), 13)
_FINE = np.linspace(-3.0, 3.0, 11)
_COARSE_AB = np.stack([v.ravel() for v in np.meshgrid(_COARSE, _COARSE)])
_FINE_AB = np.stack([v.ravel() for v in np.meshgrid(_FINE, _FINE)])
_FLOOR_NS = 100.0
"""Least scale of delays: below it stamps are equal for our purpose, and the logarithms stay finite."""


class Line(NamedTuple):
    """``y(x) = value + slope (x - at)``, with the variances and covariance of value and slope at ``at`` (ns, ns/ns),
    the deviation that 99 % of the posterior of ``value`` keep within, and the typical excess of a block's minimum."""

    at: float
    value: float
    slope: float
    var_value: float
    covariance: float
    var_slope: float
    bound99: float
    spread: float


class Prior(NamedTuple):
    """What is believed of the slope before any data: a Cauchy law (heavy tails: wrong beliefs give way) around
    ``slope``, within a Gaussian one of ``clock`` around ``zero``: no clock is far off, only a queue that drains is."""

    slope: float
    scale: float
    zero: float = 0.0
    clock: float = 0.005


def fit_lower(x: Array, y: Array, n: Array, prior: Prior) -> Line:
    """The lower edge of block minima ``y`` (ns) at ``x`` (ns, increasing), each the least of ``n`` points.

    Needs at least ``MIN_BLOCKS`` blocks. ``at`` of the answer is the last ``x``. Accuracy needs y of moderate size:
    subtract a line near the answer first.
    """
    middle, half = float(x[0] + x[-1]) / 2, float(x[-1] - x[0]) / 2
    u, base = (x - middle) / half, float(y.min())
    prior = Prior(*(half * v for v in prior))
    u, z, n, hull, scale = _without_bursts(u, y - base, n, prior)
    weights, line0, line1 = _posterior(u, z, n / n.mean(), hull, scale, prior)
    c0, c1 = float(weights @ line0), float(weights @ line1)
    end, turn = line0 + line1 - (c0 + c1), line1 - c1
    off = np.abs(end)
    order = np.argsort(off)
    inside = np.searchsorted(np.cumsum(weights[order]), 0.99)
    return Line(
        at=float(x[-1]), value=c0 + c1 + base, slope=c1 / half,
        var_value=float(weights @ end**2), covariance=float(weights @ (end * turn)) / half,
        var_slope=float(weights @ turn**2) / half**2,
        bound99=float(off[order[min(int(inside), len(order) - 1)]]), spread=scale,
    )  # fmt: skip


def fit_middle(x: Array, y: Array, n: Array, prior: Prior) -> Line:
    """The line through block means ``y`` (ns) at ``x`` (ns), each of ``n`` points with two-sided jitter."""
    middle, half = float(x[0] + x[-1]) / 2, float(x[-1] - x[0]) / 2
    u, w = (x - middle) / half, n / n.mean()
    noise = 0.0
    for _ in range(2):  # the second pass knows the noise, and so the weight of the prior
        ridge = noise / (prior.scale * half) ** 2
        a00, a01, a11 = w.sum(), w @ u, w @ u**2 + ridge
        b0, b1 = w @ y, w @ (u * y) + ridge * prior.slope * half
        det = a00 * a11 - a01**2
        c0, c1 = float((a11 * b0 - a01 * b1) / det), float((a00 * b1 - a01 * b0) / det)
        noise = float(w @ (y - c0 - c1 * u) ** 2) / max(len(u) - 2, 1) + _FLOOR_NS**2
    v00, v01, v11 = (float(noise * v / det) for v in (a11, -a01, a00))
    var_end = v00 + 2 * v01 + v11
    # Student's 99 % point, to within 1 % from 4 degrees of freedom up.
    student = 2.576 + 5.1 / max(len(u) - 3, 1)
    return Line(
        at=float(x[-1]), value=c0 + c1, slope=c1 / half, var_value=var_end, covariance=(v01 + v11) / half,
        var_slope=v11 / half**2, bound99=student * var_end**0.5, spread=noise**0.5,
    )  # fmt: skip


def weigh_line(x: Array, y: Array, variance: Array, prior: Prior) -> Line:
    """The line through points of known variance (ns^2), the prior's slope counting as one more measurement."""
    at = float(x[-1])
    w: Array = 1 / variance
    d, stiff = x - at, 1 / prior.scale**2
    a00, a01, a11 = w.sum(), w @ d, w @ d**2 + stiff
    b0, b1 = w @ y, w @ (d * y) + stiff * prior.slope
    det = a00 * a11 - a01**2
    value, slope = float((a11 * b0 - a01 * b1) / det), float((a00 * b1 - a01 * b0) / det)
    var = float(a11 / det)
    return Line(at, value, slope, var, float(-a01 / det), float(a00 / det), 2.6 * var**0.5, 0.0)


def _without_bursts(
    u: Array, z: Array, n: Array, prior: Prior
) -> tuple[Array, Array, Array, tuple[float, float], float]:
    """The blocks that are not wholly inside a burst, the lower hull at both anchors, and the typical excess over it."""
    hull, excess = _hull(u, z, prior)
    inner, at = np.sort(excess), len(excess) // 2
    kept = excess <= 5 * (inner[at] + inner[~at]) + 10 * _FLOOR_NS  # ten times the median
    if not kept.all():
        few = kept.sum() < MIN_BLOCKS or not kept[u <= -_ANCHOR].any() or not kept[u > _ANCHOR].any()
        if not few:
            u, z, n = u[kept], z[kept], n[kept]
            hull, excess = _hull(u, z, prior)
    return u, z, n, hull, max(float(np.maximum(excess, 0.0).sum()) / len(excess), _FLOOR_NS)


def _hull(u: Array, z: Array, prior: Prior) -> tuple[tuple[float, float], Array]:
    """The lower hull's height at -anchor and +anchor, and each point's excess over the line through both.

    Where that line is no clock's (a queue drains), the highest line below all points that could be one stands in.
    """
    low, high = _hull_at(u, z, -_ANCHOR), _hull_at(u, z, _ANCHOR)
    tilt = (high - low) / (2 * _ANCHOR)
    allowed = min(max(tilt, prior.zero - 4 * prior.clock), prior.zero + 4 * prior.clock)
    if allowed != tilt:
        level = float((z - allowed * u).min())
        low, high = level - allowed * _ANCHOR, level + allowed * _ANCHOR
    return (low, high), z - ((low + high) / 2 + (high - low) / (2 * _ANCHOR) * u)


def _hull_at(u: Array, z: Array, at: float) -> float:
    """The lower hull at ``at``: the least of all chords from a point on its left to one on its right."""
    left = int(np.searchsorted(u, at, side="right"))
    ul, zl, ur, zr = u[:left, None], z[:left, None], u[left:], z[left:]
    return float(((zl * (ur - at) + zr * (at - ul)) / (ur - ul)).min())


def _posterior(
    u: Array, z: Array, n: Array, hull: tuple[float, float], scale: float, prior: Prior
) -> tuple[Array, Array, Array]:
    """Weights of a grid of lines, and their heights at 0 and slopes, in units of the window's half.

    The grid lies in the logarithms of the two drops below the hull and is narrowed twice to where the mass is.
    """
    # Lines through the hull's anchors may pass above points beyond these: the largest drops must clear them all.
    level, tilt = (hull[0] + hull[1]) / 2, (hull[1] - hull[0]) / (2 * _ANCHOR)
    deepest = max(float((level + tilt * u - z).max()), 0.0)
    grid = _COARSE_AB * (1 + np.log1p(deepest / scale) / _COARSE[-1]) + np.log(scale)
    slack = (0.5 * (_COARSE[1] - _COARSE[0])) ** 2
    for _ in range(3):
        weights = _weigh(grid, u, z, n, hull, prior)[0]
        mean = grid @ weights
        off = grid - mean[:, None]
        cov = (off * weights) @ off.T
        # The Cholesky factor of the covariance, by hand: for two by two numbers a library's call costs more.
        root = sqrt(float(cov[0, 0]) + slack)
        lean = float(cov[1, 0]) / root
        across, along = _FINE_AB
        grid = np.stack((mean[0] + root * across, mean[1] + lean * across + sqrt(cov[1, 1] + slack - lean**2) * along))
        slack = 1e-6
    return _weigh(grid, u, z, n, hull, prior)


def _sum_of_logs(values: Array) -> Array:
    """The sums of logarithms over the first axis of values from 1e-3 to 1e19, no 16 of which leave the floats as a
    product: a logarithm costs as much as ten of those."""
    parts = [values[at : at + 16].prod(axis=0) for at in range(0, len(values), 16)]
    total: Array = np.log(parts).sum(axis=0)
    return total


def _weigh(
    grid: Array, u: Array, z: Array, n: Array, hull: tuple[float, float], prior: Prior
) -> tuple[Array, Array, Array]:
    """See ``_posterior``. Blocks run along the first axis, so that what is reduced over them goes by whole rows, and
    what is made on the way is written over: most of a fit's time is spent here, with nothing of it in the caches."""
    drop = np.exp(grid)
    low, high = hull[0] - drop[0], hull[1] - drop[1]
    line0, line1 = (low + high) / 2, (high - low) / (2 * _ANCHOR)
    # z - line0 - line1 u, as one product of matrices
    excess = np.stack((z, np.ones(len(u)), u), axis=1) @ np.stack((np.ones(len(line0)), -line0, -line1))
    outside = excess.min(axis=0) <= 0.0
    np.maximum(excess, 1e-3, out=excess)
    logs = _sum_of_logs(excess)
    powers = np.empty((len(SHAPES), *excess.shape))
    powers[0] = excess
    _, power15, power2, power3, power45 = powers
    np.multiply(excess, np.sqrt(excess, out=power2), out=power15)
    np.multiply(excess, excess, out=power2)
    np.multiply(power2, excess, out=power3)
    np.multiply(power3, power15, out=power45)
    sums = np.log(n @ powers)
    count = len(u)
    by_shape = (count - 1) * _LOG_SHAPES + _LESS_ONE * logs
    by_shape -= np.multiply(sums, count, out=sums)
    top = by_shape.max(axis=0)
    by_shape -= top
    score = top + np.log(np.exp(by_shape, out=by_shape).sum(axis=0)) + grid[0] + grid[1]
    score -= np.log1p(((line1 - prior.slope) / prior.scale) ** 2)
    score -= 0.5 * ((line1 - prior.zero) / prior.clock) ** 2
    score[outside] = -np.inf
    score -= score.max()
    weights = np.exp(score, out=score)
    weights /= weights.sum()
    return weights, line0, line1
