"""UDP datagrams out of a network capture: pcap (of µs or ns, either byte order) and pcapng.

Link layers: Ethernet with or without VLAN tags, Linux "cooked" (both versions), loopback, bare IP. A LiDAR's datagram
is often larger than a frame of the network, so fragments of IPv4 are put together; what never became whole is counted.
The formats: draft-ietf-opsawg-pcap and draft-ietf-opsawg-pcapng.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from pipeline.errors import RecordingError

_CLASSIC = {b"\xa1\xb2\xc3\xd4": (">", 1000), b"\xd4\xc3\xb2\xa1": ("<", 1000), b"\xa1\xb2\x3c\x4d": (">", 1),
            b"\x4d\x3c\xb2\xa1": ("<", 1)}  # fmt: skip
_NG = b"\x0a\x0d\x0d\x0a"
_LARGEST = 1 << 24
"""No packet is longer: what says so is damaged."""
_IPV4, _IPV6, _UDP = 0x0800, 0x86DD, 17
_VLAN = (0x8100, 0x88A8, 0x9100)
_MOST_PARTS = 64
"""So many datagrams may be in pieces at once; the oldest is given up then."""

Frame = tuple[int, int, bytes]
"""Link type, time in ns, bytes."""


class Datagram(NamedTuple):
    """One UDP datagram: when its last piece was captured (ns), who sent it, to which port, and what."""

    t_ns: int
    source: str
    port: int
    payload: bytes


def is_capture(path: Path) -> bool:
    """Whether a file begins like a capture."""
    with path.open("rb") as file:
        start = file.read(4)
    return start in _CLASSIC or start == _NG


def datagrams(path: Path, other: Counter[str]) -> Iterator[Datagram]:
    """All UDP datagrams in the order of the file. What else is there is counted in ``other``. RecordingError for a
    file that is no capture; one that ends within a packet ends with the last whole one, and that is counted, too."""
    with path.open("rb") as file:
        start = file.read(4)
        if start not in _CLASSIC and start != _NG:
            raise RecordingError(f"{path} is no network capture: neither pcap nor pcapng")
        frames = _classic(file, *_CLASSIC[start]) if start in _CLASSIC else _ng(file)
        whole = _Reassembly()
        while True:
            try:
                link, t_ns, data = next(frames)
            except StopIteration:
                break
            except (EOFError, struct.error):
                other["packets that are cut off at the end of the capture"] += 1
                break
            except ValueError as error:
                raise RecordingError(f"{path} is damaged: {error}") from None
            try:
                found = whole.take(t_ns, *_network(link, data))
            except (ValueError, IndexError, struct.error):
                other["packets that are not UDP over IP"] += 1
                continue
            if found is not None:
                yield found
        if whole.lost:
            other["datagrams of which a fragment is missing"] += whole.lost


def _classic(file: BinaryIO, order: str, tick_ns: int) -> Iterator[Frame]:
    (link,) = struct.unpack(order + "I", _exactly(file, 20)[16:])
    while head := file.read(16):
        seconds, ticks, size, _ = struct.unpack(order + "4I", head)
        yield link & 0xFFFF, seconds * 10**9 + ticks * tick_ns, _exactly(file, size)


def _ng(file: BinaryIO) -> Iterator[Frame]:
    """Sections may have byte orders of their own, and interfaces clocks of their own resolution."""
    order, interfaces, kind = "<", [(0, 1000, 0)], _NG
    while kind:
        if len(kind) < 4:
            raise EOFError
        if kind == _NG:
            size = _exactly(file, 4)
            magic = _exactly(file, 4)
            order, interfaces = ("<" if magic == b"\x4d\x3c\x2b\x1a" else ">"), []
            _exactly(file, _size(order, size) - 12)
            kind = file.read(4)
            continue
        (type_,) = struct.unpack(order + "I", kind)
        body = _exactly(file, _size(order, _exactly(file, 4)) - 8)[:-4]
        if type_ == 1:
            interfaces.append(_interface(order, body))
        elif type_ == 6:
            number, high, low, captured = struct.unpack_from(order + "4I", body)
            if number >= len(interfaces):
                raise ValueError(f"a packet names the interface {number}, which does not exist")
            link, resolution, offset_s = interfaces[number]
            ticks = high << 32 | low
            yield link, offset_s * 10**9 + ticks * 10**9 // resolution, body[20 : 20 + captured]
        kind = file.read(4)


def _size(order: str, field: bytes) -> int:
    (size,) = struct.unpack(order + "I", field)
    if not 12 <= size <= _LARGEST or size % 4:
        raise ValueError(f"a block has {size} bytes")
    return int(size)


def _interface(order: str, body: bytes) -> tuple[int, int, int]:
    """Link type, ticks a second, and seconds to add."""
    (link,) = struct.unpack_from(order + "H", body)
    resolution, offset_s, at = 10**6, 0, 8
    while at + 4 <= len(body):
        code, length = struct.unpack_from(order + "2H", body, at)
        value = body[at + 4 : at + 4 + length]
        if code == 9 and value:
            resolution = 2 ** (value[0] & 0x7F) if value[0] & 0x80 else 10 ** value[0]
        elif code == 14 and length == 8:
            (offset_s,) = struct.unpack(order + "q", value)
        at += 4 + -(-length // 4) * 4
    return link, resolution, offset_s


def _exactly(file: BinaryIO, size: int) -> bytes:
    if size > _LARGEST:
        raise ValueError(f"a packet has {size} bytes")
    data = file.read(size)
    if len(data) < size:
        raise EOFError
    return data


def _network(link: int, frame: bytes) -> tuple[int, bytes]:
    """Protocol number (of Ethernet) and the packet of IP in a frame. ValueError for other kinds of links."""
    if link == 1:
        at = 12
        while int.from_bytes(frame[at : at + 2], "big") in _VLAN:
            at += 4
        return int.from_bytes(frame[at : at + 2], "big"), frame[at + 2 :]
    if link == 113:
        return int.from_bytes(frame[14:16], "big"), frame[16:]
    if link == 276:
        return int.from_bytes(frame[:2], "big"), frame[20:]
    if link in (0, 108):  # loopback: the family of addresses, which has another number on every system
        frame = frame[4:]
    elif link not in (12, 14, 101, 228, 229):
        raise ValueError(f"link type {link}")
    return (_IPV6 if frame[0] >> 4 == 6 else _IPV4), frame


class _Reassembly:
    """Datagrams from packets of IP. ``lost`` counts those that never became whole."""

    def __init__(self) -> None:
        self._parts: dict[tuple[bytes, bytes], dict[int, bytes]] = {}
        self._ends: dict[tuple[bytes, bytes], int] = {}
        self._given_up = 0

    @property
    def lost(self) -> int:
        return self._given_up + len(self._parts)

    def take(self, t_ns: int, protocol: int, packet: bytes) -> Datagram | None:
        """ValueError for what is no UDP."""
        if protocol == _IPV6:
            if packet[6] != _UDP:
                raise ValueError("other protocols than UDP")
            size = int.from_bytes(packet[4:6], "big")
            return _datagram(t_ns, _ipv6(packet[8:24]), packet[40 : 40 + size])
        if protocol != _IPV4 or packet[9] != _UDP:
            raise ValueError("other protocols than UDP over IP")
        total, identity, flags = struct.unpack_from(">2s2sH", packet, 2)
        source = ".".join(str(byte) for byte in packet[12:16])
        head, end = 4 * (packet[0] & 15), int.from_bytes(total, "big") or len(packet)
        body, offset, more = packet[head:end], 8 * (flags & 0x1FFF), bool(flags & 0x2000)
        if not offset and not more:
            return _datagram(t_ns, source, body)
        whole = self._add((packet[12:20], identity), offset, body, more)
        return None if whole is None else _datagram(t_ns, source, whole)

    def _add(self, key: tuple[bytes, bytes], offset: int, body: bytes, more: bool) -> bytes | None:
        parts = self._parts.setdefault(key, {})
        if offset == 0 and 0 in parts:  # the number is used again: what was begun under it will not be whole
            self._given_up += 1
            parts.clear()
            self._ends.pop(key, None)
        parts[offset] = body
        if not more:
            self._ends[key] = offset + len(body)
        if sum(map(len, parts.values())) == self._ends.get(key):
            del self._parts[key], self._ends[key]
            return b"".join(body for _, body in sorted(parts.items()))
        if len(self._parts) > _MOST_PARTS:
            oldest = next(iter(self._parts))
            del self._parts[oldest]
            self._ends.pop(oldest, None)
            self._given_up += 1
        return None


def _ipv6(address: bytes) -> str:
    return ":".join(address[at : at + 2].hex() for at in range(0, 16, 2))


def _datagram(t_ns: int, source: str, udp: bytes) -> Datagram:
    _, port, size = struct.unpack_from(">3H", udp)
    if size < 8 or len(udp) < size:  # captured only in part
        raise ValueError("a datagram that is cut off")
    return Datagram(t_ns, source, port, udp[8:size])
