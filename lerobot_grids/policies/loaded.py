"""A policy with its processors."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lerobot.processor import DeviceProcessorStep
from torch import Tensor

from lerobot_policy_grids import GridsPolicy
from lerobot_policy_grids.checkpoint.save import save_policy, save_processors
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.modeling_grids import dense_policy

from ..preflight import Finding


@dataclass
class LoadedPolicy:
    """A policy and its processors.

    Attributes:
        policy: Dense or grids.
        preprocessor: From observations in LeRobot's names to the policy's batch.
        postprocessor: From the policy's actions to the robot's.
        reducer: Name of the reducer that was put into a dense policy without training; empty for none.
        resolution: Side in pixels at which a dense policy sees its images without training; None for its own.
        findings: What may surprise in the dataset that it is to be trained on.
    """

    policy: Any
    preprocessor: Any
    postprocessor: Any
    reducer: str = ""
    resolution: int | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def renames(self) -> dict[str, str]:
        """Names of observations to the policy's, where its pre-processor changes them."""
        renames: dict[str, str] = {}
        for step in self.preprocessor.steps:
            renames |= getattr(step, "rename_map", {})
        return renames

    def to(self, device: str) -> None:
        """Move policy and pre-processor to a device; the configuration says where the policy was trained."""
        self.policy.to(device)
        self.policy.config.device = device.split(":")[0]
        for step in self.preprocessor.steps:
            if isinstance(step, DeviceProcessorStep):
                step.device = device
                step.__post_init__()

    def save(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """Write configuration, weights and both processors, as LeRobot lays a checkpoint out.

        Args:
            folder: Where to; it must exist.
            state: The policy's state, where it is not what `policy.state_dict()` gives.
        """
        save_policy(self.policy, folder, state)
        save_processors(folder, self.preprocessor, self.postprocessor)


def flow_steps(policy: Any) -> int | None:
    """Integration steps of a policy's flow for one action chunk; None where it has none that are known."""
    base = dense_policy(policy)
    try:
        return get_family(base.config.type).count_steps(base)
    except UnsupportedPolicyError:
        return None


def set_flow_steps(policy: Any, steps: int) -> None:
    """Act with so many integration steps of the flow from now on.

    Raises:
        GridsError: If that is no number of steps, or the policy has no flow.
    """
    if steps < 1:
        raise GridsError(f"--num_steps {steps}; give at least 1")
    base = dense_policy(policy)
    if flow_steps(policy) is None:
        raise GridsError(f"the '{base.config.type}' policy integrates no flow; drop --num_steps")
    get_family(base.config.type).set_steps(base, steps)


def token_counts(policy: Any) -> tuple[int | None, int | None]:
    """Visual tokens per camera of a policy: (those it uses, those of its dense policy); None where unknown."""
    if isinstance(policy, GridsPolicy):
        return policy.num_tokens, policy.seam.layout.num_dense_tokens
    try:
        dense = get_family(policy.config.type).layout(policy).num_dense_tokens
    except UnsupportedPolicyError:  # a policy without a token grid can still be evaluated
        return None, None
    return dense, dense
