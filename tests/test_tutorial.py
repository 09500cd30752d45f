"""docs/tutorial.md, step by step, as a reader would follow it: every file that it shows and every command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.recording import RecordingReader
from tests.conftest import ROOT
from tests.rigs import simulation_lacks

TEXT = (ROOT / "docs" / "tutorial.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
STEPS = re.findall(r"^## \d+\. (.*)$", TEXT, re.MULTILINE)
PATIENCE_S = 400


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty folder with a short path."""
    folder = Path(tempfile.mkdtemp(prefix="s-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def run(place: Path, command: str) -> str:
    """What a command says, on standard output and beside it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Threads of torch that wait for each other take minutes where the machine has other things to do.
    env = os.environ | {"PATH": path, "XDG_RUNTIME_DIR": str(place), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["bash", "-c", command], cwd=place, env=env, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ran.returncode == 0, f"{command}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    return ran.stdout + ran.stderr


def test_it_goes_from_simulated_sessions_to_a_replay() -> None:
    commands = [line.split()[1] for language, text in BLOCKS if language == "sh" for line in text.splitlines()]
    steps = "simulate info train simulate evaluate run run explain explain replay"
    assert commands == steps.split()
    assert len(STEPS) == 7


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_step_works_in_its_order(place: Path) -> None:
    if lacks := simulation_lacks():
        pytest.skip(lacks)
    said: dict[str, str] = {}
    for language, text in BLOCKS:
        if language == "yaml":
            name = re.match(r"# (\S+\.yaml)\n", text)
            assert name, text
            (place / name[1]).write_text(text)
        else:
            for command in text.splitlines():
                said[command] = run(place, command)
    assert len(list((place / "sessions").glob("*.mcap"))) == 3
    assert "windows with a label" in next(out for line, out in said.items() if line.startswith("sensorium evaluate"))
    assert (place / "report.html").stat().st_size > 10_000
    assert re.search(r"camera +(late|missing)", said["sensorium explain unplugged.mcap --window 36"])
    with RecordingReader(place / "unplugged.mcap") as reader:
        epochs = {message.header.epoch for message, _ in reader.messages({"camera"})}
    assert len(epochs) == 2
