"""The whole simulation as a session: what the four sensors of a seed's world say, with the truth, tick by tick.

Each stream has its own delay, jitter, drift of its clock and small constant error of its stamps, within the uncertainty
that its headers state; what is sent when follows from the seed alone, never from the host. Beside the sensors there is
``pose``, a signal that is no sensor: where the rover really is, and the force that hit it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from pipeline.messages import (
    IMU_DTYPE,
    AudioLayout,
    FrameLayout,
    ImuLayout,
    Layout,
    Message,
    Payload,
    SignalLayout,
    SweepLayout,
    signal_dtype,
)
from pipeline.recording import Label
from pipeline.sim.camera import HEIGHT, WIDTH, Camera
from pipeline.sim.cues import SENSORS
from pipeline.sim.lidar import Lidar
from pipeline.sim.ranges import RANGES, Drawn, Name, draw
from pipeline.sim.rover import TICK_S, Array, Rover
from pipeline.sim.script import Script, Spell
from pipeline.sim.sound import BLOCK, RATE_HZ, Sound
from pipeline.sim.stage import Stage
from pipeline.sim.world import TIMESTEP_S, model_xml
from pipeline.source import Reading
from pipeline.stamper import Stamper

STREAMS: dict[str, Payload] = {
    "camera": "frame",
    "microphone": "audio",
    "imu": "imu",
    "lidar": "sweep",
    "pose": "signal",
}
POSE = ("x_m", "y_m", "z_m", "roll_rad", "pitch_rad", "yaw_rad", "speed_m_s", "force_n")
"""``force_n`` is the greatest force of the ball on the rover since the last sample."""
FRAME_TICKS, BLOCK_TICKS, POSE_TICKS, BATCH_TICKS = 8, 2, 2, 5
"""Ticks of 10 ms between pictures, blocks and poses; and in a batch of IMU samples."""
POSES = 5
LABEL_TICKS = 20
BEAT_TICKS = 10
TICK_NS = round(TICK_S * 1e9)
Item = tuple[int, Message | Label]
"""When it arrives, in ns, and what."""


class Outlet:
    """One stream's way to the host: its clock, its delay, and whether it is out of order."""

    def __init__(self, stream: str, world: Drawn, ranges: Name, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64([seed, 9, list(STREAMS).index(stream)]))
        self.stamper = Stamper(stream, STREAMS[stream])
        self.stamper.open(0)
        spread = RANGES[ranges]
        sensor = stream in SENSORS
        self._delay_ns = round(self._rng.uniform(*spread.delay_ms) * 1e6) if sensor else 0
        self._jitter_ns = world.delay_jitter_ms * 1e6 if sensor else 0.0
        self._error_ns = round(self._rng.uniform(*spread.stamp_error_ms) * 1e6) if sensor else 0
        self._uncertainty_ns = round(spread.stamp_error_ms[1] * 1e6) if sensor else 0
        self._drift = self._rng.uniform(*spread.drift_ppm) * 1e-6
        self._zero_ns = int(self._rng.integers(10**12))
        self._last_ns = 0
        self._was_out = False

    def send(self, layout: Layout, data: Any, capture_ns: int, end_ns: int, origin_ns: int) -> Item | None:
        """The reading as it arrives; ``capture_ns`` is when it really was, ``origin_ns`` the session's time of the
        simulation's 0. None if it would have begun before that."""
        stamped = capture_ns + self._error_ns
        if stamped < 0:
            return None
        arrival = end_ns + origin_ns + self._delay_ns + round(self._rng.random() * self._jitter_ns)
        arrival = self._last_ns = max(arrival, self._last_ns)
        reading = Reading(
            layout=layout, data=data, t_capture_ns=stamped + origin_ns, t_end_ns=end_ns + self._error_ns + origin_ns,
            t_receipt_ns=arrival, t_device_ns=self._zero_ns + round(capture_ns * (1 + self._drift)),
            uncertainty_ns=self._uncertainty_ns, new_epoch=self._was_out,
        )  # fmt: skip
        self._was_out = False
        header = self.stamper.stamp(reading, arrival)
        return None if header is None else (arrival, Message(header, data))

    def out(self, now_ns: int) -> Item:
        """A beat of a sensor that is out of order. It comes back with a new epoch."""
        self._was_out = True
        self._last_ns = max(now_ns, self._last_ns)
        return self._last_ns, Message(self.stamper.beat(self._last_ns, None, "the sensor does not answer"))


class Simulation:
    """A seed's world. ``tick`` gives what arrives in the next 10 ms, ``until`` all up to a time, in order of arrival.

    ``outages`` come on top of the script's; with ``script`` False nothing happens but what ``stage`` is told. The
    world's time 0 is the session's, unless ``begin`` says otherwise before the first tick. ConfigError if no
    renderer can be had. Call ``camera.prepare`` before this module is imported, and ``close`` at the end.
    """

    def __init__(
        self, seed: int, ranges: Name = "train", *, outages: Iterable[Spell] = (), script: bool = True
    ) -> None:
        self.world = draw(ranges, seed)
        self.rover = Rover(model_xml(self.world, seed), seed)
        self.stage = Stage(self.rover, self.world)
        self.camera = Camera(self.rover, self.world, seed)
        self.lidar = Lidar(self.rover, self.world, seed)
        self.sound = Sound(self.world, seed)
        self.truth: str = "clear"
        self._rng = np.random.Generator(np.random.PCG64([seed, 10]))
        self._bias = np.append(self._rng.uniform(-1, 1, 3) * self.world.accel_bias, np.zeros(3))
        self._noise = np.array([self.world.accel_noise] * 3 + [self.world.gyro_noise] * 3)
        self._script = Script(seed) if script else None
        self._spells = list(outages)
        self._start_ns = 0
        self._outlets = {stream: Outlet(stream, self.world, ranges, seed) for stream in STREAMS}
        self._imu: list[Array] = []
        self._poses: list[tuple[float, ...]] = []
        self._force_n = 0.0
        self._struck: list[tuple[str, float, float]] = []
        self._coming: list[tuple[int, int, Message | Label]] = []
        self._count = 0
        self._label_since = 0

    def begin(self, start_ns: int) -> None:
        """Lays the world's time 0 at ``start_ns`` of session time."""
        self._start_ns = start_ns
        for outlet in self._outlets.values():
            outlet.stamper.open(start_ns)

    @property
    def now_ns(self) -> int:
        """Session time up to which the world has been simulated."""
        return self._start_ns + self.rover.ticks * TICK_NS

    def until(self, end_ns: int) -> Iterator[Item]:
        """Everything that arrives before session time ``end_ns``."""
        while self.now_ns < end_ns:
            yield from self.tick()

    def tick(self) -> list[Item]:
        """Lets 10 ms pass."""
        if self._script is not None:
            acts, spells = self._script.begun(self.rover.now_s)
            for act in acts:
                self.stage.begin(act)
            self._spells += spells
        readings = self.rover.tick() + self.stage.felt()
        self._force_n = max(self._force_n, self.rover.force_n)
        self._state_truth(self.stage.tick())
        self._struck += self.stage.sounds.strokes
        self._sense(readings)
        arrived = []
        while self._coming and self._coming[0][0] <= self.now_ns:
            arrival, _, what = heapq.heappop(self._coming)
            arrived.append((arrival, what))
        return arrived

    def close(self) -> None:
        """Gives the renderer back."""
        self.camera.close()

    # -- sensors -----------------------------------------------------------------------------------------------------

    def _sense(self, readings: Array) -> None:
        ticks = self.rover.ticks
        self._imu.append(readings)
        if ticks % BATCH_TICKS == 0:
            self._send_imu()
        sweep = self.lidar.fire(self.stage.slip["lidar"], self._blinded("dust"))
        if sweep is not None:
            self._send("lidar", SweepLayout(len(sweep)), sweep, 0)
        if ticks % FRAME_TICKS == 0:
            self._send_picture()
        if ticks % BLOCK_TICKS == 0:
            self._send_sound()
        if ticks % POSE_TICKS == 0:
            self._send_pose()

    def _send_picture(self) -> None:
        if self._out("camera"):
            return self._send("camera", FrameLayout("jpeg", HEIGHT, WIDTH), b"", 0)
        self.camera.turn(self.stage.slip["camera"], self.stage.knock)
        self._send("camera", FrameLayout("jpeg", HEIGHT, WIDTH), self.camera.take(self._blinded("dark")), 0)
        return None

    def _send_sound(self) -> None:
        for stroke in self._struck:
            self.sound.strike(*stroke)
        self._struck = []
        sounds = self.stage.sounds
        data = self.sound.block(self.rover.wheel_rad_s, sounds.siren, sounds.engine, self._blinded("wind"))
        self._send("microphone", AudioLayout(RATE_HZ, 1, BLOCK), data, BLOCK_TICKS * TICK_NS)

    def _send_imu(self) -> None:
        """Each sample is the mean of two steps of the physics, and stands at the middle of them."""
        steps = np.concatenate(self._imu)
        self._imu = []
        samples = steps.reshape(-1, 2, 6).mean(axis=1) + self._bias
        samples += self._rng.normal(0.0, 1.0, samples.shape) * self._noise
        batch = np.zeros(len(samples), IMU_DTYPE)
        batch["accel"], batch["gyro"] = samples[:, :3], samples[:, 3:]
        apart = round(2 * TIMESTEP_S * 1e9)
        batch["offset_ns"] = np.arange(len(samples)) * apart
        # What MuJoCo's sensors say after a step is of its beginning.
        first = BATCH_TICKS * TICK_NS - round(0.5 * TIMESTEP_S * 1e9)
        self._send("imu", ImuLayout(len(batch)), batch, first, length_ns=int(batch["offset_ns"][-1]))

    def _send_pose(self) -> None:
        rover = self.rover
        turn = rover.rotation
        pitch = float(np.arcsin(np.clip(-turn[2, 0], -1, 1)))
        speed = float(turn[:, 0] @ rover.velocity)
        self._poses.append(
            (*map(float, rover.position), rover.roll_rad, pitch, rover.heading_rad, speed, self._force_n)
        )
        self._force_n = 0.0
        if len(self._poses) == POSES:
            batch = np.zeros(POSES, signal_dtype(len(POSE)))
            batch["value"] = self._poses
            batch["offset_ns"] = np.arange(POSES) * POSE_TICKS * TICK_NS
            length = (POSES - 1) * POSE_TICKS * TICK_NS
            self._send("pose", SignalLayout(POSES, POSE), batch, length, length_ns=length)
            self._poses = []

    def _send(self, stream: str, layout: Layout, data: Any, ago_ns: int, length_ns: int | None = None) -> None:
        """Sends a reading that began ``ago_ns`` before now and lasted ``length_ns``, by default until now."""
        if self._out(stream):
            if self.rover.ticks % BEAT_TICKS == 0:
                self._push(self._outlets[stream].out(self.now_ns))
            return
        now = self.rover.ticks * TICK_NS
        end = now if length_ns is None else now - ago_ns + length_ns
        self._push(self._outlets[stream].send(layout, data, now - ago_ns, end, self._start_ns))

    # -- conditions and truth ----------------------------------------------------------------------------------------

    def _blinded(self, condition: str) -> bool:
        now = self.rover.now_s
        return any(s.condition == condition and s.start_s <= now < s.end_s for s in self._spells)

    def _out(self, stream: str) -> bool:
        now = self.rover.now_s
        return any(s.condition == "outage" and s.sensor == stream and s.start_s <= now < s.end_s for s in self._spells)

    def _state_truth(self, label: str) -> None:
        """Says what is true piece by piece: at each change, and at least every 200 ms."""
        before = self.rover.ticks - 1  # what ``label`` says is of the tick that has just passed
        if before and (label != self.truth or before - self._label_since >= LABEL_TICKS):
            piece = self._piece(before)
            self._push((piece.end_ns, piece))
            self._label_since = before
        self.truth = label

    def rest(self) -> Label:
        """What is true from the last label on until now."""
        return self._piece(self.rover.ticks)

    def _piece(self, until: int) -> Label:
        start, end = (self._start_ns + t * TICK_NS for t in (self._label_since, until))
        return Label(start, end, self.truth)

    def _push(self, item: Item | None) -> None:
        if item is not None:
            self._count += 1
            heapq.heappush(self._coming, (item[0], self._count, item[1]))
