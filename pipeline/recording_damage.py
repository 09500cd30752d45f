"""Whether the bytes of a recording are those that were written, by the sums that lie in the file.

Chunks carry sums of their own, which every reader checks. What lies between them (schemas, attachments, metadata) and
the index at the end have one sum each, which only who wants to be certain works out: every byte is read for it.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

_MAGIC = b"\x89MCAP0\r\n"
_HEAD = struct.Struct("<BQ")
_FOOTER = struct.Struct("<BQQQI")
_DATA_END = struct.Struct("<BQI")
_BLOCK = 1 << 20


def damage(path: str | Path) -> str | None:
    """Where a recording's bytes do not match their sums, in words; None where they do, or where there is no sum: in a
    file without its end."""
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if (ended := _end(file, size)) is not None and ended < size:
            more = f"{size - ended} bytes follow" if size - ended > 1 else "1 byte follows"
            return f"{more} its end, from byte {ended} on; its recorder did not write that"
        at = size - len(_MAGIC) - _FOOTER.size
        if at < 0:
            return None
        file.seek(at)
        opcode, length, index, _, stated = _FOOTER.unpack(file.read(_FOOTER.size))
        if (opcode, length) != (2, _FOOTER.size - 9) or file.read() != _MAGIC:
            return None
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


def _end(file: BinaryIO, size: int) -> int | None:
    """Where the recording ends by its records: behind its footer. None if it has none."""
    at = len(_MAGIC)
    while at + _HEAD.size <= size:
        file.seek(at)
        opcode, length = _HEAD.unpack(file.read(_HEAD.size))
        at += _HEAD.size + length
        if opcode == 2:
            file.seek(at)
            return at + len(_MAGIC) if at < size and file.read(len(_MAGIC)) == _MAGIC else None
    return None


def _sum(file: BinaryIO, start: int, end: int) -> int:
    file.seek(start)
    result, left = 0, end - start
    while left and (data := file.read(min(left, _BLOCK))):
        result = zlib.crc32(data, result)
        left -= len(data)
    return result
