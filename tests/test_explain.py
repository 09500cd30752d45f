"""``explain``: the account that is recounted from a file is the aligner's own, and reasons are given in words."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from typer.testing import CliRunner

from pipeline import cli
from pipeline.align import Aligner, AlignSpec, Step, make_track
from pipeline.errors import BundleError, ConfigError
from pipeline.explain import Explanation, Session, _track, explain, waited_for
from pipeline.explain_window import WindowExplanation, explain_window
from pipeline.faults import Fault, Item, Restart, faulty, unordered
from pipeline.messages import Header, Message, TextLayout
from pipeline.recording import MANIFEST_TOPIC, RecordingWriter, SessionInfo
from pipeline.schemas import schema
from pipeline.summary import account
from tests.conftest import ROOT
from tests.test_faults import FILE, ITEMS, KINDS, MS, S
from tests.test_replay import SPEC
from tests.test_summary import prediction

pytestmark = pytest.mark.usefixtures("conserved")
DEMO = ROOT / "recordings" / "demo.mcap"
STREAMS = ("camera", "imu")
LIVE = msgspec.structs.replace(
    SPEC,
    streams=tuple(stream for stream in SPEC.streams if stream.name in STREAMS),
    max_delay_ns=250 * MS,
    max_future_ns=100 * MS,
    max_open=64,
)


def live_spec(faults: Iterable[Fault] = ()) -> AlignSpec:
    broken = unordered(faults, STREAMS)
    streams = tuple(msgspec.structs.replace(s, ordered=s.name not in broken) for s in LIVE.streams)
    return msgspec.structs.replace(LIVE, streams=streams)


def record_live(path: Path, items: list[Item], spec: AlignSpec, dead: tuple[int, str] | None = None) -> Aligner:
    """What a recorder and an aligner make of ``items``, which both hear at the same moment. The session stops without
    a word, as sessions do."""
    aligner = Aligner(spec)
    with RecordingWriter(path, SessionInfo(session="s"), overwrite=True) as writer:

        def write(steps: list[Step]) -> None:
            for step in steps:
                one = step.manifest
                writer.write_json(MANIFEST_TOPIC, msgspec.json.encode(one), max(one.emitted_ns, 0))

        for message, at in items:
            if dead is not None and at >= dead[0]:
                write(aligner.close(dead[1], "dead", dead[0]))
                dead = None
            writer.write(message if message.data is not None or message.header.is_beat
                         else Message(message.header, bytes(4)), at)  # fmt: skip
            write(aligner.feed(message, at))
        write(aligner.tick(items[-1][1]))
        writer.write_json("/prediction", msgspec.json.encode(prediction(20, "yes", wait=40.0, total=50.0)), 2 * S)
    return aligner


def explained(path: Path, name: str | None = None) -> tuple[Session, Aligner, Explanation]:
    """A recorded session with one of the faults."""
    faults = {} if name is None else {name: FILE.faults[name]}
    died = [(round(f.at_s * S), "imu") for f in faults.values() if isinstance(f, Restart)]
    spec = live_spec(faults.values())
    aligner = record_live(path, list(faulty(ITEMS, faults)), spec, died[0] if died else None)
    session = Session(path, spec)
    return session, aligner, explain(session)


@pytest.mark.parametrize("name", [None, *KINDS])
def test_the_account_is_the_aligners_own(tmp_path: Path, name: str | None) -> None:
    _, aligner, found = explained(tmp_path / "a.mcap", name)
    for stream in STREAMS:
        counters = aligner.counters(stream)
        told = found.streams[stream]
        assert told.balanced
        assert told.unaccounted == 0
        assert told.messages == account(counters), stream
        assert told.rejected == counters.rejected


def test_a_quiet_session(tmp_path: Path) -> None:
    session, _, found = explained(tmp_path / "a.mcap")
    assert found.source == "live"
    assert found.windows == len(session.manifests) > 95
    assert set(found.causes) <= {"proven"}
    camera, imu = found.streams["camera"], found.streams["imu"]
    assert camera.rate_hz == pytest.approx(20)
    assert camera.delay_ms is not None
    assert camera.delay_ms.p50 == pytest.approx(9)
    assert camera.jitter_ms is not None
    assert camera.jitter_ms.max == 0
    assert imu.age_ms is not None
    assert imu.age_ms.p50 == pytest.approx(10)
    # A batch of the IMU spans the hop and comes 95 ms after it began; the frame that settles a step comes before it or
    # a little later, so each window waited for one of the two, and for nobody else.
    assert camera.waited + imu.waited == found.windows
    assert found.latency_ms["wait"]["max"] == 40.0
    assert found.wait_ms is not None
    assert found.wait_ms.p50 == pytest.approx(9, abs=1)


def test_windows_wait_for_the_slowest(tmp_path: Path) -> None:
    late = sorted(((m, at + (120 * MS if m.header.stream == "camera" else 0)) for m, at in ITEMS), key=lambda i: i[1])
    record_live(tmp_path / "a.mcap", late, LIVE)
    found = explain(Session(tmp_path / "a.mcap", LIVE))
    assert found.streams["camera"].waited >= found.windows - 1
    assert found.streams["camera"].wait_ms is not None
    assert found.streams["camera"].wait_ms.p50 == pytest.approx(129, abs=2)


def test_steps_in_a_row_that_were_not_proven_are_one_range(tmp_path: Path) -> None:
    """Else each message of a stream that is late throughout would be held against every window that there was."""
    late = sorted(((m, at + (400 * MS if m.header.stream == "camera" else 0)) for m, at in ITEMS), key=lambda i: i[1])
    record_live(tmp_path / "a.mcap", late, LIVE)
    session = Session(tmp_path / "a.mcap", LIVE)
    assert explain(session).streams["camera"].messages["late"] > 90
    track = _track(session, "camera", session.manifests)
    assert track is not None
    assert len(session.manifests) > 90
    assert len(track.unproven) <= 2


class Looked(list[tuple[int, int]]):
    """Ranges that count how many of them are looked at."""

    looks = 0

    def __getitem__(self, at: Any) -> Any:
        self.looks += 1
        return super().__getitem__(at)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for index in range(len(self)):
            yield self[index]


def test_few_ranges_are_looked_at_for_a_message_that_is_late() -> None:
    camera = next(spec for spec in LIVE.streams if spec.name == "camera")
    track = make_track(camera, LIVE.hop_ns, None, 4001)
    every = [(step, step) for step in range(1, 4001) if step % 4]
    track.unproven = looked = Looked(every)
    for ns in range(0, 400_500 * MS, 1573 * MS):
        looked.looks = 0
        first_ns, until_ns = track.span()
        might = [k for k in range(1, 4001) if first_ns <= ns - (k - track.step) * LIVE.hop_ns < until_ns]
        assert track.missed(ns, ns) == any(step % 4 for step in might)
        assert looked.looks < 20


def words(session: Session, stream: str, verdict: str, reason: str | None = None) -> list[str]:
    """What is said of a stream in all windows where its verdict is this."""
    stated = [(m.step, m.streams[stream]) for m in session.manifests]
    steps = [step for step, one in stated if (one.verdict, one.reason) == (verdict, reason)]
    assert steps, {(one.verdict, one.reason) for _, one in stated}
    return [explain_window(session, step).streams[stream].why for step in steps]


def test_reasons_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    session, _, _ = explained(path, "loss")
    assert all("lost " in why and " between " in why for why in words(session, "camera", "missing", "gap"))
    session, _, _ = explained(path, "freeze")
    assert set(words(session, "camera", "missing", "silent")) == {"silent since 2.950 s"}
    assert all("its next message came" in why for why in words(session, "camera", "late"))
    session, _, _ = explained(path, "restart")
    assert all(
        why.startswith("its node was dead; its last message ends at 3.")
        for why in words(session, "imu", "missing", "dead")
    )


def test_a_window_names_its_messages(tmp_path: Path) -> None:
    session, _, _ = explained(tmp_path / "a.mcap")
    window = explain_window(session, 20)
    assert (window.start_ns, window.end_ns) == (1900 * MS, 2000 * MS)
    [frame] = window.streams["camera"].messages
    assert (frame.seq, frame.t_capture_ns, frame.arrival_ns) == (40, 2000 * MS, 2009 * MS)
    assert {m.seq for m in window.streams["imu"].messages} >= {19}
    assert window.waited_for == waited_for(session, session.manifests[19])
    assert window.wait_ms == pytest.approx(9)
    assert window.prediction is not None
    assert window.prediction.label == "yes"
    assert all(stream.why == "complete" for stream in window.streams.values())


def test_a_window_that_is_not_there(tmp_path: Path) -> None:
    session, _, found = explained(tmp_path / "a.mcap")
    with pytest.raises(ConfigError, match=f"no window 4000; it has those from 1 to {found.windows}"):
        explain_window(session, 4000)
    bare = Session(DEMO)
    assert explain(bare).source == "messages"
    assert set(explain(bare).streams["imu"].messages) == {"sent", "lost", "received", "duplicate"}
    with pytest.raises(ConfigError, match=r"it has none.*--bundle"):
        explain_window(bare, 1)


@pytest.mark.parametrize("known", [False, True])
def test_a_stream_of_another_kind_was_refused_and_not_late(tmp_path: Path, known: bool) -> None:
    """It has sent, so it has begun, whatever its verdict; of which kind is taken the windows do not tell."""
    path = tmp_path / "a.mcap"
    text = TextLayout(2)
    items = [
        (Message(msgspec.structs.replace(m.header, layout=text), b"ab") if m.header.stream == "camera" else m, at)
        for m, at in ITEMS
    ]
    aligner = record_live(path, items, LIVE)
    session = Session(path, LIVE if known else None)
    camera = explain(session).streams["camera"]
    assert camera.rejected["malformed"] >= aligner.counters("camera").rejected["malformed"] - 8  # the last second's
    assert (camera.messages["late"], camera.messages["no_window"], camera.balanced) == (0, 0, True)
    said = explain_window(session, 50).streams["camera"].why
    why = "it carries text, where frame is taken" if known else "they were of another kind than what is taken, or"
    assert said.startswith(f"what had come of it, 100 messages, was refused: {why}")
    shown = " ".join(call("explain", path).split())
    assert f"camera: rejected {camera.rejected['malformed']} of another kind than what is taken" in shown


def test_what_nobody_aligned_or_recorded_is_not_passed_over(tmp_path: Path) -> None:
    """An aligner that was away for a second, and a message that only the aligner heard."""
    path = tmp_path / "a.mcap"
    aligner = Aligner(LIVE)
    with RecordingWriter(path, SessionInfo(session="s"), overwrite=True) as writer:
        for message, at in ITEMS:
            if (message.header.stream, message.header.seq) != ("imu", 30):
                data = message.data if message.data is not None else bytes(4)
                writer.write(Message(message.header, data), at)
            for step in aligner.feed(message, at):
                if not 50 < step.manifest.step <= 60:
                    writer.write_json(MANIFEST_TOPIC, msgspec.json.encode(step.manifest), at)
    found = explain(Session(path, LIVE))
    assert not found.streams["camera"].balanced
    assert 15 <= found.streams["camera"].unaccounted <= 22
    assert found.streams["imu"].unaccounted >= 1
    assert found.streams["imu"].messages["lost"] == 0


# -- on the command line -----------------------------------------------------------------------------------------------


def call(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_a_recording_without_windows_gets_them_by_event_time() -> None:
    bundle = ("--bundle", ROOT / "models" / "demo")
    found = msgspec.json.decode(call("explain", DEMO, *bundle, "--json"), type=Explanation)
    assert (found.source, found.windows, found.wait_ms) == ("event time", 200, None)
    assert all(stream.balanced for stream in found.streams.values())
    said = call("explain", DEMO, *bundle, "--window", 100)
    assert "nothing between 9.000 s and 11.400 s" in said
    window = msgspec.json.decode(call("explain", DEMO, *bundle, "--window", 143, "--json"), type=WindowExplanation)
    assert window.streams["lidar"].reason == "out_of_tolerance"
    assert window.streams["lidar"].why == "its nearest message is 400.0 ms away"


def test_without_windows_nothing_is_said_of_their_ages() -> None:
    without, having = call("explain", DEMO), call("explain", DEMO, "--bundle", ROOT / "models" / "demo")
    assert "windows: none, for its session ran without a model" in without
    assert "windows: 200 made again" in having
    assert ("age p50" in without, "age p50" in having) == (False, True)


def test_a_model_that_has_no_stream_of_the_recording_is_refused(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", SessionInfo(session="s")) as writer:
        layout = TextLayout(2)
        times = {"t_capture_ns": 1, "t_end_ns": 1, "bound_ns": 2, "t_receipt_ns": 1}
        writer.write(Message(Header(stream="notes", seq=0, epoch=0, layout=layout, **times), b"hi"), 1)
    bundle = ROOT / "models" / "demo"
    result = CliRunner().invoke(cli.app, ["explain", str(tmp_path / "a.mcap"), "--bundle", str(bundle)])
    assert isinstance(result.exception, BundleError)
    assert "no stream in common" in str(result.exception)
    assert "name a bundle that takes what was recorded" in str(result.exception)


def test_what_a_person_reads(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    explained(path, "loss")
    said = call("explain", path)
    assert "balanced: sent = received + lost; received = used + late + no window + superseded" in said
    assert "waited for" in said
    assert "latency, ms" in said
    assert "missing: gap" in call("explain", path, "--window", 40) + call("explain", path, "--window", 41)


def test_info_has_latency_by_stage_where_there_are_predictions(tmp_path: Path) -> None:
    import jsonschema

    path = tmp_path / "a.mcap"
    explained(path)
    found = json.loads(call("info", path, "--json"))
    assert found["latency_ms"]["wait"] == {"p50": 40.0, "p95": 40.0, "p99": 40.0, "max": 40.0}
    jsonschema.Draft202012Validator(schema("info")).validate(found)
    assert "latency, ms" in call("info", path)
    assert "latency_ms" not in json.loads(call("info", DEMO, "--json"))


def test_info_tells_when_by_what_and_how_long_each_label_was_true(tmp_path: Path) -> None:
    import jsonschema

    path = tmp_path / "a.mcap"
    path.write_bytes(DEMO.read_bytes())
    found = json.loads(call("info", path, "--json"))
    jsonschema.Draft202012Validator(schema("info")).validate(found)
    assert sum(found["labels_s"].values()) == pytest.approx(20.0, abs=0.01)
    assert (found["rig"], found["bytes"]) == ("demo", DEMO.stat().st_size)
    assert found["date"] == "2026-01-01T00:00:00+00:00"
    assert {"bundle", "windows", "predictions"}.isdisjoint(found)
    said = call("info", path)
    assert "2026-01-01 00:00:00 UTC   4.2 MB   rig demo\nlabels: calm 9.0 s, flash 3.0 s" in said
    path.with_suffix(".labels.csv").write_text("start_s,end_s,label\n1,3,here\n19,99,there\n")
    assert json.loads(call("info", path, "--json"))["labels_s"] == {"here": 2.0, "there": pytest.approx(1.0, abs=0.01)}


def test_info_of_a_live_session_tells_its_model_and_counts_what_was_made(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    _, _, account_of = explained(path)
    found = json.loads(call("info", path, "--json"))
    assert found["windows"] == account_of.windows > 0
    assert found["predictions"] == 1
    assert f"{found['windows']} windows, 1 prediction\n" in call("info", path)
