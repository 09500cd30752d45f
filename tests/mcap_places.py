"""Where the records of an MCAP file lie, read by nothing but the format's own words."""

from __future__ import annotations

import struct


def places(content: bytes) -> list[tuple[int, int, int]]:
    """Opcode, first byte and end of each record."""
    found, at = [], 8
    while at + 9 < len(content) - 8:
        opcode, length = struct.unpack_from("<BQ", content, at)
        found.append((opcode, at, at + 9 + length))
        at += 9 + length
    return found
