"""The program under PJRT_DEVICE=CUDA with another PJRT plugin in place of the CUDA one: python tests/cuda_stand_in.py WHAT [flags …]

WHAT is train (run_pretrain_xla.py), generate (generate.py) or doctor (the doctor's look at the XLA devices). Test equipment: the
plugin is xla-cpu-pjrt from PyPI, a CPU that comes as a plugin, or the library that STAND_IN names; nothing looks for GPUs.
The rename, the registration in every process and the plugin class are those of the product.

A plugin that speaks a newer API than torch_xla's 0.75 wants larger options in each execution: they are padded with zeros
here, which a plugin takes for a caller that asks for nothing more. By Python, that is: a destructor that holds the interpreter
lock and waits for an execution would wait for ever, so the product does not do it.
"""

import ctypes
import functools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# At import, like what is patched below: xmp.spawn's children import this file again.
os.environ["PJRT_DEVICE"] = "CUDA"
os.environ.setdefault("GPU_NUM_DEVICES", "1")

from gpt2_xla.errors import run_main
from gpt2_xla.runtime import cuda_host, pjrt_cuda, xla_installation

EXECUTE = 55  # the place of PJRT_LoadedExecutable_Execute among the functions of the table
PADDED = 256  # bytes; 80 in API 0.75, 112 in 0.81


class ExecuteArguments(ctypes.Structure):
    """The beginning of PJRT_LoadedExecutable_Execute_Args."""

    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("extensions", ctypes.c_void_p),
        ("executable", ctypes.c_void_p),
        ("options", ctypes.c_void_p),
    )


Execute = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ExecuteArguments))
_kept = []  # what C calls


def library():
    """The stand-in's shared library; None where it is not installed."""
    if given := os.environ.get("STAND_IN"):
        return Path(given)
    try:
        import xla_plugins.xla_cpu_pjrt as package
    except ImportError:
        return None
    return Path(package.__file__).parent / "xla_cpu_pjrt.so"


@functools.cache
def load_api(path, load=pjrt_cuda.load_api):
    """The plugin's table, made to take a caller of API 0.75, and said to be of it."""
    api = load(path)
    if (api.major, api.minor) > pjrt_cuda.API:
        original = Execute(api.functions[EXECUTE])

        def execute(arguments):
            options = arguments.contents.options
            size = ctypes.c_size_t.from_address(options).value
            padded = ctypes.create_string_buffer(PADDED)
            ctypes.memmove(padded, options, size)
            ctypes.c_size_t.from_buffer(padded).value = PADDED
            arguments.contents.options = ctypes.addressof(padded)
            error = original(arguments)
            arguments.contents.options = options
            return error

        _kept.append(Execute(execute))
        api.functions[EXECUTE] = ctypes.cast(_kept[-1], ctypes.c_void_p).value
        pjrt_cuda.API = (api.major, api.minor)
    return api


@functools.wraps(pjrt_cuda.CudaPlugin.client_create_options)
def client_create_options(plugin, options=pjrt_cuda.CudaPlugin.client_create_options):
    """Those of the product, and how many devices the CPU shall pretend to be."""
    made = options(plugin)
    return made if "STAND_IN" in os.environ else made | {"cpu_device_count": len(made["visible_devices"])}


pjrt_cuda.plugin_library = library
pjrt_cuda.CudaPlugin.client_create_options = client_create_options
pjrt_cuda.load_api = load_api
xla_installation.cuda_mistakes = list
cuda_host.read_driver = lambda: None


def main():
    what = sys.argv.pop(1)
    if what == "train":
        import run_pretrain_xla

        return run_pretrain_xla.main()
    if what == "generate":
        import generate

        return generate.main()
    from gpt2_xla.runtime import xla_doctor
    from gpt2_xla.runtime.xla_spawn import spawn_replicas

    return spawn_replicas(xla_doctor.replica)


if __name__ == "__main__":
    sys.exit(run_main(main))
