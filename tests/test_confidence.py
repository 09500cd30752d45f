"""Calibrations against what they promise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.answers import Answers, in_set, line, mass_before, softmax, straightened
from pipeline.confidence import (
    fit_calibration,
    fit_limits,
    fit_mass,
    fit_mix,
    fit_scale,
    fit_temperature,
    fit_threshold,
)
from pipeline.modelfile import Calibration, SubsetCalibration, subset_key
from pipeline.scoring import calibration_error
from tests.said import world

Array = np.ndarray[Any, Any]
LABELS = ("a", "b", "c", "d")


def coverage_of(p: Array, truth: Array, calibration: Calibration | SubsetCalibration) -> tuple[float, float]:
    """How often the prediction sets hold the truth, and how many labels they have in the mean."""
    inside = in_set(p, calibration)
    return float(inside[np.arange(len(p)), truth].mean()), float(inside.sum(axis=1).mean())


@pytest.mark.parametrize("sharp", [0.3, 1.0, 2.5])
def test_the_temperature_undoes_what_was_done_to_the_logits(sharp: float) -> None:
    logits, truth = world(2, 20_000, sharp)
    found = fit_temperature(logits, truth)
    assert found == pytest.approx(1 / sharp, rel=0.05)

    def loss(t: float) -> float:
        return float(-np.log(softmax(logits, t)[np.arange(len(truth)), truth]).mean())

    assert loss(found) <= min(loss(t) for t in np.geomspace(0.1, 10, 200)) + 1e-6


def test_biases_mend_what_a_temperature_cannot() -> None:
    logits, truth = world(6, 20_000)
    wrong = logits / 2 - np.array([1.0, 0.0, 0.0, -1.0])
    temperature, bias = fit_scale(wrong, truth)
    assert temperature == pytest.approx(0.5, rel=0.05)
    assert bias - bias.mean() == pytest.approx([2.0, 0.0, 0.0, -2.0], abs=0.1)
    right = softmax(wrong, temperature, bias)
    assert np.abs(right - softmax(logits)).max() < 0.05
    few = fit_scale(wrong[:40], truth[:40])[1]
    assert np.abs(few).max() < 1.0  # few windows hold them to zero
    perfect = fit_scale(np.eye(4)[truth[:400]] * 3, truth[:400])
    assert perfect[0] > 0.2
    assert np.abs(perfect[1]).max() < 0.5
    assert fit_scale(logits[:0], truth[:0])[0] == 1.0


def test_a_linear_map_mends_what_biases_cannot() -> None:
    """A model that is sure of `c` where it is a toss of a coin between `c` and `d`, and fair about the others."""
    logits, truth = world(6, 20_000)
    skew = np.array([[0.7, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 1.6, -1.2], [0, 0, -0.2, 0.5]])
    wrong = (logits - logits.mean(axis=1, keepdims=True)) @ skew.T
    temperature, bias = fit_scale(wrong, truth)
    more, mix = fit_mix(wrong, truth, temperature, bias)
    right = softmax(logits)
    assert np.abs(softmax(wrong, temperature, more, mix) - right).max() < 0.06
    assert np.abs(softmax(wrong, temperature, bias) - right).max() > 0.2
    assert np.abs(fit_mix(logits[:40], truth[:40], *fit_scale(logits[:40], truth[:40]))[1]).max() < 1.0
    perfect = np.eye(4)[truth[:400]] * 3
    assert np.isfinite(fit_mix(perfect, truth[:400], *fit_scale(perfect, truth[:400]))[1]).all()


def test_a_map_is_fitted_where_it_is_wanted_and_windows_are_many() -> None:
    logits, truth = world(7, 2000)
    given_ = {frozenset({"x"}): logits, frozenset({"y"}): np.where(np.arange(2000)[:, None] < 900, logits, np.nan)}
    plain = fit_calibration(given_, truth, LABELS)
    assert not plain.mix
    assert not any(one.mix for one in plain.subsets.values())
    mixed = fit_calibration(given_, truth, LABELS, mix=True)
    assert mixed.subsets["x"].mix
    assert not mixed.subsets["y"].mix  # 900 windows are too few for 20 numbers
    few = {frozenset(name): logits[:900] for name in "xyz"}
    assert not fit_calibration(few, truth[:900], LABELS, mix=True).mix  # each window counts once, not once a set
    answers = Answers(mixed, LABELS, ("x", "y"))
    members = np.array([[True, False], [False, True]])[np.arange(50) % 2]
    together = answers.probabilities(logits[:50], members)
    for i in range(50):  # live one by one, in training all at once: to the last bit the same
        assert np.array_equal(answers.probabilities(logits[i : i + 1], members[i : i + 1])[0], together[i])
    held = answers.probabilities(logits, np.tile([True, False], (2000, 1)))
    one = Answers(plain, LABELS, ("x", "y")).probabilities(logits, np.tile([True, False], (2000, 1)))
    rows = np.arange(2000)
    assert -np.log(held[rows, truth]).mean() <= -np.log(one[rows, truth]).mean()


@st.composite
def lines_of(draw: st.DrawFn) -> tuple[tuple[float, float], ...]:
    """Points that rise in both."""
    columns = [sorted(draw(st.sets(st.integers(1, 999), min_size=4, max_size=4))) for _ in range(2)]
    return tuple((x / 1000, y / 1000) for x, y in zip(*columns, strict=True))[: draw(st.integers(0, 4))]


@given(hnp.arrays(np.float64, (12, 4), elements=st.floats(-30, 30)), lines_of())
def test_straightened_probabilities_keep_their_label_and_the_proportions_of_the_rest(
    logits: Array, points: tuple[tuple[float, float], ...]
) -> None:
    p = softmax(logits)
    p[3] = np.nan
    p[4] = [0, 0, 1, 0]
    own = line(points, 6)
    found = straightened(p, np.broadcast_to(own, (12, *own.shape)))
    assert np.isnan(found[3]).all()
    kept = np.arange(12) != 3
    assert found[kept].sum(axis=1) == pytest.approx(1.0)
    assert ((found[kept] >= 0) & (found[kept] <= 1)).all()
    for before, after in zip(p[kept], found[kept], strict=True):
        top = int(before.argmax())
        assert int(after.argmax()) == top
        wanted = float(np.interp(before[top], [0, *(x for x, _ in points), 1], [0, *(y for _, y in points), 1]))
        assert after[top] >= wanted - 1e-9
        if after[top] > wanted + 1e-6:  # no further than to where another label is as probable
            assert after[top] == pytest.approx(np.delete(after, top).max(), abs=1e-6)
        if before[top] < 1:
            share = np.delete(after, top) * (1 - before[top])
            assert share == pytest.approx(np.delete(before, top) * (1 - after[top]), abs=1e-9)
        alone = straightened(before[None], own[None])[0]
        assert np.array_equal(alone, after)  # whatever else is asked with it


def test_a_confidence_that_is_off_in_the_middle_is_straightened() -> None:
    """As a sensor's with decoys: too sure at 0.7, not sure enough at 0.96. New windows are called as they should be."""
    random = np.random.default_rng(3)

    def windows(n: int) -> tuple[Array, Array]:
        said = random.choice([0.55, 0.7, 0.8, 0.96], n) + random.uniform(-0.02, 0.02, n)
        right = random.random(n) < np.interp(said, [0.5, 0.55, 0.7, 0.8, 0.96, 1], [0.5, 0.55, 0.6, 0.62, 0.99, 1])
        logits = np.stack([np.log(said), *[np.log((1 - said) / 3)] * 3], 1)
        return logits, np.where(right, 0, random.integers(1, 4, n))

    (logits, truth), (later, later_truth) = windows(20_000), windows(20_000)
    off = {}
    for straighten in (False, True):
        for n in (20_000, 1500):  # too few for 16 parts
            given_logits = {frozenset({"lidar"}): logits[:n]}
            found = fit_calibration(given_logits, truth[:n], LABELS, mix=True, straighten=straighten)
            answers = Answers(found, LABELS, ["lidar"])
            p = answers.probabilities(later, np.ones((len(later), 1), bool))
            off[straighten, n] = calibration_error(p.max(axis=1), p.argmax(axis=1) == later_truth)
            assert bool(found.at(["lidar"]).confidence) == bool(found.confidence) == (straighten and n > 1500)
    assert off[True, 20_000] < 0.015 < 0.04 < off[False, 20_000]
    assert off[True, 1500] == off[False, 1500]


def test_each_set_of_streams_has_its_own_line() -> None:
    """Of other lengths, or none; and windows of several sets are not more windows."""
    lines = {"x": SubsetCalibration(confidence=((0.5, 0.2), (0.9, 0.8))), "y": SubsetCalibration(confidence=())}
    answers = Answers(Calibration(confidence=((0.7, 0.9),), set_mass=0.5, subsets=lines), LABELS, ("x", "y"))
    logits = np.log([[0.7, 0.1, 0.1, 0.1]] * 3)
    p = answers.probabilities(logits, np.array([[True, False], [False, True], [True, True]]))
    assert p[:, 0] == pytest.approx([0.5, 0.7, 0.9])
    assert p[0, 1:] == pytest.approx([0.5 / 3] * 3)
    saw, truth = world(1, 900)
    three = {frozenset(key): saw for key in ("x", "y", "xy")}
    assert fit_calibration(three, truth, LABELS, straighten=True).confidence == ()


def test_a_temperature_of_a_perfect_model_stays_finite() -> None:
    truth = np.arange(200) % 4
    assert 0.02 <= fit_temperature(np.eye(4)[truth] * 3, truth) < 1
    assert fit_temperature(np.zeros((0, 4)), truth[:0]) == 1.0
    assert fit_temperature(np.ones((5, 4)), truth[:5]) > 0


@given(hnp.arrays(np.float64, (7, 5), elements=st.floats(-6, 6)))
def test_mass_before_is_the_mass_of_what_is_more_probable(logits: Array) -> None:
    p = softmax(logits)
    for row, found in zip(p, mass_before(p), strict=True):
        order = sorted(range(5), key=lambda i: (-row[i], i))
        before = 0.0
        for i in order:
            assert found[i] == before
            before += row[i]


@pytest.mark.parametrize("coverage", [0.8, 0.9, 0.97])
def test_sets_hold_the_truth_as_often_as_stated(coverage: float) -> None:
    (held, own), (later, truth) = world(10, 4000, 0.4), world(11, 4000, 0.4)
    for stated in (Calibration(set_mass=fit_mass(softmax(held), own, coverage)),
                   Calibration(set_threshold=fit_threshold(softmax(held), own, coverage))):  # fmt: skip
        found, size = coverage_of(softmax(later), truth, stated)
        assert found == pytest.approx(coverage, abs=0.02)
        assert 1 < size < 4


def test_exact_sets_hold_the_truth_as_often_as_stated_by_a_model_that_is_right_more_often() -> None:
    (held, own), (later, truth) = world(10, 4000, 12.0), world(11, 4000, 12.0)
    p = softmax(later)
    right = (p.argmax(axis=1) == truth).mean()
    assert right > 0.95
    logits = {frozenset("a"): held}
    exact = fit_calibration(logits, own, LABELS, coverage=0.9, sets="exact")
    loose = fit_calibration(logits, own, LABELS, coverage=0.9, sets="threshold")
    answers = Answers(exact, LABELS, ("a",))
    members = np.ones((len(later), 1), bool)
    p = answers.probabilities(later, members)
    label, abstains, inside = answers.judged(p, members)
    assert inside[np.arange(len(p)), truth].mean() == pytest.approx(0.9, abs=0.02)
    assert coverage_of(p, truth, loose.at("a"))[0] == pytest.approx(right, abs=0.02)
    empty = ~inside.any(axis=1)
    assert 0 < empty.mean() < 0.2
    assert (abstains | ~empty).all()
    assert (label[empty] != truth[empty]).mean() > 3 * (label[~empty] != truth[~empty]).mean()
    i = int(np.flatnonzero(empty)[0])
    assert answers.prediction_set(members[i], p[i]) == []
    assert answers.abstains(members[i], int(label[i]), float(p[i].max()))


def test_sets_of_too_few_windows_hold_everything() -> None:
    logits, truth = world(3, 5)
    p = softmax(logits)
    assert fit_mass(p, truth, 0.9) == 1.0
    assert fit_threshold(p, truth, 0.9) == 0.0
    assert in_set(p, Calibration(set_mass=1.0)).all()


@given(st.integers(0, 1000), st.integers(1, 300), st.floats(0.02, 0.5))
def test_no_class_is_denied_with_confidence_more_often_than_allowed(seed: int, n: int, wrong: float) -> None:
    logits, truth = world(seed, n, 0.5)
    p = softmax(logits)
    limits = fit_limits(p, truth, wrong)
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    counts = confidence > np.array([limits.get(int(c), -1.0) for c in predicted])
    for true in np.unique(truth):
        own = truth == true
        errors = int(np.sum(own & counts & (predicted != true)))
        assert errors <= max(0, math.floor(wrong * (own.sum() + 1)) - 1)


def test_a_limit_is_no_higher_than_it_must_be() -> None:
    # 40 windows of each class; of `a` ten are called b and one c, all with confidence.
    truth = np.repeat([0, 1, 2, 3], 40)
    predicted = truth.copy()
    predicted[:11] = [1] * 10 + [2]
    p = np.full((160, 4), 0.1)
    p[np.arange(160), predicted] = 0.7 + np.arange(160) / 1000
    p /= p.sum(axis=1, keepdims=True)
    limits = fit_limits(p, truth, 0.1)  # three errors are allowed: the one c, and two b
    assert set(limits) == {1}
    accepted = p[:10].max(axis=1) > limits[1]
    assert accepted.sum() == 2
    assert fit_limits(p, truth, 0.5) == {}


@given(st.integers(0, 1 << 16), st.integers(1, 400), st.floats(0.02, 0.9), st.floats(0.02, 0.9))
def test_no_answer_that_counts_is_wrong_more_often_than_allowed(
    seed: int, n: int, wrong: float, mistaken: float
) -> None:
    logits, truth = world(seed, n, 0.5)
    p = softmax(np.round(logits, 1))  # some are equally sure
    limits = fit_limits(p, truth, wrong, mistaken)
    predicted, confidence = p.argmax(axis=1), p.max(axis=1)
    for label in range(4):
        own = (predicted == label) & (confidence > limits.get(label, -1.0))
        errors = int(np.sum(own & (truth != label)))
        assert errors == 0 or errors + 1 <= mistaken * (own.sum() + 1) + 1e-9
    for label, limit in fit_limits(p, truth, wrong, 1 - 1e-9).items():
        assert limits[label] >= limit  # it comes on top of what each class is promised


def test_an_answer_that_is_never_wrong_has_no_limit() -> None:
    truth = np.array([0] * 50 + [1] * 3 + [2] * 50)
    predicted = np.array([0] * 50 + [1] * 3 + [2] * 25 + [3] * 25)
    p = np.full((103, 4), 0.1) + 0.5 * np.eye(4)[predicted]
    assert fit_limits(p / p.sum(axis=1, keepdims=True), truth, 0.9, 0.05) == {3: 1.0}  # `d` never was right


def test_a_decoy_that_fools_a_sensor_half_of_the_time_keeps_it_from_answering() -> None:
    """Of the microphone's sirens half are the neighbour's. They are a twentieth of `clear`, so that it would not be
    denied too often if all of them were called alarms; but an alarm would then be a toss of a coin."""
    random = np.random.default_rng(1)
    truth = random.choice(2, 6000, p=[0.95, 0.05])  # clear, alarm
    siren = (truth == 1) | (random.random(6000) < 0.05)
    heard = np.where(siren, 2.0, -4.0) + random.normal(0, 0.5, 6000)
    logits = np.stack([np.zeros(6000), heard], axis=1)
    p = softmax(logits)
    assert 1 not in fit_limits(p, truth, 0.1, 0.9)
    limit = fit_limits(p, truth, 0.1, 0.1)[1]
    answered = (p[:, 1] > 0.5) & (p[:, 1] > limit)
    assert answered[truth == 1].mean() < 0.05
    found = fit_calibration({frozenset({"microphone"}): logits}, truth, ("clear", "alarm"))
    assert found.at(["microphone"]).answer_above["alarm"] > 0.5


def test_what_looks_like_another_class_is_not_answered() -> None:
    """Without its camera a model takes a rare flash for calm; calm cannot be answered then, and shake still can."""
    random = np.random.default_rng(0)
    truth = random.choice(3, 4000, p=[0.7, 0.25, 0.05])  # calm, shake, flash
    seen = np.where(truth == 1, 1, 0)
    blind = np.array([[2.5, -2.0, 0.0], [-2.0, 3.0, -2.0]])[seen] + random.normal(0, 0.3, (4000, 3))
    sighted = np.eye(3)[truth] * 6 + random.normal(0, 0.3, (4000, 3))
    given_ = {frozenset({"imu"}): blind, frozenset({"imu", "camera"}): sighted}
    found = fit_calibration(given_, truth, ("calm", "shake", "flash"))
    assert set(found.at(["imu"]).answer_above) == {"calm"}
    assert found.at(["imu", "camera"]).answer_above == {}
    answers = Answers(found, ("calm", "shake", "flash"), ("imu", "camera"))
    member = np.array([True, False])
    p = answers.probabilities(blind, np.tile(member, (4000, 1)))
    silent = np.array([answers.abstains(member, int(row.argmax()), float(row.max())) for row in p])
    assert silent[truth == 2].mean() > 0.8
    assert silent[truth == 1].mean() < 0.05


def test_every_subset_is_calibrated_by_itself() -> None:
    logits, truth = world(4, 3000)
    given_ = {frozenset[str](): logits * 9, frozenset({"x"}): logits * 3, frozenset({"x", "y"}): logits / 2,
              frozenset({"y"}): logits[:]}  # fmt: skip
    given_[frozenset({"y"})] = np.where(np.arange(3000)[:, None] < 20, logits, np.nan)
    truth[:10] = -1
    found = fit_calibration(given_, truth, LABELS, coverage=0.8, abstain_below=0.2)
    assert sorted(found.subsets) == ["x", "x+y"]  # of y alone there are too few windows
    assert found.at(["x"]).temperature == pytest.approx(3.0, rel=0.05)
    assert found.at(["y", "x"]).temperature == pytest.approx(0.5, rel=0.05)
    assert found.at(["y"]) == found.at([]) != found
    assert (found.set_coverage, found.at(["x"]).set_coverage, found.at(["x"]).abstain_below) == (0.8, 0.8, 0.2)
    for streams in (["x"], ["x", "y"]):
        members = np.tile(["x" in streams, "y" in streams], (3000, 1))
        p = Answers(found, LABELS, ("x", "y")).probabilities(given_[frozenset(streams)], members)
        assert coverage_of(p[10:], truth[10:], found.at(streams))[0] == pytest.approx(0.8, abs=0.01)
    with pytest.raises(ValueError, match="no held-out window"):
        fit_calibration({frozenset({"x"}): logits}, np.full(3000, -1), LABELS)
    other = fit_calibration(given_, truth, LABELS, sets="threshold")
    assert other.set_mass == 0.0
    assert 0 < other.set_threshold < 1


def test_each_row_is_calibrated_by_the_streams_that_it_was_made_from() -> None:
    own = {
        "x": SubsetCalibration(temperature=3.0, bias={"c": 0.5}),
        subset_key({"y", "x"}): SubsetCalibration(abstain_below=0.4),
    }
    answers = Answers(Calibration(temperature=2.0, set_mass=0.5, subsets=own), LABELS, ("x", "y"))
    members = np.array([[False, False], [True, False], [False, True], [True, True]])
    logits = np.tile([1.0, 0.0, -1.0, 3.0], (4, 1))
    found = answers.probabilities(logits, members)
    for row, temperature in zip(found, (2.0, 3.0, 2.0, 2.0), strict=True):
        bias = np.array([0.0, 0.0, 0.5 if temperature == 3.0 else 0.0, 0.0])
        assert row.tolist() == softmax(logits[:1], temperature, bias)[0].tolist()
    assert answers.abstains(members[3], 0, 0.39)
    assert not answers.abstains(members[1], 0, 0.39)
    assert answers.prediction_set(members[1], np.array([0.3, 0.1, 0.4, 0.2])) == ["c", "a"]
