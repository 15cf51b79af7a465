"""Generate on one XLA device and print, as JSON, what torch_xla counted: python xla_generation_counters.py"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as xla_metrics

from gpt2_xla.config import ModelConfig
from gpt2_xla.decoding import Decoder, Machine, generate
from gpt2_xla.model import build_model
from gpt2_xla.runtime.xla_generation import xla_machine
from gpt2_xla.sampling import Sampling


def counters():
    xm.wait_device_ops()  # an execution is counted when it ends
    names = ("CompileTime", "ExecuteTime", "TransferFromDeviceTime")
    return [metric[0] if (metric := xla_metrics.metric_data(name)) else 0 for name in names]


def model():
    made = build_model(ModelConfig(61, 64, 32, 2, 2), 0, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3, generator=generator)
    return made.eval()


def texts_of(model, machine, lengths, tokens):
    """The continuations of prompts of these lengths, and the counters' growth with each round of tokens."""
    prompts = [[(7 * row + place) % 61 for place in range(length)] for row, length in enumerate(lengths)]
    texts, grown, last = [[] for _ in prompts], [], counters()
    decoder = Decoder(model, machine, 3, tokens)
    for drawn in generate(decoder, prompts, range(len(prompts)), tokens, Sampling(temperature=0.8, top_k=20)):
        texts[drawn.row].append(drawn.token)
        if drawn.row == 0:
            now = counters()
            grown.append([after - before for before, after in zip(last, now, strict=True)])
            last = now
    return texts, grown


def main():
    machine, on_xla = xla_machine(), model()
    on_xla.to(machine.device)
    on_xla.tie_weights()
    # Buckets: 16; 16 again, with a row less; 32; past the context of 64, which is a bucket of its own.
    rounds = [([3, 16, 9], 36), ([1, 12], 36), ([30, 2, 17], 20), ([50, 4, 5], 40)]
    found = [texts_of(on_xla, machine, *one) for one in rounds]
    on_cpu, cpu = model(), Machine(torch.device("cpu"))
    same = [texts == texts_of(on_cpu, cpu, *one)[0] for (texts, _), one in zip(found, rounds, strict=True)]
    print(json.dumps({"counted": [grown for _, grown in found], "as_on_cpu": same}))


if __name__ == "__main__":
    main()
