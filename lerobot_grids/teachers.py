"""Whom a student imitates: itself with everything switched off, or a dense checkpoint."""

from pathlib import Path
from typing import Any

import torch
from lerobot.processor import NormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE

from lerobot_policy_grids.checkpoint import read_config
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.modeling_grids import GridsPolicy

from .distillation import DenseTeacher, SelfTeacher, Teacher
from .evaluation.loading import load_policy, load_processors
from .policies import TrainablePolicy, find_source

# What teacher and student must agree on besides their type.
SAME = ("chunk_size", "max_action_dim", "max_state_dim", "output_features")


def choose_teacher(teacher: str | None, source: str, student: TrainablePolicy, train: str) -> Teacher:
    """The teacher that the options mean.

    Args:
        teacher: Checkpoint of a dense policy, or None for `source`.
        source: What the student started from.
        student: The student and its processors.
        train: What of the student is trained.

    Raises:
        GridsError: If there is nothing to imitate, or it does not fit the student.
    """
    policy: Any = student.policy
    if not isinstance(policy, GridsPolicy) or policy.num_tokens == 0:
        advice = "drop --reducer blind" if isinstance(policy, GridsPolicy) else "give --tokens a number"
        raise GridsError(f"distillation teaches a policy with few visual tokens; {advice}, or drop --distill")
    name = source if teacher is None else teacher
    folder = find_source(name)
    if not isinstance(folder, Path):
        raise GridsError(
            f"'{name}' starts from random weights, which teach nothing; give --teacher a trained dense policy, or "
            "start from one with --policy"
        )
    config = read_config(folder)
    config.device = "cpu"
    require_alike(name, config, load_processors(folder, config)[0], policy.config, student.preprocessor)
    if teacher is None and train != "all":
        return SelfTeacher(policy)
    return DenseTeacher(load_policy(str(folder), device="cpu").policy)


def require_alike(name: str, teacher: Any, teacher_pre: Any, student: Any, student_pre: Any) -> None:
    """Raise `GridsError` unless a teacher's predictions mean what the student's do.

    Args:
        name: What to call the teacher.
        teacher: Its configuration.
        teacher_pre: Its pre-processor.
        student: The configuration of the student, dense or grids.
        student_pre: Its pre-processor.
    """
    _check_fit(name, teacher, student.base if student.type == GridsPolicy.name else student)
    _check_statistics(name, teacher_pre, student_pre)


def _check_fit(name: str, teacher: Any, student: Any) -> None:
    if teacher.type == GridsPolicy.name:
        raise GridsError(
            f"{name} is a grids policy, but a teacher sees every token; give --teacher the dense policy it came from"
        )
    if teacher.type != student.type:
        raise GridsError(f"teacher {name} is a '{teacher.type}', the student a '{student.type}'; they must be alike")
    for field in SAME:
        theirs, ours = getattr(teacher, field, None), getattr(student, field, None)
        if theirs != ours:
            raise GridsError(f"teacher {name} has {field}={theirs}, the student {ours}; they must be alike")


def _check_statistics(name: str, teacher: Any, student: Any) -> None:
    """Normalised differently, the same numbers mean other movements."""
    theirs, ours = _statistics(teacher), _statistics(student)
    for feature in (OBS_STATE, ACTION):
        for kind, value in ours.get(feature, {}).items():
            other = theirs.get(feature, {}).get(kind)
            if other is None or other.shape != value.shape or not torch.allclose(value, other, rtol=1e-3, atol=1e-5):
                raise GridsError(
                    f"teacher {name} was not trained on this dataset: its {kind} of '{feature}' "
                    f"{'is missing' if other is None else 'differs'}; train it here first (--tokens dense), or do "
                    "without a teacher"
                )


def _statistics(preprocessor: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Of the features that the pre-processor normalises: {feature: {"mean": ..., "std": ...}}."""
    for step in preprocessor.steps:
        if isinstance(step, NormalizerProcessorStep):
            used = {
                "MEAN_STD": ("mean", "std"),
                "MIN_MAX": ("min", "max"),
                "QUANTILES": ("q01", "q99"),
                "QUANTILE10": ("q10", "q90"),
            }
            return {
                feature: {
                    kind: torch.as_tensor(value).float().cpu()
                    for kind, value in step.stats[feature].items()
                    if kind in used.get(step.norm_map[described.type].value, ())
                }
                for feature, described in step.features.items()
                if feature in step.stats
            }
    return {}
