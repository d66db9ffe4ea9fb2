"""tiny_smolvla ships what it needs, and that is what its script builds."""

import json

import pytest
import torch

from lerobot_policy_grids.tiny import VLM_FOLDER, TinySmolVLAConfig, TinyTokenizerStep
from lerobot_policy_grids.tiny.build_vlm import build
from lerobot_policy_grids.tiny.modeling_tiny_smolvla import TinySmolVLAPolicy


@pytest.fixture(scope="module")
def tokenizer():
    return TinyTokenizerStep().input_tokenizer


def test_shipped_files_are_what_the_script_builds(tmp_path):
    build(tmp_path)
    names = sorted(path.name for path in VLM_FOLDER.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        ours, built = (json.loads((folder / name).read_text()) for folder in (VLM_FOLDER, tmp_path))
        for content in (ours, built):
            content.pop("transformers_version", None)
        assert ours == built, name


@pytest.mark.parametrize(
    "text", ["push the puck to the goal\n", "Öffne die Tür, bitte!\n", "把杯子放下\n", "x\ty 123\n"]
)
def test_any_instruction_has_tokens_of_its_own(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).strip() == text.strip()


def test_common_words_are_single_tokens(tokenizer):
    assert len(tokenizer("push the puck to the goal\n")["input_ids"]) == 7


def test_the_saved_step_names_no_folder():
    assert str(VLM_FOLDER) not in json.dumps(TinyTokenizerStep().get_config())


def test_the_configuration_names_no_folder():
    assert "/" not in TinySmolVLAConfig(device="cpu").vlm_model_name.replace("lerobot_policy_grids/tiny", "")


@pytest.mark.parametrize(("patch", "known"), [(8, 29), (12, 37)])
@torch.no_grad()
def test_a_token_of_the_local_tower_knows_what_is_around_it(patch, known):
    side, reach = 12 * patch, known // 2
    config = TinySmolVLAConfig(
        vision_tower="local",
        patch_size=patch,
        resize_imgs_with_padding=(side, side),
        device="cpu",
        freeze_vision_encoder=True,
    )
    vision = TinySmolVLAPolicy(config).eval().model.vlm_with_expert.get_vlm_model().vision_model
    assert not any(weight.requires_grad for weight in vision.parameters())
    image = torch.rand(1, 3, side, side) * 2 - 1
    row, column = 5, 6
    token = vision(image).last_hidden_state[0, row * 12 + column]

    def seen_of(reach):
        """The token, of an image that is black beyond so many pixels from the patch's first ones."""
        other = torch.zeros_like(image)
        window = (..., *(slice(patch * place - reach, patch * place + reach + 1) for place in (row, column)))
        other[window] = image[window]
        return vision(other).last_hidden_state[0, row * 12 + column]

    assert torch.equal(seen_of(reach), token)
    assert not torch.equal(seen_of(reach - 1), token)
