"""Why a slice cannot run a step, as far as that is known without compiling it."""

from gpt2_xla.errors import UserError
from gpt2_xla.runtime.mesh import mesh_mistakes
from gpt2_xla.runtime.xla_flash import flash_obstacles, flash_sentence
from gpt2_xla.script_config import PlanConfig
from gpt2_xla.tpu_plan.topology import Topology
from gpt2_xla.validation import config_mistakes, replica_mistakes


def division_mistakes(config: PlanConfig, slice: Topology) -> list[str]:
    """Why the step cannot be spread over the slice's devices."""
    if config.runtime.sharding == "none":
        found = replica_mistakes(config, slice.devices)
    else:
        try:
            found = mesh_mistakes(config, config.runtime.mesh, slice.devices, 1)
        except UserError:  # of --mesh itself, which validation.py has told
            return []
    return [mistake for mistake in found if not mistake.startswith("--eval-batch-size")]


def refusals(config: PlanConfig, slice: Topology) -> list[str]:
    """All reasons, a sentence each; none if the step can be compiled."""
    kernel = flash_obstacles(config.model, config.runtime, slice.device.kind)
    asked = config.runtime.attention == "flash"
    return [
        *config_mistakes(config),
        *division_mistakes(config, slice),
        *(flash_sentence(obstacle) for obstacle in kernel if asked),
    ]
