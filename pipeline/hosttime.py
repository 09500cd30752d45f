"""What other clocks say, on the session clock: the host's own two, and a video sender's wall clock. Pure, but for
``host_zero``, which asks the host.

A driver that stamps its data names no clock: V4L2 means CLOCK_MONOTONIC, PortAudio CLOCK_MONOTONIC on a sound card and
CLOCK_REALTIME through a sound server. Which one it is shows in the numbers, which lie decades apart. An RTSP sender
says its wall clock in RTCP sender reports, and FFmpeg hands that out with each packet.
"""

from __future__ import annotations

import struct
from typing import Literal

import msgspec

from pipeline.clock import Clock, Origin
from pipeline.timebase import Timebase

Domain = Literal["monotonic", "realtime"]

_MS = 1_000_000
_TRIES = 5
_PLAUSIBLE_NS = 5_000_000_000
"""A stamp of data that just came lies no further from now than this, on the clock that it is meant on."""
AHEAD_NS = 100 * _MS
"""A synchronised sender's clock may run ahead of ours by this much."""
_DOUBTS = 3
_BEHIND_NS = 3_000_000_000
"""Frames that are too old for so long, while none of them is late, come from a clock that is behind."""
_AGREED_NS = 5 * _MS


def host_zero(clock: Clock) -> Origin:
    """Where session time 0 lies on the host's clocks as they stand now: a wall clock that was stepped since the session
    began has moved its 0. Good to about a microsecond: the quickest of several readings."""
    best, quickest = Origin(0, 0), None
    for _ in range(_TRIES):
        before = clock.now_ns()
        now = Origin.now()
        after = clock.now_ns()
        if quickest is None or after - before < quickest:
            quickest, middle = after - before, (before + after) // 2
            best = Origin(now.monotonic_ns - middle, now.unix_ns - middle)
    return best


def domain_of(stamp_ns: int, now_ns: int, zero: Origin) -> Domain | None:
    """On which of the host's clocks ``stamp_ns``, taken about ``now_ns`` of session time, was meant; None: on none."""
    if abs(stamp_ns - zero.monotonic_ns - now_ns) < _PLAUSIBLE_NS:
        return "monotonic"
    return "realtime" if abs(stamp_ns - zero.unix_ns - now_ns) < _PLAUSIBLE_NS else None


class DriverStamps:
    """A driver's stamps on the host's monotonic clock, as session time. Whether they are meant on it shows in stamps of
    what just came; once they were, one that follows them may be of any age, since this process may have been stopped
    while data waited."""

    def __init__(self, zero: Origin) -> None:
        self._zero = zero
        self._last_ns: int | None = None

    def session_ns(self, stamp_ns: int, now_ns: int) -> int | None:
        """The session time of a stamp, no later than now; None if it is on another clock."""
        follows = self._last_ns is not None and self._last_ns < stamp_ns <= self._zero.monotonic_ns + now_ns
        if not follows and domain_of(stamp_ns, now_ns, self._zero) != "monotonic":
            return None
        self._last_ns = stamp_ns
        return min(stamp_ns - self._zero.monotonic_ns, now_ns)


def prft_unix_ns(data: bytes) -> int:
    """The sender's wall clock in FFmpeg's side data ``prft`` (AVProducerReferenceTime): its first eight bytes are
    microseconds since 1970. Source: libavcodec/defs.h."""
    return int(struct.unpack_from("=q", data)[0]) * 1000


class Moment(msgspec.Struct, frozen=True, gc=False):
    """When a frame was taken, as far as it can be known. ``late_ns``: how much longer than usual it was on its way
    (sender's clock: how long in all). ``by`` says whose clock it is."""

    t_capture_ns: int
    uncertainty_ns: int
    new_epoch: bool
    late_ns: int
    by: Literal["sender", "stream", "arrival"]


class FrameClock:
    """The moments of one stream's frames, by the best that each brings with it:

    ========== ============================================= ======================================================
    by          known                                         uncertainty
    ========== ============================================= ======================================================
    sender      the sender's wall clock (RTCP)                ``sender_ns``: what two synchronised hosts differ by
    stream      the stream's own clock (RTP, time stamps)     ``arrival_ns``: the least time on the way is unknown;
                mapped by its least delays                    jitter is taken out
    arrival     nothing                                       ``arrival_ns``
    ========== ============================================= ======================================================

    A sender's clock is used from the second stamp on that agrees with the stream's own clock: FFmpeg's first one is a
    frame off. A sender whose wall clock is not synchronised with ours (frames from the future, or older than 5 s, three
    times in a row) is not believed; nor is one whose frames are all older than ``oldest_ns``, which is of no use to
    anybody, though by the stream's own clock they come in time. A change of clocks opens an epoch, and so does a
    sender's clock that is set back.
    """

    def __init__(self, unix_zero_ns: int, sender_ns: int, arrival_ns: int, oldest_ns: int = _PLAUSIBLE_NS) -> None:
        self._zero, self._sender_ns, self._arrival_ns = unix_zero_ns, sender_ns, arrival_ns
        self._oldest_ns = oldest_ns
        self._base = Timebase()
        self._by: str | None = None
        self._last_ns = 0  # the sender's last time
        self._doubts = 0
        self._old_since_ns: int | None = None
        self._stepped = False
        self._apart_ns: int | None = None  # the sender's wall clock less the stream's own, at the last frame

    def update(self, stamp_ns: int | None, sender_unix_ns: int | None, receipt_ns: int) -> Moment:
        """The moment of the next frame: its stamp on the stream's clock, the sender's wall clock, its receipt."""
        mapped = None if stamp_ns is None else self._base.update(stamp_ns, receipt_ns)
        if sender_unix_ns is not None and self._agrees(stamp_ns, sender_unix_ns) and self._doubts < _DOUBTS:
            captured = sender_unix_ns - self._zero
            way = receipt_ns - captured
            if mapped is not None and self._is_behind(way - max(mapped.residual_ns, 0), receipt_ns):
                self._doubts = _DOUBTS
            elif -AHEAD_NS <= way <= _PLAUSIBLE_NS:
                fresh = self._changed("sender") or captured < self._last_ns or self._stepped
                self._doubts, self._last_ns, self._stepped = 0, captured, False
                return Moment(min(captured, receipt_ns), self._sender_ns, fresh, way, "sender")
            else:
                self._doubts += 1
        if mapped is None:
            return Moment(receipt_ns, self._arrival_ns, self._changed("arrival"), 0, "arrival")
        doubt = max(mapped.uncertainty_ns, self._arrival_ns)
        fresh = self._changed("stream") or mapped.new_epoch
        return Moment(min(mapped.t_capture_ns, receipt_ns), doubt, fresh, mapped.residual_ns, "stream")

    def wall_was_set(self, unix_zero_ns: int) -> None:
        """This host's wall clock was stepped: session time 0 lies elsewhere on it from now on. The sender, which may
        have been right all the time, is compared with it anew."""
        self._zero, self._doubts, self._old_since_ns = unix_zero_ns, 0, None
        self._stepped = True

    def _agrees(self, stamp_ns: int | None, sender_unix_ns: int) -> bool:
        if stamp_ns is None:
            return True
        apart, self._apart_ns = self._apart_ns, sender_unix_ns - stamp_ns
        return self._by == "sender" or (apart is not None and abs(self._apart_ns - apart) < _AGREED_NS)

    def _is_behind(self, way_ns: int, receipt_ns: int) -> bool:
        """Whether frames are too old that were not delayed: ``way_ns`` is how old one was less what it came late."""
        if way_ns <= self._oldest_ns:
            self._old_since_ns = None
            return False
        self._old_since_ns = receipt_ns if self._old_since_ns is None else self._old_since_ns
        return receipt_ns - self._old_since_ns >= _BEHIND_NS

    def _changed(self, by: str) -> bool:
        changed, self._by = self._by is not None and self._by != by, by
        return changed
