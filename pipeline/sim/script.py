"""What happens when: events, decoys and conditions, drawn block by block from the seed. Knows no physics.

A block holds each class once, or twice (``TWICE``), in random order with pauses of ``clear`` between. Then
each sensor gets its own series of decoys, and one series of conditions takes one sensor after the other away. Two acts
of one label keep ``APART_S``, whether events or decoys; acts of different labels overlap freely.
"""

from __future__ import annotations

import msgspec
import numpy as np

from pipeline.sim.cues import BLINDED, CUES, SENSORS, Condition, Label, Sensor

APART_S = 2.0
"""More than a window of 1.5 s, so that none holds two decoys of one label, or a decoy and the event."""
PAUSE_S = (1.8, 3.8)
BETWEEN_DECOYS_S = (1.5, 7.0)
BETWEEN_CONDITIONS_S = (8.0, 24.0)
CONDITION_S = (1.5, 4.0)
LASTS_S: dict[Label, tuple[float, float]] = {
    "rough_ground": (4.5, 7.0),
    "approach": (8.5, 8.5),
    "impact": (2.5, 2.5),
    "alarm": (4.0, 7.0),
    "tilt": (4.0, 7.0),
}
"""How long an act has the stage. What the label says follows from the physics: see ``stage``."""
TWICE: tuple[Label, ...] = ("approach", "impact")
"""The classes that are true for a short time; they come twice in a block."""
OUTAGE = 0.15
"""Share of the conditions that are outages."""


class Act(msgspec.Struct, frozen=True):
    """A cue of ``label`` for the sensors in ``seen_by``: an event if those are all that can observe it, else a decoy.
    Times in s of the simulation; ``seed`` is the act's own."""

    label: Label
    seen_by: tuple[Sensor, ...]
    start_s: float
    end_s: float
    seed: int

    @property
    def real(self) -> bool:
        return self.seen_by == CUES[self.label]


class Spell(msgspec.Struct, frozen=True):
    """A condition that takes ``sensor``'s sight for a while."""

    condition: Condition
    sensor: Sensor
    start_s: float
    end_s: float


class Block(msgspec.Struct, frozen=True):
    """A stretch of the script; acts and spells in order of their starts."""

    acts: tuple[Act, ...]
    spells: tuple[Spell, ...]
    end_s: float


def block(seed: int, index: int, start_s: float) -> Block:
    """The block ``index`` of a seed's script, beginning at ``start_s``."""
    rng = np.random.Generator(np.random.PCG64([seed, 2, index]))
    events, end_s = _events(rng, start_s)
    decoys = _decoys(rng, events, start_s, end_s)
    acts = sorted([*events, *decoys], key=lambda act: act.start_s)
    return Block(tuple(acts), _spells(rng, start_s, end_s), end_s)


def _events(rng: np.random.Generator, start_s: float) -> tuple[list[Act], float]:
    order: list[Label] = [*CUES, *TWICE]
    at, events = start_s, []
    for place in rng.permutation(len(order)):
        label = order[place]
        at += rng.uniform(*PAUSE_S)
        events.append(_act(rng, label, CUES[label], at))
        at = events[-1].end_s
    return events, at + 0.5


def _act(rng: np.random.Generator, label: Label, seen_by: tuple[Sensor, ...], at: float) -> Act:
    return Act(label, seen_by, at, at + rng.uniform(*LASTS_S[label]), int(rng.integers(1 << 31)))


def _decoys(rng: np.random.Generator, events: list[Act], start_s: float, end_s: float) -> list[Act]:
    placed = list(events)
    for sensor in rng.permutation(np.array(SENSORS)):
        labels = [label for label, sensors in CUES.items() if sensor in sensors]
        at = start_s + rng.uniform(0.2, 2.0)
        while at < end_s - APART_S:
            label = labels[rng.integers(len(labels))]
            act = _act(rng, label, (str(sensor),), at)  # type: ignore[arg-type]
            if act.end_s < end_s - APART_S and all(_compatible(act, other) for other in placed):
                placed.append(act)
                at = act.end_s + rng.uniform(*BETWEEN_DECOYS_S)
            else:
                at += 0.4
    return placed[len(events) :]


def _compatible(act: Act, other: Act) -> bool:
    return act.label != other.label or act.start_s > other.end_s + APART_S or other.start_s > act.end_s + APART_S


def _spells(rng: np.random.Generator, start_s: float, end_s: float) -> tuple[Spell, ...]:
    spells = []
    at = start_s + rng.uniform(1.0, BETWEEN_CONDITIONS_S[1])
    while (until := at + rng.uniform(*CONDITION_S)) < end_s:
        if rng.random() < OUTAGE:
            sensor = SENSORS[rng.integers(len(SENSORS))]
            spells.append(Spell("outage", sensor, at, until))
        else:
            condition = list(BLINDED)[rng.integers(len(BLINDED))]
            spells.append(Spell(condition, BLINDED[condition], at, until))
        at = until + rng.uniform(*BETWEEN_CONDITIONS_S)
    return tuple(spells)


class Script:
    """The acts and spells of a seed, without an end: each is handed out once, when its time has come."""

    def __init__(self, seed: int) -> None:
        self._seed, self._index = seed, 0
        self._acts: list[Act] = []
        self._spells: list[Spell] = []
        self._end_s = 0.0

    def begun(self, now_s: float) -> tuple[list[Act], list[Spell]]:
        """What has begun by ``now_s`` since the last call."""
        while self._end_s <= now_s:
            made = block(self._seed, self._index, self._end_s)
            self._index, self._end_s = self._index + 1, made.end_s
            self._acts += made.acts
            self._spells += made.spells
        acts = [act for act in self._acts if act.start_s <= now_s]
        spells = [spell for spell in self._spells if spell.start_s <= now_s]
        self._acts = self._acts[len(acts) :]
        self._spells = self._spells[len(spells) :]
        return acts, spells
