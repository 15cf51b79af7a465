"""The same step with other options, side by side: a row of the table for each value of --compare."""

from gpt2_xla.cli import parse
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.outcome import GIB, shortage, speed
from gpt2_xla.tpu_plan.plan import Compiled
from gpt2_xla.validation import config_mistakes

AS_GIVEN = "as given"
COLUMNS = (
    *("step", "slice", "batch", "peak GiB", "temporaries GiB", "TFLOP", "HBM GB", "sent MB"),
    *("compute ms", "HBM ms", "links ms", "tokens/s bound", "MFU bound"),
)


def variants(config: PlanConfig, mistakes: list[str]) -> list[tuple[str, PlanConfig]]:
    """The steps to compare, the given one first; what is wrong with the others goes to the mistakes."""
    found = [(AS_GIVEN, config)]
    for text in config.plan.compare:
        own: list[str] = []
        try:
            parsed = parse(PlanConfig, _flags(text), "", base=config, mistakes=own)
        except UserError as error:
            own += error.mistakes
        else:
            own += config_mistakes(parsed.config, parsed.explicit)
            found.append((text, parsed.config))
        mistakes += [f"--compare {text!r}: {mistake}" for mistake in own]
    return found


def _flags(text: str) -> list[str]:
    """`num-heads=6 no-shuffle` as flags."""
    return [f"--{word.lstrip('-')}" for word in text.replace("_", "-").split()]


def table(rows: list[tuple[str, Compiled]]) -> str:
    """Markdown; per device and optimizer step, tokens/s of the slice."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    lines += [" | ".join([name, compiled.wish.slice.name, *_cells(compiled)]) for name, compiled in rows]
    return "\n".join(f"| {line} |" for line in lines)


def _cells(compiled: Compiled) -> list[str]:
    batch = str(compiled.wish.config.data.train_batch_size)
    if compiled.traffic is None:
        short = shortage(compiled.answer.error)
        why = f"does not fit: {short.needed / GIB:.2f}" if short else compiled.failure or compiled.answer.error[:80]
        return [batch, why, *["–"] * (len(COLUMNS) - 4)]
    answer, traffic, fast = compiled.answer, compiled.traffic, speed(compiled)
    return [
        batch,
        f"{answer.peak / GIB:.2f}",
        f"{answer.temporaries / GIB:.2f}",
        f"{fast.flops / 1e12:.2f}",
        f"{traffic.hbm / 1e9:.1f}",
        f"{sum(size for _, size in traffic.collectives.values()) / 1e6:,.0f}",
        *(f"{seconds * 1e3:.1f}" for seconds in (fast.bounds.compute, fast.bounds.hbm, fast.bounds.interconnect)),
        f"{fast.tokens_per_second:,.0f}",
        f"{fast.mfu:.1%}",
    ]
