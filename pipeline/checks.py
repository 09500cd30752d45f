"""The contract of a source as a test that any source can be put to, also one outside this tree:

    def test_my_source():
        check_source(MySource, {"port": "/dev/ttyUSB0"}, readings=20)

It needs the device, or whatever the source takes for one.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from pipeline.clock import Clock, SystemClock
from pipeline.messages import (
    POINT_DTYPE,
    ImuLayout,
    Layout,
    SignalLayout,
    SweepLayout,
    TextLayout,
    nbytes_of,
    payload_of,
    view,
)
from pipeline.source import Reading, Source, default_bound_ns
from pipeline.stamper import ClockCheck, Stamper
from pipeline.strict import Document

FUTURE_NS = 50_000_000
"""How far the end of a reading may lie after the moment at which it was handed over."""


class CheckContext:
    """A source's context that lends fresh memory and remembers what the source said."""

    def __init__(self, name: str = "stream", clock: Clock | None = None) -> None:
        self.name, self.clock = name, clock or SystemClock()
        self.counted: dict[str, int] = {}
        self.notes: list[str] = []
        self.lent = 0

    def loan(self, layout: Layout, nbytes: int | None = None) -> np.ndarray[Any, Any]:
        size = nbytes if nbytes is not None else nbytes_of(layout)
        assert size is not None, f"loan({layout}) without a size, which this layout does not say"
        self.lent += 1
        return np.empty(size, np.uint8)

    def count(self, what: str, n: int = 1) -> None:
        assert what, "a drop was counted without a reason"
        assert n >= 0, f"{n} drops were counted"
        self.counted[what] = self.counted.get(what, 0) + n

    def note(self, text: str) -> None:
        self.notes.append(text)


def check_source(
    source_class: type[Source],
    settings: dict[str, Any],
    *,
    readings: int = 10,
    turns: int = 2000,
    lives: int = 2,
    clock: Clock | None = None,
) -> list[Reading]:
    """Runs a source through ``lives`` of open, ``readings`` readings (or its data's end), close, and holds everything
    against the contract. Returns all readings. AssertionError says what is wrong; fewer readings than asked for after
    ``turns`` calls of ``read`` is wrong too, unless the data ended."""
    decoded = _settings(source_class, settings)
    context = CheckContext(clock=clock)
    source = source_class(decoded, context)
    source.close()  # harmless before open
    result: list[Reading] = []
    for _ in range(lives):
        source.open()
        try:
            result += _life(source, source_class.payload_of(decoded), context, readings, turns)
        finally:
            source.close()
            source.close()
    return result


def _settings(source_class: type[Source], settings: dict[str, Any]) -> Any:
    document = Document("{}", "settings")
    assert source_class.Settings.__struct_config__.forbid_unknown_fields, (
        "Settings accepts unknown keys when a node decodes it; give the struct forbid_unknown_fields=True"
    )
    return document.decode(source_class.Settings, value=settings)


def _life(source: Source, payload: str, context: CheckContext, wanted: int, turns: int) -> list[Reading]:
    stamper = Stamper(context.name, payload)
    stamper.open(context.clock.now_ns())
    clock_check = ClockCheck()
    kept: list[tuple[Reading, str]] = []
    for _ in range(turns):
        try:
            given = source.read()
        except EOFError:
            break
        for reading in given if isinstance(given, list) else [] if given is None else [given]:
            now = context.clock.now_ns()
            _check_reading(reading, payload, now)
            header = stamper.stamp(reading, now)
            clock_check.check(reading, now)
            assert header is not None, f"{_name(reading)} begins before the bound of the last ({stamper.bound_ns})"
            kept.append((reading, _digest(reading)))
        promise = source.bound_ns()
        if promise is not None:
            stamper.beat(context.clock.now_ns(), promise, "")
        if len(kept) >= wanted:
            break
    else:
        raise AssertionError(f"{len(kept)} readings of {wanted} after {turns} calls of read()")
    for reading, digest in kept:
        assert _digest(reading) == digest, f"{_name(reading)}: its payload changed after it was handed over"
    return [reading for reading, _ in kept]


def _check_reading(reading: Reading, payload: str, now_ns: int) -> None:
    name, layout = _name(reading), reading.layout
    assert isinstance(reading, Reading), f"read() returned {type(reading).__name__}, not a Reading"
    assert payload_of(layout) == payload, f"{name}: layout {layout} on a stream of {payload}"
    for field in ("t_capture_ns", "t_end_ns", "t_receipt_ns", "uncertainty_ns"):
        assert type(getattr(reading, field)) is int, f"{name}: {field} is {getattr(reading, field)!r}, not an int"
    assert reading.t_device_ns is None or type(reading.t_device_ns) is int, f"{name}: t_device_ns is no int"
    assert reading.t_capture_ns <= reading.t_end_ns, f"{name} ends at {reading.t_end_ns}, before it begins"
    assert reading.t_end_ns <= now_ns + FUTURE_NS, f"{name} ends at {reading.t_end_ns}, after now ({now_ns})"
    assert reading.t_receipt_ns <= now_ns, f"{name} was received at {reading.t_receipt_ns}, after now ({now_ns})"
    assert reading.uncertainty_ns >= 0, f"{name} has an uncertainty of {reading.uncertainty_ns} ns"
    natural = default_bound_ns(layout, reading.t_capture_ns, reading.t_end_ns)
    bound = natural if reading.bound_ns is None else reading.bound_ns
    assert bound >= reading.t_capture_ns, f"{name} has a bound of {bound}, before its own beginning"
    _check_content(name, layout, view(layout, reading.data), reading)


def _check_content(name: str, layout: Layout, data: np.ndarray[Any, Any], reading: Reading) -> None:
    if isinstance(layout, ImuLayout | SignalLayout):
        offsets = data["offset_ns"]
        assert len(offsets), f"{name} has no samples"
        assert offsets[0] >= 0, f"{name}: the first sample lies {offsets[0]} ns before t_capture_ns"
        assert (np.diff(offsets) >= 0).all(), f"{name}: the samples' times go back"
        last = reading.t_capture_ns + int(offsets[-1])
        assert last <= reading.t_end_ns, f"{name}: the last sample lies at {last}, after t_end_ns {reading.t_end_ns}"
    if isinstance(layout, SweepLayout):
        assert data.dtype == POINT_DTYPE
        assert (data["offset_ns"] <= 0).all(), f"{name}: points after the sweep's end"
    if isinstance(layout, TextLayout):
        bytes(data).decode("utf-8")


def _name(reading: Reading) -> str:
    return f"the reading of {reading.t_capture_ns} ns"


def _digest(reading: Reading) -> str:
    return hashlib.sha256(view(reading.layout, reading.data).tobytes()).hexdigest()
