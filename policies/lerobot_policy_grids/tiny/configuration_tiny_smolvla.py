"""SmolVLA, small enough to learn a simulated task in minutes on two CPU cores."""

from dataclasses import dataclass
from typing import Literal

from lerobot.configs import PreTrainedConfig
from lerobot.policies.smolvla.configuration_smolvla import SmolVLAConfig


@PreTrainedConfig.register_subclass("tiny_smolvla")
@dataclass
class TinySmolVLAConfig(SmolVLAConfig):
    """SmolVLA's own fields with small defaults: 96 x 96 images, 12 x 12 = 144 visual tokens per camera."""

    chunk_size: int = 16
    n_action_steps: int = 8
    max_state_dim: int = 32
    max_action_dim: int = 32
    resize_imgs_with_padding: tuple[int, int] = (96, 96)
    tokenizer_max_length: int = 32
    # On the MetaWorld tasks two flow steps succeed as often as eight and take a third of the time.
    num_steps: int = 2

    freeze_vision_encoder: bool = False
    train_expert_only: bool = False
    optimizer_lr: float = 8e-4
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 100
    scheduler_decay_steps: int = 2_000
    scheduler_decay_lr: float = 4e-6

    # "attention": a convolutional stem, then SmolVLM's vision layer, in which every token sees the whole image.
    # "local": deeper convolutions and no attention, so that a token knows 29 x 29 pixels and nothing else, or 37 x 37
    # with a `patch_size` of 12.
    vision_tower: Literal["attention", "local"] = "attention"
    # Height and width of a token in pixels.
    patch_size: Literal[8, 12, 16] = 8

    # A name and not a path: the files are part of this package, wherever it is installed.
    vlm_model_name: str = "lerobot_policy_grids/tiny"
    # 0 keeps every layer of `language_layers`.
    num_vlm_layers: int = 0
    # Layers of the language model, and of the action expert. With two, a named object is pointed at; the robot's token
    # learns where it is from the third on.
    language_layers: int = 2
    expert_width_multiplier: float = 1.0
