"""What the machine refuses, said by the command line: real processes, folders that nobody may write, files that find
no room, standard output that takes nothing or not every sign."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import wave
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline import cli
from pipeline.commands import live
from pipeline.outside import explained, naming
from pipeline.paths import write_whole
from tests import test_cli
from tests.conftest import ROOT
from tests.test_cli import PATIENCE_S, Call

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="permissions, limits and devices are those of POSIX")

call, place = test_cli.call, test_cli.place  # its fixtures
MAIN = "from pipeline.cli import main; main()"
DEMO = str(ROOT / "recordings" / "demo.mcap")
MISTAKE = "mistake in Sensorium"
CAPABILITIES = "-dac_override,-dac_read_search,-fowner"


def python(
    before: str, *arguments: str, folder: Path, prefix: tuple[str, ...] = (), shell: str = "", **env: str
) -> subprocess.CompletedProcess[bytes]:
    """The command in a process of its own, after the statement ``before``."""
    command = [*prefix, sys.executable, "-c", f"{before}\n{MAIN}", *arguments]
    if shell:
        command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)} | env, capture_output=True, timeout=PATIENCE_S
    )


def limited(nbytes: int) -> str:
    """No file may be larger, which fails in the midst of it like a full disk."""
    return f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({nbytes}, {nbytes}))"


@pytest.fixture
def guarded(tmp_path: Path) -> tuple[Path, tuple[str, ...]]:
    """A folder in which nothing can be created, and what to write before a command, lest it be root's."""
    prefix: tuple[str, ...] = ()
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to take that away")
        prefix = ("setpriv", "--bounding-set", CAPABILITIES, "--inh-caps", CAPABILITIES)
    folder = tmp_path / "guarded"
    folder.mkdir()
    folder.chmod(0o555)
    return folder, prefix


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("keys", "a"), "no keys can be written to keys: Permission denied; name another folder with -o."),
        (("replay", DEMO, "--bundle", f"{ROOT}/models/demo", "-o", "x.jsonl"),
         "x.jsonl cannot be created: Permission denied; name another file with -o."),
        (("evaluate", f"{ROOT}/models/demo", DEMO, "--html", "r.html"),
         "r.html cannot be created: Permission denied; name another file with --html."),
        (("recalibrate", DEMO, "-o", "x.mcap", "--offset", "imu=3"),
         "x.mcap cannot be created: Permission denied; name another file with -o."),
        pytest.param(("simulate", "rover", "-o", "x"),
                     "x cannot be created: Permission denied; name another file with -o.",
                     marks=pytest.mark.skipif(find_spec("mujoco") is None, reason="needs the extra sim")),
        pytest.param(("simulate", "rover", "-o", "x", "--count", "2"),
                     "x: permission denied. Name another place, or change the permissions of this one.",
                     marks=pytest.mark.skipif(find_spec("mujoco") is None, reason="needs the extra sim")),
    ],
)  # fmt: skip
def test_a_place_that_nobody_may_write_is_no_mistake_of_ours(
    guarded: tuple[Path, tuple[str, ...]], arguments: tuple[str, ...], said: str
) -> None:
    folder, prefix = guarded
    done = python("", *arguments, folder=folder, prefix=prefix)
    assert done.stderr.decode().splitlines()[-1] == f"error: {said}"
    assert done.returncode == 2
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("code", "exit_code", "said"),
    [
        (errno.EACCES, 2, "a/b: permission denied. Name another place"),
        (errno.EROFS, 2, "a/b: nothing can be written there, for the file system is read-only"),
        (errno.ENAMETOOLONG, 2, "a/b: the name is too long"),
        (errno.ELOOP, 2, "a/b: its symbolic links lead round in a circle"),
        (errno.ENOSPC, 1, "a/b: no space is left on its disk. Make room"),
        (errno.EDQUOT, 1, "a/b: the quota of disk space is used up"),
        (errno.EIO, 1, "a/b: its disk or device failed"),
        (errno.ETXTBSY, 1, "a/b: Text file busy. "),
    ],
)
def test_an_error_of_the_machine_names_the_path_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    tmp_path: Path,
    code: int,
    exit_code: int,
    said: str,
) -> None:
    def refused(name: str) -> None:
        raise OSError(code, os.strerror(code), "a/b")

    monkeypatch.setattr(live, "print_schema", refused)
    found, _, err = call(tmp_path, "schema", "info")
    assert err.startswith(f"error: {said}")
    assert len(err.splitlines()) == 1
    assert found == exit_code


def test_an_error_that_names_no_file_is_explained_only_where_it_can_be_a_disks() -> None:
    assert "no space is left" in str(explained(OSError(errno.ENOSPC, "No space left on device")))
    assert explained(OSError(errno.EINVAL, "Invalid argument")) is None
    assert explained(OSError("of some library")) is None
    assert explained(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None


def test_what_fails_in_the_midst_of_a_file_gets_its_name() -> None:
    with pytest.raises(OSError, match=r"'x\.bin'") as found, naming(Path("x.bin")):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert found.value.filename == "x.bin"
    with pytest.raises(FileNotFoundError, match="'y'"), naming(Path("x.bin")):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "y")


# -- no room -----------------------------------------------------------------------------------------------------------


def test_a_report_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    arguments = ("evaluate", f"{ROOT}/models/demo", DEMO, "--html", "r.html")
    done = python(limited(2000), *arguments, folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1].startswith("error: r.html: the file would be larger than is allowed")
    assert b"accuracy" in done.stdout  # hours of work are not lost with it
    assert not list(tmp_path.iterdir())
    write_whole(tmp_path / "r.html", "–")
    assert [file.name for file in tmp_path.iterdir()] == ["r.html"]


def test_predictions_of_a_replay_are_there_whole_or_not_at_all(tmp_path: Path) -> None:
    done = python(limited(20_000), "replay", DEMO, "--bundle", f"{ROOT}/models/demo", "-o", "p.jsonl", folder=tmp_path)
    assert done.returncode == 1
    assert done.stderr.decode().splitlines()[-1].startswith("error: p.jsonl: the file would be larger than is allowed")
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_is_told_so_and_nobody_is_told_to_remove_it(tmp_path: Path, call: Call) -> None:
    (tmp_path / "link.mcap").symlink_to("away.mcap")
    (tmp_path / "round.mcap").symlink_to("round.mcap")
    os.mkfifo(tmp_path / "pipe.mcap")
    for asked, said in (
        (["info", "link.mcap"], "link.mcap is a link to what is not there, away.mcap; mend it, or name the recording."),
        (["info", "round.mcap"], "round.mcap is a link to what is not there, round.mcap;"),
        (["replay", "pipe.mcap"], "pipe.mcap is a pipe or a device, and a recording is a file; write it to one first."),
        (["info", "/dev/null"], "/dev/null is a pipe or a device, and"),
        (["info", "lnik.mcap"], "lnik.mcap: there is no such file.\n"),
        (["import", "pipe.mcap", "-o", "x.mcap"], "pipe.mcap is a pipe or a device, and what is imported is a file"),
        (["recover", DEMO, "-o", "/dev/full"], "/dev/full is a pipe or a device; name a new file."),
        (["replay", DEMO, "--bundle", f"{ROOT}/models/demo", "-o", "pipe.mcap"], "pipe.mcap is a pipe or a device;"),
    ):
        code, out, err = call(tmp_path, *asked)
        assert (code, out) == (2, ""), err
        assert f"error: {said}" in err


def test_a_command_that_is_to_be_typed_takes_a_path_with_spaces_for_one(place: Path, call: Call) -> None:
    content = bytearray(Path(DEMO).read_bytes())
    content[1_500_000] ^= 4
    (place / "my walk.mcap").write_bytes(content)
    (place / "my rig.yaml").write_text((place / "rig.yaml").read_text())
    for asked, said in (
        (["calibrate", "my walk.mcap"], "sensorium info 'my walk.mcap'; and "),
        (["calibrate", "my walk.mcap"], "sensorium recover 'my walk.mcap' -o NEW.mcap"),
        (["import", "my walk.mcap", "-o", "x.mcap"], "sensorium info 'my walk.mcap'\n"),
        (["run", "my walk.mcap"], "sensorium replay 'my walk.mcap'\n"),
        (["info", "my rig.yaml"], "sensorium run 'my rig.yaml'\n"),
    ):
        assert said in call(place, *asked)[2]
    assert "sensorium recover 'my walk.mcap' -o" in call(place, "info", "my walk.mcap")[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
@pytest.mark.parametrize(
    ("command", "ended_in"),
    [
        (("recover", "cut.mcap"), "pipeline.recording.salvage.SalvagedReader.copy_to"),
        (("recalibrate", DEMO, "--offset", "imu=1"), "pipeline.recalibrate._copy"),
        (("import", "sound.wav"), "pipeline.importing.Session.messages"),
    ],
    ids=lambda given: given[0] if isinstance(given, tuple) else "",
)
def test_of_a_recording_whose_making_is_ended_nothing_stays(
    tmp_path: Path, command: tuple[str, ...], ended_in: str, number: signal.Signals
) -> None:
    (tmp_path / "cut.mcap").write_bytes(Path(DEMO).read_bytes()[:2_000_000])
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setparams((1, 2, 8000, 0, "NONE", ""))
        sound.writeframes(bytes(8000))
    place, _, name = ended_in.rpartition(".")
    interrupt = f"""
import os, pathlib, pkgutil
place, unlink = pkgutil.resolve_name({place!r}), pathlib.Path.unlink
def ended(*arguments):
    assert [file for file in os.listdir() if file.endswith(".tmp")]
    os.kill(os.getpid(), {number:d})
def again(*arguments, **more):
    for number in {[1, 15] if number != signal.SIGINT else []}:
        os.kill(os.getpid(), number)  # a closed terminal sends two
    unlink(*arguments, **more)
place.{name}, pathlib.Path.unlink = ended, again
"""
    before = sorted(tmp_path.iterdir())
    done = python(interrupt, *command, "-o", "made.mcap", folder=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, b"error: interrupted; made.mcap is not made\n")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_recording_that_is_whole_when_its_making_is_ended_is_told_so(tmp_path: Path, number: signal.Signals) -> None:
    interrupt = f"""
import os, pathlib
unlink = pathlib.Path.unlink
def ended(*arguments, **more):
    unlink(*arguments, **more)
    os.kill(os.getpid(), {number:d})
pathlib.Path.unlink = ended
"""
    done = python(interrupt, "recalibrate", DEMO, "--offset", "imu=1", "-o", "made.mcap", folder=tmp_path)
    assert (done.returncode, done.stderr) == (128 + number, b"error: interrupted; made.mcap was whole already\n")
    assert [file.name for file in tmp_path.iterdir()] == ["made.mcap"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_of_a_replay_that_is_interrupted_what_there_is_has_another_name(tmp_path: Path, number: int) -> None:
    interrupt = f"""
import os, signal
import pipeline.terminal
shown = pipeline.terminal.Lines.prediction
def prediction(self, prediction):
    if prediction.window.index == 7:
        os.kill(os.getpid(), {number:d})
    shown(self, prediction)
pipeline.terminal.Lines.prediction = prediction
"""
    done = python(interrupt, "replay", DEMO, "--bundle", f"{ROOT}/models/demo", "-o", "p.jsonl", folder=tmp_path)
    assert done.returncode == 128 + number
    assert done.stderr.count(b"interrupted") == 1
    assert b"interrupted, so that p.jsonl is not made; the predictions until then are in p.jsonl.part" in done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl.part"]
    lines = (tmp_path / "p.jsonl.part").read_bytes().splitlines()
    assert [json.loads(line)["window"]["index"] for line in lines] == [1, 2, 3, 4, 5, 6]
    shown = python(interrupt, "replay", DEMO, "--bundle", f"{ROOT}/models/demo", folder=tmp_path)
    assert len(shown.stdout.splitlines()) == 6
    assert shown.returncode == 128 + number  # so that a script does not take a part for the whole
    assert shown.stderr.decode().splitlines()[-1] == "error: interrupted before the end of demo.mcap"
    assert b" predictions over" in shown.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("html", [(), ("--html", "r.html")])
def test_an_evaluation_that_is_interrupted_says_what_is_not_done(
    tmp_path: Path, number: int, html: tuple[str, ...]
) -> None:
    interrupt = f"""
import os
import pipeline.evaluate
pipeline.evaluate.run_pass = lambda *_, **__: os.kill(os.getpid(), {number:d})
"""
    done = python(interrupt, "evaluate", f"{ROOT}/models/demo", DEMO, *html, folder=tmp_path)
    said = "interrupted before the evaluation was done; nothing of it is kept"
    assert (done.returncode, done.stdout) == (128 + number, b"")
    assert done.stderr.decode() == f"error: {said}{', and r.html is not made' if html else ''}\n"
    assert not list(tmp_path.iterdir())


INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest may have been started in the background
class Finder:
    left = {left}
    def find_spec(self, name, path=None, target=None):
        Finder.left -= 1
        if not Finder.left:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # until Python has seen it
                pass
import pipeline
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("left", [2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377])
def test_ctrl_c_at_whatever_moment_ends_the_command_without_a_word(tmp_path: Path, left: int) -> None:
    """At the import of so manieth a module, the first of which is the command's own; a check imports more than that."""
    done = python(INTERRUPTS.format(left=left), "check", f"{ROOT}/configs/synthetic.yaml", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.decode().strip()) == (130, b"", "")


def test_a_thread_may_import_the_command(tmp_path: Path) -> None:
    imported = """
import signal, threading
signal.signal(signal.SIGINT, signal.default_int_handler)
thread = threading.Thread(target=lambda: __import__("pipeline.cli"))
thread.start()
thread.join()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
"""
    done = python(imported, "--version", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, b"")


INTERRUPTED_IMPORT = """
import sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            {stop}
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize(
    ("module", "stop"),
    [
        ("onnxruntime", "raise KeyboardInterrupt"),
        # what a module in C++ makes of it
        ("onnxruntime", "raise ImportError('initialization failed') from KeyboardInterrupt()"),
    ],
)
def test_an_interrupt_while_the_command_is_still_loading_is_no_mistake_of_ours(
    tmp_path: Path, module: str, stop: str
) -> None:
    before = INTERRUPTED_IMPORT.format(module=module, stop=stop)
    done = python(before, "replay", DEMO, "--bundle", f"{ROOT}/models/demo", folder=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, b"", b"")


@pytest.mark.parametrize(
    "arguments",
    [
        ("recalibrate", DEMO, "-o", "x.mcap", "--offset", "imu=3"),
        pytest.param(("simulate", "rover", "-o", "x.mcap", "--duration", "2"),
                     marks=pytest.mark.skipif(find_spec("mujoco") is None, reason="needs the extra sim")),
        pytest.param(("simulate", "rover", "-o", ".", "--duration", "2", "--count", "1"),
                     marks=pytest.mark.skipif(find_spec("mujoco") is None, reason="needs the extra sim")),
    ],
)  # fmt: skip
def test_of_a_recording_that_is_made_and_finds_no_room_nothing_is_kept(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    done = python(limited(20_000), *arguments, folder=tmp_path)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 1, last
    assert last.endswith("cannot be written: File too large. Nothing of it is kept; make room, or use another disk")
    assert ".tmp" not in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "arguments",
    [("info", DEMO), ("schema", "info"), ("run", f"{ROOT}/configs/synthetic.yaml", "--duration", "2")],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_takes_nothing_is_named(
    place: Path,
    arguments: tuple[str, ...],
    unbuffered: str,
) -> None:
    done = python("", *arguments, folder=place, shell=">/dev/full", XDG_RUNTIME_DIR=str(place),
                  PYTHONUNBUFFERED=unbuffered)  # fmt: skip
    assert done.stderr.decode().splitlines()[-1] == (
        "error: standard output cannot be written: no space is left on its disk. Make room, or send it to another "
        "place."
    )
    assert done.returncode == 1
    assert not list((place / "sensorium").glob("*/*"))  # the session was ended in order


# -- standard streams --------------------------------------------------------------------------------------------------


def test_what_an_encoding_does_not_have_is_replaced(tmp_path: Path) -> None:
    arguments = ("evaluate", f"{ROOT}/models/demo", DEMO)
    whole = python("", *arguments, folder=tmp_path, PYTHONIOENCODING="utf-8").stdout.decode()
    assert not whole.isascii()
    for encoding in ("ascii", "latin-1"):
        done = python("", *arguments, folder=tmp_path, PYTHONIOENCODING=encoding)
        assert done.returncode == 0, done.stderr
        plain = done.stdout.decode(encoding)
        assert "?" not in plain
        assert list(map(len, plain.splitlines())) == list(map(len, whole.splitlines()))


def test_json_is_utf_8_whatever_people_read(tmp_path: Path) -> None:
    (tmp_path / "ä.mcap").write_bytes(Path(DEMO).read_bytes())
    (tmp_path / "ä.labels.csv").write_text("start_s,end_s,label\n0,1,größer\n", encoding="utf-8")
    plain = python("", "info", "ä.mcap", "--json", folder=tmp_path, PYTHONIOENCODING="ascii")
    assert plain.returncode == 0, plain.stderr
    assert "größer" in plain.stdout.decode()


def test_a_terminal_without_utf_8_gets_its_table(place: Path) -> None:
    if shutil.which("script") is None:
        pytest.skip("needs the program script")
    command = f"{sys.executable} -c '{MAIN}' run {ROOT}/configs/synthetic.yaml --duration 2"
    env = {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(place), "TERM": "xterm", "COLUMNS": "100", "LINES": "40"}
    env |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    done = subprocess.run(["script", "-qec", command, "/dev/null"], env=os.environ | env, capture_output=True,
                          stdin=subprocess.DEVNULL, timeout=PATIENCE_S)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    assert b"predictions over" in done.stdout
    assert done.stdout.isascii()


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_a_closed_standard_stream_is_like_one_that_nobody_reads(place: Path, closed: str) -> None:
    arguments = ("run", f"{ROOT}/configs/synthetic.yaml", "--duration", "2")
    done = python("", *arguments, folder=place, shell=closed, XDG_RUNTIME_DIR=str(place))
    assert done.returncode == 0, done.stderr
    assert done.stdout == b""
    assert ("2>&-" in closed) or b"predictions over" in done.stderr


def test_an_empty_argument_is_not_taken_for_this_folder(call: Call, tmp_path: Path) -> None:
    for arguments in (("info", ""), ("check", ""), ("record", "rig.yaml", "-o", "")):
        code, _, err = call(tmp_path, *arguments)
        asked = " ".join(arguments).strip()
        assert err.startswith(f"error: what follows `sensorium {asked}` is empty; ")
        assert code == 2


def test_where_no_trace_can_be_kept_it_is_shown(
    monkeypatch: pytest.MonkeyPatch,
    call: Call,
    tmp_path: Path,
) -> None:
    def broken(name: str) -> None:
        raise ZeroDivisionError

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "/tmp/x")

    monkeypatch.setattr(live, "print_schema", broken)
    monkeypatch.setattr(cli.tempfile, "NamedTemporaryFile", refused)
    code, _, err = call(tmp_path, "schema", "info")
    assert code == 1
    assert MISTAKE in err
    assert "in broken" in err
