"""What the compiler says of a program that does not fit into HBM."""

import re
from dataclasses import dataclass

LARGEST_BUFFERS = 5
USED = re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm")
BUFFER = re.compile(r"Size: (\S+)\s+(?:Operator: (.*)\s+)?Shape: ([^\s{]+)")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Shortage:
    """Why a program does not fit: bytes, and the largest buffers at the fullest moment."""

    needed: float
    usable: float
    buffers: tuple[str, ...]


def shortage(error: str) -> Shortage | None:
    """What the compiler says of a program that does not fit; None if that is not what it says."""
    found = USED.search(error)
    if found is None:
        return None
    needed, usable = (float(found[i]) * UNITS[found[i + 1]] for i in (1, 3))
    buffers = [
        f"{size} {shape}" + (f" {name[1]}" if (name := re.search(r'op_name="([^"]*)"', operator or "")) else "")
        for size, operator, shape in BUFFER.findall(error)
    ]
    return Shortage(needed, usable, tuple(buffers[:LARGEST_BUFFERS]))
