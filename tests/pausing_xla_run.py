"""run_pretrain_xla.py --sharding fsdp whose loader stops as that of pausing_run.py does."""

import sys

from pausing_run import pausing

import run_pretrain_xla
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import run_main

if __name__ == "__main__":
    PretrainingData.training = pausing
    sys.exit(run_main(run_pretrain_xla.main))
