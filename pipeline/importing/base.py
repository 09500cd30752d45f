"""What every importer gives, and how its tracks become one session on one clock.

An importer opens a foreign file as named tracks. A track yields pieces in order of time, stamped on the file's own
clock; here they get their session time (0 is the earliest capture of all tracks), sequence numbers and bounds. Tracks
are merged lazily, so memory does not grow with the file.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterator
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


class Piece(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One message to be, on the file's clock (ns). ``data`` and times are as in ``pipeline.messages``."""

    layout: Layout
    data: Any
    t_ns: int
    end_ns: int
    t_device_ns: int
    uncertainty_ns: int = 0


@dataclass
class Opened:
    """An opened file: its tracks by stream name, and what is known about it."""

    tracks: dict[str, Iterator[Piece]]
    unix_ns: int = 0
    """Unix time of the file clock's 0, or 0 where unknown."""
    zero_ns: int = 0
    """What a player shows as 0:00, on the file's clock; labels refer to it."""
    facts: dict[str, str] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)
    """What could not be taken over, by reason; filled while the tracks run."""
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
    """Tracks on the session clock. ``origin_ns``: where the session's 0 lies on the file's clock."""

    opened: Opened
    origin_ns: int
    _tracks: dict[str, Iterator[Piece]]

    @classmethod
    def of(cls, opened: Opened, path: Path) -> Session:
        """Looks at the first piece of each track to find the earliest capture. RecordingError if there is none."""
        firsts: dict[str, Piece] = {}
        for stream, track in opened.tracks.items():
            first = next(track, None)
            if first is not None:
                firsts[stream] = first
        if not firsts:
            raise RecordingError(f"{path} holds no picture, sound or motion that can be imported")
        tracks = {stream: _with_first(first, opened.tracks[stream]) for stream, first in firsts.items()}
        return cls(opened, min(first.t_ns for first in firsts.values()), tracks)

    def messages(self) -> Iterator[Message]:
        """All messages in order of the end of their capture, which stands in for their arrival."""
        return heapq.merge(
            *(self._number(stream, track) for stream, track in self._tracks.items()),
            key=lambda message: message.header.t_end_ns,
        )

    def _number(self, stream: str, track: Iterator[Piece]) -> Iterator[Message]:
        seq, free_ns = 0, 0
        for piece in track:
            start, end = piece.t_ns - self.origin_ns, piece.end_ns - self.origin_ns
            if start < free_ns:
                self.opened.dropped[f"{stream} out of order"] += 1
                continue
            free_ns = end if isinstance(piece.layout, AudioLayout) else end + 1
            header = Header(
                stream=stream,
                seq=seq,
                epoch=0,
                t_capture_ns=start,
                t_end_ns=end,
                bound_ns=free_ns,
                t_receipt_ns=end,
                t_device_ns=piece.t_device_ns,
                uncertainty_ns=piece.uncertainty_ns,
                layout=piece.layout,
            )
            seq += 1
            yield Message(header, piece.data)


def _with_first(first: Piece, rest: Iterator[Piece]) -> Iterator[Piece]:
    yield first
    yield from rest
