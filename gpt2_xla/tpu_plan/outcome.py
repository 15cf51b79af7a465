"""What a compilation means for the user: does it fit, how fast can it be at best, what would a training cost."""

from dataclasses import dataclass
from typing import Any

from gpt2_xla.model import flops_per_token
from gpt2_xla.tpu_plan.estimate import Bounds, all_flops, bounds, training_days
from gpt2_xla.tpu_plan.plan import Compiled

GIB = 2**30
LARGEST_MOVERS = 10
RESOURCES = {"compute": "matrix units", "hbm": "HBM", "interconnect": "links"}


@dataclass(frozen=True)
class Speed:
    """What no run of the program can beat."""

    bounds: Bounds
    flops: float  # of a device's step
    tokens_per_second: float  # of the slice
    mfu: float


def speed(compiled: Compiled) -> Speed:
    """Bounds of a compiled program, from published peaks."""
    assert compiled.traffic is not None
    config, target = compiled.wish.config, compiled.wish.slice
    limits = bounds(compiled.traffic, target.device, target.devices)
    tokens_per_second = config.tokens_at(0) / limits.step
    flops = flops_per_token(config.model)
    return Speed(
        limits,
        all_flops(compiled.traffic),
        tokens_per_second,
        tokens_per_second * flops / (target.device.peak * target.devices),
    )


def facts(compiled: Compiled) -> dict[str, Any]:
    """All that is known, for --json. Bytes, seconds, FLOPs; of one device, unless said otherwise."""
    target, config = compiled.wish.slice, compiled.wish.config
    known: dict[str, Any] = {
        "slice": target.name,
        "chips": target.chips,
        "devices": target.devices,
        "train_batch_size": config.data.train_batch_size,
        "gradient_accum_step": config.data.gradient_accum_step,
        "usable_hbm": target.device.hbm,
        "fits": compiled.fits,
    }
    if compiled.refused:
        return known | {"refused": compiled.refused}
    if compiled.failure:
        return known | {"fits": None, "failure": compiled.failure}
    if compiled.answer.error:
        short = compiled.shortage
        known["compilation"] = _compilation(compiled)
        return known | (
            {"needed": short.needed, "largest": short.buffers} if short else {"error": compiled.answer.error}
        )
    assert compiled.traffic is not None
    answer, traffic, fast = compiled.answer, compiled.traffic, speed(compiled)
    days = training_days(config.plan.tokens, fast.tokens_per_second)
    price = config.plan.dollars_per_chip_hour
    return known | {
        "peak": answer.peak,
        "arguments": answer.arguments,
        "aliased": answer.aliased,
        "temporaries": answer.temporaries,
        "code": answer.code,
        "flops": fast.flops,
        "hbm_traffic": traffic.hbm,
        "collectives": {kind: {"count": n, "bytes": size} for kind, (n, size) in traffic.collectives.items()},
        "seconds": {name: getattr(fast.bounds, name) for name in ("compute", "hbm", "interconnect", "step")},
        "limit": fast.bounds.limit,
        "movers": [vars(mover) for mover in traffic.movers[:LARGEST_MOVERS]],
        "tokens_per_second_bound": fast.tokens_per_second,
        "mfu_bound": fast.mfu,
        "days": [days.least, days.most],
        "dollars": [n * 24 * target.chips * price for n in (days.least, days.most)] if price is not None else None,
        "program": str(compiled.program),
        "compilation": _compilation(compiled),
        "ran": False,
    }


def _compilation(compiled: Compiled) -> dict[str, float]:
    """What compiling took, when that was done."""
    return {"seconds": compiled.answer.seconds, "host_memory": compiled.answer.host_memory}
