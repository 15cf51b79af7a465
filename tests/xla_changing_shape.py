"""run_pretrain_xla.py whose batches are half as long from step 4 on: python xla_changing_shape.py [flags …]"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import run_main
from gpt2_xla.runtime.xla_launch import launch
from gpt2_xla.startup import pretrain_start
from gpt2_xla.train import pretrain


def work(config, runtime):
    whole = PretrainingData.training

    def shrinking(self, *arguments):
        for step, batch in enumerate(whole(self, *arguments)):
            yield batch if step < 3 else batch[:, :, : batch.shape[2] // 2 + 1]

    PretrainingData.training = shrinking
    pretrain(config, runtime)


if __name__ == "__main__":
    sys.exit(run_main(lambda: launch(pretrain_start(XlaPretrainConfig, sys.argv[1:], __doc__).config, work)))
