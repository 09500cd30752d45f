"""``sensorium explain --window``: what one window was made of, and in words why something is missing in it."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from pipeline.align import Cause, Manifest, Reason, StreamManifest, Verdict
from pipeline.errors import ConfigError
from pipeline.explain import JITTERY_NS, Heard, Session, waited_for
from pipeline.prediction import Prediction
from pipeline.rules import FOREVER

_CAUSES: dict[str, str] = {
    "proven": "it was final when {streams} had said all that could change it",
    "idle": "it was final when {streams} had been silent for too long to be waited for",
    "deadline": "its time was over; {streams} had not said all",
    "overflow": "too many windows were waiting, for {streams}",
    "end": "it was final at the end of the session",
}


class UsedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """One message that went into a step; times are session time. Null where the recorder lost the message."""

    epoch: int
    seq: int
    t_capture_ns: int | None
    t_end_ns: int | None
    arrival_ns: int | None


class StreamWindow(msgspec.Struct, frozen=True, kw_only=True):
    """One stream in the window's newest step."""

    verdict: Verdict
    reason: Reason | None
    why: str
    """The verdict in words; what fusion could not use, too."""
    coverage: float
    proven: bool
    age_ms: float | None
    uncertainty_ms: float
    messages: list[UsedMessage]


class WindowExplanation(msgspec.Struct, frozen=True, kw_only=True):
    """One window: its newest step, and the prediction from it."""

    session: str
    window: int
    start_ns: int
    end_ns: int
    cause: Cause
    waited_for: list[str]
    wait_ms: float | None
    """How long after its end the step was final; None in event time."""
    why: str
    streams: dict[str, StreamWindow]
    prediction: Prediction | None


def explain_window(session: Session, window: int) -> WindowExplanation:
    """What window ``window`` was made of. ConfigError if the recording does not have it."""
    manifest = next((m for m in session.manifests if m.step == window), None)
    if manifest is None:
        raise ConfigError(f"the recording has no window {window}; {_windows(session)}{_why_lost(session, window)}")
    prediction = session.predictions.get(window)
    names = waited_for(session, manifest)
    masked = {n: r.masked for n, r in prediction.streams.items()} if prediction is not None else {}
    words = _Words(session, manifest)
    return WindowExplanation(
        session=session.info.session,
        window=window,
        start_ns=manifest.start_ns,
        end_ns=manifest.end_ns,
        cause=manifest.cause,
        waited_for=names,
        wait_ms=(manifest.emitted_ns - manifest.end_ns) / 1e6 if session.live else None,
        why=_why(session, manifest, names),
        streams={n: _stream(session, manifest, n, words.of(n, masked.get(n))) for n in sorted(manifest.streams)},
        prediction=prediction,
    )


def _why(session: Session, manifest: Manifest, names: list[str]) -> str:
    if not session.live:
        return "made again by event time, which waits for nothing"
    return _CAUSES[manifest.cause].format(streams=" and ".join(names) or "every stream")


def _windows(session: Session) -> str:
    if not session.manifests:
        return "it has none, for its session ran without a model; name one with --bundle"
    steps = [manifest.step for manifest in session.manifests]
    return f"it has those from {steps[0]} to {steps[-1]}"


def _why_lost(session: Session, window: int) -> str:
    """What the recording says itself of a window that it lacks."""
    for gap in session.gaps:
        if "stream" not in gap and gap.get("of", "window") == "window" and gap["from"] <= window <= gap["to"]:
            return f", but not those from {gap['from']} to {gap['to']}: {gap.get('cause', '')}"
    return ""


def _stream(session: Session, manifest: Manifest, name: str, why: str) -> StreamWindow:
    stated = manifest.streams[name]
    return StreamWindow(
        verdict=stated.verdict,
        reason=stated.reason,
        why=why,
        coverage=stated.coverage,
        proven=stated.proven,
        age_ms=None if stated.newest_ns is None else (manifest.end_ns - stated.newest_ns) / 1e6,
        uncertainty_ms=stated.uncertainty_ns / 1e6,
        messages=list(_used(session.heard.get(name), stated)),
    )


def _used(heard: Heard | None, stated: StreamManifest) -> Iterator[UsedMessage]:
    wanted = {(epoch, seq) for epoch, first, last in stated.used for seq in range(first, last + 1)}
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for epoch, seq, capture_ns, end_ns, _, _, arrival_ns, beat in heard.rows() if heard is not None and wanted else ():
        if not beat and (epoch, seq) in wanted:
            found.setdefault((epoch, seq), (capture_ns, end_ns, arrival_ns))
    for epoch, seq in sorted(wanted):
        capture, end, arrival = found.get((epoch, seq), (None, None, None))
        yield UsedMessage(epoch=epoch, seq=seq, t_capture_ns=capture, t_end_ns=end, arrival_ns=arrival)


class _Words:
    """Why a step holds what it holds, from its manifest, those before it, and the headers around it."""

    def __init__(self, session: Session, manifest: Manifest) -> None:
        self._session, self._manifest = session, manifest
        self._before = [m for m in session.manifests if m.step <= manifest.step]

    def of(self, stream: str, masked: str | None = None) -> str:
        """One stream's verdict in words; ``masked`` is what fusion says of it."""
        stated = self._manifest.streams[stream]
        said = self._verdict(stream, stated)
        return f"{said}; fusion could not use it: {masked.replace('_', ' ')}" if masked else said

    def _verdict(self, stream: str, stated: StreamManifest) -> str:
        if stated.verdict == "ok":
            return "complete" if stated.used else "complete: nothing was to be said"
        if stated.verdict == "partial":
            return self._partial(stream, stated)
        if stated.verdict == "late":
            return f"nothing had come when the step's time was over; {self._next(stream)}"
        match stated.reason:
            case "never_started":
                return self._refused(stream, stated) or f"it had not begun; {self._first(stream)}"
            case "silent":
                return f"silent since {self._last(stream)}"
            case "dead":
                return f"its node was dead; its last message ends at {self._last(stream)}"
            case "out_of_tolerance":
                return self._nearest(stream)
        return self._losses(stream, stated) or self._hole(stream)

    def _partial(self, stream: str, stated: StreamManifest) -> str:
        parts = [f"{stated.coverage:.0%} of it is there"] if stated.coverage < 1 else []
        parts += [lost] if (lost := self._losses(stream, stated)) else []
        if not stated.proven:
            parts.append("more might have come, but its node was dead" if stated.closed == "dead"
                         else "more might have come, but it had fallen silent" if stated.idle
                         else "more might have come, but the step's time was over")  # fmt: skip
        elif not lost and stated.coverage < 1:
            parts.append(self._hole(stream))
        return "; ".join(parts)

    def _losses(self, stream: str, stated: StreamManifest) -> str:
        """What is known to be lost or turned away near the step."""
        start_ns, end_ns = self._manifest.start_ns, self._manifest.end_ns
        reach_ns = end_ns + (end_ns - start_ns) // 2  # the nearest message may lie in the next hop
        known = [m.streams[stream] for m in self._before if stream in m.streams]
        parts = [
            f"lost {_messages(count)} between {_s(first)} and {_s(end)}"
            for one in known for first, end, count in one.losses if first < reach_ns and end > start_ns
        ]  # fmt: skip
        parts += [f"lost {_messages(count)} after {_s(first)}" for first, count in stated.gaps if first < reach_ns]
        parts += [
            f"turned {_messages(count)} away between {_s(first)} and {_s(last)}, for its buffer was full"
            for one in known for first, last, count in one.overflows if first < reach_ns and last >= start_ns
        ]  # fmt: skip
        return " and ".join(parts)

    def _hole(self, stream: str) -> str:
        """The longest stretch without content that touches the step."""
        heard, start_ns, end_ns = self._session.heard.get(stream), self._manifest.start_ns, self._manifest.end_ns
        if heard is None or int(heard["capture_ns"].min()) > start_ns:
            return self._first(stream)
        order = np.argsort(heard["capture_ns"], kind="stable")
        begins = np.maximum.accumulate(heard["end_ns"][order])
        ends = np.append(heard["capture_ns"][order][1:], FOREVER)
        touched = np.minimum(ends, end_ns) - np.maximum(begins, start_ns)
        longest = int(np.argmax(np.where(touched > 0, ends - begins, -1)))
        begin_ns, end_ns = int(begins[longest]), int(ends[longest])
        return (
            f"nothing after {_s(begin_ns)}" if end_ns == FOREVER else f"nothing between {_s(begin_ns)} and {_s(end_ns)}"
        )

    def _nearest(self, stream: str) -> str:
        distances = [abs(t - self._manifest.end_ns) for t in self._around(stream) if t is not None]
        return f"its nearest message is {min(distances) / 1e6:.1f} ms away" if distances else "it has no message"

    def _next(self, stream: str) -> str:
        heard = self._session.heard.get(stream)
        if heard is not None:
            held = (heard["end_ns"] > self._manifest.start_ns) & (heard["arrival_ns"] >= self._manifest.emitted_ns)
            if held.any():
                later_ns = int(heard["arrival_ns"][held].min()) - self._manifest.emitted_ns
                return f"its next message came {later_ns / 1e6:.1f} ms after that"
        return "nothing came after that"

    def _first(self, stream: str) -> str:
        heard = self._session.heard.get(stream)
        if heard is None:
            return "the recording has no message of it"
        return f"its first message is from {_s(int(heard['capture_ns'].min()))}"

    def _refused(self, stream: str, stated: StreamManifest) -> str:
        """That a stream which is said to have never started had sent something, as far as this is certain."""
        heard = self._session.heard.get(stream)
        if heard is None or not self._session.live:
            return ""
        come = heard["arrival_ns"] < self._manifest.emitted_ns - JITTERY_NS
        come &= heard["capture_ns"] < (FOREVER if stated.first_ns is None else stated.first_ns)
        if not (count := int(come.sum())):
            return ""
        why = self._session.misfit(stream)
        why = f"it {why}" if why else "they were of another kind than what is taken, or contradicted themselves"
        return f"what had come of it, {_messages(count)}, was refused: {why}"

    def _last(self, stream: str) -> str:
        before, _ = self._around(stream)
        return "the start" if before is None else _s(before)

    def _around(self, stream: str) -> tuple[int | None, int | None]:
        """Where the last message that begins before the step's end ends, and the first after it begins, among those
        that had come when the step was final or that came later with captures after it."""
        heard = self._session.heard.get(stream)
        if heard is None:
            return None, None
        captures, ends, end_ns = heard["capture_ns"], heard["end_ns"], self._manifest.end_ns
        there = captures < end_ns
        if self._session.live:
            there &= heard["arrival_ns"] <= self._manifest.emitted_ns
        after = captures[captures >= end_ns]
        return (int(np.max(ends[there])) if there.any() else None), (int(after.min()) if len(after) else None)


def _messages(count: int) -> str:
    return "1 message" if count == 1 else f"{count} messages"


def _s(t_ns: int) -> str:
    """Session time in words."""
    return f"{t_ns / 1e9:.3f} s"
