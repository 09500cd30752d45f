"""Lines of text: a transcript, an operator's notes, commands. From a file that grows, HTTP on loopback, or a pipe.

    sources:
      notes:    {kind: text, file: ../notes.txt}
      commands: {kind: text, http: 8765}           # curl --data 'stop' http://127.0.0.1:8765
      words:    {kind: text, stdin: true}          # transcribe | sensorium run rig.yaml

A line counts as captured when it was complete: of a file and a pipe that is when it was found, at most
``uncertainty_ns`` after it was written. Empty lines are passed over. What is no UTF-8 (UTF-16 neither, whose letters
have zeros beside them) is refused and counted as ``utf8``, a line longer than ``max_bytes`` as ``overlong``. The last
line of a file that is removed, or whose place another takes, needs no end; that of one that is written anew is counted
as ``cut``. While nothing is said the source promises so, and nobody waits for it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import select
import stat
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol

import msgspec

from pipeline.errors import SensorError
from pipeline.messages import Payload, TextLayout
from pipeline.source import Reading, Source, SourceContext

_MS = 1_000_000
_PATIENCE_S = 0.05
_POLL_NS = 5 * _MS
_CHUNK = 1 << 16
_SEEN = 64
"""So many of the bytes that were read last are looked at again: are they others, the file was written anew."""
_MARK = "\ufeff".encode()
"""What some programs begin a file of UTF-8 with; it is no part of the text."""
_LARGEST_POST = 1 << 20
_POST_TIMEOUT_S = 5.0

Line = tuple[bytes, int, int]
"""A line without its end, when it was complete (session time), and how sure that is in ns."""


class Text(Source):
    """Lines of text."""

    payload: ClassVar[Payload] = "text"

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """Exactly one of ``file`` (followed from its end, or ``from_start``, also when it is replaced), ``http`` (a
        port of 127.0.0.1 that takes POSTs) and ``stdin`` (what is piped into the program that started this node)."""

        file: Path | None = None
        from_start: bool = False
        http: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
        stdin: bool = False
        max_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 20)] = 4096

        def __post_init__(self) -> None:
            given = [name for name in ("file", "http", "stdin") if getattr(self, name) not in (None, False)]
            if len(given) != 1:
                raise ValueError(
                    f"a text source needs exactly one of `file`, `http` and `stdin`, and has "
                    f"{' and '.join(given) or 'none'}; write for example `file: notes.txt`"
                )
            if self.from_start and self.file is None:
                raise ValueError("`from_start` is for `file`; lines of the other two have no past")

    def __init__(self, settings: Any, context: SourceContext) -> None:
        super().__init__(settings, context)
        self._input: _Input | None = None
        self._place: tuple[int, int] | None = None
        self._last_ns = -1

    def open(self) -> None:
        self.close()
        settings = self.settings
        if settings.file is not None:
            self._input = _File(settings, self.context, self._place)
        elif settings.http is not None:
            self._input = _Http(settings, self.context)
        else:
            self._input = _Pipe(settings, self.context)

    def read(self) -> list[Reading]:
        if self._input is None:
            raise SensorError("the text source was read before it was opened; open it first.")
        found = [self._reading(line) for line in self._input.read()]
        return [reading for reading in found if reading is not None]

    def _reading(self, line: Line) -> Reading | None:
        data, found_ns, uncertainty_ns = line
        data = _bare(data)
        if not data:
            return None
        if len(data) > self.settings.max_bytes:
            self.context.count("overlong")
            return None
        if _no_utf8(data):
            self.context.count("utf8")
            return None
        self._last_ns = max(found_ns, self._last_ns + 1)
        return Reading(layout=TextLayout(len(data)), data=data, t_capture_ns=self._last_ns, t_end_ns=self._last_ns,
                       t_receipt_ns=found_ns, uncertainty_ns=uncertainty_ns)  # fmt: skip

    def bound_ns(self) -> int | None:
        return None if self._input is None else self._input.promise_ns()

    def close(self) -> None:
        given, self._input = self._input, None
        if given is not None:
            if isinstance(given, _File):
                self._place = given.place
            given.close()


class _Input(Protocol):
    def read(self) -> list[Line]: ...
    def promise_ns(self) -> int | None:
        """No line that is read later was complete before this time."""

    def close(self) -> None: ...


class _Splitter:
    """Bytes in, whole lines out. What is longer than any line may be is cut to one byte too many, and so refused."""

    def __init__(self, max_bytes: int) -> None:
        self._keep = max_bytes + len(_MARK) + 2
        self._rest = b""
        self.open_bytes = 0
        """How many bytes of a line have come that has no end yet."""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, rest = (self._rest + data).split(b"\n")
        self.open_bytes = len(data) - data.rfind(b"\n") - 1 if lines else self.open_bytes + len(data)
        self._rest = rest[: self._keep]
        return [line[: self._keep] for line in lines]

    def end(self) -> list[bytes]:
        """The last line, if it has no end."""
        return self.feed(b"\n") if self._rest else []


class _File:
    """Follows a file by its name, as `tail -F` does."""

    def __init__(self, settings: Text.Settings, context: SourceContext, place: tuple[int, int] | None) -> None:
        assert settings.file is not None
        self._path, self._clock, self._count = settings.file, context.clock, context.count
        self._max_bytes = settings.max_bytes
        try:
            self._open(None if place is None and not settings.from_start else place or (0, 0))
        except OSError as error:
            raise SensorError(
                f"the text file {self._path} cannot be opened: {error}. It must exist and be readable when lines are "
                "to be read from it."
            ) from error
        self._asked_ns = self._next_ns = self._clock.now_ns()

    def _open(self, place: tuple[int, int] | None) -> None:
        """``place``: the file's number and how far it was read, at an earlier time; another file begins at its
        start. None: only what comes from now on. Raises OSError."""
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self._number, size = os.fstat(self._fd).st_ino, os.fstat(self._fd).st_size
        self._at = size if place is None else place[1] if place[0] == self._number and place[1] <= size else 0
        before = max(self._at - _SEEN, 0)
        self._seen = os.pread(self._fd, self._at - before, before)
        self._lines = _Splitter(self._max_bytes)

    @property
    def place(self) -> tuple[int, int]:
        """The file's number, and how far its lines were read: one that has no end yet is to be read whole."""
        return self._number, self._at - self._lines.open_bytes

    def read(self) -> list[Line]:
        until = self._clock.now_ns() + round(_PATIENCE_S * 1e9)
        while self._clock.now_ns() < until:
            self._clock.wait_until(self._next_ns)
            found = self._look()
            if found:
                return found
        return []

    def _look(self) -> list[Line]:
        now, before = self._clock.now_ns(), self._asked_ns
        self._next_ns = now + _POLL_NS
        last: list[bytes] = []
        try:
            data = self._more()
            if not data and self._replaced():
                data = self._more()  # what was added before
                last = [] if data else self._lines.end()  # nobody will write its end here
                if not data and not last:
                    self._follow()
        except OSError as error:
            raise SensorError(f"the text file {self._path} cannot be read any more: {error}.") from error
        if len(data) < _CHUNK:
            self._asked_ns = now
        return [(line, now, now - before) for line in last + self._lines.feed(data)]

    def _more(self) -> bytes:
        """What was added, or all that a file begins with that was cut or written anew."""
        data = os.pread(self._fd, len(self._seen) + _CHUNK, self._at - len(self._seen))
        if data.startswith(self._seen):
            data = data[len(self._seen) :]
        else:
            if self._lines.end():
                self._count("cut")
            self._at, self._seen, self._lines = 0, b"", _Splitter(self._max_bytes)
            data = os.pread(self._fd, _CHUNK, 0)
        self._at += len(data)
        self._seen = (self._seen + data)[-_SEEN:]
        return data

    def _replaced(self) -> bool:
        """Whether another file has the name now, or none."""
        try:
            return os.stat(self._path).st_ino != self._number
        except (FileNotFoundError, NotADirectoryError):
            return True

    def _follow(self) -> None:
        """Goes on at the beginning of the file that took this one's place. Raises OSError where none has."""
        old, self._number = self._fd, 0  # a new file may be given this one's number
        self._open((0, 0))
        os.close(old)

    def promise_ns(self) -> int:
        return self._asked_ns

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


class _Pipe:
    """What is piped into the program that started this node, whose own standard input belongs to the launcher."""

    def __init__(self, settings: Text.Settings, context: SourceContext) -> None:
        self._clock, self._lines = context.clock, _Splitter(settings.max_bytes)
        path = f"/proc/{os.getppid()}/fd/0"
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError as error:
            raise SensorError(
                f"standard input cannot be read through {path}: {error}. Use `file` or `http`."
            ) from error
        if stat.S_ISCHR(os.fstat(self._fd).st_mode) and os.isatty(self._fd):
            self.close()
            raise SensorError(
                "standard input is a terminal, which only the program in its foreground may read. Pipe something into "
                "the program (`transcribe | sensorium run rig.yaml`), or use `file` or `http`."
            )
        self._asked_ns = self._clock.now_ns()

    def read(self) -> list[Line]:
        if not select.select([self._fd], [], [], _PATIENCE_S)[0]:
            self._asked_ns = max(self._asked_ns, self._clock.now_ns() - round(_PATIENCE_S * 1e9))
            return []
        now, before = self._clock.now_ns(), self._asked_ns
        try:
            data = os.read(self._fd, _CHUNK)
        except BlockingIOError:
            return []
        except OSError as error:
            raise SensorError(f"standard input failed: {error}.") from error
        if len(data) < _CHUNK:
            self._asked_ns = now
        if not data:
            last = self._lines.end()
            if last:
                return [(last[0], now, now - before)]
            raise EOFError
        return [(line, now, now - before) for line in self._lines.feed(data)]

    def promise_ns(self) -> int:
        return self._asked_ns

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)


class _Http:
    """A server on 127.0.0.1: each line of a POST's body is a line. 204: taken. A page in a browser could reach it too,
    so whatever comes from a page (it has an ``Origin``) is refused."""

    def __init__(self, settings: Text.Settings, context: SourceContext) -> None:
        self._clock, self.port = context.clock, settings.http or 0
        self._lock, self._queue = threading.Lock(), queue.SimpleQueue[Line]()
        try:
            self._server = _Server(("127.0.0.1", self.port), _handler(self, settings.max_bytes))
        except OSError as error:
            why = "another program listens there already (`ss -tlnp` shows which)"
            if isinstance(error, PermissionError):
                why = "ports below 1024 are for root alone"
            elif error.errno != errno.EADDRINUSE:
                why = str(error)
            raise SensorError(
                f"port {settings.http} of 127.0.0.1 cannot be listened to: {why}; choose another port."
            ) from error
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def take(self, lines: list[bytes]) -> None:
        with self._lock:  # so that a promise lies before the lines that are not yet in the queue
            now = self._clock.now_ns()
            for line in lines:
                self._queue.put((line, now, 0))

    def read(self) -> list[Line]:
        found = []
        with contextlib.suppress(queue.Empty):
            found.append(self._queue.get(timeout=_PATIENCE_S))
            while True:
                found.append(self._queue.get_nowait())
        return found

    def promise_ns(self) -> int | None:
        with self._lock:
            return self._clock.now_ns() if self._queue.empty() else None

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client that stays connected must not hold up the end

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away before it has its answer is no fault of anybody's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


def _bare(line: bytes) -> bytes:
    """A line without what is no part of its text."""
    return line.removeprefix(_MARK).removesuffix(b"\r")


def _no_utf8(line: bytes) -> str:
    """Which byte of a line is none of a text in UTF-8; "" if there is none."""
    try:
        line.decode("utf-8")
        at = line.find(b"\0")
    except UnicodeDecodeError as error:
        at = error.start
    return f"byte {line[at]:#04x} at {at}" if at >= 0 else ""


def _usage(port: int) -> str:
    return f"each line of a POST's body is a line: curl --data 'some text' http://127.0.0.1:{port}"


def _refused(line: bytes, max_bytes: int) -> tuple[int, str] | None:
    """The status and the reason for which a line is refused; None if it is not."""
    if len(line) > max_bytes:
        return 413, f"has {len(line)} bytes where `max_bytes` of the rig allows {max_bytes}"
    wrong = _no_utf8(line)
    return (400, f"is no UTF-8 ({wrong})") if wrong else None


def _handler(owner: _Http, max_bytes: int) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _POST_TIMEOUT_S

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if self.headers.get("Origin") is not None:
                return self._answer(403, "requests of web pages are refused")
            if not length.isdecimal():
                return self._answer(411, "nothing was taken: a POST must state its Content-Length")
            if int(length) > _LARGEST_POST:
                return self._answer(413, f"nothing was taken: the body has {length} bytes where {_LARGEST_POST} are "
                                    "the most; send it in several POSTs")  # fmt: skip
            body = self.rfile.read(int(length))
            if len(body) < int(length):
                return self._answer(400, f"nothing was taken: {len(body)} bytes came where its Content-Length says "
                                    f"{length}")  # fmt: skip
            if not body.strip():
                return self._answer(400, f"nothing was taken: the body has no text; {_usage(owner.port)}")
            lines = body.split(b"\n")
            owner.take(lines)
            numbered = [(number, _bare(line)) for number, line in enumerate(lines, 1) if line]
            found = [(number, _refused(line, max_bytes)) for number, line in numbered]
            wrong = [(number, *refused) for number, refused in found if refused is not None]
            if not wrong:
                return self._answer(204, "")
            number, status, why = wrong[0]
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            rest = "; the lines that are right were taken" if len(wrong) < len(found) else ""
            return self._answer(status, f"line {number}{more} was left out: it {why}{rest}")

        def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
            """What the library would answer with a page: a method that is none of ours, or no HTTP at all."""
            why = f"this takes a POST and no {self.command}" if code == HTTPStatus.NOT_IMPLEMENTED else (
                message or HTTPStatus(code).phrase
            )  # fmt: skip
            self._answer(code, f"nothing was taken: {why}; {_usage(owner.port)}")

        def _answer(self, status: int, text: str) -> None:
            self.close_connection = True
            body = (text + "\n").encode() if text and self.command != "HEAD" else b""
            self.send_response(status)
            if body:
                self.send_header("Content-Type", "text/plain; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Not a word: what is refused is counted."""

    return Handler
