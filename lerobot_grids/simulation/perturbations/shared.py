"""Kinds that change any MuJoCo scene."""

from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from . import Filter, Perturbation


def change_light(env: Any, perturbation: Perturbation, random: np.random.Generator) -> None:
    """Lighting: make all lights dimmer (down to a third), and change their colour and direction.

    Lights never get brighter: table and floor already have the renderer's maximum and would not change.
    """
    model, strength = env.model, perturbation.strength
    gains = random.uniform(0.2, 1, 3)
    gains = (gains / gains.max() * random.uniform(0.35, 0.6)) ** strength
    for part in (model.light_diffuse, model.vis.headlight.ambient, model.vis.headlight.diffuse):
        part[:] *= gains
    angle = strength * np.radians(random.uniform(60, 120)) * random.choice([-1, 1])
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    model.light_dir[:] = model.light_dir @ turn.T


def add_noise(env: Any, perturbation: Perturbation, random: np.random.Generator) -> Filter:
    """Noise: blur each image and add noise, which is new at each step; see `blur_and_noise`."""
    return lambda image, camera, of_the_step: blur_and_noise(image, perturbation.strength, of_the_step)


def blur_and_noise(image: np.ndarray, strength: float, random: np.random.Generator) -> np.ndarray:
    """Add blur (up to 1.5 % of the width) and Gaussian noise (up to 20 % of the range) to an image uint8 [h, w, 3]."""
    blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.015 * image.shape[1] * strength))
    noise = random.normal(0, 0.2 * 255 * strength, image.shape)
    return np.clip(np.round(np.asarray(blurred) + noise), 0, 255).astype(np.uint8)
