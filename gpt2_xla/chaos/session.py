"""Many trials: seeds, limits, a line for each, and the table of faults."""

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from gpt2_xla.chaos.faults import FAULTS, Fault
from gpt2_xla.chaos.trial import Reference, Trial, plan, reference_run, run_trial, why_no_disk
from gpt2_xla.chaos.victim import write_data
from gpt2_xla.cli import did_you_mean
from gpt2_xla.errors import UserError
from gpt2_xla.script_config import ChaosConfig


def chaos(config: ChaosConfig) -> int:
    """Run the trials; 1 if one of them failed."""
    _check(config)
    with _ended_by_sigterm():
        home = Path(tempfile.mkdtemp(prefix="chaos-", dir=config.folder))
        say = _print_aside if config.json else _print
        trials: list[Trial] = []
        try:
            faults = _faults(config, home, say)
            for trial in _trials(config, faults, home):
                trials.append(trial)
                say(line(trial))
                if trial.problems:
                    say(f"  kept: {home / _name(trial)}\n  again: {_again(config, trial)}")
        finally:
            if not any(trial.problems for trial in trials):
                shutil.rmtree(home, ignore_errors=True)
        if config.json:
            print(json.dumps([trial.as_json() for trial in trials], indent=1))
        else:
            print(table(trials))
        if len(trials) < config.trials:
            say(f"--minutes {config.minutes:g} were over after {len(trials)} of {config.trials} trials")
        return int(any(trial.problems for trial in trials))


def _check(config: ChaosConfig) -> None:
    limits = {"--trials": config.trials, "--minutes": config.minutes, "--trial-seconds": config.trial_seconds}
    mistakes = [f"{flag} {value:g} is too small; expected more than 0" for flag, value in limits.items() if value <= 0]
    if not config.runtimes:
        mistakes.append("--runtimes names none; give one, for example torch")
    names = [fault.name for fault in FAULTS]
    mistakes += [
        f"--faults {name} is not one of {', '.join(names)}{did_you_mean(name, names)}"
        for name in config.faults
        if name not in names
    ]
    if config.folder is not None and not Path(config.folder).is_dir():
        mistakes.append(f"--folder {config.folder} is no folder; create it first")
    if mistakes:
        raise UserError(mistakes)


def _print(text: str) -> None:
    print(text, flush=True)


def _print_aside(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _faults(config: ChaosConfig, home: Path, say: Callable[[str], None]) -> list[Fault]:
    """The faults that may be done here."""
    wanted = [fault for fault in FAULTS if not config.faults or fault.name in config.faults]
    why_not = why_no_disk(home) if any(fault.needs_disk for fault in wanted) else None
    if why_not:
        say(f"full-disk is left out: {why_not}")
        wanted = [fault for fault in wanted if not fault.needs_disk]
    for runtime in config.runtimes:
        if not any(runtime in fault.runtimes for fault in wanted):
            raise UserError(f"none of these faults can be done to --runtimes {runtime}")
    return wanted


def _trials(config: ChaosConfig, faults: list[Fault], home: Path) -> Iterator[Trial]:
    """Run one after another, until --minutes are over."""
    end = time.monotonic() + 60 * config.minutes
    data = write_data(home / "data")
    references: dict[str, Reference] = {}
    for seed in range(config.seed, config.seed + config.trials):
        runtime = config.runtimes[seed % len(config.runtimes)]
        if runtime not in references:
            references[runtime] = reference_run(runtime, home / f"uninterrupted-{runtime}", data, config.trial_seconds)
        if time.monotonic() > end:
            return
        trial = plan(seed, runtime, faults)
        run_trial(trial, home / _name(trial), data, references[runtime], config.trial_seconds)
        if not trial.problems:
            shutil.rmtree(home / _name(trial))
        yield trial


def line(trial: Trial) -> str:
    """What a trial tells."""
    verdict = "FAILED: " + "; ".join(trial.problems) if trial.problems else "survived"
    faults = ", ".join(map(str, trial.strikes))
    options = " ".join(("", *trial.options))
    return (
        f"seed {trial.seed} {trial.runtime}{options}: {faults}; {trial.starts} starts, {trial.seconds:.0f} s: {verdict}"
    )


def table(trials: list[Trial]) -> str:
    """Faults × runtimes as Markdown: how often each struck, and in how many of these cases the trial survived."""
    runtimes = list(dict.fromkeys(trial.runtime for trial in trials))
    lines = ["", "| fault | " + " | ".join(runtimes) + " |", "|---" * (len(runtimes) + 1) + "|"]
    for fault in FAULTS:
        cells = []
        for runtime in runtimes:
            own = [(trial, one) for trial in trials if trial.runtime == runtime for one in trial.strikes]
            struck = [trial for trial, one in own if one.fault is fault and one.detail is not None]
            cells.append(f"{sum(not trial.problems for trial in struck)} of {len(struck)}" if struck else "–")
        lines.append(f"| {fault.name} | " + " | ".join(cells) + " |")
    cells = []
    for runtime in runtimes:
        all_of_it = [trial for trial in trials if trial.runtime == runtime]
        cells.append(f"{sum(not trial.problems for trial in all_of_it)} of {len(all_of_it)}")
    return "\n".join([*lines, "| **trials** | " + " | ".join(cells) + " |"])


def _name(trial: Trial) -> str:
    return f"seed-{trial.seed}-{trial.runtime}"


def _again(config: ChaosConfig, trial: Trial) -> str:
    """The command that draws the same faults again."""
    faults = f" --faults {' '.join(config.faults)}" if config.faults else ""
    return f"python scripts/chaos.py --seed {trial.seed} --trials 1 --runtimes {trial.runtime}{faults}"


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end this process as Ctrl-C does, so that nothing stays mounted or running."""

    def end(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
