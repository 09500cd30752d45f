"""A session or a replay on its way to the terminal: who writes when, and from which thread."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING

import msgspec

from pipeline.align import Counters
from pipeline.life import UNMEASURED_NS
from pipeline.outside import discard_untaken, started_again, unread, untaken
from pipeline.reports import closing
from pipeline.sheet import counted
from pipeline.subscriber import Subscription
from pipeline.summary import Summary, drops, lacking
from pipeline.terminal import Lines, Output, Screen, console
from pipeline.transport import endpoint_path

if TYPE_CHECKING:  # a replay shows itself without a launcher
    from pipeline.launch import Event, NodeStatus, Session, Status, StreamStatus
    from pipeline.life import RecordReport

POLL_MS = 100
"""How often what is shown is brought up to date, and how long is waited for a prediction before looking around."""
BEHIND = 4
"""While so much waits to be shown the table is not brought up to date."""
GRACE_NS = 3_000_000_000
"""Who reads and takes nothing for so long at the end is not waited for any longer (session clock)."""


class Show:
    """Shows a session: its predictions and what happens to its nodes at once, everything else a few times a second.

    Threads of its own write all of it: a terminal that takes nothing (Ctrl-S), or a pipe that nobody reads, holds up
    neither who looks after the nodes nor the main thread, which waits for nodes and signals. A grace after the
    session's end a stopped terminal is started again, and what else has not been taken is thrown away."""

    def __init__(self, session: Session, json: bool) -> None:
        self.summary = Summary(expected=session.rig.bundle is not None)
        self.left_out = 0
        """Predictions that nobody has taken, up to the end."""
        self.hurried = False
        """Whether Ctrl-C has cut short the waiting for who reads."""
        self._session = session
        where = (
            f"predictions at {session.predictions}" if session.rig.bundle is not None else "no model, no predictions"
        )
        self._output = output_for(
            json, f"{session.rig.name}   session {session.id}   Ctrl-C stops", self.summary, where
        )
        self._rates: dict[str, float] = {}
        self._lock = threading.Lock()
        self._last_round = threading.Event()
        self._shown = 0
        """How much was shown; of several threads, so that what counts is whether it changes."""
        self._discarded = False
        """Whether nobody sees any longer what goes to standard output."""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._reader, self._teller = _Writing("predictions", self._read), _Writing("events", self._tell)

    @property
    def _error(self) -> Exception | None:
        """What went wrong with showing."""
        return self._reader.error or self._teller.error

    def event(self, event: Event) -> None:
        """Something happened to a node. Never waits. Raises as ``tick``, but only where it cannot be shown: one who
        reads no predictions any more (``| head``) may well read of a node that does not stop."""
        if self._error is not None and not self._teller.is_alive():
            raise self._error

        def show() -> None:
            self._output.event(event)
            self._output.refresh(self._status(self._session))

        self._jobs.put(show)

    def tick(self, session: Session) -> None:
        """Shows how things are. Never waits. Raises what went wrong with showing: nobody reads it any more."""
        if self._error is not None:
            raise self._error
        if self._jobs.qsize() < BEHIND:
            self._jobs.put(partial(self._output.refresh, self._status(session)))

    def _status(self, session: Session) -> Status:
        """How things are; at the end with each stream's rate while it still came."""
        status = session.status()
        for name, stream in status.streams.items():
            if (node := status.nodes.get(stream.node)) is not None and node.state == "ready":
                self._rates[name] = stream.rate_hz
            elif self._last_round.is_set():
                stream.rate_hz = self._rates.get(name, stream.rate_hz)
        return status

    def __enter__(self) -> Show:
        self._teller.start()
        if self._session.rig.bundle is not None:
            self._reader.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._last_round.set()
        if self._reader.ident is not None:
            self._wait_for(self._reader)
        if error is None:
            self._jobs.put(partial(self._output.refresh, self._status(self._session)))
        self._jobs.put(None)
        self._wait_for(self._teller)
        if error is None and self._error is not None:
            raise self._error

    def last(self, write: Callable[[], None]) -> None:
        """Carries out what writes at the very end, after which nobody waits for long either. Raises what it raises."""
        writing = _Writing("summary", write)
        writing.start()
        self._wait_for(writing)
        if writing.error is not None:
            raise writing.error

    def _wait_for(self, writing: _Writing) -> None:
        """As long as whoever reads takes anything, or the grace lasts; Ctrl-C cuts it short. Then a terminal that
        Ctrl-S has stopped is started again, and what is not taken even so is thrown away, so that the thread comes to
        its end."""
        clock, idle = self._session.clock, False
        while not writing.over.is_set():
            before, hurried = (self._shown, unread()), False
            try:
                clock.wait_until(clock.now_ns() + GRACE_NS, writing.over)
            except KeyboardInterrupt:
                hurried = self.hurried = True
            if writing.over.is_set():
                return
            if (self._shown, unread()) != before and not hurried:
                idle = False
                continue
            numbers, again = untaken(), idle
            idle = True
            if numbers and (again or not started_again(numbers)):
                self._discarded |= 1 in numbers
                discard_untaken(numbers, (self._reader, self._teller, writing))
            elif again:
                return  # it waits for something else, and is left behind

    def _tell(self) -> None:
        """What happens and how things are, until there is nothing more to come."""
        try:
            while (job := self._jobs.get()) is not None:
                with self._lock:
                    job()
                self._shown += 1
        finally:
            with self._lock:
                self._output.close()

    def _read(self) -> None:
        """Until the session is over, and then what was sent before its end."""
        last = False
        with Subscription(endpoint_path(self._session.dir, "fusion")) as subscription:  # which asks for no keys
            while not last:
                last = self._last_round.is_set()
                for prediction in subscription.receive(POLL_MS):
                    with self._lock:
                        self.summary.add(prediction)
                        self._output.prediction(prediction)
                    self._shown += 1
                    self.left_out += self._discarded


class _Writing(threading.Thread):
    """A thread that writes to whom may take nothing, or be gone."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.error: Exception | None = None
        """What it raised, which is handed to the next who shows something: the main thread, which stops the session."""
        self.over = threading.Event()

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.error = error
        self.over.set()


def output_for(json: bool, title: str, summary: Summary, about: str = "") -> Output:
    """A live table where standard output is a terminal, lines elsewhere."""
    if json or not sys.stdout.isatty():
        if about:
            print(f"{title.split('   Ctrl')[0]}   {about}", file=sys.stderr, flush=True)
        return Lines()
    return Screen(title, summary, about)


def print_summary(summary: Summary, json: bool, status: Status | None = None) -> None:
    """The summary, where it does not get between predictions."""
    if status is not None:
        summary.counters = {name: _counters(stream) for name, stream in status.streams.items() if stream.received}
        found = {name: drops(node.counters) for name, node in status.nodes.items()}
        summary.drops = {name: counts for name, counts in found.items() if counts}
        summary.source_drops = {name: dict(s.total_dropped) for name, s in status.streams.items() if s.total_dropped}
        summary.warnings = _warnings(status)
        lives: list[RecordReport] = []
        if "record" in status.nodes:
            lives = _left(status.nodes["record"], status.recordings)
            summary.recorded, summary.lacks = _recorded(status.nodes["record"], lives)
        summary.streams = {name: _amounts(name, stream, lives) for name, stream in status.streams.items()}
        summary.lacks += _missed(summary.streams, lives)
    to_person = sys.stdout.isatty() and not json
    screen = console(sys.stdout if to_person else sys.stderr)
    if to_person:
        screen.print()  # a blank line below the table
    screen.print(closing(summary))


def _left(recorder: NodeStatus, lives: list[RecordReport]) -> list[RecordReport]:
    """What each life of the recorder has left behind: of one that died or failed, what had reached the disk."""
    if recorder.state == "failed":
        lives = [life for life in lives if os.path.isfile(life.path) and os.path.getsize(life.path)]
    ended = recorder.state not in ("failed", "restarting")
    dead = lives[:-1] if ended else lives
    return [msgspec.structs.replace(life, messages=life.safe) for life in dead] + lives[len(dead) :]


def _recorded(recorder: NodeStatus, lives: list[RecordReport]) -> tuple[str, list[str]]:
    """Where the recording is, and what it lacks. A recorder that failed before it wrote anything has made none."""
    if not lives:
        return "", []
    here = recorder.note if recorder.state == "stopped" else lives[-1].path
    files = list(dict.fromkeys([*(life.path for life in lives[:-1]), here]))
    asked = f" ({lives[0].asked} was there already, and stays as it is)" if lives[0].asked else ""
    lacks = lacking(lives, goes_on=recorder.state != "restarting")
    if recorder.state == "failed":
        lacks.append("it lacks its end, for the recorder failed")
    return ", then ".join(files) + asked, lacks


def _amounts(name: str, stream: StreamStatus, lives: list[RecordReport]) -> dict[str, int]:
    """How much was sent of a stream, and how much of that the recording has. A source that died or hung sent more than
    it had said: what is recorded was sent."""
    amounts = {"sent": stream.total}
    if any(name in life.messages for life in lives):
        recorded = sum(life.messages.get(name, 0) for life in lives)
        sent = max(stream.total, recorded)
        amounts = {"sent": sent, "recorded": recorded, "not recorded": sent - recorded}
    if count := _unmeasured(stream):
        amounts["without a value"] = count
    return amounts


def _missed(streams: dict[str, dict[str, int]], lives: list[RecordReport]) -> list[str]:
    """How much was sent while no recorder lived, and before it died had not reached the disk."""
    if len(lives) < 2:
        return []
    missed = {
        name: amounts.get("not recorded", 0) - sum(sum(life.lost.get(name, {}).values()) for life in lives)
        for name, amounts in streams.items()
    }
    said = [f"{count} of {name}" for name, count in missed.items() if count > 0]
    return [f"for that it lacks these messages: {', '.join(said)}"] if said else []


def _warnings(status: Status) -> list[str]:
    """What is wrong with sources, those that gave nothing, nodes that died, and what nodes have warned of."""
    said = []
    for name, stream in status.streams.items():
        node = status.nodes.get(stream.node)
        alive = node is not None and node.state != "failed" and not node.restarts  # else its death is told below
        if stream.total and alive and stream.failures and stream.note:
            said.append(f"{name} gave nothing more at the end: {stream.note}")
        if not stream.total:
            dropped = ", all that it had were dropped" if stream.total_dropped else ""
            why = stream.note or (node.trouble if node is not None and alive else "")
            said.append(f"{name} gave no message{dropped}" + (f": {why}" if why else ""))
        if count := _unmeasured(stream):
            least = "at least " if count < stream.published else ""
            messages = f"{least}{count} of {counted(stream.published, 'message')}"
            said.append(f"{name} gave {messages} without a value: all are {stream.unmeasured_as}")
    sources = dict.fromkeys(stream.node for stream in status.streams.values())
    for name in sources:
        node = status.nodes.get(name)
        if node is None:
            continue
        why = f": {node.trouble}" if node.trouble else ""
        if node.state == "failed":
            said.append(f"the source {name} died, and was given up" + why)
        elif node.restarts:
            away = " and had not come back" if node.state == "restarting" else ""
            said.append(f"the source {name} died {counted(node.restarts, 'time')}{away}" + why)
    said += [_died(node) for name, node in status.nodes.items() if name not in sources and node.restarts]
    return said + [f"{name}: {warning}" for name, node in status.nodes.items() for warning in node.warnings]


def _died(node: NodeStatus) -> str:
    """That a node behind the sources has died, and what that means for what is counted."""
    said = f"{node.node} died {counted(node.restarts, 'time')}" + (f": {node.trouble}" if node.trouble else "")
    counts = "messages are counted from its last start on, and all that was sent before counts as lost there"
    return f"{said}; {counts}" if node.node == "align" else said


def _unmeasured(stream: StreamStatus) -> int:
    """How many messages of its present life were without a value, where all were, or all for long."""
    worth = stream.unmeasured >= stream.published or stream.unmeasured_ns >= UNMEASURED_NS
    return stream.unmeasured if worth else 0


def _counters(stream: StreamStatus) -> Counters:
    return msgspec.convert(stream, Counters, from_attributes=True)
