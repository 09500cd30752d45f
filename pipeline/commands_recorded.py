"""The commands that look into a recording, be it damaged: ``info``, ``explain`` and ``recover``."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.commands import making, print_json, writable
from pipeline.errors import ConfigError, RecordingError
from pipeline.paths import existing, own_bundle, recorded_mapping

if TYPE_CHECKING:
    from pipeline.align import AlignSpec
    from pipeline.recording import RecordingReader
    from pipeline.recording_salvage import Damage

T = TypeVar("T")


def info(recording: Path, *, json: bool) -> bool:
    """``sensorium info``. Whether the recording is undamaged."""
    from pipeline.explain import latency_ms, recorded_predictions
    from pipeline.labels import told_labels
    from pipeline.recording import about, seconds_of, summarise

    def look(reader: RecordingReader) -> dict[str, Any]:
        found = summarise(reader) | about(reader)
        end_ns = max((stream["end_ns"] for stream in found["streams"].values()), default=0)
        if labels := seconds_of(told_labels(reader), end_ns):
            found["labels_s"] = labels
        if latency := latency_ms(recorded_predictions(reader)):
            found["latency_ms"] = latency
        return found

    found, damage = _seen(recording, look)
    if json:
        print_json(found | ({} if damage is None else {"damage": damage}))
        return damage is None
    from pipeline.reports import damage_text, recording_table
    from pipeline.terminal import console

    console(sys.stdout).print(recording_table(found))
    if damage is not None:
        console(sys.stdout).print(damage_text(damage, recording))
    return damage is None


def explain(recording: Path, bundle: Path | None, *, window: int | None, json: bool, allow_code: bool) -> bool:
    """``sensorium explain``. Whether the recording is undamaged."""
    from pipeline import explain as explaining
    from pipeline.explain_window import explain_window
    from pipeline.findings import explanation_text, window_text
    from pipeline.reports import damage_text
    from pipeline.terminal import console

    def look(reader: RecordingReader) -> explaining.Session:
        return explaining.Session(reader, _aligned_by(reader, recording, bundle, allow_code))

    with console(sys.stderr).status("reading"):
        session, damage = _seen(recording, look)
    found: Any = explaining.explain(session) if window is None else explain_window(session, window)
    if json:
        print_json(found)
    else:
        console(sys.stdout).print(explanation_text(found) if window is None else window_text(found))
    if damage is not None:
        console(sys.stderr if json else sys.stdout).print(damage_text(damage, recording))
    return damage is None


def recover(recording: Path, out: Path, *, partial: bool, json: bool) -> None:
    """``sensorium recover``."""
    from pipeline.recording_salvage import recover as recovering
    from pipeline.reports import recovery_text
    from pipeline.terminal import console

    existing(recording)
    place = writable(out, "-o")
    with making(out), console(sys.stderr).status("reading") as status:
        made = recovering(
            recording, place, partial=partial,
            progress=lambda t_ns: status.update(f"writing {out.name}: {t_ns / 1e9:.0f} s"),
        )  # fmt: skip
    if json:
        print_json(made)
    else:
        console(sys.stdout).print(recovery_text(made, recording, out))


def _seen(recording: Path, look: Callable[[RecordingReader], T]) -> tuple[T, Damage | None]:
    """What ``look`` sees in a recording; in what is intact of it, and what is not, if it is damaged. RecordingError if
    nothing can be had of it."""
    from pipeline.recording import RecordingReader
    from pipeline.recording_damage import damage
    from pipeline.recording_reader import ForeignLayoutError
    from pipeline.recording_salvage import SalvagedReader

    try:
        with RecordingReader(existing(recording)) as reader:
            found = look(reader)
        if damage(recording) is None:
            return found, None
    except ForeignLayoutError:
        raise
    except RecordingError:
        pass
    with SalvagedReader(recording) as salvaged:
        return look(salvaged), salvaged.damage


def _aligned_by(reader: RecordingReader, recording: Path, bundle: Path | None, allow_code: bool) -> AlignSpec | None:
    """The rules and limits of the session's windows, or of the bundle's that is named; None if nobody knows them."""
    from pipeline.bundle import load_bundle
    from pipeline.faultbench import limits_of
    from pipeline.plan import live_spec
    from pipeline.replay import plan_replay

    named = bundle is not None
    if bundle is None:
        try:
            bundle = own_bundle(recording, reader.info)
        except ConfigError:
            return None
    model = load_bundle(bundle, allow_code)
    mapping = recorded_mapping(reader.info, recording, model)
    if named:
        plan_replay(reader, model, mapping)  # which refuses a model that has no stream of this recording
    return live_spec(model, limits_of(reader), mapping, reader.streams)
