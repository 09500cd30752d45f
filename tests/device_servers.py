"""The far side of real protocols, each at its own pace and each counting what it has sent: a camera that serves MJPEG
over HTTP, an IMU on a pseudo-terminal, a LiDAR that sends UDP packets, microphones of a sound server.

Every frame and every sample can be recognised again by what it holds, so that nothing can be lost or doubled unseen.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import cv2
import numpy as np

from pipeline.clock import SystemClock
from tests.test_imu import Port, sample
from tests.test_lidar import PACKET_NS, STEP, vlp16

NS = 1_000_000_000
BITS = 16
TURN_PACKETS = 36000 // (12 * STEP)
"""Packets of one turn of the LiDAR, without a rest."""
POINTS = TURN_PACKETS * 12 * 32


class Paced:
    """Calls ``send`` with 0, 1, 2, … ``rate_hz`` times a second, in a thread, until it is paused or ended; what is due
    goes at once. ``sent`` counts the calls that returned True."""

    def __init__(self, rate_hz: float) -> None:
        self.rate_hz, self.sent = rate_hz, 0
        self.calls = 0
        self._clock, self._end = SystemClock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def send(self, index: int) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        self._thread.start()

    def pause(self) -> None:
        """Nothing is sent after this; what listens stays connected."""
        self._end.set()
        if self._thread.ident is not None:
            self._thread.join()

    def close(self) -> None:
        self.pause()

    def _run(self) -> None:
        start = self._clock.now_ns()
        index = 0
        while not self._end.is_set():
            due = start + round(index * NS / self.rate_hz)
            self._clock.wait_until(due, self._end)
            now = self._clock.now_ns()
            while not self._end.is_set() and start + round(index * NS / self.rate_hz) <= now:
                self.sent += self.send(index)
                index = self.calls = index + 1


def picture(index: int, width: int, height: int) -> np.ndarray[Any, Any]:
    """A picture with its number in it, as bars of black and white."""
    bits = np.array([255 * (index >> bit & 1) for bit in range(BITS)], np.uint8)
    row = np.repeat(bits, -(-width // BITS))[:width]
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def number_of(pixels: np.ndarray[Any, Any]) -> int:
    """The number in a picture."""
    width = pixels.shape[1] // BITS
    levels = pixels[4:-4, :, 0].mean(axis=0)
    return sum(int(levels[bit * width + width // 4 : (bit + 1) * width - width // 4].mean() > 127) << bit
               for bit in range(BITS))  # fmt: skip


class HttpCamera(Paced):
    """MJPEG over HTTP for one listener. ``first`` is the first frame that it was sent, ``sent`` how many there were."""

    def __init__(self, width: int, height: int, rate_hz: float) -> None:
        super().__init__(rate_hz)
        self.size = (width, height)
        self.first: int | None = None
        self._listener: Any = None
        self._gone = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                server._listener = self.wfile
                server._gone.wait()  # the connection lives as long as this call

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._serving = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._serving.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"

    def jpeg(self, index: int) -> bytes:
        coded: bytes = cv2.imencode(".jpg", picture(index, *self.size))[1].tobytes()
        return coded

    def send(self, index: int) -> bool:
        listener = self._listener
        if listener is None:
            return False
        jpeg = self.jpeg(index)
        head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
        try:
            listener.write(head.encode() + jpeg + b"\r\n")
        except (OSError, ValueError):  # it has hung up
            return False
        self.first = index if self.first is None else self.first
        return True

    def close(self) -> None:
        super().close()
        self._gone.set()
        self._server.shutdown()
        self._server.server_close()
        self._serving.join()


class SerialImu(Paced):
    """WitMotion frames; sample i is ``tests.test_imu.sample(i)``."""

    def __init__(self, rate_hz: float) -> None:
        super().__init__(rate_hz)
        self.port = Port()

    def send(self, index: int) -> bool:
        self.port.write(sample(index))
        return True

    def close(self) -> None:
        self.port.give_up()
        super().close()
        self.port.unplug()


class UdpLidar(Paced):
    """A VLP-16 in a hall, 10.05 turns a second, 289 000 points a second."""

    def __init__(self, port: int) -> None:
        super().__init__(NS / PACKET_NS)
        self._packets = [vlp16(i, 0) for i in range(TURN_PACKETS)]
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.connect(("127.0.0.1", port))

    def send(self, index: int) -> bool:
        us = index * PACKET_NS // 1000 % 3_600_000_000
        packet = self._packets[index % TURN_PACKETS]
        try:
            self._socket.send(packet[:1200] + struct.pack("<I", us) + packet[1204:])
        except ConnectionRefusedError:  # nobody listens yet
            return False
        return True

    def close(self) -> None:
        super().close()
        self._socket.close()


@contextmanager
def sending(*servers: Paced) -> Iterator[None]:
    """All of them at work; closed at the end."""
    with ExitStack() as stack:
        for server in servers:
            stack.callback(server.close)
        for server in servers:
            server.start()
        yield
