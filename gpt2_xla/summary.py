"""The one screen that a run prints before it starts."""

from pathlib import Path

from gpt2_xla import hf
from gpt2_xla.checkpoint import has_state
from gpt2_xla.config import ModelConfig, PretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.data.training_set import TrainingSet
from gpt2_xla.model import flops_per_token

MANY_EPOCHS = 100  # above the 82 of recipe shakespeare_gpu on tinyshakespeare, the most of all in configs/


def summary(
    config: PretrainConfig, data: PretrainingData, parameters: int, machine: str, step: int, source: Path | None
) -> str:
    """Model, data, schedule, machine and cost of a run at `step`, begun with the checkpoint or weights `source`, in words."""
    model, optim, run = config.model, config.optim, config.run
    flops = flops_per_token(model)
    tokens = config.batch_sizes.before(run.train_steps) * model.seq_length
    rows: list[tuple[str, str]] = [
        (
            "model",
            f"{model.num_layers} layers, {_heads(model)}, C {model.d_model}, T {model.seq_length}, {_vocabulary(model)}",
        ),
        ("made of", _parts(model)),
        ("exports to", hf.exports_to(model)),
        ("parameters", f"{parameters:,}"),
        ("machine", f"{machine}, {_precision(config)}"),
        ("data", f"{_tokens(data)}; {data.checked}"),
        ("tokenizer", f"{data.manifest.tokenizer or 'unknown (no manifest)'}"),
    ]
    training = [
        ("batch", _batch(config)),
        (
            "optimizer",
            f"{_optimizer(config)}, lr {optim.learning_rate:g} → {optim.min_lr:g} {optim.decay_method}, {_warmup(config)}",
        ),
        ("cost", f"{flops / 1e6:,.1f} MFLOP a token, {flops * tokens:.3g} FLOP in all"),
        (
            "steps",
            f"{run.train_steps:,}{f', continuing at {step:,}' if step else ''}: {tokens:,} tokens{_epochs(config, data)}",
        ),
        ("run folder", run.checkpoints_dir),
    ]
    if data.train is not None and len(data.train.sources) > 1:
        rows.append(("mixture", _mixture(data.train)))
    rows += [] if run.do_test else training
    if source is not None:
        rows.append(("checkpoint" if has_state(source) else "weights of", str(source)))
    return "\n".join(f"  {name:<11} {text}" for name, text in rows)


def epochs_note(config: PretrainConfig, data: PretrainingData) -> str | None:
    """A word of warning where the whole run reads some of the data more than MANY_EPOCHS times."""
    if data.train is None or config.run.do_test:
        return None
    steps = config.run.train_steps
    epochs = data.train.epochs(config.batch_sizes.before(steps))
    name = max(epochs, key=epochs.__getitem__)
    if epochs[name] <= MANY_EPOCHS:
        return None
    return (
        f"note: {steps:,} steps read {name} {epochs[name]:,.0f} times, and a model learns that by heart; lower --train-steps "
        f"(about {steps * MANY_EPOCHS / epochs[name]:,.0f} read it {MANY_EPOCHS} times) or the batch, or prepare more text"
    )


def _vocabulary(model: ModelConfig) -> str:
    padding = f", {model.vocab_padding:,} of them padding" if model.vocab_padding else ""
    return f"V {model.vocabulary}{padding}"


def _heads(model: ModelConfig) -> str:
    grouped = f" ({model.kv_heads} of keys and values)" if model.kv_heads != model.num_heads else ""
    return f"{model.num_heads} heads{grouped}"


def _parts(model: ModelConfig) -> str:
    parts = [
        f"{model.position} positions" if model.position == "learned" else f"rope of base {model.rope_theta:g}",
        model.norm,
        model.activation,
        *(["qk-norm"] if model.qk_norm else []),
        *([] if model.bias else ["no biases"]),
        "tied output layer" if model.tie_weights else "untied output layer",
    ]
    return ", ".join(parts)


def _optimizer(config: PretrainConfig) -> str:
    name = (
        "muon for the blocks' matrices, adamw for the rest"
        if (optim := config.optim).optim_type == "muon"
        else optim.optim_type
    )
    return f"{name}, {'independent ' if optim.independent_weight_decay else ''}weight decay {optim.weight_decay:g}"


def _warmup(config: PretrainConfig) -> str:
    steps = config.optim.warmup_steps
    return f"{steps} warm-up steps" + (", which is the whole run" if steps >= config.run.train_steps else "")


def _precision(config: PretrainConfig) -> str:
    mixed = config.runtime.mixed_precision
    if mixed == "fp8":
        return "float8 matmuls in the blocks, else bf16 autocast, over float32 weights"
    return "float32" if mixed == "no" else f"{mixed} autocast over float32 weights"


def _batch(config: PretrainConfig) -> str:
    sizes, one = config.batch_sizes, f"{config.data.train_batch_size} × {config.model.seq_length}"
    if len(sizes.stages) > 1:
        stages = ", ".join(f"{config.tokens_at(step):,} from step {step:,} on" for step, _ in sizes.stages)
        return f"tokens a step: {stages}; in micro-steps of {one}, a program each where steps are compiled"
    steps = sizes.micro_steps(0)
    return f"{config.tokens_at(0):,} tokens a step = {f'{steps} micro-steps × ' if steps > 1 else ''}{one}"


def _tokens(data: PretrainingData) -> str:
    parts = [("training", data.train), ("validation", data.valid)]
    return ", ".join(f"{windows.tokens:,} {name} tokens" for name, windows in parts if windows is not None)


def _mixture(train: TrainingSet) -> str:
    pairs = zip(train.sources, train.shares.values(), strict=True)
    return ", ".join(f"{share:.2%} {one.name} ({one.windows.tokens:,} tokens)" for one, share in pairs)


def _epochs(config: PretrainConfig, data: PretrainingData) -> str:
    if data.train is None:
        return ""
    return f", {epochs_text(data.train.epochs(config.batch_sizes.before(config.run.train_steps)))}"


def epochs_text(epochs: dict[str, float]) -> str:
    """Epochs by source, in words."""
    return ", ".join(f"{count:.2f} epochs of {name}" for name, count in epochs.items())
