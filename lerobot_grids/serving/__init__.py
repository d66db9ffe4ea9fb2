"""Answer LeRobot's `robot_client`: the policy on one machine, the robot on another."""

from .policy_server import GridsPolicyServer
from .running import Endpoint, is_loopback, start_server

__all__ = ["Endpoint", "GridsPolicyServer", "is_loopback", "start_server"]
