"""What was planned, in words."""

import importlib.metadata
from collections.abc import Iterator

from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.estimate import REACHED, training_days
from gpt2_xla.tpu_plan.outcome import GIB, LARGEST_MOVERS, RESOURCES, Speed, speed
from gpt2_xla.tpu_plan.plan import Compiled
from gpt2_xla.tpu_plan.shortage import Shortage
from gpt2_xla.tpu_plan.traffic import Mover, Traffic

ERROR_LENGTH = 600  # characters of what the compiler says that are worth reading


def headline(config: PlanConfig) -> str:
    """What the numbers are, and are not."""
    least, most = min(REACHED), max(REACHED)
    return (
        f"Compiled by the TPU compiler (libtpu {importlib.metadata.version('libtpu')}), not run. Memory is the compiler's "
        "own count; times are bounds\nthat no run can beat, from its program and published peaks. Per device and optimizer "
        f"step of {config.tokens_at(0):,} tokens. Days and\ndollars: at {least:.0%} to {most:.0%} of the bound, the "
        "shares that two public trainings reached."
    )


def report(compiled: Compiled) -> str:
    """The lines on one slice."""
    return "\n".join([_title(compiled), *(f"  {what:<11} {text}" for what, text in _lines(compiled))])


def _title(compiled: Compiled) -> str:
    target, config = compiled.wish.slice, compiled.wish.config
    kind = "device" if target.device.devices_per_chip == 1 else "core"
    how = "replicas" if config.runtime.sharding == "none" else f"fsdp, mesh {config.runtime.mesh or 'fsdp'}"
    return (
        f"{target.name} ({target.chips} chips, {target.devices} {kind}s; {how}): "
        f"--train-batch-size {config.data.train_batch_size}, {config.data.gradient_accum_step} micro-steps"
    )


def _lines(compiled: Compiled) -> Iterator[tuple[str, str]]:
    usable = f"{compiled.wish.slice.device.hbm / GIB:.2f} GiB"
    if compiled.refused:
        yield "refused", compiled.refused
    elif compiled.failure:
        yield "not known", compiled.failure
    elif compiled.answer.error:
        short = compiled.shortage
        yield from _short_lines(short) if short else iter([("refused", _short(compiled.answer.error))])
    else:
        answer = compiled.answer
        yield (
            "fits",
            f"{answer.peak / GIB:.2f} of {usable}: arguments {answer.arguments / GIB:.2f}, "
            f"temporaries {answer.temporaries / GIB:.2f}, program {answer.code / GIB:.2f}",
        )
        assert compiled.traffic is not None
        yield from _speed_lines(compiled.traffic, speed(compiled))
        yield from _cost_lines(compiled, speed(compiled))
        yield from _mover_lines(compiled.traffic.movers[:LARGEST_MOVERS])
        yield "program", f"zless {compiled.program}"


def _short_lines(short: Shortage) -> Iterator[tuple[str, str]]:
    yield "DOES NOT FIT", f"it needs {short.needed / GIB:.2f} of {short.usable / GIB:.2f} GiB; its largest buffers:"
    for buffer in short.buffers:
        yield "", buffer


def _speed_lines(traffic: Traffic, fast: Speed) -> Iterator[tuple[str, str]]:
    limits = fast.bounds
    yield (
        "compute",
        f"{limits.compute * 1e3:,.1f} ms: {fast.flops / 1e12:,.2f} TFLOP of matrix products"
        + (
            f", {fast.flops / 1e12 - traffic.dot_flops / 1e12:,.2f} of them in the attention kernel"
            if traffic.kernels
            else ""
        ),
    )
    yield "HBM", f"{limits.hbm * 1e3:,.1f} ms: {traffic.hbm / 1e9:,.1f} GB"
    sent = ", ".join(f"{n} {kind} of {size / 1e6:,.1f} MB" for kind, (n, size) in traffic.collectives.items())
    yield "links", f"{limits.interconnect * 1e3:,.1f} ms: {sent or 'nothing'}"
    yield (
        "bound",
        f"{fast.tokens_per_second:,.0f} tokens/s on the slice, {fast.mfu:.1%} MFU, set by the {RESOURCES[limits.limit]}",
    )


def _cost_lines(compiled: Compiled, fast: Speed) -> Iterator[tuple[str, str]]:
    options, chips = compiled.wish.config.plan, compiled.wish.slice.chips
    days = training_days(options.tokens, fast.tokens_per_second)
    text = f"{options.tokens / 1e9:,.3g}B tokens in {days.least:,.2f} to {days.most:,.2f} days"
    if options.dollars_per_chip_hour is not None:
        cost = days * (24 * chips * options.dollars_per_chip_hour)
        text += f", ${cost.least:,.0f} to ${cost.most:,.0f}"
    yield "training", text


def _mover_lines(movers: list[Mover]) -> Iterator[tuple[str, str]]:
    for i, mover in enumerate(movers):
        amount = f"{mover.bytes / 1e9:7.2f} GB in {mover.count:4d} × "
        yield "moves most" if i == 0 else "", f"{amount}{mover.what}  {mover.source}"


def _short(error: str) -> str:
    """The beginning of what the compiler said: a whole complaint lists each buffer and can be a megabyte."""
    return error if len(error) <= ERROR_LENGTH else error[:ERROR_LENGTH] + " …"
