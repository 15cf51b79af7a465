"""Did a run see every token once, in order? Replays its ledger (ledger.py) over all restarts and rollbacks."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gpt2_xla import checkpoint
from gpt2_xla.cli import from_dict
from gpt2_xla.config import PretrainConfig
from gpt2_xla.data import manifest as manifests
from gpt2_xla.data.batch_hash import BatchOrder, token_hash
from gpt2_xla.data.loader import TokenWindows
from gpt2_xla.data.train_dirs import parse_train_dirs
from gpt2_xla.data.training_set import TrainingSet, TrainingSource
from gpt2_xla.errors import UserError
from gpt2_xla.ledger import FILE
from gpt2_xla.script_config import VerifyRunConfig

MOST_TOLD = 20  # problems; what follows one is often its consequence
# Fields of lines that are whole numbers.
NUMBERS = ("step", "samples", "first", "count", "seed", "seq_length", "batch_size", "world_size")


@dataclass(frozen=True)
class Batch:
    """A line of the ledger: what one optimizer step saw."""

    line: int
    step: int
    first: int  # sample
    count: int
    windows: str
    tokens: str
    order: BatchOrder


@dataclass(frozen=True)
class Skip:
    """Samples that a rollback left out, after step `step`."""

    step: int
    first: int
    end: int  # one past the last


@dataclass
class Replay:
    """The run as its ledger tells it: `course` is what counts in the end, `batches` all that was ever read."""

    course: list[Batch] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    skips: list[Skip] = field(default_factory=list)
    starts: int = 0
    base: tuple[int, int] = (0, 0)  # step and sample that the ledger begins with; not 0 for a branch of another run
    problems: list[str] = field(default_factory=list)

    def position(self) -> tuple[int, int]:
        """Steps done, and the sample to come next."""
        step, sample = (
            (self.course[-1].step, self.course[-1].first + self.course[-1].count) if self.course else self.base
        )
        return step, self.skips[-1].end if self.skips and self.skips[-1].step == step else sample

    def start(self, line: int, step: int, samples: int) -> None:
        """Training begins after `step`: later steps are undone, and so are rollbacks that no checkpoint knows of."""
        self.starts += 1
        if self.starts == 1:
            self.base = step, samples
            return
        self._undo(line, step)
        if step < self.base[0]:  # the ledger of a branch, which was begun again further back
            self.base = step, samples
        while self.skips and self.skips[-1].step == step and self.skips[-1].end != samples:
            self.skips.pop()
        self._expect(line, f"the start after step {step}", step, samples)

    def batch(self, one: Batch) -> None:
        """The next step."""
        step, sample = self.position()
        if one.step <= step:
            self.problems.append(f"line {one.line}: step {one.step} again, after step {step}")
        elif one.step > step + 1:
            self.problems.append(
                f"line {one.line}: step {one.step} follows step {step}: {_range('step', step + 1, one.step)} missing"
            )
        elif one.first != sample:
            self._expect(one.line, f"step {one.step}", one.step - 1, one.first)
        self.course.append(one)
        self.batches.append(one)

    def rollback(self, line: int, step: int, samples: int) -> None:
        """Back to `step`, and on with the data from `samples`."""
        self._undo(line, step)
        at, sample = self.position()
        if at == step and samples < sample:
            self.problems.append(
                f"line {line}: the rollback to step {step} goes on with sample {samples}, which came before"
            )
        self.skips.append(Skip(step, sample, samples))

    def _undo(self, line: int, step: int) -> None:
        """Forget what came after `step`."""
        known = self.position()[0]
        if step > known:
            self.problems.append(
                f"line {line}: goes on after step {step}, but the ledger ends with step {known}: {_range('step', known + 1, step + 1)} missing"
            )
        while self.course and self.course[-1].step > step:
            self.course.pop()
        while self.skips and self.skips[-1].step > step:
            self.skips.pop()

    def _expect(self, line: int, what: str, step: int, samples: int) -> None:
        known, sample = self.position()
        if known == step and samples > sample:
            self.problems.append(
                f"line {line}: {what} begins with sample {samples}: {_range('sample', sample, samples)} left out"
            )
        elif known == step and samples < sample:
            self.problems.append(
                f"line {line}: {what} begins with sample {samples}: {_range('sample', samples, sample)} seen again"
            )


def _range(what: str, first: int, end: int) -> str:
    return f"{what} {first} is" if end == first + 1 else f"{what}s {first} to {end - 1} are"


def verify_run(config: VerifyRunConfig, folder: Path) -> tuple[str, list[str]]:
    """What the run saw, in words, and every problem found, with its line.

    Raises `UserError` if there is no ledger to read.
    """
    replay = replay_ledger(folder / FILE)
    problems = replay.problems + _checkpoint_problems(folder, replay)
    train, why_not = _data_at_hand(config, folder, replay)
    if train is not None:
        problems += _hash_problems(train, replay, config.tokens)
        if not problems:
            problems += _repeated_windows(train, replay.course)
    told = [*problems[:MOST_TOLD], *([f"and {len(problems) - MOST_TOLD} more"] if len(problems) > MOST_TOLD else [])]
    return _summary(replay, train, why_not, bool(problems)), told


def replay_ledger(path: Path) -> Replay:
    """Follow the ledger line by line; raises `UserError` if it can't be read."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; is {path.parent} a run folder?") from error
    replay, order = Replay(), None
    records = [_parsed(text) for text in lines]
    for line, record in enumerate(records, start=1):
        try:
            if record is None:
                # A crash cuts the last line short; a restart goes on below it.
                after = next((other for other in records[line:] if other is not None), None)
                if after is not None and after["kind"] != "start":
                    replay.problems.append(f"line {line} is no record")
            elif record["kind"] == "start":
                order = BatchOrder(**{one.name: record[one.name] for one in fields(BatchOrder)})
                order = replace(order, batch_sizes=str(order.batch_sizes))
                order.sizes  # noqa: B018 - a text that is no schedule shows here
                replay.start(line, record["step"], record["samples"])
            elif order is None:
                raise KeyError("a start before it")
            elif record["kind"] == "rollback":
                replay.rollback(line, record["step"], record["samples"])
            else:
                own = {one.name: record[one.name] for one in fields(Batch) if one.name not in ("line", "order")}
                replay.batch(Batch(line=line, order=order, **own))
        except KeyError as error:
            replay.problems.append(f"line {line} lacks {error.args[0]}")
        except UserError as error:
            order = None
            replay.problems.append(f"line {line}: {error.mistakes[0]}")
    return replay


def _parsed(text: bytes) -> dict[str, Any] | None:
    """A line as an object; None if it is cut short."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or "kind" not in found:
        return None
    return found if all(type(found.get(name, 0)) is int for name in NUMBERS) else None


def _checkpoint_problems(folder: Path, replay: Replay) -> list[str]:
    """Checkpoints of steps, or at positions in the data, that the ledger does not know of."""
    problems = []
    ends = {one.step: one.first + one.count for one in replay.course} | dict([replay.base])
    for path in checkpoint.checkpoints(folder):
        try:
            state = checkpoint.read_state(path)
        except UserError:  # damaged: not the ledger's affair
            continue
        if state.step not in ends:
            problems.append(f"{path.name} is there, but the ledger has no step {state.step}")
        elif state.samples != ends[state.step]:
            problems.append(
                f"{path.name} stands at sample {state.samples}, the ledger after step {state.step} at {ends[state.step]}"
            )
    return problems


def _data_at_hand(config: VerifyRunConfig, folder: Path, replay: Replay) -> tuple[TrainingSet | None, str]:
    """The run's training data, or None and why not."""
    orders = {one.order.seq_length for one in replay.batches}
    prints = {one.order.fingerprint for one in replay.batches}
    try:
        saved = from_dict(PretrainConfig, json.loads((folder / "config.json").read_text(encoding="utf-8")))
        dirs = parse_train_dirs(config.train_dir or saved.data.train_dir)
        sources = []
        for one in dirs:
            manifest = manifests.read(one.folder)
            windows = TokenWindows(one.folder, manifest, min(orders, default=1))
            sources.append(TrainingSource(one.name, one.weight, manifest, windows))
    except (OSError, ValueError, UserError) as error:
        return None, str(error)
    if not sources or not orders:
        return None, "there is nothing to compare with"
    train = TrainingSet(sources)
    if len(orders) > 1 or prints != {train.fingerprint}:
        return None, "parts of the run were trained on other data than " + " ".join(str(one.folder) for one in dirs)
    return train, ""


def _hash_problems(train: TrainingSet, replay: Replay, tokens: bool) -> list[str]:
    """Batches whose windows, or whose tokens as rank 0 read them, are not those of their samples."""
    problems = []
    for one in tqdm(replay.batches, desc="comparing", unit="batch", leave=False, dynamic_ncols=True, disable=None):
        where = f"line {one.line}: step {one.step}"
        sequences = one.order.sizes.sequences(one.step - 1)
        if one.count != sequences:
            problems.append(f"{where} took {one.count} samples, but its global batch has {sequences}")
            continue
        if next(one.order.window_hashes(train, one.first, 1, one.step - 1)) != one.windows:
            problems.append(f"{where} saw another batch than samples {one.first} to {one.first + one.count - 1}")
        elif tokens:
            samples = one.order.own_samples(one.first, one.step - 1)
            rows = train.rows(samples, seed=one.order.seed, shuffle=one.order.shuffle, vocab_size=2**32)
            if token_hash(rows) != one.tokens:
                problems.append(f"{where} read other tokens than the data holds now")
    return problems


def _repeated_windows(train: TrainingSet, course: list[Batch]) -> list[str]:
    """Windows that came a second time in an epoch of their source: of the run as it counts, beside its own numbering."""
    seen: dict[tuple[int, int], np.ndarray] = {}
    problems = []
    for one in course:
        samples = one.first + np.arange(one.count)
        numbers, indices = train.mixture.locate(samples)
        _, starts = train.places(samples, seed=one.order.seed, shuffle=one.order.shuffle)
        for number, source in enumerate(train.sources):
            own = numbers == number
            epochs, windows = indices[own] // len(source.windows), starts[own] // train.seq_length
            for epoch in np.unique(epochs).tolist():
                known = seen.setdefault((number, epoch), np.zeros(len(source.windows), bool))
                now = windows[epochs == epoch]
                if known[now].any() or len(np.unique(now)) < len(now):
                    problems.append(
                        f"line {one.line}: step {one.step} has windows of {source.name} that epoch {epoch + 1} already had"
                    )
                known[now] = True
    return problems


def _summary(replay: Replay, train: TrainingSet | None, why_not: str, bad: bool) -> str:
    steps, sequences = len(replay.course), sum(one.count for one in replay.course)
    length = replay.course[0].order.seq_length if replay.course else 0
    lines = [
        f"{steps:,} steps, {sequences:,} sequences, {sequences * length:,} tokens; "
        f"{_times(replay.starts, 'start')}, {len(replay.batches) - steps:,} steps replaced by later ones"
    ]
    if replay.base[0]:
        lines.append(f"begins after step {replay.base[0]} of another run, whose batches are not looked at")
    lines += [
        f"a loss spike: samples {one.first:,} to {one.end - 1:,} are left out after step {one.step}"
        for one in replay.skips
    ]
    if train is None:
        lines.append(f"the data is not at hand ({why_not}): only the order was checked, no hash")
    elif replay.course:
        epochs = train.epochs(replay.position()[1])
        lines.append("epochs: " + ", ".join(f"{name} {count:.2f}" for name, count in epochs.items()))
    if not bad:
        but = ", but for what was left out" if replay.skips else ""
        lines.append(f"every token once{' an epoch' if train else ''}, in order{but}")
    return "\n".join(lines)


def _times(count: int, what: str) -> str:
    return f"{count:,} {what}" + ("" if count == 1 else "s")
