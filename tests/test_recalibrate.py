"""Better times for an old recording: what is right stays right, what was wrong gets better, the original stays."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline import cli
from pipeline.align import AlignSpec, Resample, StreamSpec
from pipeline.calibrate_rig import recorded_offsets
from pipeline.errors import ConfigError, RecordingError
from pipeline.explain import Session, explain
from pipeline.messages import IMU_DTYPE, AudioLayout, FrameLayout, Header, ImuLayout, Message
from pipeline.recalibrate import FROM, Shift, asked_shifts, moved_ns, recalibrate
from pipeline.recording import (
    GAP_TOPIC,
    MANIFEST_TOPIC,
    PREDICTION_TOPIC,
    Label,
    RecordingReader,
    RecordingWriter,
    SessionInfo,
    lacks,
)
from pipeline.recording.summary import about
from pipeline.timebase import Timebase
from pipeline.verify import check_windows

MS, S = 1_000_000, 1_000_000_000


def frames(
    seconds: float, seed: int = 0, drift_ppm: float = 60.0, exposure_ns: int = 4 * MS
) -> tuple[list[Message], list[int]]:
    """A camera of 25 Hz with a clock of its own, mapped as it would be live, and the true moments. Its driver is slow
    at first, so that the live time base begins badly."""
    g, base = np.random.default_rng(seed), Timebase()
    messages, true, epoch, receipt = [], [], 5, 0
    for seq in range(round(25 * seconds)):
        t = S + seq * 40 * MS
        device = 777 * S + round(t * (1 - drift_ppm * 1e-6))
        receipt = max(receipt, t) + int(g.exponential(6 * MS)) + (int(g.exponential(8 * MS)) if seq < 100 else 0)
        mapped = base.update(device, receipt)
        epoch = t if mapped.new_epoch else epoch
        capture = mapped.t_capture_ns - exposure_ns
        messages.append(
            Message(
                Header(stream="camera", seq=seq, epoch=epoch, t_capture_ns=capture, t_end_ns=capture,
                       bound_ns=capture + 1,
                       t_receipt_ns=receipt, t_device_ns=device, uncertainty_ns=mapped.uncertainty_ns,
                       layout=FrameLayout("gray8", 1, 1)),
                b"x",
            )
        )  # fmt: skip
        true.append(t - exposure_ns)
    return messages, true


def sound(seconds: float) -> list[Message]:
    layout = AudioLayout(1000, 1, 40)
    return [
        Message(Header(stream="microphone", seq=i, epoch=5, t_capture_ns=S + i * 40 * MS,
                       t_end_ns=S + (i + 1) * 40 * MS,
                       bound_ns=S + (i + 1) * 40 * MS, t_receipt_ns=S + i * 40 * MS, layout=layout), bytes(80))
        for i in range(round(25 * seconds))
    ]  # fmt: skip


def motion(seconds: float) -> list[Message]:
    data = np.zeros(4, IMU_DTYPE)
    data["offset_ns"] = np.arange(4) * 10 * MS
    found = []
    for i in range(round(25 * seconds)):
        t = S + i * 40 * MS
        common: dict[str, Any] = {"stream": "imu", "epoch": 5 + (i >= 50), "t_receipt_ns": t + 31 * MS}
        seq = i - 50 * (i >= 50)
        found.append(
            Message(
                Header(
                    **common,
                    seq=seq,
                    t_capture_ns=t,
                    t_end_ns=t + 30 * MS,
                    bound_ns=t + 30 * MS + 1,
                    layout=ImuLayout(4),
                ),
                data.tobytes(),
            )
        )
        found.append(
            Message(Header(**common, seq=seq + 1, t_capture_ns=t + 35 * MS, t_end_ns=t + 35 * MS, bound_ns=t + 35 * MS))
        )
    return found


def write(path: Path, *streams: list[Message], extra: dict[str, str] | None = None) -> Path:
    with RecordingWriter(path, SessionInfo(session="s", unix_ns=10**18, extra=extra or {})) as writer:
        for message in sorted((m for stream in streams for m in stream), key=lambda m: m.header.t_receipt_ns):
            writer.write(message, message.header.t_receipt_ns)
        writer.write_label(Label(0, S, "calm"), 0)
        writer.write_json(MANIFEST_TOPIC, b"{}", S)
        writer.write_json(PREDICTION_TOPIC, b"{}", S)
        writer.write_json(GAP_TOPIC, b'{"from":1,"to":2}', S)
        writer.write_json(GAP_TOPIC, b'{"stream":"imu","epoch":5,"from":1,"to":2}', S)
        writer.attach("note.txt", b"mine")
    return path


def headers(path: Path, stream: str, beats: bool = False) -> list[Header]:
    with RecordingReader(path) as reader:
        return [header for header, _ in reader.headers({stream}, beats)]


def correct(path: Path, out: Path, **shifts: Shift) -> Any:
    with RecordingReader(path) as reader:
        return recalibrate(reader, out, shifts)


def test_an_offset_moves_one_stream_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", sound(4), motion(4))
    before = path.read_bytes()
    made = correct(path, tmp_path / "b.mcap", imu=Shift(offset_ns=-80 * MS, uncertainty_ns=2 * MS))
    assert path.read_bytes() == before
    assert made.dropped == {"gap": 1, "manifest": 1, "prediction": 1}
    assert made.streams["imu"].shift_ms == {"p50": -80.0, "min": -80.0, "max": -80.0}
    for old, new in zip(headers(path, "imu", True), headers(tmp_path / "b.mcap", "imu", True), strict=True):
        assert (new.t_capture_ns, new.t_end_ns, new.bound_ns) == tuple(
            t - 80 * MS for t in (old.t_capture_ns, old.t_end_ns, old.bound_ns)
        )
        assert (new.epoch, new.seq, new.t_receipt_ns, new.layout) == (old.epoch, old.seq, old.t_receipt_ns, old.layout)
        assert new.is_beat or new.uncertainty_ns == 2 * MS
    assert headers(path, "microphone", True) == headers(tmp_path / "b.mcap", "microphone", True)
    with RecordingReader(tmp_path / "b.mcap") as reader:
        assert reader.info.complete
        assert reader.info.extra[FROM] == "a.mcap"
        assert reader.labels() == [Label(0, S, "calm")]
        assert [msgspec.json.decode(d)["stream"] for d, _, _ in reader.json(GAP_TOPIC)] == ["imu"]
        assert reader.attachments["note.txt"] == b"mine"
        assert recorded_offsets(reader) == {"imu": -80.0, "microphone": 0.0}
        again = recalibrate(reader, tmp_path / "c.mcap", {"imu": Shift(offset_ns=80 * MS)})
        assert again.dropped == {}
    assert [h.t_capture_ns for h in headers(tmp_path / "c.mcap", "imu")] == [
        h.t_capture_ns for h in headers(path, "imu")
    ]
    with RecordingReader(tmp_path / "c.mcap") as reader:
        assert moved_ns(reader) == {}


def test_what_is_made_of_a_recording_without_its_end_says_so(tmp_path: Path) -> None:
    whole = write(tmp_path / "whole.mcap", motion(4)).read_bytes()
    path = tmp_path / "a.mcap"
    path.write_bytes(whole[:-1])
    correct(path, tmp_path / "b.mcap", imu=Shift(offset_ns=MS))
    with RecordingReader(tmp_path / "b.mcap") as reader:
        assert lacks(reader) == "a.mcap, of which this was made, lacked its end then"


def test_a_refit_makes_the_badly_begun_seconds_right(tmp_path: Path) -> None:
    worse, better = [], []
    for seed in range(4):
        messages, true = frames(40, seed)
        path = write(tmp_path / f"{seed}.mcap", messages)
        made = correct(path, tmp_path / f"{seed}-new.mcap", camera=Shift(refit=True))
        assert made.streams["camera"].refitted
        for name, errors in ((path, worse), (tmp_path / f"{seed}-new.mcap", better)):
            new = headers(name, "camera")
            errors.append([(h.t_capture_ns - t, h.uncertainty_ns) for h, t in zip(new, true, strict=True)])
    old, new = np.array(worse), np.array(better)
    begun = slice(0, 100)
    assert np.median(np.abs(new[:, begun, 0])) < 0.5 * np.median(np.abs(old[:, begun, 0]))
    assert np.abs(new[:, begun, 0]).max() < np.abs(old[:, begun, 0]).max() / 3
    assert (np.abs(new[..., 0]) <= new[..., 1]).mean() > 0.98
    assert np.median(new[:, begun, 1]) < np.median(old[:, begun, 1])


@given(st.integers(0, 99), st.integers(-(10**9), 10**9), st.booleans())
@example(55, 0, False)  # whose clock jumps
@settings(max_examples=8)
def test_promises_hold_after_it_as_before(
    tmp_path_factory: pytest.TempPathFactory, seed: int, offset: int, refit: bool
) -> None:
    folder = tmp_path_factory.mktemp("promises")
    path = write(folder / "a.mcap", frames(12, seed)[0], sound(12), motion(12))
    shift = Shift(offset_ns=offset, refit=refit)
    correct(path, folder / "b.mcap", camera=shift, microphone=shift, imu=shift)
    for stream in ("camera", "microphone", "imu"):
        there = headers(folder / "b.mcap", stream, True)
        for epoch in {header.epoch for header in there}:  # a new one may begin before the last one's end: that is why
            own = [header for header in there if header.epoch == epoch]
            messages = [header for header in own if not header.is_beat]
            assert all(a.t_capture_ns < b.t_capture_ns and a.t_end_ns <= b.t_capture_ns for a, b in pairwise(messages))
            bound = -(10**18)
            for header in own:
                assert header.is_beat or header.t_capture_ns >= bound
                bound = max(bound, header.bound_ns)
    blocks = headers(folder / "b.mcap", "microphone")
    assert all(a.t_end_ns == b.t_capture_ns for a, b in pairwise(blocks))


def test_windows_are_made_from_the_new_times_and_every_message_is_accounted_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", motion(6))
    correct(path, tmp_path / "b.mcap", imu=Shift(offset_ns=-37 * MS))
    with RecordingReader(tmp_path / "b.mcap") as reader:
        spec = AlignSpec(
            hop_ns=100 * MS,
            streams=(StreamSpec(name="imu", payload="imu", rule=Resample(100, 50 * MS), channels=6),),
        )
        account = explain(Session(reader, spec)).streams["imu"]
    assert account.balanced
    assert account.messages["rejected"] == 0
    assert account.messages["used"] > 100


def test_what_cannot_be_done_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", sound(3), motion(3))
    made = correct(path, tmp_path / "b.mcap", imu=Shift(refit=True), microphone=Shift(refit=True))
    assert "no device times" in made.streams["imu"].left
    assert "counting its samples" in made.streams["microphone"].left
    assert headers(path, "imu") == headers(tmp_path / "b.mcap", "imu")
    with RecordingReader(path) as reader:
        with pytest.raises(ConfigError, match="no stream `micro`"):
            recalibrate(reader, tmp_path / "c.mcap", {"micro": Shift()})
        with pytest.raises(ConfigError, match="exists already"):
            recalibrate(reader, tmp_path / "b.mcap", {})
        mine = tmp_path / "mine.mcap"
        with pytest.raises(ConfigError, match="exists already"):  # somebody else's, made meanwhile
            recalibrate(reader, mine, {"imu": Shift(offset_ns=1)}, lambda t_ns: mine.write_bytes(b"mine"))
        assert mine.read_bytes() == b"mine"
        for bad in ("imu", "imu=x", "imu=1,-2", "imu=inf"):
            with pytest.raises(ConfigError, match="expected one like"):
                asked_shifts(reader, [bad], [], {})
        for far in (["imu=-5000000"], ["imu=10001"], ["imu=6000", "imu=6000"]):
            with pytest.raises(
                ConfigError, match=r"imu=\S+: -?\d+ ms is more than an offset may be, which is 10000 ms"
            ):
                asked_shifts(reader, far, [], {})
        assert asked_shifts(reader, ["imu=-10000"], [], {})["imu"].offset_ns == -10 * S
        found = {"imu": Shift(offset_ns=MS)}
        assert asked_shifts(reader, ["imu=-80,2"], ["all"], found) == {
            "imu": Shift(offset_ns=-79 * MS, uncertainty_ns=2 * MS, refit=True)
        }


def test_the_command_says_what_moved_and_what_is_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mcap", frames(12)[0], motion(3))
    run = CliRunner().invoke
    done = run(
        cli.app, ["recalibrate", str(path), "-o", str(tmp_path / "b.mcap"), "--offset", "imu=-80", "--refit", "camera"]
    )
    assert done.exit_code == 0, done.exception
    assert all(word in done.output for word in ("-80.00", "refitted", "1 windows", "is as it was"))
    done = run(cli.app, ["recalibrate", str(path), "-o", str(tmp_path / "c.mcap"), "--offset", "imu=3", "--json"])
    assert msgspec.json.decode(done.stdout)["streams"]["imu"]["offset_ms"] == 3
    refused = run(cli.app, ["recalibrate", str(path), "-o", str(tmp_path / "d.mcap")])
    assert "say what to correct" in str(refused.exception)
    assert not (tmp_path / "d.mcap").exists()


def test_to_verify_is_the_original(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", SessionInfo(session="s", bundle="b" * 64)) as writer:
        for message in motion(3):
            writer.write(message, message.header.t_receipt_ns)
        writer.write_json(MANIFEST_TOPIC, b"{}", S)
    correct(tmp_path / "a.mcap", tmp_path / "b.mcap", imu=Shift(offset_ns=MS))
    with (
        RecordingReader(tmp_path / "b.mcap") as reader,
        pytest.raises(RecordingError, match=r"It was recalibrated, .* verify its original, a\.mcap$"),
    ):
        check_windows(reader)


def test_what_the_model_is_called_is_known_without_its_predictions(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", SessionInfo(session="s", unix_ns=10**18, bundle="26ec" * 16)) as writer:
        for message in motion(1):
            writer.write(message, message.header.t_receipt_ns)
        writer.write_json(PREDICTION_TOPIC, b'{"bundle":{"name":"demo"}}', S)
    correct(tmp_path / "a.mcap", tmp_path / "b.mcap", imu=Shift(offset_ns=MS))
    correct(tmp_path / "b.mcap", tmp_path / "c.mcap", imu=Shift(offset_ns=MS))
    for name in "abc":
        with RecordingReader(tmp_path / f"{name}.mcap") as reader:
            assert about(reader)["bundle"]["name"] == "demo"
    assert "   model demo 26ec26ec26ec…" in CliRunner().invoke(cli.app, ["info", str(tmp_path / "c.mcap")]).stdout


def test_a_model_without_a_name_is_told_by_its_digits(tmp_path: Path) -> None:
    with RecordingWriter(tmp_path / "a.mcap", SessionInfo(session="s", unix_ns=10**18, bundle="26ec" * 16)) as writer:
        for message in motion(1):
            writer.write(message, message.header.t_receipt_ns)
    assert "   model 26ec26ec26ec…" in CliRunner().invoke(cli.app, ["info", str(tmp_path / "a.mcap")]).stdout
