"""Wall-X: Qwen2.5-VL with experts for action tokens, in whose prompt images, the state and actions are placeholders.

Modifications, from outside, of `lerobot/policies/wall_x`, from LeRobot 0.6.1 on:
- `WallXPolicy.preprocess_inputs`, which writes the prompt, also runs the vision tower, once for all cameras, and the
  reducer, and cuts the prompt with what goes along with it (`qwen.scatter`). It gives positions when the policy acts,
  too, where LeRobot computes them afterwards by the same rule.
- Where the model looks for its vision tower, it finds one that lets tokens through (`_Seen`).
LeRobot runs the whole prompt again in each of ten integration steps, whose number is no option. It goes on without a
camera; here cameras must have one grid, and none may be missing. Images keep their aspect ratio.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS
from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from .base import DensePolicy, Family, Recipe, Stages, Target, image_size, refuse_second_attach, replaced
from .distances import action_distance
from .qwen import Names, Placed, image_grid, scatter
from .seam import Seam
from .small_qwen import SMALL_QWEN_2_5, sharpen, write_small_processor

# Of the small instance. LeRobot makes images 252 pixels wide, which are 9 x 9 tokens.
PATCH, WIDTH, MARKERS = 14, 8, ("<|action|>", "<|propri|>")


class WallX(Family):
    """Wall-X on Qwen2.5-VL."""

    resolution_field = None
    extra = "wallx"
    position_ids = "dense"
    spares_cameras = False
    steps: ClassVar = {"wall_x_task_processor": frozenset()}
    repositories: ClassVar = {
        "pretrained_name_or_path": frozenset({"x-square-robot/wall-oss-flow"}),
        "action_tokenizer_path": frozenset({None, "lerobot/fast-action-tokenizer"}),
        "attn_implementation": frozenset({"eager"}),
    }

    def layout(self, policy: DensePolicy) -> TokenLayout:
        from lerobot.policies.wall_x.modeling_wall_x import _wall_x_resize_dimensions

        config, qwen = policy.config, policy.model.config
        if config.prediction_mode != "diffusion":
            raise UnsupportedPolicyError(
                f"prediction_mode={config.prediction_mode}: LeRobot decodes action tokens of a 'wall_x' policy one "
                "observation at a time and from its own prompt; only prediction_mode=diffusion is supported"
            )
        cameras = self.cameras(policy)
        shapes = {name: _wall_x_resize_dimensions(*image_size(config.image_features[name].shape)) for name in cameras}
        size = policy.model.processor.image_processor.size
        return TokenLayout(
            token_grid=image_grid(
                {name: shape[2:] for name, shape in shapes.items()},
                qwen.vision_config,
                size["shortest_edge"],
                size["longest_edge"],
            ),
            width=qwen.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=qwen.text_config.hidden_size,
            state_width=config.max_state_dim,
            regions=tuple(cameras.values()),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("preprocess_inputs" in vars(policy))
        seam.remember_coordinates()
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy.preprocess_inputs = partial(_preprocess_inputs, policy, seam, False)
        # In front of the module of that name, which stays where parameters are looked for.
        vars(policy.model)["visual"] = _Seen(_vision(policy))

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        policy.preprocess_inputs = partial(_preprocess_inputs, policy, seam, True)

    def detach(self, policy: Any) -> None:
        vars(policy).pop("preprocess_inputs", None)
        vars(policy.model).pop("visual", None)

    def feature_source(self, policy: Any) -> nn.Module:
        merger: nn.Module = _vision(policy).merger
        return merger

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        return WHOLE

    @contextmanager
    def without_weights(self, config: Any) -> Iterator[None]:
        from lerobot.policies.wall_x import modeling_wall_x

        with replaced(modeling_wall_x, cached_file=_no_file, load_file=_no_weights):
            yield

    def target(self, policy: DensePolicy) -> Target:
        return Target(policy.model.action_preprocessor.action_proj_back, _distance)

    def stages(self, policy: DensePolicy) -> Stages:
        vision = _vision(policy)
        return Stages(vision, vision.merger, None, "model.forward")

    def prefix_length(self, prefix: Any) -> int:
        return int(prefix.last_hidden_state.shape[1])

    def complete(self, policy: DensePolicy, batch: dict[str, Any]) -> dict[str, Any]:
        count, words = batch[OBS_LANGUAGE_TOKENS].shape
        return batch | {"task": [" ".join("a" * words)] * count}

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        raise UnsupportedPolicyError(
            f"the architecture of a '{self.policy_type}' policy cannot be built without files from the Hub; give "
            "the folder of a checkpoint"
        )

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.wall_x.configuration_wall_x import WallXConfig
        from lerobot.policies.wall_x.modeling_wall_x import WallXPolicy

        place = write_small_processor(folder / "wall", PATCH, MARKERS)
        if not (place / "config.json").exists():
            _write_sizes(place)
        fields: dict[str, Any] = {
            "pretrained_name_or_path": str(place),
            "chunk_size": 8,
            "n_action_steps": 8,
            "max_state_dim": WIDTH,
            "max_action_dim": WIDTH,
        }
        config = WallXConfig(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
        with self.without_weights(config):
            policy = WallXPolicy(config)
        sharpen(policy.model.model)
        # Ten steps, which LeRobot has no option for, cost the tests more than all else.
        policy.model.predict = partial(type(policy.model).predict, policy.model, num_inference_timesteps=2)
        return policy


FAMILIES = (
    WallX(
        "wall_x",
        # It begins with the published weights, which are none of LeRobot's.
        sources={"wall_x": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=100_000, batch=32, micro_batch=4, lr=2e-5, warmup=0.01),
        image_size=256,
        language_tokens=48,
    ),
)


class _Seen:
    """In the place of the vision tower: tokens that came out of it pass through, and all else goes into it."""

    def __init__(self, tower: nn.Module) -> None:
        self.tower = tower

    def __getattr__(self, name: str) -> Any:
        if name == "tower":
            # Of a copy that is not filled yet.
            raise AttributeError(name)
        return getattr(self.tower, name)

    def __call__(self, values: Tensor, grid_thw: Any, **kwargs: Any) -> Any:
        if isinstance(grid_thw, Placed):
            return SimpleNamespace(pooler_output=values)
        return self.tower(values, grid_thw=grid_thw, **kwargs)


def _vision(policy: Any) -> Any:
    return policy.model._modules["visual"]


def _see(tower: Any, patches: Tensor, grids: Tensor) -> Any:
    seen = tower(patches.type(tower.dtype), grid_thw=grids)
    return SimpleNamespace(pooler_output=seen.pooler_output.unflatten(0, (len(grids), -1)))


def _preprocess_inputs(
    policy: Any, seam: Seam, dense: bool, batch: dict[str, Any], *, compute_position_ids: bool = False
) -> Any:
    inputs = type(policy).preprocess_inputs(policy, batch, compute_position_ids=True)
    model = policy.model
    cut = tuple(name for name in ("labels",) if inputs.get(name) is not None)
    hidden = tuple(model.action_token_id_set[name] for name in ("action_token_id", "propri_token_id"))
    names = Names(types="moe_token_types", cut=("moe_token_types", *cut))
    reduced = scatter(
        seam, model, batch, dict(inputs), dense=dense, hidden=hidden, names=names, see=partial(_see, _vision(policy))
    )
    placed = reduced["image_grid_thw"]
    inputs.update(reduced)
    inputs["position_ids"] = placed.number(inputs["position_ids"])
    return inputs


def _no_file(*args: Any, **kwargs: Any) -> None:
    return None


def _no_weights(path: Any) -> dict[str, Tensor]:
    return {}


def _distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """`action_distance` of velocities [b * steps, max_action_dim]."""
    size = (len(batch[ACTION]), -1)
    return action_distance(student.unflatten(0, size), teacher.unflatten(0, size), batch)


def _write_sizes(folder: Path) -> None:
    """The configuration of a small model of two experts."""
    from lerobot.policies.wall_x.qwen_model import Qwen2_5_VLConfig

    sizes = {**SMALL_QWEN_2_5}
    hidden, inner = sizes["text_config"]["hidden_size"], sizes["text_config"]["intermediate_size"]
    sizes["vision_config"] = sizes["vision_config"] | {"patch_size": PATCH, "window_size": 4 * 2 * PATCH}
    sizes["text_config"] = sizes["text_config"] | {
        "num_experts": 2,
        "experts": [{"hidden_size": hidden, "intermediate_size": inner, "hidden_act": "silu"}] * 2,
        "dim_inputs": [hidden, hidden],
        "mlp_moe": True,
        "dof_config": {"arm": WIDTH},
    }
    Qwen2_5_VLConfig(**sizes, agent_pos_config={"arm": WIDTH}).save_pretrained(folder)
