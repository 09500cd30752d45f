"""From a rig to the nodes that carry it out: everything that can be checked before anything is started.

No hardware is touched: sources' classes are imported, their settings decoded, the bundle loaded and its streams
matched, a replay's file opened. What passes here fails later only for what the world does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from pipeline.align import AlignSpec, Resample
from pipeline.bundle import Bundle, load_bundle
from pipeline.clock import Origin
from pipeline.config import (
    AlignEntry,
    BundleEntry,
    CurveEntry,
    RecordEntry,
    RigFile,
    SourceEntry,
    check_source_name,
    names_a_source,
    read_rig,
)
from pipeline.encoding import PythonEncoder
from pipeline.errors import ConfigError, SensoriumError, Together, closest, joined
from pipeline.life import NodeSpec
from pipeline.messages import Payload
from pipeline.outside import uncreatable
from pipeline.recording import free_path, message_limit
from pipeline.source import CORE_KINDS, KINDS, Pace, Source, check_class, load_kind
from pipeline.steps import GAP, STEP
from pipeline.strict import Document, Where, listed, nearest
from pipeline.transport import load_curve_server

OF_EVERY_SOURCE = ("kind", "required", "offset_ms", "offset_uncertainty_ms")
"""Keys that any source may have beside its own settings."""


class SourcePlan(msgspec.Struct, frozen=True):
    """One source of a rig: its class's settings as plain values, and what it will publish."""

    name: str
    kind: str
    required: bool
    settings: dict[str, Any]
    streams: dict[str, Payload]
    slots: dict[str, int]
    labels: bool
    offset_ns: int = 0
    offset_uncertainty_ns: int = 0
    paces: dict[str, Pace] = {}


class Plan(msgspec.Struct, frozen=True):
    """A rig that has passed every check."""

    rig_file: RigFile
    sources: tuple[SourcePlan, ...]
    streams: dict[str, Payload]
    bundle: Bundle | None
    mapping: dict[str, str]
    align: AlignSpec | None
    record: RecordEntry | None
    allow_code: bool

    def node_of(self, stream: str) -> str:
        """The node that publishes a stream."""
        return next(source.name for source in self.sources if stream in source.streams)


def load_to_plan(path: Path | str, allow_code: bool = False) -> RigFile:
    """The rig in the file ``path``, as ``load_rig`` gives it, to make a plan of. What ``load_rig`` refuses is raised
    together with what ``make_plan`` would refuse of all that can be read in spite of it. Raises as it does."""
    rig_file, wrong = read_rig(Document.load(path))
    if wrong.found and rig_file is not None:
        rig, document = rig_file.rig, rig_file.document
        if rig.bundle is not None and document.read(BundleEntry, ("bundle",))[1].found:
            rig_file = RigFile(msgspec.structs.replace(rig, bundle=None), document)  # half of it would say other things
        _plan(rig_file, allow_code, None, wrong)
    return wrong.settled(rig_file)


def make_plan(rig_file: RigFile, allow_code: bool = False, record: RecordEntry | None = None) -> Plan:
    """The plan of a rig; ``record`` replaces the rig's own recording. Raises ConfigError, BundleError,
    RecordingError, which says everything that is wrong."""
    wrong = Together()
    return wrong.settled(_plan(rig_file, allow_code, record, wrong))


def _plan(rig_file: RigFile, allow_code: bool, record: RecordEntry | None, wrong: Together) -> Plan | None:
    """The plan, or none where something is wrong, which is noted."""
    rig, sources = rig_file.rig, list[SourcePlan]()
    for name, entry in rig.sources.items():
        with wrong:
            sources.append(_source(rig_file, name, entry, ("sources", name)))
    streams = _streams(rig_file, sources, wrong)
    known = _maybe(rig_file, sources, streams) if wrong.found else streams
    _known(rig_file, ("align", "streams"), rig.align.streams, known, wrong)
    record = record or rig.record
    if record is not None and record.streams is not None:
        _known(rig_file, ("record", "streams"), record.streams, known, wrong)
    with wrong:
        _check_ring(rig_file, record, sources)
    with wrong:
        _check_place(rig_file, record)
    with wrong:
        _check_keys(rig_file, ("transport", "curve"), rig.transport.curve)
    allowed = allow_code or (rig.bundle is not None and rig.bundle.allow_code)
    with wrong:
        bundle, mapping, spec = _model(rig_file, streams, known, allowed)
    if wrong.found:
        return None
    return Plan(rig_file, tuple(sources), streams, bundle, mapping, spec, record, allowed)


def _maybe(
    rig_file: RigFile, sources: Collection[SourcePlan], streams: Mapping[str, Payload]
) -> Mapping[str, Payload | None] | None:
    """What is published where something is wrong with a source: its stream's name is then known, but not its payload.
    Nothing is known (None) if it may publish other streams, too, if its name cannot stay, or if there is none."""
    named, known = rig_file.document.value.get("sources"), dict[str, Payload | None](streams)
    if not isinstance(named, dict) or not named or not all(map(names_a_source, named)):
        return None
    well = {source.name for source in sources}
    for name, entry in named.items():
        if name in well:
            continue
        kind = str(entry.get("kind") if isinstance(entry, dict) else entry)  # some write `imu: synthetic`
        try:
            kind_class = load_kind(kind if ":" in kind else closest(kind, KINDS) or "", import_paths(rig_file))
        except ConfigError:
            return None
        if not issubclass(kind_class, Source):
            return None
        known[name] = None
    return known


def _source(rig_file: RigFile, name: str, entry: SourceEntry, at: Where) -> SourcePlan:
    document = rig_file.document
    if entry.kind in CORE_KINDS:
        raise document.error((*at, "kind"), f"`{entry.kind}` is no kind of source. Shipped are {listed(KINDS)}.")
    with placed(rig_file, (*at, "kind")):
        node_class = load_kind(entry.kind, import_paths(rig_file))
    is_source = issubclass(node_class, Source)
    if not is_source and not hasattr(node_class, "streams_of"):
        raise document.error((*at, "kind"), f"the class of `{entry.kind}` is no Source: let it inherit from "
                             "pipeline.Source.")  # fmt: skip
    if is_source:
        with placed(rig_file, (*at, "kind")):
            check_class(entry.kind, node_class)
    settings, wrong = document.read(node_class.Settings, at, entry.settings, extra=OF_EVERY_SOURCE)
    if not is_source and (entry.offset_ms or entry.offset_uncertainty_ms):
        wrong.add(document.error((*at, "offset_ms"), f"a source of kind `{entry.kind}` publishes times that were made "
                                 "elsewhere, and changes none of them; leave the offset out."))  # fmt: skip
    inner = _inner(document, node_class, entry, settings, at)
    paces: dict[str, Pace] = {}
    for stream, source in inner.items():  # of another host: checked as if they were this one's
        with wrong:
            check_source_name(document, stream, (*at, "sources"))
        with wrong:
            with placed(rig_file, (*at, "sources", stream, "kind")):
                if not issubclass(load_kind(source.kind, import_paths(rig_file)), Source):
                    raise ConfigError(
                        f"a source of kind `{source.kind}` cannot run on another host; name a sensor's kind."
                    )
            paces |= _source(rig_file, stream, source, (*at, "sources", stream)).paces
    settings = wrong.settled(settings)
    _check_keys(rig_file, (*at, "curve"), getattr(settings, "curve", None))
    with placed(rig_file, at):
        streams: dict[str, Payload] = (
            {name: node_class.payload_of(settings)} if is_source else node_class.streams_of(settings)
        )
        slots = {name: node_class.largest_payload(settings)} if is_source else node_class.slots_of(settings)
        paces |= {name: node_class.pace(settings)} if is_source else {}
    plain = msgspec.to_builtins(settings, enc_hook=str)
    return SourcePlan(
        name, entry.kind, entry.required, plain, streams, slots, labels=not is_source and not inner,
        offset_ns=round(entry.offset_ms * 1e6), offset_uncertainty_ns=round(entry.offset_uncertainty_ms * 1e6),
        paces=paces,
    )  # fmt: skip


def _check_keys(rig_file: RigFile, at: Where, curve: Any) -> None:
    """Keys must be there before anything is started."""
    if isinstance(curve, CurveEntry):
        with placed(rig_file, at):
            load_curve_server(curve.secret, curve.allow)


def _inner(document: Document, node_class: Any, entry: SourceEntry, settings: Any, at: Where) -> dict[str, SourceEntry]:
    """The sources of another host, if the kind has such; read by themselves where no ``settings`` could be made."""
    if settings is not None:
        return dict(getattr(settings, "sources", {}))
    given = entry.settings.get("sources")
    if not isinstance(given, dict) or get_type_hints(node_class.Settings).get("sources") != dict[str, SourceEntry]:
        return {}
    return document.read(dict[str, SourceEntry], (*at, "sources"), given)[0] or {}


@contextmanager
def placed(rig_file: RigFile, at: Where) -> Iterator[None]:
    """Puts the place in the rig before what is said of it."""
    document = rig_file.document
    try:
        yield
    except ValueError as error:
        raise document.error(at, str(error)) from None
    except SensoriumError as error:
        placed = [part if isinstance(part, ConfigError) and str(part).startswith(str(document.path))
                  else document.fault(type(part), at, str(part)) for part in error.parts]  # fmt: skip
        raise joined(placed) from error


def import_paths(rig_file: RigFile) -> tuple[str, ...]:
    """Where a user's own kinds may lie, beside what is installed: the rig's folder, and the current one."""
    return str(rig_file.document.folder), str(Path.cwd())


def _check_ring(rig_file: RigFile, record: RecordEntry | None, sources: Collection[SourcePlan]) -> None:
    """A ring must take the largest message of every source that it records."""
    if record is None or record.limit_bytes is None:
        return
    sizes = {stream: size for source in sources for stream, size in source.slots.items()
             if record.streams is None or stream in record.streams}  # fmt: skip
    stream = max(sizes, key=sizes.__getitem__, default="")
    if stream and sizes[stream] > (most := message_limit(record.limit_bytes)):
        least = -(-record.limit_bytes * sizes[stream] // (most * 1_000_000))
        raise rig_file.document.error(
            ("record", "limit_mb"), f"a ring of {record.limit_mb} MB takes messages of {most / 1e6:.1f} MB, and one of "
            f"`{stream}` may have {sizes[stream] / 1e6:.1f} MB; set `limit_mb: {least}` or more, or make it smaller "
            "(`encoding: jpeg`, `width`).")  # fmt: skip


def _check_place(rig_file: RigFile, record: RecordEntry | None) -> None:
    """A recording must have a place where it can be made."""
    if record is None:
        return
    path, ring = _sample(rig_file, record), record.limit_bytes is not None
    if not ring and (record.path.endswith("/") or os.path.isdir(path)):
        inside = f"{record.path.rstrip('/')}/{{session}}.mcap"
        why = f"{path} is a folder, and a recording is a file"
        todo = f"name one in it, like `path: {inside}`, or make it a ring of recordings with `limit_mb`"
    else:
        why = uncreatable(path, folder=ring)
        why, todo = (f"{path} cannot be created: {why}" if why else ""), f"name another {'folder' if ring else 'file'}"
    if not why:
        return
    if record is rig_file.rig.record:
        raise rig_file.document.error(("record", "path"), f"{why}; {todo}.")
    raise ConfigError(f"{why}; {todo}.")


def taken(rig_file: RigFile, record: RecordEntry | None) -> str:
    """Where a session is recorded to if another recording has the name that is asked for, in words."""
    if record is None or record.limit_bytes is not None or not os.path.exists(path := _sample(rig_file, record)):
        return ""
    return f"{path} exists already and stays as it is; this session is recorded to {free_path(path).name}"


def _sample(rig_file: RigFile, record: RecordEntry) -> Path:
    """Where a session of some name would be recorded to."""
    return Place("20260101T000000-0000", Path(), Origin.now()).path(record.path, rig_file.resolve)


def _streams(rig_file: RigFile, sources: Collection[SourcePlan], wrong: Together) -> dict[str, Payload]:
    streams: dict[str, Payload] = {}
    for source in sources:
        for stream, payload in source.streams.items():
            if stream in streams:
                wrong.add(rig_file.document.error(
                    ("sources", source.name), f"the stream `{stream}` is published by another source already; rename "
                    "that source, or choose streams of the recording with `streams`."))  # fmt: skip
            streams.setdefault(stream, payload)
    return streams


def _known(
    rig_file: RigFile, at: Where, names: Mapping[str, Any] | tuple[str, ...], streams: Collection[str] | None,
    wrong: Together,
) -> None:  # fmt: skip
    """Notes each of ``names``, which stand at ``at``, that is none of ``streams``; none where nobody knows these."""
    keys: Iterable[str | int] = names if isinstance(names, Mapping) else _indices(rig_file, at, names)
    for key, name in zip(keys, names, strict=True):
        if streams is not None and name not in streams:
            wrong.add(rig_file.document.error(
                (*at, key), f"the rig has no stream `{name}`; it has {listed(streams)}.{nearest(name, streams)}"
            ))  # fmt: skip


def _indices(rig_file: RigFile, at: Where, names: tuple[str, ...]) -> Sequence[int]:
    """Where ``names`` stand in the list at ``at``, of which they are what could be read."""
    written = rig_file.document.value
    for key in at:
        written = written.get(key) if isinstance(written, dict) else None
    texts = [(i, item) for i, item in enumerate(written if isinstance(written, list) else ()) if isinstance(item, str)]
    return [i for i, _ in texts] if tuple(item for _, item in texts) == names else range(len(names))


def _model(
    rig_file: RigFile, streams: dict[str, Payload], known: Mapping[str, Payload | None] | None, allow_code: bool
) -> tuple[Bundle | None, dict[str, str], AlignSpec | None]:
    rig = rig_file.rig
    if rig.bundle is None:
        return None, {}, None
    with placed(rig_file, ("bundle", "path")):
        bundle = load_bundle(rig_file.resolve(rig.bundle.path), allow_code)
        for name in bundle.experts:  # made once and let go: only they know which packages and files they need
            PythonEncoder(bundle, name, bundle.streams[name])
    with placed(rig_file, ("bundle",)):
        mapping = bundle.rig_streams(rig.bundle.streams, known)
        spec = live_spec(bundle, rig.align, rig.bundle.streams, streams, available=known)
    return bundle, mapping, spec


def live_spec(
    bundle: Bundle,
    align: AlignEntry,
    mapping: Mapping[str, str | None],
    streams: Collection[str],
    *,
    available: Mapping[str, Payload | None] | None = None,
    unordered: frozenset[str] = frozenset(),
) -> AlignSpec:
    """How a bundle's windows are made live under the limits that a rig states. Raises ConfigError as
    ``Bundle.align_spec`` does."""
    limits = align.streams
    return bundle.align_spec(
        mapping,
        align.max_delay_ms * 1_000_000,
        available=available,
        idle_ns={name: (_idle_ms(limits.get(name)) or align.idle_ms) * 1_000_000 for name in streams},
        max_buffer={name: entry.max_buffer for name, entry in limits.items() if entry.max_buffer is not None},
        unordered=unordered,
        max_future_ns=align.max_future_ms * 1_000_000,
        max_open=align.max_open,
    )


def _idle_ms(entry: Any) -> int | None:
    return None if entry is None else entry.idle_ms


class Place(msgspec.Struct, frozen=True):
    """Where and when a session runs."""

    session: str
    folder: Path
    origin: Origin

    def path(self, text: str, resolve: Callable[[str], Path]) -> Path:
        """A recording's path with {session} and {time} filled in."""
        began = datetime.fromtimestamp(self.origin.unix_ns / 1e9, tz=UTC).strftime("%Y%m%dT%H%M%SZ")
        return resolve(text.replace("{session}", self.session).replace("{time}", began))


def core_specs(plan: Plan, place: Place) -> list[NodeSpec]:
    """The specs of the recorder, the fusion node and the align node, as far as the rig has them, in that order."""
    specs = []
    if plan.record is not None:
        specs.append(_spec(plan, place, "record", _record_settings(plan, plan.record, place), ()))
    recorder = ("record",) if plan.record is not None else ()
    if plan.bundle is not None and plan.align is not None:
        specs.append(_spec(plan, place, "fusion", _fusion_settings(plan, plan.align), recorder))
        align = {"spec": msgspec.to_builtins(plan.align), "wiring": _wiring(plan, [s.name for s in plan.align.streams])}
        specs.append(_spec(plan, place, "align", align, (*recorder, "fusion")))
    return specs


def source_specs(plan: Plan, place: Place) -> list[NodeSpec]:
    """The specs of the sources."""
    return [
        msgspec.structs.replace(
            _spec(plan, place, source.name, source.settings, _readers(plan, source)),
            kind=source.kind, streams=dict(source.streams), slots=source.slots,
            offset_ns=source.offset_ns, offset_uncertainty_ns=source.offset_uncertainty_ns,
        )
        for source in plan.sources
    ]  # fmt: skip


def _spec(plan: Plan, place: Place, name: str, settings: dict[str, Any], readers: tuple[str, ...]) -> NodeSpec:
    rig = plan.rig_file.rig
    return NodeSpec(
        session=place.session, origin=place.origin, begun=False, session_dir=str(place.folder), node=name, kind=name,
        settings=settings, readers=readers, import_paths=import_paths(plan.rig_file),
        lease_ms=rig.transport.lease_ms, ring_mib=rig.transport.ring_mib, readers_s=rig.restart.start_s,
    )  # fmt: skip


def _payload_streams(align: AlignSpec) -> list[str]:
    """Streams whose messages fusion needs itself: all but the resampled ones, whose grids are in the steps."""
    return [stream.name for stream in align.streams if not isinstance(stream.rule, Resample)]


def _recorded(plan: Plan) -> list[str]:
    if plan.record is None:
        return []
    return list(plan.streams if plan.record.streams is None else plan.record.streams)


def _readers(plan: Plan, source: SourcePlan) -> tuple[str, ...]:
    """The nodes that must not miss anything of a source."""
    aligned = [] if plan.align is None else [s.name for s in plan.align.streams]
    wanted = {"align": aligned, "fusion": [] if plan.align is None else _payload_streams(plan.align)}
    wanted["record"] = _recorded(plan)
    return tuple(node for node, streams in wanted.items() if any(stream in source.streams for stream in streams))


def _wiring(plan: Plan, streams: list[str]) -> dict[str, list[str]]:
    """Streams by the node that publishes them."""
    wiring: dict[str, list[str]] = {}
    for stream in streams:
        wiring.setdefault(plan.node_of(stream), []).append(stream)
    return wiring


def _fusion_settings(plan: Plan, align: AlignSpec) -> dict[str, Any]:
    rig = plan.rig_file.rig
    assert plan.bundle is not None
    transport = rig.transport
    curve = transport.curve
    return {
        "bundle": str(plan.bundle.path), "allow_code": plan.allow_code, "streams": plan.mapping,
        "wiring": _wiring(plan, _payload_streams(align)), "labels": [s.name for s in plan.sources if s.labels],
        "threads": rig.fusion.threads, "providers": rig.fusion.providers, "contributions": rig.fusion.contributions,
        "payload_wait_ms": rig.fusion.payload_wait_ms, "cache_bytes": rig.fusion.cache_mib << 20,
        "tcp": None if transport.predictions == "ipc" else transport.predictions,
        "curve_secret": None if curve is None else str(curve.secret),
        "curve_allow": [] if curve is None else [str(path) for path in curve.allow],
    }  # fmt: skip


def _record_settings(plan: Plan, record: RecordEntry, place: Place) -> dict[str, Any]:
    topics = {source.name: ["label"] for source in plan.sources if source.labels}
    if plan.bundle is not None:
        topics |= {"align": [GAP, STEP], "fusion": [GAP, "prediction"]}
    wiring = _wiring(plan, _recorded(plan))
    return {
        "path": str(place.path(record.path, plan.rig_file.resolve)), "wiring": wiring,
        "topics": topics, "queue_bytes": record.queue_mib << 20, "compression": record.compression,
        "rig": plan.rig_file.document.text, "bundle": None if plan.bundle is None else plan.bundle.sha256,
        "limit_bytes": record.limit_bytes, "segment_ns": round(record.segment_s * 1e9),
        "elsewhere": [source.name for source in plan.sources if source.kind == "remote" and source.name in wiring],
    }  # fmt: skip
