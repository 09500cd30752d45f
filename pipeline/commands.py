"""What the commands do, once ``pipeline.cli`` has understood what was asked.

A command returns when it is done and raises otherwise: a SensoriumError says by its ``exit_code`` whether the user
asked wrongly or it failed.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from pipeline.errors import ConfigError, Interrupted, RecordingError, SensoriumError, install, typed
from pipeline.outside import naming, uncreatable
from pipeline.paths import NewFile, existing, find_rig, new_file, own_bundle, recorded_mapping, write_whole
from pipeline.strict import listed, nearest

if TYPE_CHECKING:
    from pipeline.config import RecordEntry, RigFile
    from pipeline.status import SessionRef


SILENT_NS = 3_000_000_000
"""How long an address may be silent before ``subscribe`` says so."""


def run(
    rig: str | None,
    *,
    record: Path | None,
    json: bool,
    duration_s: float | None,
    predictions: str | None,
    allow_code: bool,
) -> None:
    """``sensorium run``."""
    rig_file = _load(rig, predictions, allow_code)
    entry = _record_entry(rig_file, record) if record is not None else None
    _run(rig_file, entry, json=json, duration_s=duration_s, allow_code=allow_code)


def record(
    rig: str | None,
    out: Path | None,
    *,
    json: bool,
    duration_s: float | None,
    predictions: str | None,
    allow_code: bool,
) -> None:
    """``sensorium record``."""
    rig_file = _load(rig, predictions, allow_code)
    if out is None and rig_file.rig.record is None:
        raise ConfigError(f"{rig_file.document.path} has no key `record`, so say where to: add -o session.mcap.")
    entry = _record_entry(rig_file, out) if out is not None else rig_file.rig.record
    _run(rig_file, entry, json=json, duration_s=duration_s, allow_code=allow_code)


def _load(rig: str | None, predictions: str | None, allow_code: bool) -> RigFile:
    """The rig meant, with its predictions published at another endpoint if that was asked for."""
    from pipeline.config import TransportEntry
    from pipeline.plan import load_to_plan

    rig_file = load_to_plan(find_rig(rig), allow_code)
    if predictions is None:
        return rig_file
    kept = msgspec.structs.asdict(rig_file.rig.transport)
    try:
        transport = TransportEntry(**{**kept, "predictions": predictions})
    except ValueError as error:
        raise ConfigError(f"--predictions: {error}") from None
    return msgspec.structs.replace(rig_file, rig=msgspec.structs.replace(rig_file.rig, transport=transport))


def _record_entry(rig_file: RigFile, out: Path) -> RecordEntry:
    """The rig's wishes about a recording, but for its place: a file that is named is no ring."""
    from pipeline.config import RecordEntry

    path = new_file(out)
    return msgspec.structs.replace(rig_file.rig.record or RecordEntry(path=""), path=str(path), limit_mb=None)


def _run(
    rig_file: RigFile, entry: RecordEntry | None, *, json: bool, duration_s: float | None, allow_code: bool
) -> None:
    from pipeline.launch import Session
    from pipeline.plan import taken
    from pipeline.show import Show, print_summary
    from pipeline.terminal import console

    shows: list[Show] = []  # the session tells what happens to whoever shows it, who needs the session first
    with console(sys.stderr).status(f"checking {rig_file.document.path}"):
        session = Session(rig_file, lambda event: shows[0].event(event), allow_code, entry)
    if said := taken(rig_file, session.plan.record):
        _say(said)
    shows.append(Show(session, json))
    try:
        with shows[0] as show:
            session.run(duration_s, on_tick=show.tick)
    finally:
        status = session.status()
        if session.failure is None or any(stream.total for stream in status.streams.values()):
            print_summary(shows[0].summary, json, status)


def replay(
    recording: Path, bundle: Path | None, *, speed: float | None, json: bool, out: Path | None, allow_code: bool
) -> None:
    """``sensorium replay``."""
    from pipeline.bundle import load_bundle
    from pipeline.clock import SystemClock
    from pipeline.recording import RecordingReader, lacks
    from pipeline.replay import paced, replay_predictions
    from pipeline.show import POLL_MS, output_for, print_summary
    from pipeline.summary import Summary
    from pipeline.terminal import Lines

    summary = Summary()
    with RecordingReader(existing(recording)) as reader, ExitStack() as stack:
        model = load_bundle(bundle or own_bundle(recording, reader.info), allow_code)
        if not reader.info.complete:
            _say(f"{recording.name} is incomplete: {lacks(reader)}; what can be read is replayed")
        kept = to_file = None
        stack.enter_context(ended_politely())
        if out is not None:
            writable(out, "-o")
            kept = stack.enter_context(NewFile(out))
            to_file = Lines(kept.file)
        output = stack.enter_context(closing(output_for(json, f"{recording.name}   model {model.name}", summary)))
        predictions = replay_predictions(
            reader, model, streams=recorded_mapping(reader.info, recording, model), note=_say
        )
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


def verify(recording: Path, bundle: Path | None, *, json: bool, allow_code: bool) -> bool:
    """``sensorium replay --verify``: whether everything was made again and nothing differs."""
    from pipeline import verify as verifying
    from pipeline.bundle import load_bundle
    from pipeline.recording import RecordingReader
    from pipeline.recording_damage import damage
    from pipeline.reports import verification_text
    from pipeline.terminal import console

    screen = console(sys.stderr)
    existing(recording)
    try:
        with RecordingReader(recording) as reader, screen.status("making it again") as status:
            verifying.check_windows(reader)
            model = load_bundle(bundle or own_bundle(recording, reader.info), allow_code)
            found = verifying.verify(
                reader,
                model,
                streams=recorded_mapping(reader.info, recording, model),
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


def faults(recording: Path, file: Path, bundle: Path | None, *, json: bool, allow_code: bool) -> None:
    """``sensorium replay --faults``."""
    from pipeline.bundle import load_bundle
    from pipeline.faultbench import fault_bench
    from pipeline.faults import load_faults
    from pipeline.findings import fault_text
    from pipeline.recording import RecordingReader
    from pipeline.terminal import console

    screen = console(sys.stderr)
    with RecordingReader(existing(recording)) as reader, screen.status("running without faults") as status:
        model = load_bundle(bundle or own_bundle(recording, reader.info), allow_code)
        mapping = recorded_mapping(reader.info, recording, model)
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


def explain_running(session: str | None, *, window: int | None, count: int | None, json: bool) -> None:
    """``sensorium explain`` on a session that runs."""
    from rich.live import Live

    from pipeline.clock import SystemClock
    from pipeline.explain_live import Attached
    from pipeline.findings import explanation_text, window_text
    from pipeline.terminal import Part, Stack, console

    ref = _live(session, "explain")
    screen = console(sys.stdout)
    steady = screen.is_terminal and not json and window is None
    count = count if json or steady or count else 1
    said = None
    with Attached(ref) as attached, ExitStack() as stack, suppress(KeyboardInterrupt):
        live = stack.enter_context(Live(console=screen, auto_refresh=False, transient=True)) if steady else None
        if window is not None:
            found = attached.window(window)
            print_json(found) if json else screen.print(window_text(found))
            return
        shown = 0
        while Path(ref.dir).exists() and (count is None or shown < count):
            second = SystemClock()
            while second.now_ns() < EXPLAIN_EVERY_NS:
                attached.turn()
            said = attached.explanation()
            shown += 1
            if live is not None:
                whole = Part("explanation", 0, False, explanation_text(said), divisible=True)
                live.update(Stack([whole]), refresh=True)
            elif json:
                _print_line(said)
            else:
                screen.print(explanation_text(said))
    if live is not None and said is not None:
        screen.print(explanation_text(said))  # the last one stays, and whole: now it may be higher than the screen


EXPLAIN_EVERY_NS = 1_000_000_000


def writable(out: Path, option: str, what: str = "file") -> Path:
    """``out``, absolute, if it can be written and destroys nothing. ConfigError, before there is anything to lose."""
    whole = new_file(out, what)
    if why := uncreatable(out):
        raise ConfigError(f"{out} cannot be created: {why}; name another {what} with {option}.")
    return whole


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def subscribe(
    endpoint: str | None,
    session: str | None,
    *,
    json: bool,
    count: int | None,
    key: Path | None = None,
    hub_key: Path | None = None,
) -> None:
    """``sensorium subscribe``."""
    from pipeline.clock import SystemClock
    from pipeline.refusals import Repeated
    from pipeline.show import POLL_MS, output_for, print_summary
    from pipeline.subscriber import Subscription
    from pipeline.summary import Summary

    title, endpoint, folder = _session(endpoint, session)
    summary, waiting = Summary(), SystemClock()
    summary.endpoint = endpoint if folder is None else ""
    told, refusals = folder is not None, Repeated()
    with Subscription(endpoint, key=key, hub_key=hub_key) as subscription:
        output = output_for(json, f"{title}   Ctrl-C stops", summary)
        try:
            while (count is None or summary.predictions < count) and (folder is None or folder.exists()):
                if not told and (summary.predictions or waiting.now_ns() > SILENT_NS):
                    told = True
                    if not summary.predictions:
                        _say(f"nothing has come from {endpoint} yet; if no session publishes there, {_begin(endpoint)}")
                for refusal in refusals.new([subscription.refusal] if subscription.refusal else []):
                    told = True
                    _say(refusal)
                left = None if count is None else count - summary.predictions
                for prediction in subscription.receive(POLL_MS)[:left]:
                    summary.add(prediction)
                    output.prediction(prediction)
                output.refresh()
        except KeyboardInterrupt:
            pass
        finally:
            output.close()
    print_summary(summary, json)


def _begin(endpoint: str) -> str:
    """How to start a session of which ``subscribe`` will hear: at an address of the host alone only its own says where
    it is."""
    if endpoint.startswith("tcp:"):
        return f"start one with: sensorium run RIG --predictions {endpoint}"
    return "start one with: sensorium run RIG, and listen to it with: sensorium subscribe, without an address"


def _session(endpoint: str | None, session: str | None) -> tuple[str, str, Path | None]:
    """A title, the endpoint given or that of the session meant, and the folder that is gone when that session is over.
    Raises ConfigError."""
    if endpoint is not None:
        return endpoint, endpoint, None
    from pipeline.transport import endpoint_path

    found = _live(session, "subscribe")
    # Inside the session, where no keys are asked for.
    return f"{found.rig}   session {found.id}", endpoint_path(Path(found.dir), "fusion"), Path(found.dir)


def _live(session: str | None, command: str) -> SessionRef:
    """The session that runs on this machine: the only one, or that of this name. Raises ConfigError, which says what
    to type for the newest of several."""
    from pipeline.launch import live_sessions

    live = {found.id: found for found in live_sessions()}
    if session is not None and session not in live:
        raise ConfigError(f"no session `{session}` runs here.{nearest(session, live)} {_running(live)}")
    if session is None and not live:
        raise ConfigError(f"{_running(live)} Start one: sensorium run RIG.")
    if session is None and len(live) > 1:
        raise ConfigError(f"{_running(live)} Name one: sensorium {command} --session {next(iter(live))}")
    return live[session] if session is not None else next(iter(live.values()))


def _running(live: dict[str, Any]) -> str:
    said = ", ".join(f"`{key}` ({found.rig})" for key, found in live.items())
    return f"Running now: {said}." if live else "No session runs on this machine now."


def evaluate(
    bundle: Path,
    recordings: list[Path],
    *,
    html: Path | None,
    json: bool,
    robustness: bool,
    by: str | None,
    jobs: int,
    allow_code: bool,
) -> None:
    """``sensorium evaluate``."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn

    from pipeline import evaluate as evaluating
    from pipeline.bars import Bar
    from pipeline.terminal import console

    if html is not None:
        writable(html, "--html")
    columns = (BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    try:
        with ended_politely(), Bar(*columns, console=console(sys.stderr), transient=True) as bar:
            task = bar.add_task("checking what was named", total=None)
            found = evaluating.evaluate(
                bundle, recordings, robustness=robustness, by=by, jobs=jobs, allow_code=allow_code,
                progress=lambda done, total, what: bar.update(task, completed=done, total=total, description=what),
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        left = "" if html is None else f", and {html} is not made"
        raise interrupted(f"interrupted before the evaluation was done; nothing of it is kept{left}", stop) from None
    if json:
        print_json(found)
    else:
        from pipeline.evaluate_text import evaluation_text

        console(sys.stdout).print(evaluation_text(found))
    if html is not None:
        from pipeline.evaluate_html import page

        write_whole(html, page(found))
        print(f"{html}: written", file=sys.stderr)


def print_schema(name: str) -> None:
    """``sensorium schema``."""
    from pipeline.schemas import schema

    print_json(schema(name))


def check(rig: str | None, *, json: bool, allow_code: bool) -> None:
    """``sensorium check``."""
    from pipeline.devices import absences
    from pipeline.launch import check_rig_file
    from pipeline.node import decode_settings
    from pipeline.plan import import_paths, load_to_plan, make_plan
    from pipeline.source import load_kind

    rig_file = load_to_plan(find_rig(rig), allow_code)
    warnings = check_rig_file(rig_file, allow_code)
    plan = make_plan(rig_file, allow_code)
    classes = {source.name: load_kind(source.kind, import_paths(rig_file)) for source in plan.sources}
    absent = absences({s.name: (classes[s.name], decode_settings(classes[s.name], s.settings)) for s in plan.sources})
    if json:
        found = {"rig": rig_file.rig.name, "streams": plan.streams, "mapping": plan.mapping}
        print_json(found | {"warnings": warnings, "absent": absent})
        return
    from pipeline.reports import plan_table
    from pipeline.terminal import console

    console(sys.stdout).print(plan_table(plan, warnings, absent))


def devices(*, json: bool) -> None:
    """``sensorium devices``."""
    from pipeline.devices import look
    from pipeline.reports import devices_text
    from pipeline.terminal import console

    with console(sys.stderr).status("looking"):
        places = look()
    if json:
        print_json({"places": places})
    else:
        console(sys.stdout).print(devices_text(places), soft_wrap=True)


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


def train(
    file: Path,
    out: Path,
    *,
    seed: int | None,
    epochs: int | None,
    device: str,
    resume: bool,
    init_from: Path | None,
    freeze: bool,
    jobs: int | None,
    json: bool,
) -> None:
    """``sensorium train``."""
    from pipeline.curves import Bars, curves, score_table
    from pipeline.terminal import console

    absent = [name for name in ("torch", "onnx", "onnxscript") if find_spec(name) is None]
    if absent:
        raise ConfigError(f"training needs {listed(absent)}, not installed here. {install('learn')}")
    from pipeline import learn
    from pipeline.learn.loop import CHECKPOINT

    again = _train_command(file, out, seed=seed, epochs=epochs, init_from=init_from, freeze=freeze, device=device,
                           jobs=jobs)  # fmt: skip
    out = writable(out, "-o", "folder")
    config = learn.read_config(file)
    if init_from is not None or freeze:
        config = learn.beginning_from(config, init_from, freeze)
    config = learn.with_overrides(config, seed=seed, epochs=epochs)

    def kept() -> bool:
        return any(out.with_name(f"{out.name}.unfinished").rglob(CHECKPOINT))

    if kept() and not resume:
        _say(f"a training of {out.name} was interrupted here, and is begun anew; `--resume` would go on with it")
    if resume and not kept():
        _say(f"no training of {out.name} was interrupted here: nothing is to be gone on with, and it begins anew")
    tell = _print_line if json else None
    try:
        with ended_politely(), Bars(console(sys.stderr), tell) as bars:
            trained, made = learn.train_bundle(config, out, device=device, resume=resume, watch=bars,
                                              jobs=jobs or _cores())  # fmt: skip
    except KeyboardInterrupt as stop:
        if out.exists():
            raise interrupted(f"interrupted; {out} was whole already", stop) from None
        if kept():
            raise interrupted(f"interrupted; go on with:\n{again} --resume", stop) from None
        raise interrupted(f"interrupted before an epoch was over; begin again with:\n{again}", stop) from None
    except OSError as error:
        if kept():
            mended = "" if isinstance(error, BrokenPipeError) else "when what is said below is mended, "
            _say(f"the last whole epoch is kept; {mended}go on with:\n{again} --resume")
        raise
    if json:
        _print_line({"bundle": str(out), "sha256": made.bundle.sha256, "scores": made.scores})
        return
    screen = console(sys.stdout)
    untested = "no labelled window was kept to test on: nothing is known of how good it is on others"
    screen.print(curves(trained.curves), "")
    screen.print(score_table(made.scores) if made.scores else untested)
    screen.print(f"\n{out}: done; its README.md says of what, and how good it is", soft_wrap=True)


def _train_command(file: Path, out: Path, **options: Any) -> str:
    """What to type for a training with these options, as they were given."""
    words = ["sensorium", "train", str(file), "-o", str(out)]
    for name, value in options.items():
        if value is not None and value is not False and value != "auto":
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return shlex.join(words)


class _Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP came, whose number it holds."""


def interrupted(text: str, stop: KeyboardInterrupt) -> Interrupted:
    """With the exit code that a shell says of the signal."""
    error = Interrupted(text)
    if isinstance(stop, _Terminated):
        error.exit_code = 128 + int(stop.args[0])
    return error


@contextmanager
def ended_politely() -> Iterator[None]:
    """Within it SIGTERM and a closed terminal do what Ctrl-C does: nothing half done stays behind, and it can be gone
    on with."""
    from pipeline.calls import ending_signals

    asked = False

    def terminated(number: int, _: object) -> None:
        nonlocal asked
        if not asked:  # a closed terminal sends two, and the second would end what tidies up after the first
            asked = True
            raise _Terminated(number)

    others = [number for number in ending_signals() if number != signal.SIGINT]
    before = {number: signal.signal(number, terminated) for number in others}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def making(out: Path) -> Iterator[None]:
    """Within it ``out`` is written, which appears only when it is whole: what ends it early says whether it is
    made."""
    try:
        with ended_politely():
            yield
    except KeyboardInterrupt as stop:
        made = "was whole already" if os.path.lexists(out) else "is not made"
        raise interrupted(f"interrupted; {out} {made}", stop) from None


def _cores() -> int:
    """How many this process may use; at most as many as have enough memory with them, 0.3 GB each."""
    return min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)


def _print_line(value: Any) -> None:
    _print_bytes(msgspec.json.encode(value))


def _print_bytes(data: bytes) -> None:
    """A text for programs, which is UTF-8 whatever people's is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data + b"\n")
    sys.stdout.buffer.flush()


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
        _say(text)
    screen.print(f"{out}: done; see it with: sensorium info {typed(out)}", soft_wrap=True)


def make_keys(name: str, out: Path) -> None:
    """``sensorium keys``."""
    from pipeline.session import check_name
    from pipeline.transport import make_curve_keys

    check_name("a pair of keys", name)
    try:
        public, secret = make_curve_keys(out, name)
    except FileExistsError as error:
        raise ConfigError(f"{error} exists already, and keys are never replaced; choose another name.") from None
    except OSError as error:
        raise ConfigError(f"no keys can be written to {out}: {error.strerror}; name another folder with -o.") from None
    print(f"{public}: copy this to the other side")
    print(f"{secret}: keep this here, and show it to nobody")


def join(address: str, key: Path | None, hub_key: Path | None, *, insecure: bool, once: bool, allow_code: bool) -> None:
    """``sensorium node --join``."""
    import signal
    import threading

    from pipeline import joining
    from pipeline.calls import ending_signals, setting
    from pipeline.link import LinkSpec

    absolute = [None if path is None else str(path.absolute()) for path in (key, hub_key)]
    stop = threading.Event()
    for number in ending_signals():
        signal.signal(number, setting(stop))
    joining.join(
        LinkSpec(address, absolute[0], absolute[1], insecure),
        say=lambda text: print(text, file=sys.stderr, flush=True),
        stop=stop, once=once, allow_code=allow_code, paths=(str(Path.cwd()),),
    )  # fmt: skip


def simulate(
    world: str,
    out: Path,
    *,
    seed: int,
    duration_s: float,
    ranges: Literal["train", "held-out"],
    count: int | None,
    jobs: int,
    json: bool,
) -> None:
    """``sensorium simulate``."""
    from pipeline.bars import Bar
    from pipeline.sheet import size
    from pipeline.sim import generate
    from pipeline.terminal import console

    if world != "rover":
        raise ConfigError(f"there is no world `{world}` to simulate; there is `rover`.")
    written: list[generate.Written] = []
    there = 0
    hidden = not sys.stderr.isatty()
    try:
        with ended_politely(), Bar(console=console(sys.stderr), transient=True, disable=hidden) as bar:
            if count is None:
                task = bar.add_task(f"simulating {out.name}", total=duration_s)
                file = writable(out, "-o")
                written.append(
                    generate.record_session(
                        file, seed, ranges, duration_s, progress=lambda s: bar.update(task, completed=s)
                    )
                )
            else:
                if out.is_file():
                    raise ConfigError(f"{out} is a file; several sessions go into a folder: -o FOLDER.")
                seeds = range(seed, seed + count)
                there = _sessions_there(out, seeds, ranges)
                task = bar.add_task(f"simulating {count - there} sessions", total=count - there)
                with closing(generate.record_sessions(out, seeds, ranges, duration_s, jobs)) as sessions:
                    for session in sessions:
                        written.append(session)
                        bar.advance(task)
    except KeyboardInterrupt as stop:
        if count is None:
            kept = f"{out} holds what was simulated until then" if out.exists() else "nothing was written"
            raise interrupted(f"interrupted; {kept}", stop) from None
        done = _sessions_there(out, range(seed, seed + count), ranges)
        raise interrupted(f"interrupted after {done} of {count} sessions; the same command goes on", stop) from None
    if json:
        print_json(written[0] if count is None else written)
        return
    room = f", {size(sum(session.bytes for session in written))}" if written else ""
    stays = "was there already and is left as it is" if there == 1 else "were there already and are left as they are"
    left = f"; {there} {stays}" if there else ""
    shown = written[0].file if written else generate.session_file(out, seed, ranges)
    print(f"{out}: {len(written)} session{'s' * (len(written) != 1)} of {duration_s:g} s{room}{left}; "
          f"see {'one' if count is not None else 'it'} with: sensorium info {typed(shown)}",
          file=sys.stderr)  # fmt: skip


def _sessions_there(folder: Path, seeds: Iterable[int], ranges: Literal["train", "held-out"]) -> int:
    from pipeline.sim.generate import session_file

    return sum(session_file(folder, seed, ranges).exists() for seed in seeds)


def node(kind: str, spec: Path) -> None:
    """``sensorium node``."""
    from pipeline.life import read_spec
    from pipeline.node import run_node

    found = read_spec(spec).kind
    if found != kind:
        raise ConfigError(f"{spec} is the spec of a node of kind `{found}`, not `{kind}`.")
    run_node(spec)


def print_json(value: Any) -> None:
    """What ``--json`` asks for."""
    _print_bytes(msgspec.json.format(msgspec.json.encode(value), indent=2))
