"""TPU slices: the names that users rent them by, what the compiler calls them, and what a device of each can do."""

from dataclasses import dataclass, field
from typing import Any

from gpt2_xla.cli import did_you_mean
from gpt2_xla.errors import UserError
from gpt2_xla.runtime.peaks import TPUS

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What PJRT calls one device: a core of a v2 or v3 chip, a whole chip of later ones."""

    kind: str  # PJRT's name
    hbm: float  # bytes that the compiler lets a program use, as it says itself when one does not fit
    hbm_bandwidth: float  # bytes/s, published
    interconnect: float  # bytes/s out of one chip over all its links, published
    devices_per_chip: int = 1
    cores_per_chip: int = 1  # as v2, v3, v4 and v5p slices are named by

    @property
    def peak(self) -> float:
        """bf16 FLOP/s, published."""
        return TPUS[self.kind]


# cloud.google.com/tpu/docs/system-architecture-tpu-vm, a page for each generation; the usable HBM is libtpu 0.0.21's.
DEVICES = {
    "v2": Device("TPU v2", 7.48 * GIB, 700e9 / 2, 4 * 62e9, 2, 2),
    "v3": Device("TPU v3", 15.48 * GIB, 900e9 / 2, 4 * 82e9, 2, 2),
    "v4": Device("TPU v4", 30.75 * GIB, 1228e9, 300e9, 1, 2),
    "v5e": Device("TPU v5 lite", 15.75 * GIB, 819e9, 200e9),
    "v5p": Device("TPU v5", 95.74 * GIB, 2765e9, 600e9, 1, 2),
    "v6e": Device("TPU v6 lite", 31.25 * GIB, 1640e9, 448e9),
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "v6litepod": "v6e", "v6lite": "v6e"}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16", 1024: "32x32"}
CUBES = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}
# Chips that a slice of each generation can have, and their arrangement.
SHAPES: dict[str, dict[int, str]] = {
    "v2": {chips: FLAT[chips] for chips in (4, 16, 64, 128, 256)},
    "v3": {chips: FLAT[chips] for chips in (4, 16, 32, 64, 128, 256, 1024)},
    "v4": CUBES,
    "v5e": {chips: FLAT[chips] for chips in (1, 4, 8, 16, 32, 64, 128, 256)},
    "v5p": CUBES,
    "v6e": {chips: FLAT[chips] for chips in (1, 4, 8, 16, 32, 64, 128, 256)},
}


@dataclass(frozen=True)
class Topology:
    """One slice."""

    name: str  # v5e-8
    device: Device
    chips: int
    compiler_name: str  # v5e:2x4
    options: dict[str, Any] = field(default_factory=dict)  # for get_topology_desc

    @property
    def devices(self) -> int:
        """Devices in the slice: the replicas of a run, or the size of its mesh."""
        return self.chips * self.device.devices_per_chip


def topology(name: str) -> Topology:
    """The slice that a user means. UserError that lists the slices for an unknown one."""
    generation, _, count = name.lower().partition("-")
    generation = ALIASES.get(generation, generation)
    known = known_names()
    if f"{generation}-{count}" not in known:
        raise UserError(f"--tpu {name} is no slice that is known here{did_you_mean(name, known)}; {_listed()}")
    device = DEVICES[generation]
    chips = int(count) // device.cores_per_chip
    options: dict[str, Any] = {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # two cores as one device, as on every v4 VM
    if chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    return Topology(f"{generation}-{count}", device, chips, f"{generation}:{SHAPES[generation][chips]}", options)


def known_names() -> list[str]:
    """All slices, by the names that users rent them by."""
    return [
        f"{generation}-{chips * DEVICES[generation].cores_per_chip}"
        for generation in SHAPES
        for chips in SHAPES[generation]
    ]


def _listed() -> str:
    return "there are " + "; ".join(
        f"{generation}-" + " ".join(str(chips * DEVICES[generation].cores_per_chip) for chips in shapes)
        for generation, shapes in SHAPES.items()
    )
