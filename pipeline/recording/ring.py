"""A ring of recordings: a folder whose segments together never exceed a limit, the oldest deleted first.

    recordings/edge/segment-000041-20261121T050912Z.mcap
    recordings/edge/segment-000042-20261121T051012Z.mcap

Each segment is a recording of its own, with the rig, and with where its session's streams stood when it began
(``SessionInfo.since``). It is closed before the next one begins, so that a killed recorder leaves one segment without
its end, readable up to its last chunk. Room for a whole segment is made before it begins; its beginning says what the
ring has deleted by then, so that the count outlives every process. A file that does not say at its beginning that it
is this ring's segment of that number is not the ring's: it is neither counted nor touched, whatever its name.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from pipeline.errors import RecordingError
from pipeline.messages import Message
from pipeline.recording.reader import RecordingReader, ring_part
from pipeline.recording.schemas import encode
from pipeline.recording.writer import Compression, Deleted, RecordingWriter, RingPart, SessionInfo, Standing

SEGMENTS = 8
"""A segment takes at most this part of the limit, so that what is deleted at once is little of what there is."""
_NAME = re.compile(r"segment-(\d{6,})-\d{8}T\d{6}Z\.mcap", re.ASCII)
_CHUNK_BYTES = 1 << 20
_NAMED = 8
"""Missing segments that are named, at most."""


def segment_limit(limit_bytes: int) -> int:
    """Bytes of the largest segment of a ring."""
    return limit_bytes // SEGMENTS


def message_limit(limit_bytes: int) -> int:
    """Bytes of the largest message that a ring takes."""
    return segment_limit(limit_bytes) // 2


def ring_notes(folder: Path, limit_bytes: int) -> list[str]:
    """What is doubtful about a ring in ``folder``, in sentences: whether another recorder is at work there, and whether
    the disk has room for it."""
    busy = _busy(folder)
    there = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), None)
    if there is None:
        return busy
    free = shutil.disk_usage(there).free
    held = 0
    for path in folder.glob("segment-*.mcap"):
        with suppress(FileNotFoundError):  # its recorder has deleted it since, or it is a link that leads nowhere
            held += path.stat().st_size
    if held + free >= limit_bytes:
        return busy
    return [
        *busy,
        f"the ring {folder} may grow to {limit_bytes / 1e6:.0f} MB, but its disk has room for "
        f"{(held + free) / 1e6:.0f} MB; when the disk is full, recording ends. Lower `limit_mb`, or make room.",
    ]


def _busy(folder: Path) -> list[str]:
    """Whether the ring in ``folder`` has a recorder already."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it is not there yet, or no place for a ring, which is said elsewhere
        return []
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return [f"{folder} is written to by another recorder now, and a ring has one at a time; end that first."]
    finally:
        os.close(lock)
    return []


class Ring:
    """The folder of a ring, locked as long as its recorder lives."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        """Makes the folder if need be and finds the segments that are there. RecordingError if that cannot be, or if
        another recorder writes into it."""
        self.folder, self.limit_bytes = folder, limit_bytes
        self.deleted = Deleted()
        self.strangers: list[str] = []
        """Files with a segment's name that are none of this ring's."""
        self.missing: list[int] = []
        """Segments that should be there and are not: somebody else has deleted or moved them."""
        self._sizes: dict[int, tuple[Path, int]] = {}
        self._next = 1
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise RecordingError(f"{folder} cannot hold a ring of recordings: {error.strerror}.") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise RecordingError(
                f"{folder} is written to by another recorder, and a ring has one at a time. Stop the other session, or "
                "give this one another `path`."
            ) from None
        self._scan()

    @property
    def bytes(self) -> int:
        """Bytes of the segments that are closed."""
        return sum(size for _, size in self._sizes.values())

    def _scan(self) -> None:
        parts: dict[int, RingPart] = {}
        others: set[int] = set()
        for path in sorted(self.folder.iterdir()):
            if (match := _NAME.fullmatch(path.name)) is None:
                continue
            number, part = int(match[1]), ring_part(path)
            self._next = max(self._next, number + 1)
            if part is None or part.segment != number or not path.is_file() or path.is_symlink():
                self.strangers.append(path.name)
                others.add(number)
                continue
            parts[number], self._sizes[number] = part, (path, path.stat().st_size)
        if parts:
            newest = parts[max(parts)]
            self.deleted = newest.deleted
            self.missing = [n for n in range(newest.oldest, newest.segment) if n not in parts and n not in others]
            self._unlink(number for number in parts if number < newest.oldest)  # counted already, then it was killed

    def open(
        self, session: SessionInfo, since: Standing | None, now_ns: int, compression: Compression
    ) -> RecordingWriter:
        """Begins the next segment, for which room is made. Raises RecordingError."""
        number, room = self._next, self.limit_bytes - segment_limit(self.limit_bytes)
        self._look()
        doomed, kept = [], self.bytes
        for old in sorted(self._sizes):
            if kept > room:
                doomed.append(old)
                kept -= self._sizes[old][1]
        self.deleted = self._with(doomed)
        oldest = min((n for n in self._sizes if n not in doomed), default=number)
        began = datetime.fromtimestamp((session.unix_ns + now_ns) / 1e9, tz=UTC)
        info = msgspec.structs.replace(
            session, since=since, ring=RingPart(segment=number, oldest=oldest, deleted=self.deleted)
        )
        path = self.folder / f"segment-{number:06}-{began:%Y%m%dT%H%M%SZ}.mcap"
        writer = RecordingWriter(path, info, compression, min(_CHUNK_BYTES, segment_limit(self.limit_bytes) // 8))
        self._next += 1
        self._unlink(doomed)  # only now: the count of what is gone lies in the file that has just begun
        return writer

    def _look(self) -> None:
        """Takes note of segments that somebody else has deleted: they are not the ring's to count."""
        gone = [number for number, (path, _) in self._sizes.items() if not path.exists()]
        for number in gone:
            del self._sizes[number]
        self.missing += gone

    def closed(self, writer: RecordingWriter) -> None:
        """Takes a segment that was written to its end among those that may be deleted."""
        number = writer.session.ring.segment if writer.session.ring is not None else 0
        self._sizes[number] = (writer.path, writer.path.stat().st_size)

    def close(self) -> None:
        """Lets go of the folder. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _with(self, doomed: list[int]) -> Deleted:
        """``deleted`` and these segments."""
        messages = Counter(self.deleted.messages)
        size = self.deleted.bytes
        for number in doomed:
            path, length = self._sizes[number]
            size += length
            try:
                with RecordingReader(path) as reader:
                    messages.update(reader.counts())
            except RecordingError:
                continue  # a damaged segment: its bytes are counted, what was in it nobody can tell
        return Deleted(self.deleted.segments + len(doomed), size, dict(messages))

    def _unlink(self, numbers: Iterable[int]) -> None:
        for number in list(numbers):
            path, _ = self._sizes.pop(number)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RecordingError(f"{path} cannot be deleted to make room in its ring: {error.strerror}.") from None


class RingWriter:
    """Writes a session into a ring, as ``RecordingWriter`` writes it into a file. Not thread-safe.

    ``account`` gives, each time that a segment ends, what has been lost since the last time, in words.
    ``known`` says where the streams stand at the beginning, as ``SessionInfo.since``.
    """

    def __init__(
        self,
        ring: Ring,
        session: SessionInfo,
        now_ns: int,
        *,
        segment_ns: int,
        compression: Compression = "zstd",
        account: Callable[[], list[str]] = list,
    ) -> None:
        self.ring, self.session = ring, session
        self._segment_ns, self._compression, self._account = segment_ns, compression, account
        self._next: Standing = dict(session.since or {})
        self._closed_messages = self._closed_bytes = self._segments = 0
        self._closed_safe_ns: int | None = None
        self._begin(session.since, now_ns)

    def _begin(self, since: Standing | None, now_ns: int) -> None:
        self._segment = self.ring.open(self.session, since, now_ns, self._compression)
        self._segments += 1
        self._began_ns = now_ns

    @property
    def path(self) -> Path:
        """The segment that is being written."""
        return self._segment.path

    @property
    def messages(self) -> int:
        """Messages written so far, in all segments, beats and JSON objects not counted."""
        return self._closed_messages + self._segment.messages

    @property
    def bytes_written(self) -> int:
        """Bytes written so far, in all segments."""
        return self._closed_bytes + self._segment.bytes_written

    @property
    def safe_ns(self) -> int | None:
        """The newest arrival in what the operating system has; None before there is any."""
        return self._closed_safe_ns if self._segment.safe_ns is None else self._segment.safe_ns

    @property
    def note(self) -> str:
        """What to tell whoever watches: where it writes, what was deleted, what is in the way."""
        deleted, strangers, missing = self.ring.deleted, self.ring.strangers, self.ring.missing
        before = self._segments - 1
        said = [str(self.path)]
        if before:
            said[0] += f", and the {before} segments before it" if before > 1 else ", and the segment before it"
        if deleted.segments:
            said.append(f"the ring has deleted {deleted_text(deleted)}")
        if missing:
            numbers = ", ".join(map(str, missing[:_NAMED])) + (" …" if len(missing) > _NAMED else "")
            said.append(
                f"segment{'s' if len(missing) > 1 else ''} {numbers} {'are' if len(missing) > 1 else 'is'} not there, "
                "deleted or moved by somebody else, and not counted as deleted"
            )
        if strangers:
            said.append(f"left alone and not counted, being none of its segments: {', '.join(strangers)}")
        return "; ".join(said)

    def write(self, message: Message, arrival_ns: int) -> None:
        """Records one message or beat. Raises as ``RecordingWriter.write``; ValueError for what is too large."""
        header = message.header
        data = encode(message, self.session.unix_ns)
        self._make_room(len(data), arrival_ns)
        self._segment.write_encoded(message, data, arrival_ns)
        stands = (header.epoch, header.seq + (not header.is_beat))
        self._next[header.stream] = max(self._next.get(header.stream) or stands, stands)

    def write_json(self, topic: str, data: bytes, log_ns: int, publish_ns: int | None = None) -> None:
        """Records one JSON object."""
        self._make_room(len(data), log_ns)
        self._segment.write_json(topic, data, log_ns, publish_ns)

    def close(self, complete: bool = True, note: str = "") -> None:
        """Ends the last segment and lets go of the ring. ``complete`` and ``note`` are about that segment."""
        try:
            self._segment.close(complete, note)
        finally:
            self.ring.close()

    def _make_room(self, size: int, now_ns: int) -> None:
        limit = segment_limit(self.ring.limit_bytes)
        if size > message_limit(self.ring.limit_bytes):
            raise ValueError(f"it has {size} bytes, more than a ring of {self.ring.limit_bytes} bytes takes at once")
        if now_ns - self._began_ns >= self._segment_ns or self._segment.size_with(size) > limit:
            self._cut(now_ns)

    def _cut(self, now_ns: int) -> None:
        """Ends a segment and begins the next."""
        notes = self._account()
        self._segment.close(complete=not notes, note="; ".join(notes))
        self._closed_safe_ns = self.safe_ns
        self._closed_messages += self._segment.messages
        self._closed_bytes += self._segment.bytes_written
        self.ring.closed(self._segment)
        self._begin(dict(self._next), now_ns)


def deleted_text(deleted: Deleted) -> str:
    """What a ring has deleted, in words."""
    messages = ", ".join(f"{stream} {count}" for stream, count in sorted(deleted.messages.items()))
    plural = "s" if deleted.segments != 1 else ""
    text = f"{deleted.segments} segment{plural}, {deleted.bytes / 1e6:.1f} MB"
    return f"{text}, messages: {messages}" if messages else text


__all__ = ["Ring", "RingWriter", "deleted_text", "message_limit", "ring_notes", "segment_limit"]
