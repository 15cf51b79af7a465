"""What a process does with memory that was freed: on a CPU the next step asks for the same again."""

import ctypes
import sys

import pytest
from commands import PYTHON, ROOT, run

# Page faults, 4 KiB each or more, of taking and writing 64 MiB four times, once the heap has grown.
COUNT = """
import resource, torch
from gpt2_xla.config import TorchConfig
from gpt2_xla.runtime.torch_runtime import TorchRuntime
TorchRuntime(TorchConfig(device="cpu"))
for _ in range(4):
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc's malloc: it has mallopt"
)
@pytest.mark.parametrize(
    ("settings", "kept"), [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)], ids=["ours", "the user's"]
)
def test_the_runtime_keeps_what_is_freed_unless_the_environment_says_otherwise(settings, kept, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    faults = int(run(*PYTHON, "-c", COUNT, PYTHONPATH=str(ROOT), **settings))
    assert faults < 1000 if kept else faults > 10_000
