"""benchmarks/rover.py: what counts as observable, and when a goal is reached."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest

from benchmarks.rover import goals, observable, table
from pipeline.sim.cues import CUES, LABELS, SENSORS


def test_a_class_is_observable_by_two_cues() -> None:
    assert observable([*SENSORS]) == {*LABELS}
    for lost in SENSORS:
        assert observable([s for s in SENSORS if s != lost]) == {*LABELS}
    assert observable(["imu", "microphone"]) == {"clear", "rough_ground", "impact"}
    assert observable(["camera"]) == {"clear"}
    assert all(len(sensors) >= 3 for sensors in CUES.values())


def line(streams: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """A row as measured, of a model that reaches everything."""
    rest = sorted({*LABELS} - observable([*streams]))
    accuracy = {4: 96.0, 3: 93.0, 2: 86.0, 1: 80.0}[len(streams)]
    return {
        "streams": "+".join(streams), "accuracy": accuracy, "accuracy_interval": [accuracy - 1, accuracy + 1],
        "macro_f1": 90.0, "ece": 2.0, "ece_interval": [None, None], "coverage": 90.0, "set_size": 1.0,
        "coverage_interval": [89.0, 91.0], "abstained": 8.0, "right_if_answered": 98.0, "over_observable": accuracy,
        "all_sensors_there": 96.0, "not_observable": rest, "abstains_on_rest": 85.0 if rest else None,
    } | more  # fmt: skip


def rows() -> list[dict[str, Any]]:
    return [line(some) for size in (4, 3, 2, 1) for some in combinations(SENSORS, size)]


def test_every_goal_can_be_reached_and_missed() -> None:
    assert all(goal["reached"] for goal in goals(rows()))
    for i, key, value in (
        (0, "accuracy", 94.9), (0, "accuracy", 89.0), (1, "over_observable", 90.9), (6, "abstains_on_rest", 79.0),
        (14, "ece", 5.1), (9, "coverage", 87.9), (3, "coverage", 92.1),
    ):  # fmt: skip
        spoilt = rows()
        spoilt[i] |= {key: value, "not_observable": ["tilt"]}
        missed = [goal for goal in goals(spoilt) if not goal["reached"]]
        assert missed, key
        assert any(goal["found"] == pytest.approx(value) or key in ("accuracy", "over_observable") for goal in missed)


def test_the_table_has_a_line_for_each_set_of_sensors() -> None:
    made = rows()
    about: dict[str, Any] = {"bundle": "rover", "ranges": "train", "sessions": 2, "windows": 9}
    text = table({**about, "rows": made, "goals": goals(made)})
    starts = [line.split(" | ")[0] for line in text.splitlines()]
    assert all(f"| {one['streams'].replace('+', ', ')}" in starts for one in made[1:])
    assert "| all | 96.0 (95.0 to 97.0) | 2.0 | 90.0 (89.0 to 91.0) |" in text
