"""The camera: files, MJPEG over HTTP and RTSP, from real servers that stop, hang and return. V4L2 needs a device."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest

from nodes.camera import Camera, ffmpeg
from pipeline.checks import CheckContext, check_source
from pipeline.clock import Origin, SystemClock, wall_ahead_ns
from pipeline.errors import ConfigError, SensorError
from pipeline.hosttime import DriverStamps, FrameClock, host_zero
from pipeline.life import Life, NodeSpec
from pipeline.messages import FrameLayout, Header, Message, view
from pipeline.node import SourceShell
from pipeline.strict import Document

MS, NS = 1_000_000, 1_000_000_000
BITS = 42
PYTHON = "/usr/bin/python3"


def settings(**given: Any) -> Any:
    return Document("{}", "rig.yaml").decode(Camera.Settings, value=given)


class Collector:
    """A publisher that keeps what it is given."""

    def __init__(self) -> None:
        self.messages: list[tuple[Header, np.ndarray[Any, Any]]] = []

    def publish(self, message: Message) -> bool:
        assert message.header.layout is not None
        self.messages.append((message.header, view(message.header.layout, message.data).copy()))
        return True

    def beat(self, header: Header) -> bool:
        return True

    def loan(self, nbytes: int) -> np.ndarray[Any, Any] | None:
        return np.empty(nbytes, np.uint8)


def shell(**given: Any) -> tuple[SourceShell, Collector]:
    sender, clock = Collector(), SystemClock()
    spec = NodeSpec(session="s", origin=clock.origin, session_dir="/nowhere", node="camera", kind="camera")
    made = SourceShell(Camera, settings(**given), Life(spec, clock), sender, "camera")
    made.stamper.open(clock.now_ns())
    return made, sender


def turn_until(made: SourceShell, condition: Callable[[], Any], seconds: float = 40) -> None:
    end = made.life.clock.now_ns() + round(seconds * NS)
    while not condition():
        made.turn()
        assert made.life.clock.now_ns() < end, f"not within {seconds} s; {made.context.dropped}, {made._trouble}"


# -- times -------------------------------------------------------------------------------------------------------------


def test_a_senders_clock_gives_the_moment_and_the_streams_own_only_its_pace() -> None:
    clock = FrameClock(unix_zero_ns=1000 * NS, sender_ns=10 * MS, arrival_ns=100 * MS)
    first = clock.update(0, None, 60 * MS)
    assert (first.t_capture_ns, first.uncertainty_ns, first.by) == (60 * MS, 100 * MS, "stream")
    unsure = clock.update(20 * MS, 1000 * NS + 65 * MS, 80 * MS)  # a frame off, as FFmpeg's first one is
    assert unsure.by == "stream"
    assert clock.update(30 * MS, 1000 * NS + 35 * MS, 95 * MS).by == "stream"
    then = clock.update(40 * MS, 1000 * NS + 45 * MS, 110 * MS)
    assert (then.t_capture_ns, then.uncertainty_ns, then.by, then.new_epoch) == (45 * MS, 10 * MS, "sender", True)
    assert then.late_ns == 65 * MS
    assert not clock.update(80 * MS, 1000 * NS + 85 * MS, 140 * MS).new_epoch


def test_a_sender_that_lives_in_another_time_is_not_believed() -> None:
    clock = FrameClock(unix_zero_ns=1000 * NS, sender_ns=10 * MS, arrival_ns=100 * MS)
    moments = [clock.update(i * 40 * MS, 90_000 * NS + i * 40 * MS, i * 40 * MS + 50 * MS) for i in range(20)]
    assert {m.by for m in moments} == {"stream"}
    assert all(abs(m.t_capture_ns - (i * 40 + 50) * MS) < MS for i, m in enumerate(moments))


def test_a_senders_clock_that_would_make_every_frame_too_old_is_not_believed() -> None:
    """Its frames would all be dropped, though they come in time: nobody would ever see one."""
    clock = FrameClock(unix_zero_ns=1000 * NS, sender_ns=10 * MS, arrival_ns=100 * MS, oldest_ns=NS)
    moments = [clock.update(i * 40 * MS, 998 * NS + i * 40 * MS, i * 40 * MS + 50 * MS) for i in range(200)]
    assert {m.by for m in moments[100:]} == {"stream"}
    assert all(abs(m.t_capture_ns - (100 + i) * 40 * MS - 50 * MS) < MS for i, m in enumerate(moments[100:]))
    assert max(m.late_ns for m in moments[100:]) < MS


def test_a_senders_clock_that_is_set_back_opens_an_epoch_and_is_left_if_that_was_too_far() -> None:
    for back, by in ((400 * MS, "sender"), (3 * NS, "stream")):
        clock = FrameClock(unix_zero_ns=1000 * NS, sender_ns=10 * MS, arrival_ns=100 * MS, oldest_ns=NS)
        moments = []
        for i in range(400):
            unix = 1000 * NS + i * 40 * MS - (back if i >= 200 else 0)
            moments.append(clock.update(i * 40 * MS, unix, i * 40 * MS + 50 * MS))
        assert {m.by for m in moments[2:200]} == {"sender"}
        assert moments[200].new_epoch
        assert {m.by for m in moments[300:]} == {by}
        assert sum(m.new_epoch for m in moments[2:]) == (1 if by == "sender" else 2)


@pytest.mark.parametrize("ahead", [400 * MS, -400 * MS, 3600 * NS])
def test_a_step_of_the_hosts_own_wall_clock_is_followed(ahead: int) -> None:
    """A host that starts with a wrong clock and is synchronised later: the sender was right from the beginning."""
    clock = FrameClock(unix_zero_ns=1000 * NS + ahead, sender_ns=10 * MS, arrival_ns=100 * MS, oldest_ns=NS)
    moments = []
    for i in range(200):
        if i == 100:
            clock.wall_was_set(1000 * NS)
        moments.append(clock.update(i * 40 * MS, 1000 * NS + i * 40 * MS, i * 40 * MS + 50 * MS))
    assert all(m.by == "sender" and m.t_capture_ns == i * 40 * MS for i, m in enumerate(moments) if i >= 100)
    assert [i for i, m in enumerate(moments) if m.new_epoch and i > 10] == [100]


def test_a_stall_and_the_rush_after_it_leave_the_senders_clock_believed() -> None:
    """Also where a stream begins with pictures that its server had kept."""
    clock = FrameClock(unix_zero_ns=1000 * NS, sender_ns=10 * MS, arrival_ns=100 * MS, oldest_ns=NS)
    moments = []
    for i in range(1500):
        taken = i * 40 * MS
        receipt = max(taken, 2 * NS if i < 50 else 0, 24 * NS if 500 <= i < 600 else 0) + 50 * MS
        moments.append(clock.update(taken, 1000 * NS + taken, receipt))
    assert {m.by for m in moments[2:]} == {"sender"}
    assert [m.late_ns > NS for m in moments].count(True) > 80


def test_a_drivers_stamp_stays_one_however_long_its_frame_has_waited() -> None:
    """A process that was stopped for ten seconds finds frames from before, which did not happen when it woke."""
    stamps = DriverStamps(Origin(monotonic_ns=1000 * NS, unix_ns=0))
    assert stamps.session_ns(1001 * NS, 20 * NS) is None  # nothing shows yet whose clock that is
    assert stamps.session_ns(1019 * NS, 20 * NS) == 19 * NS
    assert [stamps.session_ns(1000 * NS + s * NS, 40 * NS) for s in (20, 21, 39)] == [20 * NS, 21 * NS, 39 * NS]
    assert stamps.session_ns(1041 * NS, 40 * NS) == 40 * NS  # nothing was taken after it came
    assert [stamps.session_ns(wrong, 41 * NS) for wrong in (0, 1030 * NS, 1_790_000_000 * NS)] == [None] * 3


def test_without_any_clock_the_receipt_counts() -> None:
    moment = FrameClock(0, 1, 100 * MS).update(None, None, 7 * MS)
    assert (moment.t_capture_ns, moment.by, moment.uncertainty_ns) == (7 * MS, "arrival", 100 * MS)


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "said"), [
    ({"device": 0, "file": "a.mp4"}, "Remove the other"), ({"fps": 30}, "rate_hz"), ({"encoding": "h264"}, "one of"),
    ({"encoding": "native", "format": "gray8"}, "passes on"),
    ({"encoding": "native", "device": "http://10.0.0.8/mjpeg", "width": 320}, "set the size in the camera"),
    ({"encoding": "native", "device": "clip.mp4", "height": 240}, "set the size in the camera"),
    ({"pixel_format": "mjpeg"}, "matching"),
    ({"width": 0}, "at least 1"),
])  # fmt: skip
def test_wrong_settings_are_named_without_a_device(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(**given)


@pytest.mark.parametrize(("device", "said"), [
    ("/dev/video99", "is not here; cameras here: "), (98, "is not here; cameras here: "),
    ("No Such Camera", "no camera has `No Such Camera` in its name"), ("clips/none.mp4", "no such file"),
    ("rtsp://user:secret@127.0.0.1:9/x", "//…@127.0.0.1:9/x cannot be opened"), ("http://127.0.0.1:9/", "opened"),
])  # fmt: skip
def test_an_absent_camera_is_named_with_what_to_do(device: int | str, said: str) -> None:
    source = Camera(settings(device=device), CheckContext())
    with pytest.raises(SensorError, match=said) as failed:
        source.open()
    assert "secret" not in str(failed.value)
    source.close()


def test_the_ring_is_made_for_what_will_be_published() -> None:
    assert Camera.largest_payload(settings(width=640, height=480)) == 640 * 480 * 3
    assert Camera.largest_payload(settings(width=640, height=480, format="gray8")) == 640 * 480
    assert Camera.largest_payload(settings(encoding="jpeg")) == 1920 * 1080


# -- files -------------------------------------------------------------------------------------------------------------


def make_clip(path: Path, frames: int = 12, rate: int = 25, size: tuple[int, int] = (160, 120), noise: int = 0) -> Path:
    """A clip whose frame i has the brightness 20 i."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.bit_rate = *size, "yuv420p", 20_000_000
        for i in range(frames):
            picture = np.full((size[1], size[0], 3), 20 * i % 256, np.uint8)
            if noise:
                picture = rng.integers(0, noise, picture.shape, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="bgr24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def play(path: Path, **given: Any) -> tuple[list[Any], CheckContext]:
    context = CheckContext()
    source, found = Camera(settings(file=str(path), **given), context), []
    source.open()
    try:
        while True:
            reading = source.read()
            if reading is not None:
                found.append(reading)
    except EOFError:
        return found, context
    finally:
        source.close()


@pytest.mark.parametrize("given", [{}, {"format": "gray8"}, {"format": "rgb8", "width": 80}, {"encoding": "jpeg"}])
def test_a_file_plays_at_its_own_pace_and_ends(tmp_path: Path, given: dict[str, Any]) -> None:
    clip = make_clip(tmp_path / "clip.mp4")
    found, context = play(clip, max_age_ms=60_000, **given)
    assert len(found) == 12
    steps = np.diff([reading.t_capture_ns for reading in found])
    assert np.abs(steps - 40 * MS).max() < 1000
    assert all(reading.t_receipt_ns >= reading.t_capture_ns for reading in found)
    for i, reading in enumerate(found):
        pixels = view(reading.layout, reading.data)
        if given.get("encoding") == "jpeg":
            pixels = np.asarray(cv2.imdecode(pixels, cv2.IMREAD_COLOR))
        assert abs(float(pixels.mean()) - 20 * i) < 6, i
    expected = FrameLayout("jpeg" if given.get("encoding") else given.get("format", "bgr8"),
                           *((60, 80) if "width" in given else (120, 160)))  # fmt: skip
    assert found[0].layout == expected
    assert context.counted == {}


def test_a_source_from_a_file_keeps_the_contract(tmp_path: Path) -> None:
    check_source(Camera, {"file": str(make_clip(tmp_path / "clip.mp4"))}, readings=5)


def test_fewer_frames_a_second_are_taken_evenly(tmp_path: Path) -> None:
    found, _ = play(make_clip(tmp_path / "clip.mp4", frames=25, rate=50), rate_hz=25, max_age_ms=60_000)
    assert len(found) == 13
    assert set(np.diff([reading.t_capture_ns for reading in found]) // MS) <= {39, 40}


def test_compressed_frames_keep_to_their_limit(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "clip.mp4", frames=60, rate=30, size=(320, 240), noise=255)
    found, _ = play(clip, encoding="jpeg", quality=90, limit_mb_per_min=40, max_age_ms=60_000)
    sizes = [reading.data.nbytes for reading in found]
    assert sizes[0] > 40e6 / 60 / 30
    assert np.mean(sizes[40:]) < 40e6 / 60 / 30 * 1.1


def test_a_damaged_file_is_the_files_fault(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"this is no video" * 100)
    source = Camera(settings(file=str(path)), CheckContext())
    with pytest.raises(SensorError, match="cannot be opened"):
        source.open()


# -- MJPEG over HTTP ---------------------------------------------------------------------------------------------------


class Mjpeg:
    """A server of JPEG files one after another; ``send`` gives it the next one, None ends the answer."""

    def __init__(self, port: int = 0) -> None:
        self.frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        frames = self.frames

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                while (jpeg := frames.get()) is not None:
                    head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                    try:
                        self.wfile.write(head.encode() + jpeg + b"\r\n")
                    except OSError:
                        return

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.thread.start()

    def send(self, level: int) -> bytes:
        picture = np.full((96, 128, 3), level, np.uint8)
        jpeg = cv2.imencode(".jpg", picture)[1].tobytes()
        self.frames.put(jpeg)
        return jpeg

    def close(self) -> None:
        self.frames.put(None)
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def mjpeg() -> Iterator[Mjpeg]:
    server = Mjpeg()
    yield server
    server.close()


@pytest.mark.parametrize("encoding", ["raw", "native"])
def test_mjpeg_over_http_is_decoded_or_passed_on(mjpeg: Mjpeg, encoding: str) -> None:
    sent = [mjpeg.send(50 + i) for i in range(8)]
    made, sender = shell(device=f"http://127.0.0.1:{mjpeg.port}/", encoding=encoding)
    try:
        turn_until(made, lambda: made._open)
        for i in range(4):
            count = len(sender.messages)
            sent.append(mjpeg.send(100 + 20 * i))
            turn_until(made, lambda count=count: len(sender.messages) > count)  # type: ignore[misc]
    finally:
        made.source.close()
    header, data = sender.messages[-1]
    assert header.uncertainty_ns >= 100 * MS
    assert header.t_capture_ns == header.t_receipt_ns
    if encoding == "native":
        assert header.layout == FrameLayout("jpeg", 96, 128)
        assert all(d.tobytes().rstrip(b"\r\n") in sent for _, d in sender.messages)
    else:
        assert header.layout == FrameLayout("bgr8", 96, 128)
        assert min(abs(float(data.mean()) - level) for level in (100, 120, 140, 160)) < 3


def test_a_server_that_falls_silent_is_given_up_and_found_again(mjpeg: Mjpeg) -> None:
    for i in range(6):
        mjpeg.send(i)
    made, sender = shell(device=f"http://127.0.0.1:{mjpeg.port}/", timeout_ms=400)
    try:
        turn_until(made, lambda: len(sender.messages) >= 1)
        turn_until(made, lambda: made._trouble)
        mjpeg.frames.put(None)
        count = len(sender.messages)

        def again() -> bool:
            mjpeg.send(77)
            return len(sender.messages) > count

        turn_until(made, again)
    finally:
        made.source.close()
    assert len({header.epoch for header, _ in sender.messages}) == 2


# -- RTSP --------------------------------------------------------------------------------------------------------------

PACKAGES = ("gstreamer1.0-rtsp gir1.2-gst-rtsp-server-1.0 python3-gi gstreamer1.0-plugins-base "
            "gstreamer1.0-plugins-good gstreamer1.0-plugins-ugly")  # fmt: skip
PROBE = """
import gi
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gst, GstRtspServer
Gst.init(None)
assert all(Gst.ElementFactory.find(n) for n in ("appsrc", "videoconvert", "x264enc", "rtph264pay"))
"""


class Rtsp:
    """The RTSP server of ``rtsp_server.py`` as a process of its own."""

    def __init__(self, port: int = 0) -> None:
        script = Path(__file__).with_name("rtsp_server.py")
        self.process = subprocess.Popen([PYTHON, str(script), str(port)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 30)
        line = self.process.stdout.readline() if ready else ""
        assert line.startswith("READY"), "the RTSP server did not start"
        self.port = int(line.split()[1])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def rtsp() -> Iterator[list[Rtsp]]:
    """A list of servers, with one in it; all are stopped at the end."""
    try:
        probe = subprocess.run([PYTHON, "-c", PROBE], capture_output=True, timeout=60, check=False)
        there = probe.returncode == 0
    except OSError:
        there = False
    if not there:
        pytest.skip(f"no RTSP server here: apt-get install --no-install-recommends {PACKAGES}")
    servers = [Rtsp()]
    yield servers
    for server in servers:
        server.kill()


class Dam:
    """A TCP relay to a port of this machine; while ``open`` is cleared, what comes from there waits."""

    def __init__(self, port: int) -> None:
        self.open = threading.Event()
        self.open.set()
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        try:
            near, _ = self._listener.accept()
            far = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            return
        self._ends += [near, far]
        for source, sink, held in ((near, far, False), (far, near, True)):
            self._threads.append(threading.Thread(target=self._relay, args=(source, sink, held)))
            self._threads[-1].start()

    def _relay(self, source: socket.socket, sink: socket.socket, held: bool) -> None:
        try:
            while data := source.recv(65536):
                if held:
                    self.open.wait()
                sink.sendall(data)
        except OSError:
            pass

    def close(self) -> None:
        self.open.set()
        for end in (self._listener, *self._ends):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        for thread in self._threads:
            thread.join(10)


def coded_ms(pixels: np.ndarray[Any, Any]) -> int:
    """The time code burnt into a picture."""
    row = pixels[pixels.shape[0] // 2, :, 0]
    return sum(1 << bit for bit in range(BITS) if row[8 * bit + 4] > 128)


def by_sender(header: Header) -> bool:
    return header.uncertainty_ns < 60 * MS


@pytest.mark.slow
def test_rtsp_frames_have_their_senders_time_also_after_it_was_restarted(rtsp: list[Rtsp]) -> None:
    made, sender = shell(device=f"rtsp://127.0.0.1:{rtsp[0].port}/camera")
    zero: Origin = host_zero(made.life.clock)
    try:
        turn_until(made, lambda: sum(by_sender(h) for h, _ in sender.messages) > 50)
        rtsp[0].kill()
        turn_until(made, lambda: made._trouble)
        count = len(sender.messages)
        rtsp.append(Rtsp(rtsp.pop().port))
        turn_until(made, lambda: sum(by_sender(h) for h, _ in sender.messages[count:]) > 25)
    finally:
        made.source.close()
    errors = [(h.t_capture_ns + zero.unix_ns) / MS - coded_ms(d) - 0.5 for h, d in sender.messages if by_sender(h)]
    assert np.abs(errors).max() < 5, errors
    for header, pixels in sender.messages:
        error_ns = header.t_capture_ns + zero.unix_ns - coded_ms(pixels) * MS
        assert abs(error_ns) < header.uncertainty_ns
    captures = [h.t_capture_ns for h, _ in sender.messages]
    assert captures == sorted(captures)
    assert len({h.epoch for h, _ in sender.messages[count:]} - {h.epoch for h, _ in sender.messages[:count]}) >= 1


@pytest.mark.slow
def test_rtsp_frames_follow_a_step_of_this_hosts_wall_clock(rtsp: list[Rtsp], monkeypatch: pytest.MonkeyPatch) -> None:
    step, ahead = 300 * MS, wall_ahead_ns
    made, sender = shell(device=f"rtsp://127.0.0.1:{rtsp[0].port}/camera")
    zero = host_zero(made.life.clock)
    try:
        turn_until(made, lambda: sum(by_sender(h) for h, _ in sender.messages) > 20)
        epoch = sender.messages[-1][0].epoch
        monkeypatch.setattr(ffmpeg, "host_zero", lambda _: Origin(zero.monotonic_ns, zero.unix_ns + step))
        monkeypatch.setattr(ffmpeg, "wall_ahead_ns", lambda: ahead() + step)
        turn_until(made, lambda: sender.messages[-1][0].epoch > epoch)
    finally:
        made.source.close()
    header, pixels = sender.messages[-1]
    assert by_sender(header)
    assert abs(header.t_capture_ns + zero.unix_ns + step - coded_ms(pixels) * MS) < 5 * MS


@pytest.mark.slow
def test_frames_that_a_stall_made_old_are_dropped_and_counted(rtsp: list[Rtsp]) -> None:
    dam = Dam(rtsp[0].port)
    made, sender = shell(device=f"rtsp://127.0.0.1:{dam.port}/camera", max_age_ms=400, timeout_ms=10_000)
    try:
        turn_until(made, lambda: sum(by_sender(h) for h, _ in sender.messages) > 20)
        dam.open.clear()
        end = made.life.clock.now_ns() + 1500 * MS
        turn_until(made, lambda: made.life.clock.now_ns() > end)
        dam.open.set()
        count = len(sender.messages)
        turn_until(made, lambda: len(sender.messages) > count + 20)
    finally:
        made.source.close()
        dam.close()
    assert made.context.dropped.get("stale", 0) > 0, made.context.dropped
    published = [h for h, _ in sender.messages if by_sender(h)]
    assert max(h.t_receipt_ns - h.t_capture_ns for h in published) <= 400 * MS
    assert made.failures == 0
