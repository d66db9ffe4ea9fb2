"""Can videos be decoded, and can a simulation draw without a screen?"""

import os
import subprocess
import sys
from collections.abc import Iterator
from ctypes.util import find_library
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec

from .check import Check

# MUJOCO_GL -> the library that it needs.
BACKENDS = {"egl": "EGL", "osmesa": "OSMesa"}
# Draws nothing: whether there is a context is what often fails. Some drivers raise errors when a process ends.
CONTEXT = "import mujoco, os; mujoco.GLContext(64, 64).make_current(); print('context', flush=True); os._exit(0)"
CONTEXT_TIMEOUT_S = 30
INSTALL_OPENGL = "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri, or: apt-get install libosmesa6"


def check_video() -> Iterator[Check]:
    """Which decoder reads the videos of a dataset."""
    fault = None
    if find_spec("torchcodec"):
        try:
            import_module("torchcodec")
        except Exception as error:  # it tries each release of FFmpeg, and raises all that it met
            fault = _torchcodec_fault(str(error))
        else:
            yield Check("ok", "Video", f"torchcodec {version('torchcodec')} decodes")
            return
    try:
        import_module("av")
    except Exception as error:  # a wrong library raises OSError
        seen = f"neither torchcodec nor pyav can be loaded ({str(error).splitlines()[0]})"
        yield Check("fail", "Video", seen, "datasets with videos cannot be read; pip install av")
        return
    decoder = f"pyav {version('av')} decodes"
    if fault is None:
        yield Check("ok", "Video", f"{decoder}, torchcodec is not installed")
    else:
        advice = f"{fault}, or silence LeRobot's warnings with: pip uninstall torchcodec"
        yield Check("warn", "Video", f"torchcodec cannot be loaded; {decoder} instead, slower", advice)


def _torchcodec_fault(message: str) -> str:
    """What to do about torchcodec's error, which has hundreds of lines."""
    if "libavutil" in message or "libavcodec" in message:
        return "install FFmpeg's libraries (on Debian or Ubuntu: apt-get install ffmpeg)"
    return "install the torchcodec that belongs to this torch, as its README lists"


def check_opengl() -> Iterator[Check]:
    """Whether a simulation can draw without a screen."""
    if not find_spec("mujoco"):
        yield Check("ok", "OpenGL", "not needed, no simulation is installed (extras sim, libero)")
        return
    if not sys.platform.startswith("linux"):
        yield Check("ok", "OpenGL", f"not looked at on {sys.platform}")
        return
    asked = os.environ.get("MUJOCO_GL")
    tried = []
    for backend in [asked] if asked else BACKENDS:
        if not asked and not find_library(BACKENDS[backend]):
            tried.append(f"no lib{BACKENDS[backend]}")
            continue
        reason = _context_fault(backend)
        if reason is None:
            yield Check("ok", "OpenGL", f"{backend} draws without a screen")
            return
        tried.append(f"{backend} gives no context ({reason})")
    advice = "unset MUJOCO_GL, or " + INSTALL_OPENGL if asked else INSTALL_OPENGL
    yield Check("warn", "OpenGL", f"{', '.join(tried)}; eval, record and view of simulations cannot draw", advice)


def _context_fault(backend: str) -> str | None:
    """Why another process gets no context of OpenGL; None if it does."""
    command = [sys.executable, "-c", CONTEXT]
    environment = os.environ | {"MUJOCO_GL": backend}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=CONTEXT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {CONTEXT_TIMEOUT_S} s"
    if "context" in done.stdout:
        return None
    said = done.stderr.strip().splitlines()
    return said[-1] if said else f"exit code {done.returncode}"
