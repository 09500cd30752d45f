"""Sources on another host, as the hub sees them: that host joins here, and what it sends goes onto the session's bus.

    sources:
      pi:
        kind: remote
        listen: tcp://0.0.0.0:5600
        curve: {secret: keys/hub.key_secret, allow: [keys/pi.key]}
        sources:
          front: {kind: camera, device: /dev/video0}

and on the other host `sensorium node --join tcp://HUB:5600 --key pi.key_secret --hub-key hub.key`. The streams are
called as the inner sources are. What is said over the link, and how the other host comes to stamp on this session's
clock, is told in ``pipeline.link``. Nothing that comes is believed before it is checked.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import deque
from pathlib import Path
from typing import Any

import msgspec

from pipeline.clock import SystemClock
from pipeline.config import CurveEntry, SourceEntry
from pipeline.errors import ConfigError, WireError
from pipeline.life import Life, Report, SourceReport, State
from pipeline.link import (
    DATA,
    ECHO,
    INVITE,
    JOIN,
    PROBE,
    PROTOCOL,
    REPORT,
    STOP,
    Echo,
    Hello,
    Invitation,
    RemoteStream,
)
from pipeline.messages import Message, Payload, payload_of
from pipeline.node import Source, decode_settings, load_kind, ring_drops, ring_spec, wait_for_readers
from pipeline.refusals import Refusals
from pipeline.session import check_remote
from pipeline.transport import LinkServer, Publisher, ZmqBus, load_curve_server
from pipeline.wire import check_payload, decode_header

PATIENCE_MS = 20
BATCH = 256
"""Messages taken in one turn, so that reports go out however much comes."""
SILENT_NS = 1_500_000_000
"""A source of which nothing was heard for so long is away."""
AHEAD_NS = 1_000_000_000
"""An epoch that opens later than this from now is nonsense, and would silence its stream until then."""
LEAVE_NS = 1_500_000_000
"""How long after the end the other host may take to send what it has."""
_NOTES: dict[State, str] = {"waiting": "nothing comes", "starting": "it starts"}
"""What is said of a source that says nothing itself."""


class Remote:
    """Publishes the streams of a host that joins."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """``listen``: where the other host joins; beyond loopback only with ``curve`` (this end's secret key, the
        public keys of those who may join: `sensorium keys`), or with ``insecure: true``, which lets anybody on the
        network join and listen in. ``sources``: what the other host is to run."""

        listen: str
        sources: dict[str, SourceEntry]
        curve: CurveEntry | None = None
        insecure: bool = False

        def __post_init__(self) -> None:
            if not self.sources:
                raise ValueError("`sources`: name at least one source that the other host is to run.")
            try:
                check_remote(self.listen, keys=self.curve is not None or self.insecure)
            except ConfigError as error:
                without = "; `insecure: true` does without, where you trust everybody." * ("keys" in str(error))
                raise ValueError(f"`listen`: {error}{without}") from None
            if self.listen.startswith("ipc:") or self.listen.endswith(":*"):
                raise ValueError(f"`listen: {self.listen}`: another host needs an address like tcp://0.0.0.0:5600.")

    @classmethod
    def streams_of(cls, settings: Remote.Settings) -> dict[str, Payload]:
        """The streams that a node with these settings publishes. Raises ConfigError."""
        return {name: kind.payload_of(own) for name, (kind, own) in _inner(settings).items()}

    @classmethod
    def slots_of(cls, settings: Remote.Settings) -> dict[str, int]:
        """Bytes of the largest payload to expect, by stream."""
        return {name: kind.largest_payload(own) for name, (kind, own) in _inner(settings).items()}

    def __init__(self, life: Life) -> None:
        self.life, self.clock = life, life.clock
        self.settings: Remote.Settings = decode_settings(Remote, life.spec.settings)
        self.streams = life.spec.streams
        self.reports = {stream: SourceReport() for stream in self.streams}
        self.said: dict[str, Report] = {}
        self.heard_ns: dict[str, int] = {}
        self.taken_ns: dict[str, int] = {}
        """When the last message or beat of each stream came that was published."""
        self.joined: deque[bytes] = deque(maxlen=8)
        self.asked: bytes | None = None
        """Who asked last what to run."""
        self.crowd = Refusals(self.clock)
        self.host = ""
        self.counters: dict[str, float] = {}
        self.own_life = secrets.token_hex(8)

    def run(self) -> None:
        """Until stopped. Raises ConfigError if nobody can join."""
        spec, settings = self.life.spec, self.settings
        curve = None if settings.curve is None else load_curve_server(settings.curve.secret, settings.curve.allow)
        with (
            contextlib.closing(LinkServer(settings.listen, curve, settings.insecure)) as server,
            contextlib.closing(ZmqBus(Path(spec.session_dir), spec.node)) as bus,
        ):
            publisher = bus.publisher(spec.node, sorted(self.streams), ring_spec(spec), stop=self.life.stop)
            wait_for_readers(publisher, self.life)
            self.life.wait_to_begin(Report(state="loaded"))
            self.serve(server, publisher)

    def serve(self, server: LinkServer, publisher: Publisher) -> None:
        """Answers and publishes until stopped, and takes what the other host still has."""
        self.server, self.publisher = server, publisher
        while not self.life.stop.is_set():
            self.turn()
        for peer in self.joined:
            server.send(peer, (STOP,))
        leaving = SystemClock()
        while self.present() and self.state() != "ended" and leaving.now_ns() < LEAVE_NS:
            self.turn()
        self.life.report(self._report())  # that its streams ended, and did not die

    def turn(self) -> None:
        """Takes what has come, and reports."""
        wait_ms = PATIENCE_MS
        for _ in range(BATCH):
            item = self.server.receive(wait_ms)
            if item is None:
                break
            self._take(*item, self.clock.now_ns())
            wait_ms = 0
        self.publisher.readers()  # takes note of who has joined meanwhile
        if self.life.due:
            self.life.report(self._report())

    def present(self) -> bool:
        """Whether anything was heard from the other host lately."""
        now = self.clock.now_ns()
        return any(now - heard < SILENT_NS for heard in self.heard_ns.values())

    def state(self) -> State:
        """Of all sources together: waiting while one of them is away or has nothing to give."""
        states = {self._state_of(stream) for stream in self.streams}
        return "ended" if states == {"ended"} else "waiting" if states - {"ended", "ready"} else "ready"

    def _state_of(self, stream: str) -> State:
        said = self.said.get(stream)
        if said is None or (said.state != "ended" and self.clock.now_ns() - self.heard_ns[stream] > SILENT_NS):
            return "waiting"
        return said.state

    def _take(self, peer: bytes, parts: list[bytes], now_ns: int) -> None:
        """One message from another host. What is malformed is counted."""
        try:
            match parts:
                case [kind, number] if kind == PROBE:
                    asked = msgspec.msgpack.decode(number, type=int)
                    echo = Echo(asked, now_ns, self.clock.now_ns(), self.own_life)
                    self.server.send(peer, (ECHO, msgspec.msgpack.encode(echo)))
                case [kind, header, *payload] if kind == DATA and len(payload) < 2:
                    self._publish(header, payload[0] if payload else None, now_ns)
                case [kind, stream, report] if kind == REPORT:
                    self._hear(stream.decode(), msgspec.json.decode(report, type=Report), now_ns)
                case [kind, hello] if kind == JOIN:
                    self._join(peer, msgspec.json.decode(hello, type=Hello))
                case _:
                    raise WireError("nothing that a host says")
        except (WireError, msgspec.MsgspecError, UnicodeDecodeError):
            self._count("link.malformed")

    def _join(self, peer: bytes, hello: Hello) -> None:
        before, self.asked = self.asked, peer
        host = hello.host[:64]
        if peer not in self.joined:
            self.joined.append(peer)
        elif peer != before:  # one that was followed by another is silent; both ask
            hosts = " and ".join(sorted({host, self.host}))
            self.crowd.add(
                f"`sensorium node --join` runs twice for {self.settings.listen}, on {hosts}: each stream is taken from "
                "the one that began it last, and what the other sends is left out. End one of them; for one more host "
                "give the rig one more source of `kind: remote`, with another `listen`."
            )
        self.host = host
        streams = {
            name: RemoteStream(
                kind=entry.kind, payload=self.streams[name], settings=entry.settings,
                offset_ns=round(entry.offset_ms * 1e6), offset_uncertainty_ns=round(entry.offset_uncertainty_ms * 1e6),
            )
            for name, entry in self.settings.sources.items()
        }  # fmt: skip
        invitation = Invitation(PROTOCOL, self.life.spec.session, self.own_life, streams, self.crowd.recent())
        self.server.send(peer, (INVITE, msgspec.json.encode(invitation)))

    def _publish(self, data: bytes, payload: bytes | None, now_ns: int) -> None:
        header = decode_header(data)
        report = self.reports.get(header.stream)
        if report is None or header.is_beat != (payload is None) or header.epoch > now_ns + AHEAD_NS:
            raise WireError(f"{header.stream}/{header.seq} is nothing that this node can publish")
        if header.layout is not None and payload_of(header.layout) != self.streams[header.stream]:
            raise WireError(f"{header.stream}/{header.seq} is no {self.streams[header.stream]}")
        if report.epoch is not None and header.epoch < report.epoch:
            self._count("link.stale")  # from a process that another has followed
            if now_ns - self.taken_ns[header.stream] > SILENT_NS:  # which has ended since: that one is to begin anew
                self.own_life, self.taken_ns[header.stream] = secrets.token_hex(8), now_ns
            return
        self.heard_ns[header.stream] = self.taken_ns[header.stream] = now_ns
        if payload is not None:
            check_payload(header, len(payload))
        if report.epoch != header.epoch:  # said before it is sent: whoever buries this node must know its last epoch
            report.epoch = header.epoch
            self.life.report(self._report())
        if payload is None:
            self.publisher.beat(header)
            return
        report.published += 1
        report.newest_ns = header.t_end_ns
        if not self.publisher.publish(Message(header, payload)):
            report.dropped["no_slot"] = report.dropped.get("no_slot", 0) + 1

    def _hear(self, stream: str, report: Report, now_ns: int) -> None:
        if stream not in self.reports:
            raise WireError(f"there is no stream {stream}")
        there, newest = report.sources.get(stream), self.reports[stream].epoch
        if there is not None and there.epoch is not None and there.epoch < (newest or 0):
            self._count("link.stale")
            return
        self.said[stream], self.heard_ns[stream] = report, now_ns
        if there is not None:
            self.reports[stream].failures = there.failures
            self.reports[stream].unmeasured = there.unmeasured
            self.reports[stream].unmeasured_as = there.unmeasured_as
            self.reports[stream].unmeasured_ns = there.unmeasured_ns
            self.reports[stream].dropped = there.dropped | {
                name: n for name, n in self.reports[stream].dropped.items() if name == "no_slot"
            }

    def _count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0.0) + 1

    def _report(self) -> Report:
        ended = {
            name: at for report in self.said.values() if report.state == "ended" for name, at in report.ended.items()
        }
        there: dict[str, float] = {}
        for stream, said in self.said.items():
            there |= {f"{stream}.{name}": count for name, count in said.counters.items()}
        away = {stream: why for stream, why in self._lacking().items() if self.reports[stream].epoch is not None}
        return Report(
            state=self.state(), note=self._note(), sources=self.reports, ended=ended, away=away,
            counters=self.counters | there | ring_drops(self.publisher),
            warnings=self.server.refusals() + self.crowd.recent(),
        )  # fmt: skip

    def _lacking(self) -> dict[str, str]:
        """Sources of which nothing comes now, and why."""
        states = {stream: self._state_of(stream) for stream in self.streams}
        return {
            stream: said.note if (said := self.said.get(stream)) and said.note else _NOTES[state]
            for stream, state in states.items()
            if state in _NOTES
        }

    def _note(self) -> str:
        if not self.heard_ns:
            come = "has joined; its sources start" if self.joined else "may join"
            return f"{self.host or 'a host'} {come} at {self.settings.listen}"
        if not self.present():
            return f"nothing comes from {self.host}"
        return "; ".join(f"{stream}: {why}" for stream, why in self._lacking().items())


def _inner(settings: Remote.Settings) -> dict[str, tuple[type[Source], Any]]:
    """The classes of the inner sources and their settings, which the rig's check has found right."""
    kinds = {name: load_kind(entry.kind) for name, entry in settings.sources.items()}
    return {
        name: (kind, msgspec.convert(settings.sources[name].settings, kind.Settings, dec_hook=lambda as_, v: as_(v)))
        for name, kind in kinds.items()
    }
