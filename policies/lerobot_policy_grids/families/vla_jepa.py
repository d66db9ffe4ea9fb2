"""VLA-JEPA: Qwen3-VL, whose states at some action tokens of the prompt condition a flow-matching transformer.

Modifications, from outside, of `lerobot/policies/vla_jepa`, from LeRobot 0.6.1 on:
- `VLAJEPAPolicy._prepare_model_inputs` lets the instructions carry the whole batch, state included.
- `Qwen3VLInterface.build_inputs` also runs the vision tower, once for all cameras, and the reducer, and cuts the prompt
  that it wrote (`qwen.scatter`). LeRobot finds the action tokens in it afterwards.
- `Qwen3VLModel.get_image_features` and `get_rope_index` take what that gives. Features that the model adds in later
  layers (deepstack) are read at the same coordinates.
The world model of training sees videos on a way of its own, with every token. Images keep about their aspect ratio, and
the grid of tokens follows from their size, or from `resize_images_to` where that is set, which LeRobot applies to
observations when it acts and not in training. Cameras must have one grid, and none may be missing.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lerobot.utils.constants import ACTION, OBS_LANGUAGE_TOKENS, OBS_STATE
from torch import Tensor, nn
from torch.distributions import Distribution

from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from .base import DensePolicy, Family, Recipe, Stages, Target, image_size, refuse_second_attach, replaced
from .distances import action_distance
from .published_qwen import IDS, QWEN_3_VL_2B, Published, published_processor
from .qwen import attach_model, detach_model, image_grid, no_training_step, scatter
from .seam import Seam
from .small_qwen import sharpen, write_small_qwen3

# Of the published image processor: pixels of an image, at least and at most.
PIXELS = {"shortest_edge": 2**16, "longest_edge": 2**24}
# Tokens of the published tokenizer.
TOKENS = 151669


class VLAJEPA(Family):
    """VLA-JEPA on Qwen3-VL."""

    resolution_field = None
    extra = "vla_jepa"
    packages = ("transformers", "diffusers")
    flow_steps = "num_inference_timesteps"
    counted_on_meta = True
    # Without a state LeRobot leaves it out.
    reads_state = False
    steps: ClassVar = {
        "vla_jepa_clip_actions": frozenset(),
        "vla_jepa_pre_snap_gripper": frozenset({"gripper_dim", "threshold"}),
        "vla_jepa_binarize_gripper": frozenset({"gripper_dim", "threshold"}),
    }
    repositories: ClassVar = {
        "qwen_model_name": frozenset({"Qwen/Qwen3-VL-2B-Instruct"}),
        "jepa_encoder_name": frozenset({"facebook/vjepa2-vitl-fpc64-256"}),
        # Formatted with objects, whose attributes a template can read.
        "prompt_template": frozenset(
            {
                "Your task is {instruction}. Infer the temporal dynamics from frames {actions} and produce the "
                "corresponding policy actions {e_actions}."
            }
        ),
        "special_action_token": frozenset({"<|action_{}|>"}),
    }

    def layout(self, policy: DensePolicy) -> TokenLayout:
        config, qwen = policy.config, policy.model.qwen
        vlm, size = qwen.model.config, qwen.processor.image_processor.size
        cameras = self.cameras(policy)
        shapes = {name: config.resize_images_to or image_size(config.image_features[name].shape) for name in cameras}
        return TokenLayout(
            token_grid=image_grid(shapes, vlm.vision_config, size["shortest_edge"], size["longest_edge"]),
            width=vlm.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=vlm.text_config.hidden_size,
            state_width=config.state_dim if config.robot_state_feature is not None else 0,
            regions=tuple(cameras.values()),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_prepare_model_inputs" in vars(policy))
        seam.remember_coordinates()
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._prepare_model_inputs = partial(_prepare_model_inputs, policy)
        policy.model.qwen.build_inputs = partial(_build_inputs, policy.model, seam, False)
        attach_model(policy.model.qwen.model.model)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        policy.model.qwen.build_inputs = partial(_build_inputs, policy.model, seam, True)

    def detach(self, policy: Any) -> None:
        vars(policy).pop("_prepare_model_inputs", None)
        vars(policy.model.qwen).pop("build_inputs", None)
        detach_model(policy.model.qwen.model.model)

    def feature_source(self, policy: Any) -> nn.Module:
        merger: nn.Module = policy.model.qwen.model.model.visual.merger
        return merger

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        return WHOLE

    @contextmanager
    def without_weights(self, config: Any) -> Iterator[None]:
        from lerobot.policies.vla_jepa import modeling_vla_jepa, qwen_interface

        with ExitStack() as stack:
            for module, name in ((qwen_interface, "Qwen3VLForConditionalGeneration"), (modeling_vla_jepa, "AutoModel")):
                stack.enter_context(replaced(module, **{name: _Sizes(getattr(module, name))}))
            yield

    def target(self, policy: DensePolicy) -> Target:
        return Target(policy.model.action_model.action_decoder, _distance)

    def stages(self, policy: DensePolicy) -> Stages:
        visual = policy.model.qwen.model.model.visual
        return Stages(visual, visual.merger, self.flow_steps, "_qwen_last_decoder_hidden")

    def set_steps(self, policy: DensePolicy, steps: int) -> None:
        super().set_steps(policy, steps)
        policy.model.action_model.num_inference_timesteps = steps

    def prefix_length(self, prefix: Any) -> int:
        return int(prefix.shape[1])

    def complete(self, policy: DensePolicy, batch: dict[str, Any]) -> dict[str, Any]:
        count, words = batch[OBS_LANGUAGE_TOKENS].shape
        return batch | {"task": [" ".join("a" * words)] * count}

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        config: Any = super().config(inputs, outputs, size, dtype)
        config.torch_dtype = dtype
        return config

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        import transformers
        from lerobot.policies.vla_jepa import modeling_vla_jepa, qwen_interface

        with ExitStack() as stack:
            # A distribution that is made on the meta device has no values to check.
            stack.enter_context(replaced(Distribution, _validate_args=False))
            if not Path(config.qwen_model_name).is_dir():
                # The defaults of V-JEPA 2 are the sizes of LeRobot's encoder.
                kinds = {config.qwen_model_name: _published_qwen, config.jepa_encoder_name: transformers.VJEPA2Config}
                videos = Published(transformers.VJEPA2VideoProcessor)
                stack.enter_context(replaced(transformers, AutoConfig=_ByName(kinds)))
                stack.enter_context(replaced(qwen_interface, AutoProcessor=Published(_published_processor)))
                stack.enter_context(replaced(modeling_vla_jepa, AutoVideoProcessor=videos))
            yield

    def finish(self, policy: Any) -> None:
        if next(policy.parameters()).is_meta:
            policy.predict_action_chunk = partial(_without_autocast, policy)
            policy.forward = partial(no_training_step, self.policy_type)

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.vla_jepa.configuration_vla_jepa import VLAJEPAConfig
        from lerobot.policies.vla_jepa.modeling_vla_jepa import VLAJEPAPolicy

        fields: dict[str, Any] = {
            "qwen_model_name": str(write_small_qwen3(folder / "qwen3")),
            "torch_dtype": "float32",
            "enable_world_model": False,
            "chunk_size": 8,
            "n_action_steps": 8,
            "action_model_type": "DiT-test",
            "action_hidden_size": 16,
            "action_num_layers": 2,
            "action_dropout": 0.0,
            "num_action_tokens_per_timestep": 2,
            "num_embodied_action_tokens_per_instruction": 4,
            "num_inference_timesteps": 3,
            "repeated_diffusion_steps": 2,
        }
        policy = VLAJEPAPolicy(
            VLAJEPAConfig(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
        )
        sharpen(policy.model.action_model)
        for name, parameter in policy.model.action_model.named_parameters():
            if name.endswith(("action_decoder.layer1.weight", "action_decoder.layer2.weight", "proj_out_2.weight")):
                # LeRobot's own are so small that hardly anything changes an action.
                nn.init.normal_(parameter, std=0.3)
        return policy


FAMILIES = (
    VLAJEPA(
        "vla_jepa",
        # It begins with Qwen3-VL-2B, V-JEPA 2 and a new action transformer.
        sources={"vla_jepa": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=30_000, batch=64, micro_batch=8, lr=1e-4, warmup=0.033),
        image_size=256,
        language_tokens=48,
    ),
)


class _Sizes:
    """In the place of a class of models: what it would fetch, with random weights."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def from_pretrained(self, name: str, torch_dtype: Any = None, **kwargs: Any) -> Any:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name, **kwargs)
        make = getattr(self.kind, "_from_config", None) or self.kind.from_config
        return make(config, dtype=torch_dtype).eval()


class _ByName:
    """In the place of `AutoConfig`.

    Args:
        kinds: Name -> makes the configuration.
    """

    def __init__(self, kinds: Mapping[str, Any]) -> None:
        self.kinds = kinds

    def from_pretrained(self, name: str, **kwargs: Any) -> Any:
        return self.kinds[name]()


def _published_qwen() -> Any:
    from transformers import Qwen3VLConfig

    return Qwen3VLConfig(**QWEN_3_VL_2B | IDS)


def _published_processor() -> Any:
    from transformers import Qwen3VLProcessor
    from transformers.models.qwen2_vl import Qwen2VLImageProcessor
    from transformers.models.qwen3_vl import Qwen3VLVideoProcessor

    images = Qwen2VLImageProcessor(size=PIXELS, patch_size=QWEN_3_VL_2B["vision_config"]["patch_size"])
    return published_processor(Qwen3VLProcessor, images, Qwen3VLVideoProcessor(), TOKENS)


def _without_autocast(policy: Any, batch: dict[str, Any], **kwargs: Any) -> Tensor:
    """`predict_action_chunk` on the meta device, which has no autocast. Operations are the same."""
    from lerobot.policies.vla_jepa import modeling_vla_jepa

    with replaced(modeling_vla_jepa, _get_autocast_context=_no_autocast):
        chunk: Tensor = type(policy).predict_action_chunk(policy, batch, **kwargs)
    return chunk


def _no_autocast(*args: Any) -> AbstractContextManager[None]:
    return nullcontext()


class _Instructions(list[str]):
    """The instructions of a batch, and all of it."""

    def __init__(self, texts: list[str], batch: Mapping[str, Any]) -> None:
        super().__init__(texts)
        self.batch = batch


def _prepare_model_inputs(policy: Any, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = type(policy)._prepare_model_inputs(policy, batch, **kwargs)
    # LeRobot takes its observations from now on into the future, and the state of now.
    state = {} if "state" not in inputs else {OBS_STATE: inputs["state"][:, 0]}
    return inputs | {"instructions": _Instructions(inputs["instructions"], {**batch, **state})}


def _build_inputs(model: Any, seam: Seam, dense: bool, instructions: _Instructions, **kwargs: Any) -> dict[str, Any]:
    from lerobot.policies.vla_jepa.modeling_vla_jepa import _get_autocast_context

    qwen = model.qwen
    inputs = dict(type(qwen).build_inputs(qwen, instructions=instructions, **kwargs))
    hidden = (model.embodied_action_token_id, *model.action_token_ids)
    # As LeRobot runs the whole of Qwen.
    with _get_autocast_context(inputs["input_ids"].device.type):
        return scatter(seam, qwen.model.model, instructions.batch, inputs, dense=dense, hidden=hidden)


def _distance(student: Tensor, teacher: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """`action_distance` of velocities [r * b, steps, action_dim], of r draws of noise for every sample."""
    draws = len(student) // len(batch[ACTION])
    repeated = {
        name: value.repeat(draws, *[1] * (value.ndim - 1))
        for name in (ACTION, "action_is_pad")
        if (value := batch.get(name)) is not None
    }
    return action_distance(student, teacher, repeated)
