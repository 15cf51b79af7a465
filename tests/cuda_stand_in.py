"""The program under PJRT_DEVICE=CUDA with another PJRT plugin in place of the CUDA one: python tests/cuda_stand_in.py WHAT [flags …]

WHAT is train (run_pretrain_xla.py), generate (generate.py) or doctor (the doctor's look at the XLA devices). Test equipment: the
plugin is xla-cpu-pjrt from PyPI, a CPU that comes as a plugin, or the library that STAND_IN names; nothing looks for GPUs.
The rename, the registration in every process and the plugin class are those of the product.

A plugin that speaks a newer API than torch_xla's 0.75 wants larger options in each execution: they are padded with zeros
here, which a plugin takes for a caller that asks for nothing more. In C: a function of Python's would need the interpreter
lock, which a destructor may hold while it waits for the very execution.
"""

import ctypes
import functools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

# At import, like what is patched below: xmp.spawn's children import this file again.
os.environ["PJRT_DEVICE"] = "CUDA"
os.environ.setdefault("GPU_NUM_DEVICES", "1")

from gpt2_xla.errors import run_main
from gpt2_xla.runtime import cuda_host, pjrt_cuda, xla_installation

EXECUTE = 55  # the place of PJRT_LoadedExecutable_Execute among the functions of the table
PADDING = """
#include <string.h>
struct arguments { size_t size; void *extensions; void *executable; void *options; };
static void *(*original)(struct arguments *);
void set_original(void *function) { original = function; }
void *execute(struct arguments *given) {
  char padded[256] = {0};  /* 80 bytes in API 0.75, 112 in 0.81 */
  void *options = given->options;
  memcpy(padded, options, *(size_t *)options);
  *(size_t *)padded = sizeof padded;
  given->options = padded;
  void *error = original(given);
  given->options = options;
  return error;
}
"""


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
        with tempfile.TemporaryDirectory() as folder:
            source, padding = Path(folder) / "padding.c", Path(folder) / "padding.so"
            source.write_text(PADDING)
            subprocess.run(["cc", "-shared", "-fPIC", "-o", padding, source], check=True)
            shim = ctypes.CDLL(str(padding))
        shim.set_original(ctypes.c_void_p(api.functions[EXECUTE]))
        api.functions[EXECUTE] = ctypes.cast(shim.execute, ctypes.c_void_p).value
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
