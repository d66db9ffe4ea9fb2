"""GridsConfig: policy type "grids", any supported VLA with K visual tokens per camera instead of all of them."""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import NormalizationMode

from .base_choice import GRIDS_TYPE, BasePolicyChoice
from .budget import GRAMMAR, TokenBudget
from .errors import BudgetError, CheckpointError, GridsError
from .interpolation import INTERPOLATIONS
from .sampler import CONTEXTS

REDUCER_NAMES = ("grids", "uniform", "pool", "random", "merge", "fastv", "sparsevlm", "blind")
POSITION_IDS = ("consecutive", "dense")
# Fields of PreTrainedConfig that wrapper and base must agree on; LeRobot sets them on the wrapper.
SHARED_FIELDS = ("n_obs_steps", "input_features", "output_features", "device", "use_amp")


@PreTrainedConfig.register_subclass(GRIDS_TYPE)
@dataclass
class GridsConfig(PreTrainedConfig):
    """Configuration of a grids policy.

    Whatever a LeRobot command reads or sets here that is not a field below (dtype, rtc_config, chunk_size,
    use_relative_actions, ...) is the base policy's.
    """

    base: BasePolicyChoice | None = field(
        default=None, metadata={"help": "The policy that is wrapped: --policy.base.type=smolvla, ..."}
    )
    num_tokens: int = field(default=16, metadata={"help": "K: visual tokens per camera."})
    num_tokens_max: int | None = field(
        default=None,
        metadata={"help": "Largest K this checkpoint can serve at run time. Defaults to num_tokens at training."},
    )
    camera_tokens: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Cameras that get fewer tokens than K, and how many at most."}
    )
    token_budget: str = field(default="constant", metadata={"help": f"K over the training steps: {GRAMMAR}."})
    token_budget_steps: int = field(
        default=0,
        metadata={"help": "Training steps over which a linear, cosine or exponential token budget goes down."},
    )
    # Steps of the token budget that are done, so that lerobot-train goes on where it stopped.
    token_budget_step: int = 0
    reducer: str = field(default="grids", metadata={"help": f"How tokens are reduced: one of {REDUCER_NAMES}."})
    condition_on: list[str] = field(
        default_factory=lambda: ["image", "language", "state", "camera"],
        metadata={"help": f"What the coordinates depend on: any of {CONTEXTS}."},
    )
    hidden_width: int = field(default=512, metadata={"help": "Hidden units of the coordinate head."})
    geometry_width: int = field(default=256, metadata={"help": "Hidden units of the geometry embedding; 0 for none."})
    anchored: bool = field(
        default=True,
        metadata={"help": "Whether each coordinate starts at an anchor of its own, or, as in the paper, all freely."},
    )
    interpolation: str = field(
        default="antialiased", metadata={"help": f"How the feature map is read: one of {INTERPOLATIONS}."}
    )
    position_ids: str = field(
        default="consecutive",
        metadata={"help": f"How the trunk numbers visual tokens: one of {POSITION_IDS}, dense as if all were there."},
    )
    full_layers: int | None = field(
        default=None,
        metadata={
            "help": "Layers of the trunk that see every token (fastv, sparsevlm). Default: 2, or half of fewer than 4."
        },
    )
    base_repo_id: str | None = field(default=None, metadata={"help": "Hub id the dense base came from, if any."})
    base_revision: str | None = field(default=None, metadata={"help": "Commit of base_repo_id that was used."})
    # Of this format; raised when a field changes its meaning.
    version: int = 1

    def __post_init__(self) -> None:
        base: Any = self.base
        if self.device is None and base is not None:
            self.device: str | None = base.device
        super().__post_init__()
        if self.version != 1:
            raise CheckpointError(
                f"grids configuration version {self.version}, but this release reads version 1; "
                "upgrade lerobot_policy_grids"
            )
        if self.reducer not in REDUCER_NAMES:
            raise GridsError(f"reducer '{self.reducer}' is unknown; choose one of {', '.join(REDUCER_NAMES)}")
        unknown = sorted(set(self.condition_on) - set(CONTEXTS))
        if unknown:
            raise GridsError(f"condition_on holds {unknown}; choose any of {', '.join(CONTEXTS)}")
        if not 1 <= self.num_tokens <= self.max_tokens:
            raise BudgetError(
                f"num_tokens={self.num_tokens} with num_tokens_max={self.max_tokens}; "
                f"choose num_tokens from 1 .. {self.max_tokens}"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise GridsError(
                f"interpolation '{self.interpolation}' is unknown; choose one of {', '.join(INTERPOLATIONS)}"
            )
        if self.position_ids not in POSITION_IDS:
            raise GridsError(f"position_ids '{self.position_ids}' is unknown; choose one of {', '.join(POSITION_IDS)}")
        _ = self.budget  # refuses what cannot be read
        self.share_with_base()

    @property
    def budget(self) -> TokenBudget:
        """K over the training steps."""
        return TokenBudget(self.token_budget, self.max_tokens, self.num_tokens, self.token_budget_steps)

    @property
    def max_tokens(self) -> int:
        """Largest budget the sampler is built for."""
        return self.num_tokens if self.num_tokens_max is None else self.num_tokens_max

    def share_with_base(self) -> None:
        """Give the base what LeRobot put on the wrapper, and take from it what only the base was told."""
        base: Any = self.base
        if base is None:
            return
        for name in SHARED_FIELDS:
            # Features: the side that has them wins; LeRobot fills only the wrapper's, a dense checkpoint the base's.
            if name.endswith("_features") and not getattr(self, name):
                setattr(self, name, deepcopy(getattr(base, name)))
            else:
                setattr(base, name, deepcopy(getattr(self, name)))

    def require_base(self) -> PreTrainedConfig:
        """The base policy's configuration.

        Raises:
            GridsError: If none was given.
        """
        if self.base is None:
            raise GridsError("policy type 'grids' wraps another policy; say which with --policy.base.type=smolvla")
        base: Any = self.base
        return base

    @property
    def normalization_mapping(self) -> dict[str, NormalizationMode]:
        """The base policy's, which its processors apply."""
        mapping: dict[str, NormalizationMode] = self.require_base().normalization_mapping
        return mapping

    @property
    def observation_delta_indices(self) -> list[int] | None:
        return self.require_base().observation_delta_indices

    @property
    def action_delta_indices(self) -> list[int] | None:
        return self.require_base().action_delta_indices

    @property
    def reward_delta_indices(self) -> list[int] | None:
        return self.require_base().reward_delta_indices

    def get_optimizer_preset(self) -> Any:
        return self.require_base().get_optimizer_preset()

    def get_scheduler_preset(self) -> Any:
        return self.require_base().get_scheduler_preset()

    def validate_features(self) -> None:
        self.require_base().validate_features()

    def __getattr__(self, name: str) -> Any:
        # Only reached for what is not found here: then the base policy's answer is the answer.
        base = self.__dict__.get("base")
        if base is None or name.startswith("__"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        base = self.__dict__.get("base")
        if base is not None and name not in _OWN_FIELDS and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _save_pretrained(self, save_directory: Path) -> None:
        # Where the weights came from is a fact about a machine and a moment; a checkpoint holds its own weights.
        saved = deepcopy(self)
        saved.num_tokens_max = self.max_tokens
        config: Any
        for config in filter(None, (saved, saved.base)):
            config.pretrained_path = config.pretrained_revision = None
        if hasattr(saved, "load_vlm_weights"):
            saved.load_vlm_weights = False
        super(GridsConfig, saved)._save_pretrained(save_directory)


_OWN_FIELDS = {f.name for f in fields(GridsConfig)}
