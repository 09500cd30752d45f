"""A ring of recordings: a folder whose segments together never exceed a limit, the oldest deleted first.

    recordings/edge/segment-000041-20261121T050912Z.mcap
    recordings/edge/segment-000042-20261121T051012Z.mcap

Each segment is a recording of its own, with the rig, and with where its session's streams stood when it began
(``SessionInfo.since``). It is closed before the next one begins, so that a killed recorder leaves one segment without
its end, readable up to its last chunk; so does a full disk, and the segment that begins once there is room again says
what was lost in between. Room for a whole segment is made before it begins; its beginning says what the ring has
deleted by then, so that the count outlives every process. A file that does not say at its beginning that it is this
ring's segment of that number is not the ring's: it is neither counted nor touched, whatever its name.
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
from pipeline.messages import Header, Message
from pipeline.recording.losses import Item, Json, Losses
from pipeline.recording.reader import RecordingReader, ring_part
from pipeline.recording.schemas import encode
from pipeline.recording.writer import (
    Compression,
    Deleted,
    NoRoomError,
    RecordingWriter,
    RingPart,
    SessionInfo,
    Standing,
)

SEGMENTS = 8
"""A segment takes at most this part of the limit, so that what is deleted at once is little of what there is."""
_NAME = re.compile(r"segment-(\d{6,})-\d{8}T\d{6}Z\.mcap", re.ASCII)
_CHUNK_BYTES = 1 << 20
RETRY_NS = 1_000_000_000
"""How often it is looked whether a full disk has room again (session time)."""
ROOM_BYTES = 64 << 20
"""So much room, or a segment's, is waited for: with less the disk would soon be full again."""
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
        f"{(held + free) / 1e6:.0f} MB; while the disk is full, nothing is recorded. Lower `limit_mb`, or make room.",
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
        deleted = self._with(doomed)
        oldest = min((n for n in self._sizes if n not in doomed), default=number)
        began = datetime.fromtimestamp((session.unix_ns + now_ns) / 1e9, tz=UTC)
        info = msgspec.structs.replace(
            session, since=since, ring=RingPart(segment=number, oldest=oldest, deleted=deleted)
        )
        path = self.folder / f"segment-{number:06}-{began:%Y%m%dT%H%M%SZ}.mcap"
        try:
            writer = RecordingWriter(path, info, compression, min(_CHUNK_BYTES, segment_limit(self.limit_bytes) // 8))
        except NoRoomError:
            with suppress(OSError):
                path.unlink()  # what there is of it is no segment
            raise
        self._next += 1
        self.deleted = deleted
        self._unlink(doomed)  # only now: the count of what is gone lies in the file that has just begun
        return writer

    def has_room(self) -> bool:
        """Whether the disk has room to go on with."""
        disk = os.fstatvfs(self._lock)
        enough = disk.f_bavail * disk.f_frsize >= min(ROOM_BYTES, segment_limit(self.limit_bytes))
        return enough and not (disk.f_files and disk.f_favail <= 0)

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

    A full disk does not end it: what comes meanwhile is lost and counted (``losses``). It is looked for room once a
    second of arrival, and where there is some the next segment begins, with records of what was lost before it.

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
        self.losses = Losses()
        self.messages = 0
        """Messages written so far, in all segments, beats and JSON objects not counted."""
        self.warnings: list[str] = []
        """That there is no room, or that there is some again: what happened last."""
        self._segment_ns, self._compression, self._account = segment_ns, compression, account
        self._next: Standing = dict(session.since or {})
        self._safe = dict(self._next)
        """``_next`` when something last reached the operating system."""
        self._pending: list[Item] = []
        """What was written since."""
        self._notes: list[str] = []
        """What the next segment that is closed has to say of what was lost."""
        self._closed_bytes = self._segments = self._chunks = 0
        self._closed_safe_ns: int | None = None
        self._full = False
        """Whether there is no room, and so no segment."""
        self._newest_ns = self._asked_ns = now_ns
        self._begin(session.since, now_ns)

    def _begin(self, since: Standing | None, now_ns: int) -> RecordingWriter:
        segment = self.ring.open(self.session, since, now_ns, self._compression)
        self._segment: RecordingWriter | None = segment
        self.path = segment.path
        """The segment that is being written, or was last."""
        self._segments += 1
        self._began_ns, self._chunks = now_ns, 0
        return segment

    @property
    def bytes_written(self) -> int:
        """Bytes written so far, in all segments."""
        return self._closed_bytes + (0 if self._segment is None else self._segment.bytes_written)

    @property
    def safe_ns(self) -> int | None:
        """The newest arrival in what the operating system has; None before there is any."""
        now = None if self._segment is None else self._segment.safe_ns
        return self._closed_safe_ns if now is None else now

    @property
    def note(self) -> str:
        """What to tell whoever watches: where it writes, what was deleted, what is in the way."""
        deleted, strangers, missing = self.ring.deleted, self.ring.strangers, self.ring.missing
        before = self._segments - 1
        said = [str(self.path)]
        if before:
            said[0] += f", and the {before} segments before it" if before > 1 else ", and the segment before it"
        if self._full:
            said.insert(0, "nothing is recorded until there is room on the disk")
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
        if self._goes_on(arrival_ns):
            data = encode(message, self.session.unix_ns)
            self._put(message.header, len(data), arrival_ns, lambda to: to.write_encoded(message, data, arrival_ns))
        else:
            self._lose(message.header)

    def write_json(self, topic: str, data: bytes, log_ns: int, publish_ns: int | None = None) -> None:
        """Records one JSON object."""
        item = Json(topic, data, log_ns, publish_ns)
        if self._goes_on(log_ns):
            self._put(item, len(data), log_ns, lambda to: to.write_json(*item))
        else:
            self._lose(item)

    def close(self, complete: bool = True, note: str = "") -> None:
        """Ends the last segment and lets go of the ring. ``complete`` and ``note`` are about that segment."""
        try:
            if self._full:
                self._look_for_room(self._newest_ns)
            if self._segment is not None:
                notes = [*self._notes, *([note] if note and note not in self._notes else [])]
                try:
                    self._segment.close(complete and not self._notes, "; ".join(notes))
                except NoRoomError as error:
                    self._suspend(error)
                else:
                    self._left()
        finally:
            self.ring.close()
            self._full = False

    def _put(self, item: Item, size: int, now_ns: int, write: Callable[[RecordingWriter], None]) -> None:
        """Writes what has ``size`` bytes, or loses it where there is no room."""
        try:
            to = self._with_room(size, now_ns)
        except NoRoomError as error:
            self._suspend(error)
            self._lose(item)
            return
        failed = None
        try:
            write(to)
        except NoRoomError as error:
            failed = error
        self._pending.append(item)
        self._stand(item)
        self.messages += _is_message(item)
        if failed is not None:
            self._suspend(failed)
        elif to.chunks != self._chunks:
            self._reached(to)

    def _stand(self, item: Item) -> None:
        """Takes note of how far a stream has come, be it recorded or lost."""
        if isinstance(item, Header):
            stands = (item.epoch, item.seq + (not item.is_beat))
            self._next[item.stream] = max(self._next.get(item.stream) or stands, stands)

    def _reached(self, segment: RecordingWriter) -> None:
        """All until now has reached the operating system."""
        self._chunks, self._safe = segment.chunks, dict(self._next)
        self._pending.clear()

    def _with_room(self, size: int, now_ns: int) -> RecordingWriter:
        """The segment for something of this size."""
        assert self._segment is not None
        limit = segment_limit(self.ring.limit_bytes)
        if size > message_limit(self.ring.limit_bytes):
            raise ValueError(f"it has {size} bytes, more than a ring of {self.ring.limit_bytes} bytes takes at once")
        if now_ns - self._began_ns >= self._segment_ns or self._segment.size_with(size) > limit:
            return self._cut(self._segment, now_ns)
        return self._segment

    def _cut(self, segment: RecordingWriter, now_ns: int) -> RecordingWriter:
        """Ends a segment and begins the next."""
        self._notes += [note for note in self._account() if note not in self._notes]
        segment.close(complete=not self._notes, note="; ".join(self._notes))
        self._notes.clear()
        self._reached(segment)
        self._left()
        return self._begin(dict(self._next), now_ns)

    def _left(self) -> None:
        """The segment is not written to any more."""
        assert self._segment is not None
        self._closed_safe_ns = self.safe_ns
        self._closed_bytes += self._segment.bytes_written
        self.ring.closed(self._segment)
        self._segment = None

    # -- a full disk -------------------------------------------------------------------------------------------------

    def _lose(self, item: Item) -> None:
        self._stand(item)
        self.losses.take(item)

    def _suspend(self, error: NoRoomError) -> None:
        """There is no room any more: what has not reached the operating system is lost. Raises an error of another
        kind: of one that would come again in the next segment."""
        if not error.full:
            raise error
        if self._segment is not None and self._segment.chunks != self._chunks:
            self._reached(self._segment)
        since_ns = self._began_ns if self.safe_ns is None else self.safe_ns
        if self._segment is not None:
            self._left()
        self._full = True
        self.losses.begin(since_ns)
        for item in self._pending:
            self.messages -= _is_message(item)
            self._lose(item)
        self._pending.clear()
        self._asked_ns = self._newest_ns
        self._warn(
            f"no room is left on the disk of {self.ring.folder}, and nothing is recorded from "
            f"{since_ns / 1e9:.1f} s of the session on until there is some again."
        )

    def _goes_on(self, now_ns: int) -> bool:
        """Whether there is a segment to write to."""
        self._newest_ns = max(self._newest_ns, now_ns)
        if self._full and self._newest_ns - self._asked_ns >= RETRY_NS:
            self._look_for_room(self._newest_ns)
        return not self._full

    def _look_for_room(self, now_ns: int) -> None:
        """Begins the next segment if there is room, with what was lost before it."""
        self._asked_ns = now_ns
        if not self.ring.has_room():
            return
        try:
            self._begin(dict(self._safe), now_ns)
        except NoRoomError as error:
            if not error.full:
                raise
            return
        self._full = False
        text, stated = self.losses.end(now_ns)
        self._notes.append(text)
        self._warn(f"{text}; since then it is, in {self.path}.")
        for item in stated:
            self.write_json(*item)

    def _warn(self, text: str) -> None:
        self.warnings = [*self.warnings[-1:], text]


def _is_message(item: Item) -> bool:
    return isinstance(item, Header) and not item.is_beat


def deleted_text(deleted: Deleted) -> str:
    """What a ring has deleted, in words."""
    messages = ", ".join(f"{stream} {count}" for stream, count in sorted(deleted.messages.items()))
    plural = "s" if deleted.segments != 1 else ""
    text = f"{deleted.segments} segment{plural}, {deleted.bytes / 1e6:.1f} MB"
    return f"{text}, messages: {messages}" if messages else text


__all__ = ["Ring", "RingWriter", "deleted_text", "message_limit", "ring_notes", "segment_limit"]
