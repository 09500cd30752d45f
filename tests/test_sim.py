"""The simulated rover: its sensors agree with its physics and with each other, and a decoy deceives one sensor alone.

Physics and pictures need MuJoCo and OpenGL without a window system; where they are missing these tests are skipped and
say what to install.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner

from nodes.simulated import Simulated
from pipeline.cli import app
from pipeline.errors import ConfigError, Interrupted, RecordingError, install
from pipeline.messages import array
from pipeline.prediction import Prediction
from pipeline.recording import Label, RecordingReader, RecordingWriter, SessionInfo
from pipeline.sim import cues, generate
from pipeline.sim.cues import CUES, DELAY_S, LABELS, SENSORS
from pipeline.sim.generate import record_session, record_sessions, session_file
from pipeline.sim.ranges import RANGES, draw
from pipeline.sim.script import APART_S, TWICE, Act, Spell, block
from pipeline.sim.world import BALL_M, CAMERA_AT, FAR_M, FOVY_DEG, LIDAR_AT
from tests.rigs import make_rig, short_folder, simulation_lacks

NS = 1_000_000_000
LIDAR_TO_CAMERA_M = CAMERA_AT[0] - LIDAR_AT[0]
START_S = 0.5
"""When the act of a test begins."""


@pytest.fixture(scope="module")
def simulation() -> Iterator[Callable[..., Any]]:
    """Makes simulations, and closes them."""
    if lacks := simulation_lacks():
        pytest.skip(lacks)
    from pipeline.sim.session import Simulation

    made: list[Any] = []

    def make(seed: int, **more: Any) -> Any:
        made.append(Simulation(seed, **more))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Session:
    """What a simulation sent: by stream arrays over time, the pose, and the labels."""

    def __init__(self, simulation: Any, seconds: float, act: Act | None = None) -> None:
        self.items = list(simulation.until(round(START_S * NS)))
        if act is not None:
            simulation.stage.begin(act)
        self.items += simulation.until(round(seconds * NS))
        self.labels = [what for _, what in self.items if isinstance(what, Label)]
        self.messages: dict[str, list[Any]] = {name: [] for name in (*SENSORS, "pose")}
        for _, what in self.items:
            if not isinstance(what, Label) and not what.header.is_beat:
                self.messages[what.header.stream].append(what)

    def samples(self, stream: str) -> tuple[Any, Any]:
        """Times in s, corrected by what the stamps are off, and values [samples, columns]."""
        times, values = [], []
        for message in self.messages[stream]:
            data = array(message)
            if stream == "microphone":
                rate = message.header.layout.rate_hz
                offsets, found = np.arange(len(data)) / rate * NS, data.astype(float) / 32768
            else:
                columns = [data["accel"], data["gyro"]] if stream == "imu" else [data["value"]]
                offsets, found = data["offset_ns"], np.concatenate(columns, axis=1).astype(float)
            times.append((message.header.t_capture_ns + offsets) / NS)
            values.append(found)
        return np.concatenate(times), np.concatenate(values)

    def bytes_of(self, stream: str) -> list[bytes]:
        return [bytes(memoryview(np.ascontiguousarray(m.data)).cast("B")) if not isinstance(m.data, bytes) else m.data
                for m in self.messages[stream]]  # fmt: skip

    def truth(self, t_s: float) -> str | None:
        return next((x.label for x in self.labels if x.start_ns < t_s * NS <= x.end_ns), None)


def act(label: str, seen_by: tuple[str, ...] | None = None, lasts_s: float = 6.0, seed: int = 1) -> Act:
    sensors = CUES[label] if seen_by is None else seen_by  # type: ignore[index]
    return Act(label, sensors, START_S, START_S + lasts_s, seed)  # type: ignore[arg-type]


def onset(labels: list[Label], label: str) -> float:
    """When ``label`` began to be true, in s."""
    return next(x.start_ns for x in labels if x.label == label) / NS


# -- what is said of it ------------------------------------------------------------------------------------------------


def test_the_tables_of_the_text_are_those_of_the_code() -> None:
    tables = re.findall(r"^(\w[\w ]*?)  +camera .*?\n=+[ =]+\n(.*?)\n=+[ =]+$", cues.__doc__ or "", re.M | re.S)
    assert len(tables) == 2
    for _, body in tables:
        found: dict[str, tuple[str, ...]] = {}
        for line in body.splitlines():
            cells = [line[i:j].strip() for i, j in ((0, 14), (14, 38), (38, 63), (63, 88), (88, 130))]
            if cells[0]:
                found[cells[0]] = tuple(s for s, cell in zip(SENSORS, cells[1:], strict=True) if cell not in ("", "--"))
        assert {label: sensors for label, sensors in found.items() if label != "clear"} == CUES


def test_every_class_stays_observable_without_any_one_sensor() -> None:
    """Two cues are left, which no decoy has."""
    assert set(CUES) | {"clear"} == set(LABELS)
    for sensors in CUES.values():
        assert all(len(set(sensors) - {lost}) >= 2 for lost in SENSORS)


def test_a_block_has_every_class_and_keeps_acts_of_one_label_apart() -> None:
    decoys = set()
    for seed in range(30):
        made = block(seed, 0, 10.0)
        events = [a.label for a in made.acts if a.real]
        assert sorted(events) == sorted([*CUES, *TWICE])
        for one in made.acts:
            assert 10.0 <= one.start_s < one.end_s <= made.end_s
            if not one.real:
                decoys.add((one.label, *one.seen_by))
            for other in made.acts:
                if one is not other and one.label == other.label and not (one.real and other.real):
                    assert one.start_s > other.end_s + APART_S or other.start_s > one.end_s + APART_S
        ends = [spell.end_s for spell in made.spells]
        assert all(a <= b.start_s for a, b in zip(ends, made.spells[1:], strict=False))
    assert decoys == {(label, sensor) for label, sensors in CUES.items() for sensor in sensors}


def test_held_out_worlds_are_others() -> None:
    train, held_out = (msgspec.structs.asdict(RANGES[name]) for name in ("train", "held-out"))
    assert all(low <= draw("train", 3).values[name] <= high for name, (low, high) in train.items())
    assert all(held_out[name] != spread for name, spread in train.items())
    assert draw("train", 3) == draw("train", 3) != draw("train", 4)


# -- sensors and physics -----------------------------------------------------------------------------------------------


def depth_of(one: Any) -> Any:
    """The camera's depth image of what the LiDAR can see, too: f4 [240, 320] m along the line of sight."""
    import mujoco

    renderer = mujoco.Renderer(one.rover.model, 240, 320)
    try:
        renderer.enable_depth_rendering()
        options = mujoco.MjvOption()
        options.geomgroup[:] = [1, 0, 1, 0, 0, 0]
        renderer.update_scene(one.rover.data, "camera", options)
        return renderer.render()
    finally:
        renderer.close()


@pytest.mark.parametrize("seed", [5, 6])
def test_the_lidar_measures_what_the_renderer_sees(simulation: Callable[..., Any], seed: int) -> None:
    """Points ahead, projected into the depth image of the rover at rest: nineteen of twenty lie within 6 cm of what
    the nine pixels there span (far away, the ground's depth changes by much from pixel to pixel)."""
    one = simulation(seed, script=False)
    one.stage.limits = (0.0, 0.0)
    cloud = array(Session(one, 2.0).messages["lidar"][-1])
    depth, data, camera = depth_of(one), one.rover.data, one.rover.model.camera("camera").id
    points = np.stack([cloud["x"], cloud["y"], cloud["z"]], 1) + LIDAR_AT
    world = one.rover.position + points @ one.rover.rotation.T
    seen = (world - data.cam_xpos[camera]) @ data.cam_xmat[camera].reshape(3, 3)  # x right, y up, looking along -z
    seen = seen[seen[:, 2] < -0.5]
    focal = 120 / np.tan(np.deg2rad(FOVY_DEG / 2))
    column, row = 160 + focal * seen[:, 0] / -seen[:, 2], 120 - focal * seen[:, 1] / -seen[:, 2]
    inside = (column > 2) & (column < 317) & (row > 2) & (row < 237)
    column, row, away = column[inside].astype(int), row[inside].astype(int), -seen[inside, 2]
    around = np.stack([depth[row + i, column + j] for i in (-1, 0, 1) for j in (-1, 0, 1)])
    error = np.maximum(around.min(axis=0) - away, away - around.max(axis=0))
    assert len(error) > 60
    assert np.quantile(error, 0.95) < 0.06


def test_the_nearest_range_is_the_depth_of_who_comes(simulation: Callable[..., Any]) -> None:
    """Within 0.4 m: the sweep is up to 0.2 s old, in which somebody comes 0.3 m nearer."""
    one = simulation(5, script=False)
    one.stage.limits = (0.0, 0.0)
    cloud = array(Session(one, 2.8, act("approach")).messages["lidar"][-1])
    ahead = (np.abs(np.arctan2(cloud["y"], cloud["x"])) < np.deg2rad(30)) & (cloud["z"] > -0.2)
    depth = depth_of(one)[:125, 20:300]  # above the ground
    assert cloud["x"][ahead].min() - LIDAR_TO_CAMERA_M == pytest.approx(depth.min(), abs=0.4)
    assert depth.min() < 5.0


def test_the_imu_integrates_to_the_pose(simulation: Callable[..., Any]) -> None:
    """Over 8 s of driving: heading within 1 degree, speed within 0.25 m/s (its bias is subtracted), roll from gravity
    within 1 degree at rest."""
    one = simulation(8, script=False)
    ran = Session(one, 8.0)
    t, imu = ran.samples("imu")
    t_pose, pose = ran.samples("pose")
    turned = np.concatenate([[0.0], np.cumsum(imu[:-1, 5] * np.diff(t))])
    yaw = np.interp(t, t_pose, np.unwrap(pose[:, 5]))
    assert np.ptp(yaw) > np.deg2rad(3)
    assert np.abs((turned - turned[0]) - (yaw - yaw[0])).max() < np.deg2rad(1.0)
    forward = imu[:, 0] - one._bias[0] - 9.81 * np.sin(-np.interp(t, t_pose, pose[:, 4]))
    gained = np.concatenate([[0.0], np.cumsum(forward[:-1] * np.diff(t))])
    speed = np.interp(t, t_pose, pose[:, 6])
    assert np.ptp(speed) > 0.2
    assert np.abs((gained - gained[0]) - (speed - speed[0])).max() < 0.25
    assert np.median(imu[:, 2]) == pytest.approx(9.81, abs=0.3)


def test_an_impact_is_one_moment_for_force_sound_motion_and_truth(simulation: Callable[..., Any]) -> None:
    """The force's onset, the thud's and the jolt's lie within 25 ms, and the label begins 0.25 s after."""
    for seed in (3, 4):
        ran = Session(simulation(seed, script=False), 3.2, act("impact", lasts_s=2.5, seed=seed))
        t_pose, pose = ran.samples("pose")
        hit = t_pose[np.flatnonzero(pose[:, 7] > 50)[0]]
        t, imu = ran.samples("imu")
        quiet = (t > START_S) & (t < hit - 0.3)
        accel = np.linalg.norm(imu[:, :3] - imu[quiet, :3].mean(0), axis=1)
        jolt = t[np.flatnonzero((accel > 8 * accel[quiet].std() + accel[quiet].mean()) & (t > START_S))[0]]
        t_sound, sound = ran.samples("microphone")
        before = np.abs(sound[(t_sound > 0.2) & (t_sound < hit - 0.1), 0]).max()
        thud = t_sound[np.flatnonzero((np.abs(sound[:, 0]) > 2 * before) & (t_sound > 0.2))[0]]
        assert abs(jolt - hit) < 0.025
        assert abs(thud - hit) < 0.025
        assert onset(ran.labels, "impact") == pytest.approx(hit + DELAY_S, abs=0.03)
        pieces = sum(x.end_ns - x.start_ns for x in ran.labels if x.label == "impact") / NS
        assert pieces == pytest.approx(0.7, abs=0.05)


def test_a_tilt_is_the_same_for_pose_gravity_horizon_and_ground(simulation: Callable[..., Any]) -> None:
    one = simulation(6, script=False)
    ran = Session(one, 3.5, act("tilt", lasts_s=4.0))
    t_pose, pose = ran.samples("pose")
    roll = pose[t_pose > 2.5, 3].mean()
    assert abs(roll) > np.deg2rad(7)
    t, imu = ran.samples("imu")
    late = imu[t > 2.5, :3].mean(0) - one._bias[:3]
    assert np.arctan2(late[1], late[2]) == pytest.approx(roll, abs=np.deg2rad(1.5))
    cloud = array(ran.messages["lidar"][-1])
    ground = np.stack([cloud["x"], cloud["y"], cloud["z"]], 1)[np.abs(cloud["y"]) < 2.0]
    plane, *_ = np.linalg.lstsq(np.c_[ground[:, :2], np.ones(len(ground))], ground[:, 2], rcond=None)
    assert -np.arctan(plane[1]) == pytest.approx(roll, abs=np.deg2rad(2.0))
    assert ran.truth(3.0) == "tilt"
    half = t_pose[np.flatnonzero(np.abs(pose[:, 3]) > abs(one.stage._plays[0].angle) / 2)[0]]
    assert onset(ran.labels, "tilt") == pytest.approx(half + DELAY_S, abs=0.04)


def test_rough_ground_shakes_and_crunches_while_it_is_true(simulation: Callable[..., Any]) -> None:
    ran = Session(simulation(2, script=False), 6.0, act("rough_ground", lasts_s=7.0))
    begin = onset(ran.labels, "rough_ground")
    t, imu = ran.samples("imu")
    before, during = (imu[(t > a) & (t < b), 2].std() for a, b in ((0.2, begin - 0.4), (begin, begin + 1.5)))
    assert during > 3 * before
    t, sound = ran.samples("microphone")
    fine = np.diff(sound[:, 0])  # stones crackle far above the motors' whine
    before, during = (fine[(t[1:] > a) & (t[1:] < b)].std() for a, b in ((0.2, begin - 0.4), (begin, begin + 1.5)))
    assert during > 1.5 * before


def test_an_alarm_sounds_flashes_and_bars_the_way(simulation: Callable[..., Any]) -> None:
    one = simulation(4, script=False)
    ran = Session(one, 3.0, act("alarm", lasts_s=4.0))
    t, sound = ran.samples("microphone")
    before, during = (sound[(t > a) & (t < b), 0].std() for a, b in ((0.2, 0.45), (1.0, 2.9)))
    assert during > 2 * before
    bright = [int((array(m)["intensity"] > 150).sum()) for m in ran.messages["lidar"]]
    assert max(bright[:5]) == 0
    assert min(bright[12:]) > 5
    assert onset(ran.labels, "alarm") == pytest.approx(START_S + DELAY_S, abs=0.03)


def test_somebody_comes_nearer_for_all_that_can_tell(simulation: Callable[..., Any]) -> None:
    ran = Session(simulation(17, script=False), 3.0, act("approach"))
    begin = onset(ran.labels, "approach")
    ranges = {}
    for message in ran.messages["lidar"]:
        cloud = array(message)
        ahead = (np.abs(np.arctan2(cloud["y"], cloud["x"])) < np.deg2rad(35)) & (cloud["z"] > -0.25)
        if ahead.any():
            ranges[message.header.t_capture_ns / NS] = np.hypot(cloud["x"], cloud["y"])[ahead].min()
    at_begin = min(ranges, key=lambda t: abs(t - begin))
    assert ranges[at_begin] == pytest.approx(6.0, abs=0.4)
    assert ranges[max(ranges)] < ranges[at_begin] - 1.0


# -- decoys ------------------------------------------------------------------------------------------------------------

ALONE = [
    (label, sensor)
    for label, sensors in CUES.items()
    for sensor in sensors
    if (label, sensor) not in {("impact", "camera"), ("impact", "lidar")}
]
"""The decoys that change one sensor's readings and not a bit of the others'. The rest throw a ball that camera and
LiDAR both see."""


STEADY, HURRIED = 17, 5
"""Seeds whose rover drives at a speed that no act limits, and at one that acts do."""


@pytest.fixture(scope="module")
def undisturbed(simulation: Callable[..., Any]) -> Session:
    return Session(simulation(STEADY, script=False), 1.9)


@pytest.mark.parametrize(("label", "sensor"), ALONE)
def test_a_decoy_is_seen_by_one_sensor_alone(
    simulation: Callable[..., Any], undisturbed: Session, label: str, sensor: str
) -> None:
    one = simulation(STEADY, script=False)
    ran = Session(one, 1.9, act(label, (sensor,), seed=2))
    assert {x.label for x in ran.labels} == {"clear"}
    changed = [other for other in SENSORS if undisturbed.bytes_of(other) != ran.bytes_of(other)]
    assert changed == [sensor]


@pytest.mark.parametrize("sensor", ["camera", "lidar"])
def test_a_ball_that_misses_is_no_impact(simulation: Callable[..., Any], sensor: str) -> None:
    ran = Session(simulation(STEADY, script=False), 2.6, act("impact", (sensor,), lasts_s=2.5, seed=3))
    assert {x.label for x in ran.labels} == {"clear"}
    t, imu = ran.samples("imu")
    _, pose = ran.samples("pose")
    assert pose[:, 7].max() == 0.0
    assert np.linalg.norm(imu[t > 0.4, :3] - np.median(imu[:, :3], axis=0), axis=1).max() < 10.0


@pytest.mark.parametrize("seed", [STEADY, HURRIED])
@pytest.mark.parametrize("label", [label for label, sensors in CUES.items() if "imu" in sensors])
def test_to_the_imu_its_decoy_is_what_the_event_is(simulation: Callable[..., Any], label: str, seed: int) -> None:
    """Bit by bit until a second after it, to a few cm/s² from then on; and it is not nothing."""
    felt = []
    for seen_by in (CUES[label], ("imu",), None):  # type: ignore[index]
        one = simulation(seed, script=False)
        ran = Session(one, 6.5, None if seen_by is None else act(label, seen_by, lasts_s=3.2, seed=3))
        felt.append(ran.samples("imu"))
        assert ({x.label for x in ran.labels} == {"clear"}) == (seen_by != CUES[label])  # type: ignore[index]
    (t, event), (_, decoy), (_, nothing) = felt
    until = t < START_S + 3.2 + 0.95
    assert np.array_equal(event[until], decoy[until])
    assert np.abs(event - decoy).max() < 0.05
    assert np.abs(event - nothing).max() > 1.0


def of_the_imu(items: list[Any]) -> tuple[Any, Any]:
    """Times in s, and accelerations [n, 3]."""
    messages = [w for _, w in items if not isinstance(w, Label) and w.header.stream == "imu"]
    times = [(m.header.t_capture_ns + array(m)["offset_ns"]) / NS for m in messages]
    return np.concatenate(times), np.concatenate([array(m)["accel"] for m in messages])


def test_what_really_happens_during_a_decoy_of_the_imu_is_felt(simulation: Callable[..., Any]) -> None:
    """A lean in the middle of stones that are none: both in one."""
    one = simulation(STEADY, script=False)
    items = list(one.until(NS))
    one.stage.begin(Act("rough_ground", ("imu",), 1.0, 7.0, 1))
    items += one.until(2 * NS)
    one.stage.begin(Act("tilt", CUES["tilt"], 2.0, 6.0, 1))
    items += one.until(5 * NS)
    accel = of_the_imu(items)[1][-400:]
    lean = np.arctan2(accel[:, 1].mean(), accel[:, 2].mean())
    assert abs(one.rover.roll_rad) > np.deg2rad(7)
    assert lean == pytest.approx(one.rover.roll_rad, abs=np.deg2rad(2.0))
    assert accel[:, 2].std() > 1.0


def test_what_really_ends_during_a_decoy_of_the_imu_is_over(simulation: Callable[..., Any]) -> None:
    """Stones that were left while the mount slips shake nobody, and a rover that is upright again is so for its IMU."""
    one = simulation(STEADY, script=False)
    items = list(one.until(round(START_S * NS)))
    one.stage.begin(act("rough_ground", lasts_s=4.5))
    items += one.until(4 * NS)
    one.stage.begin(Act("tilt", ("imu",), 4.0, 8.0, 1))
    items += one.until(7 * NS)
    t, accel = of_the_imu(items)
    assert accel[(t > 2.0) & (t < 4.0), 2].std() > 1.0
    assert accel[(t > 5.6) & (t < 7.0), 2].std() < 0.3
    one = simulation(STEADY, script=False)
    one.stage.begin(Act("tilt", CUES["tilt"], 0.0, 3.0, 1))
    items = list(one.until(2 * NS))
    one.stage.begin(Act("rough_ground", ("imu",), 2.0, 7.0, 1))
    items += one.until(6 * NS)
    t, accel = of_the_imu(items)
    upright = accel[t > 4.5].mean(0) - one._bias[:3]
    assert np.arctan2(upright[1], upright[2]) == pytest.approx(0.0, abs=np.deg2rad(1.5))


def test_doubles_stop_when_the_rover_does(simulation: Callable[..., Any]) -> None:
    one = simulation(STEADY, script=False)
    list(one.until(NS))
    one.stage.begin(Act("tilt", ("imu",), 1.0, 9.0, 1))
    one.stage.begin(Act("approach", CUES["approach"], 1.0, 9.5, 1))
    list(one.until(7 * NS))
    assert one.stage.doubles
    for rover in (one.rover, *one.stage.doubles):
        assert np.hypot(*rover.velocity[:2]) < 0.05


def test_the_end_of_rough_ground_is_no_jolt(simulation: Callable[..., Any]) -> None:
    """Its stones sink where the wheels stand on them."""
    one = simulation(STEADY, script=False)
    ran = Session(one, 4.0, act("rough_ground", lasts_s=2.5))
    t, imu = ran.samples("imu")
    shaken = np.abs(imu[:, 2] - 9.81)
    assert shaken[(t > 1.5) & (t < 2.5)].max() > 3.0
    assert shaken[t > START_S + 2.5].max() < 1.5


def test_a_ball_that_is_put_away_stays_there(simulation: Callable[..., Any]) -> None:
    one = simulation(STEADY, script=False)
    Session(one, 5.0, act("impact", lasts_s=2.5))
    assert one.rover.ball_at[1:] == pytest.approx([FAR_M, BALL_M], abs=0.05)


@pytest.mark.parametrize(("condition", "sensor"), [("dark", "camera"), ("wind", "microphone"), ("dust", "lidar")])
def test_a_condition_takes_one_sensors_sight(
    simulation: Callable[..., Any], undisturbed: Session, condition: Any, sensor: str
) -> None:
    spell = Spell(condition, "camera", 0.0, 9.0)
    ran = Session(simulation(STEADY, script=False, outages=(spell,)), 1.9)
    assert [other for other in SENSORS if undisturbed.bytes_of(other) != ran.bytes_of(other)] == [sensor]


def test_an_outage_is_silence_with_beats_and_a_new_epoch(simulation: Callable[..., Any]) -> None:
    ran = Session(simulation(STEADY, script=False, outages=(Spell("outage", "microphone", 0.5, 1.2),)), 2.0)
    headers = [w.header for _, w in ran.items if not isinstance(w, Label) and w.header.stream == "microphone"]
    epochs = sorted({h.epoch for h in headers})
    assert len(epochs) == 2
    silent = [h for h in headers if h.is_beat]
    assert len(silent) >= 5
    assert {h.health for h in silent} == {"the sensor does not answer"}
    assert not any(0.52 < h.t_capture_ns / NS < 1.17 for h in headers if not h.is_beat)
    first = next(h for h in headers if h.epoch == epochs[1])
    assert first.seq == 0


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_file(simulation: Callable[..., Any], tmp_path: Path) -> None:
    told: list[float] = []
    one = record_session(tmp_path / "a.mcap", 21, "held-out", 2.0, progress=told.append)
    record_session(tmp_path / "b.mcap", 21, "held-out", 2.0)
    record_session(tmp_path / "c.mcap", 22, "held-out", 2.0)
    a, b, c = ((tmp_path / f"{name}.mcap").read_bytes() for name in "abc")
    assert a == b != c
    assert told
    assert one.bytes == len(a)
    with RecordingReader(tmp_path / "a.mcap") as reader:
        assert dict(reader.streams) == {"camera": "frame", "microphone": "audio", "imu": "imu", "lidar": "sweep",
                                        "pose": "signal"}  # fmt: skip
        labels = reader.labels()
        assert reader.info.complete
        assert reader.info.extra["seed"] == "21"
    assert all(before.end_ns == after.start_ns for before, after in pairwise(labels))
    assert all(before.label != after.label for before, after in pairwise(labels))
    assert (labels[0].start_ns, labels[-1].end_ns) == (0, 2 * NS)
    assert sum(one.label_s.values()) == pytest.approx(2.0)


def test_many_sessions_are_those_of_their_seeds_and_what_is_there_stays(
    simulation: Callable[..., Any], tmp_path: Path
) -> None:
    session_file(tmp_path, 31, "train").write_bytes(b"mine")
    made = list(record_sessions(tmp_path, range(30, 33), "train", 1.0, jobs=2))
    assert sorted(written.seed for written in made) == [30, 32]
    assert session_file(tmp_path, 31, "train").read_bytes() == b"mine"
    assert {Path(written.file) for written in made} == {session_file(tmp_path, s, "train") for s in (30, 32)}
    assert not list(tmp_path.glob("*.tmp"))
    record_session(tmp_path / "alone.mcap", 30, "train", 1.0)
    assert (tmp_path / "alone.mcap").read_bytes() == session_file(tmp_path, 30, "train").read_bytes()
    assert not list(record_sessions(tmp_path, range(30, 33), "train", 1.0))
    with pytest.raises(ConfigError, match=r"00030\.mcap is there already, and is 1 s long, not 2 s \(1 more are"):
        list(record_sessions(tmp_path, range(30, 34), "train", 2.0))
    assert not session_file(tmp_path, 33, "train").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="who has a lock is told by Linux alone")
def test_what_another_process_is_at_is_left_to_it(simulation: Callable[..., Any], tmp_path: Path) -> None:
    theirs = session_file(tmp_path, 30, "train").with_suffix(".mcap.tmp")
    with RecordingWriter(theirs, SessionInfo(session="s"), overwrite=True):
        with pytest.raises(RecordingError, match=rf"being written at this moment, by process {os.getpid()}; "):
            list(record_sessions(tmp_path, [30], "train", 0.1))
        assert theirs.exists()
    with RecordingReader(theirs) as reader:
        assert reader.info.complete


def test_the_command_says_what_was_there_already(simulation: Callable[..., Any], tmp_path: Path) -> None:
    for seed in (70, 71):
        with RecordingWriter(session_file(tmp_path, seed, "train"), SessionInfo(session="s", unix_ns=1)) as writer:
            writer.write_label(Label(0, NS, "clear"), NS)
    asked = ("simulate", "rover", "-o", str(tmp_path), "--seed", "70", "--count", "2", "--duration")
    ran = cli(*asked, "1")
    assert ran.returncode == 0, ran.stderr
    assert "0 sessions of 1 s; 2 were there already and are left as they are; see one with" in ran.stderr
    shown = ran.stderr.split("sensorium info ")[1].strip()
    assert cli("info", shown).returncode == 0
    (tmp_path / "rover-train-00071.mcap").unlink()
    said = cli(*asked, "1").stderr
    assert "1 session of 1 s" in said
    assert "; 1 was there already and is left as it is; " in said
    ran = cli(*asked, "60")
    assert ran.returncode == 2
    assert "is 1 s long, not 60 s" in ran.stderr


MAIN = """
import sys
for name in sys.argv.pop(1).split():
    sys.modules[name] = None
from pipeline.cli import main
main()
"""


def cli(*arguments: str, hidden: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """``sensorium`` where there is no module of the name ``hidden``."""
    env = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "MUJOCO_GL")} | environment
    command = [sys.executable, "-c", MAIN, hidden, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_without_mujoco_one_line_says_what_to_type(tmp_path: Path) -> None:
    ran = cli("simulate", "rover", "-o", str(tmp_path / "x.mcap"), hidden="mujoco")
    assert ran.returncode == 2
    assert install("sim") in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_a_renderer_one_line_says_what_to_type(simulation: Callable[..., Any], tmp_path: Path) -> None:
    ran = cli("simulate", "rover", "-o", str(tmp_path / "x.mcap"), MUJOCO_GL="egl", __EGL_VENDOR_LIBRARY_FILENAMES="/-")
    assert ran.returncode == 2, ran.stderr
    assert "apt-get install libegl1 libgl1-mesa-dri" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_is_asked_wrongly_is_said(tmp_path: Path) -> None:
    out = str(tmp_path / "x.mcap")
    assert "there is `rover`" in cli("simulate", "boat", "-o", out).stderr
    (tmp_path / "x.mcap").write_bytes(b"")
    assert "exists already" in cli("simulate", "rover", "-o", out).stderr
    assert "is a file" in cli("simulate", "rover", "-o", out, "--count", "2").stderr


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_what_is_ended_leaves_whole_sessions_and_the_same_command_goes_on(
    simulation: Callable[..., Any], tmp_path: Path, how: signal.Signals
) -> None:
    asked = ["simulate", "rover", "-o", str(tmp_path), "--count", "3", "--duration", "600"]
    with RecordingWriter(session_file(tmp_path, 0, "train"), SessionInfo(session="s", unix_ns=1)) as writer:
        writer.write_label(Label(0, 600 * NS, "clear"), 600 * NS)
    # The signal reaches the command alone, and none of its workers.
    with subprocess.Popen([sys.executable, "-c", MAIN, "", *asked], stderr=subprocess.PIPE, text=True) as running:
        try:
            part = session_file(tmp_path, 1, "train").with_suffix(".mcap.tmp")
            for _ in range(600):
                if part.exists():
                    break
                threading.Event().wait(0.1)
            assert part.exists()
            running.send_signal(how)
            _, stderr = running.communicate(timeout=30)
        finally:
            running.kill()
    assert running.returncode == 128 + how
    assert stderr == "error: interrupted after 1 of 3 sessions; the same command goes on\n"
    assert [file.name for file in tmp_path.iterdir()] == ["rover-train-00000.mcap"]


def test_a_single_session_that_is_ended_says_what_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(path: Path, *_: Any, **__: Any) -> None:
        path.write_bytes(b"some")
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "record_session", interrupted)
    out = tmp_path / "x.mcap"
    result = CliRunner().invoke(app, ["simulate", "rover", "-o", str(out)])
    assert isinstance(result.exception, Interrupted)
    assert str(result.exception) == f"interrupted; {out} holds what was simulated until then"


# -- live --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_runs_live_as_a_rig_and_its_truth_stands_beside_the_prediction(simulation: Callable[..., Any]) -> None:
    with short_folder() as folder:
        rover = {"kind": "simulated", "seed": 2, "outages_s": {"imu": [[1.0, 1.6]]}}
        rig = make_rig(folder, {"rover": rover}).document.path
        ran = cli("run", str(rig), "--record", str(folder / "live.mcap"), "--duration", "4", "--json")
        assert ran.returncode == 0, ran.stderr
        predictions = [msgspec.json.decode(line, type=Prediction) for line in ran.stdout.splitlines()]
        with RecordingReader(folder / "live.mcap") as reader:
            assert dict(reader.streams) == {"camera": "frame", "microphone": "audio", "imu": "imu", "lidar": "sweep"}
            assert reader.labels()
            epochs = {message.header.epoch for message, _ in reader.messages({"imu"})}
        assert len(epochs) == 2
        assert {p.truth for p in predictions[10:]} <= set(LABELS)
        assert len(predictions) > 15


def test_a_rig_that_asks_for_what_the_rover_has_not_is_refused() -> None:
    for settings in (
        {"streams": ("radar",)},
        {"outages_s": {"radar": ((1.0, 2.0),)}},
        {"outages_s": {"imu": ((2.0, 1.0),)}},
    ):
        with pytest.raises(ValueError):
            Simulated.Settings(**settings)  # type: ignore[arg-type]
