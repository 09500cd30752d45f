"""Writing simulated sessions: one, or many in several processes.

A recording holds the four sensors, ``pose``, the labels as whole intervals without a gap, and what was drawn from the
ranges as the attachment ``world.json``. The same seed, ranges and duration give the same bytes on one machine. On
another, pictures may differ where its OpenGL rounds otherwise, and all streams in their last digits where its
processor or its versions of MuJoCo and numpy do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import as_completed
from contextlib import suppress
from pathlib import Path

import msgspec

from pipeline.errors import ConfigError, RecordingError
from pipeline.recording import Label, RecordingReader, RecordingWriter, SessionInfo
from pipeline.recording.writer import NoRoomError, written_now
from pipeline.sim.camera import prepare
from pipeline.sim.ranges import Name
from pipeline.sim.script import Spell
from pipeline.workers import workers

UNIX_NS = 1_767_225_600_000_000_000
"""Simulated sessions begin at 2026-01-01T00:00:00Z, so that the same seed gives the same bytes."""
NS = 1_000_000_000
_TICK_NS = 10_000_000
"""The simulation's, which cannot be imported before ``prepare``."""


class Written(msgspec.Struct, frozen=True):
    """What was written. ``label_s`` is how long each label was true."""

    file: str
    seed: int
    ranges: str
    duration_s: float
    bytes: int
    label_s: dict[str, float]


def record_session(
    path: Path,
    seed: int,
    ranges: Name = "train",
    duration_s: float = 20.0,
    *,
    outages: Iterable[Spell] = (),
    overwrite: bool = False,
    progress: Callable[[float], None] = lambda s: None,
) -> Written:
    """Simulates a session and records it. ConfigError if MuJoCo or a renderer is missing, or the file exists;
    RecordingError where it finds no room, and then nothing of it stays."""
    prepare()  # before anything imports MuJoCo
    from pipeline.sim.session import Simulation

    simulation = Simulation(seed, ranges, outages=outages)
    info = SessionInfo(
        session=f"rover-{ranges}-{seed}",
        unix_ns=UNIX_NS,
        extra={"simulation": "rover", "seed": str(seed), "ranges": ranges},
    )
    labels: list[Label] = []
    try:
        with RecordingWriter(path, info, overwrite=overwrite) as writer:
            for arrival, what in simulation.until(round(duration_s * NS)):
                if isinstance(what, Label):
                    if (whole := _joined(labels, what)) is not None:
                        writer.write_label(whole, arrival)
                    progress(arrival / NS)
                else:
                    writer.write(what, arrival)
            if (whole := _joined(labels, simulation.rest())) is not None:
                writer.write_label(whole, simulation.now_ns)
            writer.write_label(labels[-1], simulation.now_ns)
            writer.attach("world.json", msgspec.json.encode(simulation.world.values), "application/json")
    except NoRoomError as error:
        path.unlink(missing_ok=True)
        named = path.with_suffix("") if path.suffix == ".tmp" else path
        raise RecordingError(
            f"{named} cannot be written: {error.why}. Nothing of it is kept; make room, or use another disk"
        ) from None
    finally:
        simulation.close()
    length = dict.fromkeys(sorted({label.label for label in labels}), 0.0)
    for label in labels:
        length[label.label] += (label.end_ns - label.start_ns) / NS
    rounded = {name: round(s, 2) for name, s in length.items()}
    return Written(str(path), seed, ranges, duration_s, path.stat().st_size, rounded)


def session_file(folder: Path, seed: int, ranges: Name) -> Path:
    """Where ``record_sessions`` puts a seed's session."""
    return folder / f"rover-{ranges}-{seed:05d}.mcap"


def record_sessions(
    folder: Path, seeds: Iterable[int], ranges: Name = "train", duration_s: float = 20.0, jobs: int = 1
) -> Generator[Written, None, None]:
    """Records a session of each seed into ``folder``, several at a time, and yields each as it is done. A session is
    there whole or not at all; what is there already is left, so that a run that was ended can go on. ConfigError, also
    if a session that is there already has another length."""
    files = {seed: session_file(folder, seed, ranges) for seed in seeds}
    _check_lengths([file for file in files.values() if file.exists()], duration_s)
    prepare()
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [seed for seed, file in files.items() if not file.exists()]
    try:
        with workers(jobs) as pool:
            for done in as_completed([pool.submit(_record_whole, folder, seed, ranges, duration_s) for seed in wanted]):
                yield done.result()
    finally:
        for seed in wanted:
            _discard(_unfinished(folder, seed, ranges))


def _check_lengths(files: Iterable[Path], duration_s: float) -> None:
    """ConfigError if sessions are not as long as those that are to lie beside them. What cannot be read is nobody's
    business here."""
    others = []
    for file in files:
        with suppress(RecordingError), RecordingReader(file) as reader:
            if not 0 <= reader.end_ns - round(duration_s * NS) < _TICK_NS:  # a session ends with a tick
                others.append((file, reader.end_ns / NS))
    if others:
        file, length_s = others[0]
        more = f" ({len(others) - 1} more are of another length)" if len(others) > 1 else ""
        raise ConfigError(
            f"{file} is there already, and is {length_s:g} s long, not {duration_s:g} s{more}. Name another folder, or "
            f"the same length, or remove what is there."
        )


def _unfinished(folder: Path, seed: int, ranges: Name) -> Path:
    return session_file(folder, seed, ranges).with_suffix(".mcap.tmp")


def _discard(path: Path) -> None:
    """Removes what was begun, unless another process is at it."""
    with suppress(FileNotFoundError), path.open("rb") as file:
        if not written_now(file.fileno()):
            path.unlink()


def _record_whole(folder: Path, seed: int, ranges: Name, duration_s: float) -> Written:
    final = session_file(folder, seed, ranges)
    written = record_session(_unfinished(folder, seed, ranges), seed, ranges, duration_s, overwrite=True)
    Path(written.file).replace(final)
    return msgspec.structs.replace(written, file=str(final))


def _joined(labels: list[Label], piece: Label) -> Label | None:
    """Adds a piece to the last label if it says the same; else begins a new one, and returns the last: it is whole."""
    if labels and labels[-1].label == piece.label:
        labels[-1] = Label(labels[-1].start_ns, piece.end_ns, piece.label)
        return None
    labels.append(piece)
    return labels[-2] if len(labels) > 1 else None
