"""What is promised of time, shown from end to end: a live session with real deadlines and a node killed in the middle
proves itself, one changed byte is found, and replays in real time agree under any load.

    SENSORIUM_PROOF_S=60 python -m pytest tests/test_proof.py     the same at the length that is promised
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.recording import MANIFEST_TOPIC, RecordingReader
from tests.conftest import ROOT
from tests.rigs import nodes_of, short_folder
from tests.test_launch import until
from tests.test_replay import record
from tests.test_replay import session as live_session
from tests.tiny_bundle import FRAME, GRID, write_bundle

SECONDS = float(os.environ.get("SENSORIUM_PROOF_S", "8"))
REPLAYS, BURNERS = 10, 2
PATIENCE_S = 120 + 4 * SECONDS

RIG = f"""
name: proof
sources:
  camera:     {{kind: synthetic, payload: frame, rate_hz: 15, delay_ms: 15, required: true}}
  microphone: {{kind: synthetic, payload: audio, delay_ms: 10, required: true}}
  imu:        {{kind: synthetic, payload: imu, required: true}}
  lidar:      {{kind: synthetic, payload: sweep, delay_ms: 30, required: true}}
bundle: {{path: {ROOT}/models/demo}}
align: {{max_delay_ms: 150}}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(2 * PATIENCE_S),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes in /proc"),
]


def sensorium(place: Path, *arguments: object) -> subprocess.Popen[str]:
    code = "import sys; from pipeline.cli import main; sys.argv[0] = 'sensorium'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT, env=os.environ | {"XDG_RUNTIME_DIR": str(place)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def pid_of(place: Path, node: str) -> int | None:
    for pid in nodes_of(place):
        if f"/{node}.json".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return None


def seen(process: subprocess.Popen[str], ready: Callable[[int, dict[str, Any]], bool]) -> None:
    """Reads predictions until one's index and what it says of the microphone are as asked for."""
    assert process.stdout is not None
    for line in process.stdout:
        prediction = json.loads(line)
        if ready(prediction["window"]["index"], prediction["streams"]["microphone"]):
            return
    raise AssertionError(f"the session ended before that: {ended(process)[2]}")


@pytest.fixture(scope="module")
def session() -> Iterator[Path]:
    """The recording of a live session in whose middle the process of the microphone was killed."""
    with short_folder() as place:
        (place / "rig.yaml").write_text(RIG)
        process = sensorium(place, "record", place / "rig.yaml", "-o", place / "a.mcap", "--json")
        try:
            middle = round(10 * SECONDS / 2)
            seen(process, lambda index, sound: index >= middle)
            os.kill(until(lambda: pid_of(place, "microphone"), "it has a process"), signal.SIGKILL)
            seen(process, lambda index, sound: sound.get("reason") == "dead")
            seen(process, lambda index, sound: index >= 2 * middle and sound["verdict"] == "ok")
            process.send_signal(signal.SIGINT)
            status, _, err = ended(process)
            assert status == 0, err
        finally:
            process.kill()
        yield place / "a.mcap"


def test_a_session_with_real_deadlines_and_a_killed_node_proves_itself(session: Path) -> None:
    status, out, err = ended(sensorium(session.parent, "replay", session, "--verify", "--json"))
    assert status == 0, out + err
    found = json.loads(out)
    assert found["holds"]
    assert found["windows"] == found["predictions"] >= 9 * SECONDS - 10
    with RecordingReader(session) as reader:
        manifests = [json.loads(data) for data, _, _ in reader.json(MANIFEST_TOPIC)]
    assert [m["step"] for m in manifests] == list(range(1, len(manifests) + 1))


def test_one_changed_byte_is_found_and_placed(session: Path) -> None:
    changed = session.with_name("changed.mcap")
    data = bytearray(session.read_bytes())
    data[len(data) // 2] ^= 1
    changed.write_bytes(data)
    status, out, err = ended(sensorium(session.parent, "replay", changed, "--verify", "--json"))
    assert status == 3, out + err
    found = json.loads(out)
    assert not found["holds"]
    said = json.dumps(found["first_difference"]) + json.dumps(found["unverifiable"])
    assert "byte" in said or "window" in said, said


@contextmanager
def load(count: int) -> Iterator[None]:
    """Processes that use all of the machine that they can get."""
    burners = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for burner in burners:
            burner.kill()
            burner.wait()


REPLAY = """
import sys
from pathlib import Path
import msgspec
from pipeline.bundle import load_bundle
from pipeline.clock import SystemClock
from pipeline.replay import paced, replay_predictions
recording, bundle, *outs = map(Path, sys.argv[1:])
for out in outs:
    predictions = ((p, p.window.end_ns) for p in replay_predictions(recording, load_bundle(bundle)))
    said = [msgspec.structs.replace(p, timing=None) for p, _ in paced(predictions, SystemClock(), 1.0)]
    out.write_bytes(msgspec.json.encode(said))
"""


def test_ten_replays_in_real_time_under_load_agree(tmp_path: Path) -> None:
    """Processes that replay and processes that only burn, more than there are cores: each is late in its own way."""
    recording = record(tmp_path / "a.mcap", live_session(1.5, silent=(0.5, 0.9)))
    model = write_bundle(tmp_path / "model", {"camera": FRAME, "imu": GRID})
    outs = [tmp_path / f"{i}.json" for i in range(REPLAYS)]
    with load(BURNERS):
        runs = [
            subprocess.Popen([sys.executable, "-c", REPLAY, recording, model, *outs[i : i + 2]], cwd=ROOT)
            for i in range(0, REPLAYS, 2)
        ]
        assert [run.wait(PATIENCE_S) for run in runs] == [0] * len(runs)
    said = {out.read_bytes() for out in outs}
    assert len(said) == 1
    assert said.pop().count(b'"digest"') >= 10
