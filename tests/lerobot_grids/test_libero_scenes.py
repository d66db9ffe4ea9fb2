"""LIBERO itself, where the extra `libero` is installed: its scenes, dealt layouts, the expert, recordings, `eval`."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_grids.choices import PERTURBATIONS, SEVERITIES
from lerobot_grids.data import PLACES
from lerobot_grids.evaluation.rollouts import evaluate
from lerobot_grids.policies import load
from lerobot_grids.simulation.environments import make_demonstrator, make_env_config, task_names
from lerobot_grids.simulation.perturbations import parse_perturbations
from lerobot_grids.simulation.recording import record
from lerobot_policy_grids.errors import SimulationError

pytestmark = pytest.mark.skipif(find_spec("libero") is None, reason="the extra 'libero' is not installed")

TASK, SIZE = "libero_object_3", 64
PIXELS = {"observation_height": SIZE, "observation_width": SIZE}


def environment(layout="dealt", drawing="fast", **options):
    from lerobot_grids.simulation.libero.environment import LiberoConfig

    config = LiberoConfig(task=TASK, layout=layout, drawing=drawing, **PIXELS, **options)
    return config.make("libero_object", 3)


@pytest.fixture(scope="module")
def env():
    env = environment()
    yield env
    env.close()


def positions(env):
    return np.stack([pose.position for pose in env.poses().values()])


def test_the_same_seed_deals_the_same_whatever_came_before(env):
    first = env.reset(seed=7)[0]
    places = positions(env)
    env.reset(seed=8)
    assert np.abs(positions(env) - places).max() > 0.05
    again = env.reset(seed=7)[0]
    assert np.array_equal(positions(env), places)
    for camera in ("image", "image2"):
        assert np.array_equal(again["pixels"][camera], first["pixels"][camera])


@pytest.mark.parametrize("drawing", ["fast", "libero"])
def test_environments_beside_each_other_draw_as_if_alone(env, drawing):
    still = np.array([0.0, 0, 0, 0, 0, 0, -1])
    alone = env.reset(seed=7)[0]["pixels"], env.step(still)[0]["pixels"]
    other = environment(drawing=drawing)
    own = other.reset(seed=7)[0]["pixels"]
    beside = env.reset(seed=7)[0]["pixels"], env.step(still)[0]["pixels"]
    again = other.observe()["pixels"]
    env.observe()
    other.close()
    after = env.reset(seed=7)[0]["pixels"], env.step(still)[0]["pixels"]
    for camera in ("image", "image2"):
        assert np.array_equal(own[camera], again[camera])
        for seen in (beside, after):
            for first, second in zip(alone, seen, strict=True):
                assert np.array_equal(first[camera], second[camera])


def test_named_objects_are_where_the_image_shows_them(env):
    """Black out all but the pixels around the given place: the object's colour must be among them."""
    from lerobot_grids.simulation.libero.expert import Expert

    for seed in range(3):
        observation, _ = env.reset(seed=seed)
        before = observation["pixels"]["image"][::-1, ::-1].astype(int)
        x, y = env.image_place("agentview_image", Expert(env.simulation).object_position()) * SIZE
        # Without the object, pixels change at the place that was given, and nowhere far from it.
        data = env.simulation.sim.data
        joint = env.simulation.objects_dict["bbq_sauce_1"].joints[0]
        data.set_joint_qpos(joint, np.r_[5, 5, -1, 1, 0, 0, 0])
        env.simulation.sim.forward()
        after = env._format_raw_obs(env.simulation._get_observations())["pixels"]["image"][::-1, ::-1].astype(int)
        rows, columns = np.nonzero(np.abs(before - after).sum(-1) > 30)
        assert len(rows) > 3
        assert np.hypot(columns.mean() + 0.5 - x, rows.mean() + 0.5 - y) < 3


def test_a_zoom_draws_the_middle_larger_and_nothing_else(env):
    zoomed = environment(zoom=2.0)
    seen = [one.reset(seed=7)[0]["pixels"] for one in (env, zoomed, zoomed)]
    assert np.array_equal(positions(zoomed), positions(env))
    assert np.array_equal(seen[0]["image2"], seen[1]["image2"])
    # Once, not again at each reset.
    assert np.array_equal(seen[1]["image"], seen[2]["image"])
    quarter, half = SIZE // 4, SIZE // 2
    middle = seen[0]["image"][quarter:-quarter, quarter:-quarter].astype(float)
    smaller = seen[1]["image"].reshape(half, 2, half, 2, 3).mean((1, 3))
    # Fast drawing has no multisampling, so edges differ.
    assert np.abs(middle - smaller).mean() < 0.5 * np.abs(seen[0]["image"][::2, ::2] - middle).mean()
    for place in env.poses().values():
        apart = [one.image_place("agentview_image", place.position) - 0.5 for one in (env, zoomed)]
        assert np.allclose(2 * apart[0], apart[1], atol=1e-5)
    zoomed.close()


def test_perturbations_change_what_they_say_and_nothing_else(env):
    from lerobot_grids.simulation.libero.expert import Expert
    from lerobot_grids.simulation.perturbations.libero import KINDS

    assert tuple(KINDS) == PERTURBATIONS["libero"]
    # In the layout of this seed the object has enough pixels for the smallest panel to hide some.
    plain = env.reset(seed=11)[0]["pixels"]
    where = env.image_place("agentview_image", Expert(env.simulation).object_position()) * SIZE
    perturbed = environment(perturb="view:3")
    for kind in KINDS:
        changes = []
        for severity in SEVERITIES:
            perturbed.perturbations[:] = parse_perturbations(f"{kind}:{severity}", "libero")
            # An episode is a function of its seed, whatever came before.
            perturbed.reset(seed=8)
            seen = perturbed.reset(seed=11)[0]["pixels"]
            assert np.array_equal(positions(perturbed), positions(env))
            apart = {camera: np.abs(seen[camera].astype(int) - plain[camera])[::-1, ::-1].sum(-1) for camera in seen}
            assert apart["image2"].any() == (kind in ("light", "noise", "novel")), kind
            if kind in ("occlusion", "novel"):
                # Only what is at the named object.
                rows, columns = np.nonzero(apart["image"] > 30)
                assert np.hypot(columns + 0.5 - where[0], rows + 0.5 - where[1]).max() < 8, kind
            else:
                assert (apart["image"] > 0).mean() > 0.3, kind
            changes.append(apart["image"].sum())
        # A small object has few rows of pixels, so two severities may hide the same ones.
        assert changes == sorted(changes), (kind, changes)
        assert changes[0] < changes[2], (kind, changes)
    perturbed.close()


def test_images_between_looks_are_repeated():
    env = environment(render_interval=3)
    frames = [env.reset(seed=1)[0]["pixels"]["image2"]]
    frames += [env.step(np.array([0.5, 0.5, -0.5, 0, 0, 0, -1]))[0]["pixels"]["image2"] for _ in range(3)]
    env.close()
    assert np.array_equal(frames[0], frames[1])
    assert np.array_equal(frames[0], frames[2])
    assert not np.array_equal(frames[0], frames[3])


def test_the_default_is_lerobots_own():
    from lerobot.envs.libero import LiberoEnv, _get_suite

    def episodes(env):
        """Two, each with its first two observations. LeRobot's environments draw wrong ones beside others."""
        seen = [(env.reset(seed=3)[0]["pixels"], env.step(np.full(7, 0.3))[0]["pixels"]) for _ in range(2)]
        env.close()
        return seen

    theirs = LiberoEnv(_get_suite("libero_object"), 3, "libero_object", obs_type="pixels_agent_pos", **PIXELS)
    expected, got = episodes(theirs), episodes(environment(layout="official", drawing="libero"))
    for camera in ("image", "image2"):
        for own, same in zip(expected, got, strict=True):
            assert np.array_equal(own[0][camera], same[0][camera])
            assert np.array_equal(own[1][camera], same[1][camera])


def test_names_of_tasks():
    from lerobot_grids.simulation.libero.environment import parse_tasks

    assert parse_tasks("libero_object_3,libero_object_1") == {"libero_object": [1, 3]}
    assert parse_tasks("libero_goal") == {"libero_goal": list(range(10))}
    for wrong in ("libero_object_10", "libero_objects", "", "libero_10_x"):
        with pytest.raises(SimulationError, match=rf"has no task '{wrong}'; give a suite"):
            parse_tasks(wrong)
    with pytest.raises(SimulationError, match="task_id 10 out of range"):
        make_env_config("libero", "libero_object", {"task_ids": [10]})
    config = make_env_config("libero", TASK, PIXELS, layout="dealt")
    assert task_names(config) == [TASK]
    with pytest.raises(SimulationError, match=r"zoom is 0\.5, expected 1"):
        make_env_config("libero", TASK, {**PIXELS, "zoom": 0.5})
    with pytest.raises(SimulationError, match="libero_goal cannot be dealt anew"):
        make_env_config("libero", "libero_goal", layout="dealt")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("libero") / "demos"
    demonstrator = make_demonstrator("libero", TASK, size=SIZE, noise=0.1, layout="dealt")
    return folder, record(folder, demonstrator, episodes=1, workers=1)


def test_a_recording_has_the_names_of_lerobots_environment(recording):
    folder, count = recording
    dataset = LeRobotDataset("local/demos", root=folder)
    item = dataset[0]
    assert len(dataset) == count.frames
    assert item["task"] == "pick up the bbq sauce and place it in the basket"
    assert item["observation.images.image"].shape == item["observation.images.image2"].shape == (3, SIZE, SIZE)
    assert item["observation.state"].shape == (8,)
    assert item["action"].shape == (7,)
    places = torch.stack([dataset[i][PLACES] for i in range(len(dataset))])
    # The agent's camera sees object and basket all the time; the hand's camera does not.
    assert ((places[:, :4] > 0) & (places[:, :4] < 1)).all()
    assert not ((places[:, 4:] > 0) & (places[:, 4:] < 1)).all()


def test_a_policy_of_a_recording_is_evaluated(recording, tmp_path):
    from lerobot_grids_cli.main import main

    output = tmp_path / "run"
    main(["fit", "--policy=tiny", "--tokens=4", f"--dataset={recording[0]}", f"--output={output}", "--steps=2"])
    config = make_env_config("libero", TASK, {**PIXELS, "drawing": "fast", "episode_length": 12}, layout="dealt")
    result = evaluate(load(str(output)), config, episodes=2, batch_size=1)
    assert (result.layout, result.environment) == ("dealt", "grids_libero")
    assert [task.task for task in result.tasks] == [TASK]
    assert result.total.episodes == 2
