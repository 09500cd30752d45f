"""Which stream of a recording serves which of a bundle: the one that ``--stream`` asks for, else the one that did when
the session ran, else the one of its name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from pipeline.bundle import Bundle
from pipeline.config import check_rig
from pipeline.errors import ConfigError, Together
from pipeline.recording import RecordingReader
from pipeline.strict import Document, listed, nearest

LEAVE_OUT = "null"
"""What a rig writes for a stream of the bundle that nothing serves."""


def asked_streams(texts: Iterable[str]) -> dict[str, str | None]:
    """What ``--stream camera=front`` asks for, by stream of the bundle; None for one that is left out
    (``camera=null``). ConfigError for what is no such pair, and where a stream of either side is given twice."""
    asked, wrong = dict[str, str | None](), Together()
    for text in texts:
        with wrong:
            name, equals, held = (part.strip() for part in text.partition("="))
            if not (name and equals and held):
                raise ConfigError(
                    f"--stream {text}: found {text!r}, expected one like camera=front: a stream of the bundle, and the "
                    f"one of the recording that serves it (camera={LEAVE_OUT} leaves it out)."
                )
            if name in asked:
                raise ConfigError(
                    f"--stream {text}: the bundle's `{name}` is given {_said(asked[name])} already; name it once."
                )
            served = [one for one, by in asked.items() if by == held]
            if served:
                raise ConfigError(
                    f"--stream {text}: `{held}` of the recording serves the bundle's `{served[0]}` already, and each "
                    "needs a stream of its own."
                )
            asked[name] = None if held == LEAVE_OUT else held
    return wrong.settled(asked)


def recorded_mapping(reader: RecordingReader, bundle: Bundle) -> dict[str, str | None]:
    """Which stream served which when the session ran, from the rig in the recording, as far as the bundle has them."""
    if reader.info.rig is None:
        return {}
    with suppress(ConfigError):  # a rig of another version tells nothing, and nothing is instantiated from it
        entry = check_rig(Document(reader.info.rig, Path(reader.path))).rig.bundle
        return {name: rig for name, rig in (entry.streams if entry else {}).items() if name in bundle.streams}
    return {}


def session_mapping(
    reader: RecordingReader,
    bundle: Bundle,
    asked: Mapping[str, str | None] | None = None,
    elsewhere: Collection[str] = (),
) -> dict[str, str | None]:
    """Which stream of a recording serves which of ``bundle``: as ``asked``, else as when the session ran. A stream that
    is asked for and that only others, ``elsewhere``, hold is passed over. ConfigError for what cannot be as asked."""
    mapping, wrong = recorded_mapping(reader, bundle), Together()
    for name, held in (asked or {}).items():
        with wrong:
            _check_name(name, held, bundle)
            if held is None or held in reader.streams:
                _check_payload(reader, bundle, name, held)
                mapping[name] = held
            elif held not in elsewhere:
                raise ConfigError(
                    f"{_option(name, held)}: {reader.path} has no stream `{held}`; it has "
                    f"{listed(sorted(reader.streams)) or 'none'}.{nearest(held, reader.streams)}"
                )
    with wrong:
        if not wrong.found and asked:
            _check_whole(reader, bundle, mapping, asked)
    return wrong.settled(mapping)


def _said(held: str | None) -> str:
    return "nothing (it is left out)" if held is None else f"`{held}`"


def _option(name: str, held: str | None) -> str:
    return f"--stream {name}={LEAVE_OUT if held is None else held}"


def _check_name(name: str, held: str | None, bundle: Bundle) -> None:
    if name in bundle.streams:
        return
    turned = f" The bundle's comes first: {_option(held, name)}." if held in bundle.streams and held else ""
    raise ConfigError(
        f"{_option(name, held)}: the bundle `{bundle.name}` has no stream `{name}`; it has {listed(bundle.streams)}."
        f"{turned or nearest(name, bundle.streams)}"
    )


def _check_payload(reader: RecordingReader, bundle: Bundle, name: str, held: str | None) -> None:
    needed = bundle.streams[name].payload
    if held is None or (carried := reader.streams[held]) == needed:
        return
    fit = sorted(one for one, payload in reader.streams.items() if payload == needed)
    raise ConfigError(
        f"{_option(name, held)}: the bundle `{bundle.name}` needs {needed} on its stream `{name}`, and `{held}` of "
        f"{reader.path} carries {carried}. "
        + (f"Of {needed} it has {listed(fit)}." if fit else f"It has none that carries {needed}.")
    )


def _check_whole(
    reader: RecordingReader, bundle: Bundle, mapping: Mapping[str, str | None], asked: Mapping[str, str | None]
) -> None:
    """Raises ConfigError where nothing is left, or where what was asked for takes a stream from another."""
    names = {name: mapping.get(name, name) for name in bundle.streams}
    if not any(names.values()):
        raise ConfigError(f"--stream leaves out every stream of the bundle `{bundle.name}`; leave one in.")
    for name, held in asked.items():
        others = [one for one, by in names.items() if one != name and by == held and held is not None]
        if others and mapping.get(name, name) == held:
            raise ConfigError(
                f"{_option(name, held)}: `{held}` of {reader.path} serves the bundle's `{others[0]}`, and each needs a "
                f"stream of its own. Say what serves `{others[0]}` then, --stream {others[0]}=…, or leave it out: "
                f"{_option(others[0], None)}."
            )
