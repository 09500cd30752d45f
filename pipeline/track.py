"""What one stream has to say about one step: the bookkeeping that all rules share.

A ``Track`` holds one stream's messages between their arrival and the last step that can use them. It takes messages
(and refuses those that contradict what the stream has promised), answers for the step that is next whether its content
is proven, and hands the content over. It knows neither other streams nor deadlines: those are the aligner's. Its
subclasses are the rules (``pipeline.rules``): those that pick messages in ``pipeline.picking``, the one that computes
new samples in ``pipeline.resampling``.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from operator import itemgetter
from typing import Any, Literal, NamedTuple, Protocol

import msgspec
import numpy as np

from pipeline.messages import (
    AudioLayout,
    FrameLayout,
    Header,
    ImuLayout,
    Layout,
    Message,
    SignalLayout,
    SweepLayout,
    TextLayout,
)
from pipeline.numbering import Unordered
from pipeline.rules import FOREVER, StreamSpec

Array = np.ndarray[Any, Any]

LEAST_MEMORY = 64
"""So many losses, and so many numbers that are outstanding, are remembered one by one; beyond it they are merged."""


class Counters(msgspec.Struct, kw_only=True):
    """received == used + late + no_window + superseded + duplicate + sum(rejected.values()) + buffered, always."""

    received: int = 0
    used: int = 0
    late: int = 0
    """No step to come can hold them, and one that might have was made before they came, not yet being proven."""
    no_window: int = 0
    """No step to come can hold them, and none was made too early for them: pictures between two steps, say."""
    superseded: int = 0
    duplicate: int = 0
    rejected: dict[str, int] = msgspec.field(default_factory=dict)
    """By reason: epoch, bound, future, malformed, overflow."""
    buffered: int = 0
    lost: int = 0
    """Messages that the numbering says were sent and that never came."""
    beats: int = 0


class Content(NamedTuple):
    """What a step holds of one stream, as far as it has come."""

    messages: tuple[Message, ...]
    """Those that the content was made of, oldest first."""
    coverage: float
    complete: bool
    newest_ns: int | None
    grid: Array | None = None


Range = tuple[int, int, int]
"""(epoch, first seq, last seq)"""


class Stated(Protocol):
    """What a manifest says of a track's state, as far as its content and verdict depend on it."""

    @property
    def epoch(self) -> int | None: ...
    @property
    def closed(self) -> str | None: ...
    @property
    def bound_ns(self) -> int | None: ...
    @property
    def first_ns(self) -> int | None: ...
    @property
    def losses(self) -> tuple[tuple[int, int, int], ...]: ...
    @property
    def overflows(self) -> tuple[tuple[int, int, int], ...]: ...
    @property
    def gaps(self) -> tuple[tuple[int, int], ...]: ...


LAYOUTS: dict[str, type[Layout]] = {
    "frame": FrameLayout,
    "audio": AudioLayout,
    "imu": ImuLayout,
    "signal": SignalLayout,
    "sweep": SweepLayout,
    "text": TextLayout,
}


def ranges(messages: list[Message] | tuple[Message, ...], ordered: bool) -> tuple[Range, ...]:
    """The (epoch, seq) of ``messages`` as ranges; ``ordered``: numbers are known to increase."""
    if not messages:
        return ()
    first, last = messages[0].header, messages[-1].header
    if ordered and first.epoch == last.epoch and last.seq - first.seq + 1 == len(messages):
        return ((first.epoch, first.seq, last.seq),)  # all in one, as nearly always
    result: list[Range] = []
    for epoch, seq in sorted((m.header.epoch, m.header.seq) for m in messages):
        if result and result[-1][0] == epoch and result[-1][2] == seq - 1:
            result[-1] = (epoch, result[-1][1], seq)
        else:
            result.append((epoch, seq, seq))
    return tuple(result)


class Track:
    """One stream on its way into steps. Subclasses are the rules; see the module's table."""

    def __init__(self, spec: StreamSpec, hop_ns: int, max_future_ns: int | None, step: int) -> None:
        self.spec = spec
        self.hop_ns = hop_ns
        self.max_future_ns = FOREVER if max_future_ns is None else max_future_ns
        self.layout_type = LAYOUTS[spec.payload]
        self.looks_at_each = self.looks_inside or bool(spec.channel_names)
        self.malformed: Layout | None = None  # of the last message that was refused as such
        self.ordered = spec.ordered
        self.max_buffer = spec.max_buffer
        self.memory = max(spec.max_buffer, LEAST_MEMORY)
        self.counters = Counters()
        self.received = 0
        self.epoch = -FOREVER
        self.epoch_floor_ns = -FOREVER
        self.bound_ns = -FOREVER  # FOREVER once the stream has ended
        self.last_bound_ns = -FOREVER  # the greatest finite bound of a stream that has ended
        self.advanced_ns = (step - 1) * hop_ns  # arrival time of the header that last moved the bound
        self.closed: str | None = None
        # Least capture time of what has come and kept the stream's promises. Who begins later cannot know that a
        # stream has never started.
        self.first_ns = FOREVER if step == 1 else -FOREVER
        self.proven = False
        self.buffer: list[Message] = []  # by capture time
        self.used: set[int] = set()  # ids of the messages in the buffer that some step has used
        self.fresh: list[Message] = []  # taken since the last manifest
        self.fresh_losses = 0  # how many of ``losses`` are newer than the last manifest
        self.next_seq = 0
        self.gaps: list[tuple[int, int]] = []  # (first ns, count) of losses whose end is not known yet
        self.last_capture_ns = -FOREVER
        self.refused: list[Range] = []  # numbers of what came and was not believed: it is not lost
        self.sequence = None if spec.ordered else Unordered(self.memory)
        self.ordinary = False  # ordered, has begun, is not closed, and no loss is open
        self.losses: list[tuple[int, int, int]] = []  # (first ns, end ns, count) in which lost messages may lie
        self.overflows: list[tuple[int, int, int]] = []  # (first ns, last ns, count) of what was turned away
        self.fresh_overflows = 0
        # (first, last) of the steps that were final before they were proven, as long as a message might be theirs.
        self.unproven: list[tuple[int, int]] = []
        self.aim(step)

    # --- taking messages -------------------------------------------------------------------------------------------

    def take(self, message: Message, arrival_ns: int) -> bool:
        """Takes one message or beat; True if the bound has reached the point from which the step may be proven."""
        header = message.header
        if (
            header.seq == self.next_seq
            and self.ordinary
            and header.epoch == self.epoch
            and type(header.layout) is self.layout_type
            and header.bound_ns >= header.t_end_ns >= header.t_capture_ns >= self.bound_ns
            and header.t_capture_ns >= self.late_below_ns
            and header.bound_ns - arrival_ns <= self.max_future_ns
            and len(self.buffer) < self.max_buffer
            and (not self.looks_at_each or self.well_formed(message))
        ):
            self.received += 1
            self.next_seq += 1
            self.last_capture_ns = header.t_capture_ns
            self.buffer.append(message)
            self.fresh.append(message)
            if header.bound_ns > self.bound_ns:
                self.bound_ns = header.bound_ns
                self.advanced_ns = arrival_ns
            else:
                self._ask_again()
            return self.bound_ns >= self.interesting_ns
        return self._take_with_care(message, arrival_ns)

    def _take_with_care(self, message: Message, arrival_ns: int) -> bool:
        """The same for whatever is out of the ordinary, one check after the other."""
        header = message.header
        if header.layout is None:
            self.counters.beats += 1
        else:
            self.received += 1
        if (reason := self._refusal(message, arrival_ns)) is not None:
            self._reject(header, reason)
            self._skip_number(header, arrival_ns)
            return self.bound_ns >= self.interesting_ns
        if header.epoch < self.epoch:
            self._reject(header, "epoch")
            return False
        if header.epoch > self.epoch:
            self._open(header.epoch)
        if self._is_duplicate(header):
            self.counters.duplicate += 1
            return False
        self._number(header)
        if header.layout is not None:
            self._place(message)
        self._promise(header, arrival_ns)
        return self.bound_ns >= self.interesting_ns

    def _refusal(self, message: Message, arrival_ns: int) -> str | None:
        header = message.header
        if header.seq < 0 or header.t_end_ns < header.t_capture_ns:
            return "malformed"
        if header.layout is not None and (
            type(header.layout) is not self.layout_type
            or header.bound_ns < header.t_capture_ns
            or not self.well_formed(message)
        ):
            self.malformed = header.layout
            return "malformed"
        if max(header.t_end_ns, header.bound_ns) - arrival_ns > self.max_future_ns:
            return "future"
        return None

    def _reject(self, header: Header, reason: str) -> None:
        if header.layout is not None:
            self.counters.rejected[reason] = self.counters.rejected.get(reason, 0) + 1

    def _skip_number(self, header: Header, arrival_ns: int) -> None:
        """A refused message has come all the same: it is not also counted as lost."""
        if header.layout is None or header.epoch < self.epoch:
            return
        if self.sequence is not None:
            if header.epoch == self.epoch:
                self.sequence.come(header.seq)
                self._raise_bound(self.sequence.released(), arrival_ns)
        elif header.epoch == self.epoch and header.seq == self.next_seq:
            self.next_seq += 1
        else:
            self._note_refused(header)

    def _note_refused(self, header: Header) -> None:
        epoch, seq = header.epoch, header.seq
        if (epoch, seq) < (self.epoch, self.next_seq) or any(e == epoch and a <= seq <= b for e, a, b in self.refused):
            return
        if len(self.refused) >= self.memory:
            self.refused = [known for known in self.refused if (known[0], known[2]) >= (self.epoch, self.next_seq)]
        if self.refused and self.refused[-1][0] == epoch and self.refused[-1][2] == seq - 1:
            self.refused[-1] = (epoch, self.refused[-1][1], seq)
        elif len(self.refused) < self.memory:
            self.refused.append((epoch, seq, seq))

    def _missing_before(self, seq: int) -> int:
        """How many numbers from the next one on, below ``seq``, belong to messages that have not come at all."""
        came = 0
        for epoch, first, last in self.refused:
            if epoch == self.epoch:
                came += max(0, min(last + 1, seq) - max(first, self.next_seq))
        return seq - self.next_seq - came

    def turn_away(self, message: Message) -> None:
        """Counts a message that there was no room to look at."""
        if message.header.layout is None:
            self.counters.beats += 1
        else:
            self.received += 1
            self._overflow(message.header)
            if self.sequence is None:
                self._note_refused(message.header)

    def _open(self, epoch: int) -> None:
        if self.sequence is not None:
            self.counters.lost += self.sequence.missing
            self.sequence = Unordered(self.memory)
        self.ordinary = False  # until its first message has come
        self.epoch = epoch
        self.epoch_floor_ns = self.promised_ns
        self.next_seq = 0
        # What it loses before anything came lies at or above the old bound. When it was opened tells less: a jump of a
        # source's clock is seen in a message that was captured before. Of a stream's first epoch nothing else is known.
        self.last_capture_ns = epoch - 1 if self.epoch_floor_ns == -FOREVER else -FOREVER
        self._turn()  # what the old epoch's samples could still become is decided: ask again

    def _is_duplicate(self, header: Header) -> bool:
        if header.layout is None:
            return False
        return self.sequence.has(header.seq) if self.sequence is not None else header.seq < self.next_seq

    def _number(self, header: Header) -> None:
        """Sequence accounting: a jump is a loss at once where the bus keeps the order."""
        beat = header.layout is None
        if self.sequence is not None:
            self.sequence.known(header.seq) if beat else self.sequence.come(header.seq)
            return
        if header.seq > self.next_seq and (count := self._missing_before(header.seq)):
            self.counters.lost += count
            # What is lost was promised to lie at or above the bound that held until now; its end is the next message.
            if len(self.gaps) >= self.memory:
                count += self.gaps.pop()[1]
            self.gaps.append((max(self.last_capture_ns + 1, self.bound_ns), count))
            self.ordinary = False
        self.next_seq = max(self.next_seq, header.seq if beat else header.seq + 1)

    def _remember_loss(self, first_ns: int, end_ns: int, count: int) -> None:
        if len(self.losses) >= self.memory:  # bounded whatever a stream does: the two newest become one
            before = self.losses.pop()
            first_ns, count = before[0], before[2] + count
        self.losses.append((first_ns, end_ns, count))
        self.fresh_losses += 1

    def _place(self, message: Message) -> None:
        header = message.header
        if header.t_capture_ns < self.epoch_floor_ns:
            self._reject(header, "epoch")
        elif header.t_capture_ns < self.bound_ns:
            self._reject(header, "bound")
        else:
            self._arrive(header)
            self._sort_in(message)

    def _arrive(self, header: Header) -> None:
        """The message keeps the stream's promises: it ends a gap, whatever becomes of it."""
        self.first_ns = min(self.first_ns, header.t_capture_ns)
        self.last_capture_ns = header.t_capture_ns
        for first_ns, count in self.gaps:
            self._remember_loss(first_ns, header.t_capture_ns, count)
        self.gaps.clear()
        self.ordinary = self.sequence is None and self.closed is None and self.acquainted()

    def _sort_in(self, message: Message) -> None:
        header = message.header
        if self.is_late(message):
            if self.missed(header.t_capture_ns, header.t_end_ns):
                self.counters.late += 1
            else:
                self.counters.no_window += 1
        elif len(self.buffer) >= self.max_buffer:
            self._overflow(header)
        else:
            self._keep(message)

    def _overflow(self, header: Header) -> None:
        """Rejects a message for which there is no room, and marks what it would have covered."""
        self._reject(header, "overflow")
        first_ns, count = header.t_capture_ns, 1
        if len(self.overflows) >= self.memory:
            before = self.overflows.pop()
            first_ns, count = before[0], before[2] + 1
        self.overflows.append((first_ns, header.t_end_ns, count))
        self.fresh_overflows += 1

    def _ask_again(self) -> None:
        """A message that does not move the bound may prove the step all the same."""
        self.interesting_ns = max(self.least_ns, min(self.interesting_ns, self.bound_ns))

    def _keep(self, message: Message) -> None:
        self._ask_again()
        self._reopen()
        self.fresh.append(message)
        if self.buffer and by_time(message) < by_time(self.buffer[-1]):
            insort(self.buffer, message, key=by_time)
            self.reordered()
        else:
            self.buffer.append(message)

    def _promise(self, header: Header, arrival_ns: int) -> None:
        """The header's bound, once nothing with a lower number is outstanding."""
        if self.sequence is None:
            self._raise_bound(header.bound_ns, arrival_ns)
        else:
            self.sequence.promise(header)
            self._raise_bound(self.sequence.released(), arrival_ns)

    def _raise_bound(self, bound_ns: int, arrival_ns: int) -> None:
        if bound_ns > self.bound_ns:
            self.bound_ns = bound_ns
            self.advanced_ns = arrival_ns
            self._reopen()

    def close(self, reason: Literal["dead", "ended"]) -> None:
        """Nothing more is expected: for now, or for good, which proves everything."""
        self.ordinary = False
        if self.closed != "ended":
            self.closed = reason
        if reason == "ended" and self.bound_ns < FOREVER:
            self.last_bound_ns, self.bound_ns = self.bound_ns, FOREVER

    def _reopen(self) -> None:
        if self.closed == "dead":
            self.closed = None
            self.ordinary = self.sequence is None and not self.gaps and self.first_ns < FOREVER and self.acquainted()

    # --- the step that is next -------------------------------------------------------------------------------------

    def aim(self, step: int) -> None:
        """Turns to ``step``: its limits, and the point from which asking for a proof is worth the while."""
        self.step = step
        self.start_ns = (step - 1) * self.hop_ns
        self.end_ns = step * self.hop_ns
        self.proven = False
        self._turn()

    def _turn(self) -> None:
        self.limit()
        self.least_ns = self.interesting_ns  # below it no message can prove anything

    def idle_at(self, now_ns: int) -> bool:
        """Whether the stream has made no progress for its limit."""
        return self.closed != "ended" and now_ns >= self.expiry_ns

    @property
    def promised_ns(self) -> int:
        """The greatest finite bound."""
        return self.bound_ns if self.bound_ns < FOREVER else self.last_bound_ns

    @property
    def expiry_ns(self) -> int:
        """When it will be idle if nothing comes."""
        return FOREVER if self.spec.idle_ns is None else self.advanced_ns + self.spec.idle_ns

    @property
    def looks_from_ns(self) -> int:
        """What ends before this, no step from this one on looks at."""
        return self.late_below_ns

    def lost_within(self, first_ns: int, end_ns: int) -> int:
        """How many messages may have been lost in [first, end)."""
        count = sum(n for a, b, n in self.losses if max(a, first_ns) < min(b, end_ns)) if self.losses else 0
        return count + sum(n for a, n in self.gaps if a < end_ns) if self.gaps else count

    def overflowed_within(self, first_ns: int, end_ns: int) -> int:
        """How many messages were turned away there because the buffer was full."""
        return sum(n for a, b, n in self.overflows if a < end_ns and b >= first_ns) if self.overflows else 0

    @property
    def never_started(self) -> bool:
        """Whether nothing has come that lies before the end of what the rule looks at."""
        return self.first_ns >= self.span()[1]

    def missed_within(self, first_ns: int, end_ns: int) -> bool:
        """Whether something in [first, end) may have been lost or turned away."""
        if first_ns >= end_ns:
            return False
        return bool(self.lost_within(first_ns, end_ns) or self.overflowed_within(first_ns, end_ns))

    def touched(self) -> bool:
        """Whether a loss or an overflow lies in what the rule looks at."""
        return self.missed_within(*self.span())

    def advance(self) -> None:
        """The step is history: what no later step can hold leaves the buffer, and is counted."""
        self.fresh.clear()
        self.fresh_losses = self.fresh_overflows = 0
        if self.unproven or not self.proven:
            self._note_proof()
        self.aim(self.step + 1)
        gone = self.obsolete()
        if gone:
            before = len(self.used)
            self.used.difference_update(map(id, self.buffer[:gone]))
            used = before - len(self.used)
            self.counters.used += used
            self.counters.superseded += gone - used
            del self.buffer[:gone]
        if self.losses or self.overflows:
            first_ns = self.span()[0]
            self.losses = [loss for loss in self.losses if loss[1] > first_ns]
            self.overflows = [span for span in self.overflows if span[1] >= first_ns]

    def _note_proof(self) -> None:
        """Notes whether the step that becomes history was proven, and forgets steps that no message can be of."""
        end_ns = self.span()[1]
        while self.unproven and end_ns + (self.unproven[0][1] - self.step) * self.hop_ns <= self.bound_ns:
            del self.unproven[0]
        if not self.proven:
            self.note_unproven(self.step)

    def note_unproven(self, step: int) -> None:
        """Notes that ``step``, which is later than all that are noted, was final before it was proven."""
        joins = bool(self.unproven) and self.unproven[-1][1] == step - 1
        first = self.unproven.pop()[0] if joins else step
        self.unproven.append((first, step))

    def missed(self, capture_ns: int, end_ns: int) -> bool:
        """Whether a message from ``capture_ns`` to ``end_ns`` lies in what the rule looked at for a step that was final
        before it was proven."""
        if not self.unproven:
            return False
        first_ns, until_ns = self.span()
        last_ns = end_ns if self.looks_inside else capture_ns
        low = self.step + (capture_ns - until_ns) // self.hop_ns + 1
        high = self.step + (last_ns - first_ns) // self.hop_ns
        before = bisect_right(self.unproven, high, key=itemgetter(0))  # ranges that begin at ``high`` or sooner
        return low <= high and before > 0 and low <= self.unproven[before - 1][1]

    def restore(self, stated: Stated, messages: list[Message]) -> None:
        """Puts the track where it was when a step was made: see ``Aligner.obey``."""
        for message in messages:
            self._keep(message)
        self.epoch = -FOREVER if stated.epoch is None else stated.epoch
        self.closed = stated.closed
        self.last_bound_ns = -FOREVER if stated.bound_ns is None else stated.bound_ns
        self.bound_ns = FOREVER if stated.closed == "ended" else self.last_bound_ns
        self.first_ns = FOREVER if stated.first_ns is None else stated.first_ns
        self.losses.extend(stated.losses)
        self.fresh_losses = len(stated.losses)
        self.overflows.extend(stated.overflows)
        self.fresh_overflows = len(stated.overflows)
        self.gaps = list(stated.gaps)
        self._turn()
        self.proven = self.bound_ns >= self.interesting_ns and (self.closed == "ended" or self.prove())

    def count(self) -> Counters:
        """The counters as of now."""
        used = self.counters.used + len(self.used)
        missing = self.sequence.missing if self.sequence is not None else 0
        return msgspec.structs.replace(
            self.counters,
            received=self.received,
            rejected=dict(self.counters.rejected),
            used=used,
            buffered=len(self.buffer) - len(self.used),
            lost=self.counters.lost + missing,
        )

    # --- what a rule says ------------------------------------------------------------------------------------------

    late_below_ns: int
    interesting_ns: int
    looks_inside = False
    """Whether the rule needs the payload, which must then be well formed."""
    hole_is_gap = False
    """Whether proven emptiness is a gap in the stream, rather than content that lies too far away."""

    def limit(self) -> None:
        """Sets ``interesting_ns``, the least bound at which the step can be proven, and ``late_below_ns``, the capture
        time below which a message may be late."""
        raise NotImplementedError

    def prove(self) -> bool:
        """Whether the content is proven, given that the bound has reached ``interesting_ns``."""
        raise NotImplementedError

    def span(self) -> tuple[int, int]:
        """[first, end) of the capture times that the rule looks at."""
        raise NotImplementedError

    def content(self) -> Content | None:
        """What the step holds of what has come; None if nothing. Marks it as used."""
        raise NotImplementedError

    def obsolete(self) -> int:
        """How many messages at the front of the buffer no step from ``self.step`` on can hold."""
        raise NotImplementedError

    def is_late(self, message: Message) -> bool:
        """Whether no step from ``self.step`` on can hold the message."""
        return message.header.t_capture_ns < self.late_below_ns

    def well_formed(self, message: Message) -> bool:
        """Whether the payload is what the rule can work with, and its channels are those that are taken."""
        layout, names = message.header.layout, self.spec.channel_names
        return not names or not isinstance(layout, SignalLayout) or layout.channels == names

    def acquainted(self) -> bool:
        """Whether the rule has learnt from the messages that it kept what it must know of the current epoch."""
        return True

    def reordered(self) -> None:
        """A message was put before others that had come earlier."""


def by_time(message: Message) -> tuple[int, int, int]:
    """The order of a buffer: capture time, then epoch, then number."""
    header = message.header
    return header.t_capture_ns, header.epoch, header.seq


def before(buffer: list[Message], limit_ns: int) -> int:
    """How many messages at the front have a capture time below ``limit_ns``."""
    count = 0
    for message in buffer:
        if message.header.t_capture_ns >= limit_ns:
            break
        count += 1
    return count
