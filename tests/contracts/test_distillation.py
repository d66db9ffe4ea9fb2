"""Every family can be its own teacher: the dense policy's prediction, from the same noise, without a second copy."""

import pytest
import torch

from driving import act, wrap
from lerobot_grids.training.distillation import DenseTeacher, Distillation, SelfTeacher, copied, watch
from lerobot_grids.training.looking import distance, learn_to_look, look
from lerobot_grids.training.lora import add_lora
from lerobot_grids.training.saliency import distance_to_points
from lerobot_policy_grids.families import get_family


def student_of(family, num_tokens, lora=False, cameras=1):
    policy = wrap(family.policy(cameras), num_tokens)
    policy.base.requires_grad_(False)
    # LeRobot names no targets for some families.
    if lora and policy.base._get_default_peft_targets():
        add_lora(policy.base, 4)
        for name, parameter in policy.base.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
    return policy.train()


def dense_prediction(family, batch, seed, cameras=1):
    """What the policy predicts that was never wrapped."""
    policy = family.policy(cameras).requires_grad_(False)
    target = get_family(policy.config.type).target(policy)
    torch.manual_seed(seed)
    with torch.no_grad(), watch(target) as seen:
        policy.forward(copied(batch))
    return seen[0]


def test_the_self_teacher_predicts_what_the_dense_policy_does(family):
    policy = student_of(family, 4, lora=True)
    batch = family.batch(policy.base)
    expected = dense_prediction(family, batch, seed=7)
    torch.manual_seed(7)
    taught = SelfTeacher(policy).predict(batch)
    assert torch.equal(taught.output, expected.output)
    assert torch.equal(taught.hidden, expected.hidden)
    assert not taught.output.requires_grad


def test_an_external_teacher_predicts_the_same(family):
    batch = family.batch(family.policy())
    teacher = DenseTeacher(family.policy())
    torch.manual_seed(7)
    assert torch.equal(teacher.predict(batch).output, dense_prediction(family, batch, seed=7).output)
    assert not any(parameter.requires_grad for parameter in teacher.policy.parameters())


def test_student_and_teacher_draw_the_same_noise_and_time(family):
    """With every token and nothing trained they are the same policy, so any distance is a difference in draws."""
    policy = student_of(family, family.tokens_per_camera)
    batch = family.batch(policy.base)
    _, distance = Distillation(policy, SelfTeacher(policy), feature_weight=1.0).losses(batch)
    assert distance.item() == 0.0
    _, distance = Distillation(policy, DenseTeacher(family.policy())).losses(batch)
    assert distance.item() == 0.0


def test_the_distance_teaches_reducer_and_adapters_and_nothing_else(family):
    policy = student_of(family, 4, lora=True)
    torch.nn.init.normal_(policy.reducer.query.weight, std=0.1)
    batch = family.batch(policy.base)
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    task, distance = Distillation(policy, SelfTeacher(policy), feature_weight=0.1).losses(batch)
    assert distance.item() > 0
    torch.manual_seed(0)
    distance.backward()
    assert {name for name, parameter in policy.named_parameters() if parameter.requires_grad} == trainable
    reached = {name for name, parameter in policy.named_parameters() if parameter.grad is not None}
    assert reached <= trainable
    assert "reducer.query.weight" in reached
    expected = {name for name in trainable if "lora_A" in name and not any(part in name for part in family.beyond)}
    assert expected <= reached
    assert policy.base.training
    assert task.requires_grad


def test_vision_runs_once_for_both(family):
    policy = student_of(family, 4, lora=True, cameras=2)
    calls = []
    vision = policy.family.stages(policy.base).vision
    vision.register_forward_hook(lambda *args: calls.append(len(args[1][0]) if args[1] else 0))
    batch = family.batch(policy.base)
    Distillation(policy, SelfTeacher(policy)).losses(batch)
    assert len(calls) == 1
    policy.forward(copied(batch))
    assert len(calls) == 2, "what was shared must not outlive the step"


def storages(*modules):
    """Bytes of all distinct storages of some modules' parameters and buffers."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


def test_a_self_teacher_keeps_no_second_copy(family):
    policy = student_of(family, 4, lora=True)
    alone = storages(policy)
    teacher = SelfTeacher(policy)
    Distillation(policy, teacher).losses(family.batch(policy.base))
    assert storages(policy, teacher.policy) == alone
    # The measure itself can tell: a teacher of its own is a second copy.
    assert storages(policy, DenseTeacher(family.policy()).policy) > 1.5 * alone


def test_after_looking_everywhere_the_policy_looks_at_k_places_again(family):
    policy = wrap(family.policy(), 4).eval()
    batch = family.batch(policy.base)
    before = act(policy, batch)
    with pytest.raises(RuntimeError, match="stop"), policy.looking_everywhere():
        raise RuntimeError("stop")
    assert torch.equal(act(policy, batch), before)


def test_points_move_to_where_the_dense_policy_looks(family):
    policy = student_of(family, 4, cameras=2)
    torch.nn.init.normal_(policy.reducer.query.weight, std=0.1)
    batch = family.batch(policy.base)
    seen = []
    for teacher in (SelfTeacher(policy), DenseTeacher(family.policy(2))):
        torch.manual_seed(7)
        expected = teacher.predict(batch)
        torch.manual_seed(7)
        taught = teacher.predict(batch, salient=True)
        assert torch.equal(taught.output, expected.output)
        assert not taught.output.requires_grad
        seen.append(taught.saliency)
        torch.manual_seed(7)
        assert torch.equal(teacher.predict(batch).output, expected.output), "the teacher acts as before"
    torch.testing.assert_close(*seen)
    assert seen[0].shape[1:] == (2, family.tokens_per_camera)
    assert seen[0].min() >= 0
    torch.testing.assert_close(seen[0].sum((1, 2)), torch.ones(len(seen[0])))
    # Points get a gradient from where it looks.
    torch.manual_seed(7)
    plain = Distillation(policy, SelfTeacher(policy)).losses(batch)[1]
    torch.manual_seed(7)
    drawn = Distillation(policy, SelfTeacher(policy), saliency_weight=1.0).losses(batch)[1]
    (drawn - plain.detach()).backward()
    assert policy.reducer.query.weight.grad.abs().max() > 0


def test_a_sampler_learns_alone_to_look_where_the_dense_policy_looks(family):
    policy = student_of(family, 4, cameras=2)
    batch = family.batch(policy.base)
    teaching = Distillation(policy, SelfTeacher(policy))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    budgets = []
    with torch.no_grad():
        looks = look(teaching, batch)
        # Stored maps give the points that the policy has.
        policy.seam.remember_coordinates()
        policy.forward(copied(batch))
        expected = distance_to_points(looks.saliency, policy.seam.coordinates, policy.seam.layout.token_grid)
        torch.testing.assert_close(distance(policy, looks), expected, rtol=0.02, atol=0.01)
    learn_to_look(teaching, iter([batch, batch]), 2, budgets.append)
    with torch.no_grad():
        assert distance(policy, looks) < 0.9 * expected
    assert budgets == [0, *sorted(budgets[1:-1]), 0]
    assert max(budgets) < 1
    changed = {name for name, value in policy.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("reducer.") for name in changed)
    assert all(weight.grad is None for weight in policy.parameters())
