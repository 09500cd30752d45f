"""How much each stream contributed to a prediction: Shapley values over streams.

A coalition S is a set of streams; v(S) is what the model says when only S is there. The Shapley value of stream i is

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (v(S + i) - v(S))

the only share that sums to v(all) - v(none), gives a stream that changes nothing exactly 0, treats interchangeable
streams alike, and is linear in v. Up to ``EXACT`` streams v is evaluated on all 2^n coalitions; above, on the prefixes
of seeded random orders, each in both directions, and the value comes with its standard error.

Coalitions are rows of a boolean matrix [coalitions, n]; the first row is the empty one, the last is all streams.
"""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

EXACT = 8
"""Streams up to which all coalitions are evaluated: 256 of them."""

Array = np.ndarray[Any, Any]


class Shares(NamedTuple):
    """Shares [n] of v(all) - v(none), which they sum to, and their standard errors [n] (0 where exact)."""

    values: Array
    standard_error: Array


class Plan(NamedTuple):
    """Which coalitions to evaluate for ``n`` streams, and how to join their values."""

    coalitions: Array
    """Boolean [coalitions, n]; row 0 is empty, the last row full."""
    orders: Array | None
    """Above ``EXACT``: for each order, its n streams [orders, n]; None where exact."""
    rows: Array | None
    """Above ``EXACT``: for each order the rows of its n + 1 prefixes [orders, n + 1]."""


@cache
def exact_plan(n: int) -> Plan:
    """All 2^n coalitions; row r holds stream i iff bit i of r is set."""
    rows = np.arange(1 << n)
    return Plan((rows[:, None] >> np.arange(n)[None, :] & 1).astype(bool), None, None)


@lru_cache(maxsize=64)
def sampled_plan(n: int, orders: int, seed: int) -> Plan:
    """The prefixes of ``orders`` random orders (an even number: each order is followed by its reverse, which cancels
    much of the error). The same seed gives the same plan everywhere."""
    generator = np.random.Generator(np.random.PCG64(seed))
    half = np.stack([generator.permutation(n) for _ in range(max(1, orders // 2))])
    chosen = np.stack([half, half[:, ::-1]], axis=1).reshape(-1, n)
    index: dict[bytes, int] = {}
    rows = np.empty((len(chosen), n + 1), np.int64)
    for o, order in enumerate(chosen):
        member = np.zeros(n, bool)
        rows[o, 0] = index.setdefault(member.tobytes(), len(index))
        for k, stream in enumerate(order):
            member[stream] = True
            rows[o, k + 1] = index.setdefault(member.tobytes(), len(index))
    # All orders begin empty and end full; the full row goes last, where the caller expects it.
    full, last = int(rows[0, n]), len(index) - 1
    swapped = np.arange(len(index))
    swapped[[full, last]] = [last, full]
    unique = np.stack([np.frombuffer(key, bool) for key in index])
    return Plan(unique[swapped], chosen, swapped[rows])


def shares(plan: Plan, values: Array) -> Shares:
    """The shares from v of each of the plan's coalitions, float64 [coalitions]."""
    if plan.orders is None or plan.rows is None:
        return _exact(plan.coalitions.shape[1], values)
    n = plan.coalitions.shape[1]
    gains = np.diff(values[plan.rows], axis=1)
    by_stream = np.empty_like(gains)
    np.put_along_axis(by_stream, plan.orders, gains, axis=1)
    # An order and its reverse are one draw: their mean is what is independent of the others.
    pairs = by_stream.reshape(-1, 2, n).mean(axis=1)
    spread = pairs.std(axis=0, ddof=1) if len(pairs) > 1 else np.full(n, math.inf)
    return Shares(pairs.mean(axis=0), spread / math.sqrt(len(pairs)))


def _exact(n: int, values: Array) -> Shares:
    if n == 0:
        return Shares(np.zeros(0), np.zeros(0))
    without, with_, weight = _exact_terms(n)
    # Differences first: a stream that changes nothing gets exactly 0, whatever the weights round to.
    return Shares((weight * (values[with_] - values[without])).sum(axis=1), np.zeros(n))


@cache
def _exact_terms(n: int) -> tuple[Array, Array, Array]:
    """For each stream i: rows [n, 2^(n-1)] of the coalitions without i, the same with i, and the Shapley weights."""
    rows = np.arange(1 << n)
    bits = 1 << np.arange(n)
    without = np.stack([rows[rows & bit == 0] for bit in bits])
    sizes = np.array([int(row).bit_count() for row in rows])[without]
    weight = np.array([math.factorial(s) * math.factorial(n - s - 1) / math.factorial(n) for s in range(n)])
    return without, without | bits[:, None], weight[sizes]
