"""Bounds on a step's time from what its program computes and moves, and what a run of it would take and cost."""

import math
from dataclasses import dataclass

from gpt2_xla.tpu_plan.hlo import Array
from gpt2_xla.tpu_plan.topology import Device
from gpt2_xla.tpu_plan.traffic import Traffic

MATRIX_UNIT = 128  # rows and columns; 256 on v6e. A kernel's products over fewer elements leave the rest of it idle
# Matrix products of (T, T, D) in the attention kernel: q k and p v; backward q k, dv, dp, dk and dq.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5
KERNEL_BLOCK = 1024  # of runtime/xla_splash.py


@dataclass(frozen=True)
class Bounds:
    """Seconds that each resource needs at least for one step, were the others free. None of them was measured on a TPU."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def step(self) -> float:
        """No step can be faster."""
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def limit(self) -> str:
        """The resource that sets it."""
        return max(("compute", "hbm", "interconnect"), key=lambda name: getattr(self, name))


def bounds(traffic: Traffic, device: Device, devices: int) -> Bounds:
    """The roofline of a program that runs on `devices` devices."""
    # A chip's links serve all of its devices.
    link = device.interconnect / device.devices_per_chip
    return Bounds(
        all_flops(traffic) / device.peak, traffic.hbm / device.hbm_bandwidth, wire_bytes(traffic, devices) / link
    )


def all_flops(traffic: Traffic) -> float:
    """Of matrix products, those of kernels too."""
    return traffic.dot_flops + sum(kernel_flops(operands) * times for _, operands, times in traffic.kernels)


def wire_bytes(traffic: Traffic, devices: int) -> float:
    """Bytes that a device sends, with rings: an all-reduce sends its array nearly twice, others nearly once, a permute once."""
    share = (devices - 1) / devices
    rounds = {"all-reduce": 2 * share, "collective-permute": 1.0}
    return sum(rounds.get(kind, share) * size for kind, (_, size) in traffic.collectives.items())


def kernel_flops(operands: tuple[Array, ...]) -> float:
    """FLOPs of one call of the attention kernel, the idle part of the matrix unit included.

    The forward call takes three arrays of heads, the backward one more. Blocks above the diagonal are left out.
    """
    heads = [array.shape for array in operands if len(array.shape) == 4 and min(array.shape[-2:]) > 1]
    if not heads:
        return 0.0
    batch, count, one, other = heads[0]
    length, head_dim = max(one, other), min(one, other)
    blocks = max(1, length // math.gcd(length, KERNEL_BLOCK))
    products = FORWARD_PRODUCTS if len(heads) <= 3 else BACKWARD_PRODUCTS
    wide = -(-head_dim // MATRIX_UNIT) * MATRIX_UNIT
    return products * 2.0 * batch * count * length**2 * wide * (blocks + 1) / (2 * blocks)


# What two public trainings reached of such a bound: GPT-2 1.5B on a v3-128 (444,000 tokens/s) and GPT-2 124M on a v3-8 (10B
# tokens in 14 hours). Their bounds were taken with XLA's "bytes accessed", which is larger than the traffic counted here, so
# that of today's bound a like run may reach less: the second's was 38 % of what --reference gives on v3-8 (517,000 tokens/s).
# They are all that is known of the distance from a bound to a run.
REACHED = (0.37, 0.71)


@dataclass(frozen=True)
class Range:
    """The least and the most that a training may take."""

    least: float
    most: float

    def __mul__(self, factor: float) -> "Range":
        return Range(self.least * factor, self.most * factor)


def training_days(tokens: float, tokens_per_second: float) -> Range:
    """Days for that many tokens at the shares of the bound that are known to have been reached."""
    days = tokens / tokens_per_second / 86400
    return Range(days / max(REACHED), days / min(REACHED))
