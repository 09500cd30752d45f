"""The prediction: what a subscriber gets, one JSON object a window. ``sensorium schema prediction`` prints its schema.

What is not deterministic (latency, the provider that ran) stands under ``timing`` and is outside every digest; the
rest of two predictions from the same windows and bundle is equal byte for byte on an equal machine. Numbers that are
not finite are null.
"""

from __future__ import annotations

import msgspec

from pipeline.align import Reason, Verdict


class WindowSpan(msgspec.Struct, frozen=True, gc=False):
    """Which window: the index is that of its last step; times are session time in ns, end excluded."""

    index: int
    start_ns: int
    end_ns: int


class StreamReport(msgspec.Struct, frozen=True, gc=False, kw_only=True, omit_defaults=True):
    """One stream in the window's newest step. ``masked`` says what fusion itself could not use, and why.

    ``contribution`` is the stream's share of the confidence (all of them sum to it, less what the model says when it
    sees nothing); null where it was not computed. ``contribution_error`` is its standard error where it was sampled.
    """

    verdict: Verdict
    contribution: float | None
    contribution_error: float | None = None
    reason: Reason | None = None
    coverage: float | None = None
    age_ms: float | None = None
    masked: str | None = None


class Timing(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """Milliseconds by stage: wait (E(k) to the step's emission), align, transport, encode, fuse; total ends before
    the send."""

    latency_ms: dict[str, float]
    provider: str = ""
    fingerprint: str = ""
    """Of the runtime that computed the scores: on an equal one they are equal to the last bit."""


class BundleRef(msgspec.Struct, frozen=True, gc=False):
    """Which model."""

    name: str
    sha256: str


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """One live prediction."""

    schema: int = 1
    session: str
    window: WindowSpan
    label: str | None
    """None when the model abstains with nothing to say (every stream masked); see also ``abstained``."""
    confidence: float | None
    scores: dict[str, float | None]
    set: list[str]
    abstained: bool
    streams: dict[str, StreamReport]
    sync_uncertainty_ms: float | None
    timing: Timing
    bundle: BundleRef
    digest: str
    """The digest of the window's newest step (references, verdicts, resampled samples)."""
    truth: str | None = None
    """The label that the recording or the simulation states for this moment, where it states one."""
