"""Kinds of perturbations in LIBERO, in the scene of the task at hand. LIBERO-Plus has many more; see docs/libero.md.

Three of them are what critics of token pruning ask for: the named object half hidden, the named object in another
colour, and another field of view.
"""

from typing import Any

import mujoco
import numpy as np

from ..libero.shapes import collision_points
from . import Filter, Kind, Perturbation
from .shared import add_noise, change_light

OVERVIEW = "agentview_image"
PANEL_COLOUR = 96


def zoom(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Field of view: the overview camera sees a wider or a narrower one, by up to a quarter."""
    camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, OVERVIEW.removesuffix("_image"))
    env.model.cam_fovy[camera] *= 1.25 ** (perturbation.strength * random.choice([-1, 1]))


def hide_object(env: Any, perturbation: Perturbation, random: np.random.Generator) -> Filter:
    """Occlusion: a grey panel before the overview camera hides a part of the named object where the episode starts.

    At full strength it hides three quarters of the object's width or height, from a side that the seed chooses. The
    panel stays where it is, and it also hides the arm behind it. The camera at the hand sees the object.
    """
    left, top, right, bottom = box_of(env, named_object(env), OVERVIEW)
    share = 0.75 * perturbation.strength
    width, height = share * (right - left), share * (bottom - top)
    panel = [
        (left, top, left + width, bottom),
        (right - width, top, right, bottom),
        (left, top, right, top + height),
        (left, bottom - height, right, bottom),
    ][random.integers(4)]

    def change(image: np.ndarray, camera: str, of_the_step: np.random.Generator) -> np.ndarray:
        if camera != OVERVIEW:
            return image
        # LeRobot turns the image later, and `panel` is in the turned image.
        image = image[::-1, ::-1].copy()
        size = image.shape[1], image.shape[0]
        x0, y0, x1, y1 = (round(edge * size[axis % 2]) for axis, edge in enumerate(panel))
        image[max(y0, 0) : max(y1, 0), max(x0, 0) : max(x1, 0)] = PANEL_COLOUR
        return np.ascontiguousarray(image[::-1, ::-1])

    return change


def recolour_object(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Novel object: turn the hues of the named object, by up to 120 degrees. Its shape stays."""
    angle = perturbation.strength * np.radians(120) * random.choice([-1, 1])
    for texture in textures_of(env.model, env.body_of(named_object(env))):
        first = int(env.model.tex_adr[texture])
        count = int(env.model.tex_height[texture] * env.model.tex_width[texture])
        pixels = env.model.tex_data[first : first + count * 3].reshape(count, 3)
        pixels[:] = (pixels @ hue_turn(angle).T).round().clip(0, 255).astype(np.uint8)
        env.upload_texture(texture)


def hue_turn(angle: float) -> np.ndarray:
    """Rotation of RGB values around the greys, [3, 3]."""
    matrix = np.empty(9)
    quaternion = np.r_[np.cos(angle / 2), np.full(3, np.sin(angle / 2) / np.sqrt(3))]
    mujoco.mju_quat2Mat(matrix, quaternion)
    return matrix.reshape(3, 3)


def named_object(env: Any) -> str:
    """The object that the instruction says to pick up."""
    name: str = env.simulation.parsed_problem["goal_state"][0][1]
    return name


def box_of(env: Any, name: str, camera: str) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of an object in a camera's image as LeRobot gives it, from 0 to 1."""
    corners = collision_points(env.model, env.simulation.sim.data._data, env.body_of(name))
    seen = np.stack([env.image_place(camera, corner) for corner in corners])
    return (*map(float, seen.min(0)), *map(float, seen.max(0)))  # type: ignore[return-value]


def textures_of(model: Any, body: int) -> list[int]:
    """Numbers of the RGB textures of a body and of what it carries."""
    textures: set[int] = set()
    for geom in range(model.ngeom):
        if model.body_rootid[model.geom_bodyid[geom]] == model.body_rootid[body] and model.geom_matid[geom] >= 0:
            textures.update(int(number) for number in model.mat_texid[model.geom_matid[geom]] if number >= 0)
    return sorted(number for number in textures if model.tex_nchannel[number] == 3)


KINDS: dict[str, Kind] = {
    "light": change_light,
    "noise": add_noise,
    "view": zoom,
    "occlusion": hide_object,
    "novel": recolour_object,
}
