"""Perturbed MetaWorld: the same for every policy, each kind changes its own thing only, more with each severity."""

import json

import numpy as np
import pytest

from lerobot_grids.choices import PERTURBATIONS, SEVERITIES
from lerobot_grids.evaluation.films import film
from lerobot_grids.evaluation.rollouts import evaluate
from lerobot_grids.policies import load
from lerobot_grids.simulation.environments import make_env_config
from lerobot_grids.simulation.metaworld import MetaworldEnv, expand_tasks
from lerobot_grids.simulation.paraphrases import paraphrase
from lerobot_grids.simulation.perturbations import Perturbation, parse_perturbations
from lerobot_grids.simulation.perturbations.metaworld import KINDS
from lerobot_policy_grids.errors import SimulationError

SEED = 100_000
LOOKS_ONLY = ("camera", "light", "background", "noise")


def first(perturb="", seed=SEED, task="push-v3"):
    """Image, state, positions of object and goal, and instruction at the start of an episode in a new environment."""
    env = MetaworldEnv(task, perturbations=parse_perturbations(perturb, "metaworld"))
    observation, _ = env.reset(seed=seed)
    seen = (observation["pixels"].astype(int), observation["agent_pos"], env.positions, env.task_description)
    env.close()
    return seen


@pytest.fixture(scope="module")
def nominal():
    return first()


@pytest.fixture(scope="module")
def perturbed():
    return {(kind, severity): first(f"{kind}:{severity}") for kind in KINDS for severity in SEVERITIES}


def distance(kind, a, b):
    """How far apart two starts are, in what this kind changes."""
    image, state, positions, words = a
    other_image, other_state, _, other_words = b
    if kind in LOOKS_ONLY:
        return np.abs(image - other_image).mean()
    if kind == "robot":
        return np.linalg.norm(state[:2] - other_state[:2])
    if kind == "layout":
        return max(abs(positions[0]), abs(positions[3])) - 0.08  # metres into the outermost strip
    kept = set(words.lower().split()) & set(other_words.lower().split())
    return len(words.split()) + len(other_words.split()) - 2 * len(kept)


def test_the_command_line_knows_every_kind():
    assert tuple(KINDS) == PERTURBATIONS["metaworld"]


@pytest.mark.parametrize("kind", KINDS)
def test_severity_is_monotone(kind, nominal, perturbed):
    distances = [distance(kind, perturbed[kind, severity], nominal) for severity in SEVERITIES]
    assert 0 < distances[0] < distances[1] < distances[2]
    if kind == "robot":
        # 4, 8 and 12 cm, as the physics of the reset lets the hand come to rest.
        assert np.allclose(distances, [0.04, 0.08, 0.12], atol=0.01)
    if kind == "layout":
        assert [int(d * 50) for d in distances] == [0, 1, 2]  # strips of 2 cm, the first inside the training box


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_its_own_thing_only(kind, nominal, perturbed):
    for severity in SEVERITIES:
        image, state, positions, words = perturbed[kind, severity]
        assert np.array_equal(state, nominal[1]) == (kind != "robot")
        assert np.array_equal(positions, nominal[2]) == (kind != "layout")
        assert (words == nominal[3]) == (kind != "instruction")
        assert np.array_equal(image, nominal[0]) == (kind == "instruction")


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_is_a_function_of_its_seed(kind, perturbed):
    """Also after other episodes, beside another environment, and again."""
    envs = [MetaworldEnv("push-v3", perturbations=[Perturbation(kind, 2)]) for _ in range(2)]
    for seed in (7, SEED):
        observations = [env.reset(seed=seed + other)[0] for other, env in enumerate(envs)]
    image, state, positions, words = perturbed[kind, 2]
    assert np.array_equal(observations[0]["pixels"], image)
    # Its picture, drawn after the other environment's was.
    assert np.array_equal(envs[0].render(), image)
    assert np.array_equal(observations[0]["agent_pos"], state)
    assert np.array_equal(envs[0].positions, positions)
    assert envs[0].task_description == words
    assert kind == "instruction" or not np.array_equal(observations[1]["pixels"], image)
    for env in envs:
        env.close()


def test_noise_is_new_at_each_step_and_the_same_in_each_run():
    runs = []
    for _ in range(2):
        env = MetaworldEnv("push-v3", perturbations=[Perturbation("noise", 1)])
        clean = MetaworldEnv("push-v3")
        for one in (env, clean):
            one.reset(seed=SEED)
        noises = [env.step(np.zeros(4, np.float32))[0]["pixels"].astype(int) for _ in range(2)]
        for step in range(2):
            noises[step] -= clean.step(np.zeros(4, np.float32))[0]["pixels"]
        runs.append(noises)
        env.close()
        clean.close()
    assert not np.array_equal(runs[0][0], runs[0][1])
    assert np.array_equal(runs[0], runs[1])
    # A third of 20 % of the range, less what is clipped and what the blur of 0.48 pixels adds.
    assert 0.75 * 17 < runs[0][0].std() < 1.25 * 17


def test_an_unperturbed_episode_is_as_before():
    """The scene returns to what it was, array by array, and no perturbation is no wrapper."""
    env = MetaworldEnv("push-v3")
    env.reset(seed=SEED)
    assert env._perturber is None
    names = ("cam_pos", "cam_quat", "cam_fovy", "light_diffuse", "light_dir", "tex_data", "mat_rgba", "geom_rgba")
    before = {name: getattr(env._env.model, name).copy() for name in names}
    everything = MetaworldEnv("push-v3", perturbations=[Perturbation(kind, 3) for kind in KINDS])
    everything.reset(seed=SEED)
    changed = [name for name in names if not np.array_equal(getattr(everything._env.model, name), before[name])]
    assert changed == ["cam_pos", "cam_quat", "cam_fovy", "light_diffuse", "light_dir", "tex_data"]
    everything._perturber._nominal.restore(everything)
    for name, value in before.items():
        assert np.array_equal(getattr(everything._env.model, name), value), name
    assert everything.task_description == env.task_description
    assert np.array_equal(everything._env.hand_init_pos, env._env.hand_init_pos)
    assert everything._env._random_reset_space == env._env._random_reset_space
    env.close()
    everything.close()


def test_the_reset_after_a_success_keeps_the_perturbation(perturbed):
    env = MetaworldEnv("push-v3", perturbations=[Perturbation("camera", 2)])
    env.reset(seed=SEED)
    camera = env._env.model.cam_pos.copy()
    env.reset()
    assert np.array_equal(env._env.model.cam_pos, camera)
    env.close()


def test_the_goal_that_experts_are_told_is_the_true_one():
    """MetaWorld clips it to the training box, and an expert would push to the border of that."""
    env = MetaworldEnv("push-v3", perturbations=[Perturbation("layout", 3)])
    env.reset(seed=SEED)
    assert 0.12 < abs(env._env._target_pos[0]) < 0.14
    assert np.allclose(env.positions[3:], env._env._target_pos)
    env.close()


@pytest.mark.parametrize("task", expand_tasks("easy,medium,hard,very_hard"))
def test_every_instruction_has_paraphrases(task):
    from lerobot.envs.metaworld import TASK_DESCRIPTIONS

    words = TASK_DESCRIPTIONS[task]
    for seed in range(5):
        said = [paraphrase(words, severity, np.random.default_rng(seed)) for severity in SEVERITIES]
        assert words[1:] in said[0]
        assert len({words, *said}) == 4, said
        assert said[1] in said[2]


def test_errors_are_one_line_and_say_what_to_do():
    for text, message in {
        "fog:1": "'fog' is unknown in metaworld; choose from camera, light",
        "camera:9": "'camera:9' has an unknown severity; write camera: and one of 1, 2, 3",
        "camera": "'camera' has no severity; write",
        "camera:1,camera:2": "'camera' is given twice",
    }.items():
        with pytest.raises(SimulationError, match=message) as error:
            make_env_config("metaworld", "push-v3", perturb=text)
        assert "\n" not in str(error.value)
    with pytest.raises(SimulationError, match="environment 'pusht' cannot be perturbed"):
        make_env_config("pusht", None, perturb="camera:1")


def test_the_result_and_the_film_are_of_the_perturbed_task(grids_checkpoint, tmp_path):
    loaded = load(str(grids_checkpoint))
    config = make_env_config("metaworld", "push-v3", {"max_steps": 4}, look_every=8, perturb="background:3,noise:1")
    evaluate(loaded, config, episodes=1).save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["perturb"] == "background:3,noise:1"
    seen = []
    original = loaded.policy.select_action
    loaded.policy.select_action = lambda batch: seen.append(batch["observation.image"]) or original(batch)
    film(loaded, config, tmp_path / "films", episodes=1)
    image = first("background:3,noise:1")[0]
    assert np.array_equal((seen[0][0] * 255).round().permute(1, 2, 0).numpy(), image)
