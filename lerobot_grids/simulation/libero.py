"""What LIBERO and LIBERO-Plus need before LeRobot can make their environments.

Importing LIBERO without its configuration file waits for an answer on the keyboard, and missing meshes fail in the
middle of an evaluation. So everything is checked first, without importing it.
"""

import os
from importlib.util import find_spec
from pathlib import Path

import yaml

from lerobot_policy_grids.errors import SimulationError

# LeRobot's environment type -> what it is called.
LIBERO_KINDS = {"libero": "LIBERO", "libero_plus": "LIBERO-Plus"}
INSTALL = {
    "libero": "pip install 'lerobot[libero]', on Linux",
    "libero_plus": "clone github.com/sylvestf/LIBERO-plus and put it on PYTHONPATH, as LeRobot's page on it says",
}
# Only the fork says which perturbation each of its tasks has.
PLUS_MARK = Path("benchmark") / "task_classification.json"
# Where Hugging Face's LIBERO keeps meshes and textures that it downloads.
ASSET_CACHE = Path("~/.cache/libero/assets")


def require_libero(kind: str) -> None:
    """Check that LIBERO can be used, without importing it.

    Args:
        kind: "libero" or "libero_plus".

    Raises:
        SimulationError: If the package, its configuration or its files are missing, or it is the other of the two.
    """
    name = LIBERO_KINDS[kind]
    root = _package_root()
    if root is None:
        raise SimulationError(f"{name} is not installed (no package 'libero'); to install it: {INSTALL[kind]}")
    if (root / PLUS_MARK).is_file() != (kind == "libero_plus"):
        other = next(key for key in LIBERO_KINDS if key != kind)
        raise SimulationError(
            f"the package 'libero' in {root} is {LIBERO_KINDS[other]}, whose suites hold other tasks under the same "
            f"names; evaluate it with --env {other}, or replace it: {INSTALL[kind]}"
        )
    file = Path(os.environ.get("LIBERO_CONFIG_PATH", "~/.libero")).expanduser() / "config.yaml"
    if not file.is_file():
        raise SimulationError(
            f"{name} has no configuration {file}, and importing it would ask for one on the keyboard; "
            'write its default once with: echo N | python -c "import libero.libero"'
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
            raise SimulationError(f"{name}'s configuration {file} names {folder}, which does not exist; correct it")
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
