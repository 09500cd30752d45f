"""Streams of the Lab Streaming Layer, from outlets in other processes."""

from __future__ import annotations

import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nodes.lsl import Lsl
from pipeline.checks import CheckContext, check_source
from pipeline.clock import SystemClock
from pipeline.errors import ConfigError, SensorError
from pipeline.messages import SignalLayout
from pipeline.source import Reading
from pipeline.strict import Document

pytest.importorskip("pylsl", reason="the Lab Streaming Layer is not installed: pip install -e '.[lsl]'")
ROOT = Path(__file__).resolve().parent.parent

OUTLET = """
import sys, threading
import pylsl
from pipeline.clock import SystemClock
identity, kind, rate, shift = sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4])
format_ = {"EEG": "float32", "Markers": "string", "Counts": "int32"}[kind]
info = pylsl.StreamInfo("Test " + kind, kind, 3, rate, format_, identity)
if kind == "EEG":
    info.set_channel_labels(["Fp1", "Fp2", "Cz"])
outlet = pylsl.StreamOutlet(info)
print("ready", flush=True)
clock = SystemClock()
ended = threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
start, sent = None, 0
cut = int if kind == "Counts" else float
while not ended.is_set():
    if start is None:
        if outlet.wait_for_consumers(0.05):
            start = pylsl.local_clock()
        continue
    while start + sent / (rate or 100) <= pylsl.local_clock():
        stamp = start + sent / (rate or 100)
        # The stamp itself travels as thousands of seconds and the rest, so that the reader can compare.
        values = ["a", "b", "c"] if kind == "Markers" else [sent, int(stamp) // 1000, cut(stamp % 1000)]
        outlet.push_sample(values, stamp + shift)
        sent += 1
    clock.wait_until(clock.now_ns() + 2_000_000)
"""

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def outlet() -> Iterator[Start]:
    """Starts an outlet in another process, and waits until it is there."""
    started: list[subprocess.Popen[bytes]] = []

    def start(identity: str, kind: str = "EEG", rate: float = 200, shift: float = 0) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", OUTLET, identity, kind, str(rate), str(shift)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait(30)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


@pytest.fixture
def identity() -> str:
    """A source_id that no other test uses."""
    return f"sensorium-{uuid.uuid4()}"


def settings(**given: Any) -> Any:
    return Document("{}", "settings").decode(Lsl.Settings, value=given)


def read(source: Lsl, wanted: int, turns: int = 300) -> list[Reading]:
    found: list[Reading] = []
    for _ in range(turns):
        reading = source.read()
        if reading is not None:
            found.append(reading)
        if sum(len(r.data) for r in found) >= wanted:
            return found
    raise AssertionError(f"{sum(len(r.data) for r in found)} samples of {wanted} after {turns} turns")


def patiently(source: Lsl) -> None:
    """Opens as the shell does: again, while the layer looks for the stream."""
    for _ in range(10):
        try:
            return source.open()
        except SensorError as error:
            last = error
    raise last


def test_an_outlet_keeps_the_contract_of_a_source(outlet: Start, identity: str) -> None:
    outlet(identity)
    got = check_source(Lsl, {"source_id": identity}, readings=10, lives=1)
    assert got[0].layout == SignalLayout(len(got[0].data), ("Fp1", "Fp2", "Cz"))


def test_samples_come_whole_with_the_time_at_which_the_outlet_took_them(outlet: Start, identity: str) -> None:
    import pylsl

    outlet(identity)
    clock = SystemClock()
    source = Lsl(settings(source_id=identity), CheckContext(clock=clock))
    patiently(source)
    found = read(source, 300)
    zero = clock.now_ns() - round(pylsl.local_clock() * 1e9)
    source.close()
    values = np.concatenate([r.data["value"] for r in found]).astype(np.float64)
    first = int(values[0, 0])
    assert values[:, 0].tolist() == list(range(first, first + len(values)))
    times = np.concatenate([r.t_capture_ns + r.data["offset_ns"] for r in found])
    assert (np.diff(times) > 0).all()
    truth = (values[:, 1] * 1000 + values[:, 2]) * 1e9 + zero
    doubt = max(r.uncertainty_ns for r in found)
    assert np.abs(times - truth).max() <= doubt + 1_000_000  # the values are f4, good to 30 us
    assert 0 < doubt < 50_000_000


def test_channels_are_chosen_by_name_and_whole_numbers_are_taken(outlet: Start, identity: str) -> None:
    outlet(identity)
    source = Lsl(settings(source_id=identity, channels=["Cz", "Fp1"]), CheckContext())
    patiently(source)
    (reading, *_) = read(source, 1)
    source.close()
    assert isinstance(reading.layout, SignalLayout)
    assert reading.layout.channels == ("Cz", "Fp1")
    assert reading.data["value"][0, 1] == round(float(reading.data["value"][0, 1]))
    with pytest.raises(SensorError, match="no channel Pz; it has Fp1, Fp2, Cz"):
        patiently(Lsl(settings(source_id=identity, channels=["Pz"]), CheckContext()))
    outlet(identity + "-counts", "Counts", 0)
    irregular = Lsl(settings(source_id=identity + "-counts"), CheckContext())
    patiently(irregular)
    (counted, *_) = read(irregular, 1)
    irregular.close()
    assert isinstance(counted.layout, SignalLayout)
    assert counted.layout.channels == ("ch1", "ch2", "ch3")


def test_an_outlet_that_ends_is_an_error_and_one_that_returns_is_found_again(outlet: Start, identity: str) -> None:
    first = outlet(identity)
    source = Lsl(settings(source_id=identity, silence_ms=500), CheckContext())
    patiently(source)
    read(source, 20)
    stop(first)
    with pytest.raises(SensorError, match=r"went away|sent nothing"):
        read(source, 1_000_000)
    source.close()
    outlet(identity)
    patiently(source)
    assert read(source, 20)
    source.close()


def test_an_outlet_that_is_not_there_is_a_sensor_error_that_says_what_was_looked_for(identity: str) -> None:
    with pytest.raises(SensorError, match=f"source_id `{identity}` is not there"):
        Lsl(settings(source_id=identity), CheckContext()).open()


def test_markers_are_refused(outlet: Start, identity: str) -> None:
    outlet(identity, "Markers", 0)
    with pytest.raises(SensorError, match="carries text"):
        patiently(Lsl(settings(source_id=identity), CheckContext()))


def test_stamps_of_another_clock_are_refused(outlet: Start, identity: str) -> None:
    outlet(identity, "EEG", 200, 1.7e9)  # an outlet that stamps with Unix time
    source = Lsl(settings(source_id=identity), CheckContext())
    patiently(source)
    with pytest.raises(SensorError, match="a clock that is not the layer's"):
        read(source, 1)
    source.close()


def test_a_stamp_that_is_no_time_costs_its_sample_and_no_more(identity: str) -> None:
    import pylsl

    outlet = pylsl.StreamOutlet(pylsl.StreamInfo("Test", "EEG", 1, 0, "float32", identity))
    context = CheckContext()
    source = Lsl(settings(source_id=identity), context)
    patiently(source)
    assert source.read() is None  # the inlet asks for samples from here on
    assert outlet.wait_for_consumers(10)
    now = pylsl.local_clock()
    for value, stamp in enumerate([now, np.nan, now + 0.01, np.inf, 1e300, now + 0.02]):
        outlet.push_sample([float(value)], stamp)
    found = read(source, 3)
    source.close()
    assert np.concatenate([r.data["value"] for r in found])[:, 0].tolist() == [0, 2, 5]
    assert context.counted == {"malformed": 3}


@pytest.mark.parametrize(
    ("given_settings", "match"),
    [({}, "which stream"), ({"name": "'\""}, "not both"), ({"type": "EEG", "channels": ["a", "a"]}, "each once")],
)
def test_settings_name_a_stream(given_settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        settings(**given_settings)
