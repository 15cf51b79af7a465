#!/usr/bin/env python
"""Pretrain a GPT on CUDA, CPU or any other torch accelerator: `python run_pretrain.py …` for one process,
`torchrun --standalone --nproc_per_node=N run_pretrain.py …` for N."""

import sys

from gpt2_xla.config import TorchPretrainConfig
from gpt2_xla.errors import run_main


def main() -> None:
    from gpt2_xla.runtime.torch_runtime import TorchRuntime, device_mistakes, world_size
    from gpt2_xla.startup import pretrain_config
    from gpt2_xla.train import pretrain
    from gpt2_xla.validation import replica_mistakes

    config = pretrain_config(
        TorchPretrainConfig,
        sys.argv[1:],
        __doc__,
        lambda config: [*device_mistakes(config.runtime), *replica_mistakes(config, world_size())],
    )
    runtime = TorchRuntime(config.runtime)
    try:
        pretrain(config, runtime)
    finally:
        runtime.close()


if __name__ == "__main__":
    sys.exit(run_main(main))
