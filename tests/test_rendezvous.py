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
rendezvous.meet = lambda environment, wait, stop: meet(environment, timedelta(minutes=5), stop)
rendezvous.WAIT = timedelta(seconds=12)  # to connect
of_cpus = rendezvous.open_group("gloo", torch.device("cpu"), StopRequest())
if os.environ["RANK"] == "1":
    time.sleep(15)
values = [torch.ones(1) for _ in range(2)]
groups = (dist.group.WORLD, of_cpus)
works = [dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, groups)]
for work, value in zip(works, values):
    work.wait()
    os.write(1, f"together {int(value)}\\n".encode())  # at once: the other process writes into the same pipe
"""


def test_a_collective_waits_longer_than_connecting_may_take(tmp_path):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    torchrun = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    assert run(*torchrun, str(script), PYTHONPATH=str(ROOT)).count("together 2") == 4
