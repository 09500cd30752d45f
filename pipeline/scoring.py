"""How good a model is, in numbers. Pure functions over numpy; what makes its own numbers honest is in ``confidence``.

Rows are windows, in no order that matters. ``truth`` and ``predicted`` are indices of labels; a prediction of -1 says
that there was nothing to predict from, and is wrong. Windows of one session resemble each other, so intervals are drawn
over whole sessions (cluster bootstrap), never over windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

BINS = 10


def accuracy(truth: Array, predicted: Array) -> float:
    """Share of windows whose label is right; NaN of none."""
    return float(np.mean(truth == predicted)) if len(truth) else math.nan


def confusion(truth: Array, predicted: Array, labels: int) -> Array:
    """Counts i8 [labels, labels + 1]: truth by prediction; the last column counts windows without a prediction."""
    columns = np.where(predicted < 0, labels, predicted)
    return np.bincount(truth * (labels + 1) + columns, minlength=labels * (labels + 1)).reshape(labels, labels + 1)


def f1_by_class(counts: Array) -> Array:
    """F1 of each label [..., labels] from confusions [..., labels, labels + 1]; NaN for labels that never were true."""
    square = counts[..., :-1]
    hits = np.diagonal(square, axis1=-2, axis2=-1)
    true, said = counts.sum(axis=-1), square.sum(axis=-2)
    return np.where(true > 0, 2 * hits / np.maximum(true + said, 1), np.nan)


def macro_f1(counts: Array) -> Array:
    """Mean F1 [...] over the labels that are true somewhere; NaN where none is."""
    by_class = f1_by_class(counts)
    known = ~np.isnan(by_class)
    total = known.sum(axis=-1)
    mean: Array = np.where(known, by_class, 0.0).sum(axis=-1) / np.where(total > 0, total, np.nan)
    return mean


def reliability(confidence: Array, right: Array, bins: int = BINS) -> tuple[Array, Array, Array]:
    """Bins of equal mass, least confident first: mean confidence, share right, and windows of each; bins that would be
    empty are left out. Windows of equal confidence count alike, whichever bin they fall into."""
    values, group, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    shared = np.bincount(group, weights=right.astype(np.float64), minlength=len(values)) / np.maximum(counts, 1)
    order = np.sort(group)
    parts = [part for part in np.array_split(order, bins) if len(part)]
    means = [(values[part].mean(), shared[part].mean(), len(part)) for part in parts]
    table = np.array(means, np.float64).reshape(-1, 3)
    return table[:, 0], table[:, 1], table[:, 2]


def calibration_error(confidence: Array, right: Array, bins: int = BINS) -> float:
    """Expected calibration error: mean distance of confidence and share right over bins of equal mass; NaN of none."""
    said, found, counts = reliability(confidence, right, bins)
    return float(np.sum(np.abs(said - found) * counts) / counts.sum()) if len(counts) else math.nan


def bootstrap(
    parts: Array, statistic: Callable[[Array], Array], *, draws: int = 1000, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """An interval of ``statistic`` over sessions drawn with replacement. ``parts`` [sessions, ...] are what each
    session adds to a sum; ``statistic`` maps sums [draws, ...] to values [draws]. None for a single session, which says
    nothing about others, and where no draw has a value."""
    if len(parts) < 2:
        return None
    n = len(parts)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=draws).astype(np.float64)
    values = statistic((weights @ parts.reshape(n, -1)).reshape(draws, *parts.shape[1:]))
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def calibration_interval(
    confidence: Sequence[Array], right: Sequence[Array], *, draws: int = 200, level: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """An interval of ``calibration_error`` over sessions drawn with replacement, each with its windows' confidences and
    which of them were right. Bins are of equal mass in every draw. As any distance it is greater in a draw than in
    truth, so that a small error lies near the lower end, or below it. None for fewer than two sessions with windows."""
    kept = [i for i, part in enumerate(confidence) if len(part)]
    if len(kept) < 2:
        return None
    said = np.concatenate([confidence[i] for i in kept]).astype(np.float64)
    found = np.concatenate([right[i] for i in kept]).astype(np.float64)
    session = np.repeat(np.arange(len(kept)), [len(confidence[i]) for i in kept])
    order = np.argsort(said, kind="stable")
    off, session = (said - found)[order], session[order]
    lots = np.random.default_rng(seed).multinomial(len(kept), np.full(len(kept), 1 / len(kept)), size=draws)
    values = []
    for lot in lots:
        weight = lot[session].astype(np.float64)
        mass = weight.cumsum()
        edges = np.searchsorted(mass, mass[-1] * np.arange(1, BINS + 1) / BINS - 1e-9)
        sums = np.diff((weight * off).cumsum()[edges], prepend=0.0)
        values.append(np.abs(sums).sum() / mass[-1])
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Separation:
    """How well each pair of labels can be told apart, by the odds that a model gives them: the probability that a
    window of the one has higher odds for it than a window of the other (area under the curve), counted in bins, so that
    memory does not grow with windows."""

    _BINS, _REACH = 128, 16.0

    def __init__(self, labels: int) -> None:
        self._labels = labels
        self._counts = np.zeros((labels, labels, self._BINS), np.int64)

    def add(self, p: Array, truth: Array) -> None:
        """Counts probabilities [windows, labels]."""
        logs = np.log(np.maximum(p, 1e-12))
        odds = logs[np.arange(len(p)), truth][:, None] - logs
        place = (np.clip(odds / self._REACH, -1, 1) + 1) / 2 * (self._BINS - 1)
        columns = np.arange(self._labels)
        np.add.at(self._counts, (truth[:, None], columns[None, :], np.rint(place).astype(np.int64)), 1)

    def join(self, other: Separation) -> None:
        """Adds what another one has counted."""
        self._counts += other._counts

    def areas(self) -> Array:
        """[labels, labels], symmetric; 1: never confused, 0.5: as good as equal. NaN for labels never seen, and on the
        diagonal."""
        own = self._counts
        other = self._counts.transpose(1, 0, 2)[..., ::-1]  # the other label's windows, by the same odds
        below = other.cumsum(axis=-1) - other
        wins = (own * (below + other / 2)).sum(axis=-1)
        pairs = own.sum(axis=-1) * other.sum(axis=-1)
        areas = np.where(pairs > 0, wins / np.maximum(pairs, 1), np.nan)
        np.fill_diagonal(areas, np.nan)
        return areas
