"""Resampling irregular samples onto an integer grid: pure functions over numpy arrays.

The grid of a stream at ``rate`` Hz is ``g_j = j * 10^9 // rate`` ns of session time, for every integer j, so that it
never drifts and two runs agree on every point. Neighbouring samples of one epoch that lie at most ``max_gap`` apart
belong together; a grid point between two that do not is a hole and stays one.

Floats never depend on how samples were batched into messages: every point is computed from its own neighbours by the
same elementwise operations, whatever the length of the arrays that it is computed with.
"""

from __future__ import annotations

from functools import lru_cache
from math import ceil
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SECOND = 1_000_000_000


def samples_per_hop(rate_hz: int, hop_ns: int) -> int | None:
    """How many grid points a hop holds, or None if that is no positive whole number."""
    count, rest = divmod(rate_hz * hop_ns, SECOND)
    return count if rest == 0 and count > 0 else None


def nearest_hop_ns(rate_hz: int, hop_ns: int) -> int:
    """The hop nearest to ``hop_ns`` that holds a whole number of samples at ``rate_hz`` and is whole nanoseconds."""
    wanted = max(1, round(rate_hz * hop_ns / SECOND))
    for distance in range(rate_hz + 1):
        for count in (wanted - distance, wanted + distance):
            if count > 0 and count * SECOND % rate_hz == 0:
                return count * SECOND // rate_hz
    return SECOND


def grid(rate_hz: int, first: int, count: int) -> Array:
    """Grid times i8 [count], ns, of the points ``first`` ... ``first + count - 1``."""
    seconds, rest = divmod(first, rate_hz)  # apart: in int64 the product below holds 2.2 days of 48 kHz, and no more
    points: Array = seconds * SECOND + np.arange(rest, rest + count, dtype=np.int64) * SECOND // rate_hz
    return points


def joined(times: Array, breaks: Array, left: Array, right: Array, points: Array) -> Array:
    """Which points have a value: an exact sample, or neighbours with no break in between (bool [points]).

    ``left`` is the index of the last sample at or before each point (-1: none), ``right`` that of the first one after
    it (or of the last sample, where there is none after it).
    ``breaks`` i8, ascending: the indices i for which sample i does not belong together with sample i - 1.
    """
    exact = (left >= 0) & (times[left] == points)
    between = (left >= 0) & (right > left)
    if len(breaks):
        between &= breaks.searchsorted(right, side="right") == breaks.searchsorted(left, side="right")
    result: Array = exact | between
    return result


def linear(times: Array, values: Array, left: Array, right: Array, points: Array) -> Array:
    """Linear interpolation of ``values`` f8 [samples, channels] as f4 [points, channels]; no ``left`` is negative.

    At an exact sample its value, bit for bit, whatever its neighbour is.
    """
    before = times[left]
    span = times[right] - before
    if not span[-1]:  # an exact sample with nothing after it: only the last point can be one
        span[-1] = 1
    weight = ((points - before) / span)[:, None]
    low = values[left]
    with np.errstate(invalid="ignore", over="ignore"):  # infinity times 0, and what float32 cannot hold
        result: Array = np.where(weight == 0.0, low, low + (values[right] - low) * weight).astype(np.float32)
    if np.isnan(result).any():
        result[np.isnan(result)] = np.nan  # one NaN, not whichever the processor made: digests cover these bytes
    return result


ZERO_CROSSINGS = 16
PHASES = 4096
KAISER_BETA = 9.0
ROLL_OFF = 0.92


@lru_cache(maxsize=16)
def kernel(source_hz: int, target_hz: int) -> Array:
    """The windowed-sinc kernel as f8 [taps, PHASES + 1]: column p weighs the taps for a point p / PHASES of a sample
    period right of its left neighbour. It is low-pass at the lower of the two Nyquist rates. Taking the nearest of
    4096 phases errs by 1/8192 of a sample period at most: -78 dB at 8 kHz from 48 kHz.

    Source: J. O. Smith, "Digital Audio Resampling Home Page" (bandlimited interpolation with a tabulated kernel).
    """
    scale = min(1.0, target_hz / source_hz) * ROLL_OFF
    half = half_taps(source_hz, target_hz)
    offset = np.arange(-half + 1, half + 1)[:, None] - np.arange(PHASES + 1) / PHASES
    window = np.i0(KAISER_BETA * np.sqrt(np.maximum(0.0, 1.0 - (offset / half) ** 2))) / np.i0(KAISER_BETA)
    table = np.sinc(offset * scale) * window * scale
    table /= table.sum(axis=0)
    table.setflags(write=False)
    result: Array = table
    return result


def half_taps(source_hz: int, target_hz: int) -> int:
    """How many samples on each side of a point the kernel looks at."""
    return ceil(ZERO_CROSSINGS * max(1.0, source_hz / target_hz))


def reach_ns(source_hz: int, target_hz: int) -> int:
    """Half the filter in ns, with 1 % for a source whose real rate is off its nominal one."""
    return half_taps(source_hz, target_hz) * SECOND * 101 // (100 * source_hz) + 1


def band_limited(
    times: Array, values: Array, breaks: Array, left: Array, right: Array, points: Array, source_hz: int, target_hz: int
) -> Array:
    """Band-limited interpolation, f4 [points, channels]; samples beyond a break count as silence.

    The position between two samples is taken from their times, so a source that drifts stays in place.
    ``left`` must not be negative.
    """
    table, half = kernel(source_hz, target_hz), half_taps(source_hz, target_hz)
    span = np.maximum(times[right] - times[left], 1)
    phase = ((points - times[left]) / span * PHASES + 0.5).astype(np.int64)
    run = breaks.searchsorted(np.arange(len(times)), side="right") if len(breaks) else None
    reach, end = reach_ns(source_hz, target_hz), len(times) - 1
    # A tap counts only within the filter's reach in time: when a source is slow or samples are lost there are fewer,
    # and a point must not depend on how many more have come beyond.
    plain = run is None and left[0] >= half - 1 and left[-1] + half <= end
    if plain:
        span_right, span_left = times[left + half] - points, points - times[left - half + 1]
        plain = bool((span_right <= reach).all() and (span_left <= reach).all())
    out = np.zeros((len(points), values.shape[1]))
    # Tap by tap in a fixed order, elementwise: a sum whose order is left to a library differs between processors.
    for tap in range(2 * half):
        at = left + (tap - half + 1)
        weight = table[tap][phase]
        if not plain:
            inside = (at >= 0) & (at <= end)
            np.clip(at, 0, end, out=at)
            inside &= np.abs(times[at] - points) <= reach
            if run is not None:
                inside &= run[at] == run[left]
            weight = np.where(inside, weight, 0.0)
        for channel in range(values.shape[1]):
            out[:, channel] += weight * values[:, channel][at]
    return out.astype(np.float32)
