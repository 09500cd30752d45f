"""A simulated rover in the place of the capture nodes: four sensors of one physical world, live, with the truth.

    sources:
      rover: {kind: simulated, seed: 7}

What the sensors say is that of ``sensorium simulate rover --seed 7``, from the session's begin on; ``pipeline.sim``
says what happens there. The world runs ``LEAD_NS`` ahead of the session's clock, so that what is true is known to all
before anything of it has arrived. Needs the extra ``sim``.
"""

from __future__ import annotations

import contextlib
import heapq
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

from pipeline.life import Life, Report
from pipeline.messages import Message, Payload
from pipeline.node import PlayedStreams, decode_settings, wait_for_readers
from pipeline.recording import Label
from pipeline.sim.camera import prepare
from pipeline.sim.cues import SENSORS
from pipeline.sim.script import Spell
from pipeline.transport import Publisher, ZmqBus

if TYPE_CHECKING:
    from pipeline.sim.session import Simulation

LABEL = "label"
LEAD_NS = 400_000_000
PATIENCE_NS = 50_000_000
BEHIND_NS = 500_000_000
"""A world that is so far behind is said to be."""
STREAMS: dict[str, Payload] = {"camera": "frame", "microphone": "audio", "imu": "imu", "lidar": "sweep"}
Interval = tuple[float, float]


class Simulated:
    """Publishes the streams of a simulated rover."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``ranges``: which worlds ``seed`` draws from. ``streams``: which of the sensors (null: all four).
        ``outages_s``: spans in which a sensor is out of order, by stream, in seconds since the world began."""

        seed: Annotated[int, msgspec.Meta(ge=0)] = 0
        ranges: Literal["train", "held-out"] = "held-out"
        streams: tuple[str, ...] | None = None
        outages_s: dict[str, tuple[Interval, ...]] = {}

        def __post_init__(self) -> None:
            for name in (*(self.streams or ()), *self.outages_s):
                if name not in STREAMS:
                    raise ValueError(f"`{name}` is no sensor of the rover; it has {', '.join(STREAMS)}")
            if any(start >= end for spans in self.outages_s.values() for start, end in spans):
                raise ValueError("`outages_s`: each span must end after it begins, like {microphone: [[9, 11.5]]}")

    @classmethod
    def streams_of(cls, settings: Simulated.Settings) -> dict[str, Payload]:
        """The streams that a node with these settings publishes. Raises ConfigError where MuJoCo is missing."""
        prepare()
        return {name: payload for name, payload in STREAMS.items() if name in (settings.streams or STREAMS)}

    @classmethod
    def slots_of(cls, settings: Simulated.Settings) -> dict[str, int]:
        """None of the payloads is large enough for shared memory."""
        return dict.fromkeys(cls.streams_of(settings), 0)

    def __init__(self, life: Life) -> None:
        self.life, self.clock = life, life.clock
        self.settings: Simulated.Settings = decode_settings(Simulated, life.spec.settings)
        self.streams = set(life.spec.streams)
        self._waiting: list[tuple[int, int, Message]] = []
        self._count = 0

    def run(self) -> None:
        """Until stopped. Raises ConfigError where MuJoCo or a renderer is missing."""
        prepare()
        from pipeline.sim.session import Simulation

        spec, settings = self.life.spec, self.settings
        outages = [Spell("outage", name, *span) for name in SENSORS for span in settings.outages_s.get(name, ())]
        with contextlib.ExitStack() as stack:
            simulation = Simulation(settings.seed, settings.ranges, outages=outages)
            stack.callback(simulation.close)
            bus = stack.enter_context(contextlib.closing(ZmqBus(Path(spec.session_dir), spec.node)))
            publisher = bus.publisher(spec.node, sorted(self.streams), None, stop=self.life.stop)
            wait_for_readers(publisher, self.life)
            self.life.wait_to_begin(Report(state="loaded"))
            simulation.begin(self.clock.now_ns() + LEAD_NS)
            self.play(publisher, simulation)

    def play(self, publisher: Publisher, simulation: Simulation) -> None:
        """Lets the world run beside the clock and publishes what arrives, until stopped."""
        played = PlayedStreams(self.life, publisher, self.streams)
        while not self.life.stop.is_set():
            now = self.clock.now_ns()
            if simulation.now_ns < now + LEAD_NS:
                for arrival, what in simulation.tick():
                    self._take(publisher, arrival, what)
                behind = now - simulation.now_ns
                played.note = f"this machine simulates too slowly: {behind / 1e9:.1f} s behind" * (behind > BEHIND_NS)
            else:
                due = self._waiting[0][0] if self._waiting else now + PATIENCE_NS
                self.clock.wait_until(min(due, now + PATIENCE_NS, simulation.now_ns - LEAD_NS + 1), self.life.stop)
            self._publish_due(played)
        if self.life.ordered:
            played.end()

    def _take(self, publisher: Publisher, arrival: int, what: Message | Label) -> None:
        if isinstance(what, Label):
            publisher.publish_json(LABEL, msgspec.json.encode(what))
        elif what.header.stream in self.streams:
            self._count += 1
            heapq.heappush(self._waiting, (arrival, self._count, what))

    def _publish_due(self, played: PlayedStreams) -> None:
        while self._waiting and self._waiting[0][0] <= self.clock.now_ns():
            played.publish(heapq.heappop(self._waiting)[2])
        played.report()
