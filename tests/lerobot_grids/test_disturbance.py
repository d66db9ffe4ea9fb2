"""The noise and the pushes on what a scripted expert executes."""

import numpy as np

from lerobot_grids.simulation.disturbance import SIZES, STEPS, UP, Disturbance

ACTION = np.array([0.5, -0.5, 0.9, 0.1, 0.2, 0.3, 1.0], np.float32)


def test_noise_alone_is_added_to_x_y_and_z():
    disturb, same = Disturbance(np.random.default_rng(3), 0.2), np.random.default_rng(3)
    for _ in range(20):
        expected = ACTION.copy()
        expected[:3] += same.normal(0, 0.2, 3)
        assert np.array_equal(disturb(ACTION), np.clip(expected, -1, 1))


def test_pushes_replace_the_motion_for_some_steps():
    disturb = Disturbance(np.random.default_rng(0), 0.0, 0.05)
    executed = np.stack([disturb(ACTION) for _ in range(4000)])
    pushed = (executed[:, :3] != ACTION[:3]).any(1)
    # A push begins in a twentieth of the steps that belong to none.
    assert abs(pushed.mean() - STEPS / (STEPS + 1 / 0.05 - 1)) < 0.03
    assert np.array_equal(executed[:, 3:], np.broadcast_to(ACTION[3:], (4000, 4)))
    sizes = np.linalg.norm(executed[pushed, :2], axis=1)
    assert SIZES[0] - 1e-6 < sizes.min() < sizes.max() < SIZES[1] + 1e-6
    assert np.allclose(executed[pushed, 2], UP * sizes)
    assert set(np.sign(executed[pushed, 0])) == {-1, 1}
