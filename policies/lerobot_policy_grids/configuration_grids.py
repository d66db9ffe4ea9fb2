"""GridsConfig: policy type "grids", any supported VLA with K visual tokens per camera instead of all of them."""

from copy import deepcopy
from dataclasses import dataclass, field, fields
from numbers import Integral
from pathlib import Path
from typing import Any

import draccus
import lerobot.policies  # noqa: F401  (registers the built-in policy types)
from lerobot.configs import PreTrainedConfig
from lerobot.configs.types import NormalizationMode

from .base_options import add_base_options, base_options, hand_to_base, hide_from_instances, take_defaults_from
from .errors import BudgetError, CheckpointError, GridsError
from .families import families
from .reducers import ReducerConfig, reducer_config
from .runtime import PRECISIONS, QUANTISATIONS, RUNTIMES
from .schedule import GRAMMAR, TokenSchedule

GRIDS_TYPE = "grids"
POSITION_IDS = ("consecutive", "dense")
REFUSED_PUSH = (
    "LeRobot's own push sends its training configuration, which holds paths of this machine; drop --policy.repo_id, "
    "give --policy.push_to_hub=false, and push with: lerobot-grids push RUN/checkpoints/last/pretrained_model user/name"
)
# Types of fields whose wrong values would fail later, and unclearly.
TYPES: dict[str, Any] = {
    "base": PreTrainedConfig | None,
    "reducer": ReducerConfig,
    "runtime": str,
    "quantise": str,
    "precision": str,
    "schedule": str,
    "schedule_steps": int,
    "version": int,
}
# Fields of PreTrainedConfig that wrapper and base must agree on; LeRobot sets them on the wrapper.
SHARED_FIELDS = ("n_obs_steps", "input_features", "output_features", "device", "use_amp")


# draccus registers every choice of a choice field before parsing, so a field of type `PreTrainedConfig` inside a
# `PreTrainedConfig` recurses for ever and hangs every LeRobot command, even `--policy.type=act`. It looks inside a
# choice type only if that is a dataclass.
@dataclass
class BasePolicyChoice(draccus.ChoiceRegistry):
    """The type of `GridsConfig.base`: `PreTrainedConfig`'s choices without "grids"."""

    @classmethod
    def get_known_choices(cls) -> dict[str, Any]:
        return {name: choice for name, choice in PreTrainedConfig.get_known_choices().items() if name != GRIDS_TYPE}

    @classmethod
    def get_choice_class(cls, name: str) -> Any:
        return cls.get_known_choices()[name]

    @classmethod
    def get_choice_name(cls, subcls: Any) -> str:
        if subcls is cls:
            raise ValueError(f"{cls.__name__} is a proxy and no choice itself")
        return str(PreTrainedConfig.get_choice_name(subcls))


# Without this draccus drops the "type" key when it encodes a base config, and the file cannot be read back.
BasePolicyChoice.register(PreTrainedConfig)


@PreTrainedConfig.register_subclass(GRIDS_TYPE)
@dataclass
@add_base_options
class GridsConfig(PreTrainedConfig):
    """Configuration of a grids policy.

    Whatever a LeRobot command reads or sets here that is not a field below (dtype, rtc_config, chunk_size,
    use_relative_actions, ...) is the base policy's. On a command line and in the constructor, too: `base_options`.
    """

    base: BasePolicyChoice | None = field(
        default=None, metadata={"help": "The policy that is wrapped: --policy.base.type=NAME, ..."}
    )
    reducer: ReducerConfig = field(
        default_factory=lambda: reducer_config("grids"),
        metadata={"help": "How its visual tokens are reduced: --policy.reducer.type=grids, ..."},
    )
    num_tokens: int | None = field(
        default=None, metadata={"help": "Short for reducer.num_tokens, K: visual tokens per camera."}
    )
    position_ids: str | None = field(
        default=None,
        metadata={
            "help": f"How the trunk numbers visual tokens: one of {POSITION_IDS}, dense as if all were there. "
            "Defaults to dense; reducers inside the trunk keep the ids of the tokens that they keep."
        },
    )
    schedule: str = field(default="constant", metadata={"help": f"K over the training steps: {GRAMMAR}."})
    schedule_steps: int = field(
        default=0,
        metadata={"help": "Training steps over which a linear, cosine or exponential schedule goes down."},
    )
    runtime: str = field(
        default="auto",
        metadata={
            "help": f"How actions are computed: one of {RUNTIMES}. fast skips what does not change them, and uses CUDA "
            "graphs on a GPU; compiled also has torch compile it. Both are checked against eager first. auto is fast "
            "on a GPU where the policy can, and eager elsewhere."
        },
    )
    quantise: str = field(
        default="none",
        metadata={
            "help": f"Weights of trunk and action expert when acting with a fast or compiled runtime: one of "
            f"{QUANTISATIONS}. Needs torchao; checked against eager first."
        },
    )
    precision: str = field(
        default="own",
        metadata={
            "help": f"How exactly a fast or compiled runtime computes products of float32: one of {PRECISIONS}, own as "
            "the process does; bf16 is tf32 with a vision tower in bfloat16. Checked against fp32 first."
        },
    )
    base_repo_id: str | None = field(default=None, metadata={"help": "Hub id the dense base came from, if any."})
    base_revision: str | None = field(default=None, metadata={"help": "Commit of base_repo_id that was used."})
    # Version of this format; raised when a field changes its meaning.
    version: int = 1

    def __post_init__(self) -> None:
        self._check_types()
        base: Any = self.base
        given = {name: value for name in BASE_OPTIONS if (value := self.__dict__.pop(name, None)) is not None}
        if base is not None:
            self._take_what_the_weights_need(base)
            hand_to_base(base, given)
            if self.device is None:
                self.device: str | None = base.device
        elif given:
            raise GridsError(f"{', '.join(given)} of policy type 'grids' without a base; give --policy.base.type=NAME")
        super().__post_init__()
        if self.version != 1:
            raise CheckpointError(
                f"grids configuration version {self.version}, but this release reads version 1; "
                "upgrade lerobot_policy_grids"
            )
        if self.repo_id is not None:
            raise GridsError(REFUSED_PUSH)
        if self.num_tokens is not None:
            self.set_num_tokens(self.num_tokens)
            self.num_tokens = None
        self.set_runtime(self.runtime, self.quantise, self.precision)
        if self.position_ids not in (None, *POSITION_IDS):
            raise GridsError(f"position_ids '{self.position_ids}' is unknown; choose one of {', '.join(POSITION_IDS)}")
        if self.position_ids == "dense" and self.reducer.in_trunk:
            raise GridsError(
                f"reducer '{self.reducer.type}' keeps the position ids of the tokens that it keeps; drop position_ids"
            )
        _ = self.token_schedule  # refuses what cannot be read
        self.__dict__["_is_complete"] = True
        self.share_with_base()

    @staticmethod
    def _take_what_the_weights_need(base: Any) -> None:
        """The options with which the weights in `base.pretrained_path` were trained."""
        path = base.pretrained_path
        if path is None:
            return
        try:
            trained = PreTrainedConfig.from_pretrained(path, revision=base.pretrained_revision)
        except Exception:  # whoever needs the weights says why they cannot be had; a complete checkpoint does not
            return
        take_defaults_from(base, trained)

    def _check_types(self) -> None:
        for name, kind in TYPES.items():
            value = getattr(self, name)
            if not isinstance(value, kind):
                raise GridsError(f"GridsConfig has {name}={value!r}, expected {_described(kind)}; give one")

    def set_num_tokens(self, num_tokens: int) -> None:
        """Act with K tokens per camera from now on.

        Raises:
            BudgetError: If the reducer cannot.
        """
        reducer: Any = self.reducer
        if not isinstance(num_tokens, Integral):
            raise BudgetError(f"num_tokens={num_tokens!r} is not a whole number; give 1 or more")
        if reducer.budget == 0:
            raise BudgetError(f"num_tokens={num_tokens}, but reducer '{reducer.type}' keeps none; drop num_tokens")
        reducer.num_tokens = num_tokens
        reducer.__post_init__()

    def set_runtime(self, runtime: str, quantise: str = "none", precision: str = "own") -> None:
        """Have actions computed in this way.

        Raises:
            GridsError: If there is no such way.
        """
        if quantise not in QUANTISATIONS:
            raise GridsError(f"quantise '{quantise}' is unknown; choose one of {', '.join(QUANTISATIONS)}")
        if precision not in PRECISIONS:
            raise GridsError(f"precision '{precision}' is unknown; choose one of {', '.join(PRECISIONS)}")
        if runtime not in RUNTIMES:
            raise GridsError(f"runtime '{runtime}' is unknown; choose one of {', '.join(RUNTIMES)}")
        if runtime in ("auto", "eager") and quantise != "none":
            raise GridsError(
                f"quantise={quantise} with runtime={runtime}, which runs the weights as they are; give runtime=fast"
            )
        if runtime in ("auto", "eager") and precision != "own":
            raise GridsError(
                f"precision={precision} with runtime={runtime}, which computes as the process does; give runtime=fast"
            )
        self.runtime, self.quantise, self.precision = runtime, quantise, precision

    @property
    def token_schedule(self) -> TokenSchedule:
        """K over the training steps.

        Raises:
            BudgetError: If it cannot be read, or there are no tokens to schedule.
        """
        if self.reducer.budget == 0 and self.schedule != "constant":
            raise BudgetError(f"schedule '{self.schedule}' of a blind policy, which has no visual tokens; drop it")
        return TokenSchedule(self.schedule, self.reducer.largest, self.reducer.budget, self.schedule_steps)

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
            raise GridsError("policy type 'grids' wraps another policy; say which with --policy.base.type=NAME")
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
        if name in BASE_OPTIONS and "_is_complete" not in self.__dict__:
            # Of the constructor: `__post_init__` hands it on.
            self.__dict__[name] = value
        elif base is not None and name not in _OWN_FIELDS and hasattr(base, name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def _save_pretrained(self, save_directory: Path) -> None:
        saved: Any = deepcopy(self)
        if saved.reducer.budget:
            saved.reducer.num_tokens_max = saved.reducer.largest
        config: Any
        for config in filter(None, (saved, saved.base)):
            # Not saved: the checkpoint holds its own weights.
            config.pretrained_path = config.pretrained_revision = None
        if saved.base is not None and saved.base.type in families():
            families()[saved.base.type].without_download(saved.base)
        super(GridsConfig, saved)._save_pretrained(save_directory)


def _described(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind)


BASE_OPTIONS = frozenset(base_options()) & {f.name for f in fields(GridsConfig)}
_OWN_FIELDS = {f.name for f in fields(GridsConfig)} - BASE_OPTIONS
hide_from_instances(GridsConfig, BASE_OPTIONS)


def base_config(config: Any) -> Any:
    """The dense policy's configuration, of itself or of a grids policy."""
    return config.require_base() if config.type == GRIDS_TYPE else config
