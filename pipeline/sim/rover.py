"""The rover in MuJoCo: time passes in ticks of 10 ms, the wheels follow a way and a speed, contacts are read off.

All randomness is of the drive and comes from the seed; physics has none. Poses are of the chassis: position of its
middle in m, x forward along the way, z up.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import mujoco
import numpy as np

from pipeline.sim.world import (
    BALL_M,
    BED_M,
    CORRIDOR_M,
    FAR_M,
    GRAVEL_M,
    PARKED_M,
    SCENERY,
    STONE_BEDS,
    STONES_OUT_M,
    TIMESTEP_S,
    TRACK_M,
    WHEEL_M,
    WHEELS,
)

Array = np.ndarray[Any, Any]
TICK_S, STEPS = 0.01, 4
SPEED = (0.3, 1.0)
SIGHT_M = (-9.0, 9.5, 14.0)
"""Scenery that lies further back than the first moves on to between the others, ahead of the rover."""


class Contact(NamedTuple):
    """One onset of a contact: when, how far the force rose, and whether it was a wheel's with a stone."""

    t_s: float
    force_n: float
    stone: bool


class Rover:
    """Model, state, and the drive."""

    def __init__(self, xml: str, seed: int) -> None:
        self.model = mujoco.MjModel.from_xml_string(xml)
        self.data = mujoco.MjData(self.model)
        self._rng = np.random.Generator(np.random.PCG64([seed, 4]))
        # Its own, since when scenery moves on depends on where the rover is, and how it is to drive must not.
        self._scenery_rng = np.random.Generator(np.random.PCG64([seed, 11]))
        self._chassis = int(self.model.body("rover").id)
        self._mocap = {
            self.model.body(i).name: int(self.model.body_mocapid[i])
            for i in range(self.model.nbody)
            if self.model.body_mocapid[i] >= 0
        }
        beds = {int(self.model.body(f"bed_{i}").id) for i in range(STONE_BEDS)}
        self._stone = np.isin(self.model.geom_bodyid, sorted(beds))
        self._ball = int(self.model.geom("ball").id)
        self._ball_qpos = int(self.model.jnt_qposadr[self.model.joint("ball").id])
        self._ball_qvel = int(self.model.jnt_dofadr[self.model.joint("ball").id])
        self._spin = [int(self.model.jnt_dofadr[self.model.joint(f"spin_{w}").id]) for w in WHEELS]
        self._forces: dict[int, float] = {}
        self.contacts: list[Contact] = []
        """Onsets of the last tick."""
        self.force_n = 0.0
        """The greatest force of the ball on the rover in the last tick."""
        self.watch = False
        """Whether contacts are looked at; they are not while nothing can be met."""
        self.speed_limits = (0.0, SPEED[1])
        self._speed, self._lane = float(self._rng.uniform(*SPEED)), 0.0
        self._change_s = 0.0
        self.ticks = 0
        self.lean_rad = 0.0
        """How far the suspension leans the chassis to the right."""
        for name in self._mocap:
            if name.rpartition("_")[0] in SCENERY:
                self._place_scenery(name, float(self._scenery_rng.uniform(SIGHT_M[0], SIGHT_M[2])))
        mujoco.mj_forward(self.model, self.data)

    def double(self) -> Rover:
        """Another rover, in a world that is as this one's is now. Where things are and what happens to them, each has
        for itself; the model is one: who sees a prop (``show``), a carpet's length, the light, the cameras."""
        double = copy.copy(self)
        double.data = copy.copy(self.data)
        double._rng, double._scenery_rng = copy.deepcopy(self._rng), copy.deepcopy(self._scenery_rng)
        double.contacts, double._forces, double.watch = [], {}, False
        return double

    # -- where everything is -----------------------------------------------------------------------------------------

    @property
    def now_s(self) -> float:
        return self.ticks * TICK_S

    @property
    def position(self) -> Array:
        """f8 [3] of the chassis."""
        return np.array(self.data.qpos[:3])

    @property
    def rotation(self) -> Array:
        """world_from_rover, f8 [3, 3]."""
        return np.array(self.data.xmat[self._chassis]).reshape(3, 3)

    @property
    def velocity(self) -> Array:
        """f8 [3] of the chassis, in the world."""
        return np.array(self.data.qvel[:3])

    @property
    def heading_rad(self) -> float:
        x = self.rotation[:, 0]
        return float(np.arctan2(x[1], x[0]))

    @property
    def roll_rad(self) -> float:
        """To the right; 0 on even ground."""
        return float(np.arcsin(np.clip(self.rotation[2, 1], -1, 1)))

    @property
    def wheel_rad_s(self) -> float:
        """The wheels' mean speed."""
        return float(np.mean(self.data.qvel[self._spin]))

    @property
    def ball_at(self) -> Array:
        return np.array(self.data.qpos[self._ball_qpos : self._ball_qpos + 3])

    def geoms(self, name: str) -> list[int]:
        """The geoms of a prop."""
        body = self.model.body(name).id
        return [int(g) for g in np.flatnonzero(self.model.geom_bodyid == body)]

    # -- putting things ----------------------------------------------------------------------------------------------

    def put(self, name: str, position: Any, quaternion: Any = (1.0, 0.0, 0.0, 0.0)) -> None:
        """Moves a prop."""
        self.data.mocap_pos[self._mocap[name]] = position
        self.data.mocap_quat[self._mocap[name]] = quaternion

    def park(self, *names: str) -> None:
        """Takes props off the stage."""
        for name in names:
            self.put(name, (0.0, 0.0, PARKED_M))

    def show(self, name: str, group: int) -> None:
        """Who sees a prop: a group of ``world``."""
        self.model.geom_group[self.geoms(name)] = group

    def throw_ball(self, position: Any, velocity: Any) -> None:
        """Lets the ball go."""
        self.data.qpos[self._ball_qpos : self._ball_qpos + 7] = [*position, 1, 0, 0, 0]
        self.data.qvel[self._ball_qvel : self._ball_qvel + 6] = [*velocity, 0, 0, 0]

    def park_ball(self) -> None:
        """Where nothing sees it; not under the ground, which is solid for it and would throw it up."""
        self.throw_ball((self.data.qpos[0], FAR_M, BALL_M), (0.0, 0.0, 0.0))

    def lay_carpet(self, name: str, start_m: float, length_m: float) -> None:
        """Lays ``gravel_seen`` or ``gravel_ranged`` on the way from x = ``start_m``."""
        length_m = min(length_m, GRAVEL_M)
        self.model.geom_size[self.geoms(name), 0] = length_m / 2
        self.put(name, (start_m + length_m / 2, self.position[1], 0.004))

    def lay_stones(self, start_m: float, beds: int) -> None:
        """Lays so many beds of stones on the way from x = ``start_m``."""
        for i in range(beds):
            self.put(f"bed_{i}", (start_m + (i + 0.5) * BED_M, self.position[1], 0.0))

    def sink_stones(self, share: float) -> None:
        """Lets the stones down by ``share`` of what they stand out at most."""
        for i in range(STONE_BEDS):
            if (at := self.data.mocap_pos[self._mocap[f"bed_{i}"]])[2] > PARKED_M:
                at[2] = -share * STONES_OUT_M

    # -- time --------------------------------------------------------------------------------------------------------

    def tick(self) -> Array:
        """Lets 10 ms pass. Returns what the accelerometer (m/s^2) and the gyroscope (rad/s) read in each step,
        f8 [STEPS, 6], in the frame of the site ``imu``."""
        self._drive()
        self._scroll()
        readings = np.empty((STEPS, 6))
        self.contacts, self.force_n = [], 0.0
        for i in range(STEPS):
            mujoco.mj_step(self.model, self.data)
            readings[i] = self.data.sensordata
            if self.watch:
                self._read_contacts(self.now_s + (i + 1) * TIMESTEP_S)
        self.ticks += 1
        # Positions are those after the step, but derived quantities those before it; sensors need both to agree.
        mujoco.mj_kinematics(self.model, self.data)
        mujoco.mj_camlight(self.model, self.data)
        return readings

    def _drive(self) -> None:
        now = self.now_s
        if now >= self._change_s:
            stops = self._rng.random() < 0.1
            self._speed = 0.0 if stops else float(self._rng.uniform(*SPEED))
            self._lane = float(self._rng.uniform(-0.5, 0.5))
            self._change_s = now + float(self._rng.uniform(2.0, 5.0))
        speed = float(np.clip(self._speed, *self.speed_limits))
        wanted = np.clip(0.4 * (self._lane - self.data.qpos[1]), -0.2, 0.2)
        turn = np.clip(1.5 * (wanted - self.heading_rad), -0.6, 0.6) * (speed > 0)
        sides = {"l": speed - turn * TRACK_M, "r": speed + turn * TRACK_M}
        rise = TRACK_M * np.tan(self.lean_rad)
        slew = 1.5 * TICK_S / WHEEL_M
        for i, wheel in enumerate(WHEELS):
            side = wheel[1]
            self.data.ctrl[i] = -rise if side == "l" else rise
            before = self.data.ctrl[4 + i]
            self.data.ctrl[4 + i] = np.clip(sides[side] / WHEEL_M, before - slew, before + slew)

    def _scroll(self) -> None:
        if self.ticks % 50:
            return
        x = self.data.qpos[0]
        for name, mocap in self._mocap.items():
            if name.rpartition("_")[0] in SCENERY and self.data.mocap_pos[mocap, 0] < x + SIGHT_M[0]:
                self._place_scenery(name, x + float(self._scenery_rng.uniform(*SIGHT_M[1:])))

    def _place_scenery(self, name: str, x: float) -> None:
        nearest = CORRIDOR_M + {"wall": 0.8, "post": 0.0, "bush": 0.6}[name.rpartition("_")[0]]
        rng = self._scenery_rng
        self.put(name, (x, rng.choice([-1, 1]) * rng.uniform(nearest, nearest + 4.0), 0.0))

    def _read_contacts(self, t_s: float) -> None:
        """Rises of the normal force where the ball meets the rover, or a wheel a stone."""
        pairs = self.data.contact.geom[: self.data.ncon]
        stone = self._stone[pairs].any(axis=1)
        ball = (pairs == self._ball).any(axis=1) & (self.model.geom_group[pairs] == 4).any(axis=1)
        forces: dict[int, float] = {}
        for i in np.flatnonzero(stone | ball):
            force = np.zeros(6)
            mujoco.mj_contactForce(self.model, self.data, int(i), force)
            key = int(pairs[i, 0]) * 4096 + int(pairs[i, 1])
            forces[key] = float(force[0])
            rise = force[0] - self._forces.get(key, 0.0)
            if rise > 1.0:
                self.contacts.append(Contact(t_s, float(rise), bool(stone[i])))
            if ball[i]:
                self.force_n = max(self.force_n, float(force[0]))
        self._forces = forces
