"""The aligner against a brute-force model of it, and against what the design promises whatever comes.

Each property is one test. A failing case prints as a ``Case`` that can be pasted into ``check``.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pipeline.align import Aligner, AlignSpec, All, Latest, Nearest, Resample, Step, StreamSpec
from pipeline.messages import Message
from tests.align_strategies import (
    HOP,
    Case,
    beat,
    change,
    event_time_orders,
    live_cases,
    message,
    with_ticks,
)
from tests.reference_aligner import ReferenceAligner, RefStep, RefStream


PHASES = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
"""Without ``explain``, which traces every line of the model and the aligner."""


def expand(ranges: tuple[tuple[int, int, int], ...]) -> set[tuple[int, int]]:
    return {(epoch, seq) for epoch, first, last in ranges for seq in range(first, last + 1)}


def as_model(step: Step) -> RefStep:
    """What the aligner said, in the model's words."""
    m = step.manifest
    return RefStep(
        m.step, m.start_ns, m.end_ns, m.cause, m.emitted_ns,
        {
            name: RefStream(
                s.verdict, s.reason, s.coverage, s.proven, expand(s.used), expand(s.received), s.epoch, s.bound_ns,
                s.newest_ns, s.uncertainty_ns, s.idle, s.closed,
            )
            for name, s in m.streams.items()
        },
        {name: sorted((x.header.epoch, x.header.seq) for x in held) for name, held in step.messages.items()},
        dict(step.grids),
    )  # fmt: skip


def differences(expected: RefStep, found: RefStep) -> Iterator[str]:
    """In words, what the aligner says otherwise than the model."""
    for f in ("step", "start_ns", "end_ns", "cause", "emitted_ns", "messages"):
        if getattr(expected, f) != getattr(found, f):
            yield f"{f}: expected {getattr(expected, f)!r}, found {getattr(found, f)!r}"
    for name in expected.streams.keys() | found.streams.keys():
        for f in dataclasses.fields(RefStream):
            a, b = getattr(expected.streams[name], f.name), getattr(found.streams[name], f.name)
            if a != b:
                yield f"{name}.{f.name}: expected {a!r}, found {b!r}"
    if expected.grids.keys() != found.grids.keys():
        yield f"grids: expected {sorted(expected.grids)}, found {sorted(found.grids)}"
    for name in expected.grids.keys() & found.grids.keys():
        a, b = expected.grids[name], found.grids[name]
        if b.dtype != np.float32 or not np.array_equal(a, b, equal_nan=True):
            yield f"{name} grid: expected {a.tolist()}, found {b.tolist()} ({b.dtype})"


def call(aligner: Any, c: tuple[Any, ...]) -> list[Any]:
    """One call of a case."""
    return list(getattr(aligner, c[0])(*c[1:]))


def counts(aligner: Aligner, name: str) -> dict[str, Any]:
    found = msgspec.structs.asdict(aligner.counters(name))
    found["rejected"] = {reason: n for reason, n in found["rejected"].items() if n}
    return found


def accounted(c: dict[str, Any]) -> bool:
    ways = ("used", "late", "superseded", "duplicate", "buffered")
    return bool(c["received"] == sum(c[w] for w in ways) + sum(c["rejected"].values()))


def check(case: Case) -> list[Step]:
    """Every call of the case on both; every answer and every counter must be equal. Returns the steps."""
    aligner, model, steps = Aligner(case.spec), ReferenceAligner(case.spec), []
    for i, c in enumerate(case.calls):
        expected, found = call(model, c), call(aligner, c)
        steps += found
        head = f"call {i}, {c}:"
        for e, f in zip(expected, found, strict=False):
            assert not (told := "; ".join(differences(e, as_model(f)))), f"{head} step {e.step}: {told}"
        numbers = [e.step for e in expected], [f.manifest.step for f in found]
        assert numbers[0] == numbers[1], f"{head} steps: expected {numbers[0]}, found {numbers[1]}"
        for name, stream in model.streams.items():
            expected_counts, found_counts = stream.counts(), counts(aligner, name)
            assert expected_counts == found_counts, f"{head} {name}: expected {expected_counts}, found {found_counts}"
    return steps


def run(case: Case) -> list[Step]:
    aligner = Aligner(case.spec)
    return [s for c in case.calls for s in call(aligner, c)]


def told(steps: list[Step]) -> list[Any]:
    """What must not depend on how often the aligner was called, for each step, comparable with ``==``."""
    return [
        (s.manifest.step, s.manifest.digest, s.manifest.cause, s.manifest.emitted_ns, as_model(s).streams)
        for s in steps
    ]


# (1) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=250)
@given(live_cases())
def test_every_answer_is_the_models(case: Case) -> None:
    check(case)


@settings(phases=PHASES, max_examples=60)
@given(event_time_orders(), st.integers(0, 3))
def test_every_answer_is_the_models_without_limits(orders: tuple[AlignSpec, list[list[Message]]], which: int) -> None:
    spec, messages = orders
    check(Case(spec, event_time(messages[which])))


# (2) ------------------------------------------------------------------------------------------------------------------


def event_time(messages: list[Message]) -> tuple[tuple[Any, ...], ...]:
    """Calls that feed these messages in this order, one a nanosecond, and finish."""
    return (*(("feed", m, i) for i, m in enumerate(messages)), ("finish", len(messages)))


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
@given(live_cases(most_events=30))
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
            assert found["received"] == fed[s.name]
            assert accounted(found), found
            assert 0 <= found["used"] <= len(used[s.name]) <= found["used"] + found["buffered"]
            assert 0 <= found["buffered"] <= s.max_buffer
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
    assert len(grid) == n * ((times[-1] + 1) // HOP)
    for g, v in zip(points, grid, strict=True):
        neighbours = max((t for t in times if t <= g), default=None), min((t for t in times if t >= g), default=None)
        within = None not in neighbours and neighbours[1] - neighbours[0] <= 30  # type: ignore[operator]
        assert (v == pytest.approx(g)) if within else np.isnan(v)


def signal(**rule: Any) -> StreamSpec:
    return StreamSpec(name="s", payload="signal", channels=1, rule=Resample(**rule), idle_ns=None)


def ramps(spec: StreamSpec, batches: list[list[int]]) -> list[Message]:
    """Batches of samples at these times, whose values are the times."""
    out = []
    for seq, times in enumerate(b for b in batches if b):
        m = message(spec, seq, times[0], offsets=tuple(t - times[0] for t in times))
        rows = np.frombuffer(m.data, [("offset_ns", "<i8"), ("value", "<f4")]).copy()
        rows["value"] = times
        out.append(Message(m.header, rows.tobytes()))
    return out


# (4) ------------------------------------------------------------------------------------------------------------------


@settings(phases=PHASES, max_examples=100)
@given(live_cases(most_events=30), st.integers(1, 4), st.integers(1, 20))
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


# (5) ------------------------------------------------------------------------------------------------------------------


def weight(root: Any) -> int:
    """Bytes of everything that is reachable from ``root`` and is not code or a type."""
    seen: set[int] = set()
    todo, total = [root], 0
    while todo:
        x = todo.pop()
        if id(x) in seen or isinstance(x, type) or callable(x) or type(x).__name__ == "module":
            continue
        seen.add(id(x))
        total += sys.getsizeof(x)
        todo += gc.get_referents(x)
        if isinstance(x, msgspec.Struct):
            todo += [getattr(x, f) for f in x.__struct_fields__]
        if isinstance(x, np.ndarray) and x.base is None:
            total += x.nbytes if not x.flags.owndata else 0
    return total


RULES = {
    "nearest": (Nearest(150), "frame", 0),
    "latest": (Latest(250), "sweep", 0),
    "all": (All(), "text", 0),
    "resample": (Resample(3 * 10**7, 60), "signal", 1),
}


def hostile(spec: StreamSpec, kind: str) -> Iterator[tuple[Message, int]]:
    """For ever: messages and their arrivals, of a source that does its worst."""
    for i in itertools.count():
        t = 7 * i
        match kind:
            case "one loss a message":
                yield message(spec, 2 * i, t), t
            case "one epoch a message":
                yield message(spec, 0, t, epoch=t), t
            case "one beat a message":
                yield beat(spec.name, 3 * i, t), t
                yield message(spec, 3 * i + 1, t), t
            case "beats of great numbers":
                yield beat(spec.name, 10**15 * (i + 1), t), t
            case "below the bound":
                yield message(spec, i, 5 if i else 0, bound=50), t
            case "from the future":
                yield message(spec, i, 10**15 + t), t
            case "the same again":
                yield message(spec, 0, 5), t
            case "never a bound":
                yield message(spec, i + 1, t, bound=t), t
            case "all at once":
                yield message(spec, i, 3 + i // 1000, bound=3 + i // 1000), 3
            case "backwards":
                yield message(spec, 10**9 - i, t), t
            case "far apart":
                yield message(spec, i, 10**6 * i), t
            case "silent but for beats":
                yield beat(spec.name, 0, t), t


HOSTILE = (
    "one loss a message", "one epoch a message", "one beat a message", "beats of great numbers", "below the bound",
    "from the future", "the same again", "never a bound", "all at once", "backwards", "far apart",
    "silent but for beats",
)  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
@pytest.mark.parametrize("deadline", [None, 50], ids=["no deadline", "deadline"])
def test_memory_is_bounded_whatever_a_stream_does(kind: str, rule: str, ordered: bool, deadline: int | None) -> None:
    """Beside a silent stream, which without a deadline holds everything up."""
    r, payload, channels = RULES[rule]
    bad = StreamSpec(name="bad", payload=payload, rule=r, channels=channels, ordered=ordered, max_buffer=20,
                     idle_ns=None)  # fmt: skip
    silent = StreamSpec(name="silent", payload="text", rule=All(), idle_ns=None)
    spec = AlignSpec(hop_ns=HOP, streams=(bad, silent), max_delay_ns=deadline, max_open=8, max_steps_per_call=4)
    aligner, weights = Aligner(spec), []
    feed = hostile(bad, kind)
    for n in (150, 300, 1500):
        for m, at in itertools.islice(feed, n):
            aligner.feed(m, at)
            assert aligner.counters("bad").buffered <= 20
        weights.append(weight(aligner))
    assert weights[2] <= weights[1] + 4096, f"grew from {weights[0]} over {weights[1]} to {weights[2]} bytes"


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


def grid_bytes(step: Step) -> dict[str, bytes]:
    return {name: grid.tobytes() for name, grid in step.grids.items()}


@settings(phases=PHASES, max_examples=60)
@given(live_cases())
def test_what_was_said_stays_as_it_was_said(case: Case) -> None:
    """Neither later calls nor the owner of a payload's memory change a step that is out."""
    aligner, steps, kept = Aligner(case.spec), [], []
    for c in case.calls:
        if c[0] == "feed" and c[1].data:
            memory = bytearray(c[1].data)
            out = aligner.feed(Message(c[1].header, memoryview(memory)), c[2])
            memory[:] = b"\xff" * len(memory)
        else:
            out = call(aligner, c)
        steps += out
        kept += [{name: grid.copy() for name, grid in s.grids.items()} for s in out]
    for step, grids, clean in zip(steps, kept, run(case), strict=True):
        assert step.manifest.digest == clean.manifest.digest
        for name, grid in grids.items():
            assert np.array_equal(grid, step.grids[name], equal_nan=True)
            assert np.array_equal(grid, clean.grids[name], equal_nan=True)


# (8) ------------------------------------------------------------------------------------------------------------------


def lines_of(do: Any) -> int:
    """How many lines of Python ran, of whatever module."""
    n = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal n
        n += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(before)
    return n


@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "unordered"])
@pytest.mark.parametrize("deadline", [None, 50], ids=["no deadline", "deadline"])
@pytest.mark.parametrize("kind", ["bound", "seq", "tick", "capture", "beat"])
def test_operations_a_call_are_bounded(kind: str, ordered: bool, deadline: int | None) -> None:
    """A jump by 10^13 hops or numbers costs no more than one by 10^4."""
    streams = tuple(
        StreamSpec(name=name, payload=p, rule=r, channels=c, ordered=ordered, idle_ns=1000, max_buffer=64)
        for name, (r, p, c) in RULES.items()
    )
    spec = AlignSpec(hop_ns=HOP, streams=streams, max_delay_ns=deadline, max_open=8, max_steps_per_call=4)

    def worst(jump: int) -> int:
        aligner, most = Aligner(spec), 0
        for seq in range(40):
            for s in streams:
                aligner.feed(message(s, seq, 10 * seq), 10 * seq)
        for i in range(6):
            for s in streams:
                t, seq, at = 400 + 10 * i, 40 + i, 400 + 10 * i
                m = message(s, seq, t)
                match kind:
                    case "bound":
                        m = change(m, bound_ns=t + jump * HOP)
                    case "seq":
                        m = change(m, seq=seq + jump * (i + 1))
                    case "capture":
                        m = message(s, seq, t + jump * HOP * (i + 1))
                    case "tick":
                        at = jump * HOP
                    case "beat":
                        m = beat(s.name, seq + jump * (i + 1), t)
                most = max(most, lines_of(lambda m=m, at=at: aligner.feed(m, at)))
        return most

    assert worst(10**13) <= 1.5 * worst(10**4)


# The strategies themselves -----------------------------------------------------------------------------------------


def test_the_cases_reach_every_verdict_reason_cause_and_rejection() -> None:
    """A property over cases that never reach anything would prove nothing."""
    seen: set[Any] = set()

    @settings(phases=PHASES, max_examples=300, database=None, derandomize=True)
    @given(live_cases(most_events=25))
    def explore(case: Case) -> None:
        aligner = Aligner(case.spec)
        for step in (s for c in case.calls for s in call(aligner, c)):
            seen.add(step.manifest.cause)
            for s in step.manifest.streams.values():
                seen.update((s.verdict, s.reason, (s.verdict, s.proven), len({e for e, _, _ in s.used}) > 1 and "two"))
        for s in case.spec.streams:
            found = aligner.counters(s.name)
            seen.update(k for k, n in found.rejected.items() if n)
            seen.update(k for k in ("used", "late", "superseded", "duplicate", "lost", "beats") if getattr(found, k))

    explore()
    assert seen >= {
        "proven", "idle", "deadline", "overflow", "end", "two",
        "ok", "partial", "late", "missing", "never_started", "silent", "dead", "gap", "out_of_tolerance",
        ("partial", True), ("partial", False),
        "epoch", "bound", "future", "malformed", "used", "superseded", "duplicate", "lost", "beats",
    }  # fmt: skip
