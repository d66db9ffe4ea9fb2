"""Losses against closed formulas, and who may be a teacher. tests/contracts/test_distillation.py has the families."""

import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from lerobot_grids.data import LeRobotDataModule, load_metadata
from lerobot_grids.training import looking
from lerobot_grids.training.distillation import DenseTeacher, SelfTeacher, feature_loss
from lerobot_grids.training.module import GridsModule
from lerobot_grids.training.saliency import distance_to_points, saliency
from lerobot_policy_grids.errors import GridsError
from lerobot_policy_grids.families.distances import action_distance, token_divergence


def test_velocity_loss_leaves_out_padding_of_steps_and_of_dimensions():
    student, teacher = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    pad = torch.zeros(2, 5, dtype=torch.bool)
    pad[1, 3:] = True
    batch = {"action": torch.zeros(2, 5, 3), "action_is_pad": pad}
    expected = torch.nn.functional.mse_loss(student[~pad][:, :3], teacher[~pad][:, :3])
    torch.testing.assert_close(action_distance(student, teacher, batch), expected)
    del batch["action_is_pad"]
    torch.testing.assert_close(action_distance(student, teacher, batch), (student - teacher)[..., :3].square().mean())


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_logit_loss_is_the_mean_divergence_of_the_next_tokens(temperature):
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    divergence = (p * (p / q).log()).sum(-1)
    real = [(0, 0), (0, 1), (0, 2), (1, 0)]  # entry i is used where token i + 1 is real
    expected = sum(divergence[row, i] for row, i in real) / len(real) * temperature**2
    batch = {"action.token_mask": mask}
    torch.testing.assert_close(token_divergence(student, teacher, batch, temperature), expected)
    if temperature == 1:
        torch.testing.assert_close(token_divergence(student, teacher, batch), expected)


def test_feature_loss_does_not_depend_on_the_scale():
    student, teacher = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    torch.testing.assert_close(feature_loss(5 * student, 5 * teacher), feature_loss(student, teacher))


def test_saliency_is_gradient_times_difference_from_the_mean():
    size, cameras, cells, width = 3, 2, 5, 4
    tokens = torch.randn(cameras * size, cells, width, requires_grad=True)
    weights = torch.rand(cells, width)
    # A linear prediction of one number for each frame: the gradient is the weights, times the drawn direction.
    output = (tokens * weights).sum((1, 2)).unflatten(0, (cameras, size)).sum(0)
    expected = ((tokens - tokens.mean(1, keepdim=True)) * weights).sum(-1).square().detach()
    expected = torch.stack([expected[:size], expected[size:]], 1)
    torch.testing.assert_close(saliency(output, tokens, size), expected / expected.sum((1, 2), keepdim=True))


def test_points_are_drawn_to_what_is_salient():
    grid = (6, 6)
    weights = torch.zeros(1, 1, 36)
    weights[0, 0, [2 * 6 + 1, 4 * 6 + 4]] = 0.5
    points = torch.tensor([[[0.5, 0.4], [0.6, 0.5]]], requires_grad=True)
    optimizer = torch.optim.SGD([points], lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        loss = distance_to_points(weights, [points], grid)
        loss.backward()
        optimizer.step()
    assert loss < 1e-3
    centres = torch.tensor([[[1.5, 2.5], [4.5, 4.5]]]) / 6
    torch.testing.assert_close(points.detach(), centres, atol=5e-3, rtol=0)


def module_of(dataset, **options):
    return GridsModule(load_metadata(str(dataset)), **{"tokens": 4, "distill": 0.5} | options)


def test_the_teacher_follows_from_what_is_trained(dataset, dense_checkpoint):
    own = module_of(dataset, policy=str(dense_checkpoint), train="reducer+lora").distillation.teacher
    assert isinstance(own, SelfTeacher)
    other = module_of(dataset, policy=str(dense_checkpoint), train="all")
    assert isinstance(other.distillation.teacher, DenseTeacher)
    named = module_of(dataset, policy=str(dense_checkpoint), teacher=str(dense_checkpoint), train="reducer")
    assert isinstance(named.distillation.teacher, DenseTeacher)
    # One that only says where to look teaches nothing else.
    looks = module_of(dataset, policy=str(dense_checkpoint), teacher=str(dense_checkpoint), look_first=8, distill=0.0)
    assert isinstance(looks.looking.teacher, DenseTeacher)
    assert looks.distillation is None
    # A teacher of its own is no part of the module: not in its state, its parameters, its optimiser.
    plain = module_of(dataset, policy=str(dense_checkpoint), train="all", distill=0.0)
    assert other.state_dict().keys() == plain.state_dict().keys()
    assert len(list(other.parameters())) == len(list(plain.parameters()))


def test_who_cannot_teach_says_why(dataset, dense_checkpoint, grids_checkpoint, tmp_path):
    with pytest.raises(GridsError, match="random weights, which teach nothing"):
        module_of(dataset, policy="tiny")
    with pytest.raises(GridsError, match="is a grids policy, but a teacher sees every token"):
        module_of(dataset, policy=str(grids_checkpoint), tokens=16)
    with pytest.raises(GridsError, match="teaches a policy with few visual tokens"):
        module_of(dataset, policy=str(dense_checkpoint), tokens="dense")
    with pytest.raises(GridsError, match="drop --reducer blind"):
        module_of(dataset, policy=str(dense_checkpoint), reducer="blind", tokens=None)
    with pytest.raises(GridsError, match="would teach nothing"):
        module_of(dataset, policy=str(dense_checkpoint), teacher=str(dense_checkpoint), distill=0.0)
    with pytest.raises(GridsError, match=r"--model\.distill_map 0\.5 without --distill would teach nothing"):
        module_of(dataset, policy=str(dense_checkpoint), distill_map=0.5, distill=0.0)
    with pytest.raises(GridsError, match=r"--model\.distill_saliency 0\.5 without --distill would teach nothing"):
        module_of(dataset, policy=str(dense_checkpoint), distill_saliency=0.5, distill=0.0)
    with pytest.raises(GridsError, match="the 'pool' reducer has no points that move"):
        module_of(dataset, policy=str(dense_checkpoint), distill_saliency=0.5, reducer="pool")
    with pytest.raises(GridsError, match="look_first=8: the 'pool' reducer has no points that move"):
        module_of(dataset, policy=str(dense_checkpoint), look_first=8, reducer="pool")
    with pytest.raises(GridsError, match="tokens are sampled after the vision tower"):
        module_of(dataset, policy=str(dense_checkpoint), distill_map=0.5)
    with pytest.raises(GridsError, match="which have no temperature"):
        module_of(dataset, policy=str(dense_checkpoint), distill_temperature=2.0)
    with pytest.raises(GridsError, match="shares of the loss"):
        module_of(dataset, policy=str(dense_checkpoint), distill=1.5)
    other = tmp_path / "other"
    shutil.copytree(dense_checkpoint, other)
    (statistics,) = other.glob("policy_preprocessor_*normalizer*.safetensors")
    changed = load_file(statistics)
    changed["action.mean"] = changed["action.mean"] + 1
    save_file(changed, statistics)
    with pytest.raises(GridsError, match="was not trained on this dataset: its mean of 'action' differs"):
        module_of(dataset, policy=str(dense_checkpoint), teacher=str(other))


def test_looking_first_on_more_frames_than_memory_holds_is_refused(monkeypatch):
    looks = looking.Looks([(torch.zeros(8, 4, 4, 2, dtype=torch.bfloat16), {}, 0)], torch.zeros(8, 1, 16))
    assert looks.size == 8 * 4 * 4 * 2 * 2
    monkeypatch.setattr(looking.psutil, "virtual_memory", lambda: SimpleNamespace(available=5 * looks.size))
    looking.require_memory(looks, 2)
    with pytest.raises(GridsError, match=r"look_first=24: feature maps of so many frames .* give at most 16"):
        looking.require_memory(looks, 3)


def test_student_and_teacher_draw_the_same_biased_times(dataset, dense_checkpoint):
    """With every token and nothing trained they are the same policy, so any distance is a difference in draws."""
    module = module_of(dataset, policy=str(dense_checkpoint), tokens=144, train="all", time_bias=3.0).eval()
    data = LeRobotDataModule(str(dataset), batch_size=4)
    data.load(module.policy.config)
    batch = module._prepare(next(iter(data.val_dataloader())), augment=False)
    losses = []
    for biased in (module._biased_time(), nullcontext()):
        torch.manual_seed(0)
        with biased:
            loss, distance = module.distillation.losses(batch)
        losses.append(loss.item())
        assert distance.item() == 0.0
    assert losses[0] != losses[1]


def test_what_cannot_be_trained_for_few_steps(dataset, dense_checkpoint):
    with pytest.raises(GridsError, match="give a bias above 0, and a weight from 0 on"):
        module_of(dataset, policy=str(dense_checkpoint), time_bias=0.0)
    with pytest.raises(GridsError, match="give a bias above 0, and a weight from 0 on"):
        module_of(dataset, policy=str(dense_checkpoint), one_step=-1.0)


def test_a_grids_checkpoint_learns_from_a_named_teacher(dataset, dense_checkpoint, grids_checkpoint):
    module = module_of(dataset, policy=str(grids_checkpoint), tokens=16, teacher=str(dense_checkpoint))
    assert isinstance(module.distillation.teacher, DenseTeacher)
