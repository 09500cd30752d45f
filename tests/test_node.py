"""The shell around a source: numbers, epochs, bounds, beats, retries; and the contract that every source keeps."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.align import Manifest, Step, StreamManifest
from pipeline.checks import CheckContext, check_source
from pipeline.clock import ManualClock, Origin
from pipeline.errors import ConfigError, SensorError, WireError
from pipeline.life import Life, Mark, NodeSpec, Order, Report, read_spec
from pipeline.messages import (
    IMU_DTYPE,
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    Payload,
    SignalLayout,
    SweepLayout,
    TextLayout,
    form_of,
    payload_of,
    signal_dtype,
)
from pipeline.node import FAILURES, RETRY_NS, PlayedStreams, SourceShell, ring_spec
from pipeline.sending import as_bytes, as_part
from pipeline.shm import RingCounters
from pipeline.source import KINDS, Reading, Source, load_kind
from pipeline.stamper import LOOK_NS, STRAGGLERS, Stamper, ValueCheck, hollow, in_place_of_values, no_value
from pipeline.steps import UNHEARD, UNMADE, Account, Gap, Unpredicted, decode_step, encode_step

MS = 1_000_000


def spec(folder: Path | str = "/nowhere", **more: Any) -> NodeSpec:
    return NodeSpec(session="s", origin=Origin(0, 0), session_dir=str(folder), node="text", kind="x", **more)


class Sender:
    """Keeps what is sent; ``full`` says that no slot is free."""

    def __init__(self) -> None:
        self.sent: list[Header] = []
        self.full = False
        self.ring_counters = RingCounters()

    def publish(self, message: Message) -> bool:
        self.sent.append(message.header)
        return not self.full

    def beat(self, header: Header) -> bool:
        assert header.is_beat
        self.sent.append(header)
        return True

    def loan(self, nbytes: int) -> np.ndarray[Any, Any] | None:
        return None if self.full else np.zeros(nbytes, np.uint8)

    @property
    def beats(self) -> list[Header]:
        return [header for header in self.sent if header.is_beat]

    @property
    def messages(self) -> list[Header]:
        return [header for header in self.sent if not header.is_beat]


def line(t_ns: int, **more: Any) -> Reading:
    return Reading(layout=TextLayout(2), data=b"hi", t_capture_ns=t_ns, t_end_ns=t_ns, t_receipt_ns=t_ns, **more)


class Scripted(Source):
    """A source that does what its script says: each entry is what one call of ``open`` or ``read`` gives or raises."""

    payload: ClassVar[Payload] = "text"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        script: list[Any] = []
        openings: list[Any] = []

    def __init__(self, settings: Any, context: Any) -> None:
        super().__init__(settings, context)
        self.opened = self.closed = 0
        self.promise: int | None = None

    def open(self) -> None:
        self.opened += 1
        if self.settings.openings and isinstance(outcome := self.settings.openings.pop(0), Exception):
            raise outcome

    def read(self) -> Any:
        self.context.clock.wait_until(self.context.clock.now_ns() + 20 * MS)
        outcome = self.settings.script.pop(0) if self.settings.script else None
        if isinstance(outcome, Exception):
            raise outcome
        return outcome(self.context) if callable(outcome) else outcome

    def close(self) -> None:
        self.closed += 1

    def bound_ns(self) -> int | None:
        return self.promise


def shell(script: list[Any], openings: list[Any] | None = None) -> tuple[SourceShell, Sender, ManualClock]:
    clock, sender = ManualClock(1000 * MS), Sender()
    life = Life(spec(), clock)
    settings = Scripted.Settings(script=script, openings=openings or [])
    made = SourceShell(Scripted, settings, life, sender, "text")
    made.stamper.open(clock.now_ns())
    return made, sender, clock


def turn_until(made: SourceShell, condition: Callable[[], Any], turns: int = 500) -> None:
    for _ in range(turns):
        if condition():
            return
        made.turn()
    raise AssertionError(f"not within {turns} turns")


# -- stamps ------------------------------------------------------------------------------------------------------------


def test_readings_are_numbered_and_bounded_by_their_kind() -> None:
    stamper = Stamper("text", "text")
    stamper.open(5)
    first, second = stamper.stamp(line(10), 11), stamper.stamp(line(20), 21)
    assert first is not None
    assert second is not None
    assert (first.epoch, first.seq, first.bound_ns) == (5, 0, 11)
    assert (second.epoch, second.seq, second.bound_ns) == (5, 1, 21)
    audio = Stamper("microphone", "audio")
    audio.open(0)
    block = Reading(layout=AudioLayout(100, 1, 1), data=bytes(2), t_capture_ns=0, t_end_ns=10, t_receipt_ns=11)
    assert audio.stamp(block, 11).bound_ns == 10  # type: ignore[union-attr]
    imu = Stamper("imu", "imu")
    imu.open(0)
    batch = Reading(layout=ImuLayout(1), data=bytes(32), t_capture_ns=0, t_end_ns=10, t_receipt_ns=11)
    assert imu.stamp(batch, 11).bound_ns == 11  # type: ignore[union-attr]


def test_a_straggler_is_dropped_and_a_clock_that_jumped_back_opens_an_epoch() -> None:
    stamper = Stamper("text", "text")
    stamper.open(0)
    assert stamper.stamp(line(1000), 1000)
    assert stamper.stamp(line(999), 1001) is None
    assert stamper.stamp(line(1002), 1002).seq == 1  # type: ignore[union-attr]
    outcomes = [stamper.stamp(line(10 + i), 2000 + i) for i in range(STRAGGLERS)]
    assert outcomes[:-1] == [None] * (STRAGGLERS - 1)
    opened = outcomes[-1]
    assert opened is not None
    assert (opened.epoch, opened.seq) == (2000 + STRAGGLERS - 1, 0)


def test_epochs_always_rise() -> None:
    stamper = Stamper("text", "text")
    stamper.open(7)
    stamper.open(7)
    assert stamper.epoch == 8
    assert stamper.stamp(line(10, new_epoch=True), 11).epoch == 8  # type: ignore[union-attr]
    assert stamper.stamp(line(12, new_epoch=True), 13).epoch == 13  # type: ignore[union-attr]


def test_a_reading_that_contradicts_itself_is_the_sources_fault() -> None:
    stamper = Stamper("text", "text")
    stamper.open(0)
    with pytest.raises(SensorError, match="before its beginning"):
        stamper.stamp(msgspec.structs.replace(line(5), t_end_ns=4), 5)
    with pytest.raises(SensorError, match="type imu on a stream of type text"):
        stamper.stamp(msgspec.structs.replace(line(5), layout=ImuLayout(1)), 5)
    with pytest.raises(SensorError, match="bound"):
        stamper.stamp(line(5, bound_ns=4), 5)


MEASURED: list[tuple[Layout, dict[str, Any], bool]] = [
    (ImuLayout(2), {"accel": np.nan, "gyro": np.nan}, False),
    (ImuLayout(2), {"accel": np.nan}, True),  # an IMU without an accelerometer
    (ImuLayout(2), {"accel": np.nan, "gyro": [[np.nan] * 3, [np.nan, np.nan, 1.0]]}, True),
    (SignalLayout(2, ("a", "b")), {"value": np.nan}, False),
    (SignalLayout(2, ("a", "b")), {"value": [[np.nan, np.nan], [np.nan, 0.0]]}, True),
    (SweepLayout(3), {"x": np.nan, "y": np.nan, "z": np.nan}, False),
    (SweepLayout(3), {"x": [np.nan, np.nan, 1.0]}, True),
    (ImuLayout(2), {"accel": np.inf, "gyro": np.nan}, False),
    (SignalLayout(2, ("a", "b")), {"value": [[np.inf, np.nan], [-np.inf, 0.0]]}, True),
    (SweepLayout(0), {}, True),  # nothing is near
    (AudioLayout(100, 1, 2), {}, True),
    (TextLayout(0), {}, True),
]


@pytest.mark.parametrize(("layout", "values", "measured"), MEASURED)
def test_readings_without_a_single_value_are_counted(layout: Layout, values: dict[str, Any], measured: bool) -> None:
    dtype, shape = form_of(layout)
    data = np.zeros(shape, dtype)
    for name, value in values.items():
        data[name] = value
    check = ValueCheck()
    for now_ns in (0, 1, 5):
        check.look(layout, data if now_ns else data.tobytes(), now_ns)
    assert (check.count, check.longest_ns) == ((0, 0) if measured else (3, 5))


def test_what_has_had_values_is_looked_at_again_from_time_to_time() -> None:
    check, layout = ValueCheck(), SignalLayout(1, ("a",))
    empty, full = np.zeros(1, signal_dtype(1)), np.zeros(1, signal_dtype(1))
    empty["value"] = np.nan
    check.look(layout, full, 0)
    for now_ns in range(0, 2 * LOOK_NS, LOOK_NS // 4):
        check.look(layout, empty, now_ns)
    assert (check.count, check.longest_ns) == (4, LOOK_NS * 3 // 4)
    check.look(layout, full, 2 * LOOK_NS)
    check.look(layout, empty, 3 * LOOK_NS)
    check.look(layout, empty, 3 * LOOK_NS + 1)
    assert (check.count, check.longest_ns) == (6, LOOK_NS * 3 // 4)


def test_what_is_no_value_is_called_what_it_is() -> None:
    check, layout = ValueCheck(), ImuLayout(2)
    data = np.zeros(2, IMU_DTYPE)
    for accel, gyro, said in (
        (np.nan, np.nan, "NaN"),
        (np.inf, [-np.inf, np.inf, np.inf], "infinities"),
        (np.inf, np.nan, "NaN or infinities"),  # it has no gyroscope
        (np.inf, [np.nan, np.nan, 1.0], ""),
    ):
        data["accel"], data["gyro"] = accel, gyro
        assert in_place_of_values(hollow(layout, data)) == said
        check.look(layout, data, 0)
    assert (check.count, in_place_of_values(check.held)) == (3, "NaN or infinities")
    assert no_value("NaN") == "NaN, which is no value"
    assert no_value("infinities") == "infinities, which are no values"


@pytest.mark.parametrize("gyro", [np.nan, 1.0])
def test_a_source_says_how_much_of_it_is_no_value(gyro: float) -> None:
    def numb(context: Any) -> Reading:
        data, now_ns = np.zeros(2, IMU_DTYPE), context.clock.now_ns()
        data["accel"], data["gyro"] = np.nan, gyro
        times = {"t_capture_ns": now_ns, "t_end_ns": now_ns, "t_receipt_ns": now_ns}
        return Reading(layout=ImuLayout(2), data=data, **times)

    class Numb(Scripted):
        payload: ClassVar[Payload] = "imu"

    clock, sender, said = ManualClock(1000 * MS), Sender(), list[Report]()
    made = SourceShell(Numb, Numb.Settings(script=[numb] * 5), Life(spec(), clock), sender, "imu")
    made.say = said.append
    turn_until(made, lambda: not made.source.settings.script)
    made._report()
    report = said[-1].sources["imu"]
    assert len(sender.messages) == report.published == 5
    assert (report.unmeasured, report.unmeasured_ns) == ((5, 80 * MS) if np.isnan(gyro) else (0, 0))
    assert report.unmeasured_as == "NaN"


def test_played_streams_say_how_much_of_them_is_no_value() -> None:
    clock, sender = ManualClock(0), Sender()
    played = PlayedStreams(Life(spec(), clock), sender, ["imu", "text"])  # type: ignore[arg-type]
    data = np.zeros(1, signal_dtype(1))
    data["value"] = np.nan
    for seq in range(3):
        times = dict.fromkeys(("t_capture_ns", "t_end_ns", "bound_ns", "t_receipt_ns"), seq * MS)
        played.publish(Message(Header(stream="imu", seq=seq, epoch=0, layout=SignalLayout(1, ("a",)), **times), data))
        played.publish(Message(Header(stream="text", seq=seq, epoch=0, layout=TextLayout(1), **times), b"x"))
    found = {name: (r.published, r.unmeasured, r.unmeasured_ns) for name, r in played._reports.items()}
    assert found == {"imu": (3, 3, 2 * MS), "text": (3, 0, 0)}


def test_a_layout_that_is_none_is_the_sources_fault() -> None:
    stamper = Stamper("camera", "frame")
    stamper.open(0)
    layout = FrameLayout(48, 64, "rgb8")  # type: ignore[arg-type]
    swapped = Reading(layout=layout, data=b"", t_capture_ns=0, t_end_ns=0, t_receipt_ns=0)
    with pytest.raises(SensorError, match=r"layout FrameLayout\(format=48.* which is none: "):
        stamper.stamp(swapped, 1)
    with pytest.raises(SensorError, match="`dict` as its layout"):
        stamper.stamp(msgspec.structs.replace(swapped, layout={"format": "rgb8"}), 1)  # type: ignore[arg-type]
    numpys = TextLayout(np.int64(2))  # type: ignore[arg-type]
    with pytest.raises(SensorError, match="int64"):
        Stamper("text", "text").stamp(msgspec.structs.replace(line(5), layout=numpys), 6)


WRONG_DATA: list[tuple[Layout, Any, str]] = [
    (SignalLayout(1, ("load",)), np.zeros(1), r"array float64 \[1\] as data, .* needs signal_dtype\(1\) \[1\]"),
    (SignalLayout(2, ("load",)), np.zeros(3), r"array float64 \[3\]"),  # of the right size, and would be rubbish
    (SignalLayout(1, ("load",)), np.zeros(1, signal_dtype(2)), r"a structured type \[1\] .* signal_dtype\(1\)"),
    (SignalLayout(1, ("load",)), [1.0], "data of the type `list`"),
    (SignalLayout(1, ("load",)), bytes(8), "8 bytes of data, .* needs 12"),
    (FrameLayout("rgb8", 4, 6), np.zeros((4, 6, 3), np.float32), r"float32 \[4, 6, 3\] .* uint8 \[4, 6, 3\]"),
    (FrameLayout("rgb8", 6, 4), np.zeros((4, 6, 3), np.uint8), r"uint8 \[4, 6, 3\] .* uint8 \[6, 4, 3\]"),
    (AudioLayout(100, 2, 5), np.zeros((2, 5), np.int16), r"int16 \[2, 5\] .* int16 \[5, 2\]"),
    (AudioLayout(100, 1, 5), np.zeros((5, 1), np.float32), r"float32 \[5, 1\] .* int16 \[5, 1\]"),
    (ImuLayout(1), np.zeros((1, 6), np.float32), "IMU_DTYPE"),
    (SweepLayout(2), np.zeros((2, 4), np.float32), "POINT_DTYPE"),
]


@pytest.mark.parametrize(("layout", "data", "words"), WRONG_DATA)
def test_data_that_are_not_what_the_layout_says_are_the_sources_fault(layout: Layout, data: Any, words: str) -> None:
    stamper = Stamper("s", payload_of(layout))
    stamper.open(0)
    reading = Reading(layout=layout, data=data, t_capture_ns=0, t_end_ns=0, t_receipt_ns=0)
    with pytest.raises(SensorError, match=words):
        stamper.stamp(reading, 1)


@pytest.mark.parametrize("offsets", [[-1, 0], [0, 11], [5, 3], []])
def test_samples_out_of_their_batch_are_the_sources_fault(offsets: list[int]) -> None:
    stamper, data = Stamper("load", "signal"), np.zeros(len(offsets), signal_dtype(1))
    stamper.open(0)
    data["offset_ns"] = offsets
    reading = Reading(layout=SignalLayout(len(offsets), ("load",)), data=data, t_capture_ns=0, t_end_ns=10,
                      t_receipt_ns=10)  # fmt: skip
    with pytest.raises(SensorError, match="at most 10 here" if offsets else "no samples"):
        stamper.stamp(reading, 10)
    data["offset_ns"] = range(len(offsets))
    if offsets:
        assert stamper.stamp(reading, 10) is not None


RIGHT_DATA: list[tuple[Layout, Any]] = [
    (AudioLayout(100, 1, 5), np.zeros(5, np.int16)),
    (AudioLayout(100, 1, 5), np.zeros((1, 5), np.int16)),
    (AudioLayout(100, 2, 5), np.zeros(20, np.uint8)),
    (FrameLayout("gray8", 4, 6), np.zeros((4, 6, 1), np.uint8)),
    (FrameLayout("rgb8", 4, 6), np.zeros((4, 6, 3), np.uint8)[:, :, ::-1]),
    (FrameLayout("jpeg", 4, 6), np.zeros(17, np.uint8)),
    (FrameLayout("jpeg", 4, 6), np.zeros((17, 1), np.uint8)),
    (FrameLayout("jpeg", 4, 6), memoryview(bytes(17))),
    (SignalLayout(2, ("load",)), np.zeros(2, signal_dtype(1))),
    (SignalLayout(2, ("load",)), np.zeros(4, signal_dtype(1))[::2]),
    (AudioLayout(100, 1, 5), np.zeros(10, np.int16)[::2]),
]


@pytest.mark.parametrize(("layout", "data"), RIGHT_DATA)
def test_data_that_are_what_the_layout_says_pass(layout: Layout, data: Any) -> None:
    stamper = Stamper("s", payload_of(layout))
    stamper.open(0)
    reading = Reading(layout=layout, data=data, t_capture_ns=0, t_end_ns=10, t_receipt_ns=10)
    header = stamper.stamp(reading, 10)
    assert header is not None
    written = np.frombuffer(as_part(data, memoryview(data).nbytes), np.uint8)
    assert written.tobytes() == as_bytes(data).tobytes() == np.asarray(data).tobytes()


def test_sound_without_length_is_the_sources_fault() -> None:
    stamper = Stamper("microphone", "audio")
    stamper.open(0)
    block = Reading(layout=AudioLayout(100, 1, 1), data=bytes(2), t_capture_ns=5, t_end_ns=5, t_receipt_ns=5)
    with pytest.raises(SensorError, match="`t_end_ns` is where the next block begins"):
        stamper.stamp(block, 6)


readings = st.lists(
    st.tuples(st.integers(0, 200), st.integers(0, 20), st.booleans(), st.none() | st.integers(0, 50), st.booleans())
)


@given(readings)
def test_whatever_a_source_says_its_stream_keeps_its_promises(said: list[Any]) -> None:
    stamper, now = Stamper("imu", "imu"), 0
    stamper.open(0)
    epoch, seq, bound = -1, 0, 0
    for t, length, new_epoch, promise, is_beat in said:
        now += 1
        if is_beat:
            header: Header | None = stamper.beat(now, promise, "")
        else:
            extra = None if promise is None else t + promise
            reading = Reading(layout=ImuLayout(1), data=bytes(32), t_capture_ns=t, t_end_ns=t + length,
                              t_receipt_ns=now, new_epoch=new_epoch, bound_ns=extra)  # fmt: skip
            header = stamper.stamp(reading, now)
        if header is None:
            continue
        assert header.epoch >= epoch
        if header.epoch > epoch:
            epoch, seq, bound = header.epoch, 0, min(header.t_capture_ns, header.bound_ns)
        assert header.seq == seq
        assert header.t_capture_ns >= bound
        assert header.bound_ns >= bound
        bound = header.bound_ns
        if not header.is_beat:
            seq += 1
            assert header.bound_ns > header.t_end_ns or promise is not None


# -- the shell ---------------------------------------------------------------------------------------------------------


def test_silence_is_filled_with_beats_that_state_the_next_number() -> None:
    made, sender, _clock = shell([line(1020 * MS), *[None] * 20])
    turn_until(made, lambda: len(sender.beats) >= 4)
    assert [header.seq for header in sender.messages] == [0]
    assert [header.seq for header in sender.beats][1:] == [1] * (len(sender.beats) - 1)
    spacing = np.diff([header.t_receipt_ns for header in sender.beats[2:]])
    assert (spacing == 100 * MS).all()
    assert {header.bound_ns for header in sender.beats[1:]} == {1020 * MS + 1}


def test_a_reading_of_another_clock_is_refused_and_said() -> None:
    made, sender, _clock = shell([line(clock_ns) for clock_ns in (1_795_914_110 * 10**9, 1020 * MS)])
    turn_until(made, lambda: sender.messages)
    assert [header.t_capture_ns for header in sender.messages] == [1020 * MS]
    said = next(header.health for header in sender.beats if header.health)
    assert re.search(r"`t_end_ns` lies 17959\d+\.\d s in the future; .*session clock", said)
    made, sender, _clock = shell([lambda context: line(context.clock.now_ns() + 900 * MS)])
    turn_until(made, lambda: sender.messages)
    assert made.failures == 0


def speaking(time: Callable[[int], int], every_ns: int = 20 * MS) -> Callable[[Any], Reading]:
    """A reading whose times are made from the session clock's, after the clock went on by ``every_ns``."""

    def read(context: Any) -> Reading:
        context.clock.advance(every_ns - 20 * MS)
        return line(time(context.clock.now_ns()))

    return read


@pytest.mark.parametrize(("factor", "unit"), [(10**3, "microseconds"), (10**6, "milliseconds"), (10**9, "seconds")])
@pytest.mark.parametrize("every_ns", [20 * MS, 2500 * MS])
def test_times_of_another_unit_are_refused_and_said(factor: int, unit: str, every_ns: int) -> None:
    read = speaking(lambda now: now // factor, every_ns)
    made, sender, clock = shell([read] * 400)
    turn_until(made, lambda: made.failures)
    assert clock.now_ns() <= 1000 * MS + 6 * max(1000 * MS, every_ns)
    said = next(header.health for header in sender.beats if header.health)
    assert re.search(r"`t_end_ns` went on by \d+ \(to \d+\) while the session clock went on by \d{10}", said)
    assert f"which fits {unit}: multiply them by {factor}; times are nanoseconds on the session clock" in said
    published = made.published
    turn_until(made, lambda: made.failures > 4)
    assert made.published == published  # opened again it is refused at once
    assert {header.health for header in sender.beats} == {"", said}  # and nothing new is said
    made.source.settings.script[:] = [speaking(lambda now: now)] * 100
    turn_until(made, lambda: made.published > published + 10)


def test_times_that_stand_still_are_refused() -> None:
    made, sender, _clock = shell([line(10 * MS)] * 400)
    turn_until(made, lambda: made.failures)
    said = next(header.health for header in sender.beats if header.health)
    assert "went on by 0 (to 10000000) while the session clock went on by" in said
    assert "multiply" not in said


def test_times_that_lie_far_back_are_refused() -> None:
    made, sender, _clock = shell([line(-700 * 1000 * MS), line(1020 * MS)])
    turn_until(made, lambda: sender.messages)
    assert made.published == made.failures == 1
    said = next(header.health for header in sender.beats if header.health)
    assert "`t_end_ns` lies 701.0 s in the past" in said
    assert "it is -700000000000, and the session clock says 1020000000; times are nanoseconds" in said


def test_a_source_that_is_late_is_no_other_clock() -> None:
    minutes = 300_000 * MS
    late = [speaking(lambda now: now - minutes)] * 300
    # Its network goes away after one reading, for minutes and more than once; then it gives all that it held back.
    away = [speaking(lambda now: now - 60_000 * MS, 60_000 * MS)]
    behind = [speaking(lambda now, back=back: now - back) for back in range(60_000 * MS, 0, -1000 * MS)]
    seldom = [speaking(lambda now: now, 30_000 * MS)] * 10
    made, _sender, _clock = shell([*late, *(away + behind) * 6, *seldom])
    turn_until(made, lambda: not made.source.settings.script, turns=2000)
    assert made.failures == 0


NO_READINGS = [(TextLayout(2), b"hi"), 0, "hi", iter([]), np.zeros(3)]


@pytest.mark.parametrize("given", NO_READINGS, ids=["pair", "int", "text", "iterator", "array"])
def test_what_is_no_reading_is_the_sources_fault(given: Any) -> None:
    made, sender, _clock = shell([given, [given], line(1020 * MS)])
    turn_until(made, lambda: sender.messages)
    said = next(header.health for header in sender.beats if header.health)
    assert said.startswith(f"`read` gave `{type(given).__name__}`, where it gives a Reading")
    assert made.failures == 2


@pytest.mark.parametrize("nothing", [None, []])
def test_a_source_that_has_nothing_and_does_not_wait_takes_no_core(nothing: Any) -> None:
    made, sender, clock = shell([])
    made.source.read = lambda: nothing  # type: ignore[method-assign]
    made.turn()  # opens it
    start_ns = clock.now_ns()
    for _ in range(250):
        made.turn()
    assert clock.now_ns() - start_ns == 250 * MS
    assert len(sender.beats) >= 3


def test_a_promise_moves_the_bound_while_silent() -> None:
    made, sender, _clock = shell([line(1020 * MS), *[None] * 20])
    turn_until(made, lambda: sender.messages)
    made.source.promise = 5000 * MS  # type: ignore[attr-defined]
    turn_until(made, lambda: len(sender.beats) >= 3)
    assert sender.beats[-1].bound_ns == 5000 * MS


def test_a_device_that_fails_is_opened_again_in_a_new_epoch() -> None:
    failing = [SensorError("unplugged"), SensorError("still away")]
    script = [line(1020 * MS), SensorError("unplugged"), lambda context: line(context.clock.now_ns())]
    made, sender, _clock = shell(script, [None, *failing, None])
    said: list[Report] = []
    made.say = said.append
    turn_until(made, lambda: len(sender.messages) == 2)
    made.turn()
    first, second = sender.messages
    assert second.epoch > first.epoch
    assert (first.seq, second.seq) == (0, 0)
    assert made.source.opened == 4  # type: ignore[attr-defined]
    assert made.source.closed >= 3  # type: ignore[attr-defined]
    assert (made.failures, made.context.dropped) == (3, {})
    assert (said[-1].sources["text"].failures, said[-1].sources["text"].dropped) == (3, {})
    assert "still away" in {header.health for header in sender.beats}
    assert sender.beats[-1].health == ""
    # It was silent meanwhile, never for longer than the longest pause, and its beats went on.
    gaps = np.diff([header.t_receipt_ns for header in sender.sent[:-1]])
    assert gaps.max() <= 120 * MS


def test_a_device_that_stays_away_ends_the_node() -> None:
    made, _sender, clock = shell([], [SensorError("away")] * 100)
    start = clock.now_ns()
    with pytest.raises(SensorError, match="away"):
        turn_until(made, lambda: False, 5000)
    assert made.source.opened == FAILURES  # type: ignore[attr-defined]
    assert clock.now_ns() - start <= FAILURES * RETRY_NS[1] + 200 * MS


def test_the_end_of_the_data_is_stated_and_beats_go_on() -> None:
    made, sender, _clock = shell([line(1020 * MS), EOFError()])
    turn_until(made, lambda: made.ended)
    turn_until(made, lambda: len(sender.beats) > 4)
    assert sender.beats[-1].seq == 1


def test_drops_are_counted() -> None:
    made, sender, _clock = shell([line(1020 * MS), line(1010 * MS), lambda context: context.count("overflow", 3)])
    sender.full = True
    turn_until(made, lambda: not made.source.settings.script)
    assert made.context.dropped == {"no_slot": 1, "order": 1, "overflow": 3}


def test_a_loan_is_memory_whether_or_not_a_slot_is_free() -> None:
    made, sender, _clock = shell([])
    layout = FrameLayout("gray8", 4, 4)
    for sender.full in (False, True):
        assert made.context.loan(layout).nbytes == 16
        assert made.context.loan(FrameLayout("jpeg", 4, 4), 100).nbytes == 100
    with pytest.raises(ValueError, match="size"):
        made.context.loan(FrameLayout("jpeg", 4, 4))


def test_a_ring_is_made_only_for_payloads_too_large_for_the_socket() -> None:
    assert ring_spec(spec(slots={"imu": 0})) is None
    assert ring_spec(spec(slots={"text": 60_000})) is None
    ring = ring_spec(spec(slots={"camera": 6_000_000}, ring_mib=64))
    assert ring is not None
    assert (ring.slots, ring.slot_bytes) == (11, 6_000_000)
    assert ring_spec(spec(slots={"camera": 50 << 20})).slots == 6  # type: ignore[union-attr]


# -- the contract ------------------------------------------------------------------------------------------------------


class Good(Source):
    payload: ClassVar[Payload] = "frame"

    def open(self) -> None:
        self.t = self.context.clock.now_ns()

    def read(self) -> Reading:
        layout, now = FrameLayout("gray8", 2, 2), self.context.clock.now_ns()
        buffer = self.context.loan(layout)
        buffer[:] = 1
        self.t = max(self.t + 1, now - 1)
        return Reading(layout=layout, data=buffer, t_capture_ns=self.t, t_end_ns=self.t, t_receipt_ns=now)


def test_a_good_source_passes() -> None:
    assert len(check_source(Good, {}, readings=3, clock=ManualClock(50 * MS))) == 6


class Reusing(Good):
    def __init__(self, settings: Any, context: Any) -> None:
        super().__init__(settings, context)
        self.buffer = np.zeros(4, np.uint8)

    def read(self) -> Reading:
        self.buffer[:] += 1
        return msgspec.structs.replace(super().read(), data=self.buffer)


class Wrong(Good):
    """One thing about its readings is wrong."""

    change: ClassVar[dict[str, Any]] = {}

    def read(self) -> Reading:
        return msgspec.structs.replace(super().read(), **self.change)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"data": b"123"}, "bytes where its layout"),
    ({"layout": ImuLayout(1)}, "on a stream of frame"),
    ({"t_end_ns": 10**18}, "after now"),
    ({"t_receipt_ns": 10**18}, "received at"),
    ({"t_capture_ns": 0, "t_end_ns": 0}, "before the bound of the last"),
    ({"uncertainty_ns": -1}, "uncertainty"),
    ({"uncertainty_ns": 0.5}, "not an int"),
    ({"bound_ns": 0}, "before its own beginning"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words for _, words in WRONG])
def test_what_breaks_the_contract_is_named(change: dict[str, Any], words: str) -> None:
    broken = type("Broken", (Wrong,), {"change": change})
    with pytest.raises((AssertionError, ValueError), match=words):
        check_source(broken, {}, clock=ManualClock(50 * MS))


def test_a_buffer_that_is_used_again_is_named() -> None:
    with pytest.raises(AssertionError, match="changed after it was handed over"):
        check_source(Reusing, {}, clock=ManualClock(50 * MS))


def test_settings_must_be_strict_and_silence_is_no_success() -> None:
    class Loose(Good):
        class Settings(msgspec.Struct):
            pass

    with pytest.raises(AssertionError, match="forbid_unknown_fields"):
        check_source(Loose, {})
    with pytest.raises(AssertionError, match="0 readings of 10"):
        check_source(Scripted, {}, turns=5, clock=ManualClock())
    with pytest.raises(AssertionError, match="without a reason"):
        CheckContext().count("")


# -- kinds -------------------------------------------------------------------------------------------------------------


def test_kinds_are_found_by_name_or_by_module(tmp_path: Path) -> None:
    assert load_kind("synthetic").__name__ == "Synthetic"
    (tmp_path / "thermometer_of_mine.py").write_text("class Thermometer: pass\n")
    assert load_kind("thermometer_of_mine:Thermometer", [tmp_path]).__name__ == "Thermometer"
    sys.path.remove(str(tmp_path))
    with pytest.raises(ConfigError, match="Did you mean `camera`"):
        load_kind("camrea")
    with pytest.raises(ConfigError, match="cannot be imported: ModuleNotFoundError"):
        load_kind("no_such_module_here:X")
    with pytest.raises(ConfigError, match=r"no class `Syntetic`.*`Synthetic`"):
        load_kind("nodes.synthetic:Syntetic")


def test_the_table_of_kinds_names_modules_of_nodes() -> None:
    assert len(KINDS) >= 8
    assert all(target.startswith("nodes.") and ":" in target for target in KINDS.values())


# -- lives -------------------------------------------------------------------------------------------------------------


def test_a_mark_outlives_its_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal\nfrom pipeline.clock import Origin\nfrom pipeline.life import *\n"
        f"mark = Mark(Life(NodeSpec(session='s', origin=Origin(0, 0), session_dir={str(tmp_path)!r}, node='text', "
        "kind='x')))\nassert mark.value == -1\nmark.value = 41\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert Mark(Life(spec(tmp_path))).value == 41


def test_orders_and_specs_are_read_back(tmp_path: Path) -> None:
    file = tmp_path / "text.json"
    file.write_bytes(msgspec.json.encode(spec(tmp_path, streams={"text": "text"})))
    assert read_spec(file) == spec(tmp_path, streams={"text": "text"})
    file.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="no node's spec"):
        read_spec(file)
    life = Life(spec(tmp_path))
    life.orders.put(Order(do="close", stream="text"))
    assert [order.stream for order in life.take_orders()] == ["text"]
    assert life.take_orders() == []


# -- steps on the wire -------------------------------------------------------------------------------------------------


def step(k: int, grids: dict[str, Any]) -> Step:
    stated = StreamManifest(verdict="ok", proven=True, used=((0, 1, 2),), epoch=0)
    manifest = Manifest(step=k, start_ns=0, end_ns=1, cause="proven", emitted_ns=2, digest="d", streams={"imu": stated})
    return Step(manifest, {}, grids)


def test_a_step_is_the_same_on_the_other_side() -> None:
    grids = {"b": np.array([[1, np.nan], [3, 4]], np.float32), "a": np.zeros((0, 6), np.float32)}
    sent = decode_step(encode_step(step(7, grids), 99))
    assert sent.manifest == step(7, grids).manifest
    assert sent.sent_ns == 99
    assert set(sent.grids) == {"a", "b"}
    for name, grid in grids.items():
        np.testing.assert_array_equal(sent.grids[name], grid)
        assert not sent.grids[name].flags.writeable


@given(st.lists(st.binary(max_size=40), max_size=3))
def test_a_damaged_step_is_refused(parts: list[bytes]) -> None:
    with pytest.raises(WireError):
        decode_step([b"step", *parts])
    good = encode_step(step(1, {"a": np.zeros((2, 2), np.float32)}), 0)
    with pytest.raises(WireError, match="grids of"):
        decode_step([*good, b"1234"])


@given(st.lists(st.integers(1, 60), min_size=1, unique=True).map(sorted), st.lists(st.integers(1, 60), max_size=4))
def test_every_index_is_a_step_or_in_one_gap(steps: list[int], announced: list[int]) -> None:
    account, seen = Account(), []
    for first in announced:
        account.announce(Gap(first, first + 5, "the align node was restarted"))
    for k in steps:
        gap = account.take(k)
        if gap is not None:
            seen += range(gap.first, gap.last + 1)
            assert gap.cause
        seen.append(k)
    assert seen == list(range(1, steps[-1] + 1))
    with pytest.raises(WireError, match="not used twice"):
        account.take(steps[-1])
    assert Account(first=None).take(50) is None


@given(st.lists(st.booleans(), min_size=1, max_size=40), st.data())
def test_every_window_has_a_prediction_or_lies_in_one_gap(predicted: list[bool], data: st.DataObject) -> None:
    account, seen, gaps = Unpredicted(), [], []
    waiting: list[int] = []
    for step, there in enumerate(predicted, 1):
        account.window(step)
        waiting += [step] if there else []
        while waiting and data.draw(st.booleans()):
            index = waiting.pop(0)
            for again in (False, True):  # a fusion node that was killed between the sending and its mark
                found, first = account.prediction(index)
                assert first is not again
                gaps += found
            seen.append(index)
    sent = data.draw(st.integers(max(seen, default=0), len(predicted)))  # the rest died with the fusion node
    gaps += account.end(sent)
    named = [k for gap in gaps for k in range(gap.first, gap.last + 1)]
    assert sorted(seen + named) == list(range(1, len(predicted) + 1))
    assert all(gap.of == "prediction" for gap in gaps)
    assert all(gap.cause == (UNHEARD if gap.last <= sent else UNMADE) for gap in gaps)
    assert not any(gap.first <= sent < gap.last for gap in gaps)


def test_predictions_that_were_never_made_are_told_from_those_that_were_lost() -> None:
    account = Unpredicted()
    for step in range(1, 31):
        account.window(step)
    account.announce(Gap(8, 9, "the fusion node was restarted", "prediction"))
    gaps = [gap for step in (3, 6, 10, 11, 12) for gap in account.prediction(step)[0]]
    assert [(gap.first, gap.last, gap.cause == UNHEARD) for gap in gaps] == [(1, 2, True), (4, 5, True), (7, 9, False)]
    account.prediction(20)
    assert [(gap.first, gap.last, gap.cause == UNHEARD) for gap in account.end(30)] == [(21, 30, True)]
    for step in range(31, 36):
        account.window(step)
    assert account.end(33) == [Gap(31, 33, UNHEARD, "prediction"), Gap(34, 35, UNMADE, "prediction")]
    account.window(36)
    account.announce(Gap(36, 36, "the fusion node was restarted", "prediction"))
    account.window(37)
    assert [gap.cause for gap in account.end(36)] == ["the fusion node was restarted", UNMADE]


@pytest.mark.parametrize("field", ["t_capture_ns", "t_end_ns", "t_receipt_ns"])
def test_a_time_that_is_no_whole_number_is_the_sources_fault(field: str) -> None:
    """No reader takes such a header, so that all of the stream would be missing without a word of whose fault it is."""
    stamper = Stamper("load", "text")
    stamper.open(0)
    times = {"t_capture_ns": 5, "t_end_ns": 5, "t_receipt_ns": 5} | {field: 5.5}
    with pytest.raises(SensorError, match=r"times .*5\.5.*, where times are whole numbers"):
        stamper.stamp(Reading(layout=TextLayout(1), data=b"a", **times), 6)


@pytest.mark.parametrize("field", ["uncertainty_ns", "bound_ns", "t_device_ns"])
@pytest.mark.parametrize("value", [1e6, "x", np.int64(5)])
def test_no_other_time_of_a_reading_may_be_anything_else(field: str, value: Any) -> None:
    """A float passes the sender, and then no reader takes the header; what cannot be compared ended the node."""
    made, sender, _clock = shell([line(1020 * MS, **{field: value}), line(1030 * MS)])
    turn_until(made, lambda: sender.messages)
    said = next(header.health for header in sender.beats if header.health)
    assert f"`{field}` {value!r}" in said
    assert said.endswith("where times are whole numbers (int) of nanoseconds; this is a fault of the source.")
