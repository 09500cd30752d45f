"""A node's life: what it is told to be, what it is told to do, and what it says of itself.

One process is one node. Its parent hands it a ``NodeSpec`` in a file, writes ``Order``s to its standard input and
reads ``Report``s from its standard output, both a line of JSON each; its log is standard error. Pipes need no name and
no port, they order what is said, and when the parent dies, however it dies, they close: then the node stops cleanly,
and a recording is finished. No node outlives its launcher.
"""

from __future__ import annotations

import ctypes
import io
import mmap
import os
import queue
import signal
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import msgspec

from pipeline.calls import setting
from pipeline.clock import Clock, Origin, SystemClock
from pipeline.errors import ConfigError

REPORT_EVERY_NS = 250_000_000
"""How often a node reports while nothing changes. The launcher takes long silence for a hang."""

UNMEASURED_NS = 10_000_000_000
"""A stream that has given nothing but NaN or infinities for so long is told of."""

LAST_RESORT_S = 8.0
"""How long a node whose launcher is gone may take to finish what it holds."""


class NodeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a node must know. ``settings`` are its class's own, checked before it was started."""

    session: str
    origin: Origin
    session_dir: str
    node: str
    kind: str
    settings: dict[str, Any] = {}
    streams: dict[str, str] = {}
    """The streams that this node publishes, and their payloads."""
    slots: dict[str, int] = {}
    """Bytes of the largest payload of each of them, 0 if unknown."""
    offset_ns: int = 0
    """Added to the capture times of a source, and to their uncertainty the next."""
    offset_uncertainty_ns: int = 0
    readers: tuple[str, ...] = ()
    """Nodes that must have joined before the first message is sent."""
    import_paths: tuple[str, ...] = ()
    life: int = 0
    """How often this node has been restarted."""
    begun: bool = True
    """Whether the session has begun; else ``origin`` is provisional, and the node waits for the order to begin."""
    readers_s: float = 10.0
    """How long to wait for ``readers`` before sending without them."""
    lease_ms: int = 1000
    ring_mib: int = 64
    supervised: bool = True
    link: dict[str, Any] | None = None
    """Where a source on another host finds its hub (``pipeline.link.LinkSpec``); None on the hub itself."""


class SourceReport(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a source says of one stream: ``dropped`` are messages and what would have been in them, by reason;
    ``failures`` how often its device failed or could not be opened, which by itself cost no message; ``unmeasured`` are
    messages that were found to hold no value, but ``unmeasured_as`` (NaN, infinities), ``unmeasured_ns`` the longest
    time in which no other was found."""

    epoch: int | None = None
    published: int = 0
    newest_ns: int | None = None
    dropped: dict[str, int] = {}
    failures: int = 0
    unmeasured: int = 0
    unmeasured_as: str = "NaN"
    unmeasured_ns: int = 0


class AlignReport(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What the aligner says of one stream: its counters, and the verdict of the newest step."""

    verdict: str | None = None
    reason: str | None = None
    age_ms: float | None = None
    received: int = 0
    used: int = 0
    late: int = 0
    no_window: int = 0
    superseded: int = 0
    duplicate: int = 0
    lost: int = 0
    buffered: int = 0
    rejected: dict[str, int] = {}


QUEUE_FULL = "the disk was too slow, and the recorder's queue full"
ON_THE_WAY = "lost on the way to the recorder"
OVERWRITTEN = "overwritten in shared memory before the recorder had copied it"
SLOW = (QUEUE_FULL, ON_THE_WAY, OVERWRITTEN)
"""Why the recorder has lost messages, where the disk or the machine was too slow."""
FROM_ELSEWHERE = "lost on the way from their host to the recorder"
"""The same of streams of another host, between which and the recorder there is a link."""


class NoRoom(msgspec.Struct, omit_defaults=True, kw_only=True):
    """That a ring had no room on its disk, ``times`` times: since when (session time), until when (None: it has none
    yet), and how many windows and predictions it lacks for that."""

    times: int
    from_ns: int
    until_ns: int | None = None
    windows: int = 0
    predictions: int = 0


class RecordReport(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a recorder says of the file, or the ring, that one life of it writes."""

    path: str
    asked: str = ""
    """The name that was asked for, if another file has it and stays as it is."""
    from_ns: int = 0
    safe_ns: int | None = None
    """Session time of the newest arrival that the operating system has; None: nothing is there yet."""
    messages: dict[str, int] = {}
    """Recorded, by stream: every stream that is to be."""
    safe: dict[str, int] = {}
    """Those of them that the operating system has, which a life that dies leaves behind."""
    lost: dict[str, dict[str, int]] = {}
    """Not recorded, by stream and cause."""
    lost_beats: int = 0
    lost_windows: int = 0
    lost_predictions: int = 0
    """These two on the way to it."""
    no_room: NoRoom | None = None


class Accounts(msgspec.Struct, kw_only=True):
    """What the aligner says of all streams at a moment of session time."""

    now_ns: int
    streams: dict[str, AlignReport]


State = Literal["starting", "loaded", "waiting", "ready", "ended"]


class Report(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What a node says of itself. ``loaded``: a source that could begin; ``waiting``: it lives but has nothing to give,
    for the reason in ``note``; ``ended``: its data came to their natural end (``ended`` holds the epoch and the number
    of the message that will not come)."""

    state: State
    note: str = ""
    sources: dict[str, SourceReport] = {}
    aligned: dict[str, AlignReport] = {}
    counters: dict[str, float] = {}
    ended: dict[str, tuple[int, int]] = {}
    away: dict[str, str] = {}
    """Of a node with several streams those that have come and do not now, and why."""
    recording: RecordReport | None = None
    warnings: list[str] = []
    """What is wrong now and does not keep the node from working, in sentences; said once, and at the session's end."""


class Order(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What the launcher tells a node. ``begin``: all are up, and the session's time 0 lies at ``origin``; ``close``
    goes to the align node: a stream is dead, its node's last life having ended in ``epoch``, or it ended before message
    ``seq`` of ``epoch``."""

    do: Literal["begin", "stop", "close"]
    origin: Origin | None = None
    stream: str = ""
    reason: Literal["dead", "ended"] = "dead"
    epoch: int = 0
    seq: int = 0


_encode = msgspec.json.Encoder().encode
_order = msgspec.json.Decoder(Order)


class Life:
    """What a running node is given: its spec, the clock, the wish that it stops, its orders, and its voice."""

    def __init__(self, spec: NodeSpec, clock: Clock | None = None, voice: int | None = None) -> None:
        """``voice`` is the file descriptor that reports go to; None: nowhere (a node that runs without a launcher)."""
        self.spec = spec
        self.clock: Clock = clock or SystemClock(spec.origin)
        self.stop = threading.Event()
        self.begun = threading.Event()
        if spec.begun:
            self.begun.set()
        self.ordered = False
        """Whether it is the launcher that wants it to stop; otherwise the node will be started again."""
        self.orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._voice = voice
        self._unsaid = b""
        self._next_report_ns = 0

    def report(self, report: Report) -> None:
        """Says ``report``. Never waits: while the launcher does not listen, reports are left out."""
        self._next_report_ns = self.clock.now_ns() + REPORT_EVERY_NS
        if self._voice is None:
            return
        line = self._unsaid or _encode(report) + b"\n"
        try:
            self._unsaid = line[os.write(self._voice, line) :]
        except BlockingIOError:
            self._unsaid = line if line is self._unsaid else b""
        except BrokenPipeError:
            self.stop.set()  # the launcher is gone

    def wait_to_begin(self, report: Report) -> None:
        """Says ``report`` until the session begins. Nothing may be stamped before: its time 0 is not known until every
        node is up, so that no window is lost to the start of a process."""
        while not self.begun.is_set() and not self.stop.is_set():
            self.report(report)
            self.begun.wait(REPORT_EVERY_NS / 1e9)

    def begin(self, origin: Origin) -> None:
        """The order to begin."""
        if isinstance(self.clock, SystemClock):
            self.clock.begin(origin)
        self._next_report_ns = 0
        self.begun.set()

    @property
    def due(self) -> bool:
        """Whether it is time to report again. A node that stops says at each of its last turns how things are, so that
        what it counts is known to the end."""
        return self.stop.is_set() or self.due_at(self.clock.now_ns())

    def due_at(self, now_ns: int) -> bool:
        """The same, asked by one who knows the time."""
        return now_ns >= self._next_report_ns

    def take_orders(self) -> list[Order]:
        """The orders since the last call (``stop`` is none of them: it sets ``stop``)."""
        taken = []
        while True:
            try:
                taken.append(self.orders.get_nowait())
            except queue.Empty:
                return taken


class Mark:
    """A number that outlives its process, however that ends: the last step that was sent. -1 before the first."""

    def __init__(self, life: Life) -> None:
        path = Path(life.spec.session_dir) / f"{life.spec.node}.mark"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fresh = os.fstat(fd).st_size < 8
            os.ftruncate(fd, 8)
            self._word = memoryview(mmap.mmap(fd, 8)).cast("q")
        finally:
            os.close(fd)
        if fresh:
            self._word[0] = -1

    @property
    def value(self) -> int:
        return self._word[0]

    @value.setter
    def value(self, value: int) -> None:
        self._word[0] = value


def last_sent(session_dir: str, node: str) -> int:
    """The ``Mark`` of another node of the session; -1 where it has sent nothing."""
    try:
        return int.from_bytes((Path(session_dir) / f"{node}.mark").read_bytes()[:8], sys.byteorder, signed=True)
    except OSError:
        return -1


def read_spec(path: Path | str) -> NodeSpec:
    """The spec in the file ``path``. Raises ConfigError."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=NodeSpec)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is no node's spec: {error}. Specs are written by the launcher into the session's folder; to start "
            "a session, run `sensorium run RIG`."
        ) from None


def begin(spec: NodeSpec) -> Life:
    """The life of this process as the node ``spec``: signals, pipes and the tie to the launcher are set up."""
    # Interrupts from a terminal reach the whole group; the launcher decides in which order its nodes stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN if spec.supervised else signal.default_int_handler)
    if not spec.supervised:
        life = Life(spec)
        signal.signal(signal.SIGTERM, setting(life.stop))
        signal.signal(signal.SIGINT, setting(life.stop))
        return life
    voice = os.dup(1)
    os.set_blocking(voice, False)
    os.dup2(2, 1)  # what a driver prints belongs in the log, not between the reports
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # and at once: who writes a source looks for it there
    life = Life(spec, voice=voice)
    signal.signal(signal.SIGTERM, setting(life.stop))
    _die_with_parent()
    threading.Thread(target=_listen, args=(life,), daemon=True, name="orders").start()
    return life


def _listen(life: Life) -> None:
    """Passes orders on until the launcher is gone. Reads the descriptor itself: a thread that waits inside a buffered
    file aborts the interpreter when that ends."""
    rest = b""
    while said := os.read(0, 65_536):
        *lines, rest = (rest + said).split(b"\n")
        for order in map(_order.decode, lines):
            if order.do == "stop":
                life.ordered = True
                life.stop.set()
            elif order.do == "begin" and order.origin is not None:
                life.begin(order.origin)
            else:
                life.orders.put(order)
    life.stop.set()
    # The pipe closes only when the launcher has died: a node that cannot finish must not stay behind as an orphan.
    threading.Event().wait(LAST_RESORT_S)
    os._exit(70)


def _die_with_parent() -> None:
    """Asks Linux for a SIGTERM when the launcher dies, beside the closing pipe. Elsewhere the pipe alone does it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # 1: PR_SET_PDEATHSIG
