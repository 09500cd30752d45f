"""What a session says of itself: events as they happen, and how everything is at one moment."""

from __future__ import annotations

from typing import Literal

import msgspec

from pipeline.child import Child, NodeState
from pipeline.clock import Origin
from pipeline.life import AlignReport, RecordReport, SourceReport

What = Literal["starting", "ready", "waiting", "returned", "died", "hung", "restarting", "gave_up", "ended", "stopped",
               "failed", "warning"]  # fmt: skip


class Event(msgspec.Struct, frozen=True):
    """Something happened to a node; ``text`` says it in words, with the last lines of a node that died."""

    t_ns: int
    node: str
    kind: What
    text: str


class StreamStatus(msgspec.Struct, kw_only=True):
    """One stream, as its source and the aligner see it. Counters are of the node's present life, ``total`` (published)
    and ``total_dropped`` of all its lives; ``failures`` of the device are none of ``dropped``, for nothing was ever
    sent."""

    node: str
    payload: str
    epoch: int | None = None
    published: int = 0
    rate_hz: float = 0.0
    newest_ns: int | None = None
    dropped: dict[str, int] = {}
    total: int = 0
    total_dropped: dict[str, int] = {}
    failures: int = 0
    unmeasured: int = 0
    unmeasured_as: str = "NaN"
    unmeasured_ns: int = 0
    note: str = ""
    verdict: str | None = None
    reason: str | None = None
    age_ms: float | None = None
    received: int = 0
    used: int = 0
    late: int = 0
    no_window: int = 0
    superseded: int = 0
    duplicate: int = 0
    lost: int = 0
    buffered: int = 0
    rejected: dict[str, int] = {}


class NodeStatus(msgspec.Struct, kw_only=True):
    """One node."""

    node: str
    kind: str
    state: NodeState
    pid: int | None
    restarts: int
    note: str
    log: str
    counters: dict[str, float]
    trouble: str = ""
    """Why it waited last, or how it died."""
    warnings: list[str] = []
    """What it has warned of until now."""


class Status(msgspec.Struct, kw_only=True):
    """A session at one moment."""

    session: str
    now_ns: int
    nodes: dict[str, NodeStatus]
    streams: dict[str, StreamStatus]
    recordings: list[RecordReport] = []
    """What the recorder has written: one of each of its lives, for each writes a file, or goes on in its ring."""


class SessionRef(msgspec.Struct, frozen=True):
    """A session that runs on this host: where it is, and where its predictions come from."""

    id: str
    dir: str
    rig: str
    predictions: str
    streams: dict[str, str] = {}
    """The streams, and the node that publishes each."""
    model: bool = False
    """Whether windows are made, and predictions from them."""
    origin: Origin | None = None
    """Where the session's time 0 lies; None until it has begun."""


def node_status(child: Child) -> NodeStatus:
    """A node's own word, and what its launcher knows of its process."""
    return NodeStatus(
        node=child.name, kind=child.spec.kind, state=child.state,
        pid=None if child.process is None else child.process.pid, restarts=child.restarts,
        note=child.report.note, log=str(child.log), counters=child.report.counters,
        trouble=child.trouble, warnings=child.warned.all,
    )  # fmt: skip


def merge(status: StreamStatus, report: SourceReport | AlignReport) -> None:
    """Takes over the fields of a report, which have the same names."""
    for name in report.__struct_fields__:
        setattr(status, name, getattr(report, name))
