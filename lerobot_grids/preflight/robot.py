"""Does a dataset fit a policy's configuration: cameras, state, action, their sizes and their names?"""

import json
from typing import Any

from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_grids.configuration_grids import base_config
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.base import EMPTY_CAMERA, LIMITS, width_faults

from .features import DatasetFeatures
from .findings import Finding, warning


def check_training(source: str, config: Any, data: DatasetFeatures) -> list[Finding]:
    """Whether a policy can be trained on a dataset.

    Args:
        source: What the user calls the policy.
        config: Its configuration as its checkpoint has it; the dataset's state and action may have other sizes.
        data: The dataset's features.
    """
    findings = [*data.findings, *check_cameras(source, config, data)]
    if data.action is None:
        line = f"the dataset has no '{ACTION}' to learn; it has {data.listed}; rename one with --rename_map"
        findings.append(Finding(line))
    base = base_config(config)
    findings += _name_faults(source, config, data)
    findings += _state_faults(source, config, data)
    widths = {name: feature.shape[0] for name, feature in (data.inputs | data.outputs).items()}
    findings += [Finding(line) for line in width_faults(source, base, widths)]
    findings += _fixed_width_faults(source, base, widths)
    if getattr(base, "use_relative_actions", False):
        findings += _relative_faults(data)
    return findings


def check_acting(source: str, config: Any, data: DatasetFeatures) -> list[Finding]:
    """Whether a trained policy can be run on the observations of a dataset, and compared with its actions."""
    findings = [finding for finding in data.findings if finding.is_error]
    findings += check_cameras(source, config, data)
    findings += _state_faults(source, config, data)
    trained = {OBS_STATE: config.robot_state_feature, ACTION: config.action_feature}
    for name, feature in (data.inputs | data.outputs).items():
        expected = trained.get(name)
        if expected is not None and tuple(expected.shape) != tuple(feature.shape):
            findings.append(
                Finding(
                    f"{source} has '{name}' of shape {tuple(expected.shape)}, the dataset has {tuple(feature.shape)}; "
                    "use the policy's own data"
                )
            )
    before, now = getattr(base_config(config), "action_feature_names", None), data.names.get(ACTION)
    if before and now and list(before) != now:
        text = f"{source} has the actions {', '.join(before)}, the dataset has {', '.join(now)}"
        if sorted(before) == sorted(now):
            findings.append(Finding(f"{text}, in another order; use the policy's own data"))
        else:
            findings.append(warning(f"{text}; errors are computed as if they were the same"))
    return findings


def check_cameras(source: str, config: Any, data: DatasetFeatures) -> list[Finding]:
    """Whether a dataset has the cameras that a policy looks through, perhaps fewer of them, as LeRobot allows."""
    wanted = [name for name in config.image_features if EMPTY_CAMERA not in name]
    have = list(data.cameras)
    if not have:
        if any(finding.is_error for finding in data.findings):
            return []
        return [Finding("the dataset has no colour camera, so there are no visual tokens to reduce; record one")]
    missing, unused = [n for n in wanted if n not in have], [n for n in have if n not in wanted]
    if not missing:
        return [warning(f"{source} does not look through {', '.join(unused)}")] if unused else []
    if unused:
        return [
            Finding(
                f"policy {source} looks through cameras {', '.join(wanted)}; the dataset has {', '.join(have)}. "
                f"Rename with --rename_map '{json.dumps({data.sources[unused[0]]: missing[0]})}'"
            )
        ]
    kind = base_config(config).type
    if not get_family(kind).spares_cameras:
        line = f"the dataset lacks {', '.join(missing)}, through which {source} looks, and {kind} does not go without"
        return [Finding(f"{line}; record every camera, or start a new policy")]
    return [warning(f"the dataset lacks {', '.join(missing)}, through which {source} looks too; it goes without")]


def _fixed_width_faults(source: str, base: Any, widths: dict[str, int]) -> list[Finding]:
    """Refuse states and actions of other widths where a policy does not pad them: its weights have their widths."""
    trained = {OBS_STATE: base.robot_state_feature, ACTION: base.action_feature}
    if get_family(base.type).writes_state:
        del trained[OBS_STATE]
    return [
        Finding(
            f"the dataset's {kind} has {widths[name]} dimensions, and {source} was trained with "
            f"{trained[name].shape[0]}, which stay with the '{base.type}' policy; start a new one"
        )
        for name, kind, fields in LIMITS
        if not any(hasattr(base, field) for field in fields)
        and name in widths
        and trained.get(name) is not None
        and trained[name].shape[0] != widths[name]
    ]


def _name_faults(source: str, config: Any, data: DatasetFeatures) -> list[Finding]:
    """Warn of cameras whose pixels LeRobot's processors do not normalise, because of their names."""
    prefix = get_family(base_config(config).type).camera_prefix
    odd = [name for name in data.cameras if not name.startswith(prefix)]
    if not odd:
        return []
    line = f"{source} normalises only cameras called '{prefix}...'; it gets the pixels of {', '.join(odd)} as they are"
    return [warning(line)]


def _state_faults(source: str, config: Any, data: DatasetFeatures) -> list[Finding]:
    if data.state is not None:
        return []
    if get_family(base_config(config).type).reads_state or config.robot_state_feature is not None:
        line = f"{source} reads '{OBS_STATE}', which the dataset lacks; it has {data.listed}; record or rename it"
        return [Finding(line)]
    return [warning(f"the dataset has no '{OBS_STATE}'; the policy is trained without it")]


def _relative_faults(data: DatasetFeatures) -> list[Finding]:
    """LeRobot subtracts the state from the action dimension by dimension, whatever they are called."""
    state, action = data.names.get(OBS_STATE), data.names.get(ACTION)
    if state and action and state[: len(action)] != action:
        return [
            Finding(
                f"actions relative to the state need both in one order; the state has {', '.join(state)}, the action "
                f"{', '.join(action)}; record them alike, or train a policy with use_relative_actions=false"
            )
        ]
    return []
