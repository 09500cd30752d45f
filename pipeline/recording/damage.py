"""Whether the bytes of a recording are those that were written, by the sums that lie in the file; and where in a
damaged one the next record lies that is certain to be one.

Chunks, attachments, what a recording says of its session and the index at the end carry sums of their own, which every
reader checks. All that comes before the index has one sum, too, which only who wants to be certain works out: every
byte is read for it.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import zstandard
from mcap.data_stream import ReadDataStream
from mcap.exceptions import McapError
from mcap.opcode import Opcode
from mcap.records import Chunk, Metadata
from mcap.stream_reader import get_chunk_data_stream

from pipeline.errors import typed
from pipeline.recording.writer import END, SESSION, SUM, facts_sum, free_path

_MAGIC = b"\x89MCAP0\r\n"
DAMAGE = (McapError, struct.error, ValueError, RuntimeError, OverflowError, MemoryError, zstandard.ZstdError)
"""What decoding damaged bytes may raise."""
_HEAD = struct.Struct("<BQ")
_FOOTER = struct.Struct("<BQQQI")
_DATA_END = struct.Struct("<BQI")
_BLOCK = 1 << 20
_SECTOR = 512
"""So many zeros are no part of a record that was cut off by chance."""

Read = Callable[[int, int], bytes]
"""Of a file: so many bytes from a place on, fewer at its end."""


def damage(path: str | Path) -> str | None:
    """Where a recording's bytes do not match their sums, in words; None where they do, or where there is no sum: in a
    file without its end."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if (footer := _footer_end(file, size)) is not None:
            file.seek(footer)
            if not _MAGIC.startswith(file.read(len(_MAGIC))):
                return f"its end is not at byte {footer}, where its footer ends"
            if (more := size - footer - len(_MAGIC)) > 0:
                follow = f"{more} bytes follow" if more > 1 else "1 byte follows"
                return f"{follow} its end, from byte {size - more} on; its recorder did not write that"
        at = size - len(_MAGIC) - _FOOTER.size
        if at < 0:
            return None
        file.seek(at)
        opcode, length, index, _, stated = _FOOTER.unpack(file.read(_FOOTER.size))
        if (opcode, length) != (2, _FOOTER.size - 9) or file.read() != _MAGIC:
            return None
        index = index or at  # 0 where it has none
        if not _DATA_END.size <= index <= at:
            return f"its footer at byte {at} names a place that the file does not have"
        # The index' sum covers the footer, too, but for the sum itself.
        if stated and _sum(file, index, size - len(_MAGIC) - 4) != stated:
            return f"its index, bytes {index} to {size}, does not match its sum"
        end = index - _DATA_END.size
        file.seek(end)
        _, _, stated = _DATA_END.unpack(file.read(_DATA_END.size))
        if stated and _sum(file, 0, end) != stated:
            return f"what was recorded, bytes 0 to {index}, does not match its sum"
    return None


def _footer_end(file: BinaryIO, size: int) -> int | None:
    """Where the footer ends that its records lead to. None if they lead to none."""
    at = len(_MAGIC)
    while at + _HEAD.size <= size:
        file.seek(at)
        opcode, length = _HEAD.unpack(file.read(_HEAD.size))
        at += _HEAD.size + int(length)
        if opcode == 2:
            return at
    return None


def lacking_end(read: Read, size: int) -> str:
    """That a file of this size lacks its end, in words, and what is in its place."""
    start, end = max(size - _BLOCK, 0), size
    while end and not (block := read(start, end - start).rstrip(b"\0")):
        start, end = max(start - _BLOCK, 0), start
    zeros = size - start - len(block) if end else size
    if zeros < _SECTOR:
        return "its end is missing"
    return f"its end is missing: its last {zeros} bytes are zeros, which a power cut or a fault of the disk leaves"


_PACKED = (
    (b"\x1f\x8b", "gzip", ".gz", "gzip -dc {} > {}"),
    (b"\x28\xb5\x2f\xfd", "zstd", ".zst", "zstd -dc {} > {}"),
    (b"\x04\x22\x4d\x18", "lz4", ".lz4", "lz4 -dc {} > {}"),
    (b"\xfd7zXZ\0", "xz", ".xz", "xz -dc {} > {}"),
    (b"BZh", "bzip2", ".bz2", "bzip2 -dc {} > {}"),
    (b"PK\x03\x04", "zip", ".zip", "unzip {}"),
)
"""Of packed files how they begin, what they are called, their suffix, and what to type for one and its contents."""


_ARCHIVE = re.compile(r"\.(tgz|tbz2?|txz|tzst|tar\.\w+)$", re.ASCII)
"""How the names of files end that, once unpacked, are several in one."""


def packed(path: Path, start: bytes) -> str:
    """That a file which begins so is packed as a whole, and what to type; nothing if it is not known to be."""
    for magic, name, suffix, command in _PACKED:
        if start.startswith(magic):
            if _ARCHIVE.search(path.name):
                return f"it is an archive packed with {name}. Unpack it first: tar -xkf {typed(path)}"
            inside = path.stem if path.suffix in (suffix, f".{name}") else f"unpacked{path.suffix}"
            to = free_path(Path(inside))  # a shell's > replaces what is there
            return f"it is packed with {name}. Unpack it first: {command.format(typed(path), typed(to))}"
    return ""


def _sum(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    result, left = 0, end - start
    while left and (data := file.read(min(left, _BLOCK))):
        result = zlib.crc32(data, result)
        left -= len(data)
    return result


class Index(NamedTuple):
    """The index at the end of a file: where it lies, its footer included, where it says that it lies, its bytes."""

    start: int
    end: int
    stated: int
    body: bytes


def whole_index(read: Read, size: int) -> Index | None:
    """The index of a file, wherever damage has moved it to, if it matches its sum."""
    tail = max(size - _BLOCK // 16, 0)
    data = read(tail, size - tail)
    at = data.rfind(_FOOTER_HEAD)
    while at >= 0:
        if at + _FOOTER.size <= len(data):
            _, _, start, offsets, stated = _FOOTER.unpack_from(data, at)
            footer = tail + at
            # Where bytes before it are gone it does not lie where it says; its length tells, by how many groups it has.
            places = [footer - (offsets - start) - groups * _SUMMARY_OFFSET_BYTES for groups in range(8)]
            for place in places if offsets else [start or footer]:  # others than we may list no groups, or nothing
                if len(_MAGIC) <= place <= footer and stated:
                    body = read(place, footer + _FOOTER.size - 4 - place)
                    if zlib.crc32(body) == stated:
                        return Index(place, footer + _FOOTER.size, start, body[: footer - place])
        at = data.rfind(_FOOTER_HEAD, 0, at)
    return None


def has_sum(read: Read, end: int) -> bool:
    """Whether the index whose footer ends at ``end`` has a sum. Ours always have; other tools may leave it out."""
    return read(end - 4, 4) != bytes(4)


_FOOTER_HEAD = _HEAD.pack(2, _FOOTER.size - 9)
_SUMMARY_OFFSET_BYTES = 26


class Piece(NamedTuple):
    """A record of a file, from ``start`` to ``end``; ``data`` is what a chunk holds."""

    opcode: int
    start: int
    end: int
    body: bytes
    data: memoryview


_CHUNK_HEAD = struct.Struct("<QQQII")
_INDEX_HEAD = struct.Struct("<HI")
_SURE = re.compile(
    rb"\x06.{5}\x00{3}.{16}.{5}\x00{3}.{4}(?:\x04\x00{3}zstd|\x03\x00{3}lz4|\x00{4}).{5}\x00{3}"
    rb"|\x09.{5}\x00{3}.{8}\x00{8}"
    rb"|\x0c.{4}\x00{4}(?:\x09\x00{3}sensorium|\x0d\x00{3}sensorium\.end)",
    re.DOTALL,
)
"""How the records begin that can be told from anything else: chunks, attachments, metadata."""
_LONGEST = 64
"""No match of it is longer."""


def piece(read: Read, at: int, size: int) -> Piece | None:
    """The record at ``at`` if nothing speaks against it: chunks and attachments match their sums, what a recording says
    of itself does if it has one, and others have the form of their kind."""
    if at + _HEAD.size > size:
        return None
    opcode, length = _HEAD.unpack(read(at, _HEAD.size))
    body_at, end = at + _HEAD.size, at + _HEAD.size + length
    if end > size or opcode not in _FORMS:
        return None
    if opcode == Opcode.CHUNK and chunk_end(read, at, size) != end:
        return None
    body, data = read(body_at, length), memoryview(b"")
    try:
        if opcode == Opcode.CHUNK:
            data = chunk_data(body)
        holds = zlib.crc32(data) == _CHUNK_HEAD.unpack_from(body)[3] if len(data) else _FORMS[opcode](body)
    except DAMAGE:
        return None
    return Piece(opcode, at, end, body, data) if holds else None


def chunk_end(read: Read, at: int, size: int) -> int | None:
    """Where the chunk at ``at`` ends by its head, if that does not contradict itself. What it holds may be damaged."""
    head = read(at, _HEAD.size + _CHUNK_HEAD.size + 4 + 8)
    if len(head) < _HEAD.size + _CHUNK_HEAD.size + 8:
        return None
    opcode, length = _HEAD.unpack_from(head)
    *_, name = _CHUNK_HEAD.unpack_from(head, _HEAD.size)
    if opcode != Opcode.CHUNK or name > 4 or at + _HEAD.size + length > size:
        return None
    (inside,) = struct.unpack_from("<Q", head, _HEAD.size + _CHUNK_HEAD.size + name)
    return at + _HEAD.size + length if length == _CHUNK_HEAD.size + name + 8 + inside else None


def next_piece(read: Read, at: int, size: int) -> Piece | None:
    """The first chunk, attachment or metadata at or behind ``at`` that is certain to be one."""
    return next((found for place in _places(read, at, size) if (found := piece(read, place, size)) is not None), None)


def _places(read: Read, at: int, size: int) -> Iterator[int]:
    while at < size:
        block = read(at, _BLOCK + _LONGEST)
        match = _SURE.search(block)
        while match is not None and match.start() < _BLOCK:
            yield at + match.start()
            match = _SURE.search(block, match.start() + 1)
        at += _BLOCK


def chunk_data(body: bytes) -> memoryview:
    """What the chunk with this body holds. Raises one of ``DAMAGE``."""
    chunk = Chunk.read(ReadDataStream(BytesIO(body)))
    if len(body) != _CHUNK_HEAD.size + len(chunk.compression) + 8 + len(chunk.data):
        raise ValueError("its length contradicts what is in it")
    stream, length = get_chunk_data_stream(chunk, validate_crc=True)
    if length != chunk.uncompressed_size:
        raise ValueError(f"it holds {length} bytes where it says {chunk.uncompressed_size}")
    return memoryview(stream.read(length))


def attachment_holds(body: bytes) -> bool:
    """Whether an attachment matches its sum."""
    return len(body) > 4 and zlib.crc32(memoryview(body)[:-4]) == int.from_bytes(body[-4:], "little")


def facts_hold(facts: dict[str, str]) -> bool:
    """Whether what a recording says of itself matches its sum; those of older versions have none."""
    return SUM not in facts or facts[SUM] == facts_sum(facts)


def _metadata_holds(body: bytes) -> bool:
    metadata = Metadata.read(ReadDataStream(BytesIO(body)))
    return metadata.name in (SESSION, END) and facts_hold(metadata.metadata)


def _message_index_holds(body: bytes) -> bool:
    _, length = _INDEX_HEAD.unpack_from(body)
    return length % 16 == 0 and len(body) == _INDEX_HEAD.size + int(length)


_FORMS: dict[int, Callable[[bytes], bool]] = {
    Opcode.CHUNK: lambda body: False,  # one that holds nothing
    Opcode.MESSAGE_INDEX: _message_index_holds,
    Opcode.ATTACHMENT: attachment_holds,
    Opcode.METADATA: _metadata_holds,
    Opcode.DATA_END: lambda body: len(body) == 4,
}
