"""LeRobot's LIBERO environment with dealt layouts and cheaper drawing.

Differences from `lerobot.envs.libero`, each an option whose default is LeRobot's own behaviour:
- `layout="dealt"` deals the objects anew; see `layouts`.
- `drawing="fast"` draws without multisampling and shadow map and with fewer triangles, see `meshes`, and resets the
  simulator without building the scene again.
- `perturb="occlusion:2"` perturbs each episode; see `perturbations`.
- `zoom=1.5` draws with the overview camera so many times larger: LIBERO-Object's objects fill a seventh of its image.
- `render_interval=n` draws the cameras at every n-th step only, for policies that execute n actions of a chunk.

Use it in LeRobot's own commands with `--env.discover_packages_path=lerobot_grids.simulation.libero
--env.type=grids_libero`.
"""

import os
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..rendering import choose_renderer
from .installed import import_libero

choose_renderer()
import_libero()

# ruff: noqa: E402  (mujoco reads MUJOCO_GL when it is imported, and LIBERO may ask for its configuration)
import mujoco
import numpy as np
from lerobot.envs import configs as lerobot_configs
from lerobot.envs import libero as lerobot_libero
from libero.libero.envs import OffScreenRenderEnv

from lerobot_policy_grids.errors import SimulationError

from ...choices import parts
from ..perturbations import Perturbation, Perturber, parse_perturbations
from ..perturbations.libero import KINDS
from ..perturbations.saved import SavedScene
from .layouts import Pose, deal, generator, require_layout
from .meshes import simplify

DRAWINGS = ("libero", "fast")
CHEAP = '<quality shadowsize="0" offsamples="0"/>'
OVERVIEW = "agentview"
# A dealt layout in which an object moves or falls while it settles is dealt again, so often.
DEALS = 20
# How far an object may move while it settles, in metres.
SETTLED = 0.02


def parse_tasks(tasks: str) -> dict[str, list[int]]:
    """{suite: numbers of its tasks} of comma-separated names: "libero_object" for all, "libero_object_3" for one.

    Raises:
        SimulationError: If a suite or a task does not exist.
    """
    suites = lerobot_libero.benchmark.get_benchmark_dict()
    chosen: dict[str, list[int]] = {}
    for name in parts(tasks) or [tasks]:
        suite, _, number = name.rpartition("_") if name not in suites else (name, "", "")
        count = len(load_suite(suite).tasks) if suite in suites else 0
        if not count or (number and not (number.isdigit() and int(number) < count)):
            raise SimulationError(
                f"LIBERO has no task '{name}'; give a suite ({', '.join(sorted(suites))}) or a task of one, such as "
                "libero_object_3"
            )
        chosen.setdefault(suite, []).extend([int(number)] if number else range(count))
    return {suite: sorted(set(numbers)) for suite, numbers in chosen.items()}


def load_suite(name: str) -> Any:
    """LIBERO's suite of a name. It prints a line, which is hidden."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        return lerobot_libero._get_suite(name)


def draw_cheaply(xml: str) -> str:
    """A MuJoCo model with neither shadow map nor multisampling."""
    xml = re.sub(r"<quality[^>]*/>", "", xml)
    if re.search(r"<visual\s*/>", xml):
        return re.sub(r"<visual\s*/>", f"<visual>{CHEAP}</visual>", xml, count=1)
    if "<visual>" in xml:
        return xml.replace("<visual>", "<visual>" + CHEAP, 1)
    return re.sub(r"(<mujoco[^>]*>)", rf"\1<visual>{CHEAP}</visual>", xml, count=1)


class LiberoEnv(lerobot_libero.LiberoEnv):
    """One LIBERO task.

    Args:
        layout: "official" or "dealt".
        drawing: "libero" or "fast".
        zoom: How many times larger the overview camera draws, in both directions.
        render_interval: Number of steps between two images; the last ones are repeated in between.
        perturbations: Changes to each episode. The episode's seed decides their direction.
    """

    # `render` returns the policy's first image, so films can draw the sampled points on it.
    renders_observation = True
    _env: Any

    def __init__(
        self,
        *args: Any,
        layout: str = "official",
        drawing: str = "libero",
        zoom: float = 1.0,
        render_interval: int = 1,
        perturbations: list[Perturbation] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.perturbations = perturbations or []
        self._perturber: Perturber | None = None
        self.suite = kwargs["task_suite_name"]
        self.layout, self.drawing, self.zoom, self.render_interval = layout, drawing, zoom, render_interval
        self._adapted: Any = None
        # Otherwise robosuite draws both cameras in every step, while objects settle too.
        self._draws = drawing == "fast" or render_interval > 1
        self._steps, self._settling = 0, False
        blank = np.zeros((self.observation_height, self.observation_width, 3), np.uint8)
        self._frames = dict.fromkeys(self.camera_name, blank)

    @property
    def simulation(self) -> Any:
        """Robosuite's environment, for experts; None before the first reset."""
        return None if self._env is None else self._env.env

    @property
    def model(self) -> Any:
        """MuJoCo's model; only after the first reset."""
        return self.simulation.sim.model._model

    def body_of(self, name: str) -> int:
        """Number of an object's body in MuJoCo's model."""
        return int(self.simulation.obj_body_id[name])

    def upload_texture(self, texture: int) -> None:
        """Send a changed texture to the renderer, which keeps a copy."""
        mujoco.mjr_uploadTexture(self.model, self._renderer(), texture)

    def _renderer(self) -> Any:
        """MuJoCo's rendering context, made current.

        Robosuite draws with the current context and frees in it what it made, whichever environment's it is.
        """
        context = self.simulation.sim._render_context_offscreen
        context.gl_ctx.make_current()
        return context.con

    def _ensure_env(self) -> None:
        if self._env is not None:
            return
        env = OffScreenRenderEnv(
            bddl_file_name=self._task_bddl_file,
            camera_heights=self.observation_height,
            camera_widths=self.observation_width,
            control_freq=self.control_freq,
            hard_reset=True,
        )
        if self.drawing == "fast":
            # It takes effect when the model is built the next time, which is this reset.
            env.env.set_xml_processor(draw_cheaply)
        env.reset()
        env.env.hard_reset = self.hard_reset and self.drawing == "libero"
        self._env = env
        for camera in self.camera_name if self._draws else ():
            self.simulation.modify_observable(camera, "enabled", False)

    def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._steps = 0
        self._ensure_env()
        self._renderer()
        if self.layout == "dealt" and seed is not None:
            # Otherwise the robot's and the furniture's state would depend on the number of earlier resets.
            self.init_state_id = seed
        state = self.init_state_id
        self._settling = True
        observation, info = super().reset(seed=seed, **kwargs)
        self._adapt_model()
        if self.layout == "dealt":
            self._deal(state, generator(seed, self.task_id))
        elif not self.simulation.hard_reset:
            self._begin(state, {})
        self._settling = False
        if self.perturbations:
            self._perturb(seed)
        if self.layout == "dealt" or self._draws or self.perturbations or self.zoom != 1:
            observation = self.observe()
        return observation, info

    def observe(self) -> dict[str, Any]:
        """What LeRobot's environment gives in the present state."""
        self._renderer()
        return self._format_raw_obs(self.simulation._get_observations(force_update=True))

    def _adapt_model(self) -> None:
        """Zoom and simplify meshes, once for each model that is built."""
        if self._adapted is self.model:
            return
        self._adapted, camera = self.model, self.model.camera(OVERVIEW).id
        half = np.radians(self.model.cam_fovy[camera]) / 2
        self.model.cam_fovy[camera] = 2 * np.degrees(np.arctan(np.tan(half) / self.zoom))
        if self.drawing == "fast":
            simplify(self.model, self._renderer())

    def _perturb(self, seed: int | None) -> None:
        """Perturb the episode that begins, when its objects stand."""
        if self._perturber is None or self.simulation.hard_reset:
            # A hard reset builds the scene again.
            self._perturber = Perturber(SavedScene(self), KINDS, self.perturbations)
        self._perturber.begin(self, seed)

    def _deal(self, state: int, random: np.random.Generator) -> None:
        """Deal the objects until they stay where they are put."""
        official = self.poses()
        for _ in range(DEALS):
            dealt = deal(self.suite, official, self.base_position(), random)
            self._begin(state, dealt)
            moved = [np.abs(pose.position - dealt[name].position).max() for name, pose in self.poses().items()]
            if max(moved) < SETTLED:
                return
        raise SimulationError(f"no dealt layout of {self.task} settles with this seed; choose another seed")

    def _begin(self, state: int, poses: dict[str, Pose]) -> None:
        """Start an episode from an official state and these poses, whatever came before, and let objects settle."""
        self._env.set_init_state(self._init_states[state % len(self._init_states)])
        data = self.simulation.sim.data
        data.qacc_warmstart[:] = 0
        self.put(poses)
        for robot in self.simulation.robots:
            # Without building the scene again, the goals of the last episode would stay.
            robot.controller.update(force=True)
            robot.controller.reset_goal()
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        for _ in range(self.num_steps_wait):
            self._env.step(lerobot_libero.get_libero_dummy_action())

    def put(self, poses: dict[str, Pose]) -> None:
        """Put free objects somewhere, at rest."""
        data = self.simulation.sim.data
        for name, pose in poses.items():
            joint = self.simulation.objects_dict[name].joints[0]
            data.set_joint_qpos(joint, np.r_[pose.position, pose.quaternion])
            data.set_joint_qvel(joint, np.zeros(6))
        self.simulation.sim.forward()

    def poses(self) -> dict[str, Pose]:
        """Where the free objects are."""
        poses = {}
        for name, thing in self.simulation.objects_dict.items():
            values = self.simulation.sim.data.get_joint_qpos(thing.joints[0])
            poses[name] = Pose(values[:3].copy(), values[3:].copy())
        return poses

    def base_position(self) -> np.ndarray:
        """Where the robot stands, [3] in metres."""
        position: np.ndarray = self.simulation.sim.data.get_body_xpos("robot0_base")
        return position

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._steps += 1
        self._renderer()
        result: tuple[dict[str, Any], float, bool, bool, dict[str, Any]] = super().step(action)
        return result

    def close(self) -> None:
        if self._env is not None:
            self._renderer()
        super().close()

    def _format_raw_obs(self, raw_obs: dict[str, Any]) -> dict[str, Any]:
        if self._draws:
            if not self._settling and self._steps % self.render_interval == 0:
                sensors = self.simulation._observables
                self._frames = {camera: sensors[camera]._sensor({}) for camera in self.camera_name}
            raw_obs = raw_obs | self._frames
        if self._perturber is not None and not self._settling:
            seen = {name: self._perturber.see(raw_obs[name], name, self._steps) for name in self.camera_name}
            raw_obs = raw_obs | seen
        result: dict[str, Any] = super()._format_raw_obs(raw_obs)
        return result

    def image_place(self, camera: str, point: np.ndarray) -> np.ndarray:
        """Where a point of the world lies in a camera's image as LeRobot gives it to policies, float32 [2].

        Args:
            camera: "agentview_image" or "robot0_eye_in_hand_image".
            point: [3] in metres.

        Returns:
            (x, y) from 0 to 1, or outside if the camera does not see it; (-1, -1) behind the camera.
        """
        model, data = self.model, self.simulation.sim.data._data
        number = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, camera.removesuffix("_image"))
        x, y, z = data.cam_xmat[number].reshape(3, 3).T @ (point - data.cam_xpos[number])
        if z > -1e-3:
            return np.full(2, -1, np.float32)
        scale = 0.5 / np.tan(np.radians(model.cam_fovy[number]) / 2)
        # LeRobot turns by 180 degrees an image that robosuite gives upside down, so left and right are exchanged.
        return np.array([0.5 + scale * x / z, 0.5 + scale * y / z], np.float32)


@lerobot_configs.EnvConfig.register_subclass("grids_libero")
@dataclass
class LiberoConfig(lerobot_configs.LiberoEnv):
    """Configuration of LeRobot's LIBERO with the options of this module.

    Attributes:
        task: Suites or tasks, comma-separated: libero_object, or libero_object_3 for one task.
        layout: "official" for LIBERO's own initial states, "dealt" for objects dealt anew by the episode's seed.
        drawing: "libero" for LIBERO's own images and resets, "fast" for cheaper ones.
        zoom: How many times larger the overview camera draws, 1 or more.
        render_interval: See `LiberoEnv`.
        perturb: Perturbations as kind:severity, comma-separated; see `perturbations`.
    """

    task: str = "libero_object"
    layout: str = "official"
    drawing: str = "libero"
    zoom: float = 1.0
    render_interval: int = 1
    perturb: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_perturbations(self.perturb, "libero")
        if self.drawing not in DRAWINGS:
            raise SimulationError(f"drawing '{self.drawing}' is unknown; choose from {', '.join(DRAWINGS)}")
        if not self.zoom >= 1:
            raise SimulationError(f"zoom is {self.zoom}, expected 1 (LIBERO's own images) or more")
        require_layout(self.layout, list(self.chosen))

    @property
    def chosen(self) -> dict[str, list[int]]:
        """{suite: numbers of the tasks}."""
        chosen = parse_tasks(self.task)
        if self.task_ids is None:
            return chosen
        return {suite: lerobot_libero._select_task_ids(len(load_suite(suite).tasks), self.task_ids) for suite in chosen}

    @property
    def names(self) -> list[str]:
        """Names of the tasks, such as libero_object_3."""
        return [f"{suite}_{number}" for suite, numbers in self.chosen.items() for number in numbers]

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Make one vector environment with `n_envs` copies per task: {suite: {number of the task: environment}}."""
        vector = lerobot_configs._make_vec_env_cls(use_async_envs, n_envs)
        envs: dict[str, dict[int, Any]] = {}
        for suite, numbers in self.chosen.items():
            for number in numbers:
                makers = [partial(self.make, suite, number, index, n_envs) for index in range(n_envs)]
                envs.setdefault(suite, {})[number] = vector(makers)
        return envs

    def make(self, suite: str, number: int, index: int = 0, n_envs: int = 1) -> LiberoEnv:
        """One environment of a task of a suite; `index` of `n_envs` that run together."""
        return LiberoEnv(
            task_suite=load_suite(suite),
            task_id=number,
            task_suite_name=suite,
            episode_index=index,
            n_envs=n_envs,
            episode_length=self.episode_length,
            camera_name=self.camera_name,
            init_states=self.init_states,
            control_mode=self.control_mode,
            camera_name_mapping=self.camera_name_mapping,
            layout=self.layout,
            drawing=self.drawing,
            zoom=self.zoom,
            render_interval=self.render_interval,
            perturbations=parse_perturbations(self.perturb, "libero"),
            **{key: value for key, value in self.gym_kwargs.items() if key != "task_ids"},
        )
