"""Reading a recording, whole or cut off anywhere.

Opening scans the file's records without decoding their chunks; a file without its end (a killed writer, a full disk)
is scanned chunk by chunk, each checked against its CRC, and ends with the last whole one. Reading decodes one chunk
after another, in log order with ties broken by record index, so memory holds the chunks that overlap in time and no
more. What cannot be read is one RecordingError.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

import msgspec
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.records import Attachment, Channel, ChunkIndex, Metadata, Schema

from pipeline.errors import RecordingError, typed
from pipeline.messages import Header, Message, Payload
from pipeline.recording.damage import (
    DAMAGE,
    attachment_holds,
    chunk_data,
    facts_hold,
    has_sum,
    lacking_end,
    next_piece,
    packed,
    whole_index,
)
from pipeline.recording.schemas import BEAT_TOPIC, LABEL_TOPIC, decode, decode_envelope
from pipeline.recording.writer import (
    CALIBRATION,
    END,
    RIG,
    SESSION,
    Label,
    RingPart,
    SessionInfo,
    Standing,
    written_now,
)

MAGIC = b"\x89MCAP0\r\n"
_HEAD = struct.Struct("<BQ")
_CHUNK_TIMES = struct.Struct("<QQ")
MESSAGE_HEAD = struct.Struct("<HIQQ")
_KEPT = {Opcode.SCHEMA, Opcode.CHANNEL, Opcode.METADATA, Opcode.ATTACHMENT, Opcode.CHUNK_INDEX}

_BEGINNING = 1 << 16
_END_BYTES = 4
"""So many bytes of the end, and no fewer, are behind a cut by no chance."""
_HEAD_RECORDS = 4
"""Within so many records of its beginning a recording says whose it is."""

Stated = TypeVar("Stated")

# log time, chunk, index in the chunk, channel, publish time, bytes
Record = tuple[int, int, int, int, int, memoryview]


class ForeignLayoutError(RecordingError):
    """A recording that another tool has written anew in a way that is not read here. It is not damaged."""


class ChunkPlace(msgspec.Struct, frozen=True, gc=False):
    """Where a chunk lies in the file and which log times it spans."""

    offset: int
    length: int
    start: int
    end: int


class RecordingReader:
    """An open recording. Iterators of one reader may be interleaved. Close it, or use it in a ``with``."""

    info: SessionInfo
    streams: dict[str, Payload]
    """The streams that have messages in the file."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._schemas: dict[int, Schema] = {}
        self._channels: dict[int, Channel] = {}
        self._chunks: list[ChunkPlace] = []
        self._chunk_channels: dict[int, frozenset[int]] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self._sure = len(MAGIC)
        """Where the last record ends that is not damaged, as far as this is known."""
        self.attachments: dict[str, bytes] = {}
        self.lacking_end = ""
        """That the file lacks its end, or is being written, in words; nothing if it has its end."""
        try:
            self._file: BinaryIO = self.path.open("rb", buffering=0)
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be opened: {error.strerror}") from None
        self._size = os.fstat(self._file.fileno()).st_size
        """What is there when it is opened; what is written meanwhile is left alone."""
        try:
            whole = self._scan()
            if not whole:
                self.lacking_end = self._no_end()
                self._salvage()
            self.info = self._session(whole)
            for channel in self._channels.values():
                if channel.schema_id not in self._schemas:
                    raise RecordingError(f"{self.path} is damaged: it lacks the schema of {channel.topic!r}")
        except BaseException:
            self._file.close()
            raise
        self.streams = {
            channel.topic: channel.metadata["payload"]  # type: ignore[misc]
            for channel in self._channels.values()
            if "payload" in channel.metadata
        }

    @property
    def topics(self) -> list[str]:
        """Streams and JSON topics, sorted."""
        return sorted({channel.topic for channel in self._channels.values()})

    @property
    def end_ns(self) -> int:
        """Session time of the last that was recorded, without looking into it; 0 if there is nothing."""
        return max((chunk.end - self.info.unix_ns for chunk in self._chunks), default=0)

    def messages(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Message, int]]:
        """Messages and their arrival times (session clock) in log order, of all streams or of ``streams``; with the
        beats of the same streams if asked. Payloads are bytes, checked against the hash stored with them."""
        for schema, data, arrival_ns in self._messages(streams, beats):
            message = decode(schema, data)
            if streams is None or message.header.stream in streams:
                yield message, arrival_ns

    def headers(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Header, int]]:
        """The same without the payloads, several times faster where these are large."""
        for schema, data, arrival_ns in self._messages(streams, beats):
            header = decode_envelope(schema, data)
            if streams is None or header.stream in streams:
                yield header, arrival_ns

    def _messages(self, streams: Collection[str] | None, beats: bool) -> Iterator[tuple[str, memoryview, int]]:
        ids = {
            number: self._schemas[channel.schema_id].name
            for number, channel in self._channels.items()
            if ("payload" in channel.metadata and (streams is None or channel.topic in streams))
            or (beats and channel.topic == BEAT_TOPIC)
        }
        for log, _, _, channel, _, data in self._records(ids.keys()):
            yield ids[channel], data, log - self.info.unix_ns

    def json(self, topic: str) -> Iterator[tuple[bytes, int, int]]:
        """The JSON objects of a topic as they were written, with log and publish time (session clock)."""
        ids = {number for number, channel in self._channels.items() if channel.topic == topic}
        for log, _, _, _, publish, data in self._records(ids):
            yield bytes(data), log - self.info.unix_ns, publish - self.info.unix_ns

    def labels(self) -> list[Label]:
        """What the recording says was true when, in order of start."""
        try:
            labels = [msgspec.json.decode(data, type=Label) for data, _, _ in self.json(LABEL_TOPIC)]
        except msgspec.MsgspecError as error:
            raise RecordingError(f"{self.path} has a damaged label: {error}") from None
        return sorted(labels, key=lambda label: (label.start_ns, label.end_ns, label.label))

    def counts(self) -> dict[str, int]:
        """How many messages of each stream are in the file. What it says of itself, else counted."""
        stated = self._metadata.get(END, {}).get("messages")
        if stated is not None:
            return msgspec.json.decode(stated, type=dict[str, int])
        names = {number: c.topic for number, c in self._channels.items() if "payload" in c.metadata}
        return dict(Counter(names[channel] for _, _, _, channel, _, _ in self._records(names.keys())))

    def close(self) -> None:
        """Lets go of the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> RecordingReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Opening.

    def _read(self, offset: int, length: int) -> bytes:
        if self._file.closed:  # as when messages are asked for in a `with` and gone over behind it
            raise RecordingError(
                f"the reader of {self.path} was closed before all was read; go over its messages before, inside the "
                "`with`, or open it again"
            )
        return os.pread(self._file.fileno(), length, offset)

    def _no_end(self) -> str:
        descriptor = self._file.fileno()
        if now := written_now(descriptor):
            return now
        if os.fstat(descriptor).st_size != self._size:  # its writer has closed it, or died, since
            return "it was still being written when it was opened"
        return lacking_end(self._read, self._size)

    def _not_begun(self) -> str:
        return written_now(self._file.fileno()) or "its writer died before it began"

    def _damaged(self, where: str) -> RecordingError:
        path = typed(self.path)
        return RecordingError(
            f"{self.path} is damaged{where}. What can be read is shown by: sensorium info {path}; and written to "
            f"a new recording by: sensorium recover {path} -o NEW.mcap"
        )

    def _scan(self) -> bool:
        """Notes where everything lies. True if the file has its end."""
        size = self._size
        if size == 0:
            raise RecordingError(f"{self.path} is empty: nothing was recorded, or {self._not_begun()}")
        if (start := self._read(0, len(MAGIC))) != MAGIC[:size]:
            if how := packed(self.path, start):
                raise RecordingError(f"{self.path} is no MCAP file: {how}")
            raise RecordingError(f"{self.path} is no MCAP file, and only those are recordings. See `sensorium import`")
        at = len(MAGIC)
        while at + _HEAD.size <= size:
            opcode, length = _HEAD.unpack(self._read(at, _HEAD.size))
            body = at + _HEAD.size
            if opcode == 0 or body + length > size:
                return False
            if opcode == Opcode.CHUNK:
                start, end = _CHUNK_TIMES.unpack(self._read(body, _CHUNK_TIMES.size))
                self._chunks.append(ChunkPlace(at, length, start, end))
            elif opcode in _KEPT:
                self._keep(opcode, self._read(body, length))
            elif opcode == Opcode.MESSAGE:
                self._refuse_bare(body)
            elif opcode == Opcode.FOOTER:
                whole = self._ended(body + length, size)
                self._find_chunks()
                self._learn_channels()
                return whole
            at = body + length
            if opcode in (Opcode.ATTACHMENT, Opcode.METADATA):
                self._sure = at
        return False

    def _refuse_bare(self, body: int) -> None:
        """Raises ForeignLayoutError for a message of a known channel outside of all chunks: recorders write none."""
        if SESSION in self._metadata and int.from_bytes(self._read(body, 2), "little") in self._channels:
            raise ForeignLayoutError(
                f"{self.path} was written anew by another tool, and without chunks, which recordings consist of. Write "
                f"it with chunks: mcap compress {typed(self.path.name)} -o chunked.mcap"
            )

    def _find_chunks(self) -> None:
        """Raises RecordingError where a chunk that the index lists does not say that it is one: it would be passed
        over, and all that is in it."""
        there = {chunk.offset for chunk in self._chunks}
        for offset in self._chunk_channels:
            if offset not in there:
                raise self._damaged(f": what lies at byte {offset} is no chunk, and its index lists one there")

    def _learn_channels(self) -> None:
        """Takes the channels from the chunks where the end does not list them, as some tools leave it."""
        if not self._channels:
            for chunk in self._chunks:
                self._keep_channels(chunk)

    def _keep_channels(self, chunk: ChunkPlace) -> None:
        for opcode, body in split(self._chunk_data(chunk)):
            if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                self._keep(opcode, bytes(body))

    def _ended(self, at: int, size: int) -> bool:
        """Whether the end, behind the footer, is there, too. Raises RecordingError if something else is."""
        end = self._read(at, len(MAGIC))
        if not MAGIC.startswith(end):
            raise self._damaged(f": its end is not at byte {at}, where its footer ends")
        sure = end != MAGIC or SESSION not in self._metadata or not has_sum(self._read, at)
        if not sure and whole_index(self._read, at + len(MAGIC)) is None:
            raise self._damaged(": its index does not match its sum")
        return end == MAGIC

    def _keep(self, opcode: int, body: bytes) -> None:
        stream = ReadDataStream(BytesIO(body))
        try:
            match opcode:
                case Opcode.SCHEMA:
                    schema = Schema.read(stream)
                    self._schemas[schema.id] = schema
                case Opcode.CHANNEL:
                    channel = Channel.read(stream)
                    self._channels[channel.id] = channel
                case Opcode.METADATA:
                    metadata = Metadata.read(stream)
                    if not facts_hold(metadata.metadata):
                        raise ValueError(f"what `{metadata.name}` says does not match its sum")
                    self._metadata[metadata.name] = metadata.metadata
                case Opcode.ATTACHMENT:
                    attachment = Attachment.read(stream)
                    if not attachment_holds(body):
                        raise ValueError(f"its attachment `{attachment.name}` does not match its sum")
                    self.attachments[attachment.name] = attachment.data
                case Opcode.CHUNK_INDEX:
                    index = ChunkIndex.read(stream)
                    self._chunk_channels[index.chunk_start_offset] = frozenset(index.message_index_offsets)
        except DAMAGE as error:
            raise self._damaged(f": {error}") from None

    def _salvage(self) -> None:
        """Keeps the chunks up to the last, which may not be whole; learns the channels, which the lost end would list.
        RecordingError if the file goes on behind what can be followed: a writer that was killed leaves nothing behind
        the record that it was in the midst of."""
        for position, chunk in enumerate(self._chunks):
            try:
                self._keep_channels(chunk)
                self._sure = max(self._sure, chunk.offset + _HEAD.size + chunk.length)
            except (RecordingError, struct.error):
                if position + 1 < len(self._chunks):
                    raise
                del self._chunks[position:]
        size = self._size
        ours = SESSION in self._metadata or b"sensorium" in self._read(0, _BEGINNING)
        if ours and (more := next_piece(self._read, self._sure, size)) is not None:
            raise self._damaged(f" from byte {self._sure} on, and goes on at byte {more.start}")
        if ours and size > 2 * len(MAGIC) and self._read(size - _END_BYTES, _END_BYTES) == MAGIC[-_END_BYTES:]:
            raise self._damaged(f" from byte {self._sure} on, before its end")

    def _session(self, whole: bool) -> SessionInfo:
        facts = self._metadata.get(SESSION)
        if facts is None:
            raise RecordingError(
                f"{self.path} is an MCAP file, but no recording of a Sensorium session. See `sensorium import`"
                if whole
                else f"{self.path} ends before it says which session it holds: {self._not_begun()}"
            )
        end = self._metadata.get(END, {})
        try:
            return SessionInfo(
                session=facts["session"],
                unix_ns=int(facts["unix_ns"]),
                rig=self.attachments[RIG].decode() if RIG in self.attachments else None,
                bundle=facts.get("bundle"),
                arrival="capture_end" if facts.get("arrival") == "capture_end" else "received",
                calibrations={
                    name.removeprefix(CALIBRATION): data.decode()
                    for name, data in self.attachments.items()
                    if name.startswith(CALIBRATION)
                },
                extra={k.removeprefix("extra."): v for k, v in facts.items() if k.startswith("extra.")},
                since=_stated(facts, "since", Standing),
                ring=_stated(facts, "ring", RingPart),
                complete=whole and end.get("complete") == "true",
                note=end.get("note", ""),
            )
        except (KeyError, ValueError, msgspec.MsgspecError) as error:
            raise RecordingError(f"{self.path} contradicts itself about its session: {error!r}") from None

    # Reading.

    def _records(self, channels: Collection[int]) -> Iterator[Record]:
        """Records of ``channels`` in log order, ties by chunk and index in the chunk."""
        pending: list[Record] = []
        for ordinal, chunk in sorted(enumerate(self._chunks), key=lambda entry: (entry[1].start, entry[0])):
            inside = self._chunk_channels.get(chunk.offset)
            if inside is not None and not inside.intersection(channels):
                continue
            ready = bisect_left(pending, chunk.start, key=_log_time)
            yield from pending[:ready]
            pending = pending[ready:]
            pending.extend(self._chunk_records(ordinal, chunk, channels))
            pending.sort(key=_order)
        yield from pending

    def _chunk_records(self, ordinal: int, chunk: ChunkPlace, channels: Collection[int]) -> Iterator[Record]:
        data = self._chunk_data(chunk)
        try:
            for index, (opcode, body) in enumerate(split(data)):
                if opcode == Opcode.MESSAGE:
                    channel, _, log, publish = MESSAGE_HEAD.unpack_from(body)
                    if not chunk.start <= log <= chunk.end:
                        raise ValueError("it holds what lies outside of its times")
                    if channel in channels:
                        yield log, ordinal, index, channel, publish, body[MESSAGE_HEAD.size :]
        except (struct.error, ValueError) as error:
            raise self._damaged(f" in the chunk at byte {chunk.offset}: {error}") from None

    def _chunk_data(self, place: ChunkPlace) -> memoryview:
        try:
            return chunk_data(self._read(place.offset + _HEAD.size, place.length))
        except DAMAGE as error:
            raise self._damaged(f" in the chunk at byte {place.offset}: {error}") from None


def ring_part(path: Path) -> RingPart | None:
    """Where a file says at its beginning that it stands in a ring; None if it is no segment of one, or if what it says
    there is damaged. Reads no further than that, and raises nothing."""
    facts = _begun(path) or {}
    with suppress(msgspec.MsgspecError):
        return _stated(facts, "ring", RingPart) if facts_hold(facts) else None
    return None


def is_recording(path: Path) -> bool:
    """Whether a file says at its beginning that it is a recording, be it cut off behind that. Raises nothing."""
    return _begun(path) is not None


def _begun(path: Path) -> dict[str, str] | None:
    """What a recording says of its session at its beginning; None if the file does not say it there."""
    try:
        with path.open("rb") as file:
            at = len(MAGIC) if file.read(len(MAGIC)) == MAGIC else 1 << 62
            for _ in range(_HEAD_RECORDS):
                file.seek(at)
                opcode, length = _HEAD.unpack(file.read(_HEAD.size))
                if opcode == Opcode.METADATA:
                    metadata = Metadata.read(ReadDataStream(BytesIO(file.read(length))))
                    if metadata.name == SESSION:
                        return dict(metadata.metadata)
                at += _HEAD.size + length
    except (*DAMAGE, OSError):
        pass
    return None


def _stated(facts: dict[str, str], name: str, type_: type[Stated]) -> Stated | None:
    return msgspec.json.decode(facts[name], type=type_) if name in facts else None


def _log_time(record: Record) -> int:
    return record[0]


def _order(record: Record) -> tuple[int, int, int]:
    return record[:3]


def split(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The records in a chunk: opcode and body."""
    at = 0
    while at < len(data):
        opcode, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield opcode, data[at : at + length]
        at += length


@contextmanager
def reading(recording: str | Path | RecordingReader) -> Iterator[RecordingReader]:
    """The reader itself, or one of the file at that path, closed at the end."""
    if isinstance(recording, RecordingReader):
        yield recording
    else:
        with RecordingReader(recording) as reader:
            yield reader


__all__ = ["MAGIC", "RecordingReader", "is_recording", "reading", "ring_part"]
