"""What the processes wait for once they have met: each other, however long it takes."""

from commands import PYTHON, ROOT, run

LATE = """
import os, time
from datetime import timedelta
import torch
import torch.distributed as dist
from gpt2_xla.runtime import rendezvous
from gpt2_xla.runtime.stop_signals import StopRequest
meet = rendezvous.meet
rendezvous.meet = lambda environment, wait, stop: meet(environment, timedelta(minutes=1), stop)
rendezvous.WAIT = timedelta(seconds=6)  # to connect
of_cpus = rendezvous.open_group("gloo", torch.device("cpu"), StopRequest())
for group in (dist.group.WORLD, of_cpus):
    if os.environ["RANK"] == "1":
        time.sleep(9)
    value = torch.ones(1)
    dist.all_reduce(value, group=group)
    print("together", int(value))
"""


def test_a_collective_waits_longer_than_connecting_may_take(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    torchrun = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert run(*torchrun, str(script), PYTHONPATH=str(ROOT)).count("together 2") == 4
