"""run_pretrain.py whose loader stops before step PAUSE_AT, for PAUSE_SECONDS or for ever, on rank RANK_PAUSED or on all.

With PAUSE_UNTIL it goes on when there is such a file.

After a restart by torchrun it does not.
"""

import os
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import run_pretrain
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import run_main

whole = PretrainingData.training


def pause():
    if "PAUSE_UNTIL" not in os.environ:
        threading.Event().wait(float(os.environ.get("PAUSE_SECONDS", "100000")))
        return
    while not Path(os.environ["PAUSE_UNTIL"]).exists():
        time.sleep(0.05)


def pausing(self, *arguments):
    for step, batch in enumerate(whole(self, *arguments)):
        paused = os.environ.get("RANK_PAUSED", str(self.rank)) == str(self.rank)
        if step == int(os.environ["PAUSE_AT"]) and paused and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
            pause()
        yield batch


if __name__ == "__main__":
    PretrainingData.training = pausing
    sys.exit(run_main(run_pretrain.main))
