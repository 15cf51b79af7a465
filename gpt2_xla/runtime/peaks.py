"""Published dense peaks of accelerators, in FLOP/s, from their vendors' datasheets; for MFU."""

# (substring of the device's name, bf16 / fp16 tensor-core peak). The first match counts.
GPUS: tuple[tuple[str, float], ...] = (
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
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

# Per chip. A v2 or v3 chip is two devices, a v4 or later chip one.
TPUS: dict[str, tuple[float, int]] = {
    "v2": (45e12, 2),
    "v3": (123e12, 2),
    "v4": (275e12, 1),
    "v5e": (197e12, 1),
    "v5p": (459e12, 1),
    "v6e": (918e12, 1),
}


def gpu_peak(name: str) -> float | None:
    """The half-precision peak of the GPU that calls itself `name`."""
    return next((peak for part, peak in GPUS if part in name), None)


def tpu_peak(version: str) -> float | None:
    """The bf16 peak of one device (core or chip) of a TPU version such as `v5e`."""
    if version not in TPUS:
        return None
    peak, devices = TPUS[version]
    return peak / devices
