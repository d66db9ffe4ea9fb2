"""Kinds of perturbations in this package's MetaWorld."""

from typing import Any

import gymnasium
import mujoco
import numpy as np

from lerobot_policy_grids.errors import SimulationError

from ..camera import CAMERA_TARGET, look_at
from ..paraphrases import paraphrase
from . import Kind, Perturbation
from .saved import SavedScene
from .shared import add_noise, change_light


class SavedMetaworld(SavedScene):
    """The scene, and what the simulator draws positions from."""

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._hand = np.array(env._env.hand_init_pos)
        self._spaces = env._env._random_reset_space, env._env.goal_space
        self._instruction = env.task_description

    def restore(self, env: Any) -> None:
        super().restore(env)
        env._env.hand_init_pos = self._hand.copy()
        set_spaces(env._env, *self._spaces)
        env.task_description = self._instruction


def move_camera(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Viewpoint: change the camera's position around the table, its distance, its aim and its field of view.

    At full strength: 15 degrees of azimuth, up to 8 degrees of elevation, 15 % of the distance, 3 cm of the aim and 8 %
    of the field of view.
    """
    model, strength = env.model, perturbation.strength
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


def repaint_background(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Background: mix the textures of table, floor and walls with stripes or checks of two random colours."""
    model, strength = env.model, perturbation.strength
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
        mujoco.mjr_uploadTexture(env.model, viewer.con, texture)


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


KINDS: dict[str, Kind] = {
    "camera": move_camera,
    "light": change_light,
    "background": repaint_background,
    "noise": add_noise,
    "robot": start_elsewhere,
    "layout": displace_objects,
    "instruction": say_otherwise,
}
