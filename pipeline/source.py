"""What a sensor is to Sensorium: one class with settings, ``open``, ``read`` and ``close``.

A source knows its device and the session clock and nothing else. It hands over readings with honest times; numbering,
epochs, bounds, beats, retries and sockets are the shell's (``pipeline.node``). A whole sensor, in or out of this tree:

    class Thermometer(Source):
        class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
            port: Path
        payload = "signal"

        def open(self) -> None: ...             # import the driver and open the device here; raise SensorError
        def read(self) -> Reading | None: ...   # at most about 100 ms
        def close(self) -> None: ...

and in a rig ``sources: {water: {kind: "my_package.thermometer:Thermometer", port: /dev/ttyUSB0}}``.
``pipeline.checks.check_source`` tells whether such a class keeps the contract.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np

from pipeline.clock import Clock
from pipeline.errors import ConfigError, listed, nearest
from pipeline.messages import PAYLOADS, AudioLayout, ImuLayout, Layout, Payload, SignalLayout

KINDS: dict[str, str] = {
    "camera": "nodes.camera:Camera",
    "microphone": "nodes.microphone:Microphone",
    "imu": "nodes.imu:Imu",
    "lidar": "nodes.lidar:Lidar",
    "text": "nodes.text:Text",
    "lsl": "nodes.lsl:Lsl",
    "synthetic": "nodes.synthetic:Synthetic",
    "replay": "nodes.replay:Replay",
    "simulated": "nodes.simulated:Simulated",
    "remote": "nodes.remote:Remote",
}
"""Everything that a rig may name as ``kind`` without a module. The only list of it."""

CORE_KINDS: dict[str, str] = {
    "align": "nodes.align:Align",
    "fusion": "nodes.fusion:Fusion",
    "record": "nodes.record:Record",
}
"""The nodes that the launcher adds to a rig's sources."""


class Reading(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One reading of a device, before it is numbered. All times int64 ns on the session clock, but ``t_device_ns``.

    Within one life of the device's clock each reading begins at or after the bound of the one before; corrections of
    the clock are slewed into the times. ``new_epoch`` says that the clock jumped or restarted before this reading.
    ``bound_ns`` promises that no later reading of the epoch begins before it; left out, it follows from the payload.
    """

    layout: Layout
    data: Any
    t_capture_ns: int
    t_end_ns: int
    t_receipt_ns: int
    t_device_ns: int | None = None
    uncertainty_ns: int = 0
    new_epoch: bool = False
    bound_ns: int | None = None


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A device on this machine. ``settings`` are what a rig must say of it, beside its kind; None if it cannot be a
    source, and then ``detail`` says why. ``detail`` may have several lines."""

    name: str
    detail: str = ""
    settings: dict[str, Any] | None = None


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """One place where a source looked for devices. ``looked_for`` says what and where, in words that follow "looked
    for"; ``trouble`` is the sentence that says why it could not look, "" if it could."""

    looked_for: str
    found: list[Found] = []
    trouble: str = ""


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How often a source is set to speak: the time between two messages and between two samples of them, None where
    only the device knows. ``gather_ns``: messages gather for so long and come together, None if each comes when it is
    full. ``bytes_per_s`` is at most how much comes of it, None where every message may be as large as its
    ``largest_payload``; where that is far more than usual, as of pictures that are compressed, and nobody knows what is
    usual, it is 0. ``fewer`` and ``sooner`` say which settings make its messages fewer, and come sooner."""

    message_ns: float | None = None
    sample_ns: float | None = None
    gather_ns: float | None = None
    bytes_per_s: float | None = None
    fewer: str = "lower `rate_hz`"
    sooner: str = "raise `rate_hz`"

    @classmethod
    def of(cls, rate_hz: float | None, message_ms: float | None = None, key: str = "") -> Pace:
        """The pace at ``rate_hz``, of messages or, where these are blocks of ``message_ms`` by the setting ``key``, of
        samples."""
        sample_ns = None if rate_hz is None else 1e9 / rate_hz
        if message_ms is None:
            return cls(message_ns=sample_ns)
        message_ns = message_ms * 1e6 if sample_ns is None else max(message_ms * 1e6, sample_ns)
        return cls(message_ns=message_ns, sample_ns=sample_ns, fewer=f"raise `{key}`", sooner=f"lower `{key}`")


def default_bound_ns(layout: Layout, t_capture_ns: int, t_end_ns: int) -> int:
    """The promise that a reading's kind makes by itself: an audio block ends where the next begins; samples of a
    batch and single moments are followed by later ones."""
    kind = type(layout)
    if kind is AudioLayout:
        return t_end_ns
    return (t_end_ns if kind is ImuLayout or kind is SignalLayout else t_capture_ns) + 1


class SourceContext(Protocol):
    """What a source is given; nothing else of the system reaches it."""

    name: str
    """The stream's name."""
    clock: Clock

    def loan(self, layout: Layout, nbytes: int | None = None) -> np.ndarray[Any, Any]:
        """A writable buffer u1 [nbytes] for a payload of ``layout`` (``nbytes`` only where the layout does not say):
        in shared memory where a slot is free, else fresh. Fill it and pass it, or a slice from its start, as
        ``Reading.data``; then do not touch it again."""

    def count(self, what: str, n: int = 1) -> None:
        """Counts ``n`` drops that the source made itself, by reason: "stale", "overflow". Shown in its health."""

    def note(self, text: str) -> None:
        """The source's health in words; "" is well. Sent with the next beat."""


class Source:
    """Base of all sources. ``Settings`` is decoded strictly from the rig, without touching hardware."""

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        """No settings."""

    payload: ClassVar[Payload]

    def __init__(self, settings: Any, context: SourceContext) -> None:
        self.settings, self.context = settings, context

    @classmethod
    def payload_of(cls, settings: Any) -> Payload:
        """The payload type of a source with these settings."""
        return cls.payload

    @classmethod
    def largest_payload(cls, settings: Any) -> int:
        """Bytes of the largest payload to expect, 0 if unknown: what a slot of shared memory must hold."""
        return 0

    @classmethod
    def pace(cls, settings: Any) -> Pace:
        """How often a source with these settings speaks, as far as they say; for `sensorium check`, which warns where
        that does not fit the rest of the rig."""
        return Pace()

    @classmethod
    def discover(cls) -> list[Search]:
        """What is on this machine, for `sensorium devices`. It only looks: it writes to no bus and changes no setting.
        A source that has no place to look leaves this out."""
        return []

    @classmethod
    def absence(cls, settings: Any) -> str:
        """For `sensorium check`: that the device named by ``settings`` is not here, or may not be opened by this user,
        in a sentence; "" where it can be, and where it would have to be disturbed to tell. It only looks, as
        ``discover``; absent devices are waited for."""
        return ""

    def open(self) -> None:
        """Imports the driver and opens the device. Raises SensorError; called again after a failure."""

    def read(self) -> Reading | list[Reading] | None:
        """What has come since the last call, oldest first; blocks at most about 100 ms. Raises SensorError when the
        device fails, EOFError where the data end by nature."""
        raise NotImplementedError

    def close(self) -> None:
        """Gives the device back. May be called twice, and after a failed ``open``; never raises."""

    def bound_ns(self) -> int | None:
        """While nothing is read: nothing that begins before this time will come any more. None: no new promise."""
        return None


def load_kind(kind: str, paths: Iterable[Path | str] = ()) -> type[Any]:
    """The class that ``kind`` names: a shipped kind, or ``package.module:Class`` found as Python finds modules, then
    in ``paths``. Raises ConfigError."""
    target = KINDS.get(kind) or CORE_KINDS.get(kind) or kind
    module_name, colon, class_name = target.partition(":")
    if not colon or not class_name or not module_name:
        raise ConfigError(
            f"`{kind}` is no kind of source.{nearest(kind, KINDS)} Shipped are {listed(KINDS)}; a source of your own "
            "is named `package.module:Class`."
        )
    for path in map(str, paths):
        if path not in sys.path:
            sys.path.append(path)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way while it is imported
        missing = isinstance(error, ModuleNotFoundError) and error.name in _parents(module_name)
        hint = " It must be installed, or lie beside the rig or in the current folder." if missing else ""
        raise ConfigError(
            f"the module `{module_name}` of kind `{kind}` cannot be imported: {type(error).__name__}: {error}.{hint}"
        ) from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type):
        classes = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == module_name]
        raise ConfigError(
            f"the module `{module_name}` has no class `{class_name}`.{nearest(class_name, classes)} "
            f"Its classes are {listed(classes) or 'none'}."
        )
    return found


def _parents(module_name: str) -> set[str]:
    parts = module_name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts) + 1)}


_NO_READ = (inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction)


def _takes(called: Any, count: int) -> bool:
    """Whether so many arguments fit."""
    try:
        inspect.signature(called).bind(*[None] * count)
    except TypeError:
        return False
    return True


def check_class(kind: str, source_class: type[Source]) -> None:
    """Raises ConfigError, which says all of it, if ``source_class`` lacks what its shell needs: what can be known of a
    class without a device."""
    wrong = []
    if not (isinstance(source_class.Settings, type) and issubclass(source_class.Settings, msgspec.Struct)):
        wrong.append("its `Settings` is no msgspec.Struct: write `class Settings(msgspec.Struct, frozen=True, "
                     "forbid_unknown_fields=True, kw_only=True)`")  # fmt: skip
    if not _takes(source_class.payload_of, 1):
        wrong.append("its `payload_of` does not take `(cls, settings)` as a `@classmethod`")
    if getattr(source_class.payload_of, "__func__", None) is Source.payload_of.__func__:  # type: ignore[attr-defined]
        payload = getattr(source_class, "payload", None)
        if payload not in PAYLOADS:
            said = "it has no `payload`" if payload is None else f"its `payload` is {payload!r}"
            wrong.append(f"{said}; allowed are {listed(PAYLOADS)}")
    if source_class.read is Source.read or not callable(source_class.read):
        wrong.append("it has no method `read(self)`, which returns a Reading, a list of them, or None")
    elif any(test(source_class.read) for test in _NO_READ):
        wrong.append("its `read` yields or is async; it returns a Reading, a list of them, or None, each time anew")
    if not _takes(source_class, 2):
        wrong.append("its `__init__` does not take `(self, settings, context)`; leave it out, or take these and begin "
                     "with `super().__init__(settings, context)`")  # fmt: skip
    if wrong:
        raise ConfigError(f"the class of `{kind}` cannot be a source: {'; '.join(wrong)}.")
