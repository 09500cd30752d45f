"""A sound card of the kernel's own (snd-aloop): what is played on its first device is heard on its second."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nodes.microphone import Microphone
from pipeline.clock import SystemClock
from pipeline.life import Life, NodeSpec
from pipeline.node import SourceShell
from pipeline.strict import Document
from tests.test_microphone import MS, NS, Collector, onsets, turn_until

CARDS = Path("/proc/asound/cards")

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not CARDS.exists() or "Loopback" not in CARDS.read_text(), reason="no loopback card: modprobe snd-aloop"
    ),
]


def shell(**given: object) -> tuple[SourceShell, Collector]:
    sender, clock = Collector(), SystemClock()
    decoded = Document("{}", "settings").decode(Microphone.Settings, value={"device": "hw:0,1", **given})
    spec = NodeSpec(session="s", origin=clock.origin, session_dir="/nowhere", node="microphone", kind="microphone")
    made = SourceShell(Microphone, decoded, Life(spec, clock), sender, "microphone")
    made.stamper.open(clock.now_ns())
    return made, sender


@pytest.mark.parametrize("given", [{"rate_hz": 48_000}, {"rate_hz": 16_000, "channels": 1}])
def test_clicks_on_a_sound_card_are_found_by_its_monotonic_clock(tmp_path: Path, given: dict[str, object]) -> None:
    if shutil.which("aplay") is None:
        pytest.skip("no aplay: apt-get install alsa-utils")
    clicks, period = 20, 9600
    sound = np.zeros(period * clicks, "<i2")
    for i in range(clicks):
        sound[period * i + 4800 : period * i + 4848] = 20_000
    path = tmp_path / "sound.raw"
    path.write_bytes(sound.tobytes())
    made, sender = shell(**given)
    try:
        turn_until(made, lambda: len(sender.messages) > 10, 120)
        assert isinstance(made.source, Microphone)
        assert made.source._domain == "monotonic"
        player = subprocess.Popen(["aplay", "-q", "-D", "plughw:0,0,0", "-t", "raw", "-f", "S16_LE", "-r", "48000",
                                   "-c", "1", str(path)])  # fmt: skip
        try:
            turn_until(made, lambda: player.poll() is not None, 120)
        finally:
            player.kill()
            player.wait()
    finally:
        made.source.close()
    found = np.array(onsets(sender.messages))
    # An emulated machine may be too slow to play without holes; what lies between two clicks without one is exact.
    assert len(found) >= clicks // 2
    steps = np.diff(found) / NS
    errors = np.abs(steps / 0.2 - np.rint(steps / 0.2)) * 0.2
    assert np.median(errors) < 2 * MS / NS, errors
