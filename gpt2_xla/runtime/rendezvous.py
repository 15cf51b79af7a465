"""How the processes of all hosts find each other. What keeps them from it is told in one sentence, not by a hang."""

import contextlib
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from gpt2_xla.errors import Stopped, UserError
from gpt2_xla.runtime.stop_signals import StopRequest

WAIT = timedelta(minutes=10)  # for a host to come, and to connect
FOREVER = timedelta(days=365)  # for a collective: how long one may take says --hang-timeout, which knows what all do
SAME = "start the command on every host with the same --nnodes, --nproc_per_node and --rdzv-endpoint"
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
TRIAL = "GPT2_XLA_TRIAL"  # set in processes that try something beside those of the run: their number


def environment_mistakes(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the variables that say which process of how many this is, and where to meet the others.

    torchrun sets them; so may a scheduler, or a user.
    """
    mend = "start the command with torchrun, which sets it, or unset all such variables"
    mistakes, numbers = [], {"RANK": 0, "WORLD_SIZE": 1}
    limits = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 1}
    for name in limits.keys() & environment.keys():
        text = environment[name]
        if text.isdecimal() and int(text) >= limits[name]:
            numbers[name] = int(text)
        else:
            mistakes.append(f"{name}={text} in the environment is no whole number of at least {limits[name]}; {mend}")
    processes = numbers["WORLD_SIZE"]
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if processes > 1 and missing:
        mistakes.append(f"WORLD_SIZE={processes} in the environment, but no {' and no '.join(missing)}; {mend}")
    if numbers["RANK"] >= processes and not mistakes:
        mistakes.append(
            f"RANK={numbers['RANK']} in the environment is not below WORLD_SIZE, which is {processes}; {mend}"
        )
    return sorted(mistakes)


def backend_mistakes(wanted: str, device: str) -> list[str]:
    """What keeps this build of torch, or a device of that type, from using --ddp-backend."""
    if wanted == "nccl" and device != "cuda":
        return [f"--ddp-backend nccl needs CUDA devices, but the device is {device}; use --ddp-backend gloo"]
    backend = pick_backend(wanted, device)
    if dist.is_available() and dist.is_backend_available(backend):
        return []
    others = [name for name in ("gloo", "nccl") if dist.is_available() and dist.is_backend_available(name)]
    usable = [name for name in others if name != "nccl" or device == "cuda"]
    mend = f"use --ddp-backend {usable[0]}" if usable else "install another build of torch, or start one process"
    return [f"--ddp-backend {wanted}: this build of torch, {torch.__version__}, has no {backend}; {mend}"]


def pick_backend(wanted: str, device: str) -> str:
    """The backend that --ddp-backend means for a type of device."""
    return ("nccl" if device == "cuda" else "gloo") if wanted == "auto" else wanted


def open_group(backend: str, device: torch.device, stop: StopRequest) -> dist.ProcessGroup:
    """Open the process group of all processes that torchrun started; a second one, of gloo, is for their CPUs.

    Raises `UserError` if the processes do not come together, `Stopped` if `stop` is requested while they do not.
    """
    environment = os.environ
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if rank == 0 and (note := restart_note(environment)):
        print(note, file=sys.stderr, flush=True)
    store = meet(environment, WAIT, stop)
    device_id = device if backend == "nccl" else None
    try:
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=world_size, timeout=WAIT, device_id=device_id
        )
        wait_for_ever(dist.group.WORLD)
        of_cpus = dist.new_group(backend="gloo", timeout=WAIT)
        wait_for_ever(of_cpus)
        return of_cpus
    except RuntimeError as error:
        interfaces = " and ".join(f"{name}_SOCKET_IFNAME" for name in dict.fromkeys(("GLOO", backend.upper())))
        said = re.sub(r"\[/\S+\] ", "", str(error).splitlines()[0])  # without the place in torch's source
        raise UserError(
            f"the {world_size} processes met at {_endpoint(environment)}, but rank {rank} cannot connect to the others "
            f"({said}); on several hosts set {interfaces} to the network interface that joins them (`ip -br address` lists "
            "them), and open all ports between them"
        ) from error


def wait_for_ever(group: dist.ProcessGroup | None) -> None:
    """Have the group's collectives wait for processes that are late, however long, once it has connected them."""
    dist.distributed_c10d._set_pg_timeout(FOREVER, group)  # private, as there is no other way; checked on torch 2.9


def meet(environment: Mapping[str, str], wait: timedelta, stop: StopRequest) -> dist.Store:  # type: ignore[name-defined]
    """The store by which the processes exchange their addresses, once all are there and count the same processes.

    Raises `UserError` that names who is missing, or who counts otherwise; `Stopped` if `stop` is requested meanwhile.
    """
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    me = f"rank {rank} of {world_size}"
    try:
        store = _store(environment, wait, stop)
        store.set(f"world_size/{rank}", str(world_size))
    except (dist.DistError, OSError, ValueError) as error:  # ValueError: the port is taken, by another run perhaps
        said = str(error).splitlines()[0]
        raise UserError(
            f"{me} finds no rank 0 at {_endpoint(environment)} within {_time(wait)} ({said}); {SAME}"
        ) from error
    for other in range(world_size):
        key = f"world_size/{other}"
        try:
            there = _until(lambda key=key: bool(store.check([key])), wait, stop)  # type: ignore[misc]
            theirs = int(store.get(key)) if there else None
        except Stopped:
            with contextlib.suppress(dist.DistError):
                store.delete_key(f"world_size/{rank}")  # who still comes shall not count on this one
            raise
        except dist.DistError:  # rank 0 took the store with it
            theirs = None
        if theirs is None:
            raise UserError(
                f"{me} waited at {_endpoint(environment)} for rank {other}, which did not come within {_time(wait)} or is gone "
                f"again; {SAME}"
            )
        if theirs != world_size:
            raise UserError(
                f"rank {other} was started as one of {theirs} processes, rank {rank} as one of {world_size}; {SAME}"
            )
    return store


def _until(there: Callable[[], bool], wait: timedelta, stop: StopRequest) -> bool:
    """Ask until it is there; False once `wait` is over. Raises `Stopped` if `stop` is requested and it is not there.

    The store's own waiting hears no signal, and complains about each short wait.
    """
    deadline, pause = time.monotonic() + wait.total_seconds(), 0.05
    while not there():
        if stop.requested:
            raise Stopped("stopped before the first step: there is nothing to save; the same command begins anew")
        if (left := deadline - time.monotonic()) <= 0:
            return False
        time.sleep(min(pause, left))
        pause = min(2 * pause, 1.0)  # thousands of processes may ask
    return True


def restart_note(environment: Mapping[str, str]) -> str | None:
    """What a job of several hosts lacks to survive the loss of one; None if nothing, or if it shall not restart."""
    restarts = int(environment.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if not restarts or _one_host(environment) or environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"note: --max-restarts {restarts} cannot bring a lost host back as long as {SHARED_STORE}=1 is not set on all hosts "
        "(and --rdzv-backend=c10d given); see docs/multi_host.md"
    )


def _store(environment: Mapping[str, str], wait: timedelta, stop: StopRequest) -> dist.Store:  # type: ignore[name-defined]
    """The agents' store, or one that rank 0 opens, and that the trials of --find-batch share.

    torchrun 2.9 keeps its store over a restart, with the addresses of the workers that died: a new one that reads them too
    early cannot connect (pytorch issue 135712). On one host the count of restarts gives all the same fresh keys; on several,
    whose counts may differ, torchrun must open a new store each time: see `restart_note`.
    """
    of_agent = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    is_master = not of_agent and environment["RANK"] == "0" and TRIAL not in environment
    if not is_master and not _until(lambda: _listens(address, port), wait, stop):
        raise OSError("nobody listens there")
    store = dist.TCPStore(  # type: ignore[attr-defined]
        address,
        port,
        is_master=is_master,
        timeout=wait,
        wait_for_workers=False,
        multi_tenant=True,
    )
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    if TRIAL in environment:
        return dist.PrefixStore(f"restart_{restarts}_trial_{environment[TRIAL]}", store)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"restart_{restarts}", store) if of_agent and _one_host(environment) else store  # type: ignore[attr-defined]


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5).close()
    except OSError:
        return False
    return True


def _one_host(environment: Mapping[str, str]) -> bool:
    return environment.get("LOCAL_WORLD_SIZE") == environment.get("WORLD_SIZE")


def _endpoint(environment: Mapping[str, str]) -> str:
    return f"{environment.get('MASTER_ADDR')}:{environment.get('MASTER_PORT')}"


def _time(wait: timedelta) -> str:
    return f"{wait.total_seconds():.0f} s"
