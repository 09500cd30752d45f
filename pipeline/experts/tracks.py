"""Which faces are there, believed from the hits and misses of a detector that is sometimes wrong.

Each track is a two-state hidden Markov chain (this face is there, or it is not). A hit of the detector near the track
and a miss each change the odds by what such a detector does with a face and without one; between steps a little belief
leaks towards change. So one false alarm in passing is soon forgotten, and a face that the detector loses for a step or
two (a blink of the cascade, a hand, a turned head) is held.
"""

from __future__ import annotations

import msgspec

from pipeline.experts.motion import Box

HIT_IF_FACE, HIT_IF_NONE = 0.9, 0.05
"""How often a step has a hit at a track's place when a face is there and when none is."""
LEAVES = 0.02
"""Chance that a face leaves in one step: it bounds belief at about 0.99 and so the hold at about two misses."""
BORN, DEAD = 0.2, 0.1
"""Belief in a track before its first hit counts, and the belief below which it is dropped."""


class Track(msgspec.Struct):
    """One face: where it was seen last, and how surely it is (still) there."""

    box: Box
    belief: float
    seen: bool = True


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(0.0, width) * max(0.0, height)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def _updated(belief: float, hit: bool) -> float:
    stays = belief * (1 - LEAVES)
    if_face, if_none = (HIT_IF_FACE, HIT_IF_NONE) if hit else (1 - HIT_IF_FACE, 1 - HIT_IF_NONE)
    return stays * if_face / (stays * if_face + (1 - stays) * if_none)


class Tracks:
    """At most ``limit`` faces, the surest first."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.all: list[Track] = []

    def update(self, found: list[Box]) -> None:
        """One step's detections, each given to the track that it overlaps most; the rest begin tracks."""
        free = sorted(found, key=lambda box: (-box[2] * box[3], box))
        for track in self.all:
            box = max(free, key=lambda b: overlap(b, track.box), default=None)
            track.seen = box is not None and overlap(box, track.box) > 0.3
            if box is not None and track.seen:
                free.remove(box)
                track.box = box
            track.belief = _updated(track.belief, track.seen)
        self.all += [Track(box, _updated(BORN, True)) for box in free]
        self._drop()

    def wait(self) -> None:
        """A step without a picture: belief leaks, nothing else is known."""
        for track in self.all:
            track.belief *= 1 - LEAVES
            track.seen = False
        self._drop()

    def _drop(self) -> None:
        kept = [track for track in self.all if track.belief >= DEAD]
        self.all = sorted(kept, key=lambda t: (-t.belief, -t.box[2], t.box))[: self._limit]
