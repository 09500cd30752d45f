"""The commands on a recording: looking into it, replaying it, mending it, making one of another system's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from pipeline.commands.tools import ended_politely, interrupted, making, print_json, say, writable
from pipeline.errors import ConfigError, RecordingError, SensoriumError, Together, typed
from pipeline.outside import naming
from pipeline.paths import NewFile, existing, find_rig, new_file, own_bundle
from pipeline.strict import nearest

if TYPE_CHECKING:
    from pipeline.align import AlignSpec
    from pipeline.recording import RecordingReader
    from pipeline.recording.salvage import Damage

T = TypeVar("T")


def info(recordings: Sequence[Path], *, json: bool) -> bool:
    """``sensorium info``. Whether all recordings are undamaged. Raises at the end for those that cannot be read."""
    whole, wrong = True, Together()
    for number, recording in enumerate(recordings):
        if len(recordings) > 1 and not json:
            print(("\n" if number else "") + str(recording))
        with wrong:
            whole &= _info(recording, json)
    return wrong.settled(whole)


def _info(recording: Path, json: bool) -> bool:
    """Shows one recording. Whether it is undamaged."""
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


def explain(
    recording: Path, bundle: Path | None, streams: Sequence[str], *, window: int | None, json: bool, allow_code: bool
) -> bool:
    """``sensorium explain``. Whether the recording is undamaged."""
    from pipeline import explain as explaining
    from pipeline.explain_window import explain_window
    from pipeline.findings import explanation_text, window_text
    from pipeline.mapping import asked_streams
    from pipeline.reports import damage_text
    from pipeline.terminal import console

    asked = asked_streams(streams)

    def look(reader: RecordingReader) -> explaining.Session:
        return explaining.Session(reader, _aligned_by(reader, recording, bundle, asked, allow_code))

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
    from pipeline.recording.salvage import recover as recovering
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
    from pipeline.recording.damage import damage
    from pipeline.recording.reader import ForeignLayoutError
    from pipeline.recording.salvage import SalvagedReader

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


def _aligned_by(
    reader: RecordingReader, recording: Path, bundle: Path | None, asked: Mapping[str, str | None], allow_code: bool
) -> AlignSpec | None:
    """The rules and limits of the session's windows, or of the bundle's that is named; None if nobody knows them."""
    from pipeline.bundle import load_bundle
    from pipeline.faultbench import limits_of
    from pipeline.mapping import session_mapping
    from pipeline.plan import live_spec
    from pipeline.replay import plan_replay
    from pipeline.verify import check_streams

    chosen = bundle is not None or asked
    if bundle is None:
        try:
            bundle = own_bundle(recording, reader.info)
        except ConfigError:
            if asked:
                raise
            return None
    model = load_bundle(bundle, allow_code)
    mapping = session_mapping(reader, model, asked)
    if asked:
        check_streams(reader, asked, "explain tells of those", "use `sensorium replay`")
    if chosen:
        plan_replay(reader, model, mapping)  # which refuses a model that has no stream of this recording
    return live_spec(model, limits_of(reader), mapping, reader.streams)


def replay(
    recording: Path,
    bundle: Path | None,
    streams: Sequence[str],
    *,
    speed: float | None,
    json: bool,
    out: Path | None,
    allow_code: bool,
) -> None:
    """``sensorium replay``."""
    from pipeline.bundle import load_bundle
    from pipeline.clock import SystemClock
    from pipeline.mapping import asked_streams, session_mapping
    from pipeline.recording import RecordingReader, lacks
    from pipeline.replay import paced, replay_predictions
    from pipeline.show import POLL_MS, output_for, print_summary
    from pipeline.summary import Summary
    from pipeline.terminal import Lines

    summary, asked = Summary(), asked_streams(streams)
    with RecordingReader(existing(recording)) as reader, ExitStack() as stack:
        model = load_bundle(bundle or own_bundle(recording, reader.info), allow_code)
        mapping = session_mapping(reader, model, asked)
        if not reader.info.complete:
            say(f"{recording.name} is incomplete: {lacks(reader)}; what can be read is replayed")
        kept = to_file = None
        stack.enter_context(ended_politely())
        if out is not None:
            writable(out, "-o")
            kept = stack.enter_context(NewFile(out))
            to_file = Lines(kept.file)
        output = stack.enter_context(closing(output_for(json, f"{recording.name}   model {model.name}", summary)))
        predictions = replay_predictions(reader, model, streams=mapping, note=say)
        shown = paced(((p, p.window.end_ns) for p in predictions), SystemClock(), speed)
        refreshed = SystemClock()
        stop: KeyboardInterrupt | None = None
        try:
            for prediction, _ in shown:
                summary.add(prediction)
                output.prediction(prediction)
                if to_file is not None and out is not None:
                    with naming(out):
                        to_file.prediction(prediction)
                if refreshed.now_ns() > POLL_MS * 1_000_000:
                    output.refresh()
                    refreshed = SystemClock()
        except KeyboardInterrupt as asked:
            stop = asked
        output.refresh()
        place = None if kept is None else kept.end(interrupted=stop is not None)
    if summary.predictions or stop is None:
        print_summary(summary, json)
    if stop is not None:
        left = f", so that {out} is not made; the predictions until then are in {place}" if place else ""
        raise interrupted(f"interrupted{left or f' before the end of {recording.name}'}", stop) from None


def verify(recording: Path, bundle: Path | None, streams: Sequence[str], *, json: bool, allow_code: bool) -> bool:
    """``sensorium replay --verify``: whether everything was made again and nothing differs."""
    from pipeline import verify as verifying
    from pipeline.bundle import load_bundle
    from pipeline.mapping import asked_streams, session_mapping
    from pipeline.recording import RecordingReader
    from pipeline.recording.damage import damage
    from pipeline.reports import verification_text
    from pipeline.terminal import console

    screen, asked = console(sys.stderr), asked_streams(streams)
    existing(recording)
    try:
        with RecordingReader(recording) as reader, screen.status("making it again") as status:
            verifying.check_windows(reader)
            model = load_bundle(bundle or own_bundle(recording, reader.info), allow_code)
            mapping = session_mapping(reader, model, asked)
            verifying.check_streams(reader, asked)
            found = verifying.verify(
                reader,
                model,
                streams=mapping,
                progress=lambda window: status.update(f"making it again: window {window}"),
            )
    except SensoriumError as error:
        if (text := damage(recording)) is None:
            raise
        found = verifying.Verification(session="")  # what it says of itself cannot be relied on
        found.damaged(f"{error}; {text}")
    if json:
        print_json(msgspec.to_builtins(found) | {"holds": found.holds})
    else:
        console(sys.stdout).print(verification_text(found))
    return found.holds


def faults(
    recording: Path, file: Path, bundle: Path | None, streams: Sequence[str], *, json: bool, allow_code: bool
) -> None:
    """``sensorium replay --faults``."""
    from pipeline.bundle import load_bundle
    from pipeline.faultbench import fault_bench
    from pipeline.faults import load_faults
    from pipeline.findings import fault_text
    from pipeline.mapping import asked_streams, session_mapping
    from pipeline.recording import RecordingReader
    from pipeline.terminal import console

    screen, asked = console(sys.stderr), asked_streams(streams)
    with RecordingReader(existing(recording)) as reader, screen.status("running without faults") as status:
        model = load_bundle(bundle or own_bundle(recording, reader.info), allow_code)
        mapping = session_mapping(reader, model, asked)
        used = set(model.rig_streams(mapping).values())
        found = fault_bench(
            reader,
            model,
            load_faults(file, used & set(reader.streams)),
            streams=mapping,
            progress=lambda run, window: status.update(f"{run}: window {window}"),
        )
    if json:
        print_json(found)
    else:
        console(sys.stdout).print(fault_text(found))


def calibrate(
    recording: Path,
    streams: list[str] | None,
    reference: str | None,
    *,
    within_ms: float,
    write: Path | None,
    json: bool,
) -> None:
    """``sensorium calibrate``."""
    from pipeline import calibrate as calibrating
    from pipeline.calibrate_rig import apply, recorded_offsets, report, rig_lines
    from pipeline.recording import RecordingReader
    from pipeline.reports import calibration_text
    from pipeline.terminal import console

    wanted = None if not streams else {*streams, *([reference] if reference else [])}
    rig = find_rig(str(write)) if write is not None else None
    screen = console(sys.stderr)
    with RecordingReader(existing(recording)) as reader, screen.status("comparing streams") as status:
        if reference is not None and reference not in reader.streams:
            raise ConfigError(f"{recording} has no stream `{reference}`.{nearest(reference, reader.streams)}")
        pairs = calibrating.calibrate(
            reader,
            wanted,
            round(within_ms * 1e6),
            progress=lambda t_ns: status.update(f"comparing streams: {t_ns / 1e9:.0f} s read"),
        )
        recorded = recorded_offsets(reader)
    solution = calibrating.solve(pairs, reference)
    if json:
        print_json(report(pairs, solution, recorded))
    else:
        lines = rig_lines(solution, recorded)
        console(sys.stdout).print(calibration_text(pairs, lines, solution.reference, solution.contradiction))
    if rig is not None:
        written = apply(rig, solution, recorded)
        print(f"{rig}: set {', '.join(written)}" if written else f"{rig}: nothing to set", file=sys.stderr)


def recalibrate(recording: Path, out: Path, offsets: list[str], *, find: bool, refit: list[str], json: bool) -> None:
    """``sensorium recalibrate``."""
    from pipeline.recalibrate import Shift, asked_shifts
    from pipeline.recalibrate import recalibrate as recalibrating
    from pipeline.recording import RecordingReader
    from pipeline.reports import recalibration_text
    from pipeline.terminal import console

    screen = console(sys.stderr)
    with making(out), RecordingReader(existing(recording)) as reader, screen.status("reading") as status:
        found: dict[str, Shift] = {}
        if find:
            from pipeline import calibrate as calibrating

            solution = calibrating.solve(calibrating.calibrate(reader))
            if not solution.corrections:
                raise RecordingError(f"{recording}: {solution.contradiction or 'no offset could be decided'}.")
            found = {
                name: Shift(offset_ns=one.offset_ns, uncertainty_ns=one.uncertainty_ns)
                for name, one in solution.corrections.items()
                if abs(one.offset_ns) > one.uncertainty_ns
            }
        shifts = asked_shifts(reader, offsets, refit, found)
        if not shifts:
            raise ConfigError("say what to correct: --offset STREAM=MS, --find, --refit STREAM, or several of them.")
        writable(out, "-o")
        made = recalibrating(
            reader, out.resolve(), shifts, lambda t_ns: status.update(f"writing {out.name}: {t_ns / 1e9:.0f} s")
        )
    if json:
        print_json(made)
    else:
        console(sys.stdout).print(recalibration_text(made))


def import_file(
    file: Path, out: Path, labels: Path | None, streams: str | None, metadata: Path | None, times: Path | None,
    *, json: bool,
) -> None:  # fmt: skip
    """``sensorium import``."""
    from collections import Counter

    from pipeline import importing
    from pipeline.terminal import console

    screen = console(sys.stderr)
    counts: Counter[str] = Counter()
    wanted = tuple(entry.strip() for entry in (streams or "").split(",") if entry.strip())
    if file.exists():  # else that is what to say
        writable(out, "-o")
    with making(out), screen.status(f"reading {file.name}") as status:
        info = importing.import_file(
            file,
            new_file(out),
            importing.ImportOptions(streams=wanted, metadata=metadata, times=times),
            labels=labels,
            progress=lambda t_ns: status.update(f"reading {file.name}: {t_ns / 1e9:.0f} s taken over"),
            counts=counts,
        )
    left_out = info.extra.get("left_out", "")
    if json:
        print_json({"recording": str(out), "streams": dict(sorted(counts.items())), "complete": info.complete,
                     "note": info.note, "left_out": left_out})  # fmt: skip
        return
    for stream, count in sorted(counts.items()):
        print(f"{stream}  {count} messages")
    for text in filter(None, [left_out and f"left out: {left_out}", info.note]):
        say(text)
    screen.print(f"{out}: done; see it with: sensorium info {typed(out)}", soft_wrap=True)
