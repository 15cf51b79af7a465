"""The step traced and trained by torch_xla, in a process of its own: python -m gpt2_xla.hlo.tracing REQUEST.json

The program is that of tpu_plan's tracing: the training runtime with placeholders. Numbers that change with the step, the learning
rate and the dropout seed, are arguments of it; one trace for each step finds their values.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.durable_files import atomic_write
from gpt2_xla.runtime.orphans import die_with

KIND = "cpu"  # PJRT's name of the device: no TPU, so plain attention and a float32 residual stream
BATCH = "batch"


@dataclass(frozen=True)
class TraceRequest:
    """What to trace, and the folder for the answers."""

    config: dict[str, Any]  # of XlaPretrainConfig
    steps: int
    folder: str

    program: str = "program.hlo"  # an HloModuleProto
    arrays: str = "arrays.safetensors"
    answer: str = "trace.json"


@dataclass(frozen=True)
class Trace:
    """The program's arguments by name, where "" is one of the changing numbers, and its results from the second on."""

    arguments: list[str]
    results: list[str]
    parameters: int
    flops_per_token: float
    losses: list[float]


def trace(request: TraceRequest) -> Trace:
    """Write program and arrays; train as many steps with torch_xla."""
    import torch
    from safetensors.numpy import save

    from gpt2_xla.cli import from_dict
    from gpt2_xla.model import build_model, flops_per_token, parameter_count

    config = from_dict(XlaPretrainConfig, request.config)
    folder = Path(request.folder)
    assert config.model.vocab_size is not None  # filled in by the command
    numbers = torch.Generator().manual_seed(config.run.seed)
    shape = (config.data.gradient_accum_step, config.data.train_batch_size, config.model.seq_length + 1)
    batch = torch.randint(config.model.vocab_size, shape, generator=numbers)  # (A, B, T+1)
    model = build_model(config.model, config.runtime.loss_chunk, config.run.seed)
    arrays = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    arrays[BATCH] = batch.numpy()
    traced = [_lowered(config, step) for step in range(request.steps)]
    if any(one.program != traced[0].program for one in traced):
        raise RuntimeError("the step's program is not the same in each step")
    for number, name in enumerate(traced[0].arguments):
        if name == "":
            arrays[f"number.{number}"] = np.stack([one.numbers[number] for one in traced])
        elif name not in arrays:  # the optimizer's state begins with zeros
            arrays[name] = np.zeros(*traced[0].state[name])
    (folder / request.program).write_bytes(traced[0].program)
    (folder / request.arrays).write_bytes(save(arrays))
    return Trace(
        traced[0].arguments,
        traced[0].results,
        parameter_count(model),
        flops_per_token(config.model),
        _losses(config, model, batch, request.steps),
    )


@dataclass(frozen=True)
class _Lowered:
    program: bytes
    arguments: list[str]
    results: list[str]
    state: dict[str, tuple[tuple[int, ...], Any]]  # shape and dtype
    numbers: dict[int, np.ndarray]


def _lowered(config: XlaPretrainConfig, step: int) -> _Lowered:
    """Step `step` as a program."""
    import torch

    from gpt2_xla import optim
    from gpt2_xla.model import GPT
    from gpt2_xla.tpu_plan.placeholders import plan_runtime
    from gpt2_xla.tpu_plan.tracing import lower
    from gpt2_xla.train import Run, train_step

    runtime = plan_runtime(config, 1, KIND)
    with torch.device("meta"):
        model = GPT(config.model, config.runtime.loss_chunk, config.runtime.vocab_multiple)
    forward = runtime.place(model)
    run = Run(config, runtime, None, model, forward, runtime.build_optimizer(model, config.optim))  # type: ignore[arg-type]
    run.step = step
    model.train()
    values = train_step(run, runtime.hold_batch(config))
    state = optim.named_state(model, run.optimizer)
    named: dict[str, torch.Tensor] = {**dict(model.named_parameters()), **state}
    context = lower([values, *named.values()])
    held = {context.tensor_parameter_id(tensor): name for name, tensor in runtime.held.items()}
    given = context.device_parameter_id_tensor_mapping()
    return _Lowered(
        context.hlo(),
        [held.get(number, "") for number in range(len(given))],
        list(named),
        {name: (tuple(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in state.items()},
        {number: value.cpu().numpy() for number, value in given.items() if number not in held},
    )


def _losses(config: XlaPretrainConfig, model: Any, batch: Any, steps: int) -> list[float]:
    """The losses of torch_xla's own training."""
    from gpt2_xla.runtime.stop_signals import StopRequest
    from gpt2_xla.runtime.xla_runtime import XlaRuntime
    from gpt2_xla.train import Run, train_step

    runtime = XlaRuntime(config.runtime, StopRequest())
    forward = runtime.place(model)
    run = Run(config, runtime, None, model, forward, runtime.build_optimizer(model, config.optim))  # type: ignore[arg-type]
    model.train()
    losses = []
    for _ in range(steps):
        values = train_step(run, batch.to(runtime.device))
        runtime.end_step()
        losses.append(runtime.fetch_later(values)()[0])
        run.step += 1
    return losses


def main() -> None:
    """Trace the request of a file, write the answer to another."""
    request = TraceRequest(**json.loads(Path(sys.argv[1]).read_text()))
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES="1", TF_CPP_MIN_LOG_LEVEL="3")
    die_with(os.getppid())
    answer = trace(request)
    with atomic_write(Path(request.folder) / request.answer) as file:
        file.write(json.dumps(asdict(answer)).encode())


if __name__ == "__main__":
    main()
