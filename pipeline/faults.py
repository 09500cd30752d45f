"""``replay --faults``: what a session would have been if its sensors, clocks and wires had been worse.

A file of faults is applied to a recording's messages, each fault by itself and, if asked, all together. What comes of
it runs through the *live* rules (deadline, idleness, guards: those of the recording's rig, or the defaults) in the
session's own time, beside the clean run, and the two are compared window by window and prediction by prediction.

Faults are seeded per fault and stream, so that a run can be repeated and a further fault changes no other. They work
on messages as they come (``faulty`` is a pure generator): whatever a fault holds back is all that is in memory.

============= ========================================================= ============================================
kind          what happens to a stream's messages                       what the aligner makes of it
============= ========================================================= ============================================
``loss``      a share vanishes, if asked in runs of ``run`` on average  losses, found by number
``delay``     they arrive ``delay_ms`` later                            late once beyond the deadline
``jitter``    they arrive up to ``jitter_ms`` later, still in order     the same
``reorder``   a share arrives ``delay_ms`` later and is overtaken       waits for what is outstanding
``duplicate`` a share arrives twice                                     duplicate
``offset``    stamps are wrong by ``offset_ms``                         content that is somewhere else in time
``drift``     stamps run away by ``drift_ppm``                          the same, growing
``jump``      the clock jumps by ``jump_ms`` at ``at_s``                a new epoch; if back, rejected until it is over
``freeze``    nothing from ``start_s`` to ``end_s``, then all at once   silent or late
``restart``   the node dies at ``at_s`` and is away for ``away_s``      dead, then a new epoch
``future``    a share is stamped ``ahead_ms`` into the future           rejected, beyond what the rig allows
``noise``     payloads are disturbed (``pipeline.disturb``)             nothing: it looks at no payload
============= ========================================================= ============================================
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Annotated, Any

import msgspec

from pipeline.disturb import Disturber
from pipeline.messages import Header, Message
from pipeline.strict import Document, listed, nearest

Item = tuple[Message, int]
"""A message or beat and its arrival."""

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Positive = Annotated[float, msgspec.Meta(gt=0)]


def _ns(value: float, unit: int) -> int:
    return round(value * unit)


class _Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag_field="kind"):
    """What every fault has: which ``streams`` (none named: all), and from when to when in session time (a message
    belongs to the time at which it arrived)."""

    streams: tuple[str, ...] = ()
    start_s: NotNegative = 0.0
    end_s: NotNegative | None = None

    def active(self, arrival_ns: int) -> bool:
        """Whether the fault is there at this time."""
        return _ns(self.start_s, 10**9) <= arrival_ns and (self.end_s is None or arrival_ns < _ns(self.end_s, 10**9))

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        """What is done to one stream, a message at a time; arrivals may only become later."""
        raise NotImplementedError


class Loss(_Fault, frozen=True, tag="loss"):
    """Messages vanish on the way: each by itself, or in runs of ``run`` messages on average."""

    share: Share
    run: Annotated[float, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        least = 1.0 if self.share == 1 else self.share / (1 - self.share)
        if self.run is not None and self.run < least:
            raise ValueError(f"a `share` of {self.share:g} cannot be lost in runs of less than {least:g}")

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        # Two states. The bad one is left with probability 1/run and takes up ``share`` of all messages.
        stay = self.share if self.run is None or self.share == 1 else 1 - 1 / self.run
        enter = self.share if self.run is None or self.share == 1 else self.share / (self.run * (1 - self.share))
        losing = False

        def apply(message: Message, arrival_ns: int) -> list[Item]:
            nonlocal losing
            if message.header.is_beat or not self.active(arrival_ns):
                return [(message, arrival_ns)]
            losing = random.random() < (stay if losing else enter)
            return [] if losing else [(message, arrival_ns)]

        return apply


class Delay(_Fault, frozen=True, tag="delay"):
    """Messages arrive later, by a constant."""

    delay_ms: NotNegative

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        later_ns = _ns(self.delay_ms, 10**6)
        return lambda message, at: [(message, at + later_ns if self.active(at) else at)]


class Jitter(_Fault, frozen=True, tag="jitter"):
    """Messages arrive later, by anything up to ``jitter_ms``; their order stays."""

    jitter_ms: NotNegative

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        most_ns = _ns(self.jitter_ms, 10**6)
        return lambda message, at: [(message, at + (random.randint(0, most_ns) if self.active(at) else 0))]


class Reorder(_Fault, frozen=True, tag="reorder"):
    """A share of the messages is overtaken by those that follow within ``delay_ms``; the stream counts as unordered."""

    share: Share
    delay_ms: Positive

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        later_ns = _ns(self.delay_ms, 10**6)

        def apply(message: Message, arrival_ns: int) -> list[Item]:
            held = self.active(arrival_ns) and not message.header.is_beat and random.random() < self.share
            return [(message, arrival_ns + later_ns if held else arrival_ns)]

        return apply


class Duplicate(_Fault, frozen=True, tag="duplicate"):
    """A share of the messages arrives twice."""

    share: Share

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        def apply(message: Message, arrival_ns: int) -> list[Item]:
            twice = self.active(arrival_ns) and not message.header.is_beat and random.random() < self.share
            return [(message, arrival_ns)] * (1 + twice)

        return apply


class Offset(_Fault, frozen=True, tag="offset"):
    """Stamps are wrong by a constant, which nobody notices."""

    offset_ms: float

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        by_ns = _ns(self.offset_ms, 10**6)
        return lambda message, at: [(moved(message, by_ns) if self.active(at) else message, at)]


class Drift(_Fault, frozen=True, tag="drift"):
    """Stamps run away from the truth, from ``start_s`` on; what has built up by ``end_s`` stays."""

    drift_ppm: float

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        begin_ns = _ns(self.start_s, 10**9)
        end_ns = None if self.end_s is None else _ns(self.end_s, 10**9)

        def apply(message: Message, arrival_ns: int) -> list[Item]:
            # By capture time, not by arrival: within a message, too, later means further.
            until_ns = min(message.header.t_capture_ns, end_ns) if end_ns is not None else message.header.t_capture_ns
            return [(moved(message, round(max(0, until_ns - begin_ns) * self.drift_ppm / 1e6)), arrival_ns)]

        return apply


class Jump(_Fault, frozen=True, tag="jump"):
    """The source's clock jumps, and the source notices: a new epoch."""

    at_s: NotNegative
    jump_ms: float

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        at_ns, by_ns = _ns(self.at_s, 10**9), _ns(self.jump_ms, 10**6)
        epochs = _NewEpoch(at_ns)
        return lambda message, at: [(message if at < at_ns else epochs(moved(message, by_ns)), at)]


class Freeze(_Fault, frozen=True, tag="freeze"):
    """Nothing comes from ``start_s`` to ``end_s``, and then all of it at once."""

    def __post_init__(self) -> None:
        if self.end_s is None or self.end_s <= self.start_s:
            raise ValueError("a freeze needs an `end_s` that lies after its `start_s`")

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        end_ns = _ns(self.end_s or 0.0, 10**9)
        return lambda message, at: [(message, end_ns if self.active(at) else at)]


class Restart(_Fault, frozen=True, tag="restart"):
    """The source's node dies and comes back after ``away_s`` in a new epoch; what it did not send is not lost."""

    at_s: NotNegative
    away_s: NotNegative = 1.0

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        dies_ns, back_ns = _ns(self.at_s, 10**9), _ns(self.at_s + self.away_s, 10**9)
        epochs = _NewEpoch(back_ns)

        def apply(message: Message, arrival_ns: int) -> list[Item]:
            if arrival_ns < dies_ns:
                return [(message, arrival_ns)]
            return [] if arrival_ns < back_ns else [(epochs(message), arrival_ns)]

        return apply


class Future(_Fault, frozen=True, tag="future"):
    """A share of the messages is stamped too far ahead."""

    share: Share
    ahead_ms: Positive

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        by_ns = _ns(self.ahead_ms, 10**6)

        def apply(message: Message, arrival_ns: int) -> list[Item]:
            wrong = self.active(arrival_ns) and not message.header.is_beat and random.random() < self.share
            return [(moved(message, by_ns) if wrong else message, arrival_ns)]

        return apply


class Noise(_Fault, frozen=True, tag="noise"):
    """Payloads are wrong, which nobody notices: noise that is ``level`` times as strong as the stream has varied."""

    level: NotNegative

    def stage(self, stream: str, random: Random) -> Callable[[Message, int], list[Item]]:
        disturbed = Disturber(self.level, random)
        return lambda message, at: [(disturbed(message) if self.active(at) else message, at)]


Fault = Loss | Delay | Jitter | Reorder | Duplicate | Offset | Drift | Jump | Freeze | Restart | Future | Noise


class FaultFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``faults`` by a name of your own; each runs by itself, and with ``together`` all of them once more."""

    faults: dict[str, Fault]
    seed: int = 0
    together: bool = False


TOGETHER = "all together"


def load_faults(path: Path | str, streams: Iterable[str]) -> FaultFile:
    """The faults in a YAML file, for a recording that has ``streams``. Raises ConfigError."""
    document = Document.load(path)
    found, wrong = document.read(FaultFile)
    if found is None:
        return wrong.settled(found)
    known = sorted(streams)
    if document.value["faults"] == {}:
        said = "no fault is named, so there is nothing to compare; see the example file."
        wrong.add(document.error(("faults",), said))
    for name, fault in found.faults.items():
        for stream in fault.streams:
            if stream not in known:
                said = f"the recording has no stream `{stream}` that the model uses; it has {listed(known) or 'none'}."
                wrong.add(document.error(("faults", name, "streams"), f"{said}{nearest(stream, known)}"))
    if found.together and TOGETHER in found.faults:
        said = "this name is taken by the run of all faults; choose another."
        wrong.add(document.error(("faults", TOGETHER), said))
    return wrong.settled(found)


def runs(file: FaultFile) -> dict[str, dict[str, Fault]]:
    """What is run beside the clean session: a title, and the faults in it."""
    found = {name: {name: fault} for name, fault in file.faults.items()}
    if file.together and len(found) > 1:
        found[TOGETHER] = dict(file.faults)
    return found


def faulty(items: Iterable[Item], faults: Mapping[str, Fault], seed: int = 0) -> Iterator[Item]:
    """``items``, which come in order of arrival, as they would have come with ``faults``; again in order of arrival."""
    for name, fault in faults.items():
        items = _stage(items, name, fault, seed)
    yield from items


def unordered(faults: Iterable[Fault], streams: Iterable[str]) -> frozenset[str]:
    """Of ``streams`` those whose order a fault breaks."""
    broken = [fault for fault in faults if isinstance(fault, Reorder)]
    return frozenset(s for s in streams for fault in broken if s in fault.streams or not fault.streams)


def deaths(faults: Iterable[Fault], streams: Iterable[str]) -> list[tuple[int, str]]:
    """When which stream's node is known to be dead, in order."""
    restarts = [fault for fault in faults if isinstance(fault, Restart)]
    return sorted((_ns(f.at_s, 10**9), s) for f in restarts for s in streams if s in f.streams or not f.streams)


def _stage(items: Iterable[Item], name: str, fault: Fault, seed: int) -> Iterator[Item]:
    applied: dict[str, Callable[[Message, int], list[Item]]] = {}
    newest: dict[str, int] = {}
    held: list[tuple[int, int, Message]] = []
    count = 0
    for message, arrival_ns in items:
        stream = message.header.stream
        made: list[Item] = [(message, arrival_ns)]
        if not fault.streams or stream in fault.streams:
            if stream not in applied:
                applied[stream] = fault.stage(stream, Random(f"{seed}/{name}/{stream}"))
            made = applied[stream](message, arrival_ns)
        for one, at_ns in made:
            if not isinstance(fault, Reorder):  # a wire keeps the order: what follows a late message is late, too
                at_ns = newest[stream] = max(at_ns, newest.get(stream, at_ns))
            heapq.heappush(held, (at_ns, count, one))
            count += 1
        while held and held[0][0] <= arrival_ns:
            at_ns, _, one = heapq.heappop(held)
            yield one, at_ns
    while held:
        at_ns, _, one = heapq.heappop(held)
        yield one, at_ns


def moved(message: Message, by_ns: int) -> Message:
    """The message as a sensor whose stamps are ``by_ns`` too late would have sent it: what the sensor's clock says
    moves (capture, end, bound), what the host's says does not (epoch, receipt)."""
    header = message.header
    return _with(
        message,
        t_capture_ns=header.t_capture_ns + by_ns,
        t_end_ns=header.t_end_ns + by_ns,
        bound_ns=header.bound_ns + by_ns,
    )


class _NewEpoch:
    """Messages from some moment on as those of an epoch that opens there: numbered from 0 again."""

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._first: dict[int, int] = {}

    def __call__(self, message: Message) -> Message:
        header = message.header
        if header.epoch >= self._epoch:  # an epoch that opened later by itself
            return message
        first = self._first.setdefault(header.epoch, header.seq)
        if header.seq < first:  # it was on its way when the epoch opened
            return message
        return _with(message, epoch=self._epoch, seq=header.seq - first)


def _with(message: Message, **changes: Any) -> Message:
    header: Header = msgspec.structs.replace(message.header, **changes)
    return Message(header, message.data)


__all__ = ["Fault", "FaultFile", "Item", "deaths", "faulty", "load_faults", "moved", "runs", "unordered"]
