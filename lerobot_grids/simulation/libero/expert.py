"""A scripted expert for LIBERO's pick-and-place tasks, which acts through the environment's own actions.

It reads the simulator's state and never the image: above the object, down, close, lift, carry, lower, open, withdraw.
Which object and which target it is comes from the task's goal, `(In object region)` or `(On object target)`.

Facts about robosuite 1.4.0 that it rests on: action[:3] of 1 is a step of 5 cm along the world's axes, action[3:6] of
1 a turn of 0.5 rad around them, both from where the hand is now; action[6] of -1 opens and 1 closes the fingers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .grasps import choose_grasp
from .shapes import collision_points, rotation_vector, turned

# What an action of 1 means, in metres and radians; how much of an error one step corrects.
STEP, TURN = 0.05, 0.5
GAIN, TURN_GAIN = 2.6, 1.6
# Metres above the object at which the hand waits; steps after which a phase gives up.
ABOVE = 0.08
PATIENCE = {"descend": 35, "close": 22, "lift": 40, "carry": 70, "lower": 60, "open": 5, "leave": 12}


@dataclass
class Expert:
    """Acts in one episode.

    Args:
        env: Robosuite's environment inside LIBERO's, after its reset.
        noise: Standard deviation in metres of what is added to waypoints, so that demonstrations differ.
        seed: Seed of that.
        belief: Positions to believe instead of the simulator's, {object: [3]}, for an expert that does not look.
    """

    env: Any
    noise: float = 0.0
    seed: int = 0
    belief: Mapping[str, np.ndarray] | None = None

    def __post_init__(self) -> None:
        self.model, self.data = self.env.sim.model._model, self.env.sim.data._data
        self.relation, self.object, self.target = self.env.parsed_problem["goal_state"][0][:3]
        self.fingers, self.place, self.travel, self.low = np.zeros(2), np.zeros(3), 0.0, 0
        self.jitter = np.random.default_rng(self.seed).normal(0, 1, (2, 3)) * self.noise
        self.down = _straight(self._hand()[1])
        self._begin_grasp()

    def act(self) -> np.ndarray:
        """The next action, float32 [7], not clipped."""
        self.steps += 1
        action: np.ndarray = getattr(self, f"_{self.phase}")()
        return action.astype(np.float32)

    def object_position(self) -> np.ndarray:
        """Where the object to be picked up is, [3] in metres."""
        return self._position(self.object)

    def hold_position(self) -> np.ndarray:
        """Where the hand is to hold the object, [3] in metres."""
        return self._position(self.object) + self.grasp.offset

    def target_position(self) -> np.ndarray:
        """The point over which the object is let go, [3] in metres."""
        if self.target in self.env.obj_body_id:
            return self._position(self.target)
        point: np.ndarray = self.data.site_xpos[self.model.site(self.target).id].copy()
        parent = self._target_body()
        if self.belief and parent and parent in self.belief:
            point += self._position(parent) - self.data.xpos[self.env.obj_body_id[parent]]
        return point

    # Phases. Each returns an action, and names the next phase when it is finished.

    def _hover(self) -> np.ndarray:
        position, matrix = self._hand()
        hold = self.hold_position()
        goal = hold + [0, 0, ABOVE] + self.jitter[0]
        way = float(np.linalg.norm(goal[:2] - position[:2]))
        if way > 0.03:
            # Not through what stands between: up, over, then down.
            clear = self._top(self._others(), (goal + position) / 2, way / 2 + 0.05) + 0.035
            goal[2] = max(goal[2], min(clear, goal[2] + 0.3))
            if position[2] < goal[2] - 0.06:
                goal[:2] = position[:2] + (goal[:2] - position[:2]) * 0.3
        else:
            off = np.abs(rotation_vector(turned(self.down, self.grasp.yaw) @ matrix.T)).max()
            if off < 0.12 and position[2] - hold[2] < 0.14:
                self._next("descend")
        return self._go(goal, self._opening())

    def _descend(self) -> np.ndarray:
        position, _ = self._hand()
        error = self.hold_position() - position
        if np.linalg.norm(error[:2]) > 0.012:
            error[2] = max(error[2], -0.01)
        if (abs(error[2]) < 0.006 and np.linalg.norm(error[:2]) < 0.008) or self._is_late():
            self._next("close")
        return self._go(position + error, self._opening(), 0.7)

    def _close(self) -> np.ndarray:
        if self.steps == 1:
            self.place = self.hold_position()
        # The fingers need about 15 steps; lifting earlier leaves a thin rim behind.
        fingers = self._fingers()
        still = self.steps > 3 and np.abs(fingers - self.fingers).max() < 0.0004
        self.fingers = fingers
        if still or self._is_late():
            self._next("lift")
        return self._go(self.place, 1)

    def _lift(self) -> np.ndarray:
        position, _ = self._hand()
        if self.steps == 1:
            self.place = position.copy()
            reach = self._reach()
            middle = np.r_[position[:2] + reach / 2, 0]
            clear = self._top(self._others(), middle, float(np.linalg.norm(reach)) / 2 + 0.08) + self._hang() + 0.025
            self.travel = max(clear, position[2] + 0.04) + abs(self.jitter[1][2])
        goal = np.r_[self.place[:2], self.travel]
        if position[2] > self.travel - 0.035 or self._is_late():
            missed = not self.belief and np.linalg.norm(self.hold_position() - position) > 0.04
            if missed:
                self._begin_grasp()
            else:
                self._next("carry")
        return self._go(goal, 1)

    def _carry(self) -> np.ndarray:
        position, reach = self._hand()[0], self._reach()
        if np.linalg.norm(reach) < 0.012 or self._is_late():
            self._next("lower")
        return self._go(np.r_[position[:2] + reach, self.travel], 1)

    def _lower(self) -> np.ndarray:
        position, target = self._hand()[0], self.target_position()
        support = self._target_body()
        under = target[2] if support is None or self.relation.lower() == "in" else self._top([support], target, 0.05)
        drop = under + self._hang() + 0.004
        self.low = self.low + 1 if position[2] - drop < 0.012 and self.steps > 1 else 0
        if self.low > 1 or self._is_late():
            self._next("open")
        return self._go(np.r_[position[:2] + self._reach(), max(drop, position[2] - 0.06)], 1, 0.6)

    def _open(self) -> np.ndarray:
        if self.steps == 1:
            self.place = self._hand()[0].copy()
        if self._is_late():
            self._next("leave")
        return self._go(self.place, -1)

    def _leave(self) -> np.ndarray:
        action = self._go(self.place + np.array([0, 0, 0.12]), -1)
        if self._is_late():
            self._begin_grasp()
        return action

    # What is where.

    def _hand(self) -> tuple[np.ndarray, np.ndarray]:
        site = self.env.robots[0].eef_site_id
        return self.data.site_xpos[site], self.data.site_xmat[site].reshape(3, 3)

    def _fingers(self) -> np.ndarray:
        fingers: np.ndarray = self.data.qpos[self.env.robots[0]._ref_gripper_joint_pos_indexes].copy()
        return fingers

    def _position(self, name: str) -> np.ndarray:
        true: np.ndarray = self.data.xpos[self.env.obj_body_id[name]].copy()
        if self.belief and name in self.belief:
            # The height is that of what it stands on, so it tells an expert that does not look nothing.
            return np.r_[self.belief[name][:2], true[2]]
        return true

    def _points(self, name: str, inside: int = 0) -> np.ndarray:
        body = self.env.obj_body_id[name]
        return collision_points(self.model, self.data, body, inside) - self.data.xpos[body] + self._position(name)

    def _target_body(self) -> str | None:
        """Name of the object that the target is or belongs to; None for a place on the table."""
        if self.target in self.env.obj_body_id:
            return str(self.target)
        parent = getattr(self.env.object_sites_dict[self.target], "parent_name", None)
        return parent if parent in self.env.obj_body_id else None

    def _others(self) -> list[str]:
        return [name for name in self.env.obj_body_id if name != self.object]

    def _top(self, names: list[str], near: np.ndarray, radius: float) -> float:
        """The highest point of some objects near a place."""
        best = -9.0
        for name in names:
            points = self._points(name, 100)
            points = points[np.linalg.norm(points[:, :2] - near[:2], axis=1) < radius]
            best = max(best, points[:, 2].max(initial=-9.0))
        return best

    def _hang(self) -> float:
        """How far the held object reaches below the hand."""
        return float(self._hand()[0][2] - self._points(self.object)[:, 2].min())

    def _reach(self) -> np.ndarray:
        """The way [2] from the object in the hand to the target."""
        held = self._position(self.object) if not self.belief else self._hand()[0] - self.grasp.offset
        return self.target_position()[:2] - held[:2]

    # How to move.

    def _begin_grasp(self) -> None:
        base = self.data.body("robot0_base").xpos[:2]
        obstacles = [self._points(name, 400) for name in self._others()]
        points, centre = self._points(self.object, 200), self._position(self.object)
        self.grasp = choose_grasp(points, centre, self.down, obstacles, base)
        self._next("hover")

    def _next(self, phase: str) -> None:
        self.phase, self.steps = phase, 0

    def _is_late(self) -> bool:
        return self.steps > PATIENCE[self.phase]

    def _opening(self) -> int:
        """The gripper's action on the way to the object. It moves by the sign, so 0 holds it half open."""
        finger = np.abs(self._fingers()).min()
        if self.grasp.opening >= 0.04:
            return -1
        return 1 if finger > self.grasp.opening + 0.004 else -1 if finger < self.grasp.opening - 0.004 else 0

    def _go(self, goal: np.ndarray, grip: int, speed: float = 1.0) -> np.ndarray:
        position, matrix = self._hand()
        move = np.clip(GAIN * (goal - position) / STEP, -speed, speed)
        off = rotation_vector(turned(self.down, self.grasp.yaw) @ matrix.T)
        return np.r_[move, np.clip(TURN_GAIN * off / TURN, -0.6, 0.6), grip]


def _straight(matrix: np.ndarray) -> np.ndarray:
    """The hand's orientation with its z axis exactly down; LIBERO starts it 3.4 degrees off."""
    y = matrix[:, 1] * [1, 1, 0]
    y /= np.linalg.norm(y)
    z = np.array([0, 0, -1.0])
    return np.stack([np.cross(y, z), y, z], 1)
