"""What the benchmark says of a loop that ended early: the sentence that says why, of all that was written."""

import sys

import pytest
from commands import PYTHON, ROOT, finish, start

from gpt2_xla.bench.complaint import complaint
from gpt2_xla.errors import UserError, print_mistakes

BEGIN = """
import os, signal
import torch.distributed as dist
from gpt2_xla.errors import UserError, run_main
dist.init_process_group("gloo")
second = os.environ["RANK"] == "1"
"""
# The other process loses its peer, and says so unless torchrun ends it before.
RAISES = """
if second:
    try:
        {}["a"]
    except KeyError as error:
        raise ValueError("boom: 1") from error
dist.barrier()
"""
KILLED = """
if second:
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""
MISTAKEN = """
def main():
    dist.barrier()
    raise UserError(["--one 1 is wrong", "--two 2 is wrong"])
raise SystemExit(run_main(main))
"""


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        (RAISES, "ValueError: boom: 1"),
        (KILLED, "Signal 9 (SIGKILL) received by PID"),
        (MISTAKEN, "--one 1 is wrong; --two 2 is wrong"),
    ],
    ids=["raises", "killed", "mistaken"],
)
def test_of_several_processes_the_first_to_fail_is_quoted(end, expected, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(BEGIN + end)
    torchrun = (*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    # Unbuffered, Python writes a print's end of line by itself, and another process's line may come between.
    process = start(*torchrun, str(script), PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    output = finish(process)
    assert process.returncode == 1, output
    found = complaint(output, process.returncode)
    assert found.startswith(expected) if end is KILLED else found == expected


@pytest.mark.parametrize(
    "mistakes", [["--one 1 is wrong"], ["--one 1 is wrong", "--two 2 is wrong", "3. is no number"]]
)
def test_all_mistakes_are_quoted_once(mistakes, capsys):
    print("  7. a warning", file=sys.stderr) if len(mistakes) == 1 else None
    for _ in range(2):  # processes
        print_mistakes(UserError(mistakes))
    assert complaint(capsys.readouterr().err, 2) == "; ".join(mistakes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "UserWarning: old\nTraceback …\ntorch.OutOfMemoryError: no 2 GiB\nTry another size.\n",
            "torch.OutOfMemoryError: no 2 GiB",
        ),
        ("AssertionError\n", "AssertionError"),
        ("terminate called\n  what():  no driver\n-----\n", "what():  no driver"),
        ("", "exit status -11"),
    ],
)
def test_of_one_process_the_exception_or_the_last_line_is_quoted(text, expected):
    assert complaint(text, -11) == expected
