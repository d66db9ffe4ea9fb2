"""Wall-X: Qwen2.5-VL with experts for action tokens, in whose prompt images, the state and actions are placeholders.

Modifications, from outside, of `lerobot/policies/wall_x`, from LeRobot 0.6.1 on:
- `WallXPolicy.preprocess_inputs`, which writes the prompt, also runs the vision tower, once for all cameras, and the
  reducer, and cuts the prompt with what goes along with it (`qwen.scatter`). It gives positions when the policy acts,
  too, where LeRobot computes them afterwards by the same rule.
- Where the model looks for its vision tower, it finds one that lets tokens through (`_Seen`).
LeRobot runs the whole prompt again in each of ten integration steps, whose number is no option. It goes on without a
camera; here cameras must have one grid, and none may be missing. Images keep their aspect ratio.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from lerobot.utils.constants import OBS_LANGUAGE_TOKENS
from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from .base import DensePolicy, Family, Recipe, Stages, Target, image_size, refuse_second_attach, replaced
from .distances import flat_action_distance
from .published_qwen import IDS, QWEN_2_5_VL_3B, Published, published_processor
from .qwen import Names, Placed, image_grid, no_training_step, scatter
from .seam import Seam
from .small_qwen import SMALL_QWEN_2_5, sharpen, write_small_processor

MARKERS = ("<|action|>", "<|propri|>")
# Of the small instance. LeRobot makes images 252 pixels wide, which are 9 x 9 tokens.
PATCH, WIDTH = 14, 8
# Of wall-oss-flow: a Qwen2.5-VL-3B with more tokens, and in each layer a second, narrower MLP for action tokens. Its
# config.json was not at hand. Public copies agree: `workspace/lerobot_example/qwen25_config_libero.json` of
# AshlingYan/wall-x, a configuration of that architecture; and notes of gugudeshubao/wall-x on running wall-oss-flow
# itself (experts of 11008 and 2048, logits of 153715 tokens, a file of about 8 GB, which is 8.4 here), with its
# tokenizer_config.json.
NARROW, TOKENS = 2048, 153715
PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 16384 * 28 * 28}


class WallX(Family):
    """Wall-X on Qwen2.5-VL."""

    resolution_field = None
    extra = "wallx"
    packages = ("transformers", "peft", "torchdiffeq", "qwen_vl_utils")
    counted_on_meta = True
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
        return Target(policy.model.action_preprocessor.action_proj_back, flat_action_distance)

    def stages(self, policy: DensePolicy) -> Stages:
        vision = _vision(policy)
        return Stages(vision, vision.merger, None, "model.forward")

    def prefix_length(self, prefix: Any) -> int:
        return int(prefix.last_hidden_state.shape[1])

    def complete(self, policy: DensePolicy, batch: dict[str, Any]) -> dict[str, Any]:
        count, words = batch[OBS_LANGUAGE_TOKENS].shape
        return batch | {"task": [" ".join("a" * words)] * count}

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        from lerobot.policies.wall_x import modeling_wall_x

        if Path(config.pretrained_name_or_path).is_dir():
            yield
            return
        with (
            replaced(modeling_wall_x.Qwen2_5_VLMoEForAction, config_class=Published(partial(_published_sizes, config))),
            replaced(modeling_wall_x, AutoProcessor=Published(_published_processor)),
        ):
            yield

    def finish(self, policy: Any) -> None:
        if next(policy.parameters()).is_meta:
            policy.predict_action_chunk = partial(_by_eulers_rule, policy)
            policy.forward = partial(no_training_step, self.policy_type)

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.wall_x.configuration_wall_x import WallXConfig
        from lerobot.policies.wall_x.modeling_wall_x import WallXPolicy

        place = write_small_processor(folder / "wall", PATCH, MARKERS)
        if not (place / "config.json").exists():
            _small_sizes().save_pretrained(place)
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


def _published_sizes(config: Any) -> Any:
    text = QWEN_2_5_VL_3B["text_config"]
    sizes = QWEN_2_5_VL_3B | IDS | {"text_config": text | {"vocab_size": TOKENS}}
    return _sizes(sizes, (text["intermediate_size"], NARROW), config.max_action_dim, config.max_state_dim)


def _published_processor() -> Any:
    from transformers.models.qwen2_5_vl import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    images, videos = Qwen2VLImageProcessor(size=PIXELS), Qwen2VLVideoProcessor()
    return published_processor(Qwen2_5_VLProcessor, images, videos, TOKENS, MARKERS)


def _by_eulers_rule(policy: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """`predict_action_chunk` on the meta device, where torchdiffeq would look at the times. Operations are the same."""
    from lerobot.policies.wall_x import modeling_wall_x

    with replaced(modeling_wall_x, odeint=_euler):
        chunk: Tensor = type(policy).predict_action_chunk(policy, batch, **kwargs)
    return chunk


def _euler(step: Callable[[Tensor, Tensor], Tensor], state: Tensor, times: Tensor, method: str) -> list[Tensor]:
    states = [state]
    for now, then in itertools.pairwise(times):
        states.append(states[-1] + (then - now) * step(now, states[-1]))
    return states


def _small_sizes() -> Any:
    vision, inner = SMALL_QWEN_2_5["vision_config"], SMALL_QWEN_2_5["text_config"]["intermediate_size"]
    patches = {"patch_size": PATCH, "window_size": 4 * 2 * PATCH}
    return _sizes(SMALL_QWEN_2_5 | {"vision_config": vision | patches}, (inner, inner), WIDTH, WIDTH)


def _sizes(qwen: dict[str, Any], experts: tuple[int, int], action: int, state: int) -> Any:
    """The configuration of a model.

    Args:
        qwen: That of the Qwen2.5-VL.
        experts: Width of the MLP for all else and of the one for action tokens.
        action: Dimensions of an action.
        state: Dimensions of a state.
    """
    from lerobot.policies.wall_x.qwen_model import Qwen2_5_VLConfig

    width = qwen["text_config"]["hidden_size"]
    text = {
        "num_experts": len(experts),
        "experts": [{"hidden_size": width, "intermediate_size": inner, "hidden_act": "silu"} for inner in experts],
        "dim_inputs": [width] * len(experts),
        "mlp_moe": True,
        "dof_config": {"arm": action},
    }
    sizes = qwen | {"text_config": qwen["text_config"] | text}
    return Qwen2_5_VLConfig(**sizes, agent_pos_config={"arm": state})
