"""All micro-steps of a step are one XLA loop: equal to eager micro-steps, with dropout masks of their own."""

import pytest
from commands import PYTHON, QUICK_XLA, ROOT, printed_json, run

pytestmark = pytest.mark.xla


@pytest.fixture(scope="module")
def found():
    return printed_json(run(*PYTHON, str(ROOT / "tests" / "xla_micro_steps.py"), **QUICK_XLA))


def test_loss_and_gradients_equal_eager_micro_steps(found):
    assert found["difference"] < 1e-6
    assert found["difference_one"] < 1e-6
    assert found["tied"]


def test_bf16_autocast_reaches_into_the_loop_and_gradients_stay_float32(found):
    assert 1e-5 < found["bf16_difference"] < 2e-2
    assert found["bf16_dtypes"] == ["torch.float32"]


def test_every_micro_step_and_every_step_draws_its_own_mask(found):
    (_, first), (_, second), (_, again) = found["masks"]
    # A weight survives both masks of a micro-step with probability 1/4, and then counts 4/4; so sums of 4 reach 4 and 0 to 4.
    assert {0.0, 1.0, 2.0} <= set(first) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert first != second
    assert first == again
    assert found["one_mask"][0][1] != found["one_mask"][1][1]
    assert set(found["one_mask"][0][1]) == {0.0, 4.0}


def test_a_checkpointed_block_draws_the_same_mask_again_in_the_backward_pass(found):
    for loss, gradient in found["checkpointed"]:
        assert loss == pytest.approx(sum(gradient))
    # Activation checkpointing changes no mask.
    assert found["checkpointed"] == found["masks"][:2]


def test_the_program_does_not_grow_with_the_number_of_micro_steps(found):
    few, many = found["program_sizes"]
    assert few == many
