"""A session: starts a rig's nodes, watches them, brings back those that die, and stops all of them in order.

One thread owns every child process. It starts the consumers first, waits until they are ready, then starts the
sources. It reads what nodes say of themselves; one that dies or says nothing for too long is started again, with
backoff and a limit, and the align node is told at once that its streams are dead, so that no window waits for them.
Stopping goes the way of the data: sources, align, fusion, record. Nodes see the launcher's death by their pipes, so
that however it ends nothing stays behind; the next start removes the folder and shared memory of a session that was
killed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import selectors
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import msgspec

from pipeline.child import Child, NodeState, died_how
from pipeline.clock import Origin, SystemClock
from pipeline.config import RecordEntry, RigFile, check_environment
from pipeline.errors import ConfigError, SensoriumError
from pipeline.life import AlignReport, NodeSpec, Order, SourceReport
from pipeline.node import EXIT_SENSOR
from pipeline.plan import Place, Plan, core_specs, make_plan, source_specs
from pipeline.transport import SessionFolder, endpoint_path, remove_leftovers

__all__ = ["Event", "NodeStatus", "Session", "SessionRef", "Status", "StreamStatus", "check_rig_file", "live_sessions"]

TURN_S = 0.1
STOP_NS = {"record": 60_000_000_000}
"""How long a node may take to stop before it is killed; the recorder must write what it holds."""
STOP_DEFAULT_NS = 5_000_000_000
LINGER_NS = 3_000_000_000
"""How long after the data's end predictions may still come."""

What = Literal["starting", "ready", "waiting", "died", "hung", "restarting", "gave_up", "ended", "stopped", "failed"]


class Event(msgspec.Struct, frozen=True):
    """Something happened to a node; ``text`` says it in words, with the last lines of a node that died."""

    t_ns: int
    node: str
    kind: What
    text: str


class StreamStatus(msgspec.Struct, kw_only=True):
    """One stream, as its source and the aligner see it. Counters are of the node's present life."""

    node: str
    payload: str
    epoch: int | None = None
    published: int = 0
    rate_hz: float = 0.0
    newest_ns: int | None = None
    dropped: dict[str, int] = {}
    note: str = ""
    verdict: str | None = None
    reason: str | None = None
    age_ms: float | None = None
    received: int = 0
    used: int = 0
    late: int = 0
    superseded: int = 0
    duplicate: int = 0
    lost: int = 0
    buffered: int = 0
    rejected: dict[str, int] = {}


class NodeStatus(msgspec.Struct, kw_only=True):
    """One node."""

    node: str
    kind: str
    state: NodeState
    pid: int | None
    restarts: int
    note: str
    log: str
    counters: dict[str, float]


class Status(msgspec.Struct, kw_only=True):
    """A session at one moment."""

    session: str
    now_ns: int
    nodes: dict[str, NodeStatus]
    streams: dict[str, StreamStatus]


class SessionRef(msgspec.Struct, frozen=True):
    """A session that runs on this host: where it is, and where its predictions come from."""

    id: str
    dir: str
    rig: str
    predictions: str


def check_rig_file(rig_file: RigFile, allow_code: bool = False) -> list[str]:
    """Checks everything about a rig that needs no hardware; what is doubtful, in sentences. Raises ConfigError,
    BundleError, RecordingError."""
    plan = make_plan(rig_file, allow_code)
    notes = check_environment()
    if plan.align is not None:
        unused = sorted(set(plan.streams) - {stream.name for stream in plan.align.streams})
        notes += [f"the model does not use the stream `{name}`; it can only be recorded." for name in unused]
        left_out = sorted(set(plan.bundle.streams if plan.bundle else ()) - set(plan.mapping))
        notes += [f"the model's stream `{name}` is left out and will always be masked." for name in left_out]
    elif plan.record is None:
        notes.append("the rig has neither a bundle nor a recording, so nothing comes of what its sources see.")
    return notes


def sessions_root() -> Path:
    """The folder of this user's sessions."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base and os.access(base, os.W_OK):
        return Path(base) / "sensorium"
    return Path(tempfile.gettempdir()) / f"sensorium-{os.getuid()}"


def live_sessions(root: Path | None = None) -> list[SessionRef]:
    """This user's sessions that are running now, the newest first."""
    root = root or sessions_root()
    remove_leftovers(root)
    found = []
    for file in sorted(root.glob("*/session.json"), reverse=True) if root.is_dir() else ():
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            found.append(msgspec.json.decode(file.read_bytes(), type=SessionRef))
    return found


class Session:
    """One run of a rig: ``start``, then ``wait`` or ``status``, then ``stop``; or ``with``; or ``run`` for it all."""

    def __init__(
        self,
        rig_file: RigFile,
        on_event: Callable[[Event], None] = lambda event: None,
        allow_code: bool = False,
        record: RecordEntry | None = None,
        root: Path | None = None,
    ) -> None:
        """Checks the rig; nothing is started. ``on_event`` is called from the session's own thread. Raises
        ConfigError, BundleError, RecordingError."""
        self.rig = rig_file.rig
        self.plan: Plan = make_plan(rig_file, allow_code, record)
        self.origin = Origin.now()
        self.clock = SystemClock(self.origin)
        began = datetime.fromtimestamp(self.origin.unix_ns / 1e9, tz=UTC)
        self.id = f"{began:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        self.dir = (root or sessions_root()) / self.id
        self.failure: str | None = None
        """Why the session ended before it was stopped, if it failed."""
        self._on_event = on_event
        self._crash: BaseException | None = None
        self._children: dict[str, Child] = {}
        self._lock = threading.RLock()
        self._started, self._over, self._stop, self._hard = (threading.Event() for _ in range(4))
        self._wake = os.pipe()
        self._thread: threading.Thread | None = None
        self._selector = selectors.DefaultSelector()
        self._stopping = False
        self._start_ns = self._end_ns = 0
        endpoint_path(self.dir, "m" * 32)  # the longest name of a source: too long a folder is found before the start

    @property
    def predictions(self) -> str:
        """The endpoint of the predictions: subscribe to the topics ``prediction`` and ``gap``."""
        tcp = self.rig.transport.predictions
        return endpoint_path(self.dir, "fusion") if tcp == "ipc" else tcp

    # -- what the user of a session calls --------------------------------------------------------------------------

    def start(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Starts all nodes; returns when the consumers and the required sources are ready, or when ``interrupted``
        says so. Raises SensoriumError, with a dying node's last lines, and leaves nothing behind."""
        if self._thread is not None:
            raise ConfigError(f"session {self.id} was started already; a session runs once")
        atexit.register(self.stop)  # a program that forgets its session must not leave it behind
        self._thread = threading.Thread(target=self._supervise, name="session", daemon=True)
        self._thread.start()
        while not self._started.wait(TURN_S) and not self._over.is_set() and not interrupted():
            pass
        if self.failure is not None or self._crash is not None:
            self.stop()
            raise SensoriumError(self.failure)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the session is over: its data came to their end, or it failed (``failure``); all nodes have
        stopped and the recording is closed then. False if the time was over first."""
        return self._over.wait(timeout_s)

    def stop(self, hard: bool = False) -> None:
        """Stops all nodes in order and removes what belongs to the session; ``hard`` kills them. Idempotent."""
        self._stop.set()
        if hard:
            self._hard.set()
        with contextlib.suppress(OSError):
            os.write(self._wake[1], b"x")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.stop)
        crash, self._crash = self._crash, None
        if crash is not None:
            raise crash

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def run(self, duration_s: float | None = None, on_tick: Callable[[Session], None] = lambda session: None) -> None:
        """Starts the session, runs it until its end, ``duration_s``, SIGINT or SIGTERM, and stops it; a second signal
        kills. ``on_tick`` is called about four times a second. For the main thread. Raises SensoriumError."""
        asked = threading.Event()

        def on_signal(*_: Any) -> None:
            if asked.is_set():
                self._hard.set()
            asked.set()

        with _signals(on_signal):
            try:
                self.start(asked.is_set)
                until = None if duration_s is None else self.clock.now_ns() + round(duration_s * 1e9)
                while not asked.is_set() and not self.wait(0.25):
                    on_tick(self)
                    if until is not None and self.clock.now_ns() >= until:
                        break
            finally:
                self.stop()
            if self.failure is not None:
                raise SensoriumError(self.failure)

    def status(self) -> Status:
        """How everything is now. Cheap; from any thread."""
        with self._lock:
            nodes = {name: _node_status(child) for name, child in self._children.items()}
            streams = {name: self._stream_status(name) for name in self.plan.streams}
            return Status(session=self.id, now_ns=self.clock.now_ns(), nodes=nodes, streams=streams)

    def _stream_status(self, stream: str) -> StreamStatus:
        node = self.plan.node_of(stream)
        status = StreamStatus(node=node, payload=self.plan.streams[stream])
        if (child := self._children.get(node)) is not None:
            _merge(status, child.report.sources.get(stream, SourceReport()))
            status.rate_hz, status.note = child.rate_hz(stream), child.report.note
        if (align := self._children.get("align")) is not None:
            _merge(status, align.report.aligned.get(stream, AlignReport()))
        return status

    # -- the thread that owns the processes ------------------------------------------------------------------------

    def _supervise(self) -> None:
        folder: SessionFolder | None = None
        try:
            remove_leftovers(self.dir.parent)
            self.dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            folder = SessionFolder(self.dir)
            ref = SessionRef(self.id, str(self.dir), self.rig.name, self.predictions)
            (self.dir / "session.json").write_bytes(msgspec.json.encode(ref))
            self._selector.register(self._wake[0], selectors.EVENT_READ)
            self._watch(Place(self.id, self.dir, self.origin))
            self._stop_all()
        except BaseException as error:  # handed to the thread that waits for this one
            self._crash = error
        finally:
            self._kill_all()
            self._selector.close()
            if folder is not None:
                folder.close(remove=True)
            self._over.set()

    def _watch(self, place: Place) -> None:
        """From the first node's start until the session is over or is to be stopped."""
        for spec in core_specs(self.plan, place):
            self._launch(spec, required=True)
        cores = list(self._children.values())
        self._start_ns = self.clock.now_ns()
        sources: list[Child] = []
        while not self._stop.is_set() and self.failure is None and not self._drained(sources):
            self._listen(TURN_S)
            self._care()
            if not sources and all(core.state == "ready" for core in cores):
                for spec in source_specs(self.plan, place):
                    self._launch(spec, self.rig.sources[spec.node].required)
                sources = [child for child in self._children.values() if child not in cores]
                self._start_ns = self.clock.now_ns()
            if not self._started.is_set():
                required = [child for child in sources if child.required]
                self._check_start(required if sources else cores, launched=bool(sources))

    def _check_start(self, awaited: list[Child], launched: bool) -> None:
        """Whether those that must be ready are; they have a limited time for it."""
        late = [child for child in awaited if child.state not in ("ready", "ended")]
        if launched and not late:
            self._started.set()
        elif late and self.clock.now_ns() - self._start_ns > self.rig.restart.start_s * 1e9:
            reasons = "; ".join(f"{child.name} ({child.report.note or child.state})" for child in late)
            self.failure = f"not ready within {self.rig.restart.start_s:g} s: {reasons}."

    def _launch(self, spec: NodeSpec, required: bool) -> None:
        child = Child(spec, required, self.rig.restart, self.clock)
        with self._lock:
            self._children[spec.node] = child
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
                os.read(self._wake[0], 4096)

    def _hear(self, child: Child) -> None:
        state = child.state
        with self._lock:
            reports, alive = child.listen()
        for report in reports:
            if report.state != state and report.state in ("ready", "waiting", "ended"):
                if not self._stopping:
                    self._tell(child, report.state, report.note or report.state)
                if report.state == "ended":
                    self._close_ended(child)
                if child.name == "align" and report.state == "ready":
                    self._close_what_is_gone()
            state = report.state
        if not alive:
            self._died(child)

    def _care(self) -> None:
        """Does what time brings: kills nodes that hang, starts those again that are to be."""
        for child in list(self._children.values()):
            if child.process is not None and child.hangs():
                self._tell(child, "hung", f"has said nothing for too long (it was: {child.report.note or child.state})")
                child.kill()
            if child.restart_at_ns is not None and self.clock.now_ns() >= child.restart_at_ns:
                self._begin(child)
            child.trim_log()

    def _died(self, child: Child) -> None:
        assert child.process is not None
        self._close_dead(child)  # first of all: windows are waiting
        self._selector.unregister(child.process.stdout)  # type: ignore[arg-type]
        with self._lock:
            ended, status = child.state == "ended", child.bury()
            if self._stopping:
                child.state = "stopped"
        if self._stopping:
            self._tell(child, "stopped", "stopped" if status == 0 else died_how(status))
            return
        if ended:
            return  # it had nothing more to give
        tail = child.tail()
        self._tell(child, "died", died_how(status) + (f"; its last words:\n{tail}" if tail else ""))
        core_at_start = not self._started.is_set() and child.name not in self.rig.sources
        if core_at_start or status == ConfigError.exit_code or not child.plan_restart(status == EXIT_SENSOR):
            self._give_up(child, status, tail)
        else:
            self._tell(child, "restarting", "will be started again")

    def _give_up(self, child: Child, status: int, tail: str) -> None:
        with self._lock:
            child.state = "failed"
        said = f"{child.name} {died_how(status)}" + (f":\n{tail}" if tail else "")
        self._tell(child, "gave_up", "is not started again")
        sources = [c for c in self._children.values() if c.name in self.rig.sources]
        if child.required or (sources and all(c.state == "failed" for c in sources)):
            self.failure = said

    # -- what the align node must know ------------------------------------------------------------------------------

    def _close(self, child: Child, reason: Literal["dead", "ended"], at: dict[str, tuple[int, int]]) -> None:
        align = self._children.get("align")
        if align is None or self.plan.align is None:
            return
        for stream in self.plan.align.streams:
            if stream.name in child.spec.streams and (reason == "dead" or stream.name in at):
                epoch, seq = at.get(stream.name, (0, 0))
                align.tell(Order(do="close", stream=stream.name, reason=reason, epoch=epoch, seq=seq))

    def _close_dead(self, child: Child) -> None:
        if child.state != "ended":
            self._close(child, "dead", {})

    def _close_ended(self, child: Child) -> None:
        self._close(child, "ended", child.report.ended)

    def _close_what_is_gone(self) -> None:
        """A new life of the align node knows nothing of what came before."""
        for child in self._children.values():
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
        align, fusion = self._children.get("align"), self._children.get("fusion")
        if align is None or fusion is None or self.clock.now_ns() - self._end_ns > LINGER_NS:
            return True
        said = fusion.report.counters.get("last_step", -1), align.report.counters.get("steps", 0)
        return align.state == "ended" and said[0] >= said[1]

    def _stop_all(self) -> None:
        """Stops nodes in the order of the data, each when those before it are gone."""
        self._stopping = True
        sources = [child for child in self._children.values() if child.name in self.rig.sources]
        cores = [self._children[name] for name in ("align", "fusion", "record") if name in self._children]
        for stage in [sources, *([core] for core in cores)]:
            for child in stage:
                child.restart_at_ns = None
                child.tell(Order(do="stop"))
            begun_ns = self.clock.now_ns()
            while living := [child for child in stage if child.process is not None]:
                self._listen(TURN_S)
                for child in living:
                    late = self.clock.now_ns() - begun_ns > STOP_NS.get(child.name, STOP_DEFAULT_NS)
                    if child.process is not None and (late or self._hard.is_set()):
                        self._tell(child, "hung", "does not stop, and is killed")
                        child.kill()
                        self._died(child)

    def _kill_all(self) -> None:
        for child in self._children.values():
            if child.process is not None:
                child.kill()
                child.bury()

    def _tell(self, child: Child, kind: What, text: str) -> None:
        self._on_event(Event(self.clock.now_ns(), child.name, kind, text))


def _node_status(child: Child) -> NodeStatus:
    return NodeStatus(
        node=child.name, kind=child.spec.kind, state=child.state,
        pid=None if child.process is None else child.process.pid, restarts=child.restarts,
        note=child.report.note, log=str(child.log), counters=child.report.counters,
    )  # fmt: skip


def _merge(status: StreamStatus, report: SourceReport | AlignReport) -> None:
    """Takes over the fields of a report, which have the same names."""
    for name in report.__struct_fields__:
        setattr(status, name, getattr(report, name))


@contextlib.contextmanager
def _signals(handler: Callable[..., None]) -> Iterator[None]:
    """SIGINT and SIGTERM go to ``handler`` meanwhile."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
