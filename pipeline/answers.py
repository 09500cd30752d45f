"""From logits to an answer: probabilities, prediction set and abstention, as the calibration says for the streams that
are there.

A model that lacks a sensor is wrong in its own way, so each set of streams may have a calibration of its own
(``Calibration.subsets``). Sets of streams are boolean rows [rows, streams], in the bundle's order; every row of logits
is calibrated by the streams that it was made from, and by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.modelfile import Calibration

Array = np.ndarray[Any, Any]


class Answers:
    """The calibration of a bundle, ready to be asked once a step."""

    def __init__(self, calibration: Calibration, labels: Sequence[str], streams: Sequence[str]) -> None:
        self._general, self._labels, self._streams = calibration.at(()), tuple(labels), tuple(streams)
        self._bits = 1 << np.arange(len(streams), dtype=np.int64)
        self._own = {
            sum(1 << self._streams.index(name) for name in key.split("+")): calibration.at(key.split("+"))
            for key in calibration.subsets
        }
        everyone: list[tuple[int | None, Calibration]] = [(None, self._general), *self._own.items()]
        self._biases = {code: self._bias(stated) for code, stated in everyone}
        self._mixes = {code: self._mix(stated) for code, stated in everyone} if any(s.mix for _, s in everyone) else {}
        longest = max(len(stated.confidence) for _, stated in everyone)
        self._lines = {code: line(stated.confidence, longest) for code, stated in everyone} if longest else {}

    def at(self, member: Array) -> Calibration:
        """What holds for one set of streams, boolean [streams]."""
        return self._own.get(int(member @ self._bits), self._general) if self._own else self._general

    def probabilities(self, logits: Array, members: Array) -> Array:
        """Calibrated probabilities of logits [rows, labels], float64, by the streams [rows, streams] of each row. Rows
        that are not finite become NaN."""
        p = softmax(logits, *self._scales(members))
        return straightened(p, np.stack([self._lines[code] for code in self._codes(members)])) if self._lines else p

    def abstains(self, member: Array, label: int, confidence: float) -> bool:
        """Whether the model had better not answer with this label."""
        stated = self.at(member)
        limit = stated.answer_above.get(self._labels[label])
        return confidence < _least(stated) or (limit is not None and confidence <= limit)

    def prediction_set(self, member: Array, scores: Array) -> list[str]:
        """The labels in the prediction set of one row of probabilities, most probable first."""
        inside = in_set(scores[None], self.at(member))[0]
        return [self._labels[i] for i in np.argsort(-scores, kind="stable") if inside[i]]

    def judged(self, p: Array, members: Array) -> tuple[Array, Array, Array]:
        """Of many windows what is said of one by the methods above: labels [windows], whether the model abstains
        [windows], and the prediction sets [windows, labels], from probabilities [windows, labels] and the streams that
        each window has [windows, streams]. A window of no stream has no label: -1, and the model abstains."""
        label, confidence, codes = p.argmax(axis=1), p.max(axis=1), members @ self._bits
        abstains, inside = np.ones(len(p), bool), np.zeros(p.shape, bool)
        for code in np.unique(codes).tolist():
            rows, stated = codes == code, self._own.get(code, self._general)
            limits = np.array([stated.answer_above.get(name, -1.0) for name in self._labels])
            abstains[rows] = (confidence[rows] < _least(stated)) | (confidence[rows] <= limits[label[rows]])
            inside[rows] = in_set(p[rows], stated)
        nothing = (codes == 0) | ~np.isfinite(confidence)
        return np.where(nothing, -1, label), abstains | nothing, inside

    def _scales(self, members: Array) -> tuple[Any, Any, Any]:
        """Temperature, bias and mix: what holds for all rows, or arrays that have a row for each; no mix is None."""
        if not self._own:
            return self._general.temperature, self._biases[None], self._mixes.get(None)
        codes = self._codes(members)
        stated = [self._general if code is None else self._own[code] for code in codes]
        mix = np.array([self._mixes[code] for code in codes]) if self._mixes else None
        return np.array([[one.temperature] for one in stated]), np.array([self._biases[code] for code in codes]), mix

    def _codes(self, members: Array) -> list[int | None]:
        """By which calibration each row goes; None is that of all together."""
        return [code if code in self._own else None for code in (members @ self._bits).tolist()]

    def _bias(self, stated: Calibration) -> Array:
        return np.array([stated.bias.get(label, 0.0) for label in self._labels])

    def _mix(self, stated: Calibration) -> Array:
        """[labels, labels]: what is added to each label's logit, by whose."""
        rows = (stated.mix.get(label, {}) for label in self._labels)
        return np.array([[row.get(label, 0.0) for label in self._labels] for row in rows])


def _least(stated: Calibration) -> float:
    """The confidence that every answer needs: with an empty set there is none."""
    return max(stated.abstain_below, stated.set_threshold if stated.set_may_be_empty else 0.0)


def softmax(logits: Array, temperature: Any = 1.0, bias: Any = 0.0, mix: Array | None = None) -> Array:
    """Probabilities, float64 [rows, labels]; rows that are not finite become NaN. ``mix`` [labels, labels], or one for
    each row, adds to each label's logit so many times the logits, each less the mean of all."""
    scaled = logits.astype(np.float64) / temperature + bias
    if mix is not None:
        finite = np.where(np.isfinite(logits), logits, np.nan).astype(np.float64)
        apart = finite - finite.mean(axis=1, keepdims=True)
        for label in range(logits.shape[1]):  # not as a product of matrices, which rounds by how many rows there are
            scaled += apart[:, label : label + 1] * mix[..., label]
    scaled[~np.isfinite(scaled).all(axis=1)] = np.nan
    raised = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    result: Array = raised / raised.sum(axis=1, keepdims=True)
    return result


def line(points: Sequence[tuple[float, float]], length: int) -> Array:
    """The line of ``Calibration.confidence`` as [length + 2, 2]; what is left over goes on straight beyond 1."""
    beyond = [(1.0 + i, 1.0 + i) for i in range(length + 1 - len(points))]
    return np.array([(0.0, 0.0), *points, *beyond])


def straightened(p: Array, lines: Array) -> Array:
    """Probabilities [rows, labels] whose greatest is moved along its row's line [rows, points, 2] (see ``line``), but
    never so far that another label becomes the most probable; the others share in proportion what is left."""
    rows, top = np.arange(len(p)), p.argmax(axis=1)
    confidence = p[rows, top]
    right = np.clip((lines[:, :, 0] <= confidence[:, None]).sum(axis=1), 1, lines.shape[1] - 1)
    (x0, y0), (x1, y1) = lines[rows, right - 1].T, lines[rows, right].T
    moved = y0 + (confidence - x0) * (y1 - y0) / (x1 - x0)
    left = 1.0 - confidence
    others = p.copy()
    others[rows, top] = 0.0
    second = others.max(axis=1)
    least = second / np.maximum(left + second, 1e-300) * (1 + 1e-9)
    moved = np.minimum(1.0, np.maximum(moved, least))  # interpolation rounds, and 1 is what nothing exceeds
    result = others * np.where(left > 0, (1.0 - moved) / np.where(left > 0, left, 1.0), 0.0)[:, None]
    result[rows, top] = moved
    return result


def mass_before(p: Array) -> Array:
    """How much probability the labels have together that are more probable than each one, [rows, labels]; of equals
    the first counts as the more probable."""
    order = np.argsort(-p, axis=1, kind="stable")
    descending = np.take_along_axis(p, order, axis=1)
    sums = np.zeros_like(p)
    sums[:, 1:] = descending.cumsum(axis=1)[:, :-1]  # not the sum less the label's own: that would round differently
    before = np.empty_like(p)
    np.put_along_axis(before, order, sums, axis=1)
    return before


def in_set(p: Array, calibration: Calibration) -> Array:
    """Which labels are in the prediction set, boolean [rows, labels] (see ``Calibration``). The most probable one is
    always in it, unless sets may be empty; a row that is not finite has an empty set."""
    if calibration.set_may_be_empty:
        enough: Array = p >= calibration.set_threshold  # not true of NaN
        return enough
    before = mass_before(p)
    first = np.zeros(p.shape, bool)
    first[np.arange(len(p)), p.argmax(axis=1)] = True
    found: Array = first | (p >= calibration.set_threshold) | (before <= calibration.set_mass)
    return found & np.isfinite(p).all(axis=1, keepdims=True)
