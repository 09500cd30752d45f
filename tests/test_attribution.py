"""Shares against their axioms, and against the definition: the mean gain over all orders."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pipeline.attribution import exact_plan, sampled_plan, shares

Array = np.ndarray[Any, Any]


@st.composite
def games(draw: st.DrawFn, most: int = 5) -> Array:
    """v of every coalition of 1 to ``most`` streams."""
    n = draw(st.integers(1, most))
    return draw(arrays(np.float64, 1 << n, elements=st.floats(-1, 1, width=32)))


def players(values: Array) -> int:
    return len(values).bit_length() - 1


def exact(values: Array) -> Array:
    return shares(exact_plan(players(values)), values).values


def by_definition(values: Array) -> Array:
    n = players(values)
    total = np.zeros(n)
    for order in permutations(range(n)):
        coalition = 0
        for stream in order:
            total[stream] += values[coalition | 1 << stream] - values[coalition]
            coalition |= 1 << stream
    return total / math.factorial(n)


@given(games())
def test_shares_are_the_mean_gain_over_all_orders(values: Array) -> None:
    assert np.allclose(exact(values), by_definition(values), atol=1e-12)


@given(games(8))
def test_shares_sum_to_the_whole(values: Array) -> None:
    assert exact(values).sum() == pytest.approx(values[-1] - values[0], abs=1e-12)


@given(games(), st.data())
def test_a_stream_that_changes_nothing_gets_exactly_zero(values: Array, data: st.DataObject) -> None:
    stream = data.draw(st.integers(0, players(values) - 1))
    rows = np.arange(len(values))
    assert exact(values[rows & ~(1 << stream)])[stream] == 0.0


@given(games(), st.data())
def test_streams_that_do_the_same_share_alike(values: Array, data: st.DataObject) -> None:
    n = players(values)
    one, other = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1))
    rows = np.arange(len(values))
    swapped = rows & ~(1 << one | 1 << other) | (rows >> one & 1) << other | (rows >> other & 1) << one
    alike = exact(values + values[swapped])
    assert alike[one] == pytest.approx(alike[other], abs=1e-12)


@given(games(4), st.data())
def test_shares_are_linear(values: Array, data: st.DataObject) -> None:
    more = data.draw(arrays(np.float64, len(values), elements=st.floats(-1, 1, width=32)))
    assert np.allclose(exact(values + 2 * more), exact(values) + 2 * exact(more), atol=1e-12)


@given(games(), st.integers(1, 20), st.integers(0, 1000))
def test_sampled_shares_sum_to_the_whole_and_ignore_what_changes_nothing(values: Array, orders: int, seed: int) -> None:
    n = players(values)
    plan = sampled_plan(n, 2 * orders, seed)
    rows = (plan.coalitions * (1 << np.arange(n))).sum(axis=1)
    assert rows[0] == 0
    assert rows[-1] == len(values) - 1
    assert len(set(rows.tolist())) == len(rows)
    found = shares(plan, values[rows])
    assert found.values.sum() == pytest.approx(values[-1] - values[0], abs=1e-12)
    dummy = values[rows & ~1]
    assert shares(plan, dummy).values[0] == 0.0


def test_sampled_shares_lie_within_their_stated_error() -> None:
    n = 10
    rows = np.arange(1 << n)
    size = np.array([int(r).bit_count() for r in rows])
    values = np.sqrt(size) + 0.3 * (rows & 3 == 3) - 0.2 * (rows >> 5 & 1)
    exactly = exact(values)
    plan = sampled_plan(n, 64, 7)
    found = shares(plan, values[(plan.coalitions * (1 << np.arange(n))).sum(axis=1)])
    assert (np.abs(found.values - exactly) <= 4 * found.standard_error + 1e-9).all()
    assert found.standard_error.max() < 0.1


def test_sampling_is_a_function_of_its_seed() -> None:
    first, again, other = sampled_plan(9, 32, 1), sampled_plan.__wrapped__(9, 32, 1), sampled_plan(9, 32, 2)
    assert np.array_equal(first.coalitions, again.coalitions)
    assert not np.array_equal(first.coalitions[:50], other.coalitions[:50])


def test_no_streams_share_nothing() -> None:
    assert exact(np.array([0.4])).shape == (0,)
