"""Every policy type of LeRobot is a family or is refused with a reason."""

import lerobot
import pytest
from lerobot.configs import FeatureType, PolicyFeature, PreTrainedConfig
from packaging.specifiers import SpecifierSet

from lerobot_grids.policies import find_source
from lerobot_grids.profiling.bench import bench
from lerobot_policy_grids import compress
from lerobot_policy_grids.errors import UnsupportedPolicyError
from lerobot_policy_grids.families import REFUSED, families

INSTALLED = {
    name
    for name, config in PreTrainedConfig.get_known_choices().items()
    if config.__module__.startswith("lerobot.policies.")
}


def unaccounted(installed, version):
    """What is wrong with families and refusals, for a LeRobot of this version that has these types."""
    elsewhere = {name for name, why in REFUSED.items() if why.releases and version not in SpecifierSet(why.releases)}
    refused = REFUSED.keys() - elsewhere
    return {
        "neither": installed - families().keys() - REFUSED.keys(),
        "both": families().keys() & REFUSED.keys(),
        "not there": refused - installed,
        "there": elsewhere & installed,
    }


def test_every_type_is_a_family_or_refused():
    assert not any(unaccounted(INSTALLED, lerobot.__version__).values())


def test_a_new_type_and_one_that_is_gone_are_found():
    found = unaccounted(INSTALLED - {"tdmpc"} | {"pi9"}, lerobot.__version__)
    assert found == {"neither": {"pi9"}, "both": set(), "not there": {"tdmpc"}, "there": set()}


@pytest.mark.parametrize("name", REFUSED)
def test_the_refusal_is_one_line_with_the_reason(name):
    for ask in (find_source, lambda source: bench(source, [16])):
        with pytest.raises(UnsupportedPolicyError) as error:
            ask(name)
        line = str(error.value)
        assert f"policy type '{name}' is not supported: {REFUSED[name].reason}; choose one of act, " in line
        assert "\n" not in line


def test_a_policy_in_memory_is_refused_with_the_reason():
    from lerobot.policies.tdmpc.modeling_tdmpc import TDMPCConfig, TDMPCPolicy

    inputs = {
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 84, 84)),
        "observation.state": PolicyFeature(FeatureType.STATE, (4,)),
    }
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    policy = TDMPCPolicy(TDMPCConfig(input_features=inputs, output_features=outputs, device="cpu"))
    with pytest.raises(UnsupportedPolicyError, match="'tdmpc' is not supported: its convolutions"):
        compress(policy)
