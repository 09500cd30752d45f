"""The summary at the end of a run: its numbers against plain computations."""

from __future__ import annotations

import io
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pipeline.align import Counters
from pipeline.prediction import BundleRef, Prediction, StreamReport, Timing, WindowSpan
from pipeline.reports import closing
from pipeline.summary import Quantiles, Summary, account, ordered


def prediction(index: int = 10, label: str | None = "yes", truth: str | None = None, **latency_ms: float) -> Prediction:
    return Prediction(
        session="s",
        window=WindowSpan(index=index, start_ns=(index - 10) * 10**8, end_ns=index * 10**8),
        label=label,
        confidence=0.5,
        scores={"yes": 0.5, "no": 0.5},
        set=["yes", "no"],
        abstained=label is None,
        streams={
            "camera": StreamReport(verdict="ok", contribution=0.25),
            "imu": StreamReport(verdict="missing", reason="dead", contribution=0.0),
        },
        sync_uncertainty_ms=None,
        timing=Timing(latency_ms=latency_ms),
        bundle=BundleRef(name="b", sha256="0" * 64),
        digest="",
        truth=truth,
    )


@given(st.lists(st.floats(0.01, 1e5), min_size=1), st.sampled_from([0.01, 0.5, 0.95, 0.99, 1.0]))
def test_a_quantile_is_that_of_the_sorted_values_to_one_per_cent(values: list[float], q: float) -> None:
    series = Quantiles()
    for value in values:
        series.add(value)
    exact = sorted(values)[math.ceil(q * len(values)) - 1]
    assert series.quantile(q) == pytest.approx(exact, rel=0.01)
    assert series.maximum == max(values)


def test_a_long_series_takes_no_more_memory_than_its_range() -> None:
    series = Quantiles()
    for i in range(50_000):
        series.add(1.0 + i % 1000 / 1000)
    assert len(series._bins) <= 72  # ln 2 / ln 1.01, and both ends


def test_no_value_has_no_quantile_and_zero_is_a_value() -> None:
    assert math.isnan(Quantiles().quantile(0.5))
    series = Quantiles()
    series.add(0.0)
    assert series.quantile(0.5) == 0.0


def test_predictions_are_added_up() -> None:
    summary = Summary()
    summary.add(prediction(10, "yes", truth="yes", total=5.0))
    summary.add(prediction(11, "no", truth="yes", total=5.0))
    summary.add(prediction(12, None))
    values = summary.as_dict()
    assert values["predictions"] == 3
    assert values["abstained"] == 1
    assert values["span_s"] == pytest.approx(0.2)
    assert values["accuracy"] == 0.5
    assert values["with_truth"] == 2
    assert values["labels"] == {"yes": 1, "no": 1}
    assert values["verdicts"] == {"camera": {"ok": 3}, "imu": {"missing(dead)": 3}}
    assert values["latency_ms"]["total"]["max"] == 5.0


def said(summary: Summary) -> str:
    shown = io.StringIO()
    Console(file=shown, width=1000).print(closing(summary))
    return shown.getvalue()


def test_the_counts_by_label_sum_to_the_predictions() -> None:
    summary = Summary()
    for label in ("yes", "no", None, "yes"):
        summary.add(prediction(10, label))
    assert "4 predictions over 0.0 s (yes 2, no 1, no label 1)" in said(summary)
    for label in "abcdefgh":
        summary.add(prediction(11, label))
    assert "(yes 2, no 1, a 1, b 1, c 1, d 1, other labels 4, no label 1)" in said(summary)


def test_accuracy_is_told_of_all_and_of_those_that_were_answered() -> None:
    summary = Summary()
    for label, truth, abstained in (("yes", "yes", True), ("yes", "yes", False), ("no", "yes", False)):
        summary.add(msgspec.structs.replace(prediction(10, label, truth=truth), abstained=abstained))
    shown = said(summary)
    assert "abstained 1 time; accuracy 0.667: 2 of 3 with a known truth, abstained or not; 0.500 where " in shown
    assert "where it answered: 1 of 2" in shown
    assert (summary.as_dict()["answered"], summary.as_dict()["answered_accuracy"]) == (2, 0.5)
    summary = Summary()
    summary.add(msgspec.structs.replace(prediction(10, "yes", truth="yes"), abstained=True))
    assert "it abstained from all of them" in said(summary)
    assert summary.as_dict()["answered_accuracy"] is None


def test_a_truth_that_the_model_has_no_label_for_is_said_and_does_not_count() -> None:
    summary = Summary()
    for _ in range(2):
        summary.add(prediction(10, "yes", truth="tilt"))
    assert summary.as_dict()["accuracy"] is None
    assert summary.as_dict()["foreign_labels"] == {"tilt": 2}
    shown = said(summary)
    assert "accuracy 0" not in shown
    assert "2 predictions cannot be right: their truth (tilt) is none of the model's labels (yes, no), so" in shown
    summary.add(prediction(11, "no", truth="no"))
    assert "accuracy 1.000: 1 of 1 with a known truth" in said(summary)
    assert "they do not count" in said(summary)


def test_windows_without_a_prediction_are_named() -> None:
    summary = Summary()
    for index in (10, 11, 40, 42):
        summary.add(prediction(index))
    assert summary.as_dict()["gaps"] == [{"from": 12, "to": 39}, {"from": 41, "to": 41}]
    shown = io.StringIO()
    Console(file=shown, width=120).print(closing(summary))
    assert "29 windows have no prediction, for a node had died: 12 to 39, 41" in shown.getvalue()


def test_accuracy_is_not_claimed_where_no_truth_is_known() -> None:
    summary = Summary()
    summary.add(prediction())
    assert summary.as_dict()["accuracy"] is None


@given(st.lists(st.integers(0, 10**6), min_size=9, max_size=9))
def test_every_message_has_one_place(n: list[int]) -> None:
    counters = Counters(
        received=sum(n[:8]), used=n[0], late=n[1], superseded=n[2], duplicate=n[3],
        rejected={"epoch": n[4], "bound": n[5]}, buffered=n[6], no_window=n[7], lost=n[8],
    )  # fmt: skip
    places = account(counters)
    assert places["sent"] == places["received"] + places["lost"]
    inside = ("used", "late", "no_window", "superseded", "duplicate", "rejected", "buffered")
    assert places["received"] == sum(places[place] for place in inside)


def test_stages_stand_in_the_order_of_the_way_of_the_data() -> None:
    assert ordered(["total", "fuse", "novel", "wait", "encode"]) == ["wait", "encode", "fuse", "novel", "total"]
