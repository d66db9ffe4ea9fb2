"""Pictures of dealt LIBERO scenes to train a small policy on, with the object of every pixel, all positions, the
robot's state, and what the scripted expert does next.

    python benchmarks/libero/scenes.py outputs/libero/scenes.npz --scenes 120    # of each task

In most scenes the hand is on its way to the task's object, in the others the arm is anywhere. Seeds start at 900000, so
no scene is one of a recording or an evaluation. A scene takes about 0.3 seconds of one core of an AMD EPYC.
"""

import argparse
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from lerobot.utils.constants import OBS_STATE

from lerobot_grids.simulation.libero.demonstrator import CAMERAS, as_policies_see
from lerobot_grids.simulation.libero.environment import LiberoConfig, LiberoEnv
from lerobot_grids.simulation.libero.expert import Expert
from lerobot_grids.simulation.libero.layouts import deal
from lerobot_grids.simulation.libero.shapes import rotation_vector, turned

FIRST_SEED = 900_000
# Standard deviation of the arm's joints around their start, in radians.
ARM = 0.22
# Share of the scenes in which the hand is on its way. There it is off its grasp along the table by a standard deviation
# between these two, up to this high above it and higher the further it is off, and turned in part as the grasp needs,
# with this standard deviation, in metres and radians.
COMING, ALONG, ABOVE, TURN = 0.75, (0.01, 0.2), 0.12, 0.2
# Actions of the expert in each scene.
ACTIONS = 8
ROBOT = "robot"


def kind(name: str) -> str:
    """The kind of an object: its name without the number."""
    return name.rstrip("0123456789").rstrip("_")


def labels(env: LiberoEnv) -> dict[int, str]:
    """{number of a shape: name of its kind of object} of all objects and the robot."""
    model, names = env.simulation.sim.model._model, {}
    for name, body in env.simulation.obj_body_id.items():
        names[body] = kind(name)
    names[model.body("robot0_base").id] = ROBOT
    kinds: dict[int, str] = {}
    for shape in range(model.ngeom):
        body = model.geom_bodyid[shape]
        while body and body not in names:
            body = model.body_parentid[body]
        if body:
            kinds[shape] = names[body]
    return kinds


def classes_seen(env: LiberoEnv, camera: str, kinds: dict[int, str], classes: list[str]) -> np.ndarray:
    """The class of each pixel of a camera, uint8 [h, w], 0 for the background, as LeRobot turns images."""
    model, context = env.simulation.sim.model, env.simulation.sim._render_context_offscreen
    size, number = (env.observation_width, env.observation_height), model.camera_name2id(camera.removesuffix("_image"))
    context.render(*size, camera_id=number, segmentation=True)
    red, green, blue = np.moveaxis(context.read_pixels(*size).astype(np.int64), -1, 0)
    drawn = {shape.segid + 1: shape.objid for shape in context.scn.geoms[: context.scn.ngeom]}
    table = np.zeros(context.scn.ngeom + 1, np.uint8)
    for segment, shape in drawn.items():
        table[segment] = 1 + classes.index(kinds[shape]) if shape in kinds else 0
    seen: np.ndarray = table[red + 256 * green + 65536 * blue][::-1, ::-1]
    return seen


def scatter(env: LiberoEnv, random: np.random.Generator) -> None:
    """Deal the objects, and put the arm somewhere, where it touches nothing."""
    env._env.set_init_state(env._init_states[random.integers(len(env._init_states))])
    env.put(deal(env.suite, env.poses(), env.base_position(), random))
    robot, data = env.simulation.robots[0], env.simulation.sim.data._data
    joints, start = robot._ref_joint_pos_indexes, data.qpos[robot._ref_joint_pos_indexes].copy()
    coming = random.random() < COMING
    while True:
        data.qpos[joints] = start + random.normal(0, ARM, 7) * (0.1 if coming else 1)
        data.qpos[robot._ref_gripper_joint_pos_indexes] = np.array([1, -1]) * random.uniform(0, 0.04)
        mujoco.mj_forward(env.model, data)
        if coming:
            bring_close(env, random)
        if not touches(env):
            break
    # The controller has goals of its own, and robosuite counts steps.
    robot.controller.update(force=True)
    robot.controller.reset_goal()
    robot.gripper.current_action = np.zeros(robot.gripper.dof)
    env.simulation.timestep = 0


def bring_close(env: LiberoEnv, random: np.random.Generator) -> None:
    """Move the hand to where it may be on its way to the object's grasp, by inverse kinematics."""
    model, data, robot = env.model, env.simulation.sim.data._data, env.simulation.robots[0]
    expert, site = Expert(env.simulation), robot.eef_site_id
    along = np.exp(random.uniform(*np.log(ALONG)))
    goal = expert.hold_position() + np.r_[random.normal(0, along, 2), random.uniform(0, ABOVE + along)]
    matrix = turned(expert.down, expert.grasp.yaw * random.random() + random.normal(0, TURN))
    moves, turns = np.zeros((3, model.nv)), np.zeros((3, model.nv))
    for _ in range(20):
        mujoco.mj_jacSite(model, data, moves, turns, site)
        jacobian = np.r_[moves, turns][:, robot._ref_joint_vel_indexes]
        off = np.r_[goal - data.site_xpos[site], rotation_vector(matrix @ data.site_xmat[site].reshape(3, 3).T)]
        step = jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + 1e-3 * np.eye(6), off)
        data.qpos[robot._ref_joint_pos_indexes] += step.clip(-0.3, 0.3)
        mujoco.mj_forward(model, data)


def touches(env: LiberoEnv) -> bool:
    """Whether the robot touches something."""
    model, data = env.model, env.simulation.sim.data._data
    robot = model.body_rootid[model.body("robot0_base").id]
    roots = model.body_rootid[model.geom_bodyid[data.contact.geom]]
    return bool(((roots == robot).sum(1) == 1).any())


def expert_actions(env: LiberoEnv) -> np.ndarray:
    """What the scripted expert does next, float32 [actions, 7]; the scene is another one afterwards."""
    expert, actions = Expert(env.simulation), []
    # The first call says only whether the hand is near enough to go down.
    expert.act()
    for _ in range(ACTIONS):
        actions.append(np.clip(expert.act(), -1, 1))
        env._env.step(actions[-1])
    return np.stack(actions)


def positions(env: LiberoEnv, classes: list[str]) -> np.ndarray:
    """Where the object of each class is, [classes, 3] in metres; NaN where there is none."""
    places = np.full((len(classes), 3), np.nan, np.float32)
    for name, body in env.simulation.obj_body_id.items():
        places[classes.index(kind(name))] = env.simulation.sim.data.body_xpos[body]
    return places


def draw(tasks: str, scenes: range, size: int, zoom: float) -> dict[str, Any]:
    """What is saved of some scenes of each task.

    Returns:
        "images" uint8 [scenes, cameras, h, w, 3], "labels" uint8 [scenes, cameras, h, w], "positions" float32
        [scenes, classes, 3], "states" float32 [scenes, 8], "actions" float32 [scenes, actions, 7], "named" uint8
        [scenes], the class of the task's object, and "classes", whose first is the background.
    """
    config = LiberoConfig(task=tasks, drawing="fast", observation_height=size, observation_width=size, zoom=zoom)
    prepare, classes = config.get_env_processors()[0], ["background"]
    columns: dict[str, list[Any]] = {name: [] for name in ("images", "labels", "states", "actions", "named")}
    places: list[np.ndarray] = []
    ((suite, numbers),) = config.chosen.items()
    for number in numbers:
        env = config.make(suite, number)
        env.reset(seed=FIRST_SEED)
        kinds = labels(env)
        classes += [name for name in dict.fromkeys(kinds.values()) if name not in classes]
        for scene in scenes:
            scatter(env, np.random.default_rng(FIRST_SEED + 1000 * number + scene))
            seen = as_policies_see(env.observe(), prepare)
            images = [(seen[name][0].permute(1, 2, 0) * 255).round().byte().numpy() for name in CAMERAS]
            columns["images"].append(np.stack(images))
            columns["states"].append(seen[OBS_STATE][0].numpy())
            columns["labels"].append(
                np.stack([classes_seen(env, camera, kinds, classes[1:]) for camera in CAMERAS.values()])
            )
            columns["named"].append(np.uint8(classes.index(kind(Expert(env.simulation).object))))
            places.append(positions(env, classes))
            columns["actions"].append(expert_actions(env))
        print(f"{suite} {number}: {len(places)} scenes", flush=True)
        env.close()
    # A later task may bring new classes.
    known = np.full((len(places), len(classes), 3), np.nan, np.float32)
    for row, there in zip(known, places, strict=True):
        row[: len(there)] = there
    return {name: np.stack(column) for name, column in columns.items()} | {"positions": known, "classes": classes}


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", default="libero_object", help="a suite, or tasks of one, comma-separated")
    parser.add_argument("--scenes", type=int, default=150, help="scenes of each task")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, for a file beside another")
    parser.add_argument("--size", type=int, default=144)
    parser.add_argument("--zoom", type=float, default=1.4, help="how many times larger the overview camera draws")
    arguments = parser.parse_args()
    scenes = range(arguments.first, arguments.first + arguments.scenes)
    content = draw(arguments.tasks, scenes, arguments.size, arguments.zoom)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output, **content)


if __name__ == "__main__":
    main()
