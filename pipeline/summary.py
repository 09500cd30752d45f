"""What a run or a replay amounted to: predictions, verdicts, latency, accuracy, and where every message went.

Pure: fed with predictions and counters, asked for text or for plain values. Memory does not grow with the length of a
run: latencies are counted in bins one per cent wide, so a quantile is good to one per cent; the maximum is exact.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

from pipeline.align import Counters, Verdict
from pipeline.life import FROM_ELSEWHERE, ON_THE_WAY, SLOW, NoRoom, RecordReport
from pipeline.prediction import Prediction
from pipeline.recording import NO_ROOM

VERDICTS: tuple[str, ...] = get_args(Verdict)
STAGES = ("wait", "align", "transport", "encode", "fuse", "total")
_BIN = math.log(1.01)
_LEAST_MS = 1e-3


class Quantiles:
    """Quantiles of a series of positive numbers in bounded memory."""

    def __init__(self) -> None:
        self._bins: Counter[int] = Counter()
        self.count = 0
        self.maximum = 0.0

    def add(self, value: float) -> None:
        self._bins[round(math.log(max(value, _LEAST_MS)) / _BIN)] += 1
        self.maximum = max(self.maximum, value)
        self.count += 1

    def quantile(self, q: float) -> float:
        """The value that a fraction ``q`` does not exceed, to 1 %; NaN of an empty series."""
        left = math.ceil(q * self.count)
        for position, count in sorted(self._bins.items()):
            left -= count
            if left <= 0:
                return min(math.exp(position * _BIN), self.maximum)
        return math.nan


class Summary:
    """Adds up predictions one by one; ``counters`` and ``drops`` are set when they are known, which is at the end."""

    def __init__(self, expected: bool = True) -> None:
        """``expected``: there is a model, so that predictions should come."""
        self.expected = expected
        self.endpoint = ""
        """Where predictions are listened for, if nobody knows whether a session publishes there."""
        self.predictions = 0
        self.abstained = 0
        self.unlabelled = 0
        self.labels: Counter[str] = Counter()
        self.known: dict[str, None] = {}
        """The model's labels, in its order."""
        self.truths: Counter[str] = Counter()
        """What was true, whether the model knows it or not."""
        self.correct = 0
        self.answered = 0
        """Of those whose truth the model knows, how many it did not abstain from, and how many of these are right."""
        self.answered_correct = 0
        self.latency_ms: dict[str, Quantiles] = {}
        self.verdicts: dict[str, Counter[str]] = {}
        self.counters: dict[str, Counters] = {}
        self.drops: dict[str, dict[str, int]] = {}
        """By node, what did not pass through its bus or its ring as it should: ``camera.overrun``, ``ring.expired``."""
        self.recorded = ""
        """Where the recording is, and what a ring has deleted."""
        self.lacks: list[str] = []
        """What the recording does not hold, in sentences; it is whole where there are none."""
        self.streams: dict[str, dict[str, int]] = {}
        """Of a session: how much of each stream was sent, and recorded."""
        self.source_drops: dict[str, dict[str, int]] = {}
        """By stream, what its source dropped itself, by reason."""
        self.warnings: list[str] = []
        """What a person should know of the sources, in sentences."""
        self.gaps: list[tuple[int, int]] = []
        """Windows without a prediction between those that have one: first and last of each range."""
        self._start_ns: int | None = None
        self._end_ns = 0
        self._index: int | None = None

    def add(self, prediction: Prediction) -> None:
        """Counts one prediction."""
        self.predictions += 1
        self.abstained += prediction.abstained
        if prediction.label is not None:
            self.labels[prediction.label] += 1
        else:
            self.unlabelled += 1
        self.known.update(dict.fromkeys(prediction.scores))
        if prediction.truth is not None:
            self._compare(prediction, prediction.truth)
        for stage, value in prediction.timing.latency_ms.items():
            self.latency_ms.setdefault(stage, Quantiles()).add(value)
        for stream, report in prediction.streams.items():
            verdict = f"{report.verdict}({report.reason})" if report.reason else report.verdict
            self.verdicts.setdefault(stream, Counter())[verdict] += 1
        index, before = prediction.window.index, self._index
        if before is not None and index > before + 1:
            self.gaps.append((before + 1, index - 1))
        self._index = index
        if self._start_ns is None:
            self._start_ns = prediction.window.end_ns
        self._end_ns = prediction.window.end_ns

    def _compare(self, prediction: Prediction, truth: str) -> None:
        right = prediction.label == truth
        answered = truth in prediction.scores and prediction.label is not None and not prediction.abstained
        self.truths[truth] += 1
        self.correct += right
        self.answered += answered
        self.answered_correct += answered and right

    @property
    def foreign(self) -> dict[str, int]:
        """What was true and is none of the model's labels, with the number of windows: nothing can be right there."""
        return {label: count for label, count in self.truths.items() if label not in self.known}

    @property
    def with_truth(self) -> int:
        """Predictions that can be right: their truth is one of the model's labels."""
        return sum(self.truths.values()) - sum(self.foreign.values())

    @property
    def span_s(self) -> float:
        """Session time between the first and the last prediction."""
        return 0.0 if self._start_ns is None else (self._end_ns - self._start_ns) / 1e9

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values, for ``--json``."""
        return {
            "predictions": self.predictions,
            "abstained": self.abstained,
            "span_s": self.span_s,
            "accuracy": self.correct / self.with_truth if self.with_truth else None,
            "with_truth": self.with_truth,
            "answered": self.answered,
            "answered_accuracy": self.answered_correct / self.answered if self.answered else None,
            "foreign_labels": self.foreign,
            "labels": dict(self.labels),
            "no_label": self.unlabelled,
            "verdicts": {stream: dict(counts) for stream, counts in self.verdicts.items()},
            "latency_ms": {stage: quantiles(self.latency_ms[stage]) for stage in ordered(self.latency_ms)},
            "messages": {stream: account(counters) for stream, counters in self.counters.items()},
            "drops": self.drops,
            "source_drops": self.source_drops,
            "streams": self.streams,
            "recording": {"where": self.recorded, "lacks": self.lacks} if self.recorded else None,
            "warnings": self.warnings,
            "gaps": [{"from": first, "to": last} for first, last in self.gaps],
        }


def lacking(recordings: Sequence[RecordReport], goes_on: bool = True) -> list[str]:
    """What a session's recording lacks, in sentences; ``goes_on``: the recorder's last life came to its end."""
    said = _holes(recordings, goes_on)
    for stream, causes in _losses(recordings).items():
        why = next(iter(causes)) if len(causes) == 1 else ", ".join(f"{n} {cause}" for cause, n in causes.items())
        said.append(f"it lacks {_of(recordings, stream, causes)}: {why}")
    if other := _lost_of_windows(recordings):
        said.append(f"it lacks {other}: {ON_THE_WAY}")
    if other := _unwritten(recordings):
        said.append(f"it lacks {other}: {NO_ROOM}")
    if beats := sum(one.lost_beats for one in recordings):
        said.append(f"it lacks {beats} beats, by which a silent stream says that it lives")
    return said


def not_whole(recordings: Sequence[RecordReport], goes_on: bool = True) -> str:
    """The same in one sentence, with what to do; nothing where nothing is missing."""
    losses, said = _losses(recordings), _holes(recordings, goes_on)
    other, unwritten = _lost_of_windows(recordings), _unwritten(recordings)
    if losses or other or unwritten:
        each = [_of(recordings, stream, causes) for stream, causes in losses.items()]
        each += [what for what in (other, unwritten) if what]
        said.append(f"it lacks {', '.join(each)}")
    elif not said and any(one.lost_beats for one in recordings):
        said.append("it lacks beats, by which a silent stream says that it lives")
    if not said:
        return ""
    todo = "; `sensorium info` shows what is missing"
    if other or any(cause in SLOW for causes in losses.values() for cause in causes):
        todo += (
            ". The disk or the machine was too slow: record fewer or slower streams (`streams` of `record`; `rate_hz` "
            "and the like of a source), with a larger `queue_mib`, or onto a faster disk"
        )
    if any(FROM_ELSEWHERE in causes for causes in losses.values()):
        todo += (
            ". The link between the hosts was cut or too slow: look after its cable or its radio, or send less over it "
            "(`rate_hz` and the like of a source)"
        )
    if any(one.no_room is not None for one in recordings):
        todo += ". Make room on the disk, or lower the ring's `limit_mb`"
    return f"the recording is not whole: {'; '.join(said)}{todo}"


def _of(recordings: Sequence[RecordReport], stream: str, causes: Counter[str]) -> str:
    lost = sum(causes.values())
    there = sum(one.messages.get(stream, 0) for one in recordings)
    return f"{lost} of {lost + there} messages of {stream}"


def _lost_of_windows(recordings: Sequence[RecordReport]) -> str:
    """How many windows and predictions were sent and did not reach the recorder, in words."""
    return _windows(sum(one.lost_windows for one in recordings), sum(one.lost_predictions for one in recordings))


def _unwritten(recordings: Sequence[RecordReport]) -> str:
    """How many of those that reached it found no room on the disk, in words."""
    found = [one.no_room for one in recordings if one.no_room is not None]
    return _windows(sum(one.windows for one in found), sum(one.predictions for one in found))


def _windows(windows: int, predictions: int) -> str:
    lost = {"windows": windows, "predictions": predictions}
    return " and ".join(f"{count} {what}" for what, count in lost.items() if count)


def _losses(recordings: Sequence[RecordReport]) -> dict[str, Counter[str]]:
    """Lost messages by stream and cause, of all lives of the recorder."""
    found: dict[str, Counter[str]] = {}
    for one in recordings:
        for stream, causes in one.lost.items():
            found.setdefault(stream, Counter()).update(causes)
    return dict(sorted(found.items()))


def _holes(recordings: Sequence[RecordReport], goes_on: bool) -> list[str]:
    """When nothing was recorded, for the recorder had died, or its disk was full."""
    said = [_full(one.no_room) for one in recordings if one.no_room is not None]
    for before, after in pairwise(recordings):
        where = f", which is between {before.path} and {after.path}" if before.path != after.path else ""
        said.append(f"the recorder died, and nothing is recorded from {_until(before)} to {after.from_ns / 1e9:.1f} s "
                    f"of the session{where}")  # fmt: skip
    if not goes_on:
        until = _until(recordings[-1]) if recordings else "its beginning"
        said.append(f"the recorder died, and nothing is recorded from {until} of the session on")
    return said


def _full(said: NoRoom) -> str:
    """When there was no room."""
    first = f"{said.from_ns / 1e9:.1f} s"
    end = "the end" if said.until_ns is None else f"{said.until_ns / 1e9:.1f} s"
    if said.times > 1:
        return f"{NO_ROOM} {said.times} times between {first} and {end} of the session, and nothing is recorded then"
    return f"{NO_ROOM}, and nothing is recorded from {first} to {end} of the session"


def _until(life: RecordReport) -> str:
    return "its beginning" if life.safe_ns is None else f"{life.safe_ns / 1e9:.1f} s"


def drops(counters: Mapping[str, float]) -> dict[str, int]:
    """Of a node's counters those that count drops: they are named ``where.what``."""
    return {name: int(count) for name, count in counters.items() if "." in name and count}


def quantiles(series: Quantiles) -> dict[str, float]:
    """The four numbers that are shown of a series."""
    return {
        "p50": series.quantile(0.5),
        "p95": series.quantile(0.95),
        "p99": series.quantile(0.99),
        "max": series.maximum,
    }


def account(counters: Counters) -> dict[str, int]:
    """Where a stream's messages went, one number a place: sent = received + lost, received = all the rest."""
    rejected = sum(counters.rejected.values())
    return {
        "sent": counters.received + counters.lost,
        "lost": counters.lost,
        "received": counters.received,
        "used": counters.used,
        "late": counters.late,
        "no_window": counters.no_window,
        "superseded": counters.superseded,
        "duplicate": counters.duplicate,
        "rejected": rejected,
        "buffered": counters.buffered,
    }


def ordered(stages: Iterable[str]) -> list[str]:
    """The stages in the order in which a prediction passes through them, unknown ones before the total."""
    order: Mapping[str, int] = {stage: position for position, stage in enumerate(STAGES)}
    return sorted(stages, key=lambda stage: order.get(stage, len(STAGES) - 1.5))
