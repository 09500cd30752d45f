"""Labelled sessions of the synthetic world, made in process: as recordings, or in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.messages import AudioLayout, FrameLayout, Header, ImuLayout, Layout, Message, SweepLayout
from pipeline.recording import Label, RecordingWriter, SessionInfo
from pipeline.scene import Scene, happenings

NS = 1_000_000_000
RATE_HZ = 8000


def message(stream: str, seq: int, t_ns: int, length_ns: int, layout: Layout, data: Any) -> Message:
    """One message as a source would send it."""
    end = t_ns + length_ns
    bound = end if isinstance(layout, AudioLayout) else end + 1
    return Message(Header(stream=stream, seq=seq, epoch=0, t_capture_ns=t_ns, t_end_ns=end, bound_ns=bound,
                          t_receipt_ns=end, layout=layout), data)  # fmt: skip


def messages(seed: int, seconds: float, streams: Sequence[str] = ("camera", "imu", "lidar")) -> Iterator[Message]:
    """What the sensors see of one period of ``seconds``, in which every event happens once."""
    scene = Scene(seed, round(seconds * NS))
    if "camera" in streams:
        for i in range(int(seconds * 20)):
            pixels = np.empty((48, 64, 3), np.uint8)
            scene.frame(i * NS // 20, i, pixels)
            yield message("camera", i, i * NS // 20, 0, FrameLayout("bgr8", 48, 64), pixels)
    if "microphone" in streams:
        for i in range(int(seconds * 20)):
            sound = scene.audio(i * RATE_HZ // 20, RATE_HZ // 20, RATE_HZ)
            yield message("microphone", i, i * NS // 20, NS // 20, AudioLayout(RATE_HZ, 1, RATE_HZ // 20), sound)
    if "imu" in streams:
        for i in range(int(seconds * 20)):
            times = (i * 5 + np.arange(5, dtype=np.int64)) * 10_000_000
            yield message("imu", i, int(times[0]), 40_000_000, ImuLayout(5), scene.imu(times, i))
    if "lidar" in streams:
        for i in range(int(seconds * 10)):
            cloud = scene.sweep(i * NS // 10, i, 240, NS // 10)
            yield message("lidar", i, i * NS // 10, 0, SweepLayout(240), cloud)


def labels(seed: int, seconds: float) -> list[Label]:
    """The truth, without a gap."""
    found, at, end = [], 0, round(seconds * NS)
    for event in happenings(0, seed, end):
        found += [Label(at, event.start_ns, "calm"), Label(event.start_ns, event.end_ns, event.label)]
        at = event.end_ns
    return [*found, Label(at, end, "calm")]


def record(path: Path, seed: int, seconds: float, truth: Sequence[Label] | None = None, **more: Any) -> Path:
    """A recording of such a session."""
    info = SessionInfo(session=path.stem, extra={"seed": str(seed % 4)})
    with RecordingWriter(path, info, compression="none") as writer:
        for label in labels(seed, seconds) if truth is None else truth:
            writer.write_label(label, max(label.start_ns, 0))
        for one in sorted(messages(seed, seconds, **more), key=lambda m: m.header.bound_ns):
            writer.write(one, one.header.bound_ns)
    return path
