"""What ``sensorium evaluate`` found, as plain values: ``--json`` prints it, ``sensorium schema evaluation`` its schema.

Shares are of 1, times in seconds. Intervals are 95 % and drawn over whole sessions; null where one session is all there
is. A window is *blind* where nothing of the streams that a row is about was in it: the model then has no label, which
counts as wrong and as abstained, and it is left out of the calibration error, since no confidence is stated.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from pipeline.prediction import BundleRef


class Estimate(msgspec.Struct, frozen=True):
    """A number and its interval."""

    value: float | None
    low: float | None = None
    high: float | None = None


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    """How good a set of windows was predicted."""

    windows: int
    blind: int
    accuracy: Estimate
    """Of the most probable label, also where the model abstains."""
    macro_f1: Estimate
    """Mean over the labels that are true somewhere."""
    calibration_error: float | None
    """Over ten bins of equal mass."""
    calibration_interval: tuple[float, float] | None = None
    """Of the calibration error, by sessions drawn anew."""
    log_loss: float | None
    coverage: Estimate
    """How often the prediction set holds the truth."""
    set_size: float | None
    abstained: Estimate
    answered_accuracy: Estimate
    """Accuracy where the model does not abstain."""


class ClassScores(msgspec.Struct, frozen=True, kw_only=True):
    """One label with one set of streams."""

    windows: int
    recall: float | None
    f1: float | None
    abstained: float | None
    wrong: float | None
    """Share that got a wrong answer that the model stood by."""
    apart: float | None
    """How well it can be told from the label that it resembles most: area under the curve, 1 is always, 0.5 never."""
    resembles: str | None
    observable: bool | None
    """Whether these streams can tell it from every other label: ``apart`` of 0.9 or more."""


Use = Literal["", "trained on", "calibrated on", "tested on"]
"""What a recording was to a bundle when that was made."""


class Reliability(msgspec.Struct, frozen=True):
    """Bins of equal mass: what was said, what was found."""

    confidence: list[float]
    accuracy: list[float]
    windows: list[int]


class SubsetResult(msgspec.Struct, frozen=True, kw_only=True):
    """The bundle with just these streams; the first of them all has all."""

    streams: list[str]
    scores: Scores
    classes: dict[str, ClassScores]
    reliability: Reliability
    confusion: list[list[int]]
    """Truth by prediction, in the order of the labels; the last column is no label."""
    observable_accuracy: float | None
    """Accuracy over the windows of the labels that these streams can observe, beside that of all streams on the same
    windows; and on the windows of the others how often the model abstains, and how often it stands by a wrong
    answer."""
    full_accuracy: float | None
    rest_abstained: float | None
    rest_wrong: float | None


class SessionResult(msgspec.Struct, frozen=True, kw_only=True):
    """One recording, with all of its streams."""

    file: str
    session: str
    sha256: str
    in_training: Annotated[bool, msgspec.Meta(description="Follows from `used`: whether that is `trained on`.")]
    """For programs that knew it before ``used``, and nothing else."""
    used: Annotated[Use, msgspec.Meta(description="What this file was to the bundle when it was made; empty: nothing.")]
    attributes: dict[str, str]
    missing: list[str]
    """Streams of the bundle that the recording lacks."""
    windows: int
    """All of them; those with a label are in the scores."""
    labels: dict[str, int]
    scores: Scores


class GroupResult(msgspec.Struct, frozen=True, kw_only=True):
    """The sessions that share a value of the attribute asked for."""

    value: str
    sessions: int
    scores: Scores


class FaultScores(msgspec.Struct, frozen=True, kw_only=True):
    """All streams there, and one of them worse than it says. ``fault``: ``loss`` (``level`` is the share of messages),
    ``noise`` (standard deviations of the signal), ``shift`` (ms by which it is stamped late), ``missing``."""

    stream: str
    fault: str
    level: float
    scores: Scores


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """How good a bundle is on recordings whose truth is known."""

    schema: int = 1
    bundle: BundleRef
    labels: list[str]
    streams: list[str]
    stated_coverage: float | None
    sessions: list[SessionResult]
    subsets: list[SubsetResult]
    contributions: dict[str, dict[str, float]]
    """Label -> stream -> its mean share of the confidence, over the windows of the label that were predicted right."""
    attribute: str | None = None
    groups: list[GroupResult] = []
    robustness: list[FaultScores] = []
    warnings: list[str] = []
