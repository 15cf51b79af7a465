"""Stop a run while its loader pauses (pausing_run.py): however fast the machine is, the signal does not come after its end."""

import os
import signal
import subprocess
from pathlib import Path

from commands import ROOT, finish

PAUSING = str(ROOT / "tests" / "pausing_run.py")
PAUSING_XLA = str(ROOT / "tests" / "pausing_xla_run.py")


def stop_paused(process: subprocess.Popen, number: int, go_on: Path) -> str:
    """Send the signal, let the loader go on (PAUSE_UNTIL is `go_on`) when the run has said that it heard it; what it printed."""
    process.send_signal(number)
    told = b""
    try:
        while b"stopping after this step" not in told:
            some = os.read(process.stdout.fileno(), 2**16)
            assert some, told.decode()
            told += some
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    go_on.touch()
    return told.decode() + finish(process)
