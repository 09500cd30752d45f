"""Which messages of a stream have come, by their numbers, where they may overtake each other."""

from __future__ import annotations

import heapq

from pipeline.messages import Header
from pipeline.rules import FOREVER


class Unordered:
    """Numbers of a stream whose messages may overtake each other: what has come, and which bounds hold already."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._floor = 0  # all numbers below have come
        self._seen: set[int] = set()
        self._known = 0  # numbers below this are known to have been sent
        self._given_up = 0
        self._promises: list[tuple[int, int]] = []  # heap of (numbers needed, bound)

    @property
    def missing(self) -> int:
        """How many numbers are known to have been sent and have not come."""
        return self._known - self._floor - len(self._seen) + self._given_up

    def has(self, seq: int) -> bool:
        return seq < self._floor or seq in self._seen

    def known(self, count: int) -> None:
        self._known = max(self._known, count)

    def come(self, seq: int) -> None:
        if self.has(seq):
            return
        self.known(seq + 1)
        self._seen.add(seq)
        if len(self._seen) > self._limit:  # bounded: the oldest outstanding numbers are given up as lost
            oldest = min(self._seen)
            self._given_up += oldest - self._floor
            self._floor = oldest
        while self._floor in self._seen:
            self._seen.discard(self._floor)
            self._floor += 1

    def promise(self, header: Header) -> None:
        """Takes note of a bound; it holds as soon as nothing below the header's number is outstanding."""
        needed = header.seq if header.layout is None else header.seq + 1
        heapq.heappush(self._promises, (needed, header.bound_ns))
        if len(self._promises) > 2 * self._limit:
            self._promises = heapq.nsmallest(self._limit, self._promises)

    def released(self) -> int:
        """The greatest bound that has come to hold since the last call."""
        best = -FOREVER
        while self._promises and self._promises[0][0] <= self._floor:
            best = max(best, heapq.heappop(self._promises)[1])
        return best
