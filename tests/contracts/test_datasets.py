"""Every kind of dataset trains and saves what its files say, or is refused in one line with nothing written.

benchmarks/dataset_matrix.py does this with the families of `trials` and with lerobot-train, too.
"""

import pytest

import trials
import zoo

# Plain variants of others, which only the benchmark runs.
PLAIN = {
    *("png at 30 fps", "png at 50 fps", "h264 video", "two cameras", "four cameras", "portrait", "image names rgb"),
    *("7 joints", "14 joints", "joint names null", "state wider than action", "two names exchanged", "several tasks"),
    *("foreign state name", "no camera", "no action", "narrow joints far from zero"),
}
# With every family; the tiny one gets all that are not plain.
SHARED = ("three cameras of mixed sizes", "foreign state name, renamed")


@pytest.fixture(scope="module", autouse=True)
def _small(tmp_path_factory):
    with trials.small_world(tmp_path_factory.mktemp("tokenizers")):
        yield


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return trials.Checkpoints(tmp_path_factory.mktemp("checkpoints"))


def require(outcome, expected, said=""):
    assert outcome.fits(expected, said), f"{outcome.status}: {outcome.line}\n{outcome.printed[-2000:]}"


@pytest.mark.parametrize("name", [name for name in zoo.DATASETS if name not in PLAIN])
def test_fit_on_every_kind_of_dataset(name, tmp_path):
    case = zoo.DATASETS[name]
    data = case.make(tmp_path / "data")
    outcome = trials.fit(data, tmp_path / "run", "tiny", "tiny_smolvla", *case.options, "--trainer.logger", "false")
    require(outcome, case.expected("tiny_smolvla"), case.said)


def test_the_plain_ones_exist():
    assert zoo.DATASETS.keys() >= PLAIN


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("family", trials.FAMILIES[1:])
def test_fit_of_every_family(family, name, checkpoints, tmp_path):
    case = zoo.DATASETS[name]
    data = case.make(tmp_path / "data")
    options: list[str] = []
    if family in trials.FRESH:
        policy, options, _ = trials.fresh(family)
    else:
        policy = checkpoints.get(family, case.cameras, case.has_state)
    outcome = trials.fit(data, tmp_path / "run", policy, family, *options, *case.options, "--trainer.logger", "false")
    require(outcome, case.expected(family), case.said_of(family))


def test_a_camera_that_is_not_normalised_is_named(checkpoints, tmp_path):
    case = zoo.DATASETS["camera called observation.image"]
    data = case.make(tmp_path / "data")
    outcome = trials.fit(data, tmp_path / "run", checkpoints.get("xvla", case.cameras), "xvla")
    require(outcome, zoo.TRAINS, "gets the pixels of observation.image as they are")


def test_a_trunk_that_cannot_be_trained_is_refused_at_the_start(checkpoints, tmp_path):
    case = zoo.DATASETS["png at 10 fps"]
    data = case.make(tmp_path / "data")
    outcome = trials.fit(data, tmp_path / "run", checkpoints.get("pi0", case.cameras), "pi0", "--reducer", "fastv")
    require(outcome, "only when it acts")


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("png at 10 fps", ""),
        ("joint names grouped", ""),
        ("40 joints", "has 40 dimensions, and pi05 takes at most 32"),
        ("very long task", ""),
        ("long tasks alike at the start", "cannot tell apart"),
        ("no quantiles", "has no 'q01' of 'observation.state'.*augment_dataset_quantile_stats"),
        ("foreign state name, renamed", "LeRobot renames features and not their statistics"),
        ("NaN in an action", "DatasetError: 'action' holds NaN or infinity at frame"),
    ],
)
def test_lerobot_train_saves_nothing_wrong(name, line, checkpoints, tmp_path):
    case = zoo.DATASETS[name]
    data = case.make(tmp_path / "data")
    base = trials.flags_of(checkpoints.get("pi05", case.cameras))
    if case.train:
        base = [f"--policy.path={checkpoints.wrapped('pi05', case.cameras)}"]
    require(trials.lerobot_train(data, tmp_path / "run", base, "pi05", *case.train), line or zoo.TRAINS)
