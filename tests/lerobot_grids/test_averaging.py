"""The moving average is of what is trained, by the closed formula, and keeps frozen weights once."""

import lightning
import pytest
import torch

from lerobot_grids.averaging import TrainedWeightsAverage, averaged
from lerobot_grids.data import LeRobotDataModule
from lerobot_grids.module import GridsModule
from lerobot_policy_grids.errors import GridsError

NAME = "policy.reducer.coordinate_head.out.weight"


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
    with averaged(trainer, module):
        torch.testing.assert_close(module.state_dict()[NAME], expected)
    assert torch.equal(module.state_dict()[NAME], weights[-1])

    copies = dict(average._average_model.module.named_parameters())
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    assert len(frozen) > 50
    assert all(copies[name].data_ptr() == p.data_ptr() for name, p in frozen.items())
    assert copies[NAME].data_ptr() != module.state_dict()[NAME].data_ptr()


def test_gradient_checkpointing_is_refused_where_lerobot_has_none(dataset):
    with pytest.raises(GridsError, match="has no gradient checkpointing"):
        GridsModule(LeRobotDataModule(str(dataset)).meta, gradient_checkpointing=True)
