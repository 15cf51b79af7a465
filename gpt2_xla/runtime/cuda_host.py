"""The NVIDIA GPUs of this host and the package that drives them for torch_xla, looked up without starting CUDA.

NVML alone is asked: it starts no CUDA context, so processes that are forked later can still start theirs.
"""

import ctypes
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# OpenXLA's CUDA plugin. This version speaks PJRT's C API as torch_xla 2.9.0 does; newer ones refuse its calls.
PLUGIN, PLUGIN_VERSION, PLUGIN_TORCH_XLA = "jax-cuda12-pjrt", "0.7.1", "2.9"
INSTALL = "pip install -r requirements-xla_cuda.txt -c constraints.txt"
OLDEST_CUDA = 12_000  # of the driver, for CUDA 12's libraries; as NVML writes 12.0
ALLOCATOR = "PJRT_ALLOCATOR_FRACTION"
NVML_NAME = 96  # bytes that hold any name that NVML gives
NVML_OK = 0


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    name: str
    uuid: str  # as CUDA_VISIBLE_DEVICES may name it


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver, and what it drives."""

    version: str
    cuda: int  # the newest CUDA that it is for: 12040 for 12.4
    gpus: tuple[Gpu, ...]

    @property
    def cuda_text(self) -> str:
        """As people write it: 12.4."""
        return f"{self.cuda // 1000}.{self.cuda % 1000 // 10}"


def read_driver(library: str = "libnvidia-ml.so.1") -> Driver | None:
    """What NVML tells; None where there is no driver, or none that answers."""
    try:
        nvml = ctypes.CDLL(library)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != NVML_OK:
        return None
    try:
        cuda, count = ctypes.c_int(), ctypes.c_uint()
        nvml.nvmlSystemGetCudaDriverVersion_v2(ctypes.byref(cuda))
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        gpus = [_gpu(nvml, index) for index in range(count.value)]
        return Driver(_text(nvml.nvmlSystemGetDriverVersion), cuda.value, tuple(gpus))
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_void_p()
    nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device))
    return Gpu(_text(nvml.nvmlDeviceGetName, device), _text(nvml.nvmlDeviceGetUUID, device))


def _text(function: Callable[..., int], *arguments: ctypes.c_void_p) -> str:
    buffer = ctypes.create_string_buffer(NVML_NAME)
    function(*arguments, buffer, ctypes.c_uint(NVML_NAME))
    return buffer.value.decode()


def visible_gpus(driver: Driver) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES leaves, in its order: it lists numbers, or beginnings of UUIDs, up to the first wrong one."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return list(driver.gpus)
    found: list[Gpu] = []
    for word in listed.split(","):
        word = word.strip()
        if word.isdecimal():
            matching = list(driver.gpus[int(word) : int(word) + 1])
        else:
            matching = [gpu for gpu in driver.gpus if word and gpu.uuid.startswith(word)]
        if word.startswith("MIG-"):  # a part of a GPU
            matching = [Gpu("NVIDIA MIG", word)]
        if len(matching) != 1:
            break
        found += matching
    return found


def gpu_kind() -> str | None:
    """What the first visible GPU calls itself."""
    driver = read_driver()
    gpus = visible_gpus(driver) if driver else []
    return gpus[0].name if gpus else None


def gpu_count() -> int:
    """GPUs to use: GPU_NUM_DEVICES, else all that are visible. `cuda_mistakes()` tells beforehand if that is nonsense."""
    given = os.environ.get("GPU_NUM_DEVICES")
    if given is not None:
        return int(given)
    driver = read_driver()
    return len(visible_gpus(driver)) if driver else 0


def plugin_library() -> Path | None:
    """The installed plugin's shared library, found without importing its package, which needs jax; None if there is none."""
    spec = importlib.util.find_spec("jax_plugins")  # a namespace package: looking for a part of it imports nothing else
    for folder in spec.submodule_search_locations or () if spec else ():
        library = Path(folder) / "xla_cuda12" / "xla_cuda_plugin.so"
        if library.is_file():
            return library
    return None


def knows_cuda(torch_xla: Path | None = None) -> bool:
    """Whether the installed torch_xla takes PJRT_DEVICE=CUDA by itself, as releases up to 2.8 do; then there is no plugin."""
    if torch_xla is None:
        spec = importlib.util.find_spec("torch_xla")
        if spec is None or spec.origin is None:
            return False
        torch_xla = Path(spec.origin).parent
    return (torch_xla / "_internal" / "gpu.py").is_file()


def cuda_mistakes() -> list[str]:
    """Why PJRT_DEVICE=CUDA cannot work here, a sentence each."""
    return [*([] if knows_cuda() else _plugin_mistakes()), *_gpu_mistakes(), *_allocator_mistakes()]


def _plugin_mistakes() -> list[str]:
    try:
        version = importlib.metadata.version(PLUGIN)
    except importlib.metadata.PackageNotFoundError:
        return [f"PJRT_DEVICE=CUDA needs the package {PLUGIN}, which is not installed; {INSTALL}"]
    torch_xla = importlib.metadata.version("torch_xla")
    if version != PLUGIN_VERSION or not torch_xla.startswith(f"{PLUGIN_TORCH_XLA}."):
        return [
            f"{PLUGIN} {version} with torch_xla {torch_xla} was never tried, and versions that do not fit crash: "
            f"PJRT_DEVICE=CUDA needs {PLUGIN} {PLUGIN_VERSION} with torch_xla {PLUGIN_TORCH_XLA}; {INSTALL}"
        ]
    if plugin_library() is None:
        return [
            f"{PLUGIN} {version} is installed, but its xla_cuda_plugin.so is missing; pip install --force-reinstall {PLUGIN}=={version}"
        ]
    return []


def _gpu_mistakes() -> list[str]:
    driver = read_driver()
    if driver is None:
        return [
            "PJRT_DEVICE=CUDA, but NVIDIA's driver does not answer here: nvidia-smi shows why, python scripts/doctor.py what "
            "this machine has; export PJRT_DEVICE=CPU to try the program without a GPU"
        ]
    if not driver.gpus:
        return [f"PJRT_DEVICE=CUDA, but NVIDIA's driver {driver.version} finds no GPU; nvidia-smi lists what it finds"]
    mistakes = []
    if driver.cuda < OLDEST_CUDA:
        mistakes.append(
            f"NVIDIA's driver {driver.version} is for CUDA up to {driver.cuda_text}, and PJRT_DEVICE=CUDA needs one for "
            "CUDA 12; install driver 525.60.13 or newer"
        )
    gpus, given = len(visible_gpus(driver)), os.environ.get("GPU_NUM_DEVICES")
    if not gpus:
        mistakes.append(
            f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides every GPU of this machine, which has "
            f"{len(driver.gpus)}; unset CUDA_VISIBLE_DEVICES"
        )
    elif given is not None and not (given.isdecimal() and int(given)):
        mistakes.append(f"GPU_NUM_DEVICES={given} is not a number of GPUs; set 1 to {gpus}, or unset GPU_NUM_DEVICES")
    elif given is not None and int(given) > gpus:
        hidden = "" if gpus == len(driver.gpus) else " with this CUDA_VISIBLE_DEVICES"
        mistakes.append(
            f"GPU_NUM_DEVICES={given}, but there are {gpus} GPUs{hidden}; set 1 to {gpus}, or unset GPU_NUM_DEVICES"
        )
    return mistakes


def _allocator_mistakes() -> list[str]:
    given = os.environ.get(ALLOCATOR)
    if given is None:
        return []
    try:
        fits = 0 < float(given) <= 1
    except ValueError:
        fits = False
    return [] if fits else [f"{ALLOCATOR}={given} is not a share of the GPU's memory; set above 0 to 1, as in 0.9"]
