"""--compare: the same step with other options, side by side on each slice."""

from dataclasses import dataclass

from gpt2_xla.cli import parse
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.outcome import GIB, RESOURCES, speed
from gpt2_xla.tpu_plan.plan import Compiled
from gpt2_xla.validation import config_mistakes

AS_GIVEN = "as given"
REFERENCE = "reference"
LEVERS = "levers"  # a value of --compare that stands for many
COLUMNS = (
    *(
        "step",
        "slice",
        "sequences × micro-steps",
        "peak GiB",
        "temporaries GiB",
        "× first",
        "TFLOP",
        "HBM GB",
        "× first",
    ),
    *("sent MB", "bound by", "compute ms", "HBM ms", "links ms", "tokens/s bound", "MFU bound"),
)


@dataclass(frozen=True)
class Row:
    """One step on one slice; `name` is its flags."""

    name: str
    compiled: Compiled


def variants(config: PlanConfig, mistakes: list[str]) -> list[tuple[str, PlanConfig]]:
    """The steps to compare, each once: the reference first, if it is one of them, then the given one.

    What is wrong with the others goes to the mistakes; a lever that does not go with the given options is refused later.
    """
    found = {AS_GIVEN: config}
    for text in config.plan.compare:
        if text == LEVERS:
            found |= {_shown(lever): parsed for lever in levers(config) if (parsed := _parse(lever, config)) != config}
            continue
        own: list[str] = []
        try:
            found[_shown(text)] = _parse(text, config, own)
        except UserError as error:
            own += error.mistakes
        mistakes += [f"--compare {text!r}: {mistake}" for mistake in own]
    return sorted(found.items(), key=lambda step: step[0] != _shown(REFERENCE))


def levers(config: PlanConfig) -> list[str]:
    """What changes memory, traffic or speed of a step, as values of --compare."""
    model, batch = config.model, config.data.train_batch_size
    heads = [model.d_model // size for size in (64, 128) if model.d_model % size == 0]
    heads = [count for count in heads if count % (model.num_kv_heads or 1) == 0]
    return [
        REFERENCE,
        *("attention=math", "attention=flash"),
        *("activation-checkpointing=selective", "activation-checkpointing=block"),
        *("residual-precision=fp32", "residual-precision=bf16"),
        *("loss-chunk=0", "loss-chunk=512"),
        *("scan-layers", "scan-layers activation-checkpointing=block"),
        *(f"num-heads={count}" for count in heads),
        "vocab-multiple=128",
        f"train-batch-size={2 * batch}",
        f"train-batch-size={4 * batch} activation-checkpointing=block",
    ]


def _parse(text: str, config: PlanConfig, mistakes: list[str] | None = None) -> PlanConfig:
    """The given options with those of a value of --compare; `mistakes` hears what is wrong with them together."""
    parsed = parse(PlanConfig, _flags(text), "", base=config, mistakes=mistakes)
    if mistakes is not None:
        mistakes += config_mistakes(parsed.config, parsed.explicit)
    return parsed.config


def _flags(text: str) -> list[str]:
    """`num-heads=6 no-shuffle` as flags."""
    return [f"--{word.lstrip('-')}" for word in text.replace("_", "-").split()]


def _shown(text: str) -> str:
    return " ".join(_flags(text)).replace("=", " ")


def table(rows: list[Row]) -> str:
    """Markdown, a slice after the other; per device and optimizer step, tokens/s of the slice."""
    lines = [" | ".join(COLUMNS), " | ".join(["---"] * len(COLUMNS))]
    first: dict[str, Compiled] = {}
    for row in rows:
        slice = row.compiled.wish.slice.name
        base = first.setdefault(slice, row.compiled)
        name = row.name if row.name == AS_GIVEN else f"`{row.name}`"
        lines.append(" | ".join([name, slice, *_cells(row.compiled, base)]))
    return "\n".join(f"| {line} |" for line in lines)


def _cells(compiled: Compiled, first: Compiled) -> list[str]:
    data = compiled.wish.config.data
    batch = f"{data.train_batch_size} × {data.gradient_accum_step}"
    if compiled.traffic is None:
        short = compiled.shortage
        why = f"does not fit: {short.needed / GIB:.2f} of {short.usable / GIB:.2f}" if short else compiled.trouble
        return [batch, why.replace("|", "/").replace("\n", " "), *["–"] * (len(COLUMNS) - 4)]
    answer, traffic, fast = compiled.answer, compiled.traffic, speed(compiled)
    return [
        batch,
        f"{answer.peak / GIB:.2f}",
        f"{answer.temporaries / GIB:.2f}",
        _ratio(answer.temporaries, first.answer.temporaries),
        f"{fast.flops / 1e12:.2f}",
        f"{traffic.hbm / 1e9:.1f}",
        _ratio(traffic.hbm, first.traffic.hbm if first.traffic else 0),
        f"{sum(size for _, size in traffic.collectives.values()) / 1e6:,.0f}",
        RESOURCES[fast.bounds.limit],
        *(f"{seconds * 1e3:.1f}" for seconds in (fast.bounds.compute, fast.bounds.hbm, fast.bounds.interconnect)),
        f"{fast.tokens_per_second:,.0f}",
        f"{fast.mfu:.1%}",
    ]


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else "–"
