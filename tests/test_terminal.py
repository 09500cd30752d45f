"""What the terminal shows, as text."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import threading
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console, RenderableType

from pipeline.clock import Clock, ManualClock, SystemClock
from pipeline.curves import Bars, curves, score_table
from pipeline.errors import plain
from pipeline.launch import Event, NodeStatus, Status, StreamStatus
from pipeline.life import ON_THE_WAY, QUEUE_FULL, UNMEASURED_NS, RecordReport
from pipeline.reports import closing, recording_table, verification_text
from pipeline.sheet import Sheet, bar, numbers, size
from pipeline.show import GRACE_NS, Show, print_summary
from pipeline.summary import Summary, not_whole
from pipeline.terminal import Lines, Screen, console, duration, latency, screen
from pipeline.verify import Difference, Verification
from tests.test_summary import prediction

ROOT = Path(__file__).resolve().parent.parent


def text(renderable: RenderableType) -> str:
    wide = Console(file=io.StringIO(), width=120, color_system=None)
    wide.print(renderable)
    assert isinstance(wide.file, io.StringIO)
    return wide.file.getvalue()


def status() -> Status:
    streams = {
        "camera": StreamStatus(
            node="camera",
            payload="frame",
            rate_hz=29.97,
            verdict="ok",
            age_ms=12.3,
            dropped={"stale": 2},
            rejected={"future": 1},
            lost=3,
            late=4,
        ),
        "imu": StreamStatus(
            node="imu",
            payload="imu",
            rate_hz=100.0,
            verdict="missing",
            reason="dead",
            failures=7,  # attempts to open it: nothing that was sent
            note="waiting for /dev/i2c-1",
        ),
    }
    nodes = {
        "camera": NodeStatus(
            node="camera", kind="camera", state="ready", pid=1, restarts=0, note="", log="", counters={}
        ),
        "imu": NodeStatus(
            node="imu", kind="imu", state="restarting", pid=None, restarts=2, note="", log="", counters={}
        ),
    }
    return Status(session="s1", now_ns=3_723_000_000_000, nodes=nodes, streams=streams)


def test_the_screen_shows_streams_verdicts_nodes_and_what_they_wait_for() -> None:
    shown = text(screen("demo", status(), prediction(wait=1.0, encode=2.0, total=3.5), Summary()))
    rows = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert rows["demo"][-1] == "1:02:03"
    assert rows["camera"][:6] == ["camera", "30.0/s", "6", "12", "ms", "ok"]
    assert rows["camera"][6] == "+0.25"
    assert rows["imu"][:6] == ["imu", "0.0/s", "0", "–", "missing:", "dead"]
    assert rows["latency"] == ["latency", "3.5", "ms"]
    assert rows["="] == ["=", "wait", "1.0", "+", "encode", "2.0"]
    assert "camera ready" in shown
    assert "imu restarting (2 restarts)" in shown
    assert "imu: waiting for /dev/i2c-1" in shown


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"truth": "yes"}, "yes  0.50  truth yes"),
        ({"truth": "no"}, "truth no"),
        ({"abstained": True}, "not sure enough to say so"),
        ({"label": None, "confidence": None}, "no stream can be used"),
    ],
)
def test_the_answer_is_shown_beside_the_truth(changes: dict[str, object], said: str) -> None:
    assert said in text(screen("demo", None, msgspec.structs.replace(prediction(total=1.0), **changes), Summary()))


def test_what_fusion_could_not_use_is_said() -> None:
    seen = prediction(total=1.0)
    streams = seen.streams | {"camera": msgspec.structs.replace(seen.streams["camera"], masked="decode_failed")}
    assert "ok (not used: decode failed)" in text(
        screen("demo", None, msgspec.structs.replace(seen, streams=streams), Summary())
    )


def test_a_replay_has_no_latency_of_its_own() -> None:
    assert "latency, ms  wait 1.0 + encode 2.0\n" in text(
        screen("demo", None, prediction(wait=1.0, encode=2.0), Summary())
    )


def test_the_latency_of_every_stage_fits_a_terminal_of_80_columns() -> None:
    slow = prediction(wait=1250.0, align=10.8, transport=10.4, encode=120.1, fuse=10.1, total=1401.4)
    summary = Summary()
    summary.add(slow)
    shown = on_terminal(latency(slow, summary), 80)
    assert shown == [
        "latency 1401.4 ms   p50 1399.5   p95 1399.5   max 1401.4",
        "      = wait 1250.0 + align 10.8 + transport 10.4 + encode 120.1 + fuse 10.1",
    ]


def test_before_the_first_prediction_the_screen_says_what_is_waited_for() -> None:
    shown = text(screen("demo", status(), None, Summary()))
    assert "no prediction yet" in shown
    assert "camera" in shown


@pytest.mark.parametrize("value", [0.004, None, -0.3])
def test_a_contribution_may_be_nothing_unknown_or_against_the_label(value: float | None) -> None:
    seen = prediction(total=1.0)
    streams = {"camera": msgspec.structs.replace(seen.streams["camera"], contribution=value)}
    shown = text(screen("demo", None, msgspec.structs.replace(seen, streams=streams), Summary()))
    assert {0.004: "0.00", None: "–", -0.3: "-0.30 ██████"}[value] in shown


def test_the_summary_names_every_verdict_with_its_reason() -> None:
    summary = Summary()
    summary.add(prediction(truth="yes", wait=1.0, total=2.0))
    shown = text(closing(summary))
    assert "1 prediction over 0.0 s (yes 1); accuracy 1.000: 1 of 1 with a known truth" in shown
    assert "missing dead" in shown
    assert "messages" not in shown  # nobody counted them


def test_the_summary_keeps_its_words_on_a_narrow_terminal() -> None:
    summary = Summary()
    seen = prediction(total=2.0)
    for reason in ("never_started", "silent", "dead", "gap", "out_of_tolerance"):
        report = msgspec.structs.replace(seen.streams["imu"], reason=reason)
        summary.add(msgspec.structs.replace(seen, streams=seen.streams | {"microphone": report}))
    shown = "\n".join(on_terminal(closing(summary), 80))
    assert "…" not in shown
    assert "tolerance" in shown


def test_the_summary_names_what_was_dropped_between_nodes() -> None:
    summary = Summary()
    counted = {
        "align": {"steps": 40.0, "camera.overrun": 3.0},
        "camera": {"ring.expired": 2.0},
        "record": {"lost": 1.0},
    }
    seen = status()
    for node, counters in counted.items():
        seen.nodes[node] = msgspec.structs.replace(seen.nodes["camera"], node=node, counters=counters)
    print_summary(summary, True, seen)
    assert summary.as_dict()["drops"] == {"align": {"camera.overrun": 3}, "camera": {"ring.expired": 2}}
    shown = text(closing(summary))
    assert "align: camera.overrun 3" in shown
    assert "camera: ring.expired 2" in shown
    assert "steps" not in shown


def test_a_session_without_predictions_says_so() -> None:
    assert "no predictions" in text(closing(Summary()))
    assert "no model" in text(closing(Summary(expected=False)))


def test_a_session_without_a_model_says_so_at_its_beginning_alone() -> None:
    summary = Summary(expected=False)
    summary.streams = {"imu": {"sent": 7}}
    shown = text(closing(summary))
    assert "no model" not in shown
    assert "imu" in shown


def test_where_nothing_was_heard_nobody_speaks_of_a_session() -> None:
    summary = Summary()
    summary.endpoint = "tcp://127.0.0.1:5711"
    waiting = text(screen("there", None, None, summary))
    assert "waiting for predictions at tcp://127.0.0.1:5711; nothing has been heard from there yet" in waiting
    assert text(closing(summary)) == "nothing was heard at tcp://127.0.0.1:5711: is a session publishing there?\n"
    summary.add(prediction())
    assert "nothing was heard" not in text(closing(summary))


def test_the_screen_writes_events_worth_a_line_above_the_table() -> None:
    wide = Console(file=io.StringIO(), width=100, color_system=None)
    shown = Screen("demo", Summary(), on=wide)
    shown.event(Event(t_ns=1_500_000_000, node="imu", kind="died", text="killed by signal 9"))
    shown.event(Event(t_ns=1_600_000_000, node="imu", kind="ready", text="ready"))
    shown.prediction(prediction(total=1.0))
    shown.refresh(status())
    shown.close()
    assert isinstance(wide.file, io.StringIO)
    written = wide.file.getvalue()
    assert "1.5 s  imu: killed by signal 9" in written
    assert "1.6 s" not in written
    assert written.index("killed") < written.index("contribution")


def test_lines_go_where_they_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    file = io.BytesIO()
    lines = Lines(file)
    lines.prediction(prediction())
    lines.event(Event(t_ns=0, node="imu", kind="waiting", text="waiting for a device"))
    lines.refresh(None)
    lines.close()
    assert msgspec.json.decode(file.getvalue())["label"] == "yes"
    assert "imu: waiting for a device" in capsys.readouterr().err


def test_a_verification_names_the_first_difference_and_what_nobody_can_know() -> None:
    found = Verification(session="s", windows=5, predictions=4, fingerprint="other")
    assert "5 windows and 4 predictions equivalently" in text(verification_text(found))
    found.differ(Difference(7, "window", "imu", "verdict", "ok", "late"))
    for window in range(30):
        found.doubt(f"window {window} is not there")
    shown = text(verification_text(found))
    assert "1 differ; the first: window 7, stream imu, verdict: recorded ok, made again late" in shown
    assert "30 cannot be verified" in shown
    assert "and 10 more" in shown
    assert shown.rstrip().endswith("not verified")


def test_what_lies_in_other_segments_leaves_one_verified() -> None:
    found = Verification(session="s", windows=5, predictions=4, fingerprint="equal")
    found.refer("windows 1 to 40 were before this segment")
    shown = text(verification_text(found))
    assert "1 cannot be told without other segments, no doubt about this one:\n  windows 1 to 40 were" in shown
    assert shown.rstrip().endswith("\nverified")


def test_an_incomplete_recording_is_called_that() -> None:
    info = {"session": "s", "duration_s": 1.0, "complete": False, "streams": {}}
    shown = text(recording_table(info | {"incomplete": "3 windows could not be recorded"}))
    assert "incomplete: 3 windows could not be recorded" in shown


def test_one_of_a_kind_is_not_many_and_what_is_unknown_has_no_unit() -> None:
    stream = {
        "payload": "sweep", "messages": 1, "samples": 1, "rate_hz": None, "lost": 0, "gaps": 0, "max_gap_ms": None,
        "delay_ms": {"p50": 3.0, "max": 3.0},
    }  # fmt: skip
    info = {"session": "s", "duration_s": 1.0, "complete": True, "windows": 1, "predictions": 2}
    shown = text(recording_table(info | {"streams": {"lidar": stream}}))
    assert "1 window, 2 predictions" in shown
    assert [line.split() for line in shown.splitlines() if line.startswith("lidar")] == [
        ["lidar", "sweep", "1", "1", "–", "0", "0", "–", "3.0", "ms", "3.0", "ms"]
    ]
    assert "made again: 1 window and 0 predictions exactly\n" in text(
        verification_text(Verification(session="s", windows=1, fingerprint="equal"))
    )
    summary = Summary()
    summary.add(prediction(index=10, truth="other"))
    summary.add(prediction(index=12))
    shown = text(closing(summary))
    assert "1 prediction cannot be right: its truth (other)" in shown
    assert "1 window has no prediction, for a node had died: 11\n" in shown


def test_sizes_and_numbers_are_read_without_powers_of_ten() -> None:
    assert [size(n) for n in (0, 940, 52_000, 999_000, 4_200_000)] == [
        "0.0 kB",
        "0.9 kB",
        "52.0 kB",
        "999.0 kB",
        "4.2 MB",
    ]
    assert [plain(n) for n in (1e9, 1e6, 33.3333333, 250.0, 0.5, 0.00001, 1e15)] == [
        "1000000000", "1000000", "33.3333", "250", "0.5", "0.00001", "1000000000000000",
    ]  # fmt: skip


def test_bars_have_one_width_and_durations_read_as_time() -> None:
    assert [bar(share).rstrip() for share in (-1.0, 0.0, 0.0125, 0.5, 7.0)] == ["", "", "▎", "█" * 10, "█" * 20]
    assert {len(bar(i / 97)) for i in range(98)} == {20}
    assert duration(61_999_999_999) == "0:01:01"


def on_terminal(renderable: RenderableType, width: int, height: int = 100) -> list[str]:
    """The lines of a screen of this size."""
    screen = Console(file=io.StringIO(), width=width, height=height, color_system=None, force_terminal=True)
    screen.print(renderable)
    assert isinstance(screen.file, io.StringIO)
    return screen.file.getvalue().splitlines()


words = st.text("abc 0123456789.", max_size=12).map(lambda word: word.strip().replace(" ", "_"))


@given(st.integers(1, 8).flatmap(lambda n: st.lists(st.lists(words, min_size=n, max_size=n), min_size=1, max_size=4)),
       st.integers(8, 100))  # fmt: skip
def test_a_sheet_fits_every_screen_and_nothing_of_it_is_lost(rows: list[list[str]], width: int) -> None:
    sheet = numbers(rows[0][0], rows[0][1:])
    for row in rows[1:]:
        sheet.add_row(*row)
    lines = on_terminal(sheet, width)
    assert all(len(line) <= width and line == line.rstrip() for line in lines)
    if width >= 26:  # two of the longest stand beside each other
        assert {word for row in rows for word in row if word} <= {word for line in lines for word in line.split()}


def test_a_sheet_that_is_too_wide_is_continued_below_with_the_names_again() -> None:
    sheet = numbers("stream", ("messages", "max gap", "late"))
    sheet.add_row("camera", "12", "100.0 ms", "3")
    assert on_terminal(sheet, 40) == ["stream  messages   max gap  late", "camera        12  100.0 ms     3"]
    assert on_terminal(sheet, 26) == [
        "stream  messages   max gap", "camera        12  100.0 ms", "", "stream  late", "camera     3",
    ]  # fmt: skip
    assert on_terminal(sheet, 12)[:3] == ["stream  mess", "        ages", "camera    12"]


def test_headings_and_sentences_break_between_words_before_a_sheet_does() -> None:
    sheet = numbers("stream", ("never started",))
    sheet.add_column("why", sentences=True)
    sheet.add_row("camera", "3", "nobody has ever said why it should be so at all")
    assert on_terminal(sheet, 44) == [
        "stream    never  why", "        started", "camera        3  nobody has ever said why it",
        "                 should be so at all",
    ]  # fmt: skip


def test_what_is_no_terminal_gets_whole_lines_without_blanks_at_their_ends() -> None:
    info = {"session": "s", "duration_s": 1.0, "complete": True, "streams": {}}
    file = io.StringIO()
    console(file).print(recording_table(info))
    assert "longest pause  delay  max delay\n" in file.getvalue()
    assert " \n" not in file.getvalue()
    sheet = Sheet()
    sheet.add_column(sentences=True)
    sheet.add_row("word " * 100)
    file = io.StringIO()
    console(file).print(sheet)
    assert file.getvalue() == ("word " * 100).rstrip() + "\n"


@pytest.mark.parametrize("width", [50, 80])
def test_the_bars_become_shorter_where_the_screen_is_narrow(width: int) -> None:
    lines = on_terminal(screen("demo", status(), prediction(total=1.0), Summary()), width)
    row = next(line for line in lines if "+0.25" in line)
    assert len(row) <= width
    bars = row.split("+0.25 ")[1]
    assert set(bars[:-1]) == {"█"}
    assert any("30.0/s" in line for line in lines)


def test_a_screen_that_is_too_low_says_what_it_does_not_show() -> None:
    shown = screen("demo", status(), prediction(wait=1.0, total=3.5), Summary(), "predictions at ipc:///there")
    whole = on_terminal(shown, 80, 40)
    assert "no room" not in "".join(whole)
    tight = on_terminal(shown, 80, len(whole) - 1)
    assert tight == [line for line in whole if line]
    low = on_terminal(shown, 80, 10)
    assert len(low) == 10
    assert low[-1] == "no room for latency, address"
    assert low[0].startswith("demo")
    least = on_terminal(shown, 80, 4)
    assert least[0].split()[0] == "yes"
    assert least[-1] == "no room for 1 line of streams, title, notes, nodes, scores, latency, address"


@pytest.mark.parametrize(
    ("state", "made", "said"),
    [("stopped", True, "recorded: {}\n"), ("failed", True, "recorded, but not whole: {}\n"), ("failed", False, "")],
)
def test_a_recording_is_named_if_there_is_one(tmp_path: Path, state: str, made: bool, said: str) -> None:
    path = tmp_path / "x.mcap"
    path.write_bytes(b"what could be written")
    seen = recorded(RecordReport(path=str(path), messages={"imu": 4}), state=state)
    seen.recordings = seen.recordings if made else []
    shown = text(summed_up(seen))
    assert said.format(path) in shown
    assert ("recorded: " in shown) is (state == "stopped")
    assert (str(path) in shown) is made


def recorded(*lives: RecordReport, state: str = "stopped") -> Status:
    """How a session ends whose recorder has had these lives."""
    seen = status()
    changes = {"node": "record", "state": state, "note": lives[-1].path, "counters": {"messages": 4.0}}
    seen.nodes["record"] = msgspec.structs.replace(seen.nodes["camera"], **changes)
    seen.recordings = list(lives)
    return seen


def summed_up(seen: Status, model: bool = True) -> RenderableType:
    summary = Summary(expected=model)
    print_summary(summary, True, seen)
    return closing(summary)


def test_what_is_recorded_of_a_source_that_hung_was_sent() -> None:
    seen = recorded(RecordReport(path="/there/x.mcap", messages={"camera": 9}))
    seen.streams["camera"].total = 5  # what it had said before it hung
    summary = Summary(expected=False)
    print_summary(summary, True, seen)
    assert summary.streams["camera"] == {"sent": 9, "recorded": 9, "not recorded": 0}


def test_the_summary_says_what_the_recording_lacks_and_why() -> None:
    life = RecordReport(path="/there/x.mcap", messages={"camera": 1737, "imu": 5},
                        lost={"camera": {QUEUE_FULL: 3500, ON_THE_WAY: 53}}, lost_beats=2)  # fmt: skip
    seen = recorded(life)
    shown = text(summed_up(seen))
    assert "recorded, but not whole: /there/x.mcap" in shown
    assert f"it lacks 3553 of 5290 messages of camera: 3500 {QUEUE_FULL}, 53 {ON_THE_WAY}" in " ".join(shown.split())
    assert "it lacks 2 beats" in shown
    assert "messages of imu" not in shown
    summary = Summary()
    print_summary(summary, True, seen)
    assert len(summary.as_dict()["recording"]["lacks"]) == 2
    said = not_whole([life])
    assert said.startswith("the recording is not whole: it lacks 3553 of 5290 messages of camera; ")
    assert "or onto a faster disk" in said
    assert not not_whole([msgspec.structs.replace(life, lost={}, lost_beats=0)])


def test_every_file_of_a_recorder_that_died_is_named_and_the_hole_between_them() -> None:
    first = RecordReport(path="/there/k.mcap", safe_ns=2_300_000_000, messages={"imu": 60}, safe={"imu": 45})
    second = RecordReport(path="/there/k-2.mcap", from_ns=3_100_000_000, messages={"imu": 80})
    seen = recorded(first, second)
    seen.streams["imu"].total = 140
    shown = text(summed_up(seen, model=False))
    assert "recorded, but not whole: /there/k.mcap, then /there/k-2.mcap" in shown
    assert "the recorder died, and nothing is recorded from 2.3 s to 3.1 s of the session, " in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert rows["imu"] == ["140", "125", "15"]  # of the file that was not ended, what had reached the disk
    assert "for that it lacks these messages: 15 of imu\n" in shown
    never_again = recorded(first, state="restarting")
    assert "nothing is recorded from 2.3 s of the session on" in text(summed_up(never_again))


def test_the_summary_says_why_messages_were_rejected_and_counts_what_no_model_takes() -> None:
    seen = status()
    seen.streams["camera"].received, seen.streams["camera"].rejected = 7, {"malformed": 5, "epoch": 2}
    seen.streams["imu"].total = 12
    shown = text(summed_up(seen))
    assert "camera: rejected 2 of an epoch that was over, 5 of another kind than what is taken, or that" in shown
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert rows["imu"] == ["12", *"–––––––––"]


def test_the_summary_names_nodes_behind_the_sources_that_died() -> None:
    seen = status()
    for name in ("align", "fusion"):
        dead = {"node": name, "restarts": 1, "trouble": "was killed by SIGKILL"}
        seen.nodes[name] = msgspec.structs.replace(seen.nodes["camera"], **dead)
    shown = " ".join(text(summed_up(seen)).split())
    assert "warning: fusion died 1 time: was killed by SIGKILL warning" in shown or shown.endswith("by SIGKILL")
    assert "align died 1 time: was killed by SIGKILL; messages are counted from its last start on, and all" in shown


def test_without_a_model_the_summary_counts_what_every_stream_gave() -> None:
    seen = status()
    seen.streams["camera"].total = 12
    shown = text(summed_up(seen, model=False))
    rows = {line.split()[0]: line.split()[1:] for line in shown.splitlines() if line}
    assert (rows["camera"], rows["imu"]) == (["12"], ["0"])
    assert "warning: imu gave no message: waiting for /dev/i2c-1" in shown
    assert "warning: the source imu died 2 times and had not come back" in shown
    assert "camera gave no" not in shown
    seen.streams["camera"].failures, seen.streams["camera"].note = 3, "no device /dev/video0"
    assert "warning: camera gave nothing more at the end: no device /dev/video0\n" in text(summed_up(seen))
    assert "without a value" not in shown
    seen.streams["camera"].published, seen.streams["camera"].unmeasured = 12, 11
    assert "without a value" not in text(summed_up(seen))  # it began so, as what is not there yet may
    seen.streams["camera"].unmeasured_ns = UNMEASURED_NS
    shown = text(summed_up(seen))
    assert "warning: camera gave at least 11 of 12 messages without a value: all are NaN\n" in shown
    seen.streams["camera"].unmeasured_as = "infinities"
    assert "11 of 12 messages without a value: all are infinities\n" in text(summed_up(seen))
    seen.streams["imu"].note, seen.nodes["imu"].restarts, seen.nodes["imu"].trouble = "", 0, "no packet came"
    assert "warning: imu gave no message: no packet came\n" in text(summed_up(seen))  # what it said before the end
    ill = {"state": "failed", "trouble": "it has no driver", "warnings": ["a stranger knocked."]}
    seen.nodes["imu"] = msgspec.structs.replace(seen.nodes["imu"], **ill)
    shown = text(summed_up(seen))
    assert "warning: the source imu died, and was given up: it has no driver\n" in shown
    assert "warning: imu: a stranger knocked.\n" in shown


def test_the_summary_has_what_sources_dropped_themselves() -> None:
    seen = status()
    seen.streams["camera"].total_dropped = {"stale": 82_401}
    shown = text(summed_up(seen))
    assert "dropped by sources\ncamera: stale 82401\n" in shown
    summary = Summary()
    print_summary(summary, True, seen)
    assert summary.as_dict()["source_drops"] == {"camera": {"stale": 82_401}}


def test_without_a_model_the_table_waits_for_no_prediction() -> None:
    shown = text(screen("demo", status(), None, Summary(expected=False), "no model, no predictions"))
    assert "no model, no predictions" in shown
    assert "no prediction yet" not in shown


def test_another_file_of_that_name_is_said_at_the_end_too() -> None:
    life = RecordReport(path="/there/x-2.mcap", asked="/there/x.mcap", messages={"imu": 4})
    assert "recorded: /there/x-2.mcap (/there/x.mcap was there already, and stays as it is)" in text(
        summed_up(recorded(life))
    )


def test_the_last_screen_keeps_the_rates_that_there_were(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Status] = []
    monkeypatch.setattr(Lines, "refresh", lambda self, status: shown.append(status))
    now = status()
    session = shown_session(now)
    with Show(session, json=True) as show:
        show.tick(session)
        now.nodes["camera"] = msgspec.structs.replace(now.nodes["camera"], state="stopped")
        now.streams["camera"].rate_hz = 3.0
        show.tick(session)
    assert [seen.streams["camera"].rate_hz for seen in shown] == [29.97, 3.0, 29.97]
    assert "30.0/s" in text(screen("demo", shown[-1], None, Summary()))


def shown_session(now: Status | None = None, clock: Clock | None = None) -> SimpleNamespace:
    now = now or status()
    return SimpleNamespace(
        rig=SimpleNamespace(bundle=None, name="demo"), id="s", predictions="", clock=clock or SystemClock(),
        status=lambda: deepcopy(now),
    )  # fmt: skip


def test_a_terminal_that_takes_nothing_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, told = threading.Event(), list[Event]()

    def take(self: Lines, event: Event) -> None:
        taken.wait(10)
        told.append(event)

    monkeypatch.setattr(Lines, "event", take)
    happened = [Event(t_ns=n, node="imu", kind="died", text=str(n)) for n in range(3)]
    with Show(shown_session(), json=True) as show:
        for event in happened:
            show.event(event)
        assert told == []
        taken.set()
    assert told == happened


def test_who_reads_and_takes_nothing_is_waited_for_at_the_end_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped, happened = threading.Event(), Event(t_ns=1, node="imu", kind="died", text="it died")

    def take(self: Lines, event: Event) -> None:
        stopped.wait()

    monkeypatch.setattr(Lines, "event", take)
    clock, session = ManualClock(), shown_session()
    with Show(session, json=True) as show:
        show.event(happened)
        for _ in range(100):
            show.tick(session)
        session.clock = clock
    assert clock.now_ns() == 2 * GRACE_NS  # once for who reads, and once for who was freed and does not come to an end
    assert show._jobs.qsize() < 10
    stopped.set()
    show._teller.join()


def test_who_takes_something_is_waited_for_as_long_as_he_does(monkeypatch: pytest.MonkeyPatch) -> None:
    more, told = threading.Semaphore(0), list[Event]()

    class Slow(ManualClock):
        def wait_until(self, t_ns: int, stop: threading.Event | None = None) -> bool:
            before = show._shown
            more.release()
            while show._shown == before and stop is not None and not stop.is_set():
                pass  # until it is taken
            return super().wait_until(t_ns, stop)

    def take(self: Lines, event: Event) -> None:
        more.acquire()
        told.append(event)

    monkeypatch.setattr(Lines, "event", take)
    happened, session = [Event(t_ns=n, node="imu", kind="died", text=str(n)) for n in range(5)], shown_session()
    with Show(session, json=True) as show:
        for event in happened:
            show.event(event)
        session.clock = Slow()
    assert told == happened


def never_taken(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, list[list[int]]]:
    """Lets no event be shown until the event that is returned is set, which throwing away does; and what is thrown
    away."""
    free, thrown = threading.Event(), list[list[int]]()

    def discard(numbers: list[int], threads: tuple[threading.Thread, ...]) -> None:
        thrown.append(numbers)
        free.set()
        threads[1].join()

    monkeypatch.setattr(Lines, "event", lambda self, event: free.wait())
    monkeypatch.setattr("pipeline.show.discard_untaken", discard)
    return free, thrown


def test_who_reads_a_line_slowly_takes_something(monkeypatch: pytest.MonkeyPatch) -> None:
    _, thrown = never_taken(monkeypatch)
    left = iter([9000, *(size for size in range(8000, 0, -1000) for _ in range(2))])
    monkeypatch.setattr("pipeline.show.unread", lambda: [next(left, 0), 0])
    monkeypatch.setattr("pipeline.show.untaken", lambda: [1])
    clock, session = ManualClock(), shown_session()
    with Show(session, json=True) as show:
        show.event(Event(t_ns=1, node="imu", kind="died", text="it died"))
        session.clock = clock
    assert thrown == [[1]]
    assert clock.now_ns() == 10 * GRACE_NS  # while it became less, and once more


def test_one_who_takes_nothing_later_holds_up_nobody_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever took something at the moment of the look is not given up, and looked at again."""
    _, thrown = never_taken(monkeypatch)
    looks = iter([[], [2]])
    monkeypatch.setattr("pipeline.show.unread", lambda: [0, 0])
    monkeypatch.setattr("pipeline.show.untaken", lambda: next(looks))
    clock, session = ManualClock(), shown_session()
    with Show(session, json=True) as show:
        show.event(Event(t_ns=1, node="imu", kind="died", text="it died"))
        session.clock = clock
    assert thrown == [[2]]
    assert not show._teller.is_alive()


def test_ctrl_c_cuts_short_the_waiting_for_who_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Hurried(ManualClock):
        def wait_until(self, t_ns: int, stop: threading.Event | None = None) -> bool:
            raise KeyboardInterrupt

    _, thrown = never_taken(monkeypatch)
    monkeypatch.setattr("pipeline.show.untaken", lambda: [1])
    clock, session = Hurried(), shown_session()
    with Show(session, json=True) as show:
        show.event(Event(t_ns=1, node="imu", kind="died", text="it died"))
        session.clock = clock
    assert (thrown, show.hurried, clock.now_ns()) == ([[1]], True, 0)


def test_what_a_stopped_reader_does_not_take_is_thrown_away_and_who_waits_is_freed(tmp_path: Path) -> None:
    """In a process of its own, whose standard output is a pipe that is full."""
    ours, theirs = os.pipe()
    with subprocess.Popen([sys.executable, "-c", FULL], stdout=theirs, stderr=subprocess.PIPE, cwd=ROOT) as process:
        os.close(theirs)
        assert process.stderr is not None
        assert process.stderr.read() == b"[1]\nfreed\n"
        assert process.wait() == 0
    os.close(ours)


FULL = """
import os, select, sys, threading
from pipeline.outside import discard_untaken, untaken
writing = threading.Thread(target=lambda: [os.write(1, bytes(100_000)) for _ in range(10)], daemon=True)
assert untaken() == []
writing.start()
while not untaken():
    pass
print(untaken(), file=sys.stderr)
discard_untaken(untaken(), [writing])
writing.join()
print("freed", file=sys.stderr)
"""


def test_how_much_a_reader_has_not_read_is_known_of_a_pipe_and_of_a_terminal() -> None:
    process = subprocess.run([sys.executable, "-c", UNREAD], stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert process.stderr == b"10 6 ok -1\n"


UNREAD = """
import os, pty, sys
from pipeline.outside import unread
say, (ours, theirs) = os.fdopen(os.dup(2), "w"), os.pipe()
os.dup2(theirs, 1)
os.write(1, bytes(10))
before = unread()[0]
os.read(ours, 4)
after = unread()[0]
os.dup2(pty.openpty()[1], 1)
os.close(2)
print(before, after, "ok" if unread()[0] >= 0 else "", unread()[1], file=say)
"""


def test_a_terminal_that_ctrl_s_has_stopped_is_started_again_at_the_end() -> None:
    """In a process of its own, whose terminal it is: else the summary is lost, and the cursor stays hidden."""
    process = subprocess.run(
        [sys.executable, "-c", STOPPED], stderr=subprocess.PIPE, cwd=ROOT, check=False, start_new_session=True
    )
    assert process.stderr == b"[1] True []\n[2]\n"


STOPPED = """
import os, pty, sys
from pipeline.outside import started_again, untaken
(ours, theirs), (pipe, full) = pty.openpty(), os.pipe()
os.close(os.open(os.ttyname(theirs), os.O_RDWR))  # now it is this process's
os.dup2(theirs, 1)
os.write(ours, b"\\x13")
while not untaken():
    pass
print(untaken(), started_again(untaken()), untaken(), file=sys.stderr, flush=True)
say = os.dup(2)
os.dup2(full, 2)
os.set_blocking(2, False)
try:
    while os.write(2, bytes(4096)):
        pass
except BlockingIOError:
    pass
assert not started_again(untaken())
os.write(say, f"{untaken()}\\n".encode())
"""


def test_a_stopped_terminal_that_is_started_again_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    free, thrown = never_taken(monkeypatch)

    def start(numbers: list[int]) -> bool:
        free.set()
        show._teller.join()
        return True

    monkeypatch.setattr("pipeline.show.started_again", start)
    monkeypatch.setattr("pipeline.show.untaken", lambda: [] if free.is_set() else [1, 2])
    clock, session = ManualClock(), shown_session()
    with Show(session, json=True) as show:
        show.event(Event(t_ns=1, node="imu", kind="died", text="it died"))
        session.clock = clock
    assert (thrown, show.left_out, clock.now_ns()) == ([], 0, GRACE_NS)
    assert not show._teller.is_alive()


def test_a_terminal_that_is_gone_is_told_to_who_shows_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Lines, event: Event) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(Lines, "event", refuse)
    happened = Event(t_ns=1, node="imu", kind="died", text="it died")
    with pytest.raises(BrokenPipeError), Show(shown_session(), json=True) as show:
        show.event(happened)
    with pytest.raises(BrokenPipeError):
        show.event(happened)


def test_where_predictions_find_no_reader_it_is_told_what_happens_to_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    told = list[Event]()

    def refuse(endpoint: str) -> None:
        raise BrokenPipeError

    def happens(show: Show) -> None:
        show._reader.join()
        show.event(happened)

    monkeypatch.setattr("pipeline.show.Subscription", refuse)
    monkeypatch.setattr(Lines, "event", lambda self, event: told.append(event))
    happened, session = Event(t_ns=1, node="imu", kind="hung", text="does not stop, and is killed"), shown_session()
    session.rig.bundle, session.dir = "a model", Path("/nowhere")
    with pytest.raises(BrokenPipeError), Show(session, json=True) as show:
        happens(show)
    assert told == [happened]


@pytest.mark.parametrize("width", [60, 80, 90])
def test_progress_bars_leave_room_for_what_somebody_types(width: int) -> None:
    """A terminal echoes ^C behind the last line; a full one would go on in another, and the bars be drawn too low."""
    written = io.StringIO()
    with Bars(Console(file=written, width=width, color_system=None, force_terminal=True)) as bars:
        bars.begin("preparing sessions", 2)
        bars.advance(2)
        bars.begin("training", 100)
    shown = [line for line in re.split(r"[\r\n]|\x1b\[[0-9;?]*[A-Za-z]", written.getvalue()) if line]
    assert [line.split(" ")[0] for line in shown[-2:]] == ["preparing", "training"]
    assert max(map(cell_len, shown)) <= width - len("^C")


def test_what_came_of_a_training_fits_80_columns() -> None:
    rows = [{"phase": "teacher 10", "epoch": i, "loss": 10.0 + i, "held_out_accuracy": i / 50} for i in range(50)]
    assert [len(line.split()) for line in on_terminal(curves(rows), 80)] == [3, 6, 8]  # one table, whole lines
    scored = SimpleNamespace(streams=("imu", "microphone"), windows=1234, accuracy=1.0, macro_f1=1.0,
                             calibration_error=0.1, answered=1.0, right=1.0)  # fmt: skip
    lines = on_terminal(score_table([scored]), 80)
    assert len(lines) == 3  # headings in two
    assert lines[-1].split() == ["imu", "+", "microphone", "1234", "100.0%", "1.000", "10.0%", "100.0%", "100.0%"]
