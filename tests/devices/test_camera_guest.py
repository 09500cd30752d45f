"""A V4L2 camera of the kernel's own (vivid): times, sizes, unplugging."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest

from nodes.camera import Camera, usb_cameras
from pipeline.checks import CheckContext, check_source
from pipeline.errors import SensorError
from pipeline.messages import FrameLayout
from tests.test_camera import MS, settings, shell, turn_until

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        not any("vivid" in name for name in usb_cameras().values()), reason="no vivid camera: modprobe vivid"
    ),
]


def test_driver_stamps_become_capture_times_and_never_lie_ahead_of_receipt() -> None:
    made, sender = shell(device="vivid", width=320, height=180, rate_hz=30)
    try:
        turn_until(made, lambda: len(sender.messages) > 30, 120)
    finally:
        made.source.close()
    headers = [header for header, _ in sender.messages]
    assert headers[0].layout == FrameLayout("bgr8", 180, 320)
    assert all(header.t_capture_ns <= header.t_receipt_ns for header in headers)
    assert all(header.t_device_ns is not None for header in headers)
    assert all(b.t_capture_ns > a.t_capture_ns for a, b in itertools.pairwise(headers))
    assert len({header.epoch for header in headers}) == 1
    # The stamps that lay in the past were kept as the driver gave them.
    offsets = {h.t_device_ns - h.t_capture_ns for h in headers if h.t_capture_ns < h.t_receipt_ns and h.t_device_ns}
    assert max(offsets) - min(offsets) < MS if offsets else True


def test_an_unplugged_camera_opens_a_new_epoch_when_it_returns() -> None:
    if shutil.which("v4l2-ctl") is None:
        pytest.skip("no v4l2-ctl: apt-get install v4l-utils")
    made, sender = shell(device="/dev/video0")
    try:
        turn_until(made, lambda: len(sender.messages) > 5, 120)
        subprocess.run(["v4l2-ctl", "-d", "/dev/video0", "-c", "disconnect=1"], check=True, capture_output=True)
        turn_until(made, lambda: "unplugged" in made._trouble, 120)
        count = len(sender.messages)
        turn_until(made, lambda: len(sender.messages) > count + 5, 120)
    finally:
        made.source.close()
    assert len({header.epoch for header, _ in sender.messages}) == 2


@pytest.mark.parametrize("given", [{"encoding": "jpeg"}, {"format": "gray8", "width": 100}, {"format": "rgb8"}])
def test_every_encoding_keeps_the_contract(given: dict[str, object]) -> None:
    check_source(Camera, {"device": 0, **given}, readings=4, turns=100_000)  # it may say at once that none is there yet


def test_what_the_device_lacks_is_said() -> None:
    source = Camera(settings(device=0, encoding="native"), CheckContext())
    with pytest.raises(SensorError, match=r"does not give the pixel format MJPG but .*encoding: jpeg"):
        source.open()
    source.close()
