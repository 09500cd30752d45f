"""One pass of a bundle through one labelled session: what it said of every labelled window, with every set of streams.

Steps go by event time through the aligner and the ``Fuser`` that run live. What is kept of a window and a set of
streams are a dozen bytes, and of the odds between labels only counts, so a long session needs no more memory than that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.bundle import Bundle
from pipeline.errors import RecordingError
from pipeline.faults import Fault, faulty
from pipeline.inference import FuseOptions, Fuser, content_of
from pipeline.messages import Header, Message
from pipeline.prediction import Prediction
from pipeline.recording import Label, RecordingReader
from pipeline.replay import Truth, plan_replay, replay_steps
from pipeline.scoring import Separation

Array = np.ndarray[Any, Any]
_BLOCK = 512
"""Windows whose probabilities are held before they are judged."""


@dataclass
class Pass:
    """What came of it: arrays over labelled windows [windows], or over windows and sets of streams [windows, subsets].
    ``predicted`` is -1 where there was nothing to predict from."""

    steps: int
    truth: Array
    predicted: Array
    confidence: Array
    loss: Array
    abstained: Array
    covered: Array
    size: Array
    separations: list[Separation]
    shares: Array
    """Sums of contributions [labels, streams] over the windows that were predicted right, and how many [labels]."""
    shared: Array


class Struck:
    """A session as it would have been with a fault, read as often as need be, the same every time."""

    def __init__(self, reader: RecordingReader, fault: Fault, seed: int) -> None:
        self._reader, self._fault, self._seed = reader, fault, seed

    def messages(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Message, int]]:
        return faulty(self._reader.messages(streams, beats), {"fault": self._fault}, self._seed)

    def headers(self, streams: Collection[str] | None = None, beats: bool = False) -> Iterator[tuple[Header, int]]:
        bare = ((Message(header), at) for header, at in self._reader.headers(streams, beats))
        return ((message.header, at) for message, at in faulty(bare, {"fault": self._fault}, self._seed))


def run_pass(
    reader: RecordingReader,
    bundle: Bundle,
    labels: list[Label],
    members: Array,
    *,
    streams: dict[str, str | None] | None = None,
    fault: Fault | None = None,
    seed: int = 0,
    progress: Callable[[int], None] = lambda end_ns: None,
) -> Pass:
    """The bundle with each row of ``members``, boolean [subsets, streams], on the windows that ``labels`` cover; with a
    ``fault``, on the session that it would have made. ``progress`` is told the end of each window. Contributions and
    separations are taken without a fault only. Raises RecordingError (also where no window has a label), BundleError,
    ConfigError."""
    plan = plan_replay(reader, bundle, streams)
    fuser = Fuser(bundle, FuseOptions(contributions=fault is None), reader.info.session, streams=plan.streams)
    heard = reader if fault is None else Struck(reader, fault, seed)
    truth, judge = Truth(labels), _Judge(fuser, members, detailed=fault is None)
    end_ns = 0
    for step in replay_steps(heard, plan.spec):
        prediction = fuser.step(step.manifest, content_of(step))
        judge.add(prediction, truth.at(step.manifest.end_ns))
        end_ns = step.manifest.end_ns
        progress(end_ns)
    if not judge.steps:
        raise RecordingError(
            f"{reader.path}: no window can be made of it: its streams end before the first "
            f"{bundle.window.hop_ns / 1e6:g} ms are over. Leave it out"
        )
    if not judge.labelled:
        raise RecordingError(
            f"{reader.path}: of its {judge.steps} windows, which end by {end_ns / 1e9:.3f} s, none ends inside a "
            f"label; the labels lie between {labels[0].start_ns / 1e9:.3f} s and {labels[-1].end_ns / 1e9:.3f} s. "
            "Correct the times of the labels, which are session time"
        )
    return judge.result()


class _Judge:
    """Takes windows one by one, and judges them in blocks."""

    def __init__(self, fuser: Fuser, members: Array, detailed: bool) -> None:
        self.steps = self.labelled = 0
        self._fuser, self._members, self._detailed = fuser, members, detailed
        self._labels = list(fuser.bundle.labels)
        self._scores: list[Array] = []
        self._present: list[Array] = []
        self._truth: list[int] = []
        self._blocks: list[tuple[Array, ...]] = []
        n = len(self._labels)
        self._separations = [Separation(n) for _ in members] if detailed else []
        self._shares, self._shared = np.zeros((n, members.shape[1])), np.zeros(n, np.int64)

    def add(self, prediction: Prediction, label: str | None) -> None:
        """The window that was just predicted, and its truth, if it has one."""
        self.steps += 1
        if label is None:
            return
        self.labelled += 1
        true = self._labels.index(label)
        self._scores.append(self._fuser.subset_scores(self._members).astype(np.float64))
        self._present.append(self._fuser.present)
        self._truth.append(true)
        if self._detailed and prediction.label == label:
            given = [report.contribution for report in prediction.streams.values()]
            if None not in given:
                self._shares[true] += given
                self._shared[true] += 1
        if len(self._truth) == _BLOCK:
            self._judge()

    def result(self) -> Pass:
        self._judge()
        truth, predicted, confidence, loss, abstained, covered, size = (
            np.concatenate(parts) for parts in zip(*self._blocks, strict=True)
        )
        return Pass(
            steps=self.steps, truth=truth, predicted=predicted, confidence=confidence, loss=loss, abstained=abstained,
            covered=covered, size=size, separations=self._separations, shares=self._shares, shared=self._shared,
        )  # fmt: skip

    def _judge(self) -> None:
        if not self._truth:
            return
        p, present = np.stack(self._scores), np.stack(self._present)
        truth = np.array(self._truth, np.int16)
        own = np.arange(len(truth))
        columns: list[tuple[Array, ...]] = []
        for i, member in enumerate(self._members):
            one = p[:, i]
            label, abstained, inside = self._fuser.answers.judged(one, member & present)
            loss = -np.log(np.maximum(one[own, truth], 1e-12))
            columns.append((label.astype(np.int16), one.max(axis=1).astype(np.float32), loss.astype(np.float32),
                            abstained, inside[own, truth], inside.sum(axis=1).astype(np.int16)))  # fmt: skip
            if self._detailed:
                seen = (label >= 0) & np.isfinite(one).all(axis=1)
                self._separations[i].add(one[seen], truth[seen])
        self._blocks.append((truth, *(np.stack(parts, axis=1) for parts in zip(*columns, strict=True))))
        self._scores, self._present, self._truth = [], [], []
