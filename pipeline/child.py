"""One node's process as its launcher sees it: started fresh, spoken to through pipes, watched, ended."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections import deque
from pathlib import Path
from typing import IO, Literal

import msgspec

from pipeline.clock import Clock
from pipeline.config import RestartEntry
from pipeline.life import NodeSpec, Order, RecordReport, Report, SourceReport
from pipeline.refusals import REPEAT_NS, Repeated
from pipeline.shm import COPY_ENVIRONMENT

NodeState = Literal["starting", "loaded", "waiting", "ready", "restarting", "ended", "failed", "stopped"]
SENSOR_BACKOFF_NS = 1_000_000_000
TAIL_LINES = 12
LOG_LIMIT = 4 << 20

_report = msgspec.json.Decoder(Report)
_START = "import sys; from pipeline import calls, node; calls.leave(node.run_node(sys.argv[1]))"


class Child:
    """One node through all its lives."""

    def __init__(self, spec: NodeSpec, required: bool, limits: RestartEntry, clock: Clock) -> None:
        self.spec, self.required, self._limits, self._clock = spec, required, limits, clock
        self.state: NodeState = "starting"
        self.report = Report(state="starting")
        self.restarts = 0
        self.restart_at_ns: int | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.log = Path(spec.session_dir) / f"{spec.node}.log"
        self.recordings: list[RecordReport] = []
        """What a recorder's earlier lives said last."""
        self.before: dict[str, tuple[int, dict[str, int]]] = {}
        """By stream what earlier lives of a source published, and what they dropped by reason."""
        self.warned = Repeated(clock)
        """What it has warned of, in all its lives."""
        self.trouble = ""
        """Why it waited last, or how it died, in words."""
        self.away: set[str] = set()
        """Streams of which was said that they are away."""
        self._waited: dict[str, tuple[str, int, int]] = {}
        self.rates: dict[str, deque[tuple[int, int]]] = {}
        self._rest = b""
        self._deaths: deque[int] = deque()
        self._heard_ns = 0
        self.hung = self._silent = False

    @property
    def name(self) -> str:
        """The node's name."""
        return self.spec.node

    def start(self) -> IO[bytes]:
        """Starts a life: a fresh interpreter, in a process group of its own so that an interrupt typed at the terminal
        reaches the launcher alone. Returns the pipe that it speaks through."""
        file = Path(self.spec.session_dir) / f"{self.name}.json"
        file.write_bytes(msgspec.json.encode(self.spec))
        with self.log.open("ab") as log:
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(file)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, process_group=0, env=_environment(),
            )  # fmt: skip
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self._remember()
        self.state, self.report, self.restart_at_ns = "starting", Report(state="starting"), None
        self._rest, self._heard_ns = b"", self._clock.now_ns()
        self.hung = self._silent = False
        self.away = set()
        return self.process.stdout

    def _remember(self) -> None:
        """Takes over what the life before said last: what it counted is no less true for its end."""
        if self.report.recording is not None:
            self.recordings.append(self.report.recording)
        for stream, source in self.report.sources.items():
            self.before[stream] = self.total(stream, source)

    def total(self, stream: str, source: SourceReport) -> tuple[int, dict[str, int]]:
        """What all lives together published and dropped, ``source`` being the report of the present one."""
        published, dropped = self.before.get(stream, (0, {}))
        reasons = {**dropped, **source.dropped}
        return published + source.published, {r: dropped.get(r, 0) + source.dropped.get(r, 0) for r in reasons}

    def listen(self) -> tuple[list[Report], bool]:
        """What the node has said since the last call, and whether it is still there."""
        assert self.process is not None
        assert self.process.stdout is not None
        try:
            said = os.read(self.process.stdout.fileno(), 1 << 20)
        except BlockingIOError:
            return [], True
        lines = (self._rest + said).split(b"\n")
        self._rest = lines.pop()
        reports = []
        for line in lines:
            with contextlib.suppress(msgspec.MsgspecError):
                reports.append(_report.decode(line))
        if reports:
            self._hear(reports[-1])
        return reports, len(said) > 0

    def _hear(self, report: Report) -> None:
        now = self._heard_ns = self._clock.now_ns()
        self.report, self.state = report, report.state
        self.trouble = report.note if report.state == "waiting" and report.note else self.trouble
        for stream, source in report.sources.items():
            points = self.rates.setdefault(stream, deque(maxlen=5))
            if points and points[-1][1] > source.published:
                points.clear()  # a new life counts from 0
            points.append((now, source.published))

    def waits_anew(self, note: str, stream: str = "") -> bool:
        """Whether it is worth saying that it waits, or that one ``stream`` of it is away, for the reason ``note``: not
        again if nothing has come of it since it was said, until much time has passed."""
        sources = self.report.sources
        given = sum(self.total(name, source)[0] for name, source in sources.items() if stream in ("", name))
        before, now = self._waited.get(stream), self._clock.now_ns()
        if before is not None and before[:2] == (note, given) and now - before[2] < REPEAT_NS:
            return False
        self._waited[stream] = (note, given, now)
        return True

    def turns(self, away: dict[str, str]) -> tuple[list[str], list[str]]:
        """Of its streams, of which these are ``away`` now and why, those that it is worth saying of that they have gone
        since the last call, and those of which that was said and that have returned."""
        gone = [name for name, why in away.items() if name not in self.away and self.waits_anew(why, name)]
        back = sorted(self.away - set(away))
        self.away = (self.away & set(away)) | set(gone)
        return gone, back

    def rate_hz(self, stream: str) -> float:
        """Messages a second over about the last second."""
        points = self.rates.get(stream) or deque()
        if len(points) < 2 or points[-1][0] == points[0][0]:
            return 0.0
        return (points[-1][1] - points[0][1]) / ((points[-1][0] - points[0][0]) / 1e9)

    def tell(self, order: Order) -> None:
        """Gives an order; to a node that is gone it goes nowhere."""
        if self.process is None or self.process.stdin is None:
            return
        with contextlib.suppress(OSError, ValueError):
            self.process.stdin.write(msgspec.json.encode(order) + b"\n")
            self.process.stdin.flush()

    def hangs(self) -> bool:
        """Whether the node has said nothing for longer than it may. Asked once a turn, and true from the second time
        on: where the launcher was stopped itself (Ctrl-Z), what was said meanwhile is still to be heard."""
        patience_s = self._limits.hang_ms / 1000 if self.state in ("ready", "ended") else self._limits.start_s
        silent = self._clock.now_ns() - self._heard_ns > patience_s * 1e9
        before, self._silent = self._silent, silent
        return silent and before

    def trim_log(self) -> None:
        """Begins the log anew when a chatty driver has filled it: the session's folder often lies in memory."""
        if self.log.stat().st_size > LOG_LIMIT:
            os.truncate(self.log, 0)

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to the node, if it is there."""
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(how)

    def kill_once(self) -> bool:
        """Kills the node; False if that was done before: a large process takes its time to die."""
        killed, self.hung = self.hung, True
        if not killed:
            self.kill()
        return not killed

    def bury(self) -> int:
        """Collects the status of a process whose pipe has closed, and closes the launcher's ends."""
        assert self.process is not None
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:  # it closed its pipe and lives on
            self.process.kill()
            status = self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self.process = None
        return status

    def plan_restart(self, sensor: bool) -> bool:
        """Sets when the node starts again; False if it has died too often in the rig's window of time. A device that
        is away is no crash: it is waited for, for ever."""
        now = self._clock.now_ns()
        if sensor:
            self.restart_at_ns = now + SENSOR_BACKOFF_NS
        else:
            self._deaths.append(now)
            while self._deaths and now - self._deaths[0] > self._limits.window_s * 1e9:
                self._deaths.popleft()
            if len(self._deaths) > self._limits.limit:
                return False
            self.restart_at_ns = now + (self._limits.backoff_ms * 1_000_000 << min(len(self._deaths) - 1, 6))
        self.restarts += 1
        self.spec = msgspec.structs.replace(self.spec, life=self.restarts, readers_s=2.0)
        self.state = "restarting"
        return True

    def died_how(self, status: int) -> str:
        """How its last life ended, in words."""
        return "said nothing for too long, and was killed" if self.hung else died_how(status)

    def tail(self) -> str:
        """The last lines that the node wrote before it died, of this life alone."""
        try:
            said = self.log.read_bytes()
        except OSError:
            return ""
        own = said[self._log_start :] if len(said) >= self._log_start else said  # else it was trimmed meanwhile
        lines = own.decode("utf-8", "replace").splitlines()
        return "\n".join(lines[-TAIL_LINES:])


def died_how(status: int) -> str:
    """An exit status in words."""
    if status < 0:
        try:
            return f"was killed by {signal.Signals(-status).name}"
        except ValueError:
            return f"was killed by signal {-status}"
    return f"ended with exit status {status}"


def _environment() -> dict[str, str]:
    """The launcher's own, with this package on the path, without a thread a core in every node's numpy, and with the
    C library's copies as frames want them (``pipeline.shm``)."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.environ.get("PYTHONPATH")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return threads | COPY_ENVIRONMENT | dict(os.environ) | {"PYTHONPATH": f"{root}{os.pathsep}{path}" if path else root}
