"""Pictures of dealt LIBERO scenes, with the object of every pixel and all positions, to train a policy's eyes on.

    python benchmarks/libero/scenes.py outputs/libero/scenes.npz --scenes 120    # of each task

The arm is in random positions, and nothing moves. Seeds start at 900000, so no scene is one of a recording or an
evaluation. 3500 scenes took 3 minutes on two cores of an AMD EPYC, half of the tasks on each.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from lerobot_grids.simulation.libero.environment import LiberoConfig, LiberoEnv
from lerobot_grids.simulation.libero.layouts import deal

FIRST_SEED = 900_000
# Standard deviation of the arm's joints around their start, in radians.
ARM = 0.22
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


def picture(env: LiberoEnv, camera: str, kinds: dict[int, str], classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(image uint8 [h, w, 3], class of each pixel uint8 [h, w], 0 for the background), as LeRobot turns them."""
    model, context = env.simulation.sim.model, env.simulation.sim._render_context_offscreen
    size, number = (env.observation_width, env.observation_height), model.camera_name2id(camera.removesuffix("_image"))
    context.render(*size, camera_id=number)
    image = context.read_pixels(*size)
    context.render(*size, camera_id=number, segmentation=True)
    red, green, blue = np.moveaxis(context.read_pixels(*size).astype(np.int64), -1, 0)
    drawn = {shape.segid + 1: shape.objid for shape in context.scn.geoms[: context.scn.ngeom]}
    table = np.zeros(context.scn.ngeom + 1, np.uint8)
    for segment, shape in drawn.items():
        table[segment] = 1 + classes.index(kinds[shape]) if shape in kinds else 0
    return image[::-1, ::-1], table[red + 256 * green + 65536 * blue][::-1, ::-1]


def scatter(env: LiberoEnv, random: np.random.Generator) -> None:
    """Deal the objects, and put the arm somewhere."""
    data = env.simulation.sim.data
    env._env.set_init_state(env._init_states[random.integers(len(env._init_states))])
    env.put(deal(env.suite, env.poses(), env.base_position(), random))
    robot = env.simulation.robots[0]
    data.qpos[robot._ref_joint_pos_indexes] += random.normal(0, ARM, 7)
    data.qpos[robot._ref_gripper_joint_pos_indexes] = np.array([1, -1]) * random.uniform(0, 0.04)
    env.simulation.sim.forward()


def positions(env: LiberoEnv, classes: list[str]) -> np.ndarray:
    """Where the object of each class is, [classes, 3] in metres; NaN where there is none."""
    places = np.full((len(classes), 3), np.nan, np.float32)
    for name, body in env.simulation.obj_body_id.items():
        places[classes.index(kind(name))] = env.simulation.sim.data.body_xpos[body]
    return places


def draw(tasks: str, scenes: int, size: int, zoom: float) -> dict[str, Any]:
    """What is saved.

    Returns:
        "images" uint8 [scenes, cameras, h, w, 3], "labels" uint8 [scenes, cameras, h, w], "positions" float32
        [scenes, classes, 3], and "classes", whose first is the background.
    """
    config = LiberoConfig(task=tasks, drawing="fast", observation_height=size, observation_width=size, zoom=zoom)
    images, masks, places, classes = [], [], [], []
    ((suite, numbers),) = config.chosen.items()
    for number in numbers:
        env = config.make(suite, number)
        env.reset(seed=FIRST_SEED)
        kinds = labels(env)
        classes += [name for name in dict.fromkeys(kinds.values()) if name not in classes]
        for scene in range(scenes):
            scatter(env, np.random.default_rng(FIRST_SEED + 1000 * number + scene))
            drawn = [picture(env, camera, kinds, classes) for camera in env.camera_name]
            images.append(np.stack([image for image, _ in drawn]))
            masks.append(np.stack([mask for _, mask in drawn]))
            places.append(positions(env, classes))
        print(f"{suite} {number}: {len(images)} scenes", flush=True)
        env.close()
    # A later task may bring new classes.
    known = np.full((len(places), 1 + len(classes), 3), np.nan, np.float32)
    for row, there in zip(known, places, strict=True):
        row[1 : 1 + len(there)] = there
    return {
        "images": np.stack(images),
        "labels": np.stack(masks),
        "positions": known,
        "classes": ["background", *classes],
    }


def main() -> None:
    """Draw and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--tasks", default="libero_object", help="a suite, or tasks of one, comma-separated")
    parser.add_argument("--scenes", type=int, default=150, help="scenes of each task")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--zoom", type=float, default=1.5, help="how many times larger the overview camera draws")
    arguments = parser.parse_args()
    content = draw(arguments.tasks, arguments.scenes, arguments.size, arguments.zoom)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(arguments.output, **content)


if __name__ == "__main__":
    main()
