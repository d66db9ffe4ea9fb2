"""Where the objects of an episode stand: as LIBERO's official states say, or dealt anew.

In the official states the named object hardly moves, so a policy that remembers one place per task succeeds without
looking. Dealt layouts keep LIBERO's scenes and change what a policy has to see:

- LIBERO-Object: the objects change places among their slots, each is moved by up to `JITTER` and turned by up to
  `TURN`. The basket is moved by up to `SHIFT`.
- LIBERO-Spatial: everything that stands on the table is turned together around its middle by up to `TURN`, and moved by
  up to `SHIFT`, so "between the plate and the ramekin" stays true. What stands on or in furniture stays there.

A layout depends on its seed and its task: every policy gets the same one. Other seeds give others, and so do other
tasks. Their objects have the same slots, so with the seed alone the named object of ten tasks would stand in one place.
"""

from dataclasses import dataclass

import numpy as np

from lerobot_policy_grids.errors import SimulationError

LAYOUTS = ("official", "dealt")
DEALT_SUITES = ("libero_object", "libero_spatial")
# Metres, and radians.
JITTER, SHIFT, TURN = 0.03, 0.05, 0.6
# Two centres are never nearer than this; objects of LIBERO-Object are up to 14 cm long.
APART = 0.105
# What is higher than this above the lowest object stands on something.
ON_SOMETHING = 0.05
# Where the arm reaches the floor or the table, relative to its base: distances from it, and |y|.
REACH, SIDE = (0.33, 0.82), 0.36
TRIES = 200


@dataclass(frozen=True)
class Pose:
    """Where a free object is: position [3] in metres and quaternion [4], w first."""

    position: np.ndarray
    quaternion: np.ndarray


def require_layout(layout: str, suites: list[str]) -> None:
    """Raise `SimulationError` unless a layout exists for all suites."""
    if layout not in LAYOUTS:
        raise SimulationError(f"layout '{layout}' is unknown; choose from {', '.join(LAYOUTS)}")
    missing = [suite for suite in suites if suite not in DEALT_SUITES]
    if layout == "dealt" and missing:
        raise SimulationError(
            f"{missing[0]} cannot be dealt anew, only {' and '.join(DEALT_SUITES)} can; use --layout official"
        )


def generator(seed: int | None, task: int) -> np.random.Generator:
    """What deals the objects of an episode of a task, by its number in the suite; without a seed, any."""
    return np.random.default_rng(None if seed is None else [seed, task])


def deal(suite: str, poses: dict[str, Pose], base: np.ndarray, random: np.random.Generator) -> dict[str, Pose]:
    """New poses of the free objects.

    Args:
        suite: "libero_object" or "libero_spatial".
        poses: Poses in an official state, by name.
        base: Position [3] of the robot's base.
        random: What `generator` gives for the episode.

    Raises:
        SimulationError: If no layout was found in which objects stand apart and in reach.
    """
    change = _permute if suite == "libero_object" else _move_together
    for _ in range(TRIES):
        dealt = change(poses, random)
        if _stand_apart(dealt, poses) and all(_in_reach(pose.position, base) for pose in dealt.values()):
            return dealt
    raise SimulationError(f"no dealt layout of {suite} was found in {TRIES} tries; choose another seed")


def _permute(poses: dict[str, Pose], random: np.random.Generator) -> dict[str, Pose]:
    names = [name for name in poses if not name.startswith("basket")]
    places = random.permutation(np.stack([poses[name].position[:2] for name in names]))
    dealt = {}
    for name, place in zip(names, places, strict=True):
        turned = _turn(poses[name].quaternion, random.uniform(-TURN, TURN))
        dealt[name] = Pose(np.r_[place + random.uniform(-JITTER, JITTER, 2), poses[name].position[2]], turned)
    for name in poses.keys() - dealt.keys():
        moved = poses[name].position + np.r_[random.uniform(-SHIFT, SHIFT, 2), 0]
        dealt[name] = Pose(moved, poses[name].quaternion)
    return dealt


def _move_together(poses: dict[str, Pose], random: np.random.Generator) -> dict[str, Pose]:
    lowest = min(pose.position[2] for pose in poses.values())
    on_table = [name for name, pose in poses.items() if pose.position[2] < lowest + ON_SOMETHING]
    places = np.stack([poses[name].position[:2] for name in on_table])
    middle, angle, shift = places.mean(0), random.uniform(-TURN, TURN), random.uniform(-SHIFT, SHIFT, 2)
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    dealt = {}
    for name, pose in poses.items():
        # What stands on an object goes with it; what stands on furniture stays.
        carried = np.linalg.norm(places - pose.position[:2], axis=1).min() < ON_SOMETHING
        if name in on_table or carried:
            moved = rotation @ (pose.position[:2] - middle) + middle + shift
            dealt[name] = Pose(np.r_[moved, pose.position[2]], _turn(pose.quaternion, angle))
        else:
            dealt[name] = pose
    return dealt


def _turn(quaternion: np.ndarray, angle: float) -> np.ndarray:
    """The orientation turned around the vertical by an angle in radians."""
    half_cos, half_sin = np.cos(angle / 2), np.sin(angle / 2)
    w, x, y, z = quaternion
    return np.array(
        [
            half_cos * w - half_sin * z,
            half_cos * x - half_sin * y,
            half_cos * y + half_sin * x,
            half_cos * z + half_sin * w,
        ]
    )


def _stand_apart(dealt: dict[str, Pose], official: dict[str, Pose]) -> bool:
    """Whether no two objects are nearer than `APART`, or than they are officially."""
    names = list(dealt)
    for i, one in enumerate(names):
        for other in names[:i]:
            now = np.linalg.norm(dealt[one].position - dealt[other].position)
            before = np.linalg.norm(official[one].position - official[other].position)
            if now < min(APART, before - 1e-6):
                return False
    return True


def _in_reach(position: np.ndarray, base: np.ndarray) -> bool:
    ahead = np.linalg.norm(position[:2] - base[:2])
    return bool(REACH[0] < ahead < REACH[1] and abs(position[1] - base[1]) < SIDE)
