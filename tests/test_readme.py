"""Every command and every program in the README is run, as a reader would run it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.errors import install
from tests.conftest import ROOT
from tests.rigs import simulation_lacks

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
COMMANDS = [line for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
PORT = "5599"
PATIENCE_S = 240

CI = ("make test", "make lint")
"""What `.ci/run` itself consists of; here only that make knows them."""
ACTIVATE = ". .venv/bin/activate"
"""What puts the environment's programs first, as these tests do anyway."""
BACKGROUND = f"sensorium run configs/synthetic.yaml --predictions tcp://127.0.0.1:{PORT}"
WATCHING = ("sensorium subscribe", "sensorium explain --count", "python watch.py", "cc examples/subscriber.c",
            "node examples/subscriber.mjs")  # fmt: skip
"""Commands that need the one in the background."""


@contextmanager
def folder_of_the_readme() -> Iterator[Path]:
    """A folder like the checkout, with a short path, in which the README's files lie."""
    folder = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    for name in ("configs", "models", "recordings", "examples", "Makefile", "pyproject.toml"):
        (folder / name).symlink_to(ROOT / name)
    for language, text in BLOCKS:
        name = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        if language in ("python", "yaml") and name:
            (folder / name[1]).write_text(text)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def place() -> Iterator[Path]:
    with folder_of_the_readme() as folder:
        yield folder


def start(place: Path, command: str) -> subprocess.Popen[str]:
    """Starts a line of shell in ``place``, with this environment's programs first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        ["bash", "-c", command],
        cwd=place,
        env=os.environ | {"PATH": path, "XDG_RUNTIME_DIR": str(place)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end(process: subprocess.Popen[str], how: signal.Signals = signal.SIGINT) -> tuple[str, str]:
    """Ends a command as Ctrl-C does: the signal goes to everything that the line has started."""
    if process.poll() is None:
        os.killpg(process.pid, how)
    return process.communicate(timeout=PATIENCE_S)


def run(place: Path, command: str) -> str:
    process = start(place, command)
    try:
        out, err = process.communicate(timeout=PATIENCE_S)
    finally:
        end(process, signal.SIGKILL)
    assert process.returncode == 0, f"{command}\n{out[-2000:]}\n{err[-2000:]}"
    return out


def first_line(place: Path, command: str) -> str:
    """The first line that an endless command prints."""
    process = start(place, command)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
    finally:
        out, err = end(process, signal.SIGKILL)
    assert line, f"{command}\n{out}\n{err}"
    return line


def test_the_readme_has_all_of_its_parts() -> None:
    assert len(COMMANDS) >= 12
    assert BACKGROUND in COMMANDS
    assert all(any(command.startswith(start) for command in COMMANDS) for start in WATCHING)
    assert len(re.findall(r"^# \S+\.(?:py|yaml)$", README, re.MULTILINE)) == 8


def test_the_pasted_table_has_the_columns_of_the_real_one() -> None:
    pasted = next(text for language, text in BLOCKS if not language)
    columns = ["stream", "rate", "drops", "age", "verdict", "contribution"]
    assert columns in [line.split() for line in pasted.splitlines()]


def test_extras_are_installed_into_the_checkout_and_not_beside_it() -> None:
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.yaml"), *ROOT.glob("models/*/*.md")]
    told = [line for file in files for line in re.findall(r"pip install [^`)]*", file.read_text())]
    ours = [line for line in told if ".[" in line or "sensorium" in line]
    assert len(ours) >= 4
    assert all(line.startswith("pip install -e '.[") for line in ours)
    assert install("ros") == "Type in the checkout: pip install -e '.[ros]'"


def test_the_torch_that_is_named_is_the_one_that_the_tests_are_run_with() -> None:
    version = re.search(r"'torch==([\d.]+)'", (ROOT / "Makefile").read_text())
    assert version
    for file in ("README.md", "docs/tutorial.md"):
        text = " ".join((ROOT / file).read_text().split())
        assert re.search(rf"the tests run with (the CPU build of )?{re.escape(version[1])}[;)]", text)


def test_the_rig_is_the_shipped_one() -> None:
    assert ("yaml", (ROOT / "configs" / "synthetic.yaml").read_text()) in BLOCKS


def test_the_c_program_is_the_example() -> None:
    assert [text for language, text in BLOCKS if language == "c"] == [(ROOT / "examples" / "subscriber.c").read_text()]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_works_in_the_order_of_the_readme(place: Path) -> None:
    ran, lacks = 0, None
    for command in COMMANDS:
        if command in (BACKGROUND, ACTIVATE) or command.startswith(WATCHING):
            continue  # the first and the last are run by the test below
        if re.search(r"simulate|rover\.yaml", command) and (lacks := simulation_lacks()):
            continue
        if command in CI:
            run(ROOT, f"make -n {command.removeprefix('make ')}")
        elif command == "make demo":
            # With the environment that is here instead of a new one from the network.
            run(ROOT, f"make VENV={sys.prefix} -o {sys.prefix}/.base demo")
        else:
            run(place, command)
        ran += 1
    assert ran >= 8
    if lacks:
        pytest.skip(f"all but the simulation's commands ran: {lacks}")


@pytest.fixture(scope="module")
def session() -> Iterator[tuple[Path, str]]:
    """The session that runs in the background of the README, at a free port: its folder and the port."""
    with socket.socket() as probe, folder_of_the_readme() as place:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        for file in place.glob("*.py"):
            file.write_text(file.read_text().replace(PORT, port))
        process = start(place, BACKGROUND.replace(PORT, port))
        try:
            assert process.stdout is not None
            assert '"label"' in process.stdout.readline()
            yield place, port
        finally:
            _, err = end(process)
        assert process.returncode == 0, err


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith(WATCHING)])
def test_a_subscriber_sees_the_running_session(session: tuple[Path, str], command: str) -> None:
    if missing := missing_for(command):
        pytest.skip(f"{missing} is not installed")
    place, port = session
    command = command.replace(PORT, port)
    seen = run(place, command) if "--count" in command else first_line(place, command)
    assert re.search(r"calm|shake|tone|approach|flash|None|null|balanced: sent", seen), seen


@pytest.mark.slow
def test_the_sample_says_that_it_waits_and_ends_quietly(place: Path) -> None:
    process = start(place, "exec python watch.py")
    assert process.stderr is not None
    assert process.stderr.readline() == f"waiting for predictions at tcp://127.0.0.1:{PORT}\n"
    assert end(process) == ("", "")
    assert process.returncode == 0


@pytest.mark.slow
def test_the_sample_ends_quietly_when_nobody_reads_it(session: tuple[Path, str]) -> None:
    process = start(session[0], "python watch.py | head -n 1")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert len(out.splitlines()) == len(err.splitlines()) == 1


def missing_for(command: str) -> str | None:
    """The package without which a line in another language cannot be run here."""
    if command.startswith("cc "):
        return None if shutil.which("cc") and Path("/usr/include/zmq.h").exists() else "libzmq3-dev (and cc)"
    if command.startswith("node "):
        probe = ["node", "-e", "require.resolve('zeromq')"]
        found = shutil.which("node") and not subprocess.run(probe, cwd=ROOT, capture_output=True).returncode
        return None if found else "the npm package zeromq"
    return None


@pytest.mark.slow
def test_the_test_in_the_readme_passes(place: Path) -> None:
    plain = "PYTEST_DISABLE_PLUGIN_AUTOLOAD=1"  # as after `pip install pytest`, with none of our own tests' plugins
    run(place, f"{plain} {sys.executable} -m pytest -q -p no:cacheprovider test_model.py")


def test_the_source_in_the_readme_keeps_the_contract(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import check_source
    from pipeline.source import load_kind

    monkeypatch.syspath_prepend(str(place))
    check_source(load_kind("load:Load"), {}, readings=5)
