"""Session time: int64 nanoseconds on CLOCK_MONOTONIC, less its value when the session started.

The same in every process of the host, and untouched by steps of the wall clock. Time is always passed in as a
``Clock``; this is the only file of the project that reads the machine's clocks or sleeps.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol

import msgspec


class Origin(msgspec.Struct, frozen=True):
    """Where a session's time 0 lies: on CLOCK_MONOTONIC (ns) and, stored once, in Unix time (ns since 1970)."""

    monotonic_ns: int
    unix_ns: int

    @classmethod
    def now(cls) -> Origin:
        """The origin of a session that starts at this moment."""
        # The wall clock is read between two readings of the monotonic one, so that both name the same moment.
        before = time.monotonic_ns()
        unix = time.time_ns()
        after = time.monotonic_ns()
        return cls(monotonic_ns=(before + after) // 2, unix_ns=unix)


def wall_ahead_ns() -> int:
    """How far the wall clock is ahead of the monotonic one, at the price of two readings: too much by whatever came
    between them, so that it shows a step of the wall clock, and ``pipeline.hosttime.host_zero`` measures it."""
    return time.time_ns() - time.monotonic_ns()


class Clock(Protocol):
    """What every node is given instead of the ``time`` module."""

    def now_ns(self) -> int:
        """Session time now, in ns."""

    def wait_until(self, t_ns: int, stop: threading.Event | None = None) -> bool:
        """Blocks until session time ``t_ns`` or until ``stop`` is set; True if the time was reached."""


class SystemClock:
    """The session clock of this host."""

    def __init__(self, origin: Origin | None = None) -> None:
        self.origin = origin or Origin.now()

    def now_ns(self) -> int:
        return time.monotonic_ns() - self.origin.monotonic_ns

    def begin(self, origin: Origin) -> None:
        """Lays time 0 at ``origin``. Once, before anything has been stamped: a session begins when its nodes are up."""
        self.origin = origin

    def wait_until(self, t_ns: int, stop: threading.Event | None = None) -> bool:
        remaining = t_ns - self.now_ns()
        while remaining > 0:
            if stop is None:
                time.sleep(remaining / 1e9)
            elif stop.wait(remaining / 1e9):
                return False
            remaining = t_ns - self.now_ns()
        return not (stop is not None and stop.is_set())


class ManualClock:
    """A clock that moves only when told to; waiting moves it. For tests and for work at full speed."""

    def __init__(self, now_ns: int = 0) -> None:
        self._now_ns = now_ns

    def now_ns(self) -> int:
        return self._now_ns

    def advance(self, by_ns: int) -> None:
        if by_ns < 0:
            raise ValueError(f"time cannot go back: asked to advance by {by_ns} ns")
        self._now_ns += by_ns

    def wait_until(self, t_ns: int, stop: threading.Event | None = None) -> bool:
        if stop is not None and stop.is_set():
            return False
        self._now_ns = max(self._now_ns, t_ns)
        return True
