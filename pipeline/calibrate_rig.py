"""What a calibration means for a rig: its offsets as JSON, as lines to paste, or written into the file.

A recording holds the offsets that were already added when it was made, so that what is found comes on top of them. A
stream whose interval holds 0 is right as far as anybody can tell, and is left as it is.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import msgspec

from pipeline.calibrate import Correction, Offset, Solution
from pipeline.config import check_rig
from pipeline.errors import ConfigError, RecordingError
from pipeline.recalibrate import moved_ns
from pipeline.recording import RecordingReader
from pipeline.rig_edit import load_exactly, with_offset, write
from pipeline.strict import Document


def recorded_offsets(reader: RecordingReader) -> dict[str, float]:
    """The offset that each stream's times have in them already: ``offset_ms`` of the sources of the rig that made the
    recording (0 for what came from elsewhere), and what it was recalibrated by since."""
    entries: dict[str, Any] = {}
    if reader.info.rig is not None:
        try:
            entries = dict(check_rig(Document(reader.info.rig, reader.path)).rig.sources)
        except ConfigError as error:
            raise RecordingError(f"{reader.path} was made by a rig of another version: {error}") from None
    for entry in list(entries.values()):  # sources of other hosts lie within their host's
        if entry.kind == "remote":
            with contextlib.suppress(msgspec.ValidationError, KeyError):
                entries |= msgspec.convert(entry.settings["sources"], dict[str, _Offset])
    moved = moved_ns(reader)
    return {
        name: (entries[name].offset_ms if name in entries else 0.0) + moved.get(name, 0) / 1e6
        for name in reader.streams
    }


class _Offset(msgspec.Struct, frozen=True):
    offset_ms: float = 0.0


def rig_values(solution: Solution, recorded: dict[str, float]) -> dict[str, tuple[float, float]]:
    """By stream what to set: offset_ms and offset_uncertainty_ms."""
    values = {}
    for name, found in solution.corrections.items():
        if abs(found.offset_ns) > found.uncertainty_ns:
            offset_ms = round(recorded.get(name, 0.0) + found.offset_ns / 1e6, 1)
            values[name] = (offset_ms, round(found.uncertainty_ns / 1e6 + 0.05, 1))
    return values


def rig_lines(solution: Solution, recorded: dict[str, float]) -> dict[str, str]:
    """The same as YAML."""
    return {
        name: f"offset_ms: {offset:g}, offset_uncertainty_ms: {uncertainty:g}"
        for name, (offset, uncertainty) in rig_values(solution, recorded).items()
    }


def apply(rig: Path, solution: Solution, recorded: dict[str, float]) -> list[str]:
    """Writes the offsets into the rig file and says which. All or none: ConfigError where the file does not have such
    a source, has another offset than the recording was made with, or cannot be edited safely; RecordingError if there
    is no offset to write because nothing was decided."""
    if not solution.corrections:
        raise RecordingError(f"{rig} stays as it is: {solution.contradiction or 'no offset could be decided'}.")
    document = load_exactly(rig)
    sources = check_rig(document).rig.sources
    values = rig_values(solution, recorded)
    for name, (offset_ms, uncertainty_ms) in values.items():
        if name not in sources:
            raise document.error(
                ("sources",), f"there is no source `{name}`, as the recording has, to write an offset to."
            )
        if sources[name].offset_ms != recorded.get(name, 0.0):
            raise document.error(
                ("sources", name),
                f"`offset_ms` is {sources[name].offset_ms:g} here, but was {recorded.get(name, 0.0):g} when this was "
                "recorded, and what was found comes on top of that; calibrate a recording of the rig as it is.",
            )
        document = with_offset(document, name, offset_ms, uncertainty_ms)
    if values:
        check_rig(document)
        write(document)
    return [f"{name}: {text}" for name, text in rig_lines(solution, recorded).items()]


def report(pairs: list[Offset], solution: Solution, recorded: dict[str, float]) -> dict[str, Any]:
    """What a program reads."""
    values = rig_values(solution, recorded)
    return {
        "reference": solution.reference,
        "offsets": {
            name: _correction(found)
            | (
                {"rig": dict(zip(("offset_ms", "offset_uncertainty_ms"), values[name], strict=True))}
                if name in values
                else {}
            )
            for name, found in solution.corrections.items()
        },
        "contradiction": solution.contradiction or None,
        "pairs": [_pair(pair) for pair in pairs],
    }


def _correction(found: Correction) -> dict[str, Any]:
    return {"offset_ms": found.offset_ns / 1e6, "uncertainty_ms": found.uncertainty_ns / 1e6, "by": found.by}


def _pair(pair: Offset) -> dict[str, Any]:
    return {
        "reference": pair.reference, "stream": pair.stream, "decided": pair.decided,
        "offset_ms": None if pair.offset_ns is None else pair.offset_ns / 1e6,
        "interval_ms": None if pair.interval_ns is None else [ns / 1e6 for ns in pair.interval_ns],
        "reason": pair.reason or None, "events": pair.events,
        "correlation": {"before": pair.before, "after": pair.after},
        "chance": pair.chance, "rival": pair.rival, "places": pair.places,
    }  # fmt: skip
