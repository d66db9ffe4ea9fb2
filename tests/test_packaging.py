"""The wheel: what it holds, and that LeRobot finds it without the source tree."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import installing
from lerobot_policy_grids.families import families

ROOT = Path(__file__).parents[1]
PACKAGES = {"lerobot_grids", "lerobot_policy_grids", "lerobot_grids_cli", "lerobot_grids_cards"}


def test_wheel_holds_the_four_packages_and_their_data(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    shipped = set(names)
    for package in (
        "lerobot_grids",
        "policies/lerobot_policy_grids",
        "cli/lerobot_grids_cli",
        "hub_cards/lerobot_grids_cards",
    ):
        for path in (ROOT / package).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts:
                assert str(path.relative_to((ROOT / package).parent)) in shipped, path


def test_distribution_name_is_what_lerobot_looks_for(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    # Verbatim: LeRobot does not normalise dashes and underscores.
    assert "Name: lerobot_policy_grids" in lines
    assert "Requires-Python: >=3.12" in lines
    assert any(line.startswith("License-Expression: Apache-2.0") for line in lines)


def test_lerobot_finds_the_installed_wheel(installed, tmp_path):
    code = (
        "from lerobot.utils.import_utils import register_third_party_plugins; register_third_party_plugins()\n"
        "from lerobot.configs import PreTrainedConfig\n"
        "from lerobot.policies.factory import get_policy_class\n"
        "print('grids' in PreTrainedConfig.get_known_choices(), get_policy_class('grids').__name__)"
    )
    result = subprocess.run(
        [installed / "python", "-c", f"{installing.WHERE}\n{code}"],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=tmp_path,
        env=installing.without_source(),
        check=True,
    )
    assert result.stdout.splitlines()[0] == str(installed.parent)
    assert result.stdout.splitlines()[-1] == "True GridsPolicy"


def test_no_loose_modules_in_the_shelves():
    """They could be imported here and would be missing from the wheel."""
    for shelf in ("policies", "cli", "hub_cards"):
        assert list((ROOT / shelf).glob("*.py")) == []


def test_extras_name_every_family():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for family in families().values():
        if family.extra is None:
            continue
        # `fit` chooses LoRA by itself where memory is short.
        assert f"lerobot[{family.extra}]" in extras[family.extra]
        assert "lerobot_policy_grids[lora]" in extras[family.extra]
        assert family.extra in extras["all"][0]
    assert extras["lora"] == ["lerobot[peft]"]
    assert {"sim", "all", "dev"} <= extras.keys()


def test_nothing_outside_the_families_names_one():
    """A family is one file: what else knew of it would have to be found and changed with it."""
    # One is an English verb, too.
    names = {kind for kind in families() if not kind.startswith("tiny")} - {"act"}
    names |= {"paligemma", "siglip", "florence"}
    for package in PACKAGES:
        for path in ROOT.glob(f"**/{package}/**/*.py"):
            if not {".venv", "families", "tiny", "tests"} & set(path.parts):
                words = set(re.findall(r"[a-z_0-9]+", path.read_text().lower()))
                assert not names & words, (path, names & words)
                assert not re.search(r"""["']act["']""", path.read_text()), path


def test_every_module_says_what_it_is():
    for package in PACKAGES:
        for path in ROOT.glob(f"**/{package}/**/*.py"):
            if ".venv" not in path.parts and path.read_text().strip():
                assert ast.get_docstring(ast.parse(path.read_text())), path


def test_imports_go_one_way():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout
