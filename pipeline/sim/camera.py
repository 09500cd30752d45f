"""The camera: MuJoCo's off-screen renderer, then the sensor's exposure and noise, then JPEG.

Rendering needs OpenGL without a window system. On Linux that is EGL (Mesa renders in software where there is no GPU)
unless ``MUJOCO_GL`` says otherwise; it has to be said before MuJoCo is first imported, which ``prepare`` does.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from pipeline.errors import ConfigError, install
from pipeline.sim.ranges import Drawn

if TYPE_CHECKING:
    from pipeline.sim.rover import Rover

Array = np.ndarray[Any, Any]
WIDTH, HEIGHT = 128, 96
QUALITY = 70
DARK = 0.05
KNOCK_RAD, KNOCK_HZ, KNOCK_S = 0.1, 7.0, 0.15
"""How far, how fast and how long a shaken mast swings."""
_INSTALL = {
    "egl": "sudo apt-get install libegl1 libgl1-mesa-dri",
    "osmesa": "sudo apt-get install libosmesa6",
}


def prepare() -> None:
    """Checks that MuJoCo is here, and chooses how it renders. ConfigError names what to type."""
    if sys.platform == "linux":
        os.environ.setdefault("MUJOCO_GL", "egl")
    try:
        import mujoco  # noqa: F401
    except ImportError:
        raise ConfigError(f"the simulation needs MuJoCo, which is not installed here. {install('sim')}") from None
    except RuntimeError as error:  # MUJOCO_GL names what MuJoCo does not know
        raise ConfigError(f"MuJoCo cannot be loaded: {error}. Leave MUJOCO_GL unset.") from None


def make_renderer(model: Any) -> Any:
    """An off-screen renderer, ``mujoco.Renderer``. ConfigError names what to type where there is none."""
    import mujoco

    try:
        return mujoco.Renderer(model, HEIGHT, WIDTH)
    except Exception as error:  # each of MuJoCo's ways to OpenGL fails with exceptions of its own
        way = os.environ.get("MUJOCO_GL", "")
        advice = f"Type: {_INSTALL[way]}" if way in _INSTALL else "Unset MUJOCO_GL, or set it to egl or osmesa."
        what = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"the simulated camera needs OpenGL without a window system, and MuJoCo cannot have it with "
            f"MUJOCO_GL={way or '(unset)'}: {type(error).__name__}: {what}. {advice}"
        ) from error


class Camera:
    """Takes pictures of the world from the rover."""

    def __init__(self, rover: Rover, world: Drawn, seed: int) -> None:
        import mujoco

        self._rover, self._world = rover, world
        self._rng = np.random.Generator(np.random.PCG64([seed, 7]))
        self._renderer = make_renderer(rover.model)
        self._options = mujoco.MjvOption()
        self._options.geomgroup[:] = [1, 1, 0, 0, 0, 0]
        self._id = int(rover.model.camera("camera").id)
        self._mounted = np.array(rover.model.cam_quat[self._id])
        self._grain = self._rng.normal(0.0, world.pixel_noise, (2 * HEIGHT, 2 * WIDTH, 3)).astype(np.float32)
        self._balance = self._rng.uniform(0.93, 1.07, 3).astype(np.float32)

    def turn(self, slip_rad: float, knock: tuple[float, float]) -> None:
        """How the mount stands now: leant to the right, or swinging since it was shaken (when in s, how hard)."""
        import mujoco

        since = self._rover.now_s - knock[0]
        swing = KNOCK_RAD * knock[1] * np.exp(-since / KNOCK_S) * np.sin(2 * np.pi * KNOCK_HZ * since)
        turned, mounted = np.empty(4), np.array(self._mounted)
        for angle, axis in ((slip_rad, (1.0, 0.0, 0.0)), (swing, (0.0, 1.0, 0.0))):
            mujoco.mju_axisAngle2Quat(turned, np.array(axis), angle)
            mujoco.mju_mulQuat(mounted, turned, np.array(mounted))
        self._rover.model.cam_quat[self._id] = mounted
        mujoco.mj_camlight(self._rover.model, self._rover.data)

    def take(self, dark: bool) -> bytes:
        """A JPEG file of what is to be seen now."""
        self._renderer.update_scene(self._rover.data, self._id, self._options)
        picture = self._renderer.render()[:, :, ::-1].astype(np.float32)
        top, left = self._rng.integers(HEIGHT), self._rng.integers(WIDTH)
        gain = self._world.exposure * (DARK if dark else 1.0) * (1.0 + 0.02 * self._rng.standard_normal())
        picture *= self._balance * np.float32(gain)
        picture += self._grain[top : top + HEIGHT, left : left + WIDTH]
        pixels = np.clip(picture, 0, 255).astype(np.uint8)
        _, coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
        return coded.tobytes()

    def close(self) -> None:
        """Gives the renderer back."""
        self._renderer.close()
