"""The LiDAR: rays through the world, fired while it turns and the rover moves.

A turn takes ten ticks; each fires a tenth of the azimuths from where the sensor is at that moment, as a real one
smears. A sweep begins behind, so that what is ahead lies in its middle. What meets nothing within ``REACH_M``, or is
lost, gives no point. Coordinates are multiples of 1/256 m.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np

from pipeline.messages import POINT_DTYPE
from pipeline.sim.ranges import Drawn
from pipeline.sim.rover import TICK_S, Rover
from pipeline.sim.world import BOTH, LIDAR_AT, LIDAR_ONLY

Array = np.ndarray[Any, Any]
TICKS = 10
AZIMUTHS = 180
ELEVATIONS_DEG = (-32.0, -20.0, -12.0, -6.0, -1.5, 3.0)
REACH_M = 12.0
STEP_M = 1 / 256
INTENSITY = {"ground": 20.0, "gravel_ranged": 9.0, "chain": 200.0, "person": 60.0, "car": 90.0, "ball": 70.0}
GRAVEL_NOISE_M = 0.05
DUST = (0.75, 0.06)
"""In dust: the share of returns that is lost, and that comes from the dust itself."""


def roll_matrix(angle_rad: float) -> Array:
    """The rotation that leans a mount to the right."""
    c, s = np.cos(angle_rad), np.sin(angle_rad)
    return np.array([[1.0, 0.0, 0.0], [0.0, c, -s], [0.0, s, c]])


class Lidar:
    """Fires tick by tick; ``fire`` gives a sweep when a turn is complete."""

    def __init__(self, rover: Rover, world: Drawn, seed: int) -> None:
        self._rover, self._world = rover, world
        self._rng = np.random.Generator(np.random.PCG64([seed, 6]))
        model = rover.model
        self._body = int(model.body("rover").id)
        self._intensity = np.full(model.ngeom, 40.0)
        for i in range(model.ngeom):
            name = model.body(model.geom_bodyid[i]).name
            self._intensity[i] = INTENSITY.get(name, 15.0 + 60.0 * self._rng.random())
        self._intensity[model.geom("ground").id] = INTENSITY["ground"]
        self._gravel = np.isin(np.arange(model.ngeom), rover.geoms("gravel_ranged"))
        self._groups = np.isin(np.arange(6), (BOTH, LIDAR_ONLY)).astype(np.uint8)
        azimuth = -np.pi + 2 * np.pi * np.arange(AZIMUTHS) / AZIMUTHS
        elevation = np.deg2rad(ELEVATIONS_DEG)
        a, e = np.meshgrid(azimuth, elevation, indexing="ij")
        rays = np.stack([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)], axis=-1)
        self._rays = rays.reshape(TICKS, -1, 3)
        self._parts: list[Array] = []

    def fire(self, slip_rad: float, dust: bool) -> Array | None:
        """The rays of this tick; every tenth time the sweep, ``POINT_DTYPE``, which ends now."""
        directions = self._rays[len(self._parts)]
        distance, geom = self._cast(directions, slip_rad)
        distance, hit = self._degrade(distance, geom, dust)
        part = np.zeros(int(hit.sum()), POINT_DTYPE)
        points = np.round(directions[hit] * distance[hit, None] / STEP_M) * STEP_M
        part["x"], part["y"], part["z"] = points.T
        spread = self._rng.uniform(0.8, 1.2, len(part))
        part["intensity"] = np.round(np.where(geom[hit] < 0, 4.0, self._intensity[geom[hit]]) * spread)
        self._parts.append(part)
        if len(self._parts) < TICKS:
            return None
        for i, fired in enumerate(self._parts):
            fired["offset_ns"] = (i + 1 - TICKS) * round(TICK_S * 1e9)
        sweep, self._parts = np.concatenate(self._parts), []
        return sweep

    def _cast(self, directions: Array, slip_rad: float) -> tuple[Array, Array]:
        """Distances (-1: nothing) and geoms of rays in the sensor's frame."""
        rover = self._rover
        world_from_rover = rover.rotation
        origin = rover.position + world_from_rover @ np.array(LIDAR_AT)
        rays = directions @ (world_from_rover @ roll_matrix(slip_rad)).T
        n = len(rays)
        geom, distance = np.empty(n, np.int32), np.empty(n)
        mujoco.mj_multiRay(rover.model, rover.data, origin, np.ascontiguousarray(rays).reshape(-1), self._groups, 1,
                           self._body, geom, distance, None, n, REACH_M)  # fmt: skip
        distance[distance > REACH_M] = -1.0  # the cutoff alone spares planes
        return distance, geom

    def _degrade(self, distance: Array, geom: Array, dust: bool) -> tuple[Array, Array]:
        """Noise, losses, dust. Distances, and which rays give a point; ``geom`` becomes -1 where dust answered."""
        rng, n = self._rng, len(distance)
        hit = distance > 0
        noise = np.where(self._gravel[geom] & hit, GRAVEL_NOISE_M, self._world.lidar_noise_m)
        distance = distance + rng.normal(0.0, 1.0, n) * noise
        lost = np.where(self._gravel[geom] & hit, 0.25, self._world.lidar_loss) + (DUST[0] if dust else 0.0)
        hit &= rng.random(n) >= lost
        if dust:
            grain = rng.random(n) < DUST[1]
            distance = np.where(grain, rng.uniform(0.4, 4.0, n), distance)
            geom[grain] = -1
            hit |= grain
        return distance, hit & (distance > 0.2)
