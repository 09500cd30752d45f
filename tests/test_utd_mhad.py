"""The UTD-MHAD benchmark's own code: clips as sessions, corruption, folds. Its accuracy is the benchmark's to tell."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.align import AlignSpec, Resample, StreamSpec

pytest.importorskip("torch")
FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def data() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("utd_mhad_data")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def bench(data: Any) -> Any:
    return importlib.import_module("utd_mhad")


def _clip(data: Any, frames: int = 67, samples: int = 177) -> Any:
    rng = np.random.default_rng(1)
    skeleton = rng.normal(0, 1, (frames, 60)).cumsum(axis=0).astype(np.float32)
    inertial = rng.normal(0, 1, (samples, 6)).cumsum(axis=0).astype(np.float32)
    return data.Clip(9, 3, 2, {"skeleton": skeleton, "inertial": inertial})


@pytest.mark.parametrize(("frames", "samples"), [(67, 177), (41, 326), (16, 107)])
def test_a_step_is_the_whole_clip_by_fraction(data: Any, frames: int, samples: int) -> None:
    clip, gap = _clip(data, frames, samples), data.SPAN_NS
    streams = (
        StreamSpec(name="skeleton", payload="signal", rule=Resample(15, gap), channels=60),
        StreamSpec(name="inertial", payload="imu", rule=Resample(20, gap), channels=6),
    )
    made = data.session(clip, ("skeleton", "inertial"))
    [step] = made.steps(AlignSpec(hop_ns=data.SPAN_NS, streams=streams), "event_time")
    assert made.attributes == {"subject": "3"}
    assert made.labels(data.ACTIONS)[0].label == "draw_circle_cw"
    for name, points in (("skeleton", 48), ("inertial", 64)):
        rows = clip.rows[name]
        at = np.arange(points) / points * (len(rows) - 1) / 0.998
        wanted = np.stack([np.interp(at, np.arange(len(rows)), column) for column in rows.T], 1)
        np.testing.assert_allclose(step.content[name], wanted, atol=2e-3 * np.abs(rows).max())
        assert step.manifest.streams[name].verdict == "ok"


def test_corruption_hits_only_what_it_names_and_rises(data: Any) -> None:
    clip = _clip(data)
    scale = {name: rows.std(axis=0) for name, rows in clip.rows.items()}
    rising = {"noise": (0.5, 2.0), "shift": (0.1, 0.4), "loss": (0.5, 0.95), "frozen": (0.2, 0.8)}
    for kind, severities in rising.items():
        off = []
        for severity in severities:
            change = data.corrupted(data.Corruption(kind, severity, ("skeleton",)), scale)
            assert change(clip, "inertial") is clip.rows["inertial"]
            spoiled = change(clip, "skeleton")
            np.testing.assert_array_equal(spoiled, change(clip, "skeleton"))  # the same every time
            assert spoiled.shape == clip.rows["skeleton"].shape
            off.append(float(np.abs(spoiled - clip.rows["skeleton"]).mean()))
        assert 0 < off[0] < off[1], kind


def test_depth_rows_see_a_body_wherever_it_stands(data: Any) -> None:
    picture = np.zeros((60, 80), np.uint16)
    picture[10:50, 38:44] = 2500
    moved = np.zeros_like(picture)
    moved[10:50, 18:24] = 2500
    one, other = data.depth_rows(picture), data.depth_rows(moved)
    np.testing.assert_allclose(one[:-3], other[:-3], atol=1e-6)
    assert other[-3] < one[-3]
    assert not data.depth_rows(np.zeros((60, 80), np.uint16)).any()


def test_missing_data_says_where_to_get_it(data: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="utdallas"):
        data.load_clips(tmp_path, depth=False)


def test_streams_are_weighed_by_people_who_are_trained_on_and_never_by_those_tested(bench: Any) -> None:
    run = bench.Run("late", bench.PAIR, bench.ODD, bench.EVEN, weighed=True)
    folds = bench.folds_of(run)
    assert [fold.test for fold in folds] == [(subject,) for subject in bench.ODD]
    for fold in folds:
        assert {*fold.train, *fold.test} == {*bench.ODD}
        assert len(fold.train) == 3
    assert bench.folds_of(run._replace(weighed=False)) == []


@pytest.mark.parametrize("strategy", ["late", "early", "hybrid"])
def test_the_settings_make_a_training_file_for_every_strategy(bench: Any, strategy: str) -> None:
    run = bench.Run(strategy, bench.ALL, bench.ODD, bench.EVEN, apart=strategy == "late")
    file = bench.configuration(run, 3, None).file
    assert (file.strategy, file.seed, file.fusion.apart) == (strategy, 3, strategy == "late")
    assert file.split.test == ("2", "4", "6", "8")


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_clips_of_made_up_people_go_all_the_way(
    bench: Any, data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weighed by folds, trained and tested; accuracy is not the point."""
    monkeypatch.setitem(bench.TEACHERS, "count", 1)
    rng = np.random.default_rng(0)
    made = []
    for subject in (1, 3, 2):
        for action in range(1, 28):
            skeleton = rng.normal(0, 1, (20, 60)).cumsum(axis=0).astype(np.float32) + action
            inertial = rng.normal(0, 1, (30, 6)).cumsum(axis=0).astype(np.float32) + action
            made.append(data.Clip(action, subject, 1, {"skeleton": skeleton, "inertial": inertial}))
    clips = bench.Clips(made, tmp_path)
    run = bench.Run("late", bench.PAIR, (1, 3), (2,), apart=True, weighed=True)
    heard = [bench.heard_of(clips, fold, 1, "cpu") for fold in bench.folds_of(run)]
    outcome = bench.evaluate(clips, run, 0, 1, (), "cpu", heard)
    rows = bench.rows_of(run, [outcome])
    assert [row["subset"] for row in rows] == ["skeleton", "inertial", "skeleton+inertial"]
    assert all(0 <= row["accuracy"] <= 100 and row["by_subject"].keys() == {2} for row in rows)
