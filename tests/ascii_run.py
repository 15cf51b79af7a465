"""A run folder whose model writes printable ASCII."""

from pathlib import Path

import torch

from gpt2_xla import checkpoint
from gpt2_xla.checkpoint import TrainerState
from gpt2_xla.config import ModelConfig, PretrainConfig, to_dict
from gpt2_xla.model import GPT
from gpt2_xla.shares import whole_shares
from gpt2_xla.tokenizer import ByteTokenizer

MODEL = ModelConfig(vocab_size=257, seq_length=16, d_model=32, num_layers=2, num_heads=2, tie_weights=False)


def make_run(run_dir: Path, model_config: ModelConfig = MODEL, **state) -> Path:
    """A run folder whose model says printable ASCII only, and not always the same."""
    model = GPT(model_config)
    model.initialize(seed=0)
    with torch.no_grad():
        model.lm_head.weight.normal_(generator=torch.Generator().manual_seed(1))
        # The final LayerNorm's bias pushes along one direction, in which only these ids lie.
        if model.config.bias:
            model.ln_f.bias[0] = 50.0
        model.lm_head.weight[:, 0] = -1.0
        model.lm_head.weight[32:127, 0] = 1.0
    config = to_dict(PretrainConfig(model=model_config))
    recorded = {"tokenizer": "bytes", "tokenizer_hash": ByteTokenizer.hash} | state
    checkpoint.save(run_dir, TrainerState(10, 80, config, **recorded), whole_shares(model.state_dict()), [], 256)
    return run_dir
