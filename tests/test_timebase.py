"""The timebase against simulated clocks whose truth is known, and its promises as properties.

The simulated clocks are those of benchmarks/clock.py (its head states every distribution); the benchmark runs 1000 of
them, this file a fraction.
"""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from fractions import Fraction
from types import ModuleType

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline.envelope import Prior, fit_lower, fit_middle
from pipeline.timebase import SLEW_PPM, LinkClock, Mapped, RoundTrip, SampleClock, Timebase
from tests.conftest import ROOT

MS, S = 1_000_000, 1_000_000_000


def _load_benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("clock_benchmark", ROOT / "benchmarks" / "clock.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["clock_benchmark"] = module
    spec.loader.exec_module(module)
    return module


benchmark = _load_benchmark()


def stream(
    seed: int,
    *,
    rate_hz: float = 100,
    seconds: float = 20,
    drift_ppm: float = 50.0,
    mean_ns: float = MS,
    change: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
) -> tuple[list[int], list[int], np.ndarray]:
    """Device stamps, receipts and true times (ns) of a stream; ``change`` edits (device, delay) given true times."""
    g = np.random.default_rng(seed)
    t = np.arange(int(rate_hz * seconds)) * (1e9 / rate_hz)
    device, delay = t * (1 - drift_ppm * 1e-6), g.exponential(mean_ns, len(t))
    if change is not None:
        device, delay = change(device, delay)
    receipt = np.maximum.accumulate(t + delay)
    return np.rint(device).astype(np.int64).tolist(), np.rint(receipt).astype(np.int64).tolist(), t


def run(device: list[int], receipt: list[int], base: Timebase | None = None) -> list[Mapped]:
    base = base or Timebase()
    return [base.update(d, r) for d, r in zip(device, receipt, strict=True)]


def errors(mapped: list[Mapped], truth: np.ndarray) -> np.ndarray:
    return np.abs(np.array([m.t_capture_ns for m in mapped]) - truth)


# -- accuracy ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    # Seeds chosen by their order alone; those of 1 kHz are left to the benchmark for the time that they take.
    cases = (benchmark.draw(seed) for seed in range(5000, 5030))
    return [benchmark.measure(case, lsl=False) for case in cases if case.rate_hz <= 200]


def test_one_millisecond_within_ten_seconds_of_the_last_jump(rows: list[dict]) -> None:
    assert len(rows) >= 15
    late = [r["seed"] for r in rows if r["worst_us"] > 1000]
    assert not late


def test_drift_within_one_ppm_after_a_minute(rows: list[dict]) -> None:
    possible = [r for r in rows if not r["beyond_limit"]]
    good = [r for r in possible if r["drift_60s_ppm"] <= 1]
    assert len(good) >= 0.95 * len(possible)


def test_the_stated_uncertainty_holds_and_is_not_padded(rows: list[dict]) -> None:
    error, bound = (np.concatenate([r[k] for r in rows]) for k in ("errors_us", "bounds_us"))
    assert np.mean(error <= bound) >= 0.975  # errors of one case move together: 40 cases are few
    assert np.median(bound) <= 12 * np.median(error)
    assert np.median(bound) < 100


def test_better_than_the_published_lsl_smoothing_on_the_same_series() -> None:
    cases = (benchmark.draw(seed) for seed in range(5000, 5016))
    measured = [benchmark.measure(case) for case in cases if case.rate_hz <= 50]
    assert len(measured) >= 4
    ours = np.median(np.concatenate([r["errors_us"] for r in measured]))
    theirs = np.median(np.concatenate([r["lsl_centred_us"] for r in measured]))
    assert ours < theirs


# -- promises ---------------------------------------------------------------------------------------------------------


def _by_epoch(device: list[int], mapped: list[Mapped]) -> list[list[tuple[int, Mapped]]]:
    epochs: list[list[tuple[int, Mapped]]] = []
    for d, m in zip(device, mapped, strict=True):
        if m.new_epoch:
            epochs.append([])
        epochs[-1].append((d, m))
    return epochs


steps = st.lists(st.integers(1, 50 * MS), min_size=2, max_size=300)


@given(steps, st.data())
@settings(max_examples=60)
def test_times_strictly_increase_and_corrections_slew(gaps: list[int], data: st.DataObject) -> None:
    delays = data.draw(st.lists(st.integers(0, 300 * MS), min_size=len(gaps), max_size=len(gaps)))
    device = list(itertools.accumulate(gaps))
    receipt = list(itertools.accumulate((d + e for d, e in zip(device, delays, strict=True)), max))
    mapped = run(device, receipt)
    for epoch in _by_epoch(device, mapped):
        for (d0, a), (d1, b) in itertools.pairwise(epoch):
            assert b.t_capture_ns > a.t_capture_ns
            nominal = (d1 - d0) * (1 + b.drift_ppm * 1e-6)
            assert abs(b.t_capture_ns - a.t_capture_ns - nominal) <= (d1 - d0) * SLEW_PPM * 1e-6 + 3


@given(st.integers(-(2**70), 2**70), st.integers(-(2**70), 2**70))
@settings(max_examples=15)
def test_huge_stamps_lose_no_nanosecond(device_offset: int, session_offset: int) -> None:
    device, receipt, _ = stream(3, seconds=4)
    near = run(device, receipt)
    far = run([d + device_offset for d in device], [r + session_offset for r in receipt])
    assert [m.t_capture_ns for m in far] == [m.t_capture_ns + session_offset for m in near]
    assert [m.uncertainty_ns for m in far] == [m.uncertainty_ns for m in near]


def test_an_epoch_of_weeks_stays_exact() -> None:
    # One sample an hour for a month, then the stream itself: the fit must not suffer from the age of its origin.
    month = 30 * 24 * 3600 * S
    device, receipt, truth = stream(4, seconds=30)
    base = Timebase()
    for hour in range(0, month, 3600 * S):
        base.update(round(hour * (1 - 50e-6)), hour + MS)
    mapped = run([round(month * (1 - 50e-6)) + d for d in device], [month + r for r in receipt], base)
    assert errors(mapped, truth + month)[-1] < 0.2 * MS


def test_equal_inputs_give_equal_outputs() -> None:
    device, receipt, _ = stream(5)
    assert run(device, receipt) == run(device, receipt)


@given(st.integers(0, 10_000), st.floats(0.05, 3.0), st.floats(0.03, 3.0), st.booleans())
@settings(max_examples=12)
def test_bursts_of_delays_are_no_jump(seed: int, length_s: float, delay_s: float, drains: bool) -> None:
    def burst(device: np.ndarray, delay: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inside = (device >= 8 * S) & (device < (8 + length_s) * S)
        delay[inside] += (8 + length_s) * S - device[inside] if drains else delay_s * S
        return device, delay

    device, receipt, truth = stream(seed, change=burst)
    mapped = run(device, receipt)
    assert sum(m.new_epoch for m in mapped[200:]) == 0
    assert errors(mapped, truth)[1000:].max() < 0.5 * MS


@given(st.integers(0, 10_000), st.sampled_from([-1, 1]), st.floats(0.1, 1000.0), st.sampled_from([25, 100]))
@settings(max_examples=12)
def test_a_jump_opens_one_epoch(seed: int, sign: int, size_s: float, rate_hz: int) -> None:
    def jump(device: np.ndarray, delay: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(device >= 8 * S, device + sign * size_s * S, device), delay

    device, receipt, truth = stream(seed, rate_hz=rate_hz, mean_ns=0.3 * MS, change=jump)
    mapped = run(device, receipt)
    opened = [truth[i] for i, m in enumerate(mapped) if m.new_epoch and i > 0]
    assert len(opened) == 1
    # The device's time going back over many samples, or forward, shows at once; a small loss of time looks like delay.
    assert 8 * S <= opened[0] <= 12.5 * S
    assert errors(mapped, truth)[truth >= 13 * S].max() < MS


def test_a_restart_opens_an_epoch_within_three_samples() -> None:
    def restart(device: np.ndarray, delay: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.where(device >= 8 * S, device - 8 * S, device), delay

    device, receipt, truth = stream(6, change=restart)
    mapped = run(device, receipt)
    first = next(i for i, m in enumerate(mapped) if m.new_epoch and i > 0)
    assert truth[first] - 8 * S <= 3 * 10 * MS
    # The drift is the oscillator's, and is known from before.
    assert abs(mapped[first + 50].drift_ppm - 50.0) < 1.0


def test_a_device_that_slept_opens_an_epoch() -> None:
    # Its clock stood still for 5 s while nothing was sent.
    device, receipt, _ = stream(7)
    cut = 800
    mapped = run(device, receipt[:cut] + [r + 5 * S for r in receipt[cut:]])
    opened = [i for i, m in enumerate(mapped) if m.new_epoch and i > 0]
    assert len(opened) == 1
    assert abs(mapped[-1].t_capture_ns - receipt[-1] - 5 * S) < 10 * MS


@given(st.integers(500, 1900), st.integers(-(10**15), 10**15).filter(lambda g: abs(g) > 30 * MS))
@settings(max_examples=12)
def test_one_bad_stamp_is_no_jump(index: int, glitch: int) -> None:
    device, receipt, truth = stream(8)
    device[index] += glitch
    mapped = run(device, receipt)
    assert sum(m.new_epoch for m in mapped) == 1
    kept = np.arange(len(truth)) != index
    assert errors(mapped, truth)[kept][500:].max() < 0.5 * MS
    # A stamp that is too low by seconds looks like a long delay, and the bound says so.
    assert abs(mapped[index].t_capture_ns - truth[index]) <= max(mapped[index].uncertainty_ns, abs(glitch) + MS)


@given(st.integers(0, 1000), st.floats(0.05, 0.6))
@settings(max_examples=10)
def test_lost_samples_never_bend_the_fit(seed: int, loss: float) -> None:
    device, receipt, truth = stream(seed, seconds=40)
    kept = np.random.default_rng(seed).random(len(device)) >= loss
    kept[1500:2500] = False  # and ten seconds of silence
    chosen = np.flatnonzero(kept).tolist()
    mapped = run([device[i] for i in chosen], [receipt[i] for i in chosen])
    # (In the first second a new epoch is no fault: the first samples may all have been late.)
    assert sum(m.new_epoch for m in mapped[200:]) == 0
    after = errors(mapped, truth[kept])[truth[kept] >= 10 * S]
    assert after.max() < 0.2 * MS
    assert abs(mapped[-1].drift_ppm - 50.0) < 1.5


def test_a_stream_that_starts_in_a_stall_recovers() -> None:
    def stall(device: np.ndarray, delay: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        delay += np.maximum(1.5 * S - device, 0)
        return device, delay

    device, receipt, truth = stream(9, rate_hz=400, change=stall)
    mapped = run(device, receipt)
    late = truth >= 10 * S
    assert errors(mapped, truth)[late].max() < 0.2 * MS
    assert sum(m.new_epoch for m in mapped) <= 8


def test_equal_stamps_get_increasing_times() -> None:
    base = Timebase(resolution_ns=10 * MS)
    mapped = [base.update(i // 5 * 10 * MS, i * 2 * MS) for i in range(2000)]
    times = [m.t_capture_ns for m in mapped]
    assert all(b > a for a, b in itertools.pairwise(times))
    assert mapped[-1].uncertainty_ns >= 5 * MS


def test_the_uncertainty_covers_a_clock_that_stands_still() -> None:
    base = Timebase(resolution_ns=10 * MS)
    for i in range(2000):
        base.update(i // 2 * 10 * MS, i * 5 * MS)
    still = [(i * 5 * MS, base.update(1000 * 10 * MS, i * 5 * MS)) for i in range(2000, 2600)]
    beyond_doubt = [(truth, mapped) for truth, mapped in still if mapped.residual_ns > 20 * MS]
    assert len(beyond_doubt) > 550
    assert all(abs(truth - mapped.t_capture_ns) <= mapped.uncertainty_ns for truth, mapped in beyond_doubt)


def test_stamps_without_any_jitter() -> None:
    mapped = run(list(range(0, 20 * S, 10 * MS)), list(range(MS, 20 * S + MS, 10 * MS)))
    assert abs(mapped[-1].t_capture_ns - (20 * S - 10 * MS + MS)) < 1000


@pytest.mark.parametrize("bad", [{"noise": "none"}, {"jump_ns": 0}, {"confirm_ns": -1}, {"resolution_ns": 0}])
def test_settings_are_checked(bad: dict) -> None:
    with pytest.raises(ValueError, match="a timebase was asked for"):
        Timebase(**bad)


# -- counted samples --------------------------------------------------------------------------------------------------


def _audio(noise: str, lost: int, seconds: int = 30, ppm: float = 30.0) -> tuple[list, np.ndarray]:
    """Blocks of 160 samples at 16 kHz, ``lost`` samples vanish at 15 s. Mapped blocks and their true ends."""
    g = np.random.default_rng(1)
    ends = (np.arange(1, seconds * 100 + 1) * 160).astype(float)
    ends[1500:] += lost
    truth = ends / 16000 * 1e9 * (1 + ppm * 1e-6) + 5 * S
    noisy = truth + (g.normal(0, 0.16 * MS, len(truth)) if noise == "jitter" else g.exponential(MS, len(truth)))
    clock = SampleClock(16000, noise=noise)
    return [clock.update(160, round(t)) for t in noisy], truth


@pytest.mark.parametrize(("noise", "found_within"), [("jitter", 0.1), ("delay", 4.5)])
@pytest.mark.parametrize("lost", [1600, 12_224])
def test_a_gap_between_count_and_time_is_lost_samples(noise: str, found_within: float, lost: int) -> None:
    blocks, truth = _audio(noise, lost)
    found = [(i, b.lost) for i, b in enumerate(blocks) if b.lost]
    assert len(found) == 1
    assert abs(found[0][1] - lost) <= 0.0003 * 16000
    assert 15.0 <= found[0][0] / 100 <= 15.0 + found_within
    assert sum(b.new_epoch for b in blocks[200:]) == 0
    off = np.abs(np.array([b.t_end_ns for b in blocks]) - truth)
    assert off[1000:1500].max() < 0.3 * MS
    assert off[2000:].max() < 0.3 * MS
    assert abs(blocks[-1].drift_ppm - 30) < 3


def test_blocks_never_overlap_and_join_without_a_seam() -> None:
    blocks, _ = _audio("jitter", 0)
    for a, b in itertools.pairwise(blocks):
        assert b.t_capture_ns == a.t_end_ns or b.new_epoch
        assert b.t_end_ns > b.t_capture_ns


def test_a_device_that_counts_tells_its_own_losses() -> None:
    clock = SampleClock(Fraction(1000), noise="delay")
    lost, end = 0, 0
    for i in range(3000):
        block = clock.update(1, (i + (50 if i >= 2000 else 0) + 1) * MS, count=i + (50 if i >= 2000 else 0))
        lost += block.lost
        assert block.t_capture_ns >= end
        end = block.t_end_ns
        assert not block.new_epoch or i == 0
    assert lost == 50


def test_a_nominal_rate_that_is_two_percent_off_is_found() -> None:
    clock = SampleClock(100, noise="delay")
    g = np.random.default_rng(2)
    ends = np.arange(1, 6001) * 1e7 * 1.02
    block = [clock.update(1, round(t + g.exponential(MS))) for t in ends][-1]
    assert abs(block.drift_ppm - 20_000) < 20
    assert abs(block.t_end_ns - ends[-1]) < 0.3 * MS


@pytest.mark.parametrize("call", [lambda: SampleClock(0), lambda: SampleClock(100).update(0, 0)])
def test_sample_clock_settings_are_checked(call: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        call()


# -- between hosts ----------------------------------------------------------------------------------------------------


def _burst(g: np.random.Generator, at: int, offset: Callable[[int], int], probes: int = 8) -> list[RoundTrip]:
    trips = []
    for i in range(probes):
        sent = at + i * 5 * MS
        there = sent + 200_000 + int(g.exponential(400_000))
        left = there + 20_000
        trips.append(
            RoundTrip(sent, there + offset(there), left + offset(left), left + 200_000 + int(g.exponential(4e5)))
        )
    return trips


@given(st.integers(0, 10_000), st.integers(-(2**60), 2**60), st.floats(-200, 200))
@example(91, 0, 0.0)  # two bursts whose ways were held up in opposite directions
@settings(max_examples=20)
def test_a_link_follows_the_other_clock_within_its_bound(seed: int, offset: int, drift_ppm: float) -> None:
    g = np.random.default_rng(seed)

    def true(t: int) -> int:
        return offset + round(t * drift_ppm * 1e-6)

    link = LinkClock()
    for k in range(60):
        assert link.update(_burst(g, k * S, true)) == (k == 0)
        state = link.at(k * S + S)
        assert abs(state.offset_ns - true(k * S + S)) <= state.uncertainty_ns
    assert abs(state.drift_ppm - drift_ppm) < 3
    assert state.uncertainty_ns < 0.5 * MS
    assert link.at(660 * S).uncertainty_ns > link.at(61 * S).uncertainty_ns
    local, _ = link.to_local_ns(60 * S + true(60 * S))
    assert abs(local - 60 * S) < 0.3 * MS


def test_a_set_remote_clock_is_a_new_epoch_and_one_bad_burst_is_not() -> None:
    g = np.random.default_rng(3)
    link = LinkClock()
    for k in range(10):
        link.update(_burst(g, k * S, lambda t: 7 * S))
    assert not link.update(_burst(g, 10 * S, lambda t: 9 * S))
    assert not link.update(_burst(g, 11 * S, lambda t: 7 * S))
    assert [link.update(_burst(g, k * S, lambda t: 9 * S)) for k in (12, 13, 14)] == [False, True, False]
    assert abs(link.at(14 * S).offset_ns - 9 * S) < 0.5 * MS


def test_a_link_says_what_it_cannot_answer() -> None:
    with pytest.raises(ValueError, match="not been probed"):
        LinkClock().at(0)
    with pytest.raises(ValueError, match="not been probed"):
        LinkClock().to_local_ns(0)
    with pytest.raises(ValueError, match="round trip"):
        LinkClock().update([RoundTrip(10, 5, 50, 11)])


# -- the fits ---------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.sampled_from([1.0, 2.0, 3.0]), st.floats(-1e-4, 1e-4))
@settings(max_examples=30)
def test_the_lower_edge_is_found_for_any_shape_of_delays(seed: int, shape: float, slope: float) -> None:
    g = np.random.default_rng(seed)
    x = np.arange(48) * 1e9
    y = slope * x + g.gamma(shape, MS / shape, (48, 20)).min(axis=1)
    line = fit_lower(x, y, np.full(48, 20.0), Prior(0.0, 1e-4))
    assert abs(line.value - slope * x[-1]) < 5 * max(line.bound99, 1000)
    assert abs(line.slope - slope) < 12 * line.var_slope**0.5


def test_the_middle_is_found() -> None:
    g = np.random.default_rng(4)
    x = np.arange(48) * 1e9
    line = fit_middle(x, 3e-5 * x + g.normal(0, 1e5, 48), np.full(48, 10.0), Prior(0.0, 1e-4))
    assert abs(line.value - 3e-5 * x[-1]) < line.bound99 * 1.5
    assert abs(line.slope - 3e-5) < 5e-6


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_no_uncertainty_is_negative_however_a_reader_stalls(seed: int) -> None:
    """A reader that stalls and then takes whole queues at once makes samples early and late; one whose uncertainty
    is negative would be refused by everybody."""
    random, clock = np.random.default_rng(seed), SampleClock(200)
    now, taken = 0, 0
    for _ in range(300):
        now += int(random.exponential(10e6 if random.random() < 0.9 else 300e6)) + 1
        while taken + 2 <= (there := now // 5_000_000):
            more = 2 if random.random() < 0.5 else int(min(there - taken, 2 + random.integers(0, 40)))
            taken += more
            block = clock.update(more, now + int(random.exponential(1e6)))
            assert block.uncertainty_ns >= 0
            assert block.t_capture_ns <= block.t_end_ns
