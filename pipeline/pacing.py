"""What is odd about how often a rig's sources speak, held against the model's window and the aligner's limits.

Nothing of it is impossible (that a source's settings refuse); each sentence says what it leads to and what to do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from pipeline.align import AlignSpec, All, Nearest, Resample, StreamSpec
from pipeline.errors import plain
from pipeline.source import Pace

MESSAGES_PER_S = 500
"""More messages of one stream a second are more than a window gains from."""

SEND_NS, HEAR_NS = 200_000, 100_000
"""About what a message costs its source, and each node that hears it (measured with an IMU of one sample a message)."""

BYTES_PER_S = 1_000_000_000
COPIED_PER_S = 6_500_000_000
"""More bytes of one stream a second than are usual, and about how many one core copies."""

SHORT_HOP_NS = 10_000_000
"""Hops that are shorter ask for more than a hundred predictions a second."""


def odd_paces(
    paces: Mapping[str, Pace], slots: Mapping[str, int], spec: AlignSpec | None, steps: int = 1
) -> Iterator[tuple[str, str]]:
    """Streams, and what is odd about each, in a sentence: ``paces`` and the bytes of their largest messages by stream;
    ``spec`` and ``steps`` of the model's window, if there is a model. The name "" is for the window itself."""
    for name, pace in paces.items():
        yield from ((name, said) for said in _costs(pace, slots.get(name, 0)))
    if spec is None:
        return
    if spec.hop_ns < SHORT_HOP_NS:
        yield "", (f"the model's hop of {_ms(spec.hop_ns)} asks for {1e9 / spec.hop_ns:.0f} predictions a second; "
                   "where the machine cannot make so many they come late, and ever later. Use a model with a longer "
                   "hop")  # fmt: skip
    for stream in spec.streams:
        if stream.name in paces:
            misfits = _misfits(stream, paces[stream.name], spec, spec.hop_ns * steps)
            yield from ((stream.name, said) for said in misfits)


def _costs(pace: Pace, nbytes: int) -> Iterator[str]:
    """What a stream costs by itself."""
    if pace.message_ns is None:
        return
    per_s = 1e9 / pace.message_ns
    bytes_per_s = min(per_s * nbytes, math.inf if pace.bytes_per_s is None else pace.bytes_per_s)
    if per_s > MESSAGES_PER_S:
        yield (f"{per_s:.0f} messages a second take about {per_s * SEND_NS / 1e9:.0%} of a core to send, and "
               f"{per_s * HEAR_NS / 1e9:.0%} in each node that hears them; what a core has no time for is lost. "
               f"{MESSAGES_PER_S} or fewer will do: {pace.fewer}")  # fmt: skip
    elif bytes_per_s > BYTES_PER_S:
        yield (f"up to {bytes_per_s / 1e6:.0f} MB a second come of it: each copy takes about "
               f"{bytes_per_s / COPIED_PER_S:.0%} of a core, and a recording fills the disk as fast; choose a smaller "
               "`width` and `height` or fewer `points`, a lower `rate_hz`, or an encoding that compresses")  # fmt: skip


def _misfits(stream: StreamSpec, pace: Pace, spec: AlignSpec, window_ns: int) -> Iterator[str]:
    """What of a stream does not fit into its rule and the aligner's limits."""
    every, rule = pace.message_ns, stream.rule
    if isinstance(rule, Resample):
        yield from _grid(rule, pace, spec)
    elif every is not None and not isinstance(rule, All):  # of which a step with nothing is complete
        reach = 2 * rule.tolerance_ns if isinstance(rule, Nearest) else rule.max_age_ns
        share = 1 - reach / every
        if share > 0.05:
            none = ", and the whole window is shorter than that" if every > window_ns else ""
            faster = f"raise `rate_hz` to {1e9 / reach:.3g} or more, or " if reach else ""
            yield (f"a message comes each {_ms(every)}{none}: {share:.0%} of the model's steps will have none that is "
                   f"near enough, and be `missing`; {faster}use a model that looks further")  # fmt: skip
    if every is not None and stream.idle_ns is not None and every > stream.idle_ns and stream.payload != "text":
        yield (f"a message comes each {_ms(every)}, but after {_ms(stream.idle_ns)} of silence it is no longer waited "
               f"for: what it says will miss its windows; set `idle_ms` of `align` to {1.5 * every / 1e6:.0f} or "
               "more, or let it speak more often")  # fmt: skip


def _grid(rule: Resample, pace: Pace, spec: AlignSpec) -> Iterator[str]:
    """The same for samples that are put on a grid."""
    sample, every = pace.sample_ns, pace.message_ns
    if sample is not None and sample > rule.max_gap_ns:
        least = f"raise `rate_hz` to {1e9 / rule.max_gap_ns:.3g} or more" if rule.max_gap_ns else "use another model"
        yield (f"a sample comes each {_ms(sample)}, but the model takes what is farther apart than "
               f"{_ms(rule.max_gap_ns)} for a hole: no step will hold anything of it; {least}")  # fmt: skip
    elif sample is not None and sample > 1.05e9 / rule.rate_hz:
        yield (f"{1e9 / sample:g} samples a second are fewer than the {rule.rate_hz} that the model was made for: what "
               f"is faster than {0.5e9 / sample:g} Hz it will not see; raise `rate_hz` to {rule.rate_hz}")  # fmt: skip
    if every is None:
        return
    what = "a message holds"
    if pace.gather_ns is not None and pace.gather_ns > every:
        what, every = "what gathers in the device until it is taken holds", pace.gather_ns
    if spec.max_delay_ns is not None and every > spec.max_delay_ns:
        yield (f"{what} {_ms(every)} and comes when they are over, but windows wait for only "
               f"{_ms(spec.max_delay_ns)} (`max_delay_ms` of `align`): most will be `late` or `partial`; "
               f"{pace.sooner}")  # fmt: skip
    elif every > spec.hop_ns:
        yield (f"{what} {_ms(every)}, more than the model's hop of {_ms(spec.hop_ns)}: predictions come in "
               f"bursts, and up to {_ms(every)} later than they could; {pace.sooner}")  # fmt: skip


def _ms(ns: float) -> str:
    return f"{plain(ns / 1e6)} ms"
