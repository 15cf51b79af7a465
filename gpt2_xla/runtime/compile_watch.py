"""Compilations after warm-up: told when they happen, with what changed, and fatal if so wished."""

from collections.abc import Callable

from torch import Tensor

from gpt2_xla.runtime.base import Runtime

TOLD = 5  # recompilations that get a line of their own; a graph that changes in every step would drown all else


class CompileWatch:
    """Compares the runtime's counters before and after each piece of work.

    The first time of each kind of work (training, validation, saving) compiles its programs; any later compilation is one
    too many. With `limit`, more than that many ask the runtime to stop: `verdict` then says why.
    """

    def __init__(self, runtime: Runtime, say: Callable[[str], None], limit: int | None = None) -> None:
        self._runtime, self._say, self._limit = runtime, say, limit
        self._start = self._seen = runtime.compile_stats()
        self._last: dict[str, tuple[str, str]] = {}  # of each kind of work: its inputs and its graph
        self.recompiles = 0
        self.verdict: str | None = None

    def worked(self, kind: str, step: int, inputs: Tensor | None = None, graph: str = "") -> None:
        """Call after each piece of work of `kind` at `step`; `graph` is the runtime's `graph_hash`, where there is one."""
        before, self._seen = self._seen, self._runtime.compile_stats()
        now = (
            f"batch {tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}" if inputs is not None else "",
            graph,
        )
        last, self._last[kind] = self._last.get(kind), now
        programs = self._seen.count - before.count
        if last is None or programs == 0:
            return
        self.recompiles += programs
        what = (
            f"step {step}: {kind} compiled {programs} program{'s' if programs > 1 else ''} again, "
            f"in {self._seen.seconds - before.seconds:.1f} s; {_difference(last, now)}"
        )
        if self.recompiles - programs < TOLD:
            self._say(f"warning: {what}")
            if self.recompiles >= TOLD:
                self._say("warning: further recompilations are only counted (compiles in metrics.jsonl)")
        if self._limit is not None and self.recompiles > self._limit and self.verdict is None:
            self.verdict = f"{what}. That is more than --max-recompiles {self._limit}"
            self._runtime.request_stop()

    def expect(self, kind: str) -> None:
        """The next piece of work of `kind` is a first one again: it has reason to compile."""
        self._last.pop(kind, None)

    def summary(self) -> str:
        """What was compiled and executed, for all kinds of work, in words; empty if the runtime compiles nothing."""
        stats = self._runtime.compile_stats()
        if not stats.count and not stats.cache_hits:
            return ""
        programs = f"{stats.count} program{'' if stats.count == 1 else 's'} compiled in {stats.seconds:.1f} s"
        # A save alone copies every tensor: beside the numbers of training in metrics.jsonl these would seem too many.
        text = f"training, validation and saving together: {programs}, {self.recompiles} of them after warm-up"
        if stats.executions:
            text += f"; {stats.executions - self._start.executions:,} executions"
            text += f", {stats.fetches - self._start.fetches:,} copies to the host"
        if stats.cache_hits or stats.cache_misses:
            text += f"; --compile-cache: {stats.cache_hits} hits, {stats.cache_misses} misses"
        if stats.cache_failures:
            text += f", {stats.cache_failures} entries that could not be read"
        return text


def _difference(before: tuple[str, str], now: tuple[str, str]) -> str:
    """What differs between two pieces of work of one kind."""
    inputs = f"{before[0]} became {now[0]}" if before[0] != now[0] else ""
    graph = f"graph {before[1]} became {now[1]}" if before[1] != now[1] else ""
    if inputs or graph:
        return ", ".join(filter(None, (inputs, graph)))
    return f"{now[0] or 'nothing that is known'} did not change: a number or a branch that changes with the step is compiled in"
