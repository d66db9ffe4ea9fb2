"""GridsPolicy: a base policy and the reducer between its vision tower and its trunk."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from lerobot.configs import PreTrainedConfig
from lerobot.policies.pretrained import PreTrainedPolicy
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor, nn

from .checkpoint.atomic import atomic_files
from .checkpoint.files import ADAPTER_FILE, MANIFEST_FILE
from .checkpoint.find import find_checkpoint, policy_type, read_config
from .checkpoint.load import load_checkpoint
from .checkpoint.statistics import advise, find_fault
from .checkpoint.weights import require_finite
from .configuration_grids import GRIDS_TYPE, REFUSED_PUSH, GridsConfig
from .errors import BudgetError, CheckpointError, DatasetError, GridsError, UnsupportedPolicyError
from .families import DensePolicy, Seam, get_family
from .families.acting import act_eagerly
from .families.base import dimension_names, width_faults
from .finite import require_finite_action, require_finite_batch
from .forwarding import declare_as, forward_methods
from .looks import are_shown, showing, warn_of_eager_points
from .modules import is_watched, quick_eval
from .reducers import Reducer, ReducerConfig, reducer_config
from .reducers.base import MapReducer
from .reducers.random import RandomReducer
from .runtime import FastRuntime
from .versions import warn_of_unknown_lerobot

warn_of_unknown_lerobot()

# Arguments of `from_pretrained` that are meant for the Hub's client.
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")

RENAMED = (
    "LeRobot renames features and not their statistics: give the dataset's features the policy's names, or train with "
    "lerobot-grids fit --rename_map"
)


def compress(
    policy: DensePolicy,
    num_tokens: int | None = None,
    reducer: str | ReducerConfig = "grids",
    *,
    runtime: str = "auto",
) -> "GridsPolicy":
    """Give a dense policy K visual tokens per camera, by an untrained reducer.

    Args:
        policy: A LeRobot policy of a supported type. It is changed in place; `detach()` of the result gives it back,
            bit-identical to what it was.
        num_tokens: K. Defaults to the reducer's own, 16.
        reducer: The name of a reducer, or its configuration.
        runtime: How it acts: "auto", "eager", "fast" or "compiled" (`GridsPolicy.use_runtime`).

    Returns:
        The grids policy, on the same device and in evaluation mode.

    Raises:
        UnsupportedPolicyError: If the policy's type is not supported, or the reducer cannot work in it.
        BudgetError: If the policy has fewer tokens than that.
    """
    if not isinstance(getattr(policy, "config", None), PreTrainedConfig):
        raise UnsupportedPolicyError(
            f"{type(policy).__name__} is not a LeRobot policy with its configuration; give a policy that LeRobot loaded"
        )
    device = next(policy.parameters()).device
    chosen = reducer_config(reducer) if isinstance(reducer, str) else reducer
    # LeRobot's configurations check that their device exists, and "meta" is not a device that exists.
    config = GridsConfig(base=policy.config, reducer=chosen, num_tokens=num_tokens, device="cpu", runtime=runtime)
    config.device = str(device)
    with torch.device(device):
        return GridsPolicy(config, base=policy).eval()


@forward_methods
class GridsPolicy(PreTrainedPolicy):
    """Any supported VLA, with K visual tokens per camera.

    What the base policy can, this policy can (`forwarding`).

    Args:
        config: Its configuration.
        base: The base policy, if it exists already; otherwise it is built from `config.base`, and loaded from
            `config.base.pretrained_path` where that is set.
        fresh: Whether no weights are loaded into it afterwards, so that the base begins as LeRobot lets it begin.
        **kwargs: `dataset_stats` and `dataset_meta`, passed to the base policy.

    Raises:
        UnsupportedPolicyError: If the base policy's type is not supported.
        BudgetError: If `config.reducer.num_tokens` exceeds the dense policy's tokens.
        CheckpointError: If the base's weights do not fit.
    """

    config_class = GridsConfig
    name = GRIDS_TYPE

    def __init__(
        self, config: GridsConfig, *, base: DensePolicy | None = None, fresh: bool = True, **kwargs: Any
    ) -> None:
        if not isinstance(config, GridsConfig):
            raise GridsError(
                f"GridsPolicy takes a GridsConfig, not {type(config).__name__}; wrap a policy in memory with compress()"
            )
        super().__init__(config)
        self.config: GridsConfig
        config.share_with_base()
        base_config = config.require_base()
        self.family = get_family(base_config.type)
        self.family.require_inputs(base_config.input_features)
        if base is None:
            # Only the base's constructor honours load_vlm_weights.
            is_fresh = fresh and base_config.pretrained_path is None
            base = self.family.build(base_config, fresh=is_fresh, **kwargs)
            if base_config.pretrained_path is not None:
                load_checkpoint(base, find_checkpoint(str(base_config.pretrained_path)))
        self.base: Any = base
        declare_as(type(self), type(base))
        _take_from_dataset(base_config, **kwargs)
        layout = self.family.layout(base)
        if config.reducer.projected:
            layout = self.family.projected(base, layout)
        after = config.reducer.inside
        inside = None if after is None else self.family.tower(base).layout(layout, after)
        self.reducer: Any = config.reducer.build(inside or layout)
        self._is_attached = True
        self._looks_everywhere = False
        self._acts_eagerly = False
        self.seam = Seam(partial(_current_reducer, self), layout, partial(self.family.image_region, base), inside)
        self.check_schedule()
        self.family.attach(base, self.seam)
        if after is not None:
            self.family.attach_to_tower(base, self.seam, after)
        if self.reducer.in_trunk:
            self.family.attach_to_trunk(base, self.seam)
        else:
            config.position_ids = config.position_ids or "dense"
            if config.position_ids == "dense":
                self.family.keep_positions(base, self.seam)
        self.to(config.device)
        self.use_runtime(config.runtime, config.quantise, config.precision)

    def use_runtime(self, runtime: str, quantise: str = "none", precision: str = "own") -> None:
        """Act in another way from now on; for the same observation and noise the actions are the same up to rounding.

        Args:
            runtime: "eager" runs LeRobot's own loop. "fast" runs a prefill and denoising steps without what does not
                change the actions, on a GPU as CUDA graphs. "compiled" lets torch compile these first. Both are held
                against the eager way at the first observation, and say how far they are apart. "auto" is "fast" on a
                GPU, unless the policy cannot or something watches how it acts, and "eager" elsewhere.
            quantise: Weights of trunk and action expert: "none" as they are, "int8" with 8 bits, "int8_dynamic" with
                8 bits and what they are multiplied with, too. Needs torchao, and "fast" or "compiled".
            precision: "own" computes products of float32 as the process does, "fp32" as float32, "tf32" with inputs of
                10 bits on a GPU that can. "bf16" is "tf32" with a copy of the vision tower in bfloat16, which takes 2
                bytes of memory for each of its weights. Needs "fast" or "compiled".

        Raises:
            UnsupportedPolicyError: If the base policy, or the reducer, cannot act in that way.
        """
        base = self.require_attached()
        asked = runtime, quantise, precision
        before = self.config.runtime, self.config.quantise, self.config.precision
        self.config.set_runtime(*asked)
        act_eagerly(self.family.model(base), self.seam)
        self._is_undecided = runtime == "auto"
        if runtime in ("auto", "eager"):
            return
        try:
            self._act_through(*asked)
        except UnsupportedPolicyError:
            self.config.set_runtime(*(("eager", "none", "own") if before == asked else before))
            raise

    def _act_through(self, runtime: str, quantise: str = "none", precision: str = "own") -> None:
        base = self.require_attached()
        fast = FastRuntime(
            runtime,
            quantise,
            precision,
            build=partial(self.family.phases, base, self.seam),
            budget=self.seam.budget,
            weights=partial(_modules, self),
            blocked=partial(_not_acting, self),
        )
        reducer = self._reducers()[0]
        reason = None if isinstance(reducer, MapReducer) else "does not work between vision tower and trunk"
        if isinstance(reducer, RandomReducer):
            reason = "draws anew at each look, so that no two ways to act can be compared"
        if reason is not None:
            raise UnsupportedPolicyError(
                f"runtime={runtime} is not available with reducer '{self.config.reducer.type}', which {reason}; "
                "use runtime=eager"
            )
        self.family.act_through(base, self.seam, fast)

    def acts_fast(self) -> bool:
        """Whether the fast path is asked for the next action. It may still turn out not to be exact enough."""
        if self._acts_eagerly:
            return False
        if self.config.runtime == "auto":
            device = next(self.parameters()).device
            if not _pays(device) or torch.is_autocast_enabled(device.type) or _not_acting(self) is not None:
                return False
            if is_watched(self.base):
                return False
            if self._is_undecided:
                self._is_undecided = False
                with suppress(UnsupportedPolicyError):
                    self._act_through("auto")
            if self.seam.runtime is not None and are_shown():
                warn_of_eager_points()
                return False
        return self.seam.runtime is not None

    @contextmanager
    def acting_eagerly(self) -> Iterator[None]:
        """In this block actions are computed by LeRobot's own loop, whatever the runtime."""
        before, self._acts_eagerly = self._acts_eagerly, True
        try:
            yield
        finally:
            self._acts_eagerly = before

    def warm_up(self, batch: dict[str, Tensor]) -> None:
        """Prepare for observations like this one, outside the control loop: compile, record, compare with eager.

        What differs from the first observation in its cameras, shapes or length of the instruction is prepared for when
        it first comes. A shape for which the policy acts eagerly, because the fast path failed, is tried again.

        Args:
            batch: A pre-processed batch.
        """
        if self.seam.runtime is not None:
            self.seam.runtime.try_again()
        device = next(self.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            self.predict_action_chunk(dict(batch))

    @property
    def num_tokens(self) -> int:
        """K, visual tokens per camera. May be set to any 1 .. num_tokens_max between calls."""
        return int(self.reducer.num_tokens)

    @num_tokens.setter
    def num_tokens(self, value: int) -> None:
        self._set_tokens(value)
        self.config.set_num_tokens(self.num_tokens)

    def _set_tokens(self, value: int) -> None:
        for reducer in self._reducers():
            reducer.num_tokens = value

    def _reducers(self) -> list[Any]:
        # PEFT keeps the original reducer beside its trainable copy, in a wrapper that would swallow attributes.
        return [module for module in self.reducer.modules() if isinstance(module, Reducer)]

    def check_schedule(self) -> None:
        """Refuse a token schedule that could not do what it says.

        Raises:
            BudgetError: If the reducer cannot serve one of its budgets, or there is nothing to come down from.
        """
        config, schedule = self.config, self.config.token_schedule
        for k in sorted(self._coming_budgets()):
            try:
                self.reducer.check_budget(k)
            except BudgetError as error:
                if schedule.kind == "constant":
                    raise
                raise BudgetError(f"{error}; token schedule '{schedule.text}' asks for that K") from error
        largest = config.reducer.largest
        if schedule.goes_down and largest == config.reducer.budget < self.seam.layout.num_dense_tokens:
            raise BudgetError(
                f"token schedule '{schedule.text}' has nothing to come down from: num_tokens_max is {largest}, "
                "as num_tokens; give a larger num_tokens_max, or start from the dense policy"
            )

    def _coming_budgets(self) -> set[int]:
        """The budgets that training will ask of a reducer that cannot serve every K."""
        if type(self.reducer).check_budget is Reducer.check_budget:
            return set()
        budgets = {self.config.reducer.budget} | self.config.token_schedule.budgets()
        limits = getattr(self.reducer, "camera_limits", {}).values()
        return {min(k, limit) for k in budgets for limit in (k, *limits)}

    def train(self, mode: bool = True) -> Self:
        """Set the training mode. In training the budget is that of the step, otherwise `config.reducer.num_tokens`."""
        super().train(mode)
        if mode and self.seam.runtime is not None:
            self.seam.runtime.forget()
        self._advance_schedule(0)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Graphs read weights where they lie, and what nobody reads comes back to where the others are.
        seam = vars(self).get("seam")
        if seam is not None and seam.runtime is not None:
            seam.runtime.forget()
        return super()._apply(fn, recurse)

    def update(self) -> None:
        """Count a training step; lerobot-train calls this after each."""
        self._advance_schedule(1)
        if hasattr(self.base, "update"):
            self.base.update()

    def _advance_schedule(self, steps: int) -> None:
        # Reading the step waits for the device.
        if self.config.schedule != "constant":
            self.follow_schedule(int(self.reducer.schedule_step) + steps)

    def follow_schedule(self, step: int) -> int:
        """Set the budget of a training step, counted from 0, and return it."""
        if self.config.schedule != "constant":
            for reducer in self._reducers():
                reducer.schedule_step.fill_(step)
            self._set_tokens(self.config.token_schedule.at(step) if self.training else self.config.reducer.budget)
        return self.num_tokens

    @contextmanager
    def looking_everywhere(self) -> Iterator[None]:
        """In this block the base policy gets every visual token, as if it were not wrapped."""
        self._looks_everywhere = True
        try:
            yield
        finally:
            self._looks_everywhere = False

    def detach(self) -> DensePolicy:
        """Take the reducer out and return the base policy, bit-identical to what it was before wrapping.

        This policy then refuses to act and to be trained.
        """
        base = self.require_attached()
        act_eagerly(self.family.model(base), self.seam)
        self.family.detach(base)
        self._is_attached = False
        return base

    def require_attached(self) -> DensePolicy:
        """The base policy.

        Raises:
            GridsError: If the reducer was taken out of it.
        """
        if not self._is_attached:
            raise GridsError("this policy was detached from its base; use the base, or wrap it again with compress()")
        base: DensePolicy = self.base
        return base

    def forward(self, batch: dict[str, Tensor], **kwargs: Any) -> tuple[Tensor, dict[str, Any] | None]:
        """Training loss of the base policy with K tokens per camera.

        Args:
            batch: A pre-processed batch.
            **kwargs: What the base policy's forward takes (noise, time, reduction, ...).

        Returns:
            (loss, dictionary of plain numbers to log).

        Raises:
            DatasetError: If a state or an action that it is trained on holds NaN or infinity.
        """
        if self.training:
            require_finite_batch(batch)
        loss, log = self.require_attached().forward(batch, **kwargs)
        return loss, log

    def predict_action_chunk(self, batch: dict[str, Tensor], **kwargs: Any) -> Any:
        """Action chunk [b, chunk_size, action_dim] of the base policy with K tokens per camera.

        Raises:
            GridsError: If it or the state holds NaN or infinity, which no robot should be sent.
        """
        state = batch.get(OBS_STATE)
        with self._acting() as base, showing(self, batch):
            return require_finite_action(base.predict_action_chunk(batch, **kwargs), state)

    def select_action(self, batch: dict[str, Tensor], **kwargs: Any) -> Any:
        """Next action [b, action_dim], from the base policy's queue.

        Raises:
            GridsError: If it or the state holds NaN or infinity, which no robot should be sent.
        """
        state = batch.get(OBS_STATE)
        with self._acting() as base, showing(self, batch):
            return require_finite_action(base.select_action(batch, **kwargs), state)

    @contextmanager
    def _acting(self) -> Iterator[DensePolicy]:
        base = self.require_attached()
        runtime = self.seam.runtime if self.acts_fast() else None
        with quick_eval(base), nullcontext() if runtime is None else runtime.act():
            yield base

    def reset(self) -> None:
        self.base.reset()

    def get_optim_params(self) -> Any:
        """The base policy's parameters as it groups or names them, and the reducer's.

        Returns:
            What the base returns (parameters, groups, or names to parameters), with the reducer's added. Frozen
            parameters are left out.
        """
        params, reducer = self.base.get_optim_params(), dict(self.reducer.named_parameters(prefix="reducer"))
        if isinstance(params, dict):
            return {name: p for name, p in (params | reducer).items() if p.requires_grad}
        params = list(params)
        added = [p for p in reducer.values() if p.requires_grad]
        if params and isinstance(params[0], dict):
            return [*params, {"params": added}] if added else params
        return [*(p for p in params if p.requires_grad), *added]

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

    def _save_pretrained(self, save_directory: Path, **kwargs: Any) -> None:
        require_finite(self.state_dict())
        with atomic_files(save_directory) as folder:
            super()._save_pretrained(folder, **kwargs)
        # A manifest or an adapter left here would describe older weights.
        for name in (MANIFEST_FILE, ADAPTER_FILE):
            (save_directory / name).unlink(missing_ok=True)

    def push_model_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: LeRobot's push sends its training configuration, which holds paths of this machine."""
        raise GridsError(REFUSED_PUSH)

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
            raise CheckpointError(f"{folder} has policy type '{kind}', not '{cls.name}'; load it with its own class")
        if kwargs.get("config") is not None:
            # The checkpoint holds every weight, or names its base.
            kwargs["config"].require_base().pretrained_path = None
        elif "cli_overrides" not in kwargs:
            kwargs["config"] = read_config(folder)
        policy = super().from_pretrained(str(folder), strict=True, fresh=False, **kwargs)
        # LeRobot's commands load the processors from here: from what was checked, and not from what the repository's
        # main branch has by then. Of a PEFT adapter this is only the base, and the processors are the adapter's.
        if not policy.config.use_peft:
            policy.config.pretrained_path = folder
        return policy

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        load_checkpoint(model, Path(model_file).parent)
        return model

    def __getattr__(self, name: str) -> Any:
        # Python calls this for a name that neither this policy nor LeRobot's own class has.
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_"):
                raise
            return getattr(base, name)


def _take_from_dataset(config: Any, dataset_meta: Any = None, dataset_stats: Any = None, **kwargs: Any) -> None:
    """What LeRobot's commands leave undone when they train a dense policy of this configuration on a dataset.

    Raises:
        DatasetError: If the dataset has no statistics under the names of what is normalised, or is too wide.
    """
    if dataset_meta is not None:
        if hasattr(config, "action_feature_names"):
            # LeRobot takes the names of older datasets, {"motors": [...]}, for one joint called "motors".
            config.action_feature_names = dimension_names(dataset_meta.features.get(ACTION, {}))
        widths = {name: feature["shape"][0] for name, feature in dataset_meta.features.items()}
        for line in width_faults(config.type, config, widths):
            raise DatasetError(line)
    if dataset_stats:
        # The dataset's own state may have another width than that of an earlier one.
        features = {**config.input_features, **config.output_features}
        kinds: dict[str, Any] = {name: (feature.type.value, ()) for name, feature in features.items()}
        modes = {kind: getattr(mode, "value", mode) for kind, mode in config.normalization_mapping.items()}
        fault = find_fault(kinds, modes, dataset_stats)
        if fault is not None:
            renamed = any(f"'{name}'" in fault and name not in dataset_stats for name in features)
            advice = RENAMED if renamed else advise(fault)
            raise DatasetError(f"the dataset's statistics: normalisation {fault}; {advice}")


def _current_reducer(policy: GridsPolicy) -> Reducer | None:
    reducer: Reducer = policy.reducer
    return None if policy._looks_everywhere else reducer


def _modules(policy: GridsPolicy) -> list[nn.Module]:
    return [policy]


def _pays(device: torch.device) -> bool:
    """Whether the fast path pays there without being asked for: where kernels are launched."""
    return device.type == "cuda"


def _not_acting(policy: GridsPolicy) -> str | None:
    """Why the policy must not act through its fast runtime at the moment."""
    if policy.training:
        return "it is being trained, and its weights change; call eval()"
    if policy.family.feature_source(policy.base)._forward_hooks:
        return "something watches the visual tokens with a hook, which the fast path may not call"
    fixed = policy.config.runtime == "compiled" or next(policy.parameters()).is_cuda
    if fixed and any(module._forward_hooks for module in policy.reducer.modules()):
        return "something watches the sampler with a hook, which neither a compiled nor a recorded path calls"
    return None


def acting_eagerly(policy: Any) -> AbstractContextManager[None]:
    """In this block a policy, dense or grids, acts by LeRobot's own loop."""
    return policy.acting_eagerly() if isinstance(policy, GridsPolicy) else nullcontext()


def dense_policy(policy: Any) -> Any:
    """The dense policy inside a grids policy, or the policy itself."""
    return policy.base if isinstance(policy, GridsPolicy) else policy
