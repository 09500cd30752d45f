"""Replay: the same steps at any pace and however a file is read, and predictions that follow from them."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.align import Aligner, AlignSpec, All, Latest, Nearest, Resample, Step, StreamSpec
from pipeline.bundle import load_bundle
from pipeline.clock import ManualClock
from pipeline.errors import BundleError, ConfigError, RecordingError
from pipeline.importing import ImportOptions, import_file
from pipeline.messages import Message, array
from pipeline.recording import Label, RecordingReader, RecordingWriter, SessionInfo, summarise
from pipeline.replay import (
    Truth,
    _steps,
    event_time,
    paced,
    plan_replay,
    replay_predictions,
    replay_steps,
)
from pipeline.reports import recording_table
from pipeline.terminal import console
from tests.align_strategies import WELL, Source, arrivals, events, message, rigs
from tests.conftest import ROOT
from tests.tiny_bundle import FRAME, GRID, write_bundle

pytestmark = pytest.mark.usefixtures("conserved")
MS = 1_000_000
FAULTS = (*WELL, "restart", "restart", "back", "stale", "pause", "jump", "lost tail")


def record(path: Path, calls: list[tuple[int, Message]], labels: tuple[Label, ...] = ()) -> Path:
    """The messages and beats with their arrivals as a recording; frames get the payload that their layout needs."""
    with RecordingWriter(path, SessionInfo(session="s"), overwrite=True, chunk_bytes=2000) as writer:
        for label in labels:
            writer.write_label(label, 0)
        for at, one in calls:
            if not one.header.is_beat and one.data is None:
                one = Message(one.header, bytes(4))
            writer.write(one, at)
    return path


class Heard:
    """What a reader gives, from memory: writing a file for every example would take most of the time."""

    def __init__(self, calls: list[tuple[int, Message]]) -> None:
        self.calls = calls

    def messages(self, streams: Any, beats: bool) -> Any:
        return ((one, at) for at, one in self.calls if one.header.stream in streams)

    def headers(self, streams: Any, beats: bool) -> Any:
        return ((one.header, at) for one, at in self.messages(streams, beats))


def plainly(spec: AlignSpec, calls: list[tuple[int, Message]]) -> list[Step]:
    """The steps without any foresight: all is fed, and waits until it is proven or at the end."""
    there = {one.header.stream for _, one in calls}
    streams = tuple(stream for stream in spec.streams if stream.name in there)
    if not streams:
        return []
    aligner = Aligner(msgspec.structs.replace(event_time(spec), streams=streams, max_steps_per_call=10**9))
    steps = [step for at, one in calls for step in aligner.feed(one, at)]
    steps += aligner.finish(calls[-1][0])
    return steps[: aligner._last_whole_step()]


def said(step: Step) -> Any:
    """What a step says, without what depends on when it was said."""
    streams = {
        name: (s.verdict, s.reason, s.coverage, s.used, s.newest_ns) for name, s in step.manifest.streams.items()
    }
    return step.manifest.step, streams, {name: grid.tobytes() for name, grid in step.grids.items()}


@st.composite
def recordings(draw: st.DrawFn) -> tuple[AlignSpec, list[tuple[int, Message]]]:
    spec, scale = draw(rigs(limits=False, most=4))
    calls = []
    for stream in spec.streams:
        sent = Source(stream, scale, far=0).run(draw(events(FAULTS, 25)))
        calls += arrivals(sent, stream.ordered)
    return spec, sorted(calls, key=lambda call: call[0])


@given(case=recordings())
def test_foresight_changes_no_step(case: tuple[AlignSpec, list[tuple[int, Message]]]) -> None:
    spec, calls = case
    there = {one.header.stream for _, one in calls}
    steps = list(_steps(Heard(calls), event_time(spec)))  # type: ignore[arg-type]
    for step in steps:
        for absent in step.manifest.streams.keys() - there:
            assert step.manifest.streams.pop(absent).reason == "never_started"
    assert [said(step) for step in steps] == [said(step) for step in plainly(spec, calls)]


# A rig of three to be read.

SPEC = AlignSpec(
    hop_ns=100 * MS,
    streams=(
        StreamSpec(name="camera", payload="frame", rule=Nearest(50 * MS)),
        StreamSpec(name="imu", payload="imu", rule=Resample(100, 50 * MS), channels=6),
        StreamSpec(name="words", payload="text", rule=All()),
    ),
    max_delay_ns=1,
    max_future_ns=1,
    max_open=1,
)
CAMERA, IMU, WORDS = SPEC.streams


def session(seconds: float, silent: tuple[float, float] = (0, 0)) -> list[tuple[int, Message]]:
    """Frames at 20 Hz, IMU batches at 10 Hz; the IMU is silent for a while, nothing lost."""
    calls = [(n * 50 * MS + 9 * MS, message(CAMERA, n, n * 50 * MS)) for n in range(int(seconds * 20))]
    offsets = tuple(range(0, 100 * MS, 10 * MS))
    times = [n * 100 * MS for n in range(int(seconds * 10)) if not silent[0] <= n / 10 < silent[1]]
    calls += [(t + 95 * MS, message(IMU, seq, t, offsets=offsets)) for seq, t in enumerate(times)]
    return sorted(calls, key=lambda call: call[0])


def test_a_stream_that_falls_silent_holds_nothing_up(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", session(30, silent=(5, 28)))
    held = 0
    fed: list[int] = []

    class Watched(RecordingReader):
        def messages(self, *args: Any, **options: Any) -> Any:
            for one, at in super().messages(*args, **options):
                fed.append(at)
                yield one, at

    verdicts = {}
    with Watched(path) as reader:
        for step in replay_steps(reader, SPEC):
            held = max(held, fed[-1] - step.manifest.end_ns)
            verdicts[step.manifest.step] = {name: s.verdict for name, s in step.manifest.streams.items()}
    assert sorted(verdicts) == list(range(1, 300))
    assert held < 300 * MS
    assert verdicts[100] == {"camera": "ok", "imu": "missing", "words": "missing"}
    assert verdicts[290] == {"camera": "ok", "imu": "ok", "words": "missing"}


def test_what_depends_on_arrival_plays_no_part(tmp_path: Path) -> None:
    calls = session(5)
    late = sorted(
        ((at + (3000 * MS if one.header.stream == "imu" else 0), one) for at, one in calls), key=lambda c: c[0]
    )
    steps = list(replay_steps(record(tmp_path / "a.mcap", calls), SPEC))
    assert [said(s) for s in steps] == [said(s) for s in replay_steps(record(tmp_path / "b.mcap", late), SPEC)]
    assert {s.manifest.cause for s in steps} <= {"proven", "end"}
    assert len(steps) == 49


def test_a_stream_that_never_started_and_one_that_nobody_asked_for(tmp_path: Path) -> None:
    spec = msgspec.structs.replace(SPEC, streams=(CAMERA, WORDS))
    steps = list(replay_steps(record(tmp_path / "a.mcap", session(2)), spec))
    assert {(s.manifest.streams["words"].verdict, s.manifest.streams["words"].reason) for s in steps} == {
        ("missing", "never_started")
    }
    assert set(steps[0].manifest.streams) == {"camera", "words"}
    assert array(steps[3].messages["camera"][0]).shape == (2, 2)


@pytest.mark.parametrize("opened", [False, True])
def test_who_asks_for_none_of_the_streams_is_told(tmp_path: Path, opened: bool) -> None:
    """Else a loop over the steps would do nothing, and a test that consists of it would pass."""
    path = record(tmp_path / "a.mcap", session(2))
    spec = msgspec.structs.replace(SPEC, streams=(msgspec.structs.replace(CAMERA, name="camara"),))
    said = r"a.mcap has none of the streams `camara`; it has `camera`, `imu`. Did you mean `camera`\?"
    with RecordingReader(path) as reader, pytest.raises(ConfigError, match=said):
        list(replay_steps(reader if opened else path, spec))


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        (
            StreamSpec(name="imu", payload="signal", rule=Resample(100, 50 * MS), channels=6),
            "carries imu, where signal",
        ),
        (StreamSpec(name="imu", payload="frame", rule=Nearest(50 * MS)), "carries imu, where frame is taken"),
        (StreamSpec(name="wind", payload="signal", rule=Resample(100, 50 * MS), channels=3), "has 2 channels"),
        (StreamSpec(name="wind", payload="signal", rule=All(), channel_names=("b", "a")), "calls its channel 1 `a`"),
    ],
)
def test_a_stream_of_another_kind_is_not_passed_over(tmp_path: Path, stream: StreamSpec, words: str) -> None:
    wind = StreamSpec(name="wind", payload="signal", rule=All(), channels=2)
    calls = session(2) + [(n * 100 * MS, message(wind, n, n * 100 * MS)) for n in range(20)]
    path = record(tmp_path / "a.mcap", sorted(calls, key=lambda call: call[0]))
    with pytest.raises(ConfigError, match=f"a.mcap: its stream `{stream.name}` {words}"):
        list(replay_steps(path, msgspec.structs.replace(SPEC, streams=(CAMERA, stream))))


def test_an_empty_recording_has_no_steps(tmp_path: Path) -> None:
    assert list(replay_steps(record(tmp_path / "a.mcap", []), SPEC)) == []


def test_a_hop_in_milliseconds_is_told_instead_of_taking_almost_for_ever() -> None:
    spec = AlignSpec(hop_ns=100, streams=(StreamSpec(name="imu", payload="imu", rule=Resample(100, 50 * MS)),))
    with pytest.raises(ConfigError, match=r"a hop of 100 ns makes \d\d\d,.* steps of .* would be hop_ns=100_000_000\."):
        next(replay_steps(ROOT / "recordings" / "demo.mcap", spec))


# Pace.


def test_pacing_waits_and_changes_nothing() -> None:
    clock = ManualClock(5)
    items = [("a", 100), ("b", 300), ("c", 250), ("d", 500)]
    seen = [(item, t, clock.now_ns()) for item, t in paced(items, clock, 2.0)]
    assert seen == [("a", 100, 5), ("b", 300, 105), ("c", 250, 105), ("d", 500, 205)]
    assert [item for item, _ in paced(items, clock, None)] == list("abcd")
    assert clock.now_ns() == 205
    stop = threading.Event()
    stop.set()
    assert list(paced(items, clock, 1, stop)) == []
    assert list(paced(items, clock, None, stop)) == []


# Predictions.


@pytest.fixture
def bundle(tmp_path: Path) -> Any:
    return load_bundle(write_bundle(tmp_path / "bundle", {"camera": FRAME, "imu": GRID}))


def test_predictions_are_the_same_at_every_run(bundle: Any, tmp_path: Path) -> None:
    labels = (Label(0, 10**9, "still"), Label(5 * 10**8, 8 * 10**8, "wave"))
    path = record(tmp_path / "a.mcap", session(3), labels)
    notes: list[str] = []
    first, second = (list(replay_predictions(path, bundle, note=notes.append)) for _ in range(2))
    assert [strip(p) for p in first] == [strip(p) for p in second]
    assert [p.window.index for p in first] == list(range(1, 30))
    assert [p.digest for p in first] == [s.manifest.digest for s in replay_steps(path, plan_replay(path, bundle).spec)]
    assert {p.session for p in first} == {"s"}
    assert [p.truth for p in first[:11]] == ["still"] * 5 + ["wave"] * 3 + ["still"] * 2 + [None]
    assert notes == []
    assert first[10].streams["camera"].verdict == "ok"
    assert first[10].streams["camera"].masked is None


def test_the_truth_is_the_sidecars_where_there_is_one(bundle: Any, tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", session(3), (Label(0, 10**9, "still"),))
    sidecar = tmp_path / "a.labels.csv"
    sidecar.write_text("start_s,end_s,label\n0.0,0.5,wave\n")
    assert [p.truth for p in replay_predictions(path, bundle)][:6] == ["wave"] * 5 + [None]
    sidecar.write_text("start_s,end_s,label\n0,500,wave\n500,900,still\n")
    with pytest.raises(RecordingError, match="are these milliseconds"):
        list(replay_predictions(path, bundle))


def strip(prediction: Any) -> Any:
    return msgspec.structs.replace(prediction, timing=None)


def test_a_bundle_on_a_recording_that_has_less_and_more(bundle: Any, tmp_path: Path) -> None:
    calls = [(at, one) for at, one in session(2) if one.header.stream == "camera"] + [
        (10**9, message(WORDS, 0, 9 * 10**8))
    ]
    path = record(tmp_path / "a.mcap", sorted(calls, key=lambda call: call[0]))
    notes: list[str] = []
    predictions = list(replay_predictions(path, bundle, note=notes.append))
    assert [note.split(":")[0] for note in notes] == [
        "the recording has no imu",
        "the bundle does not use words of the recording",
    ]
    assert {(p.streams["imu"].verdict, p.streams["imu"].reason) for p in predictions} == {("missing", "never_started")}
    assert {p.streams["imu"].contribution for p in predictions} == {0.0}


def numb(one: Message, accel: float, gyro: float) -> Message:
    """The same, of an IMU whose values are these."""
    samples = array(one).copy()
    samples["accel"], samples["gyro"] = accel, gyro
    return Message(one.header, samples)


@pytest.mark.parametrize(
    ("accel", "gyro", "nothing"),
    [
        (np.nan, np.nan, "NaN, which is no value"),
        (np.inf, -np.inf, "infinities, which are no values"),
        (np.inf, np.nan, "NaN or infinities, which are no values"),
    ],
)
def test_a_stream_that_has_no_value_is_told_of(
    bundle: Any, tmp_path: Path, accel: float, gyro: float, nothing: str
) -> None:
    calls = session(2)
    of_imu = [i for i, (_, one) in enumerate(calls) if one.header.stream == "imu" and not one.header.is_beat]
    for values in (0, 1):  # of which the last has a value
        changed = {i: numb(calls[i][1], accel, gyro) for i in of_imu[: len(of_imu) - values]}
        path = record(tmp_path / "a.mcap", [(at, changed.get(i, one)) for i, (at, one) in enumerate(calls)])
        notes: list[str] = []
        list(replay_predictions(path, bundle, note=notes.append))
        said = f"imu has nothing but {nothing}, in all of its {len(of_imu)} messages"
        assert notes == ([] if values else [said])
        shown = io.StringIO()
        console(shown).print(recording_table(summarise(path)))
        assert (f"imu holds nothing but {nothing}" in shown.getvalue()) is not bool(values)


def test_messages_of_another_kind_are_told_of(tmp_path: Path) -> None:
    """As of a device that came back with another number of channels."""
    wind = {**GRID, "payload": "signal", "channels": 2, "channel_names": ["a", "b"]}
    bundle = load_bundle(write_bundle(tmp_path / "bundle", {"wind": wind}))
    spec = StreamSpec(name="wind", payload="signal", rule=All(), channels=2)
    calls = []
    for seq, t in enumerate(range(0, 3000 * MS, 10 * MS)):
        one = message(msgspec.structs.replace(spec, channels=3) if seq >= 200 else spec, seq, t)
        calls.append((t, one))
    notes: list[str] = []
    made = list(replay_predictions(record(tmp_path / "a.mcap", calls), bundle, note=notes.append))
    assert notes == [
        "100 of 300 messages of wind are in no window, for it has 3 channels (`a`, `b`, `c`), where 2 are taken"
    ]
    assert [p.streams["wind"].verdict for p in made][5::20] == ["ok", "missing"]


def test_streams_can_be_mapped(bundle: Any, tmp_path: Path) -> None:
    front = StreamSpec(name="front", payload="frame", rule=CAMERA.rule)
    path = record(tmp_path / "a.mcap", [(n * 50 * MS, message(front, n, n * 50 * MS)) for n in range(20)])
    predictions = list(replay_predictions(path, bundle, streams={"camera": "front", "imu": None}))
    assert predictions[5].streams["front"].verdict == "ok"
    with pytest.raises(ConfigError, match="does not have"):
        plan_replay(path, bundle, {"lidar": "front"})
    with pytest.raises(
        BundleError, match=r"no stream in common.*camera \(frame\), imu \(imu\).*front \(frame\).*'camera': 'front'"
    ):
        plan_replay(path, bundle)
    with pytest.raises(BundleError, match="needs imu on its stream imu, but front"):
        plan_replay(path, bundle, {"imu": "front", "camera": "back"})


@given(
    labels=st.lists(
        st.builds(
            lambda start, length, label: Label(start, start + length, label),
            st.integers(0, 20),
            st.integers(1, 9),
            st.sampled_from("abc"),
        ),
        max_size=6,
        unique_by=lambda label: label.start_ns,
    )
)
def test_truth_is_the_label_that_began_last(labels: list[Label]) -> None:
    truth = Truth(labels)
    for t in range(0, 32, 2):
        covering = [label for label in labels if label.start_ns < t <= label.end_ns]
        assert truth.at(t) == (max(covering, key=lambda label: label.start_ns).label if covering else None)


# Real footage, end to end.


def test_real_footage_in_steps(shared_data: Path, tmp_path: Path) -> None:
    path = tmp_path / "walk.mcap"
    import_file(shared_data / "gopro" / "max-heromode.mp4", path, ImportOptions(max_width=160))
    spec = AlignSpec(
        hop_ns=100 * MS,
        streams=(
            StreamSpec(name="camera", payload="frame", rule=Nearest(50 * MS)),
            StreamSpec(name="microphone", payload="audio", rule=Resample(16000, 100 * MS, "band_limited"), channels=2),
            StreamSpec(name="imu", payload="imu", rule=Resample(100, 50 * MS), channels=6),
            StreamSpec(name="latest", payload="sweep", rule=Latest(10**9)),
        ),
    )
    steps = list(replay_steps(path, spec))
    assert len(steps) == 105
    for step in steps[1:104]:
        verdicts = {name: s.verdict for name, s in step.manifest.streams.items()}
        assert verdicts == {"camera": "ok", "microphone": "ok", "imu": "ok", "latest": "missing"}
    grids = np.concatenate([step.grids["imu"] for step in steps[:104]])
    assert np.linalg.norm(np.nanmean(grids[:, :3], axis=0)) == pytest.approx(9.8, abs=0.2)
    assert steps[50].grids["microphone"].shape == (1600, 2)


def test_a_path_in_place_of_a_bundle_is_told_what_loads_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not 'models/demo': write load_bundle\('models/demo'\)"):
        next(replay_predictions(tmp_path / "x.mcap", "models/demo"))  # type: ignore[arg-type]
