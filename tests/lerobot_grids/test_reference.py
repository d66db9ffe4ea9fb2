"""A published GridS checkpoint becomes a grids checkpoint that acts as the published code does."""

import json
import re

import pytest
import torch
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAConfig, SmolVLAPolicy
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoTokenizer

from driving import ROUNDING, act
from lerobot_grids.policies import load
from lerobot_grids_cli.main import main
from lerobot_policy_grids.families import get_family
from lerobot_policy_grids.families.characters import write_character_tokenizer
from lerobot_policy_grids.families.pi import VOCABULARY, small_sizes
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.tiny import VLM_FOLDER, TinySmolVLAConfig

K, HIDDEN, GEOMETRY = 5, 24, 8
# What makes SmolVLA small.
FIELDS = (
    *("chunk_size", "n_action_steps", "resize_imgs_with_padding", "tokenizer_max_length", "num_steps"),
    *("freeze_vision_encoder", "train_expert_only", "num_vlm_layers", "expert_width_multiplier"),
)
STATE = {"mean": [1.0, 2.0, 3.0, 4.0], "std": [2.0, 1.0, 0.5, 4.0]}
ACTION = {"mean": [0.5, 0.0, -0.5, 1.0], "std": [3.0, 2.0, 1.0, 0.5]}
PREFIX = "model.token_sampler."


@pytest.fixture(scope="module")
def dense():
    """The policy that was published, without its sampler."""
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 96, 96)) for i in range(2)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    options = {name: getattr(TinySmolVLAConfig, name) for name in FIELDS}
    options |= {"vlm_model_name": str(VLM_FOLDER), "load_vlm_weights": False, "device": "cpu"}
    torch.manual_seed(0)
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    return SmolVLAPolicy(SmolVLAConfig(input_features=inputs, output_features=outputs, **options)).eval()


@pytest.fixture(scope="module")
def sampler(dense):
    return sampler_for(dense.model.vlm_with_expert.config.text_config.hidden_size)


def sampler_for(width):
    """Weights by their published names and shapes, far from where training starts."""
    shapes = {"scout_mlp.0": (HIDDEN, width), "scout_mlp.2": (2 * K, HIDDEN)}
    shapes |= {"coord_encoder.0": (GEOMETRY, 2), "coord_encoder.2": (width, GEOMETRY)}
    torch.manual_seed(1)
    weights = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": torch.randn(shape[0]) for name, shape in shapes.items()}


@pytest.fixture
def published(dense, sampler, tmp_path):
    """A folder as the paper's LeRobot tree saves it: no processors, statistics among the weights."""
    folder = tmp_path / "published"
    folder.mkdir()
    dense.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_grid_token_sampler": True, "grid_token_sampler_num_tokens": K, "device": "cuda"}
    (folder / "config.json").write_text(json.dumps(config))
    write(folder, tensors_of(dense, sampler))
    return folder


def tensors_of(dense, sampler):
    buffers = {f"normalize_inputs.buffer_observation_state.{k}": torch.tensor(v) for k, v in STATE.items()}
    for place in ("normalize_targets", "unnormalize_outputs"):
        buffers |= {f"{place}.buffer_action.{k}": torch.tensor(v) for k, v in ACTION.items()}
    state = {name: value.clone() for name, value in dense.state_dict().items()}
    return state | buffers | {PREFIX + name: value for name, value in sampler.items()}


def write(folder, tensors):
    save_file(tensors, folder / "model.safetensors")


def imports(folder, output, *options):
    return main(["import-reference", str(folder), "--output", str(output), *options])


def formula(sampler, tokens, **reading):
    """The published module, by torch's functions: tokens [b, n * n, c] to [b, K, c]."""

    def mlp(name, x):
        hidden = functional.linear(x, sampler[f"{name}.0.weight"], sampler[f"{name}.0.bias"]).relu()
        return functional.linear(hidden, sampler[f"{name}.2.weight"], sampler[f"{name}.2.bias"])

    side = round(tokens.shape[1] ** 0.5)
    points = mlp("scout_mlp", tokens.mean(1)).sigmoid().view(len(tokens), K, 2)
    maps = tokens.transpose(1, 2).unflatten(2, (side, side))
    read = functional.grid_sample(maps, 2 * points[:, None] - 1, **reading)[:, :, 0].transpose(1, 2)
    return read + mlp("coord_encoder", points)


def published_act(dense, trunk, sampler, batch, **reading):
    """The action chunk of a dense policy whose trunk gets images by the formula."""
    trunk.embed_image = lambda image: formula(sampler, type(trunk).embed_image(trunk, image), **reading)
    try:
        return act(dense, batch)
    finally:
        del trunk.embed_image


@pytest.mark.parametrize(
    ("options", "reading"),
    [
        ((), {"align_corners": False, "padding_mode": "zeros"}),
        (("--convention", "openpi"), {"align_corners": True, "padding_mode": "border"}),
    ],
)
def test_the_imported_policy_acts_as_the_published_one(dense, sampler, published, tmp_path, options, reading, capsys):
    output = tmp_path / "imported"
    assert imports(published, output, *options, "--json", str(tmp_path / "said.json")) == 0
    assert f"'smolvla' policy with {K} visual tokens per camera" in capsys.readouterr().out
    convention = options[1] if options else "lerobot"
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == {"policy_type": "smolvla", "num_tokens": K, "convention": convention}
    loaded = load(output, device="cpu")
    assert loaded.policy.config.reducer.type == "reference"
    torch.manual_seed(2)
    raw = {name: torch.rand(2, 3, 96, 96) for name in dense.config.image_features}
    raw |= {"observation.state": torch.randn(2, 4), "task": ["push", "pick up the mug"]}
    batch = loaded.preprocessor(dict(raw))
    expected = (raw["observation.state"] - torch.tensor(STATE["mean"])) / torch.tensor(STATE["std"])
    torch.testing.assert_close(batch["observation.state"], expected)
    published_chunk = published_act(dense, dense.model.vlm_with_expert, sampler, batch, **reading)
    chunk = act(loaded.policy, batch)
    torch.testing.assert_close(chunk, published_chunk, atol=1e-5, rtol=0)
    assert (chunk - act(dense, batch)).abs().max() > 1e-3
    moved = loaded.postprocessor(chunk)
    torch.testing.assert_close(moved, chunk * torch.tensor(ACTION["std"]) + torch.tensor(ACTION["mean"]))


@pytest.fixture
def small_pi(tmp_path, monkeypatch):
    """In this test π0 and π0.5 are constructed small, and PaliGemma's tokenizer is one of characters."""
    text, real = write_character_tokenizer(tmp_path / "text", VOCABULARY), AutoTokenizer.from_pretrained

    def local(name, *args, **kwargs):
        return real(text if str(name).startswith("google/paligemma") else name, *args, **kwargs)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", local)
    with small_sizes("pi0"), small_sizes("pi05"):
        yield


@pytest.mark.parametrize("kind", ["pi0", "pi05"])
def test_a_converted_openpi_policy_acts_as_the_published_one(kind, small_pi, tmp_path):
    """openpi samples what its trunk gets, which is wider than what the vision tower gives."""
    inputs = {f"observation.images.{i}": PolicyFeature(FeatureType.VISUAL, (3, 112, 112)) for i in range(2)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (4,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (4,))}
    torch.manual_seed(0)
    dense = get_family(kind).small(inputs, outputs, tmp_path, num_inference_steps=2).eval()
    trunk = dense.model.paligemma_with_expert
    assert trunk.paligemma.config.vision_config.hidden_size < trunk.paligemma.config.text_config.hidden_size
    sampler = sampler_for(trunk.paligemma.config.text_config.hidden_size)
    folder, output = tmp_path / "converted", tmp_path / "imported"
    statistics = {"mean": [0.5] * 4, "std": [2.0] * 4, "q01": [-1.0] * 4, "q99": [2.0] * 4}
    statistics = {name: {k: torch.tensor(v) for k, v in statistics.items()} for name in ("observation.state", "action")}
    for part in (dense, *make_processors(dense.config, statistics)):
        part.save_pretrained(folder)
    # The names that openpi has in PyTorch.
    tensors = {n.removeprefix("model."): v for n, v in load_file(folder / "model.safetensors").items()}
    write(folder, tensors | {f"active_token_sampler.{name}": value for name, value in sampler.items()})
    assert imports(folder, output, "--json", str(tmp_path / "said.json")) == 0
    said = json.loads((tmp_path / "said.json").read_text())
    assert said == {"policy_type": kind, "num_tokens": K, "convention": "openpi"}
    loaded = load(output, device="cpu")
    torch.manual_seed(2)
    raw = {name: torch.rand(2, 3, 112, 112) for name in dense.config.image_features}
    batch = loaded.preprocessor(raw | {"observation.state": torch.randn(2, 4), "task": ["push", "pick up the mug"]})
    published_chunk = published_act(dense, trunk, sampler, batch, align_corners=True, padding_mode="border")
    chunk = act(loaded.policy, batch)
    torch.testing.assert_close(chunk, published_chunk, atol=ROUNDING, rtol=0)
    assert (chunk - act(dense, batch)).abs().max() > 1e-3
    loaded.policy.use_runtime("fast")
    torch.testing.assert_close(act(loaded.policy, batch), chunk, atol=ROUNDING, rtol=0)
    # Otherwise it acted eagerly.
    (difference,) = loaded.policy.seam.runtime.differences.values()
    assert isinstance(difference, float)


def test_a_checkpoint_of_jax_is_refused_with_the_reason(tmp_path, capsys):
    """As openpi saves it: `params` in orbax's format. What its converter writes has no LeRobot configuration."""
    (tmp_path / "published/params").mkdir(parents=True)
    (tmp_path / "published/params/manifest.ocdbt").write_bytes(b"")
    require_refusal(tmp_path / "published", tmp_path, "holds no config.json .* openpi in JAX, which cannot", capsys)
    (tmp_path / "published/config.json").write_text(json.dumps({"action_horizon": 10, "grid": True}))
    require_refusal(tmp_path / "published", tmp_path, "names no type of policy.* no converter is included", capsys)


def broken(name, tensors):
    """Changes of the weights, each with a pattern of the line that refuses them."""
    head, last = f"{PREFIX}scout_mlp.0.weight", f"{PREFIX}scout_mlp.2.weight"
    geometry = f"{PREFIX}coord_encoder.0.bias"
    changes = {
        "no sampler": (lambda: [tensors.pop(key) for key in list(tensors) if PREFIX in key], "holds no GridS sampler"),
        "half a head": (lambda: tensors.pop(last), rf"lacks {last}"),
        "half a geometry": (lambda: tensors.pop(geometry), rf"lacks {geometry}"),
        "another key": (lambda: tensors.update({f"{PREFIX}norm.weight": torch.ones(3)}), "no published sampler has"),
        "odd": (lambda: tensors.update({last: torch.ones(9, HIDDEN)}), "of 9 rows, and K points have 2 K"),
        "K of another": (lambda: tensors.update({last: torch.ones(8, HIDDEN)}), "of 4 tokens, config.json says 5"),
        "flat": (lambda: tensors.update({last: torch.ones(10)}), r"of shape \(10,\)"),
        "narrow": (lambda: tensors.update({head: torch.ones(HIDDEN, 7)}), r"has shape \(24, 7\), expected \(24, 128\)"),
        "NaN": (lambda: tensors.update({head: torch.full((HIDDEN, 128), torch.nan)}), "holds NaN"),
        "a stranger": (lambda: tensors.update({"model.stranger": torch.ones(1)}), "unexpected 'model.stranger'"),
        "no statistics": (
            lambda: [tensors.pop(key) for key in list(tensors) if "buffer_action" in key],
            "nor statistics of 'action'",
        ),
        "infinite statistics": (
            lambda: tensors.update({"normalize_inputs.buffer_observation_state.mean": torch.full((4,), torch.inf)}),
            "no 'mean' of 'observation.state'",
        ),
    }
    change, line = changes[name]
    change()
    return line


@pytest.mark.parametrize(
    "name",
    [
        *("no sampler", "half a head", "half a geometry", "another key", "odd", "K of another", "flat", "narrow"),
        *("NaN", "a stranger", "no statistics", "infinite statistics"),
    ],
)
def test_weights_that_do_not_fit_are_one_line(published, tmp_path, name, capsys):
    tensors = load_file(published / "model.safetensors")
    line = broken(name, tensors)
    write(published, tensors)
    require_refusal(published, tmp_path, line, capsys)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"use_grid_token_sampler": False}, "use_grid_token_sampler=False, so it is a dense policy"),
        ({"rope_scaling": 2}, "options that this LeRobot's 'smolvla' does not know: rope_scaling"),
        ({"type": "diffusion"}, "'diffusion' is not supported: a spatial softmax"),
    ],
)
def test_a_configuration_that_does_not_fit_is_one_line(published, tmp_path, change, line, capsys):
    path = published / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    require_refusal(published, tmp_path, line, capsys)


def require_refusal(folder, tmp_path, line, capsys):
    assert imports(folder, tmp_path / "imported") == 1
    (said,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("lerobot-grids: error: ")]
    assert re.search(line, said), said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published"]


def test_the_command_line_says_what_it_needs(published, tmp_path, capsys):
    assert main(["import-reference", str(published)]) == 1
    assert "give --output FOLDER" in capsys.readouterr().err
    assert imports(tmp_path / "nothing", tmp_path / "imported") == 1
    assert "is not a folder" in capsys.readouterr().err
    (tmp_path / "there").mkdir()
    assert imports(published, tmp_path / "there") == 1
    assert "already exists" in capsys.readouterr().err
    assert imports(published, tmp_path / "imported", "--convention", "jax") == 1
    assert "convention 'jax' is unknown; choose one of lerobot, openpi" in capsys.readouterr().err
