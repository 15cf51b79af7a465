"""The attention kernel, its steps run as plain XLA on the CPU, against torch's attention; prints JSON: python xla_splash.py"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch.nn import functional as F

from gpt2_xla.runtime.mesh import AXES, mesh_shape
from gpt2_xla.runtime.xla_partition import ByHeads, Partition
from gpt2_xla.runtime.xla_splash import splash_attention

SHAPES = {"D=64": (2, 3, 256, 64), "D=128": (1, 2, 256, 128), "T=384": (1, 2, 384, 64)}
GROUPED = (1, 4, 128, 64)  # with half as many heads of keys and values


def differences(shape, dtype, groups=None):
    """Largest differences of the output and of the gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)
    of_keys = (shape[0], groups or shape[1], *shape[2:])
    q, k, v, gradient = (torch.randn(size, generator=generator).to(dtype) for size in (shape, of_keys, of_keys, shape))
    exact = [tensor.float().requires_grad_() for tensor in (q, k, v)]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    expected_gradients = torch.autograd.grad(expected, exact, gradient.float())
    placed = [tensor.to(torch_xla.device()).requires_grad_() for tensor in (q, k, v)]
    found = splash_attention(*placed, 0.0, interpret=True)
    gradients = torch.autograd.grad(found, placed, gradient.to(torch_xla.device()))
    torch_xla.sync()
    pairs = zip((found, *gradients), (expected, *expected_gradients), strict=True)
    return [float((a.detach().cpu().float() - b.detach()).abs().max()) for a, b in pairs]


def sharded_differences():
    """The same on 8 devices, of which each has one sequence of two heads."""
    partition = Partition(xs.Mesh(np.arange(8), (1, 4, 2), AXES), mesh_shape("data=1,fsdp=4,tensor=2", 8))
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn((4, 4, 128, 64), generator=generator) for _ in range(3))
    results = []
    for mapped, device in ((None, "cpu"), (ByHeads(partition), torch_xla.device())):
        placed = [tensor.to(device).requires_grad_() for tensor in (q, k, v)]
        if mapped:
            out = splash_attention(*placed, 0.0, mapped, interpret=True)
        else:
            out = F.scaled_dot_product_attention(*placed, is_causal=True)
        gradients = torch.autograd.grad(out.square().sum(), placed)
        torch_xla.sync()
        results.append([tensor.detach().cpu() for tensor in (out, *gradients)])
    return [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]


if __name__ == "__main__":
    if sys.argv[1:] == ["sharded"]:
        xr.use_spmd()
        torch_xla.device()
        print(json.dumps(sharded_differences()))
        sys.exit()
    torch_xla.device()  # before the first backward pass: autograd counts the devices then
    results = {name: differences(shape, torch.float32) for name, shape in SHAPES.items()}
    results["grouped"] = differences(GROUPED, torch.float32, groups=2)
    print(json.dumps(results | {"bf16": differences(SHAPES["D=64"], torch.bfloat16)}))
