"""``sensorium evaluate``: how good a bundle is on recordings whose truth is known, with every set of its streams.

Everything that can be wrong with what was named (no labels, labels that the bundle does not know, no stream in common,
the same file twice) is found before the long work begins. Then each session is one pass, and with ``robustness`` one
more for every stream, fault and severity; passes are independent, so they may run in several processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.attribution import EXACT
from pipeline.bundle import Bundle, load_bundle
from pipeline.errors import RecordingError
from pipeline.evaluate_pass import Pass, run_pass
from pipeline.evaluate_score import contributions, members_of, scores, subset
from pipeline.evaluate_survey import Session, found_in, survey
from pipeline.evaluation import Evaluation, FaultScores, GroupResult, SessionResult, Use
from pipeline.faults import Fault, Loss, Noise, Offset
from pipeline.prediction import BundleRef
from pipeline.recording import RecordingReader
from pipeline.strict import listed
from pipeline.workers import workers

SEVERITIES: dict[str, tuple[float, ...]] = {
    "loss": (0.1, 0.3, 0.6),
    "noise": (0.3, 1.0, 3.0),
    "shift": (50.0, 200.0, 800.0),
}
"""Shares of messages, standard deviations of the signal, and ms, rising."""
FEW = 10
"""Sessions below which an interval over them is rough."""

Progress = Callable[[float, int, str], None]
"""Told how many passes are done (with the part of the one that is on), of how many, and which is on."""


class _Task(NamedTuple):
    session: Session
    stream: str = ""
    kind: str = ""
    level: float = 0.0


def evaluate(
    bundle_path: Path,
    recordings: Sequence[Path],
    *,
    robustness: bool = False,
    by: str | None = None,
    streams: Mapping[str, str | None] | None = None,
    jobs: int = 1,
    allow_code: bool = False,
    progress: Progress = lambda done, total, what: None,
) -> Evaluation:
    """The bundle on ``recordings``, files or folders of them. ``by`` names an attribute of the sessions to group them
    by; ``streams`` maps bundle stream -> stream of the recordings that have it, and None leaves one out. ``jobs``
    processes share the passes; the result does not depend on it. Raises RecordingError, BundleError, ConfigError."""
    bundle = load_bundle(bundle_path, allow_code)
    sessions = survey(bundle, found_in(recordings), by, streams)
    tasks = [_Task(session) for session in sessions]
    if robustness:
        tasks += [
            _Task(session, stream, kind, level)
            for stream in bundle.streams
            for kind, levels in SEVERITIES.items()
            for level in levels
            for session in sessions
            if stream not in session.missing
        ]
    passes = _run(bundle, bundle_path, allow_code, tasks, jobs, progress)
    clean = passes[: len(sessions)]
    _check_truth(clean, sessions, bundle)
    members = members_of(len(bundle.streams), EXACT)
    names, labels = list(bundle.streams), list(bundle.labels)
    return Evaluation(
        bundle=BundleRef(bundle.name, bundle.sha256),
        labels=labels,
        streams=names,
        stated_coverage=bundle.calibration.set_coverage,
        sessions=[_session(session, one, bundle) for session, one in zip(sessions, clean, strict=True)],
        subsets=[subset(clean, i, [n for n, m in zip(names, member, strict=True) if m], labels)
                 for i, member in enumerate(members)],
        contributions=contributions(clean, labels, names),
        attribute=by,
        groups=_groups(sessions, clean, by, len(labels)),
        robustness=_robustness(tasks, passes, clean, members, bundle) if robustness else [],
        warnings=_warnings(sessions, clean, bundle),
    )  # fmt: skip


# -- passes ------------------------------------------------------------------------------------------------------------


def _run(
    bundle: Bundle, path: Path, allow_code: bool, tasks: Sequence[_Task], jobs: int, progress: Progress
) -> list[Pass]:
    """One pass a task, in their order."""
    done: list[Pass] = []
    for one in _here(bundle, tasks, progress) if jobs == 1 else _elsewhere(path, allow_code, tasks, jobs):
        done.append(one)
        progress(len(done), len(tasks), _title(tasks[min(len(done), len(tasks) - 1)]))
    return done


def _here(bundle: Bundle, tasks: Sequence[_Task], progress: Progress) -> Iterator[Pass]:
    for i, task in enumerate(tasks):
        span_ns = max(task.session.labels[-1].end_ns, 1)

        def tell(end_ns: int, i: int = i, span_ns: int = span_ns, title: str = _title(task)) -> None:
            progress(i + min(end_ns / span_ns, 1.0), len(tasks), title)

        yield _pass(bundle, task, tell)


def _elsewhere(path: Path, allow_code: bool, tasks: Sequence[_Task], jobs: int) -> Iterator[Pass]:
    with workers(min(jobs, len(tasks))) as pool:
        for future in [pool.submit(_in_worker, str(path), allow_code, task) for task in tasks]:
            yield future.result()


def _in_worker(path: str, allow_code: bool, task: _Task) -> Pass:
    return _pass(_loaded(path, allow_code), task)


_loaded = lru_cache(maxsize=1)(load_bundle)
"""A worker's own bundle, loaded once."""


def _pass(bundle: Bundle, task: _Task, progress: Callable[[int], None] = lambda end_ns: None) -> Pass:
    session = task.session
    streams = len(bundle.streams)
    members = members_of(streams, EXACT) if not task.kind else np.ones((1, streams), bool)
    fault = _fault(task, session.mapping.get(task.stream) or task.stream) if task.kind else None
    with RecordingReader(session.path) as reader:
        return run_pass(
            reader, bundle, session.labels, members, streams=session.mapping, fault=fault, progress=progress
        )


def _fault(task: _Task, stream: str) -> Fault:
    match task.kind:
        case "loss":
            return Loss(streams=(stream,), share=task.level)
        case "noise":
            return Noise(streams=(stream,), level=task.level)
    return Offset(streams=(stream,), offset_ms=task.level)


def _title(task: _Task) -> str:
    return task.session.path.name + (f", {task.stream}: {task.kind} {task.level:g}" if task.kind else "")


def _check_truth(passes: Sequence[Pass], sessions: Sequence[Session], bundle: Bundle) -> None:
    seen = sorted({int(i) for one in passes for i in np.unique(one.truth)})
    if len(seen) == 1:
        others = [name for i, name in enumerate(bundle.labels) if i != seen[0]]
        where = str(sessions[0].path) if len(sessions) == 1 else f"the {len(sessions)} recordings together"
        raise RecordingError(
            f"{where}: every window with a label is `{bundle.labels[seen[0]]}`, so a model that says nothing else "
            f"would be perfect. Add recordings of {listed(others)}"
        )


# -- what came of it ---------------------------------------------------------------------------------------------------


def _session(session: Session, one: Pass, bundle: Bundle) -> SessionResult:
    counts, used = np.bincount(one.truth, minlength=len(bundle.labels)), _used(session, bundle)
    return SessionResult(
        file=session.path.name, session=session.session, sha256=session.sha256, attributes=session.attributes,
        in_training=used == "trained on", used=used, missing=session.missing, windows=one.steps,
        labels={label: int(n) for label, n in zip(bundle.labels, counts, strict=True) if n},
        scores=scores([one], 0, len(bundle.labels)),
    )  # fmt: skip


def _used(session: Session, bundle: Bundle) -> Use:
    """What the bundle was made of, or by, that very file."""
    names = [name for name, sha in bundle.lineage.recordings.items() if sha == session.sha256]
    if not names:
        return ""
    if names[0] in bundle.lineage.held_out:
        return "calibrated on"
    return "tested on" if names[0] in bundle.lineage.tested else "trained on"


def _groups(sessions: Sequence[Session], passes: Sequence[Pass], by: str | None, labels: int) -> list[GroupResult]:
    if by is None:
        return []
    values = sorted({session.attributes[by] for session in sessions})
    found = []
    for value in values:
        own = [one for session, one in zip(sessions, passes, strict=True) if session.attributes[by] == value]
        found.append(GroupResult(value=value, sessions=len(own), scores=scores(own, 0, labels)))
    return found


def _robustness(
    tasks: Sequence[_Task], passes: Sequence[Pass], clean: Sequence[Pass], members: Any, bundle: Bundle
) -> list[FaultScores]:
    """Each fault over all sessions; what a stream's absence does is known from the sets of streams."""
    by_fault: dict[tuple[str, str, float], list[Pass]] = {}
    for task, one in zip(tasks[len(clean) :], passes[len(clean) :], strict=True):
        by_fault.setdefault((task.stream, task.kind, task.level), []).append(one)
    labels, found = len(bundle.labels), []
    for (stream, kind, level), struck in by_fault.items():
        found.append(FaultScores(stream=stream, fault=kind, level=level, scores=scores(struck, 0, labels)))
    for i, stream in enumerate(bundle.streams):
        without = np.arange(len(bundle.streams)) != i
        row = np.flatnonzero((members == without).all(axis=1))
        if len(row):  # a bundle of one stream has nothing without it
            lacking = scores(clean, int(row[0]), labels)
            found.append(FaultScores(stream=stream, fault="missing", level=1.0, scores=lacking))
    return found


def _warnings(sessions: Sequence[Session], passes: Sequence[Pass], bundle: Bundle) -> list[str]:
    """What a reader should know before believing any of it."""
    said = []
    for use in ("trained on", "calibrated on"):
        known = [session.path.name for session in sessions if _used(session, bundle) == use]
        if known:
            names = ", ".join(known)
            said.append(f"the bundle was {use} {names}: what it scores there says nothing about new recordings")
    if not bundle.lineage.recordings:
        said.append(
            "the bundle does not say which recordings it was trained on, so nobody can tell whether these are new"
        )
    if len(sessions) == 1:
        said.append("one session: there are no intervals, for nobody can tell from it how much others would differ")
    elif len(sessions) < FEW:
        said.append(f"{len(sessions)} sessions: intervals over so few are rough, and rather too narrow")
    seen = {bundle.labels[int(i)] for one in passes for i in np.unique(one.truth)}
    unseen = [label for label in bundle.labels if label not in seen]
    if unseen:
        said.append(f"no window is {', '.join(unseen)}: nothing is known about these labels")
    for session in sessions:
        if not session.complete:
            said.append(f"{session.path.name} is incomplete: only what could be read of it is counted")
        if session.missing:
            said.append(f"{session.path.name} has no {', '.join(session.missing)}")
    for why in dict.fromkeys(session.unread for session in sessions if session.unread):
        said.append(f"{why}. Only --by would need it: the attributes here are those in the recordings alone")
    return said
