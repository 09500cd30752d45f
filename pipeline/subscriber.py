"""Predictions of a running session, from outside of it: ``for prediction in pipeline.subscribe(): ...``

(The module is not called ``subscribe``, because importing it would then replace the function of that name in the
package.)
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import msgspec

from pipeline.clock import SystemClock
from pipeline.errors import ConfigError, WireError
from pipeline.prediction import Prediction
from pipeline.refusals import Repeated
from pipeline.steps import Account, Gap
from pipeline.transport import load_curve_client, subscribe_json

TOPIC = "prediction"
_POLL_MS = 100
MISSED = "a node of the session died, or it was lost on the way"


class Subscription:
    """Predictions as they come; iterate over it. Used by one thread; close it, or use it in a ``with`` block.

    Nothing is seen of what was published before, and a session that ends says nothing: the iteration then waits for
    the next session at the same endpoint, or ends after ``timeout_s`` without a prediction. ``malformed`` counts what
    came and was no prediction, ``repeated`` what came twice.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float | None = None,
        *,
        key: Path | str | None = None,
        hub_key: Path | str | None = None,
    ) -> None:
        """``key`` is the file of this host's own secret key, ``hub_key`` that of the publisher's public one: beyond
        this host there is nothing to be had without (`sensorium keys`). ConfigError if ``endpoint`` is none, or lies
        beyond this host and the keys are not both there."""
        if not isinstance(endpoint, str):
            raise ConfigError(
                f"an endpoint is a text like tcp://127.0.0.1:5599 or ipc:///path, not {endpoint!r}; `sensorium run` "
                "says which its session has."
            )
        self.endpoint, self._timeout_s = endpoint, timeout_s
        if (key is None) != (hub_key is None):
            raise ConfigError("keys are needed both or not at all: this host's secret one and the hub's public one.")
        curve = None if key is None or hub_key is None else load_curve_client(Path(key), Path(hub_key))
        self._objects = subscribe_json(endpoint, TOPIC, curve)
        self._foreign = 0
        self._refusals = Repeated()
        self._session = ""
        self._account = Account(None)
        self.gaps: list[Gap] = []
        """Windows whose predictions never came, between those that did: every index of a session appears once, as a
        prediction or inside one of these."""
        self.repeated = 0

    @property
    def refusal(self) -> str:
        """Why nobody may listen from here, in a sentence; nothing while it may be. ``receive`` finds it out, and the
        iteration warns of it (``RuntimeWarning``)."""
        return self._objects.refusal

    @property
    def malformed(self) -> int:
        return self._objects.malformed + self._foreign

    def receive(self, timeout_ms: int = 0) -> list[Prediction]:
        """Everything that has come, in order; waits this long for the first of it."""
        found: list[Prediction] = []
        while (value := self._objects.receive(0 if found else timeout_ms)) is not None:
            try:
                prediction = msgspec.convert(value, Prediction)
            except msgspec.ValidationError:
                self._foreign += 1
                continue
            if self._first_time(prediction):
                found.append(prediction)
        return found

    def _first_time(self, prediction: Prediction) -> bool:
        """Notes the gap before a prediction; False for one that came already."""
        if prediction.session != self._session:
            self._session, self._account = prediction.session, Account(None, MISSED)
        try:
            gap = self._account.take(prediction.window.index)
        except WireError:
            self.repeated += 1
            return False
        if gap is not None:
            self.gaps.append(msgspec.structs.replace(gap, of="prediction"))
        return True

    def __iter__(self) -> Iterator[Prediction]:
        silent = SystemClock()
        while self._timeout_s is None or silent.now_ns() < self._timeout_s * 1e9:
            found = self.receive(_POLL_MS)
            yield from found
            for refusal in self._refusals.new([self.refusal] if self.refusal else []):
                warnings.warn(refusal, RuntimeWarning, stacklevel=2)
            if found:
                silent = SystemClock()

    def close(self) -> None:
        """Idempotent."""
        self._objects.close()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def subscribe(
    endpoint: str,
    timeout_s: float | None = None,
    *,
    key: Path | str | None = None,
    hub_key: Path | str | None = None,
) -> Subscription:
    """The predictions published at ``endpoint``, such as ``tcp://127.0.0.1:5599`` or ``ipc:///path``; see
    ``Subscription``. ``sensorium run`` says which endpoint its session has. Raises ConfigError."""
    return Subscription(endpoint, timeout_s, key=key, hub_key=hub_key)
