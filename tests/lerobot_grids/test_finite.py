"""A run stops at the first number that is not finite, and what it saved before stays."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from lerobot_grids.data import datamodule
from lerobot_grids.policies import load
from lerobot_grids.training.finite import require_finite_gradients, require_finite_loss, require_finite_weights
from lerobot_grids_cli.main import main
from lerobot_policy_grids.errors import DatasetError, GridsError
from recordings import dataset_of

BATCH = {
    "index": torch.tensor([40, 41]),
    "episode_index": torch.tensor([2, 2]),
    "action": torch.zeros(2, 3, 4),
    "task": ["a", "b"],
}


def test_a_finite_loss_passes():
    require_finite_loss(torch.tensor(1.0), BATCH | {"action": torch.full((2, 3), torch.nan)}, 7)


def test_the_frame_and_the_feature_are_named():
    action = torch.zeros(2, 3, 4)
    action[1, 0, 2] = torch.inf
    with pytest.raises(DatasetError, match=r"step 7: .* 'action' holds NaN or infinity at frame 41 of episode 2"):
        require_finite_loss(torch.tensor(torch.nan), BATCH | {"action": action}, 7)
    with pytest.raises(GridsError, match=r"step 7: the loss is inf; .* lower --model.lr"):
        require_finite_loss(torch.tensor(torch.inf), BATCH, 7)


def test_the_gradient_is_named():
    layer = nn.Linear(3, 2)
    layer(torch.ones(1, 3)).sum().backward()
    require_finite_gradients(layer.named_parameters(), 7)
    layer.bias.grad[1] = torch.nan
    with pytest.raises(GridsError, match="step 7: the gradient of 'bias' is not finite"):
        require_finite_gradients(layer.named_parameters(), 7)


def test_weights_that_are_not_finite_are_not_saved():
    layer = nn.Linear(3, 2)
    require_finite_weights(layer.named_parameters(), 7)
    layer.weight.data[1, 1] = torch.inf
    with pytest.raises(GridsError, match="step 7: the weight 'weight' is not finite, so it is not saved"):
        require_finite_weights(layer.named_parameters(), 7)
    layer.weight.requires_grad_(False)
    require_finite_weights(layer.named_parameters(), 7)


def test_a_nan_in_the_data_stops_the_run_and_keeps_the_last_good_policy(tmp_path, capsys, monkeypatch):
    data, output = dataset_of(tmp_path / "data"), tmp_path / "run"
    flags = [f"--dataset={data}", f"--output={output}", "--tokens=4", "--batch_size=2", "--save_every=1"]
    flags += ["--data.val_fraction=0", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *flags, "--steps=2"]) == 0
    for path in data.glob("data/**/*.parquet"):
        table = pq.read_table(path)
        column = table.column_names.index("observation.state")
        values = table["observation.state"].to_pylist()
        values[3] = [float("nan")] * len(values[3])
        changed = pa.array(values, type=table.schema.field(column).type)
        pq.write_table(table.set_column(column, table.schema.field(column), changed), path)
    assert main(["fit", *flags, "--steps=9", "--resume"]) == 1
    assert "holds NaN or infinity in 1 frames, first in frame 3 of episode 0" in capsys.readouterr().err
    monkeypatch.setattr(datamodule, "check_values", lambda *args: [])
    assert main(["fit", *flags, "--steps=9", "--resume"]) == 1
    assert "'observation.state' holds NaN or infinity at frame 3 of episode 0" in capsys.readouterr().err
    policy = load(output).policy
    assert all(parameter.isfinite().all() for parameter in policy.parameters())
