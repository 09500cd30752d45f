"""The rules that pick messages, as tracks: ``nearest``, ``latest`` and ``all``. See ``pipeline.rules``."""

from __future__ import annotations

from pipeline.messages import Message
from pipeline.track import Content, Track, before


class NearestTrack(Track):
    """See ``Nearest``."""

    def limit(self) -> None:
        self.tolerance_ns: int = self.spec.rule.tolerance_ns  # type: ignore[union-attr]
        self.interesting_ns = self.end_ns
        self.late_below_ns = self.end_ns - self.tolerance_ns + 1

    def _best(self) -> Message | None:
        best, least, end_ns = None, self.tolerance_ns, self.end_ns
        for message in self.buffer:  # in order of time: of two that are equally near the earlier stays
            distance = message.header.t_capture_ns - end_ns
            if distance >= least:
                break
            if abs(distance) < least:
                best, least = message, abs(distance)
        return best

    def prove(self) -> bool:
        best = self._best()
        distance = self.tolerance_ns if best is None else abs(best.header.t_capture_ns - self.end_ns)
        self.interesting_ns = self.bound_ns + 1  # a nearer message may prove it before the bound gets that far
        return self.bound_ns >= self.end_ns + distance

    def span(self) -> tuple[int, int]:
        return self.end_ns - self.tolerance_ns + 1, self.end_ns + self.tolerance_ns

    def content(self) -> Content | None:
        best = self._best()
        if best is None:
            return None
        self.used.add(id(best))
        # Whatever was lost nearer to E(k) would be the content now; at the same distance the earlier one is preferred.
        t_ns = best.header.t_capture_ns
        mirrored = 2 * self.end_ns - t_ns
        rivals = (t_ns + 1, mirrored) if t_ns < self.end_ns else (mirrored, t_ns)
        return Content((best,), 1.0, not self.missed_within(*rivals), t_ns)

    def obsolete(self) -> int:
        return before(self.buffer, self.late_below_ns)


class LatestTrack(Track):
    """See ``Latest``."""

    def limit(self) -> None:
        self.interesting_ns = self.end_ns
        self.late_below_ns = self.end_ns - self.spec.rule.max_age_ns  # type: ignore[union-attr]

    def prove(self) -> bool:
        return True

    def span(self) -> tuple[int, int]:
        return self.late_below_ns, self.end_ns

    def content(self) -> Content | None:
        index = before(self.buffer, self.end_ns) - 1
        if index < 0 or self.buffer[index].header.t_capture_ns < self.late_below_ns:
            return None
        last = self.buffer[index]
        self.used.add(id(last))
        t_ns = last.header.t_capture_ns
        return Content((last,), 1.0, not self.missed_within(t_ns + 1, self.end_ns), t_ns)

    def obsolete(self) -> int:
        return before(self.buffer, self.late_below_ns)


class AllTrack(Track):
    """See ``All``."""

    hole_is_gap = True

    def limit(self) -> None:
        self.interesting_ns, self.late_below_ns = self.end_ns, self.start_ns

    def prove(self) -> bool:
        return True

    def span(self) -> tuple[int, int]:
        return self.start_ns, self.end_ns

    def content(self) -> Content | None:
        first, end = before(self.buffer, self.start_ns), before(self.buffer, self.end_ns)
        held = tuple(self.buffer[first:end])
        lost = self.lost_within(*self.span()) + self.overflowed_within(*self.span())
        if not held:
            # An hour without a line of text is complete, as long as nothing was lost and the bound says so.
            return Content((), 1.0, True, None) if not lost and self.bound_ns >= self.end_ns else None
        self.used.update(map(id, held))
        return Content(held, len(held) / (len(held) + lost), not lost, held[-1].header.t_capture_ns)

    def obsolete(self) -> int:
        return before(self.buffer, self.late_below_ns)
