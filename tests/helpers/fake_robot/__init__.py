"""A robot without hardware for LeRobot's commands: it says what it was told to see and keeps what it is sent."""

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from lerobot.robots.config import RobotConfig
from lerobot.robots.robot import Robot


@RobotConfig.register_subclass("fake_robot")
@dataclass
class FakeRobotConfig(RobotConfig):
    """Options of a `FakeRobot`.

    Attributes:
        positions: Joint -> where it is, in the robot's order of joints.
        views: Camera -> [height, width, brightness of every pixel].
        enough: Ctrl-C is pressed after this many actions.
    """

    positions: dict[str, float] = field(default_factory=dict)
    views: dict[str, list[int]] = field(default_factory=dict)
    enough: int = 3


class FakeRobot(Robot):
    """A robot that never moves.

    Attributes:
        sent: The actions that any robot was sent, oldest first.
    """

    config_class = FakeRobotConfig
    name = "fake_robot"
    sent: ClassVar[list[dict[str, float]]] = []

    def __init__(self, config):
        super().__init__(config)
        self.config = config
        self.cameras = dict.fromkeys(config.views)
        self._is_connected = False

    @property
    def action_features(self):
        return {f"{joint}.pos": float for joint in self.config.positions}

    @property
    def observation_features(self):
        return self.action_features | {name: (h, w, 3) for name, (h, w, _) in self.config.views.items()}

    @property
    def is_connected(self):
        return self._is_connected

    @property
    def is_calibrated(self):
        return True

    def connect(self, calibrate=True):
        self._is_connected = True

    def calibrate(self):
        pass

    def configure(self):
        pass

    def disconnect(self):
        self._is_connected = False

    def get_observation(self):
        joints = {f"{joint}.pos": value for joint, value in self.config.positions.items()}
        return joints | {name: np.full((h, w, 3), value, np.uint8) for name, (h, w, value) in self.config.views.items()}

    def send_action(self, action):
        self.sent.append(dict(action))
        if len(self.sent) >= self.config.enough:
            raise KeyboardInterrupt
        return action
