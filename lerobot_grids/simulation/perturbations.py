"""Perturbed MetaWorld episodes, after LIBERO-Plus (arXiv 2510.13626): seven kinds, three severities.

The perturbation of an episode depends only on (kind, severity, episode seed). Every policy gets the same episodes, so
results can be paired. The seed chooses the direction and the severity chooses the distance, so a higher severity is a
larger change in the same direction.

To add a kind, write one function (environment, perturbation, random) -> None, add one line to `KINDS`, and its name to
`choices.PERTURBATIONS`.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from PIL import Image, ImageFilter

from lerobot_policy_grids.errors import SimulationError

from ..choices import SEVERITIES, parts, perturbation_fault
from .camera import CAMERA_TARGET, look_at
from .paraphrases import paraphrase


@dataclass(frozen=True)
class Perturbation:
    """One kind at one severity."""

    kind: str
    severity: int

    @property
    def strength(self) -> float:
        """Severity as a share of the largest one, in (0, 1]."""
        return self.severity / max(SEVERITIES)

    def random(self, *seeds: int) -> np.random.Generator:
        """Random numbers for this kind in one episode; they are the same for every severity."""
        return np.random.default_rng([*seeds, zlib.crc32(self.kind.encode())])

    def __str__(self) -> str:
        return f"{self.kind}:{self.severity}"


def parse_perturbations(text: str) -> list[Perturbation]:
    """Perturbations in a list such as "camera:2,light:1"; an empty text gives none.

    Raises:
        SimulationError: If a kind or a severity is unknown, or a kind is given twice.
    """
    fault = perturbation_fault(text)
    if fault is not None:
        raise SimulationError(fault)
    return [Perturbation(kind, int(severity)) for kind, severity in (part.split(":") for part in parts(text))]


class Perturber:
    """Applies the perturbations of each episode to one `MetaworldEnv`.

    Args:
        env: The environment; its simulator must exist and be unperturbed.
        perturbations: Perturbations, at most one of each kind.
    """

    def __init__(self, env: Any, perturbations: list[Perturbation]) -> None:
        self.perturbations = perturbations
        self._nominal = Nominal(env)
        self._seed: int | None = None

    def begin(self, env: Any, seed: int | None) -> None:
        """Perturb the episode that the next reset starts. Without a seed the previous perturbation stays."""
        seed = (self._seed or 0) if seed is None else seed
        if seed == self._seed:
            return
        self._seed = seed
        self._nominal.restore(env)
        for perturbation in self.perturbations:
            KINDS[perturbation.kind](env, perturbation, perturbation.random(seed))

    def see(self, image: np.ndarray, step: int) -> np.ndarray:
        """Apply blur and noise, if perturbed, to the image uint8 [h, w, 3] of one step."""
        for perturbation in self.perturbations:
            if perturbation.kind == "noise":
                image = blur_and_noise(image, perturbation.strength, perturbation.random(self._seed or 0, step))
        return image


class Nominal:
    """The unperturbed scene of the training data; it is restored before each perturbation."""

    ARRAYS = ("cam_pos", "cam_quat", "cam_fovy", "light_diffuse", "light_dir", "tex_data")
    HEADLIGHT = ("ambient", "diffuse")

    def __init__(self, env: Any) -> None:
        model, headlight = env._env.model, env._env.model.vis.headlight
        self._arrays = {name: getattr(model, name).copy() for name in self.ARRAYS}
        self._headlight = {name: getattr(headlight, name).copy() for name in self.HEADLIGHT}
        self._hand = np.array(env._env.hand_init_pos)
        self._spaces = env._env._random_reset_space, env._env.goal_space
        self._instruction = env.task_description

    def restore(self, env: Any) -> None:
        """Undo all perturbations."""
        model = env._env.model
        for name, value in self._arrays.items():
            getattr(model, name)[:] = value
        for name, value in self._headlight.items():
            getattr(model.vis.headlight, name)[:] = value
        env._env.hand_init_pos = self._hand.copy()
        set_spaces(env._env, *self._spaces)
        env.task_description = self._instruction


def move_camera(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Viewpoint: change the camera's position around the table, its distance, its aim and its field of view.

    At full strength: 15 degrees of azimuth, up to 8 degrees of elevation, 15 % of the distance, 3 cm of the aim and 8 %
    of the field of view.
    """
    model, strength = env._env.model, perturbation.strength
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, env.camera_name)
    offset = model.cam_pos[camera] - CAMERA_TARGET
    distance, azimuth = np.linalg.norm(offset), np.arctan2(offset[1], offset[0])
    elevation = np.arcsin(offset[2] / distance)
    azimuth += strength * np.radians(15) * random.choice([-1, 1])
    elevation += strength * np.radians(8) * random.uniform(-1, 1)
    distance *= 1.15 ** (strength * random.uniform(-1, 1))
    level = distance * np.cos(elevation)
    direction = [level * np.cos(azimuth), level * np.sin(azimuth), distance * np.sin(elevation)]
    aside = strength * random.uniform(-0.03, 0.03, 3)
    model.cam_pos[camera] = np.add(CAMERA_TARGET, direction)
    model.cam_quat[camera] = look_at(model.cam_pos[camera], CAMERA_TARGET + aside)
    model.cam_fovy[camera] *= 1.08 ** (strength * random.uniform(-1, 1))


def change_light(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Lighting: make all lights dimmer (down to a third), and change their colour and direction.

    Lights never get brighter: table and floor already have the renderer's maximum and would not change.
    """
    model, strength = env._env.model, perturbation.strength
    gains = random.uniform(0.2, 1, 3)
    gains = (gains / gains.max() * random.uniform(0.35, 0.6)) ** strength
    for part in (model.light_diffuse, model.vis.headlight.ambient, model.vis.headlight.diffuse):
        part[:] *= gains
    angle = strength * np.radians(random.uniform(60, 120)) * random.choice([-1, 1])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    model.light_dir[:] = model.light_dir @ turn.T


def repaint_background(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Background: mix the textures of table, floor and walls with stripes or checks of two random colours."""
    model, strength = env._env.model, perturbation.strength
    for texture in background_textures(model):
        height, width = int(model.tex_height[texture]), int(model.tex_width[texture])
        start = int(model.tex_adr[texture])
        pixels = model.tex_data[start : start + height * width * 3].reshape(height, width, 3)
        colours = random.integers(0, 256, (2, 3))
        cells = int(random.integers(4, 9))
        rows, columns = np.arange(height) * cells // height, np.arange(width) * cells // width
        checks = (rows[:, None] * random.integers(0, 2) + columns[None]) % 2
        pixels[:] = np.round((1 - strength) * pixels + strength * colours[checks]).astype(np.uint8)
        upload_texture(env, texture)


def background_textures(model: Any) -> list[int]:
    """Indices of the textures on floor, table and walls."""
    materials = set()
    for geom in range(model.ngeom):
        body = mujoco.mj_id2name(model, mujoco.mjtObj.mjOBJ_BODY, model.geom_bodyid[geom])
        if body in ("world", "tablelink", "RetainingWall") and model.geom_matid[geom] >= 0:
            materials.add(int(model.geom_matid[geom]))
    textures = {int(texture) for material in materials for texture in model.mat_texid[material] if texture >= 0}
    return sorted(texture for texture in textures if model.tex_nchannel[texture] == 3)


def upload_texture(env: Any, texture: int) -> None:
    """Send a changed texture to the renderer, which keeps a copy after its first image."""
    env.use_own_context()
    for viewer in env.viewers():
        mujoco.mjr_uploadTexture(env._env.model, viewer.con, texture)


def start_elsewhere(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Robot: shift the start of the hand sideways and a little up. MetaWorld's reset moves the hand there."""
    angle = random.uniform(0, 2 * np.pi)
    distance = 0.12 * perturbation.strength
    shift = np.array([distance * np.cos(angle), distance * np.sin(angle), random.uniform(0, 0.5) * distance])
    start, low, high = env._env.hand_init_pos, env._env.mocap_low, env._env.mocap_high
    # Mirror the shift on each axis on which the hand would leave the arm's range.
    shift = np.where((start + shift < low) | (start + shift > high), -shift, shift)
    env._env.hand_init_pos = start + shift


def displace_objects(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Layout: draw object and goal from strips of 2 cm at the border of the box that training draws them from.

    The strips are on the left or the right of the robot. If a task has no sideways variation, they are in front or
    behind. They lie just inside the box at severity 1, just outside at 2, and 2 cm further out at 3.
    """
    space = env._env._random_reset_space
    if space is None:
        raise SimulationError(
            f"{env.task} has no random positions, so its layout cannot be perturbed; leave layout out"
        )
    low, high = space.low.copy(), space.high.copy()
    inner, outer = 0.02 * (perturbation.severity - 2), 0.02 * (perturbation.severity - 1)
    for place in range(0, len(low) - 2, 3):
        axis = place if high[place] - low[place] > 0.01 else place + 1
        if random.random() < 0.5:
            low[axis], high[axis] = high[axis] + inner, high[axis] + outer
        else:
            low[axis], high[axis] = low[axis] - outer, low[axis] - inner
    goals = env._env.goal_space
    margin = outer * np.array([1, 1, 0])
    set_spaces(
        env._env,
        gymnasium.spaces.Box(low, high, dtype=np.float64),
        gymnasium.spaces.Box(goals.low - margin, goals.high + margin, dtype=np.float64),
    )


def set_spaces(simulator: Any, reset_space: Any, goal_space: Any) -> None:
    """Set the space that MetaWorld draws positions from, and the space to which it clips the experts' goal."""
    simulator._random_reset_space, simulator.goal_space = reset_space, goal_space
    vars(simulator).pop("sawyer_observation_space", None)


def say_otherwise(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Instruction: replace it by a paraphrase."""
    env.task_description = paraphrase(env.task_description, perturbation.severity, random)


def leave_scene(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Noise: leave the scene unchanged, because `Perturber.see` changes each image."""


def blur_and_noise(image: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Add blur (up to 1.5 % of the width) and Gaussian noise (up to 20 % of the range) to an image uint8 [h, w, 3]."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.015 * image.shape[1] * strength))
    noise = random.normal(0, 0.2 * 255 * strength, image.shape)
    return np.clip(np.round(np.asarray(blurred) + noise), 0, 255).astype(np.uint8)


KINDS: dict[str, Callable[[Any, Perturbation, np.random.Generator], None]] = {
    "camera": move_camera,
    "light": change_light,
    "background": repaint_background,
    "noise": leave_scene,
    "robot": start_elsewhere,
    "layout": displace_objects,
    "instruction": say_otherwise,
}
