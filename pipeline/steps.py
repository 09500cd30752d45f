"""Steps on their way from the align node: bytes on the topic ``step``, and the account of which steps came.

A step is multipart ``[step, envelope, grid, …]``: the envelope is msgpack of the manifest and of the grids' shapes,
each grid is f4 in C order, streams in sorted order. Messages' payloads are not in it; who needs them has subscribed to
their streams and finds them by the epochs and numbers that the manifest names.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from pipeline.align import Manifest, Step
from pipeline.errors import WireError

STEP = "step"
"""The topic of steps on the align node's socket."""
ACCOUNT = "account"
"""The topic on which the align node says what became of every message; a JSON object ``pipeline.life.Accounts``."""
GAP = "gap"
"""The topic on which a restarted align node names the steps that it will never publish, and the fusion node the
windows; a JSON object ``Gap``."""


LOST = "lost on the way from the align node"
"""The cause of windows that were published, and whose loss nobody announced."""
UNHEARD = "lost on the way from the fusion node"
"""The same of predictions."""
UNMADE = "the session ended before it, or the fusion node had died"
"""The cause of predictions that were never sent until the session's end."""


class Gap(msgspec.Struct, frozen=True, omit_defaults=True):
    """Steps that nobody will ever see, both ends included, and why."""

    first: int = msgspec.field(name="from")
    last: int = msgspec.field(name="to")
    cause: str = ""
    of: Literal["window", "prediction"] = "window"
    """What is missing: the window itself, or only its prediction."""


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    manifest: Manifest
    grids: dict[str, tuple[int, int]]
    sent_ns: int


class SentStep(msgspec.Struct, frozen=True):
    """A step as it came: grids f4 [samples, channels], read-only, and when it was sent (session time)."""

    manifest: Manifest
    grids: dict[str, np.ndarray[Any, Any]]
    sent_ns: int


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Envelope).decode


def encode_step(step: Step, sent_ns: int) -> list[bytes]:
    """The parts of ``step`` as they are sent at ``sent_ns``, the topic first."""
    names = sorted(step.grids)
    shapes = {name: (step.grids[name].shape[0], step.grids[name].shape[1]) for name in names}
    grids = [np.ascontiguousarray(step.grids[name], "<f4").tobytes() for name in names]
    return [STEP.encode(), _encode(_Envelope(step.manifest, shapes, sent_ns)), *grids]


def decode_step(parts: Sequence[Any]) -> SentStep:
    """The step in ``parts``, the topic first. Its grids are views of the parts. Raises WireError."""
    try:
        envelope = _decode(parts[1])
    except (IndexError, msgspec.MsgspecError) as error:
        raise WireError(f"a step's envelope is damaged: {error}") from None
    shapes = envelope.grids
    sizes = [len(memoryview(part).cast("B")) for part in parts[2:]]
    if sizes != [4 * rows * columns for rows, columns in shapes.values()]:
        raise WireError(f"step {envelope.manifest.step} has grids of {sizes} bytes where its envelope says {shapes}")
    grids = {
        name: np.frombuffer(part, "<f4").reshape(shape)
        for (name, shape), part in zip(shapes.items(), parts[2:], strict=True)
    }
    return SentStep(envelope.manifest, grids, envelope.sent_ns)


class Account:
    """Which steps have come, so that every index appears once: as a step, or inside one gap.

    What an aligner announces after its restart is only the cause: how far its predecessor's steps had come is known
    where they arrived, not where they were sent.
    """

    def __init__(self, first: int | None = 1, unknown: str = LOST) -> None:
        """``first`` is the step that must come first; None where whatever comes first is right (a reader that joined
        later). ``unknown`` is the cause of what nobody announced."""
        self.last = None if first is None else first - 1
        self._unknown = unknown
        self._announced: list[Gap] = []

    def announce(self, gap: Gap) -> None:
        """Takes note of why steps will be missing."""
        self._announced = [*self._announced[-7:], gap]

    def take(self, step: int) -> Gap | None:
        """Notes that ``step`` came; the gap before it, if there is one. Raises WireError if it came before."""
        if self.last is not None and step <= self.last:
            raise WireError(f"step {step} came after step {self.last}; it is not used twice")
        first = step if self.last is None else self.last + 1
        self.last = step
        if step == first:
            return None
        causes = [gap.cause for gap in self._announced if gap.first < step and gap.last >= first]
        return Gap(first, step - 1, causes[-1] if causes else self._unknown)


class Unpredicted:
    """Windows that wait for their predictions, so that every window has one, or lies inside one gap: a fusion node that
    was started again announces those that it never made, and all others were lost."""

    def __init__(self) -> None:
        self._waiting: deque[int] = deque()
        self._last = -1
        self._announced: list[Gap] = []

    def announce(self, gap: Gap) -> None:
        """Takes note of predictions that were never made."""
        self._announced = [*self._announced[-7:], gap]

    def window(self, step: int) -> None:
        """Notes that window ``step`` came; windows come in order."""
        if step > self._last:
            self._waiting.append(step)

    def prediction(self, step: int) -> tuple[list[Gap], bool]:
        """Notes that the prediction of ``step`` came: the gaps before it, and whether it came for the first time."""
        if step <= self._last:
            return [], False
        self._last = step
        missing = []
        while self._waiting and self._waiting[0] <= step:
            missing.append(self._waiting.popleft())
        return [self._explained(gap) for gap in _ranges([k for k in missing if k != step])], True

    def end(self, made: int) -> list[Gap]:
        """The gaps at the end of the session; ``made`` is the last prediction that was ever sent: all up to it are
        lost, be it with a node that had died, and those behind it were never made."""
        lost = _ranges([step for step in self._waiting if step <= made])
        never = _ranges([step for step in self._waiting if step > made])
        self._waiting.clear()
        unmade = [Gap(gap.first, gap.last, UNMADE, "prediction") for gap in never]
        return [self._explained(gap) for gap in lost] + unmade

    def _explained(self, gap: Gap) -> Gap:
        """``gap`` with its cause. What touches a death is of that death: the last that a node sent dies with it."""
        causes = [known.cause for known in self._announced if known.first <= gap.last and known.last >= gap.first]
        return Gap(gap.first, gap.last, causes[-1] if causes else UNHEARD, "prediction")


def _ranges(steps: list[int]) -> list[Gap]:
    """Rising numbers as gaps."""
    gaps: list[Gap] = []
    for step in steps:
        if gaps and gaps[-1].last + 1 == step:
            gaps[-1] = Gap(gaps[-1].first, step)
        else:
            gaps.append(Gap(step, step))
    return gaps
