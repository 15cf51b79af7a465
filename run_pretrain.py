#!/usr/bin/env python
"""Pretrain a GPT on CUDA, CPU or any other torch accelerator: `python run_pretrain.py …` for one process,
`torchrun --standalone --nproc_per_node=N run_pretrain.py …` for N."""

import os
import sys

from gpt2_xla.config import TorchPretrainConfig
from gpt2_xla.errors import run_main


def main() -> None:
    from gpt2_xla.runtime.orphans import die_with
    from gpt2_xla.runtime.stop_signals import StopSignals

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with(os.getppid())
    with StopSignals() as stop:  # before the slow imports: a signal that comes during them is heard too
        from gpt2_xla.batch_search import find_batch
        from gpt2_xla.runtime.maintenance import watch_maintenance
        from gpt2_xla.runtime.process_mesh import sharding_mistakes, world_size
        from gpt2_xla.runtime.rendezvous import environment_mistakes
        from gpt2_xla.runtime.torch_runtime import device_mistakes
        from gpt2_xla.runtime.torch_sharding import open_torch_runtime
        from gpt2_xla.startup import pretrain_start
        from gpt2_xla.train import pretrain
        from gpt2_xla.validation import replica_mistakes

        watch_maintenance(stop)
        start = pretrain_start(
            TorchPretrainConfig,
            sys.argv[1:],
            __doc__,
            lambda config: (
                environment_mistakes(os.environ)
                or [
                    *device_mistakes(config.runtime),
                    *sharding_mistakes(config.runtime),
                    *replica_mistakes(config, world_size()),
                ]
            ),
        )
        runtime = open_torch_runtime(start.config.runtime, stop)
        try:
            config = start.config
            if config.runtime.find_batch and not config.run.do_test:
                config = find_batch(config, runtime, stop)
            pretrain(config, runtime, start.source, start.seen)
        finally:
            runtime.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
