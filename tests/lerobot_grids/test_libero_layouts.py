"""What LIBERO's dealt layouts and grasps promise, without LIBERO: they are arithmetic."""

import mujoco
import numpy as np
import pytest

from lerobot_grids.simulation.libero.grasps import OPENING, choose_grasp
from lerobot_grids.simulation.libero.layouts import APART, JITTER, REACH, SHIFT, Pose, deal, generator, require_layout
from lerobot_grids.simulation.libero.shapes import collision_points, rotation_vector, turned
from lerobot_policy_grids.errors import SimulationError

BASE = np.array([-0.6, 0, 0])
# LIBERO-Object's task 0: the named object, the basket, and five others.
FLOOR = {
    "alphabet_soup_1": (-0.12, -0.24, 0.015),
    "basket_1": (0.0, 0.26, 0.035),
    "salad_dressing_1": (0.05, -0.1, 0.035),
    "cream_cheese_1": (-0.15, 0.061, 0.0),
    "milk_1": (0.1, -0.2, 0.035),
    "tomato_sauce_1": (0.15, 0.03, 0.035),
    "butter_1": (-0.2, -0.08, -0.005),
}
# LIBERO-Spatial's task 3: the bowl stands on the cookie box, another one on the cabinet.
TABLE = {
    "akita_black_bowl_1": (0.07, 0.028, 1.08),
    "akita_black_bowl_2": (0.02, -0.279, 1.232),
    "cookies_1": (0.07, 0.028, 0.97),
    "glazed_rim_porcelain_ramekin_1": (-0.2, 0.202, 0.97),
    "plate_1": (0.06, 0.2, 0.97),
}


def poses(places):
    return {name: Pose(np.array(place), np.array([0.5, 0.5, 0.5, 0.5])) for name, place in places.items()}


def dealt(suite, places, seed, base=BASE, task=0):
    return deal(suite, poses(places), base, generator(seed, task))


def yaw(pose):
    """Angle of the object's first axis seen from above."""
    matrix = np.zeros(9)
    mujoco.mju_quat2Mat(matrix, pose.quaternion)
    return np.arctan2(matrix[3], matrix[0])


@pytest.mark.parametrize(("suite", "places"), [("libero_object", FLOOR), ("libero_spatial", TABLE)])
def test_a_layout_follows_from_its_seed(suite, places):
    base = BASE if suite == "libero_object" else np.array([-0.66, 0, 0.912])
    one, again, other = (dealt(suite, places, seed, base) for seed in (1, 1, 2))
    for name in places:
        assert np.array_equal(one[name].position, again[name].position)
        assert np.array_equal(one[name].quaternion, again[name].quaternion)
        assert one[name].position[2] == places[name][2]
    assert any(np.abs(one[name].position - other[name].position).max() > 0.02 for name in places)


def test_tasks_with_the_same_seed_have_their_objects_in_different_places():
    first = [dealt("libero_object", FLOOR, 1, task=task)["alphabet_soup_1"].position[:2] for task in range(10)]
    far = [np.linalg.norm(one - other) for one in first for other in first]
    assert np.mean(np.array(far) > 2 * JITTER) > 0.5


def test_objects_change_places_stand_apart_and_in_reach():
    slots = np.array([place[:2] for name, place in FLOOR.items() if name != "basket_1"])
    visited = set()
    for seed in range(40):
        layout = dealt("libero_object", FLOOR, seed)
        nearest = {}
        for name, pose in layout.items():
            away = np.abs(pose.position[:2] - (FLOOR[name][:2] if name == "basket_1" else slots)).max(-1)
            assert away.min() <= (SHIFT if name == "basket_1" else JITTER) + 1e-9
            assert REACH[0] < np.linalg.norm(pose.position[:2] - BASE[:2]) < REACH[1]
            if name != "basket_1":
                nearest[name] = int(away.argmin())
        # Each slot is used once, and nothing overlaps.
        assert sorted(nearest.values()) == list(range(6))
        places = np.stack([pose.position for pose in layout.values()])
        apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + np.eye(len(places))
        assert apart.min() >= APART
        visited.add(nearest["alphabet_soup_1"])
    # The named object is found in every slot, so remembering one is no use.
    assert visited == set(range(6))


def test_relations_on_the_table_stay_true():
    for seed in range(20):
        layout = dealt("libero_spatial", TABLE, seed, np.array([-0.66, 0, 0.912]))
        moved = {name: layout[name].position - np.array(place) for name, place in TABLE.items()}
        assert not moved["akita_black_bowl_2"].any()
        together = ["cookies_1", "glazed_rim_porcelain_ramekin_1", "plate_1"]
        for one in together:
            for other in together:
                before = np.subtract(TABLE[one], TABLE[other])
                after = layout[one].position - layout[other].position
                assert np.linalg.norm(after) == pytest.approx(np.linalg.norm(before))
        assert np.allclose(layout["akita_black_bowl_1"].position[:2], layout["cookies_1"].position[:2])
        turns = {round((yaw(layout[name]) - yaw(poses(TABLE)[name])) % (2 * np.pi), 6) for name in together}
        assert len(turns) == 1


def test_what_has_no_layout_is_refused():
    with pytest.raises(SimulationError, match=r"libero_goal cannot be dealt anew, only .*; use --layout official"):
        require_layout("dealt", ["libero_object", "libero_goal"])
    with pytest.raises(SimulationError, match="layout 'shuffled' is unknown"):
        require_layout("shuffled", [])
    require_layout("official", ["libero_goal"])


def test_shapes_are_where_mujoco_has_them():
    model = mujoco.MjModel.from_xml_string("""
        <mujoco><worldbody>
          <body name="thing" pos="1 2 3" euler="0 0 90">
            <geom type="box" size="0.1 0.2 0.3"/>
            <geom type="sphere" size="9" contype="0" conaffinity="0"/>
            <body pos="0 0 1"><geom type="cylinder" size="0.05 0.5"/></body>
          </body>
        </worldbody></mujoco>""")
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    points = collision_points(model, data, model.body("thing").id, inside=50)
    # A quarter turn exchanges the box's width and depth; what cannot collide is left out; what is carried counts.
    assert points.min(0) == pytest.approx([0.8, 1.9, 2.7], abs=1e-6)
    assert points.max(0) == pytest.approx([1.2, 2.1, 4.5], abs=1e-6)


def test_turns():
    assert rotation_vector(turned(np.eye(3), 0.3)) == pytest.approx([0, 0, 0.3])


@pytest.mark.parametrize("degrees", [0, 40, -70])
def test_the_hand_closes_across_the_narrow_side(degrees):
    angle = np.radians(degrees)
    sides = np.linspace(-0.02, 0.02, 5), np.linspace(-0.09, 0.09, 9), np.linspace(-0.03, 0.03, 13)
    box = np.stack(np.meshgrid(*sides), -1).reshape(-1, 3) @ turned(np.eye(3), angle).T + [0.1, 0.2, 0.5]
    down = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
    grasp = choose_grasp(box, np.array([0.1, 0.2, 0.5]), down, [], np.array([-0.6, 0]))
    width = np.ptp(box @ turned(down, grasp.yaw)[:, 0])
    assert width < OPENING - 0.006
    assert grasp.offset[:2] == pytest.approx([0, 0], abs=0.01)
    assert abs(grasp.yaw) <= abs(angle) + 1e-9


def test_a_bowl_is_held_by_its_rim_away_from_what_stands_beside_it():
    around = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    rim = np.stack([0.06 * np.cos(around), 0.06 * np.sin(around), np.full(48, 0.05)], -1)
    bowl = np.concatenate([rim * scale for scale in np.linspace(0.3, 1, 40)])
    down = np.array([[1.0, 0, 0], [0, -1, 0], [0, 0, -1]])
    free = choose_grasp(bowl, np.zeros(3), down, [], np.array([-0.5, 0]))
    assert np.linalg.norm(free.offset[:2]) == pytest.approx(0.056, abs=0.006)
    wall = np.array([[x, 0.0, 0.05] for x in np.linspace(-0.2, 0.2, 60) if abs(x) > 0.08])
    beside = choose_grasp(bowl, np.zeros(3), down, [wall], np.array([-0.5, 0]))
    assert abs(free.offset[1]) < 0.005
    # A finger is 2.2 cm wide, and the wall stands where it would go.
    assert abs(beside.offset[1]) > 0.011
