"""What is intact of a damaged recording: read as one that lacks the rest, and written to a new one.

The file is walked record by record. Where one is not what it must be, the next that is certain to be a chunk, an
attachment or metadata is looked for, by its form and its sum; what lies between is a hole. The index at the end, if it
is whole, tells which chunks lay in a hole, and how many messages there were in all; the numbers of the messages before
and behind a hole tell which are lacking. Those become gap records, as those of a recorder that lost messages, and the
session is incomplete. Nothing is guessed: what no number tells (how a stream went on when the file ends) has no gap
record, and is counted only where the index counts it. Memory holds a chunk, and a few numbers a chunk and a hole.
"""

from __future__ import annotations

import heapq
import struct
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from mcap.data_stream import ReadDataStream
from mcap.opcode import Opcode
from mcap.records import Attachment, AttachmentIndex, ChunkIndex, Metadata, MetadataIndex, Statistics

from pipeline.errors import ConfigError, RecordingError, typed
from pipeline.recording.damage import Index, Piece, chunk_end, damage, next_piece, piece, whole_index
from pipeline.recording.reader import (
    MAGIC,
    MESSAGE_HEAD,
    ChunkPlace,
    ForeignLayoutError,
    Record,
    RecordingReader,
    split,
)
from pipeline.recording.schemas import (
    BEAT_TOPIC,
    GAP_TOPIC,
    LABEL_TOPIC,
    MANIFEST_TOPIC,
    PREDICTION_TOPIC,
    Schema,
    decode,
)
from pipeline.recording.writer import (
    CALIBRATION,
    END,
    RIG,
    SESSION,
    SUM,
    LostMessages,
    RecordingWriter,
    SessionInfo,
    refuse_existing,
    whole_file,
    written_now,
)
from pipeline.steps import Gap

FROM = "recovered_from"
"""Under what a recovered recording names the damaged one."""
_HEADER = struct.pack("<BQII9s", Opcode.HEADER, 17, 0, 9, b"sensorium")
_BEGINNING = 1 << 16
_STEPS: dict[str, Literal["window", "prediction"]] = {MANIFEST_TOPIC: "window", PREDICTION_TOPIC: "prediction"}
Place = tuple[int, int]
"""Of a record: its chunk, and its index in it."""


class Hole(msgspec.Struct, kw_only=True):
    """Bytes ``from_byte`` to ``to_byte`` (excluded) of a file, which are not what was written."""

    from_byte: int
    to_byte: int
    what: str
    """What was there, in words."""
    from_ns: int | None = None
    to_ns: int | None = None
    """Between which arrivals, in session time, something is or may be lost here; null of an end that nobody knows, and
    where nothing is lost."""
    lost: dict[str, int] = {}
    """By stream (and topic, of windows and predictions) how many are lacking here, as far as their numbers tell."""


class Damage(msgspec.Struct, kw_only=True):
    """What is damaged in a recording."""

    holes: list[Hole]
    lost: dict[str, int]
    """By stream, and by topic of all else that was recorded, how many are lacking."""
    counted: bool
    """Whether that is all, by the file's own count; else it is what the numbers tell, and there may be more."""
    unreadable: list[str]
    """What can be had of no message: attachments, and what a stream's messages are; in words."""


class Recovery(msgspec.Struct, kw_only=True):
    """What ``recover`` made of a recording."""

    recording: str
    out: str
    saved: dict[str, int]
    """By stream, and by topic of all else."""
    complete: bool
    note: str
    damage: Damage


class _Lack(NamedTuple):
    """Numbers of an epoch that never came: those of the holes from ``hole`` up to ``until`` (excluded). They were
    missed at ``place``, at ``log_ns``."""

    epoch: int
    first: int
    last: int
    hole: int
    until: int
    place: Place
    log_ns: int


class _Numbers:
    """The numbers of a stream, or of windows, or of predictions, in the order of the file."""

    def __init__(self, stands: tuple[int, int] | None) -> None:
        """``stands``: the epoch and the number of the first that must come; None: nobody knows."""
        self._next, self._holes = stands, 0
        self._runs: dict[int, list[list[int]]] = defaultdict(list)
        self._lacks: list[_Lack] = []

    def take(self, epoch: int, first: int, last: int, holes: int, place: Place, log_ns: int) -> None:
        """Notes that the numbers ``first`` to ``last`` came, with so many holes in the file before them. None came,
        but all before ``first`` have been given out, if ``last`` is before ``first``."""
        if holes > self._holes and self._next is not None and epoch >= self._next[0]:
            below = self._next[1] if epoch == self._next[0] else 0
            if first > below:
                self._lacks.append(_Lack(epoch, below, first - 1, self._holes, holes, place, log_ns))
        self._holes = holes
        stands = (epoch, last + 1)
        self._next = stands if self._next is None else max(self._next, stands)
        if first <= last:
            self.explain(epoch, first, last)

    def explain(self, epoch: int, first: int, last: int) -> None:
        """Notes that these numbers are there, or that the recording says itself that they are not."""
        runs = self._runs[epoch]
        if runs and runs[-1][1] + 1 == first:
            runs[-1][1] = last
            return
        begin = end = bisect_left(runs, [first, first])
        while begin and runs[begin - 1][1] + 1 >= first:
            begin -= 1
        while end < len(runs) and runs[end][0] <= last + 1:
            end += 1
        joined = [[first, last], *runs[begin:end]]
        runs[begin:end] = [[min(run[0] for run in joined), max(run[1] for run in joined)]]

    def lacking(self) -> Iterator[_Lack]:
        """What was missed behind a hole, and did not come later."""
        for lack in self._lacks:
            first = lack.first
            for run in [*self._runs[lack.epoch], [lack.last + 1, lack.last + 1]]:
                if first < run[0] and first <= lack.last:
                    yield lack._replace(first=first, last=min(run[0] - 1, lack.last))
                first = max(first, run[1] + 1)


class _GapRead(msgspec.Struct):
    """What is read of a gap record, of messages or of windows."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    stream: str | None = None
    epoch: int = 0
    of: Literal["window", "prediction"] = "window"


class _Step(msgspec.Struct):
    step: int


class _WindowIndex(msgspec.Struct):
    index: int


class _Predicted(msgspec.Struct):
    window: _WindowIndex


class _Contents:
    """What the index at the end of a file says of the rest of it."""

    def __init__(self, index: Index) -> None:
        self.chunks: list[ChunkIndex] = []
        self.attachments: dict[str, int] = {}
        self.metadata: list[int] = []
        """Where attachments and metadata begin, as far as no bytes before them are gone."""
        self._moved = index.start - index.stated
        self.counts: dict[int, int] = {}
        self.channels: list[tuple[int, bytes]] = []
        """Schemas and channels as they lie there."""
        for opcode, body in split(memoryview(index.body)):
            stream = ReadDataStream(BytesIO(body))
            match opcode:
                case Opcode.SCHEMA | Opcode.CHANNEL:
                    self.channels.append((opcode, bytes(body)))
                case Opcode.CHUNK_INDEX:
                    self.chunks.append(ChunkIndex.read(stream))
                case Opcode.ATTACHMENT_INDEX:
                    one = AttachmentIndex.read(stream)
                    self.attachments[one.name] = one.offset
                case Opcode.METADATA_INDEX:
                    self.metadata.append(MetadataIndex.read(stream).offset)
                case Opcode.STATISTICS:
                    self.counts = dict(Statistics.read(stream).channel_message_counts)

    def has(self, start: int) -> bool:
        """Whether metadata or an attachment lies there, or has come to lie there."""
        return any(at in self.metadata or at in self.attachments.values() for at in (start, start - self._moved))

    def pop_until(self, start: int, end: int, length: int) -> list[ChunkIndex] | None:
        """The chunks before this one, which are no longer in ``chunks``, nor is this one. None if it is not there."""
        for at, one in enumerate(self.chunks):
            if (one.message_start_time, one.message_end_time, one.chunk_length) == (start, end, length):
                gone, self.chunks = self.chunks[:at], self.chunks[at + 1 :]
                return gone
        return None


class SalvagedReader(RecordingReader):
    """What is intact of a recording, read as a recording that lacks the rest. RecordingError, which says why, if
    nothing of it can be had."""

    damage: Damage
    ended: bool
    """Whether the file still says how its recorder closed it."""

    def __init__(self, path: str | Path) -> None:
        self._holes: list[Hole] = []
        self._losses: list[Hole] = []
        """The holes that something was recorded in."""
        self._open: list[tuple[int, int]] = []
        """Stretches since the last chunk that are not what they must be."""
        self._end_at = 1 << 62
        """Where the recorder's last words begin, once they are found: nothing was recorded behind them."""
        self._contents: _Contents | None = None
        self._entries: dict[int, bytes] | None = None
        """What the indices behind the last chunk have to say, by channel; None behind a hole."""
        self._numbers: dict[str, _Numbers] = {}
        self._taken: Counter[int] = Counter()
        self._undescribed: set[int] = set()
        """Channels of which nothing tells what they are."""
        self._refused: set[Place] = set()
        self._gaps: list[tuple[Place, bytes, int]] = []
        self._stated: SessionInfo | None = None
        super().__init__(path)

    def __enter__(self) -> SalvagedReader:
        return self

    @property
    def topics(self) -> list[str]:
        """Streams and JSON topics, sorted."""
        return sorted({*super().topics, *([GAP_TOPIC] if self._gaps else [])})

    def json(self, topic: str) -> Iterator[tuple[bytes, int, int]]:
        """As of any recording; with the gaps that the damage has left."""
        found = super().json(topic)
        if topic != GAP_TOPIC:
            return found
        gaps = sorted(((data, log_ns, log_ns) for _, data, log_ns in self._gaps), key=_log_of)
        return heapq.merge(found, gaps, key=_log_of)

    def _chunk_records(self, ordinal: int, chunk: ChunkPlace, channels: Collection[int]) -> Iterator[Record]:
        for record in super()._chunk_records(ordinal, chunk, channels):
            if record[1:3] not in self._refused:
                yield record

    def copy_to(self, writer: RecordingWriter, progress: Callable[[int], Any]) -> Counter[str]:
        """Writes all that is intact, and the gaps, in the order of the file; how many of what."""
        gaps, unix_ns = self._gaps[::-1], self.info.unix_ns
        saved: Counter[str] = Counter()
        for ordinal, chunk in enumerate(self._chunks):
            for number, (opcode, body) in enumerate(split(self._chunk_data(chunk))):
                if opcode != Opcode.MESSAGE or (ordinal, number) in self._refused:
                    continue
                while gaps and gaps[-1][0] <= (ordinal, number):
                    _, data, log_ns = gaps.pop()
                    writer.write_json(GAP_TOPIC, data, log_ns)
                channel_id, sequence, log, publish = MESSAGE_HEAD.unpack_from(body)
                channel = self._channels[channel_id]
                kind = self._schemas[channel.schema_id]
                schema = Schema(kind.name, channel.message_encoding, kind.encoding, kind.data)
                data = bytes(body[MESSAGE_HEAD.size :])
                writer.copy(channel.topic, schema, channel.metadata, data, log - unix_ns, publish - unix_ns, sequence)
                saved[channel.topic] += 1
            progress(chunk.end - unix_ns)
        return saved

    # Opening.

    def _scan(self) -> bool:
        size = self._size
        words = self._words(size)
        if words is None:
            return super()._scan()  # which says what else it is
        self._refuse_foreign()
        self._metadata[SESSION] = _metadata(words).metadata
        self._stated = super()._session(True)
        if self._read(0, words.start) != MAGIC + _HEADER:
            self._hole(0, words.start, "the head of the file, which is made anew")
        index = whole_index(self._read, size)
        if index is not None:
            self._contents = _Contents(index)
            for opcode, body in self._contents.channels:
                self._keep(opcode, body)
        at = self._walk(words.end, size if index is None else index.start)
        self._settle_open([] if self._contents is None else self._contents.chunks)
        if index is not None:
            at = min(index.end + len(MAGIC), size)
            if self._read(index.end, len(MAGIC)) != MAGIC:
                self._hole(index.end, at, "the end, which is made anew")
        if at < size:
            what = "its index, which is made anew" if index is None else "nothing that its recorder wrote"
            self._hole(at, size, what)
        self._settle(words)
        return True

    def _refuse_foreign(self) -> None:
        """Raises ForeignLayoutError for what is not damaged, but laid out as is not read here."""
        try:
            super()._scan()
        except ForeignLayoutError:
            raise
        except (RecordingError, struct.error):  # of what is damaged, which is here for that
            pass
        for noted in (self._schemas, self._channels, self._chunks, self._chunk_channels, self._metadata,
                      self.attachments):  # fmt: skip
            noted.clear()
        self._sure = len(MAGIC)

    def _words(self, size: int) -> Piece | None:
        """The metadata that says whose session it is; None if there never was any. RecordingError if it is damaged."""
        found = next_piece(self._read, len(MAGIC), size)
        if found is not None and found.opcode == Opcode.METADATA and _metadata(found).name == SESSION:
            return found
        foreign = self._read(0, len(MAGIC)) == MAGIC and b"sensorium" not in self._read(0, _BEGINNING)
        if found is None or foreign:
            return None
        raise RecordingError(
            f"{self.path} is damaged where it says whose session it is and when that began, between bytes {len(MAGIC)} "
            f"and {found.start}. Without that its messages have no times, and nothing of it can be had"
        )

    def _walk(self, at: int, limit: int) -> int:
        """Notes what is intact between ``at`` and ``limit``. Where what was recorded ends."""
        good = at
        while at < limit:
            found = piece(self._read, at, limit)
            if found is None:
                # A chunk that is damaged inside still says where it ends; else the next that is sure is looked for.
                end = chunk_end(self._read, at, limit)
                if end is None or (end < limit and piece(self._read, end, limit) is None):
                    sure = next_piece(self._read, at + 1, limit)
                    end = limit if sure is None else sure.start
                at = end
                continue
            if good < at:
                self._open.append((good, at))
                self._entries = None
                good = at
            if self._is_wrong_index(found):
                # Its length may be wrong, too, or bytes of it are gone: what is certain may begin within it.
                sure = next_piece(self._read, at + 1, limit)
                end = found.end if sure is None else min(sure.start, found.end)
                self._hole(at, end, "an index of messages, which is made anew")
                good = at = end
                continue
            if self._take(found):
                good = found.end
            at = found.end
            if found.opcode == Opcode.DATA_END and next_piece(self._read, at, limit) is None:
                return at
        if good < limit:
            self._open.append((good, limit))
        return limit

    def _take(self, found: Piece) -> bool:
        """Notes what a record says. False if it is none of this file, but of one that a message holds."""
        sure = found.opcode in (Opcode.ATTACHMENT, Opcode.METADATA)
        if sure and self._contents is not None and not self._contents.has(found.start):
            return False
        match found.opcode:
            case Opcode.CHUNK:
                return self._take_chunk(found)
            case Opcode.ATTACHMENT:
                attachment = Attachment.read(ReadDataStream(BytesIO(found.body)))
                self.attachments[attachment.name] = attachment.data
            case Opcode.METADATA if _metadata(found).name == END:
                self._metadata[END], self._end_at = _metadata(found).metadata, found.start
        return True

    def _is_wrong_index(self, found: Piece) -> bool:
        """Whether this is an index of messages that is not the one of the chunk before it."""
        if found.opcode != Opcode.MESSAGE_INDEX or self._entries is None:
            return False
        return self._entries.get(int.from_bytes(found.body[:2], "little")) != found.body[6:]

    def _hole(self, start: int, end: int, what: str) -> Hole:
        hole = Hole(from_byte=start, to_byte=end, what=what)
        self._holes.append(hole)
        return hole

    def _lose(self, start: int, end: int, what: str, from_ns: int | None, to_ns: int | None) -> None:
        hole = self._hole(start, end, what)
        hole.from_ns, hole.to_ns = from_ns, to_ns
        self._losses.append(hole)

    def _settle_open(self, gone: list[ChunkIndex], next_start: int | None = None) -> None:
        """Works out what was in the stretches since the last chunk: ``gone`` by the index; without one nobody knows,
        and it may have been something up to the next chunk, but for what lies behind the recorder's last words."""
        unix_ns, stretches = self._unix_ns, self._open
        self._open = []
        first, last = (stretches[0][0], stretches[-1][1]) if stretches else (self._reach, self._reach)
        if gone:
            from_ns = min(one.message_start_time for one in gone) - unix_ns
            self._lose(first, last, "messages", from_ns, max(one.message_end_time for one in gone) - unix_ns)
        elif self._contents is None and (recorded := [end for start, end in stretches if start < self._end_at]):
            from_ns = max((chunk.end for chunk in self._chunks), default=unix_ns) - unix_ns
            to_ns = None if next_start is None else next_start - unix_ns
            cut_off = to_ns is None and END not in self._metadata
            what = "its end, with messages perhaps" if cut_off else "messages, perhaps"
            self._lose(first, recorded[-1], what, from_ns, to_ns)
            for start, end in stretches[len(recorded) :]:
                self._hole(start, end, "nothing that is needed; it is made anew")
        else:
            for start, end in stretches:
                self._hole(start, end, "nothing that is needed; it is made anew")

    @property
    def _unix_ns(self) -> int:
        assert self._stated is not None
        return self._stated.unix_ns

    @property
    def _reach(self) -> int:
        """Where the last chunk ends."""
        return self._chunks[-1].offset + 9 + self._chunks[-1].length if self._chunks else len(MAGIC)

    def _take_chunk(self, found: Piece) -> bool:
        records = list(split(found.data))
        logs = [MESSAGE_HEAD.unpack_from(body)[2] for opcode, body in records if opcode == Opcode.MESSAGE]
        if not logs:
            return False
        start, end = min(logs), max(logs)
        gone = [] if self._contents is None else self._contents.pop_until(start, end, found.end - found.start)
        if gone is None:
            return False
        self._settle_open(gone, start)
        if struct.unpack_from("<QQ", found.body) != (start, end):
            self._hole(found.start + 9, found.start + 25, "the times of a chunk, which are made anew")
        ordinal = len(self._chunks)
        self._chunks.append(ChunkPlace(found.start, len(found.body), start, end))
        entries: dict[int, list[bytes]] = defaultdict(list)
        at = 0
        for number, (opcode, body) in enumerate(records):
            if opcode in (Opcode.SCHEMA, Opcode.CHANNEL):
                self._keep(opcode, bytes(body))
            elif opcode == Opcode.MESSAGE:
                channel, _, log, _ = MESSAGE_HEAD.unpack_from(body)
                entries[channel].append(struct.pack("<QQ", log, at))
                self._take_message(channel, (ordinal, number), log - self._unix_ns, body[MESSAGE_HEAD.size :])
            at += 9 + len(body)
        self._entries = {channel: b"".join(packed) for channel, packed in entries.items()}
        self._chunk_channels[found.start] = frozenset(entries)
        return True

    def _take_message(self, number: int, place: Place, log_ns: int, data: memoryview) -> None:
        channel = self._channels.get(number)
        if channel is None or channel.schema_id not in self._schemas:
            self._undescribed.add(number)
            self._refused.add(place)
            return
        topic = channel.topic
        try:
            if "payload" in channel.metadata or topic == BEAT_TOPIC:
                header = decode(self._schemas[channel.schema_id].name, data).header
                name, epoch, first, last = header.stream, header.epoch, header.seq, header.seq - header.is_beat
            elif topic in _STEPS:
                first = last = _step_of(topic, data)
                name, epoch = topic, 0
            else:
                if topic == GAP_TOPIC:
                    self._take_gap(msgspec.json.decode(data, type=_GapRead))
                self._taken[number] += 1
                return
        except (RecordingError, msgspec.MsgspecError) as error:
            self._refused.add(place)
            chunk = self._chunks[place[0]]
            self._lose(chunk.offset, chunk.offset + 9 + chunk.length, f"what is no message: {error}", log_ns, log_ns)
            return
        self._taken[number] += 1
        self._numbers_of(name).take(epoch, first, last, len(self._losses), place, log_ns)

    def _take_gap(self, gap: _GapRead) -> None:
        of = PREDICTION_TOPIC if gap.of == "prediction" else MANIFEST_TOPIC
        self._numbers_of(of if gap.stream is None else gap.stream).explain(gap.epoch, gap.first, gap.last)

    def _numbers_of(self, name: str) -> _Numbers:
        if name not in self._numbers:
            assert self._stated is not None
            first_step = (0, 1) if self._stated.since is None else None
            self._numbers[name] = _Numbers(first_step if name in _STEPS else self._stated.standing(name))
        return self._numbers[name]

    # What is lacking.

    def _settle(self, words: Piece) -> None:
        """Works out what is lacking in all, once everything has been looked at."""
        told = self._make_gaps()
        counts = {} if self._contents is None else self._contents.counts
        names = {number: channel.topic for number, channel in self._channels.items()}
        lacks: Counter[str] = Counter()
        for number, count in counts.items():
            lacks[names.get(number, f"channel {number}")] += count - self._taken[number]
        if text := None if self._holes else damage(self.path):
            if SUM not in self._metadata[SESSION]:
                raise RecordingError(
                    f"{self.path} is damaged: {text}. All that has a sum of its own is intact, so it may be what it "
                    f"says of its session, at bytes {words.start} to {words.end}, and nothing of it can be relied on"
                )
            self._hole(words.start, self._reach, f"nothing that is needed: {text}")
        self.ended = END in self._metadata
        self.damage = Damage(
            holes=sorted(self._holes, key=lambda hole: (hole.from_byte, hole.to_byte)),
            lost={name: count for name, count in sorted((lacks if counts else told).items()) if count},
            counted=bool(counts),
            unreadable=self._unreadable(),
        )
        for number in self._channels.keys() - self._taken.keys():  # nothing of it is left
            del self._channels[number]

    def _make_gaps(self) -> Counter[str]:
        """A gap record for each range of numbers that was lost in a hole; how many numbers, by stream."""
        told: Counter[str] = Counter()
        for name, numbers in self._numbers.items():
            for lack in numbers.lacking():
                holes = self._losses[lack.hole : lack.until]
                cause = f"the file was damaged at bytes {holes[0].from_byte} to {holes[-1].to_byte}"
                gap: Gap | LostMessages = (
                    Gap(lack.first, lack.last, cause, _STEPS[name])
                    if name in _STEPS
                    else LostMessages(name, lack.epoch, lack.first, lack.last, cause)
                )
                self._gaps.append((lack.place, msgspec.json.encode(gap), lack.log_ns))
                count = lack.last - lack.first + 1
                told[name] += count
                holes[0].lost[name] = holes[0].lost.get(name, 0) + count
        self._gaps.sort(key=lambda gap: gap[0])
        return told

    def _unreadable(self) -> list[str]:
        said = [f"what the messages of channel {number} are" for number in sorted(self._undescribed)]
        if self._contents is not None:
            gone = {at: name for name, at in self._contents.attachments.items() if name not in self.attachments}
            for hole in self._holes:
                if names := [f"`{name}`" for at, name in gone.items() if hole.from_byte <= at < hole.to_byte]:
                    hole.what = ", ".join([*names, *(["messages"] if hole in self._losses else [])])
            return said + [f"`{name}`" for name in gone.values()]
        begun = min((chunk.offset for chunk in self._chunks), default=1 << 62)
        if any(hole.to_byte <= begun for hole in self._losses):
            said.append("its rig and its calibrations, if they were there")
        return said

    def _session(self, whole: bool) -> SessionInfo:
        session, end = super()._session(whole), self._metadata.pop(END, {})
        if self._stated is None or not hasattr(self, "damage"):
            return session
        lost = bool(self._losses or self.damage.lost or self.damage.unreadable)
        said = [session.note] if end else [self._no_end()]
        cut_off = not end and all(hole.to_ns is None for hole in self._losses)  # which is said already
        if self.damage.lost or self.damage.unreadable or (self._losses and not cut_off):
            said.append(f"damaged, and recovered without what is lost: {lost_text(self.damage)}")
        return msgspec.structs.replace(
            session, complete=session.complete and not lost, note="; ".join(filter(None, said))
        )


_NAMES = {BEAT_TOPIC: "beats", LABEL_TOPIC: "labels", MANIFEST_TOPIC: "windows", PREDICTION_TOPIC: "predictions"}


def name_of(topic: str) -> str:
    """What lies under a topic, in words."""
    return _NAMES.get(topic, topic)


def counts_text(counts: Mapping[str, int]) -> str:
    """How many of what, in words: streams first."""
    ordered = sorted(counts, key=lambda name: (name.startswith("/"), name))
    return ", ".join(f"{name_of(name)} {counts[name]}" for name in ordered)


def lost_text(found: Damage) -> str:
    """What is lacking, in words."""
    said = counts_text(found.lost)
    if found.counted:
        return said or "no message"
    return f"at least {said}" if said else "nobody knows how many messages"


def _refuse_unfinished(path: Path) -> None:
    """Raises ConfigError for what is only not there yet."""
    with suppress(OSError), path.open("rb") as file:  # why it cannot be opened says its reader
        if now := written_now(file.fileno()):
            raise ConfigError(
                f"{path} is no damaged recording: {now}. Stop that session first, which gives it its end; what can be "
                f"read already is shown by: sensorium info {typed(path)}"
            )


def recover(
    path: Path, out: Path, *, partial: bool = False, progress: Callable[[int], Any] = lambda t_ns: None
) -> Recovery:
    """Writes what is intact of a recording to ``out``, which appears only when it is whole. With ``partial`` also
    where attachments, or what a stream's messages are, are lost, and without them. ConfigError for a recording that is
    whole or not yet, and an ``out`` that exists; RecordingError if nothing can be had, or not all but messages."""
    _refuse_unfinished(path)
    with SalvagedReader(path) as reader:
        found = reader.damage
        if not found.holes and reader.ended:
            raise ConfigError(f"{path} is whole, so there is nothing to recover: use it as it is")
        if found.unreadable and not partial:
            raise RecordingError(
                f"{path} is damaged where it says more than messages, and this cannot be had: "
                f"{', '.join(found.unreadable)}. To recover the rest without it, add --partial"
            )
        if not reader.topics and not reader.ended:
            raise RecordingError(f"{path} ends before its first message, or none is intact: nothing can be recovered")
        refuse_existing(out)
        extra = reader.info.extra | {FROM: Path(path).name}
        session = msgspec.structs.replace(reader.info, extra=extra)
        with whole_file(out, overwrite=False) as part, RecordingWriter(part, session, overwrite=True) as writer:
            for name, data in reader.attachments.items():
                if name != RIG and not name.startswith(CALIBRATION):
                    writer.attach(name, data)
            saved = reader.copy_to(writer, progress)
            writer.close(session.complete, session.note)
    return Recovery(
        recording=str(path), out=str(out), saved=dict(sorted(saved.items())), complete=session.complete,
        note=session.note, damage=found,
    )  # fmt: skip


def _step_of(topic: str, data: memoryview) -> int:
    if topic == MANIFEST_TOPIC:
        return msgspec.json.decode(data, type=_Step).step
    return msgspec.json.decode(data, type=_Predicted).window.index


def _metadata(found: Piece) -> Any:
    return Metadata.read(ReadDataStream(BytesIO(found.body)))


def _log_of(item: tuple[bytes, int, int]) -> int:
    return item[1]
