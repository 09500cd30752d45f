"""What one foreign message holds, between its decoding and its piece."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from pipeline.messages import Layout


class Content(NamedTuple):
    """What a message holds: payload, and its span in ns on the clock of its stamp, which is ``stamp_ns`` as it came.
    Without a stamp (None) the span lies on the clock of the arrivals."""

    layout: Layout
    data: Any
    start_ns: int
    end_ns: int
    stamp_ns: int | None
    uncertainty_ns: int = 0


Converter = Callable[[Any, int], Content]
"""(message, arrival in ns) -> its content. Raises Unusable."""


def moment(layout: Layout, data: Any, stamp_ns: int | None, arrival_ns: int) -> Content:
    """A content that was at the moment of its stamp; where it has none, its arrival is all that is known."""
    at_ns = arrival_ns if stamp_ns is None else stamp_ns
    return Content(layout, data, at_ns, at_ns, stamp_ns)


def stamp_of(message: Any) -> int | None:
    """The stamp of the message's header in ns; None if it has none, or one that nobody set."""
    header = getattr(message, "header", None)
    if header is None:
        return None
    return int(header.stamp.sec) * 10**9 + int(header.stamp.nanosec) or None
