"""π0, π0.5 and π0-FAST: SigLIP -> linear projector -> [image tokens, language, ...] -> Gemma.

Modifications, from outside, of `lerobot/policies/{pi0,pi05,pi0_fast}`, which share this seam:
- `policy._preprocess_images` also runs the vision tower, once for all cameras, and the reducer, and returns
  the k sampled features of each camera as if they were its image. There the whole batch is visible.
- `PaliGemmaModel.get_image_features` projects such features instead of running the tower. Sampling before the
  linear projector gives the same tokens for less: the map and an average commute. The reducer of published weights
  is behind it, where its authors trained it (`TokenLayout.projected`).
- Cameras missing from the batch are left out. LeRobot sends a blank image through the tower and masks its tokens;
  nothing attends to them and they advance no position, so the result is the same.
Everything after that follows from the number of tokens: masks, positions, key-value cache, FAST decoding.

A fast runtime acts in two phases, made of the modules of the policy: `phases.pi` and `phases.pi_fast`.

To drop tokens inside the trunk of π0 and π0.5 (`attach_to_trunk`), hooks in front of each layer of the language model
and of the action expert shorten what they get. In training LeRobot runs both through a function of its own, which
nothing from outside reaches, so such a policy acts and has no loss.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UnsupportedPolicyError
from ..reducers import TokenLayout
from ..reducers.anchors import Region
from ..runtime import FastRuntime, Phases
from ..tiny import VLM_FOLDER
from .acting import Prepared, act_through
from .base import DensePolicy, Family, Recipe, Stages, Target, centred_region, refuse_second_attach, replaced
from .characters import CHARACTERS, write_character_tokenizer
from .distances import action_distance, token_divergence
from .phases import pi_fast
from .phases.pi import VISION, Prefill, StepTimedByInput, StepTimedByNorms
from .positions import keep_positions, release_positions
from .pruning import TrunkPruning, mean_attention, note_images
from .seam import Sampling, Seam
from .tower import Tower, release_tower

# The paper's (its openpi configurations): 30 k steps of 128 frames, peak 5e-5 after 10 k steps of warm-up.
RECIPE = Recipe(steps=30_000, batch=128, micro_batch=8, lr=5e-5, warmup=1 / 3)
PALIGEMMA = frozenset({"google/paligemma-3b-pt-224"})
PROMPT_OPTIONS = frozenset({"max_state_dim", "task_key"})


class Pi(Family):
    """Policies built on PaliGemma in openpi's way, with a flow-matching expert."""

    resolution_field = "image_resolution"
    extra = "pi"
    packages: ClassVar[tuple[str, ...]] = ("transformers",)
    flow_steps: ClassVar[str | None] = "num_inference_steps"
    reference = "openpi"
    counted_on_meta = True
    steps: ClassVar = {
        "pi0_new_line_processor": frozenset(),
        "pi05_prepare_state_tokenizer_processor_step": PROMPT_OPTIONS,
    }
    repositories: ClassVar = {"tokenizer_name": PALIGEMMA}

    def layout(self, policy: DensePolicy) -> TokenLayout:
        config = policy.config
        if getattr(config, "use_visual_memory", False):
            raise UnsupportedPolicyError(
                "use_visual_memory=true fuses several frames inside the vision tower, where tokens are sampled; "
                "set it to false"
            )
        paligemma = _paligemma(policy)
        vision = paligemma.config.vision_config
        side = vision.image_size // vision.patch_size
        cameras = self.cameras(policy)
        return TokenLayout(
            token_grid=(side, side),
            width=vision.hidden_size,
            cameras=tuple(cameras),
            language_width=paligemma.config.text_config.hidden_size,
            state_width=0 if config.robot_state_feature is None else config.max_state_dim,
            regions=tuple(cameras.values()),
        )

    def projected(self, policy: DensePolicy, layout: TokenLayout) -> TokenLayout:
        return replace(layout, width=layout.language_width, projected=True)

    def attach(self, policy: Any, seam: Seam) -> None:
        refuse_second_attach("_preprocess_images" in vars(policy))
        paligemma = _paligemma(policy)
        # Partials of module-level functions, unlike closures, survive pickle and deepcopy.
        policy._preprocess_images = partial(_preprocess_images, policy, seam)
        paligemma.get_image_features = partial(_get_image_features, paligemma, seam.layout.projected)

    def detach(self, policy: Any) -> None:
        release_positions(policy.model.paligemma_with_expert)
        for hook in vars(policy).pop("_trunk_hooks", ()):
            hook.remove()
        for name in ("forward", "_preprocess_images"):
            vars(policy).pop(name, None)
        vars(_paligemma(policy)).pop("get_image_features", None)
        release_tower(_vision(policy).encoder)

    def feature_source(self, policy: DensePolicy) -> nn.Module:
        source: nn.Module = _vision(policy).post_layernorm
        return source

    def image_region(self, policy: DensePolicy, height: int, width: int) -> Region:
        return centred_region(height, width, *policy.config.image_resolution)

    def keep_positions(self, policy: DensePolicy, seam: Seam) -> None:
        keep_positions(policy.model.paligemma_with_expert, seam, 0, 0)

    def tower(self, policy: DensePolicy) -> Tower:
        return Tower(_vision(policy).encoder, _vision(policy).config.hidden_size)

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        act_through(policy, seam, runtime, str(self.stages(policy).steps_field), partial(_reduce, policy, seam))

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        model = policy.model.paligemma_with_expert
        step = StepTimedByNorms if hasattr(policy.model, "time_mlp_in") else StepTimedByInput
        unused = (model.paligemma.lm_head, model.gemma_expert.lm_head)
        return Phases(Prefill(policy, seam, cameras), step(policy, steps), unused, vision=VISION)

    def attach_to_trunk(self, policy: Any, seam: Seam) -> None:
        model = policy.model.paligemma_with_expert
        trunk, expert = model.paligemma.model.language_model.layers, model.gemma_expert.model.layers
        pruning = TrunkPruning(seam, len(trunk))
        policy._preprocess_images = partial(note_images, pruning, policy._preprocess_images, 0, 0)
        policy.forward = partial(_refuse_loss, self)
        policy._trunk_hooks = [
            layer.register_forward_pre_hook(partial(before, pruning, number), with_kwargs=True)
            for layers, before in ((trunk, _before_prefix), (expert, _before_suffix))
            for number, layer in enumerate(layers)
        ]

    def require_trunk_training(self) -> None:
        raise UnsupportedPolicyError(
            f"tokens can be dropped inside the trunk of the '{self.policy_type}' policy only when it acts: LeRobot "
            "trains its layers in a function that cannot be reached; apply the reducer without training, eval "
            "--reducer fastv, or train another"
        )

    def to_bfloat16(self, policy: DensePolicy) -> bool:
        policy.config.dtype = "bfloat16"
        # LeRobot's own conversion: vision, projector and norms stay float32.
        policy.model.paligemma_with_expert.to_bfloat16_for_selected_params("bfloat16")
        return True

    def checkpoint_names(self, policy: Any, names: list[str]) -> dict[str, str]:
        # LeRobot renames keys while it loads. Its function moves values about; here they are the names' numbers.
        numbers = {name: torch.tensor(number) for number, name in enumerate(names)}
        renamed = policy._fix_pytorch_state_dict_keys(numbers, policy.config)
        return {
            name if name.startswith("model.") else f"model.{name}": names[int(number)]
            for name, number in renamed.items()
        }

    def target(self, policy: DensePolicy) -> Target:
        return Target(policy.model.action_out_proj, action_distance)

    def flow(self, policy: DensePolicy) -> nn.Module:
        model: nn.Module = policy.model
        return model

    def stages(self, policy: DensePolicy) -> Stages:
        paligemma = _paligemma(policy)
        return Stages(paligemma.vision_tower, paligemma.multi_modal_projector, self.flow_steps, "embed_prefix")

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        config = super().config(inputs, outputs, size, dtype)
        config.dtype = dtype
        return config

    def finish(self, policy: Any) -> None:
        # What LeRobot keeps in float32 besides the parts of PaliGemma, which it converts itself.
        for name, module in policy.model.named_children():
            if name != "paligemma_with_expert":
                module.float()

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        return self._small(inputs, outputs, SMALL_DEPTHS, {"chunk_size": 8, "n_action_steps": 8} | options)

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        return self._small(inputs, outputs, FULL_DEPTHS, options)

    def _small(
        self, inputs: dict[str, Any], outputs: dict[str, Any], depths: tuple[int, int], options: dict[str, Any]
    ) -> Any:
        from lerobot.configs import PreTrainedConfig
        from lerobot.policies.factory import get_policy_class

        size = (SMALL_IMAGE, SMALL_IMAGE)
        fields = {"max_state_dim": 8, "max_action_dim": 8} | options
        config = PreTrainedConfig.get_choice_class(self.policy_type)(
            input_features=inputs, output_features=outputs, image_resolution=size, device="cpu", **fields
        )
        with small_sizes(self.policy_type, *depths):
            policy: Any = get_policy_class(self.policy_type)(config)
        # π0.5's time conditioning starts at zero, which closes every gate: the policy would be nearly blind.
        for name, parameter in policy.named_parameters():
            if name.endswith(("layernorm.dense.weight", "norm.dense.weight")):
                nn.init.normal_(parameter, std=0.3)
        return policy


class PiFast(Pi):
    """π0-FAST, which decodes action tokens one by one."""

    # It decodes tokens.
    flow_steps = None
    exports = False

    steps: ClassVar = {
        "pi0_fast_prepare_state_tokenizer_processor_step": PROMPT_OPTIONS,
        "action_tokenizer_processor": frozenset(
            {
                "allow_truncation",
                "trust_remote_code",
                "max_action_tokens",
                "fast_skip_tokens",
                "action_tokenizer_name",
                "paligemma_tokenizer_name",
            }
        ),
    }
    packages = ("transformers", "scipy")
    repositories: ClassVar = {
        "tokenizer_name": PALIGEMMA,
        "text_tokenizer_name": PALIGEMMA,
        "paligemma_tokenizer_name": PALIGEMMA,
        # It comes with its own code, which LeRobot runs: these two are LeRobot's and the authors'.
        "action_tokenizer_name": frozenset({"lerobot/fast-action-tokenizer", "physical-intelligence/fast"}),
    }

    def act_through(self, policy: Any, seam: Seam, runtime: FastRuntime) -> None:
        if not policy.config.use_kv_cache:
            raise UnsupportedPolicyError(
                f"runtime={runtime.name} is not available for the '{self.policy_type}' policy with use_kv_cache=false, "
                "which runs the whole prefix for each token; set use_kv_cache=true, or use runtime=eager"
            )
        seam.runtime = runtime
        policy.model.sample_actions_fast_kv_cache = partial(
            pi_fast.sample_tokens, policy, seam, runtime, partial(_reduce, policy, seam)
        )

    @torch.no_grad()
    def phases(self, policy: Any, seam: Seam, cameras: list[int], steps: int) -> Phases:
        prefill, step = pi_fast.Prefill(policy, seam, cameras, steps), pi_fast.Step(policy, steps)
        return Phases(prefill, step, start=pi_fast.first_scores, vision=VISION)

    def attach_to_trunk(self, policy: Any, seam: Seam) -> None:
        # Decoding runs the layers of the prefix again for each token.
        Family.attach_to_trunk(self, policy, seam)

    def target(self, policy: DensePolicy) -> Target:
        head = policy.model.paligemma_with_expert.paligemma.lm_head
        return Target(head, token_divergence, softened=token_divergence)

    def flow(self, policy: DensePolicy) -> nn.Module:
        # It decodes tokens.
        return Family.flow(self, policy)

    def stages(self, policy: DensePolicy) -> Stages:
        paligemma = _paligemma(policy)
        return Stages(
            paligemma.vision_tower,
            paligemma.multi_modal_projector,
            "max_decoding_steps",
            "embed_prefix_fast",
            decodes=True,
        )

    def config(self, inputs: dict[str, Any], outputs: dict[str, Any], size: int, dtype: str) -> Any:
        config = super().config(inputs, outputs, size, dtype)
        # Sampling does not look at values, so it can be counted without any; it also never stops early.
        config.temperature = 1.0
        return config

    @contextmanager
    def offline(self, config: Any) -> Iterator[None]:
        names = {"text_tokenizer_name": str(VLM_FOLDER)}
        with replaced(config, **names), replaced(modeling(self.policy_type), AutoProcessor=_NoProcessor):
            yield

    def finish(self, policy: Any) -> None:
        super().finish(policy)
        # Decoded tokens are looked up on the CPU; random ones mean nothing.
        policy.detokenize_actions = _no_actions

    def small(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        return super().small(inputs, outputs, folder, **self._files(folder) | options)

    def narrow(self, inputs: dict[str, Any], outputs: dict[str, Any], folder: Path, **options: Any) -> Any:
        return super().narrow(inputs, outputs, folder, **self._files(folder) | {"max_decoding_steps": 20} | options)

    def _files(self, folder: Path) -> dict[str, Any]:
        """Options that need no network."""
        return {
            "text_tokenizer_name": str(write_character_tokenizer(folder / "text", VOCABULARY)),
            "action_tokenizer_name": str(_write_action_tokenizer(folder / "fast")),
            "max_decoding_steps": 5,
            "max_action_tokens": 6,
            "validate_action_token_prefix": False,
            "fast_skip_tokens": 2,
        }


FAMILIES = (
    Pi("pi0", sources={"pi0": "lerobot/pi0_base"}, recipe=RECIPE, image_size=224, language_tokens=48),
    Pi("pi05", sources={"pi05": "lerobot/pi05_base"}, recipe=RECIPE, image_size=224, language_tokens=200),
    PiFast(
        "pi0_fast", sources={"pi0_fast": "lerobot/pi0fast-base"}, recipe=RECIPE, image_size=224, language_tokens=200
    ),
)


def _paligemma(policy: Any) -> Any:
    return policy.model.paligemma_with_expert.paligemma.model


def _vision(policy: Any) -> Any:
    tower = _paligemma(policy).vision_tower
    return getattr(tower, "vision_model", tower)


def modeling(policy_type: str) -> Any:
    """LeRobot's module of a policy type."""
    return import_module(f"lerobot.policies.{policy_type}.modeling_{policy_type}")


# The seam.


def _preprocess_images(policy: Any, seam: Seam, batch: dict[str, Tensor]) -> tuple[Any, list[Tensor]]:
    images, masks = type(policy)._preprocess_images(policy, batch)
    if seam.acts_in_phases:
        return Prepared(images, batch), masks
    tokens = _reduce(policy, seam, Prepared(images, batch))
    return tokens, masks[: len(tokens)]


def _reduce(policy: Any, seam: Seam, prepared: Prepared) -> list[Tensor]:
    model = policy.model
    # As in the dense policy, the tower's activations are recomputed in backward if checkpointing is on.
    encode = partial(model._apply_checkpoint, partial(_run_tower, _paligemma(policy), seam))
    return seam.tokens(prepared.images, prepared.batch, encode, model.paligemma_with_expert.embed_language_tokens)


def _run_tower(paligemma: Any, seam: Seam, images: Tensor, sample: Sampling | None = None) -> Tensor:
    with seam.sampling(sample):
        features: Tensor = paligemma.vision_tower(images).last_hidden_state
    return paligemma.multi_modal_projector(features) if seam.layout.projected else features


def _get_image_features(paligemma: Any, projected: bool, pixel_values: Tensor, **kwargs: Any) -> Any:
    """Project features [b, k, c] unless they are projected; treat pixels [b, 3, h, w] as before."""
    if pixel_values.ndim == 3:
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        features = pixel_values if projected else paligemma.multi_modal_projector(pixel_values)
        return BaseModelOutputWithPooling(pooler_output=features)
    return type(paligemma).get_image_features(paligemma, pixel_values, **kwargs)


# Dropping tokens inside the trunk.


def _refuse_loss(family: Family, *args: Any, **kwargs: Any) -> None:
    family.require_trunk_training()


def _before_prefix(pruning: TrunkPruning, number: int, layer: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What a layer of the language model gets."""
    states = args[0]
    if number == 0:
        pruning.start()
    if number == pruning.layers - 1:
        pruning.observe(_attention(layer, states, kwargs["attention_mask"], kwargs["position_embeddings"]))
    if number == pruning.layers:
        states = pruning.prune(states)
    if pruning.shortened(number):
        kwargs["attention_mask"] = pruning.take(pruning.take(kwargs["attention_mask"], -1), -2)
        kwargs["position_ids"] = pruning.take(kwargs["position_ids"], 1)
        kwargs["position_embeddings"] = tuple(pruning.take(part, 1) for part in kwargs["position_embeddings"])
    return (states, *args[1:]), kwargs


def _before_suffix(pruning: TrunkPruning, number: int, layer: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
    """What a layer of the action expert gets."""
    if pruning.shortened(number):
        kwargs["attention_mask"] = pruning.take(kwargs["attention_mask"], -1)
    return args, kwargs


@torch.no_grad()
def _attention(layer: Any, states: Tensor, mask: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """As transformers' `eager_attention_forward` weighs, float32 [b, p, p]."""
    from transformers.models.gemma.modeling_gemma import apply_rotary_pos_emb

    attention = layer.self_attn
    states, _ = layer.input_layernorm(states)
    states = states.to(attention.q_proj.weight.dtype)
    query, key = (
        project(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *rotation)
    return mean_attention(query, key, mask[:, 0] == 0, attention.scaling)


# Real sizes without a network.


class _NoProcessor:
    """In place of the action tokenizer, which comes with its own code."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        return None


def _no_actions(tokens: Tensor, action_horizon: int, action_dim: int) -> Tensor:
    return torch.zeros(len(tokens), action_horizon, action_dim, device=tokens.device)


# Small sizes. LeRobot writes these policies' sizes into its source: named Gemma variants, PaliGemma's vocabulary,
# projector and vision width. Globals of its module, replaced while a policy is constructed, make it small.

SMALL_WIDTH, SMALL_VISION, SMALL_IMAGE, SMALL_PATCH = 32, 24, 112, 14
# Layers of Gemma and of the vision tower.
SMALL_DEPTHS, FULL_DEPTHS = (2, 2), (18, 27)
# Characters, a few named tokens and spares: ids that stand for FAST's action tokens.
VOCABULARY = ("<pad>", "<eos>", "<bos>", "<unk>", *CHARACTERS, "Action", *(f"w{i}" for i in range(100)))


@contextmanager
def small_sizes(policy_type: str, depth: int = SMALL_DEPTHS[0], vision_depth: int = SMALL_DEPTHS[1]) -> Iterator[None]:
    """In this block a π policy of this type is constructed small, with so many layers."""
    module = modeling(policy_type)
    # LeRobot reshapes by a literal 8 heads.
    gemma = module.GemmaConfig(
        width=SMALL_WIDTH, depth=depth, mlp_dim=2 * SMALL_WIDTH, num_heads=8, num_kv_heads=1, head_dim=8
    )
    names = ("PaliGemmaForConditionalGenerationWithPiGemma", "PiGemmaForCausalLM")
    models = {
        name: partial(_small_model, getattr(module, name), vision_depth) for name in names if hasattr(module, name)
    }
    with replaced(module, get_gemma_config=lambda variant: gemma, **models):
        yield


def _small_model(make: Any, vision_depth: int, config: Any) -> Any:
    """Construct one of transformers' models with what LeRobot's variants do not reach."""
    text = getattr(config, "text_config", config)
    text.vocab_size = len(VOCABULARY)
    if hasattr(config, "vision_config"):
        config.projection_dim = SMALL_WIDTH
        sizes = {"hidden_size": SMALL_VISION, "intermediate_size": 2 * SMALL_VISION, "projection_dim": SMALL_WIDTH}
        counts = {"num_hidden_layers": vision_depth, "num_attention_heads": 2}
        image = {"image_size": SMALL_IMAGE, "patch_size": SMALL_PATCH}
        config.vision_config.update(sizes | counts | image)
    return make(config=config)


_ACTION_TOKENIZER = """
import numpy as np
from scipy.fft import dct
from transformers.processing_utils import ProcessorMixin

class UniversalActionProcessor(ProcessorMixin):
    attributes = ["bpe_tokenizer"]
    bpe_tokenizer_class = "AutoTokenizer"

    def __init__(self, bpe_tokenizer=None, scale=10.0, vocab_size=64, min_token=0, **kwargs):
        self.scale, self.vocab_size, self.min_token = scale, vocab_size, min_token
        super().__init__(bpe_tokenizer)

    def __call__(self, chunks):
        coefficients = np.around(dct(np.asarray(chunks, np.float32), axis=1, norm="ortho") * self.scale).astype(int)
        # The characters that the small vocabulary has.
        texts = ["".join(map(chr, np.clip(c.flatten() - self.min_token, 32, 126))) for c in coefficients]
        return [self.bpe_tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
"""


def _write_action_tokenizer(folder: Path) -> Path:
    """A stand-in for FAST's action tokenizer, which LeRobot loads with its code from a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "processing_action_tokenizer.py").write_text(_ACTION_TOKENIZER)
    for place in (folder, folder / "bpe_tokenizer"):
        write_character_tokenizer(place, VOCABULARY)
    name = "UniversalActionProcessor"
    content = {
        "processor_class": name,
        "auto_map": {"AutoProcessor": f"processing_action_tokenizer.{name}"},
        "scale": 10.0,
        "vocab_size": 64,
        "min_token": -60,
    }
    (folder / "processor_config.json").write_text(json.dumps(content))
    return folder
