"""The rows of a benchmark, and their tables."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from gpt2_xla.bench.breakdown import PARTS
from gpt2_xla.bench.contenders import Contender, precision_name
from gpt2_xla.model import flops_per_token

MIB = 2**20


@dataclass(frozen=True)
class Row:
    """What was measured of one loop. Times in seconds, memory in bytes."""

    name: str
    is_ours: bool
    machine: str
    precision: str
    processes: int
    tokens: int  # of an optimizer step
    times: tuple[float, ...]  # of a step, in each turn
    mfu: float | None
    peak_memory: int | None  # of its (first) process
    compiles: int | None
    compile_seconds: float | None
    loss: float  # the last one known
    parts: dict[str, float] | None  # of a step under the profiler

    @property
    def step(self) -> float:
        """The median turn's seconds a step."""
        return statistics.median(self.times)

    @property
    def tokens_per_second(self) -> float:
        """In the median turn."""
        return self.tokens / self.step

    def speed_of(self, other: "Row") -> float:
        """The other's speed, this one's being 1: the median over the turns, each of which both took at about the same time."""
        ratios = [mine / theirs for mine, theirs in zip(self.times, other.times, strict=True)]
        return statistics.median(ratios) * other.tokens / self.tokens


def make_row(contender: Contender, times: list[float], steps: int, seen: dict[str, Any]) -> Row:
    """The row of a loop from the seconds of its turns, of `steps` steps each."""
    config, peak = contender.config, seen["peak_flops"]
    per_step = tuple(seconds / steps for seconds in times)
    tokens = config.tokens_at(0)
    flops = tokens / statistics.median(per_step) * flops_per_token(config.model)
    return Row(
        name=contender.name,
        is_ours=contender.is_ours,
        machine=seen["machine"],
        precision=precision_name(config.runtime.mixed_precision),
        processes=contender.processes,
        tokens=tokens,
        times=per_step,
        mfu=flops / peak if peak else None,
        peak_memory=seen["peak_memory"],
        compiles=seen["compiles"],
        compile_seconds=seen["compile_seconds"],
        loss=seen["loss"],
        parts=seen.get("parts"),
    )


def table(rows: list[Row]) -> str:
    """All rows, the others beside the first of ours, as a Markdown table."""
    ours = next((row for row in rows if row.is_ours), None)
    titles = ["loop", "machine", "precision", "tokens/s", "step", "p90", "ours is faster", "peak memory", "ours needs"]
    lines = [[*titles, "MFU", "compiles", "compile time", "loss"]]
    for row in rows:
        beside = ours if not row.is_ours else None
        memory = beside.peak_memory / row.peak_memory if beside and beside.peak_memory and row.peak_memory else None
        lines.append(
            [
                row.name,
                row.machine,
                row.precision,
                f"{row.tokens_per_second:,.0f}",
                f"{row.step * 1e3:,.1f} ms",
                f"{_p90(row.times) * 1e3:,.1f} ms",
                _cell(row.speed_of(beside) if beside else None, "{:.2f} ×"),
                _cell(row.peak_memory, "{:,.0f} MiB", 1 / MIB),
                _cell(memory, "{:.2f} ×"),
                _cell(row.mfu, "{:.1%}"),
                _cell(row.compiles, "{:.0f}"),
                _cell(row.compile_seconds, "{:.1f} s"),
                f"{row.loss:.4f}" if math.isfinite(row.loss) else "–",
            ]
        )
    return _markdown(lines)


def scaling_table(rows: list[Row]) -> str:
    """Our loop with more and more processes; efficiency is the tokens/s of a process, the first row's being 1."""
    first = rows[0]
    lines = [["processes", "machine", "tokens a step", "tokens/s", "step", "efficiency", "peak memory of a process"]]
    for row in rows:
        efficiency = first.speed_of(row) * first.processes / row.processes
        lines.append(
            [
                str(row.processes),
                row.machine,
                f"{row.tokens:,}",
                f"{row.tokens_per_second:,.0f}",
                f"{row.step * 1e3:,.1f} ms",
                f"{efficiency:.2f}",
                _cell(row.peak_memory, "{:,.0f} MiB", 1 / MIB),
            ]
        )
    return _markdown(lines)


def breakdown_table(rows: list[Row]) -> str:
    """The parts of the steps of the rows that have them."""
    profiled = [(row, row.parts) for row in rows if row.parts is not None]
    columns = [["part of the step", *PARTS, "other", "a step under the profiler", "a step without it"]]
    for row, parts in profiled:
        times = [*(parts[part] for part in (*PARTS, "other")), sum(parts.values())]
        columns.append([f"{row.name}: ms", *(f"{time * 1e3:,.2f}" for time in times), f"{row.step * 1e3:,.2f}"])
        columns.append(["%", *(f"{time / times[-1]:.1%}" for time in times), ""])
    return _markdown([list(line) for line in zip(*columns, strict=True)])


def _markdown(lines: list[list[str]]) -> str:
    rows = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "---|" * (rows[0].count("|") - 1), *rows[1:]])


def _p90(times: tuple[float, ...]) -> float:
    return statistics.quantiles(times, n=10, method="inclusive")[-1] if len(times) > 1 else times[0]


def _cell(value: float | None, template: str, factor: float = 1.0) -> str:
    return template.format(value * factor) if value is not None else "–"
