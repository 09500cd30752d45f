"""``sensorium explain`` on a session that runs: watched from outside, and not disturbed."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from pipeline import terminal
from pipeline.cli import app
from pipeline.clock import SystemClock
from pipeline.commands import live
from pipeline.errors import ConfigError
from pipeline.explain import PLACES, Explanation, StreamAccount
from pipeline.explain_live import Attached, Recent
from pipeline.findings import explanation_text
from pipeline.launch import Session, live_sessions
from pipeline.messages import Header
from pipeline.status import SessionRef
from pipeline.terminal import console
from tests.rigs import SOURCES, STREAMS, make_rig, short_folder
from tests.test_explain import explained

S = 1_000_000_000
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sessions of several processes")


def watch_until(attached: Attached, ready: object, what: str) -> None:
    clock = SystemClock()
    while not ready():  # type: ignore[operator]
        assert clock.now_ns() < 60 * S, what
        attached.turn()


@pytest.mark.slow
def test_a_running_session_is_explained_and_not_disturbed(tmp_path: Path) -> None:
    with short_folder() as root, Session(make_rig(tmp_path), root=root) as session:
        [ref] = live_sessions(root)
        assert ref.origin == session.clock.origin
        with Attached(ref) as attached:
            watch_until(
                attached, lambda: len(attached.predictions) > 12 and attached.accounts, "predictions and an account"
            )
            said = attached.explanation()
            assert said.source == "running"
            assert set(said.streams) == set(STREAMS)
            for name, stream in said.streams.items():
                counted = stream.messages
                assert stream.balanced
                assert counted["sent"] == counted["received"] + counted["lost"]
                assert counted["received"] == sum(counted[place] for place in PLACES) > 0
                assert stream.rate_hz == pytest.approx(
                    {"camera": 30, "microphone": 16_000, "imu": 100, "lidar": 10}[name], rel=0.1
                )
                assert sum(stream.verdicts.values()) == said.windows
            assert sum(stream.waited for stream in said.streams.values()) > 0
            assert said.latency_ms["total"]["p50"] > 0
            shown = attached.window(attached.manifests[-1].step + 2)  # one to come
            assert shown.streams["imu"].messages
            assert all(message.arrival_ns is not None for message in shown.streams["imu"].messages)
            with pytest.raises(ConfigError, match="not seen of this session, only those from"):
                attached.window(1) if attached.manifests[0].step > 1 else attached.window(-1)
        session.stop()
        assert not session.dir.exists()  # who watched holds nothing of it


@pytest.mark.slow
def test_without_a_model_it_says_what_can_be_seen(tmp_path: Path) -> None:
    rig = make_rig(tmp_path, {"imu": SOURCES["imu"]}, bundle=False, record={"path": "a.mcap"})
    with short_folder() as root, Session(rig, root=root), Attached(live_sessions(root)[0]) as attached:
        watch_until(attached, lambda: "imu" in attached.heard and len(attached.heard["imu"]["seq"]) > 5, "messages")
        said = attached.explanation()
    assert (said.windows, said.streams["imu"].balanced) == (0, True)
    assert said.streams["imu"].messages["received"] > 5


def test_of_a_stream_that_never_came_nothing_is_claimed(tmp_path: Path) -> None:
    ref = SessionRef(id="s", dir=str(tmp_path), rig="r", predictions="", streams={"imu": "imu"})
    with Attached(ref, SystemClock()) as attached:
        stream = attached.explanation().streams["imu"]
    assert (stream.payload, stream.rate_hz, stream.delay_ms, stream.uncertainty_ms) == (None, None, None, None)


def test_what_the_aligner_does_not_count_is_said_to_be_counted_from_here() -> None:
    def account(**places: int) -> StreamAccount:
        return StreamAccount(
            payload="imu", rate_hz=None, gaps=0, max_gap_ms=None, jitter_ms=None, delay_ms=None, uncertainty_ms=None,
            age_ms=None, messages=places, rejected={}, unaccounted=0, balanced=True, verdicts={}, waited=0,
            wait_ms=None,
        )  # fmt: skip

    found = Explanation(
        session="s", complete=True, source="running", windows=1, causes={}, wait_ms=None, gaps=[], latency_ms={},
        streams={"imu": account(sent=70, used=70), "air": account(sent=10)},
    )  # fmt: skip
    note = "air: counted since this began to look"
    for source, said in (("running", True), ("live", False)):
        shown = io.StringIO()
        console(shown).print(explanation_text(msgspec.structs.replace(found, source=source)))
        assert (note in shown.getvalue()) is said


def test_what_stays_on_a_low_terminal_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = explained(tmp_path / "a.mcap")[2]
    ref = SessionRef(id="s", dir=str(tmp_path), rig="r", predictions="", streams={"imu": "imu"})
    screen, whole = (Console(file=io.StringIO(), width=100, height=9, force_terminal=True) for _ in range(2))
    monkeypatch.setattr(live, "EXPLAIN_EVERY_NS", 0)
    monkeypatch.setattr(live, "_live", lambda session, command: ref)
    monkeypatch.setattr(Attached, "explanation", lambda self: found)
    monkeypatch.setattr(terminal, "console", lambda file: screen)
    live.explain_running(None, window=None, count=2, json=False)
    whole.print(explanation_text(found))
    shown, said = (on.file.getvalue() for on in (screen, whole))  # type: ignore[attr-defined]
    assert "no room for" in shown  # while it went on
    assert len(said.splitlines()) > 9
    assert shown.endswith(said)


def test_what_is_old_is_forgotten() -> None:
    heard = Recent()
    for i in range(10):
        heard.add(Header(stream="x", seq=i, epoch=0, t_capture_ns=i, t_end_ns=i, bound_ns=i, t_receipt_ns=i), i * S)
    heard.forget(6 * S)
    assert list(heard["seq"]) == []  # beats are none of the messages
    assert [row[1] for row in heard.rows()] == [6, 7, 8, 9]
    assert set(heard.first_bound) == {6, 7, 8, 9}


def test_a_recording_and_a_session_are_not_explained_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="leave one of them out"):
        app(["explain", str(tmp_path / "a.mcap"), "--count", "2"], standalone_mode=False)
    assert capsys.readouterr().out == ""  # nothing that a program would read
