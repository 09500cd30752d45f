"""The calibration that makes a model's own numbers honest: fitted on windows that were held out. Pure functions over
numpy; ``answers`` applies it, live and afterwards. ``truth`` holds indices of labels.

**Abstention**, and why it is not a target for the accuracy of what is answered. A model without its camera sees a
``flash`` as ``calm``, and there is no way to tell such a ``calm`` from a true one. If flashes are rare, answering
``calm`` every time is nearly always right, and a threshold for the accuracy over all windows would let it: the common
class pays for the rare one, which is then denied with confidence every time that it happens. So what is bounded is, for
*each class by itself*, the share of its windows that get a confident wrong answer, and what is set are thresholds for
each *answer*: an answer that some class would elicit just as well, with the same confidence, is no answer. The price is
stated plainly: what cannot be told from a flash is not called ``calm`` either. Other answers stay as they are: without
a camera a ``shake`` is still a ``shake``. The bound holds with the finite-sample correction of split conformal
prediction (Vovk's label-conditional form) where held-out windows and later ones are exchangeable.

That alone bounds what is done to the classes, not what an answer is worth: a rare ``shake`` may be said in every tenth
window of a common ``calm`` and be wrong more often than right. So of *each answer by itself*, too, the share is bounded
that is wrong among those that count (selective risk: Geifman and El-Yaniv 2017), with the same kind of correction, one
wrong answer more than was seen (as in selection by conformal p-values: Jin and Candes 2023). An answer that was never
wrong has no limit.

**Prediction sets that keep their word in both directions.** A set that always holds the most probable label covers as
often as the model is right; where that is more often than stated, the statement is untrue, if to the good side, and
the set says nothing that the label did not. There are two ways to the stated coverage. One is to leave labels out at
random (Romano, Sesia and Candès), seeded or not: it empties sets of which the model is sure as often as others, and a
set then changes while nothing else does. The other is to leave out what is improbable, the most probable label
included: ``exact``, the threshold of Sadinle, Lei and Wasserman taken at its word. The windows that lose their label
are those that the model doubts most, so an empty set has a meaning: *at this coverage nothing is probable enough to be
said*, and the model abstains. It costs answers, some of them right; whoever wants one in every window has the label
and its confidence beside the set. ``mass`` and ``threshold`` still make sets that are never empty.

Sources: temperature and biases: Guo et al. 2017, with Platt's (1999) soft targets; sets by mass: Romano, Sesia and
Candès 2020, without their randomisation; by threshold: Sadinle, Lei and Wasserman 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.answers import line, mass_before, softmax, straightened
from pipeline.modelfile import Calibration, SubsetCalibration, subset_key
from pipeline.scoring import reliability

Array = np.ndarray[Any, Any]

LEAST = 30
"""Held-out windows below which a subset of the streams gets no calibration of its own."""
MIXED = 50
"""Held-out windows for each number of a linear map below which none is fitted."""
STEPS, STEP_WINDOWS = 16, 100
"""Into how many parts of equal mass confidences are divided to be straightened, and the windows that each needs."""
_COARSEST, _FINEST = 0.02, 50.0
"""Limits of 1 / temperature."""
_HELD = 10.0


def fit_temperature(logits: Array, truth: Array) -> float:
    """The temperature of the least log loss on held-out logits [windows, labels], found as the root of the loss's slope
    in 1 / T, in which it is convex. The targets are softened by one part in windows + 2, so that a set on which the
    model is never wrong does not ask for infinite confidence."""
    n, labels = logits.shape
    if not n:
        return 1.0
    z = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    soft = 1.0 / (n + 2)
    own = z[np.arange(n), truth]
    wanted = float(np.mean((1 - soft) * own + soft * (z.sum(axis=1) - own) / (labels - 1)))
    low, high, beta = _COARSEST, _FINEST, 1.0
    for _ in range(60):
        p = softmax(z, 1 / beta)
        mean = (p * z).sum(axis=1)
        slope = float(mean.mean()) - wanted
        low, high = (low, beta) if slope > 0 else (beta, high)
        curve = float(np.mean((p * z**2).sum(axis=1) - mean**2))
        step = beta - slope / curve if curve > 0 else math.nan
        following = step if low < step < high else math.sqrt(low * high)
        if abs(following - beta) <= 1e-6 * beta:
            break
        beta = following
    return float(f"{1 / beta:.5g}")


def fit_scale(logits: Array, truth: Array) -> tuple[float, Array]:
    """Temperature and biases [labels] of the least log loss together, from the best temperature without them (Newton's
    method; the loss is convex in 1 / T and the biases). A model without its camera is not only less sure: it is wrong
    about some labels more than about others, which no temperature can mend. Biases are held to 0 as if 10 windows had
    said so, with a standard deviation of 1; for few windows they stay small."""
    n, labels = logits.shape
    scale = np.concatenate([[1 / fit_temperature(logits, truth)], np.zeros(labels)])
    if not n:
        return 1.0, scale[1:]
    z = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    held, target = _HELD / n, _softened(truth, labels)
    loss = _loss(z, target, scale, held)
    for _ in range(40):
        p = softmax(z * scale[0] + scale[1:])
        off, mean = p - target, (p * z).sum(axis=1)
        slope = np.concatenate([[(off * z).sum(axis=1).mean()], off.mean(axis=0) + held * scale[1:]])
        curve = np.empty((labels + 1, labels + 1))
        curve[0, 0] = ((p * z**2).sum(axis=1) - mean**2).mean() + 1e-9
        curve[0, 1:] = curve[1:, 0] = (p * (z - mean[:, None])).mean(axis=0)
        curve[1:, 1:] = np.diag(p.mean(axis=0) + held) - p.T @ p / n
        step = np.linalg.solve(curve, slope)
        while np.abs(step).max() > 1e-7:
            tried = scale - step
            tried[0] = min(max(tried[0], _COARSEST), _FINEST)
            if (found := _loss(z, target, tried, held)) < loss:
                scale, loss = tried, found
                break
            step = step / 2
        else:
            break
    return float(f"{1 / scale[0]:.5g}"), np.round(scale[1:], 4)


def fit_mix(logits: Array, truth: Array, temperature: float, biases: Array) -> tuple[Array, Array]:
    """Biases [labels] and mix [labels, labels] of the least log loss, from temperature and biases of ``fit_scale``:
    together any linear map of the logits (matrix scaling: Guo et al. 2017; Kull et al. 2019). What a lone sensor cannot
    tell apart it may be sure about for one label and fair about another, and which other label it then is shows in the
    logits, too. All are held to where they begin as if 10 windows had said so, with a standard deviation of 1. Newton's
    method on a convex loss, with all windows at once: labels * (labels + 1) unknowns."""
    n, labels = logits.shape
    z = logits.astype(np.float64)
    x = np.concatenate([z - z.mean(axis=1, keepdims=True), np.ones((n, 1))], axis=1)
    first = np.concatenate([np.eye(labels) / temperature, biases[:, None]], axis=1)
    held, target, weights = _HELD / max(n, 1), _softened(truth, labels), first

    def loss_of(weights: Array) -> float:
        return float(held * ((weights - first) ** 2).sum() / 2 + _log_loss(x @ weights.T, target))

    loss, size = loss_of(first), labels * (labels + 1)
    for _ in range(40):
        p = softmax(x @ weights.T)
        slope = (p - target).T @ x / n + held * (weights - first)
        curve = np.empty((labels, labels + 1, labels, labels + 1))
        for one in range(labels):
            for other in range(one, labels):
                spread = p[:, one] * ((one == other) - p[:, other])
                curve[one, :, other] = curve[other, :, one] = (x * spread[:, None]).T @ x / n
        step = np.linalg.solve(curve.reshape(size, size) + held * np.eye(size), slope.reshape(-1))
        step = step.reshape(labels, labels + 1)
        while np.abs(step).max() > 1e-7:
            if (found := loss_of(weights - step)) < loss:
                weights, loss = weights - step, found
                break
            step = step / 2
        else:
            break
    mix = weights[:, :labels] - np.eye(labels) / temperature
    return np.round(weights[:, labels], 4), np.round(mix, 4)


def fit_confidence(p: Array, truth: Array) -> tuple[tuple[float, float], ...]:
    """The points of ``Calibration.confidence``: for ``STEPS`` parts of equal mass of the windows, by confidence, what
    that is in the mean and how often it is right, neighbours joined until both rise (isotonic regression by pooling
    adjacent violators; calibration of the top label alone: Gupta and Ramdas 2022). Where a sensor has decoys its
    confidence is off in ways that no map of the logits mends: right in 0.6 where it is 0.7, and in 0.99 where it is
    0.96. Held to one half as if two windows had said so."""
    said, found, counts = reliability(p.max(axis=1), p.argmax(axis=1) == truth, STEPS)
    joined: list[tuple[float, float, float]] = []
    for confidence, right, count in zip(said, (found * counts + 1) / (counts + 2), counts, strict=True):
        new = (float(confidence), float(right), float(count))
        while joined and joined[-1][1] >= new[1]:
            before = joined.pop()
            n = before[2] + new[2]
            new = ((before[0] * before[2] + new[0] * new[2]) / n, (before[1] * before[2] + new[1] * new[2]) / n, n)
        joined.append(new)
    points: list[tuple[float, float]] = []
    for confidence, right, _ in joined:
        x, y = round(confidence, 5), round(right, 5)
        if (points[-1][0] if points else 0) < x < 1 and (points[-1][1] if points else 0) < y < 1:
            points.append((x, y))
    return tuple(points)


def _loss(z: Array, target: Array, scale: Array, held: float) -> float:
    return float(held * (scale[1:] ** 2).sum() / 2 + _log_loss(z * scale[0] + scale[1:], target))


def _log_loss(scaled: Array, target: Array) -> float:
    logs = scaled - np.logaddexp.reduce(scaled, axis=1, keepdims=True)
    return float(-(target * logs).sum(axis=1).mean())


def _softened(truth: Array, labels: int) -> Array:
    """Targets [windows, labels]: the truth, but for one part in windows + 2, which the other labels share."""
    soft = 1.0 / (len(truth) + 2)
    target = np.full((len(truth), labels), soft / (labels - 1))
    target[np.arange(len(truth)), truth] = 1 - soft
    return target


def fit_mass(p: Array, truth: Array, coverage: float) -> float:
    """The mass whose sets hold the truth in a share of at least ``coverage`` of later windows (split conformal)."""
    return _round_up(_quantile(mass_before(p)[np.arange(len(p)), truth], coverage))


def fit_threshold(p: Array, truth: Array, coverage: float, exact: bool = False) -> float:
    """The same for sets of the labels that are probable enough. The most probable label is always in the set, unless
    it is to be ``exact``."""
    own = p[np.arange(len(p)), truth]
    if not exact:
        own = np.where(p.argmax(axis=1) == truth, 1.0, own)
    return 1.0 - _round_up(_quantile(1.0 - own, coverage))


def fit_limits(p: Array, truth: Array, wrong: float, mistaken: float | None = None) -> dict[int, float]:
    """Confidences above which each answer counts, by label, such that of every class at most a share ``wrong`` of its
    windows gets a wrong answer that counts, and of every answer at most a share ``mistaken`` (as ``wrong`` if None) of
    those that count is wrong. Labels that need no limit are left out.

    A class may have so and so many errors, (windows + 1) * wrong less one; they are left to the answers with the
    fewest, and an answer with more is limited as far as it must be. A class with too few windows for any error to be
    allowed limits every wrong answer to it that was seen. Then each answer is limited further, if (its errors + 1) /
    (its windows + 1) is still more than ``mistaken``: to the most windows at which it is not, the surest ones."""
    limits = _by_class(p, truth, wrong)
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    for label in np.unique(predicted).tolist():
        own = (predicted == label) & (confidence > limits.get(label, -1.0))
        limit = _by_answer(confidence[own], truth[own] == label, wrong if mistaken is None else mistaken)
        if limit is not None:
            limits[label] = limit
    return limits


def _by_class(p: Array, truth: Array, wrong: float) -> dict[int, float]:
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    limits: dict[int, float] = {}
    for true in np.unique(truth):
        own = truth == true
        allowed = max(0, math.floor(wrong * (int(own.sum()) + 1)) - 1)
        errors = {int(c): np.sort(confidence[own & (predicted == c)])[::-1] for c in np.unique(predicted[own])}
        errors.pop(int(true), None)
        level = _level([len(found) for found in errors.values()], allowed)
        for label, found in errors.items():
            if len(found) > level:
                limits[label] = max(limits.get(label, 0.0), _round_up(float(found[level])))
    return limits


def _by_answer(confidence: Array, right: Array, mistaken: float) -> float | None:
    """The confidence that an answer has to exceed so that few enough of its windows [n] are wrong; None if all of them
    may count, 1 if it had better never be given."""
    if right.all():
        return None
    # Limits are stated to six digits, so windows that these do not tell apart are taken together.
    steps, place = np.unique(-np.ceil(confidence * 1e6), return_inverse=True)
    answered = np.bincount(place).cumsum()
    errors = np.bincount(place, weights=~right).cumsum()
    good = np.flatnonzero(errors + 1 <= mistaken * (answered + 1))
    if not len(good):
        return 1.0
    last = int(good[-1])
    return None if last == len(steps) - 1 else float(round(-steps[last + 1] / 1e6, 6))


def fit_calibration(
    logits_by_subset: Mapping[frozenset[str], Array],
    truth: Array,
    labels: Sequence[str],
    *,
    coverage: float = 0.9,
    sets: Literal["mass", "threshold", "exact"] = "mass",
    wrong: float = 0.1,
    mistaken: float = 0.1,
    mix: bool = False,
    straighten: bool = False,
    abstain_below: float = 0.0,
) -> Calibration:
    """A calibration from held-out windows, for each set of streams by itself and, for sets that it does not state, for
    all of them together.

    ``logits_by_subset`` [windows, labels]: what the model says of the same windows with just these streams left
    unmasked; rows that are not finite (windows in which a stream of the subset had nothing) and rows whose truth is -1
    are left out, and so is the empty subset. ``coverage`` is the prediction sets'; ``wrong`` the share of any class's
    windows that may get a confident wrong answer, and ``mistaken`` that of any answer's that may be wrong (see above).
    ``mix`` fits any linear map of the logits, where there are so many windows (``MIXED``) for each of its numbers;
    ``straighten`` what ``fit_confidence`` does, where there are enough for each part (``STEP_WINDOWS``).
    ValueError if no row is left.
    """
    usable: dict[str, tuple[Array, Array]] = {}
    for streams, logits in sorted(logits_by_subset.items(), key=lambda item: (len(item[0]), sorted(item[0]))):
        kept = np.isfinite(logits).all(axis=1) & (truth >= 0)
        if streams and kept.any():
            usable[subset_key(streams)] = np.asarray(logits[kept], np.float64), truth[kept]
    if not usable:
        raise ValueError("no held-out window has both a label and something to predict it from")

    def fitted(logits: Array, own: Array, *, windows: int) -> dict[str, Any]:
        (temperature, biases), weights = fit_scale(logits, own), None
        if mix and windows >= MIXED * len(labels) * (len(labels) + 1):
            biases, weights = fit_mix(logits, own, temperature, biases)
        p = softmax(logits, temperature, biases, weights)
        points = fit_confidence(p, own) if straighten and windows >= STEPS * STEP_WINDOWS else ()
        if points:
            p = straightened(p, np.broadcast_to(line(points, len(points)), (len(p), len(points) + 2, 2)))
        bias = dict(zip(labels, biases.tolist(), strict=True))
        limits = {labels[i]: limit for i, limit in sorted(fit_limits(p, own, wrong, mistaken).items())}
        size = (
            {"set_mass": fit_mass(p, own, coverage)}
            if sets == "mass"
            else {"set_threshold": fit_threshold(p, own, coverage, sets == "exact")}
        )
        mixed = {} if weights is None else {
            label: dict(zip(labels, row, strict=True)) for label, row in zip(labels, weights.tolist(), strict=True)
        }  # fmt: skip
        return {"temperature": temperature, "bias": bias, "mix": mixed, "confidence": points,
                "answer_above": limits, **size}  # fmt: skip

    # All together have each window once for every set.
    most = max(len(own) for _, own in usable.values())
    everything, truths = (np.concatenate(part) for part in zip(*usable.values(), strict=True))
    pooled = fitted(everything, truths, windows=most)
    own = {key: SubsetCalibration(**fitted(found, known, windows=len(known)))
           for key, (found, known) in usable.items() if len(known) >= LEAST}  # fmt: skip
    return Calibration(
        **pooled, abstain_below=abstain_below, set_coverage=coverage, set_may_be_empty=sets == "exact", subsets=own
    )


def _quantile(scores: Array, coverage: float) -> float:
    """The conformal quantile of scores in [0, 1]: 1 where there are too few of them."""
    place = math.ceil(coverage * (len(scores) + 1))
    return float(np.sort(scores)[place - 1]) if place <= len(scores) else 1.0


def _level(counts: Sequence[int], allowed: int) -> int:
    """The greatest level to which counts can be cut so that they have together no more than ``allowed``."""
    level, left = 0, list(counts)
    while any(count > level for count in left) and sum(min(count, level + 1) for count in left) <= allowed:
        level += 1
    return level


def _round_up(value: float) -> float:
    """To six digits, never below: a file that is read again gives no smaller sets and no more answers."""
    return min(1.0, math.ceil(value * 1e6) / 1e6)
