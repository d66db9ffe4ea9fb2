"""MetaWorld: the first image is true, recordings succeed, evaluation counts what happened."""

import gc
import json

import numpy as np
import pytest
from lerobot.datasets.lerobot_dataset import LeRobotDataset

from lerobot_grids.evaluation.films import film
from lerobot_grids.evaluation.rollouts import evaluate
from lerobot_grids.policies import load
from lerobot_grids.simulation.camera import only_geoms_in_view
from lerobot_grids.simulation.environments import make_env_config, task_names
from lerobot_grids.simulation.metaworld import MetaworldEnv, expand_tasks
from lerobot_grids.simulation.metaworld_expert import MetaworldDemonstrator
from lerobot_grids.simulation.recording import record
from lerobot_policy_grids.errors import OutputExistsError, SimulationError


@pytest.fixture(scope="module")
def env():
    env = MetaworldEnv("push-v3")
    yield env
    env.close()


def test_the_image_after_reset_shows_the_true_goal(env):
    """LeRobot's own environment shows the previous episode's goal there."""
    stale = []
    for seed in (1, 2, 3):
        observation, _ = env.reset(seed=seed)
        first = observation["pixels"].astype(int)
        observation, *_ = env.step(np.zeros(4, np.float32))
        second = observation["pixels"].astype(int)
        stale.append(np.abs(first - second).max(axis=-1) > 60)
    # One step of doing nothing moves hardly a pixel; a goal or puck elsewhere changes many.
    assert max(mask.sum() for mask in stale) < 40
    other, _ = env.reset(seed=9)
    assert (np.abs(other["pixels"].astype(int) - first).max(axis=-1) > 60).sum() > 40


def test_same_seed_same_episode(env):
    frames = [env.reset(seed=5)[0] for _ in range(2)]
    assert np.array_equal(frames[0]["pixels"], frames[1]["pixels"])
    assert np.array_equal(frames[0]["agent_pos"], frames[1]["agent_pos"])


def test_only_what_the_camera_cannot_see_is_left_out(env):
    """Beside LeRobot's own `render`, which draws every geom, and mirrors too if they mirror."""
    for seed in (1, 2):
        env.reset(seed=seed)
        for _ in range(3):
            env.step(np.full(4, 0.5, np.float32))
            env.model.mat_reflectance[:] = 0.5
            everything = super(MetaworldEnv, env).render()
            env.model.mat_reflectance[:] = 0
            assert np.array_equal(env.render(), everything)
    groups = env.model.geom_group.copy()
    with only_geoms_in_view(env.model, env._env.data, env._camera):
        assert (env.model.geom_group != groups).sum() > 5
    assert np.array_equal(env.model.geom_group, groups)


def test_closing_an_environment_leaves_others_images_alone():
    """Upstream, an image is black after another environment was closed, or collected as garbage later."""
    env, other = MetaworldEnv("push-v3"), MetaworldEnv("push-v3")
    other.reset(seed=1)
    image = env.reset(seed=5)[0]["pixels"]
    other.close()
    assert np.array_equal(env.render(), image)
    del other
    gc.collect()
    assert np.array_equal(env.render(), image)
    env.close()


def test_images_are_skipped_between_looks():
    env = MetaworldEnv("push-v3", render_interval=4)
    env.reset(seed=1)
    calls = []
    original = env.render
    env.render = lambda: calls.append(env._steps) or original()
    for _ in range(9):
        env.step(np.ones(4, np.float32) * 0.3)
    env.close()
    assert calls == [4, 8]


def test_the_expert_succeeds_and_labels_are_its_own_actions():
    noisy, again, calm = (
        MetaworldDemonstrator("push-v3", noise=noise).demonstrate("push-v3", seed=5001).columns
        for noise in (0.2, 0.2, 0.0)
    )
    assert noisy["observation.image"].shape == (len(noisy["action"]), 96, 96, 3)
    assert np.abs(noisy["action"]).max() <= 1
    assert np.array_equal(noisy["action"], again["action"])
    # The first label does not depend on the noise; the trajectory does.
    assert np.array_equal(noisy["action"][0], calm["action"][0])
    states = [columns["observation.state"] for columns in (noisy, calm)]
    assert states[0].shape != states[1].shape or not np.allclose(*states)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    output = tmp_path_factory.mktemp("record") / "demos"
    count = record(output, MetaworldDemonstrator("push-v3,coffee-push-v3", size=64), episodes=2, workers=1)
    return output, count


def test_a_recording_is_a_lerobot_dataset(recording):
    output, count = recording
    dataset = LeRobotDataset("local/demos", root=output)
    assert dataset.meta.total_episodes == count.episodes == 4
    assert len(dataset) == count.frames
    assert count.stopped is None
    assert sorted(dataset.meta.tasks.index) == ["Push a mug under a coffee machine", "Push the puck to a goal"]
    item = dataset[0]
    assert item["observation.image"].shape == (3, 64, 64)
    assert item["action"].shape == (4,)
    assert item["auxiliary.positions"].shape == (6,)
    assert not list(output.parent.glob(".*"))
    assert sorted(path.name for path in output.iterdir()) == ["data", "meta"]


def test_a_recording_is_never_overwritten(recording):
    with pytest.raises(OutputExistsError, match="already exists"):
        record(recording[0], MetaworldDemonstrator("push-v3"), episodes=1)


def test_the_trained_policy_in_the_package_acts():
    """Of 55/60 in the study; a policy with random weights succeeds in none of these."""
    config = make_env_config("metaworld", "push-v3,coffee-push-v3", None, look_every=8)
    result = evaluate(load("tiny_metaworld"), config, episodes=4, batch_size=4)
    assert result.total.successes >= 5


def test_evaluation_counts_and_films(grids_checkpoint, tmp_path):
    loaded = load(str(grids_checkpoint))
    config = make_env_config("metaworld", "push-v3", {"max_steps": 12}, look_every=8)
    progress = []
    result = evaluate(loaded, config, episodes=3, batch_size=2, on_progress=lambda *args: progress.append(args))
    assert (result.num_tokens, result.num_dense_tokens) == (16, 144)
    (task,) = result.tasks
    assert task.seeds == [100_000, 100_001, 100_002]
    assert task.successes == sum(task.outcomes)
    assert [p[:2] for p in progress] == [("push-v3", 2), ("push-v3", 3)]
    result.save(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["total"]["episodes"] == 3
    assert saved["tasks"][0]["interval"][0] == 0.0

    filmed = make_env_config("metaworld", "push-v3", {"max_steps": 12}, look_every=1)
    files = film(loaded, filmed, tmp_path / "films", episodes=1)
    assert [path.name for path in files] == ["push-v3_100000.mp4", "looks.png"]
    assert all(path.stat().st_size > 1000 for path in files)


def test_a_scripted_policy_is_counted_as_successful(grids_checkpoint):
    """The whole evaluation with the expert's actions in place of the policy's."""
    loaded = load(str(grids_checkpoint))
    config = make_env_config("metaworld", "push-v3", None)
    envs = config.create_envs(1)
    env = envs["push-v3"][0].envs[0].unwrapped
    config.create_envs = lambda n_envs: envs
    import torch

    def expert(batch):
        return torch.tensor(env.expert_policy.get_action(env.raw_observation)).float().clamp(-1, 1)[None]

    loaded.policy.select_action = expert
    loaded.postprocessor = lambda action: action
    assert evaluate(loaded, config, episodes=2, batch_size=1).total.successes == 2


def test_an_environment_that_does_not_fit_is_refused(grids_checkpoint):
    loaded = load(str(grids_checkpoint), rename_map={"observation.image": "observation.images.top"})
    config = make_env_config("metaworld", "push-v3")
    with pytest.raises(SimulationError, match=r"looks through observation\.image; .* shows observation\.images\.top"):
        evaluate(loaded, config, episodes=1)
    loaded = load(str(grids_checkpoint))
    loaded.policy.config.output_features["action"].shape = (7,)
    with pytest.raises(SimulationError, match=r"shape \(7,\), the environment takes \(4,\)"):
        evaluate(loaded, config, episodes=1)


def test_unknown_tasks_and_environments():
    with pytest.raises(SimulationError, match="no task push-v2"):
        expand_tasks("push-v2")
    with pytest.raises(SimulationError, match="no task"):
        expand_tasks(" , ")
    with pytest.raises(SimulationError, match="'gazebo' is unknown"):
        make_env_config("gazebo", None)
    with pytest.raises(SimulationError, match="has no sizes"):
        make_env_config("metaworld", None, {"sizes": 3})


def test_difficulty_groups_are_expanded():
    assert "reach-v3" in expand_tasks("easy")
    assert expand_tasks("push-v3, push-v3") == ["push-v3"]
    assert task_names(make_env_config("metaworld", "push-v3,reach-v3")) == ["push-v3", "reach-v3"]
