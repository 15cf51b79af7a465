"""The blocked attention of the CPU against torch's."""

import pytest
import torch
from torch.nn import functional as F

from gpt2_xla.model import causal_attention
from gpt2_xla.runtime.cpu_attention import _BlockedAttention, cpu_attention

# T below, at and above the block sizes, and on both sides of what keeps the probabilities (T <= 6 D).
SHAPES = [(2, 3, 1, 8), (2, 3, 48, 8), (2, 3, 49, 8), (1, 2, 64, 16), (2, 1, 200, 4), (1, 2, 257, 64), (1, 1, 500, 16)]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_attention_in_float64(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    expected, found = F.scaled_dot_product_attention(*inputs, is_causal=True), _BlockedAttention.apply(*inputs)
    torch.testing.assert_close(found, expected)
    for gradient, reference in zip(
        torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight), strict=True
    ):
        # torch's own CPU kernel takes its row sums in lower precision than float64.
        torch.testing.assert_close(gradient, reference, atol=5e-6, rtol=0)


def test_its_gradients_are_those_of_its_values() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(1, 2, 70, 4, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(3)]
    assert torch.autograd.gradcheck(_BlockedAttention.apply, inputs, fast_mode=True)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("length", [64, 300])
def test_in_bf16_it_errs_no_more_than_torch(kv_heads: int, length: int) -> None:
    """Both against float32, as the program calls it: views of one projection, in grouped heads too."""
    generator = torch.Generator().manual_seed(2)
    widths = [4 * 32, kv_heads * 32, kv_heads * 32]
    whole = torch.randn(2, length, sum(widths), generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(2, 4, length, 32, generator=generator)

    def errors(attend: object, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        q, k, v = (x.unflatten(2, (-1, 32)).transpose(1, 2) for x in whole.to(dtype).split(widths, dim=2))
        y = attend(q, k, v, 0.0)  # type: ignore[operator]
        (gradient,) = torch.autograd.grad(y, whole, weight.to(dtype))
        return y.float(), gradient.float()

    exact = errors(causal_attention, torch.float32)
    ours, torchs = errors(cpu_attention, torch.bfloat16), errors(causal_attention, torch.bfloat16)
    for value, other, reference in zip(ours, torchs, exact, strict=True):
        assert (value - reference).norm() < 2 * (other - reference).norm()
        assert (value - reference).norm() < 0.01 * reference.norm()


def test_dropout_and_float32_are_torchs() -> None:
    q, k, v = (torch.randn(1, 2, 40, 8) for _ in range(3))
    torch.testing.assert_close(cpu_attention(q, k, v, 0.0), causal_attention(q, k, v, 0.0), rtol=0, atol=0)
    torch.manual_seed(5)
    ours = cpu_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.5)
    torch.manual_seed(5)
    assert torch.equal(ours, causal_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), 0.5))
