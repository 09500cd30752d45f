"""Samples onto a grid: exact where a sample lies on it, the same however samples were batched, and true to the sound.

Most of it goes through the aligner, whose grids are what a model is trained on and fed with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pipeline import resample
from pipeline.align import Aligner, AlignSpec, All, Resample, Step, StreamSpec
from pipeline.messages import AudioLayout, Header, Message, SignalLayout, signal_dtype
from tests.align_harness import PHASES, event_time, run
from tests.align_strategies import Case, beat

MS = 1_000_000
SECOND = 1_000_000_000
HOP = 100 * MS
RATE = 16_000
Wave = Callable[[NDArray[np.float64]], NDArray[np.float64]]


# -- the grid ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from((1, 3, 7, 100, 16_000, 22_050, 44_100, 48_000)), st.integers(0, 10**9), st.integers(1, 50))
def test_grid_times_are_integers_that_never_drift(rate: int, first: int, count: int) -> None:
    assert resample.grid(rate, first, count).tolist() == [j * SECOND // rate for j in range(first, first + count)]


@given(st.sampled_from((1, 7, 100, 16_000, 44_100, 192_000)), st.integers(0, 2**62), st.integers(1, 50))
def test_grid_times_are_exact_as_late_as_any_time_can_be(rate: int, t_ns: int, count: int) -> None:
    first = t_ns * rate // SECOND
    assert resample.grid(rate, first, count).tolist() == [j * SECOND // rate for j in range(first, first + count)]


@given(st.integers(1, 2000), st.integers(1, 2000).map(lambda ms: ms * MS))
def test_the_nearest_hop_holds_a_whole_number_of_samples_and_none_is_nearer(rate: int, hop: int) -> None:
    nearest = resample.nearest_hop_ns(rate, hop)
    n = resample.samples_per_hop(rate, nearest)
    assert n is not None
    assert n * SECOND == rate * nearest
    fitting = [k * SECOND // rate for k in range(1, rate * hop // SECOND * 2 + rate + 2) if k * SECOND % rate == 0]
    assert abs(nearest - hop) == min(abs(h - hop) for h in fitting)


# -- linear -----------------------------------------------------------------------------------------------------------


def signal(channels: int, rate_hz: int = 50, max_gap_ns: int = 70 * MS) -> StreamSpec:
    rule = Resample(rate_hz, max_gap_ns)
    return StreamSpec(name="s", payload="signal", channels=channels, rule=rule, idle_ns=None)


def batch(seq: int, times: list[int], values: NDArray[Any], epoch: int = 0) -> Message:
    """Samples at these times, ``values`` f4 [samples, channels]."""
    rows = np.zeros(len(times), signal_dtype(values.shape[1]))
    rows["offset_ns"], rows["value"] = np.subtract(times, times[0]), values
    header = Header(
        stream="s", seq=seq, epoch=epoch, t_capture_ns=times[0], t_end_ns=times[-1], bound_ns=times[-1] + 1,
        t_receipt_ns=times[-1], layout=SignalLayout(samples=len(times), channels=("x",) * values.shape[1]),
    )  # fmt: skip
    return Message(header, rows.tobytes())


def grids(spec: StreamSpec, messages: list[Message]) -> NDArray[np.float32]:
    """All that came out, end to end; f4 [points, channels], NaN in holes."""
    assert isinstance(spec.rule, Resample)
    aligner = Aligner(AlignSpec(hop_ns=HOP, streams=(spec,)))
    steps: list[Step] = [s for m in messages for s in aligner.feed(m, m.header.t_receipt_ns)]
    steps += aligner.finish(messages[-1].header.t_receipt_ns)
    hole = np.full((spec.rule.rate_hz // 10, spec.channels), np.nan, np.float32)
    return np.concatenate([hole[:0], *(s.grids.get(spec.name, hole) for s in steps)])


floats = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


@pytest.mark.parametrize("channels", [1, 60], ids=["few", "many"])
@given(st.lists(floats, min_size=6, max_size=40), st.integers(1, 5))
def test_samples_on_the_grid_come_out_bit_for_bit(channels: int, values: list[float], size: int) -> None:
    spec = signal(channels)
    wave = np.repeat(np.array(values, np.float32)[:, None], channels, axis=1)
    times = [20 * MS * i for i in range(len(values))]
    starts = range(0, len(values), size)
    found = grids(spec, [batch(n, times[i : i + size], wave[i : i + size]) for n, i in enumerate(starts)])
    assert found.tobytes() == wave[: len(found)].tobytes()


@given(st.lists(st.integers(1, 60), min_size=2, max_size=80), st.integers(1, 8))
def test_few_and_many_samples_a_step_are_computed_alike(gaps_ms: list[int], size: int) -> None:
    """The aligner keeps some ten numbers a step in lists and more in arrays: nobody may notice."""
    times = [t * MS + 123 for t in itertools.accumulate(gaps_ms)]
    wave = np.sin(np.array(times) / 7e7).astype(np.float32)[:, None]
    both = []
    for channels in (1, 60):
        values = np.repeat(wave, channels, axis=1)
        starts = range(0, len(times), size)
        messages = [batch(n, times[i : i + size], values[i : i + size]) for n, i in enumerate(starts)]
        both.append(grids(signal(channels), messages))
    assert both[0].shape[0] == both[1].shape[0]
    assert np.array_equal(np.repeat(both[0], 60, axis=1), both[1], equal_nan=True)


@pytest.mark.parametrize("channels", [1, 60], ids=["few", "many"])
def test_what_was_not_measured_does_not_reach_an_exact_neighbour(channels: int) -> None:
    values = np.array([[1.0], [np.nan], [3.0], [np.inf], [5.0], [6.0]], np.float32).repeat(channels, axis=1)
    times = [0, 10 * MS, 40 * MS, 60 * MS, 80 * MS, 100 * MS]
    found = grids(signal(channels), [batch(0, times, values)])[:5, 0]  # at 0 20 40 60 80 ms
    assert np.array_equal(found, [1.0, np.nan, 3.0, np.inf, 5.0], equal_nan=True)


@pytest.mark.parametrize("channels", [1, 60], ids=["few", "many"])
def test_nothing_is_interpolated_across_epochs_or_wide_gaps(channels: int) -> None:
    def piece(seq: int, first: int, last: int, epoch: int) -> Message:
        times = list(range(first * MS, last * MS + 1, 10 * MS))
        return batch(seq, times, np.full((len(times), channels), 1.0, np.float32), epoch)

    messages = [piece(0, 0, 110, 0), piece(0, 130, 210, 1), piece(1, 290, 330, 1), piece(2, 400, 400, 1)]
    found = grids(signal(channels), messages)[:, 0]  # every 20 ms
    holes = [20 * i for i in np.flatnonzero(np.isnan(found))]
    assert holes == [120, 220, 240, 260, 280]  # 110 | 130 is a new epoch; 210 | 290 is wider than 70 ms, 330 | 400 not
    assert np.nanmin(found) == np.nanmax(found) == 1.0


# -- band-limited -----------------------------------------------------------------------------------------------------


def microphone(max_gap_ns: int = 10 * MS, channels: int = 1) -> StreamSpec:
    rule = Resample(RATE, max_gap_ns, "band_limited")
    return StreamSpec(name="mic", payload="audio", channels=channels, rule=rule, idle_ns=None)


def block(
    seq: int, rate_hz: int, t: int, end: int, values: NDArray[np.float64], epoch: int = 0, channels: int = 1
) -> Message:
    pcm = np.clip(np.round(values * 32768), -32768, 32767).astype("<i2").reshape(-1, channels)
    header = Header(
        stream="mic", seq=seq, epoch=epoch, t_capture_ns=t, t_end_ns=end, bound_ns=end, t_receipt_ns=end,
        layout=AudioLayout(rate_hz=rate_hz, channels=channels, samples=len(pcm)),
    )  # fmt: skip
    return Message(header, pcm.tobytes())


def sound(
    wave: Wave, rate_hz: int, sizes: Iterator[int], length_ns: int = 6 * HOP, start_ns: int = 0, epoch: int = 0,
    ppm: int = 0, seq: int = 0,
) -> list[Message]:  # fmt: skip
    """Blocks of ``wave`` (a function of session time in s) by a source whose clock is off by ``ppm``."""

    def at(i: int) -> int:
        return start_ns + i * (SECOND + ppm * 1000) // rate_hz

    out, i = [], 0
    while at(i) < start_ns + length_ns:
        n = next(sizes)
        out.append(block(seq, rate_hz, at(i), at(i + n), wave(np.array([at(i + j) for j in range(n)]) / 1e9), epoch))
        i, seq = i + n, seq + 1
    return out


def tone(hz: float, amplitude: float = 0.5) -> Wave:
    return lambda t: amplitude * np.sin(2 * np.pi * hz * t + 0.3)


def inner(found: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Times in s and values, without the edges, where a filter looks into silence."""
    times = resample.grid(RATE, 0, len(found)) / 1e9
    return times[160:-160], found[160:-160, 0].astype(np.float64)


def decibels(x: NDArray[np.float64], amplitude: float = 0.5) -> float:
    return float(20 * np.log10(np.sqrt(np.mean(x**2)) / (amplitude / np.sqrt(2))))


@pytest.mark.parametrize("rate_hz", [48_000, 44_100, 16_000, 8_000, 96_000])
@pytest.mark.parametrize("hz", [50, 440, 1000, 3000])
def test_a_tone_stays_what_it_was(rate_hz: int, hz: int) -> None:
    times, found = inner(grids(microphone(), sound(tone(hz), rate_hz, itertools.repeat(441))))
    assert len(found) > 5 * 1600
    assert decibels(found - tone(hz)(times)) < -60


@pytest.mark.parametrize("hz", [5000, 6000])
def test_up_to_6_khz_a_tone_stays_what_it_was(hz: int) -> None:
    for rate_hz in (48_000, 44_100):
        times, found = inner(grids(microphone(), sound(tone(hz), rate_hz, itertools.repeat(441))))
        assert decibels(found - tone(hz)(times)) < -60


@pytest.mark.parametrize("rate_hz", [48_000, 44_100, 96_000])
@pytest.mark.parametrize("hz", [9000, 10_000, 12_345, 15_000, 15_990, 21_000])
def test_what_16_khz_cannot_hold_is_suppressed_and_not_folded_back(rate_hz: int, hz: int) -> None:
    _, found = inner(grids(microphone(), sound(tone(hz), rate_hz, itertools.repeat(480))))
    assert decibels(found) < -60


def test_silence_a_constant_and_full_scale_keep_their_level() -> None:
    for level in (0.0, 0.25, -1.0):
        _, found = inner(grids(microphone(), sound(lambda t, x=level: np.full(len(t), x), 48_000,
                                                   itertools.repeat(480))))  # fmt: skip
        assert found == pytest.approx(level, abs=1e-6)


@pytest.mark.parametrize("ppm", [-300, 300])
def test_a_source_that_drifts_stays_in_place(ppm: int) -> None:
    """Positions come from the stamps, not from the nominal rate."""
    times, found = inner(grids(microphone(), sound(tone(440), 48_000, itertools.repeat(480), ppm=ppm)))
    assert decibels(found - tone(440)(times)) < -60


@pytest.mark.parametrize(("rate_hz", "whole"), [(48_000, 3), (44_100, 441), (16_000, 1), (8_000, 1)])
@given(st.data())
def test_grids_do_not_depend_on_block_sizes(rate_hz: int, whole: int, data: st.DataObject) -> None:
    """Blocks of whole nanoseconds (``whole`` samples), so that every sample has the same time in either batching."""
    sizes = data.draw(st.lists(st.integers(1, 1 + 900 // whole).map(lambda n: n * whole), min_size=1, max_size=9))
    rng = np.random.default_rng(7)
    noise = rng.uniform(-0.9, 0.9, rate_hz)
    wave: Wave = lambda t: noise[np.round(t * rate_hz).astype(int)]  # noqa: E731

    def cut(sizes: Iterator[int]) -> NDArray[np.float32]:
        messages = sound(wave, rate_hz, sizes, 2 * HOP + 50 * MS)
        return grids(microphone(), messages)[: 2 * RATE // 10]

    assert cut(itertools.cycle(sizes)).tobytes() == cut(itertools.repeat(whole * (1 + 400 // whole))).tobytes()


def test_another_epochs_sound_is_silence_to_the_filter() -> None:
    """What a new epoch says changes no point of the old one, bit for bit, and the other way round."""
    cut_at = 250 * MS
    rng = np.random.default_rng(1)
    noises = [rng.uniform(-0.9, 0.9, 48_000) for _ in range(2)]
    waves: list[Wave] = [lambda t, n=n: n[np.round(t * 48_000).astype(int)] for n in noises]

    def joined(first: Wave, second: Wave) -> NDArray[np.float32]:
        old = sound(first, 48_000, itertools.repeat(480), cut_at)
        new = sound(second, 48_000, itertools.repeat(480), cut_at, cut_at + MS, epoch=cut_at + MS)
        return grids(microphone(), old + new)

    aa, ab, bb = joined(waves[0], waves[0]), joined(waves[0], waves[1]), joined(waves[1], waves[1])
    old, new = RATE // 4, RATE * 251 // 1000
    assert ab[:old].tobytes() == aa[:old].tobytes()
    assert ab[new:].tobytes() == bb[new:].tobytes()
    assert np.isnan(ab[old:new]).all()  # between the last sample of the one and the first of the other
    assert not np.isnan(ab[: RATE // 2][np.r_[0:old, new : RATE // 2]]).any()


def test_a_lost_block_leaves_a_hole_of_its_length_and_no_more() -> None:
    messages = sound(tone(440), 48_000, itertools.repeat(960))  # of 20 ms each
    found = grids(microphone(), messages[:8] + messages[9:])
    holes = np.flatnonzero(np.isnan(found[:, 0]))
    assert holes.tolist() == list(range(8 * 320, 9 * 320))
    whole = grids(microphone(), messages)
    far = np.r_[0 : 8 * 320 - 20, 9 * 320 + 20 : len(whole)]
    assert found[far].tobytes() == whole[far].tobytes()


def test_a_step_waits_for_half_a_filter_and_not_for_ever() -> None:
    """Proven once samples stand a filter's half beyond the last point, or once none can come that near."""
    spec = microphone()
    messages = sound(tone(440), 48_000, itertools.repeat(48), 2 * HOP)  # of 1 ms each
    aligner = Aligner(AlignSpec(hop_ns=HOP, streams=(spec,)))
    reach = resample.reach_ns(48_000, RATE)
    last_point = 1599 * SECOND // RATE
    out = {m.header.seq: steps for m in messages if (steps := aligner.feed(m, m.header.t_receipt_ns))}
    (first, *_), (steps, *_) = out.keys(), out.values()
    assert [s.manifest.step for s in steps] == [1]
    last_sample = first * MS + 47 * MS // 48
    assert last_sample - MS < last_point + reach <= last_sample
    assert 0 < reach < 2 * MS
    assert [s.manifest.step for s in aligner.feed(beat("mic", len(messages), 3 * HOP), 2 * HOP)] == [2, 3]


LOST_MS = (0, 0, 0, 1, 5, 9, 10, 11, 60)


@settings(phases=PHASES)
@given(st.lists(st.tuples(st.integers(1, 20), st.sampled_from(LOST_MS)), max_size=40), st.integers(0, 10**6))
def test_band_limited_steps_do_not_depend_on_what_other_streams_say(blocks: list[tuple[int, int]], seed: int) -> None:
    """Small blocks of 1 kHz sound, some ms lost between them: what a filter rests on must be known, not guessed."""
    rule = Resample(500, 10 * MS, "band_limited")
    mic = StreamSpec(name="mic", payload="audio", channels=1, rule=rule, idle_ns=None)
    other = StreamSpec(name="other", payload="text", rule=All(), idle_ns=None)
    noise = np.random.default_rng(5).uniform(-0.9, 0.9, 2000)
    sounds: list[Message] = []
    t = 0
    for samples, lost in blocks:
        sounds.append(block(len(sounds), 1000, t, t + samples * MS, noise[t // MS :][:samples]))
        t += (samples + lost) * MS
    random = Random(seed)
    beats = [beat("other", 0, k * 37 * MS) for k in range(t // (37 * MS) + 2)]

    def steps(order: list[Message]) -> list[str]:
        spec = AlignSpec(hop_ns=HOP, streams=(mic, other), max_open=10**9)
        return [s.manifest.digest for s in run(Case(spec, event_time(order)))]

    def mixed() -> list[Message]:
        left = [list(sounds), list(beats)]
        return [random.choice([q for q in left if q]).pop(0) for _ in range(len(sounds) + len(beats))]

    assert steps(sounds + beats) == steps(beats + sounds) == steps(mixed()) == steps(mixed())


@pytest.mark.parametrize("days", [2.5, 7, 30, 3650])
@pytest.mark.parametrize("method", ["linear", "band_limited"])
def test_sound_is_the_same_however_long_the_session_is(days: float, method: Literal["linear", "band_limited"]) -> None:
    rule = Resample(48_000, 10 * MS, method)
    spec = AlignSpec(
        hop_ns=HOP, streams=(StreamSpec(name="mic", payload="audio", channels=1, rule=rule, idle_ns=None),)
    )
    noise = np.random.default_rng(2).uniform(-0.9, 0.9, 48_000)

    def steps(start_ns: int) -> list[bytes]:
        aligner, found = Aligner(spec, first_step=start_ns // HOP + 1), []
        for n in range(5):
            t = start_ns + n * HOP
            found += aligner.feed(block(n, 48_000, t, t + HOP, noise[n * 4800 : (n + 1) * 4800]), t + HOP)
        assert len(found) >= 4
        assert {step.manifest.streams["mic"].verdict for step in found} == {"ok"}
        return [step.grids["mic"].tobytes() for step in found]

    assert steps(round(days * 86_400) * SECOND) == steps(0)


def test_stereo_is_mixed_where_one_channel_is_asked() -> None:
    left, right = np.full(4800, 0.5), np.full(4800, -0.25)
    both = np.stack([left, right], axis=1).reshape(-1)
    messages = [block(n, 48_000, n * HOP, (n + 1) * HOP, both, channels=2) for n in range(4)]
    _, mixed = inner(grids(microphone(), messages))
    assert mixed == pytest.approx(0.125, abs=1e-6)
    kept = grids(microphone(channels=2), messages)[160:-160]
    assert kept == pytest.approx(np.tile([0.5, -0.25], (len(kept), 1)), abs=1e-6)


def test_linear_audio_is_the_samples_where_rates_agree() -> None:
    """16 kHz onto 16 kHz: 62.5 us are no whole number of ns, and the times still meet the grid's exactly."""
    spec = StreamSpec(name="mic", payload="audio", channels=1, rule=Resample(RATE, 10 * MS), idle_ns=None)
    pcm = np.random.default_rng(3).integers(-32768, 32768, 4800)
    messages = [
        block(n, RATE, n * HOP, (n + 1) * HOP, pcm[n * 1600 : (n + 1) * 1600] / 32768) for n in range(3)
    ]  # fmt: skip
    found = grids(spec, messages)
    assert np.array_equal(found[:, 0] * 32768, pcm[: len(found)])
    assert len(found) == 4800
