"""``sensorium``: parses the command line and hands over to ``pipeline.commands``; nothing else.

Exit codes: 0 done, 1 it failed, 2 you asked wrongly, 3 verified and found different, or looked at and found damaged,
130 interrupted (143 by SIGTERM). What a command needs is imported when it runs, so that ``--help`` and a typing error
answer at once.
"""

from __future__ import annotations

import os
import signal

if (_on_interrupt := signal.getsignal(signal.SIGINT)) is signal.default_int_handler:
    # A Ctrl-C while the command is still being loaded ends it without a word. An exception would be shown with a trace,
    # for `main` is not there yet, or would end within a module that is half made.
    try:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    except ValueError:  # loaded by another thread, which hears of no signal
        _on_interrupt = None

import math
import shutil
import sys
import tempfile
import textwrap
import traceback
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError, Interrupted, SensoriumError
from pipeline.outside import discard_output, explained, lost_output, ready_streams, unwritable

DIFFERENT = 3
"""Exit code: verified, and found different; or looked at, and found damaged."""

app = typer.Typer(
    name="sensorium",
    help="Sensors into one stream of live predictions, with time you can trust.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain text: quick to print, and the same in a pipe
)

RigArgument = Annotated[str | None, typer.Argument(metavar="RIG", help="a YAML file, or the name of one in configs/")]
Recording = Annotated[Path, typer.Argument(metavar="RECORDING", help="an MCAP file")]
Json = Annotated[bool, typer.Option("--json", help="JSON on standard output")]
JsonLines = Annotated[bool, typer.Option("--json", help="one JSON object a line on standard output")]
AllowCode = Annotated[bool, typer.Option("--allow-code", help="let the bundle run Python code of its own")]
Streams = Annotated[
    list[str] | None,
    typer.Option("--stream", metavar="NAME=STREAM", help="let STREAM of the recording be the bundle's NAME"),
]
Predictions = Annotated[
    str | None, typer.Option(metavar="ENDPOINT", help="publish predictions here too, like tcp://127.0.0.1:5599")
]


def _seconds(text: str) -> float:
    """How long, for a session: any number of nanoseconds from 0 on. ConfigError."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds * 1e9 < math.inf:
        raise ConfigError(f"--duration: found '{text}', expected seconds, a number at least 0, like 5 or 0.5.")
    return seconds


Duration = Annotated[
    float | None, typer.Option("--duration", metavar="S", parser=_seconds, help="stop after S seconds")
]


def _new_name(text: str) -> Path:
    from pipeline.paths import new_name

    return new_name(text)


class Speed(StrEnum):
    """How fast a recording is replayed; the predictions are the same."""

    half = "0.5"
    real = "1"
    max = "max"


class Ranges(StrEnum):
    """The worlds that simulated sessions are drawn from."""

    train = "train"
    held_out = "held-out"


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"sensorium {version('sensorium')}")
        raise typer.Exit


@app.callback()
def every_command(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    """What is not a command's own."""


@app.command()
def run(
    rig: RigArgument = None,
    record: Annotated[
        Path | None, typer.Option(metavar="OUT", parser=_new_name, help="record the session to this MCAP file")
    ] = None,
    json: JsonLines = False,
    duration: Duration = None,
    predictions: Predictions = None,
    allow_code: AllowCode = False,
) -> None:
    """Run a rig and show its predictions.

    On a terminal a live table; elsewhere, or with --json, one JSON line a prediction. Without a rig: says which exist.

    \b
    Example:
      sensorium run configs/demo.yaml
      sensorium run configs/demo.yaml --duration 10 --json
    """
    from pipeline.commands import live

    live.run(rig, record=record, json=json, duration_s=duration, predictions=predictions, allow_code=allow_code)


@app.command()
def record(
    rig: RigArgument = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="OUT", parser=_new_name, help="the MCAP file to write")
    ] = None,
    json: JsonLines = False,
    duration: Duration = None,
    predictions: Predictions = None,
    allow_code: AllowCode = False,
) -> None:
    """Run a rig and record its session.

    A rig without a bundle is only recorded; with one, windows and predictions are recorded too.

    \b
    Example:
      sensorium record configs/demo.yaml -o session.mcap --duration 10
    """
    from pipeline.commands import live

    live.record(rig, out, json=json, duration_s=duration, predictions=predictions, allow_code=allow_code)


@app.command()
def replay(
    recording: Recording,
    bundle: Annotated[Path | None, typer.Option(metavar="BUNDLE", help="another model than the session's own")] = None,
    streams: Streams = None,
    speed: Annotated[Speed, typer.Option(help="pace; changes nothing else")] = Speed.max,
    json: Annotated[
        bool, typer.Option("--json", help="one JSON object a line; with --verify and --faults one in all")
    ] = False,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="OUT", help="write the JSON lines here")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="make the live session again and compare")] = False,
    faults: Annotated[
        Path | None, typer.Option("--faults", metavar="FILE", help="compare with what faults would have done")
    ] = None,
    allow_code: AllowCode = False,
) -> None:
    """Predict a recorded session again.

    In event time: the windows and predictions are the same at any speed and under any load. With --verify instead by
    the deadlines that the live session met: every window and every prediction is made again and compared with the
    recorded one; exit code 3 if anything differs or cannot be verified. With --faults by the live rules, once without
    and once with each of the faults in FILE, and what that did to windows, predictions and accuracy.

    A stream of the bundle is served by the one that served it when the session ran, else by the one of its name; with
    --stream camera=front its `camera` is served by the recording's `front`, with --stream camera=null by none. The
    option may be given several times.

    \b
    Example:
      sensorium replay session.mcap --verify
      sensorium replay session.mcap
      sensorium replay recordings/demo.mcap --bundle models/demo --speed 1
      sensorium replay drive.mcap --bundle models/rover --stream camera=front --stream lidar=top
      sensorium replay recordings/demo.mcap --bundle models/demo --faults examples/faults.yaml
    """
    from pipeline.commands import recorded

    if sum((verify, faults is not None, out is not None)) > 1:
        raise ConfigError("--verify, --faults and --out ask for different things of a replay; choose one of them.")
    mapped = streams or []
    if verify:
        holds = recorded.verify(recording, bundle, mapped, json=json, allow_code=allow_code)
        raise typer.Exit(0 if holds else DIFFERENT)
    if faults is not None:
        recorded.faults(recording, faults, bundle, mapped, json=json, allow_code=allow_code)
    else:
        pace = None if speed is Speed.max else float(speed.value)
        recorded.replay(recording, bundle, mapped, speed=pace, json=json, out=out, allow_code=allow_code)


@app.command()
def subscribe(
    endpoint: Annotated[str | None, typer.Argument(metavar="ENDPOINT", help="like tcp://127.0.0.1:5599")] = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="a session that runs on this machine")] = None,
    json: JsonLines = False,
    count: Annotated[int | None, typer.Option("--count", metavar="N", min=1, help="stop after N predictions")] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="this host's own secret key")] = None,
    hub_key: Annotated[Path | None, typer.Option(metavar="FILE", help="the public key of who publishes")] = None,
) -> None:
    """Show the predictions of a running session.

    The only session of this machine, or the one named, or whatever publishes at an endpoint; on another host with keys.

    \b
    Example:
      sensorium subscribe
      sensorium subscribe tcp://127.0.0.1:5599 --json
    """
    from pipeline.commands import live

    live.subscribe(endpoint, session, json=json, count=count, key=key, hub_key=hub_key)


@app.command()
def check(rig: RigArgument = None, json: Json = False, allow_code: AllowCode = False) -> None:
    """Check a rig without starting it.

    Settings, model, streams, installed packages; and whether the devices that it names are here, which is a note and no
    error, because absent devices are waited for. Nothing is opened.

    \b
    Example:
      sensorium check configs/demo.yaml
    """
    from pipeline.commands import live

    live.check(rig, json=json, allow_code=allow_code)


@app.command()
def devices(json: Json = False) -> None:
    """List the sensors that are on this machine.

    Cameras with their modes, sound inputs, serial ports, I2C buses, sensors that the kernel drives and Lab Streaming
    Layer streams, each with its line for a rig. It only looks; nothing is written to any device.

    \b
    Example:
      sensorium devices
      sensorium devices --json
    """
    from pipeline.commands import live

    live.devices(json=json)


@app.command()
def info(
    recordings: Annotated[list[Path], typer.Argument(metavar="RECORDING...", help="MCAP files")], json: Json = False
) -> None:
    """Show what a recording holds, or several, one after the other.

    When and by what it was recorded, how long each label was true (by X.labels.csv beside X.mcap, if that is there);
    of every stream its rate, losses, delays; with --json also statistics of what was measured. Of a damaged recording
    what can be read, and where it is damaged; exit code 3.

    \b
    Example:
      sensorium info recordings/demo.mcap
      sensorium info recordings/demo.mcap --json
      sensorium info recordings/edge/*.mcap
    """
    from pipeline.commands import recorded

    raise typer.Exit(0 if recorded.info(recordings, json=json) else DIFFERENT)


@app.command()
def explain(
    recording: Annotated[Path | None, typer.Argument(metavar="[RECORDING]", help="else a session that runs")] = None,
    window: Annotated[int | None, typer.Option("--window", metavar="N", help="what window N was made of")] = None,
    bundle: Annotated[Path | None, typer.Option(metavar="BUNDLE", help="another model than the session's own")] = None,
    streams: Streams = None,
    session: Annotated[str | None, typer.Option(metavar="ID", help="a session that runs on this machine")] = None,
    count: Annotated[int | None, typer.Option("--count", metavar="N", min=1, help="a running session, N times")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="JSON on standard output; of a running session one object a line")
    ] = False,
    allow_code: AllowCode = False,
) -> None:
    """Explain where every message of a session went.

    Per stream: sent, lost, used, superseded and so on; rates, jitter, delays; which stream the windows waited for, and
    how long. With --window the messages that one window was made of, and why something is missing in it. A damaged
    recording is explained as far as it can be read; exit code 3. --stream is as in `replay`.

    Without a recording: of the session that runs here, once a second on a terminal or with --json, else once.

    \b
    Example:
      sensorium explain session.mcap
      sensorium explain session.mcap --window 40
      sensorium explain recordings/demo.mcap --bundle models/demo --json
      sensorium explain --session 20260105T101500-3fd1
    """
    from pipeline.commands import live, recorded

    if recording is None:
        if bundle is not None or streams:
            raise ConfigError("a session that runs has its own model; --bundle and --stream are for a recording.")
        live.explain_running(session, window=window, count=count, json=json)
    elif session is not None or count is not None:
        raise ConfigError("a recording is explained once, and is no session that runs; leave one of them out.")
    else:
        whole = recorded.explain(recording, bundle, streams or [], window=window, json=json, allow_code=allow_code)
        raise typer.Exit(0 if whole else DIFFERENT)


@app.command()
def recover(
    recording: Recording,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="NEW", parser=_new_name, help="the MCAP file to write")],
    partial: Annotated[
        bool, typer.Option("--partial", help="also without its rig, or other than messages, if that is lost")
    ] = False,
    json: Json = False,
) -> None:
    """Write what is intact of a damaged recording to a new one.

    Every message that is left, bit for bit; what is lost becomes gaps, and the session incomplete, as if its recorder
    had lost it. The damaged file stays. One that ends too early, for its recorder was killed, gets an end.

    \b
    Example:
      sensorium recover damaged.mcap -o whole.mcap
    """
    from pipeline.commands import recorded

    recorded.recover(recording, out, partial=partial, json=json)


@app.command()
def calibrate(
    recording: Recording,
    streams: Annotated[
        list[str] | None, typer.Option("--stream", metavar="NAME", help="only this stream and others so named")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(metavar="STREAM", help="whose times are right; else the earliest stream's")
    ] = None,
    within: Annotated[
        float, typer.Option(metavar="MS", min=20.0, max=5000.0, help="how far to look, either way")
    ] = 500.0,
    write: Annotated[Path | None, typer.Option(metavar="RIG", help="set the offsets in this rig file")] = None,
    json: Json = False,
) -> None:
    """Find constant offsets between streams from what both have seen.

    From claps, knocks, steps, turns and speech: onsets of sound against motion in the picture, jolts of an IMU against
    sound, a gyroscope against the turning of the picture. Says "undecidable", and why, where the data cannot tell. An
    offset is what must be added to a stream's capture times: a stream stamped 80 ms late gets -80 ms.

    \b
    Example:
      sensorium calibrate session.mcap
      sensorium calibrate session.mcap --write configs/rig.yaml
    """
    from pipeline.commands import recorded

    recorded.calibrate(recording, streams, reference, within_ms=within, write=write, json=json)


@app.command()
def recalibrate(
    recording: Recording,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="NEW", parser=_new_name, help="the MCAP file to write")],
    offsets: Annotated[
        list[str] | None,
        typer.Option("--offset", metavar="STREAM=MS[,MS]", help="add this to a stream's times, and so unsure is it"),
    ] = None,
    find: Annotated[bool, typer.Option("--find", help="the offsets that `calibrate` finds in this recording")] = False,
    refit: Annotated[
        list[str] | None, typer.Option(metavar="STREAM", help="fit its clock again over the whole session; `all`")
    ] = None,
    json: Json = False,
) -> None:
    """Give an old recording better times; the original stays.

    From the raw stamps in its headers: a constant offset that is known by now, or a device's clock fitted again over
    the whole session. Windows and predictions came from the old times and are left out; `replay` makes them again.

    \b
    Example:
      sensorium recalibrate session.mcap -o better.mcap --offset imu=-80 --refit camera
    """
    from pipeline.commands import recorded

    recorded.recalibrate(recording, out, offsets or [], find=find, refit=refit or [], json=json)


@app.command()
def train(
    file: Annotated[Path, typer.Argument(metavar="TRAIN.yaml", help="which sessions, window, streams, and how")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="BUNDLE", help="the folder to write")],
    seed: Annotated[int | None, typer.Option(metavar="N", min=0, help="of all that is drawn; else the file's")] = None,
    epochs: Annotated[int | None, typer.Option(metavar="N", min=1, help="else the file's")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda or what torch calls it")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="go on where a training of this was interrupted")] = False,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", metavar="BUNDLE", help="begin with the weights of a trained bundle")
    ] = None,
    freeze: Annotated[bool, typer.Option("--freeze", help="keep the encoders of --init-from as they are")] = False,
    jobs: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, max=64, help="processes that prepare sessions; else one a core, 8 at most"),
    ] = None,
    json: JsonLines = False,
) -> None:
    """Train a model on labelled sessions.

    Makes a bundle that runs live, from windows that went through the same aligner: split by session, calibrated on
    sessions that were held out, scored for every subset of its streams on others, with a card. In the
    checkout `pip install -e '.[learn]'` brings what it needs.

    \b
    Example:
      sensorium train train.yaml -o models/mine
      sensorium train train.yaml -o models/mine --resume
    """
    from pipeline.commands import models

    models.train(
        file, out, seed=seed, epochs=epochs, device=device, resume=resume, init_from=init_from, freeze=freeze,
        jobs=jobs, json=json,
    )  # fmt: skip


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="a recording of some other system: a file or a folder")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", parser=_new_name, help="the MCAP file to write")],
    labels: Annotated[Path | None, typer.Option(metavar="FILE", help="what is true when: CSV or JSON")] = None,
    streams: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="take only these, NEW=NAME to rename: imu=/imu/data,/camera/image_raw"),
    ] = None,
    metadata: Annotated[Path | None, typer.Option(metavar="FILE", help="an Ouster's metadata, for its capture")] = None,
    times: Annotated[Path | None, typer.Option(metavar="FILE", help="the CSV with the times of pictures")] = None,
    json: Json = False,
) -> None:
    """Turn a foreign recording into one of ours.

    An audio-video file, a GoPro's with its motion sensors; a bag of ROS 1 or 2, an MCAP file; a network capture
    (pcap, pcapng) of a Velodyne or an Ouster; a folder of pictures with a CSV of their times.

    \b
    Example:
      sensorium import holiday.mp4 -o holiday.mcap
      sensorium import drive.bag -o drive.mcap --streams imu=/imu/data,lidar=/velodyne_points
    """
    from pipeline.commands import recorded

    recorded.import_file(file, out, labels, streams, metadata, times, json=json)


@app.command()
def simulate(
    world: Annotated[str, typer.Argument(metavar="WORLD", help="what to simulate: rover")],
    out: Annotated[str, typer.Option("-o", "--out", metavar="OUT", help="the MCAP file; with --count a folder")],
    seed: Annotated[int, typer.Option(min=0, help="which world; of several sessions the first's")] = 0,
    duration: Annotated[float, typer.Option("--duration", metavar="S", min=1.0, help="length of a session")] = 20.0,
    ranges: Annotated[Ranges, typer.Option(help="which worlds to draw from")] = Ranges.train,
    count: Annotated[int | None, typer.Option(metavar="N", min=1, help="so many sessions, seeds in a row")] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="with --count: so many at a time")] = 1,
    json: Json = False,
) -> None:
    """Record sessions of a simulated rig, with the truth.

    A rover in a physical simulation, seen by camera, microphone, IMU and LiDAR. Needs the extra `sim`. Files that are
    in the folder already are left as they are.

    \b
    Example:
      sensorium simulate rover -o session.mcap --seed 7
      sensorium simulate rover -o sessions --count 50 --duration 60 --jobs 2
    """
    from pipeline.commands import models

    place = _new_name(out) if count is None else Path(out)
    models.simulate(
        world, place, seed=seed, duration_s=duration, ranges=ranges.value, count=count, jobs=jobs, json=json
    )


@app.command()
def evaluate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="the folder of a model")],
    recordings: Annotated[list[Path], typer.Argument(metavar="RECORDING...", help="MCAP files, or folders of them")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="write a report with plots to this file")] = None,
    streams: Streams = None,
    json: Json = False,
    robustness: Annotated[bool, typer.Option("--robustness", help="also make each stream worse, step by step")] = False,
    by: Annotated[str | None, typer.Option(metavar="ATTRIBUTE", help="also by who, where, which day")] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, max=64, help="processes that share the work")] = 1,
    allow_code: AllowCode = False,
) -> None:
    """Say how good a model is on recordings whose truth is known.

    With every set of its streams: accuracy, calibration, prediction sets, how often it abstains, and which labels the
    streams that are left cannot tell apart. Intervals are over sessions. Labels are those in a recording, or in
    X.labels.csv (start_s,end_s,label) beside X.mcap. With --robustness what loss, noise and wrong times on each stream
    do to it, if nobody notices. --stream is as in `replay`, for those of the recordings that have such a stream.

    \b
    Columns, in per cent but for the set size:
      accuracy          the most probable label is the truth, abstained or not
      macro F1          the mean of the labels' F1, each counting alike
      calib. error      how far confidence is from how often it is right
      in set            the truth is in its set of all that it does not rule out
      set size          how many labels that set has in the mean
      abstains          windows in which it is too unsure to stand by its answer
      right if not      accuracy in the other windows
      cannot tell apart labels that these streams cannot tell from some other;
                        in their windows it abstains (`abstains there`), or is
                        `sure and wrong`: stands by a wrong answer
      most like         the label that this one is taken for most easily, and how
                        well the two are told apart (1 always, 0.5 never)
      X's share         how far stream X spoke for the label, where that was right

    \b
    Example:
      sensorium evaluate models/demo recordings/demo.mcap
      sensorium evaluate models/demo recordings/ --robustness --html report.html
    """
    from pipeline.commands import models

    models.evaluate(
        bundle, recordings, streams or [], html=html, json=json, robustness=robustness, by=by, jobs=jobs,
        allow_code=allow_code,
    )  # fmt: skip


@app.command()
def schema(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="prediction, config, bundle, training, info or evaluation")
    ],
) -> None:
    """Print the JSON Schema of a text format.

    prediction, info and evaluation are what programs get, config (or rig), bundle (or model, model.yaml) and training
    (or train, TRAIN.yaml) what people write.

    \b
    Example:
      sensorium schema prediction
    """
    from pipeline.commands import live

    live.print_schema(name)


@app.command()
def keys(
    name: Annotated[str, typer.Argument(metavar="NAME", help="whose keys: this host's name, say")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="FOLDER", help="where to")] = Path("keys"),
) -> None:
    """Make a pair of keys for what other hosts can reach.

    NAME.key is public: copy it to the other side. NAME.key_secret stays on this host.

    \b
    Example:
      sensorium keys hub
    """
    from pipeline.commands import live

    live.make_keys(name, out)


@app.command()
def node(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="what the node is, with --spec")] = None,
    spec: Annotated[Path | None, typer.Option(metavar="FILE", help="the launcher's own: its file about a node")] = None,
    join: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="where the hub's rig listens, like tcp://hub:5600")
    ] = None,
    key: Annotated[Path | None, typer.Option(metavar="FILE", help="this host's own secret key")] = None,
    hub_key: Annotated[Path | None, typer.Option(metavar="FILE", help="the hub's public key")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="join a hub beyond this host without keys")] = False,
    once: Annotated[bool, typer.Option("--once", help="end with the first session")] = False,
    allow_code: Annotated[bool, typer.Option("--allow-code", help="let the hub name kinds of its own")] = False,
) -> None:
    """Run sources on this host for a session of another.

    The hub's rig has a source of kind `remote`, which says what runs here; messages are stamped on the hub's clock.

    \b
    Example:
      sensorium node --join tcp://hub:5600 --key keys/pi.key_secret --hub-key keys/hub.key
    """
    from pipeline.commands import live

    if join is not None:
        live.join(join, key, hub_key, insecure=insecure, once=once, allow_code=allow_code)
    elif kind is not None and spec is not None:
        live.node(kind, spec)
    else:
        raise ConfigError("say which session's hub to join: sensorium node --join tcp://HUB:5600.")


def main() -> None:
    """The command ``sensorium``."""
    try:
        ready_streams()
        _refuse_empty(sys.argv[1:])
        app()
    except SensoriumError as error:
        fail([str(part) for part in error.parts], error.exit_code)
    except (BrokenPipeError, SystemExit) as end:
        if isinstance(end, BrokenPipeError) or isinstance(end.__context__, BrokenPipeError):
            # Whoever read us has seen enough, which typer takes for a failure.
            discard_output()
            sys.exit(0)
        if (lost := lost_output()) is None:
            raise
        if isinstance(lost, BrokenPipeError):
            sys.exit(0)
        fail([unwritable(lost)], 1)
    except KeyboardInterrupt:
        sys.exit(Interrupted.exit_code)
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):  # an ImportError of a C extension that was being imported
            sys.exit(Interrupted.exit_code)
        if isinstance(error, OSError):
            if (lost := lost_output()) is not None:
                fail([unwritable(lost)], 1)
            if (said := explained(error)) is not None:
                fail([str(said)], said.exit_code)
        what = " ".join(f"{type(error).__name__}: {error}".split())
        fail([f"this is a mistake in Sensorium: {what}. {_trace()}"], 1)


def _refuse_empty(arguments: list[str]) -> None:
    """An empty path would be taken for this folder."""
    if "" in arguments:
        before = " ".join(["sensorium", *arguments[: arguments.index("")]])
        raise ConfigError(
            f"what follows `{before}` is empty; if it comes from a variable of the shell, that is not set. Name "
            "something, or leave it out."
        )


def _trace() -> str:
    """Keeps the trace of the exception that is handled, and says where."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sensorium-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            traceback.print_exc(file=file)
    except OSError:
        return f"No file can be written for the full trace, so it stands here:\n{traceback.format_exc()}"
    return f"The full trace is in {file.name}"


def fail(wrong: list[str], exit_code: int) -> None:
    """Says what is wrong, a paragraph each, and exits."""
    lost_output()  # else Python tries again at the end, and says that in its own words
    message = "\n".join(f"error: {one}" for one in wrong)
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns
        message = "\n".join(_filled(line, width) for line in message.splitlines())
    with suppress(OSError):  # there is nobody left to tell
        print(message, file=sys.stderr)
    sys.exit(exit_code)


def _filled(line: str, width: int) -> str:
    """``line`` in lines of ``width``. A command stays one, and a path whole, so that they can be copied."""
    if line.startswith("sensorium "):
        return line
    return textwrap.fill(line, width, break_on_hyphens=False, break_long_words=False)


if _on_interrupt is signal.default_int_handler:
    signal.signal(signal.SIGINT, _on_interrupt)

if __name__ == "__main__":  # `python -m pipeline.cli`
    main()
