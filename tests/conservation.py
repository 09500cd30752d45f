"""Conservation: whatever happens to a pipeline, no message is unaccounted for.

    pytestmark = pytest.mark.usefixtures("conserved")

in a test file holds every aligner that its tests run within this process to it. Sessions of several processes are held
to it by what their recordings say (``tests/test_explain.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pipeline.align import Aligner, AlignSpec, Counters
from pipeline.summary import account

PLACES = ("used", "late", "no_window", "superseded", "duplicate", "rejected", "buffered")


def check_account(stream: str, counters: Counters, handed_in: int | None = None) -> None:
    """Every message of a stream has one place; ``handed_in`` is how many the aligner was really given."""
    places = account(counters)
    assert places["sent"] == places["received"] + places["lost"], (stream, places)
    assert places["received"] == sum(places[place] for place in PLACES), (stream, places)
    assert min(places.values()) >= 0, (stream, places)
    if handed_in is not None:
        assert places["received"] == handed_in, (stream, places, handed_in)


@pytest.fixture
def conserved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[Aligner]]]:
    """After the test: sent = received + lost and received = used + … + buffered, for every stream of every aligner that
    took messages live or by event time. Calls give the aligners that there have been."""
    seen: dict[int, tuple[Aligner, AlignSpec, dict[str, int]]] = {}
    begin, feed = Aligner.__init__, Aligner.feed

    def noted_begin(self: Aligner, spec: AlignSpec, *rest: Any, **more: Any) -> None:
        begin(self, spec, *rest, **more)
        seen[id(self)] = (self, spec, dict.fromkeys((stream.name for stream in spec.streams), 0))

    def noted_feed(self: Aligner, message: Any, arrival_ns: int) -> Any:
        steps = feed(self, message, arrival_ns)
        seen[id(self)][2][message.header.stream] += message.header.layout is not None
        if len(seen) > KEPT:
            _check(seen, len(seen) - 1)
        return steps

    monkeypatch.setattr(Aligner, "__init__", noted_begin)
    monkeypatch.setattr(Aligner, "feed", noted_feed)
    yield lambda: [aligner for aligner, _, _ in seen.values()]
    _check(seen, len(seen))


KEPT = 64
"""So many aligners of a test are held at most; those before have had their day and are checked."""


def _check(seen: dict[int, tuple[Aligner, AlignSpec, dict[str, int]]], count: int) -> None:
    for key in list(seen)[:count]:
        aligner, _, handed_in = seen.pop(key)
        waiting = dict.fromkeys(handed_in, 0)
        for item, _ in aligner._inbox:
            if hasattr(item, "header") and item.header.layout is not None:
                waiting[item.header.stream] += 1
        for stream, given in handed_in.items():
            check_account(stream, aligner.counters(stream), given - waiting[stream])
