"""The public surface: few names, each of them there, and nothing imported before it is asked for."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import pipeline

PUBLIC = [
    "AlignSpec",
    "Aligner",
    "All",
    "Fuser",
    "Header",
    "Label",
    "Latest",
    "Message",
    "Nearest",
    "Prediction",
    "Reading",
    "RecordingReader",
    "RecordingWriter",
    "Resample",
    "SensoriumError",
    "SessionInfo",
    "Source",
    "StreamSpec",
    "array",
    "check_source",
    "load_bundle",
    "replay_predictions",
    "replay_steps",
    "subscribe",
]


def test_the_public_names_are_these_and_no_others() -> None:
    assert pipeline.__all__ == PUBLIC
    assert [name for name in dir(pipeline) if not name.startswith("_")] == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_there_and_says_what_it_is(name: str) -> None:
    value = getattr(pipeline, name)
    assert value.__name__ == name
    assert value.__doc__


def test_an_unknown_name_says_which_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no public name 'subscribers'; it has .*subscribe"):
        _ = pipeline.subscribers


def test_a_recording_is_written_and_read_with_public_names(tmp_path: Path) -> None:
    with pipeline.RecordingWriter(tmp_path / "x.mcap", pipeline.SessionInfo(session="s")) as writer:
        writer.write_label(pipeline.Label(0, 10, "still"), 10)
    with pipeline.RecordingReader(tmp_path / "x.mcap") as reader:
        assert reader.labels() == [pipeline.Label(0, 10, "still")]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_imports_nothing_else() -> None:
    assert run("import sys, pipeline; print(*(m for m in ('numpy', 'zmq', 'cv2', 'rich') if m in sys.modules))") == ""


def test_subscribing_stays_a_function_whatever_was_imported_before() -> None:
    assert run("import pipeline.subscriber, pipeline; print(callable(pipeline.subscribe))") == "True"


def test_a_subscriber_needs_no_model_runtime() -> None:
    assert run("import sys, pipeline; pipeline.subscribe; print('onnxruntime' in sys.modules)") == "False"


INTERRUPTED = """
import os, signal, sys
import pipeline

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "pipeline.steps":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
try:
    pipeline.subscribe
except KeyboardInterrupt:
    print("pipeline.subscriber" in sys.modules, signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot wait on this system")
def test_an_interrupt_waits_until_what_is_being_imported_is_there() -> None:
    assert run(INTERRUPTED) == "True set()"


def test_windows_are_replayed_without_a_model_by_public_names() -> None:
    spec = pipeline.AlignSpec(
        hop_ns=100_000_000,
        streams=(pipeline.StreamSpec(name="camera", payload="frame", rule=pipeline.Latest(max_age_ns=500_000_000)),),
    )
    steps = list(pipeline.replay_steps(Path(__file__).parents[1] / "recordings" / "demo.mcap", spec))
    assert [step.manifest.step for step in steps] == list(range(1, len(steps) + 1))
    assert {message.header.stream for step in steps for message in step.messages["camera"]} == {"camera"}


@pytest.mark.parametrize("folder", ["pipeline", "nodes"])
def test_the_map_of_the_code_names_every_file_once(folder: str) -> None:
    root = Path(__file__).parents[1]
    rows = (root / "docs" / "code.md").read_text(encoding="utf-8").partition(f"| in `{folder}/` |")[2].split("\n\n")[0]
    named = [name for row in rows.splitlines() for name in re.findall(r"`(\w+)`", row)]
    modules = {path.stem for path in (root / folder).glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in (root / folder).glob("*/__init__.py")}
    assert sorted(named) == sorted(modules | packages)
