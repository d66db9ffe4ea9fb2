"""Exported graphs act as the policy does, also without torch and LeRobot; what could not act so is not written."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot.configs import FeatureType, NormalizationMode
from lerobot.processor import NormalizerProcessorStep

from driving import train_offsets, wrap
from lerobot_grids import choices
from lerobot_grids.exporting import export, formats
from lerobot_grids.policies.loaded import LoadedPolicy
from lerobot_grids_cli.main import main
from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families.phases import smolvla
from lerobot_policy_grids.processor_grids import make_processors
from lerobot_policy_grids.runtime import buckets, flow
from trials import small_world

DOCUMENT = Path(__file__).parents[2] / "docs" / "export.md"
# Neither is the square that the vision tower sees, and one is larger.
SHAPES = [(40, 64), (150, 120)]
TASK, OTHER_TASK = "push", "pick up the mug"
# Share of the range of the actions; 1e-6 was measured.
ROUNDING = 2e-5
NUMBERS = {
    "mean": [0.5, -3.0, 10.0, 0.0],
    "std": [0.1, 2.0, 5.0, 1.0],
    "min": [0.0, -9.0, -5.0, -3.0],
    "max": [1.0, 9.0, 25.0, 3.0],
    "q01": [0.2, -8.0, -4.0, -2.0],
    "q99": [0.8, 8.0, 20.0, 2.5],
}


def load(row, folder, k=3, **options):
    """A small policy with two cameras, and its processors; dense where k is None."""
    base = row.policy(shapes=SHAPES, **options)
    values = {name: torch.tensor(numbers) for name, numbers in NUMBERS.items()}
    with small_world(folder):
        processors = make_processors(base.config, {"observation.state": values, "action": values})
    return LoadedPolicy(base if k is None else train_offsets(wrap(base, k)), *processors)


def needs(name):
    """Skips where a format cannot be written or run."""
    missing = [module for module in choices.EXPORTS[name] if find_spec(module) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)}: extra '{name}' is not installed")


@pytest.fixture(scope="module", params=["tiny_smolvla", "pi0", "pi05"])
def onnx(request, family_row, tmp_path_factory):
    """(A policy of each family with phases, its ONNX export)."""
    folder = tmp_path_factory.mktemp("export")
    loaded = load(family_row(request.param), folder / "tokenizer")
    return loaded, export(loaded, folder / "graphs", "onnx", task=TASK, repeats=1)


@pytest.fixture
def tiny(family_row, tmp_path):
    return load(family_row("tiny_smolvla"), tmp_path / "tokenizer")


def observed(loaded):
    """(Frames uint8, state, noise, the robot's actions by LeRobot's own code), of another observation."""
    random = np.random.default_rng(5)
    names = loaded.policy.seam.layout.cameras
    frames = {name: random.integers(0, 256, (*size, 3), np.uint8) for name, size in zip(names, SHAPES, strict=True)}
    state = np.array([0.55, -1.0, 13.0, 0.7])
    config = loaded.policy.base.config
    noise = random.standard_normal((1, config.chunk_size, config.max_action_dim)).astype(np.float32)
    frame = {name: torch.from_numpy(image).permute(2, 0, 1) / 255 for name, image in frames.items()}
    batch = loaded.preprocessor(frame | {"observation.state": torch.from_numpy(state).float(), "task": OTHER_TASK})
    loaded.policy.reset()
    with torch.no_grad():
        chunk = loaded.policy.predict_action_chunk(batch, noise=torch.from_numpy(noise))
    return frames, state, noise, loaded.postprocessor(chunk)[0].numpy()


def run_document(folder, tmp_path, seen, state, noise):
    """The actions that the programs of docs/export.md give, one after the other for each of the frames in a list.

    Returns:
        (Action chunks, the modules that were imported).
    """
    blocks = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(), flags=re.M | re.S)
    program = re.sub(r'folder = ".*"', f"folder = {str(folder)!r}", "".join(blocks))
    for number, frames in enumerate(seen):
        np.savez(tmp_path / f"given{number}.npz", state=state, noise=noise, **frames)
    program += f"""
import sys
chunks = []
for number in range({len(seen)}):
    given = np.load(f"{tmp_path}/given{{number}}.npz")
    frames = {{camera["name"]: given[camera["name"]] for camera in about["cameras"]}}
    chunks.append(act(observe(frames, given["state"], {OTHER_TASK!r}), given["noise"]))
np.save({str(tmp_path / "actions.npy")!r}, chunks)
print(*sys.modules)
"""
    command = [sys.executable, "-c", program]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    return np.load(tmp_path / "actions.npy"), said.stdout.split()


def apart(found, expected):
    """Largest difference of actions, each as a share of its own range."""
    return float((np.abs(found - expected) / np.ptp(expected, axis=0)).max())


@needs("onnx")
def test_the_documents_runner_acts_as_the_policy_without_torch(onnx, tmp_path):
    loaded, exported = onnx
    assert exported.check.share < ROUNDING
    frames, state, noise, expected = observed(loaded)
    # What makes no difference would prove nothing.
    black = {name: image * 0 for name, image in frames.items()}
    (found, blind), modules = run_document(exported.folder, tmp_path, [frames, black], state, noise)
    assert found.shape == expected.shape
    assert apart(found, expected) < ROUNDING
    assert {"torch", "lerobot", "transformers", "lerobot_policy_grids"}.isdisjoint(modules)
    assert apart(blind, expected) > 50 * ROUNDING


@needs("onnx")
def test_what_is_fixed_is_said(onnx, capsys):
    from lerobot_grids.exporting import print_export

    loaded, exported = onnx
    about = json.loads((exported.folder / "export.json").read_text())
    assert about == exported.constants
    assert about["visual_tokens"] == [3, 3]
    config = loaded.policy.base.config
    assert about["graphs"]["prefill"]["inputs"]["tokens"]["shape"] == [1, about["language"]["length"]]
    assert about["language"]["length"] == buckets.bucket(about["language"]["length"])
    assert about["graphs"]["denoise_step"]["outputs"]["velocity"]["shape"] == [
        1,
        config.chunk_size,
        config.max_action_dim,
    ]
    names = set(about["graphs"]["prefill"]["outputs"])
    assert set(about["graphs"]["denoise_step"]["inputs"]) == {"x_t", "step", *names}
    print_export(exported)
    said = capsys.readouterr().out
    for part in ("3 + 3 visual tokens", f"{about['language']['length']} instruction tokens", "batch 1", "150 x 120"):
        assert part in said


@needs("openvino")
def test_openvino_acts_as_a_dense_policy(family_row, tmp_path):
    loaded = load(family_row("tiny_smolvla"), tmp_path / "tokenizer", k=None)
    exported = export(loaded, tmp_path / "graphs", "openvino", task=TASK, repeats=1)
    assert exported.check.share < ROUNDING
    assert exported.constants["visual_tokens"] == [144, 144]


def test_the_command_exports_the_shipped_policy(tmp_path, capsys):
    folder, file = tmp_path / "graphs", tmp_path / "about.json"
    command = ["export", "--policy", "tiny_metaworld", f"--output={folder}", "--format=torch"]
    assert main([*command, "--language_bucket=16", "--repeats=1", f"--json={file}"]) == 0
    said = capsys.readouterr().out
    assert "144 visual tokens, 16 instruction tokens" in said
    about = json.loads(file.read_text())
    assert f"largest difference from the eager policy {about['check']['difference']:.1e}" in said
    assert about["check"]["share"] < ROUNDING
    assert {path.name for path in folder.iterdir()} == {"prefill.pt2", "denoise_step.pt2", "export.json", "tokenizer"}
    assert main(command) == 1
    assert "already exists; choose another folder or remove it" in capsys.readouterr().err


class Untraced(formats.Torch):
    """Runs phases as they are, in no time."""

    def write(self, graph, file):
        pass

    def open(self, graph, file, threads):
        def run(inputs):
            results = graph.program(*(torch.from_numpy(inputs[name]) for name in graph.inputs))
            results = results if isinstance(results, tuple) else (results,)
            return {name: value.numpy() for name, value in zip(graph.outputs, results, strict=True)}

        return run


@pytest.mark.parametrize("wrong", [False, True])
def test_graphs_that_act_otherwise_are_not_written(wrong, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "export", lambda module, inputs, strict: module)
    monkeypatch.setitem(formats.FORMATS, "torch", Untraced())
    if not wrong:
        assert export(tiny, tmp_path / "graphs", "torch", task=TASK).check.share < ROUNDING
        return
    for place in (flow, smolvla):
        monkeypatch.setattr(place, "step_times", lambda steps, device: torch.linspace(0, 1, steps))
    with pytest.raises(GridsError, match=r"differ from the policy by .* more than 1e-04, so nothing was written"):
        export(tiny, tmp_path / "out" / "graphs", "torch", task=TASK)
    assert list((tmp_path / "out").iterdir()) == []


def normalise_images(loaded):
    step = next(step for step in loaded.preprocessor.steps if isinstance(step, NormalizerProcessorStep))
    step.norm_map = step.norm_map | {FeatureType.VISUAL: NormalizationMode.MEAN_STD}
    name = loaded.policy.seam.layout.cameras[0]
    step._tensor_stats[name] = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}


def shift_state(loaded):
    loaded.preprocessor.steps.append(lambda transition: transition)
    step = next(step for step in loaded.preprocessor.steps if isinstance(step, NormalizerProcessorStep))
    step._tensor_stats["observation.state"]["mean"] += 1


@pytest.mark.parametrize(("change", "what"), [(normalise_images, "images"), (shift_state, "state")])
def test_processors_that_do_more_are_refused(change, what, tiny, tmp_path):
    change(tiny)
    with pytest.raises(UnsupportedPolicyError, match=f"processors do more than normalise.*: {what} that"):
        export(tiny, tmp_path / "out" / "graphs", "torch", task=TASK)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_instruction_that_does_not_fit_is_refused(tiny, tmp_path):
    with pytest.raises(GridsError, match=r"'push push.*--language_bucket 3 holds fewer; give at least 16"):
        export(tiny, tmp_path / "graphs", "torch", task="push push push push", language_bucket=3)


def test_an_instruction_that_is_written_otherwise_is_refused(family_row, tmp_path):
    loaded = load(family_row("pi05"), tmp_path / "tokenizer")
    with pytest.raises(GridsError, match=r"write --task 'pick_up' as 'Task: pick up, State: .*give plain words"):
        export(loaded, tmp_path / "graphs", "torch", task="pick_up")


@pytest.mark.parametrize("name", ["pi0_fast", "act", "xvla", "evo1", "groot"])
def test_families_without_phases_say_so(name, family_row, tmp_path):
    loaded = LoadedPolicy(family_row(name).policy(), None, None)
    with pytest.raises(UnsupportedPolicyError, match=f"nothing to export for the '{name}' policy.*docs/export.md"):
        export(loaded, tmp_path / "graphs", "torch", task=TASK)


def test_a_runtime_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setitem(choices.EXPORTS, "onnx", ("numpy", "no_such_runtime"))
    assert main(["export", "no_such_policy"]) == 1
    expected = "lerobot-grids: error: --format onnx needs no_such_runtime: pip install 'lerobot_policy_grids[onnx]'\n"
    assert capsys.readouterr().err == expected
