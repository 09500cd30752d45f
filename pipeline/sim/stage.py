"""Plays the script's acts in the world, and says what is true and what can be heard of them.

An act of several cues and a decoy of one run the same code: ``seen_by`` alone decides which props stand, which sounds
sound, which mount slips. A decoy of the IMU happens to a double of the rover, to the whole of it, and the IMU alone
feels that (``Apart``): no force made up to resemble stones or a ball does so to a model that has felt thousands of
them. What is true follows from the physics, ``DELAY_S`` after the cue, so that a window which ends with a label's first
moment already holds evidence of it:

rough_ground   from the first stone that a wheel meets until the last bed is left
approach       somebody's front is within 6.3 m and in the way, until out of it
impact         for 0.7 s from the onset of the ball's force on the rover
alarm          while it sounds
tilt           the chassis leans by more than half of what its suspension is told to
"""

from __future__ import annotations

from collections import deque

import numpy as np

from pipeline.sim.cues import DELAY_S, Label, Sensor
from pipeline.sim.ranges import Drawn
from pipeline.sim.rover import SPEED, STEPS, TICK_S, Array, Rover
from pipeline.sim.script import Act
from pipeline.sim.world import BED_M, BOTH, CAMERA_ONLY, LIDAR_ONLY, NEITHER, STONE_BEDS, WHEELBASE_M

IMPACT_S, RAMP_S = 0.7, 0.4
AHEAD_M, STOP_M = 6.3, 1.5
LEAVE_S, LEAVE_M_S, WAY_M = 1.4, 2.5, 0.9
COMES_M, STEP_M = (6.6, 7.2), 0.5
VOICE = 1.6
GRAVITY = 9.81
GRAIN_N, THUD_N = 60.0, 900.0
"""The rise of a contact's force that sounds with strength 1."""
RATTLE_HZ, RATTLE = 170.0, (-3.0, 1.5)
"""Decoys are as strong as what they resemble, as measured over many sessions: how often a loose cover rattles and the
logarithm's mean and deviation of how strongly."""
SINK_S = 0.5
"""So long before the end of rough ground its stones begin to sink."""
SETTLE_S = 1.0
"""So long after an act the IMU still feels what came of it apart."""


class Sounds:
    """What is to be heard in one tick: strokes (kind, s from now on the simulation's clock, strength), and levels."""

    def __init__(self) -> None:
        self.strokes: list[tuple[str, float, float]] = []
        self.siren = 0.0
        self.engine = 0.0


class Apart:
    """What the IMU feels that the rover does not do: how a double that an act happens to differs from one that is
    spared. Both begin as the rover is now, and drive and lean as it does; what else really happens meanwhile happens to
    the rover alone, and adds up. What really ends, ends for all."""

    def __init__(self, rover: Rover, until_s: float, leans: bool) -> None:
        self.struck, self.spared = rover.double(), rover.double()
        self.until_s = until_s
        self._rover, self._leans = rover, leans

    def tick(self) -> Array:
        """Lets the rover's last tick pass here, too. What to add to its readings of that, f8 [STEPS, 6]."""
        for double in (self.struck, self.spared):
            double.speed_limits = self._rover.speed_limits
        self.spared.lean_rad = self._rover.lean_rad
        if not self._leans:
            self.struck.lean_rad = self._rover.lean_rad
        return self.struck.tick() - self.spared.tick()


class Play:
    """One act on the stage."""

    def __init__(self, act: Act, stage: Stage) -> None:
        self.act, self.world, self.sounds = act, stage.world, stage.sounds
        self.rover = stage.rover if act.seen_by != ("imu",) else stage.apart(act)
        self.stage = stage
        self.limits: tuple[float, float] | None = None
        """Between which speeds the rover is to drive, in m/s."""
        self.rng = np.random.Generator(np.random.PCG64([act.seed, 5]))
        self.begin()

    def by(self, sensor: Sensor) -> bool:
        """Whether the act has a cue for ``sensor``."""
        return sensor in self.act.seen_by

    @property
    def group(self) -> int:
        """Who sees the act's props."""
        return {(True, True): BOTH, (True, False): CAMERA_ONLY, (False, True): LIDAR_ONLY}.get(
            (self.by("camera"), self.by("lidar")), NEITHER
        )

    @property
    def worlds(self) -> list[Rover]:
        """Where the act's props have to be cleared away: doubles of the rover may have been made among them."""
        return [self.rover] if self.rover is not self.stage.rover else [self.rover, *self.stage.doubles]

    def begin(self) -> None:
        """Sets up the props."""

    def tick(self, now_s: float) -> bool:
        """Moves the props; whether the cue is there, as physics has it."""
        raise NotImplementedError

    def end(self) -> None:
        """Clears the stage."""


class Rough(Play):
    """Gravel: stones under the wheels, a carpet that the camera sees, another that the LiDAR does."""

    def begin(self) -> None:
        self.limits = (0.55, 0.9)
        self.start = start = float(self.rover.position[0]) + 0.6
        self.beds = int(self.rng.integers(3, STONE_BEDS + 1))
        carpet = self.beds * BED_M + 0.8
        if self.by("camera"):
            self.rover.lay_carpet("gravel_seen", start, carpet)
        if self.by("lidar"):
            self.rover.lay_carpet("gravel_ranged", start, carpet)
        self.met = False
        if self.act.real or self.by("imu"):
            self.rover.lay_stones(start, self.beds)
        # Decoys last as long as the wheels would be on the stones.
        self.on_s = self.act.start_s + 0.4
        self.off_s = min(self.on_s + (self.beds * BED_M + 0.5) / 0.75, self.act.end_s)

    def tick(self, now_s: float) -> bool:
        # Stones that vanished under the wheels would be a jolt, which is another class.
        if (left_s := self.act.end_s - now_s) < SINK_S:
            for rover in self.worlds:
                rover.sink_stones(1.0 - left_s / SINK_S)
        if self.act.real:
            for contact in self.rover.contacts:
                if contact.stone:
                    self.met = True
                    self.sounds.strokes.append(("grain", contact.t_s, contact.force_n / GRAIN_N))
            return self.met and float(self.rover.position[0]) < self.start + self.beds * BED_M + WHEELBASE_M
        if self.by("microphone") and self.on_s < now_s < self.off_s:
            for strength in self.rng.lognormal(*RATTLE, self.rng.poisson(RATTLE_HZ * TICK_S)):
                self.sounds.strokes.append(("grain", now_s - self.rng.uniform(0, TICK_S), strength))
        return False

    def end(self) -> None:
        for rover in self.worlds:
            rover.park("gravel_seen", "gravel_ranged", *(f"bed_{i}" for i in range(STONE_BEDS)))


class Approach(Play):
    """Somebody comes straight towards the rover, which stops, stays before it for a moment, and leaves to the side."""

    def begin(self) -> None:
        self.car = bool(self.rng.random() < 0.4)
        self.speed = float(self.rng.uniform(1.2, 1.7) if self.car else self.rng.uniform(0.8, 1.3))
        self.limits = (0.2, 0.7)
        self.front = 0.95 if self.car else 0.2
        comes = float(self.rng.uniform(*COMES_M))
        self.at = self.rover.position + np.array([comes + self.front, self.rng.uniform(-0.35, 0.35), 0.0])
        self.at[2] = 0.0
        self.aside = float(self.rng.choice([-1, 1]))
        self.stays_s = float(self.rng.uniform(0.8, 1.8))
        self.leaves_s = self.act.end_s - LEAVE_S
        self.arrived, self.aside_m = False, 0.0
        self.names = ("car",) if self.car else ("person", "leg_l", "leg_r")
        for name in self.names:
            self.rover.show(name, self.group)
        self.scale = self.world.person_m / 1.75
        self.phase = self.walked = 0.0

    def tick(self, now_s: float) -> bool:
        distance = self._walk(now_s)
        if self.group != NEITHER:
            self._move()
        if self.by("microphone"):
            self._sound(now_s, distance)
        return self.act.real and self.aside_m < WAY_M and distance - self.front < AHEAD_M

    def _walk(self, now_s: float) -> float:
        """A tick's way. Returns how far from the rover it ended, in m."""
        away = self.at - self.rover.position
        distance = float(np.hypot(away[0], away[1]))
        if now_s >= self.leaves_s:
            self.at[:2] += np.array([0.3, 1.0]) * (1.0, self.aside) * LEAVE_M_S * TICK_S
            self.walked += LEAVE_M_S * TICK_S
            self.aside_m += LEAVE_M_S * TICK_S
        elif distance - self.front > STOP_M:
            self.at[0] -= self.speed * TICK_S
            self.walked += self.speed * TICK_S
        elif not self.arrived:
            self.arrived = True
            self.leaves_s = min(self.leaves_s, now_s + self.stays_s)
        else:
            self.walked += 0.8 * TICK_S  # from one foot to the other
        if distance - self.front < STOP_M + 0.6:
            self.limits = (0.0, 0.0)
        return distance

    def _move(self) -> None:
        if self.car:
            self.rover.put("car", self.at)
            return
        self.rover.put("person", self.at)
        swing = 0.45 * np.sin(np.pi * self.walked / STEP_M)
        for name, side, angle in (("leg_l", 0.1, swing), ("leg_r", -0.1, -swing)):
            hip = self.at + np.array([0.0, side, 0.88 * self.scale])
            self.rover.put(name, hip, (np.cos(angle / 2), 0.0, np.sin(angle / 2), 0.0))

    def _sound(self, now_s: float, distance: float) -> None:
        loudness = VOICE / max(distance, 1.0)
        if self.car:
            self.sounds.engine = max(self.sounds.engine, loudness)
        elif self.walked // STEP_M > self.phase:
            self.phase = self.walked // STEP_M
            self.sounds.strokes.append(("step", now_s + distance / 343.0, loudness))

    def end(self) -> None:
        self.rover.park(*self.names)


class Impact(Play):
    """A ball is thrown at the rover."""

    def begin(self) -> None:
        flight = float(self.rng.uniform(0.8, 1.0))
        self.hit_s = self.act.start_s + flight
        self.done = False
        self.touched_s: float | None = None
        self.direction = self.rng.uniform(-2.2, 2.2)
        self.strength = float(self.rng.uniform(0.7, 1.3))
        self.hits = self.act.real or self.by("imu")
        if self.group != NEITHER:
            self.rover.show("ball", BOTH)
        if self.hits or self.group != NEITHER:
            self._throw(flight)

    def _throw(self, flight: float) -> None:
        rover, heading = self.rover, self.rover.heading_rad
        target = rover.position + rover.velocity * flight
        angle = heading + self.direction
        coming = np.array([np.cos(angle), np.sin(angle), 0.0])
        if not self.hits:  # a ball that misses passes beside or in front
            target = target + np.array([-coming[1], coming[0], 0.0]) * self.rng.choice([-1, 1]) * 0.95
        distance = self.rng.uniform(2.6, 3.6)
        start = target + coming * distance
        start[2] = target[2] = 0.32
        velocity = (target - start) / flight
        velocity[2] = 0.5 * GRAVITY * flight
        rover.throw_ball(start, velocity)

    def tick(self, now_s: float) -> bool:
        for contact in self.rover.contacts:
            if not contact.stone and self.by("microphone"):
                self.touched_s = self.touched_s or contact.t_s
                self.sounds.strokes.append(("thud", contact.t_s, contact.force_n / THUD_N))
        if not self.act.real and not self.done and now_s >= self.hit_s:
            self._pretend(now_s)
        return self.touched_s is not None and now_s < self.touched_s + IMPACT_S

    def _pretend(self, now_s: float) -> None:
        """What a hit would have done to one sensor."""
        self.done = True
        if self.by("microphone"):
            self.sounds.strokes.append(("thud", now_s, 0.7 * self.strength))
        if self.by("camera"):
            self.stage.knock = (now_s, self.strength * self.rng.choice([-1, 1]))

    def end(self) -> None:
        for rover in self.worlds:
            rover.park_ball()


class Alarm(Play):
    """A siren, a flashing light, and a chain of reflectors that comes down across the way."""

    def begin(self) -> None:
        self.limits = (0.0, 0.8)
        self.at = self.rover.position + np.array([1.8 + 0.8 * (self.act.end_s - self.act.start_s), 0.0, 0.0])
        self.at[2] = 0.6
        self.off_s = self.act.end_s - RAMP_S
        if self.by("lidar"):
            self.rover.show("chain", LIDAR_ONLY)

    def tick(self, now_s: float) -> bool:
        since, left = now_s - self.act.start_s, self.off_s - now_s
        on = left > 0
        if self.by("lidar"):
            down = np.clip(min(since, left + RAMP_S) / 0.3, 0.0, 1.0)
            angle = (1.0 - down) * np.pi / 2
            pivot = self.at + np.array([0.0, -1.7, 0.0])
            self.rover.put("chain", pivot, (np.cos(angle / 2), np.sin(angle / 2), 0.0, 0.0))
        if self.by("camera"):
            self.stage.flash(on and (since * self.world.flash_hz) % 1.0 < 0.5)
        if self.by("microphone") and on:
            self.sounds.siren = 1.0
        return self.act.real and on

    def end(self) -> None:
        self.rover.park("chain")
        self.stage.flash(False)


class Tilt(Play):
    """The suspension of one side gives way; or the mount of a sensor does."""

    def begin(self) -> None:
        self.angle = np.deg2rad(self.world.list_deg) * float(self.rng.uniform(0.9, 1.1) * self.rng.choice([-1, 1]))

    def tick(self, now_s: float) -> bool:
        since, left = now_s - self.act.start_s, self.act.end_s - now_s
        angle = self.angle * float(np.clip(min(since, left) / RAMP_S, 0.0, 1.0))
        self._lean(angle)
        return self.act.real and bool(abs(self.rover.roll_rad) > abs(self.angle) / 2)

    def _lean(self, angle: float) -> None:
        if self.by("imu"):
            self.rover.lean_rad = angle
        else:
            self.stage.slip[self.act.seen_by[0]] = angle

    def end(self) -> None:
        self._lean(0.0)


PLAYS: dict[Label, type[Play]] = {
    "rough_ground": Rough,
    "approach": Approach,
    "impact": Impact,
    "alarm": Alarm,
    "tilt": Tilt,
}


class Stage:
    """All acts that are on. ``felt`` and then ``tick`` once a tick, after physics."""

    def __init__(self, rover: Rover, world: Drawn) -> None:
        self.rover, self.world = rover, world
        self.sounds = Sounds()
        self.slip: dict[str, float] = {"camera": 0.0, "lidar": 0.0}
        """By how much each mount has turned, to the right, in rad."""
        self.knock: tuple[float, float] = (-10.0, 0.0)
        """When something shook the camera's mast, and how hard."""
        self.limits = (0.0, SPEED[1])
        """Between which speeds the rover drives when no act asks for others."""
        self._plays: list[Play] = []
        self._apart: list[Apart] = []
        self._cues: deque[Label] = deque(["clear"] * round(DELAY_S / TICK_S))
        self._beacon = int(rover.model.light("beacon").id)
        rover.park_ball()

    def begin(self, act: Act) -> None:
        self._plays.append(PLAYS[act.label](act, self))

    def apart(self, act: Act) -> Rover:
        """A double of the rover for ``act`` to happen to, which the IMU alone feels."""
        self._apart.append(Apart(self.rover, act.end_s + SETTLE_S, act.label == "tilt"))
        return self._apart[-1].struck

    @property
    def doubles(self) -> list[Rover]:
        return [double for apart in self._apart for double in (apart.struck, apart.spared)]

    def felt(self) -> Array:
        """Lets the rover's last tick pass for its doubles, too: once a tick, between the rover's and this stage's.
        Returns what the IMU feels of it beside what the rover did, f8 [STEPS, 6]."""
        self._apart = [apart for apart in self._apart if apart.until_s > self.rover.now_s - TICK_S / 2]
        return sum((apart.tick() for apart in self._apart), np.zeros((STEPS, 6)))

    def flash(self, on: bool) -> None:
        """The light that an alarm has, or the glint that resembles it."""
        self.rover.model.light_active[self._beacon] = on
        self.rover.model.light_diffuse[self._beacon] = np.array([1.0, 0.35, 0.2]) * self.world.flash

    def tick(self) -> Label:
        """Moves all acts on by a tick; what is true now."""
        now = self.rover.now_s
        self.sounds.strokes.clear()
        self.sounds.siren = self.sounds.engine = 0.0
        cue: Label = "clear"
        for play in list(self._plays):
            if now >= play.act.end_s:
                play.end()
                self._plays.remove(play)
            elif play.tick(now):
                cue = play.act.label
        # What is real prevails: a rover that stopped on rough ground, for somebody who is none, would not shake.
        asked = sorted((p.act.real, p.limits) for p in self._plays if p.limits is not None)
        self.rover.speed_limits = asked[-1][1] if asked else self.limits
        self.rover.watch = any(isinstance(p, Impact) or (isinstance(p, Rough) and p.act.real) for p in self._plays)
        self._cues.append(cue)
        return self._cues.popleft()
