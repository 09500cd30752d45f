"""What faults do to a session: the clean run and each faulty one, through the live rules, compared.

The rules are those of the recording's rig (or the defaults): deadlines and idleness count. Time is the session's own,
so nothing waits and the result does not depend on the machine. See ``pipeline.faults`` for the faults themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from pipeline.align import Aligner, AlignSpec, Counters, Step
from pipeline.bundle import Bundle
from pipeline.config import AlignEntry, check_rig
from pipeline.errors import ConfigError
from pipeline.faults import Fault, FaultFile, Item, deaths, faulty, runs, unordered
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.labels import known_labels
from pipeline.plan import live_spec
from pipeline.prediction import Prediction
from pipeline.recording import RecordingReader
from pipeline.replay import Truth, plan_replay
from pipeline.strict import Document
from pipeline.summary import Summary, account


class FaultResult(msgspec.Struct, kw_only=True):
    """One run beside the clean one."""

    name: str
    windows: int
    windows_changed: int
    """Windows of the clean run whose newest step is not the same: other content, or another verdict."""
    verdicts: dict[str, dict[str, int]]
    """Stream -> verdict, with its reason -> windows."""
    label_changes: int
    mean_score_change: float | None
    """Mean |difference| of a score, over all labels and windows; None where no window has scores in both runs."""
    max_score_change: float | None
    abstained: int
    accuracy: float | None
    """None where the recording has no labels."""
    wait_ms: dict[str, float]
    messages: dict[str, dict[str, int]]


class FaultReport(msgspec.Struct, kw_only=True):
    """What ``replay --faults`` found."""

    recording: str
    bundle: str
    seed: int
    max_delay_ms: float
    with_truth: int
    clean: FaultResult
    faults: list[FaultResult]


def fault_bench(
    reader: RecordingReader,
    bundle: Bundle,
    file: FaultFile,
    *,
    streams: Mapping[str, str | None] | None = None,
    options: FuseOptions | None = None,
    progress: Callable[[str, int], None] = lambda name, window: None,
) -> FaultReport:
    """Runs every fault in ``file`` beside the clean session. ``progress`` is told the run and the window. Raises
    RecordingError, BundleError, ConfigError."""
    plan = plan_replay(reader, bundle, streams)
    align = limits_of(reader)
    options = options or FuseOptions(contributions=False)

    def run(name: str, faults: Mapping[str, Fault]) -> _Run:
        broken = unordered(faults.values(), plan.streams.values())
        spec = live_spec(bundle, align, streams or {}, tuple(plan.streams.values()), unordered=broken)
        result = _Run(name)
        heard = reader.messages([s.name for s in spec.streams if s.name in reader.streams], beats=True)
        known = [s.name for s in spec.streams]
        fuser = Fuser(bundle, options, reader.info.session, streams=plan.streams)
        truth = Truth(known_labels(reader))
        for step in live_steps(faulty(heard, faults, file.seed), spec, deaths(faults.values(), known), result.counters):
            prediction = fuser.step(step.manifest, content_of(step))
            result.add(msgspec.structs.replace(prediction, truth=truth.at(step.manifest.end_ns)))
            progress(name, step.manifest.step)
        return result

    clean = run("clean", {})
    return FaultReport(
        recording=str(reader.path),
        bundle=bundle.name,
        seed=file.seed,
        max_delay_ms=align.max_delay_ms,
        with_truth=clean.summary.with_truth,
        clean=clean.beside(clean),
        faults=[run(name, faults).beside(clean) for name, faults in runs(file).items()],
    )


def limits_of(reader: RecordingReader) -> AlignEntry:
    """The limits under which the recording's rig ran; the defaults where it does not say."""
    if reader.info.rig is not None:
        with suppress(ConfigError):  # a rig of another version tells nothing
            return check_rig(Document(reader.info.rig, Path(reader.path))).rig.align
    return AlignEntry()


def live_steps(
    items: Iterable[Item],
    spec: AlignSpec,
    dead: Iterable[tuple[int, str]] = (),
    counters: dict[str, Counters] | None = None,
) -> Iterator[Step]:
    """The steps that a live aligner makes of ``items``, in order of arrival, when the streams in ``dead`` are closed
    at the times stated there. ``counters`` is filled at the end."""
    aligner = Aligner(spec)
    coming = sorted(dead, reverse=True)
    now_ns = 0
    for message, arrival_ns in items:
        now_ns = max(now_ns, arrival_ns)
        while coming and coming[-1][0] <= now_ns:
            at_ns, stream = coming.pop()
            yield from _all(aligner, aligner.close(stream, "dead", at_ns), at_ns)
        yield from _all(aligner, aligner.feed(message, now_ns), now_ns)
    yield from aligner.finish(now_ns)
    if counters is not None:
        counters.update({stream.name: aligner.counters(stream.name) for stream in spec.streams})


def _all(aligner: Aligner, steps: list[Step], now_ns: int) -> Iterator[Step]:
    """All steps that are final now; a call returns only so many."""
    while steps:
        yield from steps
        steps = aligner.tick(now_ns)


class _Run:
    """One pass through the session."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.summary = Summary()
        self.predictions: dict[int, Prediction] = {}
        self.counters: dict[str, Counters] = {}

    def add(self, prediction: Prediction) -> None:
        self.summary.add(prediction)
        self.predictions[prediction.window.index] = prediction

    def beside(self, clean: _Run) -> FaultResult:
        """The run, compared with the clean one window by window."""
        values = self.summary.as_dict()
        pairs = [(self.predictions.get(index), one) for index, one in clean.predictions.items()]
        both = [(mine, other) for mine, other in pairs if mine is not None]
        changes = [_score_changes(mine, other) for mine, other in both]
        flat = list(chain.from_iterable(changes))
        return FaultResult(
            name=self.name,
            windows=self.summary.predictions,
            windows_changed=len(pairs) - sum(mine.digest == other.digest for mine, other in both),
            verdicts=values["verdicts"],
            label_changes=sum(mine.label != other.label for mine, other in both),
            mean_score_change=sum(flat) / len(flat) if flat else None,
            max_score_change=max(flat, default=None),
            abstained=self.summary.abstained,
            accuracy=values["accuracy"],
            wait_ms=values["latency_ms"].get("wait", {}),
            messages={stream: account(counters) for stream, counters in self.counters.items()},
        )


def _score_changes(one: Prediction, other: Prediction) -> list[float]:
    scores: list[tuple[Any, Any]] = [(score, other.scores.get(label)) for label, score in one.scores.items()]
    return [abs(a - b) for a, b in scores if a is not None and b is not None]
