"""What a policy's processors do around its two phases, as constants that need no LeRobot.

`describe` reads them off a policy and its processors, and `prepare` and `restore` are what a program does with them.
Both are held against LeRobot's own processors on one observation, so that constants which do not say all are refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs import FeatureType
from lerobot.processor import NormalizerProcessorStep, TokenizerProcessorStep, UnnormalizerProcessorStep
from lerobot.utils.constants import ACTION, OBS_STATE
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lerobot_policy_grids.errors import GridsError, UnsupportedPolicyError
from lerobot_policy_grids.families.base import image_size
from lerobot_policy_grids.runtime import Observation

Constants = dict[str, Any]
# How far prepared inputs and restored actions may be from LeRobot's, as a share of their largest value.
ROUNDING = 1e-5
# openpi's: a state in [-1, 1] is written into the instruction as numbers of bins.
STATE_BINS = 256
# Its place in a prompt.
STATE = "{state}"
BOUNDS = {"MIN_MAX": ("min", "max"), "QUANTILES": ("q01", "q99"), "QUANTILE10": ("q10", "q90")}


def describe(loaded: Any, observation: Observation, task: str, prompt: str) -> Constants:
    """The constants of a policy.

    Args:
        loaded: The policy, with its processors.
        observation: One that its processors made, at batch 1.
        task: Its instruction.
        prompt: What the processors made of it, for the tokenizer.

    Raises:
        GridsError: If the instruction is not found in the prompt.
    """
    policy = loaded.policy
    config = policy.base.config
    template = _template(prompt, task, observation.state)
    if "{task}" not in template:
        written = " ".join(prompt.split())
        raise GridsError(
            f"the policy's processors write --task '{task}' as '{written}', which does not show where an instruction "
            "goes; give plain words"
        )
    action = _step(loaded.postprocessor, UnnormalizerProcessorStep)
    tokens = observation.tokens[observation.token_mask].tolist()
    size = config.output_features[ACTION].shape[0]
    return {
        "cameras": _cameras(policy, observation.images),
        "image": {
            "height": observation.images.shape[-2],
            "width": observation.images.shape[-1],
            "black": -1.0,
            "white": 1.0,
            "padding": _padding(policy, observation.images),
        },
        "language": {
            "length": observation.tokens.shape[1],
            "prompt": template,
            "state_bins": STATE_BINS if STATE in template else None,
            "task": task,
            "tokens": tokens,
        },
        "state": {"size": observation.state.shape[-1], **state_normalisation(loaded.preprocessor)},
        "action": {
            "size": size,
            "width": config.max_action_dim,
            "chunk_size": config.chunk_size,
            "n_action_steps": config.n_action_steps,
            **_unnormalisation(action, size),
        },
    }


def state_normalisation(preprocessor: Any) -> dict[str, list[float]]:
    """How the robot's state is normalised: (value - subtract) / divide."""
    step = _step(preprocessor, NormalizerProcessorStep)
    mode, stats = _statistics(step, OBS_STATE, FeatureType.STATE)
    if mode == "MEAN_STD":
        return {"subtract": _numbers(stats["mean"]), "divide": _numbers(stats["std"] + step.eps)}
    if mode in BOUNDS:
        middle, half = _span(stats, mode, step.eps)
        return {"subtract": _numbers(middle), "divide": _numbers(half)}
    size = step.features[OBS_STATE].shape[0]
    return {"subtract": [0.0] * size, "divide": [1.0] * size}


def prepare(constants: Constants, frame: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The prefill's inputs, for the instruction that the constants hold.

    Args:
        constants: Of the policy.
        frame: Images [3, height, width] in [0, 1] and state [s], in LeRobot's names.
    """
    language, scale = constants["language"], constants["state"]
    tokens = np.zeros((1, language["length"]), np.int64)
    tokens[0, : len(language["tokens"])] = language["tokens"]
    images = [_letterbox(frame[camera["name"]], camera, constants["image"]) for camera in constants["cameras"]]
    normalised = (frame[OBS_STATE].double().numpy() - np.array(scale["subtract"])) / np.array(scale["divide"])
    return {
        "images": torch.cat(images).numpy(),
        "image_mask": np.ones((1, len(images)), bool),
        "tokens": tokens,
        "token_mask": np.arange(language["length"])[None] < len(language["tokens"]),
        "state": normalised.astype(np.float32)[None],
    }


def restore(constants: Constants, chunk: np.ndarray) -> np.ndarray:
    """The robot's actions [t, size] of an action chunk [1, t, width]."""
    action = constants["action"]
    actions: np.ndarray = chunk[0, :, : action["size"]] * np.array(action["multiply"]) + np.array(action["add"])
    return actions


def require_alike(what: str, found: np.ndarray, expected: np.ndarray) -> None:
    """Refuse constants that do not give what LeRobot's processors give.

    Raises:
        UnsupportedPolicyError: If they do not.
    """
    if found.shape == expected.shape:
        largest = max(1.0, float(np.abs(expected).max(initial=0)))
        apart = float(np.abs(found.astype(np.float64) - expected).max(initial=0)) / largest
        if apart <= ROUNDING:
            return
        seen = f"differ by {apart:.1e} of the largest"
    else:
        seen = f"have the shape {found.shape}, not {expected.shape}"
    raise UnsupportedPolicyError(
        f"this checkpoint's processors do more than normalise, resize and tokenize: {what} that the exported constants "
        f"give {seen}; run it with LeRobot, runtime=fast"
    )


def prompt_of(preprocessor: Any, frame: dict[str, Any]) -> str:
    """What the processors make of a frame's instruction, for the tokenizer."""
    tokenizer = _step(preprocessor, TokenizerProcessorStep)
    number = next(i for i, step in enumerate(preprocessor.steps) if step is tokenizer)
    *_, transition = (seen for seen, _ in zip(preprocessor.step_through(dict(frame)), range(number + 1), strict=False))
    written = transition["complementary_data"][tokenizer.task_key]
    return str(written if isinstance(written, str) else written[0])


def longest_prompt(preprocessor: Any) -> int:
    """Tokens of the longest instruction that the policy reads."""
    length: int = _step(preprocessor, TokenizerProcessorStep).max_length
    return length


def save_tokenizer(preprocessor: Any, folder: Path) -> None:
    """Write the tokenizer's files, in a form that neither pads nor cuts."""
    tokenizer = _step(preprocessor, TokenizerProcessorStep).input_tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        backend.no_padding()
        backend.no_truncation()
    tokenizer.save_pretrained(folder)


def _step(pipeline: Any, kind: type) -> Any:
    step = next((step for step in pipeline.steps if isinstance(step, kind)), None)
    if step is None:
        raise GridsError(
            f"the checkpoint's processors have no {kind.__name__}, which every supported policy has; copy the "
            "checkpoint again"
        )
    return step


def _cameras(policy: Any, images: Tensor) -> list[Constants]:
    """The cameras in the order of their images, with their places in the vision tower's input, in pixels."""
    height, width = images.shape[-2:]
    layout, features = policy.seam.layout, policy.config.image_features
    cameras = []
    for name, (left, top, right, bottom) in zip(layout.cameras, layout.regions, strict=True):
        own_height, own_width = image_size(features[name].shape)
        cameras.append(
            {
                "name": name,
                "height": own_height,
                "width": own_width,
                "left": round(left * width),
                "top": round(top * height),
                "resized_height": round((bottom - top) * height),
                "resized_width": round((right - left) * width),
            }
        )
    return cameras


def _padding(policy: Any, images: Tensor) -> float:
    """The value around an image that does not fill its square; of images that all do, black."""
    for image, camera in zip(images, _cameras(policy, images), strict=True):
        around = torch.ones_like(image, dtype=torch.bool)
        rows = slice(camera["top"], camera["top"] + camera["resized_height"])
        columns = slice(camera["left"], camera["left"] + camera["resized_width"])
        around[:, rows, columns] = False
        if around.any():
            return float(image[around][0])
    return -1.0


def _letterbox(frame: Tensor, camera: Constants, image: Constants) -> Tensor:
    """An image as the vision tower wants it, [1, 3, height, width]."""
    size = camera["resized_height"], camera["resized_width"]
    resized = F.interpolate(frame[None], size, mode="bilinear", align_corners=False).clamp(0, 1)
    right = image["width"] - camera["left"] - size[1]
    below = image["height"] - camera["top"] - size[0]
    scaled = image["black"] + (image["white"] - image["black"]) * resized
    return F.pad(scaled, (camera["left"], right, camera["top"], below), value=image["padding"])


def _template(prompt: str, task: str, state: Tensor) -> str:
    """A prompt, with {task} and {state} in the places of both."""
    bins = np.digitize(state[0].cpu().numpy(), np.linspace(-1, 1, STATE_BINS + 1)[:-1]) - 1
    words = " ".join(map(str, bins))
    return prompt.replace(task.strip(), "{task}").replace(words, STATE)


def _unnormalisation(step: Any, size: int) -> dict[str, list[float]]:
    """How actions are brought to the robot's units: value = normalised * multiply + add."""
    mode, stats = _statistics(step, ACTION, FeatureType.ACTION)
    if mode == "MEAN_STD":
        return {"multiply": _numbers(stats["std"]), "add": _numbers(stats["mean"])}
    if mode in BOUNDS:
        middle, half = _span(stats, mode, step.eps)
        return {"multiply": _numbers(half), "add": _numbers(middle)}
    return {"multiply": [1.0] * size, "add": [0.0] * size}


def _statistics(step: Any, name: str, kind: FeatureType) -> tuple[str, dict[str, np.ndarray]]:
    """(Mode of a feature's normalisation, its statistics float64)."""
    stats = (step.stats or {}).get(name)
    mode = getattr(step.norm_map.get(kind), "value", "IDENTITY")
    if stats is None:
        return "IDENTITY", {}
    return mode, {key: np.asarray(value, np.float64).reshape(-1) for key, value in stats.items()}


def _span(stats: dict[str, np.ndarray], mode: str, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(Middle, half of the width) of what becomes -1 .. 1."""
    low, high = (stats[name] for name in BOUNDS[mode])
    width = np.where(high == low, eps, high - low)
    return low + width / 2, width / 2


def _numbers(values: np.ndarray) -> list[float]:
    return [float(value) for value in values]
