"""The benchmark of the training step: bare loops do what ours does, turns are taken, tables say what was measured."""

import pytest
import torch
from commands import PYTHON, ROOT

from gpt2_xla.bench.contenders import write_random_tokens
from gpt2_xla.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TorchConfig, TorchPretrainConfig
from gpt2_xla.model import build_model, parameter_count
from gpt2_xla.runtime.bare_torch_loop import BareGPT, BareTorchLoop

MODEL = ModelConfig(vocab_size=61, seq_length=16, d_model=32, num_layers=2, num_heads=2)
BENCH = (*PYTHON, str(ROOT / "scripts" / "bench.py"), "--preset", "tiny", "--num-layers", "1", "--num-heads", "1")
SMALL = (
    "--d-model",
    "16",
    "--seq-length",
    "8",
    "--vocab-size",
    "32",
    "--turns",
    "2",
    "--steps",
    "3",
    "--device",
    "cpu",
)


def cells(output):
    """The tables that a command printed, as rows of cells."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def row(output, name):
    """The first row that begins with that cell, by the titles of the first table."""
    found = cells(output)
    return dict(zip(found[0], next(row for row in found if row[0] == name), strict=True))


def bare_like(ours):
    """A bare model with our weights."""
    bare = BareGPT(MODEL)
    names = {"attn.c_attn": "qkv", "attn.c_proj": "proj", "mlp.c_fc": "up", "mlp.c_proj": "down", "lm_head": "head"}
    state = {}
    for name, value in ours.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        state[name] = value
    bare.load_state_dict(state)
    return bare


def test_the_bare_model_is_the_same_mathematics():
    ours = build_model(MODEL, 0, seed=1)
    bare = bare_like(ours)
    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(2))
    for model in (ours, bare):
        model(tokens[:, :-1], tokens[:, 1:]).backward()
    assert parameter_count(bare) == parameter_count(ours)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) for model in (ours, bare)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert bare.wte.weight.grad == pytest.approx(ours.wte.weight.grad, abs=1e-6)


def test_the_bare_loop_learns(tmp_path):
    write_random_tokens(tmp_path, MODEL, 40)  # so few that they can be learned by heart
    config = TorchPretrainConfig(
        MODEL,
        DataConfig((str(tmp_path),), train_batch_size=4, gradient_accum_step=2),
        OptimConfig(learning_rate=1e-2, warmup_steps=5),
        RunConfig(train_steps=91),
        runtime=TorchConfig(mixed_precision="bf16"),
    )
    loop = BareTorchLoop(config, torch.device("cpu"), compiled=False)
    loop.run(1)
    assert loop.loss == pytest.approx(4.11, abs=0.1)  # ln 61
    loop.run(90)
    assert loop.loss < 1.0
