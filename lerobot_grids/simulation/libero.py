"""Check that LIBERO or LIBERO-Plus is completely installed, before LeRobot makes their environments.

Importing LIBERO without its configuration file waits for keyboard input, and missing meshes raise an error in the
middle of an evaluation. So everything is checked first, without importing LIBERO.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import yaml

from lerobot_policy_grids.errors import SimulationError

# LeRobot's environment type -> name in messages.
LIBERO_KINDS = {"libero": "LIBERO", "libero_plus": "LIBERO-Plus"}
INSTALL = {
    "libero": "pip install 'lerobot[libero]', on Linux",
    "libero_plus": "clone github.com/sylvestf/LIBERO-plus and put it on PYTHONPATH, as LeRobot's documentation says",
}
# A file that only the fork has: the perturbation of each task.
PLUS_MARK = Path("benchmark") / "task_classification.json"
# Folder into which Hugging Face's LIBERO downloads meshes and textures.
ASSET_CACHE = Path("~/.cache/libero/assets")


def require_libero(kind: str) -> None:
    """Check that LIBERO can be used, without importing it.

    Args:
        kind: "libero" or "libero_plus".

    Raises:
        SimulationError: If the package, its configuration or its files are missing, or the other of the two is
            installed.
    """
    name = LIBERO_KINDS[kind]
    root = _package_root()
    if root is None:
        raise SimulationError(f"{name} is not installed (no package 'libero'); to install it: {INSTALL[kind]}")
    if (root / PLUS_MARK).is_file() != (kind == "libero_plus"):
        other = next(key for key in LIBERO_KINDS if key != kind)
        raise SimulationError(
            f"the package 'libero' in {root} is {LIBERO_KINDS[other]}, which has different tasks in suites of the same "
            f"names; evaluate it with --env {other}, or replace it: {INSTALL[kind]}"
        )
    file = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    if not file.is_file():
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
    assets = [root / "assets", paths.get("assets", root / "assets")]
    if kind == "libero":
        assets.append(ASSET_CACHE.expanduser())
    if not any(folder.is_dir() and any(folder.iterdir()) for folder in assets):
        raise SimulationError(f"{name}'s meshes and textures are not in {assets[-1]}; {_get_assets(kind, root)}")


def _get_assets(kind: str, root: Path) -> str:
    if kind == "libero":
        return 'download them once with: python -c "from libero.libero import get_assets_path; get_assets_path()"'
    return f"download assets.zip of the dataset Sylvest/LIBERO-plus on the Hub and unpack it to {root / 'assets'}"


def _package_root() -> Path | None:
    """Folder of the package `libero.libero`, or None if it is not installed."""
    try:
        spec = find_spec("libero.libero")
    except ModuleNotFoundError:
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))
