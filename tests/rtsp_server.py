"""An RTSP server with a time code burnt into its picture; run by the system's Python, which has GStreamer's bindings.

    /usr/bin/python3 rtsp_server.py PORT      prints READY PORT; PORT 0: a free one

The picture is 42 bars of 8 pixels: bit b of the Unix time in ms at which the frame was made, white for 1.
"""

from __future__ import annotations

import sys
import time

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import GLib, Gst, GstRtspServer  # noqa: E402

WIDTH, HEIGHT, RATE, BITS = 336, 240, 25, 42
LAUNCH = (
    "( appsrc name=source is-live=true format=time do-timestamp=true "
    f"caps=video/x-raw,format=GRAY8,width={WIDTH},height={HEIGHT},framerate={RATE}/1 ! videoconvert ! "
    "video/x-raw,format=I420 ! "
    f"x264enc tune=zerolatency speed-preset=ultrafast key-int-max={RATE} ! "
    "rtph264pay name=pay0 pt=96 config-interval=1 )"
)


def configure(factory: object, media: GstRtspServer.RTSPMedia) -> None:
    source = media.get_element().get_by_name("source")

    def push() -> bool:
        now = time.time_ns() // 1_000_000  # noqa: TID251  the wall clock is what a sender's reports are about
        row = b"".join(bytes([255 if now >> bit & 1 else 0]) * 8 for bit in range(BITS))
        return bool(source.emit("push-buffer", Gst.Buffer.new_wrapped(row * HEIGHT)) == Gst.FlowReturn.OK)

    GLib.timeout_add(1000 // RATE, push)


def main() -> None:
    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(sys.argv[1])
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(LAUNCH)
    factory.set_shared(True)
    factory.connect("media-configure", configure)
    server.get_mount_points().add_factory("/camera", factory)
    if not server.attach(None):
        sys.exit(f"port {sys.argv[1]} cannot be bound")
    print("READY", server.get_bound_port(), flush=True)
    GLib.MainLoop().run()


if __name__ == "__main__":
    main()
