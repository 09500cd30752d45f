"""Blocks of sound from a driver's callback to messages: when each was taken, what is missing, at which rate. Pure.

A sound card only counts. ``BlockClock`` fits the count against the driver's ADC times (``pipeline.timebase``):

* The first blocks after a start are distrusted and dropped; they only show how far ADC times lie in the future (a
  sound server states some that end after they arrived, which cannot be: all are moved back by the most of that, but
  for a single one, which may be a bad stamp).
* An ADC time that is too early is a bad stamp, since nothing is taken before its time: PortAudio gives a few a minute,
  and many in a row on a busy machine. Such a block follows the one before it, and the fit does not see its stamp.
* A block whose ADC time is suddenly late means lost samples, or one bad stamp. It is held back for a few blocks until
  that is sure, so that sound after a gap is never published as if it belonged before it.

``Regroup`` joins small blocks to messages of equal length, never across a gap. ``Converter`` changes the rate where a
device lacks the one that was asked for: band-limited, by the same filter as the aligner's.
"""

from __future__ import annotations

from collections import deque
from math import gcd
from typing import Any

import msgspec
import numpy as np

from pipeline.resample import band_limited, half_taps
from pipeline.timebase import MappedBlock, SampleClock

Array = np.ndarray[Any, Any]

SETTLING_MS = 250
"""So much of the first sound is distrusted."""
_EXPECTED_NS, _SUSPECT_NS = 2_000_000, 3_000_000
_WITHHELD = 100
"""So many early stamps in a row are no fault of stamps: the clock itself was set back."""
_HELD = 8
"""The sample clock needs six late blocks to be sure."""
_NS = 1_000_000_000


class Block(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Sound i2 [samples, channels] with its place on the session clock (first sample, one period after the last).
    ``gap``: it does not follow the block before it. ``t_device_ns``: the driver's ADC time, raw."""

    data: Array
    t_capture_ns: int
    t_end_ns: int
    t_receipt_ns: int
    t_device_ns: int | None
    uncertainty_ns: int
    new_epoch: bool = False
    gap: bool = False


class BlockClock:
    """Places blocks in time. ``rate_hz`` is the device's nominal rate. ``adc``: the driver gives ADC times; else only
    receipts are known. ``settled``: the first blocks are past."""

    def __init__(self, rate_hz: int, adc: bool) -> None:
        self.lost = 0
        self.settled = False
        self._settling = rate_hz * SETTLING_MS // 1000  # samples
        self._rate, self._adc = rate_hz, adc
        self._clock = SampleClock(rate_hz, noise="jitter" if adc else "delay")
        self._first: list[tuple[int, int, int]] = []  # when a block ended and was received, and the count at its end
        self._ahead = self._end = 0
        self._count = self._fed = self._fed_samples = self._withheld = 0
        self._found = 0  # samples that the driver lost without counting them
        self._held: deque[Block] = deque()

    def update(
        self, data: Array, t_adc_ns: int | None, t_device_ns: int | None, t_receipt_ns: int, count: int,
        more: bool = False,
    ) -> list[Block]:  # fmt: skip
        """Takes the next block: its ADC time on the session clock (None: only the receipt counts), the driver's own
        number of its first sample. ``more``: others of the same moment follow; they are all distrusted, or none.
        Returns the blocks whose times are sure, in order; if there are any, the last is this one."""
        samples = len(data)
        length = self._ns(samples)
        end = t_receipt_ns if t_adc_ns is None else t_adc_ns + length
        if not self.settled:
            self._settle(end, t_receipt_ns, count + samples)
            self._settling -= samples
            self.settled = self._settling <= 0 and not more
            return []
        skipped, self._count = count - self._count, count + samples
        begin = self._end + self._ns(skipped) if skipped else self._end
        mapped, found = self._map(end - self._ahead, begin + length, count, samples), 0
        self.lost += max(skipped, 0)
        fresh, doubt = False, _SUSPECT_NS
        if mapped is None:
            self._end = begin + length
        else:
            fresh, doubt, found = mapped.new_epoch, mapped.uncertainty_ns, mapped.lost
            self._found += found
            self.lost += found
            begin, self._end = self._place(mapped, begin, length, fresh or found > 0)
        moved = fresh or found > 0
        block = Block(data=data, t_capture_ns=begin, t_end_ns=self._end, t_receipt_ns=t_receipt_ns,
                      t_device_ns=t_device_ns, uncertainty_ns=doubt, new_epoch=fresh,
                      gap=fresh or skipped > 0)  # fmt: skip
        suspect = mapped is not None and self._adc and mapped.residual_ns > _SUSPECT_NS
        if not (moved or suspect or self._held):
            return [block]
        self._held.append(block)
        if moved:
            return self._moved()
        return [] if suspect and len(self._held) < _HELD else self._release()

    def expects(self, t_adc_ns: int | None, count: int) -> bool:
        """Whether a block with this ADC time and number of its first sample comes as it should, and no other is in
        doubt: such blocks may be joined before they are taken."""
        off = 0 if t_adc_ns is None else t_adc_ns - self._ahead - self._end
        return self.settled and not self._held and count == self._count and abs(off) < _EXPECTED_NS

    def _ns(self, samples: int) -> int:
        return samples * _NS // self._rate

    def _settle(self, end_ns: int, receipt_ns: int, count: int) -> None:
        """Takes one of the first blocks: the middle of the later ones says where the first good block begins."""
        self._first.append((end_ns, receipt_ns, count))
        self._ahead = max(0, sorted(end - receipt for end, receipt, _ in self._first)[-2:][0])
        self._count = self._fed = count
        later = [end + self._ns(count - number) for end, _, number in self._first[len(self._first) // 2 :]]
        self._end = sorted(later)[len(later) // 2] - self._ahead

    def _map(self, end_ns: int, expected_ns: int, count: int, samples: int) -> MappedBlock | None:
        """The sample clock's answer; None where an ADC time is too early to be true, and is withheld from it."""
        if self._adc and end_ns < expected_ns - _SUSPECT_NS and self._withheld < _WITHHELD:
            self._withheld += 1
            return None
        self._withheld = 0
        # One call stands for the withheld blocks as well, and for what the driver itself skipped.
        first = self._fed_samples
        self._fed_samples = count + samples - self._fed + self._found
        return self._clock.update(self._fed_samples - first, end_ns, count=first)

    def _place(self, mapped: MappedBlock, begin_ns: int, length_ns: int, moved: bool) -> tuple[int, int]:
        """A block's begin and end: where the last one ended, unless something is missing. A stamp that is odd would
        squeeze its block and stretch the next; such a block keeps its length."""
        if moved:
            return mapped.t_end_ns - length_ns, mapped.t_end_ns
        odd = abs(mapped.t_end_ns - begin_ns - length_ns) > length_ns // 20
        return begin_ns, begin_ns + length_ns if odd and self._adc else mapped.t_end_ns

    def _release(self) -> list[Block]:
        blocks = list(self._held)
        self._held.clear()
        return blocks

    def _moved(self) -> list[Block]:
        """The held blocks came after what got lost: they end where the newest one begins, not where they seemed to."""
        last = self._held[-1]
        fresh = any(block.new_epoch for block in self._held)
        moved, end = [], last.t_end_ns
        for block in reversed(self._held):
            length = block.t_end_ns - block.t_capture_ns
            moved.append(msgspec.structs.replace(block, t_capture_ns=end - length, t_end_ns=end, gap=False,
                                                 new_epoch=False, uncertainty_ns=last.uncertainty_ns))  # fmt: skip
            end -= length
        moved.reverse()
        moved[0] = msgspec.structs.replace(moved[0], gap=True, new_epoch=fresh)
        self._held.clear()
        return moved


class Regroup:
    """Joins blocks to groups of exactly ``samples`` samples. What stands before a gap goes out as it is."""

    def __init__(self, samples: int) -> None:
        self._samples = samples
        self._parts: list[Block] = []
        self._length = 0

    @property
    def waiting(self) -> int:
        """How many samples wait for the rest of their group."""
        return self._length

    def update(self, block: Block) -> list[Block]:
        """Takes the next block; returns the groups that are full."""
        if not self._parts and len(block.data) == self._samples:
            return [block]
        full = self._flush() if (block.gap or block.new_epoch) and self._parts else []
        self._parts.append(block)
        self._length += len(block.data)
        while self._length >= self._samples:
            full.append(self._cut())
        return full

    def _flush(self) -> list[Block]:
        joined = _join(self._parts)
        self._parts, self._length = [], 0
        return [joined]

    def _cut(self) -> Block:
        last = self._parts[-1]
        excess = self._length - self._samples
        if not excess:
            return self._flush()[0]
        self._parts[-1], rest = split(last, len(last.data) - excess)
        group = _join(self._parts)
        self._parts, self._length = [rest], excess
        return group


def split(block: Block, at: int) -> tuple[Block, Block]:
    """``block`` before and from its sample ``at``."""
    middle = block.t_capture_ns + (block.t_end_ns - block.t_capture_ns) * at // len(block.data)
    first = msgspec.structs.replace(block, data=block.data[:at], t_end_ns=middle)
    rest = msgspec.structs.replace(block, data=block.data[at:], t_capture_ns=middle, new_epoch=False, gap=False)
    return first, rest


def _join(parts: list[Block]) -> Block:
    if len(parts) == 1:
        return parts[0]
    return msgspec.structs.replace(
        parts[0],
        data=np.concatenate([part.data for part in parts]),
        t_end_ns=parts[-1].t_end_ns,
        t_receipt_ns=parts[-1].t_receipt_ns,
        uncertainty_ns=max(part.uncertainty_ns for part in parts),
    )


def mix(data: Array, channels: int) -> Array:
    """i2 [samples, any] as i2 [samples, channels]: the mean for one channel, else the first ones."""
    if data.shape[1] == channels:
        return data
    if channels == 1:
        mean: Array = np.rint(data.mean(axis=1, dtype=np.float64)).astype("<i2")[:, None]
        return mean
    return np.ascontiguousarray(data[:, :channels])


class Converter:
    """Changes the rate of contiguous sound, block by block; times stay where they are. What it gives out lags behind
    by half its filter (2 ms from 48 kHz to 16 kHz at most), in arrival and not in the stated times."""

    def __init__(self, source_hz: int, target_hz: int, channels: int) -> None:
        common = gcd(source_hz, target_hz)
        self._source, self._target = source_hz, target_hz
        self._up, self._down = target_hz // common, source_hz // common
        self._half = half_taps(source_hz, target_hz)
        self._channels = channels
        self._reset()

    def _reset(self) -> None:
        """Silence before the first sample, so that the filter has a left half."""
        self._values = np.zeros((self._half, self._channels))
        self._first = -self._half  # the number of the first kept sample
        self._next = 0  # the number of the next point of the new rate

    def update(self, block: Block) -> Block | None:
        """The sound that became complete with ``block``; None if none did."""
        if block.gap or block.new_epoch:
            self._reset()
        self._values = np.concatenate([self._values, block.data])
        end = self._first + len(self._values)
        stop = max(self._next, -(-((end - self._half) * self._up) // self._down))
        numbers = np.arange(self._next, stop, dtype=np.int64)
        if not len(numbers):
            return None
        points = numbers * self._down - self._first * self._up
        times = np.arange(len(self._values), dtype=np.int64) * self._up
        left = points // self._up
        none = np.empty(0, np.int64)
        values = band_limited(times, self._values, none, left, left + 1, points, self._source, self._target)
        period = (block.t_end_ns - block.t_capture_ns) / len(block.data)
        begin, finish = (
            block.t_end_ns - round((end - number * self._down / self._up) * period) for number in (self._next, stop)
        )
        self._next = stop
        surplus = max(0, stop * self._down // self._up - self._half - self._first)
        self._values, self._first = self._values[surplus:], self._first + surplus
        data = np.clip(np.rint(values), -32768, 32767).astype("<i2")
        return msgspec.structs.replace(block, data=data, t_capture_ns=begin, t_end_ns=finish,
                                       gap=block.gap)  # fmt: skip
