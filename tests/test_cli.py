"""The command line as a person and as a program use it: real processes, real sessions, real files."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from pipeline import cli, launch
from pipeline.commands import live
from pipeline.messages import TextLayout
from pipeline.recording import RecordingWriter, SessionInfo
from pipeline.schemas import schema
from pipeline.status import SessionRef
from tests.conftest import ROOT
from tests.test_recording import message

SENSORIUM = str(Path(sys.executable).with_name("sensorium"))
COMMANDS = ("run", "record", "replay", "subscribe", "check", "devices", "info", "explain", "recover", "calibrate",
            "recalibrate", "train", "import", "simulate", "evaluate", "schema", "keys", "node")  # fmt: skip
PATIENCE_S = 60

RIG = f"""
name: small
sources:
  camera:     {{kind: synthetic, payload: frame, rate_hz: 10, required: true}}
  microphone: {{kind: synthetic, payload: audio, required: true}}
  imu:        {{kind: synthetic, payload: imu, required: true}}
  lidar:      {{kind: synthetic, payload: sweep, required: true}}
bundle: {{path: {ROOT}/models/demo}}
"""


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A folder with a short path (sockets lie in it), where sessions of these tests and no others are."""
    folder = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    (folder / "rig.yaml").write_text(RIG)
    yield folder
    shutil.rmtree(folder)


def environment(place: Path) -> dict[str, str]:
    return os.environ | {"XDG_RUNTIME_DIR": str(place)}


def sensorium(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, in ``place``."""
    return subprocess.run(
        [SENSORIUM, *map(str, arguments)],
        cwd=place,
        env=environment(place),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class Running:
    """A command that runs until it is told to stop; standard output line by line."""

    def __init__(self, place: Path, *arguments: object, stdout: int = subprocess.PIPE) -> None:
        self.process = subprocess.Popen(
            [SENSORIUM, *map(str, arguments)],
            cwd=place,
            env=environment(place),
            stdout=stdout,
            stderr=subprocess.PIPE,
            bufsize=0,  # so that select knows of everything that has not been read
        )

    def line(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], PATIENCE_S)[0], "no line came"
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def stop(self, how: signal.Signals = signal.SIGINT) -> tuple[bytes, bytes, int]:
        self.process.send_signal(how)
        out, err = self.process.communicate(timeout=PATIENCE_S)
        return out, err, self.process.returncode

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Calls the command line within this process, in some folder; gives exit code, standard output and error."""

    def run(folder: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(place))
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", ["sensorium", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main()
        out, err = capsys.readouterr()
        return int(exit.value.code or 0), out, err

    return run


# -- help and mistakes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    result = CliRunner().invoke(cli.app, [name, "--help"], terminal_width=80)
    assert result.exit_code == 0
    text = result.output.partition("Example:")[0]
    assert [line for line in text.splitlines() if len(line) > 80] == []
    assert re.search(rf"Example:\n +sensorium {name}\b", result.output)


def test_what_is_to_be_copied_from_an_error_stays_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    command, path = "sensorium train train.yaml -o /a/folder/b --resume", "/tmp" + "/folder" * 9
    with pytest.raises(SystemExit):
        cli.fail([f"interrupted, and it is {path} that words are about; go on with:\n{command}"], 1)
    assert capsys.readouterr().err.splitlines() == [
        "error: interrupted, and it is", path, "that words are about; go on with:", command,
    ]  # fmt: skip


def test_the_version_is_the_packages(call: Call, place: Path) -> None:
    assert call(place, "--version") == (0, f"sensorium {version('sensorium')}\n", "")
    code, out, _ = call(place, "--help")
    assert code == 0
    assert "Sensors into one stream of live predictions" in out


def test_the_list_of_commands_is_whole() -> None:
    assert tuple(command.name or command.callback.__name__ for command in cli.app.registered_commands) == COMMANDS


def test_help_needs_nothing_that_is_slow_to_import() -> None:
    code = (
        "import sys\nfrom pipeline import cli\nsys.argv = ['sensorium', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "print('LOADED', *(m for m in ('numpy', 'cv2', 'zmq', 'rich.live', 'onnxruntime', 'msgspec')"
        " if m in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE_S)
    assert result.stdout.splitlines()[-1] == "LOADED"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rnu"], "Did you mean 'run'?"),
        (["run", "--durtion", "3"], "--duration"),
        (["run", "rig.yaml", "--duration", "5s"], "--duration: found '5s', expected seconds, a number at least 0"),
        (["run", "rig.yaml", "--duration", "inf"], "--duration: found 'inf', expected seconds"),
        (["record", "rig.yaml", "-o", "x.mcap", "--duration", "1e300"], "--duration: found '1e300', expected seconds"),
        (["run", "rig.yaml", "--duration", "-1"], "--duration: found '-1', expected seconds"),
        (["replay", "x.mcap", "--speed", "2"], "speed"),
        (["run"], "name a rig"),
        (["run", "rgi.yaml"], "There are `"),
        (["check", "nothing/here.yaml"], "there is no such file"),
        (["run", "."], "is a folder; a rig is one YAML file"),
        (["run", "session.mcap"], "sensorium replay session.mcap"),
        (["info", "nothing.mcap"], "there is no such file"),
        (["replay", "nothing.mcap"], "there is no such file"),
        (["info", f"{ROOT}/models/demo"], f"type: sensorium replay RECORDING --bundle {ROOT}/models/demo"),
        (["info", f"{ROOT}/recordings"], f"a folder with 2 recordings; name one, like {ROOT}/recordings/rover.mcap"),
        (["info", f"{ROOT}/configs"], "configs is a folder without recordings"),
        (["replay", "rig.yaml"], "rig.yaml is a rig and no recording; to run it type: sensorium run rig.yaml"),
        (["replay", "--verify", "rig.yaml"], "to run it type: sensorium run rig.yaml"),
        (["schema", "predictions"], "Did you mean `prediction`?"),
        (["import", "nothing.mp4", "-o", "x.mcap"], "nothing.mp4"),
        (["import", "rig.yaml", "-o", "nowhere/x.mcap"], "there is no folder"),
        (["record", "rig.yaml"], "-o session.mcap"),
        (["record", "rig.yaml", "-o", f"{ROOT}/recordings/demo.mcap"], "not overwritten"),
        (["run", "rig.yaml", "--record", "/proc/x.mcap"], "error: /proc/x.mcap cannot be created: "),
        (
            ["record", "rig.yaml", "-o", "newdir/"],
            "newdir/ names a folder, and a recording is a file; name one in it",
        ),
        (["record", "rig.yaml", "-o", "."], "error: . is a folder; name a new file in it.\n"),
        (["run", "rig.yaml", "--record", "newdir/"], "like newdir/session.mcap"),
        (
            ["record", "rig.yaml", "-o", "here/x.db3"],
            "error: here/x.db3: it ends in `.db3`, and a recording is an MCAP file; name it like here/x.mcap.\n",
        ),
        (["run", "rig.yaml", "--record", "x.json"], "error: x.json: it ends in `.json`"),
        (["import", "rig.yaml", "-o", "x.bag"], "error: x.bag: it ends in `.bag`"),
        (["import", "rig.yaml", "-o", "newdir/"], "like newdir/session.mcap"),
        (["recover", "x.mcap", "-o", "x.bak"], "error: x.bak: it ends in `.bak`"),
        (["recalibrate", "x.mcap", "-o", "x.bag", "--find"], "error: x.bag: it ends in `.bag`"),
        (["simulate", "rover", "-o", "x.mp4"], "error: x.mp4: it ends in `.mp4`"),
        (["simulate", "rover", "-o", "newdir/"], "like newdir/session.mcap"),
        (["evaluate", "rig.yaml", f"{ROOT}/models/demo"], "error: rig.yaml is a file, and a bundle is a folder"),
        (
            ["replay", f"{ROOT}/recordings/demo.mcap", "--bundle", f"{ROOT}/models/demo/model.yaml"],
            f"a file, and a bundle is a folder with a file model.yaml. Name its folder {ROOT}/models/demo.\n",
        ),
        (["subscribe"], "No session runs on this machine"),
        (["subscribe"], "now (looked in /"),
        (["subscribe", "--session", "abc"], "no session `abc` runs here"),
        (["subscribe", "nonsense"], "tcp://127.0.0.1"),
        (["node", "camera", "--spec", "rig.yaml"], "no node's spec"),
    ],
)
def test_what_was_asked_wrongly_is_said_in_one_paragraph(
    place: Path, call: Call, arguments: list[str], said: str
) -> None:
    code, out, err = call(place, *arguments)
    assert code == 2, err
    assert said in err
    assert err.startswith(("error: ", "Usage: "))
    assert "Traceback" not in err
    assert out == ""


def test_the_module_is_the_command(place: Path) -> None:
    """It said nothing, did nothing, and ended with 0."""
    run = [sys.executable, "-m", "pipeline.cli", "info", f"{place}/none.mcap"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {place}/none.mcap: there is no such file")


def test_a_recording_of_no_stream_is_said_to_have_none(place: Path, call: Call) -> None:
    RecordingWriter(place / "empty.mcap", SessionInfo(session="s")).close()
    for arguments in (["recalibrate", "--offset", "imu=1", "-o", "x.mcap"], ["calibrate", "--stream", "imu"]):
        code, _, err = call(place, arguments[0], "empty.mcap", *arguments[1:])
        assert code == 2
        assert "has no stream `imu`; it has none." in err


def test_info_shows_one_recording_after_the_other_and_says_at_the_end_what_it_could_not_read(
    call: Call, place: Path
) -> None:
    demo, rover = f"{ROOT}/recordings/demo.mcap", f"{ROOT}/recordings/rover.mcap"
    _, of_demo, _ = call(place, "info", demo)
    code, out, err = call(place, "info", demo, "no.mcap", rover)
    assert out.startswith(f"{demo}\n{of_demo}\nno.mcap\n\n{rover}\nsession ")
    assert (code, err.count("error: "), "no.mcap: there is no such file" in err) == (2, 1, True)
    code, out, err = call(place, "info", demo, rover)
    assert (code, err) == (0, "")
    assert demo not in of_demo


@pytest.mark.parametrize("command", [("info",), ("explain",), ("replay", "--bundle", f"{ROOT}/models/demo")])
def test_every_command_says_of_a_recording_that_is_cut_off_the_same(
    tmp_path: Path, call: Call, command: tuple[str, ...]
) -> None:
    (tmp_path / "cut.mcap").write_bytes((ROOT / "recordings" / "demo.mcap").read_bytes()[:700_000])
    code, out, err = call(tmp_path, command[0], "cut.mcap", *command[1:])
    assert code == 0, err
    assert "incomplete: its end is missing; it can be read up to 3.03 s" in out + err


@pytest.mark.parametrize("command", [("check",), ("run",), ("record", "-o", "new.mcap")])
def test_everything_that_is_wrong_with_a_rig_is_said_at_once(place: Path, call: Call, command: list[str]) -> None:
    (place / "wrong.yaml").write_text(
        RIG.replace("small", "'a b'").replace("payload: audio", "paylod: audio").replace("rate_hz: 10", "rate_hz: -1")
    )
    code, out, err = call(place, command[0], "wrong.yaml", *command[1:])
    assert (code, out) == (2, "")
    assert [line.partition(": ")[0] + ": " + line.split(": ")[1] for line in err.splitlines()] == [
        "error: wrong.yaml, line 2, name",
        "error: wrong.yaml, line 4, sources.camera.rate_hz",
        "error: wrong.yaml, line 5, sources.microphone.paylod",
    ]


def test_a_mistake_ends_the_process_with_its_code(place: Path) -> None:
    result = sensorium(place, "run", "rgi.yaml")
    assert result.returncode == 2
    assert result.stderr.startswith("error: rgi.yaml: there is no such file")


def test_without_a_rig_run_says_which_there_are(call: Call) -> None:
    code, _, err = call(ROOT, "run")
    assert code == 2
    assert "`configs/" in err


@pytest.mark.parametrize("command", ["subscribe", "explain"])
def test_of_several_sessions_the_command_for_one_is_said(
    place: Path, call: Call, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    live = [SessionRef(id, str(place), "rig", f"ipc://{place}/{id}.sock") for id in ("20260105T10-b", "20260104T10-a")]
    monkeypatch.setattr(launch, "live_sessions", lambda: live)
    code, _, err = call(place, command)
    assert code == 2
    assert err.endswith(f"sensorium {command} --session 20260105T10-b\n")
    assert all(found.id in err for found in live)


def test_a_damaged_file_is_a_failure_not_a_wrong_question(place: Path, call: Call) -> None:
    (place / "damaged.mcap").write_bytes(b"no recording at all")
    code, _, err = call(place, "info", "damaged.mcap")
    assert code == 1
    assert err.startswith("error: ")
    assert "Traceback" not in err


def test_an_unexpected_exception_is_one_line_and_its_trace_is_kept(
    monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path
) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError("of one\nby none")

    monkeypatch.setattr(live, "print_schema", broken)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code, _, said = call(tmp_path, "schema", "info")
    assert code == 1
    assert said.startswith("error: this is a mistake in Sensorium: ZeroDivisionError: of one by none.")
    assert len(said.splitlines()) == 1
    assert "Traceback" in Path(said.rsplit(" ", 1)[1].strip()).read_text()


def test_a_reader_that_has_seen_enough_is_no_error(place: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {SENSORIUM} schema config | head -n 1"], capture_output=True, text=True,
        timeout=PATIENCE_S,
    )  # fmt: skip
    assert done.stdout == "{\n"
    assert done.stderr == ""
    assert done.returncode == 0


def test_an_address_at_which_nobody_publishes_is_said(place: Path) -> None:
    with Running(place, "subscribe", f"ipc://{place}/nobody.sock") as running:
        assert running.process.stderr is not None
        said = b""
        while b"note:" not in said and select.select([running.process.stderr], [], [], PATIENCE_S)[0]:
            said += os.read(running.process.stderr.fileno(), 4096)
        assert b"nothing has come from ipc://" in said
        assert b"start one with: sensorium run RIG, and listen to it with: sensorium subscribe, without" in said
        out, err, code = running.stop()
        assert (out, code) == (b"", 0)
        assert err.decode().strip() == f"nothing was heard at ipc://{place}/nobody.sock: is a session publishing there?"


def test_the_hint_of_an_address_is_one_that_run_takes() -> None:
    assert live._begin("tcp://127.0.0.1:5599").endswith("run RIG --predictions tcp://127.0.0.1:5599")
    assert "--predictions" not in live._begin("ipc:///nonexist/x.sock")


@pytest.mark.parametrize("named", [".", "nope.yaml", "laod.yaml", "./nope"])
def test_the_rigs_beside_what_was_named_come_first(tmp_path: Path, call: Call, named: str) -> None:
    (tmp_path / "load.yaml").write_text(RIG)
    (tmp_path / "train.yaml").write_text("name: no rig\n")
    code, _, err = call(tmp_path, "check", named)
    assert code == 2
    assert f"There are `load.yaml`, `{ROOT}/configs/" in err
    assert "train.yaml" not in err
    assert ("Did you mean `load.yaml`?" in err) == (named == "laod.yaml")


def test_of_a_folder_full_of_rigs_some_are_named(tmp_path: Path, call: Call) -> None:
    for number in range(15):
        (tmp_path / f"r{number:02}.yaml").write_text(RIG)
    _, _, err = call(tmp_path, "check", ".")
    assert "`r11.yaml`, `/" in err
    assert "And 3 more are in ." in err


def test_a_rig_may_come_through_a_pipe(place: Path) -> None:
    (place / "relative.yaml").write_text(RIG.replace(str(ROOT), "there"))
    (place / "there").symlink_to(ROOT)
    for source in ("<(cat relative.yaml)", "/dev/stdin < <(cat relative.yaml)"):
        done = subprocess.run(["bash", "-c", f"{SENSORIUM} check {source}"], cwd=place, env=environment(place),
                              capture_output=True, text=True, timeout=PATIENCE_S)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "small: 4 sources; model demo" in done.stdout
    assert "/dev/null: found nothing, expected a mapping" in sensorium(place, "check", "/dev/null").stderr


# -- sessions ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def session(place: Path) -> subprocess.CompletedProcess[str]:
    """One session that is run, shown as lines and recorded."""
    result = sensorium(place, "run", "rig.yaml", "--duration", 4, "--json", "--record", "session.mcap")
    assert result.returncode == 0, result.stderr
    return result


def test_a_run_prints_one_valid_prediction_a_line(session: subprocess.CompletedProcess[str]) -> None:
    found = lines(session.stdout)
    validator = jsonschema.Draft202012Validator(schema("prediction"))
    for prediction in found:
        validator.validate(prediction)
    indices = [prediction["window"]["index"] for prediction in found]
    assert indices == list(range(indices[0], indices[0] + len(indices)))
    assert set(found[-1]["streams"]) == {"camera", "microphone", "imu", "lidar"}


def test_a_run_ends_with_a_summary_in_which_every_message_has_a_place(
    session: subprocess.CompletedProcess[str],
) -> None:
    count = len(lines(session.stdout))
    assert f"{count} predictions over" in session.stderr
    heading = next(line for line in session.stderr.splitlines() if line.startswith("messages"))
    row = next(line for line in session.stderr.splitlines()[::-1] if line.startswith("imu"))
    places = dict(zip(re.split("  +", heading)[1:], map(int, row.split()[1:]), strict=True))
    assert places["sent"] == places["received"] + places["lost"]
    assert places["received"] == sum(
        places[place] for place in ("used", "late", "no window", "superseded", "duplicate", "rejected", "buffered")
    )
    assert places["used"] > 0


def test_info_of_the_session_satisfies_its_schema(place: Path, session: subprocess.CompletedProcess[str]) -> None:
    found = json.loads(sensorium(place, "info", "session.mcap", "--json").stdout)
    jsonschema.Draft202012Validator(schema("info")).validate(found)
    assert found["session"] == lines(session.stdout)[0]["session"]
    assert found["bundle"] == lines(session.stdout)[0]["bundle"]
    assert found["windows"] == found["predictions"] >= len(lines(session.stdout))
    assert found["streams"]["imu"]["stats"]["accel"]["mean_norm"] == pytest.approx(9.8, abs=2)
    shown = sensorium(place, "info", "session.mcap").stdout
    assert all(stream in shown for stream in found["streams"])


def without_timing(text: str) -> list[dict[str, Any]]:
    found = lines(text)
    for prediction in found:
        del prediction["timing"]
    return found


def test_a_replay_finds_the_sessions_own_model_and_is_the_same_at_any_speed(
    place: Path, session: subprocess.CompletedProcess[str]
) -> None:
    quick = sensorium(place, "replay", "session.mcap", "--json")
    assert quick.returncode == 0, quick.stderr
    assert "predictions over" in quick.stderr
    paced = sensorium(place, "replay", "session.mcap", "--speed", "1", "-o", "paced.jsonl")
    assert paced.returncode == 0, paced.stderr
    assert without_timing(quick.stdout) == without_timing((place / "paced.jsonl").read_text())
    model = lines(session.stdout)[0]["bundle"]
    assert all(prediction["bundle"] == model for prediction in without_timing(quick.stdout))


def test_a_session_is_verified_and_half_of_one_is_not(
    place: Path, call: Call, session: subprocess.CompletedProcess[str]
) -> None:
    whole = sensorium(place, "replay", "session.mcap", "--verify", "--json")
    assert whole.returncode == 0, whole.stdout
    found = json.loads(whole.stdout)
    assert found["holds"]
    assert found["windows"] == found["predictions"] >= len(lines(session.stdout))
    recorded = (place / "session.mcap").read_bytes()
    (place / "half.mcap").write_bytes(recorded[: len(recorded) // 2])
    code, out, _ = call(place, "replay", "half.mcap", "--verify")
    assert code == 3
    assert "cannot be verified" in out
    assert out.rstrip().endswith("not verified")


def test_a_replay_with_a_model_of_other_streams_names_both_sides(
    place: Path, session: subprocess.CompletedProcess[str]
) -> None:
    result = sensorium(place, "replay", "session.mcap", "--bundle", place)
    assert result.returncode == 2
    assert "models/demo" in result.stderr


def test_check_names_streams_and_what_they_are_in_the_model(place: Path) -> None:
    found = json.loads(sensorium(place, "check", "rig.yaml", "--json").stdout)
    assert found["mapping"] == {name: name for name in ("camera", "microphone", "imu", "lidar")}
    assert found["streams"]["imu"] == "imu"
    shown = sensorium(place, "check", "rig.yaml")
    assert shown.returncode == 0
    assert "microphone" in shown.stdout


def test_a_recording_that_goes_to_another_file_says_so_at_the_start(place: Path) -> None:
    rig = "name: r\nsources: {imu: {kind: synthetic, payload: imu}}\nrecord: {path: kept.mcap}\n"
    (place / "recorded.yaml").write_text(rig)
    (place / "kept.mcap").write_text("of an earlier session")
    result = sensorium(place, "record", "recorded.yaml", "--duration", 0)
    assert result.returncode == 0, result.stderr
    assert (
        "kept.mcap exists already and stays as it is; this session is recorded to kept-2.mcap"
        in (result.stderr.splitlines()[0])
    )
    assert "kept-2.mcap (" in result.stderr.splitlines()[-1]
    assert "kept.mcap was there already, and stays as it is)" in result.stderr.splitlines()[-1]
    assert (place / "kept-2.mcap").is_file()
    assert (place / "kept.mcap").read_text() == "of an earlier session"


@pytest.mark.parametrize("command", [["check"], ["record"], ["run", "--duration", "1"]])
@pytest.mark.parametrize(
    ("record", "said"),
    [
        ("/proc/{session}/x.mcap", r"/proc/\S+/x\.mcap cannot be created: "),
        ("/proc/x.mcap", r"/proc/x\.mcap cannot be created: "),
        (
            "rig.yaml/x.mcap",
            r"\S+/rig\.yaml/x\.mcap cannot be created: \S+/rig\.yaml is no folder; name another file",
        ),
        (".", r"\S+ is a folder, and a recording is a file; name one in it, like `path: \./\{session\}\.mcap`"),
        ("new/", r"\S+/new is a folder, and a recording is a file; name one in it, like `path: new/\{session\}\.mcap`"),
    ],
)
def test_a_recording_that_cannot_be_is_said_before_anything_starts(
    place: Path, call: Call, command: list[str], record: str, said: str
) -> None:
    rig = RIG.replace("models/demo", "models/nowhere") + f"record: {{path: '{record}'}}\n"
    (place / "unrecorded.yaml").write_text(rig)
    code, out, err = call(place, command[0], "unrecorded.yaml", *command[1:])
    assert (code, out) == (2, "")
    assert re.search(r"record\.path: " + said, err), err
    assert "bundle.path: " in err  # what else is wrong does not hide it
    assert not (place / "new").exists()


def test_check_says_that_a_recording_goes_to_another_file(place: Path) -> None:
    rig = "name: r\nsources: {imu: {kind: synthetic, payload: imu}}\nrecord: {path: there.mcap}\n"
    (place / "there.yaml").write_text(rig)
    (place / "there.mcap").touch()
    found = sensorium(place, "check", "there.yaml")
    assert found.returncode == 0
    said = "there.mcap exists already and stays as it is; this session is recorded to there-2.mcap"
    assert said in " ".join(found.stdout.split())
    assert not (place / "there-2.mcap").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="a file's greatest size can be set on POSIX alone")
def test_a_recording_that_finds_no_room_at_its_end_is_no_success(place: Path) -> None:
    """Much is held back until a recorder stops: its index, and of a short session nearly all."""
    (place / "short.yaml").write_text("name: r\nsources: {imu: {kind: synthetic, payload: imu}}\n")
    asked = ["run", "short.yaml", "--duration", 1, "--record"]
    assert sensorium(place, *asked, "whole.mcap").returncode == 0
    most = (place / "whole.mcap").stat().st_size - 1500
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({most}, {most})); "
    result = subprocess.run(
        [sys.executable, "-c", f"{limit}from pipeline.cli import main; main()", *map(str, asked), "cut.mcap"],
        cwd=place, env=environment(place), capture_output=True, text=True, timeout=PATIENCE_S,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert "recorded: " not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "the recording failed, and is not whole: " in last
    assert "cut.mcap cannot be written any further" in last


def test_a_recording_that_lacks_messages_is_no_success(place: Path) -> None:
    """The gaps of a recording that is played again are none of the machine's, so that they are always there."""
    with RecordingWriter(place / "gaps.mcap", SessionInfo(session="s")) as writer:
        for seq in (0, 1, 5, 6):
            said = message(
                TextLayout(1), b"a", stream="words", seq=seq, t=seq * 1000, end=seq * 1000 + 1, bound=seq * 1000 + 1
            )
            writer.write(said, seq * 1000 + 1)
    (place / "again.yaml").write_text("name: r\nsources: {old: {kind: replay, path: gaps.mcap}}\n")
    result = sensorium(place, "record", "again.yaml", "-o", "again.mcap")
    assert result.returncode == 1, result.stderr
    assert re.search(r"^recorded, but not whole: \S+again\.mcap$", result.stderr, re.M), result.stderr
    assert "  it lacks 3 of 7 messages of words: lost on the way to the recorder\n" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith(
        "error: the recording is not whole: it lacks 3 of 7 messages of words; `sensorium info` shows"
    )
    assert json.loads(sensorium(place, "info", "again.mcap", "--json").stdout)["complete"] is False


def test_a_session_without_a_model_ends_with_what_every_stream_gave(place: Path) -> None:
    (place / "mute.py").write_text(MUTE)
    (place / "mute.yaml").write_text(
        "name: r\nsources: {imu: {kind: synthetic, payload: imu}, mute: {kind: 'mute:Mute'}}\n"
    )
    result = sensorium(place, "record", "mute.yaml", "-o", "mute.mcap", "--duration", 1)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stderr.splitlines() if line.strip()}
    assert rows["mute"] == ["0", "0", "0"]
    assert rows["imu"][0] == rows["imu"][1] != "0"
    assert "warning: mute gave no message\n" in result.stderr


MUTE = """
import msgspec
from pipeline.node import Source

class Mute(Source):
    payload = "imu"
    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
        pass
    def read(self):
        clock = self.context.clock
        clock.wait_until(clock.now_ns() + 10_000_000)
"""


def test_another_process_can_watch_a_session_and_an_interrupt_ends_it_cleanly(place: Path, call: Call) -> None:
    with Running(place, "run", "rig.yaml", "--json") as running:
        first = running.line()
        watched = sensorium(place, "subscribe", "--json", "--count", 2)
        assert watched.returncode == 0, watched.stderr
        assert {prediction["session"] for prediction in lines(watched.stdout)} == {first["session"]}
        assert "2 predictions over" in watched.stderr
        code, _, err = call(place, "subscribe", "--session", "other")
        assert code == 2
        assert first["session"] in err
        with Running(place, "subscribe", "--json") as to_the_end:
            to_the_end.line()
            out, err_bytes, code = running.stop(signal.SIGINT)
            assert to_the_end.process.wait(PATIENCE_S) == 0
    assert code == 0, err_bytes
    assert b"predictions over" in err_bytes
    assert f"session {first['session']}   predictions at ipc://".encode() in err_bytes
    assert all(line["session"] == first["session"] for line in lines(out.decode()))
    assert not list((place / "sensorium").glob("*/*"))


def test_a_session_ends_when_nobody_reads_its_predictions_any_more(place: Path) -> None:
    with Running(place, "run", "rig.yaml", "--json") as running:
        running.line()
        assert running.process.stdout is not None
        running.process.stdout.close()
        assert running.process.wait(PATIENCE_S) == 0
        assert running.process.stderr is not None
        assert b"Traceback" not in running.process.stderr.read()
    assert not list((place / "sensorium").glob("*/*"))


def test_the_end_of_a_session_waits_for_no_terminal_that_is_stopped(place: Path) -> None:
    ours, theirs = pty.openpty()
    with Running(place, "record", "rig.yaml", "-o", "stopped.mcap", stdout=theirs) as running:
        shown = b""
        while b"contribution" not in shown or b"latency" not in shown:
            assert select.select([ours], [], [], PATIENCE_S)[0], shown
            shown += os.read(ours, 65536)
        termios.tcflow(theirs, termios.TCOOFF)  # as Ctrl-S does
        assert not select.select([], [theirs], [], 0)[1]
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(PATIENCE_S) == 0
        assert running.process.stderr is not None
        assert b"predictions over" in running.process.stderr.read()  # for where it was to stand nobody sees it
    os.close(theirs)
    os.close(ours)
    assert json.loads(sensorium(place, "info", "stopped.mcap", "--json").stdout)["complete"] is True
    assert not list((place / "sensorium").glob("*/*"))


def test_the_end_of_a_session_waits_for_no_reader_and_says_what_he_has_not_taken(place: Path) -> None:
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)
    with Running(place, "run", "rig.yaml", "--json", "--duration", 2, stdout=theirs) as running:
        os.close(theirs)
        assert running.process.wait(PATIENCE_S) == 0
        assert running.process.stderr is not None
        said = running.process.stderr.read().decode()
    with open(ours, "rb") as pipe:
        taken = pipe.read().count(b"\n")
    made = re.search(r"^(\d+) predictions over", said, re.M)
    left = re.search(r"^note: whoever reads the predictions took none for 3 s; (\d+) predictions at", said, re.M)
    assert made is not None, said
    assert left is not None, said
    assert taken + int(left[1]) == int(made[1])


def test_a_terminal_gets_a_live_table(place: Path) -> None:
    ours, theirs = pty.openpty()
    with Running(place, "run", "rig.yaml", stdout=theirs) as running:
        os.close(theirs)
        shown = b""
        while b"contribution" not in shown or b"latency" not in shown:
            assert select.select([ours], [], [], PATIENCE_S)[0], shown
            shown += os.read(ours, 65536)
        running.process.send_signal(signal.SIGTERM)
        while running.process.poll() is None or select.select([ours], [], [], 0)[0]:
            try:
                shown += os.read(ours, 65536)
            except OSError:  # how Linux says that the other side of a terminal is closed
                break
        assert running.process.wait(PATIENCE_S) == 0
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert "small   session " in text
    assert "predictions over" in text
    assert not text.lstrip().startswith("{")
