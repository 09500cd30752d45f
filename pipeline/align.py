"""The aligner: messages of many streams in, one final step after another out. No sockets, no clocks, no threads.

Theory
------
Session time is cut into hops; step k covers ``[E(k-1), E(k))`` with ``E(k) = k * hop``. Every stream has a rule that
says what its step holds (``pipeline.rules``) and a bound B, its promise that nothing captured before B will come any
more. A stream is *proven* for step k when no message that its bound still allows could change the content. So the
content of a step does not depend on the order in which streams are heard, only on what they say.

Waiting for proof must end even if a stream falls silent. Hence three limits, each of which has a nominal time, so that
a step is the same however seldom the aligner is called:

=========== =========================================== =======================================================
cause       the head step k is final                    nominal time
=========== =========================================== =======================================================
proven      every live stream is proven, one is live    arrival of the message that completed it
idle        the same, once unproven streams are idle    the last such stream's last progress + its ``idle_ns``
deadline    whatever is proven                          E(k) + ``max_delay_ns``
overflow    more than ``max_open`` steps wait           arrival of the message that made them too many
end         all streams have ended                      the end
=========== =========================================== =======================================================

A stream is *live* unless it is closed as dead or idle. What a step then says of each stream:

============== ================================= =============================================================
verdict        content                           meaning
============== ================================= =============================================================
ok             proven and complete               nothing was lost, nothing can be added
partial        some, of stated coverage          lost or not yet come; ``proven`` tells which
late           none                              unproven at the deadline, and the stream is not idle
missing        none; with a reason               ``never_started``, ``silent`` (idle), ``dead`` (closed), ``gap``
                                                 (proven: a hole or a loss), ``out_of_tolerance`` (proven: not near)
============== ================================= =============================================================

Worked example: a 100 ms hop, one stream with ``nearest(50 ms)``. Frames at 90 and 130 ms. After the first the bound is
just above 90 ms, and a frame at 95 ms could still be nearer to E(1) = 100 ms. After the second it is just above 130 ms:
anything nearer than 10 ms would have to lie below it.

>>> from pipeline.messages import FrameLayout, Header, Message
>>> MS = 1_000_000
>>> def frame(seq, ms):
...     return Message(Header(stream="camera", seq=seq, epoch=0, t_capture_ns=ms * MS, t_end_ns=ms * MS,
...                           bound_ns=ms * MS + 1, t_receipt_ns=ms * MS, layout=FrameLayout("gray8", 1, 1)))
>>> camera = StreamSpec(name="camera", payload="frame", rule=Nearest(50 * MS))
>>> aligner = Aligner(AlignSpec(hop_ns=100 * MS, streams=(camera,), max_delay_ns=80 * MS))
>>> aligner.feed(frame(0, 90), 95 * MS)
[]
>>> [step] = aligner.feed(frame(1, 130), 135 * MS)
>>> step.manifest.cause, step.manifest.emitted_ns // MS, step.manifest.streams["camera"].used
('proven', 135, ((0, 0, 0),))
>>> [step] = aligner.tick(350 * MS)  # called much too late: step 2 still says when it was due
>>> step.manifest.cause, step.manifest.emitted_ns // MS, step.manifest.streams["camera"].verdict
('deadline', 280, 'late')

Every call does a bounded amount of work (at most ``max_steps_per_call`` steps). After a pause the rest stays pending;
messages that come meanwhile wait in an inbox, so that they cannot slip into a step whose time was over before them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import msgspec

from pipeline.errors import ConfigError
from pipeline.messages import Message
from pipeline.picking import AllTrack, LatestTrack, NearestTrack
from pipeline.resampling import ResampleTrack
from pipeline.rules import FOREVER, All, Latest, Nearest, Resample, Rule, StreamSpec, misfit
from pipeline.track import Content, Counters, Range, Track, ranges

__all__ = [
    "AlignSpec",
    "Aligner",
    "All",
    "Cause",
    "Counters",
    "Latest",
    "Manifest",
    "Nearest",
    "Reason",
    "Resample",
    "Rule",
    "Step",
    "StreamManifest",
    "StreamSpec",
    "Verdict",
]

Verdict = Literal["ok", "partial", "late", "missing"]
Reason = Literal["never_started", "silent", "dead", "gap", "out_of_tolerance"]
Cause = Literal["proven", "idle", "deadline", "overflow", "end"]


class AlignSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the aligner must know of all streams; all times in ns. ``None`` switches a limit off (event-time replay)."""

    hop_ns: int
    streams: tuple[StreamSpec, ...]
    max_delay_ns: int | None = None
    max_future_ns: int | None = None
    max_open: int = 64
    max_steps_per_call: int = 64


class StreamManifest(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What one stream had to say about one step, and from which messages. Ranges are (epoch, first seq, last seq)."""

    verdict: Verdict
    reason: Reason | None = None
    coverage: float = 1.0
    proven: bool = False
    used: tuple[Range, ...] = ()
    received: tuple[Range, ...] = ()
    """What was taken into the buffer since the last manifest."""
    epoch: int | None = None
    bound_ns: int | None = None
    newest_ns: int | None = None
    """Capture time of the newest content (the last valid grid point's for ``resample``): E(k) - newest is its age."""
    uncertainty_ns: int = 0
    idle: bool = False
    closed: str | None = None
    first_ns: int | None = None
    """Least capture time that has come so far; before it the stream had never started."""
    losses: tuple[tuple[int, int, int], ...] = ()
    """Losses learnt of since the last manifest: (first ns, end ns, count)."""
    overflows: tuple[tuple[int, int, int], ...] = ()
    """What was turned away since then because the buffer was full: (first ns, last ns, count) by capture time."""
    gaps: tuple[tuple[int, int], ...] = ()
    """Losses whose end is not known yet: (first ns, count)."""


class Manifest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The whole truth about one step: enough to make it again from the messages."""

    step: int
    start_ns: int
    end_ns: int
    cause: Cause
    emitted_ns: int
    digest: str
    """Over references, verdicts and resampled samples; not over anything that depends on arrival."""
    streams: dict[str, StreamManifest]


class Step(msgspec.Struct, frozen=True):
    """One final step. ``messages[stream]`` is what its content was made of, oldest first (payloads may be absent);
    ``grids[stream]`` is there for resample: f4 [rate x hop, channels], NaN in holes; audio scaled to [-1, 1)."""

    manifest: Manifest
    messages: dict[str, tuple[Message, ...]]
    grids: dict[str, Any]


class _Close(NamedTuple):
    """A stream's end on its way through the inbox."""

    track: Track
    reason: Literal["dead", "ended"]


class Aligner:
    """Joins streams into steps; see the module. Times passed in must not go back."""

    def __init__(self, spec: AlignSpec, first_step: int = 1) -> None:
        _check(spec)
        self._spec = spec
        self._next = first_step
        self._tracks = {s.name: make_track(s, spec.hop_ns, spec.max_future_ns, first_step) for s in spec.streams}
        self._order = sorted(self._tracks.items())
        self._unproven = len(self._tracks)
        self._time_ns = 0  # nominal: of the event that is being worked on
        self._heard_ns = 0  # of the last feed or close
        self._emitted_ns = 0
        self._pending = False
        self._deserted = False  # nothing but the life of a stream is missing: whoever speaks next completes the step
        self._inbox: deque[tuple[Message | _Close, int]] = deque()
        self._inbox_limit = sum(s.max_buffer for s in spec.streams)
        self._wake_ns = 0
        self._reckon_wake()

    # --- calls -----------------------------------------------------------------------------------------------------

    def feed(self, message: Message, arrival_ns: int) -> list[Step]:
        """Takes one message or beat that arrived at ``arrival_ns``; returns the steps that became final, in order.

        ValueError for a stream that was not declared: what to do with it is the caller's to decide.
        """
        track = self._tracks.get(message.header.stream)
        if track is None:
            raise ValueError(f"stream {message.header.stream!r} was not declared; there are {sorted(self._tracks)}")
        if arrival_ns < self._time_ns:
            arrival_ns = self._time_ns
        if arrival_ns >= self._wake_ns or self._pending or self._deserted or track.closed is not None:
            self._hold(track, message, arrival_ns)
            return self._work(arrival_ns)
        self._time_ns = self._heard_ns = arrival_ns
        if track.take(message, arrival_ns) and not track.proven and track.prove():
            track.proven = True
            self._unproven -= 1
            return self._work(arrival_ns)
        return [] if track.bound_ns < self._open_limit_ns else self._work(arrival_ns)

    def tick(self, now_ns: int) -> list[Step]:
        """Returns the steps that became final by ``now_ns`` without a message: idle streams and deadlines."""
        if now_ns < self._wake_ns and not self._pending:
            return []
        return self._work(now_ns)

    def close(self, stream: str, reason: Literal["dead", "ended"], now_ns: int) -> list[Step]:
        """Says that a stream's node is dead (no longer waited for until it speaks again), or that it has ended."""
        self._inbox.append((_Close(self._tracks[stream], reason), now_ns))
        return self._work(now_ns)

    def finish(self, now_ns: int) -> list[Step]:
        """Ends all streams; returns all steps up to the last whole hop below the greatest bound."""
        steps = self._work(now_ns, None)
        self._time_ns = self._heard_ns = max(self._time_ns, now_ns)
        for track in self._tracks.values():
            self._end(track, "ended")
        while self._next <= self._last_whole_step():
            steps.append(self._emit("end"))
        return steps

    def misfit(self, stream: str) -> str:
        """Why messages of the stream that have come can be in no step, in words that follow its name; "" if none of
        what it sends is of another kind than what is taken."""
        track = self._tracks[stream]
        return "" if track.malformed is None else misfit(track.spec, track.malformed)

    def counters(self, stream: str) -> Counters:
        """What became of the stream's messages so far."""
        return self._tracks[stream].count()

    @property
    def next_step(self) -> int:
        """The index of the step that will come next."""
        return self._next

    @property
    def next_event_ns(self) -> int | None:
        """When to call ``tick`` if nothing comes before; None if only a message can change anything."""
        if self._pending:
            return self._time_ns
        return None if self._wake_ns >= FOREVER else self._wake_ns

    def obey(self, manifest: Manifest, messages: Mapping[str, list[Message]]) -> Step:
        """Makes a step again as its manifest says that it was made: ``messages`` holds, for each stream, those that
        the manifest lists as received (with payloads where the rule needs them). The manifests of a session are obeyed
        in order, by an aligner that is given nothing else; the caller compares digests. What depends on arrival (who
        was idle or closed, which bound and which losses were known) is taken from the manifest; content, proof,
        verdict and samples are worked out anew."""
        while self._next < manifest.step:  # a gap record says why
            self._advance()
        for name, track in self._order:
            track.restore(manifest.streams[name], messages.get(name, []))
        self._time_ns = self._emitted_ns = manifest.emitted_ns
        return self._emit(manifest.cause, {name: stated.idle for name, stated in manifest.streams.items()})

    def looks_from(self, stream: str) -> int:
        """The least capture time that the next step, or any later one, looks at in this stream; of messages of many
        samples, of their ends."""
        return self._tracks[stream].looks_from_ns

    # --- the order of events ---------------------------------------------------------------------------------------

    def _hold(self, track: Track, message: Message, arrival_ns: int) -> None:
        if len(self._inbox) < self._inbox_limit:
            self._inbox.append((message, arrival_ns))
        else:
            track.turn_away(message)

    def _work(self, now_ns: int, limit: int | None = 0) -> list[Step]:
        """Does what is due up to ``now_ns``, in the order of nominal times: steps, then expiries and deadlines, then
        what waits in the inbox. Stops after ``limit`` steps (0: as many as a call may); the rest stays pending."""
        limit = self._spec.max_steps_per_call if limit == 0 else limit
        steps: list[Step] = []
        self._pending = False
        while True:
            cause = self._due()
            if cause is not None:
                if limit is not None and len(steps) >= limit:
                    self._pending = True
                    return steps
                steps.append(self._emit(cause))
                continue
            event_ns = self._next_event_ns()
            until_ns = self._inbox[0][1] if self._inbox else now_ns
            if event_ns <= until_ns:
                self._time_ns = max(self._time_ns, event_ns)
            elif self._inbox:
                item, arrival_ns = self._inbox.popleft()
                self._time_ns = self._heard_ns = max(self._time_ns, arrival_ns)
                if isinstance(item, Message):
                    self._take(self._tracks[item.header.stream], item, self._time_ns)
                else:
                    self._end(item.track, item.reason)
            else:
                self._time_ns = max(self._time_ns, now_ns)
                self._reckon_wake()
                return steps

    def _take(self, track: Track, message: Message, arrival_ns: int) -> None:
        if track.take(message, arrival_ns) and not track.proven and track.prove():
            track.proven = True
            self._unproven -= 1

    def _due(self) -> Cause | None:
        """Why the head step is final now, or None."""
        now_ns = self._time_ns
        cause = self._proven_at(now_ns)
        if cause is not None:
            return cause
        if self._spec.max_delay_ns is not None and now_ns >= self._next * self._spec.hop_ns + self._spec.max_delay_ns:
            return "deadline"
        if any(FOREVER > t.bound_ns >= self._open_limit_ns for t in self._tracks.values()):
            return "overflow"
        return None

    def _proven_at(self, now_ns: int) -> Cause | None:
        expired_ns, self._deserted = -1, False
        if self._unproven:
            for track in self._tracks.values():
                if track.proven or track.closed == "dead":
                    continue
                if not track.idle_at(now_ns):
                    return None
                expired_ns = max(expired_ns, track.expiry_ns)
        ended = False
        for track in self._tracks.values():
            if track.closed == "ended":
                ended = True
            elif track.proven and track.closed is None and not track.idle_at(now_ns):
                break
        else:  # nobody lives who could say more: what has ended speaks for itself as far as anything was said
            if not ended or self._next > self._last_whole_step():
                self._deserted = True
                return None
        return "idle" if expired_ns > self._heard_ns else "proven"

    def _next_event_ns(self) -> int:
        """The next time after now at which the head step could become final by itself."""
        now_ns, earliest = self._time_ns, FOREVER
        if self._spec.max_delay_ns is not None:
            earliest = self._next * self._spec.hop_ns + self._spec.max_delay_ns
        for track in self._tracks.values():
            if not track.proven and track.closed is None and now_ns < track.expiry_ns < earliest:
                earliest = track.expiry_ns
        return earliest

    def _reckon_wake(self) -> None:
        self._wake_ns = self._next_event_ns()
        self._open_limit_ns = (self._next + self._spec.max_open) * self._spec.hop_ns

    def _end(self, track: Track, reason: Literal["dead", "ended"]) -> None:
        track.close(reason)
        if reason == "ended" and not track.proven:
            track.proven = True
            self._unproven -= 1

    def _last_whole_step(self) -> int:
        """The last step whose hop lies below the greatest bound."""
        return max(track.promised_ns for track in self._tracks.values()) // self._spec.hop_ns

    # --- steps -----------------------------------------------------------------------------------------------------

    def _emit(self, cause: Cause, idle: Mapping[str, bool] | None = None) -> Step:
        """Makes the head step of what has come, and turns to the next. ``idle``: who was, if that is known."""
        self._emitted_ns = max(self._emitted_ns, self._time_ns)
        messages: dict[str, tuple[Message, ...]] = {}
        grids: dict[str, Any] = {}
        streams: dict[str, StreamManifest] = {}
        for name, track in self._order:
            content = track.content()
            silent = track.closed is None and track.idle_at(self._time_ns) if idle is None else idle[name]
            streams[name] = self._judge(track, content, silent)
            if content is not None:
                messages[name] = content.messages
                if content.grid is not None:
                    grids[name] = content.grid
        manifest = Manifest(
            step=self._next,
            start_ns=(self._next - 1) * self._spec.hop_ns,
            end_ns=self._next * self._spec.hop_ns,
            cause=cause,
            emitted_ns=self._emitted_ns,
            digest=digest(self._next, streams, grids),
            streams=streams,
        )
        self._advance()
        return Step(manifest, messages, grids)

    def _judge(self, track: Track, content: Content | None, idle: bool) -> StreamManifest:
        """The verdict on one stream; see the table at the top."""
        verdict: Verdict
        reason: Reason | None = None
        used: tuple[Range, ...] = ()
        coverage, newest_ns, uncertainty_ns = 0.0, None, 0
        if content is not None:
            verdict = "ok" if track.proven and content.complete else "partial"
            coverage, newest_ns = content.coverage, content.newest_ns
            used = ranges(content.messages, track.ordered)
            for message in content.messages:
                if message.header.uncertainty_ns > uncertainty_ns:
                    uncertainty_ns = message.header.uncertainty_ns
        elif track.proven:
            verdict = "missing"
            if track.never_started:
                reason = "never_started"
            else:
                reason = "gap" if track.hole_is_gap or track.touched() else "out_of_tolerance"
        elif track.closed == "dead":
            verdict, reason = "missing", "dead"
        elif idle:
            verdict, reason = "missing", "never_started" if track.never_started else "silent"
        else:
            verdict = "late"
        return StreamManifest(
            verdict,
            reason,
            coverage,
            track.proven,
            used,
            ranges(track.fresh, track.ordered),
            track.epoch if track.epoch > -FOREVER else None,
            track.promised_ns if track.promised_ns > -FOREVER else None,
            newest_ns,
            uncertainty_ns,
            idle,
            track.closed,
            track.first_ns if track.first_ns < FOREVER else None,
            tuple(track.losses[-track.fresh_losses :]) if track.fresh_losses else (),
            tuple(track.overflows[-track.fresh_overflows :]) if track.fresh_overflows else (),
            tuple(track.gaps),
        )

    def _advance(self) -> None:
        self._next += 1
        self._unproven = 0
        for track in self._tracks.values():
            track.advance()
            if track.bound_ns >= track.interesting_ns and (track.closed == "ended" or track.prove()):
                track.proven = True
            else:
                self._unproven += 1
        self._open_limit_ns = (self._next + self._spec.max_open) * self._spec.hop_ns


_encode = msgspec.msgpack.Encoder().encode


def digest(step: int, streams: dict[str, StreamManifest], grids: dict[str, Any]) -> str:
    """What makes two steps the same: references, verdicts and resampled samples; 32 hexadecimal digits."""
    said = [(name, m.verdict, m.reason, m.coverage, m.proven, m.used) for name, m in sorted(streams.items())]
    state = hashlib.blake2b(_encode((step, said)), digest_size=16)
    for name in sorted(grids):
        state.update(grids[name].tobytes())
    return state.hexdigest()


_TRACKS: dict[type, type[Track]] = {Nearest: NearestTrack, Latest: LatestTrack, Resample: ResampleTrack, All: AllTrack}


def make_track(spec: StreamSpec, hop_ns: int, max_future_ns: int | None, step: int) -> Track:
    """The track for a stream's rule. ConfigError if the rule does not fit the hop or the payload."""
    if isinstance(spec.rule, Resample) and spec.payload not in ("audio", "imu", "signal"):
        raise ConfigError(
            f"stream {spec.name!r} carries {spec.payload}, which cannot be resampled; resample takes audio, imu and "
            f"signal streams. Use nearest, latest or all"
        )
    if (track := _TRACKS.get(type(spec.rule))) is None:
        raise ConfigError(
            f"the rule of stream {spec.name!r} is {spec.rule!r}; rules are Nearest(…), Latest(…), Resample(…) and All()"
        )
    return track(spec, hop_ns, max_future_ns, step)


def _check(spec: AlignSpec) -> None:
    names = [s.name for s in spec.streams]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"the aligner needs streams with distinct names; got {names}")
    if spec.hop_ns <= 0 or spec.max_open < 1 or spec.max_steps_per_call < 1:
        raise ConfigError(
            f"hop ({spec.hop_ns} ns), max_open ({spec.max_open}) and max_steps_per_call ({spec.max_steps_per_call}) "
            f"must be positive"
        )
