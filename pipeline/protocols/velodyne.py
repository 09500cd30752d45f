"""Velodyne's data packets (UDP, 1206 bytes) to sweeps: VLP-16, Puck Hi-Res, VLP-32, HDL-32, HDL-64, VLS-128.

The packets themselves are decoded by velodyne-decoder; this adds the time. A packet states when its first laser fired,
in microseconds since the full hour on the sensor's clock; it is sent when its last laser has fired. A sweep ends with
its last point.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, WireError
from pipeline.protocols.sweeps import Sweep, make_points
from pipeline.timebase import Timebase

PACKET_BYTES = 1206
MODELS = ("HDL64E_S1", "HDL64E_S2", "HDL64E_S3", "HDL32E", "VLP32A", "VLP32B", "VLP32C", "VLP16", "PuckHiRes", "VLS128")
"""The names that velodyne-decoder uses."""

_HOUR_US = 3_600_000_000
_DUAL = 0x39
# How long the lasers of a packet fire, in ns: blocks (half of them where each is sent twice) x the cycle of a block.
_SPANS_NS = {0x21: 552_960, 0x22: 1_327_104, 0x24: 1_327_104, 0x28: 663_552, 0xA1: 159_900}


class Velodyne:
    """Packets of one sensor in, sweeps out. Without a ``model`` the packets tell, but for the HDL-64E.

    ``partial`` counts the sweeps that were thrown away because the sensor had turned already when the first packet
    came; ``malformed`` what was no packet. A packet that is lost on the way is a hole in its sweep.
    """

    def __init__(self, model: str | None = None, calibration: Path | None = None, min_range_m: float = 0.1,
                 max_range_m: float = 200.0) -> None:  # fmt: skip
        import velodyne_decoder

        self._library = velodyne_decoder
        chosen = None if model is None else getattr(velodyne_decoder.Model, model)
        try:
            table = None if calibration is None else velodyne_decoder.Calibration.read(str(calibration))
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(
                f"{calibration} is no calibration of a Velodyne: {error}. It is a YAML file, made from the sensor's "
                "db.xml; leave `calibration` out to use the one that the decoder brings along."
            ) from error
        self._config = velodyne_decoder.Config(
            model=chosen, calibration=table, min_range=min_range_m, max_range=max_range_m
        )
        self.partial = self.malformed = self.packets = 0
        self._times = Timebase(resolution_ns=1000)
        self._hours, self._last_us = 0, 0
        self._new_epoch = False
        self._start()

    def _start(self) -> None:
        self._decoder = self._library.StreamDecoder(self._config)
        self._whole = False

    def feed(self, packet: bytes, receipt_ns: int) -> Sweep | None:
        """Takes a packet and when it was received (session time). Returns the sweep that ended before it, if any.
        WireError if the decoder cannot tell what sensor sends."""
        self.packets += 1
        if len(packet) != PACKET_BYTES or packet[1] not in (0xEE, 0xDD):
            self.malformed += 1
            return None
        device_ns, span = self._device_ns(packet), _span_ns(packet)
        # The end of the packet is what the receipt can tell about; the decoder wants its beginning.
        mapped = self._times.update(device_ns + span, receipt_ns)
        if mapped.new_epoch and self.packets > self.malformed + 1:  # points on both sides of a jump make no sweep
            self._new_epoch = True
            self._start()
        try:
            done = self._decoder.decode((mapped.t_capture_ns - span) / 1e9, packet)
        except (RuntimeError, ValueError) as error:
            raise WireError(
                f"the Velodyne's packets cannot be decoded: {str(error).rstrip('.')}. Set `model`, one of "
                f"{', '.join(MODELS)}."
            ) from error
        if done is None:
            return None
        if not self._whole:
            self._whole, self.partial = True, self.partial + 1
            return None
        stamps, cloud = done
        return self._sweep(stamps, cloud, receipt_ns, mapped.uncertainty_ns)

    def _sweep(self, stamps: Any, cloud: np.ndarray[Any, Any], receipt_ns: int, uncertainty_ns: int) -> Sweep | None:
        if not len(cloud):  # nothing but sky; without a point there is no end
            return None
        seconds = cloud[:, 4].astype(np.float64)
        end = float(seconds.max())
        new_epoch, self._new_epoch = self._new_epoch, False
        offsets = np.round((seconds - end) * 1e9).astype(np.int32)
        points = make_points(cloud[:, :3], cloud[:, 3], offsets)
        ahead = round(end * 1e9)
        return Sweep(points, round(stamps.host * 1e9) + ahead, round(stamps.device * 1e9) + ahead, receipt_ns,
                     uncertainty_ns, new_epoch)  # fmt: skip

    def _device_ns(self, packet: bytes) -> int:
        """The packet's stamp, the hours counted."""
        us = int.from_bytes(packet[1200:1204], "little")
        if us < self._last_us - _HOUR_US // 2:
            self._hours += 1
        self._last_us = us
        return (self._hours * _HOUR_US + us) * 1000


def _span_ns(packet: bytes) -> int:
    span = _SPANS_NS.get(packet[1205], 0)
    return span // 2 if packet[1204] == _DUAL else span
