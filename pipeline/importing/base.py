"""What every importer gives, and how its tracks become one session on one clock.

An importer opens a foreign file as named tracks. A track yields pieces in order of time, stamped on the file's own
clock; here they get their session time (0 is the earliest capture of all tracks), sequence numbers and bounds. Tracks
are merged lazily, so memory does not grow with the file. A file in which the streams lie mixed (a bag) gives them so.

What is not taken over is said: ``left_out`` names what nobody here can take over, which is no loss of the session's;
``dropped`` counts what a stream lost on the way, and a session that lost something is not complete.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from pipeline.errors import RecordingError
from pipeline.messages import AudioLayout, Header, Layout, Message


class ImportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to take a file over."""

    jpeg_quality: int | None = 85
    """Pictures are compressed once, here, with this quality; None keeps them raw (bgr8)."""
    max_width: int | None = None
    """Wider pictures are scaled down to it; None keeps their size."""
    block_ms: int = 20
    imu_batch_ms: int = 50
    camera: str = "camera"
    microphone: str = "microphone"
    imu: str = "imu"
    """The streams' names."""
    streams: tuple[str, ...] = ()
    """Which streams to take, by their names here or in the file, each with ``NEW=`` before it if it is to be called
    otherwise; all of them if empty."""
    metadata: Path | None = None
    """What a LiDAR's capture cannot be read without: an Ouster's metadata; by default the JSON file beside it."""
    times: Path | None = None
    """The CSV with the times of a folder's pictures; by default the one in the folder."""


class Piece(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One message to be, on the file's clock (ns). ``data`` and times are as in ``pipeline.messages``."""

    layout: Layout
    data: Any
    t_ns: int
    end_ns: int
    t_device_ns: int | None
    uncertainty_ns: int = 0
    arrival_ns: int | None = None
    """When a recorder received it, on the file's clock; the end of the capture where the file knows none."""
    new_epoch: bool = False
    """The device's clock jumped or restarted before it."""


def arrival_of(piece: Piece) -> int:
    """When the piece arrived, or what stands in for it."""
    return piece.end_ns if piece.arrival_ns is None else piece.arrival_ns


@dataclass
class Opened:
    """An opened file: its tracks by stream name, and what is known about it."""

    tracks: dict[str, Iterator[Piece]] = field(default_factory=dict)
    """Streams that can be read each by itself."""
    mixed: Iterator[tuple[str, Piece]] | None = None
    """Instead of ``tracks``: all streams at once, in order of arrival."""
    origin_ns: int = 0
    """With ``mixed``: its earliest capture."""
    arrives: bool = False
    """Whether the file knows when its pieces arrived."""
    unix_ns: int | None = None
    """Unix time of the file clock's 0; None where unknown."""
    zero_ns: int = 0
    """What a player shows as 0:00, on the file's clock; labels refer to it."""
    facts: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    """What was lost on the way, by what it is; filled while the tracks run."""
    left_out: list[str] = field(default_factory=list)
    """What is not taken over at all and why, one sentence each, without a full stop."""
    close: Callable[[], None] = lambda: None


class Importer(Protocol):
    """One kind of file."""

    name: str

    def accepts(self, path: Path) -> bool:
        """Whether this importer knows such a file, from its name or its first bytes."""

    def open(self, path: Path, options: ImportOptions) -> Opened:
        """Raises RecordingError if the file cannot be read."""


@dataclass
class Session:
    """Pieces on the session clock. ``origin_ns``: where the session's 0 lies on the file's clock."""

    opened: Opened
    origin_ns: int
    _pieces: Iterator[tuple[str, Piece]]

    @classmethod
    def of(cls, opened: Opened, path: Path) -> Session:
        """Looks at the first piece of each track to find the earliest capture. RecordingError if there is none."""
        if opened.mixed is not None:
            return cls(opened, opened.origin_ns, opened.mixed)
        firsts: dict[str, Piece] = {}
        for stream, track in opened.tracks.items():
            first = next(track, None)
            if first is not None:
                firsts[stream] = first
        if not firsts:
            raise RecordingError(f"{path} holds no picture, sound or motion that can be imported{_why(opened)}")
        tracks = (_named(stream, first, opened.tracks[stream]) for stream, first in firsts.items())
        merged = heapq.merge(*tracks, key=lambda entry: arrival_of(entry[1]))
        return cls(opened, min(first.t_ns for first in firsts.values()), merged)

    def messages(self) -> Iterator[Message]:
        """All messages in order of arrival. Their receipt is the arrival."""
        streams: defaultdict[str, _Numbers] = defaultdict(_Numbers)
        for stream, piece in self._pieces:
            numbers = streams[stream]
            start, end = piece.t_ns - self.origin_ns, piece.end_ns - self.origin_ns
            if start < numbers.free_ns:
                self.opened.dropped[f"{stream} out of order"] += 1
                continue
            if piece.new_epoch and numbers.seq:
                numbers.epoch, numbers.seq = numbers.epoch + 1, 0
            numbers.free_ns = end if isinstance(piece.layout, AudioLayout) else end + 1
            header = Header(
                stream=stream,
                seq=numbers.seq,
                epoch=numbers.epoch,
                t_capture_ns=start,
                t_end_ns=end,
                bound_ns=numbers.free_ns,
                t_receipt_ns=arrival_of(piece) - self.origin_ns,
                t_device_ns=piece.t_device_ns,
                uncertainty_ns=piece.uncertainty_ns,
                layout=piece.layout,
            )
            numbers.seq += 1
            yield Message(header, piece.data)


@dataclass
class _Numbers:
    """Where a stream is: its epoch, the next number in it, and the end of what it has taken."""

    epoch: int = 0
    seq: int = 0
    free_ns: int = 0


def _why(opened: Opened) -> str:
    reasons = opened.left_out + [f"{count} {what}" for what, count in sorted(opened.dropped.items())]
    return f": {'; '.join(reasons)}" if reasons else ""


def _named(stream: str, first: Piece, rest: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
    yield stream, first
    for piece in rest:
        yield stream, piece
