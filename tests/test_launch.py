"""Whole sessions with real processes: what happens when one of them dies, and what is left when they are over."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import yaml

from pipeline.child import Child
from pipeline.clock import ManualClock, Origin, SystemClock
from pipeline.commands import live
from pipeline.config import RecordEntry, RestartEntry, load_rig
from pipeline.errors import ConfigError, SensoriumError
from pipeline.joining import _Host
from pipeline.launch import Event, Session, check_rig_file, live_sessions
from pipeline.life import NodeSpec
from pipeline.prediction import Prediction
from pipeline.recording import GAP_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC, RecordingReader
from pipeline.show import Show, print_summary
from pipeline.transport import LinkClient, make_curve_keys, subscribe_json
from tests.rigs import SOURCES, STREAMS, make_rig, nodes_of, segment_exists, segments_of, short_folder
from tests.tiny_bundle import GRID, write_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]
LIMIT_S = 60.0
ROOT = Path(__file__).resolve().parent.parent


def until(condition: Callable[[], Any], what: str, limit_s: float = LIMIT_S) -> Any:
    """The condition's first true value; fails when it does not become true."""
    clock, pause = SystemClock(), threading.Event()
    while not (value := condition()):
        assert clock.now_ns() < limit_s * 1e9, f"not within {limit_s} s: {what}"
        pause.wait(0.02)
    return value


class Watched:
    """A running session with everything that it says."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.events: list[Event] = []
        self.predictions: list[Prediction] = []
        self.gaps: list[dict[str, Any]] = []

    def note(self, event: Event) -> None:
        self.events.append(event)

    def saw(self, node: str, kind: str, times: int = 1) -> bool:
        return sum((e.node, e.kind) == (node, kind) for e in self.events) >= times

    def pid(self, node: str) -> int:
        return until(lambda: self.session.status().nodes[node].pid, f"{node} has a process")

    def next_prediction(self) -> Prediction:
        while (found := self.subscription.receive(int(LIMIT_S * 1000))) is not None:
            self.predictions.append(msgspec.convert(found, Prediction))
            return self.predictions[-1]
        raise AssertionError("no more predictions come")

    def predict_until(self, condition: Callable[[Prediction], bool], what: str) -> Prediction:
        clock = SystemClock()
        while True:
            prediction = self.next_prediction()
            if condition(prediction):
                return prediction
            assert clock.now_ns() < LIMIT_S * 1e9, f"no prediction in {LIMIT_S} s: {what}; the last: {prediction}"


@contextlib.contextmanager
def running(folder: Path, **rig: Any) -> Iterator[Watched]:
    """A session of the four-stream rig, subscribed to, and nothing of it left afterwards."""
    segments: set[str] = set()
    with short_folder() as root:
        watched: list[Watched] = []
        session = Session(make_rig(folder, **rig), lambda event: watched[0].note(event), root=root)
        watched.append(Watched(session))
        session.start()
        try:
            with subscribe_json(session.predictions, "prediction") as watched[0].subscription:
                yield watched[0]
                segments = segments_of(session.dir)
        finally:
            session.stop()
        assert not session.dir.exists()
        assert not nodes_of(session.dir)
        assert not any(map(segment_exists, segments))


def all_ok(prediction: Prediction) -> bool:
    return {report.verdict for report in prediction.streams.values()} == {"ok"}


def indices(predictions: list[Prediction]) -> list[int]:
    return [prediction.window.index for prediction in predictions]


def test_what_a_source_prints_stands_in_its_log_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    (tmp_path / "talker.py").write_text(
        "from tests.truth_source import Truth\n"
        "class Talker(Truth):\n"
        "    def open(self):\n"
        "        super().open()\n"
        "        print('opened by', self.context.name)\n"
    )
    rig = tmp_path / "rig.yaml"
    rig.write_text(yaml.safe_dump({"name": "talk", "sources": {"mine": {"kind": "talker:Talker"}}}))
    with short_folder() as root, Session(load_rig(rig), root=root) as session:
        log = session.dir / "mine.log"
        until(lambda: log.exists() and "opened by mine" in log.read_text(), "the source's words are in its log")


def test_four_streams_are_predicted_from_and_stopped(tmp_path: Path) -> None:
    with running(tmp_path) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        first = watched.predictions[-1]
        for _ in range(5):
            watched.next_prediction()
        got = indices(watched.predictions)
        assert got == list(range(got[0], got[0] + len(got)))
        assert first.session == watched.session.id
        stages = first.timing.latency_ms
        assert set(stages) == {"wait", "align", "transport", "encode", "fuse", "total"}
        assert sum(v for k, v in stages.items() if k != "total") == pytest.approx(stages["total"])
        status = until(lambda: (s := watched.session.status()).streams["camera"].used and s, "the aligner has reported")
        assert set(status.streams) == set(STREAMS)
        assert status.streams["camera"].rate_hz > 0
        assert status.streams["microphone"].payload == "audio"
        assert {node.state for node in status.nodes.values()} == {"ready"}
        assert {ref.id for ref in live_sessions(watched.session.dir.parent)} == {watched.session.id}
    assert {event.node for event in watched.events if event.kind == "stopped"} == {*SOURCES, "align", "fusion"}
    stopped = [event.node for event in watched.events if event.kind == "stopped"]
    assert stopped[-2:] == ["align", "fusion"]
    assert not any(event.kind in ("died", "hung") for event in watched.events)


def test_a_killed_microphone_is_missed_within_a_window_and_comes_back_in_a_new_epoch(tmp_path: Path) -> None:
    with running(tmp_path) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        epoch = until(lambda: watched.session.status().streams["microphone"].epoch, "the epoch is known")
        os.kill(watched.pid("microphone"), signal.SIGKILL)

        def heard(prediction: Prediction) -> str:
            report = prediction.streams["microphone"]
            return report.reason or report.verdict

        watched.predict_until(lambda p: heard(p) == "dead", "the microphone is missing(dead)")
        fell_silent = next(p for p in watched.predictions[::-1] if heard(p) == "ok").window.index
        others = watched.predictions[-1].streams
        assert {others[name].verdict for name in ("camera", "imu", "lidar")} == {"ok"}
        assert others["microphone"].contribution is not None
        back = watched.predict_until(lambda p: heard(p) == "ok", "the microphone is back")
        between = [heard(p) for p in watched.predictions if fell_silent < p.window.index < back.window.index]
        assert "dead" in between
        # Neither its silence nor its death was waited for: the verdict says dead as soon as the step is nobody's any
        # more. A step it had begun may hold what it sent, and so may the one in which it came back.
        assert set(between[:2] + between[-2:]) <= {"dead", "partial", "gap"}
        assert set(between[2:-2]) <= {"dead"}
        got = indices(watched.predictions)
        assert got == list(range(got[0], got[0] + len(got)))
        returned = until(
            lambda: (e := watched.session.status().streams["microphone"].epoch) != epoch and e, "the epoch is known"
        )
        assert returned > epoch
        assert watched.saw("microphone", "died")
        assert watched.saw("microphone", "restarting")
        died = next(event for event in watched.events if event.kind == "died")
        assert "SIGKILL" in died.text
        assert watched.session.status().nodes["microphone"].restarts == 1


def test_a_killed_align_node_begins_at_the_next_hop_and_names_the_gap(tmp_path: Path) -> None:
    out = tmp_path / "session.mcap"
    with running(tmp_path, record={"path": str(out)}) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        with subscribe_json(watched.session.predictions, "gap") as gaps:
            # The subscription to gaps has been joined when something else comes through a subscription opened later.
            with subscribe_json(watched.session.predictions, "prediction") as later:
                assert later.receive(int(LIMIT_S * 1000)) is not None
            os.kill(watched.pid("align"), signal.SIGKILL)
            gap = gaps.receive(int(LIMIT_S * 1000))
        assert gap is not None
        assert gap["cause"] == "the align node was restarted"
        watched.predict_until(lambda p: all_ok(p) and p.window.index > gap["to"], "all is well again")
    seen = [*indices(watched.predictions), *range(gap["from"], gap["to"] + 1)]
    assert sorted(seen) == list(range(min(seen), max(seen) + 1))
    with RecordingReader(out) as reader:
        steps = [msgspec.json.decode(data)["step"] for data, _, _ in reader.json(MANIFEST_TOPIC)]
        recorded = [msgspec.json.decode(data) for data, _, _ in reader.json(GAP_TOPIC)]
        assert reader.info.complete
    named = [k for g in recorded for k in range(g["from"], g["to"] + 1)]
    assert sorted(steps + named) == list(range(1, max(steps) + 1))


def test_a_killed_fusion_node_comes_back(tmp_path: Path) -> None:
    out = tmp_path / "session.mcap"
    with running(tmp_path, record={"path": str(out)}) as watched:
        last = watched.predict_until(all_ok, "all four streams are ok").window.index
        os.kill(watched.pid("fusion"), signal.SIGKILL)
        until(lambda: watched.saw("fusion", "ready", 2), "fusion is ready again")
        back = watched.predict_until(all_ok, "predictions are back")
        assert back.window.index > last
        got = indices(watched.predictions)
        assert got == sorted(set(got))
    with RecordingReader(out) as reader:
        steps = [msgspec.json.decode(data)["step"] for data, _, _ in reader.json(MANIFEST_TOPIC)]
        predicted = [msgspec.json.decode(data)["window"]["index"] for data, _, _ in reader.json(PREDICTION_TOPIC)]
        gaps = [gap for data, _, _ in reader.json(GAP_TOPIC) if "of" in (gap := msgspec.json.decode(data))]
    named = [k for gap in gaps for k in range(gap["from"], gap["to"] + 1)]
    assert sorted(predicted + named) == steps == list(range(1, steps[-1] + 1))
    assert not named or last <= named[0] <= named[-1] < back.window.index  # the last may have been on its way only


def test_a_killed_recorder_leaves_a_readable_file_and_starts_another(tmp_path: Path) -> None:
    out = tmp_path / "session.mcap"
    with running(tmp_path, record={"path": str(out)}) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        written = until(
            lambda: (c := watched.session.status().nodes["record"].counters).get("bytes", 0) > 1e6 and c,
            "a chunk is on the disk",
        )
        os.kill(watched.pid("record"), signal.SIGKILL)
        until(lambda: (tmp_path / "session-2.mcap").exists(), "a second file")
        until(lambda: watched.session.status().nodes["record"].counters.get("messages", 0) > 0, "it is written to")
        assert all_ok(watched.next_prediction()) or watched.predictions
    first, second = watched.session.status().recordings
    assert (first.path, second.path) == (str(out), str(tmp_path / "session-2.mcap"))
    assert first.safe_ns is not None
    assert first.safe_ns < second.from_ns
    assert watched.session.defect is not None
    assert f"the recorder died, and nothing is recorded from {first.safe_ns / 1e9:.1f} s" in watched.session.defect
    with RecordingReader(out) as reader:
        assert not reader.info.complete
        messages = sum(1 for _ in reader.messages())
        assert messages > 0
        assert set(reader.streams) == set(STREAMS)
    assert out.stat().st_size >= written["bytes"]
    with RecordingReader(tmp_path / "session-2.mcap") as reader:
        assert not reader.info.complete
        assert "part 2" in reader.info.note
        assert sum(1 for _ in reader.messages()) > 0


def test_a_recording_has_everything_that_was_published(tmp_path: Path) -> None:
    rig = make_rig(tmp_path)
    with short_folder() as root:
        session = Session(rig, record=RecordEntry(path=str(tmp_path / "{session}.mcap")), root=root)
        with session:
            until(lambda: session.status().nodes["fusion"].counters.get("predictions", 0) > 20, "predictions")
            until(lambda: session.status().streams["lidar"].published > 20, "sweeps")
        published = {name: stream.published for name, stream in session.status().streams.items()}
    with RecordingReader(tmp_path / f"{session.id}.mcap") as reader:
        assert reader.info.complete
        assert reader.info.rig == rig.document.text
        seqs: dict[str, list[int]] = {}
        for message, _ in reader.messages():
            seqs.setdefault(message.header.stream, []).append(message.header.seq)
        predictions = [msgspec.json.decode(d, type=Prediction) for d, _, _ in reader.json(PREDICTION_TOPIC)]
        manifests = [msgspec.json.decode(d)["step"] for d, _, _ in reader.json(MANIFEST_TOPIC)]
    for name, numbers in seqs.items():
        assert numbers == list(range(len(numbers))), name
        assert len(numbers) >= published[name]
    assert manifests == list(range(1, len(manifests) + 1))
    assert indices(predictions) == manifests[: len(predictions)]


LAUNCHER = """
import sys
from pathlib import Path
from pipeline.config import load_rig
from pipeline.launch import Session
session = Session(load_rig(sys.argv[1]), root=Path(sys.argv[2]))
print(session.dir, flush=True)
once = []
def tick(session):
    used = [s.used for s in session.status().streams.values()]
    if all(used) and not once:
        once.append(print("running", flush=True))
session.run(on_tick=tick)
print("stopped", flush=True)
"""


@contextlib.contextmanager
def launcher(folder: Path, **rig: Any) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A launcher in a process of its own, all of whose nodes are at work."""
    make_rig(folder, **rig)
    with short_folder() as root:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder / "rig.yaml"), str(root)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True,
        )  # fmt: skip
        with process:
            try:
                assert process.stdout is not None
                session_dir = Path(process.stdout.readline().strip())
                assert process.stdout.readline() == "running\n"
                yield process, session_dir
            finally:
                process.kill()


@pytest.fixture
def hung_up() -> Iterator[None]:
    """Processes that are started now end when their terminal is closed, also where the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.usefixtures("hung_up")
def test_a_signal_stops_everything_in_order(tmp_path: Path, how: signal.Signals) -> None:
    out = tmp_path / "session.mcap"
    with launcher(tmp_path, record={"path": str(out)}) as (process, session_dir):
        assert len(nodes_of(session_dir)) == 7
        segments = segments_of(session_dir)
        assert all(map(segment_exists, segments))
        assert len(segments) == 1
        process.send_signal(how)
        assert process.stdout is not None
        assert process.stdout.readline() == "stopped\n"
        assert process.wait(LIMIT_S) == 0
        assert not nodes_of(session_dir)
        assert not session_dir.exists()
        assert not any(map(segment_exists, segments))
    with RecordingReader(out) as reader:
        assert reader.info.complete


@pytest.mark.usefixtures("hung_up")
def test_a_session_that_is_to_outlive_its_terminal_does(tmp_path: Path) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does
    session = Session(make_rig(tmp_path, {"imu": SOURCES["imu"]}, bundle=False))
    heeded: list[Any] = []
    session.run(0.0, on_tick=lambda _: heeded.append(signal.getsignal(signal.SIGHUP)))
    assert set(heeded) == {signal.SIG_IGN}


@pytest.mark.parametrize(("how", "kills"), [(signal.SIGINT, True), (signal.SIGTERM, True), (signal.SIGHUP, False)])
@pytest.mark.usefixtures("hung_up")
def test_a_second_signal_kills_unless_a_closed_terminal_sends_it(
    tmp_path: Path, how: signal.Signals, kills: bool
) -> None:
    session = Session(make_rig(tmp_path, {"imu": SOURCES["imu"]}, bundle=False))
    hard: list[bool] = []

    def twice(_: Session) -> None:
        signal.raise_signal(how)
        signal.raise_signal(how)
        hard.append(session._supervisor.hard.is_set())

    session.run(on_tick=twice)
    assert hard == [kills]


def test_a_listener_that_is_gone_ends_the_session_in_order(tmp_path: Path) -> None:
    out, told = tmp_path / "session.mcap", []  # type: ignore[var-annotated]

    def listen(event: Event) -> None:
        told.append(event)
        if (event.node, event.kind) == ("imu", "ready"):
            raise BrokenPipeError

    with short_folder() as root:
        rig = make_rig(tmp_path, {"imu": SOURCES["imu"]}, bundle=False, record={"path": str(out)})
        with pytest.raises(BrokenPipeError):
            Session(rig, listen, root=root).run()
    assert (told[-1].node, told[-1].kind) == ("imu", "ready")  # it is not asked again
    with RecordingReader(out) as reader:
        assert reader.info.complete


def test_the_nodes_of_a_killed_launcher_stop_by_themselves_and_close_the_recording(tmp_path: Path) -> None:
    out = tmp_path / "session.mcap"
    with launcher(tmp_path, record={"path": str(out)}) as (process, session_dir):
        assert len(nodes_of(session_dir)) == 7
        segments = segments_of(session_dir)
        assert all(map(segment_exists, segments))
        assert len(segments) == 1
        process.kill()
        process.wait(LIMIT_S)
        until(lambda: not nodes_of(session_dir), "no node is left")
        with RecordingReader(out) as reader:
            assert reader.info.complete
        assert session_dir.exists()
        assert live_sessions(session_dir.parent) == []  # looking is what cleans up, as the next start does
        assert not session_dir.exists()
        assert not any(map(segment_exists, segments))


STUBBORN = """
import threading
from nodes.synthetic import Synthetic

class Stubborn(Synthetic):
    def read(self):
        print("reading", flush=True)
        threading.Event().wait()
"""


def test_who_asks_again_is_told_once_that_all_nodes_are_killed(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    sources = {name: source | {"kind": "stubborn:Stubborn"} for name, source in SOURCES.items()}
    with running(tmp_path, sources=sources) as watched:
        watched.session.stop(hard=True)
    hung = [event for event in watched.events if event.kind == "hung"]
    assert [event.node for event in hung] == ["launch"]
    assert "killed at once" in hung[0].text


@pytest.mark.slow
def test_a_source_that_does_not_return_is_killed_and_told_what_it_may(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    sources = SOURCES | {"camera": SOURCES["camera"] | {"kind": "stubborn:Stubborn"}}
    with running(tmp_path, sources=sources) as watched:
        log = watched.session.dir / "camera.log"
        until(lambda: log.exists() and "reading" in log.read_text(), "the source is asked, and does not return")
        watched.session.stop()
    events = list(watched.events)
    hung = [event for event in events if event.kind == "hung"]
    assert [event.node for event in hung] == ["camera"]
    waited = [event for event in events if "is waited for, at most 5 s" in event.text]
    assert [event.node for event in waited if event.node in sources] == ["camera"]
    assert events.index(waited[0]) < events.index(hung[0])
    assert "the `read` of a source returns within about 100 ms" in hung[0].text


def test_a_node_that_hangs_is_killed_and_started_again(tmp_path: Path) -> None:
    with running(tmp_path, restart={"hang_ms": 1000}) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        os.kill(watched.pid("imu"), signal.SIGSTOP)
        until(lambda: watched.saw("imu", "hung"), "the launcher notices")
        until(lambda: watched.saw("imu", "ready", 2), "it is back")
        watched.predict_until(all_ok, "all is well again")
        assert watched.session.status().nodes["imu"].trouble == "said nothing for too long, and was killed"


def test_a_session_that_ends_for_a_node_that_hangs_says_so(tmp_path: Path) -> None:
    with running(tmp_path, restart={"hang_ms": 1000, "limit": 0}) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        os.kill(watched.pid("fusion"), signal.SIGSTOP)
        assert watched.session.wait(LIMIT_S)
        assert watched.session.failure is not None
        assert watched.session.failure.startswith("fusion said nothing for too long, and was killed")


def test_a_node_that_spoke_while_the_launcher_was_stopped_does_not_hang(tmp_path: Path) -> None:
    clock, (ear, voice) = ManualClock(), os.pipe()
    spec = NodeSpec(session="s", origin=Origin(0, 0), session_dir=str(tmp_path), node="imu", kind="x")
    child = Child(spec, False, RestartEntry(hang_ms=1000), clock)
    with open(ear, "rb") as child_voice, open(voice, "wb", buffering=0) as node:
        os.set_blocking(ear, False)
        child.process = SimpleNamespace(stdout=child_voice)  # type: ignore[assignment]
        node.write(b'{"state":"ready"}\n')
        child.listen()
        clock.advance(5_000_000_000)  # in which the launcher was stopped
        node.write(b'{"state":"ready"}\n')
        assert not child.hangs()
        child.listen()
        assert not child.hangs()
        clock.advance(5_000_000_000)
        assert not child.hangs()
        child.listen()
        assert child.hangs()  # nothing was said


def test_another_host_tells_once_of_a_node_that_hangs(tmp_path: Path) -> None:
    clock, said, killed = ManualClock(), list[str](), list[int]()
    spec = NodeSpec(session="s", origin=Origin(0, 0), session_dir=str(tmp_path), node="imu", kind="x")
    host, child = object.__new__(_Host), Child(spec, False, RestartEntry(), clock)
    child.process = SimpleNamespace(returncode=None, send_signal=killed.append)  # type: ignore[assignment]
    host._children, host._clock, host._say, host._selector = [child], clock, said.append, selectors.SelectSelector()
    clock.advance(60_000_000_000)
    for _ in range(5):  # a large process takes its time to die
        host._care()
    assert said == ["imu has said nothing for too long, and is killed"]
    assert killed == [signal.SIGKILL]
    assert child.died_how(-9) == "said nothing for too long, and was killed"


def test_a_node_that_is_asked_to_end_by_somebody_else_comes_back(tmp_path: Path) -> None:
    with running(tmp_path) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        os.kill(watched.pid("camera"), signal.SIGTERM)  # the camera has shared memory as well
        watched.predict_until(lambda p: p.streams["camera"].reason == "dead", "the camera is gone")
        watched.predict_until(all_ok, "all is well again")
        os.kill(watched.pid("camera"), signal.SIGKILL)
        watched.predict_until(lambda p: p.streams["camera"].reason == "dead", "the camera is gone")
        watched.predict_until(all_ok, "all is well again")
        assert len(segments_of(watched.session.dir)) == 1


# A node of a user's own, beside the rig, which dies as soon as it is read.
FRAGILE = """
import msgspec
from pipeline.node import Source

class Fragile(Source):
    payload = "imu"
    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        pass
    def read(self):
        raise RuntimeError("a bug in a driver")
"""


def test_a_source_that_keeps_crashing_is_given_up_and_the_rest_goes_on(tmp_path: Path) -> None:
    (tmp_path / "fragile.py").write_text(FRAGILE)
    sources = SOURCES | {"imu": {"kind": "fragile:Fragile"}}
    with running(tmp_path, sources=sources, restart={"limit": 1, "backoff_ms": 10}) as watched:
        until(lambda: watched.saw("imu", "gave_up"), "the launcher gives up")
        assert watched.saw("imu", "died", 2)
        died = [event for event in watched.events if event.kind == "died"]
        own = [event.text.count("RuntimeError: a bug in a driver") for event in died]
        assert own == [1, 1]
        prediction = watched.predict_until(
            lambda p: p.streams["imu"].reason == "dead" and p.streams["camera"].verdict == "ok", "the others go on"
        )
        assert prediction.streams["imu"].contribution == 0.0
        assert watched.session.status().nodes["imu"].state == "failed"


def test_a_required_source_that_fails_ends_the_start(tmp_path: Path) -> None:
    unread = "def read(self):\n        return None\n    def open(self):"
    (tmp_path / "unopened.py").write_text(FRAGILE.replace("def read(self):", unread))  # a module is imported once
    sources = SOURCES | {"imu": {"kind": "unopened:Fragile", "required": True}}
    rig = make_rig(tmp_path, sources=sources, restart={"limit": 0})
    with short_folder() as root:
        events: list[Event] = []
        session = Session(rig, events.append, root=root)
        with pytest.raises(SensoriumError, match=r"(?s)imu.*a bug in a driver"):
            session.start()
        assert not any("a bug in a driver" in event.text for event in events)  # it is said once
        assert not session.dir.exists()
        assert not nodes_of(session.dir)


# A source of a user's own whose device is there when a file is.
PLUGGED = """
from pathlib import Path
from nodes.synthetic import Synthetic
from pipeline.errors import SensorError

class Plugged(Synthetic):
    class Settings(Synthetic.Settings, frozen=True, forbid_unknown_fields=True, kw_only=True):
        plug: Path
    def open(self):
        self.check()
        super().open()
    def read(self):
        self.check()
        return super().read()
    def check(self):
        if not self.settings.plug.exists():
            raise SensorError("nothing is plugged in")
"""


def test_a_device_that_is_unplugged_and_plugged_in_again(tmp_path: Path) -> None:
    (tmp_path / "plugged.py").write_text(PLUGGED)
    plug = tmp_path / "plug"
    sources = SOURCES | {"imu": {"kind": "plugged:Plugged", "payload": "imu", "plug": "plug"}}
    with running(tmp_path, sources=sources) as watched:
        watched.predict_until(lambda p: p.streams["camera"].verdict == "ok", "the others do not wait for the device")
        until(lambda: watched.saw("imu", "waiting"), "the node says that it waits")
        assert watched.session.status().streams["imu"].note == "nothing is plugged in"
        watched.predict_until(lambda p: p.streams["imu"].reason == "never_started", "nothing has ever come of it")
        plug.touch()
        watched.predict_until(all_ok, "the device is there")
        plug.unlink()
        watched.predict_until(lambda p: p.streams["imu"].verdict == "missing", "the device is gone")
        plug.touch()
        watched.predict_until(all_ok, "the device is back")
        until(lambda: watched.session.status().streams["imu"].note == "", "all is well")
        assert watched.session.status().nodes["imu"].restarts == 0
        got = indices(watched.predictions)
        assert got == list(range(got[0], got[0] + len(got)))


def test_a_required_device_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    (tmp_path / "plugged.py").write_text(PLUGGED)
    imu = {"kind": "plugged:Plugged", "payload": "imu", "plug": "plug", "required": True}
    rig = make_rig(tmp_path, sources={"imu": imu}, bundle=False, restart={"start_s": 3})
    with short_folder() as root:
        session = Session(rig, root=root)
        with pytest.raises(SensoriumError, match=r"not ready within 3 s: imu \(nothing is plugged in\)"):
            session.start()
        assert not session.dir.exists()
        assert not nodes_of(session.dir)


def test_a_host_without_keys_is_told_of_while_the_session_runs_and_at_its_end(tmp_path: Path) -> None:
    public, secret = make_curve_keys(tmp_path, "hub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    pi = {
        "kind": "remote", "listen": address, "sources": {"imu": SOURCES["imu"]},
        "curve": {"secret": str(secret), "allow": [str(public)]},
    }  # fmt: skip
    events: list[Event] = []
    with (
        short_folder() as root,
        Session(make_rig(tmp_path, {"pi": pi}, bundle=False), events.append, root=root) as session,
        contextlib.closing(LinkClient(address)) as stranger,
    ):
        while not any(event.kind == "warning" for event in events):
            stranger.receive(20)
        warnings = session.status().nodes["pi"].warnings
    assert [event.text for event in events if event.kind == "warning"] == warnings
    assert f"somebody without keys was refused at {address}" in warnings[0]


def test_a_source_that_gives_nothing_is_told_of_once_and_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "idle.py").write_text(IDLE)
    monkeypatch.setattr("pipeline.supervise.SILENT_NS", 500_000_000)
    monkeypatch.setattr("pipeline.supervise.UNMEASURED_NS", 300_000_000)
    idle = {name: {"kind": f"idle:{name.title()}"} for name in ("mute", "deaf", "dead", "numb", "void")}
    sources = {"imu": SOURCES["imu"]} | idle
    events: list[Event] = []
    with short_folder() as root:
        session = Session(make_rig(tmp_path, sources, bundle=False), events.append, root=root)
        with session, Show(session, json=True) as show:
            until(lambda: len([e for e in events if e.kind == "warning"]) > 2, "the silent ones are told of")
            until(lambda: sum((e.node, e.kind) == ("deaf", "ready") for e in events) > 3, "it has tried again")
            until(lambda: any((e.node, e.kind) == ("dead", "gave_up") for e in events), "it is given up")
        print_summary(show.summary, True, session.status())
    assert sorted((e.node, e.text) for e in events if e.kind == "warning") == [
        ("mute", "has given nothing in the first 0 s of the session"),
        ("numb", "has given nothing but NaN, which is no value, for 0 s"),
        ("void", "has given nothing but infinities, which are no values, for 0 s"),
    ]
    assert [e.text for e in events if e.kind == "waiting"] == ["nothing is heard"]
    numb = session.status().streams["numb"].published
    assert show.summary.as_dict()["streams"]["numb"] == {"sent": numb, "without a value": numb}
    assert "without a value" not in show.summary.streams["imu"]
    assert {warning for warning in show.summary.warnings if warning.startswith(("mute", "deaf", "numb"))} == {
        f"numb gave {numb} of {numb} messages without a value: all are NaN",
        "mute gave no message",
        "deaf gave no message: nothing is heard",
    }
    assert "the source dead died, and was given up: it is broken" in show.summary.warnings


IDLE = """
import msgspec
import numpy as np
from pipeline.errors import ConfigError, SensorError
from pipeline.messages import SignalLayout, signal_dtype
from pipeline.source import Reading, Source

class Mute(Source):
    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        pass
    payload = "signal"
    def open(self):
        self.due_ns = self.context.clock.now_ns()
    def read(self):
        self.due_ns += 100_000_000
        self.context.clock.wait_until(self.due_ns)
        return None

class Deaf(Mute):
    def read(self):
        super().read()
        raise SensorError("nothing is heard")

class Dead(Mute):
    def open(self):
        raise ConfigError("it is broken")

class Numb(Mute):
    value = np.nan
    def read(self):
        super().read()
        sample = np.zeros(1, signal_dtype(2))
        sample["value"] = self.value
        times = dict.fromkeys(("t_capture_ns", "t_end_ns", "t_receipt_ns"), self.due_ns)
        return Reading(layout=SignalLayout(1, ("a", "b")), data=sample, **times)

class Void(Numb):
    value = np.inf
"""


def test_on_its_own_host_a_session_is_seen_without_its_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    public, secret = make_curve_keys(tmp_path, "hub")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    curve = {"secret": str(secret), "allow": [str(public)]}
    with short_folder() as root:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(root))
        session = Session(make_rig(tmp_path, transport={"predictions": address, "curve": curve}))
        with session, Show(session, json=True) as show:
            live.subscribe(None, None, json=True, count=2)
            until(lambda: show.summary.predictions, "the session's own table has predictions")
            assert session.status().nodes["fusion"].warnings == []
    assert capfdbinary.readouterr().out.count(b'"schema"') >= 2


def test_the_end_of_a_replay_is_the_end_of_the_session(tmp_path: Path) -> None:
    out = tmp_path / "first.mcap"
    sources = {name: source | {"duration_s": 4} for name, source in SOURCES.items()}
    with running(tmp_path, sources=sources, record={"path": str(out)}) as watched:
        assert watched.session.wait(LIMIT_S)
        assert watched.session.failure is None
    with RecordingReader(out) as reader:
        assert reader.info.complete
        assert 60 < sum(1 for _ in reader.messages(["camera"])) <= 121
    folder = tmp_path / "again"
    folder.mkdir()
    again = {"session": {"kind": "replay", "path": str(out)}}
    with running(folder, sources=again, record={"path": str(folder / "second.mcap")}) as watched:
        assert watched.session.wait(LIMIT_S)
        assert watched.session.failure is None
    with RecordingReader(folder / "second.mcap") as reader, RecordingReader(out) as original:
        second, first = list(reader.messages()), list(original.messages())
        verdicts = [msgspec.json.decode(d, type=Prediction).streams for d, _, _ in reader.json(PREDICTION_TOPIC)]
        assert reader.info.complete
    assert any({report.verdict for report in streams.values()} == {"ok"} for streams in verdicts)
    key = ("stream", "seq")
    by_name = lambda pair: tuple(getattr(pair[0].header, name) for name in key)  # noqa: E731
    shifts = {
        b.header.t_capture_ns - a.header.t_capture_ns
        for (a, _), (b, _) in zip(sorted(first, key=by_name), sorted(second, key=by_name), strict=True)
    }
    assert len(shifts) == 1
    assert [bytes(m.data) for m, _ in sorted(first, key=by_name)] == [
        bytes(m.data) for m, _ in sorted(second, key=by_name)
    ]


def test_a_rig_is_checked_without_starting_anything(tmp_path: Path) -> None:
    assert check_rig_file(make_rig(tmp_path)) == []
    nothing = make_rig(tmp_path, bundle=False, record={"path": "x.mcap", "streams": []})
    [said] = check_rig_file(nothing)
    assert "record.streams: no stream is named, so none is recorded" in said
    assert check_rig_file(make_rig(tmp_path, record={"path": "x.mcap", "streams": []})) == []  # predictions alone
    extra = SOURCES | {"second_imu": {"kind": "synthetic", "payload": "imu"}}
    assert "second_imu" in check_rig_file(make_rig(tmp_path, sources=extra))[0]
    [said] = check_rig_file(make_rig(tmp_path, bundle=False))
    assert "nothing comes" in said
    assert said.endswith("or record it: sensorium record RIG -o FILE")


NEEDY = b"""
from pipeline.errors import BundleError

class Needy:
    token = 1
    reset = encode = skip = lambda *_: None
    def __init__(self, stream, settings):
        raise BundleError("it needs the file weights.onnx; run: pip install weights")
"""


def test_an_expert_that_lacks_what_it_needs_is_said_before_anything_starts(tmp_path: Path) -> None:
    write_bundle(tmp_path / "needy", {"imu": GRID | {"encoder": "python: needy:Needy"}}, files={"needy.py": NEEDY})
    file = tmp_path / "rig.yaml"
    file.write_text(yaml.safe_dump({"name": "t", "sources": SOURCES, "bundle": {"path": "needy", "allow_code": True}}))
    with pytest.raises(SensoriumError, match=r"rig.yaml, line .*`imu`.*weights.onnx; run: pip install weights") as said:
        check_rig_file(load_rig(file))
    with pytest.raises(SensoriumError) as again:
        Session(load_rig(file))
    assert str(again.value) == str(said.value)


def test_an_address_that_is_taken_is_said_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        rig = make_rig(tmp_path, transport={"predictions": address})
        with pytest.raises(ConfigError, match=f"cannot listen at {address}: Address already in use; is another"):
            Session(rig)
    Session(rig)


REFUSED: list[tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]] = [
    ({"imu": {"kind": "synthetik", "payload": "imu"}}, {}, ("sources.imu.kind", "Did you mean `synthetic`?")),
    ({"imu": {"kind": "synthetic", "payload": "imu", "rate_khz": 0.1}}, {}, ("line ", "`rate_hz: 100`", "`kind`")),
    ({"imu": {"kind": "synthetic", "payload": "imo"}}, {}, ("sources.imu.payload", "'imo'", "`imu`")),
    ({"imu": {"kind": "synthetic", "payload": "imu", "silence_s": [[2, 1]]}}, {}, ("sources.imu", "must end after")),
    ({"imu": {"kind": "no_such_package.x:Y"}}, {}, ("cannot be imported", "no_such_package")),
    ({"imu": {"kind": "nodes.synthetic:Synthetik"}}, {}, ("no class `Synthetik`", "`Synthetic`")),
    ({"imu": {"kind": "align"}}, {}, ("no kind of source",)),
    ({"imu": {"kind": "msgspec:Struct"}}, {}, ("no Source",)),
    ({"imu": {"kind": "synthetic", "payload": "audio"}}, {}, ("bundle", "`imu`", "audio")),
    ({"s": {"kind": "replay", "path": "no.mcap"}}, {}, ("sources.s", "cannot be opened")),
    ({"s": {"kind": "replay", "path": "no.mcap", "speed": 2}}, {}, ("sensorium replay",)),
    ({}, {"bundle": {"path": "nowhere"}}, ("bundle.path", "no bundle")),
    ({}, {"bundle": {"path": "model", "streams": {"camera": "front"}}}, ("`front`",)),
    ({}, {"align": {"streams": {"lidr": {"idle_ms": 5}}}}, ("align.streams", "Did you mean `lidar`?")),
    ({}, {"record": {"path": "x.mcap", "streams": ["cam"]}}, ("record.streams", "`cam`")),
]


@pytest.mark.parametrize(("sources", "more", "words"), REFUSED, ids=[str(i) for i in range(len(REFUSED))])
def test_what_cannot_be_carried_out_is_refused_before_anything_starts(
    tmp_path: Path, sources: dict[str, Any], more: dict[str, Any], words: tuple[str, ...]
) -> None:
    rig = make_rig(tmp_path, sources=SOURCES | sources, **more)
    if "bundle" in more:
        file = tmp_path / "rig.yaml"
        file.write_text(yaml.safe_dump(yaml.safe_load(file.read_text()) | more))
        rig = load_rig(file)
    with pytest.raises(SensoriumError) as caught:
        check_rig_file(rig)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert "rig.yaml" in str(caught.value)


def test_a_session_runs_once(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, sources={"imu": SOURCES["imu"]}, bundle=False)
    with short_folder() as root:
        with Session(rig, root=root) as session, pytest.raises(ConfigError, match="runs once"):
            session.start()
        session.stop()
