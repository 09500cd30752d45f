"""The line fitted below delayed receipts: the quick way of weighing lines against the model as its docstring states
it, one line and one block at a time."""

from __future__ import annotations

from math import exp, inf, log

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import envelope
from pipeline.envelope import SHAPES, Prior

ANCHOR = 0.6


def weigh_slowly(
    grid: np.ndarray, u: np.ndarray, z: np.ndarray, n: np.ndarray, hull: tuple[float, float], prior: Prior
) -> list[float]:
    """The posterior of lines: the density of every block's excess, over the scale in closed form, over the shape as a
    sum, times the priors and the grid's own measure."""
    scores = []
    for a, b in grid.T:
        low, high = hull[0] - exp(a), hull[1] - exp(b)
        level, slope = (low + high) / 2, (high - low) / (2 * ANCHOR)
        excess = [zi - level - slope * ui for ui, zi in zip(u, z, strict=True)]
        if min(excess) <= 0:
            scores.append(-inf)
            continue
        count, by_shape = len(u), []
        for k in SHAPES:
            logs = sum((k - 1) * log(max(e, 1e-3)) for e in excess)
            scale = log(sum(ni * max(e, 1e-3) ** k for ni, e in zip(n, excess, strict=True)))
            by_shape.append((count - 1) * log(k) + logs - count * scale)
        score = max(by_shape) + log(sum(exp(s - max(by_shape)) for s in by_shape)) + a + b
        score -= log(1 + ((slope - prior.slope) / prior.scale) ** 2) + 0.5 * ((slope - prior.zero) / prior.clock) ** 2
        scores.append(score)
    weights = [exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32), st.integers(6, 49), st.floats(2.0, 9.0))
def test_lines_are_weighed_as_the_model_says(seed: int, blocks: int, magnitude: float) -> None:
    g = np.random.default_rng(seed)
    mean = 10.0**magnitude
    u = np.sort(g.uniform(-1, 1, blocks))
    z, n = g.gamma(g.uniform(1, 3), mean, blocks), g.uniform(0.1, 3, blocks)
    hull = (float(z.min()) * 0.9, float(z.min()) * 0.8)
    grid = np.log(mean) + g.uniform(-3, 1, (2, 25))
    prior = Prior(g.normal(0, mean), mean * g.uniform(0.1, 10), 0.0, 100 * mean)
    expected = weigh_slowly(grid, u, z, n, hull, prior)
    weights, line0, line1 = envelope._weigh(grid, u, z, n, hull, prior)
    assert weights == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert line0 - ANCHOR * line1 == pytest.approx(hull[0] - np.exp(grid[0]), rel=1e-9, abs=1e-6 * mean)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 49])
def test_logarithms_of_the_least_and_the_greatest_excess_stay_numbers(count: int) -> None:
    for value in (1e-3, 1.0, 1e19):
        values = np.full((count, 3), value)
        assert envelope._sum_of_logs(values) == pytest.approx(np.full(3, count * log(value)), rel=1e-12, abs=1e-12)
