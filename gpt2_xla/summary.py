"""The one screen that a run prints before it starts."""

from pathlib import Path

from gpt2_xla.checkpoint import has_state
from gpt2_xla.config import PretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.data.training_set import TrainingSet
from gpt2_xla.model import flops_per_token


def summary(
    config: PretrainConfig, data: PretrainingData, parameters: int, machine: str, step: int, source: Path | None
) -> str:
    """Model, data, schedule, machine and cost of a run at `step`, begun with the checkpoint or weights `source`, in words."""
    model, optim, run = config.model, config.optim, config.run
    flops = flops_per_token(model, parameters)
    tokens = run.train_steps * config.tokens_per_step
    rows = [
        (
            "model",
            f"{model.num_layers} layers, {model.num_heads} heads, C {model.d_model}, T {model.seq_length}, V {model.vocabulary}",
        ),
        ("parameters", f"{parameters:,}"),
        ("machine", f"{machine}, {_precision(config)}"),
        ("data", f"{_tokens(data)}; {data.checked}"),
        ("tokenizer", f"{data.manifest.tokenizer or 'unknown (no manifest)'}"),
        (
            "batch",
            f"{config.tokens_per_step:,} tokens a step = {_micro_steps(config)}{config.data.train_batch_size} × {model.seq_length}",
        ),
        (
            "optimizer",
            f"{optim.optim_type}, lr {optim.learning_rate:g} → {optim.min_lr:g} {optim.decay_method}, {_warmup(config)}",
        ),
        ("cost", f"{flops / 1e6:,.1f} MFLOP a token, {flops * tokens:.3g} FLOP in all"),
        (
            "steps",
            f"{run.train_steps:,}{f', continuing at {step:,}' if step else ''}: {tokens:,} tokens{_epochs(config, data)}",
        ),
        ("run folder", run.checkpoints_dir),
    ]
    if data.train is not None and len(data.train.sources) > 1:
        rows.insert(4, ("mixture", _mixture(data.train)))
    if source is not None:
        rows.append(("checkpoint" if has_state(source) else "weights of", str(source)))
    return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def _warmup(config: PretrainConfig) -> str:
    steps = config.optim.warmup_steps
    return f"{steps} warm-up steps" + (", which is the whole run" if steps >= config.run.train_steps else "")


def _precision(config: PretrainConfig) -> str:
    mixed = config.runtime.mixed_precision
    return "float32" if mixed == "no" else f"{mixed} autocast over float32 weights"


def _micro_steps(config: PretrainConfig) -> str:
    steps = config.data.gradient_accum_step
    return f"{steps} micro-steps × " if steps > 1 else ""


def _tokens(data: PretrainingData) -> str:
    parts = [("training", data.train), ("validation", data.valid)]
    return ", ".join(f"{windows.tokens:,} {name} tokens" for name, windows in parts if windows is not None)


def _mixture(train: TrainingSet) -> str:
    pairs = zip(train.sources, train.shares.values(), strict=True)
    return ", ".join(f"{share:.2%} {one.name} ({one.windows.tokens:,} tokens)" for one, share in pairs)


def _epochs(config: PretrainConfig, data: PretrainingData) -> str:
    if data.train is None:
        return ""
    return f", {epochs_text(data.train.epochs(config.run.train_steps * config.sequences_per_step))}"


def epochs_text(epochs: dict[str, float]) -> str:
    """Epochs by source, in words."""
    return ", ".join(f"{count:.2f} epochs of {name}" for name, count in epochs.items())
