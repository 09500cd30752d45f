"""Bags that were cut off (a copy that broke, a full disk, a recorder that was killed): where, and what is left of them.

It is told here since their readers tell it in the words of their parsers, like "Could not read uint32".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import typed
from pipeline.recording.reader import MAGIC

_BAG, _SQLITE = b"#ROSBAG V2.0\n", b"SQLite format 3\0"
_SQLITE_HEAD = 100
_U32 = struct.Struct("<I")
_HEAD, _CHUNK, _CHUNK_INFO, _CONNECTION = 3, 5, 6, 7
_LONGEST = 1 << 20
"""No header of a record is longer."""


def broken(path: Path) -> str:
    """Where the bag in the file ``path`` ends too early, what is left of it and what to do, or that it is no bag, in a
    paragraph; "" where it is neither. OSError."""
    look = {".bag": _cut_bag, ".db3": _cut_database, ".mcap": _cut_mcap}.get(path.suffix)
    if look is None:
        return ""
    with path.open("rb") as file:
        return look(path, file, path.stat().st_size)


def mended_database(path: Path) -> str:
    """What to type for what is whole in a damaged database of ROS 2."""
    mend = f"sqlite3 {typed(path.name)} .dump | sed 's/^ROLLBACK;.*/COMMIT;/' | sqlite3 whole.db3"
    return f"{mend} (`ros2 bag reindex` mends no database)"


def _nothing(path: Path, size: int, tool: str) -> str:
    return (
        f"{path} ends after {size} bytes, before any message: its recorder died, or it was not copied whole. Nothing "
        f"of it can be had, not even by `{tool}`; copy it again."
    )


def _other(path: Path, what: str) -> str:
    return f"{path} cannot be read: it is no {what}, whatever its name says."


class _Record(NamedTuple):
    op: int
    fields: dict[bytes, bytes]
    end: int


def _records(file: BinaryIO, at: int, size: int) -> Iterator[_Record]:
    """The records of a bag of ROS 1 from byte ``at`` on, up to the first that is not whole."""
    while True:
        file.seek(at)
        head = file.read(_U32.size)
        length = _U32.unpack(head)[0] if len(head) == _U32.size else _LONGEST
        header = file.read(length) if length < _LONGEST else b""
        data = file.read(_U32.size)
        if len(header) != length or len(data) != _U32.size:
            return
        fields = _fields(header)
        at += 2 * _U32.size + length + _U32.unpack(data)[0]
        if at > size or len(op := fields.get(b"op", b"")) != 1:
            return
        yield _Record(op[0], fields, at)


def _fields(header: bytes) -> dict[bytes, bytes]:
    found, at = dict[bytes, bytes](), 0
    while at + _U32.size <= len(header):
        end = at + _U32.size + _U32.unpack_from(header, at)[0]
        name, _, value = header[at + _U32.size : end].partition(b"=")
        found[name], at = value, end
    return found


def _cut_bag(path: Path, file: BinaryIO, size: int) -> str:
    start = file.read(len(_BAG))
    if start != _BAG:
        if _BAG.startswith(start):
            return _nothing(path, size, "rosbag reindex")
        return "" if start.startswith(b"#ROSBAG V") else _other(path, "bag of ROS 1")
    head = next(_records(file, len(_BAG), size), None)
    if head is None:
        return _nothing(path, size, "rosbag reindex")
    if head.op != _HEAD:
        return ""
    index, chunks, connections = (
        int.from_bytes(head.fields.get(name, b""), "little") for name in (b"index_pos", b"chunk_count", b"conn_count")
    )
    if index and index < size:
        ops = [record.op for record in _records(file, index, size)]
        if ops.count(_CHUNK_INFO) >= chunks and ops.count(_CONNECTION) >= connections:
            return ""
        what = (
            f"ends at byte {size}, and its index, which begins at byte {index}, is not whole: it was cut off or damaged"
        )
    elif index:
        what = f"is cut off at byte {size}: its index should begin at byte {index}"
    else:
        what = f"ends at byte {size} without an index: its recorder was killed, or its disk was full"
    whole = [r.end for r in _records(file, len(_BAG), min(size, index or size)) if r.op == _CHUNK]
    if not whole:
        return (
            f"{path} {what}. Not one chunk of messages in it is whole, and nothing of it can be had, not even by "
            "`rosbag reindex`; copy it again."
        )
    many = f"{len(whole)} chunks of messages" if len(whole) > 1 else "one chunk of messages"
    return (
        f"{path} {what}. Copy it again if there is a whole one. What is whole in it, {many} up to byte {whole[-1]}, "
        f"comes back with: rosbag reindex {typed(path.name)}"
    )


def _cut_database(path: Path, file: BinaryIO, size: int) -> str:
    head = file.read(_SQLITE_HEAD)
    if not head.startswith(_SQLITE[: len(head)]):
        return _other(path, "database, as ROS 2 writes them")
    page = int.from_bytes(head[16:18], "big")
    page = 65536 if page == 1 else page
    if size < max(page, _SQLITE_HEAD):
        return _nothing(path, size, "ros2 bag reindex")
    if page < 512:
        return ""
    pages, changes, counted_at = (int.from_bytes(head[at : at + 4], "big") for at in (28, 24, 92))
    wanted = pages * page if changes == counted_at else 0  # old writers leave the count as it was
    if size >= wanted and size % page == 0:
        return ""
    told = f"it has {size} bytes, and its beginning says {wanted}" if wanted > size else f"it has {size} bytes"
    return (
        f"{path} is cut off in the midst of its messages: {told}. It was not copied whole, or its disk was full; copy "
        f"it again if there is a whole one. What is whole in it comes back with: {mended_database(path)}"
    )


def _cut_mcap(path: Path, file: BinaryIO, size: int) -> str:
    start = file.read(len(MAGIC))
    file.seek(max(size - len(MAGIC), 0))
    if not MAGIC.startswith(start) or (file.read() == MAGIC and size > len(MAGIC)):
        return ""
    return (
        f"{path} cannot be read: it has {size} bytes, and its end is missing. A recorder that was killed leaves such a "
        "file, or a copy that broke; what is whole in it comes back with: "
        f"mcap recover {typed(path.name)} -o whole.mcap"
    )
