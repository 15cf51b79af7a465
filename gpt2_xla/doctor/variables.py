"""Environment variables that change what the program does; none of their secrets is ever printed."""

import re
from collections.abc import Iterator, Mapping

from gpt2_xla.doctor.finding import Finding, State
from gpt2_xla.doctor.place import Place
from gpt2_xla.runtime.xla_installation import DEVICES, HALVING

# Told if set, whatever their value.
TOLD = re.compile(
    r"(PJRT|XLA|TPU|LIBTPU|PT_XLA|NCCL|GLOO|TORCH|PYTORCH|TORCHINDUCTOR|TRITON|WANDB|HF|HUGGINGFACE|CUDA_VISIBLE|CUDA_LAUNCH)_.*"
    r"|[CG]PU_NUM_DEVICES|CLOUD_TPU_TASK_ID|OMP_NUM_THREADS|MKL_NUM_THREADS|TIKTOKEN_CACHE_DIR|XLA_FLAGS"
)
SECRET = re.compile(r"TOKEN(?!IZER)|KEY|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)
SLOW = "slows every step"
# Switches that hurt when they are on, that is neither empty nor 0. Each is mended by unsetting it.
SWITCHES: dict[str, tuple[State, str]] = {
    **dict.fromkeys(HALVING, ("problem", "float32 tensors are kept in bf16, weights and optimizer state too")),
    "XLA_USE_FP16": ("warning", "deprecated by torch_xla; the program chooses the precision"),
    "XLA_DOWNCAST_FP16": ("warning", "deprecated by torch_xla; the program chooses the precision"),
    "XLA_USE_SPMD": ("warning", "turns SPMD on behind the program's back"),
    "XLA_USE_EAGER_DEBUG_MODE": ("warning", "each operation runs as a program of its own"),
    "XLA_SYNC_WAIT": ("warning", SLOW),
    "XLA_IR_DEBUG": ("warning", SLOW),
    "XLA_HLO_DEBUG": ("warning", SLOW),
    "XLA_SAVE_TENSORS_FILE": ("warning", SLOW),
    "PT_XLA_DEBUG": ("warning", SLOW),
    "PT_XLA_DEBUG_LEVEL": ("warning", SLOW),
    "CUDA_LAUNCH_BLOCKING": ("warning", "the host waits for every kernel"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("warning", SLOW),
    "NCCL_P2P_DISABLE": ("warning", "GPUs do not copy to each other directly"),
    "NCCL_SHM_DISABLE": ("warning", "processes of a host talk through the network"),
    "NCCL_IB_DISABLE": ("warning", "hosts do not use InfiniBand"),
    "TORCHDYNAMO_DISABLE": ("warning", "--compile does nothing"),
}
OF_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def variables(environ: Mapping[str, str], place: Place, cores: int) -> Iterator[Finding]:
    """A finding for each variable that hurts, and one that lists the others that matter."""
    found = [*_switches(environ), *_pjrt(environ, place), *_tpu(environ, place), *_processes(environ, cores)]
    yield from found
    blamed = {finding.name for finding in found}
    told = [name for name in sorted(environ) if TOLD.fullmatch(name) and name not in blamed]
    yield Finding("environment", "ok", ", ".join(_shown(name, environ[name]) for name in told) or "nothing set")


def _shown(name: str, value: str) -> str:
    if SECRET.search(name) or "@" in value:  # https://user:password@host
        return f"{name} (set)"
    return f"{name}={value if len(value) <= 60 else value[:57] + '…'}"


def _on(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "0").lower() not in ("", "0", "false")


def _unset(environ: Mapping[str, str], name: str, state: State, why: str) -> Finding:
    return Finding(name, state, f"{_shown(name, environ[name])}: {why}", f"unset {name}")


def _switches(environ: Mapping[str, str]) -> Iterator[Finding]:
    for name, (state, why) in SWITCHES.items():
        if _on(environ, name):
            yield _unset(environ, name, state, why)
    flags = environ.get("XLA_FLAGS", "")
    if "--xla_dump_to" in flags:
        yield _unset(environ, "XLA_FLAGS", "warning", "each compiled program is written to disk")
    elif "--xla_cpu_enable_fast_math=true" in flags:
        yield _unset(
            environ, "XLA_FLAGS", "warning", "the CPU client then treats NaN and infinity as if they did not exist"
        )


def _pjrt(environ: Mapping[str, str], place: Place) -> Iterator[Finding]:
    device, best = environ.get("PJRT_DEVICE"), "TPU" if place.chips else "CPU"
    if device is None:
        state: State = "problem" if place.chips else "ok"
        yield Finding(
            "PJRT_DEVICE",
            state,
            "not set; run_pretrain_xla.py needs it" if place.chips else "not set; only run_pretrain_xla.py needs it",
            f"export PJRT_DEVICE={best}" if place.chips else None,
        )
    elif device not in DEVICES:
        yield Finding(
            "PJRT_DEVICE",
            "problem",
            f"{device} is not supported; run_pretrain_xla.py takes {', '.join(DEVICES[:-1])} or {DEVICES[-1]}",
            f"export PJRT_DEVICE={best}",
        )
    elif device == "TPU" and not place.chips:
        yield Finding("PJRT_DEVICE", "problem", "TPU, but this machine has no TPU", "export PJRT_DEVICE=CPU")
    elif device == "CPU" and place.chips:
        yield Finding("PJRT_DEVICE", "warning", "CPU, though there is a TPU", "export PJRT_DEVICE=TPU")
    count = environ.get("CPU_NUM_DEVICES", "1")
    if device == "CPU" and count != "1":
        why = "xmp.spawn's replicas are then threads, and torch_xla 2.9's collectives between them hang"
        yield _unset(environ, "CPU_NUM_DEVICES", "warning", why)


def _tpu(environ: Mapping[str, str], place: Place) -> Iterator[Finding]:
    if not place.chips:
        return
    # torch_xla only fills in what is not set (_internal/tpu.py, configure_topology), so one value for all processes of a
    # host keeps them apart: Kaggle's images set TPU_PROCESS_ADDRESSES=local (pytorch/xla issue 8215).
    for name in ("TPU_PROCESS_ADDRESSES", "CLOUD_TPU_TASK_ID"):
        if name in environ:
            yield _unset(environ, name, "problem", "xmp.spawn gives each process its own; a preset one breaks that")
    for name in ("TPU_VISIBLE_CHIPS", "TPU_VISIBLE_DEVICES"):
        if name in environ:
            yield _unset(environ, name, "warning", f"of {len(place.chips)} chips only these are used")


def _processes(environ: Mapping[str, str], cores: int) -> Iterator[Finding]:
    of_torchrun = [name for name in OF_TORCHRUN if name in environ]
    if of_torchrun and "TORCHELASTIC_RUN_ID" not in environ:
        text = f"{' '.join(of_torchrun)} set outside of torchrun: run_pretrain.py would wait for other processes"
        yield Finding("torchrun", "problem", text, f"unset {' '.join(of_torchrun)}")
    if environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        yield _unset(environ, "CUDA_VISIBLE_DEVICES", "warning", "hides every GPU")
    threads = environ.get("OMP_NUM_THREADS", "")
    if threads and not threads.isdecimal():
        yield _unset(environ, "OMP_NUM_THREADS", "problem", "not a number")
    elif threads and int(threads) > cores:
        text = f"{threads} threads on {cores} cores wait for each other"
        yield Finding("OMP_NUM_THREADS", "warning", text, f"export OMP_NUM_THREADS={cores}")
