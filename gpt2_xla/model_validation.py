"""Everything that can be wrong with a model's options, each as one sentence."""

import math

from gpt2_xla.config import ModelConfig
from gpt2_xla.errors import UserError


def model_mistakes(model: ModelConfig) -> list[str]:
    """The mistakes of the options among themselves; arithmetic alone, nothing is built."""
    at_least_one = {
        "--vocab-size": model.vocabulary,
        "--seq-length": model.seq_length,
        "--d-model": model.d_model,
        "--num-layers": model.num_layers,
        "--num-heads": model.num_heads,
        "--num-kv-heads": model.kv_heads,
        "--d-ff": model.hidden_dim,
    }
    mistakes = [f"{flag} {value} must be at least 1" for flag, value in at_least_one.items() if value < 1]
    if not 0 <= model.vocab_padding < max(model.vocabulary, 1):
        mistakes.append(
            f"--vocab-padding {model.vocab_padding} must be at least 0 and below the vocabulary, {model.vocabulary}"
        )
    if not 0 <= model.dropout < 1:
        mistakes.append(f"--dropout {model.dropout} must be at least 0 and below 1")
    for flag, number in (("--rope-theta", model.rope_theta), ("--norm-eps", model.norm_eps)):
        if not 0 < number < math.inf:
            mistakes.append(f"{flag} {number} must be a finite number above 0")
    if model.position != "rope" and model.rope_theta != ModelConfig.rope_theta:
        mistakes.append(
            f"--rope-theta {model.rope_theta:g} has no meaning with --position {model.position}; "
            "add --position rope, or leave it out"
        )
    return mistakes + (_head_mistakes(model) if min(at_least_one.values()) >= 1 else [])


def check_model(model: ModelConfig) -> None:
    """Raise UserError with all of them."""
    if mistakes := model_mistakes(model):
        raise UserError(mistakes)


def _head_mistakes(model: ModelConfig) -> list[str]:
    width, heads, groups = model.d_model, model.num_heads, model.kv_heads
    mistakes = []
    if width % heads:
        nearest = _nearest_divisor(width, heads)
        mistakes.append(
            f"--d-model {width} is not divisible by --num-heads {heads}; use --num-heads {nearest}, for example"
        )
    elif model.position == "rope" and model.head_dim % 2:
        mistakes.append(
            f"--position rope turns pairs of a head's dimensions, but --d-model {width} / --num-heads {heads} is "
            f"{model.head_dim}, an odd number; use another --num-heads"
        )
    if heads % groups:
        nearest = _nearest_divisor(heads, groups)
        mistakes.append(
            f"--num-heads {heads} is not divisible by --num-kv-heads {groups}; use --num-kv-heads {nearest}, for example"
        )
    return mistakes


def _nearest_divisor(number: int, wanted: int) -> int:
    fits = [n for n in range(1, min(number, 2**16) + 1) if number % n == 0]
    return min(fits, key=lambda n: abs(n - wanted))
