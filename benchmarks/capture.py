"""What a sensor costs beyond its driver: CPU of each capture node beside a loop that only reads the same device.

    python benchmarks/capture.py [--seconds 6] [--rounds 3] [--settle 2] [--only camera] [--json]

Each device is a real protocol on loopback, served by a process of its own: a camera of 1280x720 at 30 frames/s (MJPEG
over HTTP), a microphone of 16 kHz (a null sink of PulseAudio), an IMU of 200 Hz (WitMotion frames on a
pseudo-terminal), a LiDAR of 10 sweeps/s (VLP-16 packets over UDP, 289 000 points/s). The node is the process of
`sensorium run` for a rig
of this one source: it stamps, numbers and publishes. The loop beside it reads the same device with the same library
(PyAV, PortAudio, pyserial, velodyne-decoder) to the same values and throws them away. Both are measured in turn,
``rounds`` times, by the CPU time that the kernel counts for the process, and by what came: messages a second. Both are
left alone for ``settle`` seconds first. A young stream costs its node more: its clock is fitted anew whenever the time
that it is known for has grown by 6 %.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pipeline.clock import SystemClock
from pipeline.config import load_rig
from pipeline.launch import Session
from tests.device_servers import HttpCamera, SerialImu, UdpLidar
from tests.test_lidar import free_port
from tests.test_microphone import Server

NS = 1_000_000_000
STREAMS = ("camera", "microphone", "imu", "lidar")
SIZE, RATE_HZ = (1280, 720), 30


# -- the loops that only read ------------------------------------------------------------------------------------------


@functools.cache
def ready() -> None:
    """Said once, when something has been read."""
    print("ready", flush=True)


def read_camera(url: str) -> None:
    import av

    container = av.open(url, options={"fflags": "nobuffer", "analyzeduration": "500000"}, timeout=(4.0, 3.0))
    stream = container.streams.video[0]
    stream.codec_context.flags |= av.codec.context.Flags.low_delay
    stream.thread_type = "SLICE"
    pixels = np.empty((SIZE[1], SIZE[0] * 3), np.uint8)
    for frame in container.decode(stream):
        ready()
        plane = frame.reformat(width=SIZE[0], height=SIZE[1], format="bgr24").planes[0]
        np.copyto(pixels, np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : SIZE[0] * 3])


def read_microphone(device: str) -> None:
    import sounddevice

    index = next(i for i, d in enumerate(sounddevice.query_devices()) if d["name"] == device)
    kept: list[bytes] = []

    def take(data: Any, frames: int, times: Any, status: Any) -> None:
        kept[:] = [bytes(data)]
        ready()

    with sounddevice.RawInputStream(16_000, 160, index, 1, "int16", callback=take):
        SystemClock().wait_until(1 << 62)


def read_imu(port: str) -> None:
    import struct

    import serial

    rest, three = b"", struct.Struct("<hhh")
    scales = {0x51: 16 * 9.80665 / 32768, 0x52: math.radians(2000) / 32768}
    values: list[list[float]] = []
    with serial.Serial(port, 115_200, timeout=0.05) as opened:
        while True:
            data = opened.read(1)
            rest += data + opened.read(opened.in_waiting)
            while len(rest) >= 11:
                if rest[0] != 0x55 or sum(rest[:10]) & 0xFF != rest[10]:
                    rest = rest[1:]
                    continue
                scale = scales.get(rest[1], 1.0)
                values[:] = [[scale * count for count in three.unpack_from(rest, 2)]]
                ready()
                rest = rest[11:]


def read_lidar(port: str) -> None:
    import socket

    import velodyne_decoder

    decoder = velodyne_decoder.StreamDecoder(velodyne_decoder.Config())
    clock = SystemClock()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listening:
        listening.bind(("127.0.0.1", int(port)))
        while True:
            decoder.decode(clock.now_ns() / 1e9, listening.recv(2000))
            ready()


READERS: dict[str, Callable[[str], None]] = {
    "camera": read_camera, "microphone": read_microphone, "imu": read_imu, "lidar": read_lidar,
}  # fmt: skip


# -- the devices -------------------------------------------------------------------------------------------------------


class Textured(HttpCamera):
    """A camera whose pictures cost as much to decode as real ones: soft shapes and a little noise."""

    def __init__(self) -> None:
        super().__init__(*SIZE, RATE_HZ)
        random = np.random.default_rng(0)
        coarse = random.integers(0, 255, (18, 32, 3), np.uint8)
        base = cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC).astype(np.int16)
        self._coded = [
            cv2.imencode(".jpg", np.clip(base + random.normal(0, 6, base.shape), 0, 255).astype(np.uint8))[1].tobytes()
            for _ in range(4)
        ]

    def jpeg(self, index: int) -> bytes:
        return self._coded[index % 4]


def serve(name: str, port: int, pipe: Any) -> None:
    """A device in a process of its own: says where it is, and sends until the pipe closes."""
    server: Any = Textured() if name == "camera" else SerialImu(200) if name == "imu" else UdpLidar(port)
    pipe.send(server.url if name == "camera" else server.port.name if name == "imu" else str(port))
    server.start()
    pipe.recv()
    server.close()


@contextmanager
def device(name: str) -> Iterator[str]:
    """A device that sends; what names it."""
    if name == "microphone":
        with tempfile.TemporaryDirectory() as folder:
            server = Server(Path(folder))
            os.environ["PULSE_SERVER"] = server.env["PULSE_SERVER"]
            server.start()
            try:
                yield "pulse"
            finally:
                server.kill()
        return
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(name, free_port(), theirs))
    process.start()
    try:
        yield ours.recv()
    finally:
        ours.send(None)
        process.join()


def source(name: str, where: str) -> dict[str, Any]:
    return {
        "camera": {"kind": "camera", "device": where},
        "microphone": {"kind": "microphone", "device": where},
        "imu": {"kind": "imu", "port": where, "rate_hz": 200},
        "lidar": {"kind": "lidar", "sensor": "velodyne", "udp": int(where) if name == "lidar" else 1,
                  "bind": "127.0.0.1"},
    }[name]  # fmt: skip


# -- measuring ---------------------------------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process, by the scheduler's own clock; ticks would be too coarse for an IMU."""
    return sum(int(file.read_text().split()[0]) for file in Path(f"/proc/{pid}/task").glob("*/schedstat")) / NS


def over(seconds: float, pid: int, settle_s: float) -> float:
    """CPU of a process over ``seconds``, in per cent of a core, once ``settle_s`` have passed."""
    clock = SystemClock()
    clock.wait_until(round(settle_s * NS))
    begun, before = clock.now_ns(), cpu_s(pid)
    clock.wait_until(begun + round(seconds * NS))
    return 100 * (cpu_s(pid) - before) / ((clock.now_ns() - begun) / NS)


def measure_loop(name: str, seconds: float, settle_s: float) -> float:
    with device(name) as where:
        call = [sys.executable, __file__, "--read", name, where]
        process = subprocess.Popen(call, stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            return over(seconds, process.pid, settle_s)
        finally:
            process.kill()
            process.wait()


def measure_node(name: str, seconds: float, settle_s: float) -> tuple[float, float]:
    with device(name) as where, tempfile.TemporaryDirectory(prefix="sn", dir="/tmp") as folder:
        rig = Path(folder) / "rig.yaml"
        rig.write_text(yaml.safe_dump({"name": "capture", "sources": {name: source(name, where)}}))
        session = Session(load_rig(rig), root=Path(folder) / "s")
        with session:
            clock = SystemClock()
            while not session.status().streams[name].published and clock.now_ns() < 30 * NS:
                clock.wait_until(clock.now_ns() + NS // 20)
            pid = session.status().nodes[name].pid
            assert pid is not None, session.status()
            before, begun = session.status().streams[name].published, clock.now_ns()
            cpu = over(seconds, pid, settle_s)
            rate = (session.status().streams[name].published - before) / ((clock.now_ns() - begun) / NS)
    return cpu, rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settle", type=float, default=2.0)
    parser.add_argument("--only", choices=STREAMS)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--read", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        READERS[arguments.read[0]](arguments.read[1])
        return
    rows = []
    for name in STREAMS if arguments.only is None else (arguments.only,):
        loops, nodes, rates = [], [], []
        for _ in range(arguments.rounds):
            loops.append(measure_loop(name, arguments.seconds, arguments.settle))
            cpu, rate = measure_node(name, arguments.seconds, arguments.settle)
            nodes.append(cpu)
            rates.append(rate)
        loop, node = statistics.median(loops), statistics.median(nodes)
        rows.append({"stream": name, "loop_percent": loop, "node_percent": node, "overhead": node / loop - 1,
                     "messages_per_s": statistics.median(rates), "loops": loops, "nodes": nodes,
                     "load_average": os.getloadavg()[0]})  # fmt: skip
        if not arguments.json:
            row = rows[-1]
            print(f"{name:12} loop {loop:5.1f} %   node {node:5.1f} %   overhead {row['overhead']:+6.0%}   "
                  f"{row['messages_per_s']:6.1f} messages/s   load average {row['load_average']:.1f}",
                  flush=True)  # fmt: skip
    if arguments.json:
        print("\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    main()
