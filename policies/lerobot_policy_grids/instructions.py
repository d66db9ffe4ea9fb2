"""Instructions that a policy's tokenizer cuts: their end is lost, and two may become the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lerobot.processor import TokenizerProcessorStep, create_transition
from lerobot.utils.constants import OBS_STATE

# Instructions that a line names.
NAMED = 3
# Characters of an instruction's start and of its end that a line shows.
SHOWN = 40


@dataclass(frozen=True)
class Cut:
    """What a tokenizer cuts.

    Attributes:
        line: What was seen, what was expected, and what to do.
        is_ambiguous: Whether two instructions are the same after it.
    """

    line: str
    is_ambiguous: bool


def find_cut(preprocessor: Any, tasks: Sequence[str], statistics: Mapping[str, Mapping[str, Any]]) -> Cut | None:
    """Find instructions that the tokenizer cuts, and those that are then the same.

    Args:
        preprocessor: The policy's pre-processor.
        tasks: The dataset's instructions.
        statistics: The dataset's statistics in the policy's names; some policies write the state into the instruction.
    """
    steps = list(preprocessor.steps)
    number = next((i for i, step in enumerate(steps) if isinstance(step, TokenizerProcessorStep)), None)
    if number is None or not tasks:
        return None
    step: Any = steps[number]
    texts = _written(steps[:number], step.task_key, tasks, statistics)
    ids = [step.input_tokenizer(text, truncation=False)["input_ids"] for text in texts]
    cut = [task for task, tokens in zip(tasks, ids, strict=True) if len(tokens) > step.max_length]
    if not cut:
        return None
    kept: dict[tuple[int, ...], list[str]] = {}
    for task, tokens in zip(tasks, ids, strict=True):
        kept.setdefault(tuple(tokens[: step.max_length]), []).append(task)
    same = [group for group in kept.values() if len(group) > 1]
    if same:
        return Cut(
            f"the tokenizer keeps {step.max_length} tokens, so the policy cannot tell apart {_listed(same[0])}; "
            "shorten them with: lerobot-edit-dataset --operation.type modify_tasks --operation.task_replacements "
            '\'{"old": "new"}\'',
            is_ambiguous=True,
        )
    return Cut(
        f"{len(cut)} of {len(tasks)} instructions are longer than the {step.max_length} tokens that the policy "
        f"reads; the end is cut of {_listed(cut)}",
        is_ambiguous=False,
    )


def _written(
    steps: Sequence[Any], key: str, tasks: Sequence[str], statistics: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The instructions as the steps before the tokenizer write them."""
    observation = {}
    if "max" in statistics.get(OBS_STATE, {}):
        # The largest state is written with the most digits.
        largest = torch.as_tensor(statistics[OBS_STATE]["max"]).float().reshape(1, -1)
        observation[OBS_STATE] = largest.expand(len(tasks), -1)
    transition: Any = create_transition(observation=observation, complementary_data={key: list(tasks)})
    for step in steps:
        transition = step(transition)
    texts: list[str] = transition["complementary_data"][key]
    return texts


def _listed(tasks: Sequence[str]) -> str:
    shown = ", ".join(f"'{_shortened(task)}'" for task in tasks[:NAMED])
    return shown if len(tasks) <= NAMED else f"{shown} and {len(tasks) - NAMED} more"


def _shortened(task: str) -> str:
    return task if len(task) <= 2 * SHOWN else f"{task[:SHOWN]} ... {task[-SHOWN:]}"
