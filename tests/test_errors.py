"""How a mistake is told where torchrun starts several processes that may all have made it."""

import pytest
from commands import PYTHON, ROOT, finish, start

SCRIPT = """
import os, signal
from gpt2_xla.errors import UserError, run_main
def main():
    if os.environ["RANK"] not in {}:
        signal.pause()
    raise UserError("--one 1 is wrong")
raise SystemExit(run_main(main))
"""


@pytest.mark.parametrize("mistaken", [("0", "1"), ("1",)], ids=["all", "the second"])
def test_torchruns_processes_tell_a_mistake_once(mistaken, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(mistaken))
    torchrun = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    process = start(*torchrun, str(script), PYTHONPATH=str(ROOT))
    assert finish(process).count("error: --one 1 is wrong") == 1
    assert process.returncode == 1  # torchrun's
