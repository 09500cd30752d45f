"""A session: one run of a rig, from the check of its file to the end of its last process.

    with Session(load_rig("configs/demo.yaml")) as session:
        session.wait()

Nodes are processes of their own; ``pipeline.supervise`` has the thread that looks after them. They see the launcher's
death by their pipes, so that however it ends nothing stays behind, and the next start removes the folder and the shared
memory of a session that was killed.
"""

from __future__ import annotations

import atexit
import contextlib
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from pipeline.calls import ending_signals
from pipeline.clock import SystemClock
from pipeline.config import RecordEntry, RigFile, check_environment, long_times
from pipeline.errors import ConfigError, SensoriumError
from pipeline.fusing import doubt
from pipeline.life import AlignReport, SourceReport
from pipeline.pacing import odd_paces
from pipeline.plan import Place, Plan, make_plan, taken
from pipeline.recording import ring_notes
from pipeline.status import Event, NodeStatus, SessionRef, Status, StreamStatus, merge, node_status
from pipeline.supervise import TURN_S, Supervisor
from pipeline.transport import check_free, endpoint_path, remove_leftovers, sessions_root

__all__ = ["Event", "NodeStatus", "Session", "SessionRef", "Status", "StreamStatus", "check_rig_file", "live_sessions"]


def check_rig_file(rig_file: RigFile, allow_code: bool = False) -> list[str]:
    """Checks everything about a rig that needs no hardware; what is doubtful, in sentences. Raises ConfigError,
    BundleError, RecordingError."""
    plan = make_plan(rig_file, allow_code)
    notes = check_environment() + long_times(rig_file.document) + _odd_paces(plan)
    if plan.align is not None:
        unused = sorted(set(plan.streams) - {stream.name for stream in plan.align.streams})
        notes += [f"the model does not use the stream `{name}`; it can only be recorded." for name in unused]
        left_out = sorted(set(plan.bundle.streams if plan.bundle else ()) - set(plan.mapping))
        notes += [f"the model's stream `{name}` is left out and will always be masked." for name in left_out]
        if plan.bundle is not None and (said := doubt(plan.bundle)):
            notes.append(f"{rig_file.document.place(('bundle',))}: {said}.")
    elif plan.record is None:
        notes.append(
            "the rig has neither a bundle nor a recording, so nothing comes of what its sources see. Name a model "
            "(`bundle`), or record it: sensorium record RIG -o FILE"
        )
    elif plan.record.streams == ():
        place = rig_file.document.place(("record", "streams"))
        notes.append(f"{place}: no stream is named, so none is recorded; leave `streams` out to record all.")
    if said := taken(rig_file, plan.record):
        notes.append(f"{rig_file.document.place(('record', 'path'))}: {said}.")
    if plan.record is not None and plan.record.limit_bytes is not None:
        notes += ring_notes(rig_file.resolve(plan.record.path), plan.record.limit_bytes)
    return notes


def _odd_paces(plan: Plan) -> list[str]:
    paces = {stream: pace for source in plan.sources for stream, pace in source.paces.items()}
    slots = {stream: nbytes for source in plan.sources for stream, nbytes in source.slots.items()}
    steps, notes = 1 if plan.bundle is None else plan.bundle.window.steps, []
    for stream, said in odd_paces(paces, slots, plan.align, steps):
        node = plan.node_of(stream) if stream else ""
        inner = ("sources", stream) if node != stream else ()
        at = ("sources", node, *inner) if stream else ("bundle",)
        notes.append(f"{plan.rig_file.document.place(at)}: {said}.")
    return notes


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
        self.plan = make_plan(rig_file, allow_code, record)
        if self.plan.align is not None and self.rig.transport.predictions != "ipc":
            check_free(self.rig.transport.predictions)  # now, and not when half of the nodes run
        self.clock = SystemClock()  # its time 0 is laid anew when all nodes are up
        began = datetime.fromtimestamp(self.clock.origin.unix_ns / 1e9, tz=UTC)
        self.id = f"{began:%Y%m%dT%H%M%S}-{secrets.token_hex(2)}"
        self.dir = (root or sessions_root()) / self.id
        endpoint_path(self.dir, "m" * 32)  # the longest name of a source: too long a folder is found before the start
        place, ref = (
            Place(self.id, self.dir, self.clock.origin),
            SessionRef(
                self.id,
                str(self.dir),
                self.rig.name,
                self.predictions,
                streams={stream: self.plan.node_of(stream) for stream in self.plan.streams},
                model=self.plan.align is not None,
            ),
        )
        self._supervisor = Supervisor(self.plan, place, ref, self.clock, on_event)
        self._thread: threading.Thread | None = None

    @property
    def predictions(self) -> str:
        """The endpoint of the predictions: subscribe to the topics ``prediction`` and ``gap``."""
        tcp = self.rig.transport.predictions
        return endpoint_path(self.dir, "fusion") if tcp == "ipc" else tcp

    @property
    def failure(self) -> str | None:
        """Why the session ended before it was stopped, if it failed."""
        return self._supervisor.failure

    @property
    def defect(self) -> str | None:
        """What went wrong without ending the session, known at its end: its recording is not whole."""
        return self._supervisor.defect

    def start(self, interrupted: Callable[[], bool] = lambda: False) -> None:
        """Starts all nodes; returns when the consumers and the required sources are ready, or when ``interrupted``
        says so. Raises SensoriumError, with a dying node's last lines, and leaves nothing behind."""
        if self._thread is not None:
            raise ConfigError(f"session {self.id} was started already; a session runs once")
        atexit.register(self.stop)  # a program that forgets its session must not leave it behind
        supervisor = self._supervisor
        self._thread = threading.Thread(target=supervisor.run, name="session", daemon=True)
        self._thread.start()
        while not supervisor.started.wait(TURN_S) and not supervisor.over.is_set() and not interrupted():
            pass
        if self.failure is not None or supervisor.crash is not None:
            self.stop()
            raise SensoriumError(self.failure)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Waits until the session is over: its data came to their end, or it failed (``failure``); all nodes have
        stopped and the recording is closed then. False if the time was over first."""
        return self._supervisor.over.wait(timeout_s)

    def stop(self, hard: bool = False) -> None:
        """Stops all nodes in order and removes what belongs to the session; ``hard`` kills them. Idempotent."""
        supervisor = self._supervisor
        if hard:
            supervisor.hard.set()
        supervisor.stop()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        atexit.unregister(self.stop)
        crash, supervisor.crash = supervisor.crash, None
        if crash is not None:
            raise crash

    def __enter__(self) -> Session:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.stop()

    def run(self, duration_s: float | None = None, on_tick: Callable[[Session], None] = lambda session: None) -> None:
        """Starts the session, runs it until its end, ``duration_s``, SIGINT, SIGTERM or SIGHUP, and stops it; a second
        SIGINT or SIGTERM kills. ``duration_s`` counts from when every node has started, or has said what it waits for.
        ``on_tick`` is called about four times a second. For the main thread. Raises SensoriumError."""
        asked = threading.Event()

        def on_signal(number: int, _: Any) -> None:
            # A closed terminal sends two: the kernel one, and the shell another. Nobody is impatient there.
            if asked.is_set() and number != signal.SIGHUP:
                self._supervisor.hard.set()
            asked.set()

        with _signals(on_signal):
            try:
                self.start(asked.is_set)
                until: int | None = None
                while not asked.is_set() and not self.wait(0.25):
                    on_tick(self)
                    if duration_s is not None and until is None and not self._any_starting():
                        until = self.clock.now_ns() + round(duration_s * 1e9)
                    if until is not None and self.clock.now_ns() >= until:
                        break
            finally:
                self.stop()
            if (wrong := self.failure or self.defect) is not None:
                raise SensoriumError(wrong)

    def _any_starting(self) -> bool:
        return any(node.state == "starting" for node in self.status().nodes.values())

    def status(self) -> Status:
        """How everything is now. Cheap; from any thread."""
        with self._supervisor.lock:
            nodes = {name: node_status(child) for name, child in self._supervisor.children.items()}
            streams = {name: self._stream_status(name) for name in self.plan.streams}
            return Status(
                session=self.id, now_ns=self.clock.now_ns(), nodes=nodes, streams=streams,
                recordings=self._supervisor.recordings(),
            )  # fmt: skip

    def _stream_status(self, stream: str) -> StreamStatus:
        node, children = self.plan.node_of(stream), self._supervisor.children
        status = StreamStatus(node=node, payload=self.plan.streams[stream])
        if (child := children.get(node)) is not None:
            report = child.report.sources.get(stream, SourceReport())
            merge(status, report)
            status.total, status.total_dropped = child.total(stream, report)
            status.rate_hz, status.note = child.rate_hz(stream), child.report.note
        if (align := children.get("align")) is not None:
            merge(status, align.report.aligned.get(stream, AlignReport()))
        return status


@contextlib.contextmanager
def _signals(handler: Callable[..., None]) -> Iterator[None]:
    """What asks the session to end goes to ``handler`` meanwhile."""
    before = {number: signal.signal(number, handler) for number in ending_signals()}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
