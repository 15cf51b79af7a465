"""Start the XLA replicas with xmp.spawn, pass signals on to them, and never leave one behind."""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.runtime.mesh import mesh_mistakes
from gpt2_xla.runtime.replica_board import ReplicaBoard
from gpt2_xla.runtime.stop_signals import STOP_SIGNALS
from gpt2_xla.runtime.xla_flash import attention_mistakes
from gpt2_xla.runtime.xla_installation import installation_mistakes, replica_environment_mistakes

Work = Callable[[Any, Runtime], Any]


def launch(config: XlaPretrainConfig, work: Work, replica: Callable[..., None] | None = None) -> None:
    """Run work(config, runtime) on the XLA devices of this host; return when it is done.

    With --sharding fsdp this process does it, for all devices. Else xmp.spawn starts a replica per device: SIGTERM and
    Ctrl-C stop all replicas before the same step; if one fails the others, which would wait for it in a collective for
    ever, are killed, and its error is raised here. `replica` replaces `run_replica` in tests, which know their machine.
    """
    if replica is None and (mistakes := machine_mistakes(config)):
        raise UserError(mistakes)
    if config.runtime.sharding == "fsdp":
        run_sharded(config, work)
        return
    import torch_xla.distributed.xla_multiprocessing as xmp

    # Starting it later would unblock the signals again (CPython's resource_tracker does).
    resource_tracker.ensure_running()
    # Children inherit the mask: a Ctrl-C that the terminal sends to the whole group reaches only the parent.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    board = ReplicaBoard.create()
    supervisor = _Supervisor(board)
    supervisor.start()
    try:
        arguments = (str(board.path), os.getpid(), config, work)
        xmp.spawn(replica or run_replica, args=arguments, start_method=config.runtime.mp_start_method)
    except Exception as error:  # noqa: BLE001 - replaced by the replica's own error
        if supervisor.interrupted:
            raise KeyboardInterrupt from None
        raise _replica_error(board, error) from None
    finally:
        supervisor.finish()
        board.remove()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def run_sharded(config: XlaPretrainConfig, work: Work) -> None:
    """Drive all devices of this host from this process, which handles its signals itself."""
    from gpt2_xla.runtime.xla_spmd_runtime import XlaSpmdRuntime

    runtime = XlaSpmdRuntime(config.runtime)
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


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent dies, so that no orphan trains on."""
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getpid() != parent and os.getppid() != parent:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)


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

    try:
        return mesh_mistakes(config, config.runtime.mesh, *start_devices())
    except UserError:  # of --mesh itself, which validation.py has told
        return []


class _Supervisor(threading.Thread):
    """Waits for signals and for failures while the main thread waits in xmp.spawn."""

    def __init__(self, board: ReplicaBoard) -> None:
        super().__init__(daemon=True, name="replica supervisor")
        self._board = board
        self._done = threading.Event()
        self.interrupted = False  # the replicas were killed for a signal

    def run(self) -> None:
        while not self._done.is_set():
            children = multiprocessing.active_children()
            if signal.sigtimedwait(STOP_SIGNALS, 0.2):
                if self._board.request_stop():
                    print("\nstopping after this step; once more to quit at once", file=sys.stderr, flush=True)
                else:  # no step was begun (start-up, --do-test), or this is the second signal
                    self.interrupted = True
                    for child in children:
                        child.kill()
            elif self._board.failure() or any(child.exitcode for child in children):
                # The failed process may still be reporting; the others will never come back from their collective.
                self._done.wait(2.0)
                for child in multiprocessing.active_children():
                    child.kill()

    def finish(self) -> None:
        """Stop watching."""
        self._done.set()
        self.join()


def _replica_error(board: ReplicaBoard, error: Exception) -> Exception:
    """The error to raise for a failed spawn: the replica's own, where it left word."""
    failure = board.failure()
    if failure and failure["mistakes"]:
        return UserError(failure["mistakes"])  # type: ignore[arg-type]
    if failure:
        return RuntimeError(f"a replica failed:\n{failure['traceback']}")
    if isinstance(error, BrokenProcessPool):
        return RuntimeError(
            "a replica's process was killed (out of memory?); its checkpoints are safe, add --resume to continue"
        )
    return error
