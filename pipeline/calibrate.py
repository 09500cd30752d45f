"""The constant offset between two streams of a recording, found from events that both have seen, or a plain refusal.

``compare`` brings two streams down to tracks (``pipeline.events``) and slides one over the other. The score of a lag
is the correlation of the tracks, summed over the kinds of tracks that go together; it is weighted by how much of them
overlaps, so that a few moments at the edge cannot win. Its greatest value within the range asked for is taken for the
offset only if everything below holds, and else the answer is "undecidable", with the first reason why:

1. there is enough: ``MIN_OVERLAP_S`` of both streams, and the score comes from at least ``MIN_PLACES`` places of the
   recording (one clap and one door are no evidence);
2. it is no chance: among ``SURROGATES`` surrogates, in which pieces of one stream are shuffled so that events stay what
   they are and only their moments are lost, less than 1 in 100 reaches such a score anywhere in the range;
3. it is alone: no other lag, also beyond the range up to three times as far, comes near it. Steps, music and a swinging
   pendulum fit at every period, and an offset beyond the range is not to be taken for what happens to lie in it;
4. all parts of the recording say the same: in bootstrap samples of its segments the best lag stays where it is;
5. the 95 % interval, which comes from the same bootstrap, is narrow enough to be of use.

**Sign.** ``offset_ns`` is what must be *added* to the capture times of ``stream`` so that its events coincide with
those of ``reference``: a stream that is stamped 80 ms late gets -80 ms. It is what a rig takes as ``offset_ms``.

What no correlation can tell apart stands in the offset: the way of sound through air (3 ms a metre), the middle of a
motion against the beginning of its sound. Everything is deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pipeline.errors import ConfigError, WireError
from pipeline.events import Array, Track, extractor
from pipeline.recording import RecordingReader, reading
from pipeline.strict import listed, nearest

WITHIN_NS = 500_000_000
"""How far an offset is looked for, either way."""

MIN_OVERLAP_S = 2.0
MIN_PLACES = 2.5
SURROGATES = 300
CHANCE = 0.01
RIVAL = 0.8
"""A second peak above this share of the first makes the answer ambiguous."""
AGREEMENT = 0.75
WIDEST_NS = 30_000_000
"""A half interval wider than this, and wider than a period of the coarser stream, is of no use; of rotation, which is
smooth, one wider than half of it."""

_BOOTSTRAPS = 500
_FAR = 3
_SEGMENT_S, _SEGMENTS = 0.5, (6, 60)
_CLIP = 6.0
_RIVAL_ANYHOW = 0.9  # rotations with any mounting at all
_BLIND, _BLIND_ROTATION = 0.15, 0.06  # of the coarser period: what lies between two values no repetition tells apart
_PAIRS = (("strength", "strength"), ("level", "strength"), ("strength", "level"), ("rotation", "rotation"))


class Offset(msgspec.Struct, frozen=True, kw_only=True):
    """What can be said of one pair of streams. Where ``decided`` is false, ``offset_ns`` is null."""

    reference: str
    stream: str
    decided: bool
    offset_ns: int | None = None
    """To be added to the capture times of ``stream``."""
    interval_ns: tuple[int, int] | None = None
    """95 % interval of it."""
    reason: str = ""
    """Why it is undecidable."""
    events: tuple[str, ...] = ()
    """What was compared."""
    before: float | None = None
    """Correlation with the times as recorded."""
    after: float | None = None
    """Correlation at the best lag."""
    chance: float | None = None
    """The share of surrogates that reach as high a score."""
    rival: float | None = None
    """The second peak, as a share of the first."""
    places: float | None = None
    """From how many places of the recording the score comes."""

    @property
    def uncertainty_ns(self) -> int | None:
        """Half the interval."""
        return None if self.interval_ns is None else (self.interval_ns[1] - self.interval_ns[0] + 1) // 2


@dataclass(frozen=True)
class _Comparison:
    """Two tracks on a common grid: standardised values [n, c], 0 where unknown, and what is known."""

    x: Array
    y: Array
    x_known: Array
    y_known: Array


def tracks_of(
    recording: str | Path | RecordingReader,
    streams: Collection[str] | None = None,
    progress: Callable[[int], Any] = lambda t_ns: None,
) -> dict[str, list[Track]]:
    """The tracks of every stream of a recording, or of ``streams``; none for streams of text and for damaged frames.
    ``progress`` is called with the session time reached. RecordingError; ConfigError for a stream that is not there."""
    with reading(recording) as reader:
        for name in streams or ():
            if name not in reader.streams:
                raise ConfigError(
                    f"{reader.path} has no stream `{name}`; it has {listed(sorted(reader.streams)) or 'none'}."
                    f"{nearest(name, reader.streams)}"
                )
        found = {n: extractor(p) for n, p in sorted(reader.streams.items()) if streams is None or n in streams}
        takers = {name: taker for name, taker in found.items() if taker is not None}
        for message, _ in reader.messages(set(takers)):
            try:
                takers[message.header.stream].add(message)
            except WireError:  # a frame that cannot be read is a frame that is not there
                continue
            progress(message.header.t_end_ns)
    return {name: takers[name].tracks() if name in takers else [] for name in found}


def calibrate(
    recording: str | Path | RecordingReader,
    streams: Collection[str] | None = None,
    within_ns: int = WITHIN_NS,
    progress: Callable[[int], Any] = lambda t_ns: None,
) -> list[Offset]:
    """Every pair of the recording's streams (or of ``streams``), compared. RecordingError, ConfigError."""
    tracks = tracks_of(recording, streams, progress)
    return [compare(a, tracks[a], b, tracks[b], within_ns) for a, b in combinations(tracks, 2)]


def compare(
    reference: str, of_reference: list[Track], stream: str, of_stream: list[Track], within_ns: int = WITHIN_NS
) -> Offset:
    """The offset of ``stream`` against ``reference``. Of several ways to compare them the decided ones must agree; the
    one with the narrowest interval is taken."""
    found = [_compare(reference, stream, pairs, within_ns) for pairs in _ways(of_reference, of_stream) if pairs]
    if not found:
        without = " and ".join(n for n, t in ((reference, of_reference), (stream, of_stream)) if not t)
        reason = (
            f"{without} holds nothing that could be compared" if without else "they have no kind of event in common"
        )
        return Offset(reference=reference, stream=stream, decided=False, reason=reason)
    decided = sorted((f for f in found if f.decided), key=lambda f: f.uncertainty_ns or 0)
    if not decided:
        return min(found, key=lambda f: 1.0 if f.chance is None else f.chance)
    for other in decided[1:]:
        apart = abs((decided[0].offset_ns or 0) - (other.offset_ns or 0))
        if apart > (decided[0].uncertainty_ns or 0) + (other.uncertainty_ns or 0) + WIDEST_NS:
            reason = (
                f"{' and '.join(decided[0].events)} say {_ms(decided[0].offset_ns)}, "
                f"but {' and '.join(other.events)} say {_ms(other.offset_ns)}"
            )
            return msgspec.structs.replace(decided[0], decided=False, offset_ns=None, interval_ns=None, reason=reason)
    return decided[0]


def _ways(of_x: list[Track], of_y: list[Track]) -> list[list[tuple[Track, Track]]]:
    """Pairs of tracks to be compared together: those of events, and those of rotation."""
    pairs = [(x, y) for x in of_x for y in of_y if (x.kind, y.kind) in _PAIRS]
    coarse = any("picture" in t.what or "surroundings" in t.what for t in (*of_x, *of_y))
    # Loudness helps where the other side is slow; beside a sharp jolt it would only blur.
    events = [p for p in pairs if p[0].kind != "rotation" and (coarse or "level" not in (p[0].kind, p[1].kind))]
    return [events, [p for p in pairs if p[0].kind == "rotation"]]


# -- one way of comparing ----------------------------------------------------------------------------------------------


def _compare(reference: str, stream: str, pairs: list[tuple[Track, Track]], within_ns: int) -> Offset:
    """The second stream against the first; of rotation always that with more axes against that with fewer. What is
    fitted is then the whole motion to a part of it that a camera sees: the other way round, the axis that it does not
    see and the noise of its picture would stay in the rest, and pull at the lag."""
    first, second = pairs[0] if pairs else (None, None)
    if first is None or second is None or first.kind != "rotation":
        return _compare_directed(reference, stream, pairs, within_ns)
    if first.value.shape[1] <= second.value.shape[1]:
        return _compare_directed(reference, stream, pairs, within_ns)
    found = _compare_directed(stream, reference, [(y, x) for x, y in pairs], within_ns, turned=True)
    low, high = found.interval_ns or (0, 0)
    return msgspec.structs.replace(
        found,
        reference=reference,
        stream=stream,
        events=tuple(dict.fromkeys(f"{x.what} / {y.what}" for x, y in pairs)),
        offset_ns=None if found.offset_ns is None else -found.offset_ns,
        interval_ns=None if found.interval_ns is None else (-high, -low),
    )


def _compare_directed(
    reference: str, stream: str, pairs: list[tuple[Track, Track]], within_ns: int, turned: bool = False
) -> Offset:
    """One way round; ``turned``: what is asked for is the other."""
    events = tuple(dict.fromkeys(f"{x.what} / {y.what}" for x, y in pairs))
    span_ns = max(max(x.span_ns, y.span_ns) for x, y in pairs)
    step_ns = 1_000_000 if span_ns <= 12_000_000 else 2_000_000

    def refused(reason: str, **known: Any) -> Offset:
        return Offset(reference=reference, stream=stream, decided=False, reason=reason, events=events, **known)

    grid = _grid([track for pair in pairs for track in pair], step_ns)
    gridded = [on_grid for x, y in pairs if (on_grid := _gridded(x, y, grid, step_ns)) is not None]
    overlap_s = min((int((g.x_known & g.y_known).sum()) * step_ns / 1e9 for g in gridded), default=0.0)
    if not gridded or overlap_s < MIN_OVERLAP_S:
        return refused(f"only {overlap_s:.1f} s of both overlap, and {MIN_OVERLAP_S:g} s are needed")
    if any(not g.x.any() or not g.y.any() for g in gridded):
        return refused("nothing changes in one of them")
    within = round(within_ns / step_ns)
    scores = _Scores(gridded, min(_FAR * within, len(gridded[0].x) - 1), round(_SEGMENT_S * 1e9 / step_ns))
    curve = scores.total()
    inside = np.abs(scores.lags) <= within
    best = int(np.argmax(np.where(inside, curve, -np.inf)))
    if curve[best] <= 0:
        return refused("what happens in one has nothing to do with what happens in the other")
    rng = np.random.default_rng(7)
    null = scores.surrogates(within, rng)
    lobe = _lobe(curve, best, round(span_ns / step_ns))
    rival = max(float(np.delete(curve, lobe).max(initial=0.0)), 0.0) / float(curve[best])
    if pairs[0][0].kind == "rotation" and rival < _RIVAL_ANYHOW:
        # Two sensors are mounted in one way only: what fits at another lag must fit with the same mounting.
        mounted = scores.mounted(best)
        rival = max(float(np.delete(mounted, lobe).max(initial=0.0)), 0.0) / float(mounted[best])
    weights = scores.samples(rng, _BOOTSTRAPS)
    moved = scores.lags[0] + np.argmax(np.where(inside, scores.resampled(best, weights), -np.inf), axis=1)
    reach = round(max(2.0 * WIDEST_NS, 0.75 * span_ns) / step_ns)
    near = np.abs(moved - scores.lags[best]) <= reach
    whole, *spots = scores.refined(best, reach, np.concatenate([np.ones((1, weights.shape[1])), weights[near]]))
    lag = float(whole)
    places = scores.places(best)
    half_ns = np.inf
    if near.any():
        blind_ns = max(span_ns * (_BLIND_ROTATION if pairs[0][0].kind == "rotation" else _BLIND), 500_000)
        half_ns = float(np.hypot(_half_interval(np.array(spots), lag, places) * step_ns, blind_ns))
    chance = (1 + int((null >= curve[best]).sum())) / (1 + len(null))
    zero = int(np.searchsorted(scores.lags, 0))
    known: dict[str, Any] = {
        "before": _round(scores.correlation(curve, zero)), "after": _round(scores.correlation(curve, best)),
        "chance": _round(chance), "rival": _round(rival), "places": round(float(places), 1),
    }  # fmt: skip
    if places < MIN_PLACES:
        return refused(f"too few events: what fits comes from {places:.1f} places of {MIN_PLACES:g} needed", **known)
    if chance > CHANCE:
        return refused(f"chance does as well: {chance:.0%} of shuffled recordings fit as well somewhere", **known)
    beyond = int(scores.lags[int(np.argmax(curve))]) * step_ns
    if abs(beyond) > within_ns + span_ns:
        return refused(f"what fits best lies beyond the range, at {_ms(beyond if turned else -beyond)}", **known)
    if rival > RIVAL:
        return refused(f"another offset fits nearly as well ({rival:.0%}): the events repeat, or are too few", **known)
    if min(best - np.flatnonzero(inside)[0], np.flatnonzero(inside)[-1] - best) * step_ns < 2 * step_ns:
        return refused("what fits best lies at the edge of the range", **known)
    if near.mean() < AGREEMENT:
        return refused(f"parts of the recording disagree: {near.mean():.0%} of its samples say the same", **known)
    widest_ns = WIDEST_NS / 2 if pairs[0][0].kind == "rotation" else max(WIDEST_NS, span_ns)
    if half_ns > widest_ns:
        return refused(f"it would be known only to +-{half_ns / 1e6:.0f} ms", **known)
    offset = -round(lag * step_ns)
    interval = (offset - round(half_ns), offset + round(half_ns))
    return Offset(
        reference=reference, stream=stream, decided=True, offset_ns=offset, interval_ns=interval, events=events, **known
    )


def _half_interval(spots: Array, lag: float, places: float) -> float:
    """Half the 95 % interval from bootstrap estimates: their spread about the estimate, widened as Student's t is for
    few places; never less than a tenth of a step."""
    spread = float(np.sqrt(np.mean((spots - lag) ** 2)))
    free = max(places - 1.0, 1.0)
    return max(spread * (1.96 + 2.4 / free + 3.0 / free**2), 0.1)


def _lobe(curve: Array, best: int, span: int) -> slice:
    """The peak itself: down to half its height on both sides, and at least a span."""
    low = curve < 0.5 * curve[best]
    left, right = np.flatnonzero(low[:best]), np.flatnonzero(low[best:])
    begin = int(left[-1]) if len(left) else 0
    end = best + int(right[0]) if len(right) else len(curve)
    return slice(max(0, min(begin, best - span)), max(end, best + span + 1))


def _vertex(curve: Array, best: int) -> float:
    """The top of the parabola through the greatest value and its neighbours, in steps."""
    if not 0 < best < len(curve) - 1:
        return float(best)
    a, b, c = curve[best - 1 : best + 2]
    bend = a - 2 * b + c
    return best + float(np.clip(0.5 * (a - c) / bend, -0.5, 0.5)) if bend < 0 else float(best)


# -- tracks on a grid --------------------------------------------------------------------------------------------------


def _grid(tracks: list[Track], step_ns: int) -> Array:
    """The moments from the first to the last of all tracks."""
    return np.arange(min(int(t.t_ns[0]) for t in tracks), max(int(t.t_ns[-1]) for t in tracks), step_ns, dtype=np.int64)


def _gridded(x: Track, y: Track, grid: Array, step_ns: int) -> _Comparison | None:
    """Both on one grid, each as coarse as the coarser of them; None where they never overlap."""
    if min(x.t_ns[-1], y.t_ns[-1]) <= max(x.t_ns[0], y.t_ns[0]):
        return None
    span = max(x.span_ns, y.span_ns)
    (x_value, x_known), (y_value, y_known) = (_on(t, grid, step_ns, span) for t in (x, y))
    return _Comparison(_standard(x_value, x_known), _standard(y_value, y_known), x_known, y_known)


def _on(track: Track, grid: Array, step_ns: int, span_ns: float) -> tuple[Array, Array]:
    """A track's values on the grid, smoothed over ``span_ns`` where it is finer than that, and where it is known."""
    after = np.clip(np.searchsorted(track.t_ns, grid), 1, len(track.t_ns) - 1)
    known = (track.t_ns[after] - track.t_ns[after - 1] <= track.max_gap_ns) & (grid >= track.t_ns[0])
    known &= grid <= track.t_ns[-1]
    value = np.stack([np.interp(grid, track.t_ns, channel) for channel in track.value.T], axis=1)
    width = 2 * round(span_ns / step_ns / 2) + 1
    if track.span_ns < 0.7 * span_ns and width > 1 and len(grid) > width:
        value[~known] = 0.0
        sums = np.stack([np.convolve(c, np.ones(width), "same") for c in value.T], axis=1)
        value = sums / np.maximum(np.convolve(known, np.ones(width), "same"), 1.0)[:, None]
    return value, known


def _standard(value: Array, known: Array) -> Array:
    """Mean 0 and power 1 over all channels together where known, else 0; single moments cannot outweigh all."""
    if not known.any():
        return np.zeros_like(value)
    value = value - value[known].mean(axis=0)
    for _ in range(2):
        scale = float(np.sqrt((value[known] ** 2).sum(axis=1).mean()))
        if scale < 1e-12:
            return np.zeros_like(value)
        value = np.clip(value / scale, -_CLIP, _CLIP)
        value = value - value[known].mean(axis=0)
    value[~known] = 0.0
    return value


class _Scores:
    """Correlations of all pairs of tracks at every lag, in whole and by segment.

    ``parts`` [segments, lags, products]: sums of products of x at t and y at t + lag over the t of a segment. One
    channel against one gives a signed score; vectors, whose axes nobody has aligned, the norm of all products."""

    def __init__(self, gridded: list[_Comparison], far: int, segment: int) -> None:
        self._gridded, self._far = gridded, far
        self.lags = np.arange(-far, far + 1)
        n = max(len(g.x) for g in gridded)
        count = int(np.clip(n // segment, *_SEGMENTS))
        self._edges = np.linspace(0, n, count + 1).astype(int)
        self._parts = [self._segments(g) for g in gridded]
        self._overlaps = [self._overlap(g) for g in gridded]

    def _segments(self, g: _Comparison) -> Array:
        far = self._far
        padded = np.pad(g.y, ((far, far), (0, 0)))
        parts = []
        for a, b in pairwise(self._edges):
            x, y = g.x[a:b], padded[a : b + 2 * far]
            parts.append(_products(x, y, 2 * far + 1))
        return np.stack(parts)

    def _overlap(self, g: _Comparison) -> Array:
        """The weight of each lag: by it a sum of products becomes a correlation times the root of the overlap's
        share."""
        known = np.pad(g.y_known.astype(float), self._far)[:, None]
        count = _products(g.x_known.astype(float)[:, None], known, 2 * self._far + 1)[:, 0]
        return np.asarray(1.0 / np.sqrt(np.maximum(count, 0.02 * count.max()) * count.max()))

    def _score(self, sums: list[Array]) -> Array:
        """From summed products [..., lags, products] of each pair of tracks to one score [..., lags]."""
        total: Array = np.zeros(())
        for products, weight in zip(sums, self._overlaps, strict=True):
            one = products[..., 0] if products.shape[-1] == 1 else np.sqrt((products**2).sum(axis=-1))
            total = total + one * weight
        return total / len(sums)

    def total(self) -> Array:
        return self._score([parts.sum(axis=0) for parts in self._parts])

    def correlation(self, curve: Array, at: int) -> float:
        """The plain correlation at a lag, without the weight for its overlap."""
        weight = float(np.mean([w[at] / w.min() for w in self._overlaps]))
        return float(curve[at]) * weight

    def samples(self, rng: np.random.Generator, times: int) -> Array:
        """Bootstrap samples: how often each segment is in each, [times, segments]."""
        segments = len(self._parts[0])
        return rng.multinomial(segments, np.full(segments, 1 / segments), times).astype(float)

    def refined(self, best: int, reach: int, weights: Array) -> Array:
        """The best lag within ``reach`` of ``best`` for each row of ``weights`` [times, segments], to a fraction of a
        step: where the mean square of what the fitted second stream leaves of the first is least. Means over what
        overlaps have no slope of their own, as sums have at the ends."""
        around = np.arange(self.lags[best] - reach, self.lags[best] + reach + 1)
        total: Array = np.zeros(())
        for g in self._gridded:
            y, n = self._fitted(g, best), len(g.x)
            left, count = (np.zeros((len(self._edges) - 1, len(around))) for _ in range(2))
            for i, lag in enumerate(around):
                a, b = max(0, -lag), n - max(0, lag)
                both = np.zeros(n)
                both[a:b] = g.x_known[a:b] & g.y_known[a + lag : b + lag]
                rest = np.zeros(n)
                rest[a:b] = ((g.x[a:b] - y[a + lag : b + lag]) ** 2).sum(axis=1)
                left[:, i] = np.add.reduceat(rest * both, self._edges[:-1])
                count[:, i] = np.add.reduceat(both, self._edges[:-1])
            total = total - (weights @ left) / np.maximum(weights @ count, 1.0)
        return np.array([_vertex(one, int(np.argmax(one))) for one in total]) + float(around[0])

    def resampled(self, best: int, weights: Array) -> Array:
        """How well each row of ``weights`` [times, segments] fits at every lag, [times, lags].

        A segment's products alone do not peak at the true lag, but where the other stream is strong: what enters at one
        end of a segment leaves at the end of its neighbour. Least squares do: the second stream is fitted to the first
        at the best lag, and a segment tells how much of its power that explains at each lag."""
        total: Array = np.zeros(())
        for g, overlap in zip(self._gridded, self._overlaps, strict=True):
            total = total + weights @ self._explained(g, best, overlap / overlap[best]) * overlap[best]
        return total

    def _fitted(self, g: _Comparison, best: int) -> Array:
        """The second stream as the least squares' picture of the first at a lag: [n, channels of the first]."""
        lag, n = int(self.lags[best]), len(g.x)
        x, y = g.x[max(0, -lag) : n - max(0, lag)], g.y[max(0, lag) : n - max(0, -lag)]
        gram = y.T @ y
        return np.asarray(g.y @ np.linalg.solve(gram + 1e-3 * np.trace(gram) * np.eye(len(gram)), y.T @ x))

    def mounted(self, best: int) -> Array:
        """The score at every lag with the second stream turned and scaled as fits best at one."""
        total: Array = np.zeros(())
        for g, overlap in zip(self._gridded, self._overlaps, strict=True):
            fitted: Array = np.pad(self._fitted(g, best), ((self._far, self._far), (0, 0)))
            channels = [[c] for c in range(g.x.shape[1])]
            products = [_products(g.x[:, c], fitted[:, c], len(self.lags))[:, 0] for c in channels]
            total = total + np.sum(products, axis=0) * overlap
        return total

    def _explained(self, g: _Comparison, best: int, weight: Array) -> Array:
        """The product less half the power of the fitted second stream, by segment and lag."""
        far, lags = self._far, np.arange(2 * self._far + 1)
        fitted: Array = np.pad(self._fitted(g, best), ((far, far), (0, 0)))
        power = np.concatenate([[0.0], np.cumsum((fitted**2).sum(axis=1))])
        rows = []
        for a, b in pairwise(self._edges):
            channels = [[c] for c in range(g.x.shape[1])]
            products = [_products(g.x[a:b, c], fitted[a : b + 2 * far, c], len(lags))[:, 0] for c in channels]
            rows.append(np.sum(products, axis=0) * weight - 0.5 * (power[b + lags] - power[a + lags]))
        return np.stack(rows)

    def places(self, best: int) -> float:
        """How many segments the score at a lag comes from, counted by how much each gives (inverse participation)."""
        gives: Array = np.zeros(())
        for parts, weight in zip(self._parts, self._overlaps, strict=True):
            at = parts[:, best, :]
            whole = at.sum(axis=0)
            gives = gives + (at @ whole) / max(float(np.linalg.norm(whole)), 1e-12) * weight[best]
        positive = np.maximum(gives, 0.0)
        return float(positive.sum() ** 2 / max(float((positive**2).sum()), 1e-30))

    def surrogates(self, within: int, rng: np.random.Generator) -> Array:
        """The greatest score within the range of each of ``SURROGATES`` recordings in which pieces of the second stream
        are shuffled."""
        n = max(len(g.x) for g in self._gridded)
        size = _fast(n + 2 * within)
        spectra = [np.conj(np.fft.rfft(g.x, size, axis=0)) for g in self._gridded]
        near = slice(self._far - within, self._far + within + 1) if within <= self._far else slice(None)
        within = min(within, self._far)
        greatest = []
        for _ in range(SURROGATES):
            order = _shuffled(n, within, rng)
            sums = []
            for g, spectrum in zip(self._gridded, spectra, strict=True):
                moved = np.fft.rfft(g.y[order], size, axis=0)
                product = (spectrum[:, :, None] * moved[:, None, :]).reshape(len(moved), -1)
                back = np.fft.irfft(product, size, axis=0)
                sums.append(np.concatenate([back[size - within :], back[: within + 1]]))
            score: Array = np.zeros(())
            for products, weight in zip(sums, self._overlaps, strict=True):
                one = products[:, 0] if products.shape[1] == 1 else np.sqrt((products**2).sum(axis=1))
                score = score + one * weight[near]
            greatest.append(float(score.max()) / len(sums))
        return np.array(greatest)


def _products(x: Array, y: Array, lags: int) -> Array:
    """Sums over t of x[t] y[t + lag], lag 0 ... lags - 1, for all pairs of channels, [lags, pairs]."""
    size = _fast(len(y))
    product = np.conj(np.fft.rfft(x, size, axis=0))[:, :, None] * np.fft.rfft(y, size, axis=0)[:, None, :]
    return np.asarray(np.fft.irfft(product.reshape(len(product), -1), size, axis=0)[:lags])


def _fast(n: int) -> int:
    """A length of at least ``n`` for which FFTs are fast."""
    power = 1 << max(0, (n - 1).bit_length())
    return min(m for m in (power, power // 4 * 3, power // 8 * 5) if m >= n)


def _shuffled(n: int, within: int, rng: np.random.Generator) -> Array:
    """Indices 0 ... n - 1 in pieces whose order is lost: turned by a random amount first, so that the cuts lie
    elsewhere each time, and each piece either way round."""
    pieces = int(np.clip(n / max(1, within) * 1.25, 5, 60))
    cuts = np.sort(rng.choice(np.arange(1, n), pieces - 1, replace=False))
    turned = np.roll(np.arange(n), int(rng.integers(n)))
    parts = np.split(turned, cuts)
    mixed = [parts[i][::-1] if rng.random() < 0.5 else parts[i] for i in rng.permutation(len(parts))]
    return np.concatenate(mixed)


def _round(value: float) -> float:
    return round(float(value), 4)


def _ms(ns: float | None) -> str:
    return "–" if ns is None else f"{ns / 1e6:+.1f} ms"


# -- what it means for a rig -------------------------------------------------------------------------------------------


class Correction(msgspec.Struct, frozen=True, kw_only=True):
    """What is to be added to the capture times of one stream."""

    offset_ns: int
    uncertainty_ns: int
    by: str | None = None
    """The stream over which it was found, where the reference itself could not be compared with it."""


class Solution(msgspec.Struct, frozen=True, kw_only=True):
    """Corrections by stream, against ``reference``; without one where nothing is decided or the pairs contradict each
    other."""

    reference: str | None = None
    corrections: dict[str, Correction] = {}
    contradiction: str = ""


def solve(pairs: Collection[Offset], reference: str | None = None) -> Solution:
    """From pairs to one correction a stream. Without a ``reference`` it is the stream that is stamped earliest, so that
    no correction moves a stream into the future."""
    known: dict[tuple[str, str], tuple[int, int]] = {}
    for pair in pairs:
        if pair.offset_ns is not None and pair.uncertainty_ns is not None:
            known[pair.reference, pair.stream] = (pair.offset_ns, pair.uncertainty_ns)
            known[pair.stream, pair.reference] = (-pair.offset_ns, pair.uncertainty_ns)
    names = sorted({name for pair in known for name in pair})
    for a, b, c in combinations(names, 3):
        if (a, b) in known and (b, c) in known and (a, c) in known:
            apart = known[a, b][0] + known[b, c][0] - known[a, c][0]
            if abs(apart) > known[a, b][1] + known[b, c][1] + known[a, c][1]:
                said = f"{a} to {b} and {b} to {c} add up to {abs(apart) / 1e6:.0f} ms beside {a} to {c}"
                return Solution(contradiction=said)
    if reference is not None:
        return Solution(reference=reference, corrections=_against(reference, names, known))
    found = {name: _against(name, names, known) for name in names}
    if not found:
        return Solution()
    first = max(found, key=lambda name: (len(found[name]), -max(c.offset_ns for c in found[name].values()), name))
    return Solution(reference=first, corrections=found[first])


def _against(reference: str, names: list[str], known: dict[tuple[str, str], tuple[int, int]]) -> dict[str, Correction]:
    """Directly where that was decided, else over the one stream between that leaves it least uncertain."""
    found = {}
    for name in names:
        if name == reference:
            continue
        if (reference, name) in known:
            offset, uncertainty = known[reference, name]
            found[name] = Correction(offset_ns=offset, uncertainty_ns=uncertainty)
            continue
        over = [n for n in names if (reference, n) in known and (n, name) in known]
        if over:
            by = min(over, key=lambda n: known[reference, n][1] + known[n, name][1])
            (first, a), (second, b) = known[reference, by], known[by, name]
            found[name] = Correction(offset_ns=first + second, uncertainty_ns=a + b, by=by)
    return found
