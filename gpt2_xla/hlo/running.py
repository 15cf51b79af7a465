"""An exported step, run by jax on whatever device it has. Needs jax, numpy and safetensors; checked on jax 0.7.1 and 0.11.2."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from gpt2_xla.errors import UserError
from gpt2_xla.hlo.folder import ExportedStep
from gpt2_xla.runtime.peaks import gpu_peak, tpu_peak
from gpt2_xla.runtime.tpu_host import tpu_chips, tpu_device_files


@dataclass(frozen=True)
class Measured:
    """What running told."""

    device: str
    losses: list[float]
    step_seconds: float  # median of the steps after the first
    compile_seconds: float
    mfu: float | None  # None: the device's peak is not known, or the matmuls are float32
    program_memory: int  # bytes that the program says it needs: arguments, results and temporaries
    peak_memory: int | None  # bytes that the device says were in use at most; None: it does not tell


def run_step(
    step: ExportedStep, arrays: dict[str, np.ndarray], program: bytes, steps: int, say: Callable[[str], None]
) -> Measured:
    """Run it `steps` times, results feeding arguments. Past the exported steps the changing numbers stay as they were last."""
    _quieten_libtpu()
    import jax

    jax.config.update("jax_enable_x64", True)  # tokens are int64
    try:
        device = jax.devices()[0]
    except (RuntimeError, AssertionError) as error:  # by an assertion where JAX_PLATFORMS names one that is not there
        reason = (str(error).splitlines() or ["none of the kinds that JAX_PLATFORMS names is there"])[0]
        raise UserError(f"jax {jax.__version__} finds no device: {reason}") from error
    say(f"compiling for {device.device_kind} ({device.platform})")
    fed = tuple(number for number, one in enumerate(step.arguments) if one.fed_by is not None)
    values = [jax.device_put(_value(one, arrays, 0), device) for one in step.arguments]
    began = time.perf_counter()
    exported = _exported(step, program, values, device.platform)
    try:
        lowered = jax.jit(exported.call, donate_argnums=fed).lower(*values)
    except (ValueError, RuntimeError) as error:
        raise UserError(f"jax {jax.__version__} cannot read the program ({error}); export it again") from error
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    losses, seconds = [], []
    for number in range(steps):
        began = time.perf_counter()
        results = compiled(*values)
        losses.append(float(results[0][0]))  # waits for the step
        seconds.append(time.perf_counter() - began)
        for place, one in enumerate(step.arguments):
            if one.fed_by is not None:
                values[place] = results[one.fed_by]
            elif one.changes:
                values[place] = jax.device_put(_value(one, arrays, number + 1), device)
    step_seconds = float(np.median(seconds[1:] or seconds))
    return Measured(
        f"{device.device_kind} ({device.platform}, jax {jax.__version__})",
        losses,
        step_seconds,
        compile_seconds,
        _mfu(step, step_seconds, device.device_kind),
        _program_memory(compiled.memory_analysis()),
        (device.memory_stats() or {}).get("peak_bytes_in_use"),
    )


def _quieten_libtpu() -> None:
    """Without a TPU, let jax's look for one say nothing; an installed libtpu asks Google's metadata server, and tells its errors."""
    if not tpu_chips() and not tpu_device_files():
        os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5e-1")  # any will do: what it would ask for
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def _exported(step: ExportedStep, program: bytes, values: list[Any], platform: str) -> Any:
    """The program as what jax.export makes, which jax versions compile by public calls alone.

    Made by hand, since its file format needs flatbuffers. Its fields differ between versions.
    """
    import jax
    from jax import export

    results = [jax.typeof(np.zeros(2, np.float32))] * step.results
    for value, one in zip(values, step.arguments, strict=True):
        if one.fed_by is not None:
            results[one.fed_by] = jax.typeof(value)
    none_each = {"in": (None,) * len(values), "out": (None,) * step.results}
    known = {
        "fun_name": "train_step",
        "in_tree": jax.tree_util.tree_structure((tuple(values), {})),
        "in_avals": tuple(map(jax.typeof, values)),
        "out_tree": jax.tree_util.tree_structure(results),
        "out_avals": tuple(results),
        "nr_devices": 1,
        "platforms": (platform,),
        "ordered_effects": (),
        "unordered_effects": (),
        "disabled_safety_checks": (),
        "mlir_module_serialized": program,
        "calling_convention_version": export.minimum_supported_calling_convention_version,
        "module_kept_var_idx": tuple(range(len(values))),
        "uses_global_constants": False,
    }
    for way, nones in none_each.items():
        known |= {f"{way}_shardings_hlo": nones, f"_{way}_named_shardings": nones}
    return export.Exported(**{field.name: known.get(field.name) for field in fields(export.Exported)})


def _value(argument: Any, arrays: dict[str, np.ndarray], step: int) -> np.ndarray:
    array = arrays[argument.array]
    return array[min(step, len(array) - 1)] if argument.changes else array


def _mfu(step: ExportedStep, seconds: float, kind: str) -> float | None:
    peak = tpu_peak(kind) or gpu_peak(kind)
    return step.flops / seconds / peak if peak and step.mixed_precision == "bf16" else None


def _program_memory(analysis: Any) -> int:
    used = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return used + analysis.temp_size_in_bytes
