"""The aligner once more, slow and plain: the model that the property tests hold ``pipeline.align`` against.

What a stream says of a step is in ``tests.reference_stream``; here is when a step comes out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Any

import numpy as np

from pipeline.align import AlignSpec, Resample
from pipeline.messages import Message
from tests.reference_stream import RefStream, Stream, expiry_of


@dataclass
class RefStep:
    step: int
    start_ns: int
    end_ns: int
    cause: str
    emitted_ns: int
    streams: dict[str, RefStream] = field(default_factory=dict)
    messages: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    grids: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)


class ReferenceAligner:
    """The model of ``pipeline.align.Aligner``; steps are ``RefStep``."""

    def __init__(self, spec: AlignSpec, first_step: int = 1) -> None:
        self.spec, self.next = spec, first_step
        self.streams = {s.name: Stream(s, spec.hop_ns, first_step) for s in spec.streams}
        self.now = 0
        """The greatest time heard of."""
        self.heard = 0
        """When the last message or close was taken."""
        self.emitted_ns = 0
        self.inbox: list[tuple[int, Stream, Message | str]] = []
        """What has come and waits until the steps are out that were due before it."""

    def feed(self, message: Message, arrival_ns: int) -> list[RefStep]:
        self.now = max(self.now, arrival_ns)
        stream = self.streams[message.header.stream]
        if len(self.inbox) < sum(s.max_buffer for s in self.spec.streams):
            self.inbox.append((self.now, stream, message))
        else:
            stream.turn_away(message)
        return self._work(self.spec.max_steps_per_call)

    def close(self, stream: str, reason: str, now_ns: int) -> list[RefStep]:
        self.now = max(self.now, now_ns)
        self.inbox.append((self.now, self.streams[stream], reason))
        return self._work(self.spec.max_steps_per_call)

    def tick(self, now_ns: int) -> list[RefStep]:
        self.now = max(self.now, now_ns)
        return self._work(self.spec.max_steps_per_call)

    def finish(self, now_ns: int) -> list[RefStep]:
        self.now = max(self.now, now_ns)
        out = self._work(inf)
        for stream in self.streams.values():
            stream.shut("ended")
        while self.next <= self._last_whole_step():
            out.append(self._emit(max(self.emitted_ns, self.now), "end"))
        return out

    # -- when a step comes out ----------------------------------------------------------------------------------------

    def _work(self, budget: float) -> list[RefStep]:
        """Steps that are due before what waits in the inbox, that, the steps due before the next, and so on."""
        out: list[RefStep] = []
        while True:
            way = self._earliest(self.inbox[0][0] if self.inbox else self.now)
            if way is not None and len(out) == budget:
                return out
            if way is not None:
                out.append(self._emit(way[0], way[2]))
            elif self.inbox:
                self.heard, stream, what = self.inbox.pop(0)
                if isinstance(what, Message):
                    stream.take(what, self.heard, self.next, self.spec.max_future_ns)
                else:
                    stream.shut(what)
            else:
                return out

    def _earliest(self, until: int) -> tuple[int, int, str] | None:
        """(nominal time, rank among equal times, cause) of the head step, if it is due by ``until``."""
        ways = [w for w in (self._ready(), self._deadline(), self._crowded()) if w is not None and w[0] <= until]
        return min(ways, default=None)

    def _ready(self) -> tuple[int, int, str] | None:
        """When the last live stream is proven, or given up because its time runs out."""
        waits, lives = -inf, -inf
        for s in self.streams.values():
            if not s.state.dead:
                expiry = expiry_of(s.spec, s.state)
                lives = max(lives, expiry)
                waits = waits if s.proven(self.next, s.state) else max(waits, expiry)
        at = max(self.heard, self.emitted_ns, waits)
        if at == inf or at >= lives or self._all_said(at):
            return None
        return int(at), 0, "idle" if waits > self.heard else "proven"

    def _all_said(self, t: float) -> bool:
        """Whether only ended streams are live, and the last whole step below the greatest bound is out."""
        live = [s for s in self.streams.values() if not s.state.dead and t < expiry_of(s.spec, s.state)]
        return all(s.state.ended for s in live) and self.next > self._last_whole_step()

    def _deadline(self) -> tuple[int, int, str] | None:
        if self.spec.max_delay_ns is None:
            return None
        return self.next * self.spec.hop_ns + self.spec.max_delay_ns, 1, "deadline"

    def _crowded(self) -> tuple[int, int, str] | None:
        """Now, if more than ``max_open`` steps lie open."""
        if self._last_whole_step() - (self.next - 1) <= self.spec.max_open:
            return None
        return max(self.emitted_ns, self.heard), 2, "overflow"

    def _last_whole_step(self) -> float:
        bound = max(s.state.bound for s in self.streams.values())
        return int(bound) // self.spec.hop_ns if bound > -inf else -inf

    def _emit(self, emitted_ns: int, cause: str) -> RefStep:
        k, hop = self.next, self.spec.hop_ns
        step = RefStep(k, (k - 1) * hop, k * hop, cause, emitted_ns)
        for name, stream in self.streams.items():
            step.streams[name], content = stream.judge(k, emitted_ns)
            if step.streams[name].verdict in ("ok", "partial"):
                step.messages[name] = sorted(step.streams[name].used)
                if isinstance(stream.rule, Resample):
                    step.grids[name] = stream.values(k, content)
        self.next, self.emitted_ns = k + 1, emitted_ns
        for stream in self.streams.values():
            stream.trim(self.next)
        return step
