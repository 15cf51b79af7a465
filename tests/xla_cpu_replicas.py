"""Run run_pretrain_xla.py with several XLA replicas on CPU: python tests/xla_cpu_replicas.py REPLICAS [flags …]

Test equipment, checked on torch_xla 2.9.0; on TPU none of it is needed. xmp.spawn with CPU_NUM_DEVICES=N runs N threads in
one process, and their collectives hang for four reasons, each worked around here:
(a) two threads that miss the compile cache at once compile two executables, whose collectives never meet: a turnstile lets
    one compile at a time; (b) a destructor may free an in-flight buffer while it holds the GIL: wait for the device
    (GIL released) before and after each step marker; (c) xm.rendezvous and all_gather(pin_layout=True) build a graph that
    differs per ordinal: a thread barrier instead; (d) the asynchronous CPU client may queue two ranks on one pool thread:
    PJRT_CPU_ASYNC_CLIENT=0.
"""

import functools
import os
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.errors import run_main
from gpt2_xla.runtime.stop_signals import StopSignals
from gpt2_xla.runtime.xla_launch import launch, run_replica
from gpt2_xla.startup import pretrain_start
from gpt2_xla.train import pretrain

ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "XLA_THREAD_POOL_SIZE": "32",
    "NPROC": "32",
    "PJRT_CPU_ASYNC_CLIENT": "0",
}
_lock = threading.Lock()
_installed = False


def replica(index, *arguments):
    """In place of `run_replica`: the same, after the workarounds are in place."""
    install()
    run_replica(index, *arguments)


def install():
    """Patch torch_xla in this process, once."""
    global _installed
    with _lock:
        if _installed:
            return
        _installed = True
        _install_turnstile()
        _install_thread_collectives(int(os.environ["CPU_NUM_DEVICES"]))


def _install_turnstile():
    import torch_xla

    native = torch_xla._XLAC
    original = native._xla_step_marker
    changed = threading.Condition()
    state = {"holder": None, "seen": None}

    def compiled():  # moves once the holder has an executable: a cache hit, or a cache entry added
        return native._xla_counter_value("CachedCompile") or 0, native._xla_get_num_cached_compilation_graph()

    def step_marker(device="", devices=(), wait=True, reset_scope=True):
        real = native._xla_real_devices([device or native._xla_get_default_device()])
        native._xla_wait_device_ops(real)
        me = object()
        with changed:
            while state["holder"] is not None and compiled() == state["seen"]:
                changed.wait(0.002)
            state.update(holder=me, seen=compiled())
        try:
            original(device, list(devices), wait=False, reset_scope=reset_scope)
        finally:
            with changed:
                if state["holder"] is me:
                    state["holder"] = None
                    changed.notify_all()
        native._xla_wait_device_ops(real)

    native._xla_step_marker = step_marker


def _install_thread_collectives(count):
    import torch_xla
    import torch_xla.core.xla_model as xm
    import torch_xla.runtime as xr

    barrier, box = threading.Barrier(count), [b""] * count

    def rendezvous(payload=b"", ordinals=None, tag=None):
        torch_xla.sync()
        box[xr.global_ordinal()] = payload
        barrier.wait()
        everyone = list(box)
        barrier.wait()
        return everyone

    def gather(value, dim, groups, output=None):
        return xm.all_gather(value, dim=dim, groups=groups, output=output, pin_layout=False)

    xm.xla_rendezvous = rendezvous
    xm._all_gather_using_all_reduce = gather


def main():
    os.environ.update(ENVIRONMENT, CPU_NUM_DEVICES=sys.argv[1])
    with StopSignals() as stop:
        start = pretrain_start(XlaPretrainConfig, sys.argv[2:], __doc__)
        launch(start.config, functools.partial(pretrain, source=start.source, seen=start.seen), replica, stop)


if __name__ == "__main__":
    sys.exit(run_main(main))
