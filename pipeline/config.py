"""The rig: one YAML file that names the sensors, the model and where things go.

Every field that a user may write is in the structs below, units in the names; ``strict`` reads them and refuses what
it does not know. A source's own settings are checked by the source's class (``pipeline.node``), which this file does
not know. Relative paths are relative to the YAML file.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import msgspec

from pipeline.errors import Together, plain
from pipeline.strict import NUMBER, Document, Where, listed, load_yaml

__all__ = ["Rig", "RigFile", "check_environment", "config_schema", "load_rig", "load_yaml", "long_times"]

Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[int, msgspec.Meta(ge=0)]

RING_LEAST_MB = 32
RING_LEAST_S = 1.0
"""A ring that is smaller has segments too small for a message."""

_KIND = re.compile(r"\.[a-zA-Z][a-zA-Z0-9]*")
"""The end of a file's name that says what kind of file it is."""

LONG_MS = 10_000
"""More milliseconds than this are rarely meant."""

CORE = ("align", "fusion", "record", "launch", "step", "prediction", "gap", "log", "label", "manifest")
"""Names that the runtime uses itself and no source may have."""


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a rig."""


class SourceEntry(_Strict, frozen=True):
    """One source. ``kind`` is a shipped kind or ``package.module:Class``; a ``required`` source must be there for the
    session to start. ``offset_ms`` is added to its capture times, because they are known to be wrong by a constant, and
    ``offset_uncertainty_ms`` to their uncertainty (`sensorium calibrate` finds both). All other keys are the source's
    own settings."""

    REST: ClassVar[str] = "settings"
    kind: str
    required: bool = False
    offset_ms: Annotated[float, msgspec.Meta(ge=-LONG_MS, le=LONG_MS)] = 0.0
    offset_uncertainty_ms: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    settings: dict[str, Any] = msgspec.field(default_factory=dict)


class BundleEntry(_Strict, frozen=True):
    """Which model. ``streams`` maps the bundle's streams to the rig's where the names differ (null: left out, and then
    always masked); ``allow_code`` lets the bundle bring Python code, which runs with your rights."""

    path: str
    streams: dict[str, str | None] = msgspec.field(default_factory=dict)
    allow_code: bool = False


class AlignStreamEntry(_Strict, frozen=True):
    """Limits of one stream where they differ from the rig's."""

    idle_ms: Positive | None = None
    max_buffer: Positive | None = None


class AlignEntry(_Strict, frozen=True):
    """How long the aligner waits: for a step (``max_delay_ms`` after its end), for a stream that fell silent
    (``idle_ms``), and how far ahead of now a stamp may lie."""

    max_delay_ms: Positive = 250
    max_future_ms: Positive = 100
    idle_ms: Positive = 1000
    max_open: Positive = 64
    streams: dict[str, AlignStreamEntry] = msgspec.field(default_factory=dict)


class FusionEntry(_Strict, frozen=True):
    """How the model runs. ``payload_wait_ms`` is how long a step waits for a payload that its manifest names;
    ``cache_mib`` bounds the payloads kept meanwhile."""

    threads: Positive = 1
    providers: tuple[str, ...] = ("cpu",)
    contributions: bool = True
    payload_wait_ms: Positive = 50
    cache_mib: Positive = 256


def wrong_suffix(path: str) -> str:
    """Why a recording is not to have this name, in words: it ends as another kind of file does. Nothing if it ends in
    `.mcap`, or in no suffix: what follows the last point of `walk-1.5s` or `{session}.{time}` is none."""
    suffix = Path(path).suffix
    if suffix.lower() == ".mcap" or not _KIND.fullmatch(suffix):
        return ""
    return f"it ends in `{suffix}`, and a recording is an MCAP file; name it like {Path(path).with_suffix('.mcap')}"


class RecordEntry(_Strict, frozen=True):
    """A recording, an MCAP file: ``path`` may hold ``{session}`` and ``{time}``; ``streams`` null means all. With
    ``limit_mb`` it is a ring: ``path`` is a folder of segments, each a recording of ``segment_s`` at most, all of them
    together never larger than the limit; the oldest are deleted, and later sessions go on in the same ring."""

    path: str
    streams: tuple[str, ...] | None = None
    compression: Literal["zstd", "lz4", "none"] = "zstd"
    queue_mib: Positive = 128
    limit_mb: Annotated[int, msgspec.Meta(ge=RING_LEAST_MB)] | None = None
    segment_s: Annotated[float, msgspec.Meta(ge=RING_LEAST_S)] = 60.0

    def __post_init__(self) -> None:
        if self.limit_mb is None:
            if wrong := wrong_suffix(self.path):
                raise ValueError(f"`path: {self.path}`: {wrong}.")
            return
        if "{" in self.path or self.path.endswith(".mcap"):
            raise ValueError(
                f"`path: {self.path}` names a file for each session, but with `limit_mb` all sessions share one "
                "folder of segments; name a folder, like `path: ../recordings/edge`, or leave `limit_mb` out."
            )

    @property
    def limit_bytes(self) -> int | None:
        """Bytes of all segments of a ring; None for a single file."""
        return None if self.limit_mb is None else self.limit_mb * 1_000_000


class CurveEntry(_Strict, frozen=True):
    """Keys for an endpoint that other hosts can reach: its own secret key file, and the public key files of those who
    may listen. `sensorium keys` makes them."""

    secret: Path
    allow: tuple[Path, ...]


class TransportEntry(_Strict, frozen=True):
    """``predictions``: ``ipc`` (in the session's own folder alone), or also at an endpoint like tcp://127.0.0.1:5599;
    beyond loopback it needs ``curve``. ``ring_mib`` bounds the shared memory of one source; ``lease_ms`` is how long a
    reader may hold a slot."""

    lease_ms: Positive = 1000
    ring_mib: Positive = 64
    predictions: Annotated[str, msgspec.Meta(extra={NUMBER: "Write `predictions: tcp://127.0.0.1:{}`."})] = "ipc"
    curve: CurveEntry | None = None

    def __post_init__(self) -> None:
        if self.predictions != "ipc" and not re.fullmatch(
            r"tcp://(\[[0-9a-fA-F:.]+\]|[^:\[\]]+):\d+", self.predictions
        ):
            raise ValueError(
                f"`predictions: {self.predictions}` is no endpoint; allowed are `ipc` and one like tcp://127.0.0.1:5599."
            )
        if wrong := wrong_port(self.predictions):
            raise ValueError(f"`predictions: {self.predictions}`: {wrong}")
        if self.predictions.startswith("tcp:") and self.curve is None and not _is_loopback(self.predictions):
            raise ValueError(
                f"`predictions: {self.predictions}` can be reached by other hosts, so it needs `curve`, with keys "
                "and a list of those who may listen (`sensorium keys` makes them); or use a loopback endpoint like "
                "tcp://127.0.0.1:5599."
            )


def wrong_port(endpoint: str) -> str:
    """What is wrong with the port of ``tcp://HOST:PORT``; nothing if nothing is. ZeroMQ takes any number, and listens
    at what is left of it in 16 bits; 0 would be a port that nobody knows."""
    port = endpoint.rpartition(":")[2]
    if not endpoint.startswith("tcp:") or not port.isdecimal() or 1 <= int(port) <= 65535:
        return ""
    return f"{port} is no port; ports go from 1 to 65535, like tcp://127.0.0.1:5599."


def _is_loopback(endpoint: str) -> bool:
    return re.fullmatch(r"tcp://(127(\.\d+){3}|localhost|\[::1\]):\d+", endpoint) is not None


class RestartEntry(_Strict, frozen=True):
    """When a node dies: restarted after ``backoff_ms``, doubled each time, at most ``limit`` times in ``window_s``.
    A node that says nothing for ``hang_ms`` hangs and is killed; one not ready after ``start_s`` has failed."""

    limit: NotNegative = 5
    window_s: PositiveFloat = 60.0
    backoff_ms: Positive = 200
    hang_ms: Positive = 10_000
    start_s: PositiveFloat = 30.0


class Rig(_Strict, frozen=True):
    """One rig. Without ``bundle`` nothing is aligned or predicted: a rig that only records."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64, examples=["rover-2"])]
    sources: dict[str, SourceEntry]
    bundle: BundleEntry | None = None
    align: AlignEntry = AlignEntry()
    fusion: FusionEntry = FusionEntry()
    record: RecordEntry | None = None
    transport: TransportEntry = TransportEntry()
    restart: RestartEntry = RestartEntry()


class RigFile(msgspec.Struct, frozen=True):
    """A rig and the document it was read from, which knows the line of every key."""

    rig: Rig
    document: Document

    def resolve(self, path: str) -> Path:
        """``path`` of the rig as an absolute path: relative ones are relative to the YAML file."""
        expanded = Path(path).expanduser()
        return expanded if expanded.is_absolute() else (self.document.folder / expanded).resolve()


def load_rig(path: Path | str) -> RigFile:
    """The rig in the file ``path``: types, units and names checked, sources' own settings not yet.
    Raises ConfigError."""
    return check_rig(Document.load(path))


def check_rig(document: Document) -> RigFile:
    """The rig in ``document``. Raises ConfigError, which says everything that is wrong."""
    rig_file, wrong = read_rig(document)
    return wrong.settled(rig_file)


def read_rig(document: Document) -> tuple[RigFile | None, Together]:
    """The rig in ``document`` as far as it can be read, and what is wrong."""
    rig, wrong = document.read(Rig)
    if rig is None and isinstance(document.value, dict):  # any name will do to see what else is wrong
        named = document.value.get("sources")
        sources = named if isinstance(named, dict) else {}
        rig, _ = document.read(Rig, value=document.value | {"name": "rig", "sources": sources})
    if rig is None:
        return None, wrong
    named = document.value.get("sources")
    if named == {}:
        wrong.add(document.error(("sources",), "a rig needs at least one source, like `camera: {kind: camera}`."))
    for name in named if isinstance(named, dict) else ():
        with wrong:
            check_source_name(document, name, ("sources",))
    return RigFile(rig, document), wrong


def names_a_source(name: str) -> bool:
    """Whether a source can be called so."""
    return re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) is not None and name not in CORE


def check_source_name(document: Document, name: str, at: Where) -> None:
    """Raises ConfigError unless the key ``name`` of the mapping ``at`` can name a source."""
    if not names_a_source(name):
        raise document.error(
            (*at, name),
            f"`{name}` cannot name a source: use up to 32 lower-case letters, digits and _, starting with a "
            f"letter, and none of {listed(CORE)}.",
        )


def long_times(document: Document) -> list[str]:
    """Milliseconds that are so many that somebody may have meant another unit, in sentences."""
    return [
        f"{document.place(at)}: {plain(value)} ms are {plain(value / 1000)} s; is that meant?"
        for at, value in document.numbers()
        if str(at[-1]).endswith("_ms") and value > LONG_MS
    ]


def check_environment() -> list[str]:
    """What is wrong with the installed packages, in sentences; empty if nothing."""
    wheels = [name for name in ("opencv-python", "opencv-python-headless", "opencv-contrib-python",
                                "opencv-contrib-python-headless") if _installed(name)]  # fmt: skip
    if len(wheels) > 1:
        return [
            f"{' and '.join(wheels)} are installed together; they overwrite each other's files, and cv2 then breaks "
            f"in ways that look like something else. Run: pip uninstall -y {' '.join(wheels)} && "
            "pip install opencv-python-headless."
        ]
    return []


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def config_schema() -> dict[str, Any]:
    """The JSON Schema of a rig, for editors. A source's own settings are open in it."""
    schema = msgspec.json.schema(Rig, schema_hook=lambda type_: {"type": "string"} if type_ is Path else {})
    schema["$defs"]["SourceEntry"]["additionalProperties"] = True
    schema["$defs"]["SourceEntry"]["properties"].pop("settings")
    return schema
