"""The thread that owns a session's processes: starts, watches, restarts and stops them.

Consumers come first; when they are ready, the sources are started, and when these are loaded too, the session begins:
its time 0 is the moment at which all processes are up, and none has stamped anything before. A node that dies, or says
nothing for too long, is started again with backoff and a limit, and before anything else the align node is told that
its streams are dead, so that no window waits for them. Stopping goes the way of the data: sources, align, fusion,
record.
"""

from __future__ import annotations

import os
import selectors
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from pipeline.child import Child
from pipeline.clock import Origin, SystemClock
from pipeline.errors import ConfigError
from pipeline.life import UNMEASURED_NS, NodeSpec, Order, RecordReport, Report, SourceReport
from pipeline.node import EXIT_SENSOR
from pipeline.plan import Place, Plan, core_specs, source_specs
from pipeline.stamper import no_value
from pipeline.status import Event, SessionRef, What
from pipeline.summary import not_whole
from pipeline.transport import SessionFolder, remove_leftovers

TURN_S = 0.1
STOP_NS = {"record": 60_000_000_000}
"""How long a node may take to stop before it is killed; the recorder must write what it holds."""
STOP_DEFAULT_NS = 5_000_000_000
PATIENCE_NS = 1_000_000_000
"""A node that is waited for longer than this when all is to end is told of."""
LOADING = 1 / 3
"""For this part of the time in which nodes must be ready the beginning waits for sources to be loaded."""
SILENT_NS = 10_000_000_000
"""A stream of which nothing has come by then is told of."""
LINGER_NS = 3_000_000_000
"""How long after the data's end predictions may still come."""


class Supervisor:
    """Runs a plan's nodes. ``run`` is the thread's function; the rest of the public names may be used by others."""

    def __init__(
        self, plan: Plan, place: Place, ref: SessionRef, session_clock: SystemClock, on_event: Callable[[Event], None]
    ) -> None:
        self.plan, self.place, self.ref, self.session_clock = plan, place, ref, session_clock
        self.clock = SystemClock()  # of what is done here: the session's own jumps when it begins
        self.rig = plan.rig_file.rig
        self.children: dict[str, Child] = {}
        self.lock = threading.RLock()
        """Held while reports are taken in, and by who reads them."""
        self.failure: str | None = None
        self.defect: str | None = None
        """What went wrong without ending the session: it did not do all that was asked."""
        self.crash: BaseException | None = None
        """What went wrong in the thread itself, ``on_event`` included."""
        self.started, self.over, self.hard = threading.Event(), threading.Event(), threading.Event()
        self._stop = threading.Event()
        self._on_event = on_event
        self._wake: tuple[int, int] | None = None
        self._selector: selectors.BaseSelector
        self._stopping = self._hurried = False
        self._start_ns = self._end_ns = 0
        self._begun = self._silence_said = False
        self._unmeasured: set[str] = set()
        """Streams of which it was told that they hold no value."""

    def stop(self) -> None:
        """Asks the thread to stop everything."""
        self._stop.set()
        with self.lock:
            if self._wake is not None:
                os.write(self._wake[1], b"x")

    def run(self) -> None:
        """From the first node's start to the last one's end; nothing of the session is left afterwards."""
        folder: SessionFolder | None = None
        self._selector = selectors.DefaultSelector()
        with self.lock:
            wake = self._wake = os.pipe()
        try:
            folder = self._make_folder(self.place.folder)
            self._selector.register(wake[0], selectors.EVENT_READ)
            self._watch(self.place)
            self._stop_all()
            self._judge_recording()
        except BaseException as error:  # handed to the thread that waits for this one
            self.crash = self.crash or error
        finally:
            self._kill_all()
            self._selector.close()
            if folder is not None:
                folder.close(remove=True)
            with self.lock:
                self._wake = None  # the numbers may soon be somebody else's files
            for end in wake:
                os.close(end)
            self.over.set()

    def _make_folder(self, path: Path) -> SessionFolder:
        remove_leftovers(path.parent)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = SessionFolder(path)
        self._publish_ref(path)
        return folder

    def _publish_ref(self, folder: Path) -> None:
        """Says where the session is, whole or not at all."""
        new = folder / ".session.json"
        new.write_bytes(msgspec.json.encode(self.ref))
        new.replace(folder / "session.json")

    def _watch(self, place: Place) -> None:
        """From the first node's start until the session is over or is to be stopped."""
        for spec in core_specs(self.plan, place):
            self._launch(spec, required=True)
        cores = list(self.children.values())
        self._start_ns = self.clock.now_ns()
        sources: list[Child] = []
        while not self._stop.is_set() and self.failure is None and not self._drained(sources):
            self._listen(TURN_S)
            self._care()
            if not sources and all(core.state == "ready" for core in cores):
                for spec in source_specs(self.plan, place):
                    self._launch(spec, self.rig.sources[spec.node].required)
                sources = [child for child in self.children.values() if child not in cores]
                self._start_ns = self.clock.now_ns()
            if sources and not self._begun:
                self._begin_session(sources)
            if not self.started.is_set():
                required = [child for child in sources if child.required]
                self._check_start(required if sources else cores)

    def _begin_session(self, sources: list[Child]) -> None:
        """Begins as soon as every source is loaded; one that takes too long for that will come later."""
        loading = [child for child in sources if child.state == "starting" and child.process is not None]
        if loading and self.clock.now_ns() - self._start_ns < LOADING * self.rig.restart.start_s * 1e9:
            return
        self._begun = True
        origin = Origin.now()
        self.session_clock.begin(origin)
        self.ref = msgspec.structs.replace(self.ref, origin=origin)
        self._publish_ref(self.place.folder)
        for child in self.children.values():
            child.spec = msgspec.structs.replace(child.spec, origin=origin, begun=True)
            child.tell(Order(do="begin", origin=origin))

    def _check_start(self, awaited: list[Child]) -> None:
        """Whether those that must be ready are; they have a limited time for it."""
        late = [child for child in awaited if child.state not in ("ready", "ended")]
        if self._begun and not late:
            self.started.set()
        elif late and self.clock.now_ns() - self._start_ns > self.rig.restart.start_s * 1e9:
            reasons = "; ".join(f"{child.name} ({child.report.note or child.state})" for child in late)
            self.failure = f"not ready within {self.rig.restart.start_s:g} s: {reasons}."

    def _launch(self, spec: NodeSpec, required: bool) -> None:
        child = Child(spec, required, self.rig.restart, self.clock)
        with self.lock:
            self.children[spec.node] = child
        self._begin(child)

    def _begin(self, child: Child) -> None:
        self._tell(child, "starting", "starts")
        self._selector.register(child.start(), selectors.EVENT_READ, child)

    def _listen(self, timeout_s: float) -> None:
        """Hears what nodes say, for as long as nobody says anything at most ``timeout_s``."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, Child):
                self._hear(key.data)
            else:
                os.read(key.fd, 4096)

    def _hear(self, child: Child) -> None:
        state = child.state
        with self.lock:
            reports, alive = child.listen()
        for report in reports:
            self._say_who_is_away(child, report)
            if report.state != state and report.state in ("ready", "waiting", "ended"):
                news = report.state != "waiting" or (not report.away and child.waits_anew(report.note))
                if news and not self._stopping:
                    self._tell(child, report.state, report.note or report.state)
                if report.state == "ended":
                    self._close_ended(child)
                if child.name == "align" and report.state == "ready":
                    self._close_what_is_gone()
            state = report.state
            for warning in child.warned.new(report.warnings):
                self._tell(child, "warning", warning)
        self._say_what_is_unmeasured(child)
        if not alive:
            self._died(child)

    def _say_who_is_away(self, child: Child, report: Report) -> None:
        """Of a node with several streams its state says little: it waits while any of them is away."""
        gone, back = child.turns(report.away)
        if gone and not self._stopping:
            self._tell(child, "waiting", report.note)
        if back and not self._stopping:
            self._tell(child, "returned", f"{', '.join(back)} {'come' if len(back) > 1 else 'comes'} again")

    def _say_what_is_unmeasured(self, child: Child) -> None:
        """Whoever looks at times alone finds such a stream well."""
        for stream, source in child.report.sources.items():
            if source.unmeasured_ns >= UNMEASURED_NS and stream not in self._unmeasured:
                self._unmeasured.add(stream)
                text = f"has given nothing but {no_value(source.unmeasured_as)}, for {UNMEASURED_NS / 1e9:.0f} s"
                self._tell_of(stream, child, text)

    def _care(self) -> None:
        """Does what time brings: kills nodes that hang, starts those again that are to be."""
        for child in list(self.children.values()):
            if child.process is not None and child.hangs() and child.kill_once():
                self._tell(child, "hung", f"has said nothing for too long (it was: {child.report.note or child.state})")
            if child.restart_at_ns is not None and self.clock.now_ns() >= child.restart_at_ns:
                self._begin(child)
            child.trim_log()
        if self._begun and not self._silence_said and self.session_clock.now_ns() > SILENT_NS:
            self._silence_said = True
            self._say_who_is_silent()

    def _say_who_is_silent(self) -> None:
        """Of sources that run as if all were well: the others have said why nothing comes. Words are often rare."""
        for child in self.children.values():
            content = child.state == "ready" and not child.trouble
            for stream, payload in child.spec.streams.items() if content else ():
                if payload != "text" and not child.total(stream, child.report.sources.get(stream, SourceReport()))[0]:
                    text = f"has given nothing in the first {SILENT_NS / 1e9:.0f} s of the session"
                    self._tell_of(stream, child, text)

    def _tell_of(self, stream: str, child: Child, text: str) -> None:
        """Warns of a stream, which is named where its node, of which an event tells anyway, has another name."""
        self._tell(child, "warning", text if stream == child.name else f"{stream} {text}")

    def _died(self, child: Child) -> None:
        assert child.process is not None
        self._close_dead(child)  # first of all: windows are waiting
        self._selector.unregister(child.process.stdout)  # type: ignore[arg-type]
        with self.lock:
            ended, status = child.state == "ended", child.bury()
            if self._stopping:
                child.state = "stopped"
        if self._stopping:
            if child.name == "record" and status != 0:  # what it held back until the end found no room
                self._recording_failed(child, status, child.tail())
            self._tell(child, "stopped", "stopped" if status == 0 else child.died_how(status))
            return
        if ended:
            return  # it had nothing more to give
        tail, how, again = child.tail(), child.died_how(status), False
        child.trouble = _own_words(tail) or ": ".join((how, *tail.splitlines()[-1:]))
        core_at_start = not self.started.is_set() and child.name not in self.rig.sources
        if child.name == "record" and status > 0:
            self._recording_failed(child, status, tail)
        elif core_at_start or status == ConfigError.exit_code or not child.plan_restart(status == EXIT_SENSOR):
            self._give_up(child, status, tail)
        else:
            again = True
        if self.failure is not None:  # which the session's own error says
            self._tell(child, "died", how)
            return
        self._tell(child, "died", how + (f"; its last words:\n{tail}" if tail else ""))
        self._tell(child, *(("restarting", "will be started again") if again else ("gave_up", "is not started again")))

    def _recording_failed(self, child: Child, status: int, tail: str) -> None:
        """A recorder that could not write would not fare better in another life. Predictions go on without it, if there
        are any; how the session ends says that the recording is not whole."""
        with self.lock:
            child.state = "failed"
        said = f"the recording failed, and is not whole: {_own_words(tail) or tail or child.died_how(status)}"
        if self.plan.align is None or not self.started.is_set():
            self.failure = said
        else:
            self.defect = said

    def recordings(self) -> list[RecordReport]:
        """What each life of the recorder has written."""
        child = self.children.get("record")
        if child is None:
            return []
        return child.recordings + ([] if child.report.recording is None else [child.report.recording])

    def _judge_recording(self) -> None:
        """Whether the recording has all that it should have, as far as nothing worse is known of it."""
        child = self.children.get("record")
        if child is None or self.failure is not None or self.defect is not None:
            return
        self.defect = not_whole(self.recordings(), goes_on=child.state != "restarting") or None

    def _give_up(self, child: Child, status: int, tail: str) -> None:
        with self.lock:
            child.state = "failed"
        if words := _own_words(tail):
            said = f"{child.name}: {words}"
        else:
            said = f"{child.name} {child.died_how(status)}" + (f":\n{tail}" if tail else "")
        sources = [c for c in self.children.values() if c.name in self.rig.sources]
        if child.required or (sources and all(c.state == "failed" for c in sources)):
            self.failure = said

    # -- what the align node must know ------------------------------------------------------------------------------

    def _close(self, child: Child, reason: Literal["dead", "ended"], at: dict[str, tuple[int, int]]) -> None:
        align = self.children.get("align")
        if align is None or self.plan.align is None:
            return
        for stream in self.plan.align.streams:
            if stream.name in child.spec.streams and (reason == "dead" or stream.name in at):
                epoch, seq = at.get(stream.name, (0, 0)) if reason == "ended" else (_last_epoch(child, stream.name), 0)
                align.tell(Order(do="close", stream=stream.name, reason=reason, epoch=epoch, seq=seq))

    def _close_dead(self, child: Child) -> None:
        if child.state != "ended":
            self._close(child, "dead", {})

    def _close_ended(self, child: Child) -> None:
        self._close(child, "ended", child.report.ended)

    def _close_what_is_gone(self) -> None:
        """A new life of the align node knows nothing of what came before."""
        for child in self.children.values():
            if child.state == "ended":
                self._close_ended(child)
            elif child.state in ("restarting", "failed"):
                self._close_dead(child)

    # -- the end ------------------------------------------------------------------------------------------------------

    def _drained(self, sources: list[Child]) -> bool:
        """Whether all data came to their end, and what follows from them is out."""
        states = {child.state for child in sources}
        if not states or not states <= {"ended", "failed"}:
            return False
        self._end_ns = self._end_ns or self.clock.now_ns()
        align, fusion = self.children.get("align"), self.children.get("fusion")
        if align is None or fusion is None or self.clock.now_ns() - self._end_ns > LINGER_NS:
            return True
        said = fusion.report.counters.get("last_step", -1), align.report.counters.get("steps", 0)
        return align.state == "ended" and said[0] >= said[1]

    def _stop_all(self) -> None:
        """Stops nodes in the order of the data, each when those before it are gone."""
        self._stopping = True
        sources = [child for child in self.children.values() if child.name in self.rig.sources]
        cores = [self.children[name] for name in ("align", "fusion", "record") if name in self.children]
        for stage in [sources, *([core] for core in cores)]:
            for child in stage:
                child.restart_at_ns = None
                child.tell(Order(do="stop"))
            begun_ns, said = self.clock.now_ns(), False
            while living := [child for child in stage if child.process is not None]:
                self._listen(TURN_S)
                waited_ns = self.clock.now_ns() - begun_ns
                if waited_ns > PATIENCE_NS and not said and not self.hard.is_set():
                    said = True
                    self._say_who_is_waited_for([child for child in living if child.process is not None])
                for child in living:
                    late = waited_ns > STOP_NS.get(child.name, STOP_DEFAULT_NS)
                    if child.process is not None and (late or self.hard.is_set()):
                        self._say_why_killed(child)
                        child.kill()
                        self._died(child)

    def _say_who_is_waited_for(self, living: list[Child]) -> None:
        """Of what belongs together (the sources, or one of the nodes behind them) once."""
        for child in living:
            limit = STOP_NS.get(child.name, STOP_DEFAULT_NS)
            self._tell(child, "waiting", f"has not stopped yet, and is waited for, at most {limit / 1e9:g} s")

    def _say_why_killed(self, child: Child) -> None:
        """Of each node that it does not stop; once for all of them that nobody waits any longer for that."""
        if not self.hard.is_set():
            why = "; the `read` of a source returns within about 100 ms" if child.name in self.rig.sources else ""
            self._tell(child, "hung", f"does not stop, and is killed{why}")
        elif not self._hurried:
            self._hurried = True
            text = "every node that still runs is killed at once, for to stop was asked for again (Ctrl-C)"
            self._say(Event(self.session_clock.now_ns(), "launch", "hung", text))

    def _kill_all(self) -> None:
        for child in self.children.values():
            if child.process is not None:
                child.kill()
                child.bury()

    def _tell(self, child: Child, kind: What, text: str) -> None:
        self._say(Event(self.session_clock.now_ns(), child.name, kind, text))

    def _say(self, event: Event) -> None:
        """Whoever listens may have gone (a terminal that was closed, a pipe): then the session ends, but in order, lest
        a recording lack its end."""
        if self.crash is not None:
            return
        try:
            self._on_event(event)
        except BaseException as error:  # handed to the thread that waits for this one
            self.crash = error
            self._stop.set()


def _own_words(tail: str) -> str:
    """What a node said is wrong, if that is all that it said last: it stands in the session's own error."""
    return tail.removeprefix("error: ") if tail.startswith("error: ") and "\n" not in tail else ""


def _last_epoch(child: Child, stream: str) -> int:
    """The epoch that a node's last life said it was in; -1 if it said nothing, and so sent nothing."""
    source = child.report.sources.get(stream)
    return -1 if source is None or source.epoch is None else source.epoch
