"""Offsets from events: found where they are, refused where nobody could tell, and right in sign from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from pipeline.calibrate import Correction, Offset, Solution, calibrate, compare, solve, tracks_of
from pipeline.calibrate_rig import apply, rig_values
from pipeline.cli import app
from pipeline.config import load_rig
from pipeline.errors import ConfigError, RecordingError
from pipeline.events import Track, extractor
from pipeline.importing import import_file
from pipeline.messages import (
    IMU_DTYPE,
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    TextLayout,
    signal_dtype,
)
from pipeline.plan import make_plan
from pipeline.recording import RecordingWriter, SessionInfo
from pipeline.rig_edit import load_exactly, with_offset
from pipeline.source import Reading
from pipeline.stamper import Stamper
from pipeline.strict import Document

Array = np.ndarray[Any, Any]
LATE_MS = 83
RIG = """# my rig
name: shed
sources:
  microphone: {kind: synthetic, payload: audio}   # on the shelf
  imu:
    kind: synthetic
    payload: imu  # on the door
"""


def moments(seed: int = 0, count: int = 25, length: float = 20.0) -> Array:
    """Knocks at random moments, in seconds."""
    rng = np.random.default_rng([seed, 1])
    at = np.sort(rng.uniform(0.5, length - 1, count))
    return at[np.concatenate([[True], np.diff(at) > 0.2])]


def knocks_heard(at: Array, length: float = 20.0, late_ms: float = 0.0, seed: int = 0) -> Iterator[Reading]:
    """A microphone's readings, stamped late."""
    rate, rng = 16_000, np.random.default_rng([seed, 2])
    sound = rng.normal(0, 60, int(length * rate))
    for moment in at:
        begin = round(moment * rate)
        burst = 5000 * np.exp(-np.arange(1600) / rate / 0.01) * rng.normal(0, 1, 1600)
        sound[begin : begin + 1600] += burst[: len(sound) - begin]
    pcm = np.clip(sound, -32768, 32767).astype("<i2")[:, None]
    for i in range(0, len(pcm), 320):
        yield reading(AudioLayout(rate, 1, 320), pcm[i : i + 320], i / rate, (i + 320) / rate, late_ms)


def knocks_felt(at: Array, length: float = 20.0, late_ms: float = 0.0, seed: int = 0) -> Iterator[Reading]:
    """An IMU's readings, stamped late."""
    rng = np.random.default_rng([seed, 3])
    t = np.arange(0, length, 0.005)
    accel = rng.normal(0, 0.04, (len(t), 3)) + np.array([0, 0, 9.8])
    for moment in at:
        since = t - moment
        ring = np.where(since >= 0, np.exp(-np.maximum(since, 0) / 0.02) * np.cos(200 * since), 0)
        accel += ring[:, None] * rng.normal(4, 1, 3)
    yield from batches(t, accel, np.zeros((len(t), 3)), late_ms)


def batches(t: Array, accel: Array, gyro: Array, late_ms: float = 0.0) -> Iterator[Reading]:
    for a in range(0, len(t), 10):
        part = slice(a, a + 10)
        batch = np.zeros(len(t[part]), IMU_DTYPE)
        batch["offset_ns"] = np.round((t[part] - t[a]) * 1e9)
        batch["accel"], batch["gyro"] = accel[part], gyro[part]
        yield reading(ImuLayout(len(batch)), batch, t[a], float(t[part][-1]), late_ms)


def reading(layout: Layout, data: Array, t: float, end: float, late_ms: float = 0.0) -> Reading:
    begin_ns, end_ns = (round((s + late_ms / 1e3) * 1e9) for s in (t, end))
    return Reading(layout=layout, data=np.ascontiguousarray(data), t_capture_ns=begin_ns, t_end_ns=end_ns,
                   t_receipt_ns=round(end * 1e9), uncertainty_ns=1_000_000)  # fmt: skip


def tracks(payload: Any, readings: Iterator[Reading]) -> list[Track]:
    taker = extractor(payload)
    assert taker is not None
    stamper = Stamper("s", payload)
    stamper.open(0)
    for one in readings:
        header = stamper.stamp(one, one.t_receipt_ns)
        assert header is not None
        taker.add(Message(header, one.data))
    return taker.tracks()


def record(path: Path, streams: dict[str, Iterator[Reading]], rig: Path | None = None) -> Path:
    """A recording of these readings, stamped as the rig says."""
    offsets = {}
    if rig is not None:
        offsets = {s.name: (s.offset_ns, s.offset_uncertainty_ns) for s in make_plan(load_rig(rig)).sources}
    info = SessionInfo(session="test", unix_ns=10**18, rig=None if rig is None else rig.read_text())
    with RecordingWriter(path, info) as writer:
        for name, readings in streams.items():
            payload = "audio" if name == "microphone" else "imu"
            stamper = Stamper(name, payload, *offsets.get(name, (0, 0)))
            stamper.open(0)
            for one in readings:
                header = stamper.stamp(one, one.t_receipt_ns)
                assert header is not None
                writer.write(Message(header, one.data), one.t_receipt_ns)
        writer.close()
    return path


# -- from end to end -------------------------------------------------------------------------------------------------


def test_what_is_found_and_written_is_gone_when_it_is_recorded_again(tmp_path: Path) -> None:
    rig = tmp_path / "rig.yaml"
    rig.write_text(RIG)

    def session(name: str) -> Path:
        streams = {"microphone": knocks_heard(moments(), late_ms=LATE_MS), "imu": knocks_felt(moments())}
        return record(tmp_path / name, streams, rig)

    first = session("first.mcap")
    result = CliRunner().invoke(app, ["calibrate", str(first), "--write", str(rig), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["reference"] == "imu", "the stream that is stamped earliest"
    offset = found["offsets"]["microphone"]
    assert offset["offset_ms"] == pytest.approx(-LATE_MS, abs=3)
    assert found["pairs"][0]["correlation"]["before"] < found["pairs"][0]["correlation"]["after"]

    entry = load_rig(rig).rig.sources["microphone"]
    assert entry.offset_ms == offset["rig"]["offset_ms"] == pytest.approx(offset["offset_ms"], abs=0.06)
    assert entry.offset_uncertainty_ms == offset["rig"]["offset_uncertainty_ms"] > 0
    assert "# on the shelf" in rig.read_text()

    again = calibrate(session("second.mcap"))[0]
    assert again.decided
    assert again.offset_ns is not None
    assert abs(again.offset_ns) < 1_000_000
    with pytest.raises(ConfigError, match="was 0 when this was recorded"):
        apply(rig, solve(calibrate(first)), {"microphone": 0.0, "imu": 0.0})


def test_a_person_is_shown_before_and_after_and_the_line_for_the_rig(tmp_path: Path) -> None:
    streams = {"microphone": knocks_heard(moments(), late_ms=LATE_MS), "imu": knocks_felt(moments())}
    path = record(tmp_path / "a.mcap", streams)
    result = CliRunner().invoke(app, ["calibrate", str(path), "--reference", "imu"])
    assert result.exit_code == 0
    assert "microphone against imu" in result.stdout
    assert "fit before" in result.stdout
    assert "microphone: {…, offset_ms: -8" in result.stdout


def test_a_stream_that_is_not_there_is_the_users_mistake(tmp_path: Path) -> None:
    path = record(tmp_path / "a.mcap", {"imu": knocks_felt(moments())})
    with pytest.raises(ConfigError, match="no stream `imus`"):
        tracks_of(path, ["imus"])


def test_nothing_is_written_where_nothing_is_decided(tmp_path: Path) -> None:
    rig = tmp_path / "rig.yaml"
    rig.write_text(RIG)
    streams = {"microphone": knocks_heard(moments(1)), "imu": knocks_felt(moments(2))}
    path = record(tmp_path / "a.mcap", streams)
    with pytest.raises(RecordingError, match="no offset could be decided"):
        apply(rig, solve(calibrate(path)), {})
    assert rig.read_text() == RIG


# -- what is found, and what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("late_ms", [-400, -31, 0, 250])
def test_knocks_tell_the_offset_of_a_microphone(late_ms: int) -> None:
    felt, heard = knocks_felt(moments(3)), knocks_heard(moments(3), late_ms=late_ms)
    found = compare("imu", tracks("imu", felt), "microphone", tracks("audio", heard))
    assert found.decided, found.reason
    assert found.offset_ns is not None
    assert abs(found.offset_ns / 1e6 + late_ms) < 3
    assert found.interval_ns is not None
    assert found.interval_ns[0] <= found.offset_ns <= found.interval_ns[1]


def refusal(felt: Array, heard: Array, late_ms: float = 0.0, length: float = 20.0) -> str:
    """Why an offset is refused."""
    found = compare(
        "imu", tracks("imu", knocks_felt(felt, length)),
        "microphone", tracks("audio", knocks_heard(heard, length, late_ms)),
    )  # fmt: skip
    assert not found.decided, found
    assert found.offset_ns is None
    return found.reason


@pytest.mark.parametrize("seed", range(4))
def test_events_of_two_worlds_are_refused(seed: int) -> None:
    refusal(moments(seed + 10), moments(seed + 20))


def test_steady_steps_are_refused_because_every_period_fits() -> None:
    steps = np.arange(0.5, 19.0, 0.25)
    assert "another offset fits nearly as well" in refusal(steps, steps)


def test_one_clap_is_no_evidence() -> None:
    one = np.array([8.0])
    assert "too few events" in refusal(one, one) or "chance" in refusal(one, one)


def test_an_offset_beyond_the_range_is_not_taken_for_one_within() -> None:
    assert refusal(moments(5), moments(5), late_ms=900)
    felt, heard = tracks("imu", knocks_felt(moments(5))), tracks("audio", knocks_heard(moments(5), late_ms=900))
    found = compare("imu", felt, "microphone", heard, within_ns=1_000_000_000)
    assert found.offset_ns is not None
    assert abs(found.offset_ns / 1e6 + 900) < 3


def test_too_short_an_overlap_is_refused() -> None:
    at = np.array([0.3, 0.7, 1.2])
    assert "overlap" in refusal(at, at, length=1.5)


def test_streams_without_events_are_named() -> None:
    assert extractor("text") is None
    found = compare("imu", tracks("imu", knocks_felt(moments())), "notes", [])
    assert not found.decided
    assert "notes" in found.reason


def turning(t: Array, seed: int = 0) -> Array:
    """Angles [n, 3] of a head that turns, in rad, and its rates: smooth and never the same."""
    rng = np.random.default_rng([seed, 4])
    pitch, phase = rng.uniform(0.2, 3.0, (60, 3)), rng.uniform(0, 6.3, (60, 3))
    return np.sum(0.02 * np.sin(2 * np.pi * pitch * t[:, None, None] + phase), axis=1)


def gyro(t: Array, late_ms: float, mounting: Array, seed: int = 0) -> list[Track]:
    rate = (turning(t + 1e-4, seed) - turning(t - 1e-4, seed)) / 2e-4
    noise = np.random.default_rng([seed, 5]).normal(0, 0.01, rate.shape)
    return tracks("imu", batches(t, np.full_like(rate, np.nan), rate @ mounting + noise, late_ms))


def test_two_gyroscopes_agree_however_they_are_mounted() -> None:
    turned = np.linalg.qr(np.random.default_rng(6).normal(0, 1, (3, 3)))[0]
    a, b = gyro(np.arange(0, 20, 0.01), 0, np.eye(3)), gyro(np.arange(0.1, 20, 0.005), 120, turned)
    found = compare("left", a, "right", b)
    assert found.decided, found.reason
    assert found.offset_ns is not None
    assert abs(found.offset_ns / 1e6 + 120) < 1


def test_a_picture_that_turns_is_compared_with_a_gyroscope() -> None:
    texture = cv2.GaussianBlur(np.random.default_rng(7).integers(0, 255, (400, 500), np.uint8), (0, 0), 3)
    texture = cv2.normalize(texture, None, 0, 255, cv2.NORM_MINMAX)
    taker = extractor("frame")
    assert taker is not None
    stamper = Stamper("camera", "frame")
    stamper.open(0)
    for i in range(450):
        dx, dy, _ = 60 * turning(np.array([i / 30]))[0]
        view = cv2.warpAffine(texture, np.float32([[1, 0, dx - 170], [0, 1, dy - 140]]), (160, 120))
        header = stamper.stamp(reading(FrameLayout("gray8", 120, 160), view, i / 30, i / 30, late_ms=-60), 0)
        assert header is not None
        taker.add(Message(header, view))
    found = compare("imu", gyro(np.arange(0, 15, 0.01), 0, np.eye(3)), "camera", taker.tracks())
    assert found.decided, found.reason
    assert found.offset_ns is not None
    assert abs(found.offset_ns / 1e6 - 60) < 3


# -- real clips --------------------------------------------------------------------------------------------------------


def moved(of: list[Track], ms: int) -> list[Track]:
    """Shifted within its own span, and cut off where it leaves it."""
    result = []
    for track in of:
        t = track.t_ns + ms * 1_000_000
        kept = (t >= track.t_ns[0]) & (t <= track.t_ns[-1])
        result.append(replace(track, t_ns=t[kept], value=track.value[kept]))
    return result


def test_a_barking_dog_is_decided_and_stays_so_when_its_sound_is_moved(shared_data: Path, tmp_path: Path) -> None:
    import_file(shared_data / "av" / "dog.mp4", tmp_path / "dog.mcap")
    of = tracks_of(tmp_path / "dog.mcap")
    own = compare("camera", of["camera"], "microphone", of["microphone"])
    assert own.decided, own.reason
    assert own.offset_ns is not None
    decided = 0
    for ms in (-400, -200, -70, 70, 200, 400):
        found = compare("camera", of["camera"], "microphone", moved(of["microphone"], ms))
        if found.offset_ns is not None:
            decided += 1
            assert abs(found.offset_ns / 1e6 + ms - own.offset_ns / 1e6) < 20
    assert decided >= 3


def test_speech_is_found_or_refused_but_never_wrong(shared_data: Path, tmp_path: Path) -> None:
    clips = sorted((shared_data / "av").glob("*.mpg"))
    assert len(clips) == 5
    for clip in clips:
        import_file(clip, tmp_path / f"{clip.stem}.mcap")
        of = tracks_of(tmp_path / f"{clip.stem}.mcap")
        for ms in (-300, 0, 300):
            found = compare("camera", of["camera"], "microphone", moved(of["microphone"], ms))
            # They were recorded as one; how far mouth and voice are apart by nature is a few hundredths of a second.
            assert found.offset_ns is None or abs(found.offset_ns / 1e6 + ms) < 45


# -- the rig -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (
            "sources:\n  a: {kind: x}  # c\n",
            "sources:\n  a: {kind: x, offset_ms: -8.5, offset_uncertainty_ms: 2}  # c\n",
        ),
        (
            "sources:\n  a:\n    # why\n    kind: x # c\n    z: 1\n",
            "sources:\n  a:\n    # why\n    offset_uncertainty_ms: 2\n    offset_ms: -8.5\n    kind: x # c\n    z: 1\n",
        ),
        (
            "sources: {a: {offset_ms: 1.0, kind: x, offset_uncertainty_ms: 1}, b: {kind: y}}",
            "sources: {a: {offset_ms: -8.5, kind: x, offset_uncertainty_ms: 2}, b: {kind: y}}",
        ),
        (
            "sources:\r\n  a:\r\n    kind: x\r\n",
            "sources:\r\n  a:\r\n    offset_uncertainty_ms: 2\r\n    offset_ms: -8.5\r\n    kind: x\r\n",
        ),
        (
            'sources: {"a": {kind: "x y", list: [1, 2] }}',
            'sources: {"a": {kind: "x y", list: [1, 2], offset_ms: -8.5, offset_uncertainty_ms: 2 }}',
        ),
    ],
)
def test_only_the_two_numbers_of_one_source_are_edited(before: str, after: str) -> None:
    assert with_offset(Document(before, "rig.yaml"), "a", -8.5, 2.0).text == after


@pytest.mark.parametrize(
    "text",
    [
        "base: &b {kind: x}\nsources: {a: *b, b: *b}\n",
        "sources:\n  a: &b\n    kind: x\n  b: *b\n",
        "sources: {a: {kind: x, offset_ms: '3'}}\n",
    ],
)
def test_a_block_that_cannot_be_edited_safely_is_left_alone(text: str) -> None:
    with pytest.raises(ConfigError, match="cannot be written here safely"):
        with_offset(Document(text, "rig.yaml"), "a", 1.0, 1.0)


@settings(max_examples=50)
@given(offset=st.floats(-500, 500), uncertainty=st.floats(0, 50), source=st.sampled_from(["microphone", "imu"]))
def test_any_offset_can_be_written_and_read_again(offset: float, uncertainty: float, source: str) -> None:
    offset, uncertainty = round(offset, 1), round(uncertainty, 1)
    edited = with_offset(Document(RIG, "rig.yaml"), source, offset, uncertainty)
    assert edited.value["sources"][source]["offset_ms"] == offset
    assert edited.text.count("#") == RIG.count("#")


def test_a_rig_without_such_a_source_is_refused(tmp_path: Path) -> None:
    rig = tmp_path / "rig.yaml"
    rig.write_text(RIG)
    with pytest.raises(ConfigError, match="no source `camera`"):
        apply(rig, Solution(corrections={"camera": Correction(offset_ns=-(10**8), uncertainty_ns=10**6)}), {})
    assert load_exactly(rig).text == RIG


def test_what_is_found_comes_on_top_of_what_was_recorded_with_unless_it_may_be_nothing() -> None:
    found = {"a": Correction(offset_ns=5_000_000, uncertainty_ns=1_000_000),
             "b": Correction(offset_ns=5_000_000, uncertainty_ns=6_000_000)}  # fmt: skip
    assert rig_values(Solution(corrections=found), {"a": -20.0}) == {"a": (-15.0, 1.1)} or (
        rig_values(Solution(corrections=found), {"a": -20.0}) == {"a": (-15.0, 1.0)}
    )


def test_times_made_elsewhere_take_no_offset(tmp_path: Path) -> None:
    rig = tmp_path / "rig.yaml"
    rig.write_text("name: r\nsources: {session: {kind: replay, path: a.mcap, offset_ms: 3}}\n")
    with pytest.raises(ConfigError, match=r"sources\.session\.offset_ms"):
        make_plan(load_rig(rig))


# -- several streams ---------------------------------------------------------------------------------------------------


def pair(reference: str, stream: str, ms: int, half_ms: int = 2) -> Offset:
    interval = ((ms - half_ms) * 10**6, (ms + half_ms) * 10**6)
    return Offset(reference=reference, stream=stream, decided=True, offset_ns=ms * 10**6, interval_ns=interval)


def test_the_reference_is_chosen_so_that_nothing_moves_into_the_future() -> None:
    solution = solve([pair("a", "b", 30), pair("a", "c", -20)])
    assert solution.reference == "b"
    assert {name: c.offset_ns // 10**6 for name, c in solution.corrections.items()} == {"a": -30, "c": -50}
    assert solution.corrections["c"].by == "a"


def test_pairs_that_contradict_each_other_set_nothing() -> None:
    solution = solve([pair("a", "b", 30), pair("b", "c", 10), pair("a", "c", -20)])
    assert solution.contradiction
    assert not solution.corrections


def test_nothing_decided_solves_nothing() -> None:
    assert solve([Offset(reference="a", stream="b", decided=False, reason="chance")]) == Solution()


# -- the stamper -------------------------------------------------------------------------------------------------------


def test_an_offset_moves_captures_ends_and_bounds_and_keeps_what_was_measured() -> None:
    plain, shifted = Stamper("t", "text"), Stamper("t", "text", -5_000, 700)
    for stamper in (plain, shifted):
        stamper.open(0)
    for t in (100_000, 200_000, 300_000):
        one = Reading(layout=TextLayout(1), data=b"x", t_capture_ns=t, t_end_ns=t, t_receipt_ns=t + 9,
                      t_device_ns=77, uncertainty_ns=50, bound_ns=t + 1)  # fmt: skip
        a, b = plain.stamp(one, t), shifted.stamp(one, t)
        assert a is not None
        assert b is not None
        assert (b.t_capture_ns, b.t_end_ns, b.bound_ns) == (t - 5_000, t - 5_000, t + 1 - 5_000)
        assert (b.uncertainty_ns, b.t_receipt_ns, b.t_device_ns) == (750, a.t_receipt_ns, 77)
    assert shifted.beat(400_000, 350_000, "").bound_ns == 345_000


def test_a_signal_whose_channels_become_others_is_looked_at_where_it_has_most() -> None:
    found = extractor("signal")
    assert found is not None
    for seq, names in enumerate([("a", "b")] * 30 + [("a", "b", "c")] * 60):
        samples = np.zeros(1, signal_dtype(len(names)))
        samples["value"] = seq % 2
        times = {"t_capture_ns": seq * 10**7, "t_end_ns": seq * 10**7, "bound_ns": seq * 10**7 + 1}
        layout = SignalLayout(1, names)
        found.add(Message(Header(stream="s", seq=seq, epoch=0, layout=layout, t_receipt_ns=0, **times), samples))
    [track] = found.tracks()
    assert len(track.value) == 59
