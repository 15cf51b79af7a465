"""Generation on one XLA device: generate.py --device xla."""

import torch_xla

from gpt2_xla.decoding import Machine
from gpt2_xla.runtime.pjrt_cuda import register_devices, start_client


def xla_machine() -> Machine:
    """This process's device. `installation_mistakes()` tells beforehand why there is none."""
    register_devices()
    start_client()
    return Machine(torch_xla.device(), compiles=True, launch=torch_xla.sync)
