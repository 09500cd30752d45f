"""``sensorium explain`` on a session that runs: the same account, watched from outside.

Where every message went is the align node's own account, from the session's beginning on. Rates, delays, verdicts, whom
the windows waited for and what they were made of are worked out from the headers and manifests of the last
``KEPT_NS``, as they come: whoever watches joins nothing, takes no slot, and changes nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from pipeline.align import Manifest
from pipeline.clock import SystemClock
from pipeline.errors import ConfigError, WireError
from pipeline.explain import (
    PLACES,
    Explanation,
    Heard,
    Session,
    StreamAccount,
    latency_ms,
    spread,
    verdict_of,
    waits_of,
)
from pipeline.explain_window import WindowExplanation, explain_window
from pipeline.life import Accounts, AlignReport
from pipeline.messages import payload_of
from pipeline.prediction import Prediction
from pipeline.receiving import Parts
from pipeline.recording import SessionInfo, rate_hz
from pipeline.status import SessionRef
from pipeline.steps import ACCOUNT, GAP, STEP, decode_step
from pipeline.transport import Buffered, Delivery, observe

KEPT_NS = 30_000_000_000
_EVERY_NS = 5_000_000_000


class Attached(Session):
    """A session that runs, watched: ``turn`` takes what has come. Close it, or use it in a ``with`` block."""

    def __init__(self, ref: SessionRef, clock: SystemClock | None = None) -> None:
        """``clock`` is the session's; from ``ref`` where it has begun."""
        self.spec = None
        self.info = SessionInfo(session=ref.id, complete=True)
        self.source = "running"
        self.facts = {}
        self.heard, self.layouts = {}, {}
        self.manifests: list[Manifest] = []
        self.predictions: dict[int, Prediction] = {}
        self.gaps = []
        self.accounts: Accounts | None = None
        self.payloads: dict[str, str] = {}
        self._samples: dict[str, int] = {}  # of the newest message of each stream
        self._ref, self._clock = ref, clock or SystemClock(ref.origin)
        self._trimmed_ns = self._clock.now_ns()
        wiring: dict[str, dict[str, Delivery]] = {}
        for stream, node in ref.streams.items():
            wiring.setdefault(node, {})[stream] = Buffered(4096)
        topics = {"align": [STEP, GAP, ACCOUNT], "fusion": ["prediction"]} if ref.model else {}
        self._subscriber = observe(
            Path(ref.dir), wiring, {node: dict.fromkeys(names, Buffered(4096)) for node, names in topics.items()}
        )

    def turn(self, timeout_ms: int = 50) -> None:
        """Waits for what comes next and takes it."""
        for received in self._subscriber.receive(timeout_ms):
            with received:
                header = received.message.header
            self.heard.setdefault(header.stream, Recent()).add(header, self._clock.now_ns())
            if header.layout is not None:
                self.payloads[header.stream] = payload_of(header.layout)
                self._samples[header.stream] = getattr(header.layout, "samples", 1)
        for parts in self._subscriber.parts():
            self._take(parts)
        if (now := self._clock.now_ns()) - self._trimmed_ns > _EVERY_NS:
            self._trim(now - KEPT_NS)
            self._trimmed_ns = now

    def _take(self, parts: Parts) -> None:
        try:
            match parts.topic:
                case "step":
                    self.manifests.append(decode_step([STEP, *parts.parts]).manifest)
                case "account":
                    self.accounts = msgspec.json.decode(parts.parts[0], type=Accounts)
                case "gap":
                    self.gaps.append(msgspec.json.decode(parts.parts[0], type=dict))
                case "prediction":
                    prediction = msgspec.json.decode(parts.parts[0], type=Prediction)
                    self.predictions[prediction.window.index] = prediction
        except (WireError, msgspec.MsgspecError, IndexError):
            return  # whoever watches has no one to tell

    def _trim(self, since_ns: int) -> None:
        """Forgets what is older."""
        self.manifests = [m for m in self.manifests if m.emitted_ns >= since_ns]
        first = self.manifests[0].step if self.manifests else 0
        self.predictions = {index: p for index, p in self.predictions.items() if index >= first}
        for heard in self.heard.values():
            assert isinstance(heard, Recent)
            heard.forget(since_ns)

    def window(self, step: int) -> WindowExplanation:
        """What a window is made of, as soon as it is final. ConfigError for one that was final before anybody watched,
        or that never comes."""
        while Path(self._ref.dir).exists() and not any(m.step >= step for m in self.manifests):
            self.turn()
        if not any(m.step == step for m in self.manifests):
            seen = f", only those from {self.manifests[0].step} on" if self.manifests else ""
            raise ConfigError(
                f"window {step} was not seen of this session{seen}; what is past can be asked of a recording "
                "(sensorium record), what is to come of a session that goes on."
            )
        self.turn()
        return explain_window(self, step)

    def explanation(self) -> Explanation:
        """The account as it is now."""
        waits = waits_of(self)
        return Explanation(
            session=self.info.session,
            complete=True,
            source=self.source,
            windows=len(self.manifests),
            causes=dict(Counter(manifest.cause for manifest in self.manifests)),
            wait_ms=spread([manifest.emitted_ns - manifest.end_ns for manifest in self.manifests]),
            gaps=self.gaps,
            latency_ms=latency_ms(self.predictions.values()),
            streams={name: self._account(name, waits.get(name, [])) for name in sorted(self._ref.streams)},
        )

    def _account(self, name: str, waits: list[int]) -> StreamAccount:
        heard = self.heard.get(name) or Recent()
        captures, epochs, seqs = heard["capture_ns"], heard["epoch"], heard["seq"]
        intervals = np.diff(np.sort(captures))
        stated = [m.streams[name] for m in self.manifests if name in m.streams]
        newest = [(m.end_ns, m.streams[name].newest_ns) for m in self.manifests if name in m.streams]
        places, rejected = self._places(name)
        span_ns = int(captures.max() - captures.min()) if len(captures) > 1 else 0
        return StreamAccount(
            payload=self.payloads.get(name),
            rate_hz=rate_hz((len(captures) - 1) * self._samples.get(name, 0), span_ns),
            gaps=int(((np.diff(epochs) == 0) & (np.diff(seqs) > 1)).sum()),
            max_gap_ms=float((captures[1:] - heard["end_ns"][:-1]).max()) / 1e6 if len(intervals) else None,
            jitter_ms=spread(np.abs(intervals - np.median(intervals))) if len(intervals) else None,
            delay_ms=spread(heard["arrival_ns"] - heard["end_ns"]),
            uncertainty_ms=spread(heard["uncertainty_ns"]),
            age_ms=spread([end_ns - at_ns for end_ns, at_ns in newest if at_ns is not None]),
            messages=places,
            rejected=rejected,
            unaccounted=0,
            balanced="used" not in places or places["received"] == sum(places[place] for place in PLACES),
            verdicts=dict(Counter(verdict_of(one) for one in stated)),
            waited=len(waits),
            wait_ms=spread(waits),
        )

    def _places(self, name: str) -> tuple[dict[str, int], dict[str, int]]:
        """Where the stream's messages went: as the aligner says, else as they were seen from here."""
        said: AlignReport | None = self.accounts.streams.get(name) if self.accounts is not None else None
        if said is None:
            seen = self._subscriber.counters(name)
            lost = seen.lost - seen.before_join
            return {"sent": seen.received + lost, "lost": lost, "received": seen.received}, {}
        places = {"sent": said.received + said.lost, "lost": said.lost, "received": said.received}
        counted = {place: getattr(said, place) for place in PLACES if place != "rejected"}
        counted["rejected"] = sum(said.rejected.values())
        return places | {place: counted[place] for place in PLACES}, said.rejected

    def close(self) -> None:
        """Idempotent."""
        self._subscriber.close()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class Recent(Heard):
    """Headers of which the oldest are forgotten."""

    def forget(self, since_ns: int) -> None:
        """Forgets what arrived before."""
        arrivals = self._columns["arrival_ns"]
        count = int(np.searchsorted(np.array(arrivals), since_ns))
        for column in self._columns.values():
            del column[:count]
        self.first_bound = {bound: at for bound, at in self.first_bound.items() if at >= since_ns}
