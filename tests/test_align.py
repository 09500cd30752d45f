"""The aligner against a brute-force model of it, and against what the design promises whatever comes.

Each property is one test. A failing case prints as a ``Case`` that can be pasted into ``check``.
"""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.align import Aligner, AlignSpec, Resample, StreamSpec
from pipeline.messages import AudioLayout, Header, Message
from tests.align_harness import (
    PHASES,
    accounted,
    as_model,
    call,
    check,
    counts,
    event_time,
    expand,
    grid_bytes,
    run,
    told,
)
from tests.align_strategies import (
    HOP,
    Case,
    event_time_orders,
    live_cases,
    ramps,
    with_ticks,
)

# (1) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=250)
@given(live_cases(), st.sampled_from((1, 1, 1, 2, 7)))
def test_every_answer_is_the_models(case: Case, first_step: int) -> None:
    check(case, first_step)


@settings(phases=PHASES, max_examples=60)
@given(event_time_orders(), st.integers(0, 3))
def test_every_answer_is_the_models_without_limits(orders: tuple[AlignSpec, list[list[Message]]], which: int) -> None:
    spec, messages = orders
    check(Case(spec, event_time(messages[which])))


# (2) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=100)
@given(event_time_orders())
def test_without_limits_every_order_gives_the_same_steps(orders: tuple[AlignSpec, list[list[Message]]]) -> None:
    spec, (first, *others) = orders
    expected = [(as_model(s).messages, s.manifest.step, s.manifest.digest) for s in run(Case(spec, event_time(first)))]
    for order in others:
        found = [(as_model(s).messages, s.manifest.step, s.manifest.digest) for s in run(Case(spec, event_time(order)))]
        assert found == expected


# (3) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=100)
@given(live_cases())
def test_every_message_is_counted_once_at_every_moment(case: Case) -> None:
    aligner, fed, beats = Aligner(case.spec), dict.fromkeys((s.name for s in case.spec.streams), 0), 0
    used: dict[str, set[tuple[int, int]]] = {s.name: set() for s in case.spec.streams}
    for c in case.calls:
        for step in call(aligner, c):
            for name, stream in step.manifest.streams.items():
                used[name] |= expand(stream.used)
        if c[0] == "feed":
            fed[c[1].header.stream] += not c[1].header.is_beat
            beats += c[1].header.is_beat
        for s in case.spec.streams:
            found = counts(aligner, s.name)
            assert found["received"] <= fed[s.name]  # the rest waits until steps are out that were due before it
            assert accounted(found), found
            assert found["used"] == len(used[s.name])
            assert 0 <= found["buffered"] <= s.max_buffer
    if case.calls[-1][0] == "finish":
        assert {s.name: aligner.counters(s.name).received for s in case.spec.streams} == fed
        assert sum(aligner.counters(s.name).beats for s in case.spec.streams) == beats


@given(st.lists(st.integers(1, 40), min_size=2, max_size=60), st.sampled_from((1, 2, 3, 5)), st.integers(1, 5))
def test_every_grid_sample_belongs_to_exactly_one_step(gaps: list[int], n: int, batch: int) -> None:
    """A signal whose value is its time: whatever is not a hole must lie where its time says, once, in order."""
    spec = signal(rate_hz=n * 10**9 // HOP, max_gap_ns=30)
    times = list(itertools.accumulate(gaps))
    batches = [times[i : i + batch] for i in range(0, len(times), batch)]
    steps = run(Case(AlignSpec(hop_ns=HOP, streams=(spec,)), event_time(ramps(spec, batches))))
    hole = np.full((n, 1), np.nan)
    grid = np.concatenate([np.zeros((0, 1)), *(s.grids.get("s", hole) for s in steps)])[:, 0]
    points = [j * 10**9 // (n * 10**9 // HOP) for j in range(len(grid))]
    assert len(grid) % n == 0
    assert len(grid) >= n * ((times[-1] + 1) // HOP)
    for g, v in zip(points, grid, strict=True):
        neighbours = max((t for t in times if t <= g), default=None), min((t for t in times if t >= g), default=None)
        within = None not in neighbours and neighbours[1] - neighbours[0] <= 30  # type: ignore[operator]
        assert (v == pytest.approx(g)) if within else np.isnan(v)


def signal(**rule: Any) -> StreamSpec:
    return StreamSpec(name="s", payload="signal", channels=1, rule=Resample(**rule), idle_ns=None)


# (4) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=100)
@given(live_cases(), st.integers(1, 4), st.integers(1, 20))
def test_every_step_comes_once_and_in_order(case: Case, most: int, first: int) -> None:
    spec = msgspec.structs.replace(case.spec, max_steps_per_call=most)
    aligner, expected = Aligner(spec, first_step=first), first
    for c in case.calls:
        steps = call(aligner, c)
        assert len(steps) <= most or c[0] == "finish"
        for step in steps:
            assert (step.manifest.step, step.manifest.start_ns) == (expected, (expected - 1) * spec.hop_ns)
            assert step.manifest.end_ns == expected * spec.hop_ns
            assert step.manifest.streams.keys() == {s.name for s in spec.streams}
            expected += 1


@settings(phases=PHASES, max_examples=100)
@given(live_cases(), st.integers(1, 3))
def test_how_many_steps_a_call_may_return_changes_only_when_they_are_handed_out(case: Case, most: int) -> None:
    roomy = tuple(msgspec.structs.replace(s, max_buffer=10**6) for s in case.spec.streams)
    calls = tuple(c for c in case.calls if not far(c))
    few, many = (
        told(run(Case(msgspec.structs.replace(case.spec, streams=roomy, max_steps_per_call=n), calls)))
        for n in (most, 10**6)
    )
    assert few == many[: len(few)]
    assert len(few) == len(many) or case.calls[-1][0] != "finish"


# (6) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=150)
@given(live_cases(), st.lists(st.integers(0, 5000), max_size=30))
def test_extra_ticks_change_nothing(case: Case, ticks: list[int]) -> None:
    spec = msgspec.structs.replace(case.spec, max_steps_per_call=10**6, max_open=10**9)
    case = Case(spec, tuple(c for c in case.calls if c[0] != "tick" and not far(c)))
    scale = spec.hop_ns // HOP
    assert told(run(with_ticks(case, [t * scale for t in ticks]))) == told(run(case))


def far(c: tuple[Any, ...]) -> bool:
    return c[0] == "feed" and c[1].header.bound_ns > 10**13


@settings(phases=PHASES, max_examples=150)
@given(live_cases())
def test_next_event_is_never_too_late(case: Case) -> None:
    """A node that ticks only at ``next_event_ns`` misses nothing: before that time there is nothing to come."""
    aligner = Aligner(case.spec)
    for c in case.calls:
        now, last = c[-1], None
        while (event := aligner.next_event_ns) is not None and event <= now and event != last:
            aligner.tick(event)
            last = event if event == aligner.next_event_ns else None
        if aligner.next_event_ns is None or aligner.next_event_ns > now:
            assert aligner.tick(now) == []
        call(aligner, c)


# (7) ------------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=60),
    st.lists(st.integers(1, 9), min_size=1),
    st.sampled_from((1, 2, 3, 5)),
    st.integers(1, 90),
)
def test_grids_do_not_depend_on_how_samples_were_batched(gaps: list[int], sizes: list[int], n: int, gap: int) -> None:
    spec = signal(rate_hz=n * 10**9 // HOP, max_gap_ns=gap)
    times = list(itertools.accumulate(gaps))
    batches, i = [], 0
    for size in itertools.cycle(sizes):
        batches.append(times[i : i + size])
        i += size
        if i >= len(times):
            break
    rig = AlignSpec(hop_ns=HOP, streams=(spec,))
    one_by_one, batched = (
        run(Case(rig, event_time(ramps(spec, b)))) for b in ([[t] for t in times], batches)
    )  # fmt: skip
    assert [grid_bytes(s) for s in one_by_one] == [grid_bytes(s) for s in batched]


@settings(phases=PHASES, max_examples=60)
@given(live_cases())
def test_what_was_said_stays_as_it_was_said(case: Case) -> None:
    """No later call changes a step that is out."""
    aligner, steps, kept = Aligner(case.spec), [], []
    for c in case.calls:
        out = call(aligner, c)
        steps += out
        kept += [(msgspec.msgpack.encode(s.manifest), grid_bytes(s), dict(s.messages)) for s in out]
    assert [(msgspec.msgpack.encode(s.manifest), grid_bytes(s), dict(s.messages)) for s in steps] == kept


# The strategies themselves -----------------------------------------------------------------------------------------


COUNTED = ("used", "late", "no_window", "superseded", "duplicate", "lost", "beats")


REACHED = {
    "proven", "idle", "deadline", "overflow", "end", "two",
    "ok", "partial", "late", "missing", "never_started", "silent", "dead", "gap", "out_of_tolerance",
    ("partial", True), ("partial", False),
    "epoch", "bound", "future", "malformed", *(f"{name} counted" for name in COUNTED),
}  # fmt: skip


def test_the_cases_reach_every_verdict_reason_cause_and_rejection() -> None:
    """A property over cases that never reach anything would prove nothing. Which cases there are depends on what else
    was imported (hypothesis draws constants from there), and some of these are rare."""
    seen: set[Any] = set()

    @settings(phases=PHASES, max_examples=300, database=None, derandomize=True)
    @given(live_cases())
    def explore(case: Case) -> None:
        look(case)

    @settings(phases=PHASES, max_examples=2000, database=None)
    @given(live_cases())
    def explore_further(case: Case) -> None:
        if not seen >= REACHED:
            look(case)

    def look(case: Case) -> None:
        aligner = Aligner(case.spec)
        for step in (s for c in case.calls for s in call(aligner, c)):
            seen.add(step.manifest.cause)
            for s in step.manifest.streams.values():
                seen.update((s.verdict, s.reason, (s.verdict, s.proven), len({e for e, _, _ in s.used}) > 1 and "two"))
        for s in case.spec.streams:
            found = aligner.counters(s.name)
            seen.update(k for k, n in found.rejected.items() if n)
            seen.update(f"{name} counted" for name in COUNTED if getattr(found, name))

    explore()
    if not seen >= REACHED:
        explore_further()
    assert seen >= REACHED


# Manifests ------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=100)
@given(live_cases())
def test_a_manifest_is_enough_to_make_the_step_again(case: Case) -> None:
    """From the messages that the manifests list as received, and nothing else."""
    sent: dict[tuple[str, int, int], Message] = {}
    aligner, again = Aligner(case.spec), Aligner(case.spec)
    for c in case.calls:
        if c[0] == "feed" and not c[1].header.is_beat:
            sent.setdefault((c[1].header.stream, c[1].header.epoch, c[1].header.seq), c[1])
        for step in call(aligner, c):
            received = {
                name: [sent[name, epoch, seq] for epoch, seq in sorted(expand(s.received))]
                for name, s in step.manifest.streams.items()
            }
            made = again.obey(step.manifest, received)
            assert made.manifest.digest == step.manifest.digest
            assert grid_bytes(made) == grid_bytes(step)


@pytest.mark.parametrize("before", [0, 60])
def test_who_begins_in_the_middle_waits_for_the_whole_filter(before: int) -> None:
    """Blocks that come too late for any step say how far the filter of those to come reaches. Without it a step would
    be final before the samples that its last points need, and made again from its manifest it would not be."""
    MS = 1_000_000
    rule = Resample(rate_hz=4000, max_gap_ns=20 * MS, method="band_limited")
    sound = StreamSpec(name="s", payload="audio", rule=rule, channels=1)
    spec = AlignSpec(hop_ns=100 * MS, streams=(sound,))
    first = before // 5 + 3 if before else 1
    aligner, again = Aligner(spec, first), Aligner(spec, first)
    steps = []
    blocks: dict[tuple[int, int], Message] = {}
    for seq in range(before, before + 40):
        start, end = seq * 20 * MS, (seq + 1) * 20 * MS
        header = Header(
            stream="s", seq=seq, epoch=0, t_capture_ns=start, t_end_ns=end, bound_ns=end, t_receipt_ns=end,
            layout=AudioLayout(rate_hz=8000, channels=1, samples=160),
        )  # fmt: skip
        blocks[0, seq] = Message(header, np.full(160, seq, "<i2").tobytes())
        for step in aligner.feed(blocks[0, seq], end):
            assert step.manifest.emitted_ns > step.manifest.end_ns, "the filter reaches into the next block"
            steps.append(step)
    assert len(steps) >= 5
    for step in steps:
        received = [blocks[key] for key in sorted(expand(step.manifest.streams["s"].received))]
        assert again.obey(step.manifest, {"s": received}).manifest.digest == step.manifest.digest
