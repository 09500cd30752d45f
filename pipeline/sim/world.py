"""The MuJoCo model: a wheeled rover on an endless plain, scenery, and the props of every act.

Props wait under the ground or far away, where nothing sees them, until an act puts them on the stage. Who sees a geom
is its group:

=====  ===============================================
group  seen by
=====  ===============================================
0      camera and LiDAR
1      the camera alone
2      the LiDAR alone
3      neither
4      other views (the rover, which sees not itself)
=====  ===============================================

The rover: a chassis on four driven wheels, each on a slide with a position servo that is its suspension. x is forward,
y left, z up; lengths in m.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np

from pipeline.sim.ranges import Drawn

BOTH, CAMERA_ONLY, LIDAR_ONLY, NEITHER, OTHERS = 0, 1, 2, 3, 4
TIMESTEP_S = 0.0025
WHEEL_M = 0.14
WHEELBASE_M, TRACK_M = 0.25, 0.27
"""From the middle to each axle, and to each side."""
HEIGHT_M = 0.28
CAMERA_AT = (0.33, 0.0, 0.25)
LIDAR_AT = (0.0, 0.0, 0.35)
"""On the chassis."""
FOVY_DEG = 60.0
STONE_BEDS, STONES, BED_M = 6, 14, 0.8
"""Beds of stones, stones in each, and a bed's length."""
GRAVEL_M = 6.0
"""Length of the carpets that are gravel to the camera, or to the LiDAR."""
BALL_M = 0.18
SCENERY = {"wall": 6, "post": 8, "bush": 6}
CORRIDOR_M = 2.4
"""Half the width of the way, which scenery leaves free."""
PARKED_M = -30.0
FAR_M = -500.0
"""Where what is parked lies: under the ground; and beside the way, further than any sensor sees."""
STONES_OUT_M = 0.05
"""More than any stone stands out."""
WHEELS = ("fl", "fr", "rl", "rr")


def model_xml(world: Drawn, seed: int) -> str:
    """The model of a world, as MJCF."""
    rng = np.random.Generator(np.random.PCG64([seed, 3]))
    sky, grey, dark = _sky(rng), world.ground_grey, world.ground_grey - world.gravel_contrast
    tint = [grey * f for f in rng.uniform(0.85, 1.1, 3)]
    return f"""
<mujoco model="rover">
  <option timestep="{TIMESTEP_S}" integrator="implicitfast" cone="elliptic" iterations="20"/>
  <size memory="4M"/>
  <statistic extent="10" center="0 0 0"/>
  <visual>
    <global offwidth="320" offheight="240"/>
    <quality shadowsize="0" offsamples="0" numslices="8" numstacks="6" numquads="2"/>
    <map znear="0.005" zfar="40"/>
    <rgba haze="{_rgb(sky[1])} 1"/>
    <headlight ambient="{_rgb([world.ambient] * 3)}" diffuse="0 0 0" specular="0 0 0"/>
  </visual>
  <asset>
    <texture name="sky" type="skybox" builtin="gradient" rgb1="{_rgb(sky[0])}" rgb2="{_rgb(sky[1])}" width="32"
             height="192"/>
    <texture name="ground" type="2d" builtin="flat" mark="random" random="0.02" width="128" height="128"
             rgb1="{_rgb(tint)}" markrgb="{_rgb([0.85 * t for t in tint])}"/>
    <texture name="gravel" type="2d" builtin="flat" mark="random" random="0.35" width="128" height="128"
             rgb1="{_rgb([min(1.0, 1.15 * t) for t in tint])}" markrgb="{_rgb([max(0.03, dark)] * 3)}"/>
    <material name="ground" texture="ground" texrepeat="0.5 0.5" texuniform="true" specular="0"/>
    <material name="gravel" texture="gravel" texrepeat="0.4 0.4" texuniform="true" specular="0"/>
  </asset>
  <default>
    <geom condim="3" friction="{world.friction:.3f} 0.005 0.0001"/>
    <default class="prop"><geom contype="0" conaffinity="0" group="0"/></default>
    <default class="wheel">
      <joint damping="0.02"/>
      <geom type="sphere" size="{WHEEL_M}" mass="1.0" group="4" contype="1" conaffinity="2" rgba="0.1 0.1 0.1 1"/>
    </default>
  </default>
  <worldbody>
    <light name="sun" directional="true" pos="0 0 9" dir="{_rgb(_sun_dir(rng))}" castshadow="false"
           diffuse="{_rgb([world.sun] * 3)}" specular="0 0 0"/>
    <light name="beacon" directional="true" pos="0 0 9" dir="0.5 0.1 -0.8" castshadow="false" active="false"
           diffuse="0 0 0" specular="0 0 0"/>
    <geom name="ground" type="plane" size="0 0 1" material="ground" contype="2" conaffinity="1"/>
    {_rover(world)}
    {_props(world, rng)}
    {_scenery(world, rng)}
  </worldbody>
  <actuator>
    {"".join(f'<position name="lift_{w}" joint="slide_{w}" kp="6000" kv="420"/>' for w in WHEELS)}
    {"".join(f'<velocity name="drive_{w}" joint="spin_{w}" kv="12" forcerange="-35 35"/>' for w in WHEELS)}
  </actuator>
  <sensor>
    <accelerometer name="accel" site="imu"/>
    <gyro name="gyro" site="imu"/>
  </sensor>
</mujoco>"""


def _rover(world: Drawn) -> str:
    places = {"fl": (1, 1), "fr": (1, -1), "rl": (-1, 1), "rr": (-1, -1)}
    wheels = "".join(
        f'<body name="{w}" childclass="wheel" pos="{x * WHEELBASE_M} {y * TRACK_M} {WHEEL_M - HEIGHT_M}">'
        f'<joint name="slide_{w}" type="slide" axis="0 0 1" range="-0.12 0.12"/>'
        f'<joint name="spin_{w}" type="hinge" axis="0 1 0"/><geom name="{w}"/></body>'
        for w, (x, y) in places.items()
    )
    return f"""<body name="rover" pos="0 0 {HEIGHT_M}">
      <freejoint name="rover"/>
      <geom name="chassis" type="box" size="0.36 0.22 0.1" mass="{world.rover_kg - 4.0:.3f}" contype="1" conaffinity="4"
            group="4" solref="-30000 -60"/>
      <site name="imu" pos="0 0 0"/>
      <camera name="camera" pos="{_rgb(CAMERA_AT)}" xyaxes="0 -1 0 0.05 0 1" fovy="{FOVY_DEG}"/>
      {wheels}
    </body>"""


def _props(world: Drawn, rng: np.random.Generator) -> str:
    scale = world.person_m / 1.75
    coat, trousers, paint = (_rgb(_colour(rng, world.hue)) for _ in range(3))
    body = f"""
      <geom type="capsule" size="{0.2 * scale:.3f} {0.24 * scale:.3f}" pos="0 0 {1.12 * scale:.3f}" rgba="{coat} 1"/>
      <geom type="sphere" size="{0.12 * scale:.3f}" pos="0 0 {1.63 * scale:.3f}" rgba="0.75 0.55 0.42 1"/>"""
    parts = [_actor("person", body)]
    leg = f'<geom type="capsule" size="{0.09 * scale:.3f} {0.32 * scale:.3f}" pos="0 0 {-0.42 * scale:.3f}" '
    parts += [_actor(name, f'{leg} rgba="{trousers} 1"/>') for name in ("leg_l", "leg_r")]
    parts.append(_actor("car", f"""
      <geom type="box" size="0.95 0.5 0.3" pos="0 0 0.55" rgba="{paint} 1"/>
      <geom type="box" size="0.5 0.45 0.25" pos="-0.15 0 1.1" rgba="0.25 0.3 0.35 1"/>
      <geom type="box" size="0.7 0.52 0.15" pos="0 0 0.16" rgba="0.08 0.08 0.08 1"/>"""))  # fmt: skip
    parts.append(_actor("chain", '<geom type="box" size="0.03 1.7 0.28" pos="0 1.7 0" rgba="0.9 0.9 0.2 1"/>'))
    for name, group in (("gravel_seen", CAMERA_ONLY), ("gravel_ranged", LIDAR_ONLY)):
        box = f'<geom type="box" size="{GRAVEL_M / 2} 1.3 0.002" material="gravel" group="{group}"/>'
        parts.append(_actor(name, box))
    parts += [_bed(f"bed_{i}", world, rng) for i in range(STONE_BEDS)]
    parts.append(f"""<body name="ball" pos="0 {FAR_M} {BALL_M}">
      <freejoint name="ball"/>
      <geom name="ball" type="sphere" size="{BALL_M}" mass="{world.ball_kg:.3f}" contype="4" conaffinity="3" group="3"
            solref="-30000 -60" rgba="{_rgb(_colour(rng, world.hue))} 1"/>
    </body>""")
    return "".join(parts)


def _actor(name: str, geoms: str) -> str:
    return f'<body name="{name}" mocap="true" childclass="prop" pos="0 0 {PARKED_M}">{geoms}</body>'


def _bed(name: str, world: Drawn, rng: np.random.Generator) -> str:
    """Stones in a bed: spheres, sunk so that each stands out a little."""
    stones = ""
    for _ in range(STONES):
        radius, out = rng.uniform(0.04, 0.07), world.stone_m * rng.uniform(0.6, 1.4)
        side = rng.choice([-1, 1]) * (TRACK_M + rng.uniform(-0.06, 0.06))
        stones += (
            f'<geom type="sphere" size="{radius:.4f}" pos="{rng.uniform(-0.4, 0.4):.4f} {side:.4f} {out - radius:.4f}" '
            f'contype="2" conaffinity="1" group="3" rgba="0.4 0.4 0.4 1"/>'
        )
    return f'<body name="{name}" mocap="true" pos="0 0 {PARKED_M}">{stones}</body>'


def _scenery(world: Drawn, rng: np.random.Generator) -> str:
    parts = []
    for kind, number in SCENERY.items():
        for i in range(number):
            colour, height = _rgb(_colour(rng, world.hue, 0.5)), rng.uniform(0.6, 1.8)
            size = {
                "wall": f'type="box" size="{rng.uniform(1.0, 2.5):.3f} 0.2 {height:.3f}"',
                "post": f'type="cylinder" size="{rng.uniform(0.06, 0.25):.3f} {height:.3f}"',
                "bush": f'type="ellipsoid" size="{rng.uniform(0.4, 0.9):.3f} {rng.uniform(0.4, 0.9):.3f} {height:.3f}"',
            }[kind]
            parts.append(_actor(f"{kind}_{i}", f'<geom {size} pos="0 0 {0.8 * height:.3f}" rgba="{colour} 1"/>'))
    return "".join(parts)


def _sky(rng: np.random.Generator) -> tuple[Any, Any]:
    bright = rng.uniform(0.55, 0.95)
    blue = np.array([0.6, 0.75, 1.0]) * bright
    return blue, np.minimum(1.0, blue * rng.uniform(1.05, 1.3, 3))


def _sun_dir(rng: np.random.Generator) -> tuple[float, float, float]:
    angle = rng.uniform(0, 2 * np.pi)
    return float(np.cos(angle)), float(np.sin(angle)), -1.2


def _colour(rng: np.random.Generator, hue: float, saturation: float = 0.8) -> tuple[float, float, float]:
    turn = (hue + rng.uniform(0, 0.4)) % 1.0
    return colorsys.hsv_to_rgb(turn, saturation * rng.uniform(0.3, 1.0), rng.uniform(0.25, 0.85))


def _rgb(values: Any) -> str:
    return " ".join(f"{float(v):.4f}" for v in values)
