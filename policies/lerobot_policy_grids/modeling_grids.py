"""GridsPolicy: a base policy and the reducer between its vision tower and its trunk."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.factory import get_policy_class
from lerobot.policies.pretrained import PreTrainedPolicy
from torch import Tensor, nn

from .adapters import ADAPTERS, Seam, get_adapter
from .base_weights import fetch_base
from .checkpoint import find_checkpoint, load_weights, policy_type
from .configuration_grids import GridsConfig
from .errors import BudgetError, CheckpointError, GridsError
from .files import ADAPTER_FILE, MANIFEST_FILE, WEIGHTS_FILE
from .manifest import verify_manifest
from .reducer import Reducer
from .reducers import make_reducer

# Draws after which an elastic budget has shown what it draws.
MANY_STEPS = 1000
# Arguments of `from_pretrained` that are meant for the Hub's client.
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def build(config: PreTrainedConfig, **kwargs: Any) -> Any:
    """Construct the policy that a configuration describes with random weights, fetching none.

    Args:
        config: Of a base policy or of a grids policy.
        **kwargs: What its constructor takes besides.
    """
    # A grids configuration passes this on to its base.
    if hasattr(config, "load_vlm_weights"):
        config.load_vlm_weights = False
    return get_policy_class(config.type)(config, **kwargs)


def load_checkpoint(policy: Any, folder: Path) -> None:
    """Load a checkpoint folder's weights into a policy, dense or grids: exactly, or not at all.

    An adapter's base is fetched from the Hub, or its cache, first. LeRobot's own `from_pretrained` of the π policies
    prints failures and returns random weights.

    Raises:
        CheckpointError: If the weights or an adapter's base do not fit, or a file is not as the folder's manifest says.
    """
    manifest = verify_manifest(folder)
    if manifest is None or manifest.base is None:
        load_file(policy, folder / WEIGHTS_FILE)
    elif isinstance(policy, GridsPolicy):
        load_file(policy.base, fetch_base(manifest.base))
        load_weights(policy, folder / ADAPTER_FILE, required="reducer.")
    else:
        raise CheckpointError(f"{folder} is an adapter for a '{policy.config.type}' policy, expected 'grids'")


def load_file(policy: Any, path: Path) -> None:
    """Load a weights file that holds all of a policy, under its names of today or of older releases.

    Raises:
        CheckpointError: If it does not fit exactly.
    """
    kind = policy.config.type
    rename = partial(get_adapter(kind).checkpoint_names, policy) if kind in ADAPTERS else None
    load_weights(policy, path, rename)


class GridsPolicy(PreTrainedPolicy):
    """Any supported VLA, with K sampled visual tokens per camera.

    Args:
        config: Its configuration.
        base: The base policy, if it exists already; otherwise it is built from `config.base`, and loaded from
            `config.base.pretrained_path` where that is set.
        **kwargs: `dataset_stats` and `dataset_meta`, passed to the base policy.

    Raises:
        UnsupportedPolicyError: If no adapter knows the base policy.
        BudgetError: If `config.num_tokens` exceeds the dense policy's tokens.
        CheckpointError: If the base's weights do not fit.
    """

    config_class = GridsConfig
    name = "grids"

    def __init__(self, config: GridsConfig, *, base: PreTrainedPolicy | None = None, **kwargs: Any) -> None:
        super().__init__(config)
        self.config: GridsConfig
        config.share_with_base()
        base_config = config.require_base()
        self.adapter = get_adapter(base_config.type)
        if base is None:
            # Starting from the vision-language model's own weights is a wish that only the base's class can fulfil.
            base = get_policy_class(base_config.type)(base_config, **kwargs)
            if base_config.pretrained_path is not None:
                load_checkpoint(base, find_checkpoint(str(base_config.pretrained_path)))
        self.base: Any = base
        layout = self.adapter.layout(base)
        self.reducer: Any = make_reducer(config, layout)
        self._looks_everywhere = False
        self.seam = Seam(partial(_current_reducer, self), layout)
        self.check_budget()
        self.adapter.attach(base, self.seam)
        if self.reducer.in_trunk:
            self.adapter.attach_to_trunk(base, self.seam)
        elif config.position_ids == "dense":
            self.adapter.keep_positions(base, self.seam)
        self.to(config.device)

    @property
    def num_tokens(self) -> int:
        """K, visual tokens per camera. May be set to any 1 .. num_tokens_max between calls."""
        return int(self.reducer.num_tokens)

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        self._set_tokens(value)
        self.config.num_tokens = self.num_tokens

    def _set_tokens(self, value: int) -> None:
        # PEFT keeps the original reducer beside its trainable copy, in a wrapper that would swallow the attribute.
        for module in self.reducer.modules():
            if hasattr(type(module), "tokens_of"):
                module.num_tokens = value

    def check_budget(self) -> None:
        """Refuse a token budget that could not do what it says.

        Raises:
            BudgetError: If there are no tokens to budget, or none to come down from.
        """
        config, budget = self.config, self.config.budget
        for k in self._coming_budgets():
            self.reducer.check_budget(k)
        if self.num_tokens == 0:
            if budget.schedule != "constant" or config.camera_tokens:
                raise BudgetError("a blind policy has no visual tokens: drop token budget and camera_tokens")
        elif budget.goes_down and config.max_tokens == config.num_tokens < self.seam.layout.num_dense_tokens:
            raise BudgetError(
                f"token budget '{budget.text}' has nothing to come down from: num_tokens_max is {config.max_tokens}, "
                "as num_tokens; give a larger num_tokens_max, or start from the dense policy"
            )

    def _coming_budgets(self) -> set[int]:
        """What the reducer will be asked for, where it cannot serve everything."""
        if type(self.reducer).check_budget is Reducer.check_budget:
            return set()
        # Elastic budgets have no last step.
        steps = self.config.token_budget_steps or MANY_STEPS
        budgets = {self.config.num_tokens} | {self.config.budget.at(step) for step in range(steps)}
        return {min(k, limit) for k in budgets for limit in (k, *self.config.camera_tokens.values())}

    def train(self, mode: bool = True) -> Self:
        """As of any module. In training the token budget is that of the step, otherwise `num_tokens`."""
        super().train(mode)
        self.follow_budget(self.config.token_budget_step)
        return self

    def follow_budget(self, step: int) -> int:
        """Set the budget of a training step, counted from 0, and return it."""
        self.config.token_budget_step = step
        if self.num_tokens > 0:
            self._set_tokens(self.config.budget.at(step) if self.training else self.config.num_tokens)
        return self.num_tokens

    def update(self) -> None:
        """A training step is done; lerobot-train says so after each."""
        self.follow_budget(self.config.token_budget_step + 1)

    @contextmanager
    def looking_everywhere(self) -> Iterator[None]:
        """In this block the base policy gets every visual token, as if it were not wrapped."""
        self._looks_everywhere = True
        try:
            yield
        finally:
            self._looks_everywhere = False

    def detach(self) -> PreTrainedPolicy:
        """Take the reducer out and return the base policy, bit-identical to what it was before wrapping."""
        self.adapter.detach(self.base)
        base: PreTrainedPolicy = self.base
        return base

    def forward(self, batch: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, dict[str, Any] | None]:
        """Training loss of the base policy, seen through K tokens per camera.

        Args:
            batch: A pre-processed batch.
            **kwargs: What the base policy's forward takes (noise, time, reduction, ...).

        Returns:
            (loss, dictionary of plain numbers to log).
        """
        loss, log = self.base.forward(batch, **kwargs)
        return loss, log

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Action chunk [b, chunk_size, action_dim] of the base policy, seen through K tokens per camera."""
        chunk: Tensor = self.base.predict_action_chunk(batch, **kwargs)
        return chunk

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Tensor:
        """Next action [b, action_dim], from the base policy's queue.

        Raises:
            GridsError: If it is NaN or infinite, which no robot should be sent.
        """
        action: Tensor = self.base.select_action(batch, **kwargs)
        if not torch.isfinite(action).all():
            raise GridsError("the policy's action holds NaN or infinity; check the observation and its normalisation")
        return action

    def reset(self) -> None:
        self.base.reset()

    def get_optim_params(self) -> Any:
        params: list[nn.Parameter] = [p for p in self.parameters() if p.requires_grad]
        return params

    def supports_rtc(self) -> bool:
        return bool(self.base.supports_rtc())

    def init_rtc_processor(self) -> None:
        """Real-time chunking: LeRobot sets `rtc_config` on the wrapper's configuration, which is the base's."""
        if hasattr(self.base, "init_rtc_processor"):
            self.base.init_rtc_processor()

    def _get_default_peft_targets(self) -> dict[str, Any] | None:
        """The base policy's LoRA targets under our prefix, with the reducer trained whole."""
        targets = self.base._get_default_peft_targets()
        if targets is None:
            return None
        modules = targets["target_modules"]
        if isinstance(modules, str):
            modules = rf"base\.(?:{modules})"
        return {
            **targets,
            "target_modules": modules,
            "modules_to_save": [*(targets.get("modules_to_save") or []), "reducer"],
        }

    def _save_pretrained(self, save_directory: Path, state_dict: dict[str, Tensor] | None = None) -> None:
        # They would describe what was here before.
        for name in (MANIFEST_FILE, ADAPTER_FILE):
            (save_directory / name).unlink(missing_ok=True)
        super()._save_pretrained(save_directory, state_dict=state_dict)

    def push_model_to_hub(
        self,
        cfg: Any,
        peft_model: Any | None = None,
        state_dict: dict[str, Tensor] | None = None,
        dataset_meta: Any | None = None,
    ) -> None:
        """Push the trained policy as lerobot-train asks for it: one commit, without paths of this machine.

        Args:
            cfg: LeRobot's training configuration.
            peft_model: PEFT's wrapper, where the policy was trained through one; it is merged.
            state_dict: The whole state, where it is sharded.
            dataset_meta: Not used; LeRobot's own card shows it.

        Raises:
            GridsError: If it is not fit to be pushed, or the Hub refuses.
        """
        # Only here: acting needs no cards.
        from .training_push import push_trained

        push_trained(self, cfg, peft_model, state_dict)

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | Path, *, strict: bool = True, **kwargs: Any) -> Self:
        """Load a grids checkpoint: a folder, the output folder of a run, or a repository on the Hub.

        Args:
            pretrained_name_or_path: Folder or Hub id.
            strict: Must be true; a checkpoint that does not fit exactly is refused.
            **kwargs: As for any LeRobot policy: config, revision, token, cache_dir, ...

        Returns:
            The policy on `config.device`, in evaluation mode.

        Raises:
            CheckpointError: If the checkpoint is incomplete or its weights do not fit exactly.
        """
        if not strict:
            raise CheckpointError("strict=False would leave random weights in the policy; load with strict=True")
        options = {name: kwargs.pop(name) for name in HUB_OPTIONS if name in kwargs}
        folder = find_checkpoint(str(pretrained_name_or_path), **options)
        kind = policy_type(folder)
        if kind != cls.name:
            raise CheckpointError(f"{folder} is a '{kind}' policy, not '{cls.name}'; load it with its own class")
        return super().from_pretrained(str(folder), strict=True, **kwargs)

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        load_checkpoint(model, Path(model_file).parent)
        return model


def _current_reducer(policy: GridsPolicy) -> nn.Module | None:
    reducer: nn.Module = policy.reducer
    return None if policy._looks_everywhere else reducer
