"""Write what `lerobot-record` writes of an SO-101, without an SO-101: python examples/so101/pretend.py FOLDER

Six joints in degrees, a camera in front and one at the wrist (AV1 video, 30 frames per second), one instruction. A
drawn arm moves over a drawn red cube, lowers, and closes its gripper. The joints follow from where the cube is, so that
a policy has to look. Numbers and pictures are made up: use it to try the commands, not to judge a policy.
"""

import os
import sys
from pathlib import Path
from typing import Any

# The encoder prints its settings for each video.
os.environ.setdefault("SVT_LOG", "1")

import datasets
import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset

JOINTS = ("shoulder_pan", "shoulder_lift", "elbow_flex", "wrist_flex", "wrist_roll", "gripper")
CAMERAS = ("observation.images.front", "observation.images.wrist")
HEIGHT, WIDTH, FPS = 240, 320, 30
EPISODES, FRAMES = 12, 60
TASK = "pick up the cube"
TABLE, CUBE, ARM = (150, 140, 120), (200, 30, 30), (40, 60, 160)


def features() -> dict[str, Any]:
    """What LeRobot calls the joints and cameras of this robot."""
    names = [f"{joint}.pos" for joint in JOINTS]
    vector = {"dtype": "float32", "shape": (len(names),), "names": names}
    image = {"dtype": "video", "shape": (HEIGHT, WIDTH, 3), "names": ["height", "width", "channels"]}
    return {"action": vector, "observation.state": vector} | dict.fromkeys(CAMERAS, image)


def joints_over(place: np.ndarray, height: float, grip: float) -> np.ndarray:
    """Joints [6] that hold the gripper over a place [2] of the table, in degrees; the gripper goes from 0 to 100."""
    x, y = place[0] - 0.5, 1.2 - place[1]
    reach = np.hypot(x, y)
    lift = 90 * reach - 20 * height
    return np.array([np.degrees(np.arctan2(x, y)), lift - 60, 80 - lift, 30 + 40 * height, 0, 100 * grip], np.float32)


def draw(marks: list[tuple[np.ndarray, float, tuple[int, int, int]]]) -> np.ndarray:
    """A picture [height, width, 3] of the table with squares: centre in [0, 1], half of a side, colour."""
    pixels = np.full((HEIGHT, WIDTH, 3), TABLE, np.uint8)
    for (x, y), half, colour in marks:
        column, row, side = int(x * WIDTH), int(y * HEIGHT), int(half * HEIGHT)
        pixels[max(row - side, 0) : max(row + side, 0), max(column - side, 0) : max(column + side, 0)] = colour
    return pixels


def episode(random: np.random.Generator) -> list[dict[str, Any]]:
    """The frames of one demonstration."""
    cube, start = random.uniform(0.2, 0.8, 2), random.uniform(0.2, 0.8, 2)
    frames, before = [], joints_over(start, 1, 1)
    for step in range(FRAMES):
        there = min(step / (0.6 * FRAMES), 1)
        low = np.clip((step / FRAMES - 0.6) / 0.25, 0, 1)
        hand = start + (cube - start) * there
        after = joints_over(hand, 1 - low, 1.0 if step < 0.9 * FRAMES else 0.2)
        front = draw([(cube, 0.05, CUBE), (hand, 0.03 + 0.02 * (1 - low), ARM)])
        wrist = draw([((cube - hand) * 2 + 0.5, 0.1 + 0.1 * low, CUBE)])
        pictures = dict(zip(CAMERAS, (front, wrist), strict=True))
        frames.append({"observation.state": before, "action": after, "task": TASK} | pictures)
        before = after
    return frames


def main(folder: str) -> None:
    """Record all episodes."""
    datasets.disable_progress_bars()
    root, random = Path(folder), np.random.default_rng(0)
    dataset = LeRobotDataset.create(
        f"local/{root.name}", fps=FPS, features=features(), root=root, robot_type="so_follower", use_videos=True
    )
    for _ in range(EPISODES):
        for frame in episode(random):
            dataset.add_frame(frame)
        dataset.save_episode()
    dataset.finalize()
    print(f"{folder}: {EPISODES} episodes of {FRAMES} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
