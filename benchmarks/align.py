"""How fast the aligner takes messages, and how long its longest calls are. Prints a table; ``--json`` prints rows.

    python benchmarks/align.py [--json] [--seconds 30] [--streams 3,8,16] [--hops 100,20]

Input, in order of arrival, each stream with its own delay and jitter: 30 Hz camera (nearest), 100 Hz audio blocks
(all), 200 Hz IMU, one sample a message (linear resampling at 100 Hz), 10 Hz LiDAR (latest); three streams are the first
three, more repeat the four. Every message is fed, every step is made with its manifest, digest and grid. One process.

* ``messages_per_s``: messages in per second of CPU time of this process.
* ``call_cpu_p9999_us``: the 99.99th percentile of the CPU time of a single ``feed``, measured in a run of its own.
* ``memory_growth_kib``: growth of traced memory between a quarter and the end of the run.

The row ``band_limited`` resamples the audio too (48 kHz to 16 kHz). Where ROS's synchroniser is installed
(``message_filters`` on the path, with ``rclpy`` or ``rospy``), the same series goes through it.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
import tracemalloc
from typing import Any

import numpy as np

from pipeline.align import Aligner, AlignSpec, All, Latest, Nearest, Resample, StreamSpec
from pipeline.messages import AudioLayout, FrameLayout, Header, ImuLayout, Layout, Message, SweepLayout

MS = 1_000_000
SECOND = 1_000 * MS
BASE = [
    ("camera", 30, 30 * MS, 5 * MS),
    ("audio", 100, 10 * MS, MS),
    ("imu", 200, 2 * MS, MS // 2),
    ("lidar", 10, 50 * MS, 10 * MS),
]


def layout(kind: str, rate_hz: int) -> tuple[Layout, Any]:
    """The layout and the payload of one message."""
    if kind == "camera":
        return FrameLayout("bgr8", 720, 1280), None
    if kind == "audio":
        return AudioLayout(48_000, 1, 480), np.random.default_rng(1).integers(-9000, 9000, 480, np.int16).tobytes()
    if kind == "imu":
        return ImuLayout(1), bytes(8) + np.arange(6, dtype="<f4").tobytes()
    return SweepLayout(30_000), None


def arrivals(streams: int, seconds: float, seed: int = 1) -> list[tuple[Message, int]]:
    """All messages with their arrival times, in order of arrival; a stream keeps its own order."""
    rnd, out = random.Random(seed), []
    for i in range(streams):
        kind, rate_hz, delay, jitter = BASE[i % 4]
        what, data = layout(kind, rate_hz)
        period, offset, last = SECOND // rate_hz, rnd.randrange(SECOND // rate_hz), 0
        for seq in range(int(seconds * rate_hz)):
            t = offset + seq * period
            end = t + (period if kind == "audio" else 0)
            last = max(last, end + delay + rnd.randint(-jitter, jitter))
            header = Header(
                stream=f"{kind}{i}", seq=seq, epoch=0, t_capture_ns=t, t_end_ns=end, bound_ns=end + (kind != "audio"),
                t_receipt_ns=last, layout=what,
            )  # fmt: skip
            out.append((Message(header, data), last))
    return sorted(out, key=lambda item: item[1])


def spec(streams: int, hop_ms: int, band_limited: bool) -> AlignSpec:
    """The rules of the streams that ``arrivals`` makes."""
    audio = Resample(16_000, 30 * MS, "band_limited") if band_limited else All()
    rules = {"camera": Nearest(50 * MS), "audio": audio, "imu": Resample(100, 30 * MS), "lidar": Latest(250 * MS)}
    payloads = {"camera": "frame", "audio": "audio", "imu": "imu", "lidar": "sweep"}
    channels = {"imu": 6, "audio": 1}
    made = []
    for i in range(streams):
        kind = BASE[i % 4][0]
        made.append(
            StreamSpec(name=f"{kind}{i}", payload=payloads[kind], rule=rules[kind], channels=channels.get(kind, 0))
        )
    return AlignSpec(hop_ns=hop_ms * MS, streams=tuple(made), max_delay_ns=250 * MS, max_future_ns=100 * MS)


def throughput(data: list[tuple[Message, int]], align: AlignSpec) -> tuple[float, int]:
    """(messages per second of CPU time, steps made)."""
    aligner, steps = Aligner(align), 0
    start = time.process_time_ns()
    for message, arrival_ns in data:
        steps += len(aligner.feed(message, arrival_ns))
    return len(data) * 1e9 / (time.process_time_ns() - start), steps


def longest_calls(data: list[tuple[Message, int]], align: AlignSpec) -> float:
    """The 99.99th percentile of the CPU time of one call, in us."""
    aligner, spent, clock = Aligner(align), [], time.thread_time_ns
    for message, arrival_ns in data:
        start = clock()
        aligner.feed(message, arrival_ns)
        spent.append(clock() - start)
    return float(np.percentile(spent, 99.99)) / 1e3


def memory_growth(data: list[tuple[Message, int]], align: AlignSpec) -> float:
    """KiB that the aligner holds more at the end than after a quarter of the run."""
    aligner = Aligner(align)
    tracemalloc.start()
    for index, (message, arrival_ns) in enumerate(data):
        aligner.feed(message, arrival_ns)
        if index == len(data) // 4:
            early = tracemalloc.get_traced_memory()[0]
    growth = (tracemalloc.get_traced_memory()[0] - early) / 1024
    tracemalloc.stop()
    return growth


def ros_throughput(data: list[tuple[Message, int]], streams: int) -> float | None:
    """Messages per second through ROS's ApproximateTimeSynchronizer (queue 10, slop 50 ms), where it is installed."""
    try:
        import message_filters
        from rclpy.time import Time
    except ImportError:
        return None

    class Stamped:
        def __init__(self, t_ns: int) -> None:
            self.header = type("H", (), {"stamp": Time(nanoseconds=t_ns)})()

    filters = [message_filters.SimpleFilter() for _ in range(streams)]
    sync = message_filters.ApproximateTimeSynchronizer(filters, 10, 0.05)
    sync.registerCallback(lambda *_: None)
    ready = [(int(re.sub("[a-z]", "", m.header.stream)), Stamped(m.header.t_capture_ns)) for m, _ in data[:20_000]]
    start = time.process_time_ns()
    for index, stamped in ready:
        filters[index].signalMessage(stamped)
    return len(ready) * 1e9 / (time.process_time_ns() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--streams", default="3,8,16")
    parser.add_argument("--hops", default="100,20")
    options = parser.parse_args()
    rows = []
    for streams in map(int, options.streams.split(",")):
        data = arrivals(streams, options.seconds)
        ros = ros_throughput(data, streams)
        for hop_ms in map(int, options.hops.split(",")):
            for band_limited in (False, True):
                align = spec(streams, hop_ms, band_limited)
                rate = float(np.median([throughput(data, align)[0] for _ in range(options.rounds)]))
                row = {
                    "streams": streams,
                    "hop_ms": hop_ms,
                    "resampling": "linear + band_limited" if band_limited else "linear",
                    "messages": len(data),
                    "messages_per_s": round(rate),
                    "times_real_time": round(rate / (len(data) / options.seconds)),
                    "call_cpu_p9999_us": round(longest_calls(data, align), 1),
                    "memory_growth_kib": round(memory_growth(data, align), 1),
                }
                if ros is not None:
                    row["ros_messages_per_s"] = round(ros)
                    row["times_ros"] = round(rate / ros, 1)
                rows.append(row)
                if not options.json:
                    if len(rows) == 1:
                        print("  ".join(f"{key:>20}" for key in row))
                    print("  ".join(f"{value!s:>20}" for value in row.values()), flush=True)
    if options.json:
        print(json.dumps(rows, indent=1))
    elif ros is None:
        print("ROS's message_filters is not installed: not beside it in this run")


if __name__ == "__main__":
    main()
