"""The moving average is of what is trained, by the closed formula, and keeps frozen weights once."""

import lightning
import pytest
import torch

from lerobot_grids.data import LeRobotDataModule
from lerobot_grids.policies import load
from lerobot_grids.training.averaging import TrainedWeightsAverage
from lerobot_grids.training.module import GridsModule
from lerobot_policy_grids.errors import GridsError

NAME = "policy.reducer.query.weight"


def test_the_average_follows_the_formula_and_shares_frozen_weights(dataset, dense_checkpoint):
    data = LeRobotDataModule(str(dataset), batch_size=4, val_fraction=0)
    module = GridsModule(data.meta, policy=str(dense_checkpoint), tokens=4, train="reducer+lora", distill=0.5)
    average, weights = TrainedWeightsAverage(0.8), []

    class Keep(lightning.Callback):
        def on_train_batch_end(self, *args):
            weights.append(module.state_dict()[NAME].clone())

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[average, Keep()],
    )
    trainer.fit(module, data)
    expected = weights[0]
    for value in weights[1:]:
        expected = 0.8 * expected + 0.2 * value
    # Training ends with the weights, so that it can go on; the average is there on request, and leaves again.
    assert torch.equal(module.state_dict()[NAME], weights[-1])
    with average.in_place(module):
        torch.testing.assert_close(module.state_dict()[NAME], expected)
    assert torch.equal(module.state_dict()[NAME], weights[-1])

    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert average.state_dict()["average"].keys() == trained
    # Frozen weights are neither copied nor touched: without its adapters the base is what it was.
    source = load(str(dense_checkpoint)).policy.state_dict()
    held = {name.replace(".base_layer", ""): value for name, value in module.policy.base.state_dict().items()}
    assert len(source) > 80
    assert all(torch.equal(held[name], value) for name, value in source.items())


def test_a_decay_out_of_range_is_refused():
    with pytest.raises(GridsError, match="--ema 2; give the share"):
        TrainedWeightsAverage(2)


def test_gradient_checkpointing_is_refused_where_lerobot_has_none(dataset):
    with pytest.raises(GridsError, match="has no gradient checkpointing"):
        GridsModule(LeRobotDataModule(str(dataset)).meta, gradient_checkpointing=True)
