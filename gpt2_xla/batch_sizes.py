"""How many sequences each optimizer step sees: --gradient-accum-step, or --batch-size-schedule. A pure function of the step."""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from gpt2_xla.errors import UserError

LONGEST_PART = 30  # characters of a part of the schedule


@dataclass(frozen=True)
class BatchSizes:
    """The micro-steps of every step, in stages; a micro-step always has the same number of sequences."""

    micro_batch: int  # sequences of a micro-step, over all replicas
    stages: tuple[tuple[int, int], ...]  # (first step, counted from 0; micro-steps from there on), the first at step 0

    def micro_steps(self, step: int) -> int:
        """Micro-steps of optimizer step `step`, counted from 0."""
        return self.stages[self._stage(step)][1]

    def sequences(self, step: int) -> int:
        """Sequences of optimizer step `step`, over all micro-steps and replicas."""
        return self.micro_batch * self.micro_steps(step)

    def before(self, step: int) -> int:
        """Sequences of all the steps before `step`."""
        return sum(count * micro_steps for count, micro_steps in self.spans(0, step)) * self.micro_batch

    @property
    def common(self) -> int:
        """The greatest number of sequences of which every step has a multiple."""
        return self.micro_batch * math.gcd(*(micro_steps for _, micro_steps in self.stages))

    def begins(self, step: int) -> bool:
        """Whether a later stage begins with `step`."""
        return step > 0 and step == self.stages[self._stage(step)][0]

    def spans(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """(steps, their micro-steps) in order, of the steps from `first` up to `end`, which is not one of them."""
        for number in range(self._stage(first), len(self.stages)):
            start, micro_steps = self.stages[number]
            stop = self.stages[number + 1][0] if number + 1 < len(self.stages) else end
            if (count := min(stop, end) - max(start, first)) > 0:
                yield count, micro_steps
            if stop >= end:
                return

    def __str__(self) -> str:
        """As the flag takes it: `0:64,2000:128`."""
        return ",".join(f"{step}:{self.micro_batch * micro_steps}" for step, micro_steps in self.stages)

    def _stage(self, step: int) -> int:
        return bisect_right(self.stages, step, key=lambda stage: stage[0]) - 1


def parse_batch_sizes(text: str, micro_batch: int) -> BatchSizes:
    """`0:64,2000:128`: 64 sequences a step from step 0 on, 128 from step 2000 on. Raises `UserError` with all that is wrong."""
    flag, mistakes = f"--batch-size-schedule {text}", []
    stages: list[tuple[int, int]] = []
    for part in text.split(","):
        step, colon, sequences = (word.strip() for word in part.partition(":"))
        if not (colon and step.isdecimal() and sequences.isdecimal() and len(part) <= LONGEST_PART):
            mistakes.append(f"{flag}: {part.strip()!r} is not STEP:SEQUENCES, as in 0:64,2000:128")
            continue
        stages.append((int(step), int(sequences)))
    if stages and not mistakes:
        steps = [step for step, _ in stages]
        if steps[0] != 0:
            mistakes.append(f"{flag} begins with step {steps[0]}; it must say what step 0 takes")
        if steps != sorted(set(steps)):
            mistakes.append(f"{flag}: the steps must rise from one part to the next")
        for count in dict.fromkeys(count for _, count in stages):
            if micro_batch > 0 and (count % micro_batch or count == 0):
                below = count - count % micro_batch
                use = f"{below} or {below + micro_batch}" if below else f"{micro_batch}"
                mistakes.append(
                    f"{flag}: {count} sequences are no whole micro-steps of --train-batch-size {micro_batch}; use {use}"
                )
    if mistakes:
        raise UserError(mistakes)
    return BatchSizes(micro_batch, tuple((first, count // max(micro_batch, 1)) for first, count in stages))
