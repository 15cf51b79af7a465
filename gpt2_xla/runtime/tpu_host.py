"""The TPU chips of this host, read from the PCI bus: no torch_xla is imported, no chip is touched."""

from pathlib import Path

GOOGLE = "0x1ae0"
# The table of torch_xla 2.9 (torch_xla/_internal/tpu.py), with the names that jax gives the same ids.
CHIPS = {
    "0x0027": "TPU v2 or v3",
    "0x0056": "TPU",
    "0x005e": "TPU v4",
    "0x0062": "TPU v5p",
    "0x0063": "TPU v5e",
    "0x006f": "TPU v6e",
    "0x0076": "TPU7x",
}


def tpu_chips(root: Path = Path("/")) -> list[str]:
    """The kind of each TPU chip on the PCI bus; empty on a machine without one."""
    found = []
    for vendor in sorted(root.glob("sys/bus/pci/devices/*/vendor")):
        try:
            device = vendor.with_name("device").read_text().strip()
            if vendor.read_text().strip() == GOOGLE and device in CHIPS:
                found.append(CHIPS[device])
        except OSError:
            continue  # a device that was unplugged meanwhile
    return found


def tpu_device_files(root: Path = Path("/")) -> list[Path]:
    """The files that libtpu opens: /dev/accel0 … up to v4, /dev/vfio/0 … from v5e on."""
    return sorted([*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*")])
