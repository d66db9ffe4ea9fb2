"""The project as a user has it: its wheel alone, installed into an environment of its own."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Prints the environment that all four packages were imported from, and fails where they are not from one.
WHERE = """
import os, sys
from importlib.util import find_spec
assert "PYTHONPATH" not in os.environ
packages = ("lerobot_grids", "lerobot_policy_grids", "lerobot_grids_cli", "lerobot_grids_cards")
homes = {find_spec(name).origin.partition("/lib/python")[0] for name in packages}
assert homes == {sys.prefix}, homes
print(sys.prefix)
"""


def build_wheel(folder: Path) -> Path:
    """The project's wheel, built without a network."""
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    (path,) = folder.glob("*.whl")
    return path


def install(wheel: Path, folder: Path) -> Path:
    """Install the wheel into a new environment; returns its folder of commands.

    Dependencies are borrowed from the environment of the tests, the editable install there is not.
    """
    venv.create(folder, with_pip=False)
    commands = folder / "bin"
    pip = [sys.executable, "-m", "pip", "--python", commands / "python", "--quiet", "install", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--no-compile", wheel], check=True, timeout=120, env=without_source())
    site = next((folder / "lib").glob("python*")) / "site-packages"
    # A path line in a .pth file does not process that folder's own .pth files, so the editable install stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return commands


def without_source() -> dict[str, str]:
    """This process's environment variables, less what could lead to the source tree."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
