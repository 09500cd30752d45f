"""Evaluation: what is counted is what runs live, every set of streams, and what is wrong with a session is said."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import msgspec
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from pipeline import cli
from pipeline.bundle import load_bundle
from pipeline.clock import ManualClock
from pipeline.disturb import Disturber
from pipeline.errors import BundleError, ConfigError, RecordingError, SensoriumError
from pipeline.evaluate import evaluate
from pipeline.evaluate_html import page, strength
from pipeline.evaluate_pass import Struck
from pipeline.evaluate_score import members_of
from pipeline.evaluate_style import STYLE
from pipeline.evaluate_text import _HEADINGS, estimate
from pipeline.evaluation import Evaluation
from pipeline.faults import Loss
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.messages import (
    IMU_DTYPE,
    POINT_DTYPE,
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
    array,
    signal_dtype,
)
from pipeline.recording import Label, RecordingReader, RecordingWriter, SessionInfo
from pipeline.replay import plan_replay, replay_predictions, replay_steps
from pipeline.schemas import schema
from tests.conftest import ROOT
from tests.tiny_bundle import GRID, SWEEP, linear_fusion, write_bundle

MS = 1_000_000
DEMO = ROOT / "models" / "demo", ROOT / "recordings" / "demo.mcap"
STREAMS = {"imu": GRID, "lidar": SWEEP}
HALVES = (Label(0, 2000 * MS, "no"), Label(2000 * MS, 4000 * MS, "yes"))


def message(stream: str, seq: int, at_ns: int, layout: Layout, data: Any, length_ns: int = 0) -> Message:
    end = at_ns + length_ns
    return Message(Header(stream=stream, seq=seq, epoch=0, t_capture_ns=at_ns, t_end_ns=end, bound_ns=end + 1,
                          t_receipt_ns=end, layout=layout), data)  # fmt: skip


def write_session(
    path: Path, labels: Sequence[Label] = HALVES, *, seconds: float = 4, streams: Sequence[str] = ("imu", "lidar"),
    seed: int = 0, **about: str,
) -> Path:  # fmt: skip
    """A session whose IMU and LiDAR read about 1 while `yes` is true and about -1 else."""
    random = np.random.default_rng(seed)
    truth = [(one.start_ns, one.end_ns) for one in labels if one.label == "yes"]
    with RecordingWriter(path, SessionInfo(session=path.stem, extra=about)) as writer:
        for label in labels:
            writer.write_label(label, 0)
        for i in range(round(seconds * 10)):
            at = i * 100 * MS
            value = 1.0 if any(start <= at < end for start, end in truth) else -1.0
            batch = np.zeros(10, IMU_DTYPE)
            batch["offset_ns"] = np.arange(10) * 10 * MS
            batch["accel"] = batch["gyro"] = value + random.normal(0, 0.3)
            cloud = np.zeros(4, POINT_DTYPE)
            for axis in ("x", "y", "z", "intensity"):
                cloud[axis] = value + random.normal(0, 0.3)
            if "imu" in streams:
                writer.write(message("imu", i, at, ImuLayout(10), batch, 90 * MS), at + 95 * MS)
            if "lidar" in streams:
                writer.write(message("lidar", i, at + 50 * MS, SweepLayout(4), cloud), at + 96 * MS)
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    fusion = linear_fusion(STREAMS, {"imu": 1.0, "lidar": 1.0}, bias=-2.0)
    return write_bundle(tmp_path / "tiny", STREAMS, fusion=fusion, steps=2)


@pytest.fixture(scope="module")
def demo() -> Evaluation:
    return evaluate(DEMO[0], [DEMO[1]])


# -- the demo ----------------------------------------------------------------------------------------------------------


def test_what_is_counted_is_what_a_replay_says(demo: Evaluation) -> None:
    predictions = [p for p in replay_predictions(DEMO[1], load_bundle(DEMO[0])) if p.truth is not None]
    full = demo.subsets[0].scores
    assert full.windows == len(predictions) == demo.sessions[0].scores.windows
    assert full.accuracy.value == pytest.approx(np.mean([p.label == p.truth for p in predictions]))
    assert full.abstained.value == pytest.approx(np.mean([p.abstained for p in predictions]))
    assert full.coverage.value == pytest.approx(np.mean([p.truth in p.set for p in predictions]))
    assert full.set_size == pytest.approx(np.mean([len(p.set) for p in predictions]))
    right = [p for p in predictions if p.truth == p.label == "flash"]
    shares = demo.contributions["flash"]
    assert shares["camera"] == pytest.approx(np.mean([p.streams["camera"].contribution for p in right]))
    assert max(shares, key=lambda name: shares[name]) == "camera"


def test_every_set_of_streams_and_what_it_cannot_tell(demo: Evaluation) -> None:
    found = {frozenset(one.streams): one for one in demo.subsets}
    assert len(found) == len(demo.subsets) == 15
    assert demo.subsets[0].streams == ["camera", "microphone", "imu", "lidar"]
    blind = found[frozenset({"microphone", "imu", "lidar"})]
    assert {label for label, one in blind.classes.items() if not one.observable} == {"calm", "flash"}
    assert blind.classes["flash"].recall == 0.0
    assert blind.observable_accuracy == pytest.approx(blind.full_accuracy, abs=0.05)
    silent = found[frozenset({"microphone"})].scores  # it falls silent for 2.4 s, longer than a window
    assert silent.blind == 15
    for one in demo.subsets:
        assert sum(map(sum, one.confusion)) == one.scores.windows
        assert sum(one.reliability.windows) == one.scores.windows - one.scores.blind


def test_one_session_gives_no_interval_and_says_so(demo: Evaluation) -> None:
    assert demo.subsets[0].scores.accuracy.low is None
    assert any("one session" in text for text in demo.warnings)
    assert demo.sessions[0].sha256 == hashlib.sha256(DEMO[1].read_bytes()).hexdigest()


def test_sets_of_streams_are_all_or_those_that_say_most() -> None:
    assert members_of(2, 8).tolist() == [[True, True], [True, False], [False, True]]
    assert len(members_of(8, 8)) == 255
    many = members_of(9, 8)
    assert sorted({int(row.sum()) for row in many}) == [1, 8, 9]
    assert len(many) == 19


# -- sessions that a test can read -------------------------------------------------------------------------------------


def test_sessions_groups_and_intervals(tmp_path: Path, bundle: Path) -> None:
    folder = tmp_path / "sessions"
    folder.mkdir()
    for i in range(4):
        write_session(folder / f"s{i}.mcap", seed=i, day="mon" if i % 2 else "tue")
    told: list[float] = []
    found = evaluate(bundle, [folder], by="day", progress=lambda done, total, what: told.append(done / total))
    assert [one.file for one in found.sessions] == [f"s{i}.mcap" for i in range(4)]
    assert [(group.value, group.sessions) for group in found.groups] == [("mon", 2), ("tue", 2)]
    accuracy = found.subsets[0].scores.accuracy
    assert accuracy.value is not None
    assert accuracy.low is not None
    assert accuracy.high is not None
    assert 0.9 < accuracy.low <= accuracy.value <= accuracy.high <= 1.0
    assert found.sessions[0].labels == {"no": 20, "yes": 19}
    assert told == sorted(told)
    assert told[-1] == 1.0
    with pytest.raises(ConfigError, match=r"s0\.mcap: nothing says what `days`.*Did you mean `day`"):
        evaluate(bundle, [folder], by="days")


def test_a_table_of_attributes_that_nobody_asked_for_stops_nothing(tmp_path: Path, bundle: Path) -> None:
    paths = [write_session(tmp_path / f"s{i}.mcap", seed=i, day="mon") for i in range(2)]
    (tmp_path / "sessions.csv").write_text("name,day\ns0.mcap,tue\n")
    found = evaluate(bundle, paths)
    assert [one.attributes for one in found.sessions] == [{"day": "mon"}] * 2
    assert [text.partition(" is `")[0] for text in found.warnings if "sessions.csv" in text] == [
        f"{tmp_path / 'sessions.csv'}, line 1"
    ]
    with pytest.raises(ConfigError, match=r"sessions.csv, line 1 is `name,day`"):
        evaluate(bundle, paths, by="day")


def test_a_sidecar_says_what_was_true(tmp_path: Path, bundle: Path) -> None:
    path = write_session(tmp_path / "a.mcap")
    path.with_name("a.labels.csv").write_text("start_s,end_s,label\n0,2,yes\n2,4,no\n")
    assert evaluate(bundle, [path]).subsets[0].scores.accuracy.value == pytest.approx(0.05, abs=0.06)


def test_what_the_model_was_trained_on_is_said(tmp_path: Path, bundle: Path) -> None:
    path = write_session(tmp_path / "a.mcap")
    model = yaml.safe_load((bundle / "model.yaml").read_text())
    model["lineage"]["recordings"] = {"a": hashlib.sha256(path.read_bytes()).hexdigest()}
    (bundle / "model.yaml").write_text(yaml.safe_dump(model))
    found = evaluate(bundle, [path])
    assert found.sessions[0].in_training
    assert any("was trained on a.mcap" in text for text in found.warnings)
    for part, use in (("held_out", "calibrated on"), ("tested", "tested on")):
        model["lineage"] = {key: model["lineage"][key] for key in ("files", "recordings")} | {part: ["a"]}
        (bundle / "model.yaml").write_text(yaml.safe_dump(model))
        found = evaluate(bundle, [path])
        assert (found.sessions[0].in_training, found.sessions[0].used) == (False, use)
        assert any(f"was {use} a.mcap" in text for text in found.warnings) == (part == "held_out")
    stated = schema("evaluation")["$defs"]["SessionResult"]["properties"]
    assert stated["in_training"]["description"] == "Follows from `used`: whether that is `trained on`."
    assert "description" in stated["used"]


def test_a_recording_that_ends_too_early_is_said(tmp_path: Path, bundle: Path) -> None:
    path = write_session(tmp_path / "a.mcap")
    path.with_name("a.labels.csv").write_text("start_s,end_s,label\n0,1,yes\n1,2,no\n")
    assert not any("incomplete" in text for text in evaluate(bundle, [path]).warnings)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    assert any("a.mcap is incomplete" in text for text in evaluate(bundle, [path]).warnings)
    path = write_session(tmp_path / "b.mcap", ())
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    with pytest.raises(RecordingError, match=r"has no labels \(it is incomplete, and may have lost them"):
        evaluate(bundle, [path])


def test_a_session_without_a_stream(tmp_path: Path, bundle: Path) -> None:
    found = evaluate(bundle, [write_session(tmp_path / "a.mcap", streams=["imu"])])
    assert found.sessions[0].missing == ["lidar"]
    lidar = found.subsets[-1]
    assert (lidar.streams, lidar.scores.blind, lidar.scores.accuracy.value) == (["lidar"], 39, 0.0)
    assert (lidar.scores.abstained.value, lidar.scores.calibration_error) == (1.0, None)


@pytest.mark.parametrize(
    ("labels", "seconds", "words"),
    [
        ((), 4, r"a\.mcap has no labels"),
        ((Label(0, 4000 * MS, "yes"),), 4, r"a\.mcap: every window with a label is `yes`.*recordings of `no`"),
        ((Label(0, 1000 * MS, "maybe"),), 4, r"a\.mcap: the label `maybe` from 0\.000 s to 1\.000 s is none of"),
        ((Label(0, 2000 * MS, "no"), Label(1000 * MS, 3000 * MS, "yes")), 4, r"1\.000 s to 3\.000 s overlaps"),
        (
            (Label(9000 * MS, 9900 * MS, "no"),),
            4,
            r"a\.mcap: of its 39 windows.*end by 3\.900 s.*9\.000 s and 9\.900 s",
        ),
        (HALVES, 0.05, r"a\.mcap: no window can be made of it"),
    ],
)
def test_sessions_that_say_nothing(
    tmp_path: Path, bundle: Path, labels: tuple[Label, ...], seconds: float, words: str
) -> None:
    path = tmp_path / "a.mcap"
    if seconds < 0.1:
        with RecordingWriter(path, SessionInfo(session="s")) as writer:
            for label in labels:
                writer.write_label(label, 0)
            writer.write(message("lidar", 0, 10 * MS, SweepLayout(0), np.zeros(0, POINT_DTYPE)), 20 * MS)
    else:
        write_session(path, labels, seconds=seconds)
    with pytest.raises(RecordingError, match=words):
        evaluate(bundle, [path])


def test_recordings_that_cannot_be_evaluated(tmp_path: Path, bundle: Path) -> None:
    def refused(kind: type[SensoriumError], words: str, *paths: Path) -> None:
        with pytest.raises(kind, match=words):
            evaluate(bundle, paths)

    (tmp_path / "bad.mcap").write_bytes(b"no recording at all")
    refused(RecordingError, r"bad\.mcap", tmp_path / "bad.mcap")
    refused(ConfigError, "there is no such file", tmp_path / "none.mcap")
    (tmp_path / "empty").mkdir()
    refused(ConfigError, "no recording .* in this folder", tmp_path / "empty")
    one = write_session(tmp_path / "a.mcap")
    (tmp_path / "b.mcap").write_bytes(one.read_bytes())
    refused(ConfigError, r"b\.mcap is the same recording as .*a\.mcap", one, tmp_path / "b.mcap")
    with RecordingWriter(tmp_path / "text.mcap", SessionInfo(session="s")) as writer:
        writer.write(message("notes", 0, 0, TextLayout(2), b"hi"), 0)
    refused(BundleError, "no stream in common", tmp_path / "text.mcap")


def test_the_help_explains_every_column() -> None:
    shown = " ".join(CliRunner().invoke(cli.app, ["evaluate", "--help"], terminal_width=80).stdout.split())
    headings = (*_HEADINGS, "cannot tell apart", "abstains\nthere", "sure and\nwrong", "most like", "'s share")
    for heading in headings:
        assert " ".join(heading.split()) in shown


# -- faults ------------------------------------------------------------------------------------------------------------


def test_what_a_worse_stream_does(tmp_path: Path, bundle: Path) -> None:
    paths = [write_session(tmp_path / f"s{i}.mcap", seed=i) for i in range(2)]
    found = evaluate(bundle, paths, robustness=True)
    by = {(one.stream, one.fault, one.level): one.scores.accuracy.value for one in found.robustness}
    assert len(by) == len(found.robustness) == 2 * (3 * 3 + 1)
    clean = found.subsets[0].scores.accuracy.value
    assert clean is not None
    assert by["imu", "shift", 800.0] < clean
    losses = {(one.stream, one.fault, one.level): one.scores.log_loss for one in found.robustness}
    assert losses["imu", "noise", 3.0] > losses["imu", "noise", 0.3] > found.subsets[0].scores.log_loss
    assert by["imu", "missing", 1.0] == found.subsets[2].scores.accuracy.value
    assert evaluate(bundle, paths, robustness=True) == found


@pytest.mark.slow
def test_more_processes_find_the_same(tmp_path: Path, bundle: Path) -> None:
    paths = [write_session(tmp_path / f"s{i}.mcap", seed=i) for i in range(3)]
    assert evaluate(bundle, paths, jobs=2) == evaluate(bundle, paths)


def test_a_struck_session_is_the_same_however_often_it_is_read(tmp_path: Path) -> None:
    with RecordingReader(write_session(tmp_path / "a.mcap")) as reader:
        struck = Struck(reader, Loss(streams=("imu",), share=0.5), 3)
        heard = [message.header for message, _ in struck.messages(["imu", "lidar"], beats=True)]
        assert heard == [header for header, _ in struck.headers(["imu", "lidar"], beats=True)]
        lost = [header.seq for header in heard if header.stream == "imu"]
        assert 10 < len(lost) < 30
        assert [h.seq for h, _ in struck.headers(["imu"], beats=True)] == lost


def payloads() -> list[tuple[str, Layout, Any]]:
    random = np.random.default_rng(0)
    imu, signal, cloud = np.zeros(500, IMU_DTYPE), np.zeros(500, signal_dtype(2)), np.zeros(500, POINT_DTYPE)
    imu["accel"] = random.normal(0, 2, (500, 3))
    imu["gyro"] = np.nan
    signal["value"] = random.normal(0, [1, 50], (500, 2))
    for axis in "xyz":
        cloud[axis] = random.uniform(1, 9, 500)
    cloud["x"][0] = np.nan
    pixels = random.integers(0, 256, (20, 30, 3), np.uint8)
    sound = random.normal(0, 900, (500, 1)).astype("<i2")
    return [
        ("imu", ImuLayout(500), imu), ("signal", SignalLayout(500, ("a", "b")), signal),
        ("sweep", SweepLayout(500), cloud), ("frame", FrameLayout("bgr8", 20, 30), pixels),
        ("audio", AudioLayout(16000, 1, 500), sound), ("text", TextLayout(5), "grün".encode()),
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "layout", "data"), payloads(), ids=[name for name, *_ in payloads()])
def test_noise_on_each_payload(name: str, layout: Layout, data: Any) -> None:
    one = message("s", 0, 0, layout, data)
    noisy = Disturber(1.0, Random(5))(one)
    again = Disturber(1.0, Random(5))(one)
    assert array(noisy).tobytes() == array(again).tobytes() != array(one).tobytes()
    assert array(noisy).shape == array(one).shape
    if name == "imu":
        change = array(noisy)["accel"] - data["accel"]
        assert change.std() == pytest.approx(2.0, rel=0.1)
        assert np.isnan(array(noisy)["gyro"]).all()
    if name == "signal":
        assert (array(noisy)["value"] - data["value"]).std(axis=0) == pytest.approx([1, 50], rel=0.15)
    if name == "sweep":
        assert np.isnan(array(noisy)["x"][0])
    if name == "text":
        bytes(noisy.data).decode()
    assert Disturber(1.0, Random(5))(Message(one.header)).data is None
    calm = Disturber(0.0, Random(5))(one)
    assert array(calm).tobytes() == array(one).tobytes()


def test_what_cannot_be_read_is_left_as_it_is() -> None:
    bad = message("camera", 0, 0, FrameLayout("jpeg", 4, 4), b"no picture")
    assert Disturber(1.0, Random(0))(bad) is bad


# -- calibration by sets of streams ------------------------------------------------------------------------------------


def calibrated(folder: Path, **subsets: Any) -> Path:
    fusion = linear_fusion(STREAMS, {"imu": 1.0, "lidar": 1.0}, bias=-2.0)
    stated = {"temperature": 2.0, "subsets": {key.replace("_", "+"): value for key, value in subsets.items()}}
    return write_bundle(folder, STREAMS, fusion=fusion, steps=2, calibration=stated)


def test_contributions_sum_whatever_each_set_of_streams_is_calibrated_with(tmp_path: Path) -> None:
    own = {"imu": {"temperature": 0.5, "bias": {"no": 0.3}}, "lidar": {"temperature": 3.0},
           "imu_lidar": {"temperature": 1.5, "answer_above": {"yes": 0.999}}}  # fmt: skip
    bundle = load_bundle(calibrated(tmp_path / "b", **own))
    path = write_session(tmp_path / "a.mcap")
    fuser = Fuser(bundle, None, "s", clock=ManualClock())
    bare = Fuser(bundle, FuseOptions(contributions=False), "s", clock=ManualClock())
    with pytest.raises(ValueError, match="before the first step"):
        fuser.subset_scores()
    for step in replay_steps(path, plan_replay(path, bundle).spec):
        given = fuser.step(step.manifest, content_of(step))
        bare.step(step.manifest, content_of(step))
        rows = fuser.subset_scores()
        assert rows == pytest.approx(bare.subset_scores(), abs=1e-6)
        label = bundle.labels.index(str(given.label))
        assert rows[-1, label] == given.confidence
        total = sum(report.contribution or 0.0 for report in given.streams.values())
        assert total == pytest.approx(rows[-1, label] - rows[0, label], abs=1e-12)
        assert given.abstained is (given.label == "yes" and given.confidence <= 0.999)
    logit = {name: np.log(row[1] / row[0]) for name, row in zip(("none", "imu", "lidar"), rows, strict=False)}
    assert logit["none"] == pytest.approx(-1.0)  # the general temperature
    assert given.label == "yes"


@pytest.mark.parametrize(
    ("subsets", "words"),
    [
        ({"camera": {}}, r"calibration\.subsets\.camera: `camera` is no stream of this bundle"),
        ({"lidar_imu": {}}, r"write this subset as `imu\+lidar`"),
        ({"imu": {"temperature": 0}}, r"subsets\.imu\.temperature: .*more than 0"),
        ({"imu": {"temprature": 1}}, r"Did you mean `temperature`"),
        ({"imu": {"answer_above": {"yse": 0.5}}}, r"answer_above\.yse: `yse` is no label.*Did you mean `yes`"),
        ({"imu": {"bias": {"x": 0.5}}}, r"bias\.x: `x` is no label of this bundle, which has `no`, `yes`"),
        ({"imu": {"mix": {"no": {"yess": 0.5}}}}, r"mix\.no\.yess: `yess` is no label .* Did you mean `yes`"),
    ],
)
def test_a_calibration_that_does_not_fit_its_bundle(tmp_path: Path, subsets: Any, words: str) -> None:
    with pytest.raises(BundleError, match=words):
        load_bundle(calibrated(tmp_path / "b", **subsets))


# -- what is shown -----------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """Notes open tags and whatever a page would fetch."""

    VOID = ("meta", "br", "path", "rect", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href", "onload"} & {name for name, _ in attrs}
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read(text: str) -> Page:
    found = Page()
    found.feed(text)
    assert found.open == []
    assert not {"script", "link", "img", "iframe"} & set(found.tags)
    assert "http" not in text
    assert "@import" not in text
    assert "url(" not in text
    return found


def test_the_page_needs_nothing_and_shows_everything(demo: Evaluation) -> None:
    found = read(page(demo))
    assert found.tags.count("svg") >= 2 * len(demo.subsets)
    words = " ".join(found.words)
    assert all(word in words for word in ("microphone", "approach", "95.0 %", "demo.mcap", "one session"))


def test_names_cannot_write_into_the_page(demo: Evaluation) -> None:
    session = msgspec.structs.replace(demo.sessions[0], file="<script>alert(1)</script>.mcap")
    assert "<script>" not in page(msgspec.structs.replace(demo, sessions=[session]))


def luminance(colour: Any) -> float:
    parts = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))


def contrast(one: Any, other: Any) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def colours(name: str) -> list[list[int]]:
    """A colour of the page's style: light, dark."""
    found = re.findall(rf"--{name}: (?:#([0-9a-f]+)|(\d+ \d+ \d+));", STYLE)
    assert len(found) == 2
    digits = [[c * 2 for c in word] if len(word) == 3 else re.findall("..", word) for word, _ in found]
    return [[int(c, 16) for c in pair] if pair else [int(c) for c in rgb.split()]
            for pair, (_, rgb) in zip(digits, found, strict=True)]  # fmt: skip


@pytest.mark.parametrize("dark", [0, 1])
def test_whatever_stands_in_the_page_can_be_read(dark: int) -> None:
    card, heat, ink = (np.array(colours(name)[dark]) for name in ("card", "heat", "ink"))
    for share in np.linspace(-1, 1, 41):
        part = strength(share)
        assert contrast(part * heat + (1 - part) * card, ink) >= 4.5
    for name in ("s0", "s1", "s2", "bad", "soft"):
        assert contrast(colours(name)[dark], card) >= 4.5, name
    assert contrast(colours("warn")[dark], colours("warnink")[dark]) >= 4.5


def test_the_page_has_every_number_of_the_terminal(tmp_path: Path, bundle: Path) -> None:
    paths = [write_session(tmp_path / f"s{i}.mcap", seed=i, day=str(i // 2)) for i in range(4)]
    found = evaluate(bundle, paths, robustness=True, by="day")
    words = read(page(found)).words
    for group in found.groups:
        assert estimate(group.scores.accuracy) in words
    assert all(f"{100 * one.f1:.1f}" in words for one in found.subsets[0].classes.values() if one.f1 is not None)
    assert all(estimate(one.scores.accuracy) in words for one in found.robustness)


def test_the_page_can_be_heard_and_scrolled_by_keyboard(demo: Evaluation) -> None:
    text = page(demo)
    assert text.count("<table>") == text.count('tabindex="0" role="region" aria-label="')
    without = sum(len(demo.streams) - len(one.streams) for one in demo.subsets)
    assert text.count(">○</td>") == 2 * without == text.count('aria-label="without ')


def test_long_labels_do_not_widen_the_tables(demo: Evaluation) -> None:
    longer = msgspec.structs.replace(demo, labels=["rough_ground", *demo.labels[1:]])
    assert '<th class="turn"><span>rough_ground</span></th>' in page(longer)
    assert "<th>tone</th>" in page(demo)


def test_the_command(tmp_path: Path, bundle: Path) -> None:
    paths = [str(write_session(tmp_path / f"s{i}.mcap", seed=i, day=str(i))) for i in range(2)]
    html = tmp_path / "report.html"
    asked = ["evaluate", str(bundle), *paths, "--by", "day", "--robustness", "--html", str(html)]
    shown = CliRunner().invoke(cli.app, asked)
    assert shown.exit_code == 0, shown.output
    for word in ("tiny on 2 sessions, 78 windows", "imu: not there", "ms stamped late", "day", "if not"):
        assert word in shown.stdout
    assert "When a stream goes wrong" in " ".join(read(html.read_text()).words)
    again = CliRunner().invoke(cli.app, asked)
    assert isinstance(again.exception, ConfigError)  # a report is not overwritten
    printed = json.loads(CliRunner().invoke(cli.app, [*asked[:-2], "--json"]).stdout)
    jsonschema.Draft202012Validator(schema("evaluation")).validate(printed)
    assert [one["file"] for one in printed["sessions"]] == ["s0.mcap", "s1.mcap"]
