"""A step of several XLA replicas: one all-reduce, one decision."""

import json

import pytest
from commands import PYTHON, QUICK_XLA, ROOT, run

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replicas")
    run(*PYTHON, str(ROOT / "tests" / "xla_replica_step.py"), str(folder), **QUICK_XLA)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_gradients_and_loss_of_all_micro_steps_take_one_all_reduce(replicas):
    for replica in replicas:
        assert replica["all_reduces"] == 1
        assert (
            replica["reduced"] == replica["parameters"] + 2
        )  # the loss, and torch_xla's token that orders collectives
    assert replicas[0]["loss"] == replicas[1]["loss"]


def test_a_gradient_that_is_inf_on_one_replica_skips_the_step_on_all(replicas):
    for replica in replicas:
        assert not replica["norm_is_finite"]
        assert replica["skipped"]
        assert replica["goes_on"]
    assert replicas[0]["weights"] == replicas[1]["weights"]


def test_a_loss_that_is_inf_on_one_replica_skips_the_step_on_all_though_the_gradients_are_finite(replicas):
    for replica in replicas:
        loss_is_finite, norm_is_finite, *unchanged = replica["loss_alone"]
        assert (loss_is_finite, norm_is_finite) == (False, True)
        assert all(unchanged)
