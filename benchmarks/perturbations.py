"""Show the perturbations in a picture, and count how often the scripted expert succeeds with them.

python benchmarks/perturbations.py sheet docs/perturbations.png
python benchmarks/perturbations.py expert benchmarks/results/perturbations.jsonl 10
"""

import sys
import warnings
from pathlib import Path
from textwrap import fill

import numpy as np
import results
from PIL import Image, ImageDraw

from lerobot_grids.choices import SEVERITIES
from lerobot_grids.evaluation.films import contact_sheet
from lerobot_grids.simulation.metaworld import DEFAULT_TASKS, MetaworldEnv
from lerobot_grids.simulation.metaworld_expert import demonstrate
from lerobot_grids.simulation.perturbations import Perturbation
from lerobot_grids.simulation.perturbations.metaworld import KINDS

SHOWN = {"push-v3": 100_000, "coffee-push-v3": 100_002}
SIZE, LABEL_HEIGHT, FIRST_SEED = 112, 52, 100_000


def sheet(path: Path) -> None:
    """Draw the first images of two episodes: one row per kind; unperturbed, then one column per severity."""
    rows: list[list[np.ndarray]] = []
    for kind in KINDS:
        row: list[np.ndarray] = []
        for task, seed in SHOWN.items():
            for severity in (0, *SEVERITIES):
                env = MetaworldEnv(task, SIZE, perturbations=[Perturbation(kind, severity)] if severity else None)
                observation, _ = env.reset(seed=seed)
                title = f"{kind}:{severity}" if severity else "unperturbed"
                # An image does not show the instruction, so print it.
                row.append(label(observation["pixels"], env.task_description if kind == "instruction" else title))
                env.close()
        rows.append(row)
    contact_sheet(rows, path)
    # A palette that includes rare colours shows the differences and needs a quarter of the bytes.
    picture = Image.open(path).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(path, optimize=True)


def label(image: np.ndarray, title: str) -> np.ndarray:
    """Add a title above an image."""
    picture = Image.new("RGB", (image.shape[1], image.shape[0] + LABEL_HEIGHT))
    picture.paste(Image.fromarray(image), (0, LABEL_HEIGHT))
    ImageDraw.Draw(picture).multiline_text(
        (4, LABEL_HEIGHT - 3), fill(title, 17), fill=(255, 255, 255), spacing=2, anchor="ld"
    )
    return np.asarray(picture)


def expert(path: Path, episodes: int) -> None:
    """Count successes of the scripted expert per task, kind and severity."""
    warnings.filterwarnings("ignore", "Constant", UserWarning)
    counts: dict[str, dict[str, int]] = {}
    for task in DEFAULT_TASKS:
        for perturbations in ([], *([Perturbation(kind, severity)] for kind in KINDS for severity in SEVERITIES)):
            # The expert needs no images, so render one per episode only.
            env = MetaworldEnv(task, render_interval=10_000, perturbations=perturbations)
            count = sum(
                demonstrate(env, seed, noise=0.0) is not None for seed in range(FIRST_SEED, FIRST_SEED + episodes)
            )
            env.close()
            name = str(perturbations[0]) if perturbations else "none"
            counts.setdefault(task, {})[name] = count
            print(task, name, f"{count}/{episodes}", flush=True)
    what = {"episodes": episodes, "first_seed": FIRST_SEED}
    results.put(path, [{"kind": "expert", "task": task} | what | {"successes": n} for task, n in counts.items()])


if __name__ == "__main__":
    if sys.argv[1] == "sheet":
        sheet(Path(sys.argv[2]))
    else:
        expert(Path(sys.argv[2]), int(sys.argv[3]))
