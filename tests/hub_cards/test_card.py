"""A card shows what is known and what was measured; what is not known is not there."""

import json
from dataclasses import replace

import pytest
import yaml
from scipy.stats import binomtest

import kept_results
from lerobot_grids_cards import Measurements, PolicyFacts, read_measurements, render
from lerobot_policy_grids import ReducerConfig

FACTS = PolicyFacts("me/pi0-16", "pi0", 16, 36, ["observation.images.top"], "full")
# The demo's own outcomes: a 1 for each episode that succeeded, by task.
OUTCOMES = next(x["outcomes"] for x in kept_results.lines("demo") if x.get("method") == "grids16" and "outcomes" in x)
SUCCESSES = sum(bits.count("1") for bits in OUTCOMES.values())


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_without_measurements_it_claims_nothing():
    card = render(FACTS, Measurements())
    for absent in (
        "## Success",
        "## Held-out",
        "## Cost",
        "## Training",
        "looks.png",
        "None",
        "model-index",
        "base_model",
    ):
        assert absent not in card
    assert "nothing yet" in card
    assert metadata(card) == {
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["robotics", "lerobot", "pi0", "grids", "token-reduction"],
    }


def test_real_results_of_the_project(tmp_path):
    paths = [tmp_path / name for name in ("tiny_metaworld.json", "grids16.json", "pi0-2-cpu.json")]
    kept_results.write_evaluation("demo", "tiny_metaworld", paths[0])
    kept_results.write_evaluation("demo", "grids16", paths[1])
    kept_results.write_bench("pi0", 2, paths[2], "AMD EPYC")
    card = render(FACTS, read_measurements(paths, lambda policy: policy.endswith("grids16")))
    assert "**16 of 144 visual tokens**" in card
    interval = binomtest(SUCCESSES, 100).proportion_ci(method="wilson")
    low, high = (f"{100 * bound:.0f}" for bound in interval)
    assert (
        f"| **this policy** | 16 | all | {SUCCESSES}/100 | {SUCCESSES} % | {low} – {high} % | 100000 to 100024 |"  # noqa: RUF001
    ) in card
    assert "| tiny_metaworld | 144 | push-v3 | 25/25 |" in card
    assert card.index("**this policy** | 16") < card.index("| tiny_metaworld | 144")
    assert "| K=16 | 16 | 437.9 | 0.2 | 0.0 | 318.0 | 330.7 | 1086.9 | 5159.2 | 5223.2 |" in card
    assert "Milliseconds: AMD EPYC" in card
    results = metadata(card)["model-index"][0]["results"]
    assert {r["dataset"]["name"]: r["metrics"][0]["value"] for r in results} == {
        task: bits.count("1") / 25 for task, bits in OUTCOMES.items()
    }


def test_denoising_steps_are_shown_where_there_are_any(tmp_path):
    card = render(replace(FACTS, num_steps=2), Measurements())
    assert "One action chunk takes 2 denoising steps." in card
    assert "denoising" not in render(FACTS, Measurements())
    kept_results.write_evaluation("demo", "grids16", tmp_path / "grids16.json")
    saved = json.loads((tmp_path / "grids16.json").read_text())
    (tmp_path / "fewer.json").write_text(json.dumps(saved | {"policy": "fewer", "num_steps": 1}))
    measured = read_measurements(
        [tmp_path / "grids16.json", tmp_path / "fewer.json"], lambda policy: policy.endswith("grids16")
    )
    rows = [line.count("|") for line in render(FACTS, measured).splitlines() if "| all |" in line or "seeds |" in line]
    assert rows == [9, 9, 9]
    assert f"| fewer | 16 | 1 | all | {SUCCESSES}/100 |" in render(FACTS, measured)


def test_costs_that_were_only_counted_show_no_milliseconds(tmp_path):
    kept_results.write_bench("pi0", 2, tmp_path / "pi0-2.json")
    card = render(FACTS, read_measurements([tmp_path / "pi0-2.json"], lambda policy: False))
    assert "## Cost of one action chunk" in card
    assert "p50 ms" not in card
    assert "Milliseconds" not in card


def test_the_distance_to_the_teacher(tmp_path):
    rows = [{"num_tokens": k, "loss": 1 / k, "error": [], "teacher_distance": d} for k, d in ((4, 0.5), (16, None))]
    content = {"policy": "runs/mine", "policy_type": "grids", "dataset": "/data/x", "teacher": "/t", "frames": 512}
    (tmp_path / "v.json").write_text(json.dumps(content | {"budgets": rows}))
    card = render(FACTS, read_measurements([tmp_path / "v.json"], lambda policy: True))
    assert "| **this policy** | 4 | 512 | 0.2500 | 0.500 |" in card
    assert "| **this policy** | 16 | 512 | 0.0625 |  |" in card
    assert "/data/x" not in card


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"tasks": [{}]}', '{"budgets": 3}', '{"costs": [{"name": 1}]}'])
def test_what_is_no_result_is_named(content, tmp_path):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json is not a result of eval, validate or bench"):
        read_measurements([tmp_path / "x.json"], lambda policy: True)


def test_a_dense_policy_and_a_template_of_ones_own(tmp_path):
    dense = PolicyFacts("me/dense", "pi0", None, None, ["a"], "full", base_repo_id=None)
    card = render(dense, Measurements())
    assert "GridsPolicy" not in card
    assert metadata(card)["tags"] == ["robotics", "lerobot", "pi0"]
    (tmp_path / "mine.md").write_text("---\n{{ card_data }}\n---\n# {{ facts.family }}, mine")
    assert render(dense, Measurements(), tmp_path / "mine.md").endswith("# pi0, mine\n")


def test_success_in_a_changed_scene_is_called_so(tmp_path):
    content = kept_results.write_evaluation("demo", "grids16", tmp_path / "r.json")
    content |= {"perturb": "camera:2", "tamper": ["state"]}
    (tmp_path / "grids16.json").write_text(json.dumps(content))
    card = render(FACTS, read_measurements([tmp_path / "grids16.json"], lambda policy: True))
    assert f"| all (camera:2, state spoiled) | {SUCCESSES}/100 |" in card
    assert metadata(card)["model-index"][0]["results"][0]["dataset"]["name"] == "push-v3 (camera:2, state spoiled)"


def test_a_suite_stands_for_its_tasks(tmp_path):
    content = kept_results.write_evaluation("demo", "grids16", tmp_path / "r.json")
    content["suites"] = [content["total"] | {"task": "libero_goal"}]
    (tmp_path / "r.json").write_text(json.dumps(content))
    rows = read_measurements([tmp_path / "r.json"], lambda policy: True).successes
    assert [row.task for row in rows] == ["libero_goal"]


def test_what_was_reduced_without_training_is_not_this_policy(tmp_path):
    content = kept_results.write_evaluation("demo", "grids16", tmp_path / "r.json") | {"reducer": "fastv"}
    (tmp_path / "r.json").write_text(json.dumps(content))
    card = render(FACTS, read_measurements([tmp_path / "r.json"], lambda policy: True))
    assert "this policy" not in card
    assert f"all (by fastv without training) | {SUCCESSES}/100" in card


@pytest.mark.parametrize(("reducer", "says"), [("pool", "averages of blocks"), ("blind", "sees nothing")])
def test_a_card_says_what_reduces(reducer, says):
    tokens = 0 if reducer == "blind" else 16
    summary = ReducerConfig.get_choice_class(reducer).summary
    cameras = ["observation.images.top"]
    facts = PolicyFacts("me/x", "pi0", tokens, 16, cameras, "full", reducer=reducer, reducer_summary=summary)
    card = render(facts, Measurements())
    assert f"**{tokens} visual tokens**, " in card
    assert says in card
    assert "GridS, [arXiv" not in card
    assert ("policy.num_tokens =" in card) == (reducer != "blind")
    assert reducer in metadata(card)["tags"]
