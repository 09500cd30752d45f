"""From passes to the numbers of an evaluation. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from pipeline.evaluate_pass import Pass
from pipeline.evaluation import ClassScores, Estimate, Reliability, Scores, SubsetResult
from pipeline.scoring import (
    Separation,
    bootstrap,
    calibration_error,
    calibration_interval,
    confusion,
    f1_by_class,
    macro_f1,
    reliability,
)

Array = np.ndarray[Any, Any]
APART = 0.9
"""Area under the curve from which on two labels count as told apart."""


def members_of(streams: int, exact: int) -> Array:
    """Which sets of streams are evaluated, boolean [subsets, streams], the largest first: every one but the empty, or
    above ``exact`` streams all, all but one, and each alone."""
    if streams > exact:
        one = np.eye(streams, dtype=bool)
        return np.concatenate([np.ones((1, streams), bool), ~one, one])
    codes = sorted(range(1, 1 << streams), key=lambda code: (-code.bit_count(), _reversed(code, streams)))
    return np.array([[bool(code >> i & 1) for i in range(streams)] for code in codes])


def _reversed(code: int, width: int) -> int:
    """So that among sets of one size those with the first streams come first."""
    return -sum(1 << (width - 1 - i) for i in range(width) if code >> i & 1)


def scores(passes: Sequence[Pass], column: int, labels: int) -> Scores:
    """Of one set of streams, over all windows of ``passes``, with intervals over them as sessions."""
    counts = np.array([confusion(p.truth, p.predicted[:, column], labels) for p in passes])
    sums = np.array([_sums(p, column) for p in passes])
    total = sums.sum(axis=0)

    def share(of: int, among: int = 0) -> Estimate:
        return _estimate(sums, lambda s: _ratio(s[:, of], s[:, among]))

    seen = [p.predicted[:, column] >= 0 for p in passes]
    confidence = [p.confidence[one, column] for p, one in zip(passes, seen, strict=True)]
    right = [(p.predicted[:, column] == p.truth)[one] for p, one in zip(passes, seen, strict=True)]
    error = calibration_error(np.concatenate(confidence), np.concatenate(right))
    return Scores(
        windows=int(total[0]), blind=int(total[0] - sum(one.sum() for one in seen)), accuracy=share(1),
        macro_f1=_estimate(counts, macro_f1),
        calibration_error=_known(error), calibration_interval=calibration_interval(confidence, right),
        log_loss=_known(total[2] / total[0]),
        coverage=share(3), set_size=_known(total[4] / total[0]), abstained=share(5), answered_accuracy=share(7, 6),
    )  # fmt: skip


def _sums(p: Pass, column: int) -> list[float]:
    right, silent = p.predicted[:, column] == p.truth, p.abstained[:, column]
    return [len(p.truth), right.sum(), p.loss[:, column].sum(dtype=np.float64), p.covered[:, column].sum(),
            p.size[:, column].sum(), silent.sum(), (~silent).sum(), (right & ~silent).sum()]  # fmt: skip


def _estimate(parts: Array, statistic: Callable[[Array], Array]) -> Estimate:
    value = float(statistic(parts.sum(axis=0, keepdims=True))[0])
    low, high = bootstrap(parts, statistic) or (None, None)
    return Estimate(_known(value), low, high)


def _ratio(part: Array, whole: Array) -> Array:
    return np.where(whole > 0, part / np.maximum(whole, 1e-12), np.nan)


def subset(passes: Sequence[Pass], column: int, streams: list[str], labels: Sequence[str]) -> SubsetResult:
    """All about one set of streams. The first column is that of all streams."""
    n = len(labels)
    truth = np.concatenate([p.truth for p in passes])
    predicted, full = (np.concatenate([p.predicted[:, c] for p in passes]) for c in (column, 0))
    silent = np.concatenate([p.abstained[:, column] for p in passes])
    seen = predicted >= 0
    confidence = np.concatenate([p.confidence[:, column] for p in passes])[seen]
    counts = confusion(truth, predicted, n)
    classes = _classes(truth, predicted, silent, counts, _areas(passes, column, n), labels)
    can = np.array([classes[label].observable is True for label in labels])[truth]
    said, found, windows = reliability(confidence, (predicted == truth)[seen])
    return SubsetResult(
        streams=streams, scores=scores(passes, column, n), classes=classes,
        reliability=Reliability(said.tolist(), found.tolist(), windows.astype(int).tolist()),
        confusion=counts.tolist(), observable_accuracy=_mean((predicted == truth)[can]),
        full_accuracy=_mean((full == truth)[can]), rest_abstained=_mean(silent[~can]),
        rest_wrong=_mean((~silent & (predicted != truth))[~can]),
    )  # fmt: skip


def _areas(passes: Sequence[Pass], column: int, labels: int) -> Array:
    together = Separation(labels)
    for one in passes:
        together.join(one.separations[column])
    return together.areas()


def _classes(
    truth: Array, predicted: Array, silent: Array, counts: Array, areas: Array, labels: Sequence[str]
) -> dict[str, ClassScores]:
    f1 = f1_by_class(counts)
    found = {}
    for i, label in enumerate(labels):
        own, right = truth == i, predicted == i
        apart = areas[i]
        other = int(np.nanargmin(apart)) if not np.isnan(apart).all() else None
        least = None if other is None else float(apart[other])
        found[label] = ClassScores(
            windows=int(own.sum()), recall=_mean(right[own]), f1=_known(f1[i]), abstained=_mean(silent[own]),
            wrong=_mean((~right & ~silent)[own]), apart=least, resembles=None if other is None else labels[other],
            observable=None if least is None else least >= APART,
        )  # fmt: skip
    return found


def contributions(passes: Sequence[Pass], labels: Sequence[str], streams: Sequence[str]) -> dict[str, dict[str, float]]:
    """Label -> stream -> mean contribution, for labels that were predicted right at least once."""
    total = np.sum([p.shares for p in passes], axis=0)
    count = np.sum([p.shared for p in passes], axis=0)
    return {
        label: dict(zip(streams, (total[i] / count[i]).tolist(), strict=True))
        for i, label in enumerate(labels)
        if count[i]
    }


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
