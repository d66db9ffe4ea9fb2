"""Rendering a model card: YAML metadata that the Hub searches by, and the template's text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .measurements import ALL_TASKS, Measurements

TEMPLATE = Path(__file__).with_name("model_card.md")


@dataclass(frozen=True)
class PolicyFacts:
    """What a checkpoint says about itself.

    Attributes:
        repo_id: Where it is pushed to.
        family: LeRobot's type of the dense policy.
        num_tokens: K; None for a dense policy.
        reducer: Name of the reducer, as in `--reducer`.
        reducer_summary: What its tokens are, in words.
        num_tokens_max: Largest K that it can serve.
        cameras: Names of its images.
        format: "adapter" or "full".
        base_repo_id: Hub id of the dense policy that it started from, if any.
        base_revision: Commit of that.
        base_sha256: Of its weights, in an adapter.
        dataset: Hub id of the training data, if it is on the Hub.
        licence: Identifier as the Hub spells it, if one was given.
        training: Options of the training run, in words.
        picture: Whether looks.png lies beside the card.
        tags: Of the author, besides the project's.
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


def render(facts: PolicyFacts, measurements: Measurements, template: Path = TEMPLATE) -> str:
    """The text of README.md.

    Args:
        facts: Of the checkpoint.
        measurements: Of it, and of what it is compared with.
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
            # What the client tells results apart by; it would put all under the first task's name.
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
        # The Hub guesses otherwise, from file names that it knows.
        base_model_relation={"adapter": "adapter", "full": "finetune"}[facts.format] if has_base else None,
        datasets=[facts.dataset] if facts.dataset else None,
        tags=[
            "robotics",
            "lerobot",
            facts.family,
            *([facts.reducer, "token-reduction"] if facts.num_tokens is not None else []),
            *facts.tags,
        ],
        # The client writes it out where no result needs it.
        model_name=facts.repo_id.split("/")[-1] if results else None,
        eval_results=results or None,
    )
