"""Sessions to prepared steps on disk: what the live runtime would feed to each encoder, through the same aligner, the
same lanes and the same code before the graph, with only the graph's learned half left out.

A prepared session is a folder: ``STREAM.f4``, rows of one prepared step each; ``steps.npz``, what else is known of each
step; ``samples.npz``, raw inputs of a few steps, with which an export is checked. The folder is named by a digest of
all that it depends on, code included, so that it is made once and never stale.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import cv2
import msgspec
import numpy as np
import torch

from pipeline.align import AlignSpec, StreamSpec
from pipeline.bundle import encoder_input
from pipeline.encoding import GridEncoder, MessageEncoder
from pipeline.errors import RecordingError
from pipeline.lanes import Lane, cross_gap
from pipeline.learn.loop import one_thread
from pipeline.learn.sessions import Given, Mode, Recorded, Session
from pipeline.learn.stream_encoder import StreamEncoder
from pipeline.messages import payload_of
from pipeline.modelfile import BundleStream
from pipeline.outside import naming
from pipeline.rules import misfit
from pipeline.strict import listed
from pipeline.workers import workers

Array = np.ndarray[Any, Any]
_FORMAT = 1
"""Of the folder; another number makes all of them anew."""
WORTH_BYTES = 8 << 20
"""Of recordings for which another process is worth its start, which takes some seconds."""


class Recipe(msgspec.Struct, frozen=True):
    """How steps are made: the model's streams and encoders by their names there, the streams' names in the sessions,
    and the window."""

    streams: dict[str, BundleStream]
    encoders: dict[str, StreamEncoder]
    names: dict[str, str]
    settings: dict[str, Any]
    """Of the encoders, as the training file states them."""
    hop_ns: int
    steps: int
    mode: Mode = "recorded"
    allow_missing: bool = False

    def spec(self) -> AlignSpec:
        """What the aligner must know."""
        streams = [
            StreamSpec(
                name=self.names[name], payload=s.payload, rule=s.rule, channels=s.channels if s.samples else 0,
                channel_names=s.channel_names,
            )
            for name, s in self.streams.items()
        ]  # fmt: skip
        return AlignSpec(hop_ns=self.hop_ns, streams=tuple(streams))

    def digest(self) -> str:
        """Over all that a prepared session depends on beside the session, the code of the encoders included."""
        state = hashlib.sha256()
        classes = {base for encoder in self.encoders.values() for base in type(encoder).__mro__}
        own = {inspect.getfile(base) for base in classes if issubclass(base, StreamEncoder)}
        for file in sorted(own | {__file__}):
            state.update(Path(file).read_bytes())
        said: list[Any] = [
            _FORMAT,
            self.hop_ns,
            self.steps,
            self.mode,
            str(torch.__version__),
            np.__version__,
            cv2.__version__,
        ]
        for name, stream in self.streams.items():
            said += [name, self.names[name], repr(stream), self.encoders[name].shape, self.settings.get(name)]
        state.update(msgspec.json.encode(said, order="deterministic"))
        return state.hexdigest()


class Rows(NamedTuple):
    """A file of prepared steps, f4 [n, *shape]."""

    file: Path
    shape: tuple[int, ...]

    def read(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop``."""
        size = math.prod(self.shape)
        found = np.fromfile(self.file, "<f4", (stop - start) * size, offset=4 * start * size)
        return found.reshape(-1, *self.shape)


class PreparedSession(msgspec.Struct):
    """A session on disk. ``step`` and ``end_ns`` [n], ``present`` [n] of each stream; a row that stands for a step
    which nobody ever made has the step -1. ``digests`` are the steps' own."""

    name: str
    sha256: dict[str, str]
    attributes: dict[str, str]
    rows: dict[str, Rows]
    present: dict[str, Array]
    step: Array
    end_ns: Array
    digests: list[str]
    verdicts: dict[str, dict[str, int]]
    samples: dict[str, list[dict[str, Array]]]

    def __len__(self) -> int:
        return len(self.step)


def prepare(sessions: Sequence[Session], recipe: Recipe, cache: Path, jobs: int = 1) -> Iterator[PreparedSession]:
    """Each session prepared, in order; from ``cache`` where it lies there. Recordings that do not are prepared by up to
    ``jobs`` processes at a time, if there is enough to do, with the same result. RecordingError, naming session and
    time, where one cannot be learnt from: a stream is missing, is another one's payload, never has content, or has
    numbers that are none."""
    for session in sessions:
        _check_streams(session, recipe, sessions)
    folders = [_folder(session, recipe, cache) for session in sessions]
    missing = {folder: session for folder, session in zip(folders, sessions, strict=True) if not _whole(folder)}
    shared = {folder: session for folder, session in missing.items() if isinstance(session, Recorded)}
    number = min(jobs, sum(session.path.stat().st_size for session in shared.values()) // WORTH_BYTES)
    with ExitStack() as stack:
        made: dict[Path, Future[None]] = {}
        if missing:
            cache.mkdir(parents=True, exist_ok=True)
            # Of this process, which cleans up behind workers that were ended.
            parts = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="part-", dir=cache)))
        if number > 1:
            pool = stack.enter_context(workers(number))
            made = {folder: pool.submit(_make, session, recipe, folder, parts) for folder, session in shared.items()}
        for session, folder in zip(sessions, folders, strict=True):
            if folder in made:
                made[folder].result()
            elif not _whole(folder):
                _make(session, recipe, folder, parts)
            yield _read(session, recipe, folder)


def _folder(session: Session, recipe: Recipe, cache: Path) -> Path:
    """Where the session lies when it is prepared."""
    key = hashlib.sha256(f"{recipe.digest()} {next(iter(session.sha256.values()))}".encode()).hexdigest()
    return cache / key[:32]


def _whole(folder: Path) -> bool:
    return (folder / "steps.npz").is_file()


def _make(session: Session, recipe: Recipe, folder: Path, parts: Path) -> None:
    """Prepares the session in ``parts``, and moves it to ``folder`` when it is whole."""
    part = Path(tempfile.mkdtemp(dir=parts))
    with one_thread(), naming(folder.parent):
        _write(session, recipe, part)
    try:
        part.replace(folder)
    except OSError:
        if not _whole(folder):  # where another training was faster, its work is as good
            raise


def _check_streams(session: Session, recipe: Recipe, sessions: Sequence[Session]) -> None:
    layouts = session.layouts()
    specs = {spec.name: spec for spec in recipe.spec().streams}
    for name, stream in recipe.streams.items():
        recorded = recipe.names[name]
        if recorded not in layouts:
            if recipe.allow_missing:
                continue
            raise RecordingError(
                f"{session.name} has no stream `{recorded}`; it has {listed(sorted(layouts)) or 'none'}. Leave the "
                "session out, or say `missing_streams: allow`"
            )
        if payload_of(layouts[recorded]) != stream.payload:
            raise RecordingError(
                f"{session.name} has {payload_of(layouts[recorded])} on its stream `{recorded}`, where `{name}` is "
                f"{stream.payload}. Leave the session out, or name another stream by `recorded_as`"
            )
        if words := misfit(specs[recorded], layouts[recorded]):
            first = next(one.name for one in sessions if recorded in one.layouts())
            todo = (
                f"as {first} has it. One model cannot learn from both: leave one of them out, or record it anew"
                if first != session.name
                else "as the training file says. Correct its `channels`, or leave the session out"
            )
            raise RecordingError(f"{session.name}: its stream `{recorded}` {words}, {todo}")


# -- writing -------------------------------------------------------------------------------------------------------


class _Preprocessing:
    """The half of an encoder's graph that holds nothing learned, run in the graph's place. Notes what it was fed."""

    def __init__(self, encoder: StreamEncoder, stream: BundleStream) -> None:
        self._encoder = encoder
        self.fed: dict[str, Array] = {}
        x = encoder_input(stream)
        self._inputs = [_Input("x", [d if isinstance(d, int) else None for d in x.shape])]
        self._inputs += [_Input("valid", [x.shape[0]])] if stream.samples else []

    def get_inputs(self) -> list[_Input]:
        return self._inputs

    def run(self, outputs: Any, feed: dict[str, Array]) -> list[Array]:
        self.fed = feed
        with torch.inference_mode():
            given = {name: _tensor(value) for name, value in feed.items()}
            prepared = self._encoder.prepare(given["x"], given.get("valid"))
        if tuple(prepared.shape) != self._encoder.shape:
            raise ValueError(f"a step was prepared as {list(prepared.shape)} instead of {list(self._encoder.shape)}")
        return [prepared.numpy().reshape(-1)]


class _Input(NamedTuple):
    name: str
    shape: list[Any]


def _tensor(value: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(value) if value.flags.writeable else value.copy())


class _Steps:
    """What is known of each step, collected."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self.step, self.end_ns, self.digests = [0] * 0, [0] * 0, [""] * 0
        self.present: dict[str, list[bool]] = {name: [] for name in names}
        self.verdicts: dict[str, Counter[str]] = {name: Counter() for name in names}
        self.samples: dict[str, list[dict[str, Array]]] = {name: [] for name in names}


def _write(session: Session, recipe: Recipe, folder: Path) -> None:
    known = _Steps(recipe.names)
    halves, lanes = {}, {}
    for name, stream in recipe.streams.items():
        size = math.prod(recipe.encoders[name].shape)
        flat = msgspec.structs.replace(stream, token=size)
        halves[name] = _Preprocessing(recipe.encoders[name], stream)
        encoder = (GridEncoder if stream.samples else MessageEncoder)(halves[name], flat, f"the encoder of {name}")
        lanes[name] = Lane(recipe.names[name], encoder, 1, size)
    with ExitStack() as stack:
        files = {name: stack.enter_context((folder / f"{name}.f4").open("wb")) for name in lanes}
        for given in session.steps(recipe.spec(), recipe.mode):
            _cross_gap(given, recipe, lanes, files, known)
            known.step.append(given.manifest.step)
            known.end_ns.append(given.manifest.end_ns)
            known.digests.append(given.manifest.digest)
            for name, lane in lanes.items():
                _advance(session, given, name, recipe.names[name], lane, known, halves[name])
                files[name].write(lane.tokens[0].tobytes())
    _check_written(session, recipe, known)
    flat_samples = {f"{name}/{i}/{key}": value for name, samples in known.samples.items()
                    for i, sample in enumerate(samples) for key, value in sample.items()}  # fmt: skip
    np.savez(folder / "samples.npz", **flat_samples)  # type: ignore[arg-type]
    facts = np.frombuffer(msgspec.json.encode({"digests": known.digests, "verdicts": known.verdicts}), np.uint8)
    present = {f"present.{name}": np.array(rows, bool) for name, rows in known.present.items()}
    steps = {"step": np.array(known.step, np.int64), "end_ns": np.array(known.end_ns, np.int64), "facts": facts}
    np.savez(folder / "steps.npz", **steps, **present)  # type: ignore[arg-type]


def _cross_gap(
    given: Given, recipe: Recipe, lanes: Mapping[str, Lane], files: Mapping[str, BinaryIO], known: _Steps
) -> None:
    """Masks the steps that are missing before this one; a window sees no more than its own number of them."""
    missing = 0 if not known.step else given.manifest.step - known.step[-1] - 1
    if not missing:
        return
    cross_gap(lanes.values(), missing, recipe.steps)
    for _ in range(min(missing, recipe.steps)):
        known.step.append(-1)
        known.end_ns.append(known.end_ns[-1])
        known.digests.append("")
        for name, lane in lanes.items():
            known.present[name].append(False)
            files[name].write(bytes(4 * lane.tokens.shape[1]))


def _advance(
    session: Session, given: Given, name: str, recorded: str, lane: Lane, known: _Steps, half: _Preprocessing
) -> None:
    ran = lane.encoded
    fault = lane.advance(given.manifest, given.content.get(recorded), given.masked.get(recorded))
    if fault == "encode_failed":
        raise RecordingError(
            f"{session.name}: the step of `{recorded}` that ends at {given.manifest.end_ns / 1e9:.3f} s cannot be "
            f"learnt from: {lane.note}. Mend the session, or leave it out"
        )
    present = lane.present
    known.present[name].append(present)
    stated = given.manifest.streams.get(recorded)
    known.verdicts[name][fault or (stated.verdict if stated is not None else "missing")] += 1
    index = len(known.step)
    if present and lane.encoded > ran and (not known.samples[name] or index & (index - 1) == 0):
        # The first, and then the one at the latest power of two: something from somewhere in the session.
        known.samples[name][1:] = []
        known.samples[name].append({key: np.array(value) for key, value in half.fed.items()})


def _check_written(session: Session, recipe: Recipe, known: _Steps) -> None:
    if not known.step:
        raise RecordingError(
            f"{session.name} is empty: it holds no whole step of {recipe.hop_ns / 1e6:g} ms of any of "
            f"{listed(recipe.names.values())}. Leave it out"
        )
    for name, rows in known.present.items():
        if not any(rows) and not recipe.allow_missing:
            verdicts = ", ".join(f"{count} {verdict}" for verdict, count in known.verdicts[name].items())
            raise RecordingError(
                f"{session.name}: its stream `{recipe.names[name]}` has content in none of {len(rows)} steps "
                f"({verdicts}). Look at it with `sensorium explain`; leave it out, or say `missing_streams: allow`"
            )


# -- reading -------------------------------------------------------------------------------------------------------


def _read(session: Session, recipe: Recipe, folder: Path) -> PreparedSession:
    with np.load(folder / "steps.npz") as steps:
        facts = msgspec.json.decode(steps["facts"].tobytes())
        return PreparedSession(
            name=session.name,
            sha256=dict(session.sha256),
            attributes=dict(session.attributes),
            rows={name: Rows(folder / f"{name}.f4", recipe.encoders[name].shape) for name in recipe.streams},
            present={name: steps[f"present.{name}"] for name in recipe.streams},
            step=steps["step"],
            end_ns=steps["end_ns"],
            digests=facts["digests"],
            verdicts=facts["verdicts"],
            samples={name: list(_samples(folder, name)) for name in recipe.streams},
        )


def _samples(folder: Path, name: str) -> Iterator[dict[str, Array]]:
    with np.load(folder / "samples.npz") as stored:
        for i in range(2):
            keys = [key for key in stored.files if key.startswith(f"{name}/{i}/")]
            if keys:
                yield {key.rpartition("/")[2]: stored[key] for key in keys}
