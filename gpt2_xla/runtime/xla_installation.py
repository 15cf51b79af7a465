"""Whether torch_xla can work here, told without importing torch or torch_xla: that takes seconds, or fails obscurely."""

import importlib.metadata
import importlib.util
import os

from gpt2_xla.errors import UserError
from gpt2_xla.runtime.cuda_host import cuda_mistakes
from gpt2_xla.runtime.tpu_host import tpu_chips

DEVICES = ("TPU", "CUDA", "CPU")
HALVING = (
    "XLA_USE_BF16",
    "XLA_DOWNCAST_BF16",
)  # announced as gone after 2.6, but 2.9 still rounds every float32 tensor


def refuse_torchrun() -> None:
    """UserError where torchrun started this process: each of its processes would make the whole run, in one folder.

    A scheduler's RANK and WORLD_SIZE alone say nothing.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError(
            "torchrun is for run_pretrain.py; run_pretrain_xla.py starts its own processes, one for each device: "
            "start it with PJRT_DEVICE=TPU python run_pretrain_xla.py (or CUDA, or CPU)"
        )


def installation_mistakes() -> list[str]:
    """Why torch_xla cannot work here; found before importing it takes seconds or fails with a traceback."""
    mistakes = package_mistakes()
    device = os.environ.get("PJRT_DEVICE")
    if device is None:
        mistakes.append(
            "PJRT_DEVICE is not set; start with PJRT_DEVICE=TPU or CUDA, or PJRT_DEVICE=CPU to try without one "
            "(python scripts/doctor.py tells what this machine has)"
        )
    elif device not in DEVICES:
        mistakes.append(f"PJRT_DEVICE={device} is not supported; use {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    elif device == "TPU" and not tpu_chips():
        mistakes.append(
            "PJRT_DEVICE=TPU, but this machine has no TPU; try the program with PJRT_DEVICE=CPU "
            "(python scripts/doctor.py tells what this machine has)"
        )
    elif device == "CUDA" and not mistakes:
        mistakes += cuda_mistakes()
    count = os.environ.get("CPU_NUM_DEVICES", "1")
    if device == "CPU" and not (count.isdecimal() and int(count)):
        mistakes.append(
            f"CPU_NUM_DEVICES={count} is not a number of devices, 1 or more; set one, or unset CPU_NUM_DEVICES"
        )
    for name in HALVING:
        if os.environ.get(name, "0") not in ("", "0"):
            mistakes.append(
                f"{name}={os.environ[name]} makes torch_xla keep float32 tensors in bf16, weights and optimizer state too; "
                f"unset {name} (--mixed-precision bf16 is what you want)"
            )
    return mistakes


def replica_environment_mistakes() -> list[str]:
    """Environment variables with which xmp.spawn's replicas (--sharding none) crash or hang."""
    mistakes = []
    if os.environ.get("XLA_USE_SPMD", "0") not in ("", "0"):
        mistakes.append(
            f"XLA_USE_SPMD={os.environ['XLA_USE_SPMD']} makes one device of all, and then there are no replicas; "
            "unset XLA_USE_SPMD, or use --sharding fsdp"
        )
    count = os.environ.get("CPU_NUM_DEVICES", "1")
    # More would be threads of one process, whose collectives hang or crash in torch_xla 2.9.
    if os.environ.get("PJRT_DEVICE") == "CPU" and count.isdecimal() and int(count) > 1:
        mistakes.append(
            f"CPU_NUM_DEVICES={count} works with --sharding fsdp alone: replicas on the CPU cannot talk to each other; "
            "unset CPU_NUM_DEVICES, or add --sharding fsdp"
        )
    return mistakes


def package_mistakes() -> list[str]:
    """Whether torch_xla is there and fits torch."""
    if importlib.util.find_spec("torch_xla") is None:
        return [
            "torch_xla is not installed; pip install -r requirements-xla_tpu.txt -c constraints.txt (or use run_pretrain.py)"
        ]
    torch_version, xla_version = (importlib.metadata.version(name) for name in ("torch", "torch_xla"))
    if torch_version.split("+")[0].split(".")[:2] != xla_version.split("+")[0].split(".")[:2]:
        return [
            f"torch_xla {xla_version} does not fit torch {torch_version}: their versions must match; "
            "pip install -r requirements-xla_tpu.txt -c constraints.txt"
        ]
    return []
