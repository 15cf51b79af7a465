"""Export the step, run it, compare its losses with torch_xla's own: what scripts/run_hlo.py does."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Set
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpt2_xla.child_environment import child_environment
from gpt2_xla.config import (
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    XlaConfig,
    XlaPretrainConfig,
    to_dict,
)
from gpt2_xla.errors import UserError
from gpt2_xla.hlo.folder import Argument, ExportedStep, read_folder, write_folder
from gpt2_xla.model_validation import model_mistakes
from gpt2_xla.script_config import HloConfig, HloOptions

VALUES = 0  # the result that is [loss, gradient norm]


def run_hlo(config: HloConfig, explicit: Set[str], mistakes: list[str]) -> dict[str, Any] | None:
    """Export, run, or both; what running told, None if nothing ran. Raises `UserError` with all mistakes."""
    options = config.step
    mistakes = [*mistakes, *_mistakes(config, explicit)]
    if mistakes:
        raise UserError(mistakes)
    if options.folder is not None:
        return _run(Path(options.folder), options)
    if options.export is not None:
        _export_to(Path(options.export), config)
        return None
    with tempfile.TemporaryDirectory() as folder_name:
        write_folder(Path(folder_name), *export(config))
        return _run(Path(folder_name), options)


def _export_to(folder: Path, config: HloConfig) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before the step is traced, which takes long
    except OSError as error:
        raise UserError(f"--export {folder} cannot be made: {error.strerror}; name a folder that can") from error
    exported = export(config)
    try:
        write_folder(folder, *exported)
    except OSError as error:
        raise UserError(f"--export {folder} cannot be written to: {error.strerror}") from error


def _mistakes(config: HloConfig, explicit: Set[str]) -> list[str]:
    options, mistakes = config.step, []
    for flag, value in (
        ("--steps", options.steps),
        ("--train-batch-size", options.train_batch_size),
        ("--gradient-accum-step", options.gradient_accum_step),
    ):
        if value < 1:
            mistakes.append(f"{flag} {value} must be at least 1")
    runs, exports = options.export is None, options.folder is None
    if not runs and not exports:
        mistakes.append("--export writes a folder and --folder runs one; use one of them at a time")
    if not exports and (others := sorted(explicit - {"folder", "steps", "json", "export"})):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        mistakes.append(
            f"{flags} cannot change the step of --folder {options.folder}; leave out what --export was given"
        )
    if runs and importlib.util.find_spec("jax") is None:
        mistakes.append("jax is not installed, which runs the step; pip install jax, or jax[cuda12] for NVIDIA GPUs")
    if exports:
        mistakes += model_mistakes(config.model)
        missing = [name for name in ("torch_xla", "jax") if importlib.util.find_spec(name) is None]
        if "torch_xla" in missing or (missing and not runs):
            mistakes.append(
                f"{' and '.join(missing)} missing, which exporting the step needs; "
                "pip install -r requirements-xla_tpu.txt -c constraints.txt (--folder runs one that was exported elsewhere)"
            )
    if options.export is not None and Path(options.export).is_file():
        mistakes.append(f"--export {options.export} is a file; name a new folder")
    if options.export is not None and any(Path(options.export).glob("*")):
        mistakes.append(f"--export {options.export} is not empty; name a new folder")
    return mistakes


def export(config: HloConfig) -> tuple[ExportedStep, dict[str, Any], bytes]:
    """Trace the step: what `write_folder` writes. Tracing takes a process of its own for torch_xla, which does not share one with jax."""
    from safetensors.numpy import load

    from gpt2_xla.hlo.tracing import Trace, TraceRequest
    from gpt2_xla.tpu_plan.compiler import portable_stablehlo

    training = training_config(config)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        request = TraceRequest(to_dict(training), config.step.steps, name)
        (work / "request.json").write_text(json.dumps(asdict(request)))
        done = subprocess.run(
            [sys.executable, "-m", "gpt2_xla.hlo.tracing", str(work / "request.json")],
            env=child_environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise UserError(f"the step could not be exported: {last}")
        trace = Trace(**json.loads((work / request.answer).read_text()))
        arrays, program = load((work / request.arrays).read_bytes()), (work / request.program).read_bytes()
    tokens = training.data.train_batch_size * training.data.gradient_accum_step * training.model.seq_length
    results = {name: number for number, name in enumerate(trace.results, start=VALUES + 1)}
    step = ExportedStep(
        description=_description(training),
        mixed_precision=training.runtime.mixed_precision,
        arguments=tuple(
            Argument(name or f"number.{number}", results.get(name), changes=name == "")
            for number, name in enumerate(trace.arguments)
        ),
        results=1 + len(results),
        tokens=tokens,
        flops=trace.flops_per_token * tokens,
        parameters=trace.parameters,
        losses=tuple(trace.losses),
    )
    return step, arrays, portable_stablehlo(program)


def training_config(config: HloConfig) -> XlaPretrainConfig:
    """The run that the step is of: a short one, without warm-up, whose learning rate changes in each step."""
    options = config.step
    # No more rows than tokens need: the vocabulary is the model's own, the data random.
    model: ModelConfig = replace(config.model, vocab_size=config.model.vocab_size or 50257)
    return XlaPretrainConfig(
        model,
        DataConfig(train_batch_size=options.train_batch_size, gradient_accum_step=options.gradient_accum_step),
        OptimConfig(learning_rate=1e-3, min_lr=1e-4, warmup_steps=2),
        RunConfig(train_steps=max(options.steps, 3)),
        LoggingConfig(),
        XlaConfig(mixed_precision=options.mixed_precision),
    )


def _description(config: XlaPretrainConfig) -> str:
    model, data = config.model, config.data
    return (
        f"{model.num_layers} layers, {model.num_heads} heads, C {model.d_model}, T {model.seq_length}, "
        f"V {model.vocab_size}, {data.gradient_accum_step} × {data.train_batch_size} sequences, "
        f"{'bf16 autocast' if config.runtime.mixed_precision == 'bf16' else 'float32'}, AdamW"
    )


def _run(folder: Path, options: HloOptions) -> dict[str, Any]:
    from gpt2_xla.hlo.running import run_step

    step, arrays, program = read_folder(folder)
    measured = run_step(step, arrays, program, options.steps, lambda text: print(text, file=sys.stderr, flush=True))
    compared = list(zip(measured.losses, step.losses, strict=False))
    return {
        "step": step.description,
        **asdict(measured),
        "tokens_per_second": step.tokens / measured.step_seconds,
        "torch_xla_losses": [theirs for _, theirs in compared],
        "largest_difference": max(abs(ours - theirs) for ours, theirs in compared),
    }


def report(found: dict[str, Any]) -> str:
    """What running told, for people."""
    mfu = (
        "unknown (float32, or a device without a published peak here)"
        if found["mfu"] is None
        else f"{found['mfu']:.1%}"
    )
    peak = "not told by the device" if found["peak_memory"] is None else f"{found['peak_memory'] / 2**20:,.1f} MiB"
    pairs = zip(found["losses"], found["torch_xla_losses"], strict=False)
    lines = [
        f"step       {found['step']}",
        f"device     {found['device']}, compiled in {found['compile_seconds']:.1f} s",
        *(
            f"loss {number:<5} {ours:.6f}   torch_xla {theirs:.6f}"
            for number, (ours, theirs) in enumerate(pairs, start=1)
        ),
        f"difference {found['largest_difference']:.1e} at most, over {len(found['torch_xla_losses'])} steps",
        f"step time  {found['step_seconds'] * 1e3:,.1f} ms, {found['tokens_per_second']:,.0f} tokens/s",
        f"MFU        {mfu}",
        f"memory     {found['program_memory'] / 2**20:,.1f} MiB by the program, peak {peak}",
    ]
    return "\n".join(lines)
