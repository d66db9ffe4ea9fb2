"""The doctor and a policy on the Hub: its configuration is fetched, its weights are not."""

from comparing import BASE
from lerobot_grids.doctor import plan_checks, run_checks
from lerobot_policy_grids.checkpoint import find_checkpoint


def lines(policy):
    return {check.name: check for check in run_checks(plan_checks(policy, None, None, {}, None, None))}


def test_weights_are_announced_and_not_fetched(hub, dense_checkpoint):
    hub.add_folder(BASE, dense_checkpoint)
    checks = lines(BASE)
    assert all(check.status == "ok" for check in checks.values()), checks
    assert f"of weights from {BASE}" in checks["Download"].seen
    asked = [request for request in hub.requests if "model.safetensors" in request]
    assert asked == []
    find_checkpoint(BASE)
    assert lines(BASE)["Download"].seen == f"the weights of {BASE} are in the cache"


def test_a_repository_that_does_not_exist(hub):
    checks = lines("lab/nothing")
    assert list(checks) == ["Policy"]
    assert checks["Policy"].status == "fail"
    assert "does not exist" in checks["Policy"].seen
