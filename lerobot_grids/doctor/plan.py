"""Would a training of this policy on this dataset fit? Said from configuration and metadata alone, without weights."""

from .check import Checker
from .dataset_plan import DatasetPlan
from .policy_plan import PolicyPlan


def plan_checks(
    policy: str | None,
    dataset: str | None,
    tokens: int | str | None,
    rename_map: dict[str, str],
    batch_size: int | None,
    gpu_memory: float | None,
) -> list[tuple[str, Checker]]:
    """The checks of a policy, a dataset, or both.

    Args:
        policy: What to train: the name of a family, a checkpoint folder, or a Hub id.
        dataset: Folder of a dataset, or its Hub id.
        tokens: Visual tokens per camera, or "dense"; None takes 16, or the checkpoint's.
        rename_map: Dataset feature names to the policy's.
        batch_size: Frames of a step; None takes the family's micro-batch.
        gpu_memory: GiB of a GPU to plan for; None takes this machine's.
    """
    checks: list[tuple[str, Checker]] = []
    data = None if dataset is None else DatasetPlan(dataset, rename_map)
    if data is not None:
        checks += [("Dataset", data.check), ("Numbers", data.check_numbers)]
    if policy is not None:
        plan = PolicyPlan(policy, tokens, data, batch_size, gpu_memory)
        checks += [("Policy", plan.check), ("Cameras", plan.check_cameras), ("Fit", plan.check_data)]
        checks += [("Tokenizer", plan.check_tokenizer), ("Tokens", plan.check_tokens)]
        checks += [("Training", plan.check_memory), ("Room", plan.check_room)]
    return checks
