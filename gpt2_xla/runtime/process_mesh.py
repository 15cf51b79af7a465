"""How torchrun's processes are arranged: as many copies of the model, each cut up over so many of them; and why they cannot be."""

import os

from gpt2_xla.config import TorchConfig
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.mesh import MeshShape, nearest_mesh, parse_mesh


def world_size() -> int:
    """The number of processes that torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def process_mesh(config: TorchConfig, processes: int | None = None) -> MeshShape:
    """How the processes of --sharding fsdp or hsdp are arranged; raises `UserError` for a --mesh that is none.

    Without a number it is of those that torchrun started; else of that many, on one host.
    """
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if processes is None else processes
    processes = world_size() if processes is None else processes
    if config.sharding == "fsdp":
        return MeshShape(fsdp=processes)
    if config.mesh is not None:
        return parse_mesh(config.mesh)
    return MeshShape(data=processes // per_host, fsdp=per_host)


def sharding_mistakes(config: TorchConfig, started: int | None = None) -> list[str]:
    """Why torchrun's processes cannot be arranged as --sharding says; of a --mesh that is none the options tell.

    Without a number they are those that run; else those that shall be started on this host.
    """
    processes = world_size() if started is None else started
    if processes == 1:
        return []
    if config.sharding == "none":
        return [
            f"--sharding none is for one process, but torchrun starts {processes}, each of which would train a model of "
            "its own; use --sharding ddp or fsdp"
        ]
    try:
        shape = process_mesh(config, started)
    except UserError:
        return []
    if config.sharding != "hsdp" or shape.devices == processes:
        return []
    fits = nearest_mesh(MeshShape(shape.data, shape.fsdp), processes)
    if config.mesh is None:
        return [
            f"--sharding hsdp makes a copy per host, but {processes} processes are no whole number of hosts with "
            f"{shape.fsdp} each; use --mesh {fits}, for example"
        ]
    return [
        f"--mesh {config.mesh} is for {shape.devices} processes, but torchrun starts {processes}; "
        f"use --mesh {fits}, for example"
    ]


def sharding_note(config: TorchConfig) -> str | None:
    """What is pointless about --sharding here, though no mistake."""
    processes = world_size()
    if processes == 1 and config.sharding in ("ddp", "fsdp", "hsdp"):
        return (
            f"the run's --sharding {config.sharding} is pointless with one process, which holds everything anyway; start several "
            "with torchrun"
        )
    if config.sharding == "hsdp" and processes > 1 and process_mesh(config).data == 1:
        return "--sharding hsdp with one copy is fsdp; --mesh says how many copies, as in data=2,fsdp=2"
    return None
