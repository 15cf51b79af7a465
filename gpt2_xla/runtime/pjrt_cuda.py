"""OpenXLA's CUDA plugin under torch_xla 2.9, which no longer knows CUDA but runs any device that comes as a PJRT plugin.

torch_xla takes the kind of device from the name that the plugin's client gives itself: it aborts at "cuda" ("XLA:CUDA is not
supported anymore"), and makes a generic device of a name that it does not know. So the plugin's table of functions gets
another one for the name before the client is made. Private: the layout of that table, checked for PJRT's C API 0.75.
"""

import ctypes
import os
import socket
from pathlib import Path
from typing import Any

import torch_xla
from torch_xla.experimental import plugins

from gpt2_xla.errors import UserError
from gpt2_xla.runtime.cuda_host import ALLOCATOR, PLUGIN, PLUGIN_VERSION, gpu_count, knows_cuda, plugin_library

DEVICE = "CUDA"  # the value of PJRT_DEVICE
NAME = b"NVIDIA"  # what the client calls itself, in capitals as torch_xla reads device names
API = (0, 75)  # of torch_xla 2.9.0 and of the plugin
PLATFORM_NAME = 12  # the place of PJRT_Client_PlatformName among the functions of the table
COORDINATOR_PORT = "XLA_COORDINATOR_PORT"


class Api(ctypes.Structure):
    """The beginning of PJRT_Api, the plugin's table of functions."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("version_size", ctypes.c_size_t),
        ("version_extensions", ctypes.c_void_p),
        ("major", ctypes.c_int),
        ("minor", ctypes.c_int),
        ("functions", ctypes.c_void_p * 60),
    )


class _NameArguments(ctypes.Structure):
    """PJRT_Client_PlatformName_Args; the last two are the answer."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("client", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("length", ctypes.c_size_t),
    )


def _platform_name(arguments: Any) -> None:
    """No error, and NAME. Called once, when the client is made."""
    arguments.contents.name, arguments.contents.length = NAME, len(NAME)


# Global, because C calls it as long as the process lives.
_PLATFORM_NAME = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(_NameArguments))(_platform_name)


class CudaPlugin(plugins.DevicePlugin):  # type: ignore[misc]
    """How torch_xla starts the plugin: each process of xmp.spawn with one GPU, a process of its own (SPMD) with all."""

    def __init__(self, library: Path) -> None:
        super().__init__()
        self._library = library

    def library_path(self) -> str:
        return str(self._library)

    def physical_chip_count(self) -> int:
        return gpu_count()

    def configure_single_process(self) -> None:
        """Nothing: a single process has rank 0 of 1 already."""

    def configure_multiprocess(self, local_rank: int, local_world_size: int) -> None:  # noqa: ARG002
        """In a child of xmp.spawn, before it looks for its device. Raises `UserError` if the plugin can't open it."""
        for name in ("RANK", "WORLD_SIZE"):  # torchrun's: torch_xla would take them for those of xmp.spawn's processes
            os.environ.pop(name, None)
        os.environ["MASTER_ADDR"] = "localhost"  # where the coordinator listens; a job script's may be another host
        start_client()

    def requires_xla_coordinator(self) -> bool:
        return _processes()[1] > 1

    def client_create_options(self) -> dict[str, Any]:
        rank, count = _processes()
        every = torch_xla.runtime.is_spmd()
        options: dict[str, Any] = {
            "platform_name": "cuda",
            "visible_devices": list(range(gpu_count())) if every else [rank],
            "node_id": rank,
            "num_nodes": count,
            "allocator": "cuda_async" if _is_on("PJRT_ALLOCATOR_CUDA_ASYNC", False) else "default",
            "preallocate": _is_on("PJRT_ALLOCATOR_PREALLOCATE", True),
        }
        if ALLOCATOR in os.environ:
            options["memory_fraction"] = float(os.environ[ALLOCATOR])
        return options


def register_devices() -> None:
    """Tell torch_xla of the plugin if PJRT_DEVICE asks for it: in every process, before anything touches a device.

    Raises `UserError` if the plugin is another than the one tested.
    """
    if os.environ.get("PJRT_DEVICE") != DEVICE:
        return
    # CUDA shall count the GPUs as NVML does, which tells their names; by itself it counts the fastest first.
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # For torch_xla 2.7, which does not count them itself, and for children, so that all count the same.
    os.environ.setdefault("GPU_NUM_DEVICES", str(gpu_count()))
    if knows_cuda() or DEVICE in plugins._plugin_registry:  # private, checked on 2.9
        return
    library = plugin_library()
    if library is None:
        raise UserError(f"{PLUGIN} {PLUGIN_VERSION} is gone since this run began; install it again")
    rename_client(library)
    # Two runs on one machine must not meet; children inherit it.
    os.environ.setdefault(COORDINATOR_PORT, str(_free_port()))
    plugins.use_dynamic_plugins()
    plugins.register_plugin(DEVICE, CudaPlugin(library))


def start_client() -> None:
    """Make this process's client now, of which torch_xla has one for good; raises `UserError` if CUDA's is refused."""
    try:
        torch_xla._XLAC._xla_num_runtime_devices()
    except RuntimeError as error:
        if os.environ.get("PJRT_DEVICE") != DEVICE:
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"PJRT_DEVICE=CUDA: the plugin could not open the GPU ({reason}); nvidia-smi shows the GPUs and who uses them, "
            "python scripts/doctor.py what else may be wrong"
        ) from error


def rename_client(library: Path) -> None:
    """Make the clients of the plugin call themselves NAME; raises `UserError` for a plugin of another API version."""
    api = load_api(library)
    if (api.major, api.minor) != API:
        raise UserError(
            f"{library} speaks PJRT's C API {api.major}.{api.minor}, and torch_xla {torch_xla.__version__} speaks "
            f"{API[0]}.{API[1]}; pip install {PLUGIN}=={PLUGIN_VERSION}"
        )
    api.functions[PLATFORM_NAME] = ctypes.cast(_PLATFORM_NAME, ctypes.c_void_p).value


def load_api(library: Path) -> Api:
    """The plugin's table, which the whole process shares. Raises `UserError` for a file that is no plugin."""
    try:
        get = ctypes.CDLL(str(library)).GetPjrtApi
    except (OSError, AttributeError) as error:
        raise UserError(f"{library} is no PJRT plugin that can be loaded: {error}") from error
    get.restype = ctypes.POINTER(Api)
    return get().contents


def _processes() -> tuple[int, int]:
    """Rank of this process among those that xmp.spawn started, and their number; 0 and 1 outside of it."""
    return int(os.environ.get("PJRT_LOCAL_PROCESS_RANK", "0")), int(os.environ.get("PJRT_LOCAL_PROCESS_COUNT", "1"))


def _is_on(name: str, default: bool) -> bool:
    return os.environ.get(name, str(int(default))).lower() not in ("", "0", "false")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
