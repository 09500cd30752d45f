"""Runs one case through the aligner and the model, and says in words where they differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
from hypothesis import Phase

from pipeline.align import Aligner, Step
from pipeline.messages import Message
from tests.align_strategies import Call, Case
from tests.reference_aligner import ReferenceAligner, RefStep
from tests.reference_stream import RefStream

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
    ways = ("used", "late", "no_window", "superseded", "duplicate", "buffered")
    return bool(c["received"] == sum(c[w] for w in ways) + sum(c["rejected"].values()))


def check(case: Case, first_step: int = 1) -> list[Step]:
    """Every call of the case on both; every answer and every counter must be equal. Returns the steps."""
    aligner, model = Aligner(case.spec, first_step), ReferenceAligner(case.spec, first_step)
    steps: list[Step] = []
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


def event_time(messages: list[Message]) -> tuple[Call, ...]:
    """Calls that feed these messages in this order, one a nanosecond, and finish."""
    return (*(("feed", m, i) for i, m in enumerate(messages)), ("finish", len(messages)))


def grid_bytes(step: Step) -> dict[str, bytes]:
    return {name: grid.tobytes() for name, grid in step.grids.items()}
