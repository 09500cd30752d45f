"""Device clocks mapped to the session clock, online and causally: when was the physical moment, and how sure are we?

Three clocks, one for each way in which a device can tell the time:

* ``Timebase``: the device stamps its data on a clock of its own; the host notes when it received them.
* ``SampleClock``: the device only counts samples (audio, many IMUs); samples that got lost are found and counted.
* ``LinkClock`` (``pipeline.linkclock``): another host's clock, probed by round trips.

Theory of operation of ``Timebase``
-----------------------------------
``t_receipt = offset + (1 + drift) t_device + minimum delay + one-sided delay``. The constant minimum delay cannot be
told from the offset by anybody and stays in the result. What is left is a line below the receipts
(``pipeline.envelope``), fitted over a sliding window of at most 48 blocks of equal length, whose lowest receipts alone
are kept. The window doubles its blocks while it grows, and stops growing where the slow wander of the drift would cost
more than further data gain. Arithmetic is exact: differences of stamps are taken as integers before anything becomes
a float, so that huge stamps lose no nanosecond.

========== ===================================== =============================================================
a sample    it means                              what is done
========== ===================================== =============================================================
on time     not before the line                   used; mapped by the line
late        far after the line                    mapped by the line, never used against it (delays are one-sided);
                                                  uncertainty covers the excess. If *every* sample of
                                                  ``confirm_ns`` was late, and as late at its end as at its start:
                                                  the device's clock lost time: new epoch
early       far before the line: no delay         held, mapped by its receipt. If three samples in a row are odd:
            can do that                           the device's clock gained time: new epoch. Else it was a bad stamp
backward    device time decreased                 the same: a restart, or one bad stamp
========== ===================================== =============================================================

A new epoch starts from the samples that proved it and keeps the drift as prior knowledge: the oscillator is the same.
Within an epoch the published times follow the line with corrections of at most ``SLEW_PPM``, so that mapped times of
increasing device times strictly increase. A correction that would take seconds to slew (the first samples of a stream
all came late) opens a new epoch instead: published times cannot be taken back.
"""

from __future__ import annotations

from collections import deque
from fractions import Fraction
from math import ceil, floor, hypot, inf, sqrt
from statistics import median
from typing import Literal

import msgspec
import numpy as np

from pipeline.envelope import MIN_BLOCKS, Line, Prior, fit_lower, fit_middle
from pipeline.linkclock import SLEW_PPM, LinkClock, LinkState, RoundTrip

__all__ = ["SLEW_PPM", "LinkClock", "LinkState", "Mapped", "MappedBlock", "RoundTrip", "SampleClock", "Timebase"]

_SLEW = SLEW_PPM * 1e-6
_MAX_BLOCKS = 48
_FIRST_BLOCK_NS = 20_000_000
_REFIT_GROWTH = 0.06
"""A fit is made anew when the window has grown or moved by this part of its length."""
_MIN_WINDOW_NS, _MAX_WINDOW_NS = 10e9, 90e9
_LONGEST_BLOCK_NS = 2e9
_STEP_NS = 4e6
"""A correction larger than this (eight seconds of slewing) opens a new epoch."""
_SETTLING_NS = 500_000_000
_ODD_IN_A_ROW = 3
_LATE_PAIRS, _LATE_ROUNDS = 1024, 5
_FIRST_UNCERTAINTY_NS = 50e6
_WANDER_MOST = 5e-6
_DRIFT_PRIOR, _DRIFT_PRIOR_AGAIN = 100e-6, 2e-6
_ADC_GAP_NS = 3_000_000
_TRUSTED_NS, _LONGEST_LOSS_NS = 1_000_000_000, 60e9
_STATED = 1.15
"""What the model's own 99 % bound is multiplied by: delays follow no model exactly."""


class Mapped(msgspec.Struct, frozen=True, gc=False):
    """One device time on the session clock. ``uncertainty_ns`` holds about 99 % of true errors, beside the constant
    minimum delay. ``new_epoch``: the clock jumped or restarted before this sample. Session time runs at
    ``1 + drift_ppm / 1e6`` of device time. ``residual_ns`` is this sample's own delay beyond the minimum."""

    t_capture_ns: int
    uncertainty_ns: int
    new_epoch: bool
    drift_ppm: float
    residual_ns: int


class MappedBlock(msgspec.Struct, frozen=True, gc=False):
    """A block of samples on the session clock: its first sample and one period after its last. ``lost``: samples that
    are now known to be missing before it. The rest is as in ``Mapped``."""

    t_capture_ns: int
    t_end_ns: int
    uncertainty_ns: int
    new_epoch: bool
    drift_ppm: float
    residual_ns: int
    lost: int


class Timebase:
    """Maps a device clock to the session clock. Pure: no clock is read, equal inputs give equal outputs.

    ``noise="delay"``: receipts come late by one-sided delays. ``noise="jitter"``: the second stamp is itself a
    measurement of the moment with two-sided errors (an ADC time), and the middle is fitted, not the edge.
    ``jump_ns``: the least step of a clock that is looked for; smaller ones are followed by slewing. ``confirm_ns``: for
    how long every sample must be late until that is a jump and not a delay. ``resolution_ns``: the tick of the device's
    stamps, which are cut down to whole ticks (1: exact); half a tick is added. ``wander_ppm_per_s``: how fast the drift
    itself is expected to change (ten degrees in ten minutes cost a plain crystal about 0.005).
    """

    def __init__(
        self,
        *,
        noise: Literal["delay", "jitter"] = "delay",
        jump_ns: int = 20_000_000,
        confirm_ns: int = 4_000_000_000,
        resolution_ns: int = 1,
        wander_ppm_per_s: float = 0.005,
    ) -> None:
        sizes_ok = jump_ns > 0 and resolution_ns > 0 and confirm_ns >= 0 and wander_ppm_per_s >= 0
        if noise not in ("delay", "jitter") or not sizes_ok:
            raise ValueError(
                f"a timebase was asked for with noise={noise!r}, jump_ns={jump_ns}, confirm_ns={confirm_ns}, "
                f"resolution_ns={resolution_ns}, wander_ppm_per_s={wander_ppm_per_s}; noise is 'delay' or 'jitter', "
                "jump_ns and resolution_ns are positive, the others are not negative"
            )
        self._jitter = noise == "jitter"
        self._jump, self._confirm, self._wander = float(jump_ns), confirm_ns, wander_ppm_per_s * 1e-15
        self._half_tick = resolution_ns // 2
        self._started = False
        self._slope, self._prior = 0.0, Prior(0.0, _DRIFT_PRIOR)
        self._line: Line | None = None
        self._dx, self._shown, self._last_ns = 0, 0.0, 0
        self._low = self._low_x = self._low_y = self._sum_x = self._sum_y = 0.0

    # -- the way of one sample ------------------------------------------------------------------------------------

    def update(self, t_device_ns: int, t_receipt_ns: int) -> Mapped:
        """Takes the next sample's stamps (int of any size; receipts in order) and maps its device time."""
        if not self._started:
            return self._restart([(t_device_ns, t_receipt_ns)])
        dx = t_device_ns - self._d0
        step = dx - self._dx
        y = t_receipt_ns - self._r0 - dx
        late = y - (self._value + self._slope * (dx - self._at))
        if step <= 0 or late < -self._early:
            return self._odd(t_device_ns, t_receipt_ns, step, late)
        if self._held:
            self._held.clear()
        if late <= self._late_limit:
            if self._late_pairs:
                self._late_pairs.clear()
                self._late_second, self._late_rounds = inf, 0
        elif self._is_late_jump(t_device_ns, t_receipt_ns, late):
            return self._jump_late()
        else:  # it says nothing about the line
            return self._publish(dx, late, False)
        self._typical += ((late if late < self._late_limit else self._late_limit) - self._typical) * 0.02
        # What follows is _take() in place: this is the one path that runs a thousand times a second.
        self._count += 1
        if late <= self._low:
            self._low, self._low_x, self._low_y = late, dx, y
        if self._jitter or self._line is None:
            self._take_rarer(dx, y)
        stepped = False
        if dx >= self._block_end or (late < -self._disproof and dx >= self._evidence_at):
            stepped = self._close_block(dx)
            late = y - (self._value + self._slope * (dx - self._at))
        return self._publish(dx, late, stepped)

    def _publish(self, dx: int, late: float, new_epoch: bool) -> Mapped:
        """The line's value at ``dx``, approached within the slew limit (or at once, in a new epoch)."""
        slope = self._slope
        target = self._value + slope * (dx - self._at)
        shown, doubt = target, self._bound
        if not new_epoch:
            step = dx - self._dx
            shown = self._shown + slope * step
            off, limit = target - shown, _SLEW * step
            if -limit <= off <= limit:
                shown = target
            else:
                shown += limit if off > 0 else -limit
                doubt += abs(target - shown)
        ns = dx + floor(shown + 0.5)
        if not new_epoch and ns <= self._last_ns:
            doubt += self._last_ns + 1 - ns
            ns = self._last_ns + 1
        self._shown, self._dx, self._last_ns = shown, dx, ns
        if len(self._late_pairs) >= _ODD_IN_A_ROW:
            doubt += max(self._late_least, 0.0)
        return Mapped(self._r0 + self._half_tick + ns, ceil(doubt), new_epoch, slope * 1e6, floor(late + 0.5))

    def _odd(self, t_device_ns: int, t_receipt_ns: int, step: int, late: float) -> Mapped:
        """A sample whose device stamp no delay explains: mapped by its receipt until the next ones tell why."""
        if step == 0:  # a coarse device clock gives one stamp to several samples
            self._last_ns += 1
            return self._map_apart(self._bound + (late if late > self._late_limit else 0.0), late)
        if self._held and t_device_ns <= self._held[-1][0]:
            self._held.clear()
        self._held.append((t_device_ns, t_receipt_ns))
        if len(self._held) == _ODD_IN_A_ROW:
            return self._restart(self._held)
        self._last_ns = max(self._last_ns + 1, t_receipt_ns - self._r0 - round(self._typical))
        return self._map_apart(self._bound + 4 * max(self._typical, 0.0) + self._jump, late)

    def _map_apart(self, doubt: float, late: float) -> Mapped:
        shown = self._r0 + self._half_tick + self._last_ns
        return Mapped(shown, ceil(doubt), False, self._slope * 1e6, round(late))

    # -- epochs ---------------------------------------------------------------------------------------------------

    def _restart(self, pairs: list[tuple[int, int]]) -> Mapped:
        """A new epoch proven by ``pairs``; the last of them is mapped."""
        self._open(pairs)
        late = pairs[-1][1] - self._r0 - self._dx - (self._value + self._slope * (self._dx - self._at))
        return self._publish(self._dx, late, True)

    def _open(self, pairs: list[tuple[int, int]]) -> None:
        """A fresh window whose origin is the first pair; the drift is kept as prior knowledge."""
        if self._line is not None:
            doubt = max(_DRIFT_PRIOR_AGAIN, 3 * sqrt(self._line.var_slope))
            self._prior = Prior(self._slope, min(doubt, _DRIFT_PRIOR))
        self._started, self._line = True, None
        self._d0, self._r0 = pairs[0]
        self._value, self._at = inf, 0.0
        self._bound = self._disproof = _FIRST_UNCERTAINTY_NS
        self._typical, self._span = 0.0, 0.0
        self._early, self._late_limit, self._late_least = inf, self._jump, 0.0
        self._held: list[tuple[int, int]] = []
        self._late_pairs: deque[tuple[int, int]] = deque(maxlen=_LATE_PAIRS)
        self._late_since, self._late_first, self._late_second, self._late_rounds = (0, 0), 0.0, inf, 0
        self._blocks: list[tuple[float, float, float]] = []
        self._length = _FIRST_BLOCK_NS
        self._block_end, self._evidence_at = self._length, self._length // 2
        self._refit_at, self._settled_at = 0.0, _SETTLING_NS
        self._clear_block()
        self._dx, self._shown, self._last_ns = 0, 0.0, 0
        for t_device_ns, t_receipt_ns in pairs:
            dx = t_device_ns - self._d0
            y = t_receipt_ns - self._r0 - dx
            self._take(dx, y, y - (self._value + self._slope * (dx - self._at)))
            if dx >= self._block_end:
                self._close_block(dx)
            self._dx = dx
        self._settled_at = _SETTLING_NS

    def _is_late_jump(self, t_device_ns: int, t_receipt_ns: int, late: float) -> bool:
        """Notes a late sample; True once lateness has lasted, and stood still, for long enough to be a jump."""
        pairs = self._late_pairs
        if not pairs:
            self._late_first = self._late_least = late
            self._late_since = (t_device_ns, t_receipt_ns)
        elif late < self._late_least:
            self._late_least = late
        pairs.append((t_device_ns, t_receipt_ns))
        # Device time must have passed too: a queue that drains after a stall is late for many samples, not for long.
        lasted = min(t_receipt_ns - self._late_since[1], t_device_ns - self._late_since[0])
        if 2 * lasted < self._confirm:
            self._late_first = self._late_least
            return False
        if self._late_second > late:
            self._late_second = late
        if lasted < self._confirm or len(pairs) < 2 * _ODD_IN_A_ROW:
            return False
        # A jump is as late at its end as at its start; delays come and go. (But whatever stays for five rounds is new.)
        self._late_rounds += 1
        steady = abs(self._late_second - self._late_first) < self._jump / 2 or self._late_rounds == _LATE_ROUNDS
        if not steady:
            self._late_since = (t_device_ns, t_receipt_ns)
            self._late_first = self._late_least = late
        self._late_second = inf
        return steady

    def _jump_late(self) -> Mapped:
        """The device's clock lost time: a new epoch from the latest of the late samples."""
        return self._restart(list(self._late_pairs))

    # -- the window -----------------------------------------------------------------------------------------------

    def _clear_block(self) -> None:
        self._count, self._low = 0, inf
        self._sum_x = self._sum_y = 0.0

    def _take(self, dx: int, y: float, late: float) -> None:
        """Adds a point to the open block."""
        self._count += 1
        if late <= self._low:
            self._low, self._low_x, self._low_y = late, dx, y
        self._take_rarer(dx, y)

    def _take_rarer(self, dx: int, y: float) -> None:
        """The rest of taking a point. Before the first fit the line goes through the earliest point so far."""
        self._sum_x += dx
        self._sum_y += y
        if self._line is None and y < self._value + self._slope * (dx - self._at):
            self._value, self._at = y, dx
            self._low, self._low_x, self._low_y = 0.0, dx, y

    def _close_block(self, dx: int) -> bool:
        """Ends the open block, fits where it is time to; True if the correction is too large to be slewed."""
        n, evidence = float(self._count), self._low < -self._disproof
        if self._jitter:
            self._blocks.append((self._sum_x / n, self._sum_y / n, n))
        else:
            self._blocks.append((self._low_x, self._low_y, n))
        self._clear_block()
        if len(self._blocks) > _MAX_BLOCKS and self._length < _LONGEST_BLOCK_NS:
            self._merge()
        elif len(self._blocks) > _MAX_BLOCKS:
            del self._blocks[0]
        self._block_end, self._evidence_at = dx + self._length, dx + self._length // 2
        if len(self._blocks) >= MIN_BLOCKS and (dx >= self._refit_at or evidence):
            self._fit(dx)
        if self._line is None:
            return False
        self._judge(self._line, dx)
        off = self._value + self._slope * (dx - self._at) - (self._shown + self._slope * (dx - self._dx))
        if dx < self._settled_at or abs(off) <= max(_STEP_NS, 2 * self._bound):
            return False
        self._settled_at = 2 * dx  # a stream that starts in a burst of delays improves many times: not an epoch each
        return True

    def _merge(self) -> None:
        """Blocks of twice the length: the lower of two points, or their mean."""
        old, self._blocks, self._length = self._blocks, [], 2 * self._length
        for (xa, ya, na), (xb, yb, nb) in zip(old[::2], old[1::2], strict=False):
            n = na + nb
            if self._jitter:
                self._blocks.append(((xa * na + xb * nb) / n, (ya * na + yb * nb) / n, n))
            elif ya - self._slope * xa <= yb - self._slope * xb:
                self._blocks.append((xa, ya, n))
            else:
                self._blocks.append((xb, yb, n))
        if len(old) % 2:
            self._blocks.append(old[-1])

    def _fit(self, dx: int) -> None:
        """Fits the window, then trims it to where the wander of the drift costs no more than the noise."""
        x, y, n = (np.array(v) for v in zip(*self._blocks, strict=True))
        # The fit sees deviations from the line of the moment, which are small, whatever the age of the epoch.
        fit = fit_middle if self._jitter else fit_lower
        prior = Prior(self._prior.slope - self._slope, self._prior.scale, -self._slope)
        value, slope = self._value + self._slope * (float(x[-1]) - self._at), self._slope
        line = fit(x - x[-1], y - value - slope * (x - x[-1]), n, prior)
        self._line = line._replace(at=float(x[-1]), value=line.value + value, slope=line.slope + slope)
        self._value, self._slope, self._at = self._line.value, self._line.slope, self._line.at
        self._mean_count = float(n.mean())
        span = float(x[-1] - x[0])
        self._refit_at = dx + _REFIT_GROWTH * min(span, _MAX_WINDOW_NS)
        self._span = span
        stale = int(np.searchsorted(x, x[-1] - 4 * _MAX_WINDOW_NS))
        del self._blocks[: min(stale, len(x) - MIN_BLOCKS)]  # after a long silence, or of a stream slower than this
        if len(self._blocks) > _MAX_BLOCKS // 2 and span > _MIN_WINDOW_NS:
            wander = self._wander * span**2 / 12
            if span > _MAX_WINDOW_NS or wander > sqrt(line.var_value):
                del self._blocks[: max(1, round(2 * _REFIT_GROWTH * len(x)))]

    def _judge(self, line: Line, dx: int) -> None:
        """The uncertainty at ``dx``, and the limits beyond which a sample is early or late."""
        ahead = dx - line.at
        spread = sqrt(line.var_value + max(2 * line.covariance * ahead, 0.0) + line.var_slope * ahead**2)
        noise = spread * line.bound99 / sqrt(line.var_value)
        span = self._span
        wander = min(self._wander * (span + ahead), _WANDER_MOST) * (span / 12 + ahead / 2)
        self._bound = _STATED * hypot(noise, 2 * wander, self._half_tick)
        self._early, self._disproof = max(self._jump, 4 * self._bound), self._bound
        if self._jitter:  # stamps lie on both sides of the line, and a single one far below it disproves nothing
            one = line.spread * sqrt(self._mean_count)
            self._early, self._disproof = max(self._early, 6 * one), max(self._bound, 4 * one)
        self._late_limit = self._early


class _Counted(Timebase):
    """A timebase whose device time is a count: time that the device seems to have lost is samples that got lost."""

    def __init__(self, period_ns: Fraction, noise: Literal["delay", "jitter"], jump_ns: int) -> None:
        jitter = noise == "jitter"
        super().__init__(noise=noise, jump_ns=jump_ns, confirm_ns=0 if jitter else 4_000_000_000)
        self._period = period_ns
        self.found = 0

    def _jump_late(self) -> Mapped:
        pairs = list(self._late_pairs)
        # A young line may itself be wrong, and after a long sleep the counter's life is over: new epochs, as elsewhere.
        if self._dx < _TRUSTED_NS or self._late_least > _LONGEST_LOSS_NS:
            return super()._jump_late()
        late = [r - d - (self._r0 - self._d0 + self._value + self._slope * (d - self._d0 - self._at)) for d, r in pairs]
        self.found = round(Fraction(median(late) if self._jitter else min(late)) / self._period)
        lost_ns = round(self.found * self._period)
        bound = self._bound + self._jump
        d0, r0, dx, shown, last = self._d0, self._r0, self._dx, self._shown, self._r0 + self._last_ns
        self._open([(d + lost_ns, r) for d, r in pairs])
        self._bound = self._disproof = min(self._bound, bound)
        # What is published goes on along its old line; the fit begins anew, so that rounding to samples bends nothing.
        forward = self._d0 + self._dx - d0 - dx
        self._shown = (r0 - d0) - (self._r0 - self._d0) + shown + self._slope * forward
        self._last_ns = last - self._r0
        late_now = pairs[-1][1] - self._r0 - self._dx - (self._value + self._slope * (self._dx - self._at))
        return self._publish(self._dx, late_now, False)


class SampleClock:
    """Maps a count of samples to the session clock: the device's time is the count times the nominal period.

    ``rate_hz`` is the nominal rate; the fit finds the true one. ``noise`` as in ``Timebase``: ``"jitter"`` where the
    driver gives an ADC time, ``"delay"`` where only the receipt is known. Samples that nobody delivered make time run
    ahead of the count: once that is sure (six blocks of an ADC time, four seconds of receipts) the count is corrected
    by whole samples, in the same epoch, and the fit goes on unbent.
    """

    def __init__(self, rate_hz: float | Fraction, *, noise: Literal["delay", "jitter"] = "delay") -> None:
        if not rate_hz > 0:
            raise ValueError(f"a sample clock was asked for with a rate of {rate_hz} Hz; a rate is positive")
        period = 1_000_000_000 / Fraction(rate_hz).limit_denominator(1_000_000)
        self._up, self._down = period.numerator, period.denominator
        jitter = noise == "jitter"
        self._base = _Counted(period, noise, jump_ns=_ADC_GAP_NS if jitter else 20_000_000)
        self._count, self._end = 0, 0

    def update(self, samples: int, t_ns: int, *, count: int | None = None) -> MappedBlock:
        """Takes the next block of ``samples`` samples.

        ``t_ns``: when its last sample had been taken, one period after it began (ADC time of the first sample plus the
        block's nominal length), or when the block was received. ``count``: the device's own number of the block's first
        sample, if it counts (unwrapped); else blocks follow each other, and losses are found from time alone.
        """
        if samples <= 0:
            raise ValueError(f"a block of {samples} samples has no time; a block holds at least one sample")
        skipped = 0 if count is None else count - self._count
        if count is not None:
            self._count = count
        self._count += samples
        mapped = self._base.update(self._count * self._up // self._down, t_ns)
        found, self._base.found = self._base.found, 0
        self._count += found
        start = self._end
        if mapped.new_epoch or found or skipped:
            start = mapped.t_capture_ns - round(samples * self._up / self._down * (1 + mapped.drift_ppm * 1e-6))
        if not mapped.new_epoch:
            start = max(start, self._end)
        self._end = mapped.t_capture_ns
        return MappedBlock(start, self._end, mapped.uncertainty_ns, mapped.new_epoch, mapped.drift_ppm,
                           mapped.residual_ns, found + max(skipped, 0))  # fmt: skip
