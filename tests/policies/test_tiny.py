"""tiny_smolvla ships what it needs, and that is what its script builds."""

import json

import pytest

from lerobot_policy_grids.tiny import VLM_FOLDER, TinySmolVLAConfig, TinyTokenizerStep
from lerobot_policy_grids.tiny.build_vlm import build


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
