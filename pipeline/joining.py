"""``sensorium node --join``: this host's sources for the session of another host.

Asks the hub what it is to run, and runs each source in a process of its own, with the care that a session's launcher
takes of its nodes: one that dies or hangs is started again, and none outlives this process. When the session is over
they stop, and the next one is waited for.
"""

from __future__ import annotations

import selectors
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec

from pipeline.child import Child
from pipeline.clock import Origin, SystemClock
from pipeline.config import RestartEntry
from pipeline.errors import ConfigError, SensoriumError, listed
from pipeline.life import NodeSpec, Order
from pipeline.link import INVITE, JOIN, PROTOCOL, STOP, Hello, Invitation, LinkSpec
from pipeline.node import EXIT_SENSOR
from pipeline.refusals import Repeated
from pipeline.source import KINDS
from pipeline.transport import LinkClient, SessionFolder, remove_leftovers, sessions_root

ASK_NS = 500_000_000
"""How often the hub is asked; that it answers shows that it is there."""
SILENT_NS = 10_000_000_000
"""Sources of a session whose hub has not answered for so long are stopped."""
STOP_NS = 3_000_000_000
TURN_MS = 50

Say = Callable[[str], None]


def join(
    where: LinkSpec,
    *,
    say: Say,
    stop: threading.Event,
    once: bool = False,
    allow_code: bool = False,
    paths: tuple[str, ...] = (),
) -> None:
    """Runs this host's sources for the hub at ``where`` until ``stop`` is set, or with ``once`` until the first session
    is over. ``allow_code`` lets the hub name kinds that are not shipped, which are looked for in ``paths``. Raises
    ConfigError, and SensoriumError when a source keeps dying."""
    remove_leftovers(sessions_root())
    refusals = Repeated()
    with closing(where.connect()) as client:
        while not stop.is_set():
            say(f"waiting for a session at {where.address}")
            invitation = _invited(client, stop, refusals, say)
            if invitation is None:
                return
            say(f"joined session {invitation.session}: {', '.join(sorted(invitation.streams))}")
            host = _Host(where, invitation, client, say, allow_code, paths)
            host.run(stop)
            say(f"left session {invitation.session}: {host.why}")
            if once:
                return


def _invited(client: LinkClient, stop: threading.Event, refusals: Repeated, say: Say) -> Invitation | None:
    while not stop.is_set():
        for refusal in refusals.new([client.refusal] if client.refusal else []):
            say(refusal)
        _ask(client)
        clock = SystemClock()
        while clock.now_ns() < ASK_NS and not stop.is_set():
            found = _invitation(client.receive(TURN_MS))
            if found is not None:
                return found
    return None


def _ask(client: LinkClient) -> None:
    client.send((JOIN, msgspec.json.encode(Hello(PROTOCOL, socket.gethostname()))))


def _invitation(parts: list[bytes] | None) -> Invitation | None:
    if parts is None or len(parts) != 2 or parts[0] != INVITE:
        return None
    try:
        found = msgspec.json.decode(parts[1], type=Invitation)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"the hub says what this version does not understand ({error}); install one version on both."
        ) from None
    if found.protocol != PROTOCOL:
        raise ConfigError(
            f"the hub speaks version {found.protocol} of the link, and this host version {PROTOCOL}; install one "
            "version of sensorium on both."
        )
    return found


def _make_folder() -> SessionFolder:
    """For the specs and logs of one session's sources, beside the sessions of this host: whoever starts next, a session
    or a host that joins one, removes the folder of one that was killed."""
    root = sessions_root()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    return SessionFolder(Path(tempfile.mkdtemp(prefix="join-", dir=root)))


class _Host:
    """The sources of one session."""

    def __init__(
        self, where: LinkSpec, invitation: Invitation, client: LinkClient, say: Say, allow_code: bool,
        paths: tuple[str, ...],
    ) -> None:  # fmt: skip
        foreign = sorted({s.kind for s in invitation.streams.values() if s.kind not in KINDS})
        if foreign and not allow_code:
            raise ConfigError(
                f"the hub asks for the kind {listed(foreign)}, which is not shipped; if you trust the hub to choose "
                "code that runs here with your rights, add --allow-code."
            )
        self.why = "stopped"
        self._invitation, self._client, self._say = invitation, client, say
        self._clock = SystemClock()
        self._warned = Repeated(self._clock)
        self._selector = selectors.DefaultSelector()
        self._folder = _make_folder()
        origin = Origin.now()
        self._children = [
            Child(
                NodeSpec(
                    session=invitation.session, origin=origin, session_dir=str(self._folder.path), node=name,
                    kind=stream.kind, settings=stream.settings, streams={name: stream.payload},
                    offset_ns=stream.offset_ns,
                    offset_uncertainty_ns=stream.offset_uncertainty_ns, import_paths=paths,
                    link=msgspec.to_builtins(where),
                ),
                False, RestartEntry(), self._clock,
            )
            for name, stream in invitation.streams.items()
        ]  # fmt: skip

    def run(self, stop: threading.Event) -> None:
        """Until the session is over or ``stop`` is set. Raises SensoriumError."""
        ordered = False
        try:
            for child in self._children:
                self._start(child)
            ordered = self._watch(stop)
            self._end(ordered)
        finally:
            for child in self._children:
                if child.process is not None:
                    child.kill()
                    child.bury()
            self._selector.close()
            self._folder.close(remove=True)

    def _watch(self, stop: threading.Event) -> bool:
        """Looks after the sources; whether the session ended in order."""
        asked = heard = self._clock.now_ns()
        while not stop.is_set():
            now = self._clock.now_ns()
            if now - asked > ASK_NS:
                asked = now
                _ask(self._client)
            parts = self._client.receive(TURN_MS)
            if parts is not None:
                heard = now
            if parts == [STOP]:
                self.why = "it is over"
                return True
            found = _invitation(parts)
            for warning in self._warned.new(found.warnings if found is not None else ()):
                self._say(f"the hub says: {warning}")
            if found is not None and found.session != self._invitation.session:
                self.why = "another has begun"
                return False
            if now - heard > SILENT_NS:
                self.why = f"the hub has not answered for {SILENT_NS // 1_000_000_000} s"
                return False
            self._care()
        return False

    def _care(self) -> None:
        self._listen(0)
        for child in self._children:
            if child.process is not None and child.hangs() and child.kill_once():
                self._say(f"{child.name} has said nothing for too long, and is killed")
            if child.restart_at_ns is not None and self._clock.now_ns() >= child.restart_at_ns:
                self._start(child)
            if child.log.exists():
                child.trim_log()

    def _start(self, child: Child) -> None:
        self._selector.register(child.start(), selectors.EVENT_READ, child)

    def _listen(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s) if self._selector.get_map() else ():
            child: Child = key.data
            before = child.report.state, child.report.note
            _, alive = child.listen()
            if (child.report.state, child.report.note) != before:
                self._say(f"{child.name}: {child.report.note or child.report.state}")
            if not alive:
                self._selector.unregister(key.fileobj)
                self._died(child, child.bury())

    def _died(self, child: Child, status: int) -> None:
        if child.state in ("ended", "stopped"):
            return
        tail = child.tail()
        self._say(f"{child.name} {child.died_how(status)}" + (f"; its last words:\n{tail}" if tail else ""))
        if status == ConfigError.exit_code or not child.plan_restart(status == EXIT_SENSOR):
            raise SensoriumError(f"{child.name} {child.died_how(status)}" + (f":\n{tail}" if tail else ""))

    def _end(self, ordered: bool) -> None:
        """Stops the sources: in order, so that their streams end, where it is the session that does."""
        for child in self._children:
            child.restart_at_ns, child.state = None, "stopped"
            if ordered:
                child.tell(Order(do="stop"))
            elif child.process is not None:
                child.process.terminate()
        begun = self._clock.now_ns()
        while any(child.process is not None for child in self._children):
            self._listen(0.05)
            for child in self._children:
                child.state = "stopped"
            if self._clock.now_ns() - begun > STOP_NS:
                return
