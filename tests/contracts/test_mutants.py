"""The contract suite fails for a family that is wrong: each mutant is a family with one inserted error."""

import importlib.util
from pathlib import Path

import pytest
import torch

import mutants
from lerobot_policy_grids.families import qwen


def _load(name):
    spec = importlib.util.spec_from_file_location(f"{name}_suite", Path(__file__).with_name(f"test_{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


suite, positions = _load("identity"), _load("positions")

# Mutant -> tests that must fail with it, and their parameters.
EXACT = (suite.test_identity_at_all_tokens_is_exact_for_one_camera, {"dtype": torch.float32})
SEVERAL = (suite.test_identity_at_all_tokens_up_to_rounding_for_several_cameras, {"cameras": 2})
SHORTER = (suite.test_prefix_is_shorter_and_masks_and_positions_follow, {"cameras": 2, "k": 4})
MUST_FAIL = {"wrong_mask": (EXACT, SHORTER), "dropped_camera": (SEVERAL, SHORTER), "transposed_grid": (EXACT,)}


@pytest.mark.parametrize("family", ["xvla", "act"], indirect=True)
def test_suite_fails_without_masks_with_a_dropped_camera(family, monkeypatch):
    mutants.install("dropped_camera", monkeypatch)
    test, parameters = SEVERAL
    with pytest.raises(AssertionError):
        test(family=family, **parameters)


@pytest.mark.parametrize("concatenating_family", ["tiny_smolvla", "pi0", "pi05", "pi0_fast"], indirect=True)
@pytest.mark.parametrize("mutant", MUST_FAIL)
def test_suite_fails_with(mutant, concatenating_family, monkeypatch):
    mutants.install(mutant, monkeypatch)
    for test, parameters in MUST_FAIL[mutant]:
        family = "concatenating_family" if test is SHORTER[0] else "family"
        # Numbering a prefix that lacks a camera fails before anything is compared.
        error = RuntimeError if mutant == "dropped_camera" and test is SEVERAL[0] else AssertionError
        with pytest.raises(error):
            test(**{family: concatenating_family}, **parameters)


DENSE = (positions.test_at_all_tokens_they_are_the_dense_ones, {})
MUST_FAIL_ANYWHERE = {
    "swapped_cameras": (SEVERAL,),
    "shifted_tokens": (EXACT,),
    "blank_camera": (EXACT,),
    "transposed_grid": (EXACT,),
    "wrong_positions": (DENSE,),
}


@pytest.mark.parametrize("mutant", MUST_FAIL_ANYWHERE)
def test_suite_fails_where_tokens_are_scattered_with(mutant, scattering_family, monkeypatch):
    if mutant == "swapped_cameras" and not scattering_family.tells_cameras_apart:
        pytest.skip("to this family an image is a set of tokens and places, whichever camera sent it")
    mutants.install(mutant, monkeypatch)
    for test, parameters in MUST_FAIL_ANYWHERE[mutant]:
        with pytest.raises(AssertionError):
            test(scattering_family, **parameters)


@pytest.mark.parametrize("scattering_family", ["vla_jepa"], indirect=True)
def test_suite_fails_where_the_trunk_adds_the_first_rows(scattering_family, monkeypatch):
    monkeypatch.setattr(qwen, "_read", mutants.first_rows)
    with pytest.raises(AssertionError):
        positions.test_what_the_trunk_adds_later_is_read_where_the_tokens_are(scattering_family)
