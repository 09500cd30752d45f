"""Prepared sessions as batches of chunks: which sessions are learnt from, and their steps as tensors.

A chunk is L steps of one session, one after another; from them L - S + 1 windows of S steps can be cut, so that a step
is encoded once for all windows of the chunk that it is in. A window ends with each step that was ever made, the first
included: before a session's first step everything is masked, as it is live. Its truth is the label at its end, or -1.

Data sets larger than memory stream from disk; smaller ones are read once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import msgspec
import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ConfigError, RecordingError
from pipeline.labels import checked
from pipeline.learn.config import SplitEntry
from pipeline.learn.preparing import PreparedSession
from pipeline.recording import Label
from pipeline.replay import Truth
from pipeline.strict import listed

Array = np.ndarray[Any, Any]
MEMORY_BYTES = 3 << 30
"""Data sets up to this size are held in memory."""
_DRAWS = 200


class Labelled(msgspec.Struct):
    """A prepared session and the truth of the window that ends with each step: a label's index, or -1."""

    session: PreparedSession
    truth: Array
    held: dict[str, Array] = {}
    """Its rows, where they are held in memory."""

    def __len__(self) -> int:
        return len(self.truth)

    @property
    def nbytes(self) -> int:
        return sum(4 * len(self) * int(np.prod(rows.shape)) for rows in self.session.rows.values())

    def hold(self) -> None:
        """Reads all rows into memory."""
        self.held = {name: rows.read(0, len(self)) for name, rows in self.session.rows.items()}

    def read(self, name: str, start: int, stop: int) -> Array:
        """Prepared steps [stop - start, ...] of a stream."""
        return self.held[name][start:stop] if self.held else self.session.rows[name].read(start, stop)


class Batch(NamedTuple):
    """Chunks: prepared steps [B, L, ...] and which are present [B, L] (0 or 1) by stream; the truth [B, L] of the
    windows that end there, -1 where there is none or where the chunk does not hold the whole window; which session
    each chunk is of and which of its rows it begins with."""

    prepared: dict[str, Tensor]
    present: dict[str, Tensor]
    truth: Tensor
    places: tuple[tuple[int, int], ...]

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        prepared = {name: value.to(device) for name, value in self.prepared.items()}
        present = {name: value.to(device) for name, value in self.present.items()}
        return Batch(prepared, present, self.truth.to(device), self.places)

    def twice(self) -> Batch:
        """The same chunks, and behind them the same once more."""
        prepared = {name: torch.cat([value, value]) for name, value in self.prepared.items()}
        present = {name: torch.cat([value, value]) for name, value in self.present.items()}
        return Batch(prepared, present, torch.cat([self.truth, self.truth]), self.places * 2)


def labels_of(
    stated: Iterable[Sequence[Label]], labels: tuple[str, ...] | None, ignored: Sequence[str] = ()
) -> tuple[str, ...]:
    """The labels in order: ``labels``, or by default all that occur and are not ``ignored``, sorted."""
    found = {label.label for one in stated for label in one}
    return labels if labels is not None else tuple(sorted(found - set(ignored)))


def label_sessions(
    sessions: Sequence[tuple[PreparedSession, Sequence[Label]]],
    labels: tuple[str, ...] | None,
    ignored: Sequence[str] = (),
) -> tuple[list[Labelled], tuple[str, ...]]:
    """The sessions with their truth, and the labels in order (default: all that occur, sorted). RecordingError,
    naming session and time, for a label that lies outside of its session, and where there is only one label."""
    for session, stated in sessions:
        checked(stated, session.name, end_ns=int(session.end_ns[-1]) + _hop_ns(session))
    names = labels_of([stated for _, stated in sessions], labels, ignored)
    if len(names) < 2:
        raise RecordingError(
            f"the sessions have the label {listed(names) or 'none'} alone, and a model tells labels apart: it needs "
            f"two or more. They are {listed(session.name for session, _ in sessions)}"
        )
    index = {name: i for i, name in enumerate(names)}
    return [Labelled(session, _truth(session, stated, index)) for session, stated in sessions], names


def _hop_ns(session: PreparedSession) -> int:
    return int(session.end_ns[0] // max(int(session.step[0]), 1))


def _truth(session: PreparedSession, labels: Sequence[Label], index: Mapping[str, int]) -> Array:
    truth = Truth(labels)
    ends = zip(session.step.tolist(), session.end_ns.tolist(), strict=True)
    return np.array([index.get(truth.at(end) or "", -1) if step >= 0 else -1 for step, end in ends], np.int64)


class Dataset:
    """Labelled sessions, to be read in batches of chunks of ``chunk`` steps for windows of ``steps``."""

    def __init__(self, sessions: Sequence[Labelled], steps: int, chunk: int, labels: tuple[str, ...]) -> None:
        self.sessions, self.steps, self.chunk, self.labels = list(sessions), steps, max(chunk, steps), labels

    @property
    def stride(self) -> int:
        """How many windows a chunk gives."""
        return self.chunk - self.steps + 1

    def counts(self) -> Array:
        """Windows by label, i8 [labels]."""
        counts = np.zeros(len(self.labels), np.int64)
        for session in self.sessions:
            counts += np.bincount(session.truth[session.truth >= 0], minlength=len(self.labels))
        return counts

    def shuffled(self, size: int, rng: np.random.Generator, unlabelled: bool = False) -> Iterator[Batch]:
        """Every labelled window once, in batches of about ``size`` windows: chunks begin anywhere, in any order. With
        ``unlabelled`` every step's window."""
        places = []
        for i, session in enumerate(self.sessions):
            first = -int(rng.integers(self.stride)) if len(session) > self.stride else 0
            places += [(i, end) for end in self._ends(session, first, unlabelled)]
        if not places:
            return
        # In equal parts: a last batch of a few windows would move the weights as far as a whole one, by chance.
        batches = self._batches(len(places), size)
        for part in np.array_split(rng.permutation(len(places)), batches):
            yield self._batch([places[j] for j in part])

    def batches(self, size: int) -> Iterator[tuple[Batch, int]]:
        """Every window of every session once, in order, a session after the other, and the session's index."""
        lots = max(1, round(size / self.stride))
        for i, session in enumerate(self.sessions):
            ends = [(i, end) for end in self._ends(session, 0, True)]
            for at in range(0, len(ends), lots):
                yield self._batch(ends[at : at + lots]), i

    def number_of_batches(self, size: int) -> int:
        """How many batches ``shuffled`` gives, to within one a session."""
        chunks = sum(len(list(self._ends(session, 0, False))) for session in self.sessions)
        return self._batches(chunks, size)

    def _batches(self, chunks: int, size: int) -> int:
        """In how many batches of about ``size`` windows so many chunks are seen."""
        return max(1, round(chunks / max(1, round(size / self.stride))))

    def _ends(self, session: Labelled, first: int, unlabelled: bool) -> Iterator[int]:
        """The rows at which the first window of each chunk ends."""
        for end in range(first, len(session), self.stride):
            if unlabelled or (session.truth[max(end, 0) : end + self.stride] >= 0).any():
                yield end

    def _batch(self, ends: Sequence[tuple[int, int]]) -> Batch:
        places = tuple((i, end - self.steps + 1) for i, end in ends)
        streams = self.sessions[0].session.rows
        prepared = {
            name: torch.from_numpy(np.stack([self._rows(name, rows.shape, *place) for place in places]))
            for name, rows in streams.items()
        }
        present = {
            name: torch.from_numpy(np.stack([
                self._padded(self.sessions[i].session.present[name], start, False) for i, start in places
            ])).float()
            for name in streams
        }  # fmt: skip
        truth = np.stack([self._padded(self.sessions[i].truth, start, -1) for i, start in places])
        truth[:, : self.steps - 1] = -1
        return Batch(prepared, present, torch.from_numpy(truth), places)

    def _rows(self, name: str, shape: tuple[int, ...], i: int, start: int) -> Array:
        session, out = self.sessions[i], np.zeros((self.chunk, *shape), np.float32)
        low, high = max(start, 0), min(start + self.chunk, len(session))
        if high > low:
            out[low - start : high - start] = session.read(name, low, high)
        return out

    def _padded(self, values: Array, start: int, fill: Any) -> Array:
        out = np.full(self.chunk, fill, values.dtype)
        low, high = max(start, 0), min(start + self.chunk, len(values))
        out[low - start : max(high - start, low - start)] = values[low:high]
        return out


def hold_if_small(sessions: Sequence[Labelled]) -> None:
    """Reads the sessions into memory if all of them together fit there."""
    if sum(session.nbytes for session in sessions) <= MEMORY_BYTES:
        for session in sessions:
            session.hold()


# -- splitting -----------------------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Which sessions are for what; ``groups`` names the group of each session."""

    train: list[Labelled]
    held_out: list[Labelled]
    test: list[Labelled]
    groups: dict[str, str]

    def lacking(self, labels: tuple[str, ...]) -> dict[str, list[str]]:
        """The labels that no window has, of sessions held out and of those tested on, where there are any sessions."""
        parts = {"held out": self.held_out, "tested on": self.test}
        return {name: absent(part, labels) for name, part in parts.items() if part and absent(part, labels)}


def absent(sessions: Sequence[Labelled], labels: tuple[str, ...]) -> list[str]:
    """The ``labels`` that no window of ``sessions`` has."""
    seen = {int(i) for session in sessions for i in np.unique(session.truth)}
    return [label for i, label in enumerate(labels) if i not in seen]


class _Grouped(Protocol):
    """What of a session decides which group is its."""

    @property
    def name(self) -> str: ...

    @property
    def attributes(self) -> Mapping[str, str]: ...


class _Plan(NamedTuple):
    """How groups are split: the ``groups`` of sessions; which groups are ``fixed`` to a part, which are ``free``, and
    how many of these each part gets."""

    groups: dict[str, str]
    fixed: dict[str, str]
    free: list[str]
    sizes: dict[str, int]


def check_split(sessions: Sequence[_Grouped], entry: SplitEntry) -> None:
    """ConfigError where ``split`` would raise it, which needs no more than what sessions are called."""
    _planned(sessions, entry)


def _planned(sessions: Sequence[_Grouped], entry: SplitEntry) -> _Plan:
    groups = {session.name: _group(session, entry.by) for session in sessions}
    names = sorted(set(groups.values()))
    fixed = {name: part for part in ("held_out", "test") for name in _named(entry, part, names)}
    free = [name for name in names if name not in fixed]
    sizes = {part: _size(getattr(entry, part), len(names)) for part in ("held_out", "test")}
    if sum(sizes.values()) >= len(free):
        raise ConfigError(_too_few(entry, fixed, len(free), sizes))
    return _Plan(groups, fixed, free, sizes)


def _too_few(entry: SplitEntry, fixed: Mapping[str, str], free: int, sizes: Mapping[str, int]) -> str:
    """That the groups do not suffice, and the least that would have to change."""
    many = Counter(fixed.values()) + Counter(sizes)
    what = "session" if entry.by == "session" else f"group by `{entry.by}`"
    if len(fixed) + free != 1:
        what = "sessions" if entry.by == "session" else f"groups by `{entry.by}`"
    said = (
        f"split: {len(fixed) + free} {what} cannot be split in {many['held_out']} held out, {many['test']} tested on "
        "and at least 1 to learn from. "
    )
    if not free:
        return said + "Name fewer under `held_out` and `test`, or record more."
    finer = "" if entry.by == "session" else ", split by something finer"
    if sizes["held_out"] < free:
        least = "`test: 0`, and nothing is said of how good the model is"
    elif sizes["test"] < free:
        least = "`held_out: 0`, and nobody knows how sure the model may be"
    else:
        least = "`held_out: 0` and `test: 0`, and nobody knows how good the model is, and how sure it may be"
    return f"{said}Record more{finer}, or set under `split` {least}."


def split(sessions: Sequence[Labelled], entry: SplitEntry, labels: int) -> Split:
    """The sessions in three parts, whole groups in each. ConfigError where the groups do not suffice."""
    groups, fixed, free, sizes = _planned([session.session for session in sessions], entry)
    names = sorted(set(groups.values()))
    counts = {name: np.zeros(labels) for name in names}
    for session in sessions:
        counts[groups[session.session.name]] += np.bincount(session.truth[session.truth >= 0], minlength=labels)
    chosen = _draw(free, sizes, counts, entry.seed, fixed)
    parts: dict[str, list[Labelled]] = {"train": [], "held_out": [], "test": []}
    for session in sessions:
        parts[chosen[groups[session.session.name]]].append(session)
    return Split(parts["train"], parts["held_out"], parts["test"], groups)


def _group(session: _Grouped, by: str) -> str:
    if by == "session":
        return session.name
    if by not in session.attributes:
        raise ConfigError(
            f"split: {session.name} has no attribute `{by}`; it has "
            f"{listed(sorted(session.attributes)) or 'none'}. Write it into sessions.csv beside the sessions: the "
            f"columns file and {by}, and a line for each session, as `{session.name},…`."
        )
    return session.attributes[by]


def _named(entry: SplitEntry, part: str, names: Sequence[str]) -> Sequence[str]:
    stated = getattr(entry, part)
    if not isinstance(stated, tuple):
        return ()
    for name in stated:
        if name not in names:
            raise ConfigError(f"split.{part}: `{name}` is no value of `{entry.by}`; there are {listed(names)}.")
    return stated


def _size(part: Any, groups: int) -> int:
    return max(1, round(part * groups)) if isinstance(part, float) and part > 0 else 0


def _draw(
    free: list[str], sizes: Mapping[str, int], counts: Mapping[str, Array], seed: int, fixed: Mapping[str, str]
) -> dict[str, str]:
    """Group -> part: of some random draws the one whose parts have the labels in the most equal shares."""
    rng = np.random.default_rng(seed)
    total = np.maximum(sum(counts.values(), np.zeros(1)), 1e-9)
    best: tuple[float, dict[str, str]] | None = None
    for _ in range(_DRAWS if any(sizes.values()) else 1):
        order = [free[i] for i in rng.permutation(len(free))]
        cut = sizes["held_out"] + sizes["test"]
        parts = dict.fromkeys(order, "train") | dict.fromkeys(order[:cut], "test")
        parts |= dict.fromkeys(order[: sizes["held_out"]], "held_out") | dict(fixed)
        size = Counter(parts.values())
        uneven = 0.0
        for part, n in size.items():
            own = sum((counts[name] for name, its in parts.items() if its == part), np.zeros(1))
            uneven += float(np.abs(own / total - n / len(parts)).sum())
        if best is None or uneven < best[0]:
            best = uneven, parts
    assert best is not None
    return best[1]
