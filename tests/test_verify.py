"""A live session proves itself: recorded through real processes, made again, and one changed byte is found."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline import cli
from pipeline.align import Manifest, StreamManifest
from pipeline.bundle import load_bundle
from pipeline.errors import ConfigError, RecordingError
from pipeline.explain import Session, explain
from pipeline.explain_window import explain_window
from pipeline.messages import Header, Message, TextLayout
from pipeline.prediction import Prediction
from pipeline.recording import GAP_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC, RecordingReader, RecordingWriter
from pipeline.recording.damage import damage
from pipeline.recording.salvage import lost_text, recover
from pipeline.recording.writer import Deleted, RingPart
from pipeline.steps import Gap
from pipeline.verify import _Held, verify
from tests.mcap_places import places
from tests.rigs import STREAMS
from tests.test_launch import all_ok, running
from tests.test_replay import record, session
from tests.tiny_bundle import mean_encoder, write_bundle

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc")
MIDDLE = 12
"""Predictions after the kill is over."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a session of four streams and its model: ``session.mcap`` and ``model``."""
    folder = tmp_path_factory.mktemp("whole")
    with running(folder, record={"path": str(folder / "session.mcap")}) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        for _ in range(MIDDLE):
            watched.next_prediction()
    return folder


@pytest.mark.slow
def test_a_live_session_is_made_again_to_the_last_byte(whole: Path) -> None:
    found = verify(whole / "session.mcap", load_bundle(whole / "model"))
    assert found.holds, (found.first_difference, found.unverifiable)
    assert found.fingerprint == "equal"
    assert found.windows == found.predictions >= MIDDLE
    told = explain(Session(whole / "session.mcap"))
    assert all(stream.balanced for stream in told.streams.values()), told
    assert sum(stream.waited for stream in told.streams.values()) >= found.windows
    assert set(told.latency_ms) == {"wait", "align", "transport", "encode", "fuse", "total"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["microphone", "align"])
def test_a_session_with_a_killed_node(tmp_path: Path, victim: str) -> None:
    out = tmp_path / "session.mcap"
    with running(tmp_path, record={"path": str(out)}) as watched:
        watched.predict_until(all_ok, "all four streams are ok")
        os.kill(watched.pid(victim), signal.SIGKILL)
        if victim == "microphone":
            watched.predict_until(lambda p: p.streams[victim].reason == "dead", "its death is known")
        else:
            last = watched.predictions[-1].window.index
            watched.predict_until(lambda p: p.window.index > last + len(watched.predictions), "windows go on")
        watched.predict_until(all_ok, "it is back")
        for _ in range(MIDDLE):
            watched.next_prediction()
    found = verify(out, load_bundle(tmp_path / "model"))
    assert found.first_difference is None
    if victim == "microphone":  # a sensor that is away is a verdict, not a doubt
        assert found.holds, found.unverifiable
        recorded = Session(out)
        told = explain(recorded)
        assert all(stream.balanced for stream in told.streams.values()), told
        dead = next(m.step for m in recorded.manifests if m.streams[victim].reason == "dead")
        assert explain_window(recorded, dead).streams[victim].why.startswith("its node was dead; its last message ends")
    else:  # nobody can know the windows that were never made
        assert not found.holds
        assert found.unverifiable_count == 1
        assert "are not in the recording" in found.unverifiable[0]
    assert found.windows >= MIDDLE


# -- one byte ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verified(whole: Path) -> Callable[[bytes], tuple[int, dict[str, Any]]]:
    """Verifies bytes on the command line; the exit code and what it prints."""

    def check(data: bytes) -> tuple[int, dict[str, Any]]:
        file = whole / "changed.mcap"
        file.write_bytes(data)
        arguments = ["replay", str(file), "--verify", "--json", "--bundle", str(whole / "model")]
        result = CliRunner().invoke(cli.app, arguments)
        return result.exit_code, json.loads(result.stdout)

    return check


@pytest.mark.slow
@pytest.mark.parametrize("where", ["first chunk", "a chunk", "last chunk", "metadata", "attachment", "schema", "index",
                                   "footer", "end of data"])  # fmt: skip
def test_one_changed_byte_is_found_and_named(whole: Path, verified: Callable[..., Any], where: str) -> None:
    data = bytearray((whole / "session.mcap").read_bytes())
    if where == "first chunk":
        assert verified(bytes(data))[0] == 0  # as it is, everything holds
    kinds = {"metadata": 0x0C, "attachment": 0x09, "schema": 0x03, "index": 0x08, "footer": 0x02, "end of data": 0x0F}
    spans = [(first, end) for opcode, first, end in places(data) if opcode == kinds.get(where, 0x06)]
    first, end = spans[{"first chunk": 0, "last chunk": -1}.get(where, len(spans) // 2)]
    data[(first + 9 + end) // 2] ^= 1
    code, found = verified(bytes(data))
    assert code == 3
    assert not found["holds"]
    difference = found["first_difference"]
    if "chunk" in where:
        assert f"damaged in the chunk at byte {first}" in difference["recomputed"]
    else:
        assert "does not match its sum" in difference["recomputed"]


def test_a_changed_bit_of_the_last_is_damage_and_a_missing_one_is_not(whole: Path) -> None:
    data = bytearray((whole / "session.mcap").read_bytes())
    changed = whole / "last.mcap"
    for cut in range(8):
        changed.write_bytes(data[: len(data) - cut])
        assert damage(changed) is None
    for at in range(len(data) - 8, len(data)):
        changed.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        assert "where its footer ends" in (damage(changed) or "")
        with pytest.raises(RecordingError, match="where its footer ends"):
            verify(changed, load_bundle(whole / "model"))


@pytest.mark.slow
@settings(max_examples=12)
@given(data=st.data())
def test_any_changed_bit_is_found(whole: Path, data: st.DataObject) -> None:
    """Beyond the first bytes, which say that it is a recording at all."""
    recorded = bytearray((whole / "session.mcap").read_bytes())
    at = data.draw(st.one_of(st.integers(8, len(recorded) - 1), st.integers(len(recorded) - 8000, len(recorded) - 1)))
    recorded[at] ^= 1 << data.draw(st.integers(0, 7))
    changed = whole / "bit.mcap"
    changed.write_bytes(recorded)
    try:
        assert not verify(changed, load_bundle(whole / "model")).holds
    except RecordingError:
        assert damage(changed) is not None


@pytest.mark.slow
def test_what_is_recovered_of_a_damaged_session_is_verified_again(whole: Path) -> None:
    data = bytearray((whole / "session.mcap").read_bytes())
    spans = [(first, end) for opcode, first, end in places(data) if opcode == 0x06]
    first, end = spans[len(spans) // 2]
    data[(first + 9 + end) // 2] ^= 1
    hurt, out = whole / "hurt.mcap", whole / "recovered.mcap"
    hurt.write_bytes(data)
    out.unlink(missing_ok=True)
    refused = CliRunner().invoke(cli.app, ["replay", str(hurt), "--bundle", str(whole / "model")])
    assert isinstance(refused.exception, RecordingError)
    assert f"damaged in the chunk at byte {first}" in str(refused.exception)
    assert f"sensorium recover {hurt} -o" in str(refused.exception)
    made = recover(hurt, out)
    assert made.damage.counted
    assert CliRunner().invoke(cli.app, ["replay", str(out), "--bundle", str(whole / "model")]).exit_code == 0
    found = verify(out, load_bundle(whole / "model"))
    assert not found.differences, found.first_difference
    assert not found.holds
    assert found.windows > len(steps(whole)) // 2
    assert any(f"what is lost: {lost_text(made.damage)}" in text for text in found.unverifiable)
    shown = CliRunner().invoke(cli.app, ["explain", str(hurt)])
    assert shown.exit_code == 3
    assert f"damaged at bytes {first} to" in shown.stdout
    with RecordingReader(out) as reader:
        there = {msgspec.json.decode(data, type=Manifest).step for data, _, _ in reader.json(MANIFEST_TOPIC)}
    for step in (min(there), max(there)):
        assert CliRunner().invoke(cli.app, ["explain", str(hurt), "--window", str(step)]).exit_code == 3
    for step in {manifest.step for manifest in steps(whole)} - there:
        with pytest.raises(ConfigError, match=rf"no window {step}; .*but not those from .*damaged at bytes {first} to"):
            explain_window(Session(out), step)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_a_missing_tail_of_predictions_is_doubted(whole: Path, kept: float) -> None:
    windows = steps(whole)
    left = int(kept * len(windows))
    found = verify(rewritten(whole, prediction=lambda step: step <= left), load_bundle(whole / "model"))
    assert (found.windows, found.predictions) == (len(windows), left)
    assert found.unverifiable_count == len(windows) - left
    assert f"window {left + 1} has no recorded prediction" in found.unverifiable


# -- what is not there -------------------------------------------------------------------------------------------------


def everything(_: Any) -> bool:
    return True


def steps(whole: Path) -> list[Manifest]:
    """What the session's windows were made of, the first of them first."""
    with RecordingReader(whole / "session.mcap") as reader:
        return [msgspec.json.decode(data, type=Manifest) for data, _, _ in reader.json(MANIFEST_TOPIC)]


def rewritten(
    whole: Path,
    *,
    message: Callable[[Header], bool] = everything,
    window: Callable[[int], bool] = everything,
    prediction: Callable[[int], bool] = everything,
    log: Callable[[int], bool] = everything,
    gaps: tuple[Gap, ...] = (),
    **info: Any,
) -> Path:
    """The session with only what is asked for."""
    out = whole / "rewritten.mcap"
    with RecordingReader(whole / "session.mcap") as reader:
        session = msgspec.structs.replace(reader.info, **info)
        with RecordingWriter(out, session, overwrite=True) as writer:
            for one, at in reader.messages(beats=True):
                if log(at) and message(one.header):
                    writer.write(one, at)
            for data, log_ns, publish_ns in reader.json(MANIFEST_TOPIC):
                if log(log_ns) and window(msgspec.json.decode(data, type=Manifest).step):
                    writer.write_json(MANIFEST_TOPIC, data, log_ns, publish_ns)
            for data, log_ns, publish_ns in reader.json(PREDICTION_TOPIC):
                if log(log_ns) and prediction(msgspec.json.decode(data, type=Prediction).window.index):
                    writer.write_json(PREDICTION_TOPIC, data, log_ns, publish_ns)
            for gap in gaps:
                writer.write_json(GAP_TOPIC, msgspec.json.encode(gap), reader.end_ns)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("stream", STREAMS)
def test_what_may_need_a_message_that_the_recorder_lost_is_doubted_and_nothing_else(whole: Path, stream: str) -> None:
    """The message is listed by one window; those behind it may need it, too."""
    windows = steps(whole)
    at = next(m for m in windows[len(windows) // 2 :] if m.streams[stream].received)
    epoch, _, last = at.streams[stream].received[-1]
    lost = (stream, epoch, last)
    found = verify(
        rewritten(whole, message=lambda h: h.is_beat or (h.stream, h.epoch, h.seq) != lost),
        load_bundle(whole / "model"),
    )
    assert found.first_difference is None
    used = [m.step for m in windows if any(e == epoch and a <= last <= b for e, a, b in m.streams[stream].used)]
    doubted = [int(text.split(":")[0].split()[1]) for text in found.unverifiable if text.startswith("window")]
    assert set(used) <= set(doubted) <= set(range(at.step, at.step + 5))
    assert all(f"{stream} {epoch}/{last} is not in the recording" in t for t in found.unverifiable if t[0] == "w")
    assert found.windows == len(windows) - len(doubted)


@pytest.mark.slow
def test_windows_that_the_recorder_lost_make_none_after_them_different(whole: Path) -> None:
    """The aligner went on meanwhile, with messages that no window in the file lists; so did the fusion node."""
    middle = len(steps(whole)) // 2
    gone = range(middle, middle + 2)
    for predictions in (everything, lambda step: step not in gone):
        path = rewritten(whole, window=lambda step: step not in gone, prediction=predictions)
        found = verify(path, load_bundle(whole / "model"))
        assert found.first_difference is None
        assert not found.holds
        assert f"windows {middle} to {middle + 1} are not in the recording" in found.unverifiable
        assert found.windows >= len(steps(whole)) - 2 - 5
        if predictions is everything:
            assert f"prediction {middle} has no recorded window" in found.unverifiable


@pytest.mark.slow
def test_the_death_of_an_aligner_is_one_doubt_whoever_had_its_last_window(whole: Path) -> None:
    last, back, why = len(steps(whole)) // 2, len(steps(whole)) // 2 + 3, "the align node was restarted"
    bundle = load_bundle(whole / "model")

    def doubts(window: Callable[[int], bool], prediction: Callable[[int], bool], *gaps: Gap) -> list[str]:
        found = verify(rewritten(whole, window=window, prediction=prediction, gaps=gaps), bundle)
        assert found.first_difference is None
        assert not found.holds
        # Here the aligner lived on, so that later windows may hold messages which no window in the file lists.
        return [text for text in found.unverifiable if "had received is not" not in text and "looks back" not in text]

    recorder_had_it = Gap(last + 1, back - 1, why), Gap(last, last, why, "prediction")
    said = f"windows {last + 1} to {back - 1} are not in the recording, nor the prediction of window {last}"
    assert doubts(lambda k: k <= last or k >= back, lambda k: k < last or k >= back, *recorder_had_it) == [said]
    many = Gap(last + 1, back - 1, why), Gap(last - 1, last, why, "prediction")
    said = f"windows {last + 1} to {back - 1} are not in the recording, nor the predictions of windows"
    [doubt] = doubts(lambda k: k <= last or k >= back, lambda k: k < last - 1 or k >= back, *many)
    assert doubt == f"{said} {last - 1} to {last}"
    # A window more is missing than the recording says, so that nobody says what went with it.
    assert set(doubts(lambda k: k < last or k >= back, lambda k: k < last - 1 or k >= back, *many)) == {
        f"windows {last} to {back - 1} are not in the recording",
        f"window {last - 1} has no recorded prediction",
    }
    fusion_had_it = Gap(last, back - 1, why)
    said = f"windows {last} to {back - 1} are not in the recording"
    assert doubts(lambda k: k < last or k >= back, lambda k: k <= last or k >= back, fusion_had_it) == [said]
    # Nothing that the recording says of itself makes it hold.
    said = f"window {last} has no recorded prediction"
    assert doubts(lambda k: k <= last, lambda k: k < last, *recorder_had_it) == [said]
    assert said in doubts(everything, lambda k: k != last, *recorder_had_it)


@pytest.mark.slow
def test_predictions_that_the_recorder_lost_make_none_after_them_different(whole: Path) -> None:
    middle = len(steps(whole)) // 2
    found = verify(rewritten(whole, prediction=lambda step: step != middle), load_bundle(whole / "model"))
    assert found.first_difference is None
    assert found.windows == len(steps(whole))
    assert f"window {middle} has no recorded prediction" in found.unverifiable


@pytest.mark.slow
def test_a_segment_is_verified_as_far_as_it_goes(whole: Path) -> None:
    """Cut where a ring might cut: what lies in the other part is named, and no doubt about this one."""
    windows = steps(whole)
    cut_ns = windows[len(windows) // 2].end_ns - 30_000_000
    with RecordingReader(whole / "session.mcap") as reader:
        since: dict[str, Any] = {
            h.stream: (h.epoch, h.seq + (not h.is_beat)) for h, at in reader.headers(beats=True) if at < cut_ns
        }
        session_ns = reader.end_ns
    bundle = load_bundle(whole / "model")
    part = RingPart(segment=1, oldest=1, deleted=Deleted())
    first = verify(rewritten(whole, log=lambda at: at < cut_ns, ring=part), bundle)
    assert first.holds, (first.first_difference, first.unverifiable)
    second_file = rewritten(
        whole, log=lambda at: at >= cut_ns, since=since, ring=msgspec.structs.replace(part, segment=2)
    )
    second = verify(second_file, bundle)
    assert second.holds, (second.first_difference, second.unverifiable)
    assert f"windows 1 to {first_window(second_file) - 1} were before this segment" in second.elsewhere
    assert min(first.windows, second.windows, first.predictions) > 2
    assert len(windows) - 6 <= first.windows + second.windows <= len(windows)
    assert cut_ns < session_ns
    # Nothing of it excuses what a segment itself lacks: neither a window nor a message in its middle.
    late = len(windows) - 3
    for lacking in (
        {"window": lambda step: step != late},
        {"message": lambda h: h.is_beat or h.seq != since[h.stream][1] + 5},
    ):
        path = rewritten(whole, log=lambda at: at >= cut_ns, since=since, ring=part, **lacking)
        assert not verify(path, bundle).holds


def first_window(path: Path) -> int:
    with RecordingReader(path) as reader:
        return msgspec.json.decode(next(reader.json(MANIFEST_TOPIC))[0], type=Manifest).step


@pytest.mark.slow
def test_bytes_behind_the_end_are_found(whole: Path, verified: Callable[..., Any]) -> None:
    data = (whole / "session.mcap").read_bytes()
    for junk in (b"x", bytes(400), data[-400:]):
        code, found = verified(data + junk)
        assert code == 3
        assert not found["holds"]
        text = found["first_difference"]["recomputed"]
        assert text.startswith(
            f"{len(junk)} bytes follow its end, from byte {len(data)} on" if len(junk) > 1 else "1 byte"
        )


@pytest.mark.slow
def test_another_model_proves_nothing_and_is_named_first(whole: Path) -> None:
    other = whole / "other"
    write_bundle(other, STREAMS, encoders={"microphone": mean_encoder({"payload": "signal"})})
    (other / "model.yaml").write_text((other / "model.yaml").read_text() + "# another\n")
    with RecordingReader(whole / "session.mcap") as reader:
        ran = str(reader.info.bundle)
    with pytest.raises(
        ConfigError, match=rf"was recorded with the model .*{ran[:12]}.* is another: nothing can be proven"
    ):
        verify(whole / "session.mcap", load_bundle(other))


def test_messages_that_are_not_in_the_file_cost_no_others(tmp_path: Path) -> None:
    """A stream that was not recorded, and one whose rest is missing: neither makes the whole file be held."""
    count = 9000
    calls = [(0, text("lidar", 0, 0)), *((seq * 2_000_000, text("imu", seq, seq * 2_000_000)) for seq in range(count))]
    path = record(tmp_path / "a.mcap", calls)
    streams = {"camera", "imu", "lidar"}
    with RecordingReader(path) as reader:
        held, most = _Held(reader, streams), 0
        for step in range(1, count // 50 + 1):
            first = (step - 1) * 50
            received = {name: StreamManifest("ok", received=((0, first, first + 49),)) for name in streams}
            end_ns = step * 100_000_000
            manifest = Manifest(step=step, start_ns=end_ns - 100_000_000, end_ns=end_ns, cause="proven",
                                emitted_ns=end_ns, digest="", streams=received)  # fmt: skip
            found, lost = held.received(manifest, end_ns)
            assert [m.header.seq for m in found["imu"]] == list(range(first, first + 50))
            assert lost["camera"] == (f"camera 0/{first}", False)
            assert "imu" not in lost
            most = max(most, len(held._messages["imu"]))
    assert most <= 2600  # five seconds


def text(stream: str, seq: int, t_ns: int) -> Message:
    return Message(
        Header(stream=stream, seq=seq, epoch=0, t_capture_ns=t_ns, t_end_ns=t_ns, bound_ns=t_ns + 1,
               t_receipt_ns=t_ns, layout=TextLayout(4)), b"word",
    )  # fmt: skip


def test_a_recording_without_windows_is_one_clear_error(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", session(1))
    write_bundle(tmp_path / "model", STREAMS, encoders={"microphone": mean_encoder({"payload": "signal"})})
    with pytest.raises(RecordingError, match=r"holds no windows of a live session.*sensorium record RIG"):
        verify(path, load_bundle(tmp_path / "model"))
    assert damage(path) is None
    for more in ([], ["--bundle", str(tmp_path / "model")]):
        result = CliRunner().invoke(cli.app, ["replay", str(path), "--verify", *more])
        assert isinstance(result.exception, RecordingError)
        assert "recorded without a model, and without a model there are none" in str(result.exception)
        assert "every one of them is as it was written" in str(result.exception)


def test_sums_are_those_of_the_file(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", session(1))
    assert damage(path) is None
    data = path.read_bytes()
    for at in (8, len(data) // 3, len(data) - 10):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        assert damage(path) is not None
    path.write_bytes(data[: len(data) // 2])
    assert damage(path) is None  # its end is missing, which its reader says
    path.write_bytes(b"")
    assert damage(path) is None
