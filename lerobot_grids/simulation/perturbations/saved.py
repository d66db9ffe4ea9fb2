"""The scene before it is perturbed."""

from typing import Any

ARRAYS = ("cam_pos", "cam_quat", "cam_fovy", "light_diffuse", "light_dir", "tex_data")
HEADLIGHT = ("ambient", "diffuse")


class SavedScene:
    """What perturbations change in a MuJoCo model; it is restored before each one.

    Args:
        env: An environment with a MuJoCo `model`, unperturbed.
    """

    def __init__(self, env: Any) -> None:
        model = env.model
        self._arrays = {name: getattr(model, name).copy() for name in ARRAYS}
        self._headlight = {name: getattr(model.vis.headlight, name).copy() for name in HEADLIGHT}

    def restore(self, env: Any) -> None:
        """Undo all perturbations. The renderer keeps textures: who changes one must send it again."""
        for name, value in self._arrays.items():
            getattr(env.model, name)[:] = value
        for name, value in self._headlight.items():
            getattr(env.model.vis.headlight, name)[:] = value
