"""Small histories worked out by hand. Each must hold for the aligner and for the model that the properties rest on.

A row is one call and the steps that it brings out, as ``said`` writes them: step, cause @ nominal time, and for every
stream its verdict, reason, coverage if it is not 1, and the numbers of the messages used.
"""

from __future__ import annotations

import doctest
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

import pipeline.align
from pipeline.align import Aligner, AlignSpec, All, Latest, Nearest, Resample, Rule, StreamSpec
from pipeline.errors import ConfigError
from pipeline.messages import AudioLayout, Header, Message, SignalLayout, TextLayout
from tests.align_harness import as_model, call
from tests.align_strategies import beat, change, message, ramps
from tests.reference_aligner import ReferenceAligner, RefStep

Make = Callable[..., Any]
Rows = list[tuple[tuple[Any, ...], list[str]]]


@pytest.fixture(params=[ReferenceAligner, Aligner], ids=["model", "aligner"])
def make(request: pytest.FixtureRequest) -> Make:
    return request.param  # type: ignore[no-any-return]


def stream(rule: Rule, name: str = "s", payload: Any = "text", **more: Any) -> StreamSpec:
    return StreamSpec(name=name, payload=payload, rule=rule, **{"idle_ns": None, **more})


def said(step: RefStep) -> str:
    parts = [f"{step.step} {step.cause}@{step.emitted_ns}"]
    for name, s in sorted(step.streams.items()):
        verdict = s.verdict + (f"/{s.reason}" if s.reason else "")
        if s.verdict == "partial":
            verdict += f"{s.coverage:.2f}" + ("" if s.proven else "?")
        numbers = "".join(f" {seq}" if epoch == 0 else f" {epoch}:{seq}" for epoch, seq in sorted(s.used))
        parts.append(f"{name}={verdict}{numbers}")
    return " ".join(parts)


def play(make: Make, rows: Rows, *streams: StreamSpec, **spec: Any) -> Any:
    aligner = make(AlignSpec(hop_ns=100, streams=streams, **spec))
    for c, expected in rows:
        found = [s if isinstance(s, RefStep) else as_model(s) for s in call(aligner, c)]
        assert [said(s) for s in found] == expected, c
    return aligner


def test_nearest(make: Make) -> None:
    s = stream(Nearest(40), payload="frame")
    rows: Rows = [
        (("feed", message(s, 0, 90), 95), []),  # one at 95 could still be nearer to 100
        (("feed", message(s, 1, 105), 106), ["1 proven@106 s=ok 1"]),
        (("feed", message(s, 2, 190), 191), []),
        (("feed", message(s, 3, 210), 211), ["2 proven@211 s=ok 2"]),  # as far as 190: the earlier counts
        (("feed", message(s, 4, 260), 261), []),
        (("feed", message(s, 5, 340), 341), ["3 proven@341 s=missing/out_of_tolerance"]),  # both exactly too far
        (("feed", message(s, 6, 400), 402), ["4 proven@402 s=ok 6"]),  # none can be nearer than 0
    ]
    play(make, rows, s)


def test_latest(make: Make) -> None:
    s = stream(Latest(150), payload="sweep")
    rows: Rows = [
        (("feed", message(s, 0, 50), 51), []),
        (("feed", beat("s", 1, 99), 99), []),  # one at 99 could still come
        (("feed", beat("s", 1, 100), 100), ["1 proven@100 s=ok 0"]),
        (("feed", beat("s", 1, 350), 355), ["2 proven@355 s=ok 0", "3 proven@355 s=missing/out_of_tolerance"]),
        (("feed", message(s, 1, 400), 401), ["4 proven@401 s=missing/out_of_tolerance"]),  # E(4) is not before E(4)
        (("finish", 401), []),
    ]
    play(make, rows, s)


def test_all_counts_what_was_lost(make: Make) -> None:
    s = stream(All())
    rows: Rows = [
        (("feed", message(s, 0, 0), 0), []),
        (("feed", message(s, 1, 99), 99), ["1 proven@99 s=ok 0 1"]),  # its bound is 100
        (("feed", message(s, 2, 110), 111), []),
        (("feed", message(s, 4, 150), 151), []),  # 3 lies between 111 and 150
        (("feed", message(s, 5, 250), 251), ["2 proven@251 s=partial0.67 2 4"]),
        (("feed", message(s, 8, 430), 431), ["3 proven@431 s=partial0.33 5", "4 proven@431 s=missing/gap"]),
        (("feed", beat("s", 9, 600), 600), ["5 proven@600 s=partial0.33 8", "6 proven@600 s=ok"]),
    ]
    aligner = play(make, rows, s)
    if make is Aligner:
        assert aligner.counters("s").lost == 3


def test_resample(make: Make) -> None:
    """Three points a hop: 0 33 66 | 100 133 166 | 200 233 266 | 300 333 366. Values are times."""
    s = stream(Resample(30_000_000, 60), payload="signal", channels=1)
    first, second, third, fourth = ramps(s, [[0, 50], [65, 70], [100, 170], [200]])
    fifth = change(message(s, 0, 260), epoch=250)
    rows: Rows = [
        (("feed", first, 51), []),
        (("feed", second, 71), ["1 proven@71 s=ok 0 1"]),  # 70 stands right of 66
        (("feed", third, 171), ["2 proven@171 s=partial0.33 2"]),  # 70 ns apart: 133 and 166 stay a hole
        (("feed", fourth, 201), []),
        (("feed", fifth, 261), []),  # 233 lies between two epochs; 266 is still open
        (("feed", beat("s", 1, 320, 250), 320), []),  # 320 could still be the right neighbour of 266
        (("feed", beat("s", 1, 321, 250), 321), ["3 proven@321 s=partial0.33 3"]),
    ]
    play(make, rows, s)
    aligner = make(AlignSpec(hop_ns=100, streams=(s,)))
    (one,), (two,) = aligner.feed(first, 51) + aligner.feed(second, 71), aligner.feed(third, 171)
    assert one.grids["s"][:, 0].tolist() == [0.0, 33.0, 66.0]
    assert np.array_equal(two.grids["s"][:, 0], [100.0, np.nan, np.nan], equal_nan=True)
    assert (one.grids["s"].shape, one.grids["s"].dtype) == ((3, 1), np.float32)


def test_resample_at_exact_gap_and_equal_times(make: Make) -> None:
    """Neighbours exactly max_gap apart still count; of equal times the last counts at that time, the first before."""
    s = stream(Resample(20_000_000, 60), payload="signal", channels=1)  # 0 50 | 100 150
    first, _ = ramps(s, [[20, 80, 100, 100, 160], [1]])
    rows = np.frombuffer(first.data, [("offset_ns", "<i8"), ("value", "<f4")]).copy()
    rows["value"] = [0, 60, 1, 7, 13]
    aligner = make(AlignSpec(hop_ns=100, streams=(s,)))
    one, two = aligner.feed(Message(first.header, rows.tobytes()), 161)
    assert np.array_equal(one.grids["s"][:, 0], [np.nan, 30.0], equal_nan=True)
    assert two.grids["s"][:, 0].tolist() == [7.0, 12.0]


def test_values_that_were_not_measured_are_no_holes(make: Make) -> None:
    s = stream(Resample(10_000_000, 100), payload="imu", channels=6)
    m = message(s, 0, 0)
    rows = np.frombuffer(m.data, [("offset_ns", "<i8"), ("accel", "<f4", 3), ("gyro", "<f4", 3)]).copy()
    rows["gyro"] = np.nan
    (step,) = make(AlignSpec(hop_ns=100, streams=(s,))).feed(Message(m.header, rows.tobytes()), 0)
    found = step if isinstance(step, RefStep) else as_model(step)
    assert (found.streams["s"].verdict, found.streams["s"].coverage) == ("ok", 1.0)
    assert np.isnan(step.grids["s"]).tolist() == [[False, False, False, True, True, True]]


def test_a_message_at_the_deadline_has_missed_it(make: Make) -> None:
    s = stream(Nearest(40), payload="frame")
    rows: Rows = [
        (("feed", message(s, 0, 90), 95), []),
        (("feed", message(s, 1, 104), 150), ["1 deadline@150 s=partial1.00? 0"]),
        (("tick", 249), []),
        (("tick", 999), [f"{k} deadline@{100 * k + 50} s=late" for k in range(2, 10)]),
        (("feed", message(s, 2, 990), 1000), []),
        (("feed", message(s, 3, 1030), 1040), ["10 proven@1040 s=ok 2"]),
    ]
    play(make, rows, s, max_delay_ns=50)


def test_an_idle_stream_is_not_waited_for(make: Make) -> None:
    a, b = stream(All(), "a", idle_ns=500), stream(All(), "b", idle_ns=150)
    rows: Rows = [
        (("feed", message(a, 0, 100), 100), []),  # b is waited for from the start until its limit
        (("feed", message(a, 1, 200), 200), ["1 idle@150 a=ok b=missing/never_started",
                                             "2 proven@200 a=ok 0 b=missing/never_started"]),
        (("feed", message(b, 0, 250), 260), []),
        (("feed", message(a, 2, 300), 300), []),
        (("tick", 409), []),
        (("tick", 500), ["3 idle@410 a=ok 1 b=partial1.00? 0"]),
        (("feed", message(a, 3, 400), 500), ["4 proven@500 a=ok 2 b=missing/silent"]),
        (("feed", message(b, 1, 490), 510), []),  # it is back
        (("feed", message(a, 4, 500), 520), []),
        (("feed", message(b, 2, 505), 530), ["5 proven@530 a=ok 3 b=ok 1"]),
        (("tick", 99999), []),  # when all are idle, only a deadline could bring more
    ]  # fmt: skip
    play(make, rows, a, b)


def test_a_flood_of_rejected_messages_is_idle_too(make: Make) -> None:
    a, b = stream(All(), "a"), stream(All(), "b", idle_ns=50)
    flood: Rows = [(("feed", change(message(b, i, 1), bound_ns=10), 10 * i), []) for i in range(1, 6)]
    rows: Rows = [
        (("feed", message(b, 0, 9), 9), []),
        *flood,
        (("feed", beat("a", 0, 100), 55), []),
        (("tick", 70), ["1 idle@59 a=ok b=partial1.00? 0"]),
    ]
    play(make, rows, a, b)


def test_the_dead_are_not_waited_for_until_they_speak(make: Make) -> None:
    a, b = stream(All(), "a"), stream(All(), "b")
    rows: Rows = [
        (("feed", message(a, 0, 100), 100), []),
        (("close", "b", "dead", 120), ["1 proven@120 a=ok b=missing/dead"]),
        (("feed", message(a, 1, 200), 200), ["2 proven@200 a=ok 0 b=missing/dead"]),
        (("feed", message(b, 0, 210), 210), []),
        (("feed", message(a, 2, 300), 300), []),
        (("feed", beat("b", 1, 300), 305), ["3 proven@305 a=ok 1 b=ok 0"]),
        (("close", "b", "ended", 310), []),
        (("feed", message(b, 1, 320), 320), []),  # an end is final
        (("feed", message(a, 3, 400), 400), ["4 proven@400 a=ok 2 b=ok"]),
        (("close", "a", "ended", 420), []),  # the last whole step below the greatest bound is out
        (("tick", 9999), []),
    ]
    aligner = play(make, rows, a, b)
    if make is Aligner:
        assert aligner.counters("b").rejected == {"bound": 1}


def test_too_many_open_steps_force_the_oldest_out(make: Make) -> None:
    a, b = stream(All(), "a"), stream(All(), "b")
    rows: Rows = [
        (("feed", message(a, 0, 299), 299), []),
        (("feed", beat("a", 1, 399), 399), []),
        (("feed", beat("a", 1, 400), 400), ["1 overflow@400 a=ok b=late"]),
        (("feed", beat("a", 1, 10**6), 401), ["2 overflow@401 a=ok b=late", "3 overflow@401 a=ok 0 b=late"]),
        (("feed", beat("b", 0, 10**6), 402), ["4 overflow@401 a=ok b=late", "5 overflow@401 a=ok b=late"]),
    ]
    play(make, rows, a, b, max_open=3, max_steps_per_call=2)


def test_the_end(make: Make) -> None:
    a, b = stream(All(), "a"), stream(All(), "b")
    rows: Rows = [
        (("feed", message(a, 0, 350), 350), []),
        (("feed", message(b, 0, 150), 360), ["1 proven@360 a=ok b=ok"]),
        (("finish", 400), ["2 end@400 a=ok b=ok 0", "3 end@400 a=ok b=ok"]),
    ]
    play(make, rows, a, b)


def test_an_unordered_bound_proves_only_when_all_lower_numbers_have_come(make: Make) -> None:
    s = stream(All(), ordered=False)
    rows: Rows = [
        (("feed", message(s, 1, 110), 110), []),
        (("feed", message(s, 3, 230), 120), []),
        (("feed", message(s, 0, 50), 130), ["1 proven@130 s=ok 0"]),
        (("feed", message(s, 0, 50), 131), []),
        (("feed", message(s, 2, 120), 140), ["2 proven@140 s=ok 1 2"]),
    ]
    aligner = play(make, rows, s)
    if make is Aligner:
        c = aligner.counters("s")
        assert (c.received, c.used, c.duplicate, c.buffered, c.lost) == (5, 3, 1, 1, 0)


def test_every_way_to_be_refused() -> None:
    s = stream(Nearest(150), payload="frame", max_buffer=3)
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,), max_future_ns=50))

    def feed(m: Message, at: int) -> None:
        aligner.feed(m, at)

    feed(message(s, 0, 300), 300)  # step 1 (100 ± 150) is proven empty
    feed(message(s, 0, 300), 301)  # duplicate
    feed(message(s, 1, 290), 302)  # below the bound
    feed(message(s, 2, 353), 302)  # 1 ns too far in the future (its bound is)
    feed(change(message(s, 3, 310), layout=TextLayout(bytes=2)), 303)  # not a frame
    feed(message(s, 0, 305, epoch=304), 304)  # a new epoch
    feed(message(s, 4, 310), 305)  # of the old one
    feed(message(s, 1, 306, epoch=304), 306)
    feed(message(s, 2, 307, epoch=304), 307)  # no room
    feed(message(s, 0, 250, epoch=308), 308)  # a new epoch that begins below the bound
    c = msgspec.structs.asdict(aligner.counters("s"))
    rejected = {"bound": 1, "future": 1, "malformed": 1, "epoch": 2, "overflow": 1}
    assert {k: n for k, n in c.items() if n} == {"received": 10, "duplicate": 1, "used": 1, "buffered": 2,
                                                 "rejected": rejected}  # fmt: skip


@pytest.mark.parametrize("rule", [All(), Resample(10**8, 100)])
@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (("a",), "has 1 channel (`a`), where 2 are taken"),
        (("b", "a"), "calls its channel 1 `b`, where `a` is taken (they are the same ones in another order)"),
        (("a", "c"), "calls its channel 2 `c`, where `b` is taken"),
        (("a", "b", "c", "d", "e", "f"), "has 6 channels (`a`, `b`, `c`, `d` and 2 more), where 2 are taken"),
        (("a", "b"), ""),
    ],
)
def test_a_signal_of_other_channels_is_refused_and_told(rule: Rule, sent: tuple[str, ...], words: str) -> None:
    s = stream(rule, payload="signal", channels=2 if isinstance(rule, Resample) else 0, channel_names=("a", "b"))
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,)))
    layout = SignalLayout(1, sent)
    for seq, t in enumerate((50, 150, 250)):
        aligner.feed(Message(change(message(s, seq, t), layout=layout).header, bytes(8 + 4 * len(sent))), t)
    assert aligner.misfit("s") == words
    assert aligner.counters("s").rejected == ({"malformed": 3} if words else {})


def test_another_payload_or_number_of_audio_channels_is_told() -> None:
    s = stream(Resample(10**8, 100), payload="audio", channels=2)
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,)))
    assert aligner.misfit("s") == ""
    aligner.feed(change(message(s, 0, 50), layout=AudioLayout(16_000, 1, 1)), 50)
    assert aligner.misfit("s") == "has 1 channel, where 2 are taken"
    aligner.feed(change(message(s, 1, 60), layout=TextLayout(bytes=2)), 60)
    assert aligner.misfit("s") == "carries text, where audio is taken"


@pytest.mark.parametrize(("payload", "channels"), [("imu", 0), ("imu", 3), ("signal", 0), ("audio", 0)])
def test_a_grid_needs_its_columns(payload: Any, channels: int) -> None:
    """Left out, they are 0, and every message would be refused."""
    with pytest.raises(ConfigError, match=f"'s' is resampled to {channels} columns; its `channels` are [16]"):
        Aligner(AlignSpec(hop_ns=100, streams=(stream(Resample(10**8, 100), payload=payload, channels=channels),)))


def test_a_class_is_no_rule() -> None:
    with pytest.raises(ConfigError, match=r"the rule of stream 's' is .*All.*; rules are .* and All\(\)"):
        Aligner(AlignSpec(hop_ns=100, streams=(stream(All),)))  # type: ignore[arg-type]


def test_a_late_message_may_still_serve_a_later_step() -> None:
    s = stream(Latest(150), payload="sweep")
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,), max_delay_ns=20))
    assert [x.manifest.streams["s"].verdict for x in aligner.feed(message(s, 0, 60), 130)] == ["late"]
    assert [x.manifest.streams["s"].used for x in aligner.tick(220)] == [((0, 0, 0),)]
    assert [x.manifest.streams["s"].verdict for x in aligner.feed(message(s, 1, 149), 320)] == ["late"]
    c = aligner.counters("s")
    assert (c.received, c.used, c.late, c.superseded, c.buffered) == (2, 1, 1, 0, 0)


def test_what_came_too_late_is_told_from_what_no_step_needed() -> None:
    s = stream(Nearest(20))
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,), max_delay_ns=150))

    def after(seq: int, t: int, at: int) -> tuple[int, int, int]:
        aligner.feed(message(s, seq, t), at)
        c = aligner.counters("s")
        return c.late, c.no_window, c.used

    assert after(0, 95, 96) == (0, 0, 0)
    assert after(1, 106, 107) == (0, 0, 1)  # proves step 1, and is farther from it: nobody needs it
    assert after(2, 150, 151) == (0, 1, 1)  # between two steps
    aligner.tick(350)  # the deadline of step 2
    assert after(3, 185, 351) == (1, 1, 1)  # would have been near enough for it
    assert after(4, 250, 352) == (1, 2, 1)  # late as well, but between two steps whenever it had come
    assert after(5, 300, 353) == (1, 2, 2)  # nothing can be nearer to step 3
    assert after(6, 330, 354) == (1, 3, 2)


def test_a_stream_that_was_not_declared_is_the_callers_mistake() -> None:
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(stream(All()),)))
    with pytest.raises(ValueError, match="nobody"):
        aligner.feed(beat("nobody", 0, 0), 0)


def test_a_hop_without_a_whole_number_of_samples_is_refused() -> None:
    """16 kHz in 33 ms is 528 samples, but 44.1 kHz in 33 ms is 1455.3: the error names the nearest hop."""
    spec = stream(Resample(44_100, 10**8), payload="audio", channels=1)
    with pytest.raises(ConfigError, match="hop"):
        Aligner(AlignSpec(hop_ns=33_000_000, streams=(spec,)))
    Aligner(AlignSpec(hop_ns=33_000_000, streams=(stream(Resample(16_000, 10**8), payload="audio", channels=1),)))


def test_a_step_that_touches_two_epochs_says_so() -> None:
    s = stream(All())
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,)))
    aligner.feed(message(s, 0, 10), 10)
    aligner.feed(message(s, 0, 50, epoch=50), 50)
    (step,) = aligner.feed(message(s, 1, 100, epoch=50), 100)
    assert step.manifest.streams["s"].used == ((0, 0, 0), (50, 0, 0))
    assert step.manifest.streams["s"].epoch == 50
    assert [m.header.t_capture_ns for m in step.messages["s"]] == [10, 50]


def test_a_new_epoch_closes_the_old_one_and_its_lost_tail_is_not_guessed() -> None:
    s = stream(All())
    aligner = Aligner(AlignSpec(hop_ns=100, streams=(s,)))
    aligner.feed(message(s, 4, 10), 10)  # 0 to 3 were sent before anyone listened
    aligner.feed(Message(Header(stream="s", seq=0, epoch=60, t_capture_ns=60, t_end_ns=60, bound_ns=60,
                                t_receipt_ns=60)), 60)  # fmt: skip
    aligner.feed(message(s, 5, 61), 62)
    c = aligner.counters("s")
    assert (c.lost, c.rejected, c.beats) == (4, {"epoch": 1}, 1)


@pytest.mark.parametrize(
    ("rule", "said_of_both"),
    [
        (Nearest(50), ["1 proven@290 s=partial1.00 1", "2 proven@290 s=partial1.00 260:1"]),
        (Latest(50), ["1 proven@290 s=partial1.00 1", "2 proven@290 s=missing/gap"]),
        (All(), ["1 proven@290 s=partial0.67 0 1", "2 proven@290 s=missing/gap"]),
    ],
)
def test_what_an_epoch_lost_first_may_have_been_captured_before_it_opened(
    make: Make, rule: Rule, said_of_both: list[str]
) -> None:
    """That a source's clock has jumped is seen in a message when that has come, a while after it was captured."""
    rows: Rows = [
        (("feed", message(stream(rule), 0, 40), 100), []),
        (("feed", message(stream(rule), 1, 95), 155), []),
        # The epoch's first message, of 199 say, came at 260, when it was opened, and was lost on its way to here.
        (("feed", message(stream(rule), 1, 230, epoch=260), 290), said_of_both),
    ]
    play(make, rows, stream(rule))


def test_the_digest_is_of_content_and_nothing_that_depends_on_arrival() -> None:
    s = stream(Resample(30_000_000, 60), payload="signal", channels=1)
    one, two = ramps(s, [[0, 50], [100]])
    other = Message(two.header, message(s, 1, 100).data)
    steps = [Aligner(AlignSpec(hop_ns=100, streams=(s,))) for _ in range(3)]
    digests = []
    for aligner, second, delay in zip(steps, (two, two, other), (0, 77, 0), strict=True):
        aligner.feed(one, 51 + delay)
        digests += [x.manifest.digest for x in aligner.feed(second, 101 + delay)]
    assert digests[0] == digests[1] != digests[2]


def test_the_tables_in_the_docstring() -> None:
    result = doctest.testmod(pipeline.align)
    assert result.attempted > 5
    assert result.failed == 0
