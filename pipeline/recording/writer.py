"""Writing a recording: MCAP in bounded chunks, each on its way to the disk as soon as it is full or old.

The session's metadata is in the file before the first message, and every write that reaches the file is a whole MCAP
record. So a file whose writer was killed opens with everything up to its last chunk, and a file that met a full disk
is cut back to the last whole record. Only a clean ``close()`` says ``complete``. Until it is closed the file is locked,
so that readers can tell it from one whose writer was killed; they need no lock themselves.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import zlib
from collections import Counter
from collections.abc import Iterator
from numbers import Integral
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn

import msgspec
import numpy as np
from mcap.writer import CompressionType, IndexType, Writer

from pipeline.errors import ConfigError, RecordingError, WireError, taken
from pipeline.messages import Message, payload_of, wrong_data
from pipeline.recording.schemas import ANY_OBJECT, BEAT_TOPIC, LABEL_TOPIC, TOPIC_SCHEMAS, Schema, encode, schema_of

Compression = Literal["zstd", "lz4", "none"]
_COMPRESSION = {"zstd": CompressionType.ZSTD, "lz4": CompressionType.LZ4, "none": CompressionType.NONE}

SESSION, END = "sensorium", "sensorium.end"
"""Names of the metadata records: written first, and at a clean close."""
SUM = "sum"
"""Under what such a record has a sum over the rest of it: MCAP gives it none of its own."""
RIG, CALIBRATION = "rig.yaml", "calibration/"
"""Names of the attachments."""

_MESSAGE_BYTES = 64
"""What a message takes in a chunk and in its index beside its data."""
_CHUNK_INDEX_BYTES = 1024
_END_BYTES = 128 << 10
"""What the end of a file takes beside the index of its chunks: schemas, channels, sums."""


Standing = dict[str, tuple[int, int] | None]
"""By stream the epoch and the number of its next message; None where nobody knows."""


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


class NoRoomError(RecordingError):
    """A disk that takes nothing more, and ``why``; ``full``: it may again once somebody has made room."""

    def __init__(self, path: Path | str, size: int | None, why: str, full: bool) -> None:
        """``size``: the bytes that there are; None if not even the file can be made."""
        kept = f"the {size} bytes until now stay readable" if size else "nothing of it is kept"
        written = f"written any further: {why}. The recording ends here; {kept}. Make room and start again"
        super().__init__(f"{path} cannot be " + (f"created: {why}" if size is None else written))
        self.why, self.full = why, full


class BusyError(RecordingError):
    """A file that another writer writes at this moment."""

    def __init__(self, path: Path, process: int) -> None:
        first = "close that writer first" if process == os.getpid() else "wait until that has ended"
        super().__init__(f"{path} is being written at this moment, by process {process}; {first}, or name another file")
        self.path, self.process = path, process

    def __reduce__(self) -> tuple[type[BusyError], tuple[Path, int]]:
        return BusyError, (self.path, self.process)  # else no other process could be told


class Deleted(msgspec.Struct, frozen=True):
    """What a ring has deleted so far, in all its sessions; ``messages`` by stream."""

    segments: int = 0
    bytes: int = 0
    messages: dict[str, int] = {}


class RingPart(msgspec.Struct, frozen=True, kw_only=True):
    """Where a file stands in its ring: it is segment ``segment``, and when it began all below ``oldest`` were gone."""

    segment: int
    oldest: int
    deleted: Deleted


class SessionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording says of its session. ``complete`` and ``note`` are set by reading; writing ignores them."""

    session: str
    unix_ns: int = 0
    """Unix time of the session clock's 0; 0 where nobody knows it."""
    rig: str | None = None
    """The rig's YAML. It is shown, never instantiated."""
    bundle: str | None = None
    """SHA-256 of the bundle that ran."""
    arrival: Literal["received", "capture_end"] = "received"
    """What arrival times are: when the recorder received a message, or (an import) the end of its capture."""
    calibrations: dict[str, str] = msgspec.field(default_factory=dict)
    """Name -> text."""
    extra: dict[str, str] = msgspec.field(default_factory=dict)
    """Anything else worth knowing: the imported file, its device, what was dropped."""
    since: Standing | None = None
    """None: the file has its session's beginning. Else where each stream stood when the file began: its epoch and the
    number of the next message; None of a stream: nobody knows. Streams that are not named had not begun."""
    ring: RingPart | None = None
    """If the file is a segment of a ring."""
    complete: bool = False
    note: str = ""
    """Why a recording that was closed in order is incomplete."""

    def standing(self, stream: str) -> tuple[int, int] | None:
        """The (epoch, number) of ``stream`` at the file's beginning: what lies below is in no file or in one before;
        None: nobody knows."""
        return (-1, 0) if self.since is None else self.since.get(stream, (-1, 0))


class Label(msgspec.Struct, frozen=True, gc=False):
    """What was true from ``start_ns`` (included) to ``end_ns`` (excluded) of session time."""

    start_ns: int
    end_ns: int
    label: str


class LostMessages(msgspec.Struct, frozen=True):
    """Messages of one stream that are not in the recording, both ends included: a gap record of messages."""

    stream: str
    epoch: int
    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    cause: str = ""


class RecordingWriter:
    """Writes one recording. Not thread-safe. Memory is bounded by a chunk: ``chunk_bytes`` or ``chunk_ns`` of arrival.

    ``write`` and the others raise RecordingError when the file cannot be written (a full disk): what was written until
    then stays readable, and the writer is closed. So they do when somebody deletes or empties the file meanwhile.
    WireError if a payload is not what its header says.
    """

    def __init__(
        self,
        path: str | Path,
        session: SessionInfo,
        compression: Compression = "zstd",
        chunk_bytes: int = 1 << 20,
        chunk_ns: int = 1_000_000_000,
        overwrite: bool = False,
    ) -> None:
        self.path = Path(path)
        self.session = session
        self.messages = 0
        """Messages written so far, beats and JSON objects not counted."""
        self._chunk_bytes, self._chunk_ns = chunk_bytes, chunk_ns
        self._pending_bytes = self._pending_messages = self._chunks = self._safe_bytes = 0
        self._pending_since: int | None = None
        self._newest_ns = 0
        self.safe_ns: int | None = None
        """The newest arrival in what the operating system has; None before there is any."""
        self._counts: Counter[str] = Counter()
        self._channels: dict[tuple[str, str], int] = {}
        self._schemas: dict[tuple[str, bytes], int] = {}
        self._stream_channels: dict[tuple[str, Any], int] = {}
        self._output = _Output(self.path, overwrite)
        self._writer: Any = Writer(
            self._output,  # type: ignore[arg-type]
            chunk_size=1 << 62,  # this class decides when a chunk is full: the library knows no time limit
            compression=_COMPRESSION[compression],
            index_types=IndexType.ALL,
            enable_data_crcs=True,  # of what lies between chunks, too: see ``pipeline.recording.damage``
        )
        try:
            self._writer.start(profile="", library="sensorium")
            self._write_session(session)
            self._safe_bytes = self._output.size
        except BaseException:
            self._output.close()  # else it is locked as long as this process lives
            raise

    @property
    def bytes_written(self) -> int:
        """Bytes in the file so far."""
        return self._output.size

    @property
    def chunks(self) -> int:
        """How many chunks the operating system has; the last may lack its index, for which there was no room."""
        return self._chunks + (self._output.size > self._safe_bytes)

    def size_with(self, size: int) -> int:
        """No less than what the file has in the end if a message of ``size`` bytes is the last that is written."""
        pending = self._pending_bytes + size + (self._pending_messages + 1) * _MESSAGE_BYTES
        return self._output.size + pending + pending // 128 + (self._chunks + 1) * _CHUNK_INDEX_BYTES + _END_BYTES

    @property
    def note(self) -> str:
        """What to tell whoever watches."""
        return str(self.path)

    def _write_session(self, session: SessionInfo) -> None:
        facts = {"session": session.session, "unix_ns": str(session.unix_ns), "arrival": session.arrival}
        if session.bundle is not None:
            facts["bundle"] = session.bundle
        if session.since is not None:
            facts["since"] = msgspec.json.encode(session.since).decode()
        if session.ring is not None:
            facts["ring"] = msgspec.json.encode(session.ring).decode()
        self._add_facts(SESSION, facts | {f"extra.{k}": v for k, v in session.extra.items()})
        if session.rig is not None:
            self.attach(RIG, session.rig.encode(), "application/yaml")
        for name, text in session.calibrations.items():
            self.attach(CALIBRATION + name, text.encode(), "text/plain")

    def _add_facts(self, name: str, facts: dict[str, str]) -> None:
        self._writer.add_metadata(name, facts | {SUM: facts_sum(facts)})

    def write(self, message: Message, arrival_ns: int) -> None:
        """Records one message or beat that arrived at ``arrival_ns`` of session time."""
        header, data = message.header, message.data
        if header.layout is not None and isinstance(data, np.ndarray) and (wrong := wrong_data(header.layout, data)):
            raise WireError(f"message {header.stream}/{header.seq} has {wrong}")
        _check_time("arrival_ns", arrival_ns)
        self.write_encoded(message, encode(message, self.session.unix_ns), arrival_ns)

    def write_encoded(self, message: Message, data: bytes, arrival_ns: int) -> None:
        """The same of a message that was encoded already."""
        header = message.header
        self._add(self._channel_of(message), data, arrival_ns, header.t_capture_ns, header.seq)
        if not header.is_beat:
            self.messages += 1
            self._counts[header.stream] += 1

    def write_json(self, topic: str, data: bytes, log_ns: int, publish_ns: int | None = None) -> None:
        """Records one JSON object on a topic that starts with "/" (``/manifest``, ``/prediction``, ...); times are
        session time, ``publish_ns`` is ``log_ns`` by default."""
        channel = self._channel(topic, TOPIC_SCHEMAS.get(topic, ANY_OBJECT), {})
        self._add(channel, data, log_ns, log_ns if publish_ns is None else publish_ns, 0)

    def copy(
        self, topic: str, schema: Schema, metadata: dict[str, str], data: bytes | memoryview,
        log_ns: int, publish_ns: int, sequence: int,
    ) -> None:  # fmt: skip
        """Records what lies in another recording, as it lies there; times are session time."""
        self._add(self._channel(topic, schema, metadata), bytes(data), log_ns, publish_ns, sequence)
        if "payload" in metadata:
            self.messages += 1
            self._counts[topic] += 1

    def write_label(self, label: Label, log_ns: int) -> None:
        """Records what was true for a while."""
        for name, time in (("start_ns", label.start_ns), ("end_ns", label.end_ns), ("log_ns", log_ns)):
            _check_time(name, time)
        self.write_json(LABEL_TOPIC, msgspec.json.encode(label), log_ns, label.start_ns)

    def attach(self, name: str, data: bytes, media_type: str = "application/octet-stream") -> None:
        """Embeds a small file."""
        self._check_open()
        self._writer.flush()
        self._writer.add_attachment(0, max(self.session.unix_ns, 0), name, media_type, data)

    def flush(self) -> None:
        """Ends the chunk in progress and hands it to the operating system, which keeps it if this process dies."""
        self._check_open()
        if self._pending_bytes:
            self._writer.flush()
            self._pending_bytes, self._pending_messages, self._pending_since = 0, 0, None
            self._chunks += 1
            self._safe_bytes = self._output.size
            self.safe_ns = self._newest_ns

    def close(self, complete: bool = True, note: str = "") -> None:
        """Ends the file, with its index. ``complete=False`` says that something is missing and ``note`` what.

        Idempotent; after a RecordingError it only lets go of the file.
        """
        if self._output.closed:
            return
        try:
            self.flush()
            counts = msgspec.json.encode(self._counts).decode()
            facts = {"complete": "true" if complete else "false", "note": note, "messages": counts}
            self._add_facts(END, facts)
            self._writer.finish()
            self._output.sync()
            self._output.check_place()
        finally:
            self._output.close()

    def __enter__(self) -> RecordingWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(complete=error is None, note="" if error is None else f"{type(error).__name__}: {error}")

    def _add(self, channel: int, data: bytes, log_ns: int, publish_ns: int, sequence: int) -> None:
        self._check_open()
        unix_ns = self.session.unix_ns
        if log_ns + unix_ns < 0:
            raise ValueError(f"an arrival time of {log_ns} ns lies before 1970 (the session began at {unix_ns} ns)")
        self._writer.add_message(channel, log_ns + unix_ns, data, max(publish_ns + unix_ns, 0), sequence & 0xFFFFFFFF)
        self._pending_bytes += len(data)
        self._pending_messages += 1
        self._newest_ns = log_ns
        if self._pending_since is None:
            self._pending_since = log_ns
        if self._pending_bytes >= self._chunk_bytes or log_ns - self._pending_since >= self._chunk_ns:
            self.flush()

    def _check_open(self) -> None:
        if self._output.closed:
            raise RecordingError(f"{self.path} is closed: nothing more can be recorded into it")

    def _channel_of(self, message: Message) -> int:
        header = message.header
        if header.layout is None:
            return self._channel(BEAT_TOPIC, TOPIC_SCHEMAS[BEAT_TOPIC], {})
        key = (header.stream, _kind(header.layout))
        channel = self._stream_channels.get(key)
        if channel is None:
            if header.stream.startswith("/"):
                raise ConfigError(f"stream {header.stream!r} cannot be recorded: names with a leading '/' are ours")
            metadata: dict[str, str] = {"payload": payload_of(header.layout)}
            channel = self._channel(header.stream, schema_of(header.layout), metadata)
            self._stream_channels[key] = channel
        return channel

    def _channel(self, topic: str, schema: Schema, metadata: dict[str, str]) -> int:
        channel = self._channels.get((topic, schema.name))
        if channel is None:
            identity = (schema.name, schema.data)
            if identity not in self._schemas:
                self._schemas[identity] = self._writer.register_schema(schema.name, schema.schema_encoding, schema.data)
            channel = self._writer.register_channel(topic, schema.message_encoding, self._schemas[identity], metadata)
            self._channels[topic, schema.name] = channel
        return channel


def facts_sum(facts: dict[str, str]) -> str:
    """The sum over what a recording says of itself, the sum aside."""
    stated = sorted((name, text) for name, text in facts.items() if name != SUM)
    return f"{zlib.crc32(msgspec.json.encode(stated)):08x}"


def _kind(layout: Any) -> Any:
    """What a channel's schema depends on."""
    return type(layout), getattr(layout, "format", None) == "jpeg", isinstance(getattr(layout, "channels", None), tuple)


def _check_time(name: str, value: object) -> None:
    if not isinstance(value, Integral):
        raise TypeError(f"`{name}` is {value!r}, where times are whole numbers of nanoseconds")


class _Output:
    """The file, unbuffered, as the MCAP library wants it. A write that fails leaves only whole records behind."""

    def __init__(self, path: Path, overwrite: bool) -> None:
        self._path = path
        self.size = 0
        self.closed = False
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | (0 if overwrite else os.O_EXCL)
        try:
            if not path.parent.is_dir():
                path.parent.mkdir(parents=True)
            self._fd = os.open(path, flags, 0o644)
        except OSError as error:
            if os.path.lexists(path):
                raise taken(path) from None
            in_the_way = next((parent for parent in path.parents if parent.exists()), path)
            if error.errno in _NO_ROOM:
                raise NoRoomError(path, None, str(error.strerror), True) from None
            why = str(error.strerror) if in_the_way.is_dir() else f"{in_the_way} is no folder"
            raise RecordingError(f"{path} cannot be created: {why}") from None
        try:
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self._lock()
            if self._regular:
                os.ftruncate(self._fd, 0)  # only now: it is nobody else's
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        """Marks the file as being written, where there are locks. Raises BusyError if it is by another."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if process := _holder(self._fd):  # else it is a reader, who looks whether it is being written
                raise BusyError(self._path, process) from None
        except OSError:
            pass

    def write(self, data: bytes) -> int:
        left = memoryview(data)
        self._check_whole()
        try:
            while left:
                left = left[os.write(self._fd, left) :]
        except OSError as error:
            # A device file (and a disk that is truly gone) cannot be cut; the reader copes with half a record.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            self.close()
            full = error.errno in _NO_ROOM
            raise NoRoomError(self._path, self.size, str(error.strerror), full) from None
        self.size += len(data)
        return len(data)

    def _check_whole(self) -> None:
        """Raises RecordingError where what was written is gone: one who writes on does not notice by himself."""
        if not self._regular:
            return
        now = os.fstat(self._fd)
        if now.st_nlink == 0:
            self._gone("was deleted while it was written, and with it all that was recorded")
        if now.st_size < self.size:
            self._gone(f"was cut to {now.st_size} of {self.size} bytes while it was written: what was recorded is lost")

    def check_place(self) -> None:
        """Raises RecordingError where the file is no longer what its path names."""
        self._check_whole()
        with contextlib.suppress(OSError):
            if not self._regular or os.path.samestat(os.stat(self._path), os.fstat(self._fd)):
                return
        self._gone("is no longer the file that was written: it was moved, replaced or deleted meanwhile")

    def _gone(self, how: str) -> NoReturn:
        self.close()
        raise RecordingError(
            f"{self._path} {how}. Leave a recording where it is until its session has ended, and record again"
        )

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing is held back."""

    def sync(self) -> None:
        # Pipes and devices know no sync, and there it does not matter.
        with contextlib.suppress(OSError):
            os.fsync(self._fd)

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            with contextlib.suppress(OSError):
                fcntl.flock(self._fd, fcntl.LOCK_UN)  # a process that was forked meanwhile would keep it
            os.close(self._fd)


def written_now(fd: int) -> str:
    """That the open recording ``fd`` is being written at this moment, and by whom if that is known; else nothing."""
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        process = _holder(fd)
        if process is not None and not _lives(process):  # what it has forked has the lock still, which says nothing
            return ""
        return "it is being written at this moment" + (f", by process {process}" if process else "")
    except OSError:  # where there are no locks nobody knows
        return ""
    fcntl.flock(fd, fcntl.LOCK_UN)
    return ""


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is somebody else's
        pass
    return True


def _holder(fd: int) -> int | None:
    """The process that has taken the lock of an open file, where the system tells."""
    file = os.fstat(fd)
    place = f"{os.major(file.st_dev):02x}:{os.minor(file.st_dev):02x}:{file.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            match line.split():
                case [_, "FLOCK", _, "WRITE", process, where, *_] if where == place and int(process) > 0:
                    return int(process)
    return None


@contextlib.contextmanager
def whole_file(out: Path, overwrite: bool = True) -> Iterator[Path]:
    """Where a recording is written that is to appear as ``out`` only when it is whole, which it is when the block is
    left. After an exception nothing of it stays. RecordingError, naming ``out``, where the disk is full, or where
    another process is making it; ConfigError where ``out`` has come to be meanwhile, if that is not to be
    overwritten."""
    part = out.with_name(out.name + ".tmp")
    mine = True
    try:
        yield part
        if overwrite or not _linked(part, out):
            os.replace(part, out)
    except NoRoomError as error:
        raise RecordingError(
            f"{out} cannot be written: {error.why}. Nothing of it is kept; make room, or use another disk"
        ) from None
    except BusyError as error:
        mine = False
        raise BusyError(out, error.process) from None
    finally:
        if mine:
            with contextlib.suppress(OSError):
                part.unlink()


def _linked(part: Path, out: Path) -> bool:
    """Gives a file a second name, which must be free. False where files have only one."""
    try:
        os.link(part, out)
    except OSError:
        refuse_existing(out)
        return False
    return True


def refuse_existing(out: Path) -> None:
    """Raises ConfigError if there is anything of this name, be it a link that leads nowhere."""
    if os.path.lexists(out):
        raise taken(out)


def free_path(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, … that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate
