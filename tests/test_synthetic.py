"""The synthetic sources: one seeded world, seen by every kind of sensor, with a truth that can be checked."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from nodes.synthetic import Synthetic
from pipeline.checks import CheckContext, check_source
from pipeline.clock import ManualClock
from pipeline.errors import ConfigError
from pipeline.messages import PAYLOADS, AudioLayout, FrameLayout, Message, Payload, array, view
from pipeline.scene import GRAVITY, LABELS, Scene, happenings, truth_at
from pipeline.source import Reading
from pipeline.strict import Document
from pipeline.wire import decode_frame

NS = 1_000_000_000
PERIOD = 20 * NS


def source(clock: ManualClock | None = None, **settings: Any) -> tuple[Synthetic, CheckContext]:
    context = CheckContext(clock=clock or ManualClock())
    decoded = Document("{}", "settings").decode(Synthetic.Settings, value=settings)
    made = Synthetic(decoded, context)
    made.open()
    return made, context


def readings(until_ns: int, **settings: Any) -> list[Reading]:
    """All readings that a source gives up to a time, with a clock that jumps to what it waits for."""
    made, context = source(**settings)
    found = []
    while context.clock.now_ns() < until_ns:
        try:
            reading = made.read()
        except EOFError:
            break
        if reading is not None:
            found.append(reading)
    return found


def middle(label: str, seed: int = 0) -> int:
    """A moment late in an event, or in calm."""
    events = happenings(0, seed, PERIOD)
    if label == "calm":
        return events[1].start_ns - 1
    event = next(e for e in events if e.label == label)
    return event.start_ns + (event.end_ns - event.start_ns) * 9 // 10


@pytest.mark.parametrize("payload", PAYLOADS)
def test_every_payload_keeps_the_contract_of_a_source(payload: Payload) -> None:
    got = check_source(Synthetic, {"payload": payload, "delay_jitter_ms": 20}, readings=5, clock=ManualClock(123))
    assert len(got) == 10


def test_every_payload_keeps_the_contract_in_real_time() -> None:
    check_source(Synthetic, {"payload": "imu", "rate_hz": 500}, readings=3)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_the_same_seed_gives_the_same_readings_and_another_seed_others(payload: Payload) -> None:
    first, again = (readings(2 * NS, payload=payload, seed=3, rate_hz=None) for _ in range(2))
    other = readings(2 * NS, payload=payload, seed=4)

    def data(found: list[Reading]) -> list[bytes]:
        return [view(r.layout, r.data).tobytes() for r in found]

    assert [r.t_capture_ns for r in first] == [r.t_capture_ns for r in again]
    assert data(first) == data(again)
    assert payload == "text" or data(first) != data(other)


def test_a_source_opened_late_shows_what_an_early_one_would_show_then() -> None:
    early = [r for r in readings(3 * NS, payload="audio") if r.t_capture_ns >= 2 * NS]
    made, _ = source(ManualClock(2 * NS), payload="audio")
    late = made.read()
    assert late is not None
    assert late.t_capture_ns == early[0].t_capture_ns
    np.testing.assert_array_equal(late.data, early[0].data)


def test_rates_blocks_and_times_are_as_configured() -> None:
    frames = readings(2 * NS, payload="frame", rate_hz=50, width=64, height=48)
    assert [r.t_capture_ns for r in frames[:3]] == [0, 20_000_000, 40_000_000]
    assert frames[0].layout == FrameLayout("bgr8", 48, 64)
    blocks = readings(NS, payload="audio", rate_hz=8000, block=80, channels=2)
    assert blocks[0].layout == AudioLayout(8000, 2, 80)
    assert all(a.t_end_ns == b.t_capture_ns for a, b in itertools.pairwise(blocks))
    batches = readings(NS, payload="imu", rate_hz=200, block=4)
    assert all(r.t_end_ns - r.t_capture_ns == 15_000_000 for r in batches)
    jittered = readings(2 * NS, payload="frame", jitter_ms=1000)
    assert (np.diff([r.t_capture_ns for r in jittered]) > 0).all()


def test_delay_is_the_time_between_the_moment_and_the_receipt() -> None:
    delays = [r.t_receipt_ns - r.t_end_ns for r in readings(3 * NS, payload="sweep", delay_ms=30, delay_jitter_ms=10)]
    assert min(delays) >= 30_000_000
    assert max(delays) <= 40_000_000
    assert len(set(delays)) > 3


def test_loss_silence_restarts_and_the_end() -> None:
    made, context = source(payload="imu", loss=0.3, seed=5)
    got = [made.read() for _ in range(200)]
    assert context.counted["lost"] == sum(r is None for r in got)
    assert 30 < context.counted["lost"] < 90
    quiet = [r.t_capture_ns for r in readings(4 * NS, payload="sweep", silence_s=[[1, 2], [3, 3.5]])]
    assert not [t for t in quiet if NS <= t < 2 * NS or 3 * NS <= t < 3.5 * NS]
    assert len(quiet) == pytest.approx(25, abs=2)
    starts = [r.t_capture_ns for r in readings(4 * NS, payload="sweep", restarts_s=[1.05, 2.0]) if r.new_epoch]
    assert starts == [1_100_000_000, 2_000_000_000]
    assert max(r.t_capture_ns for r in readings(9 * NS, payload="imu", duration_s=1.5)) < 1.5 * NS


def test_a_sleeping_machine_skips_what_it_missed() -> None:
    clock = ManualClock()
    made, context = source(clock, payload="imu")
    assert made.read() is not None
    clock.advance(60 * NS)
    caught_up = made.read()
    assert caught_up is not None
    assert caught_up.t_capture_ns > 59 * NS
    assert context.counted["stale"] > 1000


def test_settings_are_checked() -> None:
    for settings, words in [
        ({"payload": "audio", "rate_hz": 16000.5}, "whole number"),
        ({"payload": "frame", "block": 3}, "`block`"),
        ({"payload": "imu", "silence_s": [[3, 1]]}, "must end after"),
        ({"payload": "imu", "loss": 2}, "at most 1"),
        ({"payload": "imu", "delay_s": 1}, "`delay_ms: 1000`"),
    ]:
        with pytest.raises(ConfigError, match=words):
            source(**settings)


# -- the world ---------------------------------------------------------------------------------------------------------


def test_every_event_happens_once_in_every_period() -> None:
    for seed in range(5):
        for period in range(3):
            events = happenings(period, seed, PERIOD)
            assert sorted(e.label for e in events) == sorted(LABELS[1:])
            assert period * PERIOD <= events[0].start_ns
            assert events[-1].end_ns <= (period + 1) * PERIOD
            assert all(a.end_ns < b.start_ns for a, b in itertools.pairwise(events))
    assert happenings(0, 0, PERIOD) != happenings(0, 1, PERIOD)


def test_the_truth_is_a_pure_function_of_time() -> None:
    for event in happenings(2, 7, PERIOD):
        assert truth_at(event.start_ns - 1, 7).label == "calm"
        assert truth_at(event.start_ns, 7).label == event.label
        assert truth_at(event.end_ns - 1, 7).progress == pytest.approx(1, abs=1e-6)
        assert truth_at(event.end_ns, 7).label == "calm"


@pytest.mark.parametrize("label", LABELS)
def test_each_event_is_seen_by_the_sensors_that_can_see_it(label: str) -> None:
    scene, t = Scene(), middle(label)
    assert scene.truth(t).label == label
    frames = []
    for i in range(8):
        pixels = np.empty((120, 160, 3), np.uint8)
        scene.frame(t - i * NS // 30, i, pixels)
        frames.append(pixels)
    edge = [int(f[:4].mean()) for f in frames]
    centre = int(frames[0][55:65, 75:85].mean())
    assert (max(edge) > 150) == (label == "flash")
    assert (min(edge) < 60) or label == "flash"
    assert (centre > 200) == (label == "approach")

    sound = scene.audio(t // 62_500 - 8000, 8000, 16000)[:, 0].astype(float)
    spectrum = np.abs(np.fft.rfft(sound)) ** 2
    tone = spectrum[490:511].sum() / spectrum.sum()
    assert (tone > 0.9) == (label == "tone")
    assert (np.abs(sound).max() > 2000) == (label in ("tone", "shake"))

    times = t + np.arange(-100, 0) * 10_000_000
    batch = scene.imu(times, 1)
    assert batch["accel"][:, 2].mean() == pytest.approx(GRAVITY, abs=0.05)
    assert (batch["accel"][:, 0].std() > 1.0) == (label == "shake")

    cloud = scene.sweep(t, 1, 1440, NS // 10)
    distance = np.hypot(cloud["x"], cloud["y"])
    assert (distance.min() < 2.0) == (label == "approach")
    assert (cloud["x"][distance.argmin()] > 0) or label != "approach"
    assert np.median(distance) == pytest.approx(6.0, abs=0.2)

    assert (scene.signal(times, 1)["value"][:, 2].max() > 1.5) == (label == "approach")
    assert scene.line(t, 4).decode().startswith("4: ")


def test_the_world_sounds_as_it_should_after_a_month() -> None:
    period = 30 * 86_400 * NS // PERIOD
    heard = [event for event in happenings(period, 0, PERIOD) if event.label == "tone"]
    sound = Scene().audio((heard[0].start_ns + NS // 4) // 62_500, 8000, 16000)[:, 0].astype(float)
    spectrum = np.abs(np.fft.rfft(sound)) ** 2
    assert spectrum[490:511].sum() / spectrum.sum() > 0.9


def test_compressed_frames_show_the_same_scene() -> None:
    raw, coded = (readings(NS // 10, payload="frame", format=f)[0] for f in ("bgr8", "jpeg"))
    header: Any = type("H", (), {"stream": "camera", "seq": 0, "layout": coded.layout})()
    pixels = decode_frame(Message(header, coded.data))
    assert len(coded.data) < 40_000
    assert np.abs(pixels.astype(int) - view(raw.layout, raw.data).astype(int)).mean() < 8
    assert array(Message(header, coded.data)).ndim == 1


def test_text_promises_the_silence_between_lines() -> None:
    made, context = source(payload="text", rate_hz=0.1)
    assert made.read() is not None  # line 0, at time 0
    for _ in range(10):
        assert made.read() is None
    promised = made.bound_ns()
    assert promised is not None
    assert promised == context.clock.now_ns()
    imu, _ = source(payload="imu")
    assert imu.bound_ns() is None
