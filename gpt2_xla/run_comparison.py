"""Groups of runs against each other: validation loss by tokens, mean and spread, and who needs how many tokens."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gpt2_xla import checkpoint_files
from gpt2_xla.cli import from_dict
from gpt2_xla.config import PretrainConfig
from gpt2_xla.errors import UserError
from gpt2_xla.report import read_metrics

COLORS = ("#08519c", "#d94801", "#238b45", "#6a51a3", "#636363")


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone, say."""

    name: str
    runs: tuple[Path, ...]
    tokens: tuple[int, ...]  # trained on, at each validation; the same in all runs
    losses: tuple[tuple[float, ...], ...]  # of each run, nats per token

    @property
    def means(self) -> tuple[float, ...]:
        """Over the runs, at each validation."""
        return tuple(statistics.fmean(at_once) for at_once in zip(*self.losses, strict=True))

    def spread(self, index: int) -> float:
        """The runs' standard deviation at a validation; 0 for a single run."""
        values = [losses[index] for losses in self.losses]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def begins_below(self, loss: float) -> bool:
        """Whether it was there before its first validation: then tokens_to() is an upper bound."""
        return self.means[0] < loss

    def tokens_to(self, loss: float) -> float:
        """Tokens after which the mean loss has come down to `loss`, on a line between validations; inf if it has not."""
        means = self.means
        for index, mean in enumerate(means):
            if mean <= loss:
                if index == 0:
                    return self.tokens[0]
                share = (means[index - 1] - loss) / (means[index - 1] - mean)
                return self.tokens[index - 1] + share * (self.tokens[index] - self.tokens[index - 1])
        return math.inf


def read_groups(arguments: Sequence[str]) -> list[Group]:
    """The groups named as NAME=RUN,RUN,…; raises UserError with all mistakes together."""
    groups, mistakes = [], []
    for argument in arguments:
        name, equals, folders = argument.partition("=")
        if not equals or not name or not all(folders.split(",")):
            mistakes.append(f"--runs {argument}: expected NAME=RUN_DIR,RUN_DIR,…, as in gpt2=runs/a,runs/b")
            continue
        try:
            groups.append(_read_group(name, [Path(folder) for folder in folders.split(",")]))
        except UserError as error:
            mistakes += [f"--runs {name}: {mistake}" for mistake in error.mistakes]
    if mistakes:
        raise UserError(mistakes)
    return groups


def _read_group(name: str, runs: Sequence[Path]) -> Group:
    curves = [_curve(run) for run in runs]
    for run, curve in zip(runs, curves, strict=True):
        if curve.keys() != curves[0].keys():
            raise UserError(f"{run} was not validated at the same numbers of tokens as {runs[0]}")
    return Group(name, tuple(runs), tuple(curves[0]), tuple(tuple(curve.values()) for curve in curves))


def _curve(run: Path) -> Mapping[int, float]:
    """Validation loss by tokens trained on; raises UserError where there is none."""
    records = read_metrics(run)["valid"]
    config = from_dict(PretrainConfig, checkpoint_files.read_json(run / "config.json"))
    found = {
        config.batch_sizes.before(record["step"]) * config.model.seq_length: record["loss"]
        for record in records
        if record["step"] > 0 and record["loss"] is not None
    }
    if not found:
        raise UserError(f"{run} has no validation loss after its first step")
    return found


def table(groups: Sequence[Group]) -> str:
    """A Markdown table: last loss, mean ± standard deviation, and the tokens to the first group's last loss."""
    first = groups[0]
    lines = [
        f"| group | runs | tokens | validation loss | spread | tokens to {first.name}'s last loss | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for group in groups:
        needed = group.tokens_to(first.means[-1])
        most = "≤ " if group.begins_below(first.means[-1]) else ""
        told = (f"{most}{needed:,.0f}", f"{most}{needed / first.tokens[-1]:.2f}")
        if math.isinf(needed):
            told = "never", ""
        lines.append(
            f"| {group.name} | {len(group.runs)} | {group.tokens[-1]:,} | {group.means[-1]:.4f} | {group.spread(-1):.4f} | "
            f"{told[0]} | {told[1]} |"
        )
    return "\n".join(lines)


def draw(groups: Sequence[Group], path: Path) -> None:
    """Write a picture of the groups' means, with a band of a standard deviation to each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for number, group in enumerate(groups):
        color = COLORS[number % len(COLORS)]
        spreads = [group.spread(index) for index in range(len(group.tokens))]
        means = group.means
        label = f"{group.name}: {means[-1]:.4f}" + (f" ± {spreads[-1]:.4f}" if len(group.runs) > 1 else "")
        axes.plot(group.tokens, means, color=color, marker="o", markersize=3, label=label)
        low = [mean - spread for mean, spread in zip(means, spreads, strict=True)]
        high = [mean + spread for mean, spread in zip(means, spreads, strict=True)]
        axes.fill_between(group.tokens, low, high, color=color, alpha=0.2, linewidth=0)
    target = groups[0].means[-1]
    axes.axhline(target, color="#636363", linewidth=0.8, linestyle="--")
    for number, group in enumerate(groups[1:], start=1):
        tokens = group.tokens_to(target)
        if not math.isinf(tokens) and not group.begins_below(target):  # else the place is not on its curve
            axes.plot([tokens], [target], color=COLORS[number % len(COLORS)], marker="x", markersize=9)
    axes.xaxis.set_major_formatter(EngFormatter())  # 600 k and 1 M, by whatever the ticks are
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("validation loss (nats per token)")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
