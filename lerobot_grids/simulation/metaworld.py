"""LeRobot's MetaWorld environment, but faster on a CPU and with a correct first frame.

Differences from `lerobot.envs.metaworld`:
- There, the image after `reset()` is out of date on several tasks: bodies and sites have moved without a forward pass,
  so a policy with action chunks executes its first chunk for a wrong goal. Here the state is updated before rendering.
- A side camera shows objects larger than a few pixels. It renders at the requested size without shadow map,
  multisampling, mirrors, and what the camera cannot see, many times faster on a CPU. MuJoCo draws the scene once more
  for each mirror; this camera sees nothing in those of the default tasks.
- Episodes end after `max_steps`. Images can be rendered only at the steps at which a policy needs one.
- MetaWorld's list of tasks takes a hundred resets to make, so it is made once per process instead of per environment.

Use it in LeRobot's own commands with `--env.discover_packages_path=lerobot_grids.simulation
--env.type=grids_metaworld`.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from .rendering import choose_renderer

choose_renderer()

# ruff: noqa: E402  (mujoco reads MUJOCO_GL when it is imported)
import gymnasium
import metaworld
import mujoco
import numpy as np
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs import configs as lerobot_configs
from lerobot.envs import metaworld as lerobot_metaworld
from lerobot.envs import utils as lerobot_utils

from lerobot_policy_grids.errors import SimulationError

from ..choices import parts
from .camera import CAMERA_FOVY, CAMERA_POSITION, CAMERA_TARGET, look_at, only_geoms_in_view
from .perturbations import Perturbation, Perturber, parse_perturbations
from .perturbations.metaworld import KINDS, SavedMetaworld

# LeRobot has this function since 0.6.1; older environments were made without it.
_frozen_at_its_end = getattr(lerobot_utils, "freeze_after_episode_end", lambda make: make)

# Tasks that need vision: a policy with the object's position solves them, and a blind policy does not.
DEFAULT_TASKS = ("push-v3", "coffee-push-v3", "sweep-into-v3", "hand-insert-v3")
OBJECT_POSITION, GOAL_POSITION = slice(4, 7), slice(36, 39)


def expand_tasks(tasks: str) -> list[str]:
    """Task names in a comma-separated list; LeRobot's difficulty groups ("easy", "hard", ...) are expanded.

    Raises:
        SimulationError: If a name is unknown.
    """
    names: list[str] = []
    for name in parts(tasks):
        names += lerobot_metaworld.DIFFICULTY_TO_TASKS.get(name, [name])
    known = lerobot_metaworld.TASK_DESCRIPTIONS
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise SimulationError(
            f"MetaWorld has no task {', '.join(unknown) or '(none given)'}; choose from {', '.join(sorted(known))}"
        )
    return list(dict.fromkeys(names))


@cache
def _benchmark(task: str) -> metaworld.MT1:
    """MetaWorld's class and tasks, with the seed of LeRobot's environment."""
    return metaworld.MT1(task, seed=42)


class MetaworldEnv(lerobot_metaworld.MetaworldEnv):
    """One MetaWorld task with a side camera.

    Args:
        task: Task name, such as "push-v3".
        size: Height and width of the image in pixels.
        max_steps: Steps after which an unsuccessful episode ends.
        render_interval: Number of steps between two rendered images; the last image is repeated in between. A policy
            that executes chunks of n actions needs an image every n steps only.
        perturbations: Changes to the scene of the demonstrations. The episode's seed decides their direction.
    """

    # `render` returns the policy's own image, so films can draw the sampled points on it.
    renders_observation = True
    _env: Any

    def __init__(
        self,
        task: str,
        size: int = 96,
        max_steps: int = 200,
        render_interval: int = 1,
        perturbations: list[Perturbation] | None = None,
    ) -> None:
        super().__init__(
            expand_tasks(task)[0],
            obs_type="pixels_agent_pos",
            observation_width=size,
            observation_height=size,
        )
        self.size = size
        self.render_interval = render_interval
        self._max_episode_steps = max_steps
        self._steps = 0
        self._frame = np.zeros((size, size, 3), np.uint8)
        self.raw_observation = np.zeros(39)
        self.perturbations = perturbations or []
        self._perturber: Perturber | None = None

    @property
    def model(self) -> Any:
        """MuJoCo's model; only after the first reset."""
        return self._env.model

    @property
    def positions(self) -> np.ndarray:
        """Positions of object and goal, float32 [6] in metres. Only for experts and auxiliary losses."""
        parts = (self.raw_observation[OBJECT_POSITION], self.raw_observation[GOAL_POSITION])
        return np.concatenate(parts).astype(np.float32)

    def _ensure_env(self) -> None:
        if self._env is not None:
            return
        # The next lines are those of LeRobot's environment.
        benchmark = _benchmark(self._env_name)
        env: Any = benchmark.train_classes[self._env_name](render_mode="rgb_array", camera_name=self.camera_name)
        env.set_task(benchmark.train_tasks[0])
        env.reset()
        env._freeze_rand_vec = False
        env.seeded_rand_vec = True
        self._env = env
        self._camera = camera = mujoco.mj_name2id(env.model, mujoco.mjtObj.mjOBJ_CAMERA, self.camera_name)
        env.model.cam_pos[camera] = CAMERA_POSITION
        env.model.cam_quat[camera] = look_at(CAMERA_POSITION, CAMERA_TARGET)
        env.model.cam_fovy[camera] = CAMERA_FOVY
        env.model.vis.quality.shadowsize = 0
        env.model.vis.quality.offsamples = 0
        env.model.vis.global_.offwidth = env.model.vis.global_.offheight = self.size
        env.model.mat_reflectance[:] = 0
        env.width = env.height = self.size
        env.mujoco_renderer.width = env.mujoco_renderer.height = self.size
        if self.perturbations:
            self._perturber = Perturber(SavedMetaworld(self), KINDS, self.perturbations)

    def reset(self, seed: int | None = None, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        self._steps = 0
        self._ensure_env()
        if self._perturber is not None:
            self._perturber.begin(self, seed)
        observation, info = super().reset(seed=seed, **kwargs)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self._steps += 1
        return super().step(action)

    def render(self) -> np.ndarray:
        """The policy's camera image, uint8 [size, size, 3].

        Raises:
            SimulationError: If OpenGL fails.
        """
        try:
            self.use_own_context()
            with only_geoms_in_view(self._env.model, self._env.data, self._camera):
                image = np.ascontiguousarray(super().render())
        except (RuntimeError, AttributeError, ImportError) as error:
            raise SimulationError(
                f"rendering with MUJOCO_GL={choose_renderer()} failed ({error}); "
                "try another renderer: install libosmesa6 and set MUJOCO_GL=osmesa"
            ) from error
        return image if self._perturber is None else self._perturber.see(image, self.camera_name, self._steps)

    def use_own_context(self) -> None:
        """Make this environment's OpenGL context current.

        In gymnasium the context that was made last stays current, which has another environment's textures. After
        another environment was closed, no context is current and images are black.
        """
        for viewer in self.viewers():
            viewer.make_context_current()

    def close(self) -> None:
        """Free the simulator and its graphics resources."""
        self.use_own_context()
        for viewer in self.viewers():
            # With gymnasium the garbage collector would free it, in another environment's context.
            viewer.con.free()
        super().close()

    def viewers(self) -> list[Any]:
        """The off-screen viewers that gymnasium made for this environment; none before the first image."""
        return [] if self._env is None else list(self._env.mujoco_renderer._viewers.values())

    def _format_raw_obs(self, raw_obs: np.ndarray) -> dict[str, Any]:
        env: Any = self._env
        self.raw_observation = raw_obs
        if self._steps == 0:
            mujoco.mj_forward(env.model, env.data)
        if self._steps % self.render_interval == 0:
            self._frame = self.render()
        return {"pixels": self._frame.copy(), "agent_pos": raw_obs[:4]}


@lerobot_configs.EnvConfig.register_subclass("grids_metaworld")
@dataclass
class MetaworldConfig(lerobot_configs.MetaworldEnv):
    """Configuration of LeRobot's MetaWorld with the changes of this module.

    Attributes:
        task: Task names, comma-separated, or LeRobot's difficulty groups.
        size: Height and width of the image in pixels.
        max_steps: Steps after which an unsuccessful episode ends.
        render_interval: See `MetaworldEnv`.
        perturb: Perturbations as kind:severity, comma-separated; see `perturbations`.
    """

    task: str = ",".join(DEFAULT_TASKS)
    size: int = 96
    max_steps: int = 200
    render_interval: int = 1
    perturb: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("size", "max_steps", "render_interval"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise SimulationError(f"{name}={value!r}; give a whole number of at least 1")
        expand_tasks(self.task)
        parse_perturbations(self.perturb, "metaworld")
        self.features["pixels/top"] = PolicyFeature(type=FeatureType.VISUAL, shape=(self.size, self.size, 3))

    def create_envs(self, n_envs: int, use_async_envs: bool = False) -> dict[str, dict[int, Any]]:
        """Make one vector environment with `n_envs` copies per task: {task: {0: environment}}."""
        perturbations = parse_perturbations(self.perturb, "metaworld")
        vector = lerobot_configs._make_vec_env_cls(use_async_envs, n_envs)
        envs: dict[str, dict[int, gymnasium.vector.VectorEnv]] = {}
        for task in expand_tasks(self.task):
            make = _frozen_at_its_end(
                partial(MetaworldEnv, task, self.size, self.max_steps, self.render_interval, perturbations)
            )
            envs[task] = {0: vector([make] * n_envs)}
        return envs
