"""Makes recordings/demo.mcap: python recordings/make_demo.py

Twenty seconds of four synthetic sensors, as a live session would have recorded them: the sources and their shells run
on a clock that moves when they wait, so that this takes a few seconds and gives the same messages every time. What the
sensors suffer is in the rig below: the microphone falls silent in the middle, the LiDAR for a moment later on, and
some batches of the IMU are lost on the way, after they were numbered.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from nodes.synthetic import Synthetic
from pipeline.clock import ManualClock, Origin
from pipeline.life import Life, NodeSpec
from pipeline.messages import Header, Message
from pipeline.node import SourceShell
from pipeline.recording import Label, RecordingWriter, SessionInfo
from pipeline.scene import happenings
from pipeline.strict import Document

RIG = """\
# The rig that made this recording (recordings/make_demo.py).
name: demo
sources:
  camera:     {kind: synthetic, seed: 6, payload: frame, format: jpeg, quality: 60, delay_ms: 15, delay_jitter_ms: 8}
  microphone: {kind: synthetic, seed: 6, payload: audio, delay_ms: 12, silence_s: [[9.0, 11.4]]}
  imu:        {kind: synthetic, seed: 6, payload: imu, delay_ms: 1, delay_jitter_ms: 2}
  lidar:      {kind: synthetic, seed: 6, payload: sweep, points: 720, delay_ms: 30, silence_s: [[14.0, 14.8]]}
record: {path: demo.mcap}
"""
SECONDS = 20
LOST = {"imu": range(330, 334)}
"""Numbers of messages that never arrived."""
UNIX_NS = 1_767_225_600_000_000_000
"""The session's 0: 2026-01-01T00:00:00Z."""
NS = 1_000_000_000


class Wire:
    """Notes what a source sends and when."""

    def __init__(self, clock: ManualClock) -> None:
        self._clock = clock
        self.sent: list[tuple[int, Message]] = []

    def publish(self, message: Message) -> bool:
        if message.header.seq not in LOST.get(message.header.stream, ()):
            self.sent.append((self._clock.now_ns(), message))
        return True

    def beat(self, header: Header) -> bool:
        self.sent.append((self._clock.now_ns(), Message(header)))
        return True

    def loan(self, nbytes: int) -> np.ndarray[Any, Any] | None:
        return None


def stream(name: str, settings: Any) -> list[tuple[int, Message]]:
    """What one source sends in ``SECONDS``: arrival and message."""
    clock = ManualClock()
    wire = Wire(clock)
    spec = NodeSpec(session="demo", origin=Origin(0, 0), session_dir="", node=name, kind="synthetic")
    shell = SourceShell(Synthetic, settings, Life(spec, clock), wire, name)
    shell.stamper.open(0)
    while clock.now_ns() < SECONDS * NS:
        shell.turn()
    return wire.sent


def labels(seed: int) -> list[Label]:
    """The truth, without a gap."""
    found, at = [], 0
    for event in happenings(0, seed, SECONDS * NS):
        found += [Label(at, event.start_ns, "calm"), Label(event.start_ns, event.end_ns, event.label)]
        at = event.end_ns
    return [*found, Label(at, SECONDS * NS, "calm")]


def main(path: Path) -> None:
    """Writes the recording to ``path``, in the place of what was there."""
    rig = Document(RIG, "demo")
    sent: list[tuple[int, Message | Label]] = []
    for name, entry in rig.value["sources"].items():
        settings = rig.decode(Synthetic.Settings, ("sources", name), {k: v for k, v in entry.items() if k != "kind"})
        sent += stream(name, settings)
    session = SessionInfo(session="demo", unix_ns=UNIX_NS, rig=RIG)
    with RecordingWriter(path, session, overwrite=True) as writer:
        truth = [(label.start_ns, label) for label in labels(rig.value["sources"]["imu"]["seed"])]
        for arrival, what in sorted([*truth, *sent], key=lambda item: item[0]):
            if isinstance(what, Label):
                writer.write_label(what, arrival)
            else:
                writer.write(what, arrival)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, {writer.messages} messages")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent / "demo.mcap")
