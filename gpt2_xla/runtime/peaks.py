"""Published dense peaks of accelerators, in FLOP/s, from their vendors' datasheets; for MFU."""

import re

# (words in the device's name, bf16 / fp16 tensor-core peak). The first match counts.
GPUS: tuple[tuple[str, float], ...] = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
    ("A10G", 70e12),
    ("L40S", 362e12),
    ("L4", 121e12),
    ("V100", 125e12),  # fp16; it has no bf16 units
    ("T4", 65e12),  # fp16; it has no bf16 units
    ("RTX 4090", 165e12),
    ("RTX 3090", 71e12),
)

# By the names that PJRT gives the devices, and those of tpu_host.CHIPS. A v2 or v3 device is one of a chip's two cores, a
# later one a whole chip.
TPUS: dict[str, float] = {
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def gpu_peak(name: str) -> float | None:
    """The half-precision peak of the GPU that calls itself `name`."""
    return next((peak for part, peak in GPUS if re.search(rf"\b{part}\b", name)), None)


def tpu_peak(kind: str) -> float | None:
    """The bf16 peak of a TPU device of this PJRT kind."""
    return TPUS.get(kind)
