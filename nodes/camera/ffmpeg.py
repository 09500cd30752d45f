"""What FFmpeg opens: a video file, and streams of the network."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nodes.camera.shots import MS, NS, OPEN_S, PERIOD_NS, WAIT_NS, Array, Shot, shown
from pipeline.clock import wall_ahead_ns
from pipeline.errors import SensorError
from pipeline.hosttime import FrameClock, host_zero, prft_unix_ns
from pipeline.messages import FrameLayout
from pipeline.source import SourceContext

_KEPT = 2
"""Decoded frames that wait for ``read``: one, and one more for a hiccup."""
_CORRUPT = 200
_STEP_NS = 2 * MS
_AV_FORMAT = {"bgr8": "bgr24", "rgb8": "rgb24", "gray8": "gray"}


def _fill(image: Any, layout: FrameLayout, out: Array) -> None:
    """An FFmpeg frame as ``layout`` says: converted and scaled in one pass, then copied without FFmpeg's padding."""
    made = image.reformat(width=layout.width, height=layout.height, format=_AV_FORMAT[layout.format])
    plane = made.planes[0]
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
    np.copyto(out.reshape(layout.height, -1), rows[:, : out.nbytes // layout.height])


def _open_av(url: str, settings: Any, **more: Any) -> tuple[Any, Any]:
    """FFmpeg's container and its first video stream. Raises SensorError."""
    import av

    try:
        container = av.open(url, **more)
    except (OSError, ValueError, av.error.FFmpegError) as error:
        raise SensorError(f"{shown(url)} cannot be opened: {_why(error)}.") from error
    if not container.streams.video:
        container.close()
        raise SensorError(f"{shown(url)} has no video in it.")
    stream = container.streams.video[0]
    if settings.encoding == "native" and stream.codec_context.name != "mjpeg":
        container.close()
        raise SensorError(
            f"{shown(url)} sends {stream.codec_context.name}, no JPEG files that could be passed on; "
            "use `encoding: jpeg`."
        )
    return container, stream


def _why(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return "it does not answer in time" if "exit" in text.lower() else str(text)


class File:
    """A video file, played at its own pace. Ends with EOFError."""

    def __init__(self, path: Path, settings: Any, context: SourceContext) -> None:
        self.dropped = 0
        self._clock = context.clock
        self._container, stream = _open_av(str(path), settings)
        stream.thread_type = "AUTO"
        self.size = (stream.codec_context.width, stream.codec_context.height)
        self._native = settings.encoding == "native"
        self._frames = self._pictures(stream)
        self._period_ns = round(NS / (stream.average_rate or 25))
        self._next: Any = None
        self._begin_ns: int | None = None
        self._stamp_ns = 0

    def _pictures(self, stream: Any) -> Iterator[tuple[int | None, Any]]:
        """Every picture with its stamp in ns."""
        if self._native:
            for packet in self._container.demux(stream):
                if packet.size:
                    yield _stamp(packet), bytes(packet)
            return
        for frame in self._container.decode(stream):
            yield _stamp(frame), frame

    def shot(self) -> Shot | None:
        import av

        now = self._clock.now_ns()
        if self._next is None:
            try:
                stamp, image = next(self._frames)
            except StopIteration:
                raise EOFError from None
            except av.error.FFmpegError as error:
                raise SensorError(f"the file {self._container.name} is damaged: {_why(error)}.") from error
            self._stamp_ns = self._stamp_ns + self._period_ns if stamp is None else stamp
            if self._begin_ns is None:
                self._begin_ns = now - self._stamp_ns
            self._next = image
        assert self._begin_ns is not None
        due = self._begin_ns + self._stamp_ns
        if due > now and not (self._clock.wait_until(min(due, now + WAIT_NS)) and self._clock.now_ns() >= due):
            return None
        image, self._next = self._next, None
        now = self._clock.now_ns()
        return Shot(t_capture_ns=due, t_receipt_ns=now, t_device_ns=self._stamp_ns, late_ns=now - due, image=image)

    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None:
        _fill(shot.image, layout, out)

    def jpeg(self, shot: Shot) -> Array:
        return np.frombuffer(shot.image, np.uint8)

    def close(self) -> None:
        self._container.close()


def _stamp(of: Any) -> int | None:
    """The stamp of a packet or a frame in ns on its stream's clock."""
    return None if of.pts is None else int(of.pts * of.time_base * NS)


class Network:
    """RTSP, or MJPEG over HTTP. A thread receives and decodes, because FFmpeg blocks; the newest frames are kept."""

    def __init__(self, url: str, settings: Any, context: SourceContext) -> None:
        self.dropped = 0
        self.size = (0, 0)
        self._url, self._settings, self._context = url, settings, context
        self._native = settings.encoding == "native"
        self._zero = host_zero(context.clock)
        self._times = FrameClock(self._zero.unix_ns, round(settings.sender_error_ms * MS),
                                 round(settings.arrival_error_ms * MS), settings.max_age_ms * MS)  # fmt: skip
        self._shots: deque[Shot] = deque()
        self._changed = threading.Condition()
        self._error: SensorError | None = None
        self._stopped = self._opened = False
        self._came_ns = self._rush_ns = 0
        self._usual_ns = float(PERIOD_NS)
        self._thread = threading.Thread(target=self._run, name="camera", daemon=True)
        self._thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._opened or self._error is not None, OPEN_S + 1)
            if self._error is not None or not self._opened:
                self._stopped = True
                raise self._error or SensorError(f"{shown(url)} does not answer.")

    def shot(self) -> Shot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._shots or self._error, WAIT_NS / NS)
            if self._shots:
                return self._shots.popleft()
            if self._error is not None:
                raise self._error
            return None

    def fill(self, shot: Shot, layout: FrameLayout, out: Array) -> None:
        _fill(shot.image, layout, out)

    def jpeg(self, shot: Shot) -> Array:
        return np.frombuffer(shot.image, np.uint8)

    def close(self) -> None:
        self._stopped = True
        self._thread.join(WAIT_NS / NS)  # it ends by itself at the driver's time limit at the latest

    # -- in the thread -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            self._receive()
            error = SensorError(f"{shown(self._url)}: the stream ended; its server was stopped.")
        except SensorError as failed:
            error = failed
        except Exception as failed:  # FFmpeg's errors are of many kinds; all of them mean the same here
            error = SensorError(f"{shown(self._url)} fails: {_why(failed)}.")
        with self._changed:
            self._error = error
            self._changed.notify()

    def _receive(self) -> None:
        import av

        options = {"fflags": "nobuffer", "analyzeduration": "500000"}
        if self._url.startswith("rtsp"):
            options |= {"rtsp_transport": self._settings.rtsp_transport, "max_delay": "100000"}
        limits = (OPEN_S, self._settings.timeout_ms / 1000)
        container, stream = _open_av(self._url, self._settings, options=options, timeout=limits)
        corrupt = 0
        with container:
            stream.codec_context.flags |= av.codec.context.Flags.low_delay
            stream.thread_type = "SLICE"
            for packet in container.demux(stream):
                if self._stopped:
                    return
                if not packet.size:
                    continue
                receipt = self._context.clock.now_ns()
                try:
                    self._take(packet, receipt)
                    corrupt = 0
                except av.error.InvalidDataError:  # before the first key frame, or after a loss
                    corrupt += 1
                    if corrupt > _CORRUPT:
                        raise

    def _take(self, packet: Any, receipt_ns: int) -> None:
        """Decodes a packet; low-delay decoding gives its picture at once, or (B-frames) an older one's."""
        sender = next((prft_unix_ns(bytes(d)) for d in packet.iter_sidedata() if d.data_type == "prft"), None)
        if self._native:
            self._put(packet, bytes(packet), sender, receipt_ns)
            return
        mine = _stamp(packet)
        for frame in packet.decode():
            stamp = _stamp(frame)
            # The sender's clock and RTP time run together, so that an older picture is as much older on both.
            moved = 0 if stamp is None or mine is None else stamp - mine
            self._put(frame, frame, None if sender is None else sender + moved, receipt_ns)

    def _put(self, stamped: Any, image: Any, sender_ns: int | None, receipt_ns: int) -> None:
        stamp = _stamp(stamped) if self._url.startswith("rtsp") else None
        self._follow_wall()
        moment = self._times.update(stamp, sender_ns, receipt_ns)
        late = self._rush(receipt_ns) if moment.by == "arrival" else moment.late_ns
        shot = Shot(
            t_capture_ns=moment.t_capture_ns, t_receipt_ns=receipt_ns, t_device_ns=sender_ns or stamp,
            uncertainty_ns=moment.uncertainty_ns, new_epoch=moment.new_epoch, late_ns=late,
            image=image,
        )  # fmt: skip
        with self._changed:
            if not self._opened:
                layout = stamped.stream.codec_context if self._native else stamped
                self.size, self._opened = (layout.width, layout.height), True
            self._shots.append(shot)
            while len(self._shots) > _KEPT:
                self._shots.popleft()
                self.dropped += 1
            self._changed.notify()

    def _follow_wall(self) -> None:
        """Notices a step of this host's wall clock, which the sender's is compared with."""
        if abs(wall_ahead_ns() - (self._zero.unix_ns - self._zero.monotonic_ns)) <= _STEP_NS:
            return
        before, self._zero = self._zero, host_zero(self._context.clock)
        if abs(self._zero.unix_ns - before.unix_ns) > _STEP_NS:  # else this thread was stopped between two readings
            self._times.wall_was_set(self._zero.unix_ns)

    def _rush(self, receipt_ns: int) -> int:
        """How old a frame without any clock may be: what comes in a rush after a stall is as old as the stall."""
        gap = receipt_ns - self._came_ns if self._came_ns else 0
        self._came_ns = receipt_ns
        if gap > self._settings.max_age_ms * MS:
            self._rush_ns = gap
        elif gap > self._usual_ns / 3:
            self._rush_ns = 0
            self._usual_ns += (gap - self._usual_ns) / 16
        return self._rush_ns
