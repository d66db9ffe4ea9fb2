"""Small datasets of a given shape."""

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset


def dataset_of(root, image=(96, 96, 3), state=4, note=False):
    """One short episode with features of these shapes."""
    features = {
        "observation.image": {"dtype": "image", "shape": image, "names": ["height", "width", "channels"]},
        "observation.state": {"dtype": "float32", "shape": (state,), "names": None},
        "action": {"dtype": "float32", "shape": (4,), "names": None},
    }
    if note:
        features["note"] = {"dtype": "string", "shape": (1,), "names": None}
    data = LeRobotDataset.create("local/x", fps=10, features=features, root=root, use_videos=False)
    for _ in range(6):
        frame = {
            "observation.image": np.zeros(image, np.uint8),
            "observation.state": np.zeros(state, np.float32),
            "action": np.zeros(4, np.float32),
            "task": "push",
        }
        data.add_frame(frame | ({"note": "fine"} if note else {}))
    data.save_episode()
    data.finalize()
    return root
