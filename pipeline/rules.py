"""The four rules: what a step holds of a stream, and when that is proven.

Proof rests on one number, the stream's bound B: nothing with a capture time below B will come any more.

============== ============================================ =========================================================
rule           a step k holds                               proven when
============== ============================================ =========================================================
``nearest``    least distance d to E(k), d < tolerance      B >= E(k) + d (tolerance, if nothing is that near yet)
``latest``     last before E(k), not older than max_age     B >= E(k)
``all``        every capture in [E(k-1), E(k))              B >= E(k)
``resample``   a value for every grid point in the hop      a sample at or after the last point (band-limited: half a
                                                            filter after it), or B beyond the last point and more
                                                            than max_gap beyond the newest sample of the epoch
============== ============================================ =========================================================
"""

from __future__ import annotations

from typing import Literal

import msgspec

from pipeline.messages import Payload

FOREVER = 1 << 63
"""Beyond every time of a session: the bound of a stream that has ended."""


class Nearest(msgspec.Struct, frozen=True, gc=False, tag="nearest"):
    """The message with the least distance d to E(k), d < tolerance; ties: earlier capture, then lower seq."""

    tolerance_ns: int


class Latest(msgspec.Struct, frozen=True, gc=False, tag="latest"):
    """The last message before E(k), not older than ``max_age_ns`` (E(k) - max_age <= t < E(k))."""

    max_age_ns: int


class Resample(msgspec.Struct, frozen=True, gc=False, tag="resample"):
    """Exactly rate x hop samples on an integer grid; neighbours more than ``max_gap_ns`` apart leave a hole (NaN)."""

    rate_hz: int
    max_gap_ns: int
    method: Literal["linear", "band_limited"] = "linear"


class All(msgspec.Struct, frozen=True, gc=False, tag="all"):
    """Every message with capture time in the hop."""


Rule = Nearest | Latest | Resample | All


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the aligner must know of one stream."""

    name: str
    payload: Payload
    rule: Rule
    channels: int = 0
    """Columns of a resampled grid: 6 for imu (accel xyz, gyro xyz), the signal's or the audio's channel count; audio of
    any number of channels is mixed to one where this is 1."""
    idle_ns: int | None = 1_000_000_000
    """After how long without progress of its bound a stream is no longer waited for; None: never."""
    ordered: bool = True
    max_buffer: int = 4096
    """How many messages may wait in the buffer; one more is rejected."""
