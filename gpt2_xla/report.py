"""A run folder's metrics.jsonl → a picture of its loss curves."""

import json
from pathlib import Path
from typing import Any

from gpt2_xla.errors import UserError


def read_metrics(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """The records by kind ("train", "valid"), in order of step; of a step that was run twice, the later record.

    Raises `UserError` if the folder has no metrics. A last line cut short by a crash is passed over.
    """
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path} does not exist: is {run_dir} a run folder (a --checkpoints-dir)?")
    by_step: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "valid": {}}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
            by_step[record["kind"]][record["step"]] = record
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return {kind: [records[step] for step in sorted(records)] for kind, records in by_step.items()}


def draw_loss_curve(run_dir: Path) -> Path:
    """Write loss.png into the run folder: training and validation loss by step, learning rate below; return its path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    records = read_metrics(run_dir)
    train, valid = records["train"], records["valid"]
    figure, (upper, lower) = pyplot.subplots(
        2, 1, sharex=True, figsize=(8, 6), height_ratios=[4, 1], layout="constrained"
    )
    upper.plot([r["step"] for r in train], [r["loss"] for r in train], color="#9ecae1", linewidth=1, label="training")
    if valid:
        upper.plot(
            [r["step"] for r in valid],
            [r["loss"] for r in valid],
            color="#08519c",
            marker="o",
            markersize=3,
            label="validation",
        )
    if finite := [r for r in valid if r["loss"] is not None]:  # null is a loss that was not finite
        best = min(finite, key=lambda r: r["loss"])
        upper.annotate(
            f"best {best['loss']:.3f}",
            (best["step"], best["loss"]),
            xytext=(-4, 12),
            textcoords="offset points",
            ha="right",
        )
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(run_dir.name)
    upper.legend(frameon=False)
    upper.grid(alpha=0.3)
    lower.plot([r["step"] for r in train], [r["learning_rate"] for r in train], color="#636363", linewidth=1)
    lower.set_ylabel("learning rate")
    lower.set_xlabel("step")
    lower.grid(alpha=0.3)
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
