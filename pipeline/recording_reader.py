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
import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Attachment, Channel, Chunk, ChunkIndex, Metadata, Schema
from mcap.stream_reader import get_chunk_data_stream

from pipeline.errors import RecordingError
from pipeline.messages import Header, Message, Payload
from pipeline.recording_schemas import BEAT_TOPIC, LABEL_TOPIC, decode, decode_envelope
from pipeline.recording_writer import CALIBRATION, END, RIG, SESSION, Label, RingPart, SessionInfo, Standing

MAGIC = b"\x89MCAP0\r\n"
_HEAD = struct.Struct("<BQ")
_CHUNK_TIMES = struct.Struct("<QQ")
_MESSAGE_HEAD = struct.Struct("<HIQQ")
_KEPT = {Opcode.SCHEMA, Opcode.CHANNEL, Opcode.METADATA, Opcode.ATTACHMENT, Opcode.CHUNK_INDEX}
_DAMAGE = (McapError, struct.error, ValueError, RuntimeError, OverflowError, MemoryError, zstandard.ZstdError)

_HEAD_RECORDS = 4
"""Within so many records of its beginning a recording says whose it is."""

Stated = TypeVar("Stated")

# log time, chunk, index in the chunk, channel, publish time, bytes
_Record = tuple[int, int, int, int, int, memoryview]


class _ChunkPlace(msgspec.Struct, frozen=True, gc=False):
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
        self._chunks: list[_ChunkPlace] = []
        self._chunk_channels: dict[int, frozenset[int]] = {}
        self._metadata: dict[str, dict[str, str]] = {}
        self.attachments: dict[str, bytes] = {}
        try:
            self._file: BinaryIO = self.path.open("rb", buffering=0)
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be opened: {error.strerror}") from None
        try:
            whole = self._scan()
            if not whole:
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
        return os.pread(self._file.fileno(), length, offset)

    def _scan(self) -> bool:
        """Notes where everything lies. True if the file has its end."""
        size = os.fstat(self._file.fileno()).st_size
        if size == 0:
            raise RecordingError(f"{self.path} is empty: nothing was recorded, or its writer died before it began")
        if self._read(0, len(MAGIC)) != MAGIC[:size]:
            raise RecordingError(f"{self.path} is no MCAP file, and only those are recordings. See `sensorium import`")
        at = len(MAGIC)
        while at + _HEAD.size <= size:
            opcode, length = _HEAD.unpack(self._read(at, _HEAD.size))
            body = at + _HEAD.size
            if opcode == 0 or body + length > size:
                return False
            if opcode == Opcode.CHUNK:
                start, end = _CHUNK_TIMES.unpack(self._read(body, _CHUNK_TIMES.size))
                self._chunks.append(_ChunkPlace(at, length, start, end))
            elif opcode in _KEPT:
                self._keep(opcode, self._read(body, length))
            elif opcode == Opcode.FOOTER:
                return self._read(body + length, len(MAGIC)) == MAGIC
            at = body + length
        return False

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
                    self._metadata[metadata.name] = metadata.metadata
                case Opcode.ATTACHMENT:
                    attachment = Attachment.read(stream)
                    self.attachments[attachment.name] = attachment.data
                case Opcode.CHUNK_INDEX:
                    index = ChunkIndex.read(stream)
                    self._chunk_channels[index.chunk_start_offset] = frozenset(index.message_index_offsets)
        except _DAMAGE as error:
            raise RecordingError(f"{self.path} is damaged: {error}") from None

    def _salvage(self) -> None:
        """Keeps the chunks up to the first that is not whole; learns the channels, which the lost end would list."""
        for position, chunk in enumerate(self._chunks):
            try:
                data = self._chunk_data(chunk)
                for opcode, body in _split(data):
                    if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                        self._keep(opcode, bytes(body))
            except (RecordingError, struct.error):
                del self._chunks[position:]
                return

    def _session(self, whole: bool) -> SessionInfo:
        facts = self._metadata.get(SESSION)
        if facts is None:
            raise RecordingError(
                f"{self.path} is an MCAP file, but no recording of a Sensorium session. See `sensorium import`"
                if whole
                else f"{self.path} ends before it says which session it holds: its writer died before it began"
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

    def _records(self, channels: Collection[int]) -> Iterator[_Record]:
        """Records of ``channels`` in log order, ties by chunk and index in the chunk."""
        pending: list[_Record] = []
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

    def _chunk_records(self, ordinal: int, chunk: _ChunkPlace, channels: Collection[int]) -> Iterator[_Record]:
        data = self._chunk_data(chunk)
        try:
            for index, (opcode, body) in enumerate(_split(data)):
                if opcode == Opcode.MESSAGE:
                    channel, _, log, publish = _MESSAGE_HEAD.unpack_from(body)
                    if channel in channels:
                        yield log, ordinal, index, channel, publish, body[_MESSAGE_HEAD.size :]
        except struct.error as error:
            raise RecordingError(f"{self.path} is damaged in the chunk at byte {chunk.offset}: {error}") from None

    def _chunk_data(self, place: _ChunkPlace) -> memoryview:
        body = self._read(place.offset + _HEAD.size, place.length)
        try:
            chunk = Chunk.read(ReadDataStream(BytesIO(body)))
            stream, length = get_chunk_data_stream(chunk, validate_crc=True)
            if length != chunk.uncompressed_size:
                raise ValueError(f"it holds {length} bytes where it says {chunk.uncompressed_size}")
            return memoryview(stream.read(length))
        except _DAMAGE as error:
            raise RecordingError(f"{self.path} is damaged in the chunk at byte {place.offset}: {error}") from None


def ring_part(path: Path) -> RingPart | None:
    """Where a file says at its beginning that it stands in a ring; None if it is no segment of one. Reads no further
    than that, and raises nothing."""
    with suppress(msgspec.MsgspecError):
        return _stated(_begun(path) or {}, "ring", RingPart)
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
    except (*_DAMAGE, OSError):
        pass
    return None


def _stated(facts: dict[str, str], name: str, type_: type[Stated]) -> Stated | None:
    return msgspec.json.decode(facts[name], type=type_) if name in facts else None


def _log_time(record: _Record) -> int:
    return record[0]


def _order(record: _Record) -> tuple[int, int, int]:
    return record[:3]


def _split(data: memoryview) -> Iterator[tuple[int, memoryview]]:
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
