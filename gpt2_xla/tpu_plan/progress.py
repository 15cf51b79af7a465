"""How planning goes on, on standard error: a bar on a terminal, lines in a log file."""

import sys

from tqdm import tqdm

from gpt2_xla.tpu_plan.compiler import Answer
from gpt2_xla.tpu_plan.jobs import Job
from gpt2_xla.tpu_plan.outcome import GIB
from gpt2_xla.tpu_plan.plan import Wish
from gpt2_xla.tpu_plan.shortage import shortage


class Progress:
    """Hears from a `Planner` what runs and what has ended."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ("", 0)
        self._lines = not sys.stderr.isatty()
        self._begun: list[Job] = []

    def tick(self, what: str, running: list[Job], ended: int, total: int) -> None:
        """Jobs of one kind run, some of `total` have ended; called several times a second."""
        new = (what, total) != self._stage
        self._stage = what, total
        if self._lines:
            self._tell_begun(what, running, total, new)
            return
        if new or self._bar is None:
            self.close()
            self._bar = tqdm(total=total, desc=what, file=sys.stderr, leave=False)
        self._bar.set_postfix_str(", ".join(f"{job.name} {job.seconds:.0f} s" for job in running), refresh=False)
        self._bar.update(ended - self._bar.n)
        self._bar.refresh()

    def _tell_begun(self, what: str, running: list[Job], total: int, new: bool) -> None:
        if what != "compiling":  # a matter of seconds
            if new:
                _tell(f"{what} {total} step{'s' if total > 1 else ''}")
            return
        for job in running:
            if not any(job is one for one in self._begun):
                self._begun.append(job)
                _tell(f"compiling {job.name}")

    def compiled(self, wish: Wish, answer: Answer | str, seconds: float, ended: int, total: int) -> None:
        """A compilation has ended, the `ended`-th of `total`; with a text, the compiler said nothing."""
        if self._lines:
            _tell(f"{ended} of {total}: {wish.title}: {_outcome(wish, answer)}, {seconds:.0f} s")

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _outcome(wish: Wish, answer: Answer | str) -> str:
    """What was found, in a few words."""
    if isinstance(answer, str):
        return answer
    if short := shortage(answer.error):
        return f"does not fit: {short.needed / GIB:.2f} GiB of {short.usable / GIB:.2f}"
    if answer.error:
        return f"the compiler refused: {answer.error.splitlines()[0][:100]}"
    return f"{answer.peak / GIB:.2f} GiB of {wish.slice.device.hbm / GIB:.2f}"


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
