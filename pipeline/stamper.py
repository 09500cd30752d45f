"""Numbers, epochs and bounds for the readings of one stream, whose constant offset is taken out here; and whether its
times can be the session clock's, and its values are any."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import msgspec
import numpy as np

from pipeline.errors import SensorError
from pipeline.life import SourceReport
from pipeline.messages import (
    AudioLayout,
    Header,
    ImuLayout,
    Layout,
    SignalLayout,
    SweepLayout,
    payload_of,
    view,
    wrong_data,
)
from pipeline.source import Reading, default_bound_ns

STRAGGLERS = 3
"""So many readings in a row from before the bound are no stragglers: the clock jumped back."""

FUTURE_NS = 1_000_000_000
"""A time further in the future than this, and than its uncertainty, is of another clock."""

PAST_NS = 600_000_000_000
"""And one further in the past. A live source's readings may come late, but by no more than something on their way can
hold back: the longest that is known is 360 s, of an LSL outlet whose network is away."""

SLOW = 50
"""Times of another unit go on at a thousandth of the session clock's pace or less (or a hundredth: ticks of 100 ns).
Those of a source that is late, however late, go on at its pace, and faster while it catches up."""

SLOW_SPANS, SPAN_NS = 5, 1_000_000_000
"""Times that have gone on so slowly in so many spans in a row, each at least so long, are of another unit. One span may
be slow where a network was away after its first reading."""

LOOK_NS = 1_000_000_000
"""How often is looked whether there are still values, once one was seen."""

_VALUES: dict[type[Any], tuple[str, ...]] = {
    ImuLayout: ("accel", "gyro"),
    SignalLayout: ("value",),
    SweepLayout: ("x",),
}
"""Where those stand that may be NaN."""
_KINDS: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {"NaN": np.isnan, "infinities": np.isinf}
"""What may stand in place of a value."""

_UNITS = {1_000: "microseconds", 1_000_000: "milliseconds", 1_000_000_000: "seconds"}
_WHOLE_OR_NONE = (int, type(None))


class ClockCheck:
    """Whether the times of a source's readings can be the session clock's; with others no reader could do anything, but
    count them as late. Pure: times come in as arguments."""

    def __init__(self) -> None:
        self._last: tuple[int, int] | None = None  # session time and the reading's, where the present span begins
        self._since = (0, 0)  # where the first of the slow spans began
        self._slow = 0
        self._said = ""

    def check(self, reading: Reading, now_ns: int) -> None:
        """Raises SensorError if they cannot. ``now_ns``: the session clock when the reading was handed over."""
        latest = now_ns + reading.uncertainty_ns + FUTURE_NS
        earliest = now_ns - reading.uncertainty_ns - PAST_NS
        for name in ("t_end_ns", "t_receipt_ns"):
            time = getattr(reading, name)
            if not earliest <= time <= latest:
                where = f"{(time - now_ns) / 1e9:.1f} s in the future" if time > now_ns else _behind(now_ns - time)
                self._refuse(
                    f"a reading whose `{name}` lies {where}; it is {time}, and the session clock says {now_ns}"
                )
        self._check_pace(reading.t_end_ns, now_ns)
        self._said = ""

    def _check_pace(self, time: int, now_ns: int) -> None:
        if self._last is None:
            self._last = now_ns, time
            return
        span, gone = now_ns - self._last[0], time - self._last[1]
        if span < SPAN_NS and self._slow < SLOW_SPANS:  # else all are looked at: an opened-again device may be well
            return
        if gone * SLOW > span:
            self._slow = 0
        else:
            self._since = self._since if self._slow else self._last
            self._slow += 1
        self._last = now_ns, time
        if self._slow >= SLOW_SPANS:
            self._refuse(_slow_times(now_ns - self._since[0], time - self._since[1], time))

    def _refuse(self, wrong: str) -> None:
        """In the same words until a reading is well: its numbers alone are no news."""
        self._said = self._said or (
            f"`read` gave {wrong}; times are nanoseconds on the session clock, which is `self.context.clock.now_ns()` "
            "and begins near 0 with the session; this is a fault of the source."
        )
        raise SensorError(self._said)


def _behind(by_ns: int) -> str:
    return f"{by_ns / 1e9:.1f} s in the past, where no reading of a live source can come from"


def _slow_times(span_ns: int, gone_ns: int, time: int) -> str:
    ratio = span_ns / max(gone_ns, 1)
    fits = [f", which fits {unit}: multiply them by {n}" for n, unit in _UNITS.items() if n / 2 < ratio < n * 2]
    return (
        f"readings whose `t_end_ns` went on by {gone_ns} (to {time}) while the session clock went on by {span_ns}"
        + "".join(fits if gone_ns > 0 else [])
    )


class ValueCheck:
    """Counts readings without a single value: NaN is "not measured", an infinity what no sensor measures, and both are
    to whoever looks at times alone as good as any other. Every reading is looked at until one has a value, then one in
    ``LOOK_NS``. Pure."""

    def __init__(self) -> None:
        self.count = 0
        self.held: frozenset[str] = frozenset()
        """What they held in place of values, as ``hollow`` has it."""
        self.longest_ns = 0
        """The longest time in which there was no other reading."""
        self._since_ns: int | None = None
        self._next_ns = -PAST_NS

    def look(self, layout: Layout, data: Any, now_ns: int) -> None:
        """Takes a reading's layout and data, which fit."""
        if now_ns < self._next_ns:
            return
        held = hollow(layout, data)
        if not held:
            self._since_ns, self._next_ns = None, now_ns + LOOK_NS
            return
        self.count += 1
        self.held |= held
        self._since_ns = now_ns if self._since_ns is None else self._since_ns
        self.longest_ns = max(self.longest_ns, now_ns - self._since_ns)

    def report(self, report: SourceReport) -> None:
        """Writes what it has found into a report, if it has found anything."""
        if self.count:
            report.unmeasured, report.unmeasured_ns = self.count, self.longest_ns
            report.unmeasured_as = in_place_of_values(self.held)


def hollow(layout: Layout, data: Any) -> frozenset[str]:
    """Which of ``_KINDS`` there are where there is no value; none where there is one, or nothing that could be one, as
    in a sweep that has met nothing."""
    if (names := _VALUES.get(type(layout))) is None:
        return frozenset()
    samples = data if isinstance(data, np.ndarray) and data.dtype.names is not None else view(layout, data)
    if any(np.isfinite(samples[name]).any() for name in names):
        return frozenset()
    return frozenset(kind for kind, those in _KINDS.items() if any(those(samples[name]).any() for name in names))


def in_place_of_values(held: Collection[str]) -> str:
    """What ``hollow`` has found, in words."""
    return " or ".join(kind for kind in _KINDS if kind in held)


def no_value(held: str) -> str:
    """The same, and that it is no value."""
    return f"{held}, which is no value" if held == "NaN" else f"{held}, which are no values"


class Stamper:
    """Numbers the readings of one stream. Pure: times come in as arguments.

    ``offset_ns`` is added to every time that the source states of the physical moment, its promises included, and
    ``offset_uncertainty_ns`` to their uncertainty: a constant, so that order and distances stay. The device's own stamp
    and the receipt stay what they were."""

    def __init__(self, stream: str, payload: str, offset_ns: int = 0, offset_uncertainty_ns: int = 0) -> None:
        self.stream, self.payload = stream, payload
        self.offset_ns, self.offset_uncertainty_ns = offset_ns, offset_uncertainty_ns
        self.epoch, self.seq, self.bound_ns = -1, 0, 0
        self._unbound = True  # nothing was promised in this epoch yet
        self._stragglers = 0
        self._layout: Layout | None = None  # the last that was checked

    def open(self, now_ns: int) -> None:
        """Opens an epoch at session time ``now_ns``."""
        self.epoch, self.seq = max(now_ns, self.epoch + 1), 0
        self._unbound, self._stragglers = True, 0

    def stamp(self, reading: Reading, now_ns: int) -> Header | None:
        """The header of ``reading``; None if it begins before the bound, which its epoch's clock cannot have meant:
        such stragglers are dropped, and after ``STRAGGLERS`` in a row the clock is taken to have jumped back, which
        opens an epoch. Raises SensorError if the reading contradicts itself."""
        self.check(reading)
        return self.stamp_checked(reading, now_ns)

    def stamp_checked(self, reading: Reading, now_ns: int) -> Header | None:
        """The same for what ``check`` has let pass."""
        reading = self._moved(reading)
        if reading.new_epoch and not self._unbound:
            self.open(now_ns)
        if not self._unbound and reading.t_capture_ns < self.bound_ns:
            self._stragglers += 1
            if self._stragglers < STRAGGLERS:
                return None
            self.open(now_ns)
        if self._unbound:
            self.bound_ns = min(self.bound_ns, reading.t_capture_ns)
        self._unbound, self._stragglers = False, 0
        natural = default_bound_ns(reading.layout, reading.t_capture_ns, reading.t_end_ns)
        self.bound_ns = max(self.bound_ns, natural if reading.bound_ns is None else reading.bound_ns)
        header = Header(
            stream=self.stream,
            seq=self.seq,
            epoch=self.epoch,
            t_capture_ns=reading.t_capture_ns,
            t_end_ns=reading.t_end_ns,
            bound_ns=self.bound_ns,
            t_receipt_ns=reading.t_receipt_ns,
            t_device_ns=reading.t_device_ns,
            uncertainty_ns=reading.uncertainty_ns,
            layout=reading.layout,
        )
        self.seq += 1
        return header

    def beat(self, now_ns: int, promise_ns: int | None, health: str) -> Header:
        """A beat: the next number, and ``promise_ns`` where it says more than the bound so far."""
        if promise_ns is not None:
            self.bound_ns, self._unbound = max(self.bound_ns, promise_ns + self.offset_ns), False
        return Header(
            stream=self.stream,
            seq=self.seq,
            epoch=self.epoch,
            t_capture_ns=self.bound_ns,
            t_end_ns=self.bound_ns,
            bound_ns=self.bound_ns,
            t_receipt_ns=now_ns,
            health=health,
        )

    def _moved(self, reading: Reading) -> Reading:
        if not self.offset_ns and not self.offset_uncertainty_ns:
            return reading
        return msgspec.structs.replace(
            reading,
            t_capture_ns=reading.t_capture_ns + self.offset_ns,
            t_end_ns=reading.t_end_ns + self.offset_ns,
            bound_ns=None if reading.bound_ns is None else reading.bound_ns + self.offset_ns,
            uncertainty_ns=reading.uncertainty_ns + self.offset_uncertainty_ns,
        )

    def check(self, reading: Reading) -> None:
        """Raises SensorError for what is no reading of this stream, or contradicts itself."""
        if not isinstance(reading, Reading):
            raise SensorError(
                f"`read` gave {_kind(reading)}, where it gives a Reading, a list of them, or None; this is a fault of "
                "the source."
            )
        if self._layout is None or reading.layout != self._layout:
            self._check_layout(reading.layout)
            self._layout = reading.layout
        wrong = None
        if not (
            isinstance(reading.t_capture_ns, int)
            and isinstance(reading.t_end_ns, int)
            and isinstance(reading.t_receipt_ns, int)
        ):
            times = f"{reading.t_capture_ns!r}, {reading.t_end_ns!r} and {reading.t_receipt_ns!r}"
            wrong = f"the times {times}, where times are whole numbers (int) of nanoseconds"
        elif not (
            isinstance(reading.uncertainty_ns, int)
            and isinstance(reading.bound_ns, _WHOLE_OR_NONE)
            and isinstance(reading.t_device_ns, _WHOLE_OR_NONE)
        ):
            stated = f"`uncertainty_ns` {reading.uncertainty_ns!r}, `bound_ns` {reading.bound_ns!r} and `t_device_ns`"
            wrong = f"{stated} {reading.t_device_ns!r}, where times are whole numbers (int) of nanoseconds"
        elif reading.t_end_ns < reading.t_capture_ns:
            wrong = f"an end ({reading.t_end_ns} ns) before its beginning ({reading.t_capture_ns} ns)"
        elif reading.uncertainty_ns < 0:
            wrong = f"an uncertainty of {reading.uncertainty_ns} ns"
        elif reading.bound_ns is not None and reading.bound_ns < reading.t_capture_ns:
            wrong = f"a bound ({reading.bound_ns} ns) before its own beginning ({reading.t_capture_ns} ns)"
        else:
            wrong = wrong_data(reading.layout, reading.data) or _wrong_samples(reading)
        if wrong:
            raise _fault(wrong)

    def _check_layout(self, layout: Layout) -> None:
        """Only one that differs from the last is checked: a struct takes whatever it is made of."""
        try:
            payload = payload_of(layout)
        except KeyError:
            raise _fault(f"{_kind(layout)} as its layout; layouts are in pipeline.messages") from None
        try:
            msgspec.convert(msgspec.to_builtins(layout), type(layout))
        except (TypeError, msgspec.ValidationError) as error:  # a TypeError is numpy's: np.int64 is no int
            raise _fault(f"the layout {layout}, which is none: {error}") from None
        if payload != self.payload:
            raise _fault(f"a payload of type {payload} on a stream of type {self.payload}")


def _wrong_samples(reading: Reading) -> str | None:
    """What is wrong with the times of a batch's samples, which an aligner would reject."""
    if isinstance(reading.layout, AudioLayout) and reading.t_end_ns == reading.t_capture_ns:
        return "sound that ends when it begins; `t_end_ns` is where the next block begins"
    if not isinstance(reading.layout, ImuLayout | SignalLayout):
        return None
    data = reading.data
    named = isinstance(data, np.ndarray) and data.dtype.names is not None  # a view takes longer
    offsets = (data if named else view(reading.layout, data))["offset_ns"].reshape(-1)
    if not len(offsets):
        return "no samples"
    first, last, span = int(offsets[0]), int(offsets[-1]), reading.t_end_ns - reading.t_capture_ns
    if first < 0 or last > span or (offsets[1:] < offsets[:-1]).any():
        return (
            f"samples whose `offset_ns` goes from {first} to {last}, where it is the time after `t_capture_ns`, never "
            f"less than that of the sample before, and at most {span} here, which is `t_end_ns`"
        )
    return None


def _kind(value: object) -> str:
    return f"`{type(value).__name__}`"


def _fault(wrong: str) -> SensorError:
    return SensorError(f"`read` gave a reading with {wrong}; this is a fault of the source.")
