"""Ouster's LiDAR packets (UDP) to sweeps, through the vendor's own SDK (extra ``ouster``).

A packet holds some columns, each with the sensor's stamp in ns; the last valid one of them is what the receipt tells
about (at the edges of an azimuth window some are not, and their stamp is any number). A sweep ends with its last valid
column. Points are in the sensor frame, one for each first return; intensity is the calibrated reflectivity.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConfigError, SensorError, absent, install
from pipeline.protocols.sweeps import Sweep, make_points
from pipeline.timebase import Mapped, Timebase

_FETCH = "Fetch them from the sensor: curl http://SENSOR/api/v1/sensor/metadata -o ouster.json"


class Ouster:
    """Packets of one sensor in, sweeps out. ``frame`` is the last whole frame as the SDK gives it, with every field."""

    def __init__(self, metadata: Path) -> None:
        try:
            core: Any = importlib.import_module("ouster.sdk.core")
        except ImportError as error:
            raise SensorError(
                f"an Ouster needs its vendor's SDK, which cannot be imported: {error}. {install('ouster')}"
            ) from error
        self._core = core
        try:
            self._info = core.SensorInfo(metadata.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{absent(metadata)} {_FETCH}") from None
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{metadata} does not hold the metadata of an Ouster: {error}. {_FETCH}") from error
        self._format = core.PacketFormat(self._info)
        self._project = core.XYZLut(self._info)
        self._batcher = core.FrameBatcher(self._info)
        self._building = core.LidarFrame(self._info)
        self._times = Timebase()
        self._stamps: list[tuple[int, Mapped]] = []
        self._newest: Mapped | None = None
        self.frame: Any = None
        self.partial = self.malformed = self.packets = 0
        self._new_epoch = False

    @property
    def packet_bytes(self) -> int:
        """The size of a packet of points."""
        return int(self._format.lidar_packet_size)

    @property
    def imu_bytes(self) -> int:
        """The size of a packet of the sensor's IMU; 0 where packets hold several samples, which are not read here."""
        return int(self._format.imu_packet_size) if self._format.imu_measurements_per_packet <= 1 else 0

    @property
    def product(self) -> str:
        return str(self._info.prod_line)

    def imu(self, packet: bytes) -> tuple[int, np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """The sensor's stamp in ns, acceleration [3] in g and angular rate [3] in deg/s of a packet of its IMU."""
        form, raw = self._format, np.frombuffer(packet, np.uint8)
        accel = [form.imu_la_x(raw), form.imu_la_y(raw), form.imu_la_z(raw)]
        gyro = [form.imu_av_x(raw), form.imu_av_y(raw), form.imu_av_z(raw)]
        return int(form.imu_gyro_ts(raw)), np.array(accel), np.array(gyro)

    def take(self, packets: Sequence[bytes], received_ns: Callable[[int], int]) -> list[Sweep]:
        """Takes packets that came together; ``received_ns`` tells when the one of that number was received."""
        found = (self.feed(packet, received_ns(index)) for index, packet in enumerate(packets))
        return [sweep for sweep in found if sweep is not None]

    def feed(self, packet: bytes, receipt_ns: int) -> Sweep | None:
        """Takes a packet and when it was received (session time). Returns the sweep that it completes, if any."""
        core = self._core
        self.packets += 1
        if len(packet) != self._format.lidar_packet_size:
            self.malformed += 1
            return None
        raw = np.frombuffer(packet, np.uint8)
        held = core.LidarPacket(self._format)
        held.buf[:] = raw
        held.host_timestamp = max(receipt_ns, 1)
        valid = (self._format.packet_header(core.ColHeader.STATUS, raw) & 1).astype(bool)
        stamps = self._format.packet_header(core.ColHeader.TIMESTAMP, raw)[valid]
        if len(stamps):
            mapped = self._times.update(int(stamps[-1]), receipt_ns)
            self._new_epoch |= mapped.new_epoch and self._newest is not None
            self._newest = mapped
            self._stamps.append((int(stamps[-1]), mapped))
        if not self._batcher.batch(held, self._building):
            return None
        self.frame, self._building = self._building, core.LidarFrame(self._info)
        return self._sweep(receipt_ns)

    def _sweep(self, receipt_ns: int) -> Sweep | None:
        frame, core = self.frame, self._core
        valid = (frame.status & 1).astype(bool)
        if not valid.any() or self._newest is None:
            return None
        end = int(frame.timestamp[valid].max())
        mapped = next((m for stamp, m in reversed(self._stamps) if stamp <= end), self._newest)
        self._stamps = [s for s in self._stamps if s[0] > end]
        distance = frame.field(core.ChanField.RANGE)
        seen = (distance > 0) & valid
        field = core.ChanField.REFLECTIVITY
        light = frame.field(field) if field in frame.fields else frame.field(core.ChanField.SIGNAL)
        offsets = np.broadcast_to(frame.timestamp.astype(np.int64) - end, distance.shape)
        points = make_points(self._project(distance)[seen], light[seen], offsets[seen])
        new_epoch, self._new_epoch = self._new_epoch, False
        return Sweep(points, mapped.t_capture_ns, end, receipt_ns, mapped.uncertainty_ns, new_epoch)
