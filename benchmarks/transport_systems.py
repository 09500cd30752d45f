"""One publisher and one subscriber process of each system that ``benchmarks/transport.py`` compares.

Every sender takes a private numpy frame (or a sample) and hands it over; every receiver touches one byte of each page
(or every value of the sample) and then looks at the clock. A sender that can, also has ``fill``: the payload is put
where the system wants it *before* the clock starts, as a driver does that decodes straight into shared memory.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from pipeline.clock import Origin, SystemClock
from pipeline.messages import IMU_DTYPE, FrameLayout, Header, ImuLayout, Message
from pipeline.transport import Lossless, RingSpec, ZmqBus

HEIGHT, WIDTH = 1080, 1920
FRAME = HEIGHT * WIDTH * 3
STAMP = struct.Struct("<qq")  # number (-1 ends the stream) and time of hand-over
GAP = 64  # bytes before a peer's payload, so that it begins on a cache line
DEPTH = 8  # frames under way at most, in every system
CLOCK = SystemClock(Origin(monotonic_ns=0, unix_ns=0))  # the same numbers in every process


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a publisher and a subscriber process are told."""

    system: str
    workload: str
    folder: str
    port: int
    seconds: float
    rate_hz: float
    """0: as fast as possible."""

    @property
    def frames(self) -> bool:
        return self.workload.startswith("frame")

    @property
    def filled(self) -> bool:
        return self.system.endswith("-filled")

    @property
    def uncached(self) -> bool:
        """Whether the process runs in ``pipeline.shm.COPY_ENVIRONMENT``."""
        return self.system in ("sensorium", "sensorium-filled", "iceoryx2-uncached")

    @property
    def depth(self) -> int:
        return DEPTH if self.frames else 1000


class Sensorium:
    """This project's publisher and subscriber as they are; headers and policies included."""

    def __init__(self, job: Job, role: str) -> None:
        self.job, self.bus = job, ZmqBus(Path(job.folder), role)
        self.layout = FrameLayout("rgb8", HEIGHT, WIDTH) if job.frames else ImuLayout(1)
        if role == "pub":
            ring = RingSpec(DEPTH, FRAME) if job.frames else None
            self.publisher = self.bus.publisher("x", ["x"], ring, lossless=job.rate_hz == 0)
            if self.publisher.wait_for_readers({"sub"}, 30):
                sys.exit("no reader came")
        else:
            self.subscriber = self.bus.subscriber("sub", {"x": {"x": Lossless()}})
            self.waiting: list[Any] = []

    def _header(self, seq: int, stamp: int, layout: Any) -> Header:
        return Header(
            stream="x", seq=seq, epoch=0, t_capture_ns=stamp, t_end_ns=stamp, bound_ns=stamp + 1, t_receipt_ns=stamp,
            layout=layout,
        )  # fmt: skip

    def fill(self, payload: Any) -> Any:
        loan = self.publisher.loan(FRAME)
        while loan is None:  # as fast as possible: the readers set the pace
            CLOCK.wait_until(CLOCK.now_ns() + 100_000)
            loan = self.publisher.loan(FRAME)
        np.copyto(loan, payload)
        return loan

    def send(self, seq: int, stamp: int, payload: Any) -> None:
        self.publisher.publish(Message(self._header(seq, stamp, self.layout), payload))

    def end(self, seq: int) -> None:
        self.publisher.beat(self._header(seq, CLOCK.now_ns(), None))

    def recv(self) -> tuple[int, int, Any]:
        while not self.waiting:
            self.waiting = self.subscriber.receive(5000)[::-1]
        self.current = self.waiting.pop()
        header = self.current.message.header
        return (-1 if header.is_beat else header.seq), header.t_capture_ns, self.current.message.data

    def release(self) -> None:
        if not self.current.valid():
            sys.exit("a frame was overwritten")
        self.current.release()

    def close(self) -> None:
        self.bus.close()


class PlainZmq:
    """pyzmq as its guide shows it: one multipart message over ipc, copied in and out; never dropping."""

    def __init__(self, job: Job, role: str) -> None:
        import zmq

        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.XPUB if role == "pub" else zmq.SUB)
        self.socket.set_hwm(4 if job.frames else 1000)
        address = f"ipc://{job.folder}/plain"
        if role == "pub":
            self.socket.setsockopt(zmq.XPUB_NODROP, 1)
            self.socket.bind(address)
            self.socket.recv()  # the subscription
        else:
            self.socket.connect(address)
            self.socket.subscribe(b"")

    def send(self, seq: int, stamp: int, payload: Any) -> None:
        self.socket.send_multipart([STAMP.pack(seq, stamp), payload])

    def end(self, seq: int) -> None:
        self.send(-1, 0, b"")

    def recv(self) -> tuple[int, int, Any]:
        stamp, payload = self.socket.recv_multipart()
        return *STAMP.unpack(stamp), payload

    def release(self) -> None:
        pass

    def close(self) -> None:
        self.context.destroy(linger=2000)


class Iceoryx2:
    """A loaned slice and an event a message; the publisher retries until delivered."""

    def __init__(self, job: Job, role: str) -> None:
        import iceoryx2 as iox2

        iox2.set_log_level(iox2.LogLevel.Error)
        self.job = job
        self.node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        name = f"sensorium-benchmark/{job.port}"
        self.service = (
            self.node.service_builder(iox2.ServiceName.new(name))
            .publish_subscribe(iox2.Slice[ctypes.c_uint8])
            .enable_safe_overflow(False)
            .subscriber_max_buffer_size(job.depth)
            .subscriber_max_borrowed_samples(2)
            .open_or_create()
        )
        event = self.node.service_builder(iox2.ServiceName.new(name + "/event")).event().open_or_create()
        if role == "pub":
            self.publisher = (
                self.service.publisher_builder()
                .initial_max_slice_len(GAP + (FRAME if job.frames else IMU_DTYPE.itemsize))
                .backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered)
                .create()
            )
            self.notifier = event.notifier_builder().create()
            wait_for(Path(job.folder, "ready"))
        else:
            self.subscriber = self.service.subscriber_builder().create()
            self.listener = event.listener_builder().create()
            self.patience = iox2.Duration.from_millis(200)
            Path(job.folder, "ready").touch()

    def _put(self, payload: Any) -> Any:
        nbytes = payload.nbytes if payload is not None else 0
        sample = self.publisher.loan_slice_uninit(GAP + nbytes)
        if nbytes:
            ctypes.memmove(sample.payload_ptr + GAP, payload.ctypes.data, nbytes)
        return sample

    def fill(self, payload: Any) -> Any:
        return self._put(payload)

    def send(self, seq: int, stamp: int, payload: Any) -> None:
        sample = payload if self.job.filled and seq >= 0 else self._put(payload)
        ctypes.memmove(sample.payload_ptr, STAMP.pack(seq, stamp), STAMP.size)
        sample.assume_init().send()
        self.notifier.notify()

    def end(self, seq: int) -> None:
        self.send(-1, 0, None)
        wait_for(Path(self.job.folder, "done"))

    def recv(self) -> tuple[int, int, Any]:
        while (sample := self.subscriber.receive()) is None:
            self.listener.timed_wait(self.patience)
        self.current = sample
        data = sample.payload().as_memory_view().cast("B")
        return *STAMP.unpack(data[: STAMP.size]), data[GAP:]

    def release(self) -> None:
        self.current = None

    def close(self) -> None:
        Path(self.job.folder, "done").touch()


class Dora:
    """Two Python nodes under ``dora run``, with a shared-memory pool that holds the frames under way."""

    def __init__(self, job: Job, role: str) -> None:
        import dora
        import pyarrow  # noqa: F401  (what dora's buffers are made of)

        self.job, self.node = job, dora.Node()
        if role == "pub":
            wait_for(Path(job.folder, "ready"))
        else:
            Path(job.folder, "ready").touch()

    def send(self, seq: int, stamp: int, payload: Any) -> None:
        if payload is not None and not self.job.frames:
            self.node.send_output("data", STAMP.pack(seq, stamp) + bytes(GAP - STAMP.size) + payload.tobytes())
            return
        nbytes = payload.nbytes if payload is not None else 0
        with self.node.send_output_raw("data", GAP + nbytes) as buffer:
            data = np.asarray(buffer, dtype=np.uint8)
            data[: STAMP.size] = np.frombuffer(STAMP.pack(seq, stamp), np.uint8)
            if payload is not None:
                data[GAP:] = payload
            del data

    def end(self, seq: int) -> None:
        self.send(-1, 0, None)
        wait_for(Path(self.job.folder, "done"))

    def recv(self) -> tuple[int, int, Any]:
        while True:
            event = self.node.next(timeout=10.0)
            if event is None or event["type"] in ("STOP", "ERROR"):
                return -1, 0, b""
            if event["type"] == "INPUT":
                self.current = event
                data = event["value"].to_numpy(zero_copy_only=True)
                return *STAMP.unpack(data[: STAMP.size].tobytes()), data[GAP:]

    def release(self) -> None:
        self.current = None

    def close(self) -> None:
        Path(self.job.folder, "done").touch()


class Meter:
    """The subscriber's side of the measurement."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.latencies: list[int] = []
        self.first = self.last = 0
        self.cpu = time.process_time()

    def take(self, stamp: int, payload: Any) -> None:
        if self.job.frames:
            touched = int(np.frombuffer(payload, np.uint8)[::4096].sum())
        else:
            touched = float(np.frombuffer(payload, IMU_DTYPE)["accel"].sum())
        now = CLOCK.now_ns()
        if not touched:
            sys.exit("an empty payload arrived")
        if not self.latencies:
            self.first, self.cpu = now, time.process_time()
        self.last = now
        self.latencies.append(now - stamp)

    def result(self) -> dict[str, Any]:
        settled = np.array(self.latencies[min(len(self.latencies) // 10, 30) :]) / 1e3
        elapsed_s = max(self.last - self.first, 1) / 1e9
        p50, p99 = np.percentile(settled, [50, 99])
        return {
            "received": len(self.latencies),
            "p50_us": round(float(p50), 1),
            "p99_us": round(float(p99), 1),
            "max_us": round(float(settled.max()), 1),
            "rate_hz": round((len(self.latencies) - 1) / elapsed_s, 1),
            "cpu_sub": round((time.process_time() - self.cpu) / elapsed_s, 4),
        }


def wait_for(path: Path) -> None:
    while not path.exists():
        CLOCK.wait_until(CLOCK.now_ns() + 5_000_000)


def numbers(job: Job) -> Iterator[tuple[int, int]]:
    """The number of each message and when it is due (0: at once), until the time is over."""
    start = CLOCK.now_ns() + 300_000_000  # what was just started settles down
    CLOCK.wait_until(start)
    end, period, seq = start + int(job.seconds * 1e9), int(1e9 / job.rate_hz) if job.rate_hz else 0, 0
    while (due := start + seq * period) < end and CLOCK.now_ns() < end:
        yield seq, due if period else 0
        seq += 1


def payloads(job: Job) -> list[np.ndarray[Any, Any]]:
    """Six frames in turn, so that caches see real traffic; one sample."""
    if job.frames:
        return [np.full(FRAME, k + 1, np.uint8) for k in range(6)]
    sample = np.ones(1, IMU_DTYPE)
    sample["offset_ns"] = 0
    return [sample.view(np.uint8)]


def publish(job: Job) -> dict[str, Any]:
    """The publisher's process."""
    sender, sources, sent = SYSTEMS[job.system](job, "pub"), payloads(job), 0
    began, cpu = CLOCK.now_ns(), time.process_time()
    for seq, due in numbers(job):
        payload = sources[seq % len(sources)]
        if job.filled:
            payload = sender.fill(payload)
        if due:
            CLOCK.wait_until(due)
        sender.send(seq, CLOCK.now_ns(), payload)
        sent = seq + 1
    result = {"sent": sent, "cpu_pub": round((time.process_time() - cpu) / ((CLOCK.now_ns() - began) / 1e9), 4)}
    sender.end(sent)
    sender.close()
    return result


def subscribe(job: Job) -> dict[str, Any]:
    """The subscriber's process."""
    receiver, meter = SYSTEMS[job.system](job, "sub"), Meter(job)
    while True:
        seq, stamp, payload = receiver.recv()
        if seq < 0:
            break
        meter.take(stamp, payload)
        del payload
        receiver.release()
    result = meter.result()
    receiver.close()
    return result


async def ezmsg_publish(job: Job) -> dict[str, Any]:
    """ezmsg's low-level interface is asynchronous, so it has loops of its own."""
    import ezmsg.core as ez

    sources, sent = payloads(job), 0
    async with ez.GraphContext(("127.0.0.1", job.port), auto_start=False) as graph:
        publisher = await graph.publisher(
            "X", buf_size=FRAME + 65536 if job.frames else 65536, num_buffers=DEPTH if job.frames else 32
        )
        Path(job.folder, "up").touch()
        await asyncio.to_thread(wait_for, Path(job.folder, "ready"))
        began, cpu = CLOCK.now_ns(), time.process_time()
        for seq, due in numbers(job):
            if due:
                await asyncio.sleep(max(0, due - CLOCK.now_ns()) / 1e9)
            await publisher.broadcast((seq, CLOCK.now_ns(), sources[seq % len(sources)]))
            sent = seq + 1
        result = {"sent": sent, "cpu_pub": round((time.process_time() - cpu) / ((CLOCK.now_ns() - began) / 1e9), 4)}
        await publisher.broadcast((-1, 0, None))
        await asyncio.to_thread(wait_for, Path(job.folder, "done"))
    return result


async def ezmsg_subscribe(job: Job) -> dict[str, Any]:
    import ezmsg.core as ez

    meter = Meter(job)
    wait_for(Path(job.folder, "up"))
    async with ez.GraphContext(("127.0.0.1", job.port), auto_start=False) as graph:
        subscriber = await graph.subscriber("X")
        await asyncio.sleep(0.3)
        Path(job.folder, "ready").touch()
        more = True
        while more:
            async with subscriber.recv_zero_copy() as (seq, stamp, payload):
                more = seq >= 0
                if more:
                    meter.take(stamp, payload)
                del payload
        Path(job.folder, "done").touch()
    return meter.result()


SYSTEMS: dict[str, Any] = {
    "zmq-ipc": PlainZmq,
    "sensorium": Sensorium,
    "sensorium-cached": Sensorium,
    "sensorium-filled": Sensorium,
    "iceoryx2": Iceoryx2,
    "iceoryx2-uncached": Iceoryx2,
    "iceoryx2-filled": Iceoryx2,
    "dora": Dora,
    "ezmsg": None,
}
NEEDS = {"dora": "dora", "ezmsg": "ezmsg.core", **{name: "iceoryx2" for name in SYSTEMS if name.startswith("iceoryx2")}}
"""The module that a peer needs; what is not installed is left out, and the table says so."""


def main() -> None:
    role, folder = sys.argv[1], Path(sys.argv[2])
    job = msgspec.json.decode((folder / "job.json").read_bytes(), type=Job)
    if job.system == "ezmsg":
        result = asyncio.run(ezmsg_publish(job) if role == "pub" else ezmsg_subscribe(job))
    else:
        result = publish(job) if role == "pub" else subscribe(job)
    partial = folder / f"{role}.part"
    partial.write_text(json.dumps(result))
    partial.rename(folder / f"{role}.json")
    if job.system.startswith("iceoryx2"):
        os._exit(0)  # its objects complain when the interpreter takes them down in another order


if __name__ == "__main__":
    main()
