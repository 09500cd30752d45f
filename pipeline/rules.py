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

from collections.abc import Sequence
from typing import Literal

import msgspec

from pipeline.errors import listed
from pipeline.messages import AudioLayout, Layout, Payload, SignalLayout, payload_of

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
    channel_names: tuple[str, ...] = ()
    """What a signal's channels are called, in the order in which they are taken; others are rejected. (): any."""
    idle_ns: int | None = 1_000_000_000
    """After how long without progress of its bound a stream is no longer waited for; None: never."""
    ordered: bool = True
    max_buffer: int = 4096
    """How many messages may wait in the buffer; one more is rejected."""


def misfit(spec: StreamSpec, layout: Layout) -> str:
    """What keeps messages of ``layout`` out of every step of the stream, in words that follow its name; "" if nothing
    does."""
    payload = payload_of(layout)
    if payload != spec.payload:
        return f"carries {payload}, where {spec.payload} is taken"
    resampled = isinstance(spec.rule, Resample)
    if isinstance(layout, AudioLayout) and resampled and layout.channels != spec.channels != 1:
        return f"has {_channels(layout.channels)}, where {spec.channels} are taken"
    if isinstance(layout, SignalLayout):
        taken = spec.channel_names
        count = len(taken) or (spec.channels if resampled else len(layout.channels))
        if len(layout.channels) != count:
            return f"has {_channels(len(layout.channels))} ({channels_text(layout.channels)}), where {count} are taken"
        return _misnamed(layout.channels, taken) if taken else ""
    return ""


def channels_text(names: Sequence[str], most: int = 4) -> str:
    """Names of channels in words, the first few of many."""
    more = len(names) - most
    return listed(names) if more <= 1 else f"{listed(names[:most])} and {more} more"


def _channels(count: int) -> str:
    return "1 channel" if count == 1 else f"{count} channels"


def _misnamed(found: tuple[str, ...], taken: tuple[str, ...]) -> str:
    for number, (one, other) in enumerate(zip(found, taken, strict=True), 1):
        if one != other:
            order = " (they are the same ones in another order)" if sorted(found) == sorted(taken) else ""
            return f"calls its channel {number} `{one}`, where `{other}` is taken{order}"
    return ""
