"""What a family needs and is not here, packages or files of the Hub, is one line, whichever command asks first."""

import sys
from types import SimpleNamespace

import pytest
from huggingface_hub import constants
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils import import_utils

from lerobot_grids.doctor.policy_plan import PolicyPlan
from lerobot_grids.policies import find_source
from lerobot_grids.policies.starting import configure
from lerobot_grids.preflight.features import read_features
from lerobot_grids.profiling.architectures import architectures, instantiate, make_config
from lerobot_policy_grids.checkpoint import build, read_config
from lerobot_policy_grids.errors import CheckpointError, UnsupportedPolicyError
from lerobot_policy_grids.families import families, get_family
from lerobot_policy_grids.families.needs import needing_files, needing_packages
from lerobot_policy_grids.processor_grids import make_processors

BLOCKED = [(kind, package) for kind, family in families().items() for package in family.packages]
# Begin with files of the Hub. ACT begins with torchvision's.
FETCHING = [kind for kind, family in families().items() if family.extra and family.sources == {kind: None}]
IMAGE = {"dtype": "image", "shape": (64, 64, 3), "names": ["height", "width", "channels"]}
VECTOR = {"dtype": "float32", "shape": (4,), "names": list("abcd")}
DATA = read_features(
    SimpleNamespace(
        features={"observation.images.top": IMAGE, "observation.state": VECTOR, "action": VECTOR}, depth_keys=[]
    )
)


def block(monkeypatch, package):
    """From now on nothing imports a package, and LeRobot's own check does not find it."""
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(import_utils, "_require_package_cache", {})


def need(package):
    if package not in sys.modules:
        pytest.importorskip(package)


@pytest.mark.parametrize(("kind", "package"), BLOCKED)
def test_a_missing_package_is_named_with_its_extra(kind, package, monkeypatch):
    family, name = get_family(kind), next(iter(get_family(kind).sources))
    # While it is still there.
    for other in family.packages:
        need(other)
    config = make_config(name, 2) if name in architectures() else read_config(find_source(name))
    block(monkeypatch, package)
    line = (
        f"the '{kind}' policy needs packages that are not installed ({package}); "
        f"pip install 'lerobot_policy_grids[{family.extra}]'"
    )
    entries = {
        "load": lambda: build(config),
        "bench": lambda: instantiate(config, "meta"),
        "processors": lambda: make_processors(config),
    }
    if name in architectures():
        entries["architecture"] = lambda: make_config(name, 2)
    if family.sources[name] is None:
        entries["fit"] = lambda: configure(name, None, DATA)
    for entry, call in entries.items():
        with pytest.raises(UnsupportedPolicyError) as error:
            call()
        assert str(error.value) == line, entry
    *warned, failed = PolicyPlan(name, 16, None, None, None).check()
    assert (failed.status, failed.seen) == ("fail", line)
    assert all(check.status == "warn" for check in warned)


def test_packages_that_no_family_lists_are_named_in_one_line_too(monkeypatch):
    """LeRobot's own line gives an extra of its own, which lacks this project's packages."""
    block(monkeypatch, "tree")
    with (
        pytest.raises(
            UnsupportedPolicyError, match=r"not installed \(dm-tree\); pip install 'lerobot_policy_grids\[x\]'$"
        ),
        needing_packages("kind", "x", ()),
    ):
        import_utils.require_package("dm-tree", extra="groot", import_name="tree")
    with pytest.raises(UnsupportedPolicyError, match="No module named 'absent'"), needing_packages("kind", "x", ()):
        import absent
    with pytest.raises(ImportError), needing_packages("act", None, ()):
        import absent  # noqa: F401


@pytest.mark.parametrize("kind", FETCHING)
def test_files_that_cannot_be_fetched_are_named(kind, tmp_path, monkeypatch):
    for package in get_family(kind).packages:
        need(package)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError) as error:
        build(configure(kind, None, DATA)[0], fresh=True)
    said = str(error.value)
    (option,) = [name for name in get_family(kind).repositories if f"--base.{name} FOLDER" in said]
    (repository,) = [place for place in get_family(kind).repositories[option] if f"policy needs {place}" in said]
    assert repository.count("/") == 1
    assert "which cannot be read or downloaded (" in said
    assert "\n" not in said
    with pytest.raises(CheckpointError, match=f"'{kind}' policy needs "):
        build(configure(kind, None, DATA, {option: str(tmp_path / "nothing")})[0], fresh=True)


def test_a_loaded_policy_has_no_options_to_change():
    with pytest.raises(CheckpointError) as error, needing_files("kind", {"vlm": "user/model"}, (), fresh=False):
        raise OSError("no network. Look at the manual.")
    assert str(error.value) == (
        "the 'kind' policy needs user/model, which cannot be read or downloaded (no network); connect this machine to "
        "the network, or log in with hf auth login where its owner asks for that"
    )
    # What the operating system says names its file already.
    with pytest.raises(FileNotFoundError), needing_files("kind", {"vlm": "user/model"}, (), fresh=False):
        open("no/such/file")  # noqa: SIM115


def test_options_of_a_new_policy_hold_before_it_fetches_anything(tmp_path, monkeypatch):
    """EO1's configuration reads its model's while it is made."""
    need("transformers")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    inputs = {"observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 64, 64))}
    inputs |= {"observation.state": PolicyFeature(FeatureType.STATE, (4,))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    small = get_family("eo1").small(inputs, outputs, tmp_path)
    small.model.vlm_backbone.config.save_pretrained(small.config.vlm_base)
    config, _ = configure("eo1", None, DATA, {"vlm_base": small.config.vlm_base})
    assert config.vlm_config["text_config"]["hidden_size"] == small.config.vlm_config["text_config"]["hidden_size"]
