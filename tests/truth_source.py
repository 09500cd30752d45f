"""A source that says the truth about its own moments, for tests that compare clocks."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import numpy as np

from pipeline.clock import Origin, SystemClock
from pipeline.messages import Payload, SignalLayout, signal_dtype
from pipeline.source import Reading, Source


class Truth(Source):
    """A sample every 20 ms; the device's stamp is what this machine's monotonic clock read, on whatever clock the
    source was told to live."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        rate_hz: float = 50.0

    payload: ClassVar[Payload] = "signal"

    def open(self) -> None:
        self._raw = SystemClock(Origin(0, 0))
        self._due_ns = self.context.clock.now_ns()

    def read(self) -> Reading:
        self._due_ns = max(self._due_ns + round(1e9 / self.settings.rate_hz), self.context.clock.now_ns() - 50_000_000)
        self.context.clock.wait_until(self._due_ns)
        raw_ns, now_ns = self._raw.now_ns(), self.context.clock.now_ns()
        return Reading(
            layout=SignalLayout(1, ("x",)), data=np.zeros(1, signal_dtype(1)), t_capture_ns=now_ns, t_end_ns=now_ns,
            t_receipt_ns=now_ns, t_device_ns=raw_ns,
        )  # fmt: skip
