"""How well and how fast ``pipeline.timebase`` maps device clocks, on simulated clocks whose truth is known.

    python benchmarks/clock.py [--cases 1000] [--first 0] [--pylsl 5] [--json]

Each case is drawn from its seed: a stream of 25 to 1000 Hz over 75 s (after its jump, if it has one); an offset of up
to 2^60 ns; a drift within +-200 ppm that swings by up to +-2 ppm in 10 to 30 minutes; no loss or 30 %; in 40 % of the
cases a jump of the device's clock by 0.05 to 10 s, either way. Receipts keep their order (a late sample holds up those
behind it). Device stamps are cut to ticks of 1, 10 or 100 us; ``--exact`` leaves them whole. Delays beyond a constant
minimum of up to 20 ms, of mean 0.1 to 3.2 ms:

    exponential; gamma (shape 1 to 3); bursts (exponential, and about every 15 s a burst of 0.2 to 2 s, as a stall whose
    queue then drains, or with 20 to 500 ms more for each sample); spikes (exponential, and one sample in 5 s delayed
    by 100 to 800 ms).

An error is the mapped time less the true one less the minimum delay, which nobody can observe. Errors are taken at 200
moments of each case from 10 s after its last jump on, drift errors after 60 s. "limit" counts the cases whose drift no
estimator could have known to 1 ppm with 99 % (Cramer-Rao bound, gamma delays of shape above 2, where one exists).

Beside it, on the same receipts, the dejittering of Lab Streaming Layer: recursive least squares of stamps against the
sample count that forget with a half-time of 90 s (liblsl, src/time_postprocessor.cpp, ``postproc_dejitterer``). It has
no device stamps, so that a jump of the device's clock does not touch it, and it follows the mean delay and not the
least, so that it is given its best constant in hindsight ("centred"). Its home ground are the "calm" cases: no loss,
no bursts, no spikes. "LSL algorithm" is our implementation of the
published one; the first ``--pylsl`` cases also run through the real one (pylsl, outlet to inlet in this process, the
receipts pushed as explicit stamps), and the largest difference between both is printed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.timebase import Mapped, Timebase

Array = np.ndarray[Any, Any]
RATES_HZ = (25, 30, 50, 100, 200, 400, 1000)
MODELS = ("exponential", "gamma", "bursts", "spikes")
TICKS_NS = (1_000, 10_000, 100_000)
AFTER_JUMP_S = 75.0
MOMENTS = 200


@dataclass(frozen=True)
class Case:
    """One simulated stream: stamps as the host sees them, and the truth. All arrays [samples], times in ns."""

    seed: int
    rate_hz: int
    model: str
    shape: float
    mean_delay_ns: float
    loss: float
    jump_s: float  # 0: none
    tick_ns: int
    device_ns: Array
    receipt_ns: Array
    truth_ns: Array  # capture plus the minimum delay, on the session clock
    drift_ppm: Array  # of session time against device time


def draw(seed: int, exact: bool = False) -> Case:
    """The case of a seed."""
    g = np.random.default_rng(seed)
    rate, model = int(g.choice(RATES_HZ)), str(g.choice(MODELS))
    loss, jump = float(g.choice([0.0, 0.3])), g.random() < 0.4
    mean, shape = 10 ** g.uniform(-1, 0.5) * 1e6, float(g.uniform(1, 3)) if model == "gamma" else 1.0
    tick = 1 if exact else int(g.choice(TICKS_NS))
    jump_s = float(g.uniform(5, 30)) if jump else 0.0
    seconds = AFTER_JUMP_S + jump_s
    t = np.arange(int(seconds * rate)) * (1e9 / rate)
    fast_ppm, swing, period = g.uniform(-200, 200), g.uniform(0, 2), g.uniform(600, 1800)
    turn, phase = 2 * np.pi / period / 1e9, g.uniform(0, 2 * np.pi)
    gained = 1e-6 * (fast_ppm * t + swing * (np.cos(phase) - np.cos(turn * t + phase)) / turn)
    fast = 1e-6 * (fast_ppm + swing * np.sin(turn * t + phase))
    receipt = np.maximum.accumulate(t + _delays(g, model, shape, mean, rate, seconds, t))
    jumped = np.where(t >= jump_s * 1e9, g.choice([-1, 1]) * 10 ** g.uniform(np.log10(0.05), 1) * 1e9, 0) if jump else 0
    offset, least = int(g.integers(-(2**60), 2**60)), int(g.uniform(0, 20e6))
    device = np.floor((t + gained + jumped) / tick).astype(np.int64) * tick + offset // tick * tick
    kept = g.random(len(t)) >= loss
    received = np.rint(receipt + least).astype(np.int64)
    return Case(
        seed, rate, model, shape, mean, loss, jump_s, tick, device[kept], received[kept],
        (t + least)[kept], (1e6 * (1 / (1 + fast) - 1))[kept],
    )  # fmt: skip


def _delays(
    g: np.random.Generator, model: str, shape: float, mean: float, rate: int, seconds: float, t: Array
) -> Array:
    delay: Array = g.gamma(shape, mean / shape, len(t))
    if model == "spikes":
        delay += np.where(g.random(len(t)) < 0.2 / rate, g.uniform(1e8, 8e8, len(t)), 0)
    if model == "bursts":
        for _ in range(g.poisson(seconds / 15)):
            start, length = g.uniform(0, seconds) * 1e9, g.uniform(0.2, 2) * 1e9
            inside = (t >= start) & (t < start + length)
            if g.random() < 0.5:
                delay[inside] += start + length - t[inside]
            else:
                delay[inside] += g.uniform(20e6, 5e8) + g.exponential(2e7, int(inside.sum()))
    return delay


def lsl_dejitter(stamps_s: Sequence[float], rate_hz: float, halftime_s: float = 90.0) -> list[float]:
    """Lab Streaming Layer's published smoothing, our implementation: see the file's head."""
    w0, w1, lam = 0.0, 1 / rate_hz, 2 ** (-1 / (rate_hz * halftime_s))
    p00, p01, p11, base, out = 1e10, 0.0, 1e10, float(int(stamps_s[0])), []
    for i, stamp in enumerate(stamps_s):
        pi0, pi1 = p00 + i * p01, p01 + i * p11
        error, gain = stamp - base - (w0 + i * w1), 1 / (lam + pi0 + pi1 * i)
        p00, p01, p11 = (p00 - pi0 * pi0 * gain) / lam, (p01 - pi0 * pi1 * gain) / lam, (p11 - pi1 * pi1 * gain) / lam
        w0 += error * (p00 + p01 * i)
        w1 += error * (p01 + p11 * i)
        out.append(w0 + i * w1 + base)
    return out


def pylsl_dejitter(stamps_s: Sequence[float], rate_hz: float, name: str) -> list[float]:
    """The same by liblsl itself: pushed with explicit stamps, pulled with its dejittering switched on."""
    import pylsl

    info = pylsl.StreamInfo(name, "clock", 1, rate_hz, "float32", name)
    outlet = pylsl.StreamOutlet(info, max_buffered=3600)
    found = pylsl.resolve_byprop("source_id", name, timeout=20)
    if not found:
        raise RuntimeError(f"liblsl did not find its own stream {name!r} on this machine within 20 s")
    inlet = pylsl.StreamInlet(found[0], max_buflen=3600, processing_flags=pylsl.proc_dejitter)
    inlet.open_stream(timeout=20)
    outlet.wait_for_consumers(20)
    out: list[float] = []
    for start in range(0, len(stamps_s), 500):
        part = list(stamps_s[start : start + 500])
        for stamp in part:
            outlet.push_sample([0.0], stamp)
        while len(out) < start + len(part):
            got = inlet.pull_chunk(timeout=5.0, max_samples=start + len(part) - len(out))[1]
            if not got:
                raise RuntimeError(f"liblsl delivered {len(out)} of {len(stamps_s)} samples")
            out.extend(got)
    inlet.close_stream()
    return out


def run_case(case: Case) -> tuple[list[Mapped], float]:
    """Every sample mapped, and the CPU time in s that it took."""
    base = Timebase(resolution_ns=case.tick_ns)
    pairs = list(zip(case.device_ns.tolist(), case.receipt_ns.tolist(), strict=True))
    start = time.process_time()
    mapped = [base.update(d, r) for d, r in pairs]
    return mapped, time.process_time() - start


def measure(case: Case, lsl: bool = True) -> dict[str, Any]:
    """One case's row: settings, errors in us at the moments (10 s and later), bounds, drift errors, epochs, cost."""
    mapped, cpu_s = run_case(case)
    since = case.truth_ns - case.truth_ns[0] - case.jump_s * 1e9
    error = (np.array([m.t_capture_ns for m in mapped]) - case.truth_ns) / 1e3
    bound = np.array([m.uncertainty_ns for m in mapped]) / 1e3
    drift = np.abs(np.array([m.drift_ppm for m in mapped]) - case.drift_ppm)
    i10, i60 = (int(np.searchsorted(since, s * 1e9)) for s in (10, 60))
    at = np.linspace(i10, len(since) - 1, MOMENTS).astype(int)
    row = {
        "seed": case.seed, "rate_hz": case.rate_hz, "model": case.model, "loss": case.loss, "jump_s": case.jump_s,
        "tick_ns": case.tick_ns, "mean_delay_ms": case.mean_delay_ns / 1e6, "shape": case.shape,
        "error_10s_us": float(abs(error[i10])), "error_60s_us": float(abs(error[i60])),
        "worst_us": float(np.abs(error[i10:]).max()), "drift_60s_ppm": float(drift[i60]),
        "epochs": int(sum(m.new_epoch for m in mapped)) - (case.jump_s > 0), "us_per_update": cpu_s / len(mapped) * 1e6,
        "beyond_limit": _beyond_limit(case, i60), "errors_us": np.abs(error[at]), "bounds_us": bound[at],
    }  # fmt: skip
    if lsl:
        theirs = (np.array(lsl_dejitter((case.receipt_ns / 1e9).tolist(), case.rate_hz)) * 1e9 - case.truth_ns) / 1e3
        row["lsl_us"], row["lsl_centred_us"] = np.abs(theirs[at]), np.abs(theirs[at] - np.median(theirs[at]))
        row["lsl_worst_us"] = float(np.abs(theirs[i10:] - np.median(theirs[at])).max())
    return row


def _beyond_limit(case: Case, i60: int) -> bool:
    if case.model != "gamma" or case.shape <= 2:
        return False
    scale, n = case.mean_delay_ns / case.shape, case.rate_hz * 60 * (1 - case.loss)
    sd_ppm = scale * np.sqrt((case.shape - 2) * 12 / n) / 60e9 * 1e6
    return bool(2.576 * sd_ppm > 1.0)


def summarise(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """One line of the table over some cases."""
    errors, bounds = (np.concatenate([r[k] for r in rows]) for k in ("errors_us", "bounds_us"))

    def pair(key: str) -> tuple[float, float]:
        values = [r[key] for r in rows]
        return float(np.median(values)), float(np.percentile(values, 99))

    out = {
        "cases": name, "n": len(rows), "error_10s_us": pair("error_10s_us"), "error_60s_us": pair("error_60s_us"),
        "within_1ms_from_10s": float(np.mean([r["worst_us"] <= 1000 for r in rows])),
        "drift_60s_ppm": pair("drift_60s_ppm"),
        "drift_within_1ppm": float(np.mean([r["drift_60s_ppm"] <= 1 for r in rows])),
        "limit": sum(r["beyond_limit"] for r in rows), "coverage": float(np.mean(errors <= bounds)),
        "median_error_us": float(np.median(errors)), "median_bound_us": float(np.median(bounds)),
        "ratio": float(np.median(bounds) / np.median(errors)),
        "ratio_by_case": float(np.median([np.median(r["bounds_us"]) / np.median(r["errors_us"]) for r in rows])),
        "one_epoch": float(np.mean([r["epochs"] == 1 for r in rows])),
    }  # fmt: skip
    if "lsl_us" in rows[0]:
        theirs = np.concatenate([r["lsl_centred_us"] for r in rows])
        out["lsl_us"] = float(np.median(np.concatenate([r["lsl_us"] for r in rows])))
        out["lsl_centred_us"] = (float(np.median(theirs)), float(np.percentile(theirs, 99)))
        out["lsl_within_1ms"] = float(np.mean([r["lsl_worst_us"] <= 1000 for r in rows]))
        out["times_better_than_lsl"] = float(np.median(theirs) / np.median(errors))
    return out


def groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table: all cases, then by delay model, by rate, by loss, by jump and by tick."""
    cuts: list[tuple[str, Callable[[dict[str, Any]], bool]]] = [("all", lambda r: True)]
    cuts += [(m, lambda r, m=m: r["model"] == m) for m in MODELS]  # type: ignore[misc]
    cuts += [(f"{h} Hz", lambda r, h=h: r["rate_hz"] == h) for h in RATES_HZ]  # type: ignore[misc]
    cuts += [("no loss", lambda r: r["loss"] == 0), ("30 % loss", lambda r: r["loss"] > 0)]
    cuts += [("calm", lambda r: r["loss"] == 0 and r["model"] in ("exponential", "gamma"))]  # LSL's home ground
    cuts += [("no jump", lambda r: r["jump_s"] == 0), ("a jump", lambda r: r["jump_s"] > 0)]
    cuts += [(f"tick {k // 1000} us", lambda r, k=k: r["tick_ns"] == k) for k in TICKS_NS]  # type: ignore[misc]
    return [summarise(chosen, name) for name, cut in cuts if (chosen := [r for r in rows if cut(r)])]


def show(table: list[dict[str, Any]]) -> None:
    print(f"{'':12}{'n':>5}{'error at 10 s':>17}{'at 60 s':>15}{'<1 ms':>7}{'drift 60 s':>13}{'<1 ppm':>7}{'limit':>6}"
          f"{'inside':>8}{'ratio':>6}{'by case':>8}{'1 epoch':>8}"
          f" | {'LSL':>7}{'centred':>16}{'<1 ms':>7}{'x':>7}")  # fmt: skip
    print(f"{'':17}{'median, p99 us':>17}{'us':>15}{'':7}{'ppm':>13}{'':42} | {'us':>7}{'median, p99 us':>16}")
    for r in table:
        line = (
            f"{r['cases']:12}{r['n']:5}{r['error_10s_us'][0]:8.1f}{r['error_10s_us'][1]:9.0f}"
            f"{r['error_60s_us'][0]:7.1f}{r['error_60s_us'][1]:8.0f}{r['within_1ms_from_10s']:7.3f}"
            f"{r['drift_60s_ppm'][0]:6.2f}{r['drift_60s_ppm'][1]:7.2f}{r['drift_within_1ppm']:7.3f}{r['limit']:6}"
            f"{r['coverage']:8.4f}{r['ratio']:6.2f}{r['ratio_by_case']:8.2f}{r['one_epoch']:8.2f}"
        )
        if "lsl_us" in r:
            line += f" | {r['lsl_us']:7.0f}{r['lsl_centred_us'][0]:7.0f}{r['lsl_centred_us'][1]:9.0f}"
            line += f"{r['lsl_within_1ms']:7.3f}{r['times_better_than_lsl']:7.1f}"
        print(line)


def against_pylsl(cases: list[Case]) -> float:
    """The largest difference in us between liblsl's stamps and our implementation's."""
    worst = 0.0
    for case in cases:
        stamps = (case.receipt_ns / 1e9 + 1.0).tolist()  # liblsl reads a stamp of 0 as "now"
        theirs = pylsl_dejitter(stamps, case.rate_hz, f"clock-{case.seed}")
        worst = max(worst, float(np.abs(np.array(theirs) - lsl_dejitter(stamps, case.rate_hz)).max()) * 1e6)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--exact", action="store_true", help="device stamps are not cut to ticks")
    parser.add_argument("--no-lsl", action="store_true")
    parser.add_argument("--pylsl", type=int, default=0, help="how many cases run through the real liblsl as well")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seeds = range(args.first, args.first + args.cases)
    rows = [measure(draw(seed, args.exact), lsl=not args.no_lsl) for seed in seeds]
    table = groups(rows)
    fast = [r["us_per_update"] for r in rows if r["rate_hz"] == 1000]
    cost = float(np.median(fast)) if fast else None
    differs = against_pylsl([draw(seed, args.exact) for seed in seeds[: args.pylsl]]) if args.pylsl else None
    if args.json:
        print(json.dumps({"table": table, "us_per_update_1khz": cost, "pylsl_differs_us": differs}, indent=1))
        return
    show(table)
    if cost is not None:
        print(f"cost: {cost:.1f} us an update at 1 kHz (median of cases, fits included)")
    if differs is not None:
        print(f"liblsl itself and our implementation of its algorithm differ by at most {differs:.3g} us")


if __name__ == "__main__":
    main()
