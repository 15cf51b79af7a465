"""From options to the loops that take turns, each with its training configuration."""

import dataclasses
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gpt2_xla.bench_config import BenchConfig, BenchOptions
from gpt2_xla.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    PretrainConfig,
    RunConfig,
    RuntimeConfig,
    TorchConfig,
    TorchDeviceConfig,
    TorchPretrainConfig,
    XlaConfig,
    XlaPretrainConfig,
)
from gpt2_xla.runtime.process_mesh import sharding_mistakes
from gpt2_xla.validation import config_mistakes

Precision = Literal["no", "bf16", "fp16", "fp8"]
WARMUP_STEPS = 3
OURS = "ours"
COMMON = frozenset(field.name for field in dataclasses.fields(RuntimeConfig))
OF_TORCH = frozenset(field.name for field in dataclasses.fields(TorchDeviceConfig)) - COMMON
TOKENS = 2**20  # random ones, at least; a few seconds of reading for a fast GPU


@dataclass(frozen=True)
class Contender:
    """A loop that takes turns with others."""

    name: str  # the only one of its name
    config: PretrainConfig
    processes: int = 1
    compiled: bool = False  # of a bare loop: whether its model is

    @property
    def is_ours(self) -> bool:
        """Whether it is the program's own loop."""
        return self.name.startswith(OURS)


@dataclass(frozen=True)
class Seat:
    """Contenders that share a process, because there can be only one on their device."""

    contenders: tuple[Contender, ...]

    @property
    def processes(self) -> int:
        """Processes that torchrun starts for it; 1 without torchrun."""
        return self.contenders[0].processes

    def profiled_turns(self, options: BenchOptions) -> int:
        """Turns that ours takes under the profiler, after the others."""
        ours = self.contenders[0]
        return int(options.breakdown and ours.is_ours and isinstance(ours.config, TorchPretrainConfig))


def seats(bench: BenchConfig, folder: Path) -> dict[str, list[Seat]]:
    """The processes to start, ours first, of each runtime to measure, over the tokens in `folder`."""
    of_runtime = {"torch": _torch_seats, "xla": _xla_seats}
    return {runtime: of_runtime[runtime](bench, folder) for runtime in bench.bench.runtimes}


def _torch_seats(bench: BenchConfig, folder: Path) -> list[Seat]:
    options, own = bench.bench, bench.runtime.mixed_precision
    found: list[Contender] = []
    for number in dict.fromkeys(options.processes):
        name = OURS if len(options.processes) == 1 else f"{OURS} × {number}"
        found.append(Contender(name, _torch_config(bench, folder, own, number), number))
    if options.against == "bare":
        for precision in dict.fromkeys(own if name == "same" else name for name in options.bare_precisions):
            for model in dict.fromkeys(options.bare_models):
                config = _torch_config(bench, folder, precision)
                name = f"bare, {model}, {precision_name(precision)}"
                found.append(Contender(name, config, compiled=model == "compiled"))
    return [Seat((contender,)) for contender in found]


def precision_name(precision: Precision) -> str:
    """A --mixed-precision in words."""
    return "float32" if precision == "no" else precision


def _xla_seats(bench: BenchConfig, folder: Path) -> list[Seat]:
    common = {name: getattr(bench.runtime, name) for name in COMMON}
    config = XlaPretrainConfig(runtime=XlaConfig(**common), **_common(bench, folder))
    bare = [Contender("bare torch_xla", config)] if bench.bench.against == "bare" else []
    return [Seat((Contender(OURS, config), *bare))]  # a TPU has room for one process


def _torch_config(bench: BenchConfig, folder: Path, precision: Precision, processes: int = 1) -> TorchPretrainConfig:
    runtime = dataclasses.replace(bench.runtime, mixed_precision=precision)
    return TorchPretrainConfig(runtime=TorchConfig(**vars(runtime)), **_common(bench, folder, processes))


def _common(bench: BenchConfig, folder: Path, processes: int = 1) -> dict[str, Any]:
    options = bench.bench
    return {
        "model": bench.model,
        "data": DataConfig(
            train_dir=(str(folder / "data"),),
            train_batch_size=options.train_batch_size * processes,
            gradient_accum_step=options.gradient_accum_step,
        ),
        "optim": bench.optim,
        "run": RunConfig(
            # One more than are run: nothing is saved, as in the middle of a run.
            train_steps=WARMUP_STEPS + (options.turns + 1) * options.steps + 1,
            checkpoints_dir=str(folder / f"run-{processes}"),
            hang_timeout=0.0,
        ),
        "logging": LoggingConfig(),
    }


def write_random_tokens(folder: Path, model: ModelConfig, tokens: int) -> None:
    """A shard of that many random tokens."""
    ids = np.random.default_rng(0).integers(0, model.vocabulary, tokens)
    np.save(folder / "train_00000.npy", ids.astype(np.uint16 if model.vocabulary <= 2**16 else np.uint32))


def tokens_needed(options: BenchOptions, model: ModelConfig) -> int:
    """Random tokens for a few of the largest batches."""
    sequences = options.train_batch_size * options.gradient_accum_step * max(options.processes)
    return max(TOKENS, (4 * sequences + 2) * model.seq_length)


def option_mistakes(bench: BenchConfig, explicit: Set[str] = frozenset()) -> list[str]:
    """All that is wrong with the options; `explicit` names those that the command itself gave."""
    options = bench.bench
    numbers = {"--turns": options.turns, "--steps": options.steps, "--train-batch-size": options.train_batch_size}
    numbers["--processes"] = min(options.processes, default=0)
    mistakes = [f"{flag} {value} must be at least 1" for flag, value in numbers.items() if value < 1]
    if not options.runtimes:
        mistakes.append("--runtimes needs a value: torch, xla or both")
    if bench.runtime.profile_steps is not None:
        mistakes.append("--profile-steps has no meaning here; use --breakdown, or profile a run of run_pretrain.py")
    if set(options.runtimes) == {"xla"}:
        given = {*(OF_TORCH & explicit), *(("breakdown",) if options.breakdown else ())}
        given |= {"processes"} if options.processes != (1,) else set()
        mistakes += [
            f"{_flag(name)} is for torch, but --runtimes is xla; add torch, or leave it out" for name in sorted(given)
        ]
    else:
        mistakes += _sharding_mistakes(bench)
    if options.against == "bare":
        mistakes += _bare_mistakes(bench) if "torch" in options.runtimes else []
    else:
        idle = [name for name in ("bare_precisions", "bare_models") if name in explicit]
        mistakes += [f"{_flag(name)} has no meaning without --against bare" for name in idle]
    for runtime, of_runtime in seats(_sound(bench), Path()).items():
        known = explicit if runtime == "torch" else explicit - OF_TORCH
        mistakes += config_mistakes(of_runtime[0].contenders[0].config, known)
    return list(dict.fromkeys(mistakes))


def _sound(bench: BenchConfig) -> BenchConfig:
    """The same, its own numbers put right: what is still wrong with the loops' configurations is so for other reasons."""
    options = bench.bench
    numbers = {name: max(1, getattr(options, name)) for name in ("turns", "steps", "train_batch_size")}
    processes = tuple(max(1, number) for number in options.processes) or (1,)
    return dataclasses.replace(
        bench,
        runtime=dataclasses.replace(bench.runtime, profile_steps=None),
        bench=dataclasses.replace(options, **numbers, processes=processes),
    )


def _sharding_mistakes(bench: BenchConfig) -> list[str]:
    """Why --processes, or some of them, cannot share the work as --sharding says."""
    sharding, most = bench.runtime.sharding, max(bench.bench.processes, default=0)
    if most == 1 and sharding in ("ddp", "fsdp", "hsdp"):
        return [f"--sharding {sharding} has no meaning with one process; add --processes 2, for example"]
    if most < 2 or sharding not in ("none", "hsdp"):
        return []
    runtime = TorchConfig(**vars(bench.runtime))
    return [mistake for number in bench.bench.processes if number > 1 for mistake in sharding_mistakes(runtime, number)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _bare_mistakes(bench: BenchConfig) -> list[str]:
    """What the bare torch loop, a GPT-2 with AdamW and without float8, is not."""
    model = bench.model
    mistakes = []
    if bench.runtime.mixed_precision == "fp8" and "same" in bench.bench.bare_precisions:
        mistakes.append("--against bare: the bare loop has no --mixed-precision fp8; add --bare-precisions bf16")
    unlike = {
        "--position": model.position != "learned",
        "--norm": model.norm != "layernorm",
        "--activation": model.activation != "gelu",
        "--num-kv-heads": model.kv_heads != model.num_heads,
        "--qk-norm": model.qk_norm,
        "--no-tie-weights": not model.tie_weights,
        "--vocab-padding": model.vocab_padding,
        "--optim-type": bench.optim.optim_type != "adamw",
    }
    if flags := ", ".join(flag for flag, other in unlike.items() if other):
        mistakes.append(
            f"--against bare: the bare loop trains GPT-2's architecture with AdamW, which {flags} departs from"
        )
    return mistakes
