"""The other process of a test: ``python -m tests.bus_peer ROLE SESSION_DIR``. It says on stdout what it has done and
waits on stdin for leave to go on, so that no test has to guess how long anything takes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.messages import FrameLayout, Header, Message
from pipeline.transport import Latest, Lossless, Publisher, RingSpec, Subscriber, ZmqBus

LAYOUT = FrameLayout("gray8", 256, 512)  # 128 KiB: through the ring
SIZE = 256 * 512


def message(seq: int, *, stream: str = "camera", epoch: int = 0, data: Any = None) -> Message:
    """A frame filled with its number (or the given payload), captured at ``seq`` ms."""
    t = seq * 1_000_000
    header = Header(
        stream=stream, seq=seq, epoch=epoch, t_capture_ns=t, t_end_ns=t, bound_ns=t + 1, t_receipt_ns=t, layout=LAYOUT
    )
    return Message(header, np.full(SIZE, seq % 256, np.uint8) if data is None else data)


def say(text: str) -> None:
    print(text, flush=True)


def heard() -> str:
    return sys.stdin.readline().strip()


def publish(publisher: Publisher) -> None:
    """Lines ``first last`` publish that range; an empty line ends."""
    while line := heard():
        first, last = map(int, line.split())
        say(" ".join(str(int(publisher.publish(message(seq)))) for seq in range(first, last + 1)))


def hold(subscriber: Subscriber) -> None:
    """Takes messages and never gives them back; says the number of each."""
    held = []
    while True:
        for received in subscriber.receive(100):
            held.append(received)
            say(str(received.message.header.seq))


def take(subscriber: Subscriber) -> None:
    """Reads and releases; says number and whether the pixels were right, until told 'end' by number 999."""
    while True:
        for received in subscriber.receive(100):
            with received:
                seq = received.message.header.seq
                right = bytes(received.message.data) == bytes([seq % 256]) * SIZE
            say(f"{seq} {right and received.valid()}")
            if seq == 999:
                return


def main() -> None:
    role, folder = sys.argv[1], Path(sys.argv[2])
    bus = ZmqBus(folder, role)
    if role == "publish":
        with bus.publisher("camera", ["camera"], RingSpec(4, SIZE)) as publisher:
            say("open")
            say(str(sorted(publisher.wait_for_readers(set(sys.argv[3:]), 60))))
            publish(publisher)
    else:
        policy = Lossless() if role == "take" else Latest()
        with bus.subscriber(sys.argv[3] if len(sys.argv) > 3 else role, {"camera": {"camera": policy}}) as subscriber:
            say("open")
            (hold if role == "hold" else take)(subscriber)
    bus.close()
    say("closed")


if __name__ == "__main__":
    main()
