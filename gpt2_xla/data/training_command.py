"""The command that trains on what was prepared, with a schedule that fits its size."""

import shlex
from pathlib import Path

from gpt2_xla.cli import parse
from gpt2_xla.config import ModelConfig, PretrainConfig, TorchPretrainConfig
from gpt2_xla.data.data_mistakes import windows_per_epoch
from gpt2_xla.data.manifest import Manifest

SMALL = ["--recipe", "macbook"]  # 0.8 M parameters, 2,000 steps
# How often GPT-2 reads the data: up to here a repeated token is worth about a new one (Muennighoff et al. 2023).
EPOCHS = 4
SMALL_EPOCHS = 50
LEAST_STEPS = 500  # of half a million tokens; fewer teach GPT-2 little


def training_command(output_dir: Path, held: dict[str, Manifest]) -> str | None:
    """How to train on OUTPUT_DIR, which holds train/ and perhaps valid/ as in `held`; None for too little text."""
    config, own = PretrainConfig(), []
    steps = _steps(config, held["train"], EPOCHS)
    if steps < LEAST_STEPS:
        config, own = parse(TorchPretrainConfig, SMALL, "").config, SMALL
        steps = _steps(config, held["train"], SMALL_EPOCHS)
        if windows_per_epoch(held["train"].tokens, config.model.seq_length) < config.data.train_batch_size:
            return None
        own = [*own, "--checkpoints-dir", f"runs/{output_dir.resolve().name}"]  # the recipe's may hold other data's run
    words = ["python", "run_pretrain.py"]
    for split in held:
        words += [f"--{split}-dir", str(output_dir / split)]
    words += own
    if steps < config.run.train_steps:
        words += ["--train-steps", str(steps), "--warmup-steps", str(steps // 20)]
    vocabulary = max(one.vocab_size or 0 for one in held.values())
    if vocabulary > ModelConfig().vocabulary:
        words += ["--vocab-size", str(vocabulary)]
    return shlex.join(words)


def _steps(config: PretrainConfig, train: Manifest, epochs: int) -> int:
    """The configuration's own steps, or as few as read the data so often."""
    return min(config.run.train_steps, train.tokens * epochs // config.tokens_at(0))
