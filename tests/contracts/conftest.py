"""One row per VLA family: how the contract suite builds it, and what is expected of it."""

import copy
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lerobot
import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.utils.constants import ACTION_TOKEN_MASK, ACTION_TOKENS, OBS_LANGUAGE_TOKENS
from packaging import version

from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.tiny import VLM_FOLDER, TinySmolVLAConfig

BATCH = 3
# What the tiny policy sets besides its vision-language model.
TINY_FIELDS = (
    *("chunk_size", "n_action_steps", "resize_imgs_with_padding", "tokenizer_max_length", "num_steps"),
    *("freeze_vision_encoder", "train_expert_only", "num_vlm_layers", "expert_width_multiplier"),
)


@dataclass
class Row:
    """A family, and what an independent reading of its LeRobot class says of its small instance.

    Attributes:
        policy_type: LeRobot's type.
        image_size: Side of its square images.
        tokens_per_camera: N.
        trunk: Attributes from `policy.model` to the module whose `forward` takes inputs_embeds=[prefix, suffix],
            attention_mask and position_ids; empty for a family that works otherwise.
        sequence: For such a family: the module that gets the reduced sequence, and its keyword arguments [b, n, c].
        sequence_axis: The axis n of these arguments.
        seam: The method that the family overrides with the one that reduces tokens.
        pruned: When tokens can be dropped inside its trunk: "act", "train".
        resizes_with_padding: Whether it keeps the aspect ratio of images that are not square without an option.
        bfloat16: Options that make a bfloat16 policy, where the family has such an option.
        tokenizes: Whether its pre-processor runs offline; otherwise instructions are random tokens.
        reads_language: Whether it reads an instruction.
        resizes: Whether it brings images of any size to one. Otherwise all cameras need one size, and none may be
            missing.
        tells_cameras_apart: Whether it knows which camera a token is from.
        rounded: Ends of the names of parameters whose gradients it sums over the batch in another order.
        flow: Whether its noise and time are drawn by methods that training can change.
        needs_every_camera: Whether its pre-processor refuses a batch without one of its cameras, or writes another
            prompt.
        makes_patches: Whether its pre-processor hands over patches in the place of images.
        reads_text: Whether its seam works on the text of a prompt or its ids, whose values decide what runs.
        beyond: Parts of the names of low-rank matrices that distillation does not reach: of the vision tower, whose
            features a teacher without them shares, and of what comes after all that the action head reads.
        needs: A package that its LeRobot class needs and that not everyone has.
        has_one_shape: Whether all its cameras must have one shape.
        language: What holds the instruction in its batch.
        stretches: Whether it brings images to a square without their aspect ratio.
        layers: Layers of its vision tower, between which tokens can be sampled; 0 where they cannot.
        since: First LeRobot release with which it is supported.
        costly: Whether it takes long to build, so that it is built once for each configuration, and copied.
        options: Fields of the small instance's configuration.
    """

    policy_type: str
    image_size: int
    tokens_per_camera: int
    trunk: str
    seam: str
    sequence: tuple[str, tuple[str, ...]] = ("", ())
    sequence_axis: int = 1
    pruned: tuple[str, ...] = ()
    resizes_with_padding: bool = True
    bfloat16: dict[str, Any] = field(default_factory=dict)
    tokenizes: bool = False
    reads_language: bool = True
    resizes: bool = True
    tells_cameras_apart: bool = True
    rounded: tuple[str, ...] = ()
    flow: bool = False
    language: str = OBS_LANGUAGE_TOKENS
    stretches: bool = False
    needs_every_camera: bool = False
    makes_patches: bool = False
    has_one_shape: bool = False
    reads_text: bool = False
    beyond: tuple[str, ...] = ()
    needs: str = ""
    layers: int = 0
    since: str = "0.6.0"
    costly: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    built: dict[str, Any] = field(default_factory=dict, repr=False)

    def policy(self, cameras: int = 1, shapes: Sequence[tuple[int, int]] = (), **options: Any) -> Any:
        """A dense policy in evaluation mode, with square cameras or with cameras of these (height, width)."""
        shapes = shapes or [(self.image_size, self.image_size)] * cameras
        inputs = {
            f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, *shape)) for i, shape in enumerate(shapes)
        }
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
        outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
        torch.manual_seed(0)
        if not self.costly:
            return self.make(inputs, outputs, **self.options | options).eval()
        key = repr((inputs, options))
        if key not in self.built:
            self.built[key] = self.make(inputs, outputs, **self.options | options).eval()
        return copy.deepcopy(self.built[key])

    def make(self, inputs: Any, outputs: Any, **options: Any) -> Any:
        """The small instance."""
        return get_family(self.policy_type).small(inputs, outputs, self.folder, **options)

    def batch(self, policy: Any) -> dict[str, Any]:
        """A batch as it comes from the policy's pre-processor; some instructions are shorter than others."""
        if not self.costly:
            return self.made_batch(policy)
        key = repr(("batch", policy.config.input_features))
        if key not in self.built:
            self.built[key] = self.made_batch(policy)
        return copy.deepcopy(self.built[key])

    def made_batch(self, policy: Any) -> dict[str, Any]:
        """Such a batch, made new."""
        torch.manual_seed(1)
        steps = policy.config.chunk_size
        batch: dict[str, Any] = {key: torch.rand(BATCH, *f.shape) for key, f in policy.config.image_features.items()}
        batch["observation.state"] = torch.randn(BATCH, 4)
        batch["action"] = torch.randn(BATCH, steps, 4)
        batch["action_is_pad"] = torch.zeros(BATCH, steps, dtype=torch.bool)
        batch["action_is_pad"][0, -3:] = True
        if not self.reads_language:
            return batch
        if self.tokenizes:
            tasks = ["push", "pick up the mug", "open the drawer quickly"]
            return make_processors(policy.config)[0](batch | {"task": tasks})
        batch["observation.language.tokens"] = torch.randint(5, 90, (BATCH, 8))
        mask = torch.ones(BATCH, 8, dtype=torch.bool)
        mask[1, -3:] = False
        batch["observation.language.attention_mask"] = mask
        # What a policy does not read does no harm.
        batch[ACTION_TOKENS] = torch.randint(5, 90, (BATCH, 6))
        batch[ACTION_TOKEN_MASK] = torch.ones(BATCH, 6, dtype=torch.bool)
        return batch

    def changed(self, policy: Any, batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """A batch with other observations."""
        return batch | changes

    def trunk_of(self, policy: Any) -> Any:
        """The module that `trunk` names."""
        return policy.model.get_submodule(self.trunk)

    def lengths(self, policy: Any) -> Any:
        """Collects how many tokens the prefix has, of each call that runs the whole prefix."""
        if self.trunk:
            return Lengths(self.spy(policy))
        seen: list[int] = []
        path, names = self.sequence

        def count(module: Any, args: Any, kwargs: Any) -> None:
            cache = kwargs.get("past_key_values")
            if cache is None or not cache.get_seq_length():
                seen.append(sum(kwargs[name].shape[self.sequence_axis] for name in names))

        get_family(self.policy_type).model(policy).get_submodule(path).register_forward_pre_hook(
            count, with_kwargs=True
        )
        return seen

    def spy(self, policy: Any) -> list[Any]:
        """Collects (prefix length, mask bool [b, q, k], position ids) of each call that runs the whole prefix."""
        seen: list[Any] = []
        trunk = self.trunk_of(policy)
        kind = type(trunk)

        def forward(trunk: Any, *args: Any, **kwargs: Any) -> Any:
            prefix = kwargs["inputs_embeds"][0]
            if prefix is not None and kwargs["past_key_values"] is None:
                mask = kwargs["attention_mask"]
                # Some families hand over an additive mask with a head axis.
                mask = mask if mask.dtype == torch.bool else mask[:, 0] == 0
                seen.append((prefix.shape[1], mask, kwargs["position_ids"]))
            return kind.forward(trunk, *args, **kwargs)

        # LeRobot calls `.forward` itself, which module hooks do not see, and dense position ids replace the instance's.
        trunk.__class__ = type(kind.__name__, (kind,), {"forward": forward})
        return seen


class LenientRow(Row):
    """Of a LeRobot class that lets no more cameras be missing than its configuration says."""

    def made_batch(self, policy: Any) -> dict[str, Any]:
        batch = super().made_batch(policy)
        policy.config.empty_cameras = len(policy.config.image_features)
        return batch


class PromptRow(Row):
    """Of a LeRobot class whose pre-processor writes a prompt with the images in it."""

    def made_batch(self, policy: Any) -> dict[str, Any]:
        self.tokenizes = False
        raw = super().made_batch(policy)
        # Of one length: a batch in training is padded on the other side than one that acts.
        raw["task"] = ["push a mug", "lift a cup", "open a box"]
        return self.processed(policy, raw)

    def processed(self, policy: Any, raw: dict[str, Any]) -> dict[str, Any]:
        """What the policy gets of a batch of observations, actions and instructions."""
        return make_processors(policy.config)[0](raw)

    def changed(self, policy: Any, batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
        names = (*policy.config.image_features, "observation.state", "action", "action_is_pad", "task")
        return self.processed(policy, {name: batch[name] for name in names} | changes)


class PaddedRow(PromptRow):
    """Of a LeRobot class whose pre-processor also makes actions as wide as the policy's."""

    def changed(self, policy: Any, batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
        return super().changed(policy, batch | {"action": batch["action"][..., :4]}, **changes)


class GrootRow(PaddedRow):
    """GR00T, whose pre-processor leaves no image in the batch, and asks for the tokenizer of a backbone on the Hub."""

    def processed(self, policy: Any, raw: dict[str, Any]) -> dict[str, Any]:
        from lerobot.policies.groot.processor_groot import _build_n1_7_processor

        if "processor" not in self.built:
            self.built["processor"] = _build_n1_7_processor(policy._groot_model.config.model_name)
        preprocessor, _ = make_processors(policy.config)
        for step in preprocessor.steps:
            if hasattr(step, "model_name"):
                step._proc = self.built["processor"]
        return {**raw, **preprocessor(dict(raw))}


class Blocks(Row):
    """SmolVLA with the connector of its published checkpoints, which merges patches; the tiny one's merges none."""

    def make(self, inputs: Any, outputs: Any, **options: Any) -> Any:
        from lerobot.policies.smolvla.modeling_smolvla import SmolVLAConfig, SmolVLAPolicy

        vlm = self.folder / "vlm"
        if not vlm.exists():
            shutil.copytree(VLM_FOLDER, vlm)
            content = json.loads((vlm / "config.json").read_text()) | {"scale_factor": 2}
            content["vision_config"] |= {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": self.layers}
            (vlm / "config.json").write_text(json.dumps(content))
        fields = {name: getattr(TinySmolVLAConfig, name) for name in TINY_FIELDS}
        local = {"vlm_model_name": str(vlm), "load_vlm_weights": False, "device": "cpu"}
        return SmolVLAPolicy(SmolVLAConfig(input_features=inputs, output_features=outputs, **fields | local | options))


class Lengths:
    """The lengths in what `Row.spy` collects."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen = seen

    def __getitem__(self, index: Any) -> Any:
        return self.seen[index][0]

    def clear(self) -> None:
        self.seen.clear()


PI = {
    "image_size": 112,
    "tokens_per_camera": 64,
    "trunk": "paligemma_with_expert",
    "seam": "_preprocess_images",
    "bfloat16": {"dtype": "bfloat16"},
    "layers": 2,
}
PROMPT = {
    "image_size": 64,
    "tokens_per_camera": 64,
    "trunk": "",
    "language": "task",
    "stretches": True,
    "needs_every_camera": True,
    "makes_patches": True,
    "has_one_shape": True,
    "reads_text": True,
    "since": "0.6.1",
    "costly": True,
}
FAMILIES: dict[str, Row] = {
    "tiny_smolvla": Row(
        "tiny_smolvla",
        96,
        144,
        "vlm_with_expert",
        "prepare_images",
        pruned=("act", "train"),
        tokenizes=True,
        flow=True,
        layers=1,
    ),
    "pi0": Row("pi0", **PI, pruned=("act",), flow=True, options={"num_inference_steps": 3}),
    "pi05": Row("pi05", **PI, pruned=("act",), flow=True, options={"num_inference_steps": 3}),
    "pi0_fast": Row("pi0_fast", **PI),
    "pi0_fast without cache": Row("pi0_fast", **PI, options={"use_kv_cache": False}),
    "xvla": Row(
        "xvla",
        image_size=64,
        tokens_per_camera=64,
        trunk="",
        sequence=("transformer", ("vlm_features", "aux_visual_inputs")),
        seam="_build_model_inputs",
        resizes_with_padding=False,
        bfloat16={"dtype": "bfloat16"},
        tokenizes=True,
        since="0.6.1",
    ),
    "evo1": LenientRow(
        "evo1",
        image_size=64,
        tokens_per_camera=64,
        trunk="",
        sequence=("embedder.model.language_model", ("inputs_embeds",)),
        seam="_collect_image_batches",
        bfloat16={"vlm_dtype": "bfloat16"},
        tokenizes=True,
        language="task",
        stretches=True,
        reads_text=True,
        since="0.6.1",
    ),
    "eo1": PromptRow(
        "eo1",
        sequence=("vlm_backbone.model.language_model", ("inputs_embeds",)),
        seam="_get_model_inputs",
        bfloat16={"dtype": "bfloat16"},
        **PROMPT,
    ),
    "vla_jepa": Row(
        "vla_jepa",
        sequence=("qwen.model.model.language_model", ("inputs_embeds",)),
        seam="_prepare_model_inputs",
        tokenizes=True,
        needs="diffusers",
        **PROMPT,
    ),
    "groot": GrootRow(
        "groot",
        sequence=("backbone.model.model.language_model", ("inputs_embeds",)),
        seam="_filter_groot_inputs",
        bfloat16={"model_params_fp32": False},
        needs="tree",
        **PROMPT | {"image_size": 256},
    ),
    "wall_x": PromptRow(
        "wall_x",
        sequence=("model", ("inputs_embeds",)),
        seam="preprocess_inputs",
        needs="torchdiffeq",
        **PROMPT | {"image_size": 252, "tokens_per_camera": 81},
    ),
    "molmoact2": PaddedRow(
        "molmoact2",
        sequence=("model.transformer", ("inputs_embeds",)),
        seam="_model_inputs",
        bfloat16={"model_dtype": "bfloat16"},
        beyond=("vision_backbone", "blocks.1.self_attn.attn_out", "blocks.1.mlp"),
        **PROMPT | {"has_one_shape": False},
    ),
    "act": Row(
        "act",
        image_size=64,
        tokens_per_camera=64,
        trunk="",
        sequence=("encoder", ("pos_embed",)),
        sequence_axis=0,
        seam="forward",
        reads_language=False,
        resizes=False,
        tells_cameras_apart=False,
        rounded=("encoder_img_feat_input_proj.bias", "encoder_1d_feature_pos_embed.weight"),
    ),
}


TOWERS: dict[str, Row] = {
    name: row for name, row in FAMILIES.items() if row.layers and row.options.get("use_kv_cache", True)
}
TOWERS["smolvla with blocks"] = Blocks("smolvla", 96, 36, "vlm_with_expert", "prepare_images", tokenizes=True, layers=2)


def _families(wanted: Any) -> list[str]:
    return [name for name, row in FAMILIES.items() if wanted(row)]


def _chosen(request: Any, tmp_path_factory: Any, rows: Mapping[str, Row] = FAMILIES) -> Row:
    row = rows[request.param]
    if version.parse(lerobot.__version__) < version.parse(row.since):
        pytest.skip(f"{row.policy_type} needs LeRobot {row.since}")
    if row.needs and find_spec(row.needs) is None:
        pytest.skip(f"{row.policy_type} needs {row.needs}, which is not installed")
    row.folder = row.folder or tmp_path_factory.mktemp("tokenizers")
    return row


@pytest.fixture(scope="session")
def family_row(tmp_path_factory) -> Any:
    """Gives a row by its name."""

    def choose(name: str) -> Row:
        return _chosen(SimpleNamespace(param=name), tmp_path_factory)

    return choose


@pytest.fixture(params=FAMILIES, scope="module")
def family(request, tmp_path_factory) -> Row:
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: row.reads_language), scope="module")
def instructed_family(request, tmp_path_factory) -> Row:
    """A family that reads an instruction."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: row.resizes), scope="module")
def resizing_family(request, tmp_path_factory) -> Row:
    """A family that brings images of any size to one, and does without a camera."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: not row.resizes), scope="module")
def unsizing_family(request, tmp_path_factory) -> Row:
    """A family that does not."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: row.trunk), scope="module")
def concatenating_family(request, tmp_path_factory) -> Row:
    """A family whose trunk takes one prefix of visual tokens and what follows them."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: not row.trunk), scope="module")
def scattering_family(request, tmp_path_factory) -> Row:
    """A family whose visual tokens go elsewhere."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=TOWERS, scope="module")
def tower_family(request, tmp_path_factory) -> Row:
    """A family inside whose vision tower tokens can be sampled."""
    return _chosen(request, tmp_path_factory, TOWERS)


@pytest.fixture(params=_families(lambda row: row.flow), scope="module")
def flow_family(request, tmp_path_factory) -> Row:
    """A family that integrates a flow, whose training can be told other noise and times."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: not row.flow))
def flowless_family(request, tmp_path_factory) -> Row:
    """A family that does not."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: not row.layers))
def towerless_family(request, tmp_path_factory) -> Row:
    """A family inside whose vision tower they cannot."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: "act" in row.pruned))
def pruned_family(request, tmp_path_factory) -> Row:
    """A family in whose trunk tokens can be dropped when it acts."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: "train" in row.pruned))
def trained_family(request, tmp_path_factory) -> Row:
    """A family in whose trunk they can be dropped in training, too."""
    return _chosen(request, tmp_path_factory)


@pytest.fixture(params=_families(lambda row: row.pruned == ("act",)))
def acting_family(request, tmp_path_factory) -> Row:
    """A family in whose trunk they can be dropped only when it acts."""
    return _chosen(request, tmp_path_factory)
