"""`lerobot-grids view`: where a policy looks along an episode, in pixels and in figures."""

import json
import sys
from importlib.util import find_spec

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lerobot_grids.looks.drawing import HATCH, LOST, OTHER, PADDING, TRUE, draw
from lerobot_grids.looks.episode import Episode, open_episode
from lerobot_grids.looks.points import look
from lerobot_grids.looks.sheets import Line, Row, sheet
from lerobot_grids.policies import load
from lerobot_grids_cli.main import main
from lerobot_policy_grids.looks import Points
from lerobot_policy_grids.reducers import ReducerConfig, TokenLayout, reducer_config
from lerobot_policy_grids.reducers.base import MapReducer

WHOLE, WIDE = (0.0, 0.0, 1.0, 1.0), (0.0, 0.25, 1.0, 0.75)
GREY = np.full((48, 96, 3), 90, np.uint8)


def near(picture, colour, tolerance=12):
    """Rows and columns of the pixels of a colour."""
    return np.argwhere((np.abs(picture.astype(int) - colour) <= tolerance).all(-1))


# What a token reads.


def probed(name, region, k=4, **options):
    """An impulse in every cell: how much of each the tokens hold, [k, rows, columns], and their coordinates."""
    rows, columns = 8, 12
    layout = TokenLayout((rows, columns), rows * columns, ("a",), 0, 0, (region,))
    plain = {"value_rank": 0, "geometry_width": 0, "condition_on": []} if name == "grids" else {}
    plain |= {"geometry_width": 0, "condition_on": ["image"]} if name == "mean" else {}
    reducer = reducer_config(name, num_tokens=k, **plain | options).build(layout).eval()
    # The mean's offsets have no window: small ones stay in the picture.
    for parameter in reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.02 if name == "mean" else 0.3)
    impulses = torch.eye(rows * columns).reshape(1, rows, columns, -1)
    sampled = reducer(impulses)
    return reducer, sampled.tokens[0].detach().reshape(k, rows, columns), sampled.coordinates[0].detach()


MAPS = [
    *((name, {}) for name in ("grids", "mean", "uniform", "pool", "random")),
    *(("mean", {"interpolation": how}) for how in ("bilinear", "nearest")),
    ("grids", {"reading_width": 2.5}),
    ("pool", {"k": 10}),
]


@pytest.mark.parametrize("region", [WHOLE, WIDE], ids=["whole", "letterbox"])
@pytest.mark.parametrize(("name", "options"), MAPS, ids=lambda value: str(value))
def test_a_disc_is_as_wide_as_a_token_reads(name, options, region):
    reducer, weights, coordinates = probed(name, region, **options)
    across, down = reducer.reads(len(weights))
    _, rows, columns = weights.shape
    y, x = torch.meshgrid(torch.arange(rows) + 0.5, torch.arange(columns) + 0.5, indexing="ij")
    farthest = [0.0, 0.0]
    for token, (centre_x, centre_y) in zip(weights, coordinates * torch.tensor([columns, rows]), strict=True):
        read = token.abs() > 1e-6
        for axis, distance in enumerate(((x - centre_x).abs(), (y - centre_y).abs())):
            farthest[axis] = max(farthest[axis], float(distance[read].max()))
    assert farthest[0] < across + 1e-4
    assert farthest[1] < down + 1e-4
    # It is no wider than that, either: the next cell would be read.
    assert farthest[0] >= across - 1.01 or name == "nearest"


def test_every_reducer_says_how_wide_it_reads_or_that_it_differs():
    layout = TokenLayout((6, 6), 8, ("a",), 8, 4, (WHOLE,))
    for name in ReducerConfig.get_known_choices():
        reducer = reducer_config(name).build(layout)
        reads = reducer.reads(4) if name != "blind" else None
        assert (reads is None) == (name in ("tome", "blind")), name
        assert isinstance(reducer, MapReducer) or reads in (None, (0.5, 0.5))


# Pixels.


@pytest.mark.parametrize("region", [WHOLE, WIDE], ids=["whole", "letterbox"])
def test_points_and_discs_are_where_a_closed_formula_puts_them(region):
    """Over what the vision tower sees: the picture is its square where that is padded, else the camera's image."""
    points = Points(np.array([[0.3, 0.4]], np.float32), (0.1, 0.1), region)
    picture = draw(GREY, points, side=400)
    # The square of a padded image, or the image alone, which a policy without letterbox stretches.
    width, height = (400, 400) if region == WIDE else (400, 200)
    assert picture.shape == (height, width, 3)
    dot = near(picture, TRUE).mean(0)
    np.testing.assert_allclose(dot, [0.4 * height - 0.5, 0.3 * width - 0.5], atol=1)
    # Where the disc tints the camera's image, which is grey.
    tinted = np.argwhere(picture[..., 0].astype(int) - picture[..., 2] > 8)
    assert tinted[:, 1].min() == pytest.approx(0.2 * width, abs=2)
    assert tinted[:, 1].max() == pytest.approx(0.4 * width, abs=2)
    if region == WIDE:
        assert {tuple(pixel) for pixel in picture[:99].reshape(-1, 3)} <= {PADDING, HATCH} | {
            tuple(pixel) for pixel in picture[:99, 100:180].reshape(-1, 3)
        }
        assert (picture[110:290, 250:] == 90).all()


def test_a_point_in_the_padding_is_a_red_cross():
    points = Points(np.array([[0.5, 0.1], [0.5, 0.5]], np.float32), None, WIDE)
    assert points.in_padding().tolist() == [True, False]
    np.testing.assert_allclose(points.in_camera(), [[0.5, -0.3], [0.5, 0.5]])
    picture = draw(GREY, points, side=400)
    np.testing.assert_allclose(near(picture, LOST).mean(0), [39.5, 199.5], atol=1.5)
    np.testing.assert_allclose(near(picture, TRUE).mean(0), [199.5, 199.5], atol=1)


def test_a_sheet_has_even_sides_and_keeps_every_picture():
    """A long or foreign text does not make it wider."""
    pictures = [np.full((21, 33, 3), value, np.uint8) for value in (60, 120, 180)]
    lines = [Line("x" * 10_000), Line("толкни \x1b[31m куб\n", OTHER)]
    made = sheet(lines, ["a", "b", "c"], [Row("one", pictures), Row("two", pictures[::-1])])
    assert made.shape[0] % 2 == made.shape[1] % 2 == 0
    assert made.shape[1] < 33 * 3 + 100
    for value in (60, 120, 180):
        assert ((made == value).all(-1)).sum() >= 2 * 21 * 33


# The command.


def save(policy_folder, dataset, **reducer):
    """A policy of 16 tokens for a dataset, whose points depend on everything they may."""
    from lerobot_grids.data import load_metadata
    from lerobot_grids.policies import start

    torch.manual_seed(1)
    built = start("tiny", 16, load_metadata(str(dataset)), reducer={"type": "grids", "num_tokens_max": 36} | reducer)
    for parameter in built.policy.reducer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    policy_folder.mkdir()
    built.save(policy_folder)
    return policy_folder


@pytest.fixture(scope="module")
def two_cameras(two_camera_dataset, tmp_path_factory):
    return save(tmp_path_factory.mktemp("view") / "two", two_camera_dataset)


def frames_of(path):
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]


def test_view_shows_two_cameras_three_budgets_and_two_instructions(two_cameras, two_camera_dataset, tmp_path, capsys):
    arguments = ["--policy.path", two_cameras, "--dataset", two_camera_dataset, "--episode", 1, "--tokens", "4,8,16"]
    arguments += ["--instruction", "look at the wall", "--every", 4, "--frames", 3, "--output", tmp_path / "out"]
    assert main(["view", *map(str, arguments), "--json", str(tmp_path / "figures.json")]) == 0
    said = capsys.readouterr()
    assert "told otherwise" in said.out
    assert "warning" not in said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["looks.mp4", "looks.png", "view.json"]
    result = json.loads((tmp_path / "figures.json").read_text())
    assert result == json.loads((tmp_path / "out" / "view.json").read_text())
    assert (result["frames"], result["fps"]) == (6, 2.5)
    assert (result["instruction"], result["other_instruction"]) == ("push the square to the goal", "look at the wall")
    rows = {(row["camera"].rpartition(".")[2], row["num_tokens"]): row for row in result["looks"]}
    assert set(rows) == {(camera, k) for camera in ("top", "wrist") for k in (4, 8, 16)}
    for (_, k), row in rows.items():
        assert row["points"] == k
        assert row["told_otherwise_cells"] > 0
        assert row["motion_cells"] > 0
        assert row["reads_cells"] == pytest.approx([1.5, 1.5])
    film = frames_of(tmp_path / "out" / "looks.mp4")
    assert len(film) == 6
    # Two cameras by two instructions, three budgets.
    assert film[0].shape[0] > 4 * 260
    assert film[0].shape[1] > 3 * 260
    strip = np.asarray(Image.open(tmp_path / "out" / "looks.png"))
    assert strip.shape[0] > 12 * 180
    assert strip.shape[1] > 3 * 180
    assert len(near(strip, TRUE)) > 100
    assert len(near(strip, OTHER)) > 100


def test_points_that_cannot_follow_the_instruction_are_said_to_be_the_same(two_camera_dataset, tmp_path, capsys):
    policy = save(tmp_path / "deaf", two_camera_dataset, condition_on=["state"])
    arguments = ["--policy", policy, "--dataset", two_camera_dataset, "--instruction", "look at the wall"]
    arguments += ["--film", "false", "--max_frames", 2, "--output", tmp_path / "out"]
    assert main(["view", *map(str, arguments)]) == 0
    assert "do not depend on the instruction" in capsys.readouterr().err
    result = json.loads((tmp_path / "out" / "view.json").read_text())
    assert {row["told_otherwise_cells"] for row in result["looks"]} == {0.0}
    assert not (tmp_path / "out" / "looks.mp4").exists()


@pytest.mark.parametrize("reducer", ["tome", "fastv"])
def test_a_dense_policy_is_shown_with_a_reducer_that_needs_no_training(
    dense_checkpoint, dataset, tmp_path, capsys, reducer
):
    arguments = ["--policy", dense_checkpoint, "--dataset", dataset, "--reducer", reducer, "--tokens", "4,9"]
    assert main(["view", *map(str, arguments), "--max_frames=2", "--film=false", f"--output={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "view.json").read_text())["looks"]
    assert [row["points"] for row in rows] == [4, 9]
    assert [row["reads_cells"] is None for row in rows] == [reducer == "tome"] * 2


@pytest.mark.parametrize(
    ("policy", "options", "message"),
    [
        ("dense_checkpoint", [], "reads every cell of its token grid"),
        ("grids_checkpoint", ["--episode=6"], "episodes 0 .. 5"),
        ("grids_checkpoint", ["--episode=-1"], "--episode -1"),
        ("grids_checkpoint", ["--tokens=40"], "serves 1 .. 36"),
        ("grids_checkpoint", ["--tokens=4,dense"], "has no points"),
        ("grids_checkpoint", ["--rerun=look.png"], "ends with .rrd"),
    ],
)
def test_view_refuses(request, dataset, tmp_path, capsys, policy, options, message):
    folder = request.getfixturevalue(policy)
    try:
        code = main(["view", f"--policy={folder}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}", *options])
    except SystemExit as stop:
        code = stop.code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert code == 1
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_blind_policy_has_no_points(dataset, tmp_path, capsys):
    from lerobot_grids.data import load_metadata
    from lerobot_grids.policies import start

    start("tiny", None, load_metadata(str(dataset)), reducer={"type": "blind"}).save(tmp_path)
    assert main(["view", f"--policy={tmp_path}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}"]) == 1
    assert "is blind" in capsys.readouterr().err


def test_an_interrupted_view_leaves_no_half_written_file(grids_checkpoint, dataset, tmp_path, monkeypatch):
    from lerobot_grids.console import CountingBar

    def stop(bar, count=1, title=None):
        raise KeyboardInterrupt

    monkeypatch.setattr(CountingBar, "advance", stop)
    arguments = [f"--policy={grids_checkpoint}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}"]
    assert main(["view", *arguments]) == 130
    assert list(tmp_path.iterdir()) == []


def test_a_state_without_numbers_is_named(grids_checkpoint, dataset, tmp_path, capsys, monkeypatch):
    frames = Episode.batches

    def spoiled(self, size):
        for raw in frames(self, size):
            raw["observation.state"][raw["frame_index"] == 7] = torch.nan
            yield raw

    monkeypatch.setattr(Episode, "batches", spoiled)
    assert main(["view", f"--policy={grids_checkpoint}", f"--dataset={dataset}", f"--output={tmp_path / 'out'}"]) == 1
    assert "'observation.state' holds NaN or infinity in frame 7 of this episode" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_rerun_the_hint_says_how_to_install_it(grids_checkpoint, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rerun", None)
    monkeypatch.setattr("lerobot_grids.looks.rerun_log.find_spec", lambda name: None)
    arguments = [f"--policy={grids_checkpoint}", f"--dataset={dataset}", f"--rerun={tmp_path / 'x.rrd'}"]
    assert main(["view", *arguments]) == 1
    assert "pip install 'lerobot[viz]'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


class Screen:
    """What a process shows in rerun, as far as drawing points needs it."""

    def __init__(self, is_on=True):
        self.is_on, self.drawn = is_on, {}

    def get_global_data_recording(self):
        return object() if self.is_on else None

    def Points2D(self, places, colors, radii):
        return places, radii

    def log(self, name, drawn, static):
        self.drawn[name] = drawn


@pytest.fixture
def acting(grids_checkpoint):
    """A policy, and a batch whose images are half as high as they are wide."""
    loaded = load(str(grids_checkpoint))
    observation = {"observation.image": torch.rand(3, 48, 96), "observation.state": torch.zeros(4), "task": "push"}
    return loaded.policy, loaded.preprocessor(observation)


def test_points_appear_over_what_lerobots_command_shows(acting, monkeypatch):
    """With its --display_data=true: in pixels of the camera, once for each look."""
    policy, batch = acting
    expected = look(policy, batch)["observation.image"][0]
    screen = Screen()
    monkeypatch.setitem(sys.modules, "rerun", screen)
    policy.select_action(batch)
    assert screen.drawn.keys() == {"observation.image/points", "observation.image/reads"}
    places, _ = screen.drawn["observation.image/points"]
    np.testing.assert_allclose(places, expected.in_camera() * (96, 48), rtol=1e-5)
    # The image fills half of what the vision tower sees, whose width it has.
    assert places[:, 1].max() > 1.5 * np.asarray(expected.coordinates)[:, 1].min() * 48
    assert screen.drawn["observation.image/reads"][1] == pytest.approx(expected.reads[0] * 96)
    screen.drawn.clear()
    # Now it comes from the queue.
    policy.select_action(batch)
    assert screen.drawn == {}
    policy.predict_action_chunk(batch)
    assert len(screen.drawn) == 2


def test_nothing_is_drawn_where_nothing_is_shown(acting, monkeypatch):
    policy, batch = acting
    screen = Screen(is_on=False)
    monkeypatch.setitem(sys.modules, "rerun", screen)
    policy.predict_action_chunk(batch)
    assert screen.drawn == {}


def test_a_screen_that_fails_does_not_stop_the_robot(acting, monkeypatch, caplog):
    policy, batch = acting
    screen = Screen()
    monkeypatch.setattr(screen, "log", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setitem(sys.modules, "rerun", screen)
    assert policy.select_action(batch).isfinite().all()
    assert "where the policy looks is not shown: ZeroDivisionError" in caplog.text


def test_without_a_display_the_viewer_is_not_opened(grids_checkpoint, dataset, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lerobot_grids.looks.rerun_log.find_spec", lambda name: name)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["view", f"--policy={grids_checkpoint}", f"--dataset={dataset}", "--rerun=spawn"]) == 1
    assert "this machine has no display; give a file, such as look.rrd" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(find_spec("rerun") is None, reason="needs rerun-sdk")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_rerun_gets_images_points_states_and_actions(two_cameras, two_camera_dataset, tmp_path):
    """Read back with rerun: points are in pixels of the camera."""
    recording = pytest.importorskip("rerun.recording")
    from lerobot_grids.looks.view import watch

    file = tmp_path / "look.rrd"
    arguments = [f"--policy={two_cameras}", f"--dataset={two_camera_dataset}", "--max_frames=3", f"--rerun={file}"]
    assert main(["view", *arguments, "--film=false", f"--output={tmp_path / 'out'}"]) == 0
    logged = {}
    for chunk in recording.load_recording(str(file)).chunks():
        batch = chunk.to_record_batch()
        for name in ("Points2D:positions", "Scalars:scalars", "EncodedImage:blob"):
            if name in batch.schema.names:
                logged[str(chunk.entity_path).replace("\\", "")] = batch.column(name).to_pylist()
    loaded = load(two_cameras)
    episode = open_episode("two", loaded.policy.config, str(two_camera_dataset), most=3)
    for number, seen in enumerate(watch(loaded, episode, [16], act=True)):
        for name, value in (("state", seen.state), ("action", seen.action), ("policy/action", seen.predicted)):
            np.testing.assert_allclose(logged[f"/{name}"][number], value, rtol=1e-5, atol=1e-6)
        for (camera, k, _), points in seen.points.items():
            assert logged[f"/{camera}"][number]
            np.testing.assert_allclose(logged[f"/{camera}/K{k}/points"][number], points.coordinates * 96, rtol=1e-5)
