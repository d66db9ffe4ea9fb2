"""EO1: Qwen2.5-VL, in whose prompt images, the state and the actions are placeholders.

Modifications, from outside, of `lerobot/policies/eo1`, from LeRobot 0.6.1 on:
- `EO1Policy._get_model_inputs` also runs the vision tower, once for all cameras, and the reducer, and cuts the prompt
  (`qwen.scatter`). There the whole batch is visible. LeRobot finds the actions in the prompt afterwards, so the masks
  and the key-value cache follow.
- `Qwen2_5_VLModel.get_image_features` and `get_rope_index` take what that gives.
LeRobot's pre-processor needs every camera, and writes the prompt; images keep about their aspect ratio, and the grid of
tokens follows from their size. Cameras must have one grid.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from lerobot.utils.constants import OBS_LANGUAGE_TOKENS
from torch import nn

from ..reducers import TokenLayout
from ..reducers.anchors import WHOLE, Region
from .base import DensePolicy, Family, Recipe, Stages, Target, image_size, refuse_second_attach, replaced
from .distances import flat_action_distance
from .published_qwen import QWEN_2_5_VL_3B
from .qwen import ATTENTION, attach_model, detach_model, image_grid, made_up_prompt, no_training_step, scatter
from .seam import Seam
from .small_qwen import SMALL_QWEN_2_5, sharpen, write_small_processor


class EO1(Family):
    """EO1 on Qwen2.5-VL."""

    resolution_field = None
    extra = "eo1"
    packages = ("transformers",)
    flow_steps = "num_denoise_steps"
    counted_on_meta = True
    steps: ClassVar = {
        "eo1_conversation_template_processor": frozenset({"input_features", "chunk_size"}),
        "eo1_qwen_processor": frozenset(
            {"processor_name", "image_min_pixels", "image_max_pixels", "use_fast_processor"}
        ),
    }
    repositories: ClassVar = {
        **dict.fromkeys(("vlm_base", "processor_name"), frozenset({"Qwen/Qwen2.5-VL-3B-Instruct"})),
        **ATTENTION,
    }

    def layout(self, policy: DensePolicy) -> TokenLayout:
        config, vlm = policy.config, policy.model.vlm_backbone.config
        cameras = self.cameras(policy)
        shapes = {name: image_size(config.image_features[name].shape) for name in cameras}
        return TokenLayout(
            token_grid=image_grid(shapes, vlm.vision_config, config.image_min_pixels, config.image_max_pixels),
            width=vlm.text_config.hidden_size,
            cameras=tuple(cameras),
            language_width=vlm.text_config.hidden_size,
            state_width=config.max_state_dim,
            regions=tuple(cameras.values()),
        )

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_get_model_inputs" in vars(policy))
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._get_model_inputs = partial(_get_model_inputs, policy, seam, False)
        seam.remember_coordinates()
        attach_model(policy.model.vlm_backbone.model)

    def keep_positions(self, policy: Any, seam: Seam) -> None:
        policy._get_model_inputs = partial(_get_model_inputs, policy, seam, True)

    def detach(self, policy: Any) -> None:
        vars(policy).pop("_get_model_inputs", None)
        detach_model(policy.model.vlm_backbone.model)

    def feature_source(self, policy: Any) -> nn.Module:
        merger: nn.Module = policy.model.vlm_backbone.model.visual.merger
        return merger

    def image_region(self, policy: Any, height: int, width: int) -> Region:
        return WHOLE

    @contextmanager
    def without_weights(self, config: Any) -> Iterator[None]:
        # LeRobot takes a policy with a path for one whose weights come later.
        with replaced(config, pretrained_path=config.pretrained_path or Path("weights follow")):
            yield

    def to_bfloat16(self, policy: Any) -> bool:
        policy.config.dtype = "bfloat16"
        policy.model.vlm_backbone.bfloat16()
        return True

    def target(self, policy: DensePolicy) -> Target:
        return Target(policy.model.action_out_proj, flat_action_distance)

    def stages(self, policy: DensePolicy) -> Stages:
        visual = policy.model.vlm_backbone.model.visual
        return Stages(visual, visual.merger, self.flow_steps, "embed_prefix")

    def prefix_length(self, prefix: Any) -> int:
        return int(prefix.shape[1])

    def acting(self, batch: dict[str, Any]) -> dict[str, Any]:
        # LeRobot pads prompts on the right for training, and acts on what is padded on the left.
        mask = batch["attention_mask"]
        length = mask.shape[1]
        places = (torch.arange(length, device=mask.device) + mask.sum(1, keepdim=True)) % length
        padded_right = mask[:, :1].bool() & ~mask[:, -1:].bool()
        places = torch.where(padded_right, places, torch.arange(length, device=mask.device))
        cut = ("input_ids", "attention_mask", "mm_token_type_ids")
        return {**batch, **{name: batch[name].gather(1, places) for name in cut}}

    def complete(self, policy: DensePolicy, batch: dict[str, Any]) -> dict[str, Any]:
        vlm, tokens = policy.model.vlm_backbone.config, batch[OBS_LANGUAGE_TOKENS]
        count, words = tokens.shape
        # The last of the vocabulary, which are no words.
        state, action = (vlm.text_config.vocab_size - place for place in (2, 1))
        behind = (state, *[action] * policy.config.chunk_size)
        prompt = made_up_prompt(self.layout(policy), vlm, count, words, tokens.device, behind)
        return batch | prompt | {"state_token_id": state, "action_token_id": action}

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        from lerobot.policies.eo1.configuration_eo1 import EO1Config

        return EO1Config(
            device="cpu", input_features=inputs, output_features=outputs, vlm_config=QWEN_2_5_VL_3B, dtype=dtype
        )

    def finish(self, policy: Any) -> None:
        if next(policy.parameters()).is_meta:
            # The meta device has no autocast to switch off.
            policy.config.force_fp32_autocast = False
            policy.forward = partial(no_training_step, self.policy_type)

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        from lerobot.policies.eo1.configuration_eo1 import EO1Config
        from lerobot.policies.eo1.modeling_eo1 import EO1Policy

        fields: dict[str, Any] = {
            "vlm_base": str(write_small_processor(folder / "qwen")),
            "vlm_config": SMALL_QWEN_2_5,
            "dtype": "float32",
            "image_min_pixels": 64,
            "image_max_pixels": 64 * 64,
            "chunk_size": 8,
            "n_action_steps": 8,
            "max_state_dim": 8,
            "max_action_dim": 8,
            "num_denoise_steps": 3,
        }
        config = EO1Config(device="cpu", input_features=inputs, output_features=outputs, **fields | options)
        with self.without_weights(config):
            policy = EO1Policy(config)
        sharpen(policy.model.vlm_backbone.model.language_model)
        return policy


FAMILIES = (
    EO1(
        "eo1",
        # LeRobot publishes no policy: it begins with Qwen2.5-VL-3B and new projections.
        sources={"eo1": None},
        # LeRobot's own preset.
        recipe=Recipe(steps=30_000, batch=64, micro_batch=8, lr=1e-4, warmup=0.03),
        image_size=256,
        language_tokens=48,
    ),
)


def _get_model_inputs(
    policy: Any, seam: Seam, dense: bool, batch: dict[str, Any], excluded_keys: Collection[str] = ()
) -> dict[str, Any]:
    inputs: dict[str, Any] = type(policy)._get_model_inputs(batch, excluded_keys)
    hidden = (batch["state_token_id"], batch["action_token_id"])
    return scatter(seam, policy.model.vlm_backbone.model, batch, inputs, dense=dense, hidden=hidden)
