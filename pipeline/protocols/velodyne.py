"""Velodyne's data packets (UDP, 1206 bytes) to sweeps: VLP-16, Puck Hi-Res, VLP-32, HDL-32, HDL-64, VLS-128.

The packets themselves are decoded by velodyne-decoder; this adds the time. A packet states when its first laser fired,
in microseconds since the full hour on the sensor's clock; it is sent when its last laser has fired. A sweep ends with
its last point. Not every packet's receipt need be known: the sensor's clock is followed by some of them a second, and
tells the time of the others.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, SensorError, WireError
from pipeline.protocols.sweeps import Allocate, Array, Sweep, fresh
from pipeline.timebase import Timebase

PACKET_BYTES = 1206
MODELS = ("HDL64E_S1", "HDL64E_S2", "HDL64E_S3", "HDL32E", "VLP32A", "VLP32B", "VLP32C", "VLP16", "PuckHiRes", "VLS128")
"""The names that velodyne-decoder uses."""
FOLLOW_NS = 40_000_000
"""The sensor's clock is followed this often at least: it takes some hundred receipts to know its rate."""

_BANKS = (0xEE, 0xDD)
_STAMP = struct.Struct("<I")
_HOUR_US = 3_600_000_000
_JUMP_NS = 1_000_000_000
_DUAL = 0x39
# How long the lasers of a packet fire, in ns: blocks (half of them where each is sent twice) x the cycle of a block.
_SPANS_NS = {0x21: 552_960, 0x22: 1_327_104, 0x24: 1_327_104, 0x28: 663_552, 0xA1: 159_900}
_PLACE, _SECONDS = np.dtype("V16"), np.dtype("<f4")
"""A point as the decoder leaves it begins so: x, y, z and intensity, which are moved as one piece, and the time."""
_LAYOUT = [(name, np.dtype("<f4"), 4 * i) for i, name in enumerate(("x", "y", "z", "intensity", "time"))]
_DECODER, _TESTED = "velodyne-decoder", "3.1.0"


class Velodyne:
    """Packets of one sensor in, sweeps out. Without a ``model`` the packets tell, but for the HDL-64E.

    ``partial`` counts the sweeps that were thrown away because the sensor had turned already when the first packet
    came; ``malformed`` what was no packet. A packet that is lost on the way is a hole in its sweep.
    """

    def __init__(self, model: str | None = None, calibration: Path | None = None, min_range_m: float = 0.1,
                 max_range_m: float = 200.0, allocate: Allocate = fresh) -> None:  # fmt: skip
        """``allocate`` gives the memory that a sweep's points are written to."""
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
        self._hours = 0
        self._last_us: int | None = None
        self._mapped = self._new_epoch = False
        self._refused: WireError | None = None
        self._allocate = allocate
        # Of the last packet whose receipt is known: how far the session's clock is ahead of the sensor's, the receipt
        # itself and the sensor's time of it; and the sensor's time of the last packet.
        self._ahead_ns = self._uncertainty_ns = self._receipt_ns = self._known_ns = self._device_last_ns = 0
        self._start()

    def _start(self) -> None:
        self._decoder = self._library.StreamDecoder(self._config)
        self._whole = False

    def feed(self, packet: bytes, receipt_ns: int | None) -> Sweep | None:
        """Takes a packet and when it was received (session time; None if that is not known, which it must be of the
        first). Returns the sweep that ended with it, if any. WireError if the decoder cannot tell what sensor
        sends."""
        return next(iter(self.take((packet,), lambda _: receipt_ns)), None)

    def take(self, packets: Sequence[bytes], received_ns: Callable[[int], int | None]) -> list[Sweep]:
        """The same for packets that came together. ``received_ns`` tells when the one of that number was received, and
        is asked only of the first that is a packet and of one every ``FOLLOW_NS``. Where one cannot be decoded, the
        sweeps that were whole before it are returned, and the error is raised by the next call."""
        refused, self._refused = self._refused, None
        if refused is not None:
            raise refused
        self.packets += len(packets)
        found, asked = list[Sweep](), False
        for index, packet in enumerate(packets):
            if len(packet) != PACKET_BYTES or packet[1] not in _BANKS:
                self.malformed += 1
                continue
            ask = not asked or self._device_last_ns - self._known_ns >= FOLLOW_NS
            receipt_ns, asked = received_ns(index) if ask else None, True
            try:
                sweep = self._take(packet, receipt_ns)
            except WireError as error:
                if not found:
                    raise
                self._refused = error
                break
            if sweep is not None:
                found.append(sweep)
        return found

    def _take(self, packet: bytes, receipt_ns: int | None) -> Sweep | None:
        device_ns = self._device_ns(packet)
        if receipt_ns is None:
            if abs(device_ns - self._device_last_ns) > _JUMP_NS:
                self._start()  # points on both sides of a jump make no sweep; the next receipt tells how far it went
        elif self._map(device_ns + _span_ns(packet), receipt_ns):
            self._new_epoch = True
            self._start()
        self._device_last_ns = device_ns
        try:
            # The decoder finds the hour by this time, and cannot tell one before 0. Into a list it would turn the bytes
            # itself, more slowly; and its own records it would copy to columns.
            done = self._decoder.decode(max(device_ns + self._ahead_ns, 1) / 1e9, list(packet), True)
        except (RuntimeError, ValueError) as error:
            raise WireError(
                f"the Velodyne's packets cannot be decoded: {str(error).rstrip('.')}. Set `model`, one of "
                f"{', '.join(MODELS)}."
            ) from error
        if done is None:
            return None
        stamps, cloud = done
        if not self._whole:
            _check_layout(cloud.dtype)
            self._whole, self.partial = True, self.partial + 1
            return None
        receipt = self._receipt_ns + max(device_ns + _span_ns(packet) - self._known_ns, 0)
        return self._sweep(stamps, cloud, receipt)

    def _map(self, device_end_ns: int, receipt_ns: int) -> bool:
        """Follows the sensor's clock by the end of a packet, which is what its receipt can tell about. Whether the
        clock has jumped."""
        mapped = self._times.update(device_end_ns, receipt_ns)
        first, self._mapped = not self._mapped, True
        self._ahead_ns, self._uncertainty_ns = mapped.t_capture_ns - device_end_ns, mapped.uncertainty_ns
        self._receipt_ns, self._known_ns = receipt_ns, device_end_ns
        return mapped.new_epoch and not first

    def _sweep(self, stamps: Any, cloud: Array, receipt_ns: int) -> Sweep | None:
        """The points as they are published; written once into the memory where they stay."""
        if not len(cloud):  # nothing but sky; without a point there is no end
            return None
        count, strides = len(cloud), cloud.strides
        points = self._allocate(count)
        places: Array = np.ndarray(count, _PLACE, points, 0, points.strides)
        places[:] = np.ndarray(count, _PLACE, cloud, 0, strides)
        seconds = np.ndarray(count, _SECONDS, cloud, _PLACE.itemsize, strides).astype(np.float64)
        end = float(seconds.max())
        seconds -= end
        seconds *= 1e9
        points["offset_ns"] = np.rint(seconds, out=seconds)
        new_epoch, self._new_epoch = self._new_epoch, False
        ahead = round(end * 1e9)
        return Sweep(points, round(stamps.host * 1e9) + ahead, round(stamps.device * 1e9) + ahead, receipt_ns,
                     self._uncertainty_ns, new_epoch)  # fmt: skip

    def _device_ns(self, packet: bytes) -> int:
        """The packet's stamp, the hours counted."""
        us: int = _STAMP.unpack_from(packet, 1200)[0]
        gone = 0 if self._last_us is None else us - self._last_us
        if abs(gone) > _HOUR_US // 2:
            self._hours += 1 if gone < 0 else -1  # back: a packet was overtaken by the hour's first
        self._last_us = us
        return int((self._hours * _HOUR_US + us) * 1000)


def _check_layout(record: np.dtype[Any]) -> None:
    """SensorError unless the decoder leaves points as ``_PLACE`` and ``_SECONDS`` have it."""
    fields: Mapping[str, Any] = record.fields or {}
    if [(name, *fields[name][:2]) for name, _, _ in _LAYOUT if name in fields] != _LAYOUT:
        raise SensorError(
            f"{_DECODER} {version(_DECODER)}, which is installed, lays points out in a way that is not known here: "
            f"{record}. Install the one that is: pip install {_DECODER}=={_TESTED}"
        )


def _span_ns(packet: bytes) -> int:
    span = _SPANS_NS.get(packet[1205], 0)
    return span // 2 if packet[1204] == _DUAL else span
