"""Draw LIBERO's perturbations: a row for each kind, two dealt episodes from both cameras.

python benchmarks/libero/sheet.py docs/libero-perturbations.png
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from lerobot_grids.evaluation.films import contact_sheet
from lerobot_grids.simulation.environments import make_env_config
from lerobot_grids.simulation.perturbations.libero import KINDS

SIZE, SEEDS = 120, (7, 9)
PIXELS = {"observation_height": SIZE, "observation_width": SIZE, "drawing": "fast"}


def images(task: str, perturb: str) -> list[np.ndarray]:
    """First images of two episodes as LeRobot gives them to policies, both cameras of each."""
    config = make_env_config("libero", task, PIXELS, layout="dealt", perturb=perturb)
    suite, (number,) = next(iter(config.chosen.items()))
    env = config.make(suite, number)
    seen = [env.reset(seed=seed)[0]["pixels"] for seed in SEEDS]
    env.close()
    return [frame[::-1, ::-1] for pixels in seen for frame in pixels.values()]


def titled(image: np.ndarray, title: str) -> np.ndarray:
    """The image with a title in its corner."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    ImageDraw.Draw(picture).text((5, 3), title, fill=(255, 255, 255), stroke_width=1, stroke_fill=(0, 0, 0))
    return np.asarray(picture)


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--task", default="libero_object_3")
    parser.add_argument("--severity", type=int, default=3)
    asked = parser.parse_args()
    rows = []
    for perturb in ("", *(f"{kind}:{asked.severity}" for kind in KINDS)):
        first, *others = images(asked.task, perturb)
        rows.append([titled(first, perturb or "unperturbed"), *others])
    contact_sheet(rows, asked.output)
    # A palette that includes rare colours, such as a small object's, needs a fraction of the bytes.
    picture = Image.open(asked.output).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE).save(
        asked.output, optimize=True
    )


if __name__ == "__main__":
    main()
