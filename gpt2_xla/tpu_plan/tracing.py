"""The project's own train step as a program, traced without memory for it: python -m gpt2_xla.tpu_plan.tracing REQUEST.json

The runtimes are those of training, except that weights, optimizer state and batch are placeholders: names and shapes, without
data. That takes a process of its own, since a process can hold one set of XLA devices. Checked on torch_xla 2.9.0.
"""

import hashlib
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gpt2_xla.config import XlaPretrainConfig
from gpt2_xla.runtime.orphans import die_with

# One process stands for one replica, or drives as many virtual devices as the slice has; they never compute anything.
ENVIRONMENT = {
    "PJRT_DEVICE": "CPU",
    "JAX_PLATFORMS": "cpu",
    "XLA_ALWAYS_ALLREDUCE": "1",  # though there is one replica here
    "XLA_IR_DEBUG": "1",  # which line of Python asked for an operation
    "XLA_HLO_DEBUG": "1",
    "JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0",  # a kernel would carry the paths of this machine, and never be the same
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
# What a program says of the files that it came from, in protobuf's text.
ORIGIN = re.compile(r"^ *(?:source_\w+|stack_frame_id): .*\n|^stack_frame_index \{\n(?: .*\n)*\}\n", re.MULTILINE)


@dataclass(frozen=True)
class TraceRequest:
    """What to trace, and where the answers go."""

    config: dict[str, Any]  # of PlanConfig
    devices: int  # in the slice: replicas, or the devices of the mesh
    kind: str  # PJRT's name of a device
    program: str = ""  # file for the HloModuleProto
    answer: str = ""  # file for the Trace


@dataclass(frozen=True)
class Trace:
    """What the program does not say of itself. Shardings are GSPMD's text; [] without partitions."""

    arguments: list[str]  # of parameters, of optimizer state, `batch`; "" for other numbers that the step takes
    argument_shardings: list[str]
    result_shardings: list[str]
    parameters: int  # of the model
    digest: str  # the same for the same program, wherever its source lies and on whichever lines


def trace(request: TraceRequest) -> Trace:
    """Trace the step that `request` describes, and write its program."""
    import torch

    from gpt2_xla import optim
    from gpt2_xla.cli import from_dict
    from gpt2_xla.model import GPT, parameter_count
    from gpt2_xla.tpu_plan.placeholders import REPLICATED, plan_runtime
    from gpt2_xla.tpu_plan.reference_step import make_reference
    from gpt2_xla.train import Run, train_step

    config = from_dict(XlaPretrainConfig, request.config)
    runtime = plan_runtime(config, request.devices, request.kind)
    with torch.device("meta"):
        model = GPT(config.model, config.runtime.loss_chunk, config.runtime.vocab_multiple)
    forward = runtime.place(model)
    if request.config["plan"]["reference"]:
        make_reference(model)
    run = Run(config, runtime, None, model, forward, runtime.build_optimizer(model, config.optim))  # type: ignore[arg-type]
    model.train()
    values = train_step(run, runtime.hold_batch(config))
    results = [values, *model.parameters(), *optim.named_state(model, run.optimizer).values()]
    context = lower(results)
    Path(request.program).write_bytes(context.hlo())
    numbers = {name: context.tensor_parameter_id(tensor) for name, tensor in runtime.held.items()}
    names = {number: name for name, number in numbers.items() if number >= 0}
    count = len(context.device_parameter_id_tensor_mapping())
    shardings = runtime.argument_shardings()
    return Trace(
        arguments=[names.get(number, "") for number in range(count)],
        argument_shardings=[shardings.get(names.get(i, ""), REPLICATED) for i in range(count)] if shardings else [],
        result_shardings=runtime.result_shardings(results),
        parameters=parameter_count(model),
        digest=hashlib.sha256(ORIGIN.sub("", context.hlo_text()).encode()).hexdigest(),
    )


def lower(results: list[Any]) -> Any:
    """The program that computes these tensors, as torch_xla's context of it."""
    import torch_xla

    context = torch_xla._XLAC.lowering.LoweringContext("train_step")
    context.build(results)
    return context


def main() -> None:
    """Trace the request of a file, write the answer to another."""
    request = TraceRequest(**json.loads(Path(sys.argv[1]).read_text()))
    os.environ.update(ENVIRONMENT)
    die_with(os.getppid())
    os.environ["CPU_NUM_DEVICES"] = str(request.devices if request.config["runtime"]["sharding"] == "fsdp" else 1)
    Path(request.answer).write_text(json.dumps(asdict(trace(request))))


if __name__ == "__main__":
    main()
