"""`lerobot-grids compare` as a person types it."""

import json

import pytest

from lerobot_grids_cli.main import main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dense=x"], "1 policies given; give at least two"),
        (["dense", "grids=x"], "--policies dense; give NAME=CHECKPOINT"),
        (["a=x", "--methods", '{"b": {"policy": "y"}}'], "'b' has policy; the fields are policies, tokens, reducer"),
        (["a=x", "b=y", "--workers", "0"], "--workers 0; give at least 1"),
        (["a=nowhere/x", "b=nowhere/y"], "nowhere/x"),
    ],
)
def test_mistakes_cost_a_line(arguments, message, tmp_path, capsys):
    assert main(["compare", *arguments, "--output", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error


def test_a_recipe_compares_trained_and_untrained(grids_checkpoint, dense_checkpoint, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"methods:\n  pool: {{policies: [{dense_checkpoint}], reducer: pool, tokens: 16, num_steps: 1}}\n"
        "tasks: push-v3\nepisodes: 1\nenv_args: {max_steps: 8}\n"
    )
    out = tmp_path / "out"
    assert main(["compare", f"dense={dense_checkpoint}", "--config", str(recipe), "--output", str(out)]) == 0
    result = json.loads((out / "compare.json").read_text())
    assert [row["name"] for row in result["methods"]] == ["dense", "pool"]
    assert {path.name for path in out.iterdir()} == {
        "compare.json",
        "compare.md",
        "compare.png",
        "dense-0.json",
        "pool-0.json",
    }
    assert "pool" in capsys.readouterr().out
    steps = [json.loads((out / f"{name}-0.json").read_text())["num_steps"] for name in ("dense", "pool")]
    assert steps == [2, 1]
