"""Choose how MuJoCo renders without a screen. This must run before mujoco is imported."""

import os
import sys
from ctypes.util import find_library

from lerobot_policy_grids.errors import SimulationError


def choose_renderer() -> str:
    """Set MUJOCO_GL to EGL if this machine has it, otherwise to OSMesa. A value set by the user is kept.

    Returns:
        The name of the backend.

    Raises:
        SimulationError: On Linux, if neither library is installed.
    """
    if "MUJOCO_GL" in os.environ or not sys.platform.startswith("linux"):
        return os.environ.get("MUJOCO_GL", "glfw")
    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise SimulationError(
        "no off-screen OpenGL found (neither libEGL nor libOSMesa), but the simulation must render images; "
        "install one, e.g. on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri, or: apt-get install libosmesa6"
    )
