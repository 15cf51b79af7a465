"""Everything that can be wrong with a configuration before anything slow starts, each as one sentence."""

import math
from collections.abc import Set

from gpt2_xla.config import ModelConfig, PretrainConfig, TorchConfig, XlaConfig
from gpt2_xla.errors import UserError
from gpt2_xla.model_validation import model_mistakes
from gpt2_xla.profiling import profile_mistakes
from gpt2_xla.runtime.mesh import parse_mesh

LARGEST_INDEPENDENT_DECAY = 0.01  # a step; no larger one trains
FLOAT8_SIDE = 16  # torch._scaled_mm takes multiples of it


def config_mistakes(config: PretrainConfig, explicit: Set[str] = frozenset()) -> list[str]:
    """All mistakes that the options alone show; `explicit` names those that the command itself gave."""
    return [
        *_range_mistakes(config),
        *model_mistakes(config.model),
        *_batch_mistakes(config),
        *_memory_mistakes(config, explicit),
        *_schedule_mistakes(config),
        *_weight_decay_mistakes(config),
        *_idle_mistakes(config, explicit),
        *_logging_mistakes(config),
        *_precision_mistakes(config),
        *profile_mistakes(config),
        *_sharding_mistakes(config, explicit),
        *_lever_mistakes(config),
    ]


def replica_mistakes(config: PretrainConfig, world_size: int) -> list[str]:
    """Batches that do not divide into the replicas, with the nearest that do."""
    mistakes = []
    for flag, size in (_shared_out(config), ("--eval-batch-size", config.data.eval_batch_size)):
        if size % world_size:
            below, above = size - size % world_size, size - size % world_size + world_size
            use = f"{below} or {above}" if below else f"{above}"
            mistakes.append(f"{flag} {size} is not divisible by the {world_size} replicas; use {use}")
    return mistakes


def _shared_out(config: PretrainConfig) -> tuple[str, int]:
    """What the replicas must divide of each training batch; with --find-batch all of a step, for any accumulation will do."""
    data = config.data
    if not (isinstance(config.runtime, TorchConfig) and config.runtime.find_batch):
        return "--train-batch-size", data.train_batch_size
    if data.batch_size_schedule is not None and not _batch_mistakes(config):
        flag = f"--find-batch: the greatest common divisor of --batch-size-schedule {data.batch_size_schedule},"
        return flag, config.batch_sizes.common
    flag = (
        f"--find-batch: --train-batch-size {data.train_batch_size} × --gradient-accum-step {data.gradient_accum_step} ="
    )
    return flag, data.train_batch_size * data.gradient_accum_step


def _memory_mistakes(config: PretrainConfig, explicit: Set[str]) -> list[str]:
    runtime = config.runtime
    if not isinstance(runtime, TorchConfig) or runtime.memory_limit is None:
        return []
    if not 0 < runtime.memory_limit < math.inf:
        return [f"--memory-limit {runtime.memory_limit:g} must be a number of GiB above 0"]
    if "memory_limit" in explicit and "find_batch" not in explicit:
        return [
            f"--memory-limit {runtime.memory_limit:g} has no meaning without --find-batch; add it, or leave --memory-limit out"
        ]
    return []


def _range_mistakes(config: PretrainConfig) -> list[str]:
    data, optim, run, log = config.data, config.optim, config.run, config.logging
    at_least_one = {
        "--train-batch-size": data.train_batch_size,
        "--eval-batch-size": data.eval_batch_size,
        "--gradient-accum-step": data.gradient_accum_step,
        "--train-steps": run.train_steps,
        "--valid-steps": run.valid_steps if run.valid_steps is not None else 1,
        "--saved-checkpoint-limit": run.saved_checkpoint_limit,
        "--log-interval": log.log_interval,
        "--sample-tokens": config.sample_tokens,
        "--vocab-multiple": config.runtime.vocab_multiple,
    }
    if isinstance(config.runtime, XlaConfig):
        at_least_one |= {  # MpDeviceLoader waits for ever, or ends the data at once, with a queue of none
            "--loader-prefetch-size": config.runtime.loader_prefetch_size,
            "--device-prefetch-size": config.runtime.device_prefetch_size,
        }
    not_negative = {
        "--valid-interval": run.valid_interval,
        "--save-interval": run.save_interval,
        "--warmup-steps": optim.warmup_steps,
        "--weight-decay": optim.weight_decay,
        "--max-grad-norm": optim.max_grad_norm,
        "--min-lr": optim.min_lr,
        "--loss-chunk": config.runtime.loss_chunk,
        "--seed": run.seed,
        "--hang-timeout": run.hang_timeout,
        "--max-recompiles": config.runtime.max_recompiles or 0,
        "--max-skipped-steps": run.max_skipped_steps,
        "--sample-interval": log.sample_interval,
    }
    mistakes = [f"{flag} {value} must be at least 1" for flag, value in at_least_one.items() if value < 1]
    mistakes += [
        f"{flag} {value} must be a finite number, 0 or more"
        for flag, value in not_negative.items()
        if not 0 <= value < math.inf
    ]
    if not all(0 <= beta < 1 for beta in optim.betas):
        mistakes.append(f"--betas {optim.betas[0]} {optim.betas[1]}: each must be at least 0 and below 1")
    if not 0 <= optim.muon_momentum < 1:
        mistakes.append(f"--muon-momentum {optim.muon_momentum} must be at least 0 and below 1")
    if run.spike_factor is not None and not 1 < run.spike_factor < math.inf:
        mistakes.append(f"--spike-factor {run.spike_factor} must be a number above 1, such as 1.5")
    if not 0 < optim.learning_rate < math.inf:
        mistakes.append(f"--learning-rate {optim.learning_rate} must be a number above 0")
    return mistakes


def _batch_mistakes(config: PretrainConfig) -> list[str]:
    try:
        config.batch_sizes  # noqa: B018 - parsed there
    except UserError as error:
        return list(error.mistakes)
    return []


def _schedule_mistakes(config: PretrainConfig) -> list[str]:
    optim = config.optim
    after_warmup = max(config.run.train_steps - optim.warmup_steps, 0)
    mistakes = []
    if optim.min_lr > optim.learning_rate:
        mistakes.append(f"--min-lr {optim.min_lr} is above --learning-rate {optim.learning_rate}")
    if optim.decay_method == "noam" and optim.decay_steps is not None:
        mistakes.append("--decay-steps has no meaning for --decay-method noam, which never ends; leave it out")
    elif optim.decay_steps is not None and optim.decay_steps < 1:
        mistakes.append(f"--decay-steps {optim.decay_steps} must be at least 1")
    elif (
        optim.decay_steps is not None
        and optim.decay_method in ("cosine", "linear")
        and optim.decay_steps <= optim.warmup_steps
    ):
        mistakes.append(
            f"--decay-steps {optim.decay_steps} is the step at which --decay-method {optim.decay_method} ends, but "
            f"--warmup-steps {optim.warmup_steps} ends no earlier; raise --decay-steps or lower --warmup-steps"
        )
    elif (
        optim.decay_steps is not None and optim.decay_method in ("wsd", "wsd-sqrt") and optim.decay_steps > after_warmup
    ):
        mistakes.append(
            f"--decay-steps {optim.decay_steps} is the length of the fall of --decay-method {optim.decay_method}, but "
            f"--warmup-steps {optim.warmup_steps} leaves {after_warmup} of --train-steps {config.run.train_steps}; use no more"
        )
    return mistakes


def _weight_decay_mistakes(config: PretrainConfig) -> list[str]:
    optim = config.optim
    if not optim.independent_weight_decay:
        return []
    if optim.optim_type == "adam":
        return [
            "--independent-weight-decay is not for --optim-type adam, which adds the decay to the gradient; use adamw or muon"
        ]
    if optim.weight_decay > LARGEST_INDEPENDENT_DECAY:
        return [
            f"--weight-decay {optim.weight_decay:g} with --independent-weight-decay takes {optim.weight_decay:.0%} of every "
            f"weight away in each step; use {LARGEST_INDEPENDENT_DECAY:g} or less, such as 1e-4"
        ]
    return []


def _idle_mistakes(config: PretrainConfig, explicit: Set[str]) -> list[str]:
    """Options of the command that would do nothing, for want of another one."""
    mistakes = []
    if "muon_momentum" in explicit and config.optim.optim_type != "muon":
        mistakes.append(
            f"--muon-momentum {config.optim.muon_momentum:g} has no meaning with --optim-type {config.optim.optim_type}; "
            "add --optim-type muon, or leave it out"
        )
    given = [name for name in ("sample_prompt", "sample_tokens") if name in explicit]
    if given and config.logging.sample_interval == 0:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
        mistakes.append(
            f"{flags} {'has' if len(given) == 1 else 'have'} no meaning without --sample-interval; add it, such as 500"
        )
    return mistakes


def _logging_mistakes(config: PretrainConfig) -> list[str]:
    log = config.logging
    interval = log.wandb_logging_interval
    if interval is not None and log.log_interval > 0 and (interval < 1 or interval % log.log_interval):
        return [f"--wandb-logging-interval {interval} is not a multiple of --log-interval {log.log_interval}"]
    return []


def _precision_mistakes(config: PretrainConfig) -> list[str]:
    runtime = config.runtime
    if isinstance(runtime, XlaConfig) and runtime.mixed_precision in ("fp16", "fp8"):
        return [
            f"--mixed-precision {runtime.mixed_precision} is not supported on XLA devices; use --mixed-precision bf16 or no"
        ]
    mistakes = []
    if runtime.residual_precision == "bf16" and runtime.mixed_precision not in ("bf16", "fp8"):
        mistakes.append(
            f"--residual-precision bf16 needs --mixed-precision bf16 or fp8, but that is {runtime.mixed_precision}; "
            "leave --residual-precision out"
        )
    if runtime.mixed_precision == "fp8":
        mistakes += _float8_mistakes(config.model)
    return mistakes


def _float8_mistakes(model: ModelConfig) -> list[str]:
    """Sides of the blocks' matrices that float8 products can't have."""
    if model_mistakes(model):
        return []
    # B · T is a side too, in the product that is a weight's gradient.
    sides = {"--d-model": model.d_model, "--d-ff": model.hidden_dim, "--seq-length": model.seq_length}
    needs = f"--mixed-precision fp8 multiplies matrices whose sides are multiples of {FLOAT8_SIDE}, but"
    mistakes = []
    for flag, size in sides.items():
        if size % FLOAT8_SIDE:
            below = size // FLOAT8_SIDE * FLOAT8_SIDE
            use = f"{below} or {below + FLOAT8_SIDE}" if below else f"{FLOAT8_SIDE}"
            mistakes.append(f"{needs} {flag} is {size}; use {use}")
    width = model.d_model + 2 * model.kv_heads * model.head_dim
    if model.d_model % FLOAT8_SIDE == 0 and width % FLOAT8_SIDE:
        mistakes.append(
            f"{needs} queries, keys and values together are {width} wide; use another --num-kv-heads or --num-heads"
        )
    return mistakes


def _sharding_mistakes(config: PretrainConfig, explicit: Set[str]) -> list[str]:
    runtime = config.runtime
    if isinstance(runtime, TorchConfig):
        return _process_sharding_mistakes(runtime, explicit)
    if not isinstance(runtime, XlaConfig):
        return []
    if runtime.sharding == "none":
        if "mesh" in explicit:  # a checkpoint's may stay: without sharding it says nothing
            return [f"--mesh {runtime.mesh} says how --sharding fsdp cuts; add --sharding fsdp, or leave --mesh out"]
        return []
    mistakes = []
    if config.logging.sample_interval > 0:
        mistakes.append(
            "--sample-interval is not supported with --sharding fsdp, which has no way to decode one text on all devices; "
            "leave it out, and use generate.py on the checkpoints"
        )
    if "mp_start_method" in explicit:
        mistakes.append(
            f"--mp-start-method {runtime.mp_start_method} has no meaning with --sharding fsdp, which starts no processes: "
            "one drives all devices of its host; leave it out"
        )
    if runtime.mesh is not None:
        try:
            parse_mesh(runtime.mesh)
        except UserError as error:
            mistakes += error.mistakes
    return mistakes


def _process_sharding_mistakes(runtime: TorchConfig, explicit: Set[str]) -> list[str]:
    """Those of torchrun's processes."""
    mistakes = []
    if runtime.sharding != "hsdp":
        if "mesh" in explicit:  # a checkpoint's may stay
            mistakes.append(
                f"--mesh {runtime.mesh} says how --sharding hsdp copies and cuts; add --sharding hsdp, or leave --mesh out"
            )
        return mistakes
    if runtime.mesh is not None:
        try:
            tensor = parse_mesh(runtime.mesh).tensor
        except UserError as error:
            return [*mistakes, *error.mistakes]
        if tensor > 1:
            mistakes.append(
                f"--mesh {runtime.mesh}: only run_pretrain_xla.py cuts along tensor; give those processes to fsdp"
            )
    return mistakes


def _lever_mistakes(config: PretrainConfig) -> list[str]:
    runtime = config.runtime
    if not isinstance(runtime, XlaConfig) or not runtime.scan_layers:
        return []
    mistakes = []
    if runtime.activation_checkpointing == "selective":
        mistakes.append("--activation-checkpointing selective is not supported with --scan-layers; use block or none")
    if runtime.sharding == "fsdp":
        mistakes.append("--scan-layers is not supported with --sharding fsdp; leave one of them out")
    if config.model.dropout:
        mistakes.append(
            f"--scan-layers has no dropout, but --dropout is {config.model.dropout:g}; use --dropout 0, or leave it out"
        )
    return mistakes
