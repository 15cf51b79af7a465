"""--find-batch: the largest micro-step that fits into memory, and as many of them as make the batch that was asked for."""

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from enum import IntEnum
from typing import IO

from gpt2_xla.batch_sizes import BatchSizes
from gpt2_xla.batch_trial import DOES_NOT_FIT, MARK
from gpt2_xla.child_environment import import_path
from gpt2_xla.config import TorchPretrainConfig, to_dict
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.memory import free_memory, resident
from gpt2_xla.runtime.rendezvous import TRIAL
from gpt2_xla.runtime.stop_signals import StopRequest
from gpt2_xla.runtime.torch_runtime import TorchRuntime
from gpt2_xla.watchdog import COMPILE_SECONDS

GIB = 2**30
HEAD_ROOM = 0.1  # of the memory that is free, never to be used
LOOK = 0.05  # seconds between two looks at a trial
PATIENCE = 2.0  # seconds in which a process that ran out of memory is found, after others lost it


class Outcome(IntEnum):
    """Of a trial, worst first: processes that see different ones go by the least."""

    STOPPED = 0  # the run was asked to stop
    SHORT = 1  # of memory
    REFUSED = 2  # by the data, perhaps, that is too short
    FAILED = 3
    FITS = 4
    RUNNING = 5


def find_batch(config: TorchPretrainConfig, runtime: TorchRuntime, stop: StopRequest) -> TorchPretrainConfig:
    """The configuration with the largest --train-batch-size that fits. The sequences of each optimizer step stay.

    Every replica calls this. After a stop signal the configuration comes back as it was. Raises `UserError` if nothing fits.
    """
    sizes = micro_batches(config.batch_sizes, runtime.world_size)
    given = config.runtime.memory_limit
    there = min(free_memory(runtime.device), math.inf if given is None else int(given * GIB))
    limit = runtime.smallest(int(there * (1 - HEAD_ROOM)))
    _say(runtime, f"finding the largest --train-batch-size that fits into {limit / GIB:.2f} GiB a process")
    stopped = False

    def fits(size: int) -> bool:
        nonlocal stopped
        outcome = _try(with_batch(config, size), runtime, stop, limit, last_hope=size == sizes[0])
        stopped = outcome == Outcome.STOPPED
        return outcome == Outcome.FITS

    found = largest(sizes, lambda size: not stopped and fits(size))
    if stopped:
        return dataclasses.replace(config, runtime=dataclasses.replace(config.runtime, find_batch=False))
    if found is None:
        raise UserError(
            f"--find-batch: not even --train-batch-size {sizes[0]} fits into {limit / GIB:.2f} GiB a process; use "
            "--activation-checkpointing block, a shorter --seq-length, a smaller --eval-batch-size or a smaller model"
        )
    chosen = with_batch(config, found)
    accumulation = (
        "" if config.data.batch_size_schedule else f" --gradient-accum-step {chosen.data.gradient_accum_step}"
    )
    _say(runtime, f"found --train-batch-size {found}{accumulation}")
    return chosen


def micro_batches(sizes: BatchSizes, processes: int) -> list[int]:
    """All sizes of a micro-step, rising, that divide among the processes and make the sequences of every step."""
    return [size for size in range(processes, sizes.common + 1, processes) if sizes.common % size == 0]


def largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of the rising sizes that fits, None if none does; asks for small ones first, then halves the gap."""
    low, high, stride = -1, len(sizes), 1  # sizes[low] fits, sizes[high] does not
    while high - low > 1:
        middle = low + stride if low + stride < high else (low + high) // 2
        if fits(sizes[middle]):
            low, stride = middle, stride * 2
        else:
            high, stride = middle, len(sizes)  # from here on only halve
    return sizes[low] if low >= 0 else None


def with_batch(config: TorchPretrainConfig, size: int) -> TorchPretrainConfig:
    """The run with another micro-step and as many sequences a step; it searches no more."""
    accumulation = config.batch_sizes.sequences(0) // size
    if config.data.batch_size_schedule is not None:
        accumulation = config.data.gradient_accum_step  # of no meaning there
    data = dataclasses.replace(config.data, train_batch_size=size, gradient_accum_step=accumulation)
    return dataclasses.replace(config, data=data, runtime=dataclasses.replace(config.runtime, find_batch=False))


def _try(config: TorchPretrainConfig, runtime: TorchRuntime, stop: StopRequest, limit: int, last_hope: bool) -> Outcome:
    """What becomes of a few steps as configured, in a process beside each of the run's.

    Raises `UserError` if they fail for another reason than memory; with `last_hope` also if they are refused.
    """
    size = config.data.train_batch_size
    watched = runtime.device.type == "cpu"
    with _Trial(config, limit, watched) as trial:
        failed_since: float | None = None
        while True:
            mine = Outcome.STOPPED if stop.requested else trial.outcome()
            worst, running = Outcome(runtime.smallest(mine)), runtime.smallest(-mine) == -Outcome.RUNNING
            if worst in (Outcome.REFUSED, Outcome.FAILED):
                # Perhaps only because another one is gone: its own parent is about to see that.
                failed_since = failed_since or time.monotonic()
                waited = time.monotonic() - failed_since > PATIENCE
                if runtime.smallest(int(waited)):
                    break
            elif worst < Outcome.REFUSED or not running:
                break
            time.sleep(LOOK)
        if worst == Outcome.FITS:
            _say(runtime, f"  {size}: fits, with a peak of {trial.peak() / GIB:.2f} GiB")
        elif worst == Outcome.SHORT:
            _say(runtime, f"  {size}: does not fit")
        elif worst != Outcome.STOPPED:
            why = trial.complaint() if mine == worst else "another process says why"
            if worst == Outcome.FAILED or last_hope:
                raise UserError(f"--find-batch: a step of --train-batch-size {size} fails: {why}")
            _say(runtime, f"  {size}: {why}")
    return worst


class _Trial:
    """A child process that tries one configuration; it ends with the context."""

    number = 0

    def __init__(self, config: TorchPretrainConfig, limit: int, watched: bool) -> None:
        """`watched`: end the child when more than `limit` bytes of it are resident."""
        self._limit, self._watched = limit, watched
        timeout = config.run.hang_timeout
        self._seconds = max(timeout, COMPILE_SECONDS) if timeout else math.inf  # it starts up, and compiles
        self._began = time.monotonic()
        _Trial.number += 1
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed by __exit__, as the process is ended there
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        path = import_path()
        variables = {"PYTHONPATH": path, "GPT2_XLA_PARENT": str(os.getpid()), TRIAL: str(_Trial.number)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpt2_xla.batch_trial", str(limit)],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._errors,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:  # if it is gone, its exit status tells
            pipe.write(json.dumps(to_dict(_trial_config(config))).encode())

    def __enter__(self) -> "_Trial":
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # and what it started, such as a compiler
        self._process.wait()
        self._output.close()
        self._errors.close()

    def outcome(self) -> Outcome:
        """What has become of it so far."""
        status = self._process.poll()
        if status is None:
            if self._watched and resident(self._process.pid) > self._limit:
                return Outcome.SHORT
            return Outcome.FAILED if self._hangs() else Outcome.RUNNING
        if status == 0:
            return Outcome.SHORT if self._watched and self.peak() > self._limit else Outcome.FITS
        if status in (DOES_NOT_FIT, -signal.SIGKILL):  # a kill is the kernel's, when the machine is out of memory
            return Outcome.SHORT
        return Outcome.REFUSED if status == UserError.status else Outcome.FAILED

    def _hangs(self) -> bool:
        return time.monotonic() - self._began > self._seconds

    def peak(self) -> int:
        """Bytes that it took, as it told at its end."""
        return int(_text(self._output).rpartition(MARK)[2])

    def complaint(self) -> str:
        """The last line of its standard error, or that it hangs."""
        if self._process.poll() is None:
            return f"no end after {self._seconds:g} s, the longest that --hang-timeout and a compilation may take"
        lines = [line.strip() for line in _text(self._errors).splitlines() if line.strip()]
        return lines[-1].removeprefix("error: ") if lines else "it said nothing"


def _trial_config(config: TorchPretrainConfig) -> TorchPretrainConfig:
    """A run of at most two micro-steps a step, the second of which holds the gradients of the first, and one of validation."""
    sizes = config.batch_sizes
    most = max(micro_steps for _, micro_steps in sizes.stages)
    data = dataclasses.replace(
        config.data, batch_size_schedule=None, gradient_accum_step=min(2, most), verify_data="size"
    )
    run = dataclasses.replace(config.run, remote_dir=None, from_checkpoint=None, valid_steps=1)
    logging = dataclasses.replace(config.logging, sample_interval=0, wandb_logging=False)
    return dataclasses.replace(config, data=data, run=run, logging=logging)


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _say(runtime: TorchRuntime, text: str) -> None:
    if runtime.rank == 0:
        print(text, flush=True)
