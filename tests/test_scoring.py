"""Scores against naive references."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.answers import softmax
from pipeline.scoring import (
    Separation,
    accuracy,
    bootstrap,
    calibration_error,
    confusion,
    f1_by_class,
    macro_f1,
    reliability,
)
from tests.said import world

Array = np.ndarray[Any, Any]
LABELS = ("a", "b", "c", "d")


@st.composite
def answered(draw: st.DrawFn) -> tuple[Array, Array]:
    """Truth and prediction of some windows over four labels; -1 predicts nothing."""
    n = draw(st.integers(1, 60))
    truth = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 3)))
    return truth, draw(hnp.arrays(np.int64, n, elements=st.integers(-1, 3)))


@given(answered())
def test_counts_and_f1_are_those_of_counting_by_hand(rows: tuple[Array, Array]) -> None:
    truth, predicted = rows
    counts = confusion(truth, predicted, 4)
    for i in range(4):
        for j in range(4):
            assert counts[i, j] == sum((t, p) == (i, j) for t, p in zip(truth, predicted, strict=True))
        assert counts[i, 4] == sum((t, p) == (i, -1) for t, p in zip(truth, predicted, strict=True))
    by_class = []
    for i in range(4):
        tp = int(counts[i, i])
        fn, fp = int(np.sum(truth == i)) - tp, int(np.sum(predicted == i)) - tp
        if tp + fn:
            recall = tp / (tp + fn)
            precision = tp / (tp + fp) if tp + fp else 0.0
            by_class.append(2 * precision * recall / (precision + recall) if tp else 0.0)
            assert f1_by_class(counts)[i] == pytest.approx(by_class[-1])
        else:
            assert math.isnan(f1_by_class(counts)[i])
    assert macro_f1(counts) == pytest.approx(np.mean(by_class))
    assert accuracy(truth, predicted) == pytest.approx(np.trace(counts[:, :4]) / len(truth))


@given(st.lists(st.tuples(st.sampled_from([0.2, 0.3, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=50),
       st.randoms())  # fmt: skip
def test_calibration_error_is_that_of_its_bins_in_any_order(rows: list[tuple[float, bool]], random: Any) -> None:
    def error(some: list[tuple[float, bool]]) -> float:
        return calibration_error(np.array([c for c, _ in some]), np.array([r for _, r in some]))

    shared = {c: np.mean([r for d, r in rows if d == c]) for c, _ in rows}
    ordered = sorted((c, shared[c]) for c, _ in rows)
    parts = [part for part in np.array_split(np.array(ordered), 10) if len(part)]
    assert error(rows) == pytest.approx(sum(abs((p[:, 0] - p[:, 1]).mean()) * len(p) for p in parts) / len(rows))
    mixed = list(rows)
    random.shuffle(mixed)
    assert error(mixed) == pytest.approx(error(rows), abs=1e-12)


def test_calibration_error_knows_the_honest_from_the_boastful() -> None:
    logits, truth = world(0, 20_000)
    p = softmax(logits)
    right = p.argmax(axis=1) == truth
    assert calibration_error(p.max(axis=1), right) < 0.01
    boast = softmax(logits, 0.4)
    assert calibration_error(boast.max(axis=1), right) > 0.1
    said, found, counts = reliability(boast.max(axis=1), right)
    assert (len(counts), counts.sum(), counts.max() - counts.min()) == (10, 20_000, 0)
    assert np.all(np.diff(said) > 0)
    assert np.all(found[3:] < said[3:])
    assert math.isnan(calibration_error(np.zeros(0), np.zeros(0, bool)))


def test_nothing_scores_nothing() -> None:
    none = np.zeros(0, np.int64)
    assert math.isnan(accuracy(none, none))
    assert math.isnan(macro_f1(confusion(none, none, 4)))


def test_intervals_are_over_sessions_and_seeded() -> None:
    random = np.random.default_rng(1)
    # Sessions differ: a bootstrap over windows would promise far too much.
    shares = random.uniform(0.5, 1.0, 30)
    parts = np.stack([np.round(shares * 1000), np.full(30, 1000)], axis=1)

    def ratio(sums: Array) -> Array:
        return sums[:, 0] / sums[:, 1]

    found = bootstrap(parts, ratio, seed=3)
    assert found is not None
    assert found == bootstrap(parts, ratio, seed=3)
    spread = shares.std() / math.sqrt(30)
    assert found[1] - found[0] == pytest.approx(4 * spread, rel=0.2)
    assert found[0] < shares.mean() < found[1]
    assert bootstrap(parts[:1], ratio) is None
    assert bootstrap(parts * 0, lambda sums: np.full(len(sums), np.nan)) is None


def test_separation_is_the_area_under_the_curve() -> None:
    logits, truth = world(5, 400)
    p = softmax(logits)
    parts = Separation(4), Separation(4)
    for part, half in zip(parts, (slice(0, 150), slice(150, None)), strict=True):
        part.add(p[half], truth[half])
    parts[0].join(parts[1])
    areas = parts[0].areas()
    odds = np.log(p[:, 0]) - np.log(p[:, 2])
    wins = [(a > b) + (a == b) / 2 for a in odds[truth == 0] for b in odds[truth == 2]]
    assert areas[0, 2] == areas[2, 0] == pytest.approx(np.mean(wins), abs=0.02)
    assert math.isnan(areas[1, 1])
    alone = Separation(4)
    alone.add(p[truth == 1], truth[truth == 1])
    assert np.isnan(alone.areas()).all()
