"""The loop: one for every device. What is special about a device is behind `Runtime`."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2_xla import checkpoint, optim
from gpt2_xla.config import PretrainConfig, to_dict
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import UserError
from gpt2_xla.evaluate import evaluate
from gpt2_xla.metrics import Metrics, open_metrics
from gpt2_xla.model import GPT, build_model, flops_per_token, parameter_count
from gpt2_xla.profiling import StepProfile
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.runtime.compile_watch import CompileWatch
from gpt2_xla.schedule import learning_rate
from gpt2_xla.summary import epochs_text, summary
from gpt2_xla.training_log import TrainingLog

TOKENIZER_FOLDER = "tokenizer"  # in the run folder: files of a Hugging Face tokenizer, copied into each checkpoint


@dataclass
class Run:
    """All that a training run is: fixed parts, and the position that a checkpoint restores."""

    config: PretrainConfig
    runtime: Runtime
    data: PretrainingData
    model: GPT
    forward: nn.Module  # the model as the runtime wants it called
    optimizer: torch.optim.Optimizer
    metrics: Metrics = field(default_factory=lambda: Metrics([]))
    step: int = 0  # optimizer steps done
    samples: int = 0  # sequences consumed
    saved_step: int = 0
    best_valid_loss: float = math.inf


def pretrain(config: PretrainConfig, runtime: Runtime) -> None:
    """Train as configured, from the start or from `config.run.from_checkpoint`; or evaluate only (--do-test).

    Raises `UserError` for data that does not fit the configuration.
    """
    data = PretrainingData.open(config, runtime.rank, runtime.world_size)
    if runtime.rank == 0 and not config.run.do_test:
        _prepare_run_folder(config, data)  # early: a folder that cannot be written shall not cost a compilation
    run, wandb_id = start_run(config, runtime, data)
    if config.run.do_test:
        loss = validate(run)
        if runtime.rank == 0:
            print(f"{run.step} steps trained: validation loss {loss:.4f}, perplexity {perplexity(loss):.2f}")
        return
    run.metrics = open_metrics(config, run.step, runtime.rank, wandb_id)
    try:
        train(run)
    finally:
        run.metrics.close()


def start_run(config: PretrainConfig, runtime: Runtime, data: PretrainingData) -> tuple[Run, str | None]:
    """Build model and optimizer, restore the checkpoint if there is one, print the summary; the run and its W&B id."""
    model = build_model(config.model, config.runtime.loss_chunk, config.run.seed, config.runtime.vocab_multiple)
    source = Path(config.run.from_checkpoint) if config.run.from_checkpoint else None
    if source:
        checkpoint.load_weights(model, checkpoint.read_weights(source))
    forward = runtime.place(model)
    run = Run(config, runtime, data, model, forward, runtime.build_optimizer(model, config.optim))
    wandb_id = restore(run, source) if source else None
    if runtime.rank == 0:
        print(summary(config, data, parameter_count(model), runtime.describe(), run.step), flush=True)
    return run, wandb_id


def restore(run: Run, source: Path) -> str | None:
    """Take optimizer, scaler and position from a checkpoint; return its W&B run."""
    state = checkpoint.read_state(source)
    run.data.check_tokenizer(state.tokenizer, state.tokenizer_hash)
    optim.load_named_state(run.model, run.optimizer, checkpoint.read_optimizer(source))
    run.runtime.load_scaler_state(state.scaler)
    run.step, run.samples, run.saved_step = state.step, state.samples, state.step
    run.best_valid_loss = state.best_valid_loss if state.best_valid_loss is not None else math.inf
    if run.runtime.rank == 0 and not run.config.run.do_test:
        for difference in _changed_order(run, state):
            print(
                f"note: {difference}; from step {run.step} on the run sees other batches than it would have", flush=True
            )
    same_folder = source.parent.resolve() == Path(run.config.run.checkpoints_dir).resolve()
    return state.wandb_id if same_folder else None  # a branch is a run of its own


def train(run: Run) -> None:
    """Train until --train-steps, or until the runtime says to stop; save where due, at the end and on a stop.

    A new run validates once before its first step: a loss far from ln V, or too large an evaluation batch, shows then.
    """
    config, runtime, total_steps = run.config, run.runtime, run.config.run.train_steps
    # Rank 0's counters stand for all: replicas run one and the same program.
    watch = CompileWatch(runtime, run.metrics.say, config.runtime.max_recompiles if runtime.rank == 0 else None)
    if run.step == 0 and run.data.valid is not None and config.run.valid_interval:
        validate(run)
        watch.worked("validation", run.step)
    if run.step >= total_steps:
        run.metrics.say(f"all {total_steps} steps are done; a larger --train-steps goes on")
        return
    assert run.data.train is not None
    runtime.watch_signals()
    flops = flops_per_token(config.model, parameter_count(run.model))
    log = TrainingLog(config, runtime, run.metrics, flops, run.data.train.epochs)
    profile = StepProfile(config, runtime, log, run.metrics)
    batches = runtime.batches(run.data.training(run.samples, total_steps - run.step), rows_dim=1)
    run.forward.train()
    stopped = False
    try:
        while run.step < total_steps and not (stopped := runtime.should_stop(run.step)):
            profile.before_step(run.step + 1)
            batch = log.next_batch(batches)
            values = train_step(run, batch)
            graph = runtime.graph_hash(values)
            log.add(values)
            runtime.end_step()
            run.step += 1
            run.samples += config.sequences_per_step
            watch.worked("training", run.step, batch, graph)
            log.step_done(run.step, run.samples)
            profile.after_step(run.step)
            validate_now = run.data.valid is not None and _due(config.run.valid_interval, run.step, total_steps)
            if validate_now or _due(config.run.save_interval, run.step, total_steps):
                log.pause()
                loss = validate(run) if validate_now else None
                if validate_now:
                    watch.worked("validation", run.step)
                if _due(config.run.save_interval, run.step, total_steps) or loss == run.best_valid_loss:
                    save(run, loss)
                    watch.worked("saving", run.step)
                log.resume()
    finally:
        batches.close()
        profile.close()
    log.pause()
    run.metrics.say(f"trained on {epochs_text(run.data.train.epochs(run.samples))}")
    if stopped and run.step == 0:
        run.metrics.say("stopped before the first step: there is nothing to save or to resume")
    elif stopped:
        if run.step > run.saved_step:
            save(run, None)
        run.metrics.say(f"stopped at step {run.step} of {total_steps}; the same command with --resume continues")
    if compiled := watch.summary():
        run.metrics.say(compiled)
    if stopped and watch.verdict:
        raise UserError(f"{watch.verdict}; step {run.step} is saved, and --resume with a higher limit goes on from it")


def train_step(run: Run, batch: Tensor) -> Tensor:
    """One optimizer step on a batch (A, B, T+1) of A micro-steps: queues the work, returns float32 [loss, gradient norm].

    Nothing here depends on the step but the values of the batch, the learning rate and the dropout seed.
    """
    config, runtime = run.config, run.runtime
    optim.set_learning_rate(run.optimizer, learning_rate(run.step, config.optim, config.run.train_steps))
    runtime.seed_dropout(dropout_seed(config.run.seed, run.step))
    loss = runtime.compute_gradients(run.forward, batch)
    return runtime.update(run.model, run.optimizer, config.optim.max_grad_norm, loss)


def dropout_seed(seed: int, step: int) -> int:
    """The seed of a step's dropout masks: distinct per step; a replica adds its rank, hence the stride."""
    return (seed * 1_000_003 + step) * 4096 % 2**62


def validate(run: Run) -> float:
    """Validation loss now; recorded, and remembered if it is the best."""
    loss = evaluate(run.forward, run.data.evaluation(), run.runtime)
    best = loss < run.best_valid_loss
    if best:
        run.best_valid_loss = loss
    run.metrics.write({"kind": "valid", "step": run.step, "loss": loss, "perplexity": perplexity(loss), "best": best})
    return loss


def perplexity(loss: float) -> float:
    """e to the loss in nats; no more than a float can hold."""
    return math.exp(min(loss, 700.0))


def save(run: Run, valid_loss: float | None) -> None:
    """Write a checkpoint of the current step on rank 0, then prune old ones."""
    weights = run.runtime.to_host(dict(run.model.named_parameters()))
    optimizer = run.runtime.to_host(optim.named_state(run.model, run.optimizer))
    run.saved_step = run.step
    if run.runtime.rank != 0:
        return
    manifest = run.data.manifest
    state = checkpoint.TrainerState(
        step=run.step,
        samples=run.samples,
        config=to_dict(run.config),
        valid_loss=valid_loss if valid_loss is not None and math.isfinite(valid_loss) else None,
        best_valid_loss=run.best_valid_loss if math.isfinite(run.best_valid_loss) else None,
        data_fingerprint=run.data.fingerprint,
        tokenizer=manifest.tokenizer,
        tokenizer_hash=manifest.tokenizer_hash,
        scaler=run.runtime.scaler_state(),
        wandb_id=run.metrics.wandb_id,
    )
    folder = Path(run.config.run.checkpoints_dir)
    tokenizer_files = folder / TOKENIZER_FOLDER
    checkpoint.save(
        folder,
        state,
        weights,
        optimizer,
        end_of_text=manifest.end_of_text,
        tokenizer_files=tokenizer_files if tokenizer_files.is_dir() else None,
    )
    checkpoint.prune(folder, run.config.run.saved_checkpoint_limit)


def _due(interval: int, step: int, total_steps: int) -> bool:
    """Whether something that happens every `interval` steps (0: only at the end) happens after this one."""
    return step == total_steps or (interval > 0 and step % interval == 0)


def _changed_order(run: Run, state: checkpoint.TrainerState) -> list[str]:
    """What differs from the checkpoint's run in the things that decide the batches to come."""
    saved, config = state.config, run.config
    pairs = [
        ("the training data", state.data_fingerprint, run.data.fingerprint),
        ("--seed", saved.get("run", {}).get("seed"), config.run.seed),
        ("--shuffle", saved.get("data", {}).get("shuffle"), config.data.shuffle),
    ]
    return [f"{name} is not the checkpoint's" for name, before, now in pairs if before is not None and before != now]


def _prepare_run_folder(config: PretrainConfig, data: PretrainingData) -> None:
    """Create the run folder with its config.json; raises `UserError` if it cannot be written."""
    folder = Path(config.run.checkpoints_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
        data.save_tokenizer(folder / TOKENIZER_FOLDER)
    except OSError as error:
        raise UserError(f"--checkpoints-dir {folder} cannot be written: {error.strerror or error}") from error
