"""No process trains on when the one that minds it is dead: a restart would find it writing into the same run folder."""

import ctypes
import os
import signal
import sys


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the parent dies, so that no orphan trains on. Linux only."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1  # linux/prctl.h
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getpid() != parent and os.getppid() != parent:  # it died before the call above
        os.kill(os.getpid(), signal.SIGKILL)
