"""Start the XLA replicas with xmp.spawn, pass signals on to them, and never leave one behind."""

import multiprocessing
import multiprocessing.process
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.errors import HangError, UserError
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.runtime.mesh import mesh_mistakes
from gpt2_xla.runtime.orphans import die_with
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.stop_signals import STOP_SIGNALS, StopSignals
from gpt2_xla.runtime.xla_flash import attention_mistakes
from gpt2_xla.runtime.xla_installation import installation_mistakes, replica_environment_mistakes

Work = Callable[[Any, Runtime], Any]


def launch(
    config: XlaPretrainConfig,
    work: Work,
    replica: Callable[..., None] | None = None,
    stop: StopSignals | None = None,
) -> None:
    """Run work(config, runtime) on the XLA devices of this host; return when it is done.

    With --sharding fsdp this process does it, for all devices. Else xmp.spawn starts a replica per device: what asks `stop`
    to stop, stops all replicas at the same point; if one fails the others, which would wait for it in a collective for
    ever, are killed, and its error is raised here. Without `stop`, for work that never polls, a signal ends it at once.
    `replica` replaces `run_replica` in tests, which know their machine.
    """
    if replica is None and (mistakes := machine_mistakes(config)):
        raise UserError(mistakes)
    if config.runtime.sharding == "fsdp":
        run_sharded(config, work, stop)
    elif stop is not None:
        run_replicas(config, work, replica or run_replica, stop)
    else:
        with StopSignals(patient=False) as signals:
            run_replicas(config, work, replica or run_replica, signals)


def run_replicas(config: XlaPretrainConfig, work: Work, replica: Callable[..., None], stop: StopSignals) -> None:
    """Run a replica per device, each with a model of its own."""
    from gpt2_xla.runtime.xla_spawn import spawn_replicas

    # Starting it later would unblock the signals again (CPython's resource_tracker does).
    resource_tracker.ensure_running()
    # Children inherit the mask: a Ctrl-C that the terminal sends to the whole group reaches only the parent, where the
    # thread of `stop` hears it.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    board = ReplicaBoard.create()
    supervisor = _Supervisor(board, stop)
    supervisor.start()
    try:
        spawn_replicas(replica, (str(board.path), os.getpid(), config, work), config.runtime.mp_start_method)
    except Exception as error:  # noqa: BLE001 - replaced by the replica's own error
        if supervisor.interrupted:
            raise KeyboardInterrupt from None
        raise _replica_error(board, error) from None
    finally:
        supervisor.finish()
        board.remove()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def run_sharded(config: XlaPretrainConfig, work: Work, stop: StopSignals | None = None) -> None:
    """Drive all devices of this host from this process."""
    from gpt2_xla.runtime.xla_spmd_runtime import XlaSpmdRuntime

    runtime = XlaSpmdRuntime(config.runtime, stop)
    try:
        work(config, runtime)
    finally:
        runtime.close()


def run_replica(index: int, board_path: str, parent: int, config: XlaPretrainConfig, work: Work) -> None:  # noqa: ARG001
    """What xmp.spawn calls in each replica's thread."""
    die_with(parent)
    from gpt2_xla.runtime.xla_runtime import XlaRuntime

    board = ReplicaBoard(Path(board_path))
    try:
        runtime = XlaRuntime(config.runtime, board)
        work(config, runtime)
        runtime.close()
    except BaseException as error:
        board.report_failure(error)
        raise


def machine_mistakes(config: XlaPretrainConfig) -> list[str]:
    """What the options ask of this machine that it cannot do.

    With --sharding fsdp this starts the devices. Without, it must not: xmp.spawn's children could not use them any more.
    """
    sharded = config.runtime.sharding == "fsdp"
    mistakes = [*installation_mistakes(), *attention_mistakes(config)]
    if not sharded:
        return [*mistakes, *replica_environment_mistakes()]
    if mistakes:
        return mistakes
    from gpt2_xla.runtime.xla_spmd_runtime import start_devices

    devices, hosts = start_devices()
    try:
        return mesh_mistakes(config, config.runtime.mesh, devices, hosts)
    except UserError:  # of --mesh itself, which validation.py has told
        return []


class _Supervisor(threading.Thread):
    """Passes a stop on to the replicas and looks for failures while the main thread waits in xmp.spawn."""

    def __init__(self, board: ReplicaBoard, stop: StopSignals) -> None:
        super().__init__(daemon=True, name="replica supervisor")
        self._board, self._request = board, stop
        self._done = threading.Event()
        self.interrupted = False  # the replicas are killed for a signal
        stop.quit = self._interrupt

    def run(self) -> None:
        asked = False
        while not self._done.wait(0.2):
            children = multiprocessing.active_children()
            if self._request.requested and not asked:
                asked = True
                self._board.request_stop()
            if self.interrupted:
                _kill(children)
            elif self._board.failure() or any(child.exitcode for child in children):
                # The failed process may still be reporting; the others will never come back from their collective.
                self._done.wait(2.0)
                _kill(multiprocessing.active_children())

    def finish(self) -> None:
        """Stop watching."""
        self._done.set()
        self.join()

    def _interrupt(self, number: int) -> None:  # noqa: ARG002
        self.interrupted = True


def _kill(children: list[multiprocessing.process.BaseProcess]) -> None:
    for child in children:
        child.kill()


def _replica_error(board: ReplicaBoard, error: Exception) -> Exception:
    """The error to raise for a failed spawn: the replica's own, where it left word."""
    failure = board.failure()
    if failure and failure["mistakes"]:
        kind = HangError if failure["hang"] else UserError
        return kind(failure["mistakes"])  # type: ignore[arg-type]
    if failure:
        return RuntimeError(f"a replica failed:\n{failure['traceback']}")
    if isinstance(error, BrokenProcessPool):
        return RuntimeError(
            "a replica's process was killed (out of memory?); the same command continues from the newest checkpoint"
        )
    return error
