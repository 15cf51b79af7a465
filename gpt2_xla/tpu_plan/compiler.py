"""One program through the TPU compiler, in a process of its own: python -m gpt2_xla.tpu_plan.compiler REQUEST.json

libtpu may abort, take long or hold gigabytes, so the caller starts this file as a process with a time limit. All private
jax calls of the project are here; checked on jax 0.7.1 and libtpu 0.0.21.

The public way, jax.jit(jax.export.Exported(…).call).lower(…).compile(), was tried: it keeps donation and memory statistics, but
compiles for one replica only ("No such compile option: 'num_replicas'"), and needs private calls to read HLO and shardings too.
"""

import gzip
import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gpt2_xla.durable_files import atomic_write
from gpt2_xla.runtime.orphans import die_with

# The compiler looks for a TPU VM's metadata server and hosts unless told that there is none.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v3-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@dataclass(frozen=True)
class Request:
    """What to compile, and where the answers go."""

    program: str  # file: an HloModuleProto
    topology: str  # the compiler's name
    topology_options: dict[str, Any]
    donated: list[int]  # arguments whose memory results may take: parameters and optimizer state, as torch_xla does it
    replicas: int = 1  # copies of the program, each with its own data
    partitions: int = 1  # devices that share one program
    argument_shardings: list[str | None] = field(default_factory=list)  # GSPMD's text for each argument; [] for none
    result_shardings: list[str | None] = field(default_factory=list)
    hlo: str = ""  # file for the scheduled program's text, compressed by gzip
    answer: str = ""  # file for the Answer


@dataclass(frozen=True)
class Answer:
    """What the compiler said of one device's program. Bytes; 0 where `error` is set."""

    error: str = ""
    arguments: int = 0
    results: int = 0
    aliased: int = 0  # results that take an argument's place
    temporaries: int = 0
    code: int = 0
    flops: float = 0.0  # the compiler's count, which takes a loop's body once and a kernel as nothing
    seconds: float = 0.0  # that compiling took
    host_memory: int = 0  # of this machine, at the fullest moment of compiling

    @property
    def peak(self) -> int:
        """HBM in use at the fullest moment."""
        return self.arguments + self.results - self.aliased + self.temporaries + self.code


def compile_request(request: Request) -> Answer:
    """Compile; an Answer with `error` if the compiler refuses."""
    import numpy as np
    from jax._src.lib import xla_client
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        platform="tpu", topology_name=request.topology, **_tuples(request.topology_options)
    )
    count = request.replicas * request.partitions
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = request.replicas, request.partitions
    options.device_assignment = xla_client.DeviceAssignment.create(
        np.arange(count).reshape(request.replicas, request.partitions)
    )
    if request.partitions > 1:
        options.executable_build_options.use_spmd_partitioning = True
    devices = xla_client.DeviceList(tuple(description.devices[:count]))
    try:
        executable = description.devices[0].client.compile(_module(request), devices, options)
    except Exception as error:  # noqa: BLE001 - XLA's error types differ between versions; the text is the answer
        return Answer(error=str(error))
    if request.hlo:
        with atomic_write(Path(request.hlo)) as file:
            file.write(gzip.compress(executable.hlo_modules()[0].to_string().encode(), 3))
    memory = executable.get_compiled_memory_stats()
    return Answer(
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=float(executable.cost_analysis().get("flops", 0.0)),
    )


def _module(request: Request) -> bytes:
    """The program as MLIR bytecode, with donated arguments and shardings."""
    from jax._src.interpreters import mlir
    from jax._src.lib.mlir import ir

    with mlir.make_ir_context():
        module = ir.Module.parse(_stablehlo(Path(request.program).read_bytes()))
        main = next(op for op in module.body.operations if op.name.value == "main")
        main.arg_attrs = ir.ArrayAttr.get(
            [
                _attributes(ir, {"jax.buffer_donor": ir.BoolAttr.get(True)} if i in request.donated else {}, sharding)
                for i, sharding in enumerate(_filled(request.argument_shardings, len(main.type.inputs)))
            ]
        )
        if request.result_shardings:
            main.result_attrs = ir.ArrayAttr.get([_attributes(ir, {}, s) for s in request.result_shardings])
        return mlir.module_to_bytecode(module)


def _stablehlo(program: bytes) -> Any:
    """An HloModuleProto as text of MLIR."""
    from jax._src.lib import xla_client

    return xla_client._xla.mlir.xla_computation_to_mlir_module(xla_client.XlaComputation(program))


def portable_stablehlo(program: bytes) -> bytes:
    """An HloModuleProto as a StableHLO artifact, which later versions of jax read too."""
    from jax._src.interpreters import mlir
    from jax._src.lib import xla_client
    from jax._src.lib.mlir import ir
    from jax._src.lib.mlir.dialects import hlo

    with mlir.make_ir_context():
        module = mlir.module_to_bytecode(ir.Module.parse(_stablehlo(program)))
    version = hlo.get_version_from_compatibility_requirement(hlo.StablehloCompatibilityRequirement.WEEK_12)
    return xla_client._xla.mlir.serialize_portable_artifact(module, version, False)


def _filled(shardings: list[str | None], count: int) -> list[str | None]:
    return shardings or [None] * count


def _attributes(ir: Any, attributes: dict[str, Any], sharding: str | None) -> Any:
    if sharding is not None:
        attributes["mhlo.sharding"] = ir.StringAttr.get(sharding)
    return ir.DictAttr.get(attributes)


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def main() -> None:
    """Compile the request of a file, write the answer to another."""
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    os.environ.update(ENVIRONMENT)
    die_with(os.getppid())
    began = time.monotonic()
    answer = compile_request(request)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    answer = replace(answer, seconds=time.monotonic() - began, host_memory=memory)
    with atomic_write(Path(request.answer)) as file:
        file.write(json.dumps(asdict(answer)).encode())


if __name__ == "__main__":
    main()
