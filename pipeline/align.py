"""The aligner. (API only for now; the state machine is being written.)"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from pipeline.messages import Message, Payload


class Nearest(msgspec.Struct, frozen=True, gc=False, tag="nearest"):
    """The message with the least distance d to E(k), d < tolerance; ties: earlier capture, then lower seq."""

    tolerance_ns: int


class Latest(msgspec.Struct, frozen=True, gc=False, tag="latest"):
    """The last message before E(k), not older than ``max_age_ns`` (E(k) - max_age <= t < E(k))."""

    max_age_ns: int


class Resample(msgspec.Struct, frozen=True, gc=False, tag="resample"):
    """Exactly rate x hop samples on an integer grid; neighbours more than ``max_gap_ns`` apart leave a hole (NaN)."""

    rate_hz: int
    max_gap_ns: int
    method: Literal["linear", "band_limited"] = "linear"


class All(msgspec.Struct, frozen=True, gc=False, tag="all"):
    """Every message with capture time in the hop."""


Rule = Nearest | Latest | Resample | All
Verdict = Literal["ok", "partial", "late", "missing"]
Reason = Literal["never_started", "silent", "dead", "gap", "out_of_tolerance"]
Cause = Literal["proven", "idle", "deadline", "overflow", "end"]


class StreamSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the aligner must know of one stream."""

    name: str
    payload: Payload
    rule: Rule
    channels: int = 0
    """Columns of a resampled grid: 6 for imu (accel xyz, gyro xyz), the signal's or the audio's channel count."""
    idle_ns: int | None = 1_000_000_000
    ordered: bool = True
    max_buffer: int = 4096


class AlignSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What the aligner must know of all of them. ``None`` switches a limit off (event-time replay)."""

    hop_ns: int
    streams: tuple[StreamSpec, ...]
    max_delay_ns: int | None = None
    max_future_ns: int | None = None
    max_open: int = 64
    max_steps_per_call: int = 64


class StreamManifest(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """What one stream had to say about one step, and from which messages. Ranges are (epoch, first seq, last seq)."""

    verdict: Verdict
    reason: Reason | None = None
    coverage: float = 1.0
    proven: bool = False
    used: tuple[tuple[int, int, int], ...] = ()
    received: tuple[tuple[int, int, int], ...] = ()
    """What was taken into the buffer since the last manifest."""
    epoch: int | None = None
    bound_ns: int | None = None
    newest_ns: int | None = None
    """Capture time of the newest content (the last valid grid point's for ``resample``): E(k) - newest is its age."""
    uncertainty_ns: int = 0
    idle: bool = False
    closed: str | None = None


class Manifest(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """The whole truth about one step: enough to make it again from the messages."""

    step: int
    start_ns: int
    end_ns: int
    cause: Cause
    emitted_ns: int
    digest: str
    streams: dict[str, StreamManifest]


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One final step. ``messages[stream]`` is its content for nearest, latest and all (oldest first; the payload may
    be absent); ``grids[stream]`` for resample: f4 [rate x hop, channels], NaN in holes; audio scaled to [-1, 1)."""

    manifest: Manifest
    messages: dict[str, tuple[Message, ...]]
    grids: dict[str, Any]


class Counters(msgspec.Struct, kw_only=True):
    """received == used + late + superseded + duplicate + sum(rejected.values()) + buffered, always."""

    received: int = 0
    used: int = 0
    late: int = 0
    superseded: int = 0
    duplicate: int = 0
    rejected: dict[str, int] = msgspec.field(default_factory=dict)
    """By reason: epoch, bound, future, malformed, overflow."""
    buffered: int = 0
    lost: int = 0
    beats: int = 0


class Aligner:
    """feed / tick / close / finish; see the design. Each returns the steps that became final, in order."""

    def __init__(self, spec: AlignSpec, first_step: int = 1) -> None: ...
    def feed(self, message: Message, arrival_ns: int) -> list[Step]: ...  # type: ignore[empty-body]
    def tick(self, now_ns: int) -> list[Step]: ...  # type: ignore[empty-body]
    def close(self, stream: str, reason: Literal["dead", "ended"], now_ns: int) -> list[Step]: ...  # type: ignore[empty-body]
    def finish(self, now_ns: int) -> list[Step]: ...  # type: ignore[empty-body]
    def counters(self, stream: str) -> Counters: ...  # type: ignore[empty-body]
    @property
    def next_event_ns(self) -> int | None: ...  # when to tick next  # type: ignore[empty-body]
