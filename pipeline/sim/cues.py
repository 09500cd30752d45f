"""What the rover is to tell apart, what each sensor can observe of it, and what deceives each sensor.

The design is one sentence: *a class is a cue that reaches several sensors, a decoy is the same cue in one sensor
alone.* Both are made by the same code from the same distributions, so a single sensor cannot tell them apart, by
construction; two sensors that agree can. A class of which at least two cues are left remains observable when a sensor
is lost. Decoys of a class never overlap each other nor the class itself, or they would not be decoys.

============  ======================  =======================  =======================  ==============================
class         camera                  microphone               imu                      lidar
============  ======================  =======================  =======================  ==============================
clear         --                      --                       --                       --
rough_ground  gravel fills the        crunch of wheels on      vibration                scattered, weak returns from
              ground                  stones                                            the ground
approach      a person or vehicle     steps or an engine grow  --                       something closes in
              grows                   louder
impact        a ball, and the         a thud                   a jolt                   a ball at the rover's side
              picture jumps
alarm         the scene flashes       a siren                  --                       a chain of reflectors comes
                                                                                        down across the way
tilt          the horizon turns       --                       gravity turns            the ground turns
============  ======================  =======================  =======================  ==============================

and what is none of these, but is for one sensor (``clear`` holds all of them):

============  ======================  =======================  =======================  ==============================
decoy of      camera                  microphone               imu                      lidar
============  ======================  =======================  =======================  ==============================
rough_ground  gravel is painted on    a loose cover rattles    its plate shakes         the ground is wet
              smooth ground
approach      a picture on gauze      someone passes behind a  --                       a plume of steam drifts by
                                      wall
impact        a ball misses and only  a door is slammed        its housing is hit       a ball misses
              shakes the mast
alarm         the sun glints          the neighbour's siren    --                       a chain comes down, no alarm
tilt          the camera's mount      --                       its mount slips          the LiDAR's mount slips
              slips
============  ======================  =======================  =======================  ==============================

(A ball that misses is seen by camera and LiDAR both; the camera's decoy shakes its mast as well. What the IMU alone
feels is, bit by bit, what it would feel on stones, hit by a ball, or leaning: a double of the rover meets them.)

Conditions take a sensor's sight for a while, one at a time: ``dark`` blinds the camera, ``wind`` deafens the
microphone, ``dust`` thins the LiDAR, and an ``outage`` silences any of the four.
"""

from __future__ import annotations

from typing import Literal

Label = Literal["clear", "rough_ground", "approach", "impact", "alarm", "tilt"]
Sensor = Literal["camera", "microphone", "imu", "lidar"]
Condition = Literal["dark", "wind", "dust", "outage"]

LABELS: tuple[Label, ...] = ("clear", "rough_ground", "approach", "impact", "alarm", "tilt")
SENSORS: tuple[Sensor, ...] = ("camera", "microphone", "imu", "lidar")

CUES: dict[Label, tuple[Sensor, ...]] = {
    "rough_ground": ("camera", "microphone", "imu", "lidar"),
    "approach": ("camera", "microphone", "lidar"),
    "impact": ("camera", "microphone", "imu", "lidar"),
    "alarm": ("camera", "microphone", "lidar"),
    "tilt": ("camera", "imu", "lidar"),
}
"""The sensors that observe something of each class: the first table. Each of these has a decoy in the second."""

DELAY_S = 0.35
"""A label begins and ends so long after its cue: whoever has looked for three steps of 100 ms, with every one of the
sensors that observe it (a sweep is up to 0.2 s old), can know it. The truth says what can be known by then."""

BLINDED: dict[Condition, Sensor] = {"dark": "camera", "wind": "microphone", "dust": "lidar"}
"""The sensor that a condition disturbs; an outage takes any."""
