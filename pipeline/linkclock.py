"""The clock of another host, from round trips. Pure: probes come in, offsets with their uncertainty come out.

The one-sided delays of ``pipeline.timebase`` cannot be told from an offset; a round trip can bound them: whatever the
paths did, the true offset lies within half of what the round trip took.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from math import ceil, sqrt
from typing import NamedTuple

import msgspec
import numpy as np

from pipeline.envelope import Line, Prior, weigh_line

_MAX_BURSTS = 32
_PROBE_NOISE_NS = 1000.0
SLEW_PPM = 500
"""Published times leave the fitted drift by at most this much to follow a correction."""


class RoundTrip(NamedTuple):
    """One probe of another host's clock: sent (local clock), received and sent back (remote), received (local)."""

    sent_ns: int
    remote_received_ns: int
    remote_sent_ns: int
    received_ns: int


class LinkState(msgspec.Struct, frozen=True, gc=False):
    """Remote clock less local clock at a moment. ``uncertainty_ns``: half the best round trip, which bounds what an
    asymmetric path can hide, plus the fit's own doubt, which grows with time since the last burst."""

    offset_ns: int
    uncertainty_ns: int
    drift_ppm: float


class LinkClock:
    """Another host's clock from bursts of round trips: of each burst the fastest probe counts, a line is fitted through
    the last 32 of these, each weighted by how far its round trip exceeds the best one.

    A probe is a proof: the true offset lies within half its round trip (less the remote's own time). Two bursts in a
    row whose proofs exclude the line mean that a clock was set or restarted: the line starts anew.
    """

    def __init__(self, *, drift_ppm: float = 100.0, wander_ppm_per_s: float = 0.005) -> None:
        self._prior = Prior(0.0, drift_ppm * 1e-6)
        self._wander = wander_ppm_per_s * 1e-15
        self._best: deque[tuple[int, int, int]] = deque(maxlen=_MAX_BURSTS)  # local time, offset, half round trip
        self._excluded = 0
        self._line: Line | None = None

    def update(self, burst: Sequence[RoundTrip]) -> bool:
        """Takes a burst of probes; True if it opens a new epoch. Probes with a negative round trip are refused."""
        taken = [_measure(trip) for trip in burst]
        taken = [m for m in taken if m[2] >= 0]
        if not taken:
            raise ValueError("a burst holds no probe with a round trip of at least 0 ns; check the order of its stamps")
        at, offset, half = min(taken, key=lambda m: m[2])
        new = not self._best
        if not new:
            state = self.at(at)
            # Neither bound can be wrong by more than itself: outside both, one of the clocks was set.
            self._excluded = self._excluded + 1 if abs(offset - state.offset_ns) > half + state.uncertainty_ns else 0
            if self._excluded == 1:
                return False
            if self._excluded > 1:
                self._best.clear()
                new = True
        self._excluded = 0
        self._best.append((at, offset, half))
        self._fit()
        return new

    def at(self, t_local_ns: int) -> LinkState:
        """The offset at a local time (before, between or after the bursts). ValueError before the first burst."""
        if self._line is None:
            raise ValueError("the other host's clock has not been probed yet; feed update() a burst of probes first")
        at0, offset0, _ = self._best[-1]
        line, ahead = self._line, t_local_ns - at0
        offset = line.value + line.slope * ahead
        doubt = sqrt(max(line.var_value + 2 * line.covariance * ahead + line.var_slope * ahead**2, 0.0))
        span = at0 - self._best[0][0]
        wander = self._wander * (span**2 / 12 + abs(ahead) * (span + abs(ahead)) / 2)
        least = min(half for _, _, half in self._best)
        # The fit takes the best round trip for the path's own. Of few bursts it is not, and what each hides of its own
        # tilts the line, by twice the least half at worst; the least of n comes nearer to the path's own as 1 / n.
        tilt = 2 * least * abs(ahead) / (span * (len(self._best) - 1)) if span else 0.0
        uncertainty = least + 2.6 * doubt + wander + tilt
        return LinkState(offset0 + round(offset), ceil(uncertainty), line.slope * 1e6)

    def to_local_ns(self, t_remote_ns: int) -> tuple[int, int]:
        """A remote time on the local clock, and its uncertainty in ns."""
        local = t_remote_ns - self.at(self._best[-1][0]).offset_ns if self._line else t_remote_ns
        state = self.at(local)
        return t_remote_ns - state.offset_ns, state.uncertainty_ns

    def _fit(self) -> None:
        at0, offset0, _ = self._best[-1]
        x = np.array([float(at - at0) for at, _, _ in self._best])
        y = np.array([float(offset - offset0) for _, offset, _ in self._best])
        half = np.array([float(h) for _, _, h in self._best])
        # A round trip longer than the best by 2 e was delayed by 2 e on one way, the other or both: wrong by e at most.
        variance = (half - half.min()) ** 2 / 3 + (0.05 * half.min()) ** 2 + _PROBE_NOISE_NS**2
        if len(x) == 1:
            self._line = Line(0.0, 0.0, 0.0, variance[0], 0.0, self._prior.scale**2, 0.0, 0.0)
            return
        self._line = weigh_line(x, y, variance, self._prior)


def _measure(trip: RoundTrip) -> tuple[int, int, int]:
    """A probe's middle on the local clock, the offset there, and half its round trip (rounded up); all ns."""
    out, back = trip.remote_received_ns - trip.sent_ns, trip.remote_sent_ns - trip.received_ns
    round_trip = (trip.received_ns - trip.sent_ns) - (trip.remote_sent_ns - trip.remote_received_ns)
    return (trip.sent_ns + trip.received_ns) // 2, (out + back) // 2, -(-round_trip // 2)


class Steered:
    """Local times on another host's clock, along a line that never jumps: what a ``LinkClock`` learns is slewed in at
    ``SLEW_PPM``, so that order stays and distances keep to within that. What was mapped once is mapped the same ever
    after (32 bursts back). ``jump`` lays the line anew, for a new epoch."""

    def __init__(self) -> None:
        self._knots: deque[tuple[int, int, float]] = deque(maxlen=2 * _MAX_BURSTS)  # local time, offset, slope from it
        self._mapped_ns = -(1 << 62)  # nothing up to here may change any more

    def jump(self, now_ns: int, state: LinkState) -> None:
        """From now on exactly what ``state`` says."""
        self._knots.clear()
        self._knots.append((now_ns, state.offset_ns, state.drift_ppm * 1e-6))
        self._mapped_ns = now_ns

    def steer(self, now_ns: int, link: LinkClock) -> None:
        """Goes from where the line is to where ``link`` says that it should be."""
        start = max(now_ns, self._mapped_ns)
        state, offset = link.at(start), self.offset_ns(start)
        while self._knots and self._knots[-1][0] > start:
            self._knots.pop()
        gap, slope = state.offset_ns - offset, state.drift_ppm * 1e-6
        slew = SLEW_PPM * 1e-6
        self._knots.append((start, offset, slope + (slew if gap > 0 else -slew if gap < 0 else 0.0)))
        if gap:
            arrived = start + ceil(abs(gap) / slew)
            self._knots.append((arrived, link.at(arrived).offset_ns, slope))
        self._mapped_ns = start

    def map(self, t_ns: int) -> int:
        """A local time on the other clock."""
        self._mapped_ns = max(self._mapped_ns, t_ns)
        return t_ns + self.offset_ns(t_ns)

    def offset_ns(self, t_ns: int) -> int:
        """What is added to the local time ``t_ns``. ValueError before the first ``jump``."""
        if not self._knots:
            raise ValueError("the other host's clock is not known yet; probe it, then jump()")
        at, offset, slope = next((knot for knot in reversed(self._knots) if knot[0] <= t_ns), self._knots[0])
        return offset + round(slope * (t_ns - at))
