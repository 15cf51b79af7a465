"""Learning-rate schedules: pure functions of the step, in Python floats (a tensor would cost XLA a fetch per parameter)."""

import math
from collections.abc import Callable

from gpt2_xla.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, train_steps: int) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    Warm-up is linear: step s of the first --warmup-steps has (s + 1) / warmup_steps of the peak. Then --decay-method.
    """
    if step < optim.warmup_steps and optim.decay_method != "noam":
        return optim.learning_rate * (step + 1) / optim.warmup_steps
    return _DECAYS[optim.decay_method](step, optim, train_steps)


def _cosine(step: int, optim: OptimConfig, train_steps: int) -> float:
    """Half a cosine from the peak to --min-lr (Loshchilov & Hutter 2017, without restarts)."""
    share = 0.5 * (1 + math.cos(math.pi * _progress(step, optim, train_steps)))
    return optim.min_lr + share * (optim.learning_rate - optim.min_lr)


def _linear(step: int, optim: OptimConfig, train_steps: int) -> float:
    """A straight line from the peak to --min-lr."""
    share = 1 - _progress(step, optim, train_steps)
    return optim.min_lr + share * (optim.learning_rate - optim.min_lr)


def _noam(step: int, optim: OptimConfig, train_steps: int) -> float:  # noqa: ARG001 - the decays share a signature
    """Inverse square root (Vaswani et al. 2017), scaled so that warm-up ends at the peak; never below --min-lr after it."""
    warmup, position = max(optim.warmup_steps, 1), step + 1
    value = optim.learning_rate * min(position / warmup, math.sqrt(warmup / position))
    return value if position <= warmup else max(value, optim.min_lr)


def _wsd(step: int, optim: OptimConfig, train_steps: int) -> float:
    """Warm-up, stable, decay (Hu et al. 2024): the peak until the last --decay-steps, then a line to --min-lr."""
    return optim.min_lr + _stable_then_fall(step, optim, train_steps) * (optim.learning_rate - optim.min_lr)


def _wsd_sqrt(step: int, optim: OptimConfig, train_steps: int) -> float:
    """WSD whose fall is 1 - sqrt(its share done): fast at first; the best of the shapes in Hägele et al. 2024."""
    share = 1 - math.sqrt(1 - _stable_then_fall(step, optim, train_steps))
    return optim.min_lr + share * (optim.learning_rate - optim.min_lr)


def _stable_then_fall(step: int, optim: OptimConfig, train_steps: int) -> float:
    """1 until the last --decay-steps, then on a line to 0 at the end."""
    # By default a fifth of the run, or what warm-up leaves of it.
    default = max(min(train_steps // 5, train_steps - optim.warmup_steps), 1)
    length = optim.decay_steps if optim.decay_steps is not None else default
    return min(max(train_steps - step, 0) / length, 1.0)


def _progress(step: int, optim: OptimConfig, train_steps: int) -> float:
    """0 at the end of warm-up, 1 from --decay-steps (default: --train-steps) on."""
    end = optim.decay_steps if optim.decay_steps is not None else train_steps
    return min(1.0, (step - optim.warmup_steps) / max(end - optim.warmup_steps, 1))


_DECAYS: dict[str, Callable[[int, OptimConfig, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "noam": _noam,
    "wsd": _wsd,
    "wsd-sqrt": _wsd_sqrt,
}
