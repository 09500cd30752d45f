"""Rigs for tests of running systems: four synthetic streams and a model small enough to start at once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import RigFile, load_rig
from pipeline.errors import ConfigError
from pipeline.sim.camera import prepare
from tests.tiny_bundle import FRAME, GRID, SWEEP, mean_encoder, write_bundle

SOUND = {"payload": "audio", "rule": {"kind": "resample", "rate_hz": 100, "max_gap_ms": 50}, "channels": 1}
STREAMS = {"camera": FRAME, "microphone": SOUND, "imu": GRID, "lidar": SWEEP}
SOURCES: dict[str, dict[str, Any]] = {
    "camera": {"kind": "synthetic", "payload": "frame"},
    "microphone": {"kind": "synthetic", "payload": "audio"},
    "imu": {"kind": "synthetic", "payload": "imu"},
    "lidar": {"kind": "synthetic", "payload": "sweep"},
}
WINDOW_STEPS = 3


@contextmanager
def short_folder() -> Iterator[Path]:
    """A new folder whose path is short enough for sockets, which a test's own often is not."""
    folder = Path(tempfile.mkdtemp(prefix="sn", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def make_rig(folder: Path, sources: dict[str, Any] | None = None, bundle: bool = True, **more: Any) -> RigFile:
    """A rig file in ``folder`` with a tiny bundle beside it; ``more`` are further keys of the rig."""
    rig: dict[str, Any] = {"name": "test", "sources": SOURCES if sources is None else sources} | more
    if bundle:
        write_bundle(
            folder / "model", STREAMS, encoders={"microphone": mean_encoder({"payload": "signal"})}, steps=WINDOW_STEPS
        )
        rig["bundle"] = {"path": "model"} | more.get("bundle", {})
    file = folder / "rig.yaml"
    file.write_text(yaml.safe_dump(rig, sort_keys=False))
    return load_rig(file)


@cache
def simulation_lacks() -> str | None:
    """What the simulated rover lacks here, and what to type; None if it runs."""
    try:
        prepare()
        from pipeline.sim.session import Simulation

        Simulation(0, script=False).close()
    except ConfigError as error:
        return str(error)
    return None


def segments_of(session_dir: Path) -> set[str]:
    """Names of the shared memory that this session's publishers have, which their locks hold."""
    return {name for file in session_dir.glob("*.lock") if (name := file.read_text())}


def segment_exists(name: str) -> bool:
    """Whether shared memory of this name is there (on Linux it is a file)."""
    return Path("/dev/shm", name.lstrip("/")).exists()


def nodes_of(session_dir: Path | str) -> set[int]:
    """Processes that run a node of this session (by their command line, which names the spec)."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:  # it ended while we looked
            continue
        if str(session_dir).encode() in command and b"run_node" in command:
            found.add(int(entry.parent.name))
    return found
