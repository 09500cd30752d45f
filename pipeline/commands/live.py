"""The commands around a session: its rig, its devices and keys, its predictions; and ``schema``, of all texts."""

from __future__ import annotations

import signal
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from pipeline.commands.tools import print_json, print_line, say
from pipeline.errors import ConfigError
from pipeline.paths import find_rig, new_file
from pipeline.strict import nearest

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
    from pipeline.show import GRACE_NS, Show, print_summary
    from pipeline.terminal import console

    shows: list[Show] = []  # the session tells what happens to whoever shows it, who needs the session first
    with console(sys.stderr).status(f"checking {rig_file.document.path}"):
        session = Session(rig_file, lambda event: shows[0].event(event), allow_code, entry)
    if said := taken(rig_file, session.plan.record):
        say(said)
    shows.append(Show(session, json))
    try:
        with shows[0] as show:
            session.run(duration_s, on_tick=show.tick)
    finally:
        status = session.status()
        if session.failure is None or any(stream.total for stream in status.streams.values()):
            shows[0].last(lambda: print_summary(shows[0].summary, json, status))
        if shows[0].left_out:
            why = "was not waited for (Ctrl-C)" if shows[0].hurried else f"took none for {GRACE_NS / 1e9:.0f} s"
            left = f"{shows[0].left_out} predictions at its end are left out"
            shows[0].last(lambda: say(f"whoever reads the predictions {why}; {left}"))


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
                        say(f"nothing has come from {endpoint} yet; if no session publishes there, {_begin(endpoint)}")
                for refusal in refusals.new([subscription.refusal] if subscription.refusal else []):
                    told = True
                    say(refusal)
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


EXPLAIN_EVERY_NS = 1_000_000_000


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
                print_line(said)
            else:
                screen.print(explanation_text(said))
    if live is not None and said is not None:
        screen.print(explanation_text(said))  # the last one stays, and whole: now it may be higher than the screen


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
    if live:
        return f"Running now: {said}."
    from pipeline.transport import sessions_root

    return (
        f"No session runs on this machine now (looked in {sessions_root()}; one of another user, or that was started "
        "with another XDG_RUNTIME_DIR or TMPDIR, is not there)."
    )


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


def node(kind: str, spec: Path) -> None:
    """``sensorium node``."""
    from pipeline.life import read_spec
    from pipeline.node import run_node

    found = read_spec(spec).kind
    if found != kind:
        raise ConfigError(f"{spec} is the spec of a node of kind `{found}`, not `{kind}`.")
    run_node(spec)


def print_schema(name: str) -> None:
    """``sensorium schema``."""
    from pipeline.schemas import schema

    print_json(schema(name))
