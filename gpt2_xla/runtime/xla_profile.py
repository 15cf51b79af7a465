"""A profile of this process's XLA devices, in XProf's format."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch_xla.core.xla_model as xm
import torch_xla.debug.profiler as xp


@contextmanager
def xla_profile(folder: Path) -> Iterator[str]:
    """Record host, compiler and devices into folder/plugins/profile/TIME/*.xplane.pb; yields how to open it.

    The steps are told apart by their program's runs: a training step is one execution. Naming them with xp.StepTrace
    would add a sync, and a scope in the graph. In process, without a profiler server; on torch_xla 2.9 this works on the
    CPU client too. Raises RuntimeError if nothing was recorded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.rglob("*.xplane.pb"))
    xm.wait_device_ops()  # else the steps before would run on into it
    xp.start_trace(str(folder))
    try:
        yield f"pip install xprof && xprof --logdir {folder} --port 6006, or open the .trace.json.gz in it at https://ui.perfetto.dev"
        xm.wait_device_ops()
    finally:
        xp.stop_trace()
    if not any(file.stat().st_size for file in set(folder.rglob("*.xplane.pb")) - before):
        raise RuntimeError(f"torch_xla's profiler wrote nothing into {folder}")
