"""How to hold an object with two fingers from above: across its narrow side, or a bowl by its rim."""

from dataclasses import dataclass

import numpy as np

from .shapes import turned

# Metres: between the open fingers less a margin (Panda: 0.08), and how deep the fingers go over the top.
OPENING, DEPTH = 0.076, 0.032
# The fingers' shapes reach 1.1 cm below the point between their tips; nearer to the floor they push against it.
CLEARANCE = 0.014
# Beyond this distance from its base, in metres, the arm is nearly straight and the hand gets stuck.
FAR = 0.62


@dataclass(frozen=True)
class Grasp:
    """Where the fingers close.

    Attributes:
        offset: From the object's position to the point between the fingertips, [3] in metres.
        yaw: Turn of the hand from its first orientation, in radians.
        opening: How far each finger is open while the hand comes near, in metres.
    """

    offset: np.ndarray
    yaw: float
    opening: float = 0.04


def choose_grasp(
    points: np.ndarray, centre: np.ndarray, down: np.ndarray, obstacles: list[np.ndarray], base: np.ndarray
) -> Grasp:
    """The grasp with the least turn of the hand, of those that fit.

    Args:
        points: Points [n, 3] of the object.
        centre: The object's position [3].
        down: Orientation [3, 3] of the hand that looks straight down. The fingers open along its first axis.
        obstacles: Points [n, 3] of each other object.
        base: Position [2] of the robot's base.
    """
    low, high = points[:, 2].min(), points[:, 2].max()
    height = high - low
    z = max(high - min(DEPTH, 0.75 * height), low + CLEARANCE)
    band = points[np.abs(points[:, 2] - z) < max(0.012, 0.2 * height)]
    best, least = None, np.inf
    for degrees in range(-85, 90, 5):
        yaw = float(np.radians(degrees))
        axis = turned(down, yaw)[:, 0]
        across = np.array([axis[1], -axis[0], 0.0])
        along = band @ axis
        width = along.max() - along.min()
        cost = abs(degrees) / 90 + 200 * max(0.0, width - 0.045)
        if width <= OPENING - 0.006 and cost < least:
            beside = band @ across
            middle = axis * (along.max() + along.min()) / 2 + across * (beside.max() + beside.min()) / 2
            best, least = Grasp(np.r_[middle[:2], z] - centre, yaw), cost
    return best or _choose_rim_grasp(points, centre, down, obstacles, base)


def _choose_rim_grasp(
    points: np.ndarray, centre: np.ndarray, down: np.ndarray, obstacles: list[np.ndarray], base: np.ndarray
) -> Grasp:
    """Hold a bowl by its rim, one finger inside, on the side with the most room."""
    high = points[:, 2].max()
    rim = points[points[:, 2] > high - 0.008]
    middle = (rim[:, :2].max(0) + rim[:, :2].min(0)) / 2
    hold = np.median(np.linalg.norm(rim[:, :2] - middle, axis=1)) - 0.004
    near = [thing[(thing[:, 2] > high - 0.03) & (thing[:, 2] < high + 0.02)][:, :2] for thing in obstacles]
    occupied = np.concatenate([*near, np.full((1, 2), 9.0)])
    best, least = None, np.inf
    for degrees in range(0, 360, 10):
        angle = np.radians(degrees)
        outwards, along = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
        yaw = _yaw_to(outwards, down)
        far = np.linalg.norm(middle + hold * outwards - base) - FAR
        for opening in (0.04, 0.02):
            # The outer finger is a box of 2.2 cm along the rim and 2.7 cm across it.
            relative = occupied - middle - (hold + opening + 0.010) * outwards
            hit = np.any((np.abs(relative @ outwards) < 0.017) & (np.abs(relative @ along) < 0.016))
            cost = abs(yaw) / (np.pi / 2) + 9 * hit + (opening < 0.04) + 20 * max(0.0, far)
            if cost < least:
                point = np.r_[middle + hold * outwards, high - 0.018]
                best, least = Grasp(point - centre, yaw, opening), cost
    assert best is not None
    return best


def _yaw_to(direction: np.ndarray, down: np.ndarray) -> float:
    """Smallest turn that lays the fingers' axis along a horizontal direction [2], in radians."""
    yaw = np.arctan2(direction[1], direction[0]) - np.arctan2(down[1, 0], down[0, 0])
    return float((yaw + np.pi / 2) % np.pi - np.pi / 2)
