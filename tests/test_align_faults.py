"""Ten thousand short sessions with everything wrong that a rig can have wrong; seeded, so that a failure comes again.

Loss, delay, jitter, reordering, duplicates, clock offset, drift and jumps, freezes, restarts, stamps from the future,
dead nodes. Whatever comes: no window is missing and none comes twice, nothing is raised, memory stays bounded, and
every message is accounted for.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from pipeline.align import Aligner, AlignSpec, All, Latest, Nearest, Resample, Step, StreamSpec
from pipeline.messages import Header, ImuLayout, Layout, Message
from tests.align_strategies import layout_of

MS = 1_000_000
HOP = 100 * MS
CASES = 10_000
CHUNKS = 10
OFFSETS = (0, 10 * MS, 20 * MS)


@dataclass(frozen=True)
class Sensor:
    """One stream, how often it speaks, and a payload to send again and again."""

    spec: StreamSpec
    period_ns: int
    layout: Layout
    data: bytes | None


def sensor(period_ms: int, spec: StreamSpec) -> Sensor:
    return Sensor(spec, period_ms * MS, *layout_of(spec, list(OFFSETS), 0))


def sensors(random: Random) -> list[Sensor]:
    """A rig of up to four streams; the limits differ from case to case."""
    idle = random.choice((None, 150 * MS, 300 * MS))
    cap = random.choice((4, 16, 4096))
    common = {"idle_ns": idle, "max_buffer": cap}
    ordered = random.random() < 0.7
    everything = [
        sensor(33, StreamSpec(name="camera", payload="frame", rule=Nearest(20 * MS), ordered=ordered, **common)),
        sensor(30, StreamSpec(name="imu", payload="imu", rule=Resample(100, 30 * MS), channels=6, **common)),
        sensor(100, StreamSpec(name="lidar", payload="sweep", rule=Latest(150 * MS), ordered=ordered, **common)),
        sensor(70, StreamSpec(name="text", payload="text", rule=All(), **common)),
    ]
    return random.sample(everything, random.randint(1, 4))


class Faults:
    """What is wrong with one stream in one session."""

    def __init__(self, random: Random, length_ns: int) -> None:
        def some(chance: float, low: int, high: int) -> int:
            return random.randint(low, high) if random.random() < chance else 0

        self.random = random
        self.loss = some(0.4, 1, 60) / 100
        self.twice = some(0.3, 1, 30) / 100
        self.future = some(0.2, 1, 10) / 100
        self.delay_ns = some(0.5, 0, 120) * MS
        self.jitter_ns = some(0.5, 1, 90) * MS
        self.offset_ns = some(0.3, -80, 80) * MS
        self.drift_ppm = some(0.3, -5000, 5000)
        self.jump_at, self.jump_ns = random.randint(0, length_ns), some(0.2, -300, 300) * MS
        self.frozen_from = random.randint(0, length_ns)
        self.frozen_until = self.frozen_from + some(0.3, 50, 400) * MS
        self.restart_at = random.randint(0, length_ns) if random.random() < 0.3 else length_ns
        self.overtakes = random.random() < 0.4
        self.beats = random.random() < 0.5

    def stamp(self, t: int) -> int:
        """What the source takes ``t`` for."""
        return t + self.offset_ns + t * self.drift_ppm // 1_000_000 + (self.jump_ns if t >= self.jump_at else 0)


def history(s: Sensor, faults: Faults, length_ns: int) -> list[tuple[int, Message]]:
    """(arrival, message) of one stream, in the order of arrival."""
    random, out = faults.random, []
    seq, epoch, last = 0, 0, 0
    for t in range(random.randint(0, s.period_ns), length_ns, s.period_ns):
        if faults.frozen_from <= t < faults.frozen_until:
            continue
        if epoch == 0 and t >= faults.restart_at:
            seq, epoch = 0, max(1, faults.stamp(t))
        capture = faults.stamp(t)
        end = capture + (OFFSETS[-1] if isinstance(s.layout, ImuLayout) else 0)
        bound = 10**17 if random.random() < faults.future else end + 1
        header = Header(
            stream=s.spec.name, seq=seq, epoch=epoch, t_capture_ns=capture, t_end_ns=end, bound_ns=bound,
            t_receipt_ns=t, layout=s.layout,
        )  # fmt: skip
        seq += 1
        arrival = max(0, t + faults.delay_ns + (random.randint(0, faults.jitter_ns) if faults.jitter_ns else 0))
        last = arrival if faults.overtakes else max(last, arrival)
        if random.random() >= faults.loss:
            out.append((last, Message(header, s.data)))
            if random.random() < faults.twice:
                out.append((last + random.randint(0, 50 * MS), Message(header, s.data)))
        elif faults.beats:
            beat = Header(
                stream=s.spec.name, seq=seq, epoch=epoch, t_capture_ns=bound, t_end_ns=bound, bound_ns=bound,
                t_receipt_ns=t,
            )  # fmt: skip
            out.append((last, Message(beat)))
    return out


def session(seed: int) -> set[str | None]:
    """Runs it; returns every verdict, reason, cause and ground of rejection that it saw."""
    random = Random(seed)
    rig, length_ns = sensors(random), random.choice((300, 500, 800)) * MS
    spec = AlignSpec(
        hop_ns=HOP,
        streams=tuple(s.spec for s in rig),
        max_delay_ns=random.choice((0, 50, 150)) * MS,
        max_future_ns=random.choice((100, 1000)) * MS,
        max_open=random.choice((2, 64)),
        max_steps_per_call=random.choice((1, 3, 64)),
    )
    aligner = Aligner(spec)
    arrivals = [x for s in rig for x in history(s, Faults(random, length_ns), length_ns)]
    arrivals.sort(key=lambda x: x[0])
    fed = dict.fromkeys((s.spec.name for s in rig), 0)
    steps: list[Step] = []
    dies_at = random.randint(0, 3 * len(arrivals))
    for i, (at, message) in enumerate(arrivals):
        steps += aligner.feed(message, at)
        fed[message.header.stream] += not message.header.is_beat
        if i == dies_at:
            steps += aligner.close(rig[0].spec.name, "dead", at)
    end = max([length_ns, *(at for at, _ in arrivals)])
    steps += aligner.finish(end)
    indices = [s.manifest.step for s in steps]
    assert indices == list(range(1, len(steps) + 1))
    assert len(steps) >= (end - (spec.max_delay_ns or 0)) // HOP
    seen: set[str | None] = {s.manifest.cause for s in steps}
    seen.update(x for s in steps for m in s.manifest.streams.values() for x in (m.verdict, m.reason))
    for s in rig:
        c = aligner.counters(s.spec.name)
        assert c.received == fed[s.spec.name]
        taken = c.used + c.late + c.no_window + c.superseded + c.duplicate + c.buffered
        assert c.received == taken + sum(c.rejected.values())
        assert c.buffered <= s.spec.max_buffer
        seen.update(f"rejected {ground}" for ground in c.rejected)
    return seen


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_ten_thousand_sessions_with_faults(chunk: int) -> None:
    seen: set[str | None] = set()
    for seed in range(chunk * CASES // CHUNKS, (chunk + 1) * CASES // CHUNKS):
        try:
            seen |= session(seed)
        except Exception as error:
            raise AssertionError(f"session({seed}) failed: {error}") from error
    assert seen >= {
        "proven", "idle", "deadline", "overflow", "end", "ok", "partial", "late", "missing", "never_started", "silent",
        "dead", "gap", "out_of_tolerance", "rejected epoch", "rejected bound", "rejected future", "rejected overflow",
    }  # fmt: skip
