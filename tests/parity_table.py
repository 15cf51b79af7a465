"""The same 200 steps on every runtime, as a Markdown table: python tests/parity_table.py

Every row is a command as a user gives it (XLA replicas on the CPU: tests/xla_cpu_replicas.py); losses and counts are those
of its metrics.jsonl, of every step. test_parity.py asserts the same of some rows.
"""

import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from commands import TINY, TRAIN, TRAIN_XLA, data_flags, losses, records, run, torchrun, xla_replicas
from conftest import write_text_data

STEPS = 200
COUNTED = (20, 180)  # between the log lines of these steps nothing is validated or saved
BF16 = ("--mixed-precision", "bf16")
CPU = ("--device", "cpu")


@dataclass(frozen=True)
class Row:
    """A run; `replicas` of them count into one process's counters."""

    name: str
    command: tuple[str, ...]
    flags: tuple[str, ...] = ()
    replicas: int = 1
    environment: dict[str, str] = field(default_factory=dict)


def sharded(mesh: str) -> Row:
    """A run on a mesh of eight devices."""
    flags = ("--sharding", "fsdp", "--mesh", mesh)
    return Row(f"XLA SPMD, {mesh}", TRAIN_XLA, flags, environment={"CPU_NUM_DEVICES": "8"})


FLOAT32 = (
    Row("torch", TRAIN, CPU),
    Row("torchrun, 2 processes", torchrun(2), CPU),
    Row("torchrun, 2 processes, fsdp", torchrun(2), (*CPU, "--sharding", "fsdp")),
    Row("torchrun, 4 processes, hsdp", torchrun(4), (*CPU, "--sharding", "hsdp", "--mesh", "data=2,fsdp=2")),
    Row("XLA, 1 device", TRAIN_XLA),
    Row("XLA, 2 replicas", xla_replicas(2), replicas=2),
    Row("XLA, 4 replicas", xla_replicas(4), replicas=4),
    *map(sharded, ("data=8", "fsdp=8", "fsdp=4,tensor=2")),
)
IN_BF16 = tuple(FLOAT32[row] for row in (0, 2, 4, 5, 8))
ROWS = (*FLOAT32, *(replace(row, name=f"{row.name}, bf16", flags=(*row.flags, *BF16)) for row in IN_BF16))


def cells(row: Row, run_dir: Path, reference: list[float]) -> list[str]:
    """Final loss, largest deviation, compilations; executions and copies to the host a step of one replica."""
    found = [*losses(run_dir), *losses(run_dir, "valid")]
    deviation = max(abs(a - b) for a, b in zip(found, reference, strict=True))
    steps = {record["step"]: record for record in records(run_dir)}
    counts = [f"{found[STEPS - 1]:.6f}", f"{deviation:.1e}", str(steps[STEPS]["compiles"] or "–")]
    if not steps[STEPS]["executions"]:
        return [*counts, "–", "–"]
    first, last = (steps[step] for step in COUNTED)
    between = (COUNTED[1] - COUNTED[0]) * row.replicas
    executions, copies = ((last[name] - first[name]) / between for name in ("executions", "host_copies"))
    fetches = round(copies - 1, 2) + 0.0  # but for the log, which TINY writes in every step; + 0.0 turns -0.0 into 0.0
    return [*counts, f"{executions:.2f}", f"{fetches:.2f}"]


def main() -> None:
    """Run every row and print the table."""
    print("| run | loss of step 200 | largest deviation | compiles | executions / step | fetches / step |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, reference = data_flags(write_text_data(folder / "data")), []
        for number, row in enumerate(ROWS):
            run_dir = folder / str(number)
            flags = [*TINY, *data, "--train-steps", str(STEPS), "--checkpoints-dir", run_dir, *row.flags]
            run(*row.command, *flags, timeout=300, **row.environment)
            reference = reference or [*losses(run_dir), *losses(run_dir, "valid")]
            print(f"| {' | '.join([row.name, *cells(row, run_dir, reference)])} |", flush=True)


if __name__ == "__main__":
    main()
