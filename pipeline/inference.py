"""Fusion: steps in, one prediction a step out.

A step of a stream is encoded once, when it becomes final, and its token stays in the ring of the window's last tokens;
a prediction costs the new tokens and one fusion call, whatever the window's length. Masked steps are zeros with a mask
of 0. The one fusion call evaluates the model with every subset of the streams that have anything in the window, so
that the label, its calibrated probability and the exact contribution of each stream (``attribution``) come from the
same batch and sum to each other:

    v(S) = probability of the label predicted with all streams, when only the streams in S are left unmasked
    sum of contributions = v(all) - v(none)

A stream with nothing in the window contributes exactly 0. Note that a stream which is missing in the newest step may
still contribute by its older steps. Each row of the batch is calibrated as its own subset of the streams needs it
(``answers``), so the values are probabilities of a model that knows what it lacks, and still sum.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from pipeline.align import Manifest, Step, StreamManifest
from pipeline.answers import Answers
from pipeline.attribution import EXACT, Plan, exact_plan, sampled_plan, shares
from pipeline.bundle import Bundle
from pipeline.clock import Clock, SystemClock
from pipeline.fusing import make_encoder, make_fusion
from pipeline.lanes import Lane, cross_gap
from pipeline.onnxfile import fingerprint, provider_in_use
from pipeline.prediction import BundleRef, Prediction, StreamReport, Timing, WindowSpan

Array = np.ndarray[Any, Any]


class FuseOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a model runs. ``orders`` and ``seed`` are for bundles of more than eight streams, whose contributions are
    sampled. With ``contributions`` off only the prediction itself is computed and contributions are null; its scores
    may then differ in the last bits, since the batch is another."""

    threads: int = 1
    providers: tuple[str, ...] = ("cpu",)
    contributions: bool = True
    orders: int = 32
    seed: int = 0


class _Outcome(msgspec.Struct):
    """What one fusion call says: probabilities [labels] of the window as it is, each stream's share, and for which
    subsets of the streams (``members`` [rows, streams]) it had probabilities ``rows`` [rows, labels]."""

    scores: Array
    label: int
    contributions: dict[str, tuple[float, float]] | None
    members: Array
    rows: Array


class Fuser:
    """Runs one bundle. Steps are given in order; a gap between their indices is a gap in the window."""

    def __init__(
        self,
        bundle: Bundle,
        options: FuseOptions | None = None,
        session: str = "",
        *,
        streams: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """``streams`` maps bundle stream -> rig stream as ``Bundle.rig_streams`` returns it (default: same names); what
        is not in it is always masked. Manifests, content and predictions go by the rig's names. ``clock`` measures
        latencies, nothing else. Raises BundleError, ConfigError."""
        self.bundle, self.options, self._session_id = bundle, options or FuseOptions(), session
        self._clock = clock or SystemClock()
        names = {name: name for name in bundle.streams} if streams is None else dict(streams)
        self._lanes = {
            name: Lane(names.get(name), make_encoder(bundle, name, self.options.threads, self.options.providers),
                        bundle.window.steps, stream.token)
            for name, stream in bundle.streams.items()
        }  # fmt: skip
        self._order = list(self._lanes)
        self.answers = Answers(bundle.calibration, bundle.labels, self._order)
        self._span_ns = bundle.window.steps * bundle.window.hop_ns
        self._fusion = make_fusion(bundle, self.options.threads, self.options.providers)
        self.provider = provider_in_use(self._fusion.session, self.options.providers)
        stated = msgspec.json.encode(sorted(self.fingerprint().items()))
        self._fingerprint_id = hashlib.blake2b(stated, digest_size=8).hexdigest()
        self._last: int | None = None
        self._outcome: _Outcome | None = None
        # The first run allocates and chooses kernels; no live step shall wait for that.
        self._fusion.logits(self._lanes, self._plan(self._order).coalitions)

    @property
    def encoded(self) -> dict[str, int]:
        """How often each stream's encoder has run on content, by the bundle's names."""
        return {name: lane.encoded for name, lane in self._lanes.items()}

    @property
    def notes(self) -> dict[str, str]:
        """Why a stream's newest content was unusable, in words, by the bundle's names; empty if all is well."""
        return {name: lane.note for name, lane in self._lanes.items() if lane.note}

    @property
    def present(self) -> Array:
        """Which streams have anything in the window, boolean [streams], in the bundle's order."""
        return np.array([lane.present for lane in self._lanes.values()])

    def window(self) -> dict[str, tuple[Array, Array]]:
        """Each stream's part of the window by the bundle's names, copied: tokens f4 [steps, token] and mask f4 [steps],
        oldest step first. What a fusion model is trained on."""
        return {name: (lane.tokens.copy(), lane.mask.copy()) for name, lane in self._lanes.items()}

    def subset_scores(self, members: Array | None = None) -> Array:
        """Calibrated probabilities [rows, labels] of the last step's window, had there been only the streams of each
        row of ``members``, boolean [rows, streams] in the bundle's order (default: all 2^M subsets, where row r holds
        stream i iff bit i of r is set). A stream with nothing in the window makes no difference. What was computed for
        the contributions already is not computed again; the live path computes nothing for this. ValueError before the
        first step."""
        if self._outcome is None:
            raise ValueError("there is no window before the first step")
        asked = exact_plan(len(self._order)).coalitions if members is None else members
        asked = asked & self.present
        known = {row.tobytes(): i for i, row in enumerate(self._outcome.members)}
        wanted = [known.get(row.tobytes(), -1) for row in asked]
        if -1 not in wanted:
            found: Array = self._outcome.rows[wanted]
            return found
        return self.answers.probabilities(self._fusion.logits(self._lanes, asked), asked)

    def fingerprint(self) -> dict[str, str]:
        """What the floats of the predictions depend on beside bundle and messages."""
        return fingerprint(self.provider, self.options.threads)

    @property
    def fingerprint_id(self) -> str:
        """The fingerprint as 16 hexadecimal digits; predictions carry it."""
        return self._fingerprint_id

    def step(
        self, manifest: Manifest, content: Mapping[str, Any], masked: Mapping[str, str] | None = None
    ) -> Prediction:
        """The prediction for the window that ends with this step.

        ``content`` by rig stream: a tuple of messages with payloads, or a grid f4 [samples, channels] with NaN holes;
        None or absent where the aligner had nothing. ``masked`` names streams whose content was lost on the way here,
        and why (``overrun``, ``shed``, …). ValueError if the step is not newer than the last one.
        """
        started = self._clock.now_ns()
        self._cross_gap(manifest.step)
        lost = masked or {}
        faults = {
            name: lane.advance(manifest, content.get(lane.rig or ""), lost.get(lane.rig or ""))
            for name, lane in self._lanes.items()
        }
        encoded = self._clock.now_ns()
        outcome = self._outcome = self._fuse()
        fused = self._clock.now_ns()
        latency = {
            "wait": (manifest.emitted_ns - manifest.end_ns) / 1e6,
            "encode": (encoded - started) / 1e6,
            "fuse": (fused - encoded) / 1e6,
        }
        timing = Timing(latency_ms=latency, provider=self.provider, fingerprint=self.fingerprint_id)
        return self._prediction(manifest, outcome, faults, timing)

    def _cross_gap(self, step: int) -> None:
        """Masks the steps that are missing between the last one and ``step``."""
        if self._last is not None and step <= self._last:
            raise ValueError(f"step {step} came after step {self._last}; steps must be given in order")
        missing = 0 if self._last is None else step - self._last - 1
        self._last = step
        cross_gap(self._lanes.values(), missing, self.bundle.window.steps)

    # -- fusing ------------------------------------------------------------------------------------------------------

    def _plan(self, present: list[str]) -> Plan:
        """Which subsets of the present streams to evaluate; the last row is always all of them."""
        n = len(present)
        if not self.options.contributions:
            return Plan(np.ones((1, n), bool), None, None)
        return exact_plan(n) if n <= EXACT else sampled_plan(n, self.options.orders, self.options.seed)

    def _fuse(self) -> _Outcome:
        present = [name for name in self._order if self._lanes[name].present]
        plan = self._plan(present)
        members = np.zeros((len(plan.coalitions), len(self._order)), bool)
        members[:, [self._order.index(name) for name in present]] = plan.coalitions
        scores = self.answers.probabilities(self._fusion.logits(self._lanes, members), members)
        label = int(np.argmax(scores[-1])) if np.isfinite(scores[-1]).all() else -1
        if not self.options.contributions or not np.isfinite(scores).all():
            return _Outcome(scores[-1], label, None, members, scores)
        found = shares(plan, scores[:, label])
        pairs = zip(found.values.tolist(), found.standard_error.tolist(), strict=True)
        given = dict(zip(present, pairs, strict=True))
        contributions = {name: given.get(name, (0.0, 0.0)) for name in self._order}
        return _Outcome(scores[-1], label, contributions, members, scores)

    # -- saying it ---------------------------------------------------------------------------------------------------

    def _prediction(
        self, manifest: Manifest, outcome: _Outcome, faults: Mapping[str, str | None], timing: Timing
    ) -> Prediction:
        bundle = self.bundle
        scores = {label: _finite(p) for label, p in zip(bundle.labels, outcome.scores.tolist(), strict=True)}
        anything = any(lane.present for lane in self._lanes.values()) and outcome.label >= 0
        confidence = float(outcome.scores[outcome.label]) if anything else None
        return Prediction(
            session=self._session_id,
            window=WindowSpan(manifest.step, manifest.end_ns - self._span_ns, manifest.end_ns),
            label=bundle.labels[outcome.label] if anything else None,
            confidence=confidence,
            scores=scores,
            set=self.answers.prediction_set(outcome.members[-1], outcome.scores) if outcome.label >= 0 else [],
            abstained=confidence is None or self.answers.abstains(outcome.members[-1], outcome.label, confidence),
            streams={self._lanes[name].rig or name: self._report(name, manifest, outcome, faults[name])
                     for name in self._order},
            sync_uncertainty_ms=_sync_uncertainty_ms(manifest, [lane.rig for lane in self._lanes.values()]),
            timing=timing,
            bundle=BundleRef(bundle.name, bundle.sha256),
            digest=manifest.digest,
        )  # fmt: skip

    def _report(self, name: str, manifest: Manifest, outcome: _Outcome, fault: str | None) -> StreamReport:
        rig = self._lanes[name].rig
        stated = manifest.streams.get(rig) if rig is not None else None
        if stated is None:
            stated = StreamManifest(verdict="missing", reason="never_started")
        value, error = outcome.contributions[name] if outcome.contributions is not None else (None, 0.0)
        return StreamReport(
            verdict=stated.verdict,
            contribution=value,
            contribution_error=_finite(error) if error else None,
            reason=stated.reason,
            coverage=stated.coverage if stated.verdict == "partial" else None,
            age_ms=None if stated.newest_ns is None else (manifest.end_ns - stated.newest_ns) / 1e6,
            masked=fault,
        )


def content_of(step: Step) -> dict[str, Any]:
    """What ``Fuser.step`` takes as content, from a step as the aligner gives it (its messages with payloads)."""
    return {**step.messages, **step.grids}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sync_uncertainty_ms(manifest: Manifest, streams: list[str | None]) -> float | None:
    """How far two streams of the newest step may be apart from where their stamps put them: the uncertainties of the
    two least certain ones together. None if no stream has content."""
    stated = [manifest.streams[rig] for rig in streams if rig is not None and rig in manifest.streams]
    known = sorted(s.uncertainty_ns for s in stated if s.verdict in ("ok", "partial"))
    return sum(known[-2:]) / 1e6 if known else None
