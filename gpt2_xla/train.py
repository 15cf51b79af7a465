"""The loop: one for every device. What is special about a device is behind `Runtime`."""

import math
from collections.abc import Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from gpt2_xla import optim
from gpt2_xla.checkpoint import has_state
from gpt2_xla.config import PretrainConfig
from gpt2_xla.data.pretraining import PretrainingData
from gpt2_xla.errors import UserError
from gpt2_xla.evaluate import Evaluation, bits_per_byte, evaluate, perplexity
from gpt2_xla.ledger import Ledger, open_ledger
from gpt2_xla.loading import load
from gpt2_xla.metrics import Metrics, open_metrics
from gpt2_xla.model import GPT, build_model, flops_per_token, parameter_count
from gpt2_xla.open_window import OpenWindow
from gpt2_xla.profiling import StepProfile
from gpt2_xla.run_folder import own_run_folder
from gpt2_xla.runtime.base import Runtime
from gpt2_xla.runtime.compile_watch import CompileWatch
from gpt2_xla.saving import Saver, changed_order, restore
from gpt2_xla.schedule import learning_rate
from gpt2_xla.step_guard import StepGuard
from gpt2_xla.summary import epochs_note, epochs_text, summary
from gpt2_xla.training_log import TrainingLog
from gpt2_xla.training_samples import SamplePrompt, open_samples, sample_prompt
from gpt2_xla.watchdog import Phases, Unwatched, open_watchdog


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
    ledger: Ledger = field(default_factory=Ledger)
    source: Path | None = None  # the checkpoint that it began with
    step: int = 0  # optimizer steps done
    samples: int = 0  # sequences consumed
    saved_step: int = 0
    validated: bool = False  # at this step
    best_valid_loss: float = math.inf
    recent_losses: list[float] = field(default_factory=list)  # mean losses of the last log windows, for --spike-factor
    open_window: OpenWindow = OpenWindow()  # the steps since the last log step, at the last pause of training
    phases: Phases = field(default_factory=Unwatched)
    sample_prompt: SamplePrompt | None = None  # what samples continue, if there are any
    saver: Saver = field(init=False)

    def __post_init__(self) -> None:
        self.saver = Saver(self.config, self.runtime.rank, self.runtime.writers)


def pretrain(
    config: PretrainConfig, runtime: Runtime, source: Path | None = None, seen: Mapping[str, int] | None = None
) -> None:
    """Train as configured, from the start or from the checkpoint or weights `source`; or evaluate only (--do-test).

    `seen`: the checkpoints that the run folder held when `source` was chosen. Raises `UserError` for data that does not fit
    the configuration, and for a folder that another run has written to since.
    """
    data = PretrainingData.open(config, runtime.rank, runtime.world_size)
    writes = runtime.rank == 0 and not config.run.do_test
    # Early: a folder that cannot be written shall not cost a compilation.
    with own_run_folder(config, data, seen) if writes else nullcontext():
        _run(config, runtime, data, source)


def _run(config: PretrainConfig, runtime: Runtime, data: PretrainingData, source: Path | None) -> None:
    phases = open_watchdog(config, runtime)
    try:
        run, wandb_id = start_run(config, runtime, data, source, phases)
        if config.run.do_test:
            test(run)
            return
        run.metrics = open_metrics(config, run.step, runtime.rank, wandb_id)
        try:
            train(run)
        finally:
            run.saver.close()
            run.ledger.close()
            run.metrics.close()
    finally:
        phases.close()


def start_run(
    config: PretrainConfig,
    runtime: Runtime,
    data: PretrainingData,
    source: Path | None = None,
    phases: Phases | None = None,
) -> tuple[Run, str | None]:
    """Build model and optimizer, restore what there is to restore, print the summary; the run and its W&B id.

    A `source` with a trainer's state is a checkpoint that the run continues, one without only its first weights.
    """
    prompt = sample_prompt(config, data)
    model = build_model(config.model, config.runtime.loss_chunk, config.run.seed, config.runtime.vocab_multiple)
    forward = runtime.place(model)
    run = Run(config, runtime, data, model, forward, runtime.build_optimizer(model, config.optim))
    resumed = source if source is not None and has_state(source) else None
    run.phases, run.source, run.sample_prompt = phases or run.phases, resumed, prompt
    wandb_id = restore(run, resumed) if resumed else None
    if source is not None and resumed is None:
        load(model, source)
        runtime.end_step()
    if not runtime.agree_on(run.step):
        raise UserError(
            f"rank {runtime.rank} begins after step {run.step}, others after another one: all hosts must see the same "
            f"--checkpoints-dir {config.run.checkpoints_dir}"
        )
    if runtime.rank == 0:
        for difference in changed_order(run, resumed) if resumed and not config.run.do_test else ():
            print(
                f"note: {difference}; from step {run.step} on the run sees other batches than it would have", flush=True
            )
        print(summary(config, data, parameter_count(model), runtime.describe(), run.step, source), flush=True)
        if note := epochs_note(config, data):
            print(note, flush=True)
    return run, wandb_id


def train(run: Run) -> None:
    """Train until --train-steps, or until the runtime says to stop; save where due, at the end and on a stop.

    A stop is heard before each step and each batch of a validation, which is then made up for after the resume.
    """
    config, runtime, total_steps = run.config, run.runtime, run.config.run.train_steps
    sizes = config.batch_sizes
    # Rank 0's counters stand for all: replicas run one and the same program.
    watch = CompileWatch(runtime, run.metrics.say, config.runtime.max_recompiles if runtime.rank == 0 else None)
    if first_validation(run):
        watch.worked("validation", run.step)
    if run.step >= total_steps and _validation_due(run) and not run.validated:
        stop(run)
        return
    if run.step >= total_steps:
        run.metrics.say(f"all {total_steps} steps are done; a larger --train-steps goes on")
        run.saver.finish(run)
        return
    assert run.data.train is not None
    flops = flops_per_token(config.model)
    log = TrainingLog(config, runtime, run.metrics, flops, run.data.train.epochs, run.open_window)
    profile = StepProfile(config, runtime, log, run.metrics)
    guard = StepGuard(run, log, watch)
    samples = open_samples(run, log, watch)
    run.ledger = open_ledger(config, run.data, run.step, run.samples, run.source, run.metrics.say)
    batches = _batches(run)
    run.forward.train()
    stopped = False
    try:
        while run.step < total_steps and not (stopped := guard.verdict is not None or runtime.should_stop()):
            run.saver.check()
            profile.before_step(run.step + 1)
            if sizes.begins(run.step):
                run.metrics.say(f"from step {run.step + 1} on a step takes {sizes.sequences(run.step):,} sequences")
                run.phases.expect_compilation("step")
                watch.expect("training")
            run.phases.mark("data", run.step)
            batch = log.next_batch(batches)
            run.phases.mark("step", run.step)
            values = train_step(run, batch)
            graph = runtime.graph_hash(values)
            log.add(values)
            runtime.end_step()
            run.step += 1
            run.ledger.batch(run.step, run.samples)
            run.samples += sizes.sequences(run.step - 1)
            run.validated = False
            watch.worked("training", run.step, batch, graph)
            log.step_done(run.step, run.samples)
            profile.after_step(run.step)
            samples.after_step(run.step)
            validate_now, save_now = _validation_due(run), _due(config.run.save_interval, run.step, total_steps)
            if validate_now or save_now:
                run.open_window = log.pause()
            if guard.rolled_back(run.step if validate_now or save_now else run.step - 1):
                batches.close()
                batches = _batches(run)
            elif validate_now or save_now:
                loss = validate(run) if validate_now else None
                if validate_now:
                    watch.worked("validation", run.step)
                if save_now or loss == run.best_valid_loss:
                    run.saver.save(run, loss)
                    watch.worked("saving", run.step)
                log.resume()
    finally:
        batches.close()
        profile.close()
    run.open_window = log.pause() if guard.verdict is None else log.pause().forgiven()
    if stopped and guard.verdict is None:
        guard.rolled_back(run.step)  # the last window too: what spiked shall not be saved as good
    run.metrics.say(f"trained on {epochs_text(run.data.train.epochs(run.samples))}")
    if stopped or (_validation_due(run) and not run.validated):
        stop(run)
    else:
        run.saver.finish(run)
    if compiled := watch.summary():
        run.metrics.say(compiled)
    if stopped and watch.verdict:
        raise UserError(
            f"{watch.verdict}; step {run.step} is saved, and the same command with a higher limit goes on from it"
        )
    run.phases.mark("end", run.step)
    guard.finish()


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


def first_validation(run: Run) -> bool:
    """Whether a validation was made before this process's first step.

    A new run validates at once: a loss far from ln V, or too large an evaluation batch, shows then. A resumed one makes
    up for a validation that was due at its step, but stopped.
    """
    if run.step == 0:
        return run.data.valid is not None and run.config.run.valid_interval > 0 and validate(run) is not None
    if run.validated or not _validation_due(run):
        return False
    loss = validate(run)
    if loss is not None:
        run.saver.save(run, loss)
    return loss is not None


def validate(run: Run) -> float | None:
    """Validation loss now; recorded, and remembered if it is the best. None, and no record, if a stop came before the end."""
    found = evaluate_now(run)
    if found is None:
        return None
    loss = found.loss
    best = loss < run.best_valid_loss
    if best:
        run.best_valid_loss = loss
    run.validated = True
    run.metrics.write({"kind": "valid", "step": run.step, "loss": loss, "perplexity": perplexity(loss), "best": best})
    return loss


def evaluate_now(run: Run) -> Evaluation | None:
    """What the model makes of the validation data; None if a stop came before the end."""

    def go_on() -> bool:
        run.phases.mark("eval", run.step)
        return not run.runtime.should_stop()

    return evaluate(run.forward, run.data.evaluation(), run.runtime, run.data.evaluated_tokens(), go_on)


def test(run: Run) -> None:
    """Print what the model makes of the validation data (--do-test)."""
    found = evaluate_now(run)
    if found is None:
        raise UserError("stopped before all of --valid-dir was evaluated")
    if run.runtime.rank == 0:
        text = f"validation loss {found.loss:.4f}, perplexity {found.perplexity:.2f}"
        if found.standard_error is not None:
            text += f", standard error of the loss {found.standard_error:.4f}"
        if run.data.valid_manifest is not None and (bits := bits_per_byte(found.loss, run.data.valid_manifest)):
            text += f", {bits:.4f} bits per byte"
        print(f"{run.step} steps trained: {text}, {found.tokens:,} tokens")


def stop(run: Run) -> None:
    """Save what is not saved yet, and say how to continue."""
    if run.step == 0:
        run.metrics.say("stopped before the first step: there is nothing to save; the same command begins anew")
        return
    if run.step > run.saved_step:
        run.saver.save(run, None)
    run.saver.finish(run)
    run.metrics.say(f"stopped at step {run.step} of {run.config.run.train_steps}; the same command continues")


def _batches(run: Run) -> Generator[Tensor, None, None]:
    """The batches of all steps to come, from the run's position in the data on."""
    first, steps = run.samples, run.config.run.train_steps - run.step
    batches = run.data.training(first, steps, run.step)
    return run.runtime.batches(run.ledger.follow(batches, first, run.step), rows_dim=1)


def _due(interval: int, step: int, total_steps: int) -> bool:
    """Whether something that happens every `interval` steps (0: only at the end) happens after this one."""
    return step == total_steps or (interval > 0 and step % interval == 0)


def _validation_due(run: Run) -> bool:
    """Whether the validation loss after the current step is wanted."""
    return run.data.valid is not None and _due(run.config.run.valid_interval, run.step, run.config.run.train_steps)
