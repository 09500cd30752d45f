"""What a ring of recordings could not write while its disk was full, so that it can be stated once there is room.

Beside the counts it keeps little, however long that lasts: of each stream and epoch one range of numbers, and one of
windows and of predictions, for all that came meanwhile is lost; and labels, which are few, for later.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import msgspec

from pipeline.messages import Header
from pipeline.recording.schemas import GAP_TOPIC, MANIFEST_TOPIC, PREDICTION_TOPIC
from pipeline.recording.writer import LostMessages
from pipeline.steps import Gap

NO_ROOM = "no room was left on the disk"
"""Why messages and windows are lost."""
_UNWRITTEN = f"{NO_ROOM} for predictions"
"""The same of predictions, which would else be taken for those that died with a node (``pipeline.verify``)."""


class Json(NamedTuple):
    """A JSON object that was to be recorded; times are session time."""

    topic: str
    data: bytes
    log_ns: int
    publish_ns: int | None


Item = Header | Json
"""What was to be recorded: of a message or a beat its header."""


class _Step(msgspec.Struct):
    step: int


class _Window(msgspec.Struct):
    index: int


class _Prediction(msgspec.Struct):
    window: _Window


class _Range(msgspec.Struct):
    """Of a gap record what it is about."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    of: str = "window"
    stream: str | None = None
    epoch: int = 0


class Losses:
    """Counts and ranges of what was lost, over all times without room."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        """By stream."""
        self.beats = self.windows = self.predictions = 0
        self.times = 0
        """How often there was no room."""
        self.from_ns: int | None = None
        """The first arrival that was lost, ever."""
        self.until_ns: int | None = None
        """When there was room again, the last time; None while there is none."""
        self._ranges: dict[tuple[str, int], tuple[int, int]] = {}
        self._kept: list[Json] = []
        self._began_ns = 0

    def begin(self, now_ns: int) -> None:
        """There is no room any more, and nothing that came at ``now_ns`` or later is recorded."""
        self.times += 1
        self.from_ns = now_ns if self.from_ns is None else self.from_ns
        self._began_ns, self.until_ns = now_ns, None

    def take(self, item: Item) -> None:
        """Counts what was lost, and notes its number."""
        if isinstance(item, Header):
            if item.is_beat:
                self.beats += 1
            else:
                self.messages[item.stream] += 1
                self._note(item.stream, item.epoch, item.seq, item.seq)
        elif item.topic == MANIFEST_TOPIC:
            self.windows += 1
            step = msgspec.json.decode(item.data, type=_Step).step
            self._note("", 0, step, step)
        elif item.topic == PREDICTION_TOPIC:
            self.predictions += 1
            index = msgspec.json.decode(item.data, type=_Prediction).window.index
            self._note("", 1, index, index)
        elif item.topic == GAP_TOPIC:  # what it names was lost before, and counted then
            gap = msgspec.json.decode(item.data, type=_Range)
            self._note(gap.stream or "", gap.epoch if gap.stream else gap.of == "prediction", gap.first, gap.last)
        else:
            self._kept.append(item)

    def _note(self, stream: str, epoch: int, first: int, last: int) -> None:
        """Of windows the stream is called "", their epoch 0, and that of their predictions 1."""
        known = self._ranges.get((stream, epoch), (first, last))
        self._ranges[stream, epoch] = min(known[0], first), max(known[1], last)

    def end(self, now_ns: int) -> tuple[str, list[Json]]:
        """There is room again: what was lost since ``begin``, in words, and what is to be recorded of it."""
        self.until_ns = now_ns
        records = [self._record(*key, *numbers) for key, numbers in sorted(self._ranges.items())]
        stated = [Json(GAP_TOPIC, msgspec.json.encode(gap), now_ns, None) for gap in records]
        kept = [item._replace(log_ns=now_ns) for item in self._kept]
        self._ranges, self._kept = {}, []
        since = f"from {self._began_ns / 1e9:.1f} s to {now_ns / 1e9:.1f} s of the session"
        return f"nothing was recorded {since}: {NO_ROOM}", stated + kept

    @staticmethod
    def _record(stream: str, epoch: int, first: int, last: int) -> LostMessages | Gap:
        if stream:
            return LostMessages(stream, epoch, first, last, NO_ROOM)
        return Gap(first, last, _UNWRITTEN, "prediction") if epoch else Gap(first, last, NO_ROOM)
