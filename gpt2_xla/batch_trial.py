"""One trial of --find-batch, in a process of its own: a few real steps, and how much memory they took.

`python -m gpt2_xla.batch_trial BYTES` reads the configuration from standard input.
"""

import contextlib
import json
import os
import sys
from pathlib import Path

from gpt2_xla import cli
from gpt2_xla.config import TorchPretrainConfig
from gpt2_xla.errors import run_main
from gpt2_xla.runtime.orphans import die_with

STEPS = 2  # the second has all that the first left behind
DOES_NOT_FIT = 3  # exit status
MARK = "gpt2_xla.batch_trial "  # before the result, whatever else a library prints


def main() -> None:
    """Print the peak memory of the configured step, in bytes, or end with DOES_NOT_FIT."""
    die_with(int(os.environ["GPT2_XLA_PARENT"]))  # before the slow imports
    with contextlib.suppress(OSError):  # where the whole machine runs out of memory, this process shall end first
        Path("/proc/self/oom_score_adj").write_text("1000")
    from gpt2_xla.runtime.memory import is_out_of_memory

    config = cli.from_dict(TorchPretrainConfig, json.load(sys.stdin))
    try:
        used = try_steps(config, int(sys.argv[1]))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        os._exit(DOES_NOT_FIT)  # at once: the other processes wait for this one
    print(MARK + str(used), flush=True)
    os._exit(0)  # at once: Python's own end takes up to 100 MB more, when a run has given back its own


def try_steps(config: TorchPretrainConfig, limit: int) -> int:
    """A few steps from random weights as a run takes them, with a batch of validation and the copies that a save makes.

    Returns the peak of the memory in bytes.
    """
    from gpt2_xla import optim
    from gpt2_xla.data.pretraining import PretrainingData
    from gpt2_xla.runtime.memory import hold_to, peak
    from gpt2_xla.runtime.torch_sharding import open_torch_runtime
    from gpt2_xla.train import evaluate_now, start_run, train_step

    runtime = open_torch_runtime(config.runtime)
    hold_to(runtime.device, limit)
    data = PretrainingData.open(config, runtime.rank, runtime.world_size)
    run, _ = start_run(config, runtime, data)
    run.forward.train()
    copies: tuple[dict, dict] = ({}, {})
    for batch in runtime.batches(data.training(0, STEPS), rows_dim=1):
        values = train_step(run, batch)
        runtime.end_step()
        runtime.fetch_later(values)()
        runtime.to_host(dict(run.model.named_parameters()), copies[0])  # a run keeps them from its first save on
        runtime.to_host(optim.named_state(run.model, run.optimizer), copies[1])
    if data.valid is not None:
        evaluate_now(run)
    runtime.close()
    return peak(runtime.device)


if __name__ == "__main__":
    sys.exit(run_main(main))
