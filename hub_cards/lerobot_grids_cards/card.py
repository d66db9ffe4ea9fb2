"""Render a model card: YAML metadata for the Hub's search, and the text of the template."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .measurements import ALL_TASKS, Measurements

TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True)
class PolicyFacts:
    """Facts about a checkpoint.

    Attributes:
        repo_id: Repository of the push, `user/name`.
        family: LeRobot's type of the dense policy.
        num_tokens: K, visual tokens per camera; None for a dense policy.
        num_tokens_max: Largest K that can be set at run time.
        cameras: Feature names of the camera images.
        format: "adapter" or "full".
        base_repo_id: Hub id of the dense policy that training started from, if any.
        base_revision: Commit of that policy.
        base_sha256: SHA-256 of that policy's weights, for an adapter.
        dataset: Hub id of the training data, if it is on the Hub.
        licence: Identifier of the licence in the Hub's spelling, if given.
        training: Options of the training run and their values.
        picture: Whether looks.png is beside the card.
        tags: The author's tags, in addition to the project's.
        reducer: Name of the reducer, as in `--reducer`.
        reducer_summary: Description of the reducer's tokens.
        num_steps: Integration steps of its flow for one action chunk; None for a policy without one.
    """

    repo_id: str
    family: str
    num_tokens: int | None
    num_tokens_max: int | None
    cameras: list[str]
    format: str
    base_repo_id: str | None = None
    base_revision: str | None = None
    base_sha256: str | None = None
    dataset: str | None = None
    licence: str | None = None
    training: dict[str, str] = field(default_factory=dict)
    picture: bool = False
    tags: list[str] = field(default_factory=list)
    reducer: str = "grids"
    reducer_summary: str = ""
    num_steps: int | None = None


def render(facts: PolicyFacts, measurements: Measurements, template: Path = TEMPLATE) -> str:
    """Render the text of README.md.

    Args:
        facts: Facts about the checkpoint.
        measurements: Results of the checkpoint and of policies it is compared with.
        template: A jinja2 template; it gets `card_data`, `facts` and `measurements`.
    """
    given: dict[str, Any] = {"facts": facts, "measurements": measurements}
    card = ModelCard.from_template(_metadata(facts, measurements), template_path=str(template), **given)
    return str(card).rstrip() + "\n"


def _metadata(facts: PolicyFacts, measurements: Measurements) -> ModelCardData:
    results = [
        EvalResult(
            task_type="robotics",
            task_name="robotics",
            dataset_type="simulation",
            dataset_name=row.task,
            # The client groups results by this field; without it, all get the first task's name.
            dataset_config=row.task,
            metric_type="success_rate",
            metric_name=f"success rate at {row.tokens} visual tokens, {row.successes} of {row.episodes} episodes",
            metric_value=round(row.successes / row.episodes, 4),
        )
        for row in measurements.successes
        if row.own and row.task != ALL_TASKS
    ]
    has_base = facts.base_repo_id is not None
    return ModelCardData(
        library_name="lerobot",
        pipeline_tag="robotics",
        license=facts.licence,
        base_model=facts.base_repo_id,
        # Without this the Hub guesses from file names.
        base_model_relation={"adapter": "adapter", "full": "finetune"}[facts.format] if has_base else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=[
            "robotics",
            "lerobot",
            facts.family,
            *([facts.reducer, "token-reduction"] if facts.num_tokens is not None else []),
            *facts.tags,
        ],
        # Set only with results, because the client also writes it without any.
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
