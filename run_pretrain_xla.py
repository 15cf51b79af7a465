#!/usr/bin/env python
"""Pretrain a GPT on XLA devices through PJRT: `PJRT_DEVICE=TPU python run_pretrain_xla.py …` runs one replica per device,
`--sharding fsdp` one model cut up over all of them (`PJRT_DEVICE=CUDA` for NVIDIA GPUs, `CPU` to try it without either)."""

import functools
import sys

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.errors import run_main


def main() -> None:
    from gpt2_xla.runtime.stop_signals import StopSignals
    from gpt2_xla.runtime.xla_installation import refuse_torchrun

    refuse_torchrun()
    with StopSignals() as stop:  # before the slow imports: a signal that comes during them is heard too
        from gpt2_xla.runtime.maintenance import watch_maintenance
        from gpt2_xla.runtime.xla_launch import launch, machine_mistakes
        from gpt2_xla.startup import pretrain_start
        from gpt2_xla.train import pretrain

        watch_maintenance(stop)
        start = pretrain_start(XlaPretrainConfig, sys.argv[1:], __doc__, machine_mistakes)
        launch(start.config, functools.partial(pretrain, source=start.source, seen=start.seen), stop=stop)


if __name__ == "__main__":
    sys.exit(run_main(main))
