"""Memory and work of the aligner stay bounded, whatever a stream does."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest

from pipeline.align import Aligner, AlignSpec, All, Latest, Nearest, Resample, StreamSpec
from pipeline.messages import Message
from tests.align_strategies import HOP, beat, change, message


def weight(root: Any) -> int:
    """Bytes of everything that is reachable from ``root`` and is not code or a type."""
    seen: set[int] = set()
    todo, total = [root], 0
    while todo:
        x = todo.pop()
        if type(x) is int:
            total += 32  # each of them: that Python keeps only one of every small integer is not the aligner's merit
            continue
        if id(x) in seen or isinstance(x, type) or callable(x) or type(x).__name__ == "module":
            continue
        seen.add(id(x))
        total += sys.getsizeof(x)
        todo += gc.get_referents(x)
        if isinstance(x, msgspec.Struct):
            todo += [getattr(x, f) for f in x.__struct_fields__]
        if isinstance(x, np.ndarray):
            todo.append(x.base)
    return total


RULES = {
    "nearest": (Nearest(150), "frame", 0),
    "latest": (Latest(250), "sweep", 0),
    "all": (All(), "text", 0),
    "resample": (Resample(3 * 10**7, 60), "signal", 1),
    "sound": (Resample(3 * 10**7, 60), "audio", 1),
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
                yield message(spec, i, 3 + i, bound=4 + i), 3
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
    silent = StreamSpec(name="silent", payload="text", rule=All(), idle_ns=None, max_buffer=20)
    spec = AlignSpec(hop_ns=HOP, streams=(bad, silent), max_delay_ns=deadline, max_open=8, max_steps_per_call=4)
    aligner, weights = Aligner(spec), []
    feed = hostile(bad, kind)
    for n in (300, 300, 1500):
        for m, at in itertools.islice(feed, n):
            aligner.feed(m, at)
            assert aligner.counters("bad").buffered <= 20
        weights.append(weight(aligner))
    assert weights[2] <= max(weights[:2]) + 4096, f"grew from {weights[0]} over {weights[1]} to {weights[2]} bytes"


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
